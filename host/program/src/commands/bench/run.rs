//! The benchmark: every variant of every configuration, verified, then timed, then verified again.
//!
//! Every rank calls [`run`], and all ranks go through the same steps. A trial runs a variant several times back to back
//! after a barrier. The time of a trial is that of the slowest rank.

use std::collections::BTreeSet;

use fused_collective::group::rendezvous::Group;
use fused_collective_core::{
    fusion::{Mode, Norm},
    plan::{Algorithm, Plan},
    quant::Quantization,
};

use super::{
    across::across_hosts,
    settings::{Case, Settings},
    wires,
};
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
        steps::{AllReduce, Fused, Step},
    },
    check::{
        inputs::Numbers,
        judge,
        outputs::Saved,
        variants::{self, Variant, that_span, variants},
        verify,
    },
    commands::links::run::put_bandwidth,
    job::ranks::{Error, hosts, slowest},
    measurement::{Kind, Measurement, Trials, TwoKinds, bus_factor, compared, two_kinds},
    peers::{Peers, protocol::MeasureRequest},
    report::progress::Progress,
};

/// Trials that choose the fastest way to run an all-reduce.
const CHOICE_TRIALS: u32 = 5;

/// The problem that a configuration measures.
pub fn problem(settings: &Settings, case: Case) -> Problem {
    Problem {
        dtype: case.dtype,
        tokens: case.num_tokens,
        hidden: settings.hidden_dim,
        residual: settings.use_residual,
        sharded: settings.sharded_residual,
        norm: Norm::default(),
        pattern: settings.pattern,
        quantization: case.quant_mode.quantization(),
        scale: case.quant_mode.scale(),
        partial_sums: settings.job.partial_sums(),
    }
}

/// The results of one configuration.
#[derive(Debug)]
pub struct Measured {
    /// The configuration.
    pub case: Case,
    /// Notes for a reader, a sentence each.
    pub notes: Vec<String>,
    /// The variants.
    pub variants: Vec<Measurement>,
    /// The [all-to-all put bandwidth](put_bandwidth) in GB/s, if every rank has a GPU of its own. The same for every
    /// configuration.
    pub put_gb_s: Option<f64>,
}

