//! Every entry point that needs no group, for every kind of GPU.

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    quant::{Quantization, e2m1, e4m3},
    reference::Rounding,
};
use fused_collective_device::{
    params::{Activations, Address, Audit, Conversions, Fill, Local, Plain, Unquantized},
    simt::host::Launch,
};

use crate::{
    Compiled, ROWS, gpus_of,
    support::{
        Buffer, Case, EVERYTHING, POISON, Random, Rows, Tensors, What, bytes_of, eager_steps, geometry, shape,
    },
};

const SMALL: Launch = Launch { blocks: 2, cluster: 1, threads: 64 };

/// Runs one pass over rows, as entry point `local_{name}`.
fn one_pass<E: Element, X>(
    compiled: &Compiled,
    (name, rows): (&str, Rows),
    case: &Case<E>,
    activations: Activations,
    epilogue: X,
    tensors: &Tensors,
) {
    let params = Local { shape: shape(&case.operation), activations, epilogue };
    let launch = geometry(&case.operation, rows, 1, 2);
    // One warp streams what several could, and more.
    let launch = if rows == Rows::Streamed { Launch { threads: 64, ..launch } } else { launch };
    compiled.run(0, launch, &format!("local_{name}_{}", rows.name()), &bytes_of(&params), tensors.ranges());
}

/// Runs a kernel that accesses `buffers`.
fn run_on<P>(compiled: &Compiled, name: &str, params: &P, buffers: &[&Buffer]) {
    let ranges = buffers.iter().map(|buffer| buffer.range()).collect();
    compiled.run(0, SMALL, name, &bytes_of(params), ranges);
}

fn passes_are_right<E: Element>(random: &mut Random, compiled: &Compiled) {
    for rows in ROWS {
        for what in EVERYTHING {
            let hidden = 16 * (17 + random.below(17));
            let residual = random.below(2) == 1;
            let mut case = Case::<E>::new(random, 1, 3, hidden, residual, what);
            case.operation.keep_norm |= case.operation.norm.is_some();
            let [fused, apart] = [(); 2].map(|()| Tensors::new(&case, 0));
            let with = fused.activations();
            match case.operation.quantization {
                _ if what == What::Sum => {
                    one_pass(compiled, ("none", rows), &case, with, Plain { quantizer: Unquantized }, &fused);
                }
                Quantization::Fp8Static => {
                    one_pass(
                        compiled,
                        ("norm_fp8", rows),
                        &case,
                        with,
                        fused.norm(&case, fused.fp8()),
                        &fused,
                    );
                }
                Quantization::NvFp4 { layout } => {
                    let epilogue = fused.norm(&case, fused.nvfp4(layout));
                    one_pass(compiled, ("norm_nvfp4", rows), &case, with, epilogue, &fused);
                }
                _ => one_pass(compiled, ("norm", rows), &case, with, fused.norm(&case, Unquantized), &fused),
            }
            fused.check(&case, Rounding::Once);
            if case.operation.quantization == Quantization::None {
                continue;
            }
            // The norm, then its quantization: the bits of both in one.
            one_pass(
                compiled,
                ("norm", rows),
                &case,
                apart.activations(),
                apart.norm(&case, Unquantized),
                &apart,
            );
            let norm = Activations {
                input: apart.norm_out.address(),
                residual: Address::NULL,
                residual_out: Address::NULL,
            };
            match case.operation.quantization {
                Quantization::NvFp4 { layout } => {
                    one_pass(
                        compiled,
                        ("nvfp4", rows),
                        &case,
                        norm,
                        Plain { quantizer: apart.nvfp4(layout) },
                        &apart,
                    );
                }
                _ => one_pass(compiled, ("fp8", rows), &case, norm, Plain { quantizer: apart.fp8() }, &apart),
            }
            assert!(fused.outputs() == apart.outputs(), "{what:?} {rows:?}");
        }
    }
}

fn fill_and_audit_are_right(compiled: &Compiled) {
    let [actual, expected] = [(); 2].map(|()| Buffer::new(100 * 16, 1));
    let fill = Fill { out: actual.address(), packs: 99, word: 7, reserved: 0 };
    run_on(compiled, "fill", &fill, &[&actual]);
    let words = actual.get::<u32>();
    assert!(words[..99 * 4].iter().all(|word| *word == 7) && words[99 * 4..].iter().all(|word| *word == 1));

    let found = Buffer::new(16, 0);
    let audit = |expected: &Buffer| Audit {
        actual: actual.address(),
        expected: expected.address(),
        found: found.address(),
        packs: 100,
        poison: POISON,
        reserved: 0,
    };
    let same = Buffer::of(&words);
    run_on(compiled, "audit_outputs", &audit(&same), &[&actual, &same, &found]);
    assert_eq!(found.get::<u32>()[0], 0);
    assert!(actual.get::<u32>().iter().all(|word| *word == POISON));
    run_on(compiled, "audit_outputs", &audit(&expected), &[&actual, &expected, &found]);
    assert!((1..=100).contains(&found.get::<u32>()[0]));
}

/// Where a GPU has instructions for a conversion, the emulator does it as `core` does, and this shows the order only.
/// Random ranges of numbers, those around the largest, and those where the count of bits wraps.
fn conversions_are_right(random: &mut Random, compiled: &Compiled) {
    let edges = [448f32.to_bits() - 500, 0u32.wrapping_sub(500), 1.5f32.to_bits(), 6f32.to_bits() - 500];
    let firsts: Vec<u32> = edges.into_iter().chain((0..60).map(|_| random.next() as u32)).collect();
    for first in firsts {
        let (bytes, halves) = (Buffer::new(1000, 0), Buffer::new(500, 0));
        let e4m3 = Conversions { out: bytes.address(), first, count: 1000 };
        run_on(compiled, "encode_e4m3", &e4m3, &[&bytes]);
        let e2m1 = Conversions { out: halves.address(), ..e4m3 };
        run_on(compiled, "encode_e2m1", &e2m1, &[&halves]);
        let (bytes, halves) = (bytes.get::<u8>(), halves.get::<u8>());
        for index in 0..1000 {
            let value = f32::from_bits(first.wrapping_add(index as u32));
            assert_eq!(bytes[index], e4m3::encode(value), "{value:e}");
            assert_eq!(e2m1::unpack(halves[index / 2])[index % 2], e2m1::encode(value), "{value:e}");
        }
    }
}

fn every_kernel_is_right<E: Element>(seed: u64, dtype: &str) {
    let module = format!("{dtype}_local");
    for gpu in gpus_of(&module) {
        let mut random = Random(seed);
        let compiled = Compiled::read(gpu, &module, seed);
        passes_are_right::<E>(&mut random, &compiled);
        eager_steps::<E>(&mut random, |name, step, buffers| {
            run_on(&compiled, &format!("eager_{name}"), step, &buffers);
        });
        fill_and_audit_are_right(&compiled);
        conversions_are_right(&mut random, &compiled);
        compiled.assert_all_ran(|name| name.starts_with("links_"));
    }
}

#[test]
fn kernels_without_a_group_are_right() {
    every_kernel_is_right::<f32>(11, "f32");
    every_kernel_is_right::<f16>(12, "f16");
    every_kernel_is_right::<bf16>(13, "bf16");
}
