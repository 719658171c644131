//! The GPUs to compile for.

use std::{fmt, str::FromStr};

/// A processor to compile kernels for, as PTX names it.
///
/// The driver assembles PTX of `sm_80` and `sm_90` for every later GPU as well. PTX of the others has instructions that no
/// other GPU has (the `a` in the name): it runs on one compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Processor {
    /// `sm_80`: Ampere and later.
    Sm80,
    /// `sm_90`: Hopper and later.
    Sm90,
    /// `sm_100a`: Blackwell for data centres, compute capability 10.0.
    Sm100a,
    /// `sm_120a`: the other Blackwell, compute capability 12.0.
    Sm120a,
}

impl Processor {
    /// Every processor that there is.
    pub const ALL: [Processor; 4] = [Processor::Sm80, Processor::Sm90, Processor::Sm100a, Processor::Sm120a];

    /// The name in PTX, in rustc's `target-cpu` and in ptxas's `--gpu-name`: `sm_90`.
    pub const fn name(self) -> &'static str {
        match self {
            Processor::Sm80 => "sm_80",
            Processor::Sm90 => "sm_90",
            Processor::Sm100a => "sm_100a",
            Processor::Sm120a => "sm_120a",
        }
    }

    /// The processor that rustc compiles for. Its PTX serves other processors that have the same instructions.
    pub const fn compiled_for(self) -> Processor {
        match self {
            Processor::Sm120a => Processor::Sm100a,
            other => other,
        }
    }

    /// The PTX version: the first that has the kernels' instructions, so that old drivers know it too. `sm_90` needs `st.async`. For
    /// `sm_80` an older one would do, but drivers older than CUDA 11.4 lack what the host calls.
    const fn version(self) -> &'static str {
        match self {
            Processor::Sm80 => "7.4",
            Processor::Sm90 => "8.1",
            Processor::Sm100a => "8.6",
            Processor::Sm120a => "8.7",
        }
    }

    /// The first lines of a module.
    pub(crate) fn header(self) -> String {
        format!(".version {}\n.target {}\n", self.version(), self.name())
    }

    /// rustc's flags for device code.
    pub(crate) fn flags(self) -> [String; 4] {
        let feature = self.version().replace('.', "");
        [
            format!("-Ctarget-cpu={}", self.name()),
            format!("-Ctarget-feature=+ptx{feature}"),
            // A call passes what registers hold through local memory, so a kernel is one function, however large.
            "-Cllvm-args=-inline-threshold=100000".to_owned(),
            // Nor is a choice among constants worth a table in memory.
            "-Cllvm-args=-switch-to-lookup=false".to_owned(),
        ]
    }
}

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Processor {
    type Err = UnknownProcessor;

    fn from_str(name: &str) -> Result<Self, UnknownProcessor> {
        let found = Processor::ALL.into_iter().find(|processor| processor.name() == name);
        found.ok_or_else(|| UnknownProcessor(name.to_owned()))
    }
}

/// A name that no [`Processor`] has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no processor `{0}`: there are {names}", names = Processor::ALL.map(Processor::name).join(", "))]
pub struct UnknownProcessor(String);

/// `processors` in groups, by the processor that rustc compiles for. Each processor counts once.
pub(crate) fn by_compilation(processors: &[Processor]) -> Vec<(Processor, Vec<Processor>)> {
    let group = |compiled_for: Processor| {
        let chosen = |it: &Processor| it.compiled_for() == compiled_for && processors.contains(it);
        let group: Vec<_> = Processor::ALL.into_iter().filter(chosen).collect();
        (!group.is_empty()).then_some((compiled_for, group))
    };
    Processor::ALL.into_iter().filter_map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_with_the_same_instructions_are_compiled_for_once() {
        use Processor::{Sm80, Sm90, Sm100a, Sm120a};
        let expected = [(Sm80, vec![Sm80]), (Sm90, vec![Sm90]), (Sm100a, vec![Sm100a, Sm120a])];
        assert_eq!(by_compilation(&Processor::ALL), expected);
        assert_eq!(by_compilation(&[Sm120a, Sm120a]), [(Sm100a, vec![Sm120a])]);
        let [cpu, feature, ..] = Sm120a.compiled_for().flags();
        assert_eq!([cpu, feature], ["-Ctarget-cpu=sm_100a", "-Ctarget-feature=+ptx86"]);
        assert_eq!(Sm120a.header(), ".version 8.7\n.target sm_120a\n");
    }

    #[test]
    fn processors_are_known_by_name() {
        for processor in Processor::ALL {
            assert_eq!(processor.name().parse(), Ok(processor));
        }
        let error = "sm_75".parse::<Processor>().unwrap_err().to_string();
        assert_eq!(error, "no processor `sm_75`: there are sm_80, sm_90, sm_100a, sm_120a");
    }
}
