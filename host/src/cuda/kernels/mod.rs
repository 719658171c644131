//! The kernels: PTX files or an archive of PTX and machine code, loaded when first needed, and how each is launched.
//!
//! `cargo xtask ptx` makes a folder for each kind of GPU and in it a file for each module: `sm_90/bf16_w4.ptx`.
//! [`fused_collective_core::kernels`] has their names, and those of the entry points. Where there is no such folder, kernels
//! are those that `fused_collective_kernels` carries.
//!
//! A file says what layout of the launch structs it was built for, and one of another layout is refused: kernels that
//! read their parameters in the wrong places reach memory that is not theirs.
//!
//! How a row is shared (version, blocks of a cluster, threads of a block) decides in which order its squares are summed,
//! and so the bits of its norm. It follows from what the group [agreed](Kernels::agree) on, never from what one GPU holds
//! at once: all ranks get the same bits. How many rows are worked on at once is each rank's own affair.
//!
//! What must hold: no grid is larger than what is resident at once, and a kernel is launched as a programmatic
//! dependent, or in clusters, only if it was compiled for a processor that has these (`sm_90`): PTX for an older one
//! runs on a new GPU, but does not wait for the kernel before it.

mod versions;

use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry as Slot},
    env,
    ffi::{CString, c_void},
    fmt, iter,
    path::{Path, PathBuf},
};

use cust::function::FunctionAttribute;
use fused_collective_bench::{launch as bench, table};
use fused_collective_core::{
    kernels::{Entry, Family, Kernel, Module, Processor},
    launch::{self, LAYOUT, MAX_BLOCKS, layout_of},
};
use fused_collective_kernels::Archive;

use versions::choose_places;

use super::{
    Error,
    device::Gpu,
    driver::{Handle, LaunchAttribute, LaunchConfig, Launcher, check, failed},
};
use crate::bounded;

/// Names the folder with the kernels.
pub const FOLDER_VARIABLE: &str = "FUSED_COLLECTIVE_PTX";
/// The folder's name beside the program.
const FOLDER: &str = "ptx";
/// The largest group that there are kernels for.
pub const MAX_RANKS: u32 = launch::MAX_RANKS as u32;
/// The most bytes of a module that is read: twenty times as many as the largest has.
const MAX_MODULE_BYTES: u64 = 64 << 20;

/// The most clusters of `cluster` blocks of a grid of a kernel's.
fn most_clusters(family: Family, cluster: u32) -> u32 {
    match family {
        Family::OneShot | Family::TwoShot | Family::Sharded => MAX_BLOCKS / cluster,
        Family::Local => u32::MAX,
    }
}

/// A loaded entry point.
#[derive(Debug)]
struct Function {
    handle: Handle,
    /// The most threads of a block that its registers allow.
    max_threads: u32,
    /// Blocks that one multiprocessor holds at once, by their threads.
    per_unit: HashMap<u32, u32>,
    /// Clusters that are resident at once, by cluster size and threads of a block.
    resident: HashMap<(u32, u32), u32>,
}

const OCCUPANCY: &str = "ask how many blocks the GPU holds at once";

impl Function {
    /// Blocks of `threads` that one multiprocessor holds at once: as many on every GPU of a kind.
    fn per_unit(&mut self, threads: u32) -> Result<u32, Error> {
        let slot = match self.per_unit.entry(threads) {
            Slot::Occupied(slot) => return Ok(*slot.get()),
            Slot::Vacant(slot) => slot,
        };
        let mut count = 0;
        // SAFETY: a loaded function, and room for the answer.
        let code = unsafe {
            cust::sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut count,
                self.handle.cast(),
                threads as i32,
                0,
            )
        };
        check(OCCUPANCY, code as u32)?;
        Ok(*slot.insert(count.max(0) as u32))
    }

    /// Clusters of `cluster` blocks of `threads` that a whole GPU of `units` multiprocessors holds at once. Clusters of
    /// several blocks leave some multiprocessors idle, on each GPU others.
    fn resident(
        &mut self,
        launcher: Option<Launcher>,
        units: u32,
        cluster: u32,
        threads: u32,
    ) -> Result<u32, Error> {
        let Some(launcher) = launcher.filter(|_| cluster > 1) else {
            return Ok(self.per_unit(threads)? * units);
        };
        let slot = match self.resident.entry((cluster, threads)) {
            Slot::Occupied(slot) => return Ok(*slot.get()),
            Slot::Vacant(slot) => slot,
        };
        let attribute = LaunchAttribute::cluster(cluster);
        let config = LaunchConfig {
            grid: [cluster, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
            stream: std::ptr::null_mut(),
            attributes: &attribute,
            attribute_count: 1,
        };
        let mut count = 0;
        // SAFETY: a loaded function, and room for the answer.
        check(OCCUPANCY, unsafe { (launcher.max_active_clusters)(&mut count, self.handle, &config) })?;
        Ok(*slot.insert(count.max(0) as u32))
    }
}

