//! A progress bar on a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// The time between two draws while nothing happens: the clock shows seconds. Seldom enough not to disturb what is timed.
const TICK: Duration = Duration::from_secs(1);

/// A bar on the standard error, drawn only on a terminal. Dropping it clears it, so that no error is printed over a bar.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar over `steps` steps.
    pub fn new(steps: u64) -> Progress {
        let bar = ProgressBar::new(steps);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {elapsed} {wide_msg}") {
            bar.set_style(style);
        }
        if !bar.is_hidden() {
            bar.enable_steady_tick(TICK);
        }
        Progress { bar }
    }

    /// A bar that is never drawn, for ranks that show nothing.
    pub fn hidden() -> Progress {
        Progress { bar: ProgressBar::hidden() }
    }

    /// Shows the work at hand.
    pub fn doing(&self, what: impl Into<std::borrow::Cow<'static, str>>) {
        self.bar.set_message(what);
    }

    /// Counts one step.
    pub fn step(&self) {
        self.advance(1);
    }

    /// Counts `steps` steps.
    pub fn advance(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// Steps counted so far.
    pub fn steps(&self) -> u64 {
        self.bar.position()
    }

    /// Hides the bar while `print` writes to the terminal.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_counted_and_prints_go_through() {
        let progress = Progress::new(2);
        progress.doing("first");
        progress.step();
        assert_eq!(progress.steps(), 1);
        assert_eq!(progress.suspend(|| 7), 7);
    }
}
