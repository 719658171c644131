//! The answer of a benchmark: the fastest separate and the fastest fused variant of each configuration, and sentences to act
//! on.
//!
//! Medians that differ by less than 3%, or whose middle halves of trials overlap, are taken for equal. Fused variants
//! are this project's with a replicated residual and exact sums, if nothing else is said: peers, the sharded residual and
//! formats of fewer bits between ranks have sentences of their own.

use std::fmt;

use fused_collective_core::dtype::DType;

use super::data::{Conclusion, Configuration, Fastest, Gain, Report, Row, RowOutcome};
use crate::{
    measurement::{Kind, percentile},
    peers::choice::PeerChoice,
    quant_mode::QuantMode,
    wire::Wire,
};

/// The ratio of two medians up to which they are equal: figures of one machine repeat within 3%.
const EQUAL: f64 = 1.03;
/// The [spread](Fastest::spread) from which on a measurement is noisy.
const NOISY: f64 = 0.1;
/// The most configurations that a sentence lists.
const MOST_LISTED: usize = 4;

impl Report {
    /// Derives the conclusion from the configurations.
    pub(super) fn conclude(&mut self) {
        self.conclusion = conclusion(self);
    }
}

/// The conclusion from the configurations of `report`.
fn conclusion(report: &Report) -> Conclusion {
    let mut configurations: Vec<&Configuration> = report.configurations.iter().collect();
    configurations.sort_by_key(|configuration| {
        let Configuration { dtype, quant_mode, num_tokens, .. } = configuration;
        let place = DType::ALL.iter().position(|known| known == dtype);
        (place, *quant_mode as u8, *num_tokens)
    });
    let has_dtypes = configurations.chunk_by(|a, b| a.dtype == b.dtype).count() > 1;
    let cases: Vec<Times<'_>> =
        configurations.into_iter().map(|configuration| Times { configuration, has_dtypes }).collect();
    let mut sentences = Vec::new();
    if report.settings.job.oversubscribe {
        sentences.push("Ranks may have shared a GPU, which makes times meaningless.".to_owned());
    }
    let parts = [gain, modes, quantization, peers, sharded, wires, coded_peers, noise];
    sentences.extend(parts.into_iter().flat_map(|part| part(&cases)));
    let failures = report.failures().count();
    if failures > 0 {
        let rows: usize = report.configurations.iter().map(|case| case.rows.len()).sum();
        sentences.push(format!("Not counted: {failures} of {rows} variants, which FAILED."));
    }
    Conclusion { sentences, gains: cases.iter().map(Times::gain).collect() }
}

impl Conclusion {
    /// The lines of the conclusion, as the table and Markdown show them: `fp8`, or `float16 fp8` if there are several
    /// element types; tokens; the two variants by `name`; their times; and the gain.
    pub(super) fn cells(&self, name: impl Fn(&str) -> String) -> impl Iterator<Item = [String; 7]> {
        let has_dtypes = self.gains.chunk_by(|a, b| a.dtype == b.dtype).count() > 1;
        self.gains.iter().map(move |gain| {
            let none = || "-".to_owned();
            let sides = [&gain.separate, &gain.fused];
            let [separate, fused] =
                sides.map(|side| side.as_ref().map_or_else(none, |one| name(&one.variant)));
            let [separate_us, fused_us] =
                sides.map(|side| side.as_ref().map_or_else(none, |one| format!("{:.2}", one.median_us)));
            let factor = gain.gain.map_or_else(none, |gain| format!("{gain:.2}x"));
            let mode = mode(gain.dtype, gain.quant_mode, has_dtypes);
            [mode, gain.num_tokens.to_string(), separate, fused, separate_us, fused_us, factor]
        })
    }
}

/// One configuration, as sentences need it.
struct Times<'a> {
    configuration: &'a Configuration,
    /// True if the report has several element types.
    has_dtypes: bool,
}

/// The times of one row.
#[derive(Clone, Copy)]
struct Time<'a> {
    row: &'a Row,
    median: f64,
    /// The middle half of the trials.
    quarters: [f64; 2],
}

