//! The table of these kernels: their modules and entry points. It extends [`fused_collective_core::kernels`].

use fused_collective_core::{
    dtype::DType,
    kernels::{Bounds, Entry},
};

/// The module of the kernels that know no element type: every [`Probe`].
pub const PROBES: &str = "probes";

/// The bounds of every entry point, for every processor.
pub const BOUNDS: Bounds = Bounds::LARGEST;

/// The names of all modules: that of each element type's eager steps, and [`PROBES`].
pub fn modules() -> impl Iterator<Item = &'static str> {
    DType::ALL.into_iter().map(eager_module).chain([PROBES])
}

/// The entry points of a module that [`modules`] names.
pub fn entries(module: &str) -> impl Iterator<Item = &'static str> {
    let steps = EagerKernel::ALL.into_iter().map(EagerKernel::name);
    let probes = Probe::ALL.into_iter().map(Probe::name);
    let is_probes = module == PROBES;
    steps.filter(move |_| !is_probes).chain(probes.filter(move |_| is_probes))
}

/// The module of an element type's eager steps.
pub const fn eager_module(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32_eager",
        DType::F16 => "f16_eager",
        DType::Bf16 => "bf16_eager",
    }
}

macro_rules! entry_points {
    ($(#[$about:meta])* $enum:ident { $($(#[$doc:meta])* $kernel:ident $name:literal)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $enum {
            $($(#[$doc])* $kernel,)*
        }

        impl $enum {
            /// Every one of them.
            pub const ALL: [$enum; [$($name),*].len()] = [$($enum::$kernel),*];

            /// The name of its entry point.
            pub const fn name(self) -> &'static str {
                match self {
                    $($enum::$kernel => $name,)*
                }
            }
        }
    };
}

entry_points! {
    /// A primitive step of an eager framework, launched with an [`EagerStep`](crate::launch::EagerStep). Formulas name
    /// its fields.
    EagerKernel {
        /// `out = f32(a)`.
        ToF32 "eager_to_f32"
        /// `out = a + b`.
        Add "eager_add"
        /// `out = a` rounded to the element type.
        Round "eager_round"
        /// `out = a * a`.
        Square "eager_square"
        /// `out[token] = rsqrt(mean(a[token]) + value)`.
        MeanRsqrt "eager_mean_rsqrt"
        /// `out = a * b[token]`.
        ScaleRows "eager_scale_rows"
        /// `out = a * (value + b[element])`.
        MulWeight "eager_mul_weight"
        /// `out = a * (1 / b[0])`.
        MulInverse "eager_mul_inverse"
        /// `out = a` limited to what E4M3 holds.
        Clamp "eager_clamp"
        /// `out = E4M3(a)`.
        ToFp8 "eager_to_fp8"
    }
}

impl EagerKernel {
    /// The entry point for an element type.
    pub const fn entry(self, dtype: DType) -> Entry {
        Entry { module: eager_module(dtype), name: self.name() }
    }
}

entry_points! {
    /// A kernel that checks, or measures links.
    Probe {
        /// Compares what the kernel before wrote, then poisons it: [`Audit`](crate::launch::Audit).
        AuditOutputs "audit_outputs"
        /// Digests memory: [`Digest`](crate::launch::Digest).
        Digest "digest"
        /// Converts to E4M3: [`Conversions`](crate::launch::Conversions).
        EncodeE4m3 "encode_e4m3"
        /// Converts to E2M1: [`Conversions`](crate::launch::Conversions).
        EncodeE2m1 "encode_e2m1"
        /// Waits until every rank has come: [`Meet`](crate::launch::Meet).
        LinksMeet "links_meet"
        /// Sends a word there and back: [`Ping`](crate::launch::Ping).
        LinksPing "links_ping"
        /// Writes to other ranks' memory: [`Push`](crate::launch::Push).
        LinksPush "links_push"
        /// Reads another rank's memory: [`Pull`](crate::launch::Pull).
        LinksPull "links_pull"
    }
}

impl Probe {
    /// The entry point.
    pub const fn entry(self) -> Entry {
        Entry { module: PROBES, name: self.name() }
    }
}
