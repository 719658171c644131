//! The kernels: PTX files, loaded when first needed, and how each is launched.
//!
//! `cargo xtask ptx` makes a folder for each kind of GPU and in it a file for each element type and set of kernels:
//! `sm_90/bf16_w4.ptx`. The entry points' names are those of the device crate's table.
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

use cust::{function::FunctionAttribute, module::Module};
use fused_collective_core::{
    dtype::DType,
    launch::{self, LAYOUT, MAX_BLOCKS, layout_of},
};

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
/// The first processor with clusters and programmatic dependent launch.
const HOPPER: u32 = 90;

/// The folders of kernels for a GPU of compute capability `capability` (90 is 9.0), the best first, with the
/// capability that each was compiled for. The `a` of a processor means that its code runs on no other.
fn processors(capability: u32) -> impl Iterator<Item = (&'static str, u32)> {
    [("sm_120a", 120), ("sm_100a", 100), ("sm_90", 90), ("sm_80", 80)].into_iter().filter(
        move |&(name, compiled)| {
            if name.ends_with('a') { compiled == capability } else { compiled <= capability }
        },
    )
}

/// The set of kernels in one file, as part of the file's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Set {
    /// The collectives for groups of at most so many ranks.
    Group(u32),
    /// What needs no group.
    Local,
}

impl Set {
    /// The collectives for `world_size` ranks.
    pub(crate) fn for_group(world_size: u32) -> Option<Set> {
        [2, 4, MAX_RANKS].into_iter().find(|&ranks| world_size <= ranks).map(Set::Group)
    }

    /// The most clusters of `cluster` blocks of a grid.
    fn most_clusters(self, cluster: u32) -> u32 {
        match self {
            Set::Group(_) => MAX_BLOCKS / cluster,
            Set::Local => u32::MAX,
        }
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Set::Group(ranks) => write!(f, "w{ranks}"),
            Set::Local => f.write_str("local"),
        }
    }
}

/// The file of a set of kernels.
fn file_name(dtype: DType, set: Set) -> String {
    let element = match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
    };
    format!("{element}_{set}.ptx")
}

/// One entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    pub(crate) set: Set,
    /// `one_shot`, `two_shot`, `sharded`, `local`, `eager` or another of the table's.
    pub(crate) family: &'static str,
    /// The epilogue, or the eager step.
    pub(crate) part: &'static str,
    /// `p1`, `p2`, `streamed`, or nothing.
    pub(crate) packs: Option<&'static str>,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.family, self.part)?;
        self.packs.map_or(Ok(()), |packs| write!(f, "_{packs}"))
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
    folder: PathBuf,
    /// What they were compiled for: 90 is `sm_90`.
    compiled_for: u32,
    /// Multiprocessors of this GPU.
    units: u32,
    /// The fewest that a GPU of the group has.
    agreed_units: u32,
    /// Blocks of the largest cluster that every rank of the group can launch.
    agreed_cluster: u32,
    launcher: Option<Launcher>,
    functions: HashMap<(DType, Entry), Function>,
    modules: HashMap<(DType, Set), Module>,
}

