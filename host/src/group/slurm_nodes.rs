//! Slurm's lists of nodes, and the address where the ranks of a job step on several nodes meet if they are given none.

use super::rendezvous::Address;

/// The first and the number of the ports: below those that Linux gives to connections.
const PORTS: (u64, u64) = (15_000, 10_000);

/// A port on the first node, which has rank 0 unless the distribution of tasks is arbitrary. Steps of a job follow each other,
/// and may run at the same time: each has a port of its own.
pub(super) fn address(nodes: &str, job: u64, step: u64) -> Option<Address> {
    let (first, ports) = PORTS;
    let port = first + job.wrapping_mul(31).wrapping_add(step) % ports;
    Address::new(&first_node(nodes)?, port as u16).ok()
}

/// The first node of a list as Slurm writes it: `gpu03` of `gpu[03-05,09],login1`.
fn first_node(list: &str) -> Option<String> {
    let (mut node, mut rest) = (String::new(), list.trim());
    loop {
        let end = rest.find([',', '[']).unwrap_or(rest.len());
        node += &rest[..end];
        let Some(ranges) = rest[end..].strip_prefix('[') else { break };
        let (ranges, after) = ranges.split_once(']')?;
        node += ranges.split([',', '-']).next()?;
        rest = after;
    }
    Some(node).filter(|node| !node.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{FEW, cases};

    #[test]
    fn the_first_of_slurm_s_nodes_is_found() {
        let cases = [
            ("node1", Some("node1")),
            ("node1,node2", Some("node1")),
            ("gpu[03-05,09],login1", Some("gpu03")),
            ("rack[0-1]n[00-15]", Some("rack0n00")),
            ("a[1,2]-ib", Some("a1-ib")),
            ("", None),
            ("a[1-2", None),
        ];
        for (list, first) in cases {
            assert_eq!(first_node(list).as_deref(), first, "{list}");
        }
    }

    proptest! {
        #![proptest_config(cases(FEW))]

        #[test]
        fn any_list_has_a_first_node_or_none(list in "[a-c0-2,\\[\\]-]{0,20}", text in ".{0,20}") {
            for list in [list, text] {
                prop_assert!(first_node(&list).is_none_or(|node| !node.is_empty() && node.len() <= list.len()));
            }
        }
    }
}
