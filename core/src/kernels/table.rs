//! The table itself, and what is found in it.

use core::fmt;

use crate::{
    dtype::DType,
    fusion::{Operation, Rounding},
    launch::MAX_RANKS,
    plan::Algorithm,
    quant::Quantization,
};

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
    /// As [`Group2`](Set::Group2), of addends in a wire format.
    Wire2,
    /// As [`Group2`](Set::Group2), of any epilogue and all [`Extras`](crate::launch::Extras).
    Any2,
    /// The collectives for groups of at most 8 ranks, of rows in registers, of any epilogue and all
    /// [`Extras`](crate::launch::Extras), of addends as elements and in a wire format.
    Any8,
    /// Every kernel that streams its rows, for groups of any size: clusters of eight blocks hold 65,536 elements of 16 bits in
    /// registers, or half as many in kernels of one pack in each of 512 threads. So only GPUs without clusters, and rows longer than any
    /// model's, use these.
    Streamed,
    /// The kernels of groups of several hosts, of at most 8 ranks each, of any epilogue and all
    /// [`Extras`](crate::launch::Extras): of rows in registers, one pack a thread, and those that stream them.
    Hosts,
}

impl Set {
    /// Every set.
    pub const ALL: [Set; 9] = [
        Set::Group2,
        Set::Group4,
        Set::Group8,
        Set::Local,
        Set::Wire2,
        Set::Any2,
        Set::Any8,
        Set::Streamed,
        Set::Hosts,
    ];

    /// The set's part of a module's name.
    pub const fn name(self) -> &'static str {
        match self {
            Set::Group2 => "w2",
            Set::Group4 => "w4",
            Set::Group8 => "w8",
            Set::Local => "local",
            Set::Wire2 => "wire2",
            Set::Any2 => "any2",
            Set::Any8 => "any8",
            Set::Streamed => "streamed",
            Set::Hosts => "hosts",
        }
    }

    /// The set that has the streamed versions of this one's kernels.
    pub const fn streamed(self) -> Set {
        if matches!(self, Set::Hosts) { Set::Hosts } else { Set::Streamed }
    }

    /// The names of the set's entry points for a processor with clusters or without.
    pub fn entries(self, has_clusters: bool) -> impl Iterator<Item = &'static str> {
        KERNELS.iter().flat_map(move |kernel| {
            Version::ALL
                .into_iter()
                .filter(move |&version| self.has(kernel, version, has_clusters))
                .map(|version| kernel.name(version))
        })
    }

    /// True if the set has a version of a kernel for a processor with clusters or without.
    pub fn has(self, kernel: &Kernel, version: Version, has_clusters: bool) -> bool {
        let is_one_shot = kernel.family == Family::OneShot && kernel.addends == Addends::Elements;
        // More blocks of a cluster hold a row as well as more packs of a thread, up to 32,768 elements of 16 bits. One-shot of elements does not gain from
        // narrow blocks, and what few operations need is small before it is fast. Between two the one of any epilogue was
        // measured, and stays.
        let is_needless =
            version == Version::P2 && has_clusters && (is_one_shot && self != Set::Any2 || self == Set::Any8);
        if is_needless || !kernel.has(version) {
            return false;
        }
        match (version, kernel.family, kernel.addends) {
            (_, family, _) if family.spans_hosts() => self == Set::Hosts,
            (Version::Streamed, ..) => self == Set::Streamed,
            (_, Family::Local, _) => self == Set::Local,
            // Between two one-shot sends no more.
            (_, family, Addends::Elements) if kernel.epilogue.is_none() => {
                self == Set::Any8 || self == Set::Any2 && family != Family::TwoShot
            }
            (_, Family::TwoShot, Addends::Elements) => matches!(self, Set::Group4 | Set::Group8),
            (_, _, Addends::Elements) => matches!(self, Set::Group2 | Set::Group4 | Set::Group8),
            (_, _, Addends::Encoded) => {
                self == if kernel.epilogue.is_some() { Set::Wire2 } else { Set::Any8 }
            }
        }
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
                    Set::Wire2 => concat!($element, "_wire2"),
                    Set::Any2 => concat!($element, "_any2"),
                    Set::Any8 => concat!($element, "_any8"),
                    Set::Streamed => concat!($element, "_streamed"),
                    Set::Hosts => concat!($element, "_hosts"),
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
    /// Between hosts, the first kernel: the sum of a host's addends, without an epilogue.
    HostSum,
    /// Between hosts, the second kernel: the sum of the hosts' sums, then as [`TwoShot`](Self::TwoShot).
    TwoShotHosts,
    /// The same, then as [`Sharded`](Self::Sharded).
    ShardedHosts,
}

