//! The CUDA driver, found when it is first needed.
//!
//! Nothing is linked with `libcuda.so`, so the program builds without a CUDA toolkit and starts without a driver.
//! What this module must therefore provide:
//! - **The functions that `cust` calls.** `cust` expects a linker to bind them. They are defined here, each as a jump
//!   to where [`load`] found the driver's own; before that, and where there is no driver, they return
//!   `CUDA_ERROR_NOT_INITIALIZED`.
//! - **The functions that `cust` does not have** (IPC handles, graphs, mapped host memory): [`Functions`].
//! - **The functions newer than its bindings** (`cuLaunchKernelEx`), from `cuGetProcAddress`.
//!
//! The driver's results are numbers here, never the enum of the bindings: later drivers have results that the enum
//! does not.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr::null_mut,
    sync::{
        OnceLock,
        atomic::{AtomicPtr, Ordering::Relaxed},
    },
};

use libloading::Library;

use super::Error;

/// The driver's name for the loader.
const LIBRARY: &str = "libcuda.so.1";
/// `CUDA_SUCCESS`.
const SUCCESS: u32 = 0;
/// `CUDA_ERROR_NOT_INITIALIZED`.
const NOT_INITIALIZED: u32 = 3;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: u32 = 600;

/// What a function of the driver returns: `CUresult`.
pub(crate) type Code = u32;
/// `CUdeviceptr`.
pub(crate) type DevicePointer = u64;
/// `CUstream`, `CUfunction`, `CUgraph`, `CUgraphExec`.
pub(crate) type Handle = *mut c_void;

/// Stands in for every function of the driver as long as there is none.
unsafe extern "C" fn not_loaded() -> Code {
    NOT_INITIALIZED
}

/// Defines, for the linker, functions of the driver as jumps to where `bind` has found them.
macro_rules! trampolines {
    ($($name:ident)*) => {
        #[allow(non_upper_case_globals, reason = "each is named after the function that it points to")]
        mod targets {
            use super::*;
            $(pub(super) static $name: AtomicPtr<c_void> =
                AtomicPtr::new(not_loaded as unsafe extern "C" fn() -> Code as *mut c_void);)*
        }

        $(
            /// # Safety
            /// The driver's: any arguments pass through as they are.
            #[unsafe(no_mangle)]
            #[unsafe(naked)]
            unsafe extern "C" fn $name() -> Code {
                #[cfg(target_arch = "x86_64")]
                std::arch::naked_asm!("jmp qword ptr [rip + {target}]", target = sym targets::$name);
                #[cfg(target_arch = "aarch64")]
                std::arch::naked_asm!(
                    "adrp x16, {target}",
                    "ldr x16, [x16, :lo12:{target}]",
                    "br x16",
                    target = sym targets::$name
                );
            }
        )*

        /// Points the jumps at the driver's functions. One that it lacks stays as it is.
        fn bind(library: &Library) {
            $(
                // SAFETY: only the address is taken.
                if let Ok(symbol) = unsafe { library.get::<*mut c_void>(stringify!($name)) } {
                    targets::$name.store(*symbol, Relaxed);
                }
            )*
        }
    };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("NVIDIA's driver, and with it this crate's CUDA backend, is for x86_64 and aarch64");

// All that `cust` 0.3.2 refers to, used or not: one more than the linker asks for costs nothing.
trampolines! {
    cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuArrayDestroy cuCtxCreate_v2 cuCtxDestroy_v2 cuCtxGetApiVersion
    cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetDevice cuCtxGetFlags cuCtxGetLimit cuCtxGetSharedMemConfig
    cuCtxGetStreamPriorityRange cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCacheConfig cuCtxSetCurrent
    cuCtxSetLimit cuCtxSetSharedMemConfig cuCtxSynchronize cuDestroyExternalMemory cuDeviceGet cuDeviceGetAttribute
    cuDeviceGetCount cuDeviceGetName cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset_v2
    cuDevicePrimaryCtxRetain cuDevicePrimaryCtxSetFlags_v2 cuDeviceTotalMem_v2 cuDriverGetVersion cuEventCreate
    cuEventDestroy_v2 cuEventElapsedTime cuEventQuery cuEventRecord cuEventSynchronize
    cuExternalMemoryGetMappedBuffer cuFuncGetAttribute cuFuncSetCacheConfig cuFuncSetSharedMemConfig
    cuGetErrorString cuGraphAddKernelNode cuGraphCreate cuGraphDebugDotPrint cuGraphDestroy cuGraphGetEdges
    cuGraphGetNodes cuGraphKernelNodeGetParams cuGraphNodeGetType cuImportExternalMemory cuInit cuLaunchHostFunc
    cuLaunchKernel cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuLinkDestroy cuMemAdvise cuMemAllocAsync
    cuMemAllocHost_v2 cuMemAllocManaged cuMemAllocPitch_v2 cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2
    cuMemGetInfo_v2 cuMemPrefetchAsync cuMemcpy2D_v2 cuMemcpyAtoH_v2 cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2
    cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2 cuMemcpyHtoA_v2 cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemsetD16Async
    cuMemsetD16_v2 cuMemsetD32Async cuMemsetD32_v2 cuMemsetD8Async cuMemsetD8_v2 cuModuleGetFunction
    cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxPotentialBlockSize cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamGetFlags
    cuStreamGetPriority cuStreamSynchronize cuStreamWaitEvent cuSurfObjectCreate cuSurfObjectDestroy
    cuSurfObjectGetResourceDesc cuTexObjectCreate cuTexObjectDestroy cuTexObjectGetResourceDesc
    cuTexObjectGetResourceViewDesc
}

macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $type:ty),*);)*) => {
        /// Functions of the driver that `cust` lacks, to be called as C functions are: unsafely. Their results go to
        /// [`check`].
        #[allow(non_snake_case, reason = "the driver's names")]
        #[derive(Debug)]
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($argument: $type),*) -> Code,)*
        }

        impl Functions {
            fn find(library: &Library) -> Result<Self, String> {
                // SAFETY: the driver's function of this name has this type.
                Ok(Functions { $($name: unsafe { library.get(stringify!($name)) }.map(|symbol| *symbol).map_err(
                    |_| format!("{LIBRARY} has no {}: it is older than CUDA 11.4", stringify!($name))
                )?,)* })
            }
        }
    };
}

