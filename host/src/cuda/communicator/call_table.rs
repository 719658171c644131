//! The calls that kernels were launched for.

use std::collections::HashMap;

use fused_collective_core::agreement::{CALL_WORDS, Call};

/// The calls that kernels were launched for, by the numbers that kernels know them by. They are kept for good, since a
/// graph may be launched at any time: as many as there are different calls.
#[derive(Debug, Default)]
pub(super) struct CallTable {
    calls: Vec<Call>,
    numbers: HashMap<[u64; CALL_WORDS], u64>,
}

impl CallTable {
    /// The number of `call`.
    pub(super) fn name(&mut self, call: Call) -> u64 {
        *self.numbers.entry(call.to_words()).or_insert_with(|| {
            self.calls.push(call);
            self.calls.len() as u64 - 1
        })
    }

    /// The call with this number.
    pub(super) fn call(&self, number: u64) -> Option<Call> {
        usize::try_from(number).ok().and_then(|index| self.calls.get(index)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_a_kernel_hands_back_names_the_call_it_was_launched_for() {
        let calls = [1, 2, 1].map(|calls| Call::Replay { captured: 7, calls });
        let mut table = CallTable::default();
        let numbers = calls.map(|call| table.name(call));
        assert_eq!(numbers[0], numbers[2]);
        assert_ne!(numbers[0], numbers[1]);
        assert_eq!(numbers.map(|number| table.call(number)), calls.map(Some));
        assert_eq!([2, u64::MAX].map(|number| table.call(number)), [None, None]);
    }
}
