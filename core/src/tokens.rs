//! Ownership of tokens in two-shot: each token belongs to one rank, which sums it.
//!
//! Token `t` belongs to rank `t % world_size` and is token `t / world_size` of that rank. The interleaving keeps every
//! rank and every link busy even with few tokens, and shares differ by one token at most.

/// The rank that owns token `token` of a round.
pub const fn owner(token: u64, world_size: u32) -> u32 {
    (token % world_size as u64) as u32
}

/// The index of `token` among the tokens of its owner.
pub const fn owned_index(token: u64, world_size: u32) -> u64 {
    token / world_size as u64
}

/// The number of tokens that rank `rank` owns, of `tokens`.
pub const fn owned_tokens(tokens: u64, rank: u32, world_size: u32) -> u64 {
    (tokens + world_size as u64 - 1 - rank as u64) / world_size as u64
}

/// The token with index `owned` among the tokens of rank `rank`: the inverse of [`owned_index`].
pub const fn owned_token(owned: u64, rank: u32, world_size: u32) -> u64 {
    owned * world_size as u64 + rank as u64
}
