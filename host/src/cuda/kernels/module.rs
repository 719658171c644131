//! Modules of machine code or PTX, the functions in them, and their launch.

use std::{
    collections::{HashMap, hash_map::Entry as Slot},
    ffi::{CString, c_void},
    ptr::null_mut,
    sync::Arc,
};

use fused_collective_core::launch::{LAYOUT, LAYOUT_SYMBOL, layout_of};

use super::super::{
    device::Context,
    driver::{Handle, LaunchAttribute, LaunchConfig, Launcher, check},
};
use crate::error::Error;

/// `CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK`.
const MAX_THREADS_PER_BLOCK: u32 = 0;
/// The first bytes of machine code, an ELF file.
const ELF: &[u8] = b"\x7fELF";

const OCCUPANCY: &str = "ask how many blocks the GPU holds at once";

/// A module that the driver has loaded, until the last clone of it and of its functions is dropped.
#[derive(Clone, Debug)]
pub struct Module(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    context: Context,
    handle: Handle,
}

// SAFETY: a `CUmodule` belongs to its context, and the driver's functions may be called with it from any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above; the driver locks what threads share.
unsafe impl Sync for Loaded {}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: loaded in `load`, and unloaded once; no function of it is left.
            unsafe { (self.context.driver().cuModuleUnload)(self.handle) };
        }
    }
}

impl Module {
    /// Loads PTX, as text, or machine code. PTX takes the driver a second or so, unless it has it in its cache.
    ///
    /// # Errors
    /// [`Error::Kernels`]: it was built for another version of the [launch structs](fused_collective_core::launch), or the
    /// driver cannot use it.
    pub fn load(context: &Context, image: Vec<u8>) -> Result<Module, Error> {
        let is_machine_code = image.starts_with(ELF);
        if !is_machine_code {
            check_layout(layout_of(&String::from_utf8_lossy(&image))).map_err(Error::Kernels)?;
        }
        let image = terminated(image)?;
        let _entered = context.enter()?;
        let mut handle = null_mut();
        // SAFETY: machine code says how long it is, and PTX ends in a zero byte.
        let code = unsafe { (context.driver().cuModuleLoadData)(&mut handle, image.as_ptr().cast()) };
        check("load the kernels", code).map_err(|error| Error::Kernels(error.to_string()))?;
        let module = Module(Arc::new(Loaded { context: context.clone(), handle }));
        if is_machine_code {
            check_layout(module.word(LAYOUT_SYMBOL)?).map_err(Error::Kernels)?;
        }
        Ok(module)
    }

    /// The word that the variable `symbol` of the module holds; `None` if it has no such variable of 4 bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn word(&self, symbol: &str) -> Result<Option<u32>, Error> {
        let driver = self.0.context.driver();
        let Ok(symbol) = CString::new(symbol) else { return Ok(None) };
        let _entered = self.0.context.enter()?;
        let (mut address, mut bytes) = (0, 0);
        // SAFETY: a loaded module, a C string, and room for both answers.
        let code = unsafe {
            (driver.cuModuleGetGlobal_v2)(&mut address, &mut bytes, self.0.handle, symbol.as_ptr())
        };
        if code != 0 || bytes != size_of::<u32>() {
            return Ok(None);
        }
        let mut word = 0u32;
        // SAFETY: the variable has as many bytes as `word`.
        let code = unsafe { (driver.cuMemcpyDtoH_v2)((&raw mut word).cast(), address, bytes) };
        check("read a variable of the kernels", code).map(|()| Some(word))
    }

    /// Finds the entry point `name`.
    ///
    /// # Errors
    /// [`Error::Kernels`]: there is none of this name.
    pub fn function(&self, name: &str) -> Result<Function, Error> {
        let missing = |why: &dyn std::fmt::Display| Error::Kernels(format!("kernel {name}: {why}"));
        let driver = self.0.context.driver();
        let _entered = self.0.context.enter()?;
        let c_name = CString::new(name).map_err(|error| missing(&error))?;
        let mut handle = null_mut();
        // SAFETY: a loaded module, a C string, and room for the answer.
        let code = unsafe { (driver.cuModuleGetFunction)(&mut handle, self.0.handle, c_name.as_ptr()) };
        check("find it", code).map_err(|error| missing(&error))?;
        let mut max_threads = 0;
        // SAFETY: the function was found, and `max_threads` has room for the answer.
        let code = unsafe { (driver.cuFuncGetAttribute)(&mut max_threads, MAX_THREADS_PER_BLOCK, handle) };
        check("ask for its limits", code).map_err(|error| missing(&error))?;
        Ok(Function {
            module: self.clone(),
            handle,
            name: name.to_owned(),
            max_threads: max_threads.max(0) as u32,
            blocks_per_unit: HashMap::new(),
            resident: HashMap::new(),
        })
    }
}

