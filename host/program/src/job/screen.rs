//! The terminal while a job runs.

use std::io;

use fused_collective::group::rendezvous::Group;

use super::ranks::Error;
use crate::{
    exit::{Failure, print},
    report::{grid, progress::Progress},
};

/// Columns of the terminal, or of the tables if there is no terminal. One without a size is between a launcher such as Open
/// MPI and its ranks, and nobody reads there.
pub(crate) fn width() -> u16 {
    match rustix::termios::tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 => size.ws_col.max(40),
        _ => grid::WIDTH,
    }
}

/// Standard output during a job. Rank 0 alone writes to it. A reader that goes away fails the job, at the job's end.
pub(crate) struct Screen {
    shows: bool,
    shown: Result<(), Failure>,
}

impl Screen {
    pub(crate) fn new(group: &Group) -> Self {
        Screen { shows: group.rank() == 0, shown: Ok(()) }
    }

    /// A progress bar over `steps` steps.
    pub(crate) fn progress(&self, steps: u64) -> Progress {
        if self.shows { Progress::new(steps) } else { Progress::hidden() }
    }

    /// Shows `text` above the bar.
    pub(crate) fn show(&mut self, progress: &Progress, text: &str) {
        if self.shows && self.shown.is_ok() {
            self.shown = progress.suspend(|| print(text));
        }
    }

    /// Returns an error if some text could not be shown.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.shown {
            Err(Failure::Failed(line) | Failure::Usage(line)) => Err(Error::Failed(line)),
            _ => Ok(()),
        }
    }
}
