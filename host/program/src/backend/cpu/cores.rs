//! A core for each rank.
//!
//! Ranks of the CPU backend poll for each other's data. Two on one core take turns, and an operation of microseconds then
//! takes as long as their turns do. So a rank is pinned to a CPU of its own while it is timed. The ranks agree on who takes
//! which: each tells the others on which CPUs it may run, and all compute the same assignment.
//!
//! - Ranks that a launcher has bound to different cores stay as they are.
//! - Ranks that have a choice get cores that share a cache with rank 0's, and rank 0 the one that it runs on. Two threads of
//!   one core are two CPUs, and are used only where there are fewer cores than ranks.
//! - Where there are fewer CPUs than ranks nobody is pinned, as the system shares time out better than a fixed assignment.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::read_dir,
    io,
    marker::PhantomData,
    path::Path,
    thread::available_parallelism,
};

use fused_collective::group::rendezvous::Group;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use serde::{Deserialize, Serialize};

use crate::{
    backend::{error::Error, gather::gather},
    bounded,
};

/// The folder in which Linux describes each CPU.
const CPUS: &str = "/sys/devices/system/cpu";
/// The most bytes of a fact about a CPU, as text, that are read: a list of CPUs at most.
const MAX_FACT: u64 = 64 << 10;

/// The CPUs of a group's ranks.
#[derive(Debug, Default)]
pub(crate) struct Cores {
    /// The CPU of this rank, if ranks are pinned.
    own: Option<CpuSet>,
    /// The CPUs of each rank, as [`list`] writes them; empty if they are not known.
    ranks: Vec<String>,
    notes: Vec<String>,
}

/// A thread that is pinned. Dropping this value, on the same thread, restores the CPUs that it had.
#[derive(Debug)]
pub(crate) struct Pinned {
    before: CpuSet,
    thread: PhantomData<*const ()>,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Fails only if these CPUs were taken away meanwhile: the thread then stays where it is.
        let _ = sched_setaffinity(None, &self.before);
    }
}

fn pin(cpus: &CpuSet) -> io::Result<Pinned> {
    let before = sched_getaffinity(None)?;
    sched_setaffinity(None, cpus)?;
    Ok(Pinned { before, thread: PhantomData })
}

/// A CPU, with the numbers of what it is a part of. CPUs sort by distance: those of a core come together, and those of a
/// cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Cpu {
    package: u32,
    /// The least CPU that shares its last cache.
    cache: u32,
    /// The least CPU of its core.
    core: u32,
    number: u32,
}

impl Cpu {
    /// CPU `number`, described in a folder of `cpus`. A CPU of which nothing is known is a core of its own.
    fn read(cpus: &Path, number: u32) -> Cpu {
        let folder = cpus.join(format!("cpu{number}"));
        let first = |path: &str| {
            let text = bounded::read_to_string(&folder.join(path), MAX_FACT, bounded::PATIENCE).ok()?;
            text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        // The last of the caches, which are `index0`, `index1` and so on.
        let caches = read_dir(folder.join("cache")).into_iter().flatten();
        let names = caches.filter_map(|cache| cache.ok()?.file_name().into_string().ok());
        let last = names.filter(|name| name.starts_with("index")).max();
        Cpu {
            package: first("topology/physical_package_id").unwrap_or(0),
            cache: last.and_then(|last| first(&format!("cache/{last}/shared_cpu_list"))).unwrap_or(0),
            core: first("topology/thread_siblings_list").unwrap_or(number),
            number,
        }
    }
}

/// The processors that a rank may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Allowed {
    /// The CPUs that it may run on; empty if they are not known.
    cpus: BTreeSet<Cpu>,
    /// The number of the CPU that it runs on.
    current: u32,
    /// The CPUs' worth of time that its control group grants it.
    granted: usize,
}

