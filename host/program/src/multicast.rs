//! NVLink multicast, which a variable of any library switches off for all of them.
//!
//! NCCL, PyTorch and NVSHMEM each have a variable of their own. Where multicast does not work, a program that tries it may
//! put the GPUs out of service, so one that is switched off on purpose stays off here, whichever library is measured.

use std::{
    env,
    ffi::{OsStr, OsString},
};

/// The variables, with the values that switch multicast off.
const OFF: [(&str, &str); 3] =
    [("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"), ("NVSHMEM_DISABLE_NVLS", "1")];

/// True if the environment does not switch multicast off.
pub fn is_allowed() -> bool {
    allows(|name| env::var_os(name))
}

fn allows(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let is_false = |value: &OsStr| {
        let value = value.to_string_lossy().trim().to_ascii_lowercase();
        ["0", "n", "no", "f", "false", "off"].contains(&value.as_str())
    };
    OFF.iter().all(|&(name, off)| match variable(name) {
        None => true,
        Some(value) if value.is_empty() => true,
        // Any value that does not say no says yes.
        Some(value) => is_false(&value) != (off == "0"),
    })
}

/// Switches multicast off for all libraries, and for the processes that this one starts, if it is off for one.
///
/// # Safety
/// No other thread runs yet.
pub unsafe fn agree() {
    if !is_allowed() {
        for (name, off) in OFF {
            // SAFETY: there is no thread to read the environment meanwhile, as the caller vouches for.
            unsafe { env::set_var(name, off) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_library_s_variable_switches_multicast_off() {
        let with = |name: &str, value: &str| allows(|asked| (asked == name).then(|| value.into()));
        assert!(allows(|_| None) && allows(|_| Some(OsString::new())));
        for value in ["0", "no", "False", " off "] {
            assert!(!with("NCCL_NVLS_ENABLE", value), "{value}");
            assert!(with("TORCH_SYMM_MEM_DISABLE_MULTICAST", value), "{value}");
            assert!(with("NVSHMEM_DISABLE_NVLS", value), "{value}");
        }
        for value in ["1", "yes", "TRUE", "2"] {
            assert!(with("NCCL_NVLS_ENABLE", value), "{value}");
            assert!(!with("TORCH_SYMM_MEM_DISABLE_MULTICAST", value), "{value}");
            assert!(!with("NVSHMEM_DISABLE_NVLS", value), "{value}");
        }
    }
}
