//! The verdicts on cases, gathered from all groups and counted.

use std::fmt;

use fused_collective::group::rendezvous::Group;

use crate::{
    backend::collective::Collective,
    job::ranks::{Error, hosts},
};

/// The largest error of a case in units in the last place, or the reason why it is wrong.
pub(crate) type Verdict = Result<f64, String>;
/// The verdicts of a problem's variants, with the variants' names.
pub(crate) type Verdicts = Vec<(String, Verdict)>;

/// The results of cases.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Cases with the right results.
    pub verified: u64,
    /// Cases with wrong results.
    pub failed: u64,
    /// The largest error of any output of a right case, in units in the last place of its type.
    pub max_error_ulp: f64,
}

impl Tally {
    /// Adds the cases of `other`.
    pub fn add(&mut self, other: Tally) {
        self.verified += other.verified;
        self.failed += other.failed;
        self.max_error_ulp = self.max_error_ulp.max(other.max_error_ulp);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { verified, failed, max_error_ulp } = self;
        write!(f, "{:>3} cases, largest error {max_error_ulp:.2} ulp", verified + failed)?;
        if *failed > 0 { write!(f, ", {failed} FAILED") } else { Ok(()) }
    }
}

/// A rank's place in a verification.
pub struct Place<'a> {
    /// The group of all ranks, which keep step.
    pub world: &'a Group,
    /// This rank's group and backend; `None` for a rank that is in no group.
    pub own: Option<(&'a Group, &'a mut dyn Collective)>,
}

impl<'a> Place<'a> {
    pub(crate) fn group(&self) -> Option<&'a Group> {
        self.own.as_ref().map(|(group, _)| *group)
    }

    /// Hosts of this rank's group; 1 for a rank that is in none.
    pub(crate) fn hosts(&self) -> u32 {
        self.group().map_or(1, |group| hosts(group).count())
    }
}

/// Counts the verdicts of all groups, and reports the wrong ones to `tell`. `groups` is the number of groups.
pub(crate) fn count(
    groups: u32,
    title: &str,
    found: Vec<(usize, String, Verdict)>,
    tally: &mut Tally,
    tell: &mut impl FnMut(&str),
) {
    for (group, name, verdict) in found {
        match verdict {
            Ok(error) => tally.add(Tally { verified: 1, failed: 0, max_error_ulp: error }),
            Err(why) => {
                tally.failed += 1;
                let of_group = if groups > 1 { format!("group {group}, ") } else { String::new() };
                tell(&format!("FAILED {of_group}{title}, {name}: {why}"));
            }
        }
    }
}

/// The verdicts of all groups, each with the group's number. Every rank of the job calls this with the verdicts of its
/// group, or with none if it is in no group.
pub(crate) fn gather_groups(
    world: &Group,
    own: Option<&Group>,
    verdicts: &Verdicts,
) -> Result<Vec<(usize, String, Verdict)>, Error> {
    // All ranks of a group have the same verdicts, so its rank 0 sends them.
    let speaks = own.is_some_and(|group| group.rank() == 0);
    let own = if speaks { verdicts.as_slice() } else { &[] };
    let bytes = serde_json::to_vec(own).map_err(|error| Error::Failed(error.to_string()))?;
    let mut all = Vec::new();
    let mut group = 0;
    for (rank, bytes) in world.all_gather(&bytes)?.iter().enumerate() {
        let found: Verdicts = serde_json::from_slice(bytes)
            .map_err(|error| Error::Failed(format!("cannot read the verdicts of rank {rank}: {error}")))?;
        let speaks = !found.is_empty();
        all.extend(found.into_iter().map(|(name, verdict)| (group, name, verdict)));
        group += usize::from(speaks);
    }
    Ok(all)
}