impl Allowed {
    fn here() -> Allowed {
        // More CPUs than a set has room for are not known.
        let set = sched_getaffinity(None).unwrap_or_default();
        let numbers = (0..CpuSet::MAX_CPU).filter(|&number| set.is_set(number));
        let cpus: BTreeSet<Cpu> = numbers.map(|number| Cpu::read(Path::new(CPUS), number as u32)).collect();
        let granted = available_parallelism().map_or(cpus.len(), usize::from);
        Allowed { cpus, current: sched_getcpu() as u32, granted }
    }

    fn cores(&self) -> BTreeSet<u32> {
        self.cpus.iter().map(|cpu| cpu.core).collect()
    }
}

impl Cores {
    /// Agrees on the CPUs of the ranks. All ranks of `group` call this.
    ///
    /// # Errors
    /// A rank was lost.
    pub(crate) fn agree(group: &Group) -> Result<Cores, Error> {
        let ranks = gather(group, &Allowed::here())?;
        let Assignment { pinned, mut notes } = assign(&ranks);
        let own = pinned.as_ref().map(|pinned| {
            let mut own = CpuSet::new();
            own.set(pinned[group.rank() as usize] as usize);
            own
        });
        let refused = own.as_ref().and_then(|own| pin(own).err()).map(|error| error.to_string());
        let refused = gather(group, &refused)?;
        let refused = (0..).zip(refused).find_map(|(rank, why): (u32, _)| Some((rank, why?)));
        if let Some((rank, why)) = &refused {
            notes =
                vec![format!("ranks may end up on one core: rank {rank} cannot be pinned to a CPU: {why}")];
        }
        let (own, pinned) = if refused.is_some() { (None, None) } else { (own, pinned) };
        Ok(Cores { own, ranks: lists(&ranks, pinned.as_deref()), notes })
    }

    /// Pins this thread to this rank's CPU, if ranks are pinned.
    pub(crate) fn pin(&self) -> Option<Pinned> {
        // It worked before. A CPU that was taken away since is no reason to fail.
        self.own.as_ref().and_then(|own| pin(own).ok())
    }

    /// The CPUs of each rank, in rank order, as `0` or `0-3,8`; empty if they are not known.
    pub(super) fn of_ranks(&self) -> &[String] {
        &self.ranks
    }