/// The image with a zero byte after it: the driver takes PTX as a C string.
fn terminated(mut image: Vec<u8>) -> Result<Vec<u8>, Error> {
    if !image.starts_with(ELF) && image.contains(&0) {
        return Err(Error::Kernels("the PTX holds a zero byte".to_owned()));
    }
    image.push(0);
    Ok(image)
}

/// Checks that a module's kernels take what this crate launches them with.
fn check_layout(layout: Option<u32>) -> Result<(), String> {
    match layout {
        Some(LAYOUT) => Ok(()),
        Some(other) => Err(format!(
            "the kernels were built for launch layout {other:#010x}, and this library has {LAYOUT:#010x}: they are of \
             another version"
        )),
        None => Err("the kernels have no launch layout, as those of this version do".to_owned()),
    }
}

/// An entry point of a module.
#[derive(Debug)]
pub struct Function {
    module: Module,
    handle: Handle,
    name: String,
    max_threads: u32,
    /// Blocks that one multiprocessor holds at once, by their threads.
    blocks_per_unit: HashMap<u32, u32>,
    /// Clusters that are resident at once, by cluster size and threads of a block.
    resident: HashMap<(u32, u32), u32>,
}

// SAFETY: a `CUfunction` belongs to its module, which lives as long; the driver takes it from any thread.
unsafe impl Send for Function {}

impl Function {
    /// The entry point's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The most threads of a block that its registers allow.
    pub fn max_threads(&self) -> u32 {
        self.max_threads
    }

    fn context(&self) -> &Context {
        &self.module.0.context
    }

    /// Blocks of `threads` threads that one multiprocessor holds at once: as many on every GPU of a kind.
    ///
    /// # Errors
    /// The driver's.
    pub fn blocks_per_unit(&mut self, threads: u32) -> Result<u32, Error> {
        let context = self.module.0.context.clone();
        let slot = match self.blocks_per_unit.entry(threads) {
            Slot::Occupied(slot) => return Ok(*slot.get()),
            Slot::Vacant(slot) => slot,
        };
        let _entered = context.enter()?;
        let mut count = 0;
        // SAFETY: a function of a loaded module, and room for the answer.
        let code = unsafe {
            (context.driver().cuOccupancyMaxActiveBlocksPerMultiprocessor)(
                &mut count,
                self.handle,
                threads as i32,
                0,
            )
        };
        check(OCCUPANCY, code)?;
        Ok(*slot.insert(count.max(0) as u32))
    }

    /// Clusters of `cluster` blocks of `threads` threads that a whole GPU of `units` multiprocessors holds at once.
    /// Clusters of several blocks leave some multiprocessors idle, on each GPU others.
    ///
    /// # Errors
    /// The driver's.
    pub fn resident(
        &mut self,
        launcher: Option<Launcher>,
        units: u32,
        cluster: u32,
        threads: u32,
    ) -> Result<u32, Error> {
        let Some(launcher) = launcher.filter(|_| cluster > 1) else {
            return Ok(self.blocks_per_unit(threads)? * units);
        };
        let context = self.module.0.context.clone();
        let slot = match self.resident.entry((cluster, threads)) {
            Slot::Occupied(slot) => return Ok(*slot.get()),
            Slot::Vacant(slot) => slot,
        };
        let _entered = context.enter()?;
        let attribute = LaunchAttribute::cluster(cluster);
        let config = LaunchConfig {
            grid: [cluster, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
            stream: null_mut(),
            attributes: &attribute,
            attribute_count: 1,
        };
        let mut count = 0;
        // SAFETY: a function of a loaded module, a whole configuration, and room for the answer.
        check(OCCUPANCY, unsafe { (launcher.max_active_clusters)(&mut count, self.handle, &config) })?;
        Ok(*slot.insert(count.max(0) as u32))
    }

    /// A launch of `blocks` blocks of `threads` threads, in clusters of `cluster` blocks.
    pub fn launch(&self, blocks: u32, cluster: u32, threads: u32) -> Launch {
        Launch { function: self.handle, blocks, cluster, threads, any_epilogue: false, after_all: false }
    }

    /// Looks the driver's functions up for launches of it: `None` where kernels run one after the other.
    pub fn launcher(&self) -> Option<Launcher> {
        self.context().driver().launcher
    }
}

/// A launch of a function, without its parameters. Valid as long as the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    function: Handle,
    blocks: u32,
    cluster: u32,
    threads: u32,
    any_epilogue: bool,
    /// Starts when all ahead of it is complete, with a launcher too.
    after_all: bool,
}

// SAFETY: as of `Function`.
unsafe impl Send for Launch {}

impl Launch {
    /// The launch of a kernel whose epilogue is a parameter, an [`AnyEpilogue`](fused_collective_core::launch::AnyEpilogue).
    pub(super) fn of_any_epilogue(self, any_epilogue: bool) -> Launch {
        Launch { any_epilogue, ..self }
    }