/// The largest cluster that can be launched, with the driver's function for it or without.
fn max_cluster(has_launcher: bool) -> u32 {
    if has_launcher { launch::MAX_CLUSTER } else { 1 }
}

/// What a launch is made of, besides its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    function: Handle,
    blocks: u32,
    cluster: u32,
    threads: u32,
}

impl Launch {
    /// Blocks of the grid.
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }
}

/// The kernels for one GPU.
#[derive(Debug)]
pub(crate) struct Kernels {
    /// Where modules are, if not in the library's archive.
    folder: Option<PathBuf>,
    /// This GPU's compute capability.
    capability: u32,
    /// What they were compiled for.
    processor: Processor,
    /// Multiprocessors of this GPU.
    units: u32,
    /// The fewest that a GPU of the group has.
    agreed_units: u32,
    /// Blocks of the largest cluster that every rank of the group can launch.
    agreed_cluster: u32,
    launcher: Option<Launcher>,
    functions: HashMap<Entry, Function>,
    modules: HashMap<&'static str, cust::module::Module>,
}

impl Kernels {
    /// Finds the kernels for `gpu`. None is loaded yet.
    ///
    /// # Errors
    /// There are none: where they were looked for, and what to do.
    pub(crate) fn find(gpu: &Gpu) -> Result<Kernels, Error> {
        let program = env::current_exe().ok();
        let named = env::var_os(FOLDER_VARIABLE).map(PathBuf::from);
        let is_named = named.is_some();
        let (folder, processor) = match find_folder(&places(named, program.as_deref()), gpu.capability) {
            Ok((folder, processor)) => (Some(folder), processor),
            Err(none) if is_named => return Err(none),
            Err(none) => (None, carried_for(gpu.capability)?.ok_or(none)?),
        };
        // Without the functions of CUDA 12 kernels run all the same, one after the other.
        let launcher = if processor.has_clusters() { Launcher::find().ok() } else { None };
        Ok(Kernels {
            folder,
            capability: gpu.capability,
            processor,
            units: gpu.units,
            agreed_units: gpu.units,
            agreed_cluster: max_cluster(launcher.is_some()),
            launcher,
            functions: HashMap::new(),
            modules: HashMap::new(),
        })
    }

    /// The largest cluster that kernels can be launched in.
    pub(crate) fn max_cluster(&self) -> u32 {
        max_cluster(self.launcher.is_some())
    }

    /// From now on rows are shared as by GPUs with `units` multiprocessors and clusters of at most `cluster` blocks: the
    /// least of all ranks'.
    pub(crate) fn agree(&mut self, units: u32, cluster: u32) {
        (self.agreed_units, self.agreed_cluster) = (units, cluster.min(self.max_cluster()));
    }

    /// For reports: the processor, and whether launches overlap.
    pub(crate) fn describe(&self) -> String {
        let how = if self.launcher.is_some() { "with" } else { "without" };
        format!("kernels for {}, {how} programmatic dependent launch", self.processor.name)
    }

    /// Loads a module, which takes the driver about a second, unless it is loaded.
    ///
    /// # Errors
    /// The file is missing, or the driver cannot use it.
    pub(crate) fn load(&mut self, module: &'static str) -> Result<(), Error> {
        let Slot::Vacant(slot) = self.modules.entry(module) else { return Ok(()) };
        slot.insert(match &self.folder {
            Some(folder) => load_file(folder, module)?,
            None => load_carried(self.processor, self.capability, module)?,
        });
        Ok(())
    }

