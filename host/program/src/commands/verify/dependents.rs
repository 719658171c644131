//! Outputs that dependent kernels read as early as they may. On GPUs these are programmatic dependents of the operation,
//! which start before it has ended.

use fused_collective::group::rendezvous::Group;
use fused_collective_core::{dtype::DType, quant::Quantization};

use super::{
    settings::{Section, Settings, Shape},
    verdicts::{Place, Tally, Verdict, Verdicts, count, gather_groups},
};
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
    },
    check::{
        variants::{Variant, that_span, variants},
        verify::{verify, write_inputs},
    },
    job::ranks::{Error, gather_verdicts},
    pattern::Pattern,
    report::progress::Progress,
    wire::Wire,
};

/// Elements of the runs between two barriers.
const ELEMENTS_AT_ONCE: u64 = 1 << 34;

/// Runs bfloat16 operations with dependents that read the outputs, `settings.dependents` times each. The operations are all
/// shapes of `settings` with tokens and a residual, in every quantization and mode.
///
/// # Errors
/// A group or the backend failed.
pub fn run_dependents(
    settings: &Settings,
    place: &mut Place<'_>,
    progress: &Progress,
    mut tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let mut total = Tally::default();
    for &hidden in &settings.hidden_dims {
        for &tokens in settings.num_tokens.iter().filter(|tokens| **tokens > 0) {
            let mut tally = Tally::default();
            let partial_sums = settings.job.partial_sums();
            let section = Section { dtype: DType::Bf16, hidden, partial_sums };
            for quant_mode in section.quant_modes() {
                let shape = Shape { section, tokens, residual: true, pattern: Pattern::AllReduceNorm };
                let title = format!("{}, dependents", shape.title(quant_mode));
                progress.doing(title.clone());
                let problem = shape.problem(quant_mode);
                let mut verdicts = Verdicts::new();
                let all = variants(
                    problem.pattern,
                    quant_mode,
                    problem.residual,
                    problem.sharded,
                    true,
                    &[Wire::Exact],
                    &[],
                );
                for variant in that_span(place.hosts(), all) {
                    let mut verdict = match &mut place.own {
                        Some((group, backend)) => {
                            verified(settings, group, &mut **backend, &problem, &variant)?
                        }
                        None => Ok(0.0),
                    };
                    let mut left = settings.dependents;
                    let at_once = (ELEMENTS_AT_ONCE / (tokens * hidden)).clamp(100, 100_000);
                    while left > 0 {
                        let times = left.min(at_once);
                        left -= times;
                        if let Some((group, backend)) = &mut place.own {
                            let found = audited(group, &mut **backend, &problem, &variant, times)?;
                            verdict = verdict.and_then(|error| found.map(|()| error));
                        }
                        place.world.barrier()?;
                    }
                    if place.own.is_some() {
                        verdicts.push((variant.name, verdict));
                    }
                }
                let found = gather_groups(place.world, place.group(), &verdicts)?;
                count(settings.job.groups, &title, found, &mut tally, &mut tell);
            }
            tell(&format!(
                "dependents of {tokens} tokens, hidden {hidden}, {} times: {tally}",
                settings.dependents
            ));
            total.add(tally);
        }
    }
    Ok(total)
}

/// Prepares the problem, and verifies the outputs that it leaves.
fn verified(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    problem: &Problem,
    variant: &Variant,
) -> Result<Verdict, Error> {
    backend.prepare(problem)?;
    write_inputs(backend, problem, settings.numbers(), group)?;
    verify(backend, group, problem, variant, settings.numbers())
}

/// Runs the variant with dependents, which must read the right outputs on every rank.
fn audited(
    group: &Group,
    backend: &mut dyn Collective,
    problem: &Problem,
    variant: &Variant,
    times: u64,
) -> Result<Result<(), String>, Error> {
    let quantized = problem.quantization != Quantization::None;
    let outputs: Vec<Tensor> = Tensor::OUTPUTS
        .into_iter()
        .filter(|&tensor| problem.bytes(tensor) > Some(0))
        .filter(|&tensor| tensor != Tensor::NormOut || !quantized || variant.writes_norm)
        // Dependents poison the outputs. In a sharded sum the poison would stay in rows that this rank does not have.
        .filter(|&tensor| tensor != Tensor::ResidualShardOut)
        .filter(|&tensor| tensor != Tensor::ResidualOut || !variant.sharded)
        .collect();
    let found = backend.audit(&variant.steps, &outputs, times)?;
    Ok(gather_verdicts(group, found.map_or(Ok(()), Err))?.map(|_| ()))
}
