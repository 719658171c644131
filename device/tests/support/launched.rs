//! A kernel and its parameters, ready to run.

use std::{mem::MaybeUninit, slice};

use fused_collective_core::launch::{Extras, Fused};

/// Finds a part of the extras.
pub(super) type PartOf<T> = fn(&Extras) -> &T;

/// A kernel with its parameters: as source, and as what it is launched by where it is compiled.
pub struct Launched {
    run: Box<dyn Fn() + Send + Sync>,
    /// The name of the entry point.
    pub entry: String,
    /// The parameter's bytes.
    pub parameter: Box<[MaybeUninit<u8>]>,
}

/// The bytes of a parameter, padding included.
pub fn bytes_of<P>(params: &P) -> Box<[MaybeUninit<u8>]> {
    // SAFETY: the bytes of a value, initialized or not.
    unsafe { slice::from_raw_parts((&raw const *params).cast(), size_of::<P>()) }.into()
}

impl Launched {
    /// A kernel of other parameters.
    pub(super) fn of<P: Send + Sync + 'static>(entry: String, kernel: unsafe fn(&P), params: P) -> Launched {
        let parameter = bytes_of(&params);
        // SAFETY: as in `new`.
        Launched { run: Box::new(move || unsafe { kernel(&params) }), entry, parameter }
    }

    pub(super) fn new<X: Send + Sync + 'static, I: 'static, W: 'static>(
        entry: String,
        kernel: unsafe fn(&Fused<X>, &I, &W),
        params: Fused<X>,
        (prologue, wire): (PartOf<I>, PartOf<W>),
    ) -> Launched {
        let parameter = bytes_of(&params);
        // SAFETY: the parameters are as their documentation says, and geometries cover a row.
        let run = move || unsafe { kernel(&params, prologue(&params.extras), wire(&params.extras)) };
        Launched { run: Box::new(run), entry, parameter }
    }

    /// Runs the source, as one thread of a grid.
    pub fn run(&self) {
        (self.run)();
    }
}
