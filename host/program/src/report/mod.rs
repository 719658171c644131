//! The parts of reports that commands share: the machine, its memory, tables, files and the progress bar.

pub mod grid;
pub mod machine;
pub mod memory;
pub(crate) mod output_file;
pub mod progress;
