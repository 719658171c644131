//! The versions of kernels.

/// The ways to keep rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    P1,
    P2,
    Streamed,
}

impl Rows {
    /// As entry points are named for it.
    pub fn name(self) -> &'static str {
        match self {
            Rows::P1 => "p1",
            Rows::P2 => "p2",
            Rows::Streamed => "streamed",
        }
    }
}