impl<'a> Time<'a> {
    fn of(row: &'a Row) -> Option<Time<'a>> {
        let RowOutcome::Verified { figures, times_us, .. } = &row.outcome else { return None };
        let mut sorted = times_us.clone();
        sorted.sort_by(f64::total_cmp);
        let median = figures.median_us;
        let quarters = [25, 75].map(|percent| percentile(&sorted, percent).unwrap_or(median));
        Some(Time { row, median, quarters })
    }

    /// True if it is faster than `other` by more than what is taken for equal.
    fn beats(&self, other: &Time<'_>) -> bool {
        self.median * EQUAL < other.median && self.quarters[1] < other.quarters[0]
    }

    fn fastest(&self) -> Fastest {
        Fastest {
            variant: self.row.variant.clone(),
            median_us: self.median,
            spread: (self.quarters[1] - self.quarters[0]) / self.median,
        }
    }
}

impl<'a> Times<'a> {
    /// The fastest verified row that is `wanted`.
    fn fastest(&self, wanted: impl Fn(&Row) -> bool) -> Option<Time<'a>> {
        let rows = self.configuration.rows.iter().filter(|row| wanted(row));
        rows.filter_map(Time::of).min_by(|a, b| a.median.total_cmp(&b.median))
    }

    fn separate(&self) -> Option<Time<'a>> {
        self.fastest(|row| row.kind == Kind::Standard && row.is_exact())
    }

    fn fused(&self) -> Option<Time<'a>> {
        self.fused_as(Wire::Exact)
    }

    fn fused_as(&self, wire: Wire) -> Option<Time<'a>> {
        self.fastest(|row| row.is_ours_fused() && !row.is_sharded() && row.wire() == wire)
    }

    /// A peer's fastest row whose sum is not exact.
    fn coded_by(&self, peer: PeerChoice) -> Option<Time<'a>> {
        self.fastest(|row| row.peer() == Some(peer) && !row.is_exact())
    }

    /// True if separate operations are faster.
    fn loses(&self) -> bool {
        self.separate().zip(self.fused()).is_some_and(|(separate, fused)| separate.beats(&fused))
    }

    fn gain(&self) -> Gain {
        let Configuration { dtype, quant_mode, num_tokens, .. } = *self.configuration;
        let (separate, fused) = (self.separate(), self.fused());
        let gain = separate.zip(fused).map(|(separate, fused)| separate.median / fused.median);
        let [separate, fused] = [separate, fused].map(|time| time.map(|time| time.fastest()));
        Gain { dtype, quant_mode, num_tokens, separate, fused, gain }
    }

    fn mode(&self) -> String {
        mode(self.configuration.dtype, self.configuration.quant_mode, self.has_dtypes)
    }
}

fn mode(dtype: DType, quant_mode: QuantMode, with_dtype: bool) -> String {
    if with_dtype { format!("{dtype} {quant_mode}") } else { quant_mode.to_string() }
}

impl fmt::Display for Times<'_> {
    /// `1 token (fp8)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", tokens(self.configuration.num_tokens), self.mode())
    }
}

/// `1 token`, `128 tokens`.
fn tokens(number: u64) -> String {
    format!("{number} token{}", if number == 1 { "" } else { "s" })
}

