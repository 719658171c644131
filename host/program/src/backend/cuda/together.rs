//! Work of other libraries that every rank does at the same time, and that no deadline of theirs ends.
//!
//! It runs in a thread on each rank. Meanwhile the ranks tell each other again and again how it goes, so that all come to
//! the same result: it is done on every rank or counts on none, and nobody is left waiting for a rank that gave up.

use std::{
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use fused_collective::group::rendezvous::Group;

use crate::backend::{error::Error, gather::gather};

/// How often ranks tell each other how it goes.
const TELL_EVERY: Duration = Duration::from_millis(50);

/// How long work may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Until it is done.
    pub(super) work: Duration,
    /// From then on until it is undone, where it counts on no rank.
    pub(super) undo: Duration,
}

/// What became of the work, the same on every rank.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome<T> {
    /// It is done on all, on this one with this result.
    Done(T),
    /// It is not done on this rank, for this reason, and undone on all others; no thread of it runs any more.
    Failed { rank: u32, why: String },
    /// As `Failed`, but for a thread of the rank `running`, which still runs.
    Running { rank: u32, why: String, running: u32 },
}

/// How a rank's work goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum State {
    Working,
    Done,
    Failed(String),
    Late,
}

/// Whether all ranks are done or one has failed, and why; `None` while that is open.
fn verdict(states: &[State], doing: &str, limit: Duration) -> Option<Result<(), (u32, String)>> {
    let ranks = || (0u32..).zip(states);
    // A rank that knows why comes before those that only wait for it.
    let failed = ranks().find_map(|(rank, state)| match state {
        State::Failed(why) => Some((rank, why.clone())),
        _ => None,
    });
    let late = || ranks().find(|(_, state)| **state == State::Late);
    let why = |rank| (rank, format!("{doing} takes longer than {:.1} s", limit.as_secs_f64()));
    if let Some(failed) = failed.or_else(|| late().map(|(rank, _)| why(rank))) {
        return Some(Err(failed));
    }
    states.iter().all(|state| *state == State::Done).then_some(Ok(()))
}

/// Does `work` in a thread while all other ranks of `group` do theirs. All ranks call this. `doing` says what it is, for
/// a reader: "connecting". Where it comes to nothing, `undo` gets what had come of it on this rank, in a thread too, however late that is.
///
/// # Errors
/// A rank of the group was lost.
pub(super) fn together<T: Send + 'static>(
    group: &Group,
    doing: &str,
    limits: Limits,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
    undo: impl FnOnce(T) + Send + 'static,
) -> Result<Outcome<T>, Error> {
    let began = Instant::now();
    let (sender, receiver) = mpsc::channel();
    let started = thread::Builder::new().name("together".to_owned()).spawn(move || drop(sender.send(work())));
    let mut own = started.err().map(|error| Err(format!("its thread was not started: {error}")));
    loop {
        if own.is_none() {
            own = match receiver.recv_timeout(TELL_EVERY) {
                Ok(result) => Some(result),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Err("its thread panicked".to_owned())),
            };
        }
        let state = match &own {
            None if began.elapsed() >= limits.work => State::Late,
            None => State::Working,
            Some(Ok(_)) => State::Done,
            Some(Err(why)) => State::Failed(why.clone()),
        };
        let states = match gather(group, &state) {
            Ok(states) => states,
            Err(lost) => {
                drop(dispose(own, receiver, undo));
                return Err(lost);
            }
        };
        match (verdict(&states, doing, limits.work), own) {
            (None, unchanged) => own = unchanged,
            (Some(Ok(())), Some(Ok(done))) => return Ok(Outcome::Done(done)),
            (Some(Err((rank, why))), own) => {
                let undone = dispose(own, receiver, undo);
                let running = still_running(group, &undone, limits.undo)?;
                return Ok(match running {
                    None => Outcome::Failed { rank, why },
                    Some(running) => Outcome::Running { rank, why, running },
                });
            }
            // All are done, so this rank is.
            (Some(Ok(())), _) => return Err(Error::Other("a rank does not know its own state".to_owned())),
        }
    }
}

/// Undoes what has come of the work, or what still comes, in a thread. The receiver is disconnected when that is over.
fn dispose<T: Send + 'static>(
    own: Option<Result<T, String>>,
    receiver: Receiver<Result<T, String>>,
    undo: impl FnOnce(T) + Send + 'static,
) -> Receiver<()> {
    let (alive, over) = mpsc::channel();
    let disposal = move || {
        let _alive = alive;
        if let Ok(Ok(done)) = own.map_or_else(|| receiver.recv(), Ok) {
            undo(done);
        }
    };
    // Without a thread nothing is undone, which shows as nothing to wait for: the process is about to end.
    let _ = thread::Builder::new().name("undo".to_owned()).spawn(disposal);
    over
}

