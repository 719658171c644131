//! The secret of a job between hosts: only who has it joins, and it is never sent.
//!
//! A rank begins with a [`Challenge`]. Rank 0 answers with a nonce of its own and a proof, and the rank with its proof:
//!
//! ```text
//! terms      = protocol, rank, world size, SHA-256(key), nonce of the rank, nonce of rank 0
//! proof of S = HMAC-SHA256(SHA-256(secret), "... proof of S", terms)     S: rank 0, or the rank
//! seal of S  = HMAC-SHA256(SHA-256(secret), "... seal of S", terms)      the key of all that S sends from there on
//! tag        = HMAC-SHA256(seal of S, number of the message, message)
//! ```
//!
//! A proof is of one role, one rank, one job and one connection: it cannot be reflected or replayed, as each side has drawn a
//! nonce. A tag behind every message keeps who can write to the network from changing, repeating, dropping or adding one.
//! Contents are not encrypted: they are what ranks set a group up with, and say nothing of tensors.
//!
//! Who sees a handshake can try secrets against it, so a secret must be long and random. A short one is refused.

use std::{fmt, io};

use hmac::{Hmac, KeyInit as _, Mac as _};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest as _, Sha256};

/// Bytes of a nonce.
pub(super) const NONCE_BYTES: usize = 32;
/// Bytes of a key's digest.
pub(super) const KEY_BYTES: usize = 32;
/// Bytes of a proof, and of the tag behind a message.
pub(super) const TAG_BYTES: usize = 32;

/// The fewest and the most characters of a secret. The fewest are 128 bits in hexadecimal digits.
const CHARACTERS: std::ops::RangeInclusive<usize> = 32..=1024;

/// A text that all ranks of a job have, and nobody else.
#[derive(Clone)]
pub struct Secret(
    /// The digest of the text.
    [u8; TAG_BYTES],
);

/// The error of a text that is not fit to be a secret. It does not show the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecretError {
    /// Characters of the text.
    characters: usize,
}

impl Secret {
    /// Takes 32 to 1024 visible characters of ASCII, which should be random. White space around them does not count.
    ///
    /// # Errors
    /// There are fewer or more, or others.
    pub fn new(text: &str) -> Result<Self, SecretError> {
        let text = text.trim();
        if CHARACTERS.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(Secret(Sha256::digest(text).into()));
        }
        Err(SecretError { characters: text.chars().count() })
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl fmt::Display for SecretError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (characters, least, most) = (self.characters, CHARACTERS.start(), CHARACTERS.end());
        write!(
            f,
            "{characters} characters are no secret: use {least} to {most} visible ones of ASCII, drawn at random, such \
             as those of `openssl rand -hex 32`"
        )
    }
}

impl std::error::Error for SecretError {}

/// The first message of a rank to rank 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    pub(super) rank: u32,
    pub(super) world_size: u32,
    /// The [digest](key_digest) of the job's key.
    pub(super) key: [u8; KEY_BYTES],
    pub(super) nonce: [u8; NONCE_BYTES],
}

/// A digest of a key of any length.
pub(super) fn key_digest(key: &str) -> [u8; KEY_BYTES] {
    Sha256::digest(key).into()
}

/// Random bytes of the system, which nobody can foretell.
pub(super) fn nonce() -> io::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    match getrandom(&mut nonce, GetRandomFlags::empty())? {
        NONCE_BYTES => Ok(nonce),
        // So few bytes come whole, or not at all.
        _ => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
    }
}

/// The side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Rank 0, which listens.
    Root,
    /// The rank that has connected.
    Rank,
}

/// One handshake, as both sides know it once each has the other's nonce.
pub(super) struct Handshake {
    secret: Secret,
    terms: Vec<u8>,
}

impl Handshake {
    pub(super) fn new(
        secret: &Secret,
        protocol: u16,
        challenge: &Challenge,
        root: &[u8; NONCE_BYTES],
    ) -> Self {
        let Challenge { rank, world_size, key, nonce } = challenge;
        let mut terms = protocol.to_le_bytes().to_vec();
        terms.extend(rank.to_le_bytes());
        terms.extend(world_size.to_le_bytes());
        for part in [key, nonce, root] {
            terms.extend(part);
        }
        Handshake { secret: secret.clone(), terms }
    }

    /// The proof that `side` has the secret.
    pub(super) fn proof(&self, side: Side) -> [u8; TAG_BYTES] {
        self.mac("proof", side).finalize().into_bytes().into()
    }

    /// True if `proof` is the one of `side`. The time that this takes says nothing of the right one.
    pub(super) fn is_proof(&self, side: Side, proof: &[u8; TAG_BYTES]) -> bool {
        self.mac("proof", side).verify_slice(proof).is_ok()
    }

    /// The seal of the messages that `side` sends and receives.
    pub(super) fn seal(&self, side: Side) -> Seal {
        let other = if side == Side::Root { Side::Rank } else { Side::Root };
        let way =
            |side| Way { mac: hmac(&self.mac("seal", side).finalize().into_bytes().into()), messages: 0 };
        Seal { sends: way(side), receives: way(other) }
    }

    fn mac(&self, purpose: &str, side: Side) -> Hmac<Sha256> {
        let of = if side == Side::Root { "rank 0" } else { "a rank" };
        let mut mac = hmac(&self.secret.0);
        mac.update(format!("fused-collective rendezvous: {purpose} of {of}\0").as_bytes());
        mac.update(&self.terms);
        mac
    }
}

