//! Other packages' all-reduce, residual add, RMSNorm and quantization, measured in the same run. Their rows stand in the
//! same report.
//!
//! A peer is a Python package. For each peer, every rank starts a process of its own, which runs `peer.py` with the peers'
//! classes appended. The process measures each configuration right after this project's variants. Ranks go through the same
//! steps, and exchange the states of their processes while they wait. So a process that hangs or dies costs the benchmark
//! that peer's rows only.
//!
//! A peer that is not installed is no failure but a note that says what to install. Wrong results are a failure.

pub mod choice;
mod process;
pub mod protocol;

use std::{mem::take, path::Path, time::Duration};

use fused_collective::group::rendezvous::Group;
use serde::{Deserialize, Serialize};

use crate::{
    job::ranks::{Error, all, slowest},
    measurement::{Kind, Measurement, SumError, Trials},
    multicast,
};
use choice::PeerChoice;
use process::{Process, clipped};
use protocol::{MeasureRequest, Reply, Request, Row, RowResult, StartRequest};

/// The most rows and notes of one configuration.
const MOST: usize = 64;
/// The time that a rank listens to its process before it looks at the other ranks.
const POLL: Duration = Duration::from_millis(250);

/// The peers to start.
#[derive(Clone, Copy, Debug)]
pub struct PeerOptions<'a> {
    /// The packages, in order.
    pub choices: &'a [PeerChoice],
    /// The Python to run them.
    pub python: &'a Path,
    /// Longest silence of a process.
    pub deadline: Duration,
    /// The largest number of tokens in any configuration.
    pub max_tokens: u64,
    /// Elements of a token.
    pub hidden_dim: u64,
    /// This rank's GPU, if the peers run on GPUs.
    pub cuda: Option<u32>,
}

/// The running peers of a benchmark.
#[derive(Debug, Default)]
pub struct Peers {
    peers: Vec<Peer>,
    /// Notes for the next configuration.
    notes: Vec<String>,
}

#[derive(Debug)]
struct Peer {
    choice: PeerChoice,
    /// The packages' versions.
    about: String,
    process: Process,
    /// Longest silence of the process.
    deadline: Duration,
}

/// The state of a rank's process, as the other ranks learn it.
#[derive(Debug, Serialize, Deserialize)]
enum State {
    /// It has not answered yet.
    Waiting,
    /// It is no longer usable, for this reason.
    Gone(String),
    /// It cannot run here: the reason, and a command that would help.
    Unavailable(String, Option<String>),
    Started(Option<u16>),
    Joined(String),
    Measured(Vec<Summary>, Vec<String>),
}

/// The rows of the peers for one configuration, and notes for a reader.
pub type PeerRows = (Vec<Measurement>, Vec<String>);

/// A row without its times, which are too many for a message.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Summary {
    variant: String,
    kind: Kind,
    /// The figures beside the times, or the reason why the results are wrong.
    result: Result<Timed, String>,
}

/// A rank's figures of a row, as it sends them to the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Timed {
    max_error_ulp: f64,
    sum_error: Option<SumError>,
    operations_per_trial: u32,
}

impl Timed {
    /// This rank's row and another's: the larger errors.
    fn or_larger(self, other: Timed) -> Timed {
        let sum_error = self
            .sum_error
            .zip(other.sum_error)
            .map(|(a, b)| SumError { rms: a.rms.max(b.rms), largest: a.largest.max(b.largest) });
        Timed { max_error_ulp: self.max_error_ulp.max(other.max_error_ulp), sum_error, ..self }
    }
}

impl Peers {
    /// Starts the peers. One that cannot run here is left out, with a note. All ranks call this.
    ///
    /// # Errors
    /// The group's.
    pub fn start(options: &PeerOptions<'_>, group: &Group) -> Result<Peers, Error> {
        let mut started = Peers::default();
        for &choice in options.choices {
            match Peer::start(choice, options, group)? {
                Ok(peer) => started.peers.push(peer),
                Err(why) => started.notes.push(format!("{choice} was not measured: {why}")),
            }
        }
        Ok(started)
    }

