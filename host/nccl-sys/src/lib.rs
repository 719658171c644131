//! NCCL's C API, as far as an all-reduce and an all-gather need it, loaded at run time.
//!
//! A program that uses this crate builds and starts without NCCL; [`Nccl::load`] finds the library or says where it
//! looked. Names, types and values are those of `nccl.h`, the same since NCCL 2.18, and since 2.27 for [`Windows`]; what
//! they mean is in NCCL's documentation.
//!
//! [`Nccl`] is a table of functions. [`Nccl::of`] makes one of any functions of these types, for tests.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, reason = "the names of the C API")]

use std::{
    env,
    ffi::{CStr, OsString, c_char, c_int, c_uint, c_void},
    fmt, mem,
    ops::Deref,
    ptr,
};

use libloading::Library;

/// Names the library's file, where the loader does not find it by itself.
pub const LIBRARY_VARIABLE: &str = "NCCL_LIBRARY";
/// The name that the loader is asked for.
pub const LIBRARY_NAME: &str = "libnccl.so.2";

/// One rank's end of a communicator.
pub type ncclComm_t = *mut c_void;
/// A CUDA stream: `cudaStream_t`, which is the driver's `CUstream`.
pub type cudaStream_t = *mut c_void;
/// The result of a call: 0 is success.
pub type ncclResult_t = c_int;
/// An element type.
pub type ncclDataType_t = c_int;
/// A reduction.
pub type ncclRedOp_t = c_int;

/// A symmetric window: memory that each rank has registered, and that all ranks reach.
pub type ncclWindow_t = *mut c_void;

/// Flag of [`Windows::ncclCommWindowRegister`]: collectives may use kernels for symmetric memory.
pub const NCCL_WIN_COLL_SYMMETRIC: c_int = 1;
/// [`ncclResult_t`]: success.
pub const ncclSuccess: ncclResult_t = 0;
/// [`ncclResult_t`]: a communicator that does not block has not come to the end of what it was asked.
pub const ncclInProgress: ncclResult_t = 7;
/// [`ncclDataType_t`]: a byte.
pub const ncclUint8: ncclDataType_t = 1;
/// [`ncclDataType_t`]: IEEE half precision.
pub const ncclFloat16: ncclDataType_t = 6;
/// [`ncclDataType_t`]: IEEE single precision.
pub const ncclFloat32: ncclDataType_t = 7;
/// [`ncclDataType_t`]: bfloat16.
pub const ncclBfloat16: ncclDataType_t = 9;
/// [`ncclRedOp_t`]: the sum.
pub const ncclSum: ncclRedOp_t = 0;

/// Bytes of a [`ncclUniqueId`].
pub const NCCL_UNIQUE_ID_BYTES: usize = 128;

/// Names a communicator that is to be made: rank 0 makes it, and all ranks are told.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ncclUniqueId {
    /// Opaque.
    pub internal: [c_char; NCCL_UNIQUE_ID_BYTES],
}

/// The value of a field of [`ncclConfig_t`] that NCCL chooses.
pub const NCCL_CONFIG_UNDEF_INT: c_int = c_int::MIN;

/// The settings of a communicator, as NCCL 2.18 has them. Later releases have more fields, and take this one by its size and
/// version.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ncclConfig_t {
    /// Bytes of this struct.
    pub size: usize,
    /// Tells a config from anything else.
    pub magic: c_uint,
    /// The release that has these fields.
    pub version: c_uint,
    /// 1: calls return when they are done. 0: they return at once, and `ncclCommGetAsyncError` tells of the end.
    pub blocking: c_int,
    /// NCCL's choice.
    pub cgaClusterSize: c_int,
    /// NCCL's choice.
    pub minCTAs: c_int,
    /// NCCL's choice.
    pub maxCTAs: c_int,
    /// Null: NCCL's choice.
    pub netName: *const c_char,
    /// NCCL's choice.
    pub splitShare: c_int,
    /// Keeps the struct free of padding.
    pub reserved: c_int,
}

impl ncclConfig_t {
    /// The settings of a communicator that blocks, or that does not.
    pub const fn new(blocking: bool) -> ncclConfig_t {
        ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: blocking as c_int,
            cgaClusterSize: NCCL_CONFIG_UNDEF_INT,
            minCTAs: NCCL_CONFIG_UNDEF_INT,
            maxCTAs: NCCL_CONFIG_UNDEF_INT,
            netName: ptr::null(),
            splitShare: NCCL_CONFIG_UNDEF_INT,
            reserved: NCCL_CONFIG_UNDEF_INT,
        }
    }
}

/// Why there is no NCCL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotFound {
    /// The place that was looked in, and what came of it.
    pub looked: String,
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "NCCL was not found ({}): install it, or set LD_LIBRARY_PATH to its folder or {LIBRARY_VARIABLE} to its \
             file (Python's package has it in site-packages/nvidia/nccl/lib)",
            self.looked
        )
    }
}

impl std::error::Error for NotFound {}

