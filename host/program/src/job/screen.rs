//! The terminal while a job runs.

use std::io;

use fused_collective::group::rendezvous::Group;

use crate::{
    exit::{Failure, print},
    report::{progress::Progress, table},
};

use super::ranks::Error;

/// Columns of the terminal, or of the tables where there is none.
pub(crate) fn width() -> u16 {
    rustix::termios::tcgetwinsize(io::stdout()).map_or(table::WIDTH, |size| size.ws_col.max(40))
}

/// What the user sees while a job runs: rank 0's lines. A reader who goes away fails the job, at its end.
pub(crate) struct Screen {
    shows: bool,
    shown: Result<(), Failure>,
}

impl Screen {
    pub(crate) fn new(group: &Group) -> Self {
        Screen { shows: group.rank() == 0, shown: Ok(()) }
    }

    /// A progress bar over so many steps.
    pub(crate) fn progress(&self, steps: u64) -> Progress {
        if self.shows { Progress::new(steps) } else { Progress::hidden() }
    }

    /// Shows `text` above the bar.
    pub(crate) fn show(&mut self, progress: &Progress, text: &str) {
        if self.shows && self.shown.is_ok() {
            self.shown = progress.suspend(|| print(text));
        }
    }

    /// Whether everything could be shown.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.shown {
            Err(Failure::Failed(line) | Failure::Usage(line)) => Err(Error::Failed(line)),
            _ => Ok(()),
        }
    }
}
