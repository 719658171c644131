//! The outcome of a call: its status, and the text of the thread's last error.

use std::{
    any::Any,
    cell::RefCell,
    ffi::{CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use fused_collective::{Error, ErrorKind};

use crate::types::fc_status;

/// The reason that a call failed.
pub(crate) enum Failure {
    /// The library's error.
    Library(Error),
    /// An argument that C gave.
    Argument(String),
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Library(error.into())
    }
}

/// The status of each kind of errors.
fn status(kind: ErrorKind) -> fc_status {
    match kind {
        ErrorKind::Invalid => fc_status::Invalid,
        ErrorKind::Unsupported => fc_status::Unsupported,
        ErrorKind::Unavailable => fc_status::Unavailable,
        ErrorKind::OutOfMemory => fc_status::OutOfMemory,
        ErrorKind::Bootstrap => fc_status::Bootstrap,
        ErrorKind::TimedOut => fc_status::TimedOut,
        ErrorKind::Lost => fc_status::Lost,
        ErrorKind::Aborted => fc_status::Aborted,
        ErrorKind::Mismatch => fc_status::Mismatch,
        // Kinds that the library gains are of the system until they have a status of their own.
        _ => fc_status::System,
    }
}

/// A thread's last error.
#[derive(Default)]
struct Last {
    text: CString,
    rank: Option<u32>,
    peer: Option<u32>,
}

thread_local! {
    static LAST: RefCell<Last> = RefCell::default();
}

/// Runs the body of a function of the ABI. No panic leaves it.
pub(crate) fn call(body: impl FnOnce() -> Result<(), Failure>) -> fc_status {
    // What a panic leaves behind half done is behind locks, whose users are told.
    let (status, text, error) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return fc_status::Ok,
        Ok(Err(Failure::Library(error))) => (status(error.kind()), error.to_string(), Some(error)),
        Ok(Err(Failure::Argument(text))) => (fc_status::Invalid, text, None),
        Err(panic) => (fc_status::Panic, format!("the library panicked: {}", message(&*panic)), None),
    };
    let (rank, peer) = error.map_or((None, None), |error| (error.rank(), error.peer()));
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    // A thread that ends has nobody to read it.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Last { text, rank, peer });
    status
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Returns the text of the last call of this thread that failed, in UTF-8; it is empty if none did. It is valid until the next
/// call of this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn fc_error_text() -> *const c_char {
    LAST.try_with(|last| last.borrow().text.as_ptr()).unwrap_or(c"".as_ptr())
}

/// Returns the rank that reported the error of `fc_error_text`, or -1 where none is known.
#[unsafe(no_mangle)]
pub extern "C" fn fc_error_rank() -> i64 {
    LAST.try_with(|last| last.borrow().rank.map_or(-1, i64::from)).unwrap_or(-1)
}

/// Returns the rank that the error of `fc_error_text` is about (awaited, lost, or out of step), or -1 where none is known.
#[unsafe(no_mangle)]
pub extern "C" fn fc_error_peer() -> i64 {
    LAST.try_with(|last| last.borrow().peer.map_or(-1, i64::from)).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn a_panic_is_a_status_and_a_text() {
        assert_eq!(call(|| panic!("slot {} is taken", 7)), fc_status::Panic);
        // SAFETY: the text is this thread's, and no call comes between.
        let text = unsafe { CStr::from_ptr(fc_error_text()) };
        assert_eq!(text, c"the library panicked: slot 7 is taken");
        assert_eq!((fc_error_rank(), fc_error_peer()), (-1, -1));
    }
}
