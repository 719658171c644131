//! The interface by which ranks meet, and what a user's own implementation gives.

use std::{
    any::Any,
    fmt,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use super::loss::Lost;

/// A failure of a bootstrap, of the implementation's own type.
pub type BootstrapError = Box<dyn std::error::Error + Send + Sync>;

/// The means by which ranks exchange small messages while they make a communicator.
///
/// All ranks make the same calls in the same order. Nothing of it is used by operations.
pub trait Bootstrap {
    /// This rank, from 0.
    fn rank(&self) -> u32;

    /// Ranks in the group, at most [`MAX_WORLD_SIZE`](fused_collective_core::MAX_WORLD_SIZE) on each host.
    fn world_size(&self) -> u32;

    /// Gives every rank the bytes of every rank, by rank. Ranks may contribute different lengths, of some kilobytes.
    ///
    /// # Errors
    /// The implementation's: a rank did not come within its deadline, for instance.
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError>;

    /// Names this rank's host: ranks reach each other's memory if they give the same bytes.
    ///
    /// As provided, the name is the kernel's boot identity, which containers of one machine share.
    ///
    /// # Errors
    /// The host cannot be named.
    fn host(&self) -> Result<Vec<u8>, BootstrapError> {
        this_host()
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// The implementation's.
    fn barrier(&self) -> Result<(), BootstrapError> {
        self.all_gather(&[]).map(drop)
    }

    /// Gives every rank a descriptor of rank 0's open file; the others give `None`.
    ///
    /// As provided, ranks open it under `/proc`, which asks for one user and one PID namespace.
    ///
    /// # Errors
    /// The file cannot be opened; those of [`all_gather`](Self::all_gather).
    fn share_file(&self, file: Option<BorrowedFd<'_>>) -> Result<OwnedFd, BootstrapError> {
        share_by_path(self, file)
    }

    /// The means to notice lost ranks, where the bootstrap has them.
    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        None
    }
}

/// A watch that notices a lost rank while operations run, and tells the others when this one gives up.
pub trait Monitor: fmt::Debug + Send + Sync {
    /// The rank that was lost first, if one was. Asked inside of waits: an atomic load, as long as none was.
    fn lost(&self) -> Option<Lost>;

    /// Tells all ranks that this one gives up, and why. Does nothing once a rank was lost.
    fn abort(&self, reason: &str);

    /// Has `act` called from another thread as soon as a rank is lost, until the returned value is dropped. `act` is
    /// short.
    fn on_loss(&self, act: Box<dyn Fn() + Send>) -> Box<dyn Any + Send>;
}

/// The name of this host, as [`Bootstrap::host`] is provided.
pub(super) fn this_host() -> Result<Vec<u8>, BootstrapError> {
    Ok(std::fs::read("/proc/sys/kernel/random/boot_id")?)
}

/// An error of [`Bootstrap::share_file`] as it is provided.
#[derive(Debug)]
struct NotShared(String);

impl fmt::Display for NotShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank 0's shared memory cannot be opened here: {}", self.0)
    }
}

impl std::error::Error for NotShared {}

pub(super) fn share_by_path<B: Bootstrap + ?Sized>(
    bootstrap: &B,
    file: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, BootstrapError> {
    let not_shared = |error: &dyn fmt::Display| NotShared(error.to_string());
    let identity = |file: BorrowedFd<'_>| {
        let status = rustix::fs::fstat(file).map_err(|error| not_shared(&error))?;
        Ok::<_, NotShared>(format!("{} {}", status.st_dev, status.st_ino))
    };
    let own = match file {
        Some(file) => {
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            format!("{path}\n{}", identity(file)?)
        }
        None => String::new(),
    };
    let all = bootstrap.all_gather(own.as_bytes())?;
    let open = || {
        let of_rank_0 = all.first().and_then(|bytes| str::from_utf8(bytes).ok());
        let (path, expected) = of_rank_0
            .and_then(|text| text.split_once('\n'))
            .ok_or_else(|| NotShared("rank 0 shared none".to_owned()))?;
        let opened = match file {
            Some(file) => file.try_clone_to_owned(),
            None => std::fs::File::options().read(true).write(true).open(path).map(OwnedFd::from),
        };
        let opened = opened.map_err(|error| not_shared(&format_args!("{path}: {error}")))?;
        // Under another PID namespace the path names another process's file.
        if identity(opened.as_fd())? != expected {
            return Err(NotShared(format!("{path} is another file: the ranks' PID namespaces differ")));
        }
        Ok(opened)
    };
    let opened = open();
    // Rank 0 keeps the file open until all have opened it.
    bootstrap.barrier()?;
    Ok(opened?)
}
