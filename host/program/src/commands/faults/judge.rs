//! The verdict on a case.

use std::time::Duration;

use super::case::{Case, Fault, NO_ERROR, Phase};

/// The observations of a rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Its report of the end of its group.
    pub outcome: Option<String>,
    /// Its report on a new group.
    pub again: Option<String>,
    /// Time from the fault to its report; `None` if it reported nothing.
    pub after: Option<Duration>,
}

/// The time that a report may take on a busy machine. It counts from a fault that [shows at once](Case::deadline), and else
/// from the deadline.
pub const SLACK: Duration = Duration::from_secs(8);

/// The part of a report about NCCL's all-reduce, which does not say for which rank it waits.
const NCCL: &str = "NCCL's all-reduce";

/// Judges a case, and returns the time that the last rank took to report. `observed` is in rank order, and `deadline` the
/// [case's](Case::deadline).
///
/// # Errors
/// A surviving rank did not report, reported late, did not name the faulty rank, or gave a reason that does not fit.
pub fn judge(case: &Case, deadline: Duration, observed: &[Observed]) -> Result<Duration, String> {
    let mut slowest = Duration::ZERO;
    let mut named = false;
    let limit = if case.shows_at_once() { SLACK } else { deadline + SLACK };
    for (rank, seen) in (0u32..).zip(observed) {
        if rank == case.rank && !case.fault.is_survived() {
            continue;
        }
        let (Some(outcome), Some(after)) = (&seen.outcome, seen.after) else {
            return Err(format!("rank {rank} reported nothing"));
        };
        if outcome == NO_ERROR {
            return Err(format!("rank {rank} noticed nothing"));
        }
        if after > limit {
            return Err(format!("rank {rank} reported after {:.1} s only: {outcome}", after.as_secs_f64()));
        }
        let fits = match case.fault {
            Fault::Abort => outcome.contains("abort"),
            fault if fault.is_mismatch() => ["called (", "other call", "has not made this rank's call"]
                .iter()
                .any(|reason| outcome.contains(reason)),
            _ => true,
        };
        if !fits {
            return Err(format!("rank {rank} gave another reason: {outcome}"));
        }
        if case.fault.is_survived() && seen.again.as_deref() != Some(NO_ERROR) {
            let again = seen.again.as_deref().unwrap_or("it said nothing");
            return Err(format!("rank {rank}, in a new group: {again}"));
        }
        let names = names_rank(outcome, case.rank);
        if !names && rank != case.rank && knows_culprit(case, outcome) {
            return Err(format!("rank {rank} did not name rank {}: {outcome}", case.rank));
        }
        named |= names || names_nobody_by_right(case, outcome);
        slowest = slowest.max(after);
    }
    if !named {
        return Err(format!("no rank named rank {}", case.rank));
    }
    Ok(slowest)
}

/// True if a rank with this report must know the faulty rank. A connection, an announcement and the rendezvous name it. A
/// wait for data that passes its deadline names only the rank that was waited for, which may have waited, too.
fn knows_culprit(case: &Case, outcome: &str) -> bool {
    let by_deadline = case.phase.is_amid_operations() && !case.shows_at_once();
    !by_deadline || !(outcome.contains("rank ") || names_nobody_by_right(case, outcome))
}

/// True if the wait that passed its deadline was NCCL's.
fn names_nobody_by_right(case: &Case, outcome: &str) -> bool {
    case.phase == Phase::Nccl && !case.shows_at_once() && outcome.contains(NCCL)
}

