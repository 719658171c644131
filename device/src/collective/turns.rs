//! Which tokens a team completes in a collective of two hops, and in which order.
//!
//! A rank owns one of every `world_size` tokens. Its own tokens are dealt out to its teams in turn, and so are the
//! others', beginning with the team after the one that got the last of its own: so as many teams as there are tokens
//! have work.
//!
//! In each turn a team sums a token that its rank owns, and then gets as many of the others' as there are other ranks, of
//! the turn before: while owners sum tokens of one turn, the results of the turn before are on their way, and nobody waits
//! for a sum that has only just begun.
//!
//! # Why ranks cannot wait in a circle
//! Call turn `k` of team `i` of `t` as high as `k * t + i`, the index of the own token that it sums then, if there still is
//! one. What it gets in that turn is half a step higher. Whoever waits, waits for what is lower, whatever the grids of the
//! ranks are:
//! - A sum waits for what its team got in earlier turns; and for other ranks' pushes of their rows. These come before the
//!   first turn and wait for nothing, or come in a sum of a lower index: with two ranks, sum `k * t + i` pushes for the
//!   other's token `(k + 1) * t + f`, where `f`, the first that the team gets, is more than `i - t`.
//! - What a team gets in turn `k` waits for its sum of that turn, and for its owner's, whose index is less than `k * t`: it
//!   comes a turn late, and `f` is less than `t`.
//! - A team without a token of its own pushes before it waits for anything. Then it only gets, and nobody waits for that.

use fused_collective_core::plan::owned_tokens;

use crate::launch::{Group, Shape};

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

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use super::*;
    use crate::launch::Address;

    /// What a team does next: all of it as `sharded` does it.
    #[derive(Clone, Copy)]
    enum Step {
        Push(u32),
        Sum(u32),
        Get(u32),
    }

    /// The steps of a team, in order. `ahead` is how many rows it pushes before its first sum; 0 is all.
    fn steps(tokens: Tokens<'_, 8>, team: u32, teams: u32, ahead: u32) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut other = tokens.first_other(team, teams);
        let mut pushed = 0;
        while (ahead == 0 || pushed < ahead)
            && let Some(Token { token, .. }) = tokens.other(other)
        {
            steps.push(Step::Push(token));
            other += teams as i32;
            pushed += 1;
        }
        let (mut own, mut other) = (team, tokens.first_late(team, teams));
        while tokens.remain(own, other) {
            if let Some(Token { token, .. }) = tokens.own(own) {
                steps.push(Step::Sum(token));
                let next = tokens.other(other + ((ahead + 1) * teams) as i32);
                steps.extend(next.filter(|_| ahead > 0).map(|next| Step::Push(next.token)));
            }
            own += teams;
            for _ in 1..tokens.ranks() {
                steps.extend(tokens.other(other).map(|other| Step::Get(other.token)));
                other += teams as i32;
            }
        }
        steps
    }

    /// Has all teams of all ranks take their steps, each as soon as it need not wait, and holds that they come to their
    /// ends, and that each rank pushes, sums and gets every token that it has to, once.
    fn check(count: u32, grids: &[u32], ahead: u32) {
        let ranks = grids.len() as u32;
        let shape = Shape::of_rows(u64::from(count), 32).unwrap();
        let groups: Vec<Group> = (0..ranks)
            .map(|rank| Group {
                regions: [Address::NULL; 8],
                state: Address::NULL,
                status: Address::NULL,
                slot_bytes: 0,
                timeout_ns: 0,
                world_size: ranks,
                rank,
            })
            .collect();
        let mut teams: Vec<(u32, Vec<Step>, usize)> = Vec::new();
        for (group, &grid) in groups.iter().zip(grids) {
            let tokens = Tokens::new(group, &shape);
            teams.extend((0..grid).map(|team| (group.rank, steps(tokens, team, grid, ahead), 0)));
        }
        let table = || vec![vec![0; count as usize]; ranks as usize];
        let (mut pushed, mut summed, mut got) = (table(), vec![0; count as usize], table());
        let mut moves = true;
        while moves {
            moves = false;
            for (rank, steps, next) in &mut teams {
                let rank = *rank as usize;
                while let Some(&step) = steps.get(*next) {
                    match step {
                        Step::Push(token) => pushed[rank][token as usize] += 1,
                        Step::Sum(token) => {
                            let is_there = |other: usize| other == rank || pushed[other][token as usize] > 0;
                            if !(0..ranks as usize).all(is_there) {
                                break;
                            }
                            summed[token as usize] += 1;
                        }
                        Step::Get(token) if summed[token as usize] == 0 => break,
                        Step::Get(token) => got[rank][token as usize] += 1,
                    }
                    *next += 1;
                    moves = true;
                }
            }
        }
        let what = (count, grids, ahead);
        assert!(
            teams.iter().all(|(_, steps, next)| *next == steps.len()),
            "teams wait in a circle: {what:?}"
        );
        for (token, owner) in (0..count).map(|token| (token as usize, token % ranks)) {
            assert_eq!(summed[token], 1, "{what:?}");
            for rank in 0..ranks as usize {
                let is_others = u32::from(rank as u32 != owner);
                assert_eq!([pushed[rank][token], got[rank][token]], [is_others; 2], "{what:?}");
            }
        }
    }

    #[test]
    fn two_ranks_of_any_small_grids_do_everything_once_and_do_not_wait_in_a_circle() {
        for count in 1..=40 {
            for first in 1..=count.min(12) {
                for second in 1..=count.min(12) {
                    check(count, &[first, second], 0);
                    check(count, &[first, second], 1);
                }
            }
        }
    }

    #[test]
    fn larger_groups_of_random_grids_do_everything_once_and_do_not_wait_in_a_circle() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for ranks in 3..=8 {
            for count in 1..=40 {
                for _ in 0..40 {
                    let mut grid = || {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        1 + random as u32 % count.min(12)
                    };
                    let grids: Vec<u32> = (0..ranks).map(|_| grid()).collect();
                    check(count, &grids, 0);
                }
            }
        }
    }
}
