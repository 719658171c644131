//! The table of kernel entry points.

/// Defines the entry points of one module, all of one element type: the collectives for groups of at most `N` ranks, the
/// kernels that need no group, or all of those that stream their rows.
///
/// ```ignore
/// fused_collective_device::entries!(collectives, bf16, 4); // N is 2, 4 or 8; two-shot is among them from 4 on
/// fused_collective_device::entries!(local, bf16);
/// fused_collective_device::entries!(streamed, bf16);
/// ```
/// A module for each keeps what a program has to load small. [`fused_collective_core::kernels`] has the same table by
/// name; tests hold the two together.
///
/// Parameters are [`Fused`](crate::launch::Fused) of the epilogue in collectives, and [`Local`](crate::launch::Local)
/// of it in local kernels. The residual is in them: one that is null is never read.
///
/// # Registers
/// rustc has no way to say in PTX how large blocks are. So whoever builds the PTX adds two lines after the parameters of
/// each entry point, `.maxntid 1024, 1, 1` and `.minnctapersm 1`, with the numbers that
/// [`bounds`](fused_collective_core::kernels::bounds) gives.
#[macro_export]
macro_rules! entries {
    (collectives, $element:ident, 2) => {
        $crate::entries!(@for_any resident, $element, 2);
    };
    (collectives, $element:ident, $ranks:literal) => {
        $crate::entries!(@for_any resident, $element, $ranks);
        $crate::entries!(@from_three resident, $element, $ranks);
    };
    (local, $element:ident) => {
        $crate::entries!(@locals resident, $element);
    };
    (streamed, $element:ident) => {
        $crate::entries!(@for_any streamed, $element, 8);
        $crate::entries!(@from_three streamed, $element, 8);
        $crate::entries!(@locals streamed, $element);
    };
    (@for_any $rows:ident, $element:ident, $ranks:literal) => {
        $crate::entries!(@epilogue $rows, one_shot, "one_shot_none", $element, $ranks, Plain<Unquantized>);
        $crate::entries!(@collective $rows, one_shot, "one_shot", $element, $ranks);
        $crate::entries!(@collective $rows, sharded, "sharded", $element, $ranks);
    };
    (@from_three $rows:ident, $element:ident, $ranks:literal) => {
        $crate::entries!(@epilogue $rows, two_shot, "two_shot_none", $element, $ranks, Plain<Unquantized>);
        $crate::entries!(@collective $rows, two_shot, "two_shot", $element, $ranks);
    };
    (@collective $rows:ident, $algorithm:ident, $name:literal, $element:ident, $ranks:literal) => {
        $crate::entries!(@epilogue $rows, $algorithm, concat!($name, "_norm"), $element, $ranks, RmsNorm<Unquantized>);
        $crate::entries!(@epilogue $rows, $algorithm, concat!($name, "_fp8"), $element, $ranks, RmsNorm<Fp8Static>);
        $crate::entries!(@epilogue $rows, $algorithm, concat!($name, "_fp8_token"), $element, $ranks, RmsNorm<Fp8PerToken>);
        $crate::entries!(@epilogue $rows, $algorithm, concat!($name, "_fp8_block"), $element, $ranks, RmsNorm<Fp8Block>);
        $crate::entries!(@epilogue $rows, $algorithm, concat!($name, "_fp4"), $element, $ranks, RmsNorm<Fp4>);
    };
    (@locals $rows:ident, $element:ident) => {
        $crate::entries!(@local $rows, "none", $element, Plain<Unquantized>);
        $crate::entries!(@local $rows, "fp8", $element, Plain<Fp8Static>);
        $crate::entries!(@local $rows, "fp8_token", $element, Plain<Fp8PerToken>);
        $crate::entries!(@local $rows, "fp8_block", $element, Plain<Fp8Block>);
        $crate::entries!(@local $rows, "fp4", $element, Plain<Fp4>);
        $crate::entries!(@local $rows, "norm", $element, RmsNorm<Unquantized>);
        $crate::entries!(@local $rows, "norm_fp8", $element, RmsNorm<Fp8Static>);
        $crate::entries!(@local $rows, "norm_fp8_token", $element, RmsNorm<Fp8PerToken>);
        $crate::entries!(@local $rows, "norm_fp8_block", $element, RmsNorm<Fp8Block>);
        $crate::entries!(@local $rows, "norm_fp4", $element, RmsNorm<Fp4>);
    };
    (@epilogue resident, $algorithm:ident, $name:expr, $element:ident, $ranks:literal, $epilogue:ty) => {
        $crate::entries!(@entry concat!($name, "_p1"), Fused<$epilogue>, |params| collective::$algorithm::<$element, $epilogue, Experts, $ranks, 1, true>(&params, &params.extras.experts));
        $crate::entries!(@entry concat!($name, "_p2"), Fused<$epilogue>, |params| collective::$algorithm::<$element, $epilogue, Experts, $ranks, 2, true>(&params, &params.extras.experts));
    };
    (@epilogue streamed, $algorithm:ident, $name:expr, $element:ident, $ranks:literal, $epilogue:ty) => {
        $crate::entries!(@entry concat!($name, "_streamed"), Fused<$epilogue>, |params| collective::$algorithm::<$element, $epilogue, Experts, $ranks, 1, false>(&params, &params.extras.experts));
    };
    (@local resident, $name:literal, $element:ident, $epilogue:ty) => {
        $crate::entries!(@entry concat!("local_", $name, "_p1"), Local<$epilogue>, |params| local::<$element, $epilogue, 1, true>(&params));
        $crate::entries!(@entry concat!("local_", $name, "_p2"), Local<$epilogue>, |params| local::<$element, $epilogue, 2, true>(&params));
    };
    (@local streamed, $name:literal, $element:ident, $epilogue:ty) => {
        $crate::entries!(@entry concat!("local_", $name, "_streamed"), Local<$epilogue>, |params| local::<$element, $epilogue, 1, false>(&params));
    };
    (@entry $name:expr, $parameters:ty, |$params:ident| $kernel:expr) => {
        const _: () = {
            #[allow(unused_imports, reason = "each entry uses some of these")]
            use $crate::{collective, dtype::{bf16, f16}, launch::*, local};

            /// # Safety
            /// Launched by the rules in `fused_collective_device::launch`.
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn entry($params: $parameters) {
                // SAFETY: the rules are what the kernel asks for.
                unsafe { $kernel }
            }
        };
    };
}
