//! The comparison of an earlier report with this one: the rows that got slower, and those that lost too much.
//!
//! Machines may differ, and the comparison says in what. Backend, ranks, hidden size and residual must be the same. Rows are matched by tokens, element type, quantization mode
//! and variant. All of this is known before the run, so [`check`] refuses a useless run. A row without a counterpart is
//! listed and is no failure: variants come and go.

use std::fmt::Write;

use super::data::{Configuration, Report};
use crate::{
    commands::bench::settings::Settings, measurement::compared, report::grid::grid, usage::UsageError,
};

/// Rows of two reports, matched.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The rows that both reports have, in this run's order.
    pub rows: Vec<Compared>,
    /// A line for each row or configuration that only one report has.
    pub unmatched: Vec<String>,
    /// The facts in which the machines differ.
    pub machine: Vec<String>,
    /// Slowdown in percent past which a row has lost too much.
    pub tolerance_percent: f64,
}

/// One row in both reports.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// The configuration's title.
    pub configuration: String,
    /// The variant's name.
    pub variant: String,
    /// The earlier median in microseconds.
    pub earlier_us: f64,
    /// This run's median in microseconds.
    pub current_us: f64,
}

impl Compared {
    /// This run's time over the earlier one. Above 1 is slower.
    pub fn ratio(&self) -> f64 {
        self.current_us / self.earlier_us
    }
}

/// Checks that a run of `settings` on `backend` with `world_size` ranks is comparable with `earlier`.
pub fn check(
    earlier: &Report,
    settings: &Settings,
    backend: &str,
    world_size: u32,
) -> Result<(), UsageError> {
    let residual = |with| if with { "with residual" } else { "no residual" };
    let place = |in_place| if in_place { "outputs in place" } else { "outputs beside inputs" };
    let caches = |cold| if cold { "cold caches" } else { "warm caches" };
    let gpus = |shared| if shared { "ranks that may share a GPU" } else { "a GPU for each rank" };
    let facts = [
        (format!("backend {}", earlier.backend), format!("backend {backend}")),
        (format!("{} ranks", earlier.world_size), format!("{world_size} ranks")),
        (
            format!("hidden size {}", earlier.settings.hidden_dim),
            format!("hidden size {}", settings.hidden_dim),
        ),
        (format!("pattern {}", earlier.settings.pattern), format!("pattern {}", settings.pattern)),
        (residual(earlier.settings.use_residual).to_owned(), residual(settings.use_residual).to_owned()),
        (place(earlier.settings.in_place).to_owned(), place(settings.in_place).to_owned()),
        (caches(earlier.settings.cold).to_owned(), caches(settings.cold).to_owned()),
        (gpus(earlier.settings.job.oversubscribe).to_owned(), gpus(settings.job.oversubscribe).to_owned()),
    ];
    for (then, now) in facts {
        if then != now {
            return Err(UsageError::new(format_args!(
                "--compare: the earlier report is of another configuration ({then}; this run: {now}): use one measured the same way"
            )));
        }
    }
    if !settings.cases().any(|case| earlier.configurations.iter().any(|known| known.case() == case)) {
        return Err(UsageError::new(
            "--compare: the earlier report has none of this run's tokens, dtypes and quantization modes: use one measured the same way",
        ));
    }
    Ok(())
}

/// Compares `current` with `earlier`, which [`check`] has passed.
pub fn compare(earlier: &Report, current: &Report, tolerance_percent: f64) -> Comparison {
    let machine = current.machine.differences(&earlier.machine);
    let mut comparison = Comparison { rows: Vec::new(), unmatched: Vec::new(), machine, tolerance_percent };
    for configuration in &current.configurations {
        match earlier.configurations.iter().find(|earlier| earlier.case() == configuration.case()) {
            Some(earlier) => comparison.add(earlier, configuration),
            None => {
                comparison.unmatched.push(format!("{}: not in the earlier report", configuration.title()))
            }
        }
    }
    comparison
}

impl Comparison {
    fn add(&mut self, earlier: &Configuration, current: &Configuration) {
        let title = current.title();
        let mut unmatched = |variant: &str, why| self.unmatched.push(format!("{variant} ({title}): {why}"));
        for row in &current.rows {
            let variant = row.variant.as_str();
            let Some(before) = earlier.rows.iter().find(|before| before.variant == variant) else {
                unmatched(variant, "not in the earlier report");
                continue;
            };
            match (before.figures(), row.figures()) {
                (Some(before), Some(now)) => self.rows.push(Compared {
                    configuration: title.clone(),
                    variant: row.variant.clone(),
                    earlier_us: before.median_us,
                    current_us: now.median_us,
                }),
                (None, _) => unmatched(variant, "failed in the earlier report"),
                (Some(_), None) => unmatched(variant, "failed in this run"),
            }
        }
        for row in &earlier.rows {
            if !current.rows.iter().any(|now| now.variant == row.variant) {
                unmatched(&row.variant, "only in the earlier report");
            }
        }
    }

