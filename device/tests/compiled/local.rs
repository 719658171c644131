//! Every entry point that needs no group, for every kind of GPU.

use std::mem::MaybeUninit;

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::Rounding,
    kernels::Quantizer,
    quant::Quantization,
};
use fused_collective_device::{
    launch::{
        Activations, Address, AnyEpilogue, AnyQuantizer, Extras, Local, LocalAny, Plain, RmsNorm, Unquantized,
    },
    simt::host::Launch,
};

use fused_collective_device_tests::{
    Case, Random, Rows, Tensors, What, bytes_of, check_separate, geometry, separate_cases, shape,
    with_quantizer,
};

use crate::{Compiled, ROWS, gpus_of};

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
    run(compiled, (name, rows), case, &bytes_of(&params), tensors);
}

/// The same of the kernel of any epilogue.
fn any_pass<E: Element>(
    compiled: &Compiled,
    rows: Rows,
    case: &Case<E>,
    activations: Activations,
    epilogue: AnyEpilogue,
    tensors: &Tensors,
) {
    let local = Local { shape: shape(&case.operation), activations, epilogue };
    let params = LocalAny { local, extras: Extras::NONE };
    run(compiled, ("any", rows), case, &bytes_of(&params), tensors);
}

fn run<E: Element>(
    compiled: &Compiled,
    (name, rows): (&str, Rows),
    case: &Case<E>,
    parameter: &[MaybeUninit<u8>],
    tensors: &Tensors,
) {
    let launch = geometry(&case.operation, rows, 1, 2);
    // One warp streams what several could, and more.
    let launch = if rows == Rows::Streamed { Launch { threads: 64, ..launch } } else { launch };
    compiled.run(0, launch, &format!("local_{name}_{}", rows.name()), parameter, tensors.ranges());
}

fn passes_are_right<E: Element>(random: &mut Random, compiled: &Compiled) {
    for rows in ROWS {
        for what in What::of_each_epilogue(random) {
            let hidden = 16 * (17 + random.below(17));
            let residual = random.below(2) == 1;
            let mut case = Case::<E>::new(random, 1, 3, hidden, residual, what);
            case.operation.keep_norm |= case.operation.norm.is_some();
            let [fused, apart] = [(); 2].map(|()| Tensors::new(&case, 0));
            let with = fused.activations();
            let is_any = rows == Rows::Streamed || matches!(what, What::MxFp4(_));
            if is_any {
                any_pass(compiled, rows, &case, with, fused.any_epilogue(&case), &fused);
            } else if what == What::Sum {
                one_pass(compiled, ("none", rows), &case, with, Plain { quantizer: Unquantized }, &fused);
            } else {
                with_quantizer!(case, fused, |name, quantizer| {
                    let name = name.map_or("norm".to_owned(), |name| format!("norm_{name}"));
                    one_pass(compiled, (&name, rows), &case, with, fused.norm(&case, quantizer), &fused);
                });
            }
            fused.check(&case);
            if case.operation.quantization == Quantization::None {
                continue;
            }
            // The norm, then its quantization: the bits of both in one.
            let norm =
                Activations::new(apart.norm_out().address(), Address::NULL, Address::NULL, Rounding::Once);
            if is_any {
                let AnyEpilogue { norm: whole } = apart.any_epilogue(&case);
                let unquantized = AnyQuantizer { kind: Quantizer::None as u32, ..whole.quantizer };
                for (activations, epilogue) in [
                    (apart.activations(), RmsNorm { quantizer: unquantized, ..whole }),
                    (norm, RmsNorm { gamma: Address::NULL, ..whole }),
                ] {
                    let epilogue = AnyEpilogue { norm: epilogue };
                    any_pass(compiled, rows, &case, activations, epilogue, &apart);
                }
                assert!(fused.outputs() == apart.outputs(), "{what:?} {rows:?}");
                continue;
            }
            one_pass(
                compiled,
                ("norm", rows),
                &case,
                apart.activations(),
                apart.norm(&case, Unquantized),
                &apart,
            );
            with_quantizer!(case, apart, |name, quantizer| {
                let name = name.unwrap_or("none");
                one_pass(compiled, (name, rows), &case, norm, Plain { quantizer }, &apart);
            });
            assert!(fused.outputs() == apart.outputs(), "{what:?} {rows:?}");
        }
    }
}

fn every_kernel_is_right<E: Element>(seed: u64, dtype: &str) {
    let module = format!("{dtype}_local");
    for gpu in gpus_of(&module) {
        let mut random = Random(seed);
        let compiled = Compiled::read(gpu, &module, seed);
        passes_are_right::<E>(&mut random, &compiled);
        for rows in ROWS {
            for case in separate_cases::<E>(&mut random, rows) {
                check_separate(&case, rows, |launch, pass, tensors| {
                    compiled.run(0, launch, &pass.entry, &pass.parameter, tensors.ranges());
                });
            }
        }
        compiled.assert_all_ran(|name| !name.starts_with("local_"));
    }
}

#[test]
fn kernels_without_a_group_are_right() {
    every_kernel_is_right::<f32>(11, "f32");
    every_kernel_is_right::<f16>(12, "f16");
    every_kernel_is_right::<bf16>(13, "bf16");
}
