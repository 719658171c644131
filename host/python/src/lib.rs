//! The extension module `fused_collective._native`: operations and communicators, on addresses. What Python's users see is in
//! `python/fused_collective`.

mod communicator;
mod failure;
mod operation;

use pyo3::prelude::*;

/// Operations and communicators, on addresses: see the package's own modules.
#[pymodule(gil_used = true)]
mod _native {
    #[pymodule_export]
    use super::{
        communicator::{Capture, Communicator, workspace_bytes},
        operation::Operation,
    };
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
