//! The number of cases for tests of bytes that come from outside.
//!
//! `FUSED_COLLECTIVE_LONG_TESTS=1 cargo test any_` tries for a minute, `PROPTEST_CASES=1000000 cargo test any_` longer.

use proptest::prelude::ProptestConfig;

/// As many cases as `PROPTEST_CASES` says, or else `few`, or fifty times as many where `FUSED_COLLECTIVE_LONG_TESTS` is
/// set.
pub(crate) fn cases(few: u32) -> ProptestConfig {
    let set = |variable| std::env::var_os(variable).is_some();
    match (set("PROPTEST_CASES"), set("FUSED_COLLECTIVE_LONG_TESTS")) {
        (true, _) => ProptestConfig::default(),
        (false, false) => ProptestConfig::with_cases(few),
        (false, true) => ProptestConfig::with_cases(50 * few),
    }
}

/// Cases that a test tries in a second or so.
pub(crate) const FEW: u32 = 256;