functions! {
    fn cuInit(flags: c_uint);
    fn cuGetProcAddress(name: *const c_char, function: *mut *mut c_void, version: c_int, flags: u64);
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int);
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int);
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    fn cuMemAlloc_v2(address: *mut DevicePointer, bytes: usize);
    fn cuMemFree_v2(address: DevicePointer);
    fn cuMemsetD8Async(address: DevicePointer, value: u8, bytes: usize, stream: Handle);
    fn cuMemsetD32_v2(address: DevicePointer, value: c_uint, words: usize);
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
    fn cuStreamQuery(stream: Handle);
    fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint);
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint);
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle);
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64);
    fn cuGraphLaunch(executable: Handle, stream: Handle);
    fn cuGraphExecDestroy(executable: Handle);
    fn cuGraphDestroy(graph: Handle);
}

/// `CUipcMemHandle`: names an allocation to other processes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct IpcHandle(pub(crate) [u8; 64]);

/// `CUlaunchAttribute`: a number, and 64 bytes of which attributes use some.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LaunchAttribute {
    pub(crate) id: c_uint,
    pub(crate) padding: c_uint,
    pub(crate) value: [c_uint; 16],
}

impl LaunchAttribute {
    /// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`: clusters of so many blocks.
    pub(crate) fn cluster(blocks: u32) -> Self {
        let mut value = [0; 16];
        value[..3].copy_from_slice(&[blocks, 1, 1]);
        LaunchAttribute { id: 4, padding: 0, value }
    }

    /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: may start before the kernel before it is complete.
    pub(crate) fn programmatic_dependent() -> Self {
        let mut value = [0; 16];
        value[0] = 1;
        LaunchAttribute { id: 6, padding: 0, value }
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared_bytes: c_uint,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) attribute_count: c_uint,
}

/// Functions of CUDA 12, which launch kernels with attributes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launcher {
    /// `cuLaunchKernelEx`.
    pub(crate) launch:
        unsafe extern "C" fn(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void) -> Code,
    /// `cuOccupancyMaxActiveClusters`.
    pub(crate) max_active_clusters: unsafe extern "C" fn(*mut c_int, Handle, *const LaunchConfig) -> Code,
}

