//! The table of kernel entry points.

/// Defines the entry points of one module: either the collectives of one element type for groups of at most `N`
/// ranks, or everything of one element type that needs no group, or what measures links, which knows no element type.
///
/// ```ignore
/// fused_collective_device::entries!(collectives, bf16, 4); // N is 2, 4 or 8
/// fused_collective_device::entries!(local, bf16);
/// fused_collective_device::entries!(links);
/// ```
/// A module for each keeps what a program has to load small; the last is part of the one before, of `bf16`.
///
/// # Names
/// | entry point | parameter |
/// | --- | --- |
/// | `{one_shot,two_shot}_{none,norm,fp8,nvfp4}_{packs}` | [`Fused`](crate::params::Fused) of the epilogue |
/// | `sharded_{norm,fp8,nvfp4}_{packs}` | the same |
/// | `local_{none,norm,fp8,nvfp4,norm_fp8,norm_nvfp4}_{packs}` | [`Local`](crate::params::Local) of the epilogue |
/// | `eager_{to_f32,add,round,square,mean_rsqrt,scale_rows,mul_weight,mul_inverse,clamp,to_fp8}` | [`Step`](crate::params::Step) |
/// | `fill` | [`Fill`](crate::params::Fill) |
/// | `audit_outputs` | [`Audit`](crate::params::Audit) |
/// | `encode_{e4m3,e2m1}` | [`Conversions`](crate::params::Conversions) |
/// | `links_{meet,ping,push,pull}` | [`Meet`](crate::params::Meet), [`Ping`](crate::params::Ping), [`Push`](crate::params::Push), [`Pull`](crate::params::Pull) |
///
/// `packs` is how many 16-byte packs of a row a thread keeps in registers: `p1` or `p2`; `streamed` takes rows of
/// any length. Epilogues, as their parameter types:
///
/// | name | collective | local |
/// | --- | --- | --- |
/// | `none` | `Plain<Unquantized>` | `Plain<Unquantized>` |
/// | `norm` | `RmsNorm<Unquantized>` | `RmsNorm<Unquantized>` |
/// | `fp8` | `RmsNorm<Fp8Static>` | `Plain<Fp8Static>` |
/// | `nvfp4` | `RmsNorm<NvFp4>` | `Plain<NvFp4>` |
/// | `norm_fp8` | | `RmsNorm<Fp8Static>` |
/// | `norm_nvfp4` | | `RmsNorm<NvFp4>` |
///
/// The residual is in the parameters: one that is null is never read. `sharded` is two-shot with a sharded one.
///
/// # Registers
/// A multiprocessor has 65,536 registers: 64 for each of 1,024 threads, 128 for each of 512. Entry points need up to
/// 64, and up to 128 those named `p2` or `streamed` in either kind of module and all of the collectives for more than 4
/// ranks or, with `nvfp4`, of `f32` for 4. Those named `p2` for 2 ranks, but for one-shot's, do with 64, so that two
/// blocks of 512 threads are resident. rustc cannot say so in PTX, so whoever builds the PTX adds two lines after the
/// parameters of each entry point: `.maxntid 1024, 1, 1` (or `512, 1, 1`) and `.minnctapersm 1` (or `2`). Kernels for
/// `sm_80` and `sm_120a` need more: 128 registers, and on `sm_80` 255 for more than 4 ranks. Larger blocks are not
/// launched.
#[macro_export]
macro_rules! entries {
    (collectives, $element:ident, $ranks:literal) => {
        $crate::entries!(@collective one_shot, "one_shot", $element, $ranks);
        $crate::entries!(@collective two_shot, "two_shot", $element, $ranks);
        $crate::entries!(@epilogue sharded, "sharded_norm", $element, $ranks, RmsNorm<Unquantized>);
        $crate::entries!(@epilogue sharded, "sharded_fp8", $element, $ranks, RmsNorm<Fp8Static>);
        $crate::entries!(@epilogue sharded, "sharded_nvfp4", $element, $ranks, RmsNorm<NvFp4>);
    };
    (local, $element:ident) => {
        $crate::entries!(@local "none", $element, Plain<Unquantized>);
        $crate::entries!(@local "norm", $element, RmsNorm<Unquantized>);
        $crate::entries!(@local "fp8", $element, Plain<Fp8Static>);
        $crate::entries!(@local "nvfp4", $element, Plain<NvFp4>);
        $crate::entries!(@local "norm_fp8", $element, RmsNorm<Fp8Static>);
        $crate::entries!(@local "norm_nvfp4", $element, RmsNorm<NvFp4>);
        $crate::entries!(@entry "eager_to_f32", Step, baseline::eager::to_f32::<$element>);
        $crate::entries!(@entry "eager_add", Step, baseline::eager::add);
        $crate::entries!(@entry "eager_round", Step, baseline::eager::round::<$element>);
        $crate::entries!(@entry "eager_square", Step, baseline::eager::square);
        $crate::entries!(@entry "eager_mean_rsqrt", Step, baseline::eager::mean_rsqrt);
        $crate::entries!(@entry "eager_scale_rows", Step, baseline::eager::scale_rows);
        $crate::entries!(@entry "eager_mul_weight", Step, baseline::eager::mul_weight::<$element>);
        $crate::entries!(@entry "eager_mul_inverse", Step, baseline::eager::mul_inverse);
        $crate::entries!(@entry "eager_clamp", Step, baseline::eager::clamp);
        $crate::entries!(@entry "eager_to_fp8", Step, baseline::eager::to_fp8);
        $crate::entries!(@entry "fill", Fill, baseline::fill);
        $crate::entries!(@entry "audit_outputs", Audit, baseline::audit);
        $crate::entries!(@entry "encode_e4m3", Conversions, baseline::verify::encode_e4m3);
        $crate::entries!(@entry "encode_e2m1", Conversions, baseline::verify::encode_e2m1);
    };
    (links) => {
        $crate::entries!(@entry "links_meet", Meet, collective::links::meet);
        $crate::entries!(@entry "links_ping", Ping, collective::links::ping);
        $crate::entries!(@entry "links_push", Push, collective::links::push);
        $crate::entries!(@entry "links_pull", Pull, collective::links::pull);
    };
    (@collective $algorithm:ident, $name:literal, $element:ident, $ranks:literal) => {
        $crate::entries!(@epilogue $algorithm, concat!($name, "_none"), $element, $ranks, Plain<Unquantized>);
        $crate::entries!(@epilogue $algorithm, concat!($name, "_norm"), $element, $ranks, RmsNorm<Unquantized>);
        $crate::entries!(@epilogue $algorithm, concat!($name, "_fp8"), $element, $ranks, RmsNorm<Fp8Static>);
        $crate::entries!(@epilogue $algorithm, concat!($name, "_nvfp4"), $element, $ranks, RmsNorm<NvFp4>);
    };
    (@epilogue $algorithm:ident, $name:expr, $element:ident, $ranks:literal, $epilogue:ty) => {
        $crate::entries!(@entry concat!($name, "_p1"), Fused<$epilogue>, collective::$algorithm::<$element, $epilogue, $ranks, 1, true>);
        $crate::entries!(@entry concat!($name, "_p2"), Fused<$epilogue>, collective::$algorithm::<$element, $epilogue, $ranks, 2, true>);
        $crate::entries!(@entry concat!($name, "_streamed"), Fused<$epilogue>, collective::$algorithm::<$element, $epilogue, $ranks, 1, false>);
    };
    (@local $name:literal, $element:ident, $epilogue:ty) => {
        $crate::entries!(@entry concat!("local_", $name, "_p1"), Local<$epilogue>, baseline::local::<$element, $epilogue, 1, true>);
        $crate::entries!(@entry concat!("local_", $name, "_p2"), Local<$epilogue>, baseline::local::<$element, $epilogue, 2, true>);
        $crate::entries!(@entry concat!("local_", $name, "_streamed"), Local<$epilogue>, baseline::local::<$element, $epilogue, 1, false>);
    };
    (@entry $name:expr, $parameters:ty, $($kernel:tt)+) => {
        const _: () = {
            #[allow(unused_imports, reason = "each entry uses some of these")]
            use $crate::{baseline, collective, dtype::{bf16, f16}, params::*};

            /// # Safety
            /// Launched by the rules in `fused_collective_device::params`.
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn entry(params: $parameters) {
                // SAFETY: as this function's.
                unsafe { $($kernel)+(&params) }
            }
        };
    };
}
