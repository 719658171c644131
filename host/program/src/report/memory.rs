//! Main memory: what is free within the limits of this process's control group, and kills for want of it.

use std::{fs, path::Path};

use sysinfo::{
    MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System, get_current_pid,
};

/// Bytes that processes can still take without swapping, within the limits of this process's control group. `None` if the
/// system does not say.
pub fn available_memory() -> Option<u64> {
    let wanted = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let free = System::new_with_specifics(wanted).ok()?.available_memory();
    (free > 0).then(|| within_limits().map_or(free, |limited| limited.min(free)))
}

/// Bytes that the limits of this process's control group, and of those around it, leave. `None` without a limit.
fn within_limits() -> Option<u64> {
    let own = get_current_pid().ok()?;
    let mut system = System::new().ok()?;
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), false, ProcessRefreshKind::nothing());
    let limits = system.process(own)?.cgroup_limits()?;
    // Cached files count as used, but make room.
    Some(limits.total_memory.saturating_sub(limits.rss))
}

/// Processes of this process's control group that the kernel has killed for want of memory. `None` if it does not say.
pub fn oom_kills() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let (root, file) = events(&groups)?;
    let counters = fs::read_to_string(Path::new("/sys/fs/cgroup").join(root).join(file)).ok()?;
    counters.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

/// The folder of the group that limits memory, below where groups are mounted, and the file in it with the kernel's counters:
/// of version 1, which has a hierarchy for memory alone, or else of version 2.
fn events(groups: &str) -> Option<(String, &'static str)> {
    // Lines of hierarchy, controllers and path.
    let lines = || groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let of_memory = |(controllers, _): &(&str, &str)| controllers.split(',').any(|name| name == "memory");
    if let Some((_, path)) = lines().find(of_memory) {
        return Some((format!("memory{path}"), "memory.oom_control"));
    }
    let (_, path) = lines().find(|(controllers, _)| controllers.is_empty())?;
    Some((path.trim_start_matches('/').to_owned(), "memory.events"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_memory_is_free() {
        assert!(available_memory().is_none_or(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn the_counters_of_either_version_of_control_groups_are_found() {
        let events = |groups| events(groups).map(|(root, file)| format!("{root}/{file}"));
        let second = "0::/user.slice/a b:c\n";
        assert_eq!(events(second).as_deref(), Some("user.slice/a b:c/memory.events"));
        let both = "9:cpu:/\n4:hugetlb,memory:/job/step\n0::/user.slice\n";
        assert_eq!(events(both).as_deref(), Some("memory/job/step/memory.oom_control"));
        assert_eq!(events("3:cpu:/x\n"), None);
        assert_eq!(events("0::/\n").as_deref(), Some("/memory.events"));
    }
}
