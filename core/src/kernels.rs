//! The table of kernels: their entry points, the modules that hold them, and the largest blocks that each takes.
//!
//! A [`Module`] is a file of PTX, `bf16_w4` for instance: the kernels of one element type and one [`Set`]. A
//! [`Kernel`] is a [`Family`] with an [`Epilogue`], in every [`Version`] an entry point: `two_shot_fp4_p2`. There is
//! a folder of modules for each [`Processor`].
//!
//! Properties of a whole launch that are off the critical path are parameters, not kernels of their own: the norm beside its
//! codes, gamma's type, weight bias and epsilon, the bias and the roundings of the sum, the layout of scales, their type and
//! the size of blocks. So an epilogue is a norm or none, times five quantizers.
//!
//! Tests hold the table against the compiled kernels, both ways. Kernels that are not the library's own are not in it:
//! their names are those crates' affair, and their [`bounds`] those of the set that they resemble.

use core::fmt;

use crate::{dtype::DType, launch::MAX_RANKS, plan::Algorithm, quant::Quantization};

/// A kind of GPU that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Processor {
    /// The processor's name in PTX, and that of the folder of its modules. With an `a` at its end, its code runs on no
    /// other.
    pub name: &'static str,
    /// Its compute capability: 90 is 9.0.
    pub capability: u32,
}

impl Processor {
    /// Every processor, the oldest first.
    pub const ALL: [Processor; 4] = [
        Processor { name: "sm_80", capability: 80 },
        Processor { name: "sm_90", capability: 90 },
        Processor { name: "sm_100a", capability: 100 },
        Processor { name: "sm_120a", capability: 120 },
    ];

    /// The processors whose code runs on a GPU of compute capability `capability` (90 is 9.0), the best first.
    pub fn for_capability(capability: u32) -> impl Iterator<Item = Processor> {
        let runs = move |processor: &Processor| {
            if processor.name.ends_with('a') {
                processor.capability == capability
            } else {
                processor.capability <= capability
            }
        };
        Processor::ALL.into_iter().rev().filter(runs)
    }

    /// True where kernels may be launched in clusters and as programmatic dependents. PTX for an older processor runs on
    /// a new GPU, but does not wait for the kernel before it.
    pub const fn has_clusters(self) -> bool {
        self.capability >= 90
    }
}

/// A set of kernels: a module's, for one element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Set {
    /// The collectives for groups of 2 ranks, of rows in registers. One-shot sends no more bytes between two than two-shot, in
    /// one hop: whoever asks for two-shot gets a larger group's.
    Group2,
    /// The collectives for groups of at most 4 ranks, of rows in registers.
    Group4,
    /// The collectives for groups of at most 8 ranks, of rows in registers.
    Group8,
    /// The kernels that need no group, of rows in registers.
    Local,
    /// Every kernel that streams its rows, for groups of any size: clusters of eight blocks hold 65,536 elements of 16 bits in
    /// registers, so only GPUs without clusters, and the longest rows of `f32`, use these.
    Streamed,
}

impl Set {
    /// Every set.
    pub const ALL: [Set; 5] = [Set::Group2, Set::Group4, Set::Group8, Set::Local, Set::Streamed];

    /// The smallest set with the collective for `world_size` ranks; `None` for more than [`MAX_RANKS`].
    pub const fn for_group(world_size: u32, algorithm: Algorithm) -> Option<Set> {
        const { assert!(MAX_RANKS == 8) };
        match (world_size, algorithm) {
            (..=2, Algorithm::OneShot | Algorithm::ShardedTwoShot) => Some(Set::Group2),
            (..=4, _) => Some(Set::Group4),
            (5..=8, _) => Some(Set::Group8),
            _ => None,
        }
    }

