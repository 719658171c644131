//! The CUDA driver's API as a table of functions, found in `libcuda.so.1` when first needed.
//!
//! Nothing is linked with the driver: this crate builds without a CUDA toolkit, defines no symbol of the driver, and a
//! program that uses it starts on a machine without one. [`load`] finds the table; a missing or too old driver is an
//! [`Error::NoDriver`].
//!
//! Results are numbers, never an enum of bindings: later drivers have results that an enum would not.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr::null_mut,
    sync::OnceLock,
};

use super::dynamic_library::DynamicLibrary;
use crate::error::Error;

/// The driver's name for the loader.
const LIBRARY: &CStr = c"libcuda.so.1";
/// `CUDA_SUCCESS`.
const SUCCESS: u32 = 0;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: u32 = 600;

/// `CUresult`.
pub type Code = u32;
/// `CUdeviceptr`.
pub type DevicePointer = u64;
/// `CUcontext`, `CUmodule`, `CUstream`, `CUfunction`, `CUgraph` or `CUgraphExec`.
pub type Handle = *mut c_void;

macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $type:ty),*);)*) => {
        /// Functions of the driver, named and typed as in `cuda.h`, and called as C functions are: unsafely. Results go
        /// to [`check`].
        #[allow(non_snake_case, reason = "the driver's names")]
        #[allow(missing_docs, reason = "NVIDIA documents them")]
        #[non_exhaustive]
        #[derive(Debug)]
        pub struct Functions {
            $(pub $name: unsafe extern "C" fn($($argument: $type),*) -> Code,)*
            /// Launches with attributes, in drivers of CUDA 12 and later.
            pub launcher: Option<Launcher>,
            libcuda: DynamicLibrary,
        }

        #[allow(non_snake_case, reason = "the driver's names")]
        impl Functions {
            fn find(library: DynamicLibrary) -> Result<Self, String> {
                $(
                    let address = library.symbol(stringify!($name)).ok_or_else(|| {
                        let library = LIBRARY.to_string_lossy();
                        format!("{library} has no {}: it is older than CUDA 11.4", stringify!($name))
                    })?;
                    // SAFETY: `cuda.h` declares the function of this name with this type.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument: $type),*) -> Code>(address)
                    };
                )*
                let launcher = Launcher::find(&library);
                Ok(Functions { $($name,)* launcher, libcuda: library })
            }
        }
    };
}

functions! {
    fn cuInit(flags: c_uint);
    fn cuGetErrorString(code: Code, text: *mut *const c_char);
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int);
    fn cuDeviceGetCount(count: *mut c_int);
    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int);
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int);
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int);
    fn cuDevicePrimaryCtxRelease_v2(device: c_int);
    fn cuCtxGetCurrent(context: *mut Handle);
    fn cuCtxPushCurrent_v2(context: Handle);
    fn cuCtxPopCurrent_v2(context: *mut Handle);
    fn cuCtxEnablePeerAccess(peer: Handle, flags: c_uint);
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int);
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int);
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    fn cuMemAlloc_v2(address: *mut DevicePointer, bytes: usize);
    fn cuMemFree_v2(address: DevicePointer);
    fn cuMemsetD8Async(address: DevicePointer, value: u8, bytes: usize, stream: Handle);
    fn cuMemsetD32_v2(address: DevicePointer, value: c_uint, words: usize);
    fn cuMemsetD32Async(address: DevicePointer, value: c_uint, words: usize, stream: Handle);
    fn cuMemcpyHtoD_v2(to: DevicePointer, from: *const c_void, bytes: usize);
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: DevicePointer, bytes: usize);
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: DevicePointer, bytes: usize, stream: Handle);
    fn cuMemcpyDtoDAsync_v2(to: DevicePointer, from: DevicePointer, bytes: usize, stream: Handle);
    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint);
    fn cuMemHostGetDevicePointer_v2(device: *mut DevicePointer, host: *mut c_void, flags: c_uint);
    fn cuMemFreeHost(address: *mut c_void);
    fn cuIpcGetMemHandle(handle: *mut IpcHandle, address: DevicePointer);
    fn cuIpcOpenMemHandle_v2(address: *mut DevicePointer, handle: IpcHandle, flags: c_uint);
    fn cuIpcCloseMemHandle(address: DevicePointer);
    fn cuModuleLoadData(module: *mut Handle, image: *const c_void);
    fn cuModuleUnload(module: Handle);
    fn cuModuleGetGlobal_v2(address: *mut DevicePointer, bytes: *mut usize, module: Handle, name: *const c_char);
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char);
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: Handle);
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: *mut c_int, function: Handle, threads: c_int, shared: usize);
    fn cuLaunchKernel(function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: Handle, parameters: *mut *mut c_void, extra: *mut *mut c_void);
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint);
    fn cuStreamDestroy_v2(stream: Handle);
    fn cuStreamSynchronize(stream: Handle);
    fn cuStreamQuery(stream: Handle);
    fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint);
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint);
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle);
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64);
    fn cuGraphLaunch(executable: Handle, stream: Handle);
    fn cuGraphExecDestroy(executable: Handle);
    fn cuGraphDestroy(graph: Handle);
}

/// `CUipcMemHandle`: a name of an allocation for other processes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IpcHandle(/** Opaque bytes, which may be sent to other processes of the host. */ pub [u8; 64]);

/// `CUlaunchAttribute`: a number, and 64 bytes of which attributes use some.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LaunchAttribute {
    /// `CUlaunchAttributeID`.
    pub id: c_uint,
    /// Unused.
    pub padding: c_uint,
    /// The attribute's value, in its first words.
    pub value: [c_uint; 16],
}

