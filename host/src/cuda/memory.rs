//! Memory that outlives a call: on a GPU, of other ranks, and of the host where the GPU reaches it. Each knows its
//! context, and makes it current for as long as a call takes.

use std::{ffi::c_void, ptr::null_mut, sync::atomic::AtomicU32};

use fused_collective_core::launch::{Address, Status};

use super::{
    device::Context,
    driver::{DevicePointer, Functions, Handle, IpcHandle, check},
};
use crate::error::{Error, TensorProblem};

/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`.
const HOST_MAPPED: u32 = 1 | 2;
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`: opening a handle enables access between the two GPUs.
const ENABLE_PEER_ACCESS: u32 = 1;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;

/// Asks for the bytes that the context's GPU has free.
///
/// # Errors
/// The driver's.
pub fn free_bytes(context: &Context) -> Result<u64, Error> {
    let _entered = context.enter()?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: both numbers have room for the answer.
    let code = unsafe { (context.driver().cuMemGetInfo_v2)(&mut free, &mut total) };
    check("ask for the GPU's free memory", code)?;
    Ok(free as u64)
}

/// Refuses `needed` bytes for `what` where the context's GPU has no room for them.
///
/// # Errors
/// [`Error::Memory`], or the driver's.
pub fn require(context: &Context, what: &str, needed: u64) -> Result<(), Error> {
    let free = free_bytes(context)?;
    if needed <= free { Ok(()) } else { Err(Error::Memory { what: what.to_owned(), needed, free }) }
}

/// An allocation on a GPU: plain `cuMemAlloc`, which other processes can open.
#[derive(Debug)]
pub struct DeviceMemory {
    context: Context,
    address: DevicePointer,
    bytes: u64,
}

impl DeviceMemory {
    /// Allocates `bytes` bytes with unspecified contents, at an address that is a multiple of 256; nothing at all for 0.
    ///
    /// # Errors
    /// [`Error::Memory`], or the driver's.
    pub fn new(context: &Context, bytes: u64) -> Result<Self, Error> {
        let mut address = 0;
        if bytes > 0 {
            let _entered = context.enter()?;
            // SAFETY: `address` has room for the answer.
            let code = unsafe { (context.driver().cuMemAlloc_v2)(&mut address, bytes as usize) };
            if code == OUT_OF_MEMORY {
                let what = "an allocation".to_owned();
                return Err(Error::Memory { what, needed: bytes, free: free_bytes(context)? });
            }
            check("allocate memory on the GPU", code)?;
        }
        Ok(DeviceMemory { context: context.clone(), address, bytes })
    }

    /// Makes an allocation that holds `bytes`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn holding(context: &Context, bytes: &[u8]) -> Result<Self, Error> {
        let mut memory = Self::new(context, bytes.len() as u64)?;
        memory.write(0, bytes)?;
        Ok(memory)
    }

    /// The address; null if it has no bytes.
    pub fn address(&self) -> Address {
        Address(self.address)
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn driver(&self) -> &'static Functions {
        self.context.driver()
    }

    /// Writes `bytes` at `offset`. Returns when they are there.
    ///
    /// # Errors
    /// They do not fit, or the driver's.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.check_range(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: inside the allocation, as checked.
        let code = unsafe {
            (self.driver().cuMemcpyHtoD_v2)(self.address + offset, bytes.as_ptr().cast(), bytes.len())
        };
        check("copy to the GPU", code)?;
        // A copy of few bytes returns once they are staged. Neither other streams nor other processes wait for the rest.
        // SAFETY: the default stream of the context that was entered.
        let code = unsafe { (self.driver().cuStreamSynchronize)(null_mut()) };
        check("copy to the GPU", code)
    }

    /// Copies the bytes from `offset` on into `bytes`, as many as it has.
    ///
    /// # Errors
    /// There are not so many, or the driver's.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.check_range(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: inside the allocation, as checked; the slice has the room.
        let code = unsafe {
            (self.driver().cuMemcpyDtoH_v2)(bytes.as_mut_ptr().cast(), self.address + offset, bytes.len())
        };
        check("copy from the GPU", code)
    }

    fn check_range(&self, offset: u64, length: usize) -> Result<(), Error> {
        let (bytes, length) = (self.bytes, length as u64);
        if offset.checked_add(length).is_some_and(|end| end <= bytes) {
            return Ok(());
        }
        Err(Error::Tensor { tensor: "the memory", problem: TensorProblem::Range { bytes, offset, length } })
    }

    /// Fills the words (of 4 bytes) from `offset` to the end with `word`. Returns when they are there.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill_from(&mut self, offset: u64, word: u32) -> Result<(), Error> {
        let words = self.bytes.saturating_sub(offset) / 4;
        if words == 0 {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: inside the allocation.
        let code = unsafe { (self.driver().cuMemsetD32_v2)(self.address + offset, word, words as usize) };
        check("fill memory on the GPU", code)?;
        // The call may return early; a copy of the first word waits for it.
        let mut first = 0u32;
        // SAFETY: a word of the allocation, and room for it.
        let code = unsafe {
            (self.driver().cuMemcpyDtoH_v2)((&raw mut first).cast(), self.address + offset, size_of::<u32>())
        };
        check("fill memory on the GPU", code)
    }

    /// Names the allocation to other processes. It should have pages of its own: whoever opens it may reach them
    /// whole.
    ///
    /// # Errors
    /// The driver's: this kind of GPU or container cannot share memory.
    pub fn share(&self) -> Result<IpcHandle, Error> {
        let _entered = self.context.enter()?;
        let mut handle = IpcHandle([0; 64]);
        // SAFETY: the start of an allocation, and room for the handle.
        let code = unsafe { (self.driver().cuIpcGetMemHandle)(&mut handle, self.address) };
        check("share memory on the GPU with other processes", code)?;
        Ok(handle)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.bytes > 0
            && let Ok(_entered) = self.context.enter()
        {
            // SAFETY: allocated in `new`. If it fails, so has the whole context, and the memory with it.
            unsafe { (self.driver().cuMemFree_v2)(self.address) };
        }
    }
}