/// Waits for the threads of all ranks. The first rank whose thread still runs after `limit`.
fn still_running(group: &Group, undone: &Receiver<()>, limit: Duration) -> Result<Option<u32>, Error> {
    let began = Instant::now();
    loop {
        let runs = matches!(undone.recv_timeout(TELL_EVERY), Err(RecvTimeoutError::Timeout));
        let late = runs && began.elapsed() >= limit;
        let all: Vec<(bool, bool)> = gather(group, &(runs, late))?;
        if let Some(rank) = all.iter().position(|(_, late)| *late) {
            return Ok(Some(rank as u32));
        }
        if all.iter().all(|(runs, _)| !runs) {
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    };

    use super::*;
    use fused_collective::group::rendezvous::Membership;

    const LIMITS: Limits = Limits { work: Duration::from_secs(60), undo: Duration::from_secs(60) };
    /// For threads with nothing to do to be done, on a busy machine.
    const SHORT: Duration = Duration::from_secs(1);

    /// Runs `rank` as each of three ranks.
    fn on_ranks<T: Send>(rank: impl Fn(&Group) -> T + Sync) -> Vec<T> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let key = format!("together {} {}", std::process::id(), COUNT.fetch_add(1, SeqCst));
        let join = |rank| Membership {
            rank,
            world_size: 3,
            key: &key,
            config: b"",
            deadline: Duration::from_secs(60),
        };
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..3)
                .map(|number| {
                    let (rank, membership) = (&rank, join(number));
                    scope.spawn(move || {
                        let group = Group::join(&membership).unwrap();
                        let result = rank(&group);
                        // Those of ranks that were lost fail.
                        let _ = group.farewell();
                        result
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// Holds threads back until it is opened.
    #[derive(Default)]
    struct Gate(Mutex<bool>, Condvar);

    impl Gate {
        fn pass(&self) {
            drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
        }

        fn open(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_all();
        }
    }

    #[test]
    fn what_all_ranks_have_done_counts_and_is_not_undone() {
        let undone = Arc::new(AtomicU32::new(0));
        let results = on_ranks(|group| {
            let (own, undone) = (group.rank() * 10, Arc::clone(&undone));
            let undo = move |_| {
                undone.fetch_add(1, SeqCst);
            };
            together(group, "waiting", LIMITS, move || Ok(own), undo).unwrap()
        });
        assert_eq!(results, [0, 10, 20].map(Outcome::Done));
        assert_eq!(undone.load(SeqCst), 0);
    }

    #[test]
    fn what_one_rank_fails_at_is_undone_on_all_others_however_late_it_comes() {
        let (undone, gate) = (Arc::new(AtomicU32::new(0)), Arc::new(Gate::default()));
        let results = on_ranks(|group| {
            let (rank, undone) = (group.rank(), Arc::clone(&undone));
            let (opener, gate) = (Arc::clone(&gate), Arc::clone(&gate));
            // Rank 2 is done when rank 0 undoes what it has done, which is after rank 1 has failed.
            let work = move || match rank {
                1 => Err("no such thing".to_owned()),
                2 => {
                    gate.pass();
                    Ok(rank)
                }
                _ => Ok(rank),
            };
            let undo = move |_| {
                opener.open();
                undone.fetch_add(1, SeqCst);
            };
            together(group, "waiting", LIMITS, work, undo).unwrap()
        });
        let failed = || Outcome::Failed { rank: 1, why: "no such thing".to_owned() };
        assert_eq!(results, [failed(), failed(), failed()]);
        assert_eq!(undone.load(SeqCst), 2);
    }

    #[test]
    fn a_rank_that_is_late_is_named_on_all_and_none_keeps_what_it_has() {
        let (undone, gate) = (Arc::new(AtomicU32::new(0)), Arc::new(Gate::default()));
        let results = on_ranks(|group| {
            let (rank, undone) = (group.rank(), Arc::clone(&undone));
            let (opener, gate) = (Arc::clone(&gate), Arc::clone(&gate));
            let work = move || {
                if rank == 1 {
                    gate.pass();
                }
                Ok(rank)
            };
            let undo = move |rank| {
                if rank == 0 {
                    opener.open();
                }
                undone.fetch_add(1, SeqCst);
            };
            together(group, "waiting", Limits { work: SHORT, ..LIMITS }, work, undo).unwrap()
        });
        let late = || Outcome::Failed { rank: 1, why: "waiting takes longer than 1.0 s".to_owned() };
        assert_eq!(results, [late(), late(), late()]);
        assert_eq!(undone.load(SeqCst), 3);
    }

    #[test]
    fn a_thread_that_does_not_end_is_told_of_on_every_rank() {
        let gate = Arc::new(Gate::default());
        let results = on_ranks(|group| {
            let (rank, gate) = (group.rank(), Arc::clone(&gate));
            let work = move || {
                if rank == 2 {
                    gate.pass();
                }
                Ok(())
            };
            together(group, "waiting", Limits { work: SHORT, undo: SHORT }, work, |()| {}).unwrap()
        });
        gate.open();
        for result in results {
            assert!(matches!(result, Outcome::Running { rank: 2, running: 2, .. }), "{result:?}");
        }
    }

    #[test]
    fn a_rank_that_is_lost_meanwhile_ends_it_on_all_others() {
        let gate = Arc::new(Gate::default());
        let results = on_ranks(|group| {
            if group.rank() == 1 {
                group.abort("it had enough");
                return Ok(());
            }
            let gate = Arc::clone(&gate);
            let work = move || {
                gate.pass();
                Ok(())
            };
            together(group, "waiting", LIMITS, work, |()| {}).map(drop).map_err(|error| error.to_string())
        });
        gate.open();
        let lost = || Err("rank 1 gave up: it had enough".to_owned());
        assert_eq!(results, [lost(), Ok(()), lost()]);
    }
}
