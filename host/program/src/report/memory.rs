//! Main memory: what is free within the limits of this process's control group, and kills for want of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// The folder where control groups are mounted.
const GROUPS: &str = "/sys/fs/cgroup";

/// Bytes that processes can still take without swapping, within the limits of this process's control group. `None` if the
/// system does not say.
pub fn available_memory() -> Option<u64> {
    let wanted = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let free = System::new_with_specifics(wanted).ok()?.available_memory();
    (free > 0).then(|| within_limits().map_or(free, |limited| limited.min(free)))
}

/// Bytes that the limits of this process's control group, and of those around it, leave. `None` without a limit.
fn within_limits() -> Option<u64> {
    let (group, version) = own_group()?;
    let inside = group.ancestors().take_while(|folder| folder.starts_with(GROUPS));
    inside.filter_map(|folder| version.left_in(folder)).min()
}

/// Processes of this process's control group that the kernel has killed for want of memory. `None` if it does not say.
pub fn oom_kills() -> Option<u64> {
    let (group, version) = own_group()?;
    let events = match version {
        Version::V1 => "memory.oom_control",
        Version::V2 => "memory.events",
    };
    counter(&fs::read_to_string(group.join(events)).ok()?, "oom_kill")
}

/// True if the kernel has killed a process of this process's control group for want of memory since there were `before`
/// [kills](oom_kills).
pub fn killed_since(before: Option<u64>) -> bool {
    matches!((before, oom_kills()), (Some(before), Some(now)) if now > before)
}

/// The version of control groups that limits memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// Bytes that the limit of the group in `folder` leaves to it and to the groups in it. `None` without a limit.
    fn left_in(self, folder: &Path) -> Option<u64> {
        let (limit, [anonymous, shared]) = match self {
            Version::V1 => ("memory.limit_in_bytes", ["total_rss", "total_shmem"]),
            Version::V2 => ("memory.max", ["anon", "shmem"]),
        };
        // Version 2 says `max` where there is none.
        let limit: u64 = fs::read_to_string(folder.join(limit)).ok()?.trim().parse().ok()?;
        let used = fs::read_to_string(folder.join("memory.stat")).ok()?;
        // Cached files count as used for the kernel, but make room.
        let of = |name| counter(&used, name).unwrap_or(0);
        Some(limit.saturating_sub(of(anonymous).saturating_add(of(shared))))
    }
}

/// The number behind `name` in lines of names and numbers.
fn counter(lines: &str, name: &str) -> Option<u64> {
    lines.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.trim().parse().ok()
}

/// The folder of this process's control group that limits memory.
fn own_group() -> Option<(PathBuf, Version)> {
    group_of(&fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// The folder of the group that limits memory: of version 1, which has a hierarchy for memory alone, or else of version 2.
fn group_of(groups: &str) -> Option<(PathBuf, Version)> {
    // Lines of hierarchy, controllers and path.
    let lines = || groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let of_memory = |(controllers, _): &(&str, &str)| controllers.split(',').any(|name| name == "memory");
    let below = |root: &Path, path: &str| root.join(path.trim_start_matches('/'));
    if let Some((_, path)) = lines().find(of_memory) {
        return Some((below(&Path::new(GROUPS).join("memory"), path), Version::V1));
    }
    let (_, path) = lines().find(|(controllers, _)| controllers.is_empty())?;
    Some((below(Path::new(GROUPS), path), Version::V2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_memory_is_free() {
        assert!(available_memory().is_none_or(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn the_group_that_limits_memory_is_found_in_either_version() {
        let group =
            |groups| group_of(groups).map(|(folder, version)| (folder.display().to_string(), version));
        let found = |folder: &str, version| Some((folder.to_owned(), version));
        let second = "0::/user.slice/a b:c\n";
        assert_eq!(group(second), found("/sys/fs/cgroup/user.slice/a b:c", Version::V2));
        let both = "9:cpu:/\n4:hugetlb,memory:/job/step\n0::/user.slice\n";
        assert_eq!(group(both), found("/sys/fs/cgroup/memory/job/step", Version::V1));
        assert_eq!(group("3:cpu:/x\n"), None);
        assert_eq!(group("0::/\n"), found("/sys/fs/cgroup/", Version::V2));
    }

    #[test]
    fn a_limit_leaves_what_is_not_held_and_cached_files_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(Version::V2.left_in(folder.path()), None);
        write("memory.stat", "anon 300\nfile 5000\nshmem 40\nanon_thp 9\ntotal_rss 7\n");
        write("memory.max", "max\n");
        assert_eq!(Version::V2.left_in(folder.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(Version::V2.left_in(folder.path()), Some(660));
        write("memory.limit_in_bytes", "5\n");
        assert_eq!(Version::V1.left_in(folder.path()), Some(0));
        write("memory.limit_in_bytes", "107\n");
        assert_eq!(Version::V1.left_in(folder.path()), Some(100));
        assert_eq!(counter("oom 3\noom_kill 2\n", "oom_kill"), Some(2));
    }
}
