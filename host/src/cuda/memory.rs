//! Memory that outlives a call: on the device, of other processes, and of the host where the device reaches it.

use std::{ffi::c_void, ptr::null_mut, sync::atomic::AtomicU32};

use fused_collective_core::launch::{Address, Status};

use super::{
    Error,
    driver::{DevicePointer, Functions, IpcHandle, check, load},
};
use crate::collective::{GUARD, GUARD_BYTES, stray_write};

/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`.
const HOST_MAPPED: u32 = 1 | 2;
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`: opening a handle enables access between the two GPUs.
const ENABLE_PEER_ACCESS: u32 = 1;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;

/// Bytes that the current device has free.
pub(super) fn free_bytes() -> Result<u64, Error> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: room for both numbers.
    let code = unsafe { (load()?.cuMemGetInfo_v2)(&mut free, &mut total) };
    check("ask for the GPU's free memory", code)?;
    Ok(free as u64)
}

/// Refuses what the current device has no room for: `needed` bytes for `what`.
///
/// # Errors
/// [`Error::Memory`], or the driver's.
pub(crate) fn require(what: &str, needed: u64) -> Result<(), Error> {
    let free = free_bytes()?;
    if needed <= free { Ok(()) } else { Err(Error::Memory { what: what.to_owned(), needed, free }) }
}

/// An allocation on the current device. Plain `cuMemAlloc`, which other processes can open.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    driver: &'static Functions,
    address: DevicePointer,
    bytes: u64,
}

impl DeviceMemory {
    /// Allocates `bytes` bytes with unspecified contents, at an address that is a multiple of 256. None at all for 0.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(bytes: u64) -> Result<Self, Error> {
        let driver = load()?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: the address is written where there is room for it.
            let code = unsafe { (driver.cuMemAlloc_v2)(&mut address, bytes as usize) };
            if code == OUT_OF_MEMORY {
                let what = "an allocation".to_owned();
                return Err(Error::Memory { what, needed: bytes, free: free_bytes()? });
            }
            check("allocate memory on the GPU", code)?;
        }
        Ok(DeviceMemory { driver, address, bytes })
    }

    /// An allocation that holds `bytes`.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn holding(bytes: &[u8]) -> Result<Self, Error> {
        let mut memory = Self::new(bytes.len() as u64)?;
        memory.write(0, bytes)?;
        Ok(memory)
    }

    /// Where it is; null if it has no bytes.
    pub(crate) fn address(&self) -> Address {
        Address(self.address)
    }

    /// How large it is.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes `bytes` at `offset`. Returns when they are there.
    ///
    /// # Errors
    /// They do not fit, or the driver's.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.check_range("write", offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: inside the allocation, as checked.
        let code = unsafe {
            (self.driver.cuMemcpyHtoD_v2)(self.address + offset, bytes.as_ptr().cast(), bytes.len())
        };
        check("copy to the GPU", code)
    }

    /// Copies the bytes from `offset` on into `bytes`, as many as it has.
    ///
    /// # Errors
    /// There are not so many, or the driver's.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.check_range("read", offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: inside the allocation, as checked; the slice has the room.
        let code = unsafe {
            (self.driver.cuMemcpyDtoH_v2)(bytes.as_mut_ptr().cast(), self.address + offset, bytes.len())
        };
        check("copy from the GPU", code)
    }

    fn check_range(&self, doing: &str, offset: u64, length: usize) -> Result<(), Error> {
        if offset.checked_add(length as u64).is_some_and(|end| end <= self.bytes) {
            return Ok(());
        }
        let why = format!("has {} bytes: cannot {doing} {length} at {offset}", self.bytes);
        Err(Error::Tensor { tensor: "the memory", why })
    }

    /// Fills the words (of 4 bytes) from `offset` to the end with `word`. Returns when they are.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn fill_from(&mut self, offset: u64, word: u32) -> Result<(), Error> {
        let words = self.bytes.saturating_sub(offset) / 4;
        if words == 0 {
            return Ok(());
        }
        // SAFETY: inside the allocation.
        let code = unsafe { (self.driver.cuMemsetD32_v2)(self.address + offset, word, words as usize) };
        check("fill memory on the GPU", code)?;
        // The call may return early; a copy of the first word waits for it.
        let mut first = 0u32;
        // SAFETY: a word of the allocation, and room for it.
        let code = unsafe {
            (self.driver.cuMemcpyDtoH_v2)((&raw mut first).cast(), self.address + offset, size_of::<u32>())
        };
        check("fill memory on the GPU", code)
    }

    /// Names the allocation to other processes. It should have pages of its own: whoever opens it may reach them
    /// whole.
    ///
    /// # Errors
    /// The driver's: this kind of GPU or container cannot share memory.
    pub(crate) fn share(&self) -> Result<IpcHandle, Error> {
        let mut handle = IpcHandle([0; 64]);
        // SAFETY: the start of an allocation, and room for the handle.
        let code = unsafe { (self.driver.cuIpcGetMemHandle)(&mut handle, self.address) };
        check("share memory on the GPU with other processes", code)?;
        Ok(handle)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated in `new`. If it fails, so has the whole context, and the memory with it.
            unsafe { (self.driver.cuMemFree_v2)(self.address) };
        }
    }
}