macro_rules! functions {
    (
        $(#[$about:meta])* pub struct $api:ident;
        $($(#[$attribute:meta])* fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*
    ) => {
        $(#[$about])*
        #[derive(Debug)]
        pub struct $api {
            $($(#[$attribute])* pub $name: unsafe extern "C" fn($($argument: $type),*) -> $result,)*
        }

        impl $api {
            fn bind(library: &Library) -> Result<$api, libloading::Error> {
                // SAFETY: the library's function of this name has this type.
                Ok($api { $($name: unsafe { *library.get(stringify!($name))? },)* })
            }
        }
    };
}

functions! {
    /// The functions of every release. They are fields, to be called as C functions are: unsafely.
    pub struct Functions;
    /// Writes the version: 22809 is 2.28.9.
    fn ncclGetVersion(version: *mut c_int) -> ncclResult_t;
    /// Describes a result.
    fn ncclGetErrorString(result: ncclResult_t) -> *const c_char;
    /// Makes a name for a communicator.
    fn ncclGetUniqueId(id: *mut ncclUniqueId) -> ncclResult_t;
    /// Joins the communicator, on the current device. It is made when all ranks have.
    fn ncclCommInitRankConfig(
        comm: *mut ncclComm_t,
        ranks: c_int,
        id: ncclUniqueId,
        rank: c_int,
        config: *mut ncclConfig_t
    ) -> ncclResult_t;
    /// Tells of an error since the last call.
    fn ncclCommGetAsyncError(comm: ncclComm_t, error: *mut ncclResult_t) -> ncclResult_t;
    /// Leaves the communicator, when what was enqueued is done.
    fn ncclCommDestroy(comm: ncclComm_t) -> ncclResult_t;
    /// Leaves the communicator at once, and ends what is running.
    fn ncclCommAbort(comm: ncclComm_t) -> ncclResult_t;
    /// Enqueues an all-gather of `count` elements of each rank.
    fn ncclAllGather(
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data_type: ncclDataType_t,
        comm: ncclComm_t,
        stream: cudaStream_t
    ) -> ncclResult_t;
    /// Enqueues an all-reduce of `count` elements.
    fn ncclAllReduce(
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data_type: ncclDataType_t,
        operation: ncclRedOp_t,
        comm: ncclComm_t,
        stream: cudaStream_t
    ) -> ncclResult_t;
}

functions! {
    /// The functions of symmetric windows, in NCCL 2.27 and later.
    pub struct Windows;

    /// Allocates memory that can be registered, on the current device.
    fn ncclMemAlloc(memory: *mut *mut c_void, bytes: usize) -> ncclResult_t;
    /// Frees memory of `ncclMemAlloc`.
    fn ncclMemFree(memory: *mut c_void) -> ncclResult_t;
    /// Registers a window on all ranks, each with as many bytes of its own. The window is null where the group has no use
    /// for it.
    fn ncclCommWindowRegister(
        comm: ncclComm_t,
        memory: *mut c_void,
        bytes: usize,
        window: *mut ncclWindow_t,
        flags: c_int
    ) -> ncclResult_t;
    /// Ends a window.
    fn ncclCommWindowDeregister(comm: ncclComm_t, window: ncclWindow_t) -> ncclResult_t;
}

/// The library, loaded. It stays so until the process ends: NCCL has threads of its own, which may outlive every communicator.
#[derive(Debug)]
pub struct Nccl {
    functions: Functions,
    /// The functions of symmetric windows; `None` in a release before 2.27.
    pub windows: Option<Windows>,
}

// Whatever unloads the library would take their code from these threads.
const _: () = assert!(!mem::needs_drop::<Nccl>());

impl Deref for Nccl {
    type Target = Functions;

    fn deref(&self) -> &Functions {
        &self.functions
    }
}

impl Nccl {
    /// Loads the library that [`LIBRARY_VARIABLE`] names or, if it is not set, the one that the loader finds as
    /// [`LIBRARY_NAME`].
    ///
    /// # Errors
    /// It is not there, or lacks a function.
    pub fn load() -> Result<Nccl, NotFound> {
        Self::load_from(env::var_os(LIBRARY_VARIABLE))
    }

    /// NCCL as these functions, which keep what `nccl.h` says of those of their names: for tests.
    pub const fn of(functions: Functions, windows: Option<Windows>) -> Nccl {
        Nccl { functions, windows }
    }

    fn bind(library: Library) -> Result<Nccl, libloading::Error> {
        let functions = Functions::bind(&library)?;
        let windows = Windows::bind(&library).ok();
        mem::forget(library);
        Ok(Nccl { functions, windows })
    }

    fn load_from(named: Option<OsString>) -> Result<Nccl, NotFound> {
        let file = named.unwrap_or_else(|| LIBRARY_NAME.into());
        // SAFETY: NCCL's initialization does nothing that this process must be prepared for.
        let library = unsafe { Library::new(&file) };
        library
            .and_then(Self::bind)
            .map_err(|error| NotFound { looked: format!("{}: {}", file.display(), reason(&error)) })
    }

    /// NCCL's words for a result.
    pub fn describe(&self, result: ncclResult_t) -> String {
        // SAFETY: any number may be asked about; the answer is a constant string.
        let text = unsafe { (self.ncclGetErrorString)(result) };
        if text.is_null() {
            return format!("NCCL error {result}");
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// The loader's words: the cause of the error.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |cause| cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_named_with_what_to_set() {
        let error = Nccl::load_from(Some("/nowhere/libnccl.so.2".into())).unwrap_err().to_string();
        assert!(error.contains("/nowhere/libnccl.so.2"), "{error}");
        assert!(error.contains("LD_LIBRARY_PATH") && error.contains("NCCL_LIBRARY"), "{error}");
    }

    #[test]
    fn a_config_is_laid_out_as_in_nccl_h() {
        assert_eq!(size_of::<ncclConfig_t>(), 48);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, netName), 32);
        assert_eq!([true, false].map(|blocking| ncclConfig_t::new(blocking).blocking), [1, 0]);
    }

    #[test]
    fn a_library_without_symmetric_windows_has_none() {
        // SAFETY: the C library is loaded already.
        let library = unsafe { Library::new("libc.so.6") }.unwrap();
        assert!(Windows::bind(&library).is_err());
    }

    #[test]
    fn a_library_without_the_functions_is_refused() {
        // The C library is there on every machine, and is not NCCL.
        let error = Nccl::load_from(Some("libc.so.6".into())).unwrap_err();
        assert!(error.looked.contains("nccl"), "{error}");
    }
}
