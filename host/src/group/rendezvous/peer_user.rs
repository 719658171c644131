//! The user of the process at the other end of a socket, which the kernel vouches for.
//!
//! rustix's `socket_peercred` asks for the same, but its answer has no room for a process number of 0: the one that the
//! kernel gives where PID namespaces keep the two processes from seeing each other.

use std::{
    ffi::{c_int, c_void},
    io,
    os::fd::{AsFd, AsRawFd as _},
};

/// `SOL_SOCKET` and `SO_PEERCRED` of Linux on x86-64 and aarch64.
const SOL_SOCKET: c_int = 1;
const SO_PEERCRED: c_int = 17;

// SAFETY: `getsockopt` of the C library that `std` is linked with, as POSIX declares it.
unsafe extern "C" {
    fn getsockopt(socket: c_int, level: c_int, option: c_int, value: *mut c_void, length: *mut u32) -> c_int;
}

/// The number of the user whose process connected or listened at the other end, in this process's user namespace.
pub(super) fn peer_user(socket: impl AsFd) -> io::Result<u32> {
    // `struct ucred`: process, user and group.
    let mut credentials = [0_u32; 3];
    let mut length = size_of_val(&credentials) as u32;
    // SAFETY: the descriptor is open while it is borrowed, and the call writes at most `length` bytes to `credentials`, where
    // any bytes are numbers.
    let result = unsafe {
        getsockopt(
            socket.as_fd().as_raw_fd(),
            SOL_SOCKET,
            SO_PEERCRED,
            credentials.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    match result {
        0 if length as usize == size_of_val(&credentials) => Ok(credentials[1]),
        0 => Err(io::Error::from(io::ErrorKind::InvalidData)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn the_other_end_in_this_process_is_this_user_s_and_a_file_has_none() {
        let (one, _other) = UnixStream::pair().expect("a pair");
        assert_eq!(peer_user(&one).expect("a user"), rustix::process::geteuid().as_raw());
        assert!(peer_user(File::open("/dev/null").expect("a file")).is_err());
    }
}