/// Measures every configuration of `settings`, then the `peers` on it, and passes each to `done`. Every rank gets the same
/// figures.
///
/// # Errors
/// The group or the backend failed. A wrong variant is no error but a measurement without times.
pub fn run(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    peers: &mut Peers,
    progress: &Progress,
    mut done: impl FnMut(Measured),
) -> Result<(), Error> {
    backend.set_cold(settings.cold);
    let cache_bytes = if settings.cold { backend.cache_bytes() } else { 0 };
    let hosts = hosts(group);
    let has_links = !backend.gpus().is_empty() && !settings.job.oversubscribe && hosts.count() == 1;
    let put_bandwidth = has_links.then(|| put_bandwidth(group, backend, progress)).transpose()?;
    let most_tokens = settings.num_tokens.iter().max().copied();
    for case in settings.cases() {
        let problem = problem(settings, case);
        backend.prepare(&problem)?;
        verify::write_inputs(backend, &problem, Numbers::random(settings.seed), group)?;
        let mut notes = backend.notes().to_vec();
        let mut all_reduces = Vec::new();
        for all_reduce in backend.all_reduces() {
            let (step, note) = choose_way(group, backend, &all_reduce)?;
            all_reduces.push((all_reduce.name, step));
            notes.extend(note);
        }
        let mut all = variants(
            settings.pattern,
            case.quant_mode,
            problem.residual,
            problem.sharded,
            settings.oneshot,
            &settings.wires,
            &all_reduces,
        );
        if hosts.count() > 1 {
            all = that_span(hosts.count(), all);
            notes.extend(across_hosts(&problem, backend.limits()));
        }
        if settings.in_place {
            all = all.into_iter().map(Variant::in_place).collect();
            notes.push(in_place(&problem));
        }
        let overwritten: BTreeSet<Tensor> =
            all.iter().flat_map(|variant| variant.overwritten(&problem)).collect();
        let saved = Saved::of(backend, &overwritten.into_iter().collect::<Vec<_>>())?;
        let mut entrants = Vec::new();
        for variant in all {
            progress.doing(format!("{} tokens, {}: {}", case.num_tokens, case.quant_mode, variant.name));
            let verdict = verify::verify(backend, group, &problem, &variant, Numbers::random(settings.seed))?;
            let trials = match verdict {
                Ok(max_error_ulp) => {
                    let numbers = Numbers::random(settings.seed);
                    let sum_error = judge::sum_error(&problem, &variant, numbers, &hosts);
                    let trials = first_trial(group, backend, &variant, &saved, max_error_ulp)?;
                    Ok(Trials { sum_error, ..trials })
                }
                Err(why) => Err(why),
            };
            entrants.push((variant, trials));
            progress.step();
        }
        progress.doing(format!("{} tokens, {}: trials", case.num_tokens, case.quant_mode));
        race(settings, group, backend, &mut entrants, &saved, progress)?;
        drop(saved);
        verify_timed(settings, group, backend, &problem, &mut entrants, progress)?;
        let plan = Plan::new(&problem.operation(Mode::Auto), backend.limits());
        notes.extend(plan.ok().and_then(|plan| automatic(plan.algorithm, &entrants)));
        if has_links {
            notes.extend(wires::expected(&problem, &settings.wires, backend.limits()));
        }
        if settings.cold {
            let mib = cache_bytes as f64 / f64::from(1 << 20);
            notes.push(format!(
                "cold: operations find their tensors in memory, not in the cache of {mib:.0} MiB"
            ));
        } else {
            // From memory or from a cache, as the operations found their tensors.
            let bytes = problem.activation_bytes();
            let gpus = backend.gpus();
            let copy = || Ok(slowest(group, &[backend.copy_time(bytes)?])?[0]);
            notes.extend(prediction(&gpus, bytes, copy, &entrants)?);
        }
        if Some(case.num_tokens) == most_tokens {
            notes.extend(match &put_bandwidth {
                Some(Ok(put_gb_s)) => {
                    share_of_links(*put_gb_s, problem.activation_bytes(), group.world_size(), &entrants)
                }
                Some(Err(why)) => Some(format!("the all-to-all put bandwidth is not known: {why}")),
                None => None,
            });
        }
        let measurement = |(variant, result): (Variant, _)| Measurement {
            variant: variant.name,
            kind: variant.kind,
            result,
        };
        let mut measured: Vec<Measurement> = entrants.into_iter().map(measurement).collect();
        if !settings.peers.is_empty() {
            progress.doing(format!("{} tokens, {}: peers", case.num_tokens, case.quant_mode));
            let (rows, notes_of_peers) = peers.measure(&request(settings, case, cache_bytes), group)?;
            measured.extend(rows);
            notes.extend(notes_of_peers);
            progress.advance(settings.peers.len() as u64);
        }
        notes.extend(measured.iter().any(|row| row.result.as_ref().is_ok_and(|trials| trials.sum_error.is_some())).then(
            || "the error of a sum that is not exact is its root mean square / its largest, in percent of the root mean square of a row".to_owned(),
        ));
        notes.extend(disturbed(&measured));
        let put_gb_s = put_bandwidth.as_ref().and_then(|found| found.as_ref().ok()).copied();
        done(Measured { case, notes, variants: measured, put_gb_s });
    }
    Ok(())
}