impl Launcher {
    /// Finds the functions.
    ///
    /// # Errors
    /// The driver is older than CUDA 12.
    pub(crate) fn find() -> Result<Launcher, Error> {
        let launch = proc_address(c"cuLaunchKernelEx")?;
        let max_active_clusters = proc_address(c"cuOccupancyMaxActiveClusters")?;
        // SAFETY: the functions of these names have these types.
        unsafe {
            Ok(Launcher {
                launch: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(
                        *const LaunchConfig,
                        Handle,
                        *mut *mut c_void,
                        *mut *mut c_void,
                    ) -> Code,
                >(launch),
                max_active_clusters: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut c_int, Handle, *const LaunchConfig) -> Code,
                >(max_active_clusters),
            })
        }
    }
}

/// A function as CUDA 12.0 has it. Never null.
fn proc_address(name: &CStr) -> Result<*mut c_void, Error> {
    let mut function = null_mut();
    // SAFETY: the name is a string, and the address is written where there is room for it.
    let code = unsafe { (load()?.cuGetProcAddress)(name.as_ptr(), &mut function, 12_000, 0) };
    if code != SUCCESS || function.is_null() {
        let name = name.to_string_lossy();
        return Err(Error::NoDriver(format!("the driver has no {name}: it is older than CUDA 12")));
    }
    Ok(function)
}

/// Finds the driver and initializes it, the first time; later calls give the first one's result.
///
/// # Errors
/// There is no driver, it is too old, or it finds no GPU.
pub(crate) fn load() -> Result<&'static Functions, Error> {
    static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
    let loaded = FUNCTIONS.get_or_init(|| {
        // SAFETY: the driver's initialization does nothing that this process must be prepared for.
        let library = unsafe { Library::new(LIBRARY) }
            .map_err(|error| std::error::Error::source(&error).unwrap_or(&error).to_string())?;
        // Never unloaded: functions are called until the process ends.
        let library = Box::leak(Box::new(library));
        let functions = Functions::find(library)?;
        bind(library);
        // SAFETY: takes a number.
        match unsafe { (functions.cuInit)(0) } {
            SUCCESS => Ok(functions),
            code => Err(describe(code)),
        }
    });
    loaded.as_ref().map_err(|why| Error::NoDriver(why.clone()))
}

/// An error if `code` is one. `doing` completes "could not".
pub(crate) fn check(doing: &'static str, code: Code) -> Result<(), Error> {
    if code == SUCCESS { Ok(()) } else { Err(Error::Driver { doing, what: describe(code) }) }
}

/// Whether the work that a query asked about is done.
pub(crate) fn is_ready(doing: &'static str, code: Code) -> Result<bool, Error> {
    if code == NOT_READY { Ok(false) } else { check(doing, code).map(|()| true) }
}

/// For `map_err` on what `cust` returns. `doing` completes "could not".
pub(crate) fn failed(doing: &'static str) -> impl FnOnce(cust::error::CudaError) -> Error {
    move |error| Error::Driver { doing, what: describe(error as u32) }
}

/// The driver's words for a result.
fn describe(code: Code) -> String {
    let mut text: *const c_char = std::ptr::null();
    let target = targets::cuGetErrorString.load(Relaxed);
    // SAFETY: what `bind` found, or `not_loaded`, which takes any arguments.
    let describe = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Code, *mut *const c_char) -> Code>(target)
    };
    // SAFETY: any number may be asked about.
    if unsafe { describe(code, &mut text) } != SUCCESS || text.is_null() {
        return format!("CUDA error {code}");
    }
    // SAFETY: a constant string.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    format!("{text} (CUDA error {code})")
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
    fn without_a_driver_cust_is_told_and_nothing_else_happens() {
        if load().is_ok() {
            return; // The machine has a driver: nothing to see.
        }
        assert_eq!(cust::init(cust::CudaFlags::empty()), Err(cust::error::CudaError::NotInitialized));
        let error = load().unwrap_err().to_string();
        assert!(error.starts_with("no CUDA driver here: "), "{error}");
    }
}
