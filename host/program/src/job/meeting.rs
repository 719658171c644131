//! The way that the ranks of a job meet: within their host, or over a network if the launcher says that they are on several.

use fused_collective::group::{
    meeting_place,
    rank_env::RankEnv,
    rendezvous::{Error, Group, Membership, Network},
};
use fused_collective_core::MAX_WORLD_SIZE;

/// The network over which the ranks of a job meet, if they are on several hosts.
///
/// # Errors
/// The environment has no secret or no address for them. The text says what to set.
pub(super) fn network(environment: &RankEnv) -> Result<Option<Network>, String> {
    meeting_place::network(environment).map_err(|error| error.to_string())
}

/// Meets the other ranks.
pub(super) fn join(membership: &Membership<'_>, network: Option<&Network>) -> Result<Group, Error> {
    match network {
        Some(network) => Group::join_over(membership, network),
        None => Group::join(membership),
    }
}

/// The hosts of the ranks, and the ranks of each, in the order of their first ranks.
pub(super) fn ranks_of_hosts(hosts: &[String]) -> Vec<(&str, u32)> {
    let mut counts: Vec<(&str, u32)> = Vec::new();
    for host in hosts {
        match counts.iter_mut().find(|(other, _)| other == host) {
            Some((_, ranks)) => *ranks += 1,
            None => counts.push((host, 1)),
        }
    }
    counts
}

/// Checks that ranks on these hosts can form a group: as many on each, and no more than share memory.
///
/// # Errors
/// They cannot. The text is the same on all ranks.
pub(super) fn check(hosts: &[String]) -> Result<(), String> {
    let counts = ranks_of_hosts(hosts);
    let Some(&(_, first)) = counts.first() else { return Ok(()) };
    if counts.iter().any(|(_, ranks)| *ranks != first) {
        let all: Vec<_> = counts.iter().map(|(host, ranks)| format!("{ranks} on {host}")).collect();
        return Err(format!(
            "the hosts have different numbers of ranks, {}: start as many on each",
            all.join(", ")
        ));
    }
    if first > MAX_WORLD_SIZE {
        return Err(format!(
            "{first} ranks on a host cannot form a group: use up to {MAX_WORLD_SIZE} on each"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn hosts_have_as_many_ranks_each_in_any_order() {
        for fitting in ["", "a", "a b", "a b a b", "a a b b c c"] {
            assert_eq!(check(&hosts(fitting)), Ok(()), "{fitting}");
        }
        let why = "the hosts have different numbers of ranks, 2 on a, 1 on b: start as many on each";
        assert_eq!(check(&hosts("a b a")), Err(why.to_owned()));
        let why = "17 ranks on a host cannot form a group: use up to 16 on each";
        assert_eq!(check(&hosts(&"a b ".repeat(17))), Err(why.to_owned()));
    }
}