/// A configuration as peers are asked for it.
fn request(settings: &Settings, case: Case, cache_bytes: u64) -> MeasureRequest {
    let problem = problem(settings, case);
    MeasureRequest {
        num_tokens: problem.tokens,
        hidden_dim: problem.hidden,
        dtype: problem.dtype.name(),
        use_residual: problem.residual,
        quant_mode: case.quant_mode.name(),
        post_weight_bias: problem.pattern.post_norm().map(|norm| norm.weight_bias),
        top_k: problem.pattern.experts().map(|experts| experts.top_k),
        coded: settings.wires.iter().any(|wire| !wire.is_exact()),
        epsilon: problem.norm.epsilon,
        scale: problem.scale,
        oneshot: settings.oneshot,
        warmup: settings.warmup,
        trials: settings.trials,
        seed: settings.seed,
        cache_bytes,
    }
}

/// The number of steps that [`run`] will count on a backend with `all_reduces` all-reduces: each variant is verified twice,
/// all of them take turns in each trial, and each peer is one step.
pub fn count(settings: &Settings, all_reduces: usize) -> u64 {
    let trials = u64::from(settings.warmup) + u64::from(settings.trials);
    let steps = |case: Case| {
        let variants = variants::count(
            settings.pattern,
            case.quant_mode,
            settings.sharded_residual,
            settings.oneshot,
            &settings.wires,
            all_reduces,
        );
        2 * variants as u64 + trials + settings.peers.len() as u64
    };
    settings.cases().map(steps).sum()
}

/// Measures every way to run an all-reduce, and chooses the fastest for the separate operations.
fn choose_way(
    group: &Group,
    backend: &mut dyn Collective,
    all_reduce: &AllReduce,
) -> Result<(Step, Option<String>), Error> {
    let [(_, first), rest @ ..] = &all_reduce.ways[..] else {
        return Err(Error::Failed(format!("there is no way to run {}", all_reduce.name)));
    };
    if rest.is_empty() {
        return Ok((*first, None));
    }
    let mut best = (f64::INFINITY, *first, "");
    let mut figures = Vec::new();
    for &(name, step) in &all_reduce.ways {
        let mut times = Vec::new();
        for _ in 0..=CHOICE_TRIALS {
            times.push(backend.time(&[step], 1)?);
        }
        // The first trial warms up.
        let time = slowest(group, &times[1..])?.into_iter().fold(f64::INFINITY, f64::min);
        figures.push(format!("{name} {time:.2} µs"));
        if time < best.0 {
            best = (time, step, name);
        }
    }
    let (_, step, name) = best;
    let which = all_reduce.name;
    Ok((step, Some(format!("standard_{which} uses the {name} all-reduce ({})", figures.join(", ")))))
}

/// A lower bound of the gain from fusion. Separate operations write the all-reduced activation to memory and read it back,
/// which is a copy of it; the fused operation does not. `copy` measures that copy, in microseconds.
///
/// `None` on GPUs: dependent launch hides the memory traffic of separate operations, so the time of a copy by itself is no
/// part of theirs.
fn prediction(
    gpus: &[String],
    bytes: u64,
    copy: impl FnOnce() -> Result<f64, Error>,
    entrants: &[(Variant, Result<Trials, String>)],
) -> Result<Option<String>, Error> {
    if !gpus.is_empty() {
        return Ok(None);
    }
    let copy = copy()?;
    let rate = 2.0 * bytes as f64 / copy / 1e3;
    // A copy that takes longer than all of the separate operations was disturbed.
    Ok(Some(match (fastest(entrants, Kind::Standard), fastest(entrants, Kind::Fused)) {
        (Some(standard), Some(fused)) if copy < standard => format!(
            "fusing saves writing the activation to memory and reading it back, which takes {copy:.2} µs here \
             ({rate:.2} GB/s). Separate operations take {standard:.2} µs, so the fused one should take {:.2} µs or less. \
             It takes {fused:.2} µs",
            standard - copy
        ),
        _ => format!(
            "writing the activation to memory and reading it back takes {copy:.2} µs here ({rate:.2} GB/s)"
        ),
    }))
}

