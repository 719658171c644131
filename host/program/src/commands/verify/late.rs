//! A rank that is withheld from an operation. The waits of the others end at their deadline, with an error that names the
//! late rank. The group is then unusable on every rank, and a new group works.
//!
//! On GPUs the kernels wait, and the first wait that fails ends the others.

use std::time::{Duration, Instant};

use fused_collective::group::{
    failure::{Cause, What},
    rendezvous::Group,
};
use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm},
    plan::owner,
    quant::Quantization,
};

use super::{
    settings::Settings,
    verdicts::{Tally, Verdict, count, gather_groups},
};
use crate::{
    backend::{collective::Collective, problem::Problem, steps::Step},
    check::{
        variants::{Variant, variants},
        verify::{verify, write_inputs},
    },
    job::ranks::{Error, gather_verdicts},
    pattern::Pattern,
    quant_mode::QuantMode,
    report::progress::Progress,
    wire::Wire,
};

/// The longest wait of the operations under test.
const LONGEST_WAIT: Duration = Duration::from_millis(1500);
/// The deadline over the wait of operations. The withheld rank waits for the others, and must not reach the deadline.
const PART_OF_DEADLINE: u32 = 8;

/// Withholds each rank in turn from an operation, in every mode, and checks the errors of the others. `join` joins the
/// backend of a group with a deadline for its operations. All ranks of the job, `world`, call this, each in its own
/// `group`.
///
/// # Errors
/// A group or the backend failed.
pub fn run_late_ranks(
    settings: &Settings,
    world: &Group,
    group: &Group,
    join: impl for<'g> Fn(&'g Group, Duration) -> Result<Box<dyn Collective + 'g>, Error>,
    progress: &Progress,
    mut tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let mut total = Tally::default();
    let hidden = settings.hidden_dims.iter().copied().min().unwrap_or(16);
    let problem = Problem {
        dtype: DType::Bf16,
        // One token has one owner, so it is known which rank waits for which.
        tokens: 1,
        hidden,
        residual: true,
        sharded: false,
        norm: Norm::default(),
        pattern: Pattern::AllReduceNorm,
        quantization: Quantization::None,
        scale: QuantMode::None.scale(),
        partial_sums: settings.job.partial_sums(),
    };
    for variant in variants(
        problem.pattern,
        QuantMode::None,
        problem.residual,
        problem.sharded,
        true,
        &[Wire::Exact],
        &[],
    ) {
        let mut tally = Tally::default();
        for late in 0..group.world_size() {
            let title = format!("rank {late} withheld");
            progress.doing(format!("{}, {title}", variant.name));
            let case = Late { settings, group, problem: &problem, variant: &variant, late };
            let verdict = case.verify(&join)?;
            let found = gather_groups(world, Some(group), &vec![(variant.name.clone(), verdict)])?;
            count(settings.job.groups, &title, found, &mut tally, &mut tell);
        }
        tell(&format!("{}, a rank withheld  {tally}", variant.name));
        total.add(tally);
    }
    Ok(total)
}

/// One rank that is withheld from one operation.
struct Late<'a> {
    settings: &'a Settings,
    group: &'a Group,
    problem: &'a Problem,
    variant: &'a Variant,
    late: u32,
}

impl Late<'_> {
    fn verify(
        &self,
        join: &impl for<'g> Fn(&'g Group, Duration) -> Result<Box<dyn Collective + 'g>, Error>,
    ) -> Result<Verdict, Error> {
        let (group, settings) = (self.group, self.settings);
        let wait = LONGEST_WAIT.min(settings.job.deadline() / PART_OF_DEADLINE);
        let reported = {
            // A group of its own, as the failure ends it.
            let doomed = self.regroup()?;
            let mut backend = join(&doomed, wait)?;
            self.prepare(&mut *backend)?;
            // The set-up of a rank must not count against the deadline of another rank's operation.
            group.barrier()?;
            // The first operation does the set-up of first use.
            backend.run(&self.variant.steps)?;
            group.barrier()?;
            let own = match group.rank() == self.late {
                true => Ok(false),
                false => self.wait_in_vain(&mut *backend, wait),
            };
            let reported =
                gather_verdicts(group, own)?.and_then(|first_hand| match first_hand.contains(&true) {
                    true => Ok(0.0),
                    false => Err("every rank says that another rank reported the failure".to_owned()),
                });
            // The failed group may have no barrier, so this one keeps memory that other ranks still map.
            let _ = backend.leave();
            group.barrier()?;
            reported
        };
        let anew = self.regroup()?;
        let mut backend = join(&anew, settings.job.deadline())?;
        self.prepare(&mut *backend)?;
        let again = verify(&mut *backend, &anew, self.problem, self.variant, settings.numbers())?;
        backend.leave()?;
        drop(backend);
        anew.farewell()?;
        Ok(reported.and(again.map_err(|why| format!("the new group: {why}"))))
    }

    /// A group of the same ranks.
    fn regroup(&self) -> Result<Group, Error> {
        self.group.split(Some(0))?.ok_or_else(|| Error::Failed("a rank is in no group".to_owned()))
    }

    fn prepare(&self, backend: &mut dyn Collective) -> Result<(), Error> {
        backend.prepare(self.problem)?;
        write_inputs(backend, self.problem, self.settings.numbers(), self.group)
    }

    /// Runs an operation that cannot succeed, and checks its error. Returns true if this rank's own deadline passed, false if
    /// another rank's passed first.
    fn wait_in_vain(&self, backend: &mut dyn Collective, wait: Duration) -> Result<bool, String> {
        let began = Instant::now();
        let outcome = backend.run(&self.variant.steps);
        let took = began.elapsed();
        let Err(error) = outcome else { return Err("the operation succeeded without it".to_owned()) };
        let Some(failure) = error.failure() else {
            return Err(format!("the operation failed for another reason: {error}"));
        };
        let first_hand = match (&failure.cause, failure.wait) {
            (Cause::Deadline(_), Some(awaited)) => {
                // The operation before was number 0.
                let expected = (self.awaited(), 1);
                if ((awaited.from, awaited.what), awaited.operation) != expected {
                    return Err(format!("it should have waited for {expected:?}: {error}"));
                }
                true
            }
            (Cause::Lost(_) | Cause::GaveUp(_), _) => false,
            _ => return Err(format!("the operation failed for another reason: {error}")),
        };
        if took < wait / 2 || took > self.settings.job.deadline() {
            return Err(format!("the operation failed after {took:.1?}, with waits of {wait:.1?}: {error}"));
        }
        let began = Instant::now();
        match backend.run(&self.variant.steps) {
            Err(error) if error.is_poisoned() && began.elapsed() < wait => Ok(first_hand),
            Err(error) => Err(format!("after the failure, after {:.1?}: {error}", began.elapsed())),
            Ok(()) => Err("an operation after the failure succeeded".to_owned()),
        }
    }

    /// The rank and the data that this rank waits for when [`late`](Self::late) does not come.
    fn awaited(&self) -> (u32, What) {
        let owner = owner(0, self.group.world_size());
        // A rank that does not own the token waits for its sum, which the owner cannot complete.
        let for_sum = self.variant.steps == [Step::fused(Mode::TwoShot)] && self.group.rank() != owner;
        if for_sum { (owner, What::Sum(0)) } else { (self.late, What::Input(0)) }
    }
}