    /// The set's part of a module's name.
    pub const fn name(self) -> &'static str {
        match self {
            Set::Group2 => "w2",
            Set::Group4 => "w4",
            Set::Group8 => "w8",
            Set::Local => "local",
            Set::Streamed => "streamed",
        }
    }

    /// The names of the set's entry points.
    pub fn entries(self) -> impl Iterator<Item = &'static str> {
        let has = move |kernel: &Kernel, version| match (version, kernel.family) {
            (Version::Streamed, _) => self == Set::Streamed,
            (_, Family::Local) => self == Set::Local,
            (_, Family::TwoShot) => matches!(self, Set::Group4 | Set::Group8),
            (_, Family::OneShot | Family::Sharded) => matches!(self, Set::Group2 | Set::Group4 | Set::Group8),
        };
        KERNELS.iter().flat_map(move |kernel| {
            Version::ALL
                .into_iter()
                .filter(move |version| has(kernel, *version))
                .map(|version| kernel.name(version))
        })
    }
}

/// A file of kernels, without what it ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    /// The element type of its kernels.
    pub dtype: DType,
    /// Its kernels.
    pub set: Set,
}

impl Module {
    /// Every module.
    pub fn all() -> impl Iterator<Item = Module> {
        DType::ALL.into_iter().flat_map(|dtype| Set::ALL.map(|set| Module { dtype, set }))
    }

    /// The module's name: `bf16_w4`.
    pub const fn name(self) -> &'static str {
        macro_rules! of_type {
            ($element:literal) => {
                match self.set {
                    Set::Group2 => concat!($element, "_w2"),
                    Set::Group4 => concat!($element, "_w4"),
                    Set::Group8 => concat!($element, "_w8"),
                    Set::Local => concat!($element, "_local"),
                    Set::Streamed => concat!($element, "_streamed"),
                }
            };
        }
        match self.dtype {
            DType::F32 => of_type!("f32"),
            DType::F16 => of_type!("f16"),
            DType::Bf16 => of_type!("bf16"),
        }
    }

    /// The module called `name`, if it is one of the table's.
    pub fn named(name: &str) -> Option<Module> {
        Module::all().find(|module| module.name() == name)
    }
}

/// An entry point: one of this table's, or another crate's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The name of the module that has it.
    pub module: &'static str,
    /// Its own name.
    pub name: &'static str,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.name, self.module)
    }
}

/// The exchange between ranks that a kernel does, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// [`Algorithm::OneShot`].
    OneShot,
    /// [`Algorithm::TwoShot`].
    TwoShot,
    /// [`Algorithm::ShardedTwoShot`].
    Sharded,
    /// No exchange: the residual and the epilogue alone.
    Local,
}

impl From<Algorithm> for Family {
    fn from(algorithm: Algorithm) -> Family {
        match algorithm {
            Algorithm::OneShot => Family::OneShot,
            Algorithm::TwoShot => Family::TwoShot,
            Algorithm::ShardedTwoShot => Family::Sharded,
        }
    }
}

/// The quantizer of an epilogue, which the parameters of its kernels hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantizer {
    /// `Unquantized`.
    None,
    /// `Fp8Static`.
    Fp8,
    /// `Fp8PerToken`.
    Fp8Token,
    /// `Fp8Block`: per group, and MXFP8.
    Fp8Block,
    /// `Fp4`: NVFP4 and MXFP4.
    Fp4,
}

impl From<Quantization> for Quantizer {
    fn from(quantization: Quantization) -> Quantizer {
        match quantization {
            Quantization::None => Quantizer::None,
            Quantization::Fp8Static => Quantizer::Fp8,
            Quantization::Fp8PerToken => Quantizer::Fp8Token,
            Quantization::Fp8PerGroup { .. } | Quantization::MxFp8 { .. } => Quantizer::Fp8Block,
            Quantization::NvFp4 { .. } | Quantization::MxFp4 { .. } => Quantizer::Fp4,
        }
    }
}

/// The work of a kernel on a row's sum: of its norm, `RmsNorm<Q>`, or of itself, `Plain<Q>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// True for `RmsNorm`.
    pub norm: bool,
    /// `Q`.
    pub quantizer: Quantizer,
}

impl Epilogue {
    /// The epilogue of an operation with a norm or without, and of `quantization`.
    pub fn of(norm: bool, quantization: Quantization) -> Epilogue {
        Epilogue { norm, quantizer: quantization.into() }
    }
}