    /// The rows that lost more than the tolerance.
    pub fn regressions(&self) -> impl Iterator<Item = &Compared> {
        let most = 1.0 + self.tolerance_percent / 100.0;
        self.rows.iter().filter(move |row| row.ratio() > most)
    }

    /// The text for a terminal: a table per configuration, at most `width` columns wide, then the rows without a
    /// counterpart, the rows that got slower, and the verdict.
    pub fn render(&self, width: u16) -> String {
        let mut out = String::from("Compared with the earlier report; a ratio above 1 is slower\n");
        if !self.machine.is_empty() {
            let _ =
                writeln!(out, "note: the earlier report is of another machine: {}", self.machine.join("; "));
        }
        for rows in self.rows.chunk_by(|a, b| a.configuration == b.configuration) {
            let cells = rows.iter().map(|row| {
                let Compared { earlier_us, current_us, .. } = row;
                let (earlier, current) = (format!("{earlier_us:.2}"), format!("{current_us:.2}"));
                vec![row.variant.clone(), earlier, current, format!("{:.3}", row.ratio())]
            });
            let grid = grid(&["Operation", "earlier µs", "now µs", "ratio"], cells.collect(), width);
            let _ = writeln!(out, "\n{}\n{grid}", rows[0].configuration);
        }
        out.push('\n');
        for line in &self.unmatched {
            let _ = writeln!(out, "not compared: {line}");
        }
        let mut lost = 0;
        for row in self.regressions() {
            lost += 1;
            let how = compared(row.ratio());
            let _ = writeln!(out, "SLOWER: {} ({}) is {how} before", row.variant, row.configuration);
        }
        let (rows, tolerance) = (self.rows.len(), self.tolerance_percent);
        let _ = writeln!(out, "{lost} of {rows} rows lost more than {tolerance}%");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::fixture::{self, case, measurement, trials},
        *,
    };
    use crate::{pattern::Pattern, quant_mode::QuantMode, report::grid::WIDTH};

    const STANDARD: &str = "standard_allreduce_native_rms_norm";
    const FUSED: &str = "fused_allreduce_rmsnorm_oneshot";

    fn report(rows: &[(&str, Option<f64>)]) -> Report {
        let mut report = fixture::empty(&[128], &[QuantMode::None]);
        let row = |&(variant, time): &(&str, Option<f64>)| {
            measurement(variant, time.map_or(Err("broken".to_owned()), |time| trials(&[time])))
        };
        report.push(case(128, QuantMode::None), Vec::new(), rows.iter().map(row).collect());
        report
    }

    #[test]
    fn a_row_loses_when_it_is_slower_by_more_than_the_tolerance() {
        let earlier = report(&[(STANDARD, Some(100.0)), (FUSED, Some(50.0))]);
        let current = report(&[(STANDARD, Some(110.0)), (FUSED, Some(40.0))]);
        let lost = |tolerance| {
            let comparison = compare(&earlier, &current, tolerance);
            comparison.regressions().map(|row| row.variant.clone()).collect::<Vec<_>>()
        };
        assert_eq!(lost(9.9), [STANDARD]);
        assert_eq!(lost(10.1), [""; 0]);
        let ratios: Vec<f64> = compare(&earlier, &current, 10.0).rows.iter().map(Compared::ratio).collect();
        assert_eq!(ratios, [1.1, 0.8]);
    }

    /// A regression of another library that its users found months after the release.
    #[test]
    fn two_microseconds_more_in_a_row_of_few_tokens_are_a_loss_at_the_default_tolerance() {
        let earlier = report(&[(STANDARD, Some(9.0)), (FUSED, Some(4.8))]);
        let current = report(&[(STANDARD, Some(9.1)), (FUSED, Some(6.8))]);
        let comparison = compare(&earlier, &current, Settings::default().tolerance_percent);
        let lost: Vec<_> = comparison.regressions().map(|row| row.variant.as_str()).collect();
        assert_eq!(lost, [FUSED]);
    }

