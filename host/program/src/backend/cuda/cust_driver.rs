//! The functions that `cust` calls, found when the driver is.
//!
//! `cust` expects a linker to bind them, to a `libcuda.so` that a machine without a GPU does not have. They are defined
//! here, each as a jump to the driver's own; before [`bind_cust`], and where there is no driver, they return
//! `CUDA_ERROR_NOT_INITIALIZED`.

use std::{
    ffi::c_void,
    sync::{
        Once,
        atomic::{AtomicPtr, Ordering::Relaxed},
    },
};

use fused_collective::{
    Error,
    cuda::driver::{Code, Functions, check, load},
};

/// `CUDA_ERROR_NOT_INITIALIZED`.
const NOT_INITIALIZED: u32 = 3;

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
        fn bind(driver: &Functions) {
            $(
                if let Some(address) = driver.address(stringify!($name)) {
                    targets::$name.store(address, Relaxed);
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

/// Finds the driver, and points `cust`'s functions at it.
///
/// # Errors
/// There is no driver.
pub(crate) fn bind_cust() -> Result<(), Error> {
    static BOUND: Once = Once::new();
    let driver = load()?;
    BOUND.call_once(|| bind(driver));
    Ok(())
}

/// For `map_err` on what `cust` returns. `doing` completes "could not".
pub(crate) fn failed(doing: &'static str) -> impl FnOnce(cust::error::CudaError) -> Error {
    move |error| match check(doing, error as u32) {
        Err(error) => error,
        Ok(()) => Error::Driver { doing, code: 0, what: "no error".to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_cust_is_told_and_nothing_else_happens() {
        if bind_cust().is_ok() {
            return; // The machine has a driver: nothing to see.
        }
        assert_eq!(cust::init(cust::CudaFlags::empty()), Err(cust::error::CudaError::NotInitialized));
    }
}
