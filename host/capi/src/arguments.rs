//! Arguments as C gives them: pointers, texts, and structs of an earlier or a later version.

use std::{
    ffi::{CStr, c_char},
    mem::MaybeUninit,
    ptr, slice,
};

use crate::{
    failure::Failure,
    types::{fc_bootstrap, fc_membership, fc_operation, fc_options, fc_plan, fc_tensors},
};

/// A struct that begins with its size and may grow.
///
/// # Safety
/// The type is `repr(C)`, begins with a `u64`, has no padding, and may have every byte 0.
pub(crate) unsafe trait Versioned: Copy {
    /// The name in C.
    const NAME: &'static str;
    /// The size in the first version.
    const FIRST: usize;
}

macro_rules! versioned {
    ($($name:ident: $first:expr),*) => {
        $(
            // SAFETY: `repr(C)` with `size: u64` first; numbers, pointers and optional functions may be 0. The sizes below
            // are the sums of the fields' sizes.
            unsafe impl Versioned for $name {
                const NAME: &'static str = stringify!($name);
                const FIRST: usize = $first;
            }
            const _: () = assert!(size_of::<$name>() >= $first && align_of::<$name>() == 8);
        )*
    };
}

versioned! {
    fc_options: 56, fc_membership: 24, fc_bootstrap: 40, fc_operation: 80, fc_tensors: 224, fc_plan: 48
}

/// No struct of any version has more bytes. A size that was never set is likely above it.
const LARGEST: usize = 4096;

/// The size that the struct at `given` states.
///
/// # Safety
/// As [`read`].
unsafe fn stated<T: Versioned>(given: *const T) -> Result<usize, Failure> {
    let name = T::NAME;
    if given.is_null() {
        return Err(Failure::Argument(format!("the pointer to {name} is null")));
    }
    if !given.is_aligned() {
        return Err(Failure::Argument(format!("{name} is at {given:p}, which is not a multiple of 8")));
    }
    // SAFETY: the caller's struct begins with its size, and is aligned.
    let size = unsafe { given.cast::<u64>().read() };
    usize::try_from(size).ok().filter(|size| (T::FIRST..=LARGEST).contains(size)).ok_or_else(|| {
        Failure::Argument(format!(
            "{name} states a size of {size} bytes, and has {} to {LARGEST}: set its field size to sizeof({name})",
            T::FIRST
        ))
    })
}

/// Reads a struct. What an earlier version has not is 0. What a later one has more must be 0.
///
/// # Safety
/// `given` is null, or points to a struct of as many bytes as its first field says.
pub(crate) unsafe fn read<T: Versioned>(given: *const T) -> Result<T, Failure> {
    // SAFETY: as this function's caller vouches for.
    let size = unsafe { stated(given)? };
    let known = size.min(size_of::<T>());
    let bytes = given.cast::<u8>();
    // SAFETY: the struct has `size` bytes.
    let later = unsafe { slice::from_raw_parts(bytes.add(known), size - known) };
    if let Some(at) = later.iter().position(|byte| *byte != 0) {
        return Err(Failure::Argument(format!(
            "{} has something at byte {} of its {size}, and this version of the library knows {known} bytes of it",
            T::NAME,
            known + at
        )));
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `known` bytes are there and have room; all of them, and zeros in place of the rest, are a value of the type.
    unsafe {
        ptr::copy_nonoverlapping(bytes, value.as_mut_ptr().cast(), known);
        Ok(value.assume_init())
    }
}

/// Writes a struct whose size the caller has set, as far as it goes.
///
/// # Safety
/// As [`read`], and the struct may be written.
pub(crate) unsafe fn write<T: Versioned>(to: *mut T, value: &T) -> Result<(), Failure> {
    // SAFETY: as this function's caller vouches for.
    let size = unsafe { stated(to.cast_const())? };
    let after_size = size_of::<u64>();
    let length = size.min(size_of::<T>()) - after_size;
    // SAFETY: as many bytes are there on both sides, behind the size.
    unsafe {
        let from = ptr::from_ref(value).cast::<u8>().add(after_size);
        ptr::copy_nonoverlapping(from, to.cast::<u8>().add(after_size), length);
    }
    Ok(())
}

/// The thing behind a pointer of the caller's.
///
/// # Safety
/// `given` is null, or points to a `T` that outlives the use.
pub(crate) unsafe fn pointee<'a, T>(given: *const T, name: &str) -> Result<&'a T, Failure> {
    // SAFETY: as this function's caller vouches for.
    unsafe { given.as_ref() }.ok_or_else(|| Failure::Argument(format!("the pointer to {name} is null")))
}

/// Room for what a call returns.
///
/// # Safety
/// `given` is null, or points to a `T` that may be written, and that nobody else uses.
pub(crate) unsafe fn room<'a, T>(given: *mut T, name: &str) -> Result<&'a mut T, Failure> {
    // SAFETY: as this function's caller vouches for.
    unsafe { given.as_mut() }.ok_or_else(|| Failure::Argument(format!("the pointer to {name} is null")))
}

/// A text; `None` if it is null.
///
/// # Safety
/// `given` is null, or points to a text that ends with a zero byte and outlives the use.
pub(crate) unsafe fn text<'a>(given: *const c_char, name: &str) -> Result<Option<&'a str>, Failure> {
    if given.is_null() {
        return Ok(None);
    }
    // SAFETY: as this function's caller vouches for.
    let text = unsafe { CStr::from_ptr(given) };
    text.to_str().map(Some).map_err(|_| Failure::Argument(format!("{name} is {text:?}, which is not UTF-8")))
}