    /// Notes for a reader, a sentence each.
    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// The CPUs of `ranks`, as [`list`] writes them, or those that they are `pinned` to; empty if they are not known.
fn lists(ranks: &[Allowed], pinned: Option<&[u32]>) -> Vec<String> {
    match pinned {
        Some(pinned) => pinned.iter().map(u32::to_string).collect(),
        None if ranks.iter().any(|rank| rank.cpus.is_empty()) => Vec::new(),
        None => ranks.iter().map(|rank| list(rank.cpus.iter().map(|cpu| cpu.number))).collect(),
    }
}

/// The decision of [`assign`].
#[derive(Debug, Default, PartialEq)]
struct Assignment {
    /// The number of each rank's CPU, or `None` to leave ranks as they are.
    pinned: Option<Vec<u32>>,
    notes: Vec<String>,
}

/// Assigns CPUs to ranks. See the [module](self).
fn assign(ranks: &[Allowed]) -> Assignment {
    let note = |note: String| Assignment { pinned: None, notes: vec![note] };
    if let Some(rank) = ranks.iter().position(|rank| rank.cpus.is_empty()) {
        return note(format!(
            "ranks may end up on one core: the system does not say on which CPUs rank {rank} may run"
        ));
    }
    let all: BTreeSet<Cpu> = ranks.iter().flat_map(|rank| rank.cpus.iter().copied()).collect();
    let size = ranks.len();
    if all.len() < size {
        let (plural, cpus) = (if all.len() == 1 { "" } else { "s" }, all.len());
        return note(format!(
            "MORE RANKS THAN CPUS: {size} ranks take turns on {cpus} CPU{plural}, and times include the wait for a turn"
        ));
    }
    // A control group with less time than ranks need stops them all, wherever they run.
    let granted = (0..).zip(ranks).find(|(_, rank): &(u32, _)| rank.granted < rank.cpus.len().min(size));
    let mut notes: Vec<String> = granted
        .map(|(rank, Allowed { granted, .. })| {
            format!(
                "rank {rank}'s control group grants the time of {granted} CPU{}: if all {size} ranks share that, times \
                 include the wait for it",
                if *granted == 1 { "" } else { "s" }
            )
        })
        .into_iter()
        .collect();
    let cores: usize = ranks.iter().map(|rank| rank.cores().len()).sum();
    let distinct: BTreeSet<u32> = all.iter().map(|cpu| cpu.core).collect();
    if cores == distinct.len() {
        return Assignment { pinned: None, notes };
    }
    let near = ordered(&all, ranks[0].current);
    let of_rank = |rank: &Allowed| near.iter().filter(|cpu| rank.cpus.contains(cpu)).copied().collect();
    let choices: Vec<Vec<Cpu>> = ranks.iter().map(of_rank).collect();
    let by = |key: fn(&Cpu) -> u32| {
        matching(&choices.iter().map(|cpus| cpus.iter().map(key).collect()).collect::<Vec<Vec<u32>>>())
    };
    let pinned = if let Some(cores) = by(|cpu| cpu.core) {
        // The first thread of the core on which the rank may run.
        let cpu =
            |(cpus, core): (&Vec<Cpu>, u32)| cpus.iter().find(|cpu| cpu.core == core).map(|cpu| cpu.number);
        choices.iter().zip(cores).filter_map(cpu).collect()
    } else if let Some(cpus) = by(|cpu| cpu.number) {
        notes.push(format!(
            "{size} ranks have {} cores: some run on two threads of one core, which takes longer than two cores",
            distinct.len()
        ));
        cpus
    } else {
        let bound = lists(ranks, None);
        let bound: Vec<String> =
            (0..).zip(bound).map(|(rank, cpus): (u32, _)| format!("rank {rank} to {cpus}")).collect();
        return note(format!(
            "RANKS SHARE CPUS: they are bound so that there is not one for each ({}), and times include the wait for a turn",
            bound.join(", ")
        ));
    };
    Assignment { pinned: Some(pinned), notes }
}

/// `cpus` in the order in which ranks should take them: the core of CPU `current` first, then by distance from it. The
/// second threads of cores come last.
fn ordered(cpus: &BTreeSet<Cpu>, current: u32) -> Vec<Cpu> {
    let mut ordered: Vec<Cpu> = cpus.iter().copied().collect();
    let Some(first) = ordered.iter().find(|cpu| cpu.number == current).or(ordered.first()).copied() else {
        return ordered;
    };
    ordered.sort_by_cached_key(|cpu| {
        let thread = cpus.iter().filter(|other| other.core == cpu.core && other.number < cpu.number).count();
        let apart = (cpu.package != first.package, cpu.cache != first.cache, cpu.core != first.core);
        (thread, apart, *cpu)
    });
    ordered
}

/// One of its `choices` for each rank, no two the same, the earlier ones first; `None` if that is impossible.
fn matching(choices: &[Vec<u32>]) -> Option<Vec<u32>> {
    let mut taken = BTreeMap::new();
    for rank in 0..choices.len() {
        let free = choices[rank].iter().find(|choice| !taken.contains_key(*choice));
        if let Some(&free) = free {
            taken.insert(free, rank);
        } else if !displace(rank, choices, &mut taken, &mut BTreeSet::new()) {
            return None;
        }
    }
    let mut by_rank: Vec<(usize, u32)> = taken.into_iter().map(|(choice, rank)| (rank, choice)).collect();
    by_rank.sort_unstable();
    Some(by_rank.into_iter().map(|(_, choice)| choice).collect())
}

/// Gives `rank` one of its choices, and the ranks that had it others: an augmenting path. `tried` are the choices that did
/// not help so far.
fn displace(
    rank: usize,
    choices: &[Vec<u32>],
    taken: &mut BTreeMap<u32, usize>,
    tried: &mut BTreeSet<u32>,
) -> bool {
    choices[rank].iter().any(|&choice| {
        let helps = tried.insert(choice)
            && match taken.get(&choice) {
                Some(&other) => displace(other, choices, taken, tried),
                None => true,
            };
        if helps {
            taken.insert(choice, rank);
        }
        helps
    })
}

/// Numbers as `0-3,8`.
fn list(numbers: impl Iterator<Item = u32>) -> String {
    let numbers: BTreeSet<u32> = numbers.collect();
    let numbers: Vec<u32> = numbers.into_iter().collect();
    let runs = numbers.chunk_by(|before, after| before + 1 == *after);
    let texts: Vec<String> = runs
        .map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            [only] => only.to_string(),
            [] => String::new(),
        })
        .collect();
    texts.join(",")
}

