//! The kernels of one GPU: loaded when first needed, and the launch of each.
//!
//! [`fused_collective_core::kernels`] has the names of modules and entry points. A module of another version of the launch
//! structs is refused: kernels that read their parameters in the wrong places reach memory that is not theirs.
//!
//! The partition of a row (version, blocks of a cluster, threads of a block) decides in which order its squares are
//! summed, and so the bits of its norm. It follows from what the group [agreed](Kernels::agree) on, never from what one GPU holds
//! at once: all ranks get the same bits. How many rows are worked on at once is each rank's own affair.
//!
//! What must hold: no grid is larger than what is resident at once, and a kernel is launched as a programmatic
//! dependent, or in clusters, only if it was compiled for a processor that has these: PTX for an older one runs on a new
//! GPU, but does not wait for the kernel before it.

mod module;
mod source;
mod versions;

use std::{collections::HashMap, iter};

use fused_collective_core::{
    fusion::Operation,
    kernels::{self, Addends, Entry, Family, Kernel, Processor, Version},
    launch::{self, MAX_BLOCKS},
};

use versions::{Waits, choose_places, choose_version};

use super::{
    device::{Context, Gpu},
    driver::{Handle, Launcher},
};
use crate::error::Error;

pub use module::{Function, Launch, Module, Parameters};
pub use source::{FOLDER_VARIABLE, KernelSource, ModuleBytes};

/// The largest group that there are kernels for.
pub const MAX_RANKS: u32 = launch::MAX_RANKS as u32;

/// The most clusters of `cluster` blocks of a grid of a kernel's.
fn most_clusters(family: Family, cluster: u32) -> u32 {
    match family {
        Family::OneShot
        | Family::TwoShot
        | Family::Sharded
        | Family::HostSum
        | Family::TwoShotHosts
        | Family::ShardedHosts => MAX_BLOCKS / cluster,
        Family::Local => u32::MAX,
    }
}

/// The largest cluster that can be launched, with the driver's function for it or without.
fn max_cluster(has_launcher: bool) -> u32 {
    if has_launcher { launch::MAX_CLUSTER } else { 1 }
}

/// A kernel's entry points, in the order of [`Version::ALL`]: `None` for a version that it does not have.
#[derive(Debug)]
pub struct Versions {
    family: Family,
    addends: Addends,
    functions: [Option<Function>; 3],
    /// The versions whose epilogue is a parameter.
    any_epilogue: [bool; 3],
}

impl Versions {
    /// A kernel that has one version alone.
    pub fn of_one(family: Family, version: Version, function: Function) -> Versions {
        let mut functions = [None, None, None];
        functions[version as usize] = Some(function);
        Versions { family, addends: Addends::Elements, functions, any_epilogue: [false; 3] }
    }

    /// The exchange that the kernel does.
    pub fn family(&self) -> Family {
        self.family
    }

    fn max_threads(&self, version: Version) -> Option<u32> {
        self.functions[version as usize].as_ref().map(Function::max_threads)
    }

    /// True if a version that is there takes rows of `row_packs` packs, in clusters of at most `cluster` blocks.
    fn takes(&self, row_packs: u32, cluster: u32) -> bool {
        self.functions[Version::Streamed as usize].is_some() || self.keeps(row_packs, cluster)
    }

    /// As [`takes`](Self::takes), in registers.
    fn keeps(&self, row_packs: u32, cluster: u32) -> bool {
        let resident = |version| self.max_threads(version).filter(|_| version != Version::Streamed);
        choose_version(row_packs, iter::once(cluster), resident).is_some()
    }

    fn function(&mut self, version: Version) -> Result<&mut Function, Error> {
        self.functions[version as usize].as_mut().ok_or(Error::Unsupported("rows of this length"))
    }
}

/// A GPU's limits for launches, and those that its group agreed on.
#[derive(Clone, Copy, Debug)]
pub struct LaunchLimits {
    /// Multiprocessors of this GPU.
    units: u32,
    /// The fewest that a GPU of the group has.
    agreed_units: u32,
    /// Blocks of the largest cluster that every rank of the group can launch.
    agreed_cluster: u32,
    launcher: Option<Launcher>,
}

impl LaunchLimits {
    /// The limits of kernels that were compiled for a processor with clusters and dependent launch, or for an older one.
    pub fn of_processor(self, has_clusters: bool) -> LaunchLimits {
        let launcher = self.launcher.filter(|_| has_clusters);
        LaunchLimits { launcher, agreed_cluster: if has_clusters { self.agreed_cluster } else { 1 }, ..self }
    }

