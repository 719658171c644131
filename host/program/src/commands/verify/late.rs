//! A rank that does not come to an operation: the others' waits end at their deadline, with an error that says who was
//! waited for; the group is then over on every rank, and one made anew works.
//!
//! On GPUs the waits are the kernels' own, and the first of them to fail ends the others.

use std::time::{Duration, Instant};

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm},
    plan::owner,
    quant::Quantization,
};

use super::run::{Settings, Tally, Verdict, count, gather_groups};
use fused_collective::group::{
    failure::{Cause, What},
    rendezvous::Group,
};

use crate::{
    backend::{collective::Collective, problem::Problem, steps::Step},
    check::{
        variants::{Variant, variants},
        verify::{verify, write_inputs},
    },
    job::ranks::{Error, gather_verdicts},
    quant_mode::QuantMode,
    report::progress::Progress,
};

/// How long the operations under test wait, unless the deadline leaves less.
const LONGEST_WAIT: Duration = Duration::from_millis(1500);
/// Of the deadline, which a rank that is kept back waits for the others to tell: the part that operations may wait.
const PART_OF_DEADLINE: u32 = 8;

/// Keeps each rank in turn from an operation, in either mode, and checks what the others say. `join` makes this rank's
/// end of a backend for a group, whose operations wait so long. All ranks of the job, `world`, call this, each with its
/// own `group`.
///
/// # Errors
/// As [`run`](super::run)'s.
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
        // One token has one owner: it is known who waits for whom.
        tokens: 1,
        hidden,
        residual: true,
        sharded: false,
        norm: Norm::default(),
        quantization: Quantization::None,
        scale: QuantMode::None.scale(),
    };
    for variant in variants(QuantMode::None, problem.residual, problem.sharded, true, &[]) {
        let mut tally = Tally::default();
        for late in 0..group.world_size() {
            let title = format!("rank {late} kept back");
            progress.doing(format!("{}, {title}", variant.name));
            let case = Late { settings, group, problem: &problem, variant: &variant, late };
            let verdict = case.verify(&join)?;
            let found = gather_groups(world, Some(group), &vec![(variant.name.clone(), verdict)])?;
            count(settings, &title, found, &mut tally, &mut tell);
        }
        tell(&format!("{}, a rank kept back  {tally}", variant.name));
        total.add(tally);
    }
    Ok(total)
}

/// One rank that is kept from one operation.
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
        let wait = LONGEST_WAIT.min(settings.deadline() / PART_OF_DEADLINE);
        let reported = {
            // A group of its own, since the failure ends it.
            let doomed = self.regroup()?;
            let mut backend = join(&doomed, wait)?;
            self.prepare(&mut *backend)?;
            // A rank that prepares for longer is not one that does not come.
            group.barrier()?;
            // Whatever is set up at first use is so before the operation that counts.
            backend.run(&self.variant.steps)?;
            group.barrier()?;
            let own = match group.rank() == self.late {
                true => Ok(false),
                false => self.wait_in_vain(&mut *backend, wait),
            };
            let reported =
                gather_verdicts(group, own)?.and_then(|first_hand| match first_hand.contains(&true) {
                    true => Ok(0.0),
                    false => Err("every rank says that it was told by another".to_owned()),
                });
            // The group may be over, so it is this one that sees to it that nobody frees what another has open.
            let _ = backend.leave();
            group.barrier()?;
            reported
        };
        let anew = self.regroup()?;
        let mut backend = join(&anew, settings.deadline())?;
        self.prepare(&mut *backend)?;
        let again = verify(&mut *backend, &anew, self.problem, self.variant, settings.numbers())?;
        backend.leave()?;
        drop(backend);
        anew.farewell()?;
        Ok(reported.and(again.map_err(|why| format!("the group that was made anew: {why}"))))
    }

    /// A group of the same ranks.
    fn regroup(&self) -> Result<Group, Error> {
        self.group.split(Some(0))?.ok_or_else(|| Error::Failed("a rank is in no group".to_owned()))
    }

    fn prepare(&self, backend: &mut dyn Collective) -> Result<(), Error> {
        backend.prepare(self.problem)?;
        write_inputs(backend, self.problem, self.settings.numbers(), self.group)
    }

    /// Runs an operation that cannot succeed, and checks how it fails: whether by this rank's own deadline, or because
    /// another rank's passed first.
    fn wait_in_vain(&self, backend: &mut dyn Collective, wait: Duration) -> Result<bool, String> {
        let began = Instant::now();
        let outcome = backend.run(&self.variant.steps);
        let took = began.elapsed();
        let Err(error) = outcome else { return Err("the operation succeeded without it".to_owned()) };
        let Some(failure) = error.failure() else {
            return Err(format!("the operation failed otherwise: {error}"));
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
            _ => return Err(format!("the operation failed otherwise: {error}")),
        };
        if took < wait / 2 || took > self.settings.deadline() {
            return Err(format!(
                "the operation failed after {took:.1?}, and its waits last {wait:.1?}: {error}"
            ));
        }
        let began = Instant::now();
        match backend.run(&self.variant.steps) {
            Err(error) if error.is_poisoned() && began.elapsed() < wait => Ok(first_hand),
            Err(error) => Err(format!("after the failure, after {:.1?}: {error}", began.elapsed())),
            Ok(()) => Err("an operation after the failure succeeded".to_owned()),
        }
    }

    /// What this rank waits for, and from whom, when [`late`](Self::late) does not come.
    fn awaited(&self) -> (u32, What) {
        let owner = owner(0, self.group.world_size());
        // Who does not own the token waits for its sum, which the owner cannot make.
        let for_sum = self.variant.steps == [Step::Fused(Mode::TwoShot)] && self.group.rank() != owner;
        if for_sum { (owner, What::Sum(0)) } else { (self.late, What::Input(0)) }
    }
}