/// Another rank's allocation.
#[derive(Debug)]
pub struct PeerMemory {
    context: Context,
    address: DevicePointer,
    /// Opened by a handle, and to be closed.
    is_opened: bool,
}

impl PeerMemory {
    /// Opens what another process has [shared](DeviceMemory::share).
    ///
    /// # Errors
    /// The driver's: there is no way from this GPU to that one, or the process is gone.
    pub fn open(context: &Context, handle: IpcHandle) -> Result<Self, Error> {
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: a handle in whatever state is looked up, not trusted.
        let code =
            unsafe { (context.driver().cuIpcOpenMemHandle_v2)(&mut address, handle, ENABLE_PEER_ACCESS) };
        check("open the other rank's memory", code)?;
        Ok(PeerMemory { context: context.clone(), address, is_opened: true })
    }

    /// Reaches memory of another GPU's context `peer` in this process: all addresses of a process are unique.
    ///
    /// # Errors
    /// The driver's: there is no way from this GPU to that one.
    pub(super) fn of_this_process(
        context: &Context,
        peer: Handle,
        address: DevicePointer,
    ) -> Result<Self, Error> {
        context.enable_peer(peer)?;
        Ok(PeerMemory { context: context.clone(), address, is_opened: false })
    }

    /// The address by which this GPU reaches it.
    pub fn address(&self) -> Address {
        Address(self.address)
    }

    /// Its first bytes, as many as `bytes` has.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), Error> {
        let _entered = self.context.enter()?;
        let driver = self.context.driver();
        // SAFETY: the allocation is larger than a header, which is all that is read; the slice has the room.
        let code = unsafe { (driver.cuMemcpyDtoH_v2)(bytes.as_mut_ptr().cast(), self.address, bytes.len()) };
        check("read the other rank's memory", code)
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        if self.is_opened
            && let Ok(_entered) = self.context.enter()
        {
            // SAFETY: opened in `open`, and closed once.
            unsafe { (self.context.driver().cuIpcCloseMemHandle)(self.address) };
        }
    }
}

/// Host memory that stays where it is, so that the device reaches it and copies into it run by themselves.
#[derive(Debug)]
pub struct PinnedMemory {
    context: Context,
    host: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory belongs to the process, not to a thread. Who shares it says how it is accessed.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// Allocates `bytes` bytes, with zeros in them, at the start of a page.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(context: &Context, bytes: usize) -> Result<Self, Error> {
        let _entered = context.enter()?;
        let mut host = null_mut();
        // SAFETY: `host` has room for the answer.
        let code = unsafe { (context.driver().cuMemHostAlloc)(&mut host, bytes, HOST_MAPPED) };
        check("allocate host memory that the GPU reaches", code)?;
        // SAFETY: as large as that, and nobody else knows it.
        unsafe { host.cast::<u8>().write_bytes(0, bytes) };
        Ok(PinnedMemory { context: context.clone(), host, bytes })
    }

    /// The address in this process.
    pub fn address(&self) -> *mut c_void {
        self.host
    }

    /// Its length in bytes.
    pub fn length(&self) -> usize {
        self.bytes
    }

    /// Its contents.
    ///
    /// # Safety
    /// Nobody writes to it as long as the bytes are borrowed: no copy is under way.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation, with zeros or what was copied there.
        unsafe { std::slice::from_raw_parts(self.host.cast(), self.bytes) }
    }

    /// Leaves the memory as it is for good: the device may still write to it.
    pub fn leak(&mut self) {
        self.host = null_mut();
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if !self.host.is_null()
            && let Ok(_entered) = self.context.enter()
        {
            // SAFETY: allocated in `new`, and freed once.
            unsafe { (self.context.driver().cuMemFreeHost)(self.host) };
        }
    }
}

/// A [`Status`] in host memory that the device reaches.
#[derive(Debug)]
pub(crate) struct MappedStatus {
    memory: PinnedMemory,
    device: DevicePointer,
}

// SAFETY: the memory is accessed through atomics alone.
unsafe impl Sync for MappedStatus {}

impl MappedStatus {
    /// A status of zeros.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(context: &Context) -> Result<Self, Error> {
        let memory = PinnedMemory::new(context, size_of::<Status>())?;
        let _entered = context.enter()?;
        let mut device = 0;
        // SAFETY: the allocation is mapped.
        let code =
            unsafe { (context.driver().cuMemHostGetDevicePointer_v2)(&mut device, memory.address(), 0) };
        check("map host memory for the GPU", code)?;
        Ok(MappedStatus { memory, device })
    }

    /// The address by which the GPU reaches it.
    pub(crate) fn address(&self) -> Address {
        Address(self.device)
    }

    /// The word at `offset`.
    pub(crate) fn word(&self, offset: u64) -> &AtomicU32 {
        debug_assert!(offset + 4 <= size_of::<Status>() as u64 && offset.is_multiple_of(4));
        // SAFETY: a word of the allocation, which lives as long as `self` and is never accessed but atomically.
        unsafe { AtomicU32::from_ptr(self.memory.address().cast::<u32>().add(offset as usize / 4)) }
    }
}