/// The tags of both ways of a connection.
pub(super) struct Seal {
    sends: Way,
    receives: Way,
}

struct Way {
    /// With the key, before a message.
    mac: Hmac<Sha256>,
    messages: u64,
}

impl Way {
    fn next(&mut self, message: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(&self.messages.to_le_bytes());
        mac.update(message);
        // A number comes once: 2^64 messages are more than any connection carries.
        self.messages += 1;
        mac
    }
}

impl Seal {
    /// The tag of the next message that is sent.
    pub(super) fn next_sent(&mut self, message: &[u8]) -> [u8; TAG_BYTES] {
        self.sends.next(message).finalize().into_bytes().into()
    }

    /// True if the next message that is received is this one, by its tag.
    pub(super) fn is_next_received(&mut self, message: &[u8], tag: &[u8; TAG_BYTES]) -> bool {
        self.receives.next(message).verify_slice(tag).is_ok()
    }
}

fn hmac(key: &[u8; TAG_BYTES]) -> Hmac<Sha256> {
    // HMAC fills a key up to a block with zeros.
    let mut block = [0; 64];
    block[..TAG_BYTES].copy_from_slice(key);
    Hmac::new(&block.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{FEW, cases};

    const TEXT: &str = "0123456789abcdef0123456789abcdef";

    fn secret() -> Secret {
        Secret::new(TEXT).expect("a secret")
    }

    fn challenge() -> Challenge {
        Challenge { rank: 3, world_size: 8, key: key_digest("job"), nonce: [1; NONCE_BYTES] }
    }

    #[test]
    fn a_secret_that_is_short_or_has_other_characters_is_refused_and_not_shown() {
        for text in ["", "hunter2", &TEXT[1..], &"x".repeat(1025), &format!("{TEXT} {TEXT}"), &"é".repeat(40)]
        {
            let error = Secret::new(text).expect_err("refused").to_string();
            assert!(error.contains("openssl rand -hex 32"), "{error}");
            assert!(text.is_empty() || !error.contains(text), "{error}");
        }
        assert!(Secret::new(&format!(" {TEXT}\n")).is_ok());
        assert_eq!(format!("{:?}", secret()), "Secret(..)");
    }

    #[test]
    fn a_proof_is_of_one_side_rank_job_size_secret_and_connection() {
        let right = Handshake::new(&secret(), 2, &challenge(), &[2; NONCE_BYTES]);
        let proof = right.proof(Side::Rank);
        assert!(right.is_proof(Side::Rank, &proof) && !right.is_proof(Side::Root, &proof));
        let other_secret = Secret::new(&TEXT.replace('f', "e")).expect("a secret");
        let others = [
            Handshake::new(&other_secret, 2, &challenge(), &[2; NONCE_BYTES]),
            Handshake::new(&secret(), 3, &challenge(), &[2; NONCE_BYTES]),
            Handshake::new(&secret(), 2, &challenge(), &[3; NONCE_BYTES]),
            Handshake::new(&secret(), 2, &Challenge { rank: 4, ..challenge() }, &[2; NONCE_BYTES]),
            Handshake::new(&secret(), 2, &Challenge { world_size: 9, ..challenge() }, &[2; NONCE_BYTES]),
            Handshake::new(
                &secret(),
                2,
                &Challenge { key: key_digest("b"), ..challenge() },
                &[2; NONCE_BYTES],
            ),
            Handshake::new(
                &secret(),
                2,
                &Challenge { nonce: [9; NONCE_BYTES], ..challenge() },
                &[2; NONCE_BYTES],
            ),
        ];
        assert!(others.iter().all(|other| !other.is_proof(Side::Rank, &proof)));
    }

    #[test]
    fn a_message_is_taken_once_and_in_its_place_and_not_by_its_sender() {
        let handshake = Handshake::new(&secret(), 2, &challenge(), &[2; NONCE_BYTES]);
        let (mut root, mut rank) = (handshake.seal(Side::Root), handshake.seal(Side::Rank));
        let tags = [root.next_sent(b"one"), root.next_sent(b"two")];
        assert!(!handshake.seal(Side::Rank).is_next_received(b"two", &tags[1]), "dropped");
        assert!(!handshake.seal(Side::Root).is_next_received(b"one", &tags[0]), "reflected");
        assert!(rank.is_next_received(b"one", &tags[0]));
        assert!(!rank.is_next_received(b"one", &tags[0]), "repeated");
    }

    #[test]
    fn nonces_differ() {
        assert_ne!(nonce().expect("a nonce"), nonce().expect("a nonce"));
    }

    proptest! {
        #![proptest_config(cases(FEW))]

        #[test]
        fn any_text_is_a_secret_or_refused(text in ".{0,80}") {
            if let Err(error) = Secret::new(&text) {
                prop_assert!(!error.to_string().is_empty());
            }
        }

        #[test]
        fn any_change_of_a_sealed_message_is_seen(
            message in proptest::collection::vec(any::<u8>(), 0..100),
            at in any::<prop::sample::Index>(),
            bit in 0_u32..8,
        ) {
            let handshake = Handshake::new(&secret(), 2, &challenge(), &[2; NONCE_BYTES]);
            let mut bytes = message.clone();
            bytes.extend(handshake.seal(Side::Root).next_sent(&message));
            let is_right = |bytes: &[u8]| {
                let (message, tag) = bytes.split_last_chunk().expect("a tag");
                handshake.seal(Side::Rank).is_next_received(message, tag)
            };
            prop_assert!(is_right(&bytes));
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(!is_right(&bytes));
        }
    }
}
