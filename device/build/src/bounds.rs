//! Launch bounds: the largest block of an entry point, which tells the assembler how many registers each thread may have.
//! rustc has no way to say so in PTX.

use std::fmt::Write;

use fused_collective_core::kernels::Bounds;

use crate::Processor;

/// An entry point of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry<'a> {
    /// The processor that the module is for.
    pub processor: Processor,
    /// The module's name.
    pub module: &'a str,
    /// The entry point's name.
    pub name: &'a str,
}

/// The bounds of each entry point, as a caller gives them.
pub(crate) type BoundsOf = Box<dyn Fn(&Entry<'_>) -> Bounds>;

/// Adds to each entry point of `module` the bounds that `bounds` gives for it, in place of any that it has.
pub(crate) fn add(
    ptx: &str,
    processor: Processor,
    module: &str,
    bounds: impl Fn(&Entry<'_>) -> Bounds,
) -> String {
    let mut bounded = String::with_capacity(ptx.len());
    let mut pending = None;
    let is_bound = |line: &&str| line.starts_with(".maxntid") || line.starts_with(".minnctapersm");
    for line in ptx.lines().filter(|line| !is_bound(line)) {
        if let Some((_, name)) = line.split_once(".entry ") {
            let name = name.trim_end_matches(['(', ')', ' ']);
            pending = Some(bounds(&Entry { processor, module, name }));
        }
        // Directives of a function come between its parameters and its body.
        if line.trim_start().starts_with('{')
            && let Some(Bounds { threads, blocks }) = pending.take()
        {
            let _ = writeln!(bounded, ".maxntid {threads}, 1, 1\n.minnctapersm {blocks}");
        }
        bounded += line;
        bounded.push('\n');
    }
    bounded
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "\
.visible .entry first(
\t.param .u64 a
)
{
\t{
\tret;
\t}
}
.visible .entry second()
{
}
";

    #[test]
    fn entry_points_are_told_their_bounds_before_their_body() {
        let bounds = |entry: &Entry<'_>| {
            assert_eq!((entry.processor, entry.module), (Processor::Sm90, "own"));
            if entry.name == "first" {
                Bounds { threads: 1024, blocks: 1 }
            } else {
                Bounds { threads: 512, blocks: 2 }
            }
        };
        let expected = "\
.visible .entry first(
\t.param .u64 a
)
.maxntid 1024, 1, 1
.minnctapersm 1
{
\t{
\tret;
\t}
}
.visible .entry second()
.maxntid 512, 1, 1
.minnctapersm 2
{
}
";
        let bounded = add(PTX, Processor::Sm90, "own", bounds);
        assert_eq!(bounded, expected);
        assert_eq!(add(&bounded, Processor::Sm90, "own", bounds), bounded);
    }
}
