//! Libraries that are loaded at run time, through the C library's `dlopen`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

// SAFETY: POSIX declares these functions so, and the C library that `std` links has them.
unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *mut c_char;
}

/// `RTLD_NOW`: all symbols are resolved at once.
const NOW: c_int = 2;

/// A loaded library, which stays loaded until the process ends.
#[derive(Debug)]
pub(super) struct DynamicLibrary(*mut c_void);

// SAFETY: the handle names a library of the process, and the loader locks what threads share.
unsafe impl Send for DynamicLibrary {}
// SAFETY: as above.
unsafe impl Sync for DynamicLibrary {}

impl DynamicLibrary {
    /// Loads the library that the system's loader knows by `name`.
    ///
    /// # Errors
    /// The loader's words.
    ///
    /// # Safety
    /// The library's initializers ask nothing of the process.
    pub(super) unsafe fn load(name: &CStr) -> Result<DynamicLibrary, String> {
        // SAFETY: the name is a C string, and the caller vouches for the initializers.
        let handle = unsafe { dlopen(name.as_ptr(), NOW) };
        if !handle.is_null() {
            return Ok(DynamicLibrary(handle));
        }
        // SAFETY: returns null or a C string that stays until this thread's next call of the loader.
        let text = unsafe { dlerror() };
        if text.is_null() {
            return Err(format!("{} cannot be loaded", name.to_string_lossy()));
        }
        // SAFETY: not null, so a C string.
        Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }

    /// The address of the symbol `name`; `None` if there is none.
    pub(super) fn symbol(&self, name: &str) -> Option<*mut c_void> {
        let name = CString::new(name).ok()?;
        // SAFETY: a loaded library and a C string.
        let address = unsafe { dlsym(self.0, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_and_its_symbols_are_found_or_missed_by_name() {
        // SAFETY: the mathematics library has no initializers of note.
        let library = unsafe { DynamicLibrary::load(c"libm.so.6") }.unwrap();
        assert!(library.symbol("cos").is_some());
        assert_eq!(library.symbol("no_such_function"), None);
        assert_eq!(library.symbol("zero\0byte"), None);
        // SAFETY: there is no such library.
        let error = unsafe { DynamicLibrary::load(c"libno-such-library.so") }.unwrap_err();
        assert!(error.contains("libno-such-library.so"), "{error}");
    }
}