/// The median of the fastest verified variant of a kind. Variants with a sharded residual or a format of fewer bits between
/// ranks do not count: they send or write fewer bytes.
fn fastest(entrants: &[(Variant, Result<Trials, String>)], kind: Kind) -> Option<f64> {
    let of_kind = entrants
        .iter()
        .filter(|(variant, _)| variant.kind == kind && !variant.sharded && variant.wire().is_exact());
    of_kind.filter_map(|(_, trials)| trials.as_ref().ok()?.median_us()).min_by(f64::total_cmp)
}

/// Names the mode that [`Mode::Auto`] takes, and compares it with the other one if both have times.
fn automatic(algorithm: Algorithm, entrants: &[(Variant, Result<Trials, String>)]) -> Option<String> {
    let median = |mode| {
        let is_of_mode = |call: Fused| call.mode == mode && !call.sharded && call.wire.is_exact();
        let mut of_mode = entrants.iter().filter(|(variant, _)| variant.fused().is_some_and(is_of_mode));
        of_mode.next()?.1.as_ref().ok()?.median_us()
    };
    let (one_shot, two_shot) = (median(Mode::OneShot)?, median(Mode::TwoShot)?);
    let (taken, took, other, others) = match algorithm {
        Algorithm::OneShot => ("one-shot", one_shot, "two-shot", two_shot),
        // Between hosts there is no other mode.
        Algorithm::Hierarchical | Algorithm::ShardedHierarchical => return None,
        Algorithm::TwoShot | Algorithm::ShardedTwoShot => ("two-shot", two_shot, "one-shot", one_shot),
    };
    Some(format!("mode auto takes {taken} here, which is {} {other}", compared(took / others)))
}

/// Compares the bus bandwidth of the fastest fused variant with the all-to-all put bandwidth. Each rank reduces `bytes`
/// bytes.
fn share_of_links(
    put_gb_s: f64,
    bytes: u64,
    world_size: u32,
    entrants: &[(Variant, Result<Trials, String>)],
) -> Option<String> {
    let bandwidth = bytes as f64 * bus_factor(world_size) / fastest(entrants, Kind::Fused)? / 1e3;
    Some(format!(
        "the all-to-all put bandwidth is {put_gb_s:.1} GB/s: the fastest fused variant's bus bandwidth, \
         {bandwidth:.1} GB/s, is {:.0}% of it",
        bandwidth / put_gb_s * 100.0
    ))
}

/// Runs `variant` once, and chooses the number of operations of its trials.
fn first_trial(
    group: &Group,
    backend: &mut dyn Collective,
    variant: &Variant,
    saved: &Saved,
    max_error_ulp: f64,
) -> Result<Trials, Error> {
    let time = slowest(group, &[trial(backend, variant, saved, 1)?])?[0];
    Ok(Trials {
        max_error_ulp,
        sum_error: None,
        operations_per_trial: backend.operations_per_trial(time),
        times_us: Vec::new(),
    })
}

/// Times a trial of `operations` operations. Inputs that they overwrite are put back afterwards, so every trial starts with
/// the same numbers, and in place goes on with its own.
fn trial(
    backend: &mut dyn Collective,
    variant: &Variant,
    saved: &Saved,
    operations: u32,
) -> Result<f64, Error> {
    let time = backend.time(&variant.steps, operations)?;
    if variant.fused().is_some_and(|call| call.in_place) {
        saved.restore(backend)?;
    }
    Ok(time)
}

/// Says which outputs of fused variants are in place.
fn in_place(problem: &Problem) -> String {
    let sum = match problem.residual {
        true => "the sum over the residual",
        false => "the sum beside, as there is no residual",
    };
    let norm = match problem.quantization {
        Quantization::None => "the norm over the input",
        _ => "codes and scales beside, as they have sizes of their own",
    };
    format!("in place: fused variants write {sum}, and {norm}; separate operations and peers write beside")
}