    fn function(&mut self, entry: Entry) -> Result<&mut Function, Error> {
        self.load(entry.module)?;
        match self.functions.entry(entry) {
            Slot::Occupied(slot) => Ok(slot.into_mut()),
            Slot::Vacant(slot) => {
                let missing = |why: Error| {
                    Error::Kernels(format!("kernel {entry}: {why}; run `cargo xtask ptx` again"))
                };
                let module = self.modules.get(entry.module).ok_or(Error::Unsupported("this group"))?;
                let function = module.get_function(entry.name).map_err(failed("find it")).map_err(missing)?;
                let max_threads = function
                    .get_attribute(FunctionAttribute::MaxThreadsPerBlock)
                    .map_err(failed("ask for its limits"))?;
                Ok(slot.insert(Function {
                    handle: function.to_raw().cast(),
                    max_threads: max_threads.max(0) as u32,
                    per_unit: HashMap::new(),
                    resident: HashMap::new(),
                }))
            }
        }
    }

    /// How to launch a kernel that has versions on `tokens` rows of `row_packs` packs, with `cluster` blocks for each
    /// row, or more if that many cannot hold it in registers.
    ///
    /// # Errors
    /// The kernel is missing, or not one cluster of it can be resident.
    pub(crate) fn for_rows(
        &mut self,
        module: Module,
        kernel: &Kernel,
        cluster: u32,
        row_packs: u32,
        tokens: u64,
    ) -> Result<Launch, Error> {
        let entry = |version| module.entry(kernel, version);
        let (most, units) = (self.agreed_cluster, self.agreed_units);
        let clusters =
            iter::successors(Some(cluster), |&cluster| (cluster * 2 <= most).then_some(cluster * 2));
        // One-shot pushes a row ahead, and does not wait.
        let waits = kernel.family != Family::OneShot;
        let kernels = RefCell::new(&mut *self);
        let max_threads = |version| Ok(kernels.borrow_mut().function(entry(version))?.max_threads);
        let places = |version, cluster: u32, threads| {
            let blocks = kernels.borrow_mut().function(entry(version))?.per_unit(threads)? * units;
            Ok(u64::from((blocks / cluster).min(most_clusters(kernel.family, cluster))))
        };
        let (version, cluster, threads) =
            choose_places(row_packs, tokens, waits, clusters, max_threads, places)?;
        self.launch_of(
            entry(version),
            cluster,
            threads,
            tokens.min(most_clusters(kernel.family, cluster).into()),
        )
    }

    /// How to launch an entry point without versions, and without a collective, on `tokens` rows, in blocks of about
    /// `threads`.
    ///
    /// # Errors
    /// As [`for_rows`](Self::for_rows).
    pub(crate) fn for_elements(&mut self, entry: Entry, threads: u32, tokens: u64) -> Result<Launch, Error> {
        let threads = threads.min(self.function(entry)?.max_threads);
        self.launch_of(entry, 1, threads, tokens)
    }

    fn launch_of(&mut self, entry: Entry, cluster: u32, threads: u32, tokens: u64) -> Result<Launch, Error> {
        let (launcher, units) = (self.launcher, self.units);
        let function = self.function(entry)?;
        let resident = function.resident(launcher, units, cluster, threads)?;
        if resident == 0 {
            return Err(Error::Kernels(format!(
                "kernel {entry} cannot run on this GPU: not one cluster of {cluster} blocks of {threads} \
                 threads fits"
            )));
        }
        let clusters = tokens.clamp(1, u64::from(resident)) as u32;
        Ok(Launch { function: function.handle, blocks: clusters * cluster, cluster, threads })
    }

