//! The parts of reports that commands share: the machine, tables, files and the progress bar.

pub mod grid;
pub mod machine;
pub(crate) mod output_file;
pub mod progress;