/// A tensor on the current device between its guards.
#[derive(Debug)]
pub(crate) struct GuardedMemory {
    memory: DeviceMemory,
    bytes: u64,
}

impl GuardedMemory {
    /// Bytes of one guard. A multiple of 256, so that the tensor is aligned as an allocation is.
    const GUARD_BYTES: u64 = GUARD_BYTES as u64;

    /// Allocates `bytes` bytes with unspecified contents.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(bytes: u64) -> Result<Self, Error> {
        let mut memory = DeviceMemory::new(bytes.saturating_add(2 * Self::GUARD_BYTES))?;
        for offset in [0, Self::GUARD_BYTES + bytes] {
            memory.write(offset, &[GUARD; GUARD_BYTES])?;
        }
        Ok(GuardedMemory { memory, bytes })
    }

    /// Where the tensor is.
    pub(crate) fn address(&self) -> Address {
        self.memory.address().offset(Self::GUARD_BYTES)
    }

    /// How large it is.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes `bytes` at `offset`. Returns when they are there.
    ///
    /// # Errors
    /// They do not fit, or the driver's.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.bytes) {
            let why = format!("has {} bytes: cannot write {} at {offset}", self.bytes, bytes.len());
            return Err(Error::Tensor { tensor: "the tensor", why });
        }
        self.memory.write(Self::GUARD_BYTES + offset, bytes)
    }

    /// The contents.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn read(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.bytes as usize];
        self.memory.read(Self::GUARD_BYTES, &mut bytes)?;
        Ok(bytes)
    }

    /// Where the guards were written, if they were.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn stray_write(&self) -> Result<Option<String>, Error> {
        let (mut before, mut after) = ([0; GUARD_BYTES], [0; GUARD_BYTES]);
        self.memory.read(0, &mut before)?;
        self.memory.read(Self::GUARD_BYTES + self.bytes, &mut after)?;
        Ok(stray_write(&before, &after))
    }
}

/// Another process's allocation.
#[derive(Debug)]
pub(crate) struct PeerMemory {
    driver: &'static Functions,
    address: DevicePointer,
}

impl PeerMemory {
    /// Opens what another process has [shared](DeviceMemory::share).
    ///
    /// # Errors
    /// The driver's: there is no way from this GPU to that one, or the process is gone.
    pub(crate) fn open(handle: IpcHandle) -> Result<Self, Error> {
        let driver = load()?;
        let mut address = 0;
        // SAFETY: a handle in whatever state is looked up, not trusted.
        let code = unsafe { (driver.cuIpcOpenMemHandle_v2)(&mut address, handle, ENABLE_PEER_ACCESS) };
        check("open the other rank's memory", code)?;
        Ok(PeerMemory { driver, address })
    }

    /// Where this device sees it.
    pub(crate) fn address(&self) -> Address {
        Address(self.address)
    }

    /// Its first bytes, as many as `bytes` has.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the allocation is larger than a header, which is all that is read; the slice has the room.
        let code =
            unsafe { (self.driver.cuMemcpyDtoH_v2)(bytes.as_mut_ptr().cast(), self.address, bytes.len()) };
        check("read the other rank's memory", code)
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        // SAFETY: opened in `open`.
        unsafe { (self.driver.cuIpcCloseMemHandle)(self.address) };
    }
}

/// Host memory that stays where it is, so that the device reaches it and copies into it run by themselves.
#[derive(Debug)]
pub(crate) struct PinnedMemory {
    driver: &'static Functions,
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
    pub(crate) fn new(bytes: usize) -> Result<Self, Error> {
        let driver = load()?;
        let mut host = null_mut();
        // SAFETY: the address is written where there is room for it.
        let code = unsafe { (driver.cuMemHostAlloc)(&mut host, bytes, HOST_MAPPED) };
        check("allocate host memory that the GPU reaches", code)?;
        // SAFETY: as large as that, and nobody else knows it.
        unsafe { host.cast::<u8>().write_bytes(0, bytes) };
        Ok(PinnedMemory { driver, host, bytes })
    }

    /// Where this process sees it.
    pub(crate) fn address(&self) -> *mut c_void {
        self.host
    }

    /// How large it is.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// What is in it.
    ///
    /// # Safety
    /// Nobody writes to it as long as the bytes are borrowed: no copy is under way.
    pub(crate) unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation, with zeros or what was copied there.
        unsafe { std::slice::from_raw_parts(self.host.cast(), self.bytes) }
    }

    /// Leaves the memory as it is for good: the device may still write to it.
    pub(crate) fn leak(&mut self) {
        self.host = null_mut();
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if !self.host.is_null() {
            // SAFETY: allocated in `new`.
            unsafe { (self.driver.cuMemFreeHost)(self.host) };
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
    pub(crate) fn new() -> Result<Self, Error> {
        let memory = PinnedMemory::new(size_of::<Status>())?;
        let mut device = 0;
        // SAFETY: the allocation is mapped.
        let code = unsafe { (load()?.cuMemHostGetDevicePointer_v2)(&mut device, memory.address(), 0) };
        check("map host memory for the GPU", code)?;
        Ok(MappedStatus { memory, device })
    }

    /// Where the device sees it.
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
