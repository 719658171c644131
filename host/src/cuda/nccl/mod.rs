//! NCCL, which carries partial sums between hosts: loaded when it is first needed, and its communicators.
//!
//! NCCL waits for other ranks without a bound, on the device and on the host. What is bounded here:
//! - to connect, by a limit of the caller's: a [`Comm`] that does not block is asked again and again whether it is made;
//! - to enqueue, in the same way;
//! - on the device, by [`Comm::leave`] with `abort` from another thread, which ends what is running.
//!
//! Within a rank one thread at a time is inside of NCCL, whichever it is: [`Comm`] has a lock. NCCL's environment variables
//! are the user's: nothing here sets or reads one but [`LIBRARY_VARIABLE`].
//!
//! A communicator that does not block starts a thread in NCCL for each call that is not captured into a graph.

mod comm;
#[cfg(test)]
pub(in crate::cuda) mod fake;

use std::{ffi::c_int, sync::Arc};

use nccl_sys::{Nccl, ncclResult_t, ncclSuccess, ncclUniqueId};

use crate::error::Error;

pub use comm::{Bounds, Comm, Seat};
pub use nccl_sys::LIBRARY_VARIABLE;

/// The first release that captures into graphs what its collectives do there: 2.19.
pub const MIN_VERSION: i32 = 21_900;

/// NCCL, loaded, of a release that can be used.
#[derive(Debug)]
pub struct Library {
    nccl: Nccl,
    version: i32,
}

impl Library {
    /// Loads the library that [`LIBRARY_VARIABLE`] names or, if it is not set, the one that the loader finds.
    ///
    /// # Errors
    /// [`Error::Nccl`]: it is missing, or older than [`MIN_VERSION`].
    pub fn load() -> Result<Arc<Library>, Error> {
        Library::of(Nccl::load().map_err(|error| Error::Nccl(format!("cannot be loaded: {error}")))?)
    }

    /// Takes NCCL as a table of functions.
    ///
    /// # Errors
    /// [`Error::Nccl`]: it is older than [`MIN_VERSION`].
    pub fn of(nccl: Nccl) -> Result<Arc<Library>, Error> {
        let mut version = 0;
        // SAFETY: room for the answer.
        let told = unsafe { (nccl.ncclGetVersion)(&mut version) };
        let library = Library { nccl, version };
        library.check("tell its version", told)?;
        if version < MIN_VERSION {
            let (text, least) = (library.version(), version_text(MIN_VERSION));
            return Err(Error::Nccl(format!("{text} is too old: use {least} or later")));
        }
        Ok(Arc::new(library))
    }

    /// The version: `2.28.9`.
    pub fn version(&self) -> String {
        version_text(self.version)
    }

    /// NCCL's functions.
    pub fn functions(&self) -> &Nccl {
        &self.nccl
    }

    /// Makes a name for a communicator. One rank makes it, and tells the others.
    ///
    /// # Errors
    /// NCCL's.
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut id = ncclUniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: room for the name.
        self.check("make a name for the group", unsafe { (self.nccl.ncclGetUniqueId)(&mut id) })?;
        Ok(UniqueId(id))
    }

    /// An error if `result` is one. `doing` completes "could not".
    ///
    /// # Errors
    /// [`Error::Nccl`].
    pub fn check(&self, doing: &'static str, result: ncclResult_t) -> Result<(), Error> {
        if result == ncclSuccess {
            return Ok(());
        }
        Err(Error::Nccl(format!("could not {doing}: {}", self.nccl.describe(result))))
    }
}

/// A name of a communicator that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct UniqueId(ncclUniqueId);

impl UniqueId {
    /// Its bytes.
    pub const BYTES: usize = nccl_sys::NCCL_UNIQUE_ID_BYTES;

    /// The name as other ranks are told it.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0.internal.map(|byte| byte as u8)
    }

    /// The name that a rank was told.
    ///
    /// # Errors
    /// [`Error::Nccl`]: they are more or fewer bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<UniqueId, Error> {
        let wrong = |_| {
            Error::Nccl(format!("has a name of {} bytes for the group, not of {}", bytes.len(), Self::BYTES))
        };
        let bytes: [u8; Self::BYTES] = bytes.try_into().map_err(wrong)?;
        Ok(UniqueId(ncclUniqueId { internal: bytes.map(|byte| byte as _) }))
    }
}

fn version_text(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_that_is_too_old_is_refused_by_its_version() {
        let old = Library::of(fake::nccl::<21_805>()).unwrap_err();
        assert_eq!(old.to_string(), "NCCL 2.18.5 is too old: use 2.19.0 or later");
        assert_eq!(Library::of(fake::nccl::<22_809>()).unwrap().version(), "2.28.9");
    }

    #[test]
    fn a_name_arrives_as_it_was_made_and_no_other_length_does() {
        let id = Library::of(fake::nccl::<21_900>()).unwrap().unique_id().unwrap();
        let told = UniqueId::from_bytes(&id.to_bytes()).unwrap();
        assert_eq!(told.to_bytes(), id.to_bytes());
        let error = UniqueId::from_bytes(&[0; 7]).unwrap_err().to_string();
        assert_eq!(error, "NCCL has a name of 7 bytes for the group, not of 128");
    }

    #[test]
    fn an_error_has_nccls_words() {
        let library = Library::of(fake::nccl::<21_900>()).unwrap();
        let error = library.check("connect the group", 3).unwrap_err().to_string();
        assert_eq!(error, "NCCL could not connect the group: fake error 3");
    }
}