/// A kernel's way to keep rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// One 16-byte pack of a row in each thread's registers.
    P1,
    /// Two packs of a row in each thread's registers.
    P2,
    /// Rows of any length, read again where they are needed again.
    Streamed,
}

impl Version {
    /// Every version.
    pub const ALL: [Version; 3] = [Version::P1, Version::P2, Version::Streamed];

    /// The last part of an entry point's name.
    pub const fn name(self) -> &'static str {
        match self {
            Version::P1 => "p1",
            Version::P2 => "p2",
            Version::Streamed => "streamed",
        }
    }

    /// The version that an entry point's name ends in.
    fn of(entry: &str) -> Option<Version> {
        let (_, last) = entry.rsplit_once('_')?;
        Version::ALL.into_iter().find(|version| version.name() == last)
    }
}

/// A kernel: a family with an epilogue, an entry point in every version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The work between ranks.
    pub family: Family,
    /// The work on a row.
    pub epilogue: Epilogue,
    /// The names of its entry points, in the order of [`Version::ALL`].
    entries: [&'static str; 3],
}

macro_rules! kernels {
    ($($family:ident $norm:literal $quantizer:ident $name:literal)*) => {
        /// The table. Names in collectives say only how the norm is quantized, as they have no quantization without.
        static KERNELS: &[Kernel] = &[$(Kernel {
            family: Family::$family,
            epilogue: Epilogue { norm: $norm, quantizer: Quantizer::$quantizer },
            entries: [concat!($name, "_p1"), concat!($name, "_p2"), concat!($name, "_streamed")],
        }),*];
    };
}

kernels! {
    OneShot false None     "one_shot_none"
    OneShot true  None     "one_shot_norm"
    OneShot true  Fp8      "one_shot_fp8"
    OneShot true  Fp8Token "one_shot_fp8_token"
    OneShot true  Fp8Block "one_shot_fp8_block"
    OneShot true  Fp4      "one_shot_fp4"
    TwoShot false None     "two_shot_none"
    TwoShot true  None     "two_shot_norm"
    TwoShot true  Fp8      "two_shot_fp8"
    TwoShot true  Fp8Token "two_shot_fp8_token"
    TwoShot true  Fp8Block "two_shot_fp8_block"
    TwoShot true  Fp4      "two_shot_fp4"
    Sharded true  None     "sharded_norm"
    Sharded true  Fp8      "sharded_fp8"
    Sharded true  Fp8Token "sharded_fp8_token"
    Sharded true  Fp8Block "sharded_fp8_block"
    Sharded true  Fp4      "sharded_fp4"
    Local   false None     "local_none"
    Local   false Fp8      "local_fp8"
    Local   false Fp8Token "local_fp8_token"
    Local   false Fp8Block "local_fp8_block"
    Local   false Fp4      "local_fp4"
    Local   true  None     "local_norm"
    Local   true  Fp8      "local_norm_fp8"
    Local   true  Fp8Token "local_norm_fp8_token"
    Local   true  Fp8Block "local_norm_fp8_block"
    Local   true  Fp4      "local_norm_fp4"
}

impl Kernel {
    /// The kernel of a family and an epilogue, if there is one.
    pub fn of(family: Family, epilogue: Epilogue) -> Option<&'static Kernel> {
        KERNELS.iter().find(|kernel| kernel.family == family && kernel.epilogue == epilogue)
    }

    /// The name of a version's entry point.
    pub const fn name(&self, version: Version) -> &'static str {
        self.entries[version as usize]
    }

    /// The kernel that has the entry point `name`.
    fn with_entry(name: &str) -> Option<&'static Kernel> {
        KERNELS.iter().find(|kernel| kernel.entries.contains(&name))
    }
}

/// The blocks that an entry point is compiled for, as PTX says it: `.maxntid` and `.minnctapersm`.
///
/// They decide how many registers a thread has. A multiprocessor has 65,536: 64 for each of 1,024 threads, 128 for each
/// of 512. Larger blocks cannot be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// The most threads of a block.
    pub threads: u32,
    /// Blocks of so many threads that must fit on a multiprocessor at once.
    pub blocks: u32,
}