    /// Measures a configuration with every peer. All ranks call this with the same request, and get the same rows.
    ///
    /// # Errors
    /// The group's.
    pub fn measure(&mut self, request: &MeasureRequest, group: &Group) -> Result<PeerRows, Error> {
        let mut measured = Vec::new();
        let mut notes = take(&mut self.notes);
        let mut left = Vec::new();
        for mut peer in take(&mut self.peers) {
            match peer.measure(request, group)? {
                Ok((rows, of_peer)) => {
                    notes.push(format!("{} is {}", peer.choice, peer.about));
                    notes.extend(of_peer);
                    measured.extend(rows);
                    left.push(peer);
                }
                Err(why) => notes.push(format!("{} was not measured from here on: {why}", peer.choice)),
            }
        }
        self.peers = left;
        Ok((measured, notes))
    }
}

impl Peer {
    fn start(
        choice: PeerChoice,
        options: &PeerOptions<'_>,
        group: &Group,
    ) -> Result<Result<Peer, String>, Error> {
        let &PeerOptions { deadline, cuda, .. } = options;
        let rank = group.rank();
        let start = Request::Start(StartRequest {
            peer: choice.name(),
            rank,
            world_size: group.world_size(),
            device: if cuda.is_some() { "cuda" } else { "cpu" },
            local_rank: cuda.unwrap_or(rank),
            timeout_seconds: deadline.as_secs_f64(),
            max_tokens: options.max_tokens,
            hidden_dim: options.hidden_dim,
            multicast: multicast::is_allowed(),
        });
        let mut process = Process::start(options.python);
        let states = match ask(group, &mut process, &start, deadline)? {
            Ok(states) => states,
            Err(why) => return Ok(Err(why)),
        };
        let Some(port) = states.iter().find_map(|state| match state {
            State::Started(port) => *port,
            _ => None,
        }) else {
            return Ok(Err("rank 0 has no port for the others".to_owned()));
        };
        let states = match ask(group, &mut process, &Request::Join { port }, deadline)? {
            Ok(states) => states,
            Err(why) => return Ok(Err(why)),
        };
        let (Some(State::Joined(about)), Ok(process)) = (states.into_iter().next(), process) else {
            return Ok(Err("it did not join its ranks".to_owned()));
        };
        Ok(Ok(Peer { choice, about, process, deadline }))
    }

    fn measure(
        &mut self,
        request: &MeasureRequest,
        group: &Group,
    ) -> Result<Result<PeerRows, String>, Error> {
        let mut times = Vec::new();
        let asked = Request::Measure(request);
        let states = match ask_and_keep(group, Ok(&mut self.process), &asked, self.deadline, &mut times)? {
            Ok(states) => states,
            Err(why) => return Ok(Err(why)),
        };
        let mut ranks = Vec::new();
        for state in states {
            let State::Measured(rows, notes) = state else {
                return Ok(Err("it answered another question".to_owned()));
            };
            ranks.push((rows, notes));
        }
        let same = |rows: &[Summary]| {
            let has_exact_sum =
                |row: &Summary| row.result.as_ref().map(|timed| timed.sum_error.is_none()).ok();
            rows.iter().map(|row| (row.variant.clone(), row.kind, has_exact_sum(row))).collect::<Vec<_>>()
        };
        if ranks.iter().any(|(rows, _)| same(rows) != same(&ranks[0].0)) {
            return Ok(Err("its ranks measured different things".to_owned()));
        }
        // The same on every rank, or the next exchange would not be.
        let trials = request.trials as usize;
        let complete = times.iter().flatten().all(|times: &Vec<f64>| times.len() == trials);
        if !all(group, complete)? {
            return Ok(Err(format!("it did not time {trials} trials")));
        }
        let mut measured = Vec::new();
        for (index, times) in times.into_iter().enumerate() {
            let results = ranks.iter().map(|(rows, _)| rows[index].result.clone());
            let timed: Result<Vec<Timed>, String> = results.collect();
            let result = match (times, timed.map(|ranks| ranks.into_iter().reduce(Timed::or_larger))) {
                (Some(times), Ok(Some(Timed { max_error_ulp, sum_error, operations_per_trial }))) => {
                    Ok(Trials {
                        max_error_ulp,
                        sum_error,
                        operations_per_trial,
                        times_us: slowest(group, &times)?,
                    })
                }
                (_, timed) => Err(timed.err().unwrap_or_default()),
            };
            let Summary { variant, kind, .. } = &ranks[0].0[index];
            measured.push(Measurement { variant: variant.clone(), kind: *kind, result });
        }
        Ok(Ok((measured, ranks.swap_remove(0).1)))
    }
}

