//! The process that started the ranks of a job: the same for all ranks, unless containers keep them from seeing it.

use std::{env, ffi::OsString, fs, os::unix::ffi::OsStringExt as _, os::unix::process::parent_id};

/// The variables that differ between the ranks of PMI, and between one job inside another.
const RANK: [&str; 4] = ["PMI_RANK", "PMI_SIZE", "PMI_FD", "MPI_LOCALRANKID"];
/// The most ancestors that are looked at.
const MOST: usize = 64;

/// The number of the nearest ancestor that has not this process's variables of a rank. Those between are wrappers of the
/// rank, such as a shell.
pub(super) fn starting_process() -> u32 {
    let own = RANK.map(|name| (name, env::var_os(name).map(OsString::into_vec)));
    let is_wrapper = |pid: u32| {
        // The environment of another user's process cannot be read: that is no wrapper.
        let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else { return false };
        own.iter().all(|(name, value)| find(&environment, name) == value.as_deref())
    };
    let mut ancestor = parent_id();
    for _ in 0..MOST {
        match parent_of(ancestor) {
            Some(parent @ 1..) if is_wrapper(ancestor) => ancestor = parent,
            _ => break,
        }
    }
    ancestor
}

/// The value of a variable in an environment as `/proc` has it.
fn find<'a>(environment: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut variables = environment.split(|&byte| byte == 0);
    variables.find_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_found_by_its_whole_name() {
        let environment = b"PMI_RANKS=7\0PMI_RANK=1\0EMPTY=\0";
        assert_eq!(find(environment, "PMI_RANK"), Some(&b"1"[..]));
        assert_eq!(find(environment, "EMPTY"), Some(&b""[..]));
        assert_eq!(find(environment, "PMI"), None);
    }

    #[test]
    fn the_parent_of_a_process_is_known() {
        assert_eq!(parent_of(std::process::id()), Some(parent_id()));
    }
}