/// Times the verified variants: warm-up trials, then those that count. The variants take turns, so a change of the clock
/// or of the machine's other load affects all of them alike.
fn race(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    entrants: &mut [(Variant, Result<Trials, String>)],
    saved: &Saved,
    progress: &Progress,
) -> Result<(), Error> {
    for number in 0..settings.warmup + settings.trials {
        for (variant, trials) in entrants.iter_mut() {
            let Ok(trials) = trials else { continue };
            let time = trial(backend, variant, saved, trials.operations_per_trial)?;
            if number >= settings.warmup {
                trials.times_us.push(time);
            }
        }
        progress.step();
    }
    for (_, trials) in entrants {
        if let Ok(trials) = trials {
            trials.times_us = slowest(group, &trials.times_us)?;
        }
    }
    Ok(())
}

/// Verifies again the variants that were timed, on other inputs. One that is wrong now has no times.
fn verify_timed(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    problem: &Problem,
    entrants: &mut [(Variant, Result<Trials, String>)],
    progress: &Progress,
) -> Result<(), Error> {
    progress.doing(format!("{} tokens: verified again", problem.tokens));
    // Results that are left over from the trials would be right for the inputs of the trials.
    let numbers = Numbers::random(settings.seed.wrapping_add(1));
    verify::write_inputs(backend, problem, numbers, group)?;
    for (variant, result) in entrants {
        if let Ok(trials) = result {
            let operations = trials.operations_per_trial;
            match verify::verify_timed(backend, group, problem, variant, operations, numbers)? {
                Ok((error, _)) => trials.max_error_ulp = trials.max_error_ulp.max(error),
                Err(why) => {
                    *result = Err(format!("after {} trials: {why}", settings.warmup + settings.trials))
                }
            }
        }
        progress.step();
    }
    Ok(())
}

