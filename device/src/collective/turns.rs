//! Which tokens a team completes in a collective of two hops, and in which order.
//!
//! A rank owns one of every `world_size` tokens. Its own tokens are dealt out to its teams in turn, and so are the
//! others', beginning with the team after the one that got the last of its own: so as many teams as there are tokens
//! have work.
//!
//! In each turn a team sums a token that its rank owns, and then gets one from each other rank, those of the turn before:
//! while owners sum tokens of one turn, the results of the turn before are on their way, and nobody waits for a sum that
//! has only just begun.
//!
//! # Why ranks cannot wait in a circle
//! Call a sum as high as the index of its token among its rank's own, and what a team gets after it half a step higher.
//! Whoever waits, waits for what is lower, whatever the grids of the ranks are:
//! - A sum waits for what its team got in the turn before, after an own token of a lower index; and for other ranks'
//!   pushes of their rows. These wait for nothing, or are made in a sum of a lower index than the token that they are
//!   for: where a team deals with `t` others it pushes for the one `t` later than the own one that it sums, less fewer
//!   than `t`.
//! - What a team gets waits for the sum before it, and for its owner's sum of it. Its index is at most that of the own
//!   token before it: it comes a turn late, and began fewer than `t` after the own ones.
//! - A team without a token of its own only gets what others sum, and nobody waits for it.

use fused_collective_core::plan::owned_tokens;

use crate::params::{Group, Shape};

/// A token of a round.
#[derive(Clone, Copy)]
pub(super) struct Token {
    /// Which of the round's it is.
    pub(super) token: u32,
    /// The rank that sums it.
    pub(super) owner: u32,
    /// Which of its owner's tokens it is.
    pub(super) index: u32,
}

/// The tokens of a round as the rank of `group` sees them: its own, and the others.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a, const N: usize> {
    group: &'a Group,
    shape: &'a Shape,
}

impl<'a, const N: usize> Tokens<'a, N> {
    /// Those of a round, in a kernel for at most `N` ranks.
    #[inline(always)]
    pub(super) fn new(group: &'a Group, shape: &'a Shape) -> Self {
        Tokens { group, shape }
    }

    /// How many ranks there are.
    #[inline(always)]
    pub(super) fn ranks(self) -> u32 {
        if N == 2 { 2 } else { self.group.world_size }
    }

    /// How many this rank owns.
    #[inline(always)]
    fn owned(self) -> u32 {
        owned_tokens(self.shape.tokens as u64, self.group.rank, self.ranks()) as u32
    }

    /// The `index`-th of this rank's own, if there are so many.
    #[inline(always)]
    pub(super) fn own(self, index: u32) -> Option<Token> {
        let token = index * self.ranks() + self.group.rank;
        (index < self.owned()).then_some(Token { token, owner: self.group.rank, index })
    }

    /// The `index`-th of the others', if there are so many; none for a negative one.
    #[inline(always)]
    pub(super) fn other(self, index: i32) -> Option<Token> {
        let others = (self.ranks() - 1).max(1);
        let (turn, place) = (index as u32 / others, index as u32 % others);
        let owner = if place < self.group.rank { place } else { place + 1 };
        let is_there = (index as u32) < self.shape.tokens - self.owned();
        is_there.then(|| Token { token: turn * self.ranks() + owner, owner, index: turn })
    }

    /// Which of the others' tokens team `team` of `teams` gets first: from then on, it is one of every `teams`.
    #[inline(always)]
    pub(super) fn first_other(self, team: u32, teams: u32) -> i32 {
        let taken = self.owned() % teams.max(1);
        (if team < taken { team + teams - taken } else { team - taken }) as i32
    }

    /// The same, as many tokens before it as the team gets in a turn: so it is a turn late. A team that has no token of
    /// its own need not be.
    #[inline(always)]
    pub(super) fn first_late(self, team: u32, teams: u32) -> i32 {
        let first = self.first_other(team, teams);
        if team < self.owned() { first - ((self.ranks() - 1) * teams) as i32 } else { first }
    }

    /// Whether a team whose next own token is the `own`-th, and whose next one of the others' is the `other`-th, has work.
    #[inline(always)]
    pub(super) fn remain(self, own: u32, other: i32) -> bool {
        let owned = self.owned();
        own < owned || other < (self.shape.tokens - owned) as i32
    }
}
