//! The digest of this processor.

use fused_collective_digest::{DIGEST, digest};

#[test]
fn this_processor_computes_the_specified_bits() {
    assert_eq!(digest(), DIGEST, "{:#018x}, not {DIGEST:#018x}", digest());
}