impl Bounds {
    /// Blocks of any size, one of the largest at a time: 64 registers a thread.
    pub const LARGEST: Bounds = Bounds { threads: 1024, blocks: 1 };
}

/// The bounds of the entry point `entry` in the module of `dtype` and `set`, compiled for `processor`.
///
/// A kernel that is none of the table's gets the bounds of one that is like it: for as many ranks, and of the version
/// that its name ends in, `_p2` for instance.
pub fn bounds(processor: &str, dtype: DType, set: Set, entry: &str) -> Bounds {
    let kernel = Kernel::with_entry(entry);
    let version = Version::of(entry);
    // Without clusters and dependent launch, addresses and indices take up more registers; and for sm_120a the assembler
    // finds fewer to share.
    let takes_more = matches!(processor, "sm_80" | "sm_120a");
    // Kernels for more than 4 ranks hold a pack of each; those for 4 quantize to FP4 beside as many.
    let is_large = match set {
        Set::Group8 | Set::Streamed => true,
        Set::Group4 => kernel.is_some_and(|kernel| {
            kernel.epilogue.quantizer == Quantizer::Fp4
                && match kernel.family {
                    Family::Sharded => dtype == DType::F32 || processor == "sm_90",
                    _ => dtype == DType::F32 || processor == "sm_100a",
                }
        }),
        Set::Group2 | Set::Local => false,
    };
    let threads = match set {
        Set::Group8 | Set::Streamed if processor == "sm_80" => 256,
        // Two packs of eight ranks, widened.
        Set::Group8 if processor == "sm_120a" && dtype == DType::F32 && version == Some(Version::P2) => 256,
        Set::Group2 | Set::Group4 if takes_more => 512,
        _ if is_large || matches!(version, Some(Version::P2 | Version::Streamed)) => 512,
        _ => 1024,
    };
    // Two rows' blocks are resident where 64 registers do for two packs; one-shot pushes a row ahead instead.
    let is_resident_twice = set == Set::Group2
        && version == Some(Version::P2)
        && !takes_more
        && kernel.is_some_and(|kernel| {
            kernel.family != Family::OneShot
                && (dtype, kernel.epilogue.quantizer) != (DType::F32, Quantizer::Fp4)
        });
    Bounds { threads, blocks: if is_resident_twice { 2 } else { 1 } }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, format, vec::Vec};

    use super::*;

    #[test]
    fn a_gpu_gets_code_that_runs_on_it_and_the_best_first() {
        let names = |capability| {
            Processor::for_capability(capability).map(|processor| processor.name).collect::<Vec<_>>()
        };
        assert_eq!(names(90), ["sm_90", "sm_80"]);
        assert_eq!(names(100), ["sm_100a", "sm_90", "sm_80"]);
        assert_eq!(names(103), ["sm_90", "sm_80"]);
        assert_eq!(names(120), ["sm_120a", "sm_90", "sm_80"]);
        assert_eq!(names(86), ["sm_80"]);
        assert!(names(75).is_empty());
    }

    #[test]
    fn a_group_uses_the_smallest_kernels_that_serve_it() {
        let sets = |algorithm| [1, 2, 3, 4, 5, 8, 9].map(|world_size| Set::for_group(world_size, algorithm));
        let [two, four, eight] = [Set::Group2, Set::Group4, Set::Group8].map(Some);
        assert_eq!(sets(Algorithm::OneShot), [two, two, four, four, eight, eight, None]);
        assert_eq!(sets(Algorithm::ShardedTwoShot), [two, two, four, four, eight, eight, None]);
        assert_eq!(sets(Algorithm::TwoShot), [four, four, four, four, eight, eight, None]);
    }

    #[test]
    fn names_follow_from_their_parts_and_lead_back_to_them() {
        let names: HashSet<_> = Module::all().map(Module::name).collect();
        assert_eq!(names.len(), 15);
        for module in Module::all() {
            let element = ["f32", "f16", "bf16"][module.dtype as usize];
            assert_eq!(module.name(), format!("{element}_{}", module.set.name()));
            assert_eq!(Module::named(module.name()), Some(module));
        }
        assert_eq!(Module::named("bf16_w16"), None);

        let mut entries = HashSet::new();
        for kernel in KERNELS {
            assert_eq!(Kernel::of(kernel.family, kernel.epilogue), Some(kernel));
            for version in Version::ALL {
                let name = kernel.name(version);
                assert!(entries.insert(name), "{name} twice");
                assert_eq!((Kernel::with_entry(name), Version::of(name)), (Some(kernel), Some(version)));
            }
        }
        assert_eq!(Kernel::of(Family::Sharded, Epilogue::of(false, Quantization::None)), None);
        let kernel = Kernel::of(Family::TwoShot, Epilogue { norm: true, quantizer: Quantizer::Fp4 }).unwrap();
        assert_eq!(kernel.name(Version::Streamed), "two_shot_fp4_streamed");
    }

    #[test]
    fn every_entry_point_is_in_one_set_or_in_the_groups() {
        let [two, four, eight, local, streamed] = Set::ALL.map(|set| set.entries().collect::<Vec<_>>());
        assert_eq!(four, eight);
        assert_eq!((two.len(), four.len(), local.len(), streamed.len()), (2 * 11, 2 * 17, 2 * 10, 27));
        assert!(two.iter().all(|entry| four.contains(entry) && !entry.starts_with("two_shot")));
        let all: HashSet<_> = [four, local, streamed].concat().into_iter().collect();
        assert_eq!(all.len(), 3 * KERNELS.len());
    }

    #[test]
    fn blocks_are_as_large_as_registers_allow() {
        let of = |processor, dtype, set, entry| {
            let Bounds { threads, blocks } = bounds(processor, dtype, set, entry);
            (threads, blocks)
        };
        use DType::{Bf16, F32};
        use Set::{Group2, Group4, Group8, Local, Streamed};
        for (processor, dtype, set, entry, expected) in [
            ("sm_90", Bf16, Group4, "one_shot_norm_p1", (1024, 1)),
            ("sm_90", Bf16, Group4, "one_shot_norm_p2", (512, 1)),
            ("sm_90", Bf16, Streamed, "local_norm_streamed", (512, 1)),
            ("sm_80", Bf16, Streamed, "local_norm_streamed", (256, 1)),
            ("sm_80", Bf16, Local, "local_norm_p1", (1024, 1)),
            ("sm_80", Bf16, Group8, "one_shot_norm_p1", (256, 1)),
            ("sm_90", Bf16, Group8, "one_shot_norm_p1", (512, 1)),
            ("sm_120a", F32, Group8, "one_shot_norm_p2", (256, 1)),
            ("sm_120a", Bf16, Group8, "one_shot_norm_p2", (512, 1)),
            ("sm_120a", Bf16, Group4, "one_shot_norm_p1", (512, 1)),
            // FP4 beside packs of four ranks.
            ("sm_90", Bf16, Group4, "one_shot_fp4_p1", (1024, 1)),
            ("sm_90", F32, Group4, "one_shot_fp4_p1", (512, 1)),
            ("sm_100a", Bf16, Group4, "two_shot_fp4_p1", (512, 1)),
            ("sm_100a", Bf16, Group4, "sharded_fp4_p1", (1024, 1)),
            ("sm_90", Bf16, Group4, "sharded_fp4_p1", (512, 1)),
            // Two packs in 64 registers.
            ("sm_90", Bf16, Group2, "sharded_norm_p2", (512, 2)),
            ("sm_90", Bf16, Group2, "one_shot_norm_p2", (512, 1)),
            ("sm_120a", Bf16, Group2, "sharded_norm_p2", (512, 1)),
            ("sm_90", F32, Group2, "sharded_fp4_p2", (512, 1)),
            // None of the table's.
            ("sm_90", Bf16, Group4, "all_reduce_gelu", (1024, 1)),
            ("sm_80", Bf16, Group4, "all_reduce_gelu", (512, 1)),
            ("sm_90", Bf16, Group2, "gelu_p2", (512, 1)),
        ] {
            assert_eq!(of(processor, dtype, set, entry), expected, "{processor} {dtype} {set:?} {entry}");
        }
    }
}
