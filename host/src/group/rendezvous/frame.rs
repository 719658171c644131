//! The messages between ranks, as bytes.
//!
//! ```text
//! 0   magic, "FCRV"
//! 4   protocol version, u16
//! 6   kind, u8
//! 7   code, u8: an offer's or a part's operation, a failure's kind
//! 8   rank, u32: who says hello, whose part this is, who was lost
//! 12  length of the payload in bytes, u32
//! 16  payload
//! ```
//! Integers are little-endian. The header is the same in every version of the protocol, so that ranks of
//! different versions can name each other. The parser reads what anybody may have sent: it takes any bytes,
//! allocates for no more than has arrived, and refuses a length over the receiver's limit at once.

use std::fmt;

use super::{
    super::loss::{How, Lost},
    secret::{Challenge, KEY_BYTES, NONCE_BYTES, TAG_BYTES},
};

/// First bytes of every message.
pub(super) const MAGIC: [u8; 4] = *b"FCRV";
/// The version of these messages.
pub(super) const PROTOCOL: u16 = 2;
/// Bytes before the payload.
pub(super) const HEADER_BYTES: usize = 16;
/// The most bytes of a payload.
pub(super) const MAX_PAYLOAD: usize = 1 << 20;
/// The most bytes of a payload before the other side has proven that it has the secret.
pub(super) const MAX_UNPROVEN: usize = 4 + NONCE_BYTES + KEY_BYTES;

/// The operations that the ranks of a group do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    AllGather,
    Broadcast,
    Barrier,
    ShareFd,
    Farewell,
}

impl Operation {
    const ALL: [Operation; 5] = [
        Operation::AllGather,
        Operation::Broadcast,
        Operation::Barrier,
        Operation::ShareFd,
        Operation::Farewell,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Operation::AllGather => "the all-gather",
            Operation::Broadcast => "the broadcast",
            Operation::Barrier => "the barrier",
            Operation::ShareFd => "the sharing of a file descriptor",
            Operation::Farewell => "the farewell",
        }
    }

    /// The number of parts that rank 0 answers with, in a group of `world_size`.
    pub(super) const fn parts(self, world_size: u32) -> u32 {
        if matches!(self, Operation::AllGather) { world_size } else { 1 }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Between hosts, the first message of a rank.
    Challenge(Challenge),
    /// Rank 0's answer: its own nonce, and the proof that it has the secret.
    Answer { nonce: [u8; NONCE_BYTES], proof: [u8; TAG_BYTES] },
    /// The rank's proof that it has the secret. All that follows is sealed.
    Proof([u8; TAG_BYTES]),
    /// A rank asks rank 0 to join. Between hosts it names its own.
    Hello { rank: u32, world_size: u32, version: String, host: String, config: Vec<u8> },
    /// Rank 0: the group is complete. Between hosts: the host of each rank.
    Welcome { hosts: Vec<String> },
    /// A rank has come to an operation, with its contribution.
    Offer { operation: Operation, bytes: Vec<u8> },
    /// Rank 0: all have come; the contribution of `rank`.
    Part { rank: u32, operation: Operation, bytes: Vec<u8> },
    /// The group is over. In place of a hello: this rank does not join it.
    Failed(Lost),
}

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// They start with something else than the magic.
    Magic,
    /// They are of another version of the protocol.
    Protocol {
        /// The rank that the header names.
        rank: u32,
        /// The version.
        found: u16,
    },
    /// The payload is longer than the receiver takes.
    Length {
        /// Bytes that the header announces.
        bytes: u32,
        /// The most that is taken.
        limit: usize,
    },
    /// The header or payload is not one of any message.
    Content {
        /// The kind that the header names.
        kind: u8,
    },
    /// The seal is not that of a rank with the job's secret: the message was made or changed on its way.
    Seal,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Magic => f.write_str("bytes that are no message of a rank"),
            FrameError::Protocol { found, .. } => {
                write!(f, "a message of protocol version {found}; this program has version {PROTOCOL}")
            }
            FrameError::Length { bytes, limit } => {
                write!(f, "a message of {bytes} bytes; at most {limit} are taken here")
            }
            FrameError::Content { kind } => write!(f, "a broken message of kind {kind}"),
            FrameError::Seal => f.write_str("a message whose seal is not that of the job's secret"),
        }
    }
}