impl Family {
    /// True of the kernels of a group of several hosts.
    pub const fn spans_hosts(self) -> bool {
        matches!(self, Family::HostSum | Family::TwoShotHosts | Family::ShardedHosts)
    }
}

impl From<Algorithm> for Family {
    fn from(algorithm: Algorithm) -> Family {
        match algorithm {
            Algorithm::OneShot => Family::OneShot,
            Algorithm::TwoShot => Family::TwoShot,
            Algorithm::ShardedTwoShot => Family::Sharded,
            Algorithm::Hierarchical => Family::TwoShotHosts,
            Algorithm::ShardedHierarchical => Family::ShardedHosts,
        }
    }
}

/// The form in which addends cross the links to who sums them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Addends {
    /// Elements.
    Elements,
    /// A [format](crate::wire) of fewer bits, which is a parameter.
    Encoded,
}

/// True of an operation without [`Extras`](crate::launch::Extras), whose sum is rounded once.
pub const fn is_plain(operation: &Operation) -> bool {
    !operation.bias
        && operation.post_norm.is_none()
        && operation.experts.is_none()
        && matches!(operation.rounding, Rounding::Once)
}

/// The quantizer of an epilogue, which the parameters of its kernels hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Quantizer {
    /// `Unquantized`.
    None,
    /// `Fp8Static`.
    Fp8,
    /// `Fp8PerToken`.
    Fp8Token,
    /// `Fp8Block`: per group, and MXFP8.
    Fp8Block,
    /// `Fp4`: NVFP4.
    Fp4,
    /// `MxFp4`.
    MxFp4,
}

