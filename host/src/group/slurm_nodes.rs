//! Slurm's lists of nodes.

/// The first node of a list as Slurm writes it: `gpu03` of `gpu[03-05,09],login1`.
pub(super) fn first_node(list: &str) -> Option<String> {
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