/// True if `text` names this rank, and not one whose number starts with the same digits.
fn names_rank(text: &str, rank: u32) -> bool {
    let name = format!("rank {rank}");
    text.match_indices(&name)
        .any(|(at, _)| !text[at + name.len()..].starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(2);

    fn case(text: &str) -> Case {
        text.parse().unwrap()
    }

    fn saw(outcome: &str, seconds: u64) -> Observed {
        Observed { outcome: Some(outcome.to_owned()), again: None, after: Some(Duration::from_secs(seconds)) }
    }

    fn lost() -> Observed {
        saw("rank 1 was lost: it ended without a farewell", 0)
    }

    #[track_caller]
    fn wrong(case: &Case, observed: &[Observed]) -> String {
        judge(case, case.deadline(DEADLINE), observed).unwrap_err()
    }

    #[test]
    fn a_case_is_right_if_every_other_rank_reports_in_time() {
        let dead = Observed::default();
        assert_eq!(
            judge(&case("operations/kill/1"), DEADLINE, &[lost(), dead.clone(), lost()]),
            Ok(Duration::ZERO)
        );
        let late = saw("waited 2.0 s for rank 1's input", 3);
        assert_eq!(
            judge(&case("operations/stop/1"), DEADLINE, &[late.clone(), dead, late]),
            Ok(Duration::from_secs(3))
        );
    }

    #[test]
    fn whatever_breaks_the_promise_is_found() {
        let (dead, kill) = (Observed::default(), case("operations/kill/1"));
        assert_eq!(wrong(&kill, &[lost(), dead.clone(), dead.clone()]), "rank 2 reported nothing");
        assert_eq!(wrong(&kill, &[lost(), dead.clone(), saw(NO_ERROR, 0)]), "rank 2 noticed nothing");
        assert!(wrong(&kill, &[saw("rank 1 was lost", 9), dead.clone()]).contains("after 9.0 s only"));
        assert!(
            wrong(&case("operations/stop/1"), &[saw("rank 1", 11), dead.clone()]).contains("after 11.0 s")
        );
        let again =
            |text: &str| Observed { again: Some(text.to_owned()), ..saw("rank 1 aborted the group", 0) };
        let abort = case("ready/abort/1");
        assert!(judge(&abort, DEADLINE, &[again(NO_ERROR), again(NO_ERROR)]).is_ok());
        assert_eq!(wrong(&abort, &[again(NO_ERROR), again("wrong")]), "rank 1, in a new group: wrong");
        assert!(wrong(&abort, &[lost(), again(NO_ERROR)]).contains("another reason"));
    }

    #[test]
    fn every_report_names_the_rank_that_failed_where_that_is_known() {
        let dead = Observed::default();
        let kill = case("operations/kill/1");
        let other = "rank 12 was lost: it ended without a farewell";
        assert_eq!(
            wrong(&kill, &[lost(), dead.clone(), saw(other, 0)]),
            format!("rank 2 did not name rank 1: {other}")
        );
        // Past a deadline amid operations, a rank may name one that waited, too.
        let (stop, sum) = (case("operations/stop/1"), saw("waited 2.0 s for rank 0's sum", 2));
        assert!(
            judge(&stop, DEADLINE, &[saw("waited 2.0 s for rank 1's input", 2), dead.clone(), sum.clone()])
                .is_ok()
        );
        assert_eq!(wrong(&stop, &[sum.clone(), dead.clone(), sum.clone()]), "no rank named rank 1");
        assert!(
            wrong(&stop, &[saw("it is late", 2), dead.clone(), sum.clone()])
                .contains("rank 0 did not name rank 1")
        );
        // The rendezvous tells all ranks the same.
        assert!(
            wrong(&case("end/stop/1"), &[saw("rank 1 is late", 2), dead.clone(), sum])
                .contains("rank 2 did not name")
        );
        // NCCL does not say for which rank it waits. A connection shows an end, as in other phases.
        let nccl = saw("NCCL's all-reduce did not end within 2.0 s", 2);
        assert!(judge(&case("nccl/stop/1"), DEADLINE, &[nccl.clone(), dead.clone()]).is_ok());
        assert!(wrong(&case("nccl/kill/1"), &[nccl.clone(), dead.clone()]).contains("did not name"));
        assert!(wrong(&stop, &[nccl, dead]).contains("did not name"));
    }

    #[test]
    fn what_shows_at_once_cannot_pass_for_it_by_its_deadline() {
        for case in Case::all(1) {
            let deadline = case.deadline(DEADLINE);
            if case.shows_at_once() {
                assert!(deadline > 4 * SLACK, "{case}");
                let late = Observed { again: Some(NO_ERROR.to_owned()), ..saw("rank 1", deadline.as_secs()) };
                assert!(wrong(&case, &[late.clone(), late]).contains("only"), "{case}");
            } else {
                assert_eq!(deadline, DEADLINE, "{case}");
            }
        }
    }
}