/// Like [`ask_and_keep`], for a process that may have failed to start, and a reply without times.
fn ask(
    group: &Group,
    process: &mut Result<Process, String>,
    request: &Request<'_>,
    limit: Duration,
) -> Result<Result<Vec<State>, String>, Error> {
    ask_and_keep(group, process.as_mut().map_err(|why| why.clone()), request, limit, &mut Vec::new())
}

/// Sends a request to this rank's process, and waits until the processes of all ranks have answered or one cannot. Every
/// rank returns the same: the answers in rank order, or the reason why there are none. This rank's times go to `times`, row
/// by row; a row that failed has none.
fn ask_and_keep(
    group: &Group,
    mut process: Result<&mut Process, String>,
    request: &Request<'_>,
    limit: Duration,
    times: &mut Vec<Option<Vec<f64>>>,
) -> Result<Result<Vec<State>, String>, Error> {
    let sent = process.as_mut().map_err(|why| why.clone()).and_then(|process| process.send(request));
    let mut own = match sent {
        Ok(()) => State::Waiting,
        Err(why) => State::Gone(why),
    };
    // Ranks whose deadline is short must hear from each other often.
    let wait = POLL.min(group.deadline() / 4);
    loop {
        if let (State::Waiting, Ok(process)) = (&own, &mut process) {
            own = match process.poll(wait, limit) {
                Ok(None) => State::Waiting,
                Ok(Some(reply)) => state(reply, times),
                Err(why) => State::Gone(why),
            };
        }
        let bytes = serde_json::to_vec(&own).map_err(|error| Error::Failed(error.to_string()))?;
        let mut states: Vec<State> = Vec::new();
        for bytes in group.all_gather(&bytes)? {
            let unreadable = |error| Error::Failed(format!("cannot read a rank's state of a peer: {error}"));
            states.push(serde_json::from_slice(&bytes).map_err(unreadable)?);
        }
        if let Some(why) = trouble(&states) {
            return Ok(Err(why));
        }
        if !states.iter().any(|state| matches!(state, State::Waiting)) {
            return Ok(Ok(states));
        }
    }
}

/// The reason why the ranks' answers are not usable, if so. A missing package comes before an error that it caused.
fn trouble(states: &[State]) -> Option<String> {
    let unavailable = states.iter().find_map(|state| match state {
        State::Unavailable(why, Some(remedy)) => {
            Some(format!("{why}: run `{remedy}`, or name another Python with --python"))
        }
        State::Unavailable(why, None) => Some(why.clone()),
        _ => None,
    });
    unavailable.or_else(|| {
        (0..).zip(states).find_map(|(rank, state): (u32, _)| match state {
            State::Gone(why) => Some(format!("rank {rank}: {why}")),
            _ => None,
        })
    })
}

/// The state after a reply, short enough for a message to the other ranks. The times of its rows go to `times`.
fn state(reply: Reply, times: &mut Vec<Option<Vec<f64>>>) -> State {
    match reply {
        Reply::Working { .. } => State::Waiting,
        Reply::Unavailable { why, remedy } => {
            State::Unavailable(clipped(&why), remedy.map(|remedy| clipped(&remedy)))
        }
        Reply::Started { port } => State::Started(port),
        Reply::Joined { about } => State::Joined(clipped(&about)),
        Reply::Measured { rows, notes } if rows.len() + notes.len() > MOST => {
            State::Gone(format!("it has {} rows and notes, more than {MOST}", rows.len() + notes.len()))
        }
        Reply::Measured { rows, notes } => {
            let summary = |Row { variant, kind, result }| {
                let (result, own) = match result {
                    RowResult::Timed { max_error_ulp, sum_error, operations_per_trial, times_us } => {
                        (Ok(Timed { max_error_ulp, sum_error, operations_per_trial }), Some(times_us))
                    }
                    RowResult::Failed { failed } => (Err(clipped(&failed)), None),
                };
                times.push(own);
                Summary { variant: clipped(&variant), kind, result }
            };
            let notes = notes.iter().map(|note| clipped(note)).collect();
            State::Measured(rows.into_iter().map(summary).collect(), notes)
        }
    }
}