impl std::error::Error for FrameError {}

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const OFFER: u8 = 3;
const PART: u8 = 4;
const FAILED: u8 = 5;
const CHALLENGE: u8 = 6;
const ANSWER: u8 = 7;
const PROOF: u8 = 8;

const HOWS: [How; 5] = [How::Ended, How::GaveUp, How::Late, How::OutOfStep, How::Refused];

impl Frame {
    /// The message as bytes. Its payload must not exceed [`MAX_PAYLOAD`].
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        let (kind, code, rank) = match self {
            Frame::Challenge(Challenge { rank, world_size, key, nonce }) => {
                bytes.extend(world_size.to_le_bytes());
                bytes.extend(key);
                bytes.extend(nonce);
                (CHALLENGE, 0, *rank)
            }
            Frame::Answer { nonce, proof } => {
                bytes.extend(nonce);
                bytes.extend(proof);
                (ANSWER, 0, 0)
            }
            Frame::Proof(proof) => {
                bytes.extend(proof);
                (PROOF, 0, 0)
            }
            Frame::Hello { rank, world_size, version, host, config } => {
                bytes.extend(world_size.to_le_bytes());
                add_text(&mut bytes, version);
                add_text(&mut bytes, host);
                bytes.extend(config);
                (HELLO, 0, *rank)
            }
            Frame::Welcome { hosts } => {
                hosts.iter().for_each(|host| add_text(&mut bytes, host));
                (WELCOME, 0, 0)
            }
            Frame::Offer { operation, bytes: payload } => {
                bytes.extend(payload);
                (OFFER, *operation as u8, 0)
            }
            Frame::Part { rank, operation, bytes: payload } => {
                bytes.extend(payload);
                (PART, *operation as u8, *rank)
            }
            Frame::Failed(Lost { rank, how, detail }) => {
                bytes.extend(detail.as_bytes());
                (FAILED, *how as u8, *rank)
            }
        };
        let length = bytes.len() - HEADER_BYTES;
        debug_assert!(length <= MAX_PAYLOAD);
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL.to_le_bytes());
        bytes[6] = kind;
        bytes[7] = code;
        bytes[8..12].copy_from_slice(&rank.to_le_bytes());
        bytes[12..16].copy_from_slice(&(length as u32).to_le_bytes());
        bytes
    }

    /// The message at the start of `bytes` and how many bytes it takes; `None` if more must arrive first.
    ///
    /// # Errors
    /// Whatever follows, these bytes are no message with a payload of at most `limit` bytes.
    pub(super) fn parse(bytes: &[u8], limit: usize) -> Result<Option<(Frame, usize)>, FrameError> {
        let Some(length) = Frame::length(bytes, limit)? else { return Ok(None) };
        let Some(message) = bytes.get(..length) else { return Ok(None) };
        let (header, payload) = message.split_at(HEADER_BYTES);
        let (kind, code) = (header[6], header[7]);
        let frame =
            Frame::decode(kind, code, word(header, 8), payload).ok_or(FrameError::Content { kind })?;
        Ok(Some((frame, length)))
    }

    /// The bytes of the message that begins with `bytes`, by its header; `None` if more must arrive first.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), but for the payload, which is not looked at.
    pub(super) fn length(bytes: &[u8], limit: usize) -> Result<Option<usize>, FrameError> {
        let magic = &bytes[..bytes.len().min(MAGIC.len())];
        if !MAGIC.starts_with(magic) {
            return Err(FrameError::Magic);
        }
        let Some(header) = bytes.get(..HEADER_BYTES) else { return Ok(None) };
        let (rank, payload) = (word(header, 8), word(header, 12));
        let found = u16::from_le_bytes([header[4], header[5]]);
        if found != PROTOCOL {
            return Err(FrameError::Protocol { rank, found });
        }
        if payload as usize > limit {
            return Err(FrameError::Length { bytes: payload, limit });
        }
        Ok(Some(HEADER_BYTES + payload as usize))
    }

    fn decode(kind: u8, code: u8, rank: u32, payload: &[u8]) -> Option<Frame> {
        let operation = || Operation::ALL.into_iter().find(|&operation| operation as u8 == code);
        // What a message does not use is 0: one that was changed on its way is none.
        if matches!(kind, CHALLENGE | ANSWER | PROOF | HELLO | WELCOME) && code != 0
            || matches!(kind, ANSWER | PROOF | WELCOME | OFFER) && rank != 0
        {
            return None;
        }
        Some(match kind {
            CHALLENGE => {
                let (world_size, rest) = payload.split_first_chunk()?;
                let (key, nonce) = rest.split_first_chunk()?;
                let (world_size, nonce) = (u32::from_le_bytes(*world_size), nonce.try_into().ok()?);
                Frame::Challenge(Challenge { rank, world_size, key: *key, nonce })
            }
            ANSWER => {
                let (nonce, proof) = payload.split_first_chunk()?;
                Frame::Answer { nonce: *nonce, proof: proof.try_into().ok()? }
            }
            PROOF => Frame::Proof(payload.try_into().ok()?),
            HELLO => {
                let (world_size, rest) = payload.split_first_chunk()?;
                let (version, rest) = take_text(rest)?;
                let (host, config) = take_text(rest)?;
                let (world_size, config) = (u32::from_le_bytes(*world_size), config.to_vec());
                Frame::Hello { rank, world_size, version, host, config }
            }
            WELCOME => {
                let (mut hosts, mut rest) = (Vec::new(), payload);
                while !rest.is_empty() {
                    let (host, others) = take_text(rest)?;
                    hosts.push(host);
                    rest = others;
                }
                Frame::Welcome { hosts }
            }
            OFFER => Frame::Offer { operation: operation()?, bytes: payload.to_vec() },
            PART => Frame::Part { rank, operation: operation()?, bytes: payload.to_vec() },
            FAILED => Frame::Failed(Lost {
                rank,
                how: HOWS.into_iter().find(|&how| how as u8 == code)?,
                detail: str::from_utf8(payload).ok()?.to_owned(),
            }),
            _ => return None,
        })
    }
}