impl From<Quantization> for Quantizer {
    fn from(quantization: Quantization) -> Quantizer {
        match quantization {
            Quantization::None => Quantizer::None,
            Quantization::Fp8Static => Quantizer::Fp8,
            Quantization::Fp8PerToken => Quantizer::Fp8Token,
            Quantization::Fp8PerGroup { .. } | Quantization::MxFp8 { .. } => Quantizer::Fp8Block,
            Quantization::NvFp4 { .. } => Quantizer::Fp4,
            Quantization::MxFp4 { .. } => Quantizer::MxFp4,
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
    pub(super) fn of(entry: &str) -> Option<Version> {
        let (_, last) = entry.rsplit_once('_')?;
        Version::ALL.into_iter().find(|version| version.name() == last)
    }
}

/// A kernel: a family with an epilogue, an entry point in every version that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The work between ranks.
    pub family: Family,
    /// The form of what crosses the links.
    pub addends: Addends,
    /// The work on a row; `None` where it is a parameter.
    pub epilogue: Option<Epilogue>,
    /// The names of its entry points, in the order of [`Version::ALL`].
    entries: [&'static str; 3],
}

macro_rules! kernels {
    ($($family:ident $addends:ident $epilogue:tt $name:literal)*) => {
        /// The table. Names in collectives say only how the norm is quantized, as they have no quantization without.
        static KERNELS: &[Kernel] = &[$(Kernel {
            family: Family::$family,
            addends: Addends::$addends,
            epilogue: kernels!(@epilogue $epilogue),
            entries: [concat!($name, "_p1"), concat!($name, "_p2"), concat!($name, "_streamed")],
        }),*];
    };
    (@epilogue any) => { None };
    (@epilogue (norm $quantizer:ident)) => { Some(Epilogue { norm: true, quantizer: Quantizer::$quantizer }) };
    (@epilogue ($quantizer:ident)) => { Some(Epilogue { norm: false, quantizer: Quantizer::$quantizer }) };
}

kernels! {
    OneShot Elements (None)           "one_shot_none"
    OneShot Elements (norm None)      "one_shot_norm"
    OneShot Elements (norm Fp8)       "one_shot_fp8"
    OneShot Elements (norm Fp8Token)  "one_shot_fp8_token"
    OneShot Elements (norm Fp8Block)  "one_shot_fp8_block"
    OneShot Elements (norm Fp4)       "one_shot_fp4"
    TwoShot Elements (None)           "two_shot_none"
    TwoShot Elements (norm None)      "two_shot_norm"
    TwoShot Elements (norm Fp8)       "two_shot_fp8"
    TwoShot Elements (norm Fp8Token)  "two_shot_fp8_token"
    TwoShot Elements (norm Fp8Block)  "two_shot_fp8_block"
    TwoShot Elements (norm Fp4)       "two_shot_fp4"
    Sharded Elements (norm None)      "sharded_norm"
    Sharded Elements (norm Fp8)       "sharded_fp8"
    Sharded Elements (norm Fp8Token)  "sharded_fp8_token"
    Sharded Elements (norm Fp8Block)  "sharded_fp8_block"
    Sharded Elements (norm Fp4)       "sharded_fp4"
    Local   Elements (None)           "local_none"
    Local   Elements (Fp8)            "local_fp8"
    Local   Elements (Fp8Token)       "local_fp8_token"
    Local   Elements (Fp8Block)       "local_fp8_block"
    Local   Elements (Fp4)            "local_fp4"
    Local   Elements (norm None)      "local_norm"
    Local   Elements (norm Fp8)       "local_norm_fp8"
    Local   Elements (norm Fp8Token)  "local_norm_fp8_token"
    Local   Elements (norm Fp8Block)  "local_norm_fp8_block"
    Local   Elements (norm Fp4)       "local_norm_fp4"
    OneShot Elements any              "one_shot_any"
    TwoShot Elements any              "two_shot_any"
    Sharded Elements any              "sharded_any"
    Local   Elements any              "local_any"
    OneShot Encoded  (None)           "one_shot_wire_none"
    OneShot Encoded  (norm None)      "one_shot_wire_norm"
    OneShot Encoded  (norm Fp8)       "one_shot_wire_fp8"
    OneShot Encoded  (norm Fp8Token)  "one_shot_wire_fp8_token"
    OneShot Encoded  (norm Fp8Block)  "one_shot_wire_fp8_block"
    OneShot Encoded  (norm Fp4)       "one_shot_wire_fp4"
    Sharded Encoded  (norm None)      "sharded_wire_norm"
    Sharded Encoded  (norm Fp8)       "sharded_wire_fp8"
    Sharded Encoded  (norm Fp8Token)  "sharded_wire_fp8_token"
    Sharded Encoded  (norm Fp8Block)  "sharded_wire_fp8_block"
    Sharded Encoded  (norm Fp4)       "sharded_wire_fp4"
    OneShot Encoded  any              "one_shot_wire_any"
    TwoShot Encoded  any              "two_shot_wire_any"
    Sharded Encoded  any              "sharded_wire_any"
    HostSum      Elements any         "host_sum"
    TwoShotHosts Elements any         "two_shot_hosts"
    ShardedHosts Elements any         "sharded_hosts"
}

impl Kernel {
    /// The kernel for an operation that is planned as `algorithm` between `world_size` ranks of a host, and the set that has it
    /// for rows in registers; `None` for more than [`MAX_RANKS`]. In a group of several hosts it is the second of a round, and
    /// [`host_sum`](Self::host_sum) the first.
    pub fn of(
        operation: &Operation,
        algorithm: Algorithm,
        world_size: u32,
    ) -> Option<(Set, &'static Kernel)> {
        const { assert!(MAX_RANKS == 8) };
        let family = Family::from(algorithm);
        if family.spans_hosts() {
            let kernel = Kernel::find(family, Addends::Elements, None)?;
            return (world_size as usize <= MAX_RANKS).then_some((Set::Hosts, kernel));
        }
        let addends = if operation.wire.is_some() { Addends::Encoded } else { Addends::Elements };
        let is_pair = world_size <= 2 && family != Family::TwoShot;
        let set = match world_size {
            ..=2 if is_pair && addends == Addends::Encoded => Some(Set::Wire2),
            ..=8 if addends == Addends::Encoded => None,
            ..=2 if is_pair => Some(Set::Group2),
            ..=4 => Some(Set::Group4),
            5..=8 => Some(Set::Group8),
            _ => return None,
        };
        if let Some(set) = set.filter(|_| is_plain(operation)) {
            let epilogue = Epilogue::of(operation.norm.is_some(), operation.quantization);
            if let Some(kernel) = Kernel::find(family, addends, Some(epilogue)) {
                return Some((set, kernel));
            }
        }
        let set = if is_pair && addends == Addends::Elements { Set::Any2 } else { Set::Any8 };
        Some((set, Kernel::find(family, addends, None)?))
    }

    /// The kernel without a collective for what an operation does to a sum, or ahead of one.
    pub fn local(operation: &Operation) -> Option<&'static Kernel> {
        let epilogue = Epilogue::of(operation.norm.is_some(), operation.quantization);
        let find = |epilogue| Kernel::find(Family::Local, Addends::Elements, epilogue);
        find(Some(epilogue).filter(|_| is_plain(operation))).or_else(|| find(None))
    }

    /// The kernel that sums the addends of a host's ranks: the first of an operation across hosts.
    pub fn host_sum() -> Option<&'static Kernel> {
        Kernel::find(Family::HostSum, Addends::Elements, None)
    }