#[cfg(test)]
mod tests {
    use std::{fs, process::id, thread, time::Duration};

    use fused_collective::group::rendezvous::Membership;

    use super::*;

    /// Two packages of two caches each, two cores of two threads in each cache: CPUs 0 to 7, and 8 to 15 are the second
    /// threads of their cores.
    fn cpu(number: u32) -> Cpu {
        let core = number % 8;
        Cpu { package: core / 4, cache: core / 2 * 2, core, number }
    }

    /// A rank that may run on these CPUs of that machine, and runs on the first.
    fn rank(cpus: &[u32]) -> Allowed {
        Allowed { cpus: cpus.iter().copied().map(cpu).collect(), current: cpus[0], granted: cpus.len() }
    }

    fn pinned(ranks: &[&[u32]]) -> Vec<u32> {
        let Assignment { pinned, notes } = assign(&ranks.iter().map(|cpus| rank(cpus)).collect::<Vec<_>>());
        assert_eq!(notes, Vec::<String>::new());
        pinned.expect("pinned")
    }

    const ALL: &[u32] = &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

    #[test]
    fn each_rank_gets_a_core_near_the_one_where_rank_0_runs() {
        assert_eq!(pinned(&[ALL; 2]), [0, 1]);
        assert_eq!(pinned(&[ALL; 6]), [0, 1, 2, 3, 4, 5]);
        let near = |current| {
            let ranks = vec![Allowed { current, ..rank(ALL) }; 4];
            assign(&ranks).pinned.unwrap()
        };
        // Its core, the other of its cache, then the other cache of its package.
        assert_eq!(near(7), [7, 6, 4, 5]);
        assert_eq!(near(13), [5, 4, 6, 7]);
    }

    #[test]
    fn ranks_keep_to_the_cpus_that_they_may_run_on() {
        assert_eq!(pinned(&[&[2, 3], &[2, 3]]), [2, 3]);
        // Rank 0 makes room for rank 1, and that for rank 2.
        assert_eq!(pinned(&[&[0, 1, 2], &[0, 1], &[0]]), [2, 1, 0]);
        // The second thread of a core where rank 1 may not run on the first.
        assert_eq!(pinned(&[&[0, 1], &[8, 9, 0]]), [0, 9]);
    }

    #[test]
    fn ranks_with_cores_of_their_own_stay_as_they_were_bound() {
        for ranks in
            [[rank(&[0]), rank(&[1])], [rank(&[0, 8]), rank(&[1, 9])], [rank(&[0, 1]), rank(&[4, 5])]]
        {
            assert_eq!(assign(&ranks), Assignment::default());
        }
    }

    #[test]
    fn two_threads_of_a_core_are_the_last_resort_and_noted() {
        let Assignment { pinned, notes } = assign(&vec![rank(&[0, 1, 8, 9]); 3]);
        assert_eq!(pinned.unwrap(), [0, 1, 8]);
        let note =
            "3 ranks have 2 cores: some run on two threads of one core, which takes longer than two cores";
        assert_eq!(notes, [note]);
        assert_eq!(assign(&[rank(&[0]), rank(&[8])]).notes.len(), 1);
    }

