//! The arguments of the program as a report shows them.

use std::env;

/// This process's arguments. They are text, or they were refused; the program's own path need not be.
pub(super) fn arguments() -> Vec<String> {
    env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect()
}