/// Says that trials are of two kinds, as on a machine that does something else at the same time.
fn disturbed(measured: &[Measurement]) -> Option<String> {
    let kinds = |row: &Measurement| {
        let trials = row.result.as_ref().ok()?;
        Some((two_kinds(&trials.times_us)?, row.variant.clone(), trials.times_us.len()))
    };
    let of_two_kinds: Vec<_> = measured.iter().filter_map(kinds).collect();
    let times = |kinds: &TwoKinds| kinds.slow_us / kinds.others_us;
    let (worst, variant, trials) =
        of_two_kinds.iter().max_by(|(a, ..), (b, ..)| times(a).total_cmp(&times(b)))?;
    let TwoKinds { slow, slow_us, others_us } = worst;
    let others = match of_two_kinds.len() - 1 {
        0 => String::new(),
        1 => ", and 1 other variant has trials of two kinds as well".to_owned(),
        count => format!(", and {count} other variants have trials of two kinds as well"),
    };
    Some(format!(
        "DISTURBED: {slow} of {trials} trials of {variant} took {slow_us:.2} µs, and the others {others_us:.2} µs{others}. \
         Another program, or ranks that share a CPU, slowed them down: measure again without"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A variant of each kind, verified and timed: `standard` and `fused` microseconds.
    fn entrants(standard: f64, fused: f64) -> Vec<(Variant, Result<Trials, String>)> {
        let entrant = |kind, time| {
            let (steps, name) = (Vec::new(), String::new());
            let variant = Variant { name, kind, steps, sharded: false, writes_norm: false };
            (
                variant,
                Ok(Trials {
                    max_error_ulp: 0.5,
                    sum_error: None,
                    operations_per_trial: 1,
                    times_us: vec![time],
                }),
            )
        };
        vec![entrant(Kind::Standard, standard), entrant(Kind::Fused, fused)]
    }

    #[test]
    fn a_copy_of_the_input_predicts_what_fusing_is_worth() {
        let note = prediction(&[], 16_384, || Ok(2.0), &entrants(9.0, 6.5)).unwrap().unwrap();
        assert_eq!(
            note,
            "fusing saves writing the activation to memory and reading it back, which takes 2.00 µs here \
             (16.38 GB/s). Separate operations take 9.00 µs, so the fused one should take 7.00 µs or less. \
             It takes 6.50 µs"
        );
    }

    #[test]
    fn a_copy_that_takes_longer_than_the_separate_operations_predicts_nothing() {
        let note = prediction(&[], 16_384, || Ok(6.0), &entrants(3.69, 3.3)).unwrap().unwrap();
        assert_eq!(
            note,
            "writing the activation to memory and reading it back takes 6.00 µs here (5.46 GB/s)"
        );
    }

    #[test]
    fn the_mode_that_auto_takes_is_compared_with_the_other() {
        let mut entrants = entrants(11.0, 8.8);
        entrants[0].0.steps = vec![Step::fused(Mode::TwoShot)];
        entrants[1].0.steps = vec![Step::fused(Mode::OneShot)];
        let note = |algorithm| automatic(algorithm, &entrants).unwrap();
        assert_eq!(
            note(Algorithm::OneShot),
            "mode auto takes one-shot here, which is 20.0% faster than two-shot"
        );
        assert_eq!(
            note(Algorithm::TwoShot),
            "mode auto takes two-shot here, which is 25.0% slower than one-shot"
        );
        assert_eq!(automatic(Algorithm::OneShot, &entrants[1..]), None);
        if let Ok(trials) = &mut entrants[1].1 {
            trials.times_us = vec![374.0];
        }
        let note = automatic(Algorithm::OneShot, &entrants).unwrap();
        assert_eq!(note, "mode auto takes one-shot here, which is 34 times as slow as two-shot");
    }

    #[test]
    fn trials_of_two_kinds_are_noted_with_the_variant_where_they_differ_most() {
        let row = |name: &str, times: &[f64]| Measurement {
            variant: name.to_owned(),
            kind: Kind::Fused,
            result: Ok(Trials {
                max_error_ulp: 0.5,
                sum_error: None,
                operations_per_trial: 1,
                times_us: times.to_vec(),
            }),
        };
        let (even, two) = (row("even", &[3.0, 3.1, 3.0, 3.2]), row("two", &[3.0, 60.0, 4.0, 50.0]));
        let (more, wrong) = (
            row("more", &[1.0, 1.0, 2.0, 2.0]),
            Measurement { result: Err("wrong".to_owned()), ..row("wrong", &[]) },
        );
        assert_eq!(disturbed(&[even.clone(), wrong]), None);
        assert_eq!(
            disturbed(&[even, more, two]).unwrap(),
            "DISTURBED: 2 of 4 trials of two took 55.00 µs, and the others 3.50 µs, and 1 other variant has trials of two \
             kinds as well. Another program, or ranks that share a CPU, slowed them down: measure again without"
        );
    }

    #[test]
    fn nothing_is_predicted_from_a_copy_on_gpus() {
        let gpus = ["NVIDIA H200".to_owned()];
        let copy = || panic!("a copy is measured");
        assert_eq!(prediction(&gpus, 16_384, copy, &entrants(9.0, 3.3)).unwrap(), None);
    }

    #[test]
    fn a_time_is_the_slowest_rank_s_and_keeps_its_fractions() {
        let key = format!("bench test {}", std::process::id());
        let times = [[1.25, 9.5, 3.0], [2.0625, 9.25, 3.0]];
        let rank = &|rank: u32| {
            let deadline = std::time::Duration::from_secs(60);
            let membership = fused_collective::group::rendezvous::Membership {
                rank,
                world_size: 2,
                key: &key,
                config: b"",
                deadline,
            };
            let group = Group::join(&membership).unwrap();
            let slowest = slowest(&group, &times[rank as usize]).unwrap();
            group.farewell().unwrap();
            slowest
        };
        std::thread::scope(|scope| {
            let ranks = [0, 1].map(|index| scope.spawn(move || rank(index)));
            for slowest in ranks.map(|rank| rank.join().unwrap()) {
                assert_eq!(slowest, [2.0625, 9.5, 3.0]);
            }
        });
    }
}