    /// Checks that a version holds rows of `row_packs` packs in registers, if the operation normalizes the sum.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: none does.
    pub fn check_post_norm(
        self,
        operation: &Operation,
        versions: &Versions,
        row_packs: u32,
    ) -> Result<(), Error> {
        if operation.post_norm.is_none() || versions.keeps(row_packs, self.agreed_cluster) {
            return Ok(());
        }
        Err(Error::Unsupported("a norm of the sum of rows that do not fit into registers"))
    }

    /// Chooses the launch of a kernel that has versions on `tokens` rows of `row_packs` packs, with `cluster` blocks for each
    /// row, or more if that many cannot hold it in registers.
    ///
    /// # Errors
    /// No version takes such rows, or not one cluster of it can be resident.
    pub fn for_rows(
        self,
        versions: &mut Versions,
        cluster: u32,
        row_packs: u32,
        tokens: u64,
    ) -> Result<Launch, Error> {
        let (most, units, family) = (self.agreed_cluster, self.agreed_units, versions.family);
        let clusters =
            iter::successors(Some(cluster), |&cluster| (cluster * 2 <= most).then_some(cluster * 2));
        // One-shot pushes a row ahead, and does not wait; but to decode one takes as long as the links do.
        let waits = match (family, versions.addends) {
            (Family::OneShot, Addends::Elements) => Waits::Never,
            (Family::OneShot, Addends::Encoded) => Waits::ForItself,
            _ => Waits::ForOthers,
        };
        let max_threads = Version::ALL.map(|version| versions.max_threads(version));
        let places = |version, cluster: u32, threads| {
            let blocks = versions.function(version)?.blocks_per_unit(threads)? * units;
            Ok(u64::from((blocks / cluster).min(most_clusters(family, cluster))))
        };
        let max_threads = |version| max_threads[version as usize];
        let (version, cluster, threads) =
            choose_places(row_packs, tokens, waits, clusters, max_threads, places)?
                .ok_or(Error::Unsupported("rows of this length"))?;
        let any_epilogue = versions.any_epilogue[version as usize];
        let (function, most) = (versions.function(version)?, most_clusters(family, cluster));
        let launch = self.launch_of(function, most, cluster, threads, tokens)?;
        Ok(launch.of_any_epilogue(any_epilogue))
    }

    /// Chooses the launch of a function without versions on `tokens` rows, in blocks of about `threads`.
    ///
    /// # Errors
    /// Not one block of it can be resident.
    pub fn for_elements(self, function: &mut Function, threads: u32, tokens: u64) -> Result<Launch, Error> {
        let threads = threads.min(function.max_threads());
        self.launch_of(function, u32::MAX, 1, threads, tokens)
    }

    fn launch_of(
        self,
        function: &mut Function,
        most: u32,
        cluster: u32,
        threads: u32,
        tokens: u64,
    ) -> Result<Launch, Error> {
        let resident = function.resident(self.launcher, self.units, cluster, threads)?;
        if resident == 0 {
            return Err(Error::Kernels(format!(
                "kernel {} cannot run on this GPU: not one cluster of {cluster} blocks of {threads} threads fits",
                function.name()
            )));
        }
        let clusters = tokens.clamp(1, u64::from(resident.min(most))) as u32;
        Ok(function.launch(clusters * cluster, cluster, threads))
    }
}

/// The kernels for one GPU.
#[derive(Debug)]
pub struct Kernels {
    context: Context,
    source: KernelSource,
    /// The processor that they were compiled for.
    processor: Processor,
    /// The GPU's compute capability.
    capability: u32,
    limits: LaunchLimits,
    modules: HashMap<&'static str, Module>,
    functions: HashMap<Entry, Function>,
    kernels: HashMap<(kernels::Module, &'static Kernel), Versions>,
}

impl Kernels {
    /// Finds the kernels of `source` for `gpu`. None is loaded yet. `module` is the name of one that must be there.
    ///
    /// # Errors
    /// There are none: where they were looked for.
    pub fn find(gpu: &Gpu, source: &KernelSource, module: &str) -> Result<Kernels, Error> {
        let source = source.or_of_environment();
        let processor = source.processor(gpu.capability, module)?;
        // Without the functions of CUDA 12 kernels run all the same, one after the other.
        let launcher = gpu.context().driver().launcher.filter(|_| processor.has_clusters());
        let agreed_cluster = max_cluster(launcher.is_some());
        Ok(Kernels {
            context: gpu.context().clone(),
            source,
            processor,
            capability: gpu.capability,
            limits: LaunchLimits { units: gpu.units, agreed_units: gpu.units, agreed_cluster, launcher },
            modules: HashMap::new(),
            functions: HashMap::new(),
            kernels: HashMap::new(),
        })
    }

