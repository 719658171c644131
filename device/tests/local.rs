//! The kernels that need no group, run by the host's threads, against `core::reference`.

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::Operation,
    fusion::Rounding,
    quant::Quantization,
};
use fused_collective_device::{
    epilogue::Epilogue,
    launch::{Activations, Address, Local, Plain, Unquantized},
    local,
    simt::host::launch,
};
use fused_collective_device_tests::{
    Case, EVERYTHING, Random, Rows, Tensors, What, check_separate, geometry, separate_cases, shape,
    with_quantizer,
};

fn run_local<E: Element, X: Epilogue<E> + Sync>(
    operation: &Operation,
    activations: Activations,
    epilogue: X,
) {
    let params = Local { shape: shape(operation), activations, epilogue };
    // SAFETY: the parameters are as their documentation says, and the geometry covers a row.
    launch(geometry(operation, Rows::P1, 1, 2), || unsafe { local::<E, X, 1, true>(&params, None) });
}

/// Everything after the all-reduce in one pass.
fn compiled<E: Element>(seed: u64) {
    let mut random = Random(seed);
    for what in EVERYTHING {
        for residual in [false, true] {
            let hidden = 16 * (1 + random.below(12));
            let case = Case::<E>::new(&mut random, 1, 3, hidden, residual, what);
            let tensors = Tensors::new(&case, 0);
            fused_collective_device_tests::run_local(&case, &tensors);
            tensors.check(&case);
        }
    }
}

#[test]
fn one_pass_kernels_are_right_in_f32() {
    compiled::<f32>(21);
}

#[test]
fn one_pass_kernels_are_right_in_f16() {
    compiled::<f16>(22);
}

#[test]
fn one_pass_kernels_are_right_in_bf16() {
    compiled::<bf16>(23);
}

/// RMSNorm, then its quantization as a kernel of its own, gives the bits of both in one.
fn separate_quantization<E: Element>(seed: u64, what: What) {
    let mut random = Random(seed);
    let mut case = Case::<E>::new(&mut random, 1, 3, 96, true, what);
    case.operation.keep_norm = true;
    let (fused, separate) = (Tensors::new(&case, 0), Tensors::new(&case, 0));
    let operation = &case.operation;
    run_local::<E, _>(operation, separate.activations(), separate.norm(&case, Unquantized));
    let norm = Activations::new(separate.norm_out().address(), Address::NULL, Address::NULL, Rounding::Once);
    with_quantizer!(case, separate, |_name, quantizer| {
        run_local::<E, _>(operation, norm, Plain { quantizer });
    });
    with_quantizer!(case, fused, |_name, quantizer| {
        run_local::<E, _>(operation, fused.activations(), fused.norm(&case, quantizer));
    });
    assert!(fused.outputs() == separate.outputs());
}

#[test]
fn quantization_alone_gives_the_same_codes() {
    for what in EVERYTHING {
        if what.quantization() != Quantization::None {
            separate_quantization::<f32>(24, what);
            separate_quantization::<f16>(25, what);
            separate_quantization::<bf16>(26, what);
        }
    }
}

/// A norm without a residual needs no `residual_out`, in registers or streamed.
#[test]
fn a_norm_alone_leaves_its_input_where_it_is() {
    let mut random = Random(28);
    let case = Case::<f32>::new(&mut random, 1, 3, 720, false, What::Norm);
    let (with, without) = (Tensors::new(&case, 0), Tensors::new(&case, 0));
    run_local::<f32, _>(&case.operation, with.activations(), with.norm(&case, Unquantized));
    let params = Local {
        shape: shape(&case.operation),
        activations: Activations { residual_out: Address::NULL, ..without.activations() },
        epilogue: without.norm(&case, Unquantized),
    };
    let streamed = geometry(&case.operation, Rows::Streamed, 1, 2);
    // SAFETY: the parameters are as their documentation says.
    launch(streamed, || unsafe { local::<f32, _, 1, false>(&params, None) });
    let (with, without) = (with.norm_out().get::<f32>(), without.norm_out().get::<f32>());
    for (with, without) in with.iter().zip(&without) {
        assert!((with - without).abs() <= with.abs() * 1e-6, "{with} {without}");
    }
}

/// A norm of the sum and experts, as passes around an all-reduce.
fn separate<E: Element>(seed: u64) {
    let mut random = Random(seed);
    for rows in [Rows::P1, Rows::P2, Rows::Streamed] {
        for case in separate_cases::<E>(&mut random, rows) {
            check_separate(&case, rows, |geometry, pass, _| launch(geometry, || pass.run()));
        }
    }
}

#[test]
fn post_norms_and_experts_are_right_as_passes_of_their_own_in_f32() {
    separate::<f32>(31);
}

#[test]
fn post_norms_and_experts_are_right_as_passes_of_their_own_in_f16() {
    separate::<f16>(32);
}

#[test]
fn post_norms_and_experts_are_right_as_passes_of_their_own_in_bf16() {
    separate::<bf16>(33);
}
