//! The GPUs that kernels are compiled for.

/// A kind of GPU that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Processor {
    /// The processor's name in PTX, and that of the folder of its modules. With an `a` at its end, its code runs on no
    /// other.
    pub name: &'static str,
    /// Its compute capability: 90 is 9.0.
    pub capability: u32,
}

impl Processor {
    /// Every processor, the oldest first.
    pub const ALL: [Processor; 4] = [
        Processor { name: "sm_80", capability: 80 },
        Processor { name: "sm_90", capability: 90 },
        Processor { name: "sm_100a", capability: 100 },
        Processor { name: "sm_120a", capability: 120 },
    ];

    /// The processors whose code runs on a GPU of compute capability `capability` (90 is 9.0), the best first.
    pub fn for_capability(capability: u32) -> impl Iterator<Item = Processor> {
        let runs = move |processor: &Processor| {
            if processor.name.ends_with('a') {
                processor.capability == capability
            } else {
                processor.capability <= capability
            }
        };
        Processor::ALL.into_iter().rev().filter(runs)
    }

    /// True where kernels may be launched in clusters and as programmatic dependents. PTX for an older processor runs on
    /// a new GPU, but does not wait for the kernel before it.
    pub const fn has_clusters(self) -> bool {
        self.capability >= 90
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn a_gpu_gets_code_that_runs_on_it_and_the_best_first() {
        let names = |capability| {
            Processor::for_capability(capability).map(|processor| processor.name).collect::<Vec<_>>()
        };
        assert_eq!(names(90), ["sm_90", "sm_80"]);
        assert_eq!(names(100), ["sm_100a", "sm_90", "sm_80"]);
        assert_eq!(names(103), ["sm_90", "sm_80"]);
        assert_eq!(names(120), ["sm_120a", "sm_90", "sm_80"]);
        assert_eq!(names(86), ["sm_80"]);
        assert!(names(75).is_empty());
    }
}