/// The worth of fusing.
fn gain(cases: &[Times<'_>]) -> Vec<String> {
    let gains: Vec<(&Times<'_>, f64)> =
        cases.iter().filter_map(|case| Some((case, case.gain().gain?))).collect();
    let Some(range) = Range::of(gains.iter().map(|(_, gain)| *gain)) else {
        return vec![
            "No configuration has both a separate and a fused variant that were verified.".to_owned(),
        ];
    };
    let mut sentence = format!("Fusing is {range} times as fast as the fastest separate operations.");
    let lost: Vec<&Times<'_>> = gains.iter().map(|(case, _)| *case).filter(|case| case.loses()).collect();
    if lost.len() == gains.len() {
        sentence += " It does not pay here.";
    } else if !lost.is_empty() {
        sentence += &format!(" It does not pay at {}.", listed(&lost));
    }
    vec![sentence]
}

/// The faster mode at each token count. Quantization modes with the same answer share a sentence.
fn modes(cases: &[Times<'_>]) -> Vec<String> {
    let mut answers: Vec<(String, Vec<String>)> = Vec::new();
    for series in cases.chunk_by(|a, b| a.mode() == b.mode()) {
        let Some(answer) = mode_by_tokens(series) else { continue };
        match answers.iter_mut().find(|(known, _)| *known == answer) {
            Some((_, modes)) => modes.push(series[0].mode()),
            None => answers.push((answer, vec![series[0].mode()])),
        }
    }
    if let [(answer, _)] = &answers[..] {
        return vec![format!("{}{}.", answer[..1].to_uppercase(), &answer[1..])];
    }
    answers.into_iter().map(|(answer, modes)| format!("With {}, {answer}.", modes.join(" and "))).collect()
}

/// The mode to use at each token count of one series; `None` unless both modes were measured.
fn mode_by_tokens(series: &[Times<'_>]) -> Option<String> {
    // Ascending token counts, each with the mode that is faster by more than what is taken for equal.
    let mut winners: Vec<(u64, Option<&str>)> = Vec::new();
    for case in series {
        let of_mode = |suffix: &'static str| {
            let is_it = |row: &Row| row.is_exact() && row.variant.ends_with(suffix);
            case.fastest(|row| row.is_ours_fused() && is_it(row))
        };
        let (Some(one_shot), Some(two_shot)) = (of_mode("_oneshot"), of_mode("_twoshot")) else { continue };
        let winner = match (one_shot.beats(&two_shot), two_shot.beats(&one_shot)) {
            (true, _) => Some("one-shot"),
            (_, true) => Some("two-shot"),
            _ => None,
        };
        winners.push((case.configuration.num_tokens, winner));
    }
    let (first, last) = (winners.first()?.0, winners.last()?.0);
    let all = if first == last {
        format!("at {}", tokens(first))
    } else {
        format!("from {first} to {}", tokens(last))
    };
    let won_by = |mode| {
        let won: Vec<String> =
            winners.iter().filter(|(_, winner)| *winner == Some(mode)).map(|(n, _)| n.to_string()).collect();
        won.join(", ")
    };
    // One-shot up to here, two-shot from here on.
    let split = winners.iter().position(|(_, winner)| *winner == Some("two-shot")).unwrap_or(winners.len());
    let returns = winners[split..].iter().any(|(_, winner)| *winner == Some("one-shot"));
    Some(match split {
        _ if winners.iter().all(|(_, winner)| winner.is_none()) => {
            format!("one-shot and two-shot take the same time {all}")
        }
        _ if returns => format!(
            "one-shot is the faster mode at {} tokens, two-shot at {}",
            won_by("one-shot"),
            won_by("two-shot")
        ),
        0 => format!("use two-shot {all}"),
        split if split == winners.len() => format!("use one-shot {all}"),
        split => format!(
            "use one-shot up to {}, two-shot from {} on",
            tokens(winners[split - 1].0),
            winners[split].0
        ),
    })
}

/// The cost of quantizing in the fused kernel.
fn quantization(cases: &[Times<'_>]) -> Vec<String> {
    let fused = |dtype, quant_mode, num_tokens| {
        let is_it = |case: &&Times<'_>| {
            let Configuration { dtype: d, quant_mode: q, num_tokens: n, .. } = case.configuration;
            (*d, *q, *n) == (dtype, quant_mode, num_tokens)
        };
        Some(cases.iter().find(is_it)?.fused()?.median)
    };
    let sentence = |quant_mode: QuantMode| {
        let ratios = cases.iter().filter_map(|case| {
            let Configuration { dtype, quant_mode: own, num_tokens, .. } = *case.configuration;
            let none = (own == quant_mode).then(|| fused(dtype, QuantMode::None, num_tokens))??;
            Some(case.fused()?.median / none)
        });
        let range = Range::of(ratios)?;
        let name = quant_mode.name().to_uppercase();
        Some(if range.most <= EQUAL {
            format!("{name} in the fused kernel costs nothing: {range} times the time without quantization.")
        } else {
            format!("{name} in the fused kernel takes {range} times the time without quantization.")
        })
    };
    QuantMode::ALL.into_iter().filter(|mode| *mode != QuantMode::None).filter_map(sentence).collect()
}

/// Each peer's fastest variant against the fastest fused one.
fn peers(cases: &[Times<'_>]) -> Vec<String> {
    let sentence = |peer: PeerChoice| {
        let ratio = |case: &Times<'_>| {
            let of_peer = case.fastest(|row| row.peer() == Some(peer) && row.is_exact())?;
            Some(of_peer.median / case.fused()?.median)
        };
        let range = Range::of(cases.iter().filter_map(ratio))?;
        Some(format!("{peer} takes {range} times as long as the fastest fused variant, each at its fastest."))
    };
    PeerChoice::ALL.into_iter().filter_map(sentence).collect()
}

/// The best case of a sharded residual.
fn sharded(cases: &[Times<'_>]) -> Vec<String> {
    let saving = |case| {
        let times: &Times<'_> = case;
        let sharded = times.fastest(|row| row.is_ours_fused() && row.is_sharded() && row.is_exact())?;
        let fused = times.fused()?;
        Some((times, if sharded.beats(&fused) { 1.0 - sharded.median / fused.median } else { 0.0 }))
    };
    let best = cases.iter().filter_map(saving).max_by(|a, b| a.1.total_cmp(&b.1));
    let sentence = |(case, saving): (&Times<'_>, f64)| match saving {
        0.0 => "A sharded residual saves no time here.".to_owned(),
        _ => format!("A sharded residual saves up to {:.0}% more, at {case}.", saving * 100.0),
    };
    best.map(sentence).into_iter().collect()
}

/// Formats of fewer bits between ranks, whose sums are others.
fn wires(cases: &[Times<'_>]) -> Vec<String> {
    let sentence = |wire: Wire| {
        let fastest: Vec<_> = cases.iter().filter_map(|case| Some((case, case.fused_as(wire)?))).collect();
        let misses = misses(fastest.iter().map(|(_, time)| *time))?;
        let gains = fastest.iter().filter_map(|(case, time)| Some(case.fused()?.median / time.median));
        let gain = Range::of(gains).map(|range| format!(" It is {range} times as fast as with exact sums."));
        let in_vain =
            fastest.iter().filter(|(case, time)| case.fused().is_some_and(|exact| !time.beats(&exact)));
        let in_vain: Vec<&Times<'_>> = in_vain.map(|(case, _)| *case).collect();
        let in_vain = match in_vain.len() {
            0 => String::new(),
            count if count == fastest.len() => " Exact sums take no longer.".to_owned(),
            _ => format!(" Exact sums take no longer at {}.", listed(&in_vain)),
        };
        let gain = gain.unwrap_or_default();
        Some(format!("Not the same result: with {wire} between ranks a fused sum {misses}.{gain}{in_vain}"))
    };
    Wire::ALL.into_iter().filter(|wire| !wire.is_exact()).filter_map(sentence).collect()
}

/// Peers' sums in fewer bits, beside this project's.
fn coded_peers(cases: &[Times<'_>]) -> Vec<String> {
    let sentence = |peer: PeerChoice| {
        let misses = misses(cases.iter().filter_map(|case| case.coded_by(peer)))?;
        let beside = Wire::ALL.into_iter().filter(|wire| !wire.is_exact()).filter_map(|wire| {
            let ratio = |case: &Times<'_>| Some(case.coded_by(peer)?.median / case.fused_as(wire)?.median);
            Some(format!(
                "{} times as long as {wire} between ranks",
                Range::of(cases.iter().filter_map(ratio))?
            ))
        });
        let beside: Vec<String> = beside.collect();
        let beside = match beside.is_empty() {
            true => String::new(),
            false => format!(" {peer}'s fastest such row takes {}.", beside.join(" and ")),
        };
        Some(format!("Not the same result: {peer}'s sum in fewer bits {misses}.{beside}"))
    };
    PeerChoice::ALL.into_iter().filter_map(sentence).collect()
}

/// The largest error of sums that are not exact, in words.
fn misses<'a>(times: impl Iterator<Item = Time<'a>>) -> Option<String> {
    let errors = times.filter_map(|time| match &time.row.outcome {
        RowOutcome::Verified { sum_error, .. } => *sum_error,
        RowOutcome::Failed { .. } => None,
    });
    let error = errors.max_by(|a, b| a.rms.total_cmp(&b.rms))?;
    let [rms, largest] = [error.rms, error.largest].map(|error| error * 100.0);
    Some(format!("misses by {rms:.2}% of its row, root mean square, and an element by up to {largest:.1}%"))
}

/// Warns of measurements that may not repeat.
fn noise(cases: &[Times<'_>]) -> Vec<String> {
    let is_noisy = |case: &&Times<'_>| {
        let deciding = [case.separate(), case.fused()].into_iter().flatten();
        deciding.map(|time| time.fastest().spread).any(|spread| spread > NOISY)
    };
    let noisy: Vec<&Times<'_>> = cases.iter().filter(is_noisy).collect();
    if noisy.is_empty() {
        return Vec::new();
    }
    vec![format!(
        "Noisy: trials of the fastest variants differ by more than {:.0}% at {}. Measure again, with more trials or on a \
         quieter machine.",
        NOISY * 100.0,
        listed(&noisy)
    )]
}

/// `1 token (fp8), 2 tokens (none)`, or a number of configurations if they are many.
fn listed(cases: &[&Times<'_>]) -> String {
    if cases.len() > MOST_LISTED {
        return format!("{} configurations", cases.len());
    }
    cases.iter().map(|case| case.to_string()).collect::<Vec<_>>().join(", ")
}

/// The least and the most of some ratios.
struct Range {
    least: f64,
    most: f64,
}

impl Range {
    fn of(ratios: impl Iterator<Item = f64>) -> Option<Range> {
        ratios.fold(None, |range, ratio| {
            let Range { least, most } = range.unwrap_or(Range { least: ratio, most: ratio });
            Some(Range { least: least.min(ratio), most: most.max(ratio) })
        })
    }
}

impl fmt::Display for Range {
    /// `1.24 to 3.62`, or one number if they do not differ.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [least, most] =
            [self.least, self.most].map(|x| if x < 10.0 { format!("{x:.2}") } else { format!("{x:.0}") });
        if least == most { f.write_str(&least) } else { write!(f, "{least} to {most}") }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::fixture::{self, case, measurement, trials},
        *,
    };
    use crate::measurement::{SumError, Trials};

    const SEPARATE: &str = "standard_allreduce_rmsnorm_native_compiled";
    const ONE_SHOT: &str = "fused_allreduce_rmsnorm_oneshot";
    const TWO_SHOT: &str = "fused_allreduce_rmsnorm_twoshot";

    /// A configuration, with the times of some variants.
    type Case<'a> = (QuantMode, u64, &'a [(&'a str, f64)]);

    /// The sentences for these configurations.
    fn sentences(cases: &[Case<'_>]) -> Vec<String> {
        let mut report = fixture::empty(&[1], &[QuantMode::None]);
        for (mode, tokens, rows) in cases {
            let rows = rows.iter().map(|(variant, time)| measurement(variant, trials(&[*time; 5])));
            report.push(case(*tokens, *mode), Vec::new(), rows.collect());
        }
        report.conclusion.sentences
    }

    /// The sentence on modes for the times of one-shot and two-shot at ascending token counts.
    fn mode(times: &[(u64, f64, f64)]) -> String {
        let rows: Vec<_> =
            times.iter().map(|&(tokens, one, two)| (tokens, [(ONE_SHOT, one), (TWO_SHOT, two)])).collect();
        let cases: Vec<_> = rows.iter().map(|(tokens, rows)| (QuantMode::None, *tokens, &rows[..])).collect();
        sentences(&cases).remove(1)
    }

    #[test]
    fn the_mode_to_use_is_told_by_token_counts() {
        assert_eq!(mode(&[(1, 2.0, 3.0)]), "Use one-shot at 1 token.");
        assert_eq!(mode(&[(1, 2.0, 3.0), (64, 5.0, 5.1)]), "Use one-shot from 1 to 64 tokens.");
        assert_eq!(mode(&[(8, 4.0, 3.0), (64, 5.0, 5.0)]), "Use two-shot from 8 to 64 tokens.");
        assert_eq!(
            mode(&[(1, 2.0, 3.0), (16, 4.0, 4.0), (64, 9.0, 8.0), (128, 20.0, 15.0)]),
            "Use one-shot up to 16 tokens, two-shot from 64 on."
        );
        assert_eq!(
            mode(&[(1, 2.0, 2.0), (16, 4.0, 4.1)]),
            "One-shot and two-shot take the same time from 1 to 16 tokens."
        );
        assert_eq!(
            mode(&[(1, 2.0, 1.0), (16, 4.0, 5.0), (32, 6.0, 7.0), (64, 9.0, 8.0)]),
            "One-shot is the faster mode at 16, 32 tokens, two-shot at 1, 64."
        );
    }

    #[test]
    fn quantization_modes_with_the_same_answer_share_a_sentence() {
        let one: &[_] = &[(ONE_SHOT, 1.0), (TWO_SHOT, 2.0)];
        let two: &[_] = &[(ONE_SHOT, 2.0), (TWO_SHOT, 1.0)];
        let cases = [(QuantMode::None, 1, one), (QuantMode::Fp8, 1, one), (QuantMode::Fp4, 1, two)];
        let found = sentences(&cases);
        assert_eq!(
            found[1..3],
            ["With none and fp8, use one-shot at 1 token.", "With fp4, use two-shot at 1 token."]
        );
        let found = sentences(&cases[..2]);
        assert_eq!(found[1], "Use one-shot at 1 token.");
    }

    #[test]
    fn the_gain_is_a_range_and_where_fusing_does_not_pay_is_said() {
        let gain = |times: &[(u64, f64, f64)]| {
            let rows: Vec<_> = times
                .iter()
                .map(|&(tokens, separate, fused)| (tokens, [(SEPARATE, separate), (ONE_SHOT, fused)]))
                .collect();
            let cases: Vec<_> =
                rows.iter().map(|(tokens, rows)| (QuantMode::None, *tokens, &rows[..])).collect();
            sentences(&cases).remove(0)
        };
        let fusing = |rest: &str| format!("Fusing is {rest}");
        assert_eq!(
            gain(&[(1, 9.0, 2.25), (128, 15.0, 10.0)]),
            fusing("1.50 to 4.00 times as fast as the fastest separate operations.")
        );
        assert_eq!(
            gain(&[(1, 9.0, 2.25), (128, 9.0, 10.0)]),
            fusing(
                "0.90 to 4.00 times as fast as the fastest separate operations. It does not pay at 128 tokens (none)."
            )
        );
        assert_eq!(
            gain(&[(1, 5.0, 10.0)]),
            fusing("0.50 times as fast as the fastest separate operations. It does not pay here.")
        );
        assert_eq!(
            sentences(&[(QuantMode::None, 1, &[(ONE_SHOT, 1.0)])]),
            ["No configuration has both a separate and a fused variant that were verified."]
        );
    }

    #[test]
    fn quantization_peers_and_a_sharded_residual_have_their_sentences() {
        let none: &[_] = &[(SEPARATE, 20.0), (ONE_SHOT, 10.0), ("flashinfer_fused_oneshot", 15.0)];
        let fp8: &[_] = &[
            (ONE_SHOT, 10.1),
            ("fused_allreduce_rmsnorm_fp8_quant_twoshot_sharded", 7.575),
            ("flashinfer_fused_oneshot", 30.3),
            ("flashinfer_fused_twoshot", 20.2),
        ];
        let fp4: &[_] = &[(ONE_SHOT, 12.0)];
        let cases = [(QuantMode::None, 1, none), (QuantMode::Fp8, 1, fp8), (QuantMode::Fp4, 1, fp4)];
        let expected = [
            "Fusing is 2.00 times as fast as the fastest separate operations.",
            "FP8 in the fused kernel costs nothing: 1.01 times the time without quantization.",
            "FP4 in the fused kernel takes 1.20 times the time without quantization.",
            "flashinfer takes 1.50 to 2.00 times as long as the fastest fused variant, each at its fastest.",
            "A sharded residual saves up to 25% more, at 1 token (fp8).",
        ];
        assert_eq!(sentences(&cases), expected);
    }

    #[test]
    fn sums_that_are_not_exact_have_a_sentence_and_count_for_nothing_else() {
        let wire = |rms, largest, time: f64| {
            let trials = trials(&[time; 5]).unwrap();
            Ok(Trials { sum_error: Some(SumError { rms, largest }), ..trials })
        };
        let mut report = fixture::empty(&[1, 2], &[QuantMode::None]);
        let rows = vec![
            measurement(SEPARATE, trials(&[20.0; 5])),
            measurement(ONE_SHOT, trials(&[10.0; 5])),
            measurement("fused_allreduce_rmsnorm_int8_wire_oneshot", wire(0.0055, 0.027, 5.0)),
            // Faster than any exact sum.
            measurement(
                "flashinfer_standard_quantized_allreduce_rmsnorm_native_compiled",
                wire(0.032, 0.3, 9.0),
            ),
            measurement("fused_allreduce_rmsnorm_int8_wire_twoshot", wire(0.0078, 0.04, 6.0)),
            measurement("fused_allreduce_rmsnorm_int4_wire_twoshot", wire(0.12, 0.5, 2.5)),
            measurement("fused_allreduce_rmsnorm_int4_wire_twoshot_sharded", wire(0.086, 0.34, 2.0)),
        ];
        report.push(case(1, QuantMode::None), Vec::new(), rows);
        let rows = vec![
            measurement(SEPARATE, trials(&[20.0; 5])),
            measurement(ONE_SHOT, trials(&[10.0; 5])),
            measurement("fused_allreduce_rmsnorm_int8_wire_oneshot", wire(0.0055, 0.027, 9.9)),
        ];
        report.push(case(2, QuantMode::None), Vec::new(), rows);
        let expected = [
            "Fusing is 2.00 times as fast as the fastest separate operations.",
            "Not the same result: with int8 between ranks a fused sum misses by 0.55% of its row, root mean square, and an \
             element by up to 2.7%. It is 1.01 to 2.00 times as fast as with exact sums. Exact sums take no longer at 2 tokens (none).",
            "Not the same result: with int4 between ranks a fused sum misses by 12.00% of its row, root mean square, and an \
             element by up to 50.0%. It is 4.00 times as fast as with exact sums.",
            "Not the same result: flashinfer's sum in fewer bits misses by 3.20% of its row, root mean square, and an element by up \
             to 30.0%. flashinfer's fastest such row takes 1.80 times as long as int8 between ranks and 3.60 times as long as int4 \
             between ranks.",
        ];
        assert_eq!(report.conclusion.sentences, expected);
    }

    #[test]
    fn noise_and_shared_gpus_are_told() {
        let mut report = fixture::empty(&[1], &[QuantMode::None]);
        report.settings.job.oversubscribe = true;
        let rows = vec![
            measurement(SEPARATE, trials(&[1.0, 2.0, 3.0, 4.0, 5.0])),
            measurement(ONE_SHOT, trials(&[1.0; 5])),
            measurement(TWO_SHOT, trials(&[0.5, 0.9, 1.1, 1.6, 2.0])),
        ];
        report.push(case(1, QuantMode::None), Vec::new(), rows);
        let expected = [
            "Ranks may have shared a GPU, which makes times meaningless.",
            "Fusing is 3.00 times as fast as the fastest separate operations.",
            // Not faster by more than its own trials differ.
            "One-shot and two-shot take the same time at 1 token.",
            "Noisy: trials of the fastest variants differ by more than 10% at 1 token (none). Measure again, with more trials \
             or on a quieter machine.",
        ];
        assert_eq!(report.conclusion.sentences, expected);
        let gain = &report.conclusion.gains[0];
        assert_eq!(gain.separate.as_ref().unwrap().spread, 2.0 / 3.0);
    }
}
