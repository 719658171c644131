//! The table of kernel entry points.

/// Defines the entry points of one module, all of one element type: the collectives for groups of at most `N` ranks, of
/// addends as elements or in a wire format, those of any epilogue, the kernels that need no group, all of those that stream
/// their rows, or those of groups of several hosts.
///
/// ```ignore
/// fused_collective_device::entries!(collectives, bf16, 4); // N is 2, 4 or 8; two-shot is among them from 4 on
/// fused_collective_device::entries!(wire, bf16); // for 2 ranks
/// fused_collective_device::entries!(any, bf16, 8); // N is 2 or 8
/// fused_collective_device::entries!(local, bf16);
/// fused_collective_device::entries!(streamed, bf16);
/// fused_collective_device::entries!(hosts, bf16);
/// ```
/// A module for each keeps what a program has to load small. [`fused_collective_core::kernels`] has the same table by
/// name; tests hold the two together.
///
/// Parameters are [`Fused`](crate::launch::Fused) of the epilogue in collectives, and [`Local`](crate::launch::Local)
/// of it in local kernels, [`LocalAny`](crate::launch::LocalAny) in those of any; across hosts
/// [`HostSum`](crate::launch::HostSum), and [`FusedHosts`](crate::launch::FusedHosts) of the epilogue. The residual is in them:
/// one that is null is never read.
///
/// # Registers
/// rustc has no way to say in PTX how large blocks are. So whoever builds the PTX adds two lines after the parameters of
/// each entry point, `.maxntid 1024, 1, 1` and `.minnctapersm 1`, with the numbers that
/// [`bounds`](fused_collective_core::kernels::bounds) gives.
#[macro_export]
macro_rules! entries {
    (collectives, $element:ident, 2) => {
        $crate::entries!(@for_any $element, 2);
    };
    (collectives, $element:ident, $ranks:literal) => {
        $crate::entries!(@for_any $element, $ranks);
        $crate::entries!(@epilogue two_shot, "two_shot_none", $element, Plain<Unquantized>, elements, $ranks);
        $crate::entries!(@collective two_shot, "two_shot", $element, elements, $ranks);
    };
    (wire, $element:ident) => {
        $crate::entries!(@epilogue one_shot, "one_shot_wire_none", $element, Plain<Unquantized>, encoded, 2);
        $crate::entries!(@collective one_shot, "one_shot_wire", $element, encoded, 2);
        $crate::entries!(@collective sharded, "sharded_wire", $element, encoded, 2);
    };
    (any, $element:ident, 2) => {
        $crate::entries!(@both one_shot, "one_shot_any", $element, AnyEpilogue, Experts, elements, 2);
        $crate::entries!(@both sharded, "sharded_any", $element, AnyEpilogue, Experts, elements, 2);
    };
    (any, $element:ident, $ranks:literal) => {
        $crate::entries!(@narrow one_shot, "one_shot_any", $element, AnyEpilogue, Experts, elements, $ranks);
        $crate::entries!(@narrow two_shot, "two_shot_any", $element, AnyEpilogue, Experts, elements, $ranks);
        $crate::entries!(@narrow sharded, "sharded_any", $element, AnyEpilogue, Experts, elements, $ranks);
        $crate::entries!(@narrow one_shot, "one_shot_wire_any", $element, AnyEpilogue, Experts, encoded, $ranks);
        $crate::entries!(@narrow two_shot, "two_shot_wire_any", $element, AnyEpilogue, Experts, encoded, $ranks);
        $crate::entries!(@narrow sharded, "sharded_wire_any", $element, AnyEpilogue, Experts, encoded, $ranks);
    };
    (local, $element:ident) => {
        $crate::entries!(@local "local_none", $element, Plain<Unquantized>);
        $crate::entries!(@local "local_fp8", $element, Plain<Fp8Static>);
        $crate::entries!(@local "local_fp8_token", $element, Plain<Fp8PerToken>);
        $crate::entries!(@local "local_fp8_block", $element, Plain<Fp8Block>);
        $crate::entries!(@local "local_fp4", $element, Plain<Fp4>);
        $crate::entries!(@local "local_norm", $element, RmsNorm<Unquantized>);
        $crate::entries!(@local "local_norm_fp8", $element, RmsNorm<Fp8Static>);
        $crate::entries!(@local "local_norm_fp8_token", $element, RmsNorm<Fp8PerToken>);
        $crate::entries!(@local "local_norm_fp8_block", $element, RmsNorm<Fp8Block>);
        $crate::entries!(@local "local_norm_fp4", $element, RmsNorm<Fp4>);
        $crate::entries!(@local_any "local_any_p1", $element, 1, true);
        $crate::entries!(@local_any "local_any_p2", $element, 2, true);
    };
    (streamed, $element:ident) => {
        $crate::entries!(@fused one_shot, "one_shot_any_streamed", $element, AnyEpilogue, Experts, elements, 8, 1, false);
        $crate::entries!(@fused two_shot, "two_shot_any_streamed", $element, AnyEpilogue, Experts, elements, 8, 1, false);
        $crate::entries!(@fused sharded, "sharded_any_streamed", $element, AnyEpilogue, Experts, elements, 8, 1, false);
        $crate::entries!(@fused one_shot, "one_shot_wire_any_streamed", $element, AnyEpilogue, Experts, encoded, 8, 1, false);
        $crate::entries!(@fused two_shot, "two_shot_wire_any_streamed", $element, AnyEpilogue, Experts, encoded, 8, 1, false);
        $crate::entries!(@fused sharded, "sharded_wire_any_streamed", $element, AnyEpilogue, Experts, encoded, 8, 1, false);
        $crate::entries!(@local_any "local_any_streamed", $element, 1, false);
    };
    (hosts, $element:ident) => {
        $crate::entries!(@hosts "_p1", $element, true);
        $crate::entries!(@hosts "_streamed", $element, false);
    };
    (@hosts $version:literal, $element:ident, $resident:literal) => {
        $crate::entries!(@entry concat!("host_sum", $version), HostSum, |params| {
            collective::host_sum::<$element, _, 8, 1, $resident>(&params, &params.experts)
        });
        $crate::entries!(@entry concat!("two_shot_hosts", $version), FusedHosts<AnyEpilogue>, |params| {
            collective::two_shot_hosts::<$element, AnyEpilogue, 8, 1, $resident>(&params)
        });
        $crate::entries!(@entry concat!("sharded_hosts", $version), FusedHosts<AnyEpilogue>, |params| {
            collective::sharded_hosts::<$element, AnyEpilogue, 8, 1, $resident>(&params)
        });
    };
    (@for_any $element:ident, $ranks:literal) => {
        $crate::entries!(@epilogue one_shot, "one_shot_none", $element, Plain<Unquantized>, elements, $ranks);
        $crate::entries!(@collective one_shot, "one_shot", $element, elements, $ranks);
        $crate::entries!(@collective sharded, "sharded", $element, elements, $ranks);
    };
    (@collective $algorithm:ident, $name:literal, $element:ident, $wire:ident, $ranks:literal) => {
        $crate::entries!(@epilogue $algorithm, concat!($name, "_norm"), $element, RmsNorm<Unquantized>, $wire, $ranks);
        $crate::entries!(@epilogue $algorithm, concat!($name, "_fp8"), $element, RmsNorm<Fp8Static>, $wire, $ranks);
        $crate::entries!(@epilogue $algorithm, concat!($name, "_fp8_token"), $element, RmsNorm<Fp8PerToken>, $wire, $ranks);
        $crate::entries!(@epilogue $algorithm, concat!($name, "_fp8_block"), $element, RmsNorm<Fp8Block>, $wire, $ranks);
        $crate::entries!(@epilogue $algorithm, concat!($name, "_fp4"), $element, RmsNorm<Fp4>, $wire, $ranks);
    };
    (@epilogue one_shot, $name:expr, $element:ident, $epilogue:ty, elements, $ranks:literal) => {
        $crate::entries!(@narrow one_shot, $name, $element, $epilogue, Given, elements, $ranks);
    };
    (@epilogue $algorithm:ident, $name:expr, $element:ident, $epilogue:ty, $wire:ident, $ranks:literal) => {
        $crate::entries!(@both $algorithm, $name, $element, $epilogue, Given, $wire, $ranks);
    };
    (@narrow $algorithm:ident, $name:expr, $element:ident, $epilogue:ty, $prologue:ident, $wire:ident, $ranks:literal) => {
        $crate::entries!(@fused $algorithm, concat!($name, "_p1"), $element, $epilogue, $prologue, $wire, $ranks, 1, true);
        // Where there are no clusters.
        #[cfg(not(target_feature = "sm_90"))]
        $crate::entries!(@fused $algorithm, concat!($name, "_p2"), $element, $epilogue, $prologue, $wire, $ranks, 2, true);
    };
    (@both $algorithm:ident, $name:expr, $element:ident, $epilogue:ty, $prologue:ident, $wire:ident, $ranks:literal) => {
        $crate::entries!(@fused $algorithm, concat!($name, "_p1"), $element, $epilogue, $prologue, $wire, $ranks, 1, true);
        $crate::entries!(@fused $algorithm, concat!($name, "_p2"), $element, $epilogue, $prologue, $wire, $ranks, 2, true);
    };
    (@fused $algorithm:ident, $name:expr, $element:ident, $epilogue:ty, $prologue:ident, $wire:ident, $ranks:literal, $packs:literal, $resident:literal) => {
        $crate::entries!(@entry $name, Fused<$epilogue>, |params| {
            let (prologue, wire) = ($crate::entries!(@prologue $prologue, params), $crate::entries!(@wire $wire, params));
            collective::$algorithm::<$element, $epilogue, _, _, $ranks, $packs, $resident>(&params, prologue, wire)
        });
    };
    (@prologue Given, $params:ident) => { &Given };
    (@prologue Experts, $params:ident) => { &$params.extras.experts };
    (@wire elements, $params:ident) => { &Elements };
    (@wire encoded, $params:ident) => { &$params.extras.encoding };
    (@local $name:literal, $element:ident, $epilogue:ty) => {
        $crate::entries!(@entry concat!($name, "_p1"), Local<$epilogue>, |params| local::<$element, $epilogue, 1, true>(&params, None));
        $crate::entries!(@entry concat!($name, "_p2"), Local<$epilogue>, |params| local::<$element, $epilogue, 2, true>(&params, None));
    };
    (@local_any $name:literal, $element:ident, $packs:literal, $resident:literal) => {
        $crate::entries!(@entry $name, LocalAny, |params| {
            local::<$element, AnyEpilogue, $packs, $resident>(&params.local, Some(&params.extras))
        });
    };
    (@entry $name:expr, $parameters:ty, |$params:ident| $kernel:expr) => {
        const _: () = {
            #[allow(unused_imports, reason = "each entry uses some of these")]
            use $crate::{collective, dtype::{bf16, f16}, launch::*, local, prologue::Given, wire::Elements};

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
