//! The whole operation in `f64`.