    /// The kernel of the same exchange whose epilogue is a parameter.
    pub fn of_any(&self) -> Option<&'static Kernel> {
        Kernel::find(self.family, self.addends, None)
    }

    fn find(family: Family, addends: Addends, epilogue: Option<Epilogue>) -> Option<&'static Kernel> {
        let is_it = |kernel: &&Kernel| {
            kernel.family == family && kernel.addends == addends && kernel.epilogue == epilogue
        };
        KERNELS.iter().find(is_it)
    }

    /// True if any set has a version.
    fn has(&self, version: Version) -> bool {
        match version {
            Version::P1 => true,
            // Between hosts the links are slower than any kernel.
            Version::P2 => !self.family.spans_hosts(),
            Version::Streamed => self.epilogue.is_none(),
        }
    }

    /// The name of a version's entry point.
    pub const fn name(&self, version: Version) -> &'static str {
        self.entries[version as usize]
    }

    /// The kernel that has the entry point `name`.
    pub(super) fn with_entry(name: &str) -> Option<&'static Kernel> {
        KERNELS.iter().find(|kernel| kernel.entries.contains(&name))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, format, vec::Vec};

    use super::*;
    use crate::{
        fusion::{Experts, Mode, Norm, PartialSums, Residual, WeightType},
        quant::ScaleLayout,
        wire::WireFormat,
    };

    const PLAIN: Operation = Operation {
        dtype: DType::Bf16,
        tokens: 1,
        hidden: 64,
        residual: Residual::Replicated,
        norm: Some(Norm { epsilon: 1e-6, weight_bias: 0.0, gamma: WeightType::Element }),
        quantization: Quantization::Fp8Static,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    };

    #[test]
    fn a_group_uses_the_smallest_kernels_that_serve_it() {
        let sets = |operation: &Operation, algorithm| {
            let set = |ranks| Kernel::of(operation, algorithm, ranks).map(|(set, _)| set);
            [1, 2, 3, 4, 5, 8, 9].map(set)
        };
        let [two, four, eight, any] = [Set::Group2, Set::Group4, Set::Group8, Set::Any8].map(Some);
        assert_eq!(sets(&PLAIN, Algorithm::OneShot), [two, two, four, four, eight, eight, None]);
        assert_eq!(sets(&PLAIN, Algorithm::ShardedTwoShot), [two, two, four, four, eight, eight, None]);
        assert_eq!(sets(&PLAIN, Algorithm::TwoShot), [four, four, four, four, eight, eight, None]);
        let encoded = Operation { wire: Some(WireFormat::Int8), ..PLAIN };
        let two = Some(Set::Wire2);
        assert_eq!(sets(&encoded, Algorithm::OneShot), [two, two, any, any, any, any, None]);
        assert_eq!(sets(&encoded, Algorithm::TwoShot), [any, any, any, any, any, any, None]);
        let two = Some(Set::Any2);
        for operation in [
            Operation { bias: true, ..PLAIN },
            Operation { post_norm: PLAIN.norm, ..PLAIN },
            Operation {
                experts: Some(Experts { top_k: 1, scales: WeightType::F32, shared: false }),
                ..PLAIN
            },
            Operation { rounding: Rounding::AfterAllReduce, ..PLAIN },
            Operation { quantization: Quantization::MxFp4 { layout: ScaleLayout::Linear }, ..PLAIN },
        ] {
            assert_eq!(sets(&operation, Algorithm::OneShot), [two, two, any, any, any, any, None]);
            assert_eq!(sets(&operation, Algorithm::TwoShot), [any, any, any, any, any, any, None]);
        }
    }

    #[test]
    fn names_follow_from_their_parts_and_lead_back_to_them() {
        let names: HashSet<_> = Module::all().map(Module::name).collect();
        assert_eq!(names.len(), 27);
        for module in Module::all() {
            let element = ["f32", "f16", "bf16"][module.dtype as usize];
            assert_eq!(module.name(), format!("{element}_{}", module.set.name()));
            assert_eq!(Module::named(module.name()), Some(module));
        }
        assert_eq!(Module::named("bf16_w16"), None);

        let mut entries = HashSet::new();
        for kernel in KERNELS {
            assert_eq!(Kernel::find(kernel.family, kernel.addends, kernel.epilogue), Some(kernel));
            for version in Version::ALL {
                let name = kernel.name(version);
                assert!(entries.insert(name), "{name} twice");
                assert_eq!((Kernel::with_entry(name), Version::of(name)), (Some(kernel), Some(version)));
            }
        }
        let name = |operation: &Operation, algorithm, ranks| {
            Kernel::of(operation, algorithm, ranks).map(|(_, kernel)| kernel.name(Version::P2))
        };
        let encoded = Operation { wire: Some(WireFormat::Int4), ..PLAIN };
        assert_eq!(name(&PLAIN, Algorithm::TwoShot, 4), Some("two_shot_fp8_p2"));
        assert_eq!(name(&encoded, Algorithm::OneShot, 2), Some("one_shot_wire_fp8_p2"));
        assert_eq!(name(&encoded, Algorithm::OneShot, 4), Some("one_shot_wire_any_p2"));
        let local = |operation: &Operation| Kernel::local(operation).map(|it| it.name(Version::P1));
        assert_eq!(local(&PLAIN), Some("local_norm_fp8_p1"));
        let mxfp4 = Quantization::MxFp4 { layout: ScaleLayout::Linear };
        assert_eq!(local(&Operation { quantization: mxfp4, ..PLAIN }), Some("local_any_p1"));
        assert_eq!(local(&Operation { post_norm: PLAIN.norm, ..PLAIN }), Some("local_any_p1"));
    }

    #[test]
    fn hosts_of_one_to_eight_ranks_use_kernels_of_their_own() {
        let bias = Operation { bias: true, ..PLAIN };
        for (algorithm, name) in [
            (Algorithm::Hierarchical, "two_shot_hosts_p1"),
            (Algorithm::ShardedHierarchical, "sharded_hosts_p1"),
        ] {
            for ranks in 1..=9 {
                for operation in [&PLAIN, &bias] {
                    let found = Kernel::of(operation, algorithm, ranks);
                    let found = found.map(|(set, kernel)| (set, kernel.name(Version::P1)));
                    assert_eq!(found, (ranks <= 8).then_some((Set::Hosts, name)));
                }
            }
        }
        assert_eq!(Kernel::host_sum().map(|it| it.name(Version::Streamed)), Some("host_sum_streamed"));
        assert_eq!((Set::Hosts.streamed(), Set::Any8.streamed()), (Set::Hosts, Set::Streamed));
    }

    #[test]
    fn every_entry_point_is_in_one_set_or_in_the_groups() {
        let [two, four, eight, local, wire, any_two, any_eight, streamed, hosts] =
            Set::ALL.map(|set| set.entries(false).collect::<Vec<_>>());
        assert_eq!(four, eight);
        assert_eq!((two.len(), four.len(), local.len()), (2 * 11, 2 * 17, 2 * 11));
        assert_eq!((wire.len(), any_two.len(), any_eight.len(), streamed.len()), (2 * 11, 2 * 2, 2 * 6, 7));
        assert_eq!(hosts.len(), 2 * 3);
        for (smaller, larger) in [(&two, &four), (&any_two, &any_eight)] {
            assert!(smaller.iter().all(|entry| larger.contains(entry) && !entry.starts_with("two_shot")));
        }
        let with_clusters = Set::ALL.map(|set| set.entries(true).count());
        assert_eq!(with_clusters, [2 * 11 - 6, 2 * 17 - 6, 2 * 17 - 6, 2 * 11, 2 * 11, 4, 6, 7, 2 * 3]);
        let all: HashSet<_> = [four, local, wire, any_eight, streamed, hosts].concat().into_iter().collect();
        let entries =
            |kernel: &Kernel| Version::ALL.into_iter().filter(|&version| kernel.has(version)).count();
        assert_eq!(all.len(), KERNELS.iter().map(entries).sum::<usize>());
    }
}
