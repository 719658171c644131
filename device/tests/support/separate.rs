//! The passes of separate operations around an all-reduce, of cases of one rank.

use fused_collective_core::{
    dtype::Element,
    fusion::{Residual, Rounding},
};
use fused_collective_device::{
    launch::{Activations, Address, AnyEpilogue, Local, LocalAny, PostNorm, RmsNorm, Unquantized},
    local,
    simt::host::Launch,
};

use super::{Case, Launched, POISON, Random, Rows, Tensors, What, geometry, shape};

/// The kernel of any epilogue.
///
/// # Safety
/// As [`local()`].
unsafe fn any<E: Element, const P: usize, const RESIDENT: bool>(params: &LocalAny) {
    // SAFETY: as this function's.
    unsafe { local::<E, AnyEpilogue, P, RESIDENT>(&params.local, Some(&params.extras)) }
}

/// The kernel of RMSNorm alone.
///
/// # Safety
/// As [`local()`].
unsafe fn norm<E: Element, const P: usize>(params: &Local<RmsNorm<Unquantized>>) {
    // SAFETY: as this function's.
    unsafe { local::<E, RmsNorm<Unquantized>, P, true>(params, None) }
}

/// One case for each epilogue, with a norm of the sum, experts or both, of which some have a shared expert; with a residual
/// or without, and with each rounding.
pub fn cases<E: Element>(random: &mut Random, rows: Rows) -> Vec<Case<E>> {
    let mut cases: Vec<Case<E>> = Vec::new();
    for what in What::of_each_epilogue(random) {
        for (post_norm, experts) in [(true, false), (false, true), (true, true)] {
            // Three cases an epilogue: each of these comes with each of the others.
            let number = cases.len();
            let [residual, twice, shared] = [1, 2, 4].map(|period| (number / period).is_multiple_of(2));
            let hidden = 16 * (17 + random.below(17));
            let mut case = Case::<E>::new(random, 1, 3, hidden, residual, what);
            case.operation.rounding = if twice { Rounding::AfterAllReduce } else { Rounding::Once };
            // Where there is no norm there is none of the sum.
            if post_norm && what != What::Sum {
                case = case.with_post_norm(random);
            }
            if experts {
                case = case.with_experts(random, shared);
            }
            cases.push(case.of_rows(rows));
        }
    }
    cases
}

/// Runs a case of one rank as separate operations: the pass that makes the addend, if there are experts, and then all the rest
/// in one pass. Runs the rest again with the norm of the sum, in place, as a pass of its own. Every result is what `core`
/// specifies. `run` runs a pass.
pub fn check<E: Element>(case: &Case<E>, rows: Rows, run: impl Fn(Launch, &Launched, &Tensors) + Copy) {
    let operation = &case.operation;
    let launch = geometry(operation, rows, 1, 2);
    // One warp streams what several could, and more.
    let launch = if rows == Rows::Streamed { Launch { threads: 64, ..launch } } else { launch };
    let kernel = match rows {
        Rows::P1 => any::<E, 1, true>,
        Rows::P2 => any::<E, 2, true>,
        Rows::Streamed => any::<E, 1, false>,
    };
    let pass = |tensors: &Tensors, activations| {
        let local = Local { shape: shape(operation), activations, epilogue: tensors.any_epilogue(case) };
        let params = LocalAny { local, extras: tensors.extras() };
        run(launch, &Launched::of(format!("local_any_{}", rows.name()), kernel, params), tensors);
    };
    let combined = || {
        let tensors = Tensors::new(case, 0);
        let with = tensors.activations();
        if with.has(Activations::EXPERTS) {
            pass(&tensors, with);
            let bytes = tensors.outputs().concat();
            assert!(bytes.iter().all(|&byte| byte == POISON as u8), "more than the addend ({operation:?})");
        }
        let rest = Activations { flags: with.flags & !Activations::EXPERTS, ..with };
        (tensors, rest)
    };

    let (whole, rest) = combined();
    pass(&whole, rest);
    whole.check(case);

    // A residual is added to the norm of the sum before that is rounded, unless the rounding is that of separate operations.
    let is_separable = operation.residual == Residual::None || operation.rounding == Rounding::AfterAllReduce;
    if operation.post_norm.is_some() && is_separable {
        let (apart, mut rest) = combined();
        norm_in_place(case, rows, launch, &apart, run);
        rest.flags &= !Activations::POST_NORM;
        pass(&apart, rest);
        apart.check(case);
    }
    // Without a residual the sum stays where it is, or its norm takes its place.
    if operation.residual == Residual::None && operation.post_norm.is_none() {
        let (alone, rest) = combined();
        pass(&alone, Activations { residual_out: Address::NULL, ..rest });
        assert!(alone.outputs()[1..] == whole.outputs()[1..], "without `residual_out` ({operation:?})");
        assert!(alone.outputs()[0].iter().all(|&byte| byte == POISON as u8));
    } else if operation.residual == Residual::None && operation.experts.is_none() {
        let (in_place, rest) = combined();
        pass(&in_place, Activations { residual_out: rest.input, ..rest });
        let written = [&[in_place.input.get::<u8>()], &in_place.outputs()[1..]].concat();
        assert!(written == whole.outputs(), "with `residual_out` in place ({operation:?})");
    }
}

/// Replaces the addend of a case by its norm, the norm of the sum.
fn norm_in_place<E: Element>(
    case: &Case<E>,
    rows: Rows,
    launch: Launch,
    tensors: &Tensors,
    run: impl Fn(Launch, &Launched, &Tensors),
) {
    let input = tensors.activations().input;
    let PostNorm { gamma, inverse_hidden, epsilon, weight_bias, gamma_f32 } = tensors.extras().post_norm;
    let params = Local {
        shape: shape(&case.operation),
        activations: Activations::new(input, Address::NULL, Address::NULL, Rounding::Once),
        epilogue: RmsNorm {
            gamma,
            norm_out: input,
            inverse_hidden,
            epsilon,
            weight_bias,
            gamma_f32,
            quantizer: Unquantized,
        },
    };
    let kernel = if rows == Rows::P2 { norm::<E, 2> } else { norm::<E, 1> };
    run(launch, &Launched::of(format!("local_norm_{}", rows.name()), kernel, params), tensors);
}
