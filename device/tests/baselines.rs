//! The unfused kernels, run by the host's threads, against `core::reference`.

mod support;

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::Operation,
    quant::{ScaleLayout, e2m1, e4m3},
    reference::Rounding,
};
use fused_collective_device::{
    baseline::{self, eager},
    epilogue::Epilogue,
    params::{Activations, Address, Conversions, Fill, Local, Plain, Step, Unquantized},
    simt::host::{Launch, launch},
};
use support::{Buffer, Case, EVERYTHING, Random, Rows, Tensors, What, geometry, shape};

const SMALL: Launch = Launch { blocks: 2, cluster: 1, threads: 32 };

fn run_local<E: Element, X: Epilogue<E> + Sync>(
    operation: &Operation,
    activations: Activations,
    epilogue: X,
) {
    let params = Local { shape: shape(operation), activations, epilogue };
    // SAFETY: the parameters are as their documentation says, and the geometry covers a row.
    launch(geometry(operation, Rows::P1, 1, 2), || unsafe { baseline::local::<E, X, 1, true>(&params) });
}

/// Everything after the all-reduce in one pass.
fn compiled<E: Element>(seed: u64) {
    let mut random = Random(seed);
    for what in EVERYTHING {
        for residual in [false, true] {
            let hidden = 16 * (1 + random.below(12));
            let case = Case::<E>::new(&mut random, 1, 3, hidden, residual, what);
            let tensors = Tensors::new(&case, 0);
            support::run_local(&case, &tensors);
            tensors.check(&case, Rounding::Once);
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
    let norm = Activations {
        input: separate.norm_out.address(),
        residual: Address::NULL,
        residual_out: Address::NULL,
    };
    match what {
        What::NvFp4(layout) => {
            run_local::<E, _>(operation, norm, Plain { quantizer: separate.nvfp4(layout) });
            run_local::<E, _>(operation, fused.activations(), fused.norm(&case, fused.nvfp4(layout)));
        }
        _ => {
            run_local::<E, _>(operation, norm, Plain { quantizer: separate.fp8() });
            run_local::<E, _>(operation, fused.activations(), fused.norm(&case, fused.fp8()));
        }
    }
    assert!(fused.outputs() == separate.outputs());
}

#[test]
fn quantization_alone_gives_the_same_codes() {
    separate_quantization::<f32>(24, What::Fp8);
    separate_quantization::<bf16>(25, What::Fp8);
    separate_quantization::<f32>(26, What::NvFp4(ScaleLayout::Linear));
    separate_quantization::<f16>(27, What::NvFp4(ScaleLayout::Swizzled128x4));
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
    launch(streamed, || unsafe { baseline::local::<f32, _, 1, false>(&params) });
    let (with, without) = (with.norm_out.get::<f32>(), without.norm_out.get::<f32>());
    for (with, without) in with.iter().zip(&without) {
        assert!((with - without).abs() <= with.abs() * 1e-6, "{with} {without}");
    }
}

fn eager_steps<E: Element>(seed: u64) {
    support::eager_steps::<E>(&mut Random(seed), |name, step, buffers| {
        let kernel: unsafe fn(&Step) = match name {
            "to_f32" => eager::to_f32::<E>,
            "add" => eager::add,
            "round" => eager::round::<E>,
            "square" => eager::square,
            "mean_rsqrt" => eager::mean_rsqrt,
            "scale_rows" => eager::scale_rows,
            "mul_weight" => eager::mul_weight::<E>,
            "mul_inverse" => eager::mul_inverse,
            "clamp" => eager::clamp,
            "to_fp8" => eager::to_fp8,
            _ => panic!("no step is called {name}"),
        };
        // SAFETY: the tensors have the types and the shapes that the steps ask for.
        launch(SMALL, || unsafe { kernel(step) });
        buffers.iter().for_each(|buffer| buffer.assert_guards());
    });
}

#[test]
fn eager_steps_are_right_in_every_type() {
    eager_steps::<f32>(29);
    eager_steps::<f16>(30);
    eager_steps::<bf16>(31);
}

#[test]
fn fill_writes_every_pack_and_nothing_else() {
    let buffer = Buffer::new(100 * 16, 1);
    let params = Fill { out: buffer.address(), packs: 99, word: 7, reserved: 0 };
    // SAFETY: the memory is as long as the parameters say.
    launch(SMALL, || unsafe { baseline::fill(&params) });
    let words = buffer.get::<u32>();
    assert!(words[..99 * 4].iter().all(|word| *word == 7) && words[99 * 4..].iter().all(|word| *word == 1));
    buffer.assert_guards();
}

#[test]
fn conversions_are_stored_in_order() {
    // Round 448, the largest E4M3 number, and round zero, where the count of bits wraps.
    for first in [448f32.to_bits() - 500, 0u32.wrapping_sub(500), 1.5f32.to_bits()] {
        let (bytes, halves) = (Buffer::new(1000, 0), Buffer::new(500, 0));
        let e4m3 = Conversions { out: bytes.address(), first, count: 1000 };
        let e2m1 = Conversions { out: halves.address(), ..e4m3 };
        // SAFETY: the memory holds the codes of as many patterns.
        launch(SMALL, || unsafe {
            baseline::verify::encode_e4m3(&e4m3);
            baseline::verify::encode_e2m1(&e2m1);
        });
        let (bytes, halves) = (bytes.get::<u8>(), halves.get::<u8>());
        for index in 0..1000 {
            let value = f32::from_bits(first.wrapping_add(index as u32));
            assert_eq!(bytes[index], e4m3::encode(value));
            assert_eq!(e2m1::unpack(halves[index / 2])[index % 2], e2m1::encode(value));
        }
    }
}