impl Kernels {
    /// Finds the kernels for `gpu`. None is loaded yet.
    ///
    /// # Errors
    /// There are none: where they were looked for, and what to do.
    pub(crate) fn find(gpu: &Gpu) -> Result<Kernels, Error> {
        let program = env::current_exe().ok();
        let places = places(env::var_os(FOLDER_VARIABLE).map(PathBuf::from), program.as_deref());
        let (folder, compiled_for) = find_folder(&places, gpu.capability)?;
        // Without the functions of CUDA 12 kernels run all the same, one after the other.
        let launcher = if compiled_for >= HOPPER { Launcher::find().ok() } else { None };
        Ok(Kernels {
            folder,
            compiled_for,
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
        format!("kernels for sm_{}, {how} programmatic dependent launch", self.compiled_for)
    }

    /// Loads a set of kernels, which takes the driver about a second, unless it is loaded.
    ///
    /// # Errors
    /// The file is missing, or the driver cannot use it.
    pub(crate) fn load(&mut self, dtype: DType, set: Set) -> Result<(), Error> {
        let Slot::Vacant(slot) = self.modules.entry((dtype, set)) else { return Ok(()) };
        let file = self.folder.join(file_name(dtype, set));
        let remedy = "run `cargo xtask ptx`, which builds them, or use those that came with this program";
        let unusable = |why: &dyn fmt::Display| {
            Error::Kernels(format!("the kernels in {} cannot be used: {why}; {remedy}", file.display()))
        };
        let text = bounded::read_to_string(&file, MAX_MODULE_BYTES).map_err(|error| unusable(&error))?;
        check_layout(&text).map_err(|why| unusable(&why))?;
        let text = CString::new(text).map_err(|_| unusable(&"it holds a zero byte"))?;
        let module = Module::from_ptx_cstr(&text, &[]);
        slot.insert(module.map_err(failed("load the kernels")).map_err(|error| unusable(&error))?);
        Ok(())
    }

    fn function(&mut self, dtype: DType, entry: Entry) -> Result<&mut Function, Error> {
        self.load(dtype, entry.set)?;
        match self.functions.entry((dtype, entry)) {
            Slot::Occupied(slot) => Ok(slot.into_mut()),
            Slot::Vacant(slot) => {
                let missing = |why: Error| {
                    Error::Kernels(format!("kernel {entry} for {dtype}: {why}; run `cargo xtask ptx` again"))
                };
                let module = self.modules.get(&(dtype, entry.set)).ok_or(Error::Unsupported("this group"))?;
                let function =
                    module.get_function(entry.to_string()).map_err(failed("find it")).map_err(missing)?;
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
        dtype: DType,
        entry: Entry,
        cluster: u32,
        row_packs: u32,
        tokens: u64,
    ) -> Result<Launch, Error> {
        let versioned = |version| Entry { packs: Some(version), ..entry };
        let (most, units) = (self.agreed_cluster, self.agreed_units);
        let clusters =
            iter::successors(Some(cluster), |&cluster| (cluster * 2 <= most).then_some(cluster * 2));
        // One-shot pushes a row ahead, and does not wait.
        let waits = entry.family != "one_shot";
        let kernels = RefCell::new(&mut *self);
        let max_threads = |version| Ok(kernels.borrow_mut().function(dtype, versioned(version))?.max_threads);
        let places = |version, cluster: u32, threads| {
            let blocks = kernels.borrow_mut().function(dtype, versioned(version))?.per_unit(threads)? * units;
            Ok(u64::from((blocks / cluster).min(entry.set.most_clusters(cluster))))
        };
        let (version, cluster, threads) =
            choose_places(row_packs, tokens, waits, clusters, max_threads, places)?;
        self.launch_of(dtype, versioned(version), cluster, threads, tokens)
    }

    /// How to launch an entry point without versions on `tokens` rows, in blocks of about `threads`.
    ///
    /// # Errors
    /// As [`for_rows`](Self::for_rows).
    pub(crate) fn for_elements(
        &mut self,
        dtype: DType,
        entry: Entry,
        threads: u32,
        tokens: u64,
    ) -> Result<Launch, Error> {
        let threads = threads.min(self.function(dtype, entry)?.max_threads);
        self.launch_of(dtype, entry, 1, threads, tokens)
    }

    fn launch_of(
        &mut self,
        dtype: DType,
        entry: Entry,
        cluster: u32,
        threads: u32,
        tokens: u64,
    ) -> Result<Launch, Error> {
        let (launcher, units) = (self.launcher, self.units);
        let function = self.function(dtype, entry)?;
        let resident = function.resident(launcher, units, cluster, threads)?;
        if resident == 0 {
            return Err(Error::Kernels(format!(
                "kernel {entry} for {dtype} cannot run on this GPU: not one cluster of {cluster} blocks of {threads} \
                 threads fits"
            )));
        }
        let most = resident.min(entry.set.most_clusters(cluster));
        let clusters = tokens.clamp(1, u64::from(most)) as u32;
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

/// Checks that a module's kernels take what this program launches them with.
fn check_layout(ptx: &str) -> Result<(), String> {
    match layout_of(ptx) {
        Some(LAYOUT) => Ok(()),
        Some(other) => Err(format!(
            "they were built for launch layout {other:#010x} and this program has {LAYOUT:#010x}, so they are of \
             another version"
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
fn find_folder(places: &[PathBuf], capability: u32) -> Result<(PathBuf, u32), Error> {
    for place in places {
        for (processor, compiled_for) in processors(capability) {
            let folder = place.join(processor);
            if folder.is_dir() {
                return Ok((folder, compiled_for));
            }
        }
    }
    let names: Vec<&str> = processors(capability).map(|(name, _)| name).collect();
    let (major, minor) = (capability / 10, capability % 10);
    Err(Error::Kernels(if names.is_empty() {
        format!("there are no kernels for GPUs of compute capability {major}.{minor}: 8.0 is the least")
    } else {
        let looked: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
        format!(
            "no kernels for this GPU ({}) in {}: run `cargo xtask ptx`, or set {FOLDER_VARIABLE} to the folder that \
             holds them",
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
    fn files_and_entry_points_have_the_names_that_the_build_gives_them() {
        assert_eq!(file_name(DType::Bf16, Set::Group(4)), "bf16_w4.ptx");
        assert_eq!(file_name(DType::F32, Set::Local), "f32_local.ptx");
        let entry = Entry { set: Set::Group(2), family: "two_shot", part: "nvfp4", packs: Some("streamed") };
        assert_eq!(entry.to_string(), "two_shot_nvfp4_streamed");
        let entry = Entry { set: Set::Local, family: "eager", part: "square", packs: None };
        assert_eq!(entry.to_string(), "eager_square");
    }

    #[test]
    fn a_group_uses_the_smallest_kernels_that_serve_it() {
        let sets: Vec<_> = [2, 3, 4, 5, 8, 9].map(Set::for_group).to_vec();
        let expected = [Some(2), Some(4), Some(4), Some(8), Some(8), None].map(|n| n.map(Set::Group));
        assert_eq!(sets, expected);
    }

    #[test]
    fn code_for_one_processor_alone_is_used_on_no_other() {
        let names = |capability| processors(capability).map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(90), ["sm_90", "sm_80"]);
        assert_eq!(names(100), ["sm_100a", "sm_90", "sm_80"]);
        assert_eq!(names(103), ["sm_90", "sm_80"]);
        assert_eq!(names(120), ["sm_120a", "sm_90", "sm_80"]);
        assert_eq!(names(86), ["sm_80"]);
        assert!(names(75).is_empty());
    }

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
        assert_eq!(find_folder(&[root.path().to_owned()], 90).unwrap(), (root.path().join("sm_80"), 80));
    }

    #[test]
    fn kernels_of_another_layout_or_without_end_are_refused() {
        let module =
            |layout: u32| format!(".visible .global .align 4 .u32 fused_collective_layout = {layout};\n");
        assert_eq!(check_layout(&module(LAYOUT)), Ok(()));
        let other = check_layout(&module(LAYOUT ^ 1)).unwrap_err();
        assert!(other.contains("another version") && other.contains(&format!("{LAYOUT:#010x}")), "{other}");
        let none = check_layout(".version 8.6\n.visible .entry fill()\n").unwrap_err();
        assert!(none.contains("do not say"), "{none}");

        // Before the driver sees any of it: there is none in this test.
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("bf16_w2.ptx"), module(LAYOUT ^ 1)).unwrap();
        let mut kernels = Kernels {
            folder: folder.path().to_owned(),
            compiled_for: HOPPER,
            units: 1,
            agreed_units: 1,
            agreed_cluster: 1,
            launcher: None,
            functions: HashMap::new(),
            modules: HashMap::new(),
        };
        let error = kernels.load(DType::Bf16, Set::Group(2)).unwrap_err().to_string();
        assert!(error.contains("bf16_w2.ptx") && error.contains("another version"), "{error}");
        assert!(error.contains("run `cargo xtask ptx`"), "{error}");

        std::os::unix::fs::symlink("/dev/zero", folder.path().join("bf16_w4.ptx")).unwrap();
        let error = kernels.load(DType::Bf16, Set::Group(4)).unwrap_err().to_string();
        assert!(error.contains("bf16_w4.ptx") && error.contains("more than 67108864 bytes"), "{error}");
    }
}
