//! NCCL as a library: found, of a release that can be used, and the names of communicators.

use std::{ffi::c_int, sync::Arc};

use nccl_sys::{Nccl, ncclResult_t, ncclSuccess, ncclUniqueId};

use crate::error::Error;

/// The first release that captures into graphs what its collectives do there: 2.19.
pub const MIN_VERSION: i32 = 21_900;

/// NCCL, loaded, of a release that can be used.
#[derive(Debug)]
pub struct Library {
    nccl: Nccl,
    version: i32,
}

impl Library {
    /// Loads the library that [`LIBRARY_VARIABLE`](nccl_sys::LIBRARY_VARIABLE) names or, if it is not set, the one that the loader finds.
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

    /// True if its kernels over symmetric windows wait for the kernel ahead of them, which may let them in early. Those of 2.28.0 and
    /// later do not, up to 2.30.7.
    pub fn symmetric_kernels_wait(&self) -> bool {
        !(22_800..23_007).contains(&self.version)
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
pub struct UniqueId(pub(super) ncclUniqueId);

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