impl LaunchAttribute {
    /// Makes `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`: clusters of `blocks` blocks.
    pub fn cluster(blocks: u32) -> Self {
        let mut value = [0; 16];
        value[..3].copy_from_slice(&[blocks, 1, 1]);
        LaunchAttribute { id: 4, padding: 0, value }
    }

    /// Makes `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the kernel may start before the one ahead of it is
    /// complete.
    pub fn programmatic_dependent() -> Self {
        let mut value = [0; 16];
        value[0] = 1;
        LaunchAttribute { id: 6, padding: 0, value }
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    /// Blocks of the grid.
    pub grid: [c_uint; 3],
    /// Threads of a block.
    pub block: [c_uint; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: c_uint,
    /// The stream.
    pub stream: Handle,
    /// The first of the attributes.
    pub attributes: *const LaunchAttribute,
    /// Attributes.
    pub attribute_count: c_uint,
}

/// Functions of CUDA 12, which launch kernels with attributes.
#[derive(Clone, Copy, Debug)]
pub struct Launcher {
    /// `cuLaunchKernelEx`.
    pub launch: LaunchKernelEx,
    /// `cuOccupancyMaxActiveClusters`.
    pub max_active_clusters: MaxActiveClusters,
}

/// The type of `cuLaunchKernelEx`.
pub type LaunchKernelEx =
    unsafe extern "C" fn(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void) -> Code;
/// The type of `cuOccupancyMaxActiveClusters`.
pub type MaxActiveClusters = unsafe extern "C" fn(*mut c_int, Handle, *const LaunchConfig) -> Code;

/// The type of `cuGetProcAddress`.
type GetProcAddress = unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64) -> Code;

impl Launcher {
    /// Finds the functions; `None` in a driver older than CUDA 12.
    fn find(library: &DynamicLibrary) -> Option<Launcher> {
        let get = library.symbol("cuGetProcAddress")?;
        // SAFETY: `cuda.h` of CUDA 11.3 and later declares the function with this type.
        let get = unsafe { std::mem::transmute::<*mut c_void, GetProcAddress>(get) };
        let find = |name: &CStr| {
            let mut function = null_mut();
            // SAFETY: the name is a C string, and `function` has room for an address.
            let code = unsafe { get(name.as_ptr(), &mut function, 12_000, 0) };
            (code == SUCCESS && !function.is_null()).then_some(function)
        };
        let (launch, clusters) = (find(c"cuLaunchKernelEx")?, find(c"cuOccupancyMaxActiveClusters")?);
        // SAFETY: the driver returned these addresses for the functions of these names as CUDA 12.0 declares them.
        unsafe {
            Some(Launcher {
                launch: std::mem::transmute::<*mut c_void, LaunchKernelEx>(launch),
                max_active_clusters: std::mem::transmute::<*mut c_void, MaxActiveClusters>(clusters),
            })
        }
    }
}

impl Functions {
    /// The address of the driver's function `name`, for bindings of other crates; `None` if the driver has none.
    pub fn address(&self, name: &str) -> Option<*mut c_void> {
        self.libcuda.symbol(name)
    }
}

/// Finds the driver and initializes it, the first time; later calls return the first result.
///
/// # Errors
/// [`Error::NoDriver`]: there is no driver, it is older than CUDA 11.4, or it finds no GPU.
pub fn load() -> Result<&'static Functions, Error> {
    static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
    let loaded = FUNCTIONS.get_or_init(|| {
        // SAFETY: loading the driver runs its initializers, which ask nothing of the process.
        let library = unsafe { DynamicLibrary::load(LIBRARY) }?;
        let functions = Functions::find(library)?;
        // SAFETY: `cuInit` takes a number, and 0 is the only one that is defined.
        match unsafe { (functions.cuInit)(0) } {
            SUCCESS => Ok(functions),
            code => Err(functions.describe(code)),
        }
    });
    loaded.as_ref().map_err(|why| Error::NoDriver(why.clone()))
}

/// Makes an error of `code` unless it is `CUDA_SUCCESS`. `doing` completes "could not".
///
/// # Errors
/// [`Error::Driver`].
pub fn check(doing: &'static str, code: Code) -> Result<(), Error> {
    if code == SUCCESS { Ok(()) } else { Err(Error::Driver { doing, code, what: describe(code) }) }
}

/// Tells a query's `CUDA_SUCCESS` (true) from its `CUDA_ERROR_NOT_READY` (false).
///
/// # Errors
/// [`Error::Driver`] for any other code.
pub fn is_ready(doing: &'static str, code: Code) -> Result<bool, Error> {
    if code == NOT_READY { Ok(false) } else { check(doing, code).map(|()| true) }
}

/// The driver's words for a result.
fn describe(code: Code) -> String {
    load().map_or_else(|_| format!("CUDA error {code}"), |driver| driver.describe(code))
}

impl Functions {
    fn describe(&self, code: Code) -> String {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: any number may be asked about, and `text` has room for an address.
        if unsafe { (self.cuGetErrorString)(code, &mut text) } != SUCCESS || text.is_null() {
            return format!("CUDA error {code}");
        }
        // SAFETY: the driver returned a constant C string.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        format!("{text} (CUDA error {code})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launch_structs_are_laid_out_as_in_cuda_h() {
        assert_eq!(size_of::<LaunchAttribute>(), 72);
        assert_eq!(std::mem::offset_of!(LaunchAttribute, value), 8);
        assert_eq!(size_of::<LaunchConfig>(), 56);
        assert_eq!(std::mem::offset_of!(LaunchConfig, stream), 32);
        assert_eq!(std::mem::offset_of!(LaunchConfig, attribute_count), 48);
    }

    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        if let Err(error) = load() {
            assert!(matches!(error, Error::NoDriver(_)));
            assert!(error.to_string().starts_with("no CUDA driver here: "), "{error}");
        }
    }
}
