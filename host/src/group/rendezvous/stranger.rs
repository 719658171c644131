//! A connection to rank 0 of a process that has not said which rank it is.
//!
//! Within a host the kernel vouches for its user. Between hosts it must prove that it has the job's secret, and until then it
//! costs rank 0 one connection and a few hundred bytes, for [`HANDSHAKE`] at most.

use std::{
    net::IpAddr,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::{
    channel::Channel,
    error::Error,
    frame::{Frame, FrameError, MAX_UNPROVEN, PROTOCOL},
    network::{Network, other_end},
    secret::{Challenge, Handshake, Side, key_digest, nonce},
};

/// The time that a connection from another host may take to prove that it has the secret.
const HANDSHAKE: Duration = Duration::from_secs(3);

const NONCE: &str = "draw random numbers";

/// See the [module](self).
pub(super) struct Stranger {
    pub(super) channel: Channel,
    /// The other end's address, between hosts.
    pub(super) from: Option<IpAddr>,
    gate: Gate,
    /// The end of its time to prove itself.
    due: Option<Instant>,
}

/// The message that is expected next.
enum Gate {
    Challenge,
    Proof(Handshake, Challenge),
    /// Any; between hosts as the rank, and of the size, that the proof is for.
    Word(Option<(u32, u32)>),
}

/// The outcome of hearing a stranger.
pub(super) enum Said {
    /// Nothing yet.
    Nothing,
    /// A message, from a process that may be a rank.
    Word(Frame),
    /// Bytes that such a process would not send.
    Noise(FrameError),
    /// It is not heard any more.
    Gone,
    /// It has not proven that it has the secret, and will not.
    Unproven(&'static str),
}

impl Stranger {
    /// Of a process on this host, for which the kernel has vouched.
    pub(super) fn of_this_host(socket: OwnedFd, limit: usize) -> Self {
        Stranger { channel: Channel::new(socket, limit), from: None, gate: Gate::Word(None), due: None }
    }

    /// Of a process anywhere.
    pub(super) fn of_network(socket: OwnedFd) -> Self {
        let (from, due) = (other_end(&socket), Some(Instant::now() + HANDSHAKE));
        Stranger { channel: Channel::new(socket, MAX_UNPROVEN), from, gate: Gate::Challenge, due }
    }

    /// The end of the time that it has to prove itself, unless it has.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Takes in what has arrived. Of a rank that has proven itself, messages have up to `limit` bytes.
    pub(super) fn hear(&mut self, network: Option<&Network>, key: &str, limit: usize) -> Result<Said, Error> {
        let connected = self.channel.fill();
        loop {
            let frame = match self.channel.next() {
                Ok(Some(frame)) => frame,
                Ok(None) if !connected => return Ok(self.end("it left")),
                Ok(None) if self.due.is_some_and(|due| Instant::now() >= due) => {
                    return Ok(Said::Unproven("it did not prove in time that it has the job's secret"));
                }
                Ok(None) => return Ok(Said::Nothing),
                Err(error) if self.due.is_none() => return Ok(Said::Noise(error)),
                Err(FrameError::Protocol { .. }) => {
                    return Ok(Said::Unproven("it has another version of the protocol"));
                }
                Err(_) => return Ok(Said::Unproven("it sent something else than a rank does")),
            };
            match (&self.gate, frame, network) {
                (Gate::Word(None), frame, _) => return Ok(Said::Word(frame)),
                (&Gate::Word(Some(proven)), frame, _) => {
                    let is_other = match &frame {
                        Frame::Hello { rank, world_size, .. } => (*rank, *world_size) != proven,
                        Frame::Failed(lost) => lost.rank != proven.0,
                        _ => true,
                    };
                    return Ok(if is_other { Said::Gone } else { Said::Word(frame) });
                }
                (Gate::Challenge, Frame::Challenge(challenge), Some(network)) => {
                    if challenge.key != key_digest(key) {
                        return Ok(Said::Unproven("it is a rank of a job or group with another key"));
                    }
                    let nonce = nonce().map_err(Error::system(NONCE))?;
                    let handshake = Handshake::new(&network.secret, PROTOCOL, &challenge, &nonce);
                    self.channel.queue(&Frame::Answer { nonce, proof: handshake.proof(Side::Root) });
                    self.channel.flush();
                    self.gate = Gate::Proof(handshake, challenge);
                }
                (Gate::Proof(handshake, challenge), Frame::Proof(proof), _)
                    if handshake.is_proof(Side::Rank, &proof) =>
                {
                    self.channel.seal(handshake.seal(Side::Root));
                    self.channel.set_limit(limit);
                    self.due = None;
                    self.gate = Gate::Word(Some((challenge.rank, challenge.world_size)));
                }
                _ => return Ok(self.end("it sent something else than a rank does")),
            }
        }
    }

    fn end(&self, why: &'static str) -> Said {
        match self.gate {
            Gate::Challenge => Said::Unproven(why),
            // A rank leaves at this point if the answer is not that of its own secret.
            Gate::Proof(..) => Said::Unproven("it does not have this rank's secret"),
            Gate::Word(_) => Said::Gone,
        }
    }
}

/// Sends a rank's challenge over `channel`, and waits for the proof of rank 0, and for `end` at most. Returns the channel, which
/// is sealed; `None` if it ended before.
pub(super) fn prove(
    mut channel: Channel,
    network: &Network,
    (rank, world_size, key): (u32, u32, &str),
    end: Instant,
) -> Result<Option<Channel>, Error> {
    let challenge =
        Challenge { rank, world_size, key: key_digest(key), nonce: nonce().map_err(Error::system(NONCE))? };
    channel.queue(&Frame::Challenge(challenge));
    loop {
        channel.flush();
        let connected = channel.fill();
        match channel.next() {
            Ok(Some(Frame::Answer { nonce, proof })) => {
                let handshake = Handshake::new(&network.secret, PROTOCOL, &challenge, &nonce);
                if !handshake.is_proof(Side::Root, &proof) {
                    return Err(Error::Unproven { address: network.address.clone() });
                }
                channel.queue(&Frame::Proof(handshake.proof(Side::Rank)));
                channel.seal(handshake.seal(Side::Rank));
                return Ok(Some(channel));
            }
            // Nothing that anybody may have sent is believed, not even that the group has failed.
            Ok(Some(_)) => return Err(Error::Unproven { address: network.address.clone() }),
            Ok(None) if !connected || Instant::now() >= end => return Ok(None),
            Ok(None) => super::channel::wait_for(&mut [channel.poll_fd()], Some(end))?,
            Err(error) => return Err(Error::Protocol(error)),
        }
    }
}