    #[test]
    fn rows_without_a_counterpart_are_named_and_cost_nothing() {
        let earlier = report(&[(STANDARD, None), ("standard_gone", Some(1.0)), (FUSED, Some(1.0))]);
        let mut current = report(&[(STANDARD, Some(9.0)), (FUSED, None), ("fused_fresh", Some(9.0))]);
        current.push(case(256, QuantMode::None), Vec::new(), vec![measurement(FUSED, trials(&[9.0]))]);
        let comparison = compare(&earlier, &current, 10.0);
        let title = "num_tokens=128, dtype=bfloat16, with residual, quant=none";
        let expected = [
            format!("{STANDARD} ({title}): failed in the earlier report"),
            format!("{FUSED} ({title}): failed in this run"),
            format!("fused_fresh ({title}): not in the earlier report"),
            format!("standard_gone ({title}): only in the earlier report"),
            "num_tokens=256, dtype=bfloat16, with residual, quant=none: not in the earlier report".to_owned(),
        ];
        assert_eq!(comparison.unmatched, expected);
        assert_eq!(comparison.rows, []);
        assert_eq!(comparison.regressions().count(), 0);
    }

    #[test]
    fn the_text_is_exact() {
        let earlier = report(&[(STANDARD, Some(100.0)), (FUSED, Some(50.0)), ("fused_gone", Some(1.0))]);
        let current = report(&[(STANDARD, Some(125.0)), (FUSED, Some(40.0))]);
        let expected = "\
Compared with the earlier report; a ratio above 1 is slower

num_tokens=128, dtype=bfloat16, with residual, quant=none
Operation                           earlier     now  ratio
                                         µs      µs
----------------------------------------------------------
standard_allreduce_native_rms_norm   100.00  125.00  1.250
fused_allreduce_rmsnorm_oneshot       50.00   40.00  0.800

not compared: fused_gone (num_tokens=128, dtype=bfloat16, with residual, quant=none): only in the earlier report
SLOWER: standard_allreduce_native_rms_norm (num_tokens=128, dtype=bfloat16, with residual, quant=none) is 25.0% slower than before
1 of 2 rows lost more than 10%
";
        assert_eq!(compare(&earlier, &current, 10.0).render(WIDTH), expected);
    }

    #[test]
    fn another_configuration_is_refused_before_the_run() {
        let earlier = report(&[(FUSED, Some(1.0))]);
        let settings = earlier.settings.clone();
        assert_eq!(check(&earlier, &settings, "cpu", 2), Ok(()));
        let refused = |then: &str, now: &str| {
            let (what, hint) =
                ("the earlier report is of another configuration", "use one measured the same way");
            Err(UsageError::new(format!("--compare: {what} ({then}; this run: {now}): {hint}")))
        };
        assert_eq!(check(&earlier, &settings, "cuda", 2), refused("backend cpu", "backend cuda"));
        assert_eq!(check(&earlier, &settings, "cpu", 4), refused("2 ranks", "4 ranks"));
        let wide = Settings { hidden_dim: 4096, ..settings.clone() };
        assert_eq!(check(&earlier, &wide, "cpu", 2), refused("hidden size 8192", "hidden size 4096"));
        let moe = Settings { pattern: Pattern::Moe, ..settings.clone() };
        let why = refused("pattern all-reduce-norm", "pattern moe");
        assert_eq!(check(&earlier, &moe, "cpu", 2), why);
        let bare = Settings { use_residual: false, ..settings.clone() };
        assert_eq!(check(&earlier, &bare, "cpu", 2), refused("with residual", "no residual"));
        let in_place = Settings { in_place: true, ..settings.clone() };
        let why = refused("outputs beside inputs", "outputs in place");
        assert_eq!(check(&earlier, &in_place, "cpu", 2), why);
        let cold = Settings { cold: true, ..settings.clone() };
        assert_eq!(check(&earlier, &cold, "cpu", 2), refused("warm caches", "cold caches"));
    }

    #[test]
    fn a_run_with_nothing_in_common_is_refused_and_one_with_something_is_not() {
        let earlier = report(&[(FUSED, Some(1.0))]);
        let mut settings = Settings { num_tokens: vec![64, 128], ..earlier.settings.clone() };
        assert_eq!(check(&earlier, &settings, "cpu", 2), Ok(()));
        settings.num_tokens = vec![64];
        let error = check(&earlier, &settings, "cpu", 2).unwrap_err().to_string();
        assert!(error.starts_with("--compare: the earlier report has none of this run's tokens"), "{error}");
    }

    #[test]
    fn another_machine_is_named_and_a_large_loss_is_in_times() {
        let earlier = report(&[(FUSED, Some(1.0))]);
        let mut current = report(&[(FUSED, Some(113.6))]);
        current.machine.cores = 4;
        let text = compare(&earlier, &current, 10.0).render(WIDTH);
        let note = "note: the earlier report is of another machine: 2 cores then, 4 cores now\n";
        assert!(text.contains(note), "{text}");
        let title = "num_tokens=128, dtype=bfloat16, with residual, quant=none";
        let slower = format!("SLOWER: {FUSED} ({title}) is 114 times as slow as before\n");
        assert!(text.contains(&slower), "{text}");
    }
}