    #[test]
    fn more_ranks_than_cpus_are_left_alone_and_noted() {
        let Assignment { pinned, notes } = assign(&vec![rank(&[3]); 2]);
        assert_eq!(pinned, None);
        let note = "MORE RANKS THAN CPUS: 2 ranks take turns on 1 CPU, and times include the wait for a turn";
        assert_eq!(notes, [note]);
        let Assignment { pinned, notes } = assign(&[rank(&[0]), rank(&[0]), rank(&[1, 2, 3])]);
        assert_eq!(pinned, None);
        let note = "RANKS SHARE CPUS: they are bound so that there is not one for each (rank 0 to 0, rank 1 to 0, rank 2 \
                    to 1-3), and times include the wait for a turn";
        assert_eq!(notes, [note]);
    }

    #[test]
    fn a_control_group_with_less_time_than_ranks_need_is_noted() {
        let ranks = vec![Allowed { granted: 1, ..rank(ALL) }; 2];
        let Assignment { pinned, notes } = assign(&ranks);
        assert_eq!(pinned.unwrap(), [0, 1]);
        let note = "rank 0's control group grants the time of 1 CPU: if all 2 ranks share that, times include the wait for it";
        assert_eq!(notes, [note]);
    }

    #[test]
    fn where_the_system_does_not_name_the_cpus_nobody_is_pinned() {
        let unknown = Allowed { cpus: BTreeSet::new(), current: 0, granted: 4 };
        let ranks = [rank(ALL), unknown];
        let Assignment { pinned, notes } = assign(&ranks);
        assert_eq!((pinned, lists(&ranks, None)), (None, Vec::new()));
        let note = "ranks may end up on one core: the system does not say on which CPUs rank 1 may run";
        assert_eq!(notes, [note]);
    }

    #[test]
    fn a_cpu_is_read_with_its_core_cache_and_package_or_is_a_core_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join("cpu9").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("topology/physical_package_id", "1\n");
        write("topology/thread_siblings_list", "3,9\n");
        write("cache/index0/shared_cpu_list", "9\n");
        write("cache/index3/shared_cpu_list", "2-3,8-9\n");
        write("cache/uevent", "");
        assert_eq!(Cpu::read(folder.path(), 9), Cpu { package: 1, cache: 2, core: 3, number: 9 });
        assert_eq!(Cpu::read(folder.path(), 4), Cpu { package: 0, cache: 0, core: 4, number: 4 });
    }

    #[test]
    fn numbers_are_listed_as_runs() {
        let list = |numbers: &[u32]| list(numbers.iter().copied());
        assert_eq!(list(&[8, 0, 1, 2, 3]), "0-3,8");
        assert_eq!([list(&[5]), list(&[])], ["5", ""]);
    }

    /// Ranks are threads, which the system pins as it does processes.
    #[test]
    fn ranks_run_on_cpus_of_their_own_while_pinned_and_as_before_afterwards() {
        let key = format!("cores {}", id());
        let rank = |number| {
            let deadline = Duration::from_secs(60);
            let membership = Membership { rank: number, world_size: 2, key: &key, config: b"", deadline };
            let group = Group::join(&membership).unwrap();
            let before = sched_getaffinity(None).unwrap();
            let cores = Cores::agree(&group).unwrap();
            let pinned = cores.pin();
            let during = sched_getaffinity(None).unwrap();
            drop(pinned);
            assert_eq!(sched_getaffinity(None).unwrap(), before);
            assert_eq!(cores.of_ranks().len(), 2);
            group.farewell().unwrap();
            (during, cores)
        };
        let [(first, cores), (second, _)] = thread::scope(|scope| {
            let ranks = [0, 1].map(|number| scope.spawn(move || rank(number)));
            ranks.map(|rank| rank.join().unwrap())
        });
        if cores.own.is_some() {
            assert_eq!([first.count(), second.count()], [1, 1]);
            assert_ne!(first, second);
        } else {
            // There is one CPU only.
            assert!(first == second && !cores.notes().is_empty());
        }
    }
}