    /// The launch of the kernel when all ahead of it is complete, whatever that is.
    pub(super) fn after_all(self) -> Launch {
        Launch { after_all: true, ..self }
    }

    /// True if the kernel takes an [`AnyEpilogue`](fused_collective_core::launch::AnyEpilogue).
    pub fn takes_any_epilogue(&self) -> bool {
        self.any_epilogue
    }

    /// Blocks of the grid.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Launches the kernel on `stream`, a stream of the current context. With a `launcher` it may start before the kernel
    /// ahead of it is complete (programmatic dependent launch).
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `parameters` are what the kernel takes, the addresses in them are as its documentation says until the kernel has
    /// ended, and the launch keeps the rules of [`fused_collective_core::launch`].
    pub unsafe fn enqueue(
        &self,
        context: &Context,
        launcher: Option<Launcher>,
        parameters: &Parameters,
        stream: Handle,
    ) -> Result<(), Error> {
        let mut arguments = [parameters.0.as_ptr().cast_mut().cast::<c_void>()];
        let Some(launcher) = launcher else {
            // SAFETY: the kernel takes one argument, which the driver copies before it returns.
            let code = unsafe {
                (context.driver().cuLaunchKernel)(
                    self.function,
                    self.blocks,
                    1,
                    1,
                    self.threads,
                    1,
                    1,
                    0,
                    stream,
                    arguments.as_mut_ptr(),
                    null_mut(),
                )
            };
            return check(LAUNCH, code);
        };
        let attributes = [LaunchAttribute::cluster(self.cluster), LaunchAttribute::programmatic_dependent()];
        let first = usize::from(self.cluster == 1);
        let attributes = &attributes[first..if self.after_all { 1 } else { 2 }];
        let config = LaunchConfig {
            grid: [self.blocks, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: 0,
            stream,
            attributes: attributes.as_ptr(),
            attribute_count: attributes.len() as u32,
        };
        // SAFETY: as above.
        let code = unsafe { (launcher.launch)(&config, self.function, arguments.as_mut_ptr(), null_mut()) };
        check(LAUNCH, code)
    }
}

const LAUNCH: &str = "launch a kernel";

/// The struct that a kernel takes as its only parameter, as bytes at an address that is a multiple of 8.
#[derive(Clone, Debug, Default)]
pub struct Parameters(Vec<u64>);

impl Parameters {
    /// Parameters that are one struct.
    ///
    /// # Safety
    /// As [`push`](Self::push).
    pub unsafe fn of<T: Copy>(value: &T) -> Parameters {
        let mut parameters = Parameters::default();
        // SAFETY: as this function's caller says.
        unsafe { parameters.push(value) };
        parameters
    }

    /// Removes everything, and keeps the memory.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds a field at the next multiple of 8 bytes.
    ///
    /// # Safety
    /// `T` is `repr(C)` and has no padding, and its size is a multiple of 8.
    pub unsafe fn push<T: Copy>(&mut self, value: &T) {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let words = size_of::<T>() / 8;
        // SAFETY: so many bytes are initialized, as `T` has no padding; the copy asks for no alignment.
        self.0.extend(
            (0..words).map(|word| unsafe { (&raw const *value).cast::<u64>().add(word).read_unaligned() }),
        );
    }

    /// Adds the bytes of fields at the next multiple of 8, and zeros up to the next one.
    pub fn extend(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0.push(u64::from_ne_bytes(word));
        }
    }

    /// Adds all of other parameters.
    pub fn append(&mut self, other: &Parameters) {
        self.0.extend_from_slice(&other.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_of_another_layout_are_refused() {
        assert_eq!(check_layout(Some(LAYOUT)), Ok(()));
        let other = check_layout(Some(LAYOUT ^ 1)).unwrap_err();
        assert!(other.contains("another version") && other.contains(&format!("{LAYOUT:#010x}")), "{other}");
        let none = check_layout(None).unwrap_err();
        assert!(none.contains("have no launch layout"), "{none}");
    }

    #[test]
    fn ptx_ends_in_a_zero_byte_and_holds_no_other() {
        assert_eq!(terminated(b"ptx".to_vec()).unwrap(), b"ptx\0");
        assert!(matches!(terminated(b"p\0tx".to_vec()), Err(Error::Kernels(_))));
        assert_eq!(terminated(b"\x7fELF\0".to_vec()).unwrap(), b"\x7fELF\0\0");
    }

    #[test]
    fn parameters_are_the_structs_bytes_one_after_the_other() {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Pair {
            first: u64,
            second: [u32; 2],
        }
        let mut parameters = Parameters::default();
        // SAFETY: no padding.
        unsafe { parameters.push(&Pair { first: 7, second: [1, 2] }) };
        parameters.extend(&[0xff; 9]);
        assert_eq!(parameters.0, [7, u64::from_ne_bytes([1, 0, 0, 0, 2, 0, 0, 0]), u64::MAX, 0xff]);
    }
}