    /// The largest cluster that kernels can be launched in.
    pub fn max_cluster(&self) -> u32 {
        max_cluster(self.limits.launcher.is_some())
    }

    /// Shares rows from now on as GPUs with `units` multiprocessors and clusters of at most `cluster` blocks do: the least
    /// of all ranks'.
    pub fn agree(&mut self, units: u32, cluster: u32) {
        let cluster = cluster.min(self.max_cluster());
        (self.limits.agreed_units, self.limits.agreed_cluster) = (units, cluster);
    }

    /// The limits that launches keep.
    pub fn limits(&self) -> LaunchLimits {
        self.limits
    }

    /// Describes the processor, and whether launches overlap, for reports.
    pub fn describe(&self) -> String {
        let how = if self.limits.launcher.is_some() { "with" } else { "without" };
        format!("kernels for {}, {how} programmatic dependent launch", self.processor.name)
    }

    /// Loads a module, unless it is loaded. PTX takes the driver a second or so.
    ///
    /// # Errors
    /// It is missing, or the driver cannot use it.
    pub fn load(&mut self, module: &'static str) -> Result<&Module, Error> {
        if !self.modules.contains_key(module) {
            let load = |image| {
                Module::load(&self.context, image)
                    .map_err(|error| Error::Kernels(format!("the module {module} cannot be used: {error}")))
            };
            let loaded = self.source.load(self.processor, self.capability, module, load)?;
            self.modules.insert(module, loaded);
        }
        self.modules.get(module).ok_or(Error::Unsupported("this module"))
    }

    /// The versions of a kernel of the table's, with the one that streams if rows of `row_packs` packs need it.
    ///
    /// # Errors
    /// As [`load`](Self::load); the module lacks the kernel.
    pub fn versions(
        &mut self,
        module: kernels::Module,
        kernel: &'static Kernel,
        row_packs: u32,
    ) -> Result<&mut Versions, Error> {
        let key = (module, kernel);
        let (processor, cluster) = (self.processor, self.limits.agreed_cluster);
        if !self.kernels.contains_key(&key) {
            let loaded = self.load(module.name())?;
            let has = |version| module.set.has(kernel, version, processor.has_clusters());
            let resident = |version| has(version).then(|| loaded.function(kernel.name(version))).transpose();
            let functions = [resident(Version::P1)?, resident(Version::P2)?, None];
            let is_any = kernel.epilogue.is_none();
            let any_epilogue = [is_any, is_any, true];
            let &Kernel { family, addends, .. } = kernel;
            self.kernels.insert(key, Versions { family, addends, functions, any_epilogue });
        }
        if !self.kernels.get(&key).is_some_and(|versions| versions.takes(row_packs, cluster)) {
            let any = kernel.of_any().ok_or(Error::Unsupported("this kernel"))?;
            let module = kernels::Module { set: module.set.streamed(), ..module };
            let streamed = self.load(module.name())?.function(any.name(Version::Streamed))?;
            if let Some(versions) = self.kernels.get_mut(&key) {
                versions.functions[Version::Streamed as usize] = Some(streamed);
            }
        }
        self.kernels.get_mut(&key).ok_or(Error::Unsupported("this kernel"))
    }

    /// An entry point without versions.
    ///
    /// # Errors
    /// As [`load`](Self::load); the module lacks it.
    pub fn function(&mut self, entry: Entry) -> Result<&mut Function, Error> {
        if !self.functions.contains_key(&entry) {
            let function = self.load(entry.module)?.function(entry.name)?;
            self.functions.insert(entry, function);
        }
        self.functions.get_mut(&entry).ok_or(Error::Unsupported("this kernel"))
    }

    /// Launches a kernel on `stream`, where it may start before the kernel ahead of it is complete.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As [`Launch::enqueue`]; `stream` is a stream of the current context.
    pub unsafe fn launch(
        &self,
        launch: Launch,
        parameters: &Parameters,
        stream: Handle,
    ) -> Result<(), Error> {
        // SAFETY: as this function's caller says.
        unsafe { launch.enqueue(&self.context, self.limits.launcher, parameters, stream) }
    }

    /// As [`launch`](Self::launch), but the kernel starts when all ahead of it is complete.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_after(
        &self,
        launch: Launch,
        parameters: &Parameters,
        stream: Handle,
    ) -> Result<(), Error> {
        // SAFETY: as this function's caller says.
        unsafe { launch.after_all().enqueue(&self.context, self.limits.launcher, parameters, stream) }
    }
}
