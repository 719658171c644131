//! The terminal while a job runs.

use fused_collective::group::rendezvous::Group;

use super::ranks::Error;
use crate::{
    exit::{Failure, Stream},
    report::{
        grid::{self, wrapped},
        progress::Progress,
    },
};

/// The fewest columns that text is fitted to.
const LEAST_WIDTH: u16 = 40;

/// Columns of the terminal that `stream` is, or of the tables if it is none, or one without a size: that is between a
/// launcher such as Open MPI and its ranks, and nobody reads there.
pub(crate) fn width(stream: Stream) -> u16 {
    stream.columns().map_or(grid::WIDTH, |columns| columns.max(LEAST_WIDTH))
}

/// Shows `text` on `stream`. On a terminal, long lines break between words; elsewhere every line stays whole, for `grep`.
pub(crate) fn show(stream: Stream, text: &str) -> Result<(), Failure> {
    match stream.columns() {
        Some(columns) => stream.print(&wrapped(text, columns.max(LEAST_WIDTH).into())),
        None => stream.print(text),
    }
}

/// The text that a job shows while it runs. Rank 0 alone writes it. A reader that goes away fails the job, at the job's end.
pub(crate) struct Screen {
    shows: bool,
    stream: Stream,
    shown: Result<(), Failure>,
}

impl Screen {
    /// A screen on the standard output.
    pub(crate) fn new(group: &Group) -> Self {
        Screen::on(Stream::Output, group)
    }

    /// A screen on `stream`.
    pub(crate) fn on(stream: Stream, group: &Group) -> Self {
        Screen { shows: group.rank() == 0, stream, shown: Ok(()) }
    }

    /// A progress bar over `steps` steps.
    pub(crate) fn progress(&self, steps: u64) -> Progress {
        if self.shows { Progress::new(steps) } else { Progress::hidden() }
    }

    /// Shows `text` above the bar.
    pub(crate) fn show(&mut self, progress: &Progress, text: &str) {
        if self.shows && self.shown.is_ok() {
            self.shown = progress.suspend(|| show(self.stream, text));
        }
    }

    /// Returns the failure to show some text.
    pub(crate) fn shown(self) -> Result<(), Failure> {
        self.shown
    }

    /// Returns an error if some text could not be shown.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.shown {
            Err(Failure::Failed(line) | Failure::Usage(line)) => Err(Error::Failed(line)),
            _ => Ok(()),
        }
    }
}