    /// Launches a kernel on `stream`, where it may start before the kernel ahead of it is complete.
    ///
    /// # Safety
    /// `parameters` is the struct that the kernel takes, the addresses in it are as its documentation says until the
    /// kernel has ended, and the launch keeps the rules of [`fused_collective_core::launch`].
    pub(crate) unsafe fn launch<P: Copy>(
        &self,
        launch: Launch,
        parameters: &P,
        stream: Handle,
    ) -> Result<(), Error> {
        let mut arguments = [(&raw const *parameters).cast_mut().cast::<c_void>()];
        let doing = "launch a kernel";
        let Some(launcher) = self.launcher else {
            // SAFETY: the kernel takes one argument, which the driver copies before it returns.
            let code = unsafe {
                cust::sys::cuLaunchKernel(
                    launch.function.cast(),
                    launch.blocks,
                    1,
                    1,
                    launch.threads,
                    1,
                    1,
                    0,
                    stream.cast(),
                    arguments.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            return check(doing, code as u32);
        };
        let attributes =
            [LaunchAttribute::programmatic_dependent(), LaunchAttribute::cluster(launch.cluster)];
        let config = LaunchConfig {
            grid: [launch.blocks, 1, 1],
            block: [launch.threads, 1, 1],
            shared_bytes: 0,
            stream,
            attributes: attributes.as_ptr(),
            attribute_count: if launch.cluster > 1 { 2 } else { 1 },
        };
        // SAFETY: as above.
        let code = unsafe {
            (launcher.launch)(&config, launch.function, arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        check(doing, code)
    }
}

fn load_file(folder: &Path, module: &str) -> Result<cust::module::Module, Error> {
    let file = folder.join(format!("{module}.ptx"));
    let remedy = "run `cargo xtask ptx`, which builds them, or use those that came with this program";
    let unusable = |why: &dyn fmt::Display| {
        Error::Kernels(format!("the kernels in {} cannot be used: {why}; {remedy}", file.display()))
    };
    let text = bounded::read_to_string(&file, MAX_MODULE_BYTES).map_err(|error| unusable(&error))?;
    check_layout(layout_of(&text), LAYOUT).map_err(|why| unusable(&why))?;
    check_benchmark(module, &text).map_err(|why| unusable(&why))?;
    let text = CString::new(text).map_err(|_| unusable(&"it holds a zero byte"))?;
    let module = cust::module::Module::from_ptx_cstr(&text, &[]);
    module.map_err(failed("load the kernels")).map_err(|error| unusable(&error))
}

/// Loads a module that the library carries. Its archive is of this version's launch layout, or else it does not open.
fn load_carried(processor: Processor, capability: u32, name: &str) -> Result<cust::module::Module, Error> {
    let archive = Archive::embedded().map_err(unusable)?;
    let Some(module) = archive.module(processor.name, name) else {
        return Err(unusable(format!("{name} for {} is missing", processor.name)));
    };
    let ptx = module.ptx().map_err(unusable)?;
    check_benchmark(name, &String::from_utf8_lossy(&ptx)).map_err(unusable)?;
    // A driver older than the release of the assembler does not take its machine code.
    if let Some(code) = module.machine_code(capability).map_err(unusable)?
        && let Ok(module) = cust::module::Module::from_cubin(code, &[])
    {
        return Ok(module);
    }
    let ptx = CString::new(ptx).map_err(unusable)?;
    let module = cust::module::Module::from_ptx_cstr(&ptx, &[]);
    module.map_err(failed("load the kernels")).map_err(unusable)
}

/// Checks the launch layout of one of the benchmark's own modules.
fn check_benchmark(module: &str, ptx: &str) -> Result<(), String> {
    if table::modules().any(|name| name == module) {
        return check_layout(bench::layout_of(ptx), bench::LAYOUT);
    }
    Ok(())
}

/// The best processor for the GPU that the library carries kernels for.
fn carried_for(capability: u32) -> Result<Option<Processor>, Error> {
    let archive = Archive::embedded().map_err(unusable)?;
    let carried = |processor: &Processor| archive.processors().any(|name| name == processor.name);
    Ok(Processor::for_capability(capability).find(carried))
}

fn unusable(why: impl fmt::Display) -> Error {
    Error::Kernels(format!("the kernels in this library cannot be used: {why}"))
}

/// Checks that a module's kernels, of launch layout `built`, take what this program, of layout `own`, launches them with.
fn check_layout(built: Option<u32>, own: u32) -> Result<(), String> {
    match built {
        Some(built) if built == own => Ok(()),
        Some(built) => Err(format!(
            "they were built for launch layout {built:#010x} and this program has {own:#010x}, so they are of another \
             version"
        )),
        None => {
            Err("they do not say which launch layout they were built for, as those of this version do"
                .to_owned())
        }
    }
}

/// Where kernels may be: the folder that was named, or else beside the program, or beside its folder, where `cargo`
/// has them.
fn places(named: Option<PathBuf>, program: Option<&Path>) -> Vec<PathBuf> {
    if let Some(named) = named {
        return vec![named];
    }
    let folders = program.into_iter().flat_map(|program| program.ancestors().skip(1).take(2));
    folders.map(|folder| folder.join(FOLDER)).collect()
}

/// The first of `places` that has kernels for the GPU, and what they were compiled for.
fn find_folder(places: &[PathBuf], capability: u32) -> Result<(PathBuf, Processor), Error> {
    for place in places {
        for processor in Processor::for_capability(capability) {
            let folder = place.join(processor.name);
            if folder.is_dir() {
                return Ok((folder, processor));
            }
        }
    }
    let names: Vec<&str> = Processor::for_capability(capability).map(|processor| processor.name).collect();
    let (major, minor) = (capability / 10, capability % 10);
    Err(Error::Kernels(if names.is_empty() {
        format!("there are no kernels for GPUs of compute capability {major}.{minor}: 8.0 is the least")
    } else {
        let looked: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
        format!(
            "no kernels for this GPU ({}) in this library or in {}: run `cargo xtask ptx`, or set {FOLDER_VARIABLE} \
             to the folder that holds them",
            names.join(" or "),
            looked.join(" or ")
        )
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn kernels_are_found_beside_the_program_or_where_the_variable_says() {
        let program = Path::new("/a/target/release/program");
        let expected = ["/a/target/release/ptx", "/a/target/ptx"].map(PathBuf::from);
        assert_eq!(places(None, Some(program)), expected);
        assert_eq!(places(Some("/b".into()), Some(program)), [PathBuf::from("/b")]);
    }

    #[test]
    fn missing_kernels_are_an_error_that_says_where_and_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let error = find_folder(&[root.path().to_owned()], 90).unwrap_err().to_string();
        assert!(
            error.contains("cargo xtask ptx") && error.contains(&root.path().display().to_string()),
            "{error}"
        );
        let error = find_folder(&[root.path().to_owned()], 75).unwrap_err().to_string();
        assert!(error.contains("7.5"), "{error}");
        fs::create_dir(root.path().join("sm_80")).unwrap();
        let (folder, processor) = find_folder(&[root.path().to_owned()], 90).unwrap();
        assert_eq!((folder, processor.capability), (root.path().join("sm_80"), 80));
    }

    #[test]
    fn kernels_of_another_layout_or_without_end_are_refused() {
        let module =
            |layout: u32| format!(".visible .global .align 4 .u32 fused_collective_layout = {layout};\n");
        assert_eq!(check_layout(layout_of(&module(LAYOUT)), LAYOUT), Ok(()));
        let other = check_layout(Some(LAYOUT ^ 1), LAYOUT).unwrap_err();
        assert!(other.contains("another version") && other.contains(&format!("{LAYOUT:#010x}")), "{other}");
        let none = check_layout(None, LAYOUT).unwrap_err();
        assert!(none.contains("do not say"), "{none}");

        // Before the driver sees any of it: there is none in this test.
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("bf16_w2.ptx"), module(LAYOUT ^ 1)).unwrap();
        let mut kernels = Kernels {
            folder: Some(folder.path().to_owned()),
            capability: 90,
            processor: Processor::ALL[1],
            units: 1,
            agreed_units: 1,
            agreed_cluster: 1,
            launcher: None,
            functions: HashMap::new(),
            modules: HashMap::new(),
        };
        let error = kernels.load("bf16_w2").unwrap_err().to_string();
        assert!(error.contains("bf16_w2.ptx") && error.contains("another version"), "{error}");
        assert!(error.contains("run `cargo xtask ptx`"), "{error}");

        std::os::unix::fs::symlink("/dev/zero", folder.path().join("bf16_w4.ptx")).unwrap();
        let error = kernels.load("bf16_w4").unwrap_err().to_string();
        assert!(error.contains("bf16_w4.ptx") && error.contains("more than 67108864 bytes"), "{error}");
    }
}
