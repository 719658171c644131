//! The table of entry points, as device code.

/// Defines the entry points of one of the [table](crate::table)'s modules: the eager steps of one element type, or the
/// probes.
///
/// ```ignore
/// fused_collective_bench::entries!(eager, bf16);
/// fused_collective_bench::entries!(probes);
/// ```
#[macro_export]
macro_rules! entries {
    (eager, $element:ident) => {
        $crate::entries!(@entry "eager_to_f32", EagerStep, eager::to_f32::<$element>);
        $crate::entries!(@entry "eager_add", EagerStep, eager::add);
        $crate::entries!(@entry "eager_round", EagerStep, eager::round::<$element>);
        $crate::entries!(@entry "eager_square", EagerStep, eager::square);
        $crate::entries!(@entry "eager_mean_rsqrt", EagerStep, eager::mean_rsqrt);
        $crate::entries!(@entry "eager_scale_rows", EagerStep, eager::scale_rows);
        $crate::entries!(@entry "eager_mul_weight", EagerStep, eager::mul_weight::<$element>);
        $crate::entries!(@entry "eager_mul_inverse", EagerStep, eager::mul_inverse);
        $crate::entries!(@entry "eager_clamp", EagerStep, eager::clamp);
        $crate::entries!(@entry "eager_to_fp8", EagerStep, eager::to_fp8);
    };
    (probes) => {
        $crate::entries!(@entry "audit_outputs", Audit, audit);
        $crate::entries!(@entry "digest", Digest, digest);
        $crate::entries!(@entry "encode_e4m3", Conversions, convert::encode_e4m3);
        $crate::entries!(@entry "encode_e2m1", Conversions, convert::encode_e2m1);
        $crate::entries!(@entry "links_meet", Meet, links::meet);
        $crate::entries!(@entry "links_ping", Ping, links::ping);
        $crate::entries!(@entry "links_push", Push, links::push);
        $crate::entries!(@entry "links_pull", Pull, links::pull);
    };
    (@entry $name:literal, $parameters:ident, $($kernel:tt)+) => {
        const _: () = {
            #[allow(unused_imports, reason = "each entry uses some of these")]
            use $crate::kernels::{*, dtype::{bf16, f16}};

            /// # Safety
            /// Launched by the rules in `fused_collective_core::launch`.
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn entry(params: $crate::launch::$parameters) {
                // SAFETY: the rules are what the kernel asks for.
                unsafe { $($kernel)+(&params) }
            }
        };
    };
}
