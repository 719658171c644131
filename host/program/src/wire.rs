//! The formats of rows between ranks that the program measures.

use std::{fmt, str::FromStr};

use fused_collective_core::wire::WireFormat;
use serde::{Deserialize, Serialize};

/// A format of rows between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// The element type.
    #[default]
    Exact,
    /// [`WireFormat::Int8`].
    Int8,
    /// [`WireFormat::Int4`].
    Int4,
}

impl Wire {
    /// Every format.
    pub const ALL: [Wire; 3] = [Wire::Exact, Wire::Int8, Wire::Int4];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self.format() {
            Some(format) => format.name(),
            None => "exact",
        }
    }

    /// The operation's field.
    pub const fn format(self) -> Option<WireFormat> {
        match self {
            Wire::Exact => None,
            Wire::Int8 => Some(WireFormat::Int8),
            Wire::Int4 => Some(WireFormat::Int4),
        }
    }

    /// True for the element type.
    pub fn is_exact(self) -> bool {
        self == Wire::Exact
    }

    /// The part of a variant's name that tells it from the exact one: `_int8_wire`.
    pub fn part_of_name(self) -> String {
        if self.is_exact() { String::new() } else { format!("_{self}_wire") }
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownWire;

impl fmt::Display for UnknownWire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a format between ranks: use exact, int8 or int4")
    }
}

impl std::error::Error for UnknownWire {}

impl FromStr for Wire {
    type Err = UnknownWire;

    /// Reads a name.
    fn from_str(text: &str) -> Result<Self, UnknownWire> {
        Wire::ALL.into_iter().find(|wire| wire.name() == text).ok_or(UnknownWire)
    }
}