#[cfg(test)]
mod tests {
    use fused_collective::group::rendezvous::MAX_MESSAGE;
    use proptest::{collection::vec, prelude::*};
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        bounded::{Line, for_each_line},
        fuzz::{FEW, cases, count, json_values, replace},
    };

    /// Handles a line that a peer's process wrote. All ranks must be able to learn the result, and everything shown must be
    /// one line. Returns true if the line was a reply.
    fn heed(text: &str) -> bool {
        let Ok(reply) = serde_json::from_str::<Reply>(text) else { return false };
        let mut times = Vec::new();
        let own = state(reply, &mut times);
        let told = serde_json::to_vec(&own).unwrap();
        assert!(told.len() <= MAX_MESSAGE, "{} bytes", told.len());
        let heard: State = serde_json::from_slice(&told).unwrap();
        assert_eq!(serde_json::to_vec(&heard).unwrap(), told);
        let shown =
            |text: &String| assert!(!text.contains(char::is_control) && text.len() <= 1803, "{text:?}");
        match heard {
            State::Measured(rows, notes) => {
                assert!(rows.len() + notes.len() <= MOST && times.len() == rows.len());
                for (Summary { variant, result, .. }, times) in rows.iter().zip(&times) {
                    shown(variant);
                    assert_eq!(result.is_ok(), times.is_some());
                    match result {
                        Ok(timed) => assert!(timed.max_error_ulp.is_finite()),
                        Err(why) => shown(why),
                    }
                }
                notes.iter().for_each(shown);
            }
            State::Unavailable(why, remedy) => [why].iter().chain(&remedy).for_each(shown),
            State::Joined(text) | State::Gone(text) => shown(&text),
            State::Waiting | State::Started(_) => {}
        }
        true
    }

    /// A right reply of every kind.
    fn replies() -> [Value; 6] {
        let timed = json!({"variant": "a", "kind": "fused", "max_error_ulp": 0.5, "operations_per_trial": 20, "times_us": [1.5, 2]});
        let failed = json!({"variant": "b", "kind": "standard", "failed": "wrong"});
        [
            json!({"reply": "working", "on": "its kernels"}),
            json!({"reply": "unavailable", "why": "no", "remedy": "pip install it"}),
            json!({"reply": "started", "port": 29_500}),
            json!({"reply": "joined", "about": "1.0"}),
            json!({"reply": "measured", "rows": [timed.clone(), failed], "notes": ["slow"]}),
            json!({"reply": "measured", "rows": vec![timed; MOST + 1], "notes": []}),
        ]
    }

    #[test]
    fn right_replies_of_every_kind_are_heeded() {
        assert!(replies().iter().all(|reply| heed(&reply.to_string())));
    }

    proptest! {
        #![proptest_config(cases(FEW))]

        /// Whole lines and cut ones, of text and of other bytes.
        #[test]
        fn any_bytes_that_a_peer_writes_are_lines_and_replies_or_none(
            bytes in vec(prop_oneof![4 => any::<u8>(), 1 => Just(b'\n')], 0..200),
            most in 0u64..50,
        ) {
            let mut taken = 0;
            for_each_line(&bytes[..], most, |Line { text, is_cut }| {
                // A byte that is no text is replaced by three.
                assert!(text.len() as u64 <= 3 * most && !text.contains('\n'));
                taken += usize::from(is_cut);
                heed(&text);
                true
            });
            prop_assert!(taken <= bytes.len());
        }

        /// One value anywhere in a right reply is replaced, and the text cut or not.
        #[test]
        fn any_change_of_a_reply_gives_another_or_none(
            which in 0..6usize,
            at in any::<prop::sample::Index>(),
            other in prop_oneof![4 => json_values(), 1 => "\\PC{0,400}|[\u{0}-\u{1f}]{0,400}".prop_map(Value::from)],
            cut in proptest::option::weighted(0.1, any::<prop::sample::Index>()),
        ) {
            let mut reply = replies()[which].clone();
            let count = count(&reply);
            replace(&mut reply, &mut at.index(count), &other);
            let text = reply.to_string();
            match cut {
                None => drop(heed(&text)),
                Some(cut) => {
                    let end = text.floor_char_boundary(cut.index(text.len()));
                    prop_assert!(!heed(&text[..end]) || text[..end].trim() == text.trim(), "{text}");
                }
            }
        }
    }
}