fn add_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// The text at the start of `bytes`, behind its length, and what follows it.
fn take_text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    Some((str::from_utf8(text).ok()?.to_owned(), rest))
}

/// The little-endian word at `bytes[at..at + 4]`, which must be there.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::fuzz::{FEW, cases};

    fn frames() -> impl Strategy<Value = Frame> {
        let operation = || (0..Operation::ALL.len()).prop_map(|index| Operation::ALL[index]);
        let bytes = || vec(any::<u8>(), 0..300);
        prop_oneof![
            (any::<u32>(), any::<u32>(), any::<[u8; 32]>(), any::<[u8; 32]>()).prop_map(
                |(rank, world_size, key, nonce)| Frame::Challenge(Challenge { rank, world_size, key, nonce })
            ),
            any::<[[u8; 32]; 2]>().prop_map(|[nonce, proof]| Frame::Answer { nonce, proof }),
            any::<[u8; 32]>().prop_map(Frame::Proof),
            (any::<u32>(), any::<u32>(), ".*", ".*", bytes()).prop_map(
                |(rank, world_size, version, host, config)| {
                    Frame::Hello { rank, world_size, version, host, config }
                }
            ),
            vec(".*", 0..4).prop_map(|hosts| Frame::Welcome { hosts }),
            (operation(), bytes()).prop_map(|(operation, bytes)| Frame::Offer { operation, bytes }),
            (any::<u32>(), operation(), bytes()).prop_map(|(rank, operation, bytes)| Frame::Part {
                rank,
                operation,
                bytes
            }),
            (any::<u32>(), 0..HOWS.len(), ".*")
                .prop_map(|(rank, how, detail)| { Frame::Failed(Lost { rank, how: HOWS[how], detail }) }),
        ]
    }

    proptest! {
        #![proptest_config(cases(FEW))]

        #[test]
        fn what_is_encoded_is_parsed_back(frame in frames(), follows in vec(any::<u8>(), 0..40)) {
            let mut bytes = frame.encode();
            let length = bytes.len();
            bytes.extend(follows);
            prop_assert_eq!(Frame::parse(&bytes, MAX_PAYLOAD), Ok(Some((frame, length))));
        }

        #[test]
        fn a_truncated_message_asks_for_more(frame in frames(), cut in any::<prop::sample::Index>()) {
            let bytes = frame.encode();
            prop_assert_eq!(Frame::parse(&bytes[..cut.index(bytes.len())], MAX_PAYLOAD), Ok(None));
        }

        #[test]
        fn any_bytes_are_taken_without_a_panic(bytes in vec(any::<u8>(), 0..200)) {
            if let Ok(Some((_, taken))) = Frame::parse(&bytes, MAX_PAYLOAD) {
                prop_assert!(taken <= bytes.len());
            }
        }

        #[test]
        fn any_payload_behind_a_right_header_is_taken_without_a_panic(
            kind in 0_u8..10, code in 0_u8..8, length in 0_u32..80, payload in vec(any::<u8>(), 0..80)
        ) {
            let mut bytes = Frame::Welcome { hosts: Vec::new() }.encode();
            bytes[6] = kind;
            bytes[7] = code;
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            bytes.extend(payload);
            if let Ok(Some((_, taken))) = Frame::parse(&bytes, MAX_PAYLOAD) {
                prop_assert_eq!(taken, HEADER_BYTES + length as usize);
            }
        }
    }

    #[test]
    fn a_wrong_first_byte_is_refused_before_the_header_is_complete() {
        assert_eq!(Frame::parse(b"G", MAX_PAYLOAD), Err(FrameError::Magic));
        assert_eq!(Frame::parse(b"FC", MAX_PAYLOAD), Ok(None));
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_the_payload_arrives() {
        let mut bytes = Frame::Welcome { hosts: Vec::new() }.encode();
        bytes[12..16].copy_from_slice(&101_u32.to_le_bytes());
        assert_eq!(Frame::parse(&bytes, 100), Err(FrameError::Length { bytes: 101, limit: 100 }));
    }

    /// The limit of [`MAX_UNPROVEN`] lets all messages of the handshake through.
    #[test]
    fn the_messages_of_the_handshake_are_within_their_limit() {
        let challenge = Challenge { rank: 1, world_size: 2, key: [3; 32], nonce: [4; 32] };
        for frame in [
            Frame::Challenge(challenge),
            Frame::Answer { nonce: [5; 32], proof: [6; 32] },
            Frame::Proof([7; 32]),
        ] {
            let bytes = frame.encode();
            assert_eq!(Frame::parse(&bytes, MAX_UNPROVEN), Ok(Some((frame, bytes.len()))));
        }
    }

    #[test]
    fn another_protocol_version_is_named_with_its_rank() {
        let mut bytes = Frame::Part { rank: 3, operation: Operation::Barrier, bytes: Vec::new() }.encode();
        bytes[4] = 9;
        assert_eq!(Frame::parse(&bytes, MAX_PAYLOAD), Err(FrameError::Protocol { rank: 3, found: 9 }));
    }
}
