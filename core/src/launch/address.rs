//! Addresses that kernels are told.

/// An address in the memory of the device, or in memory mapped there. Zero stands for "not there".
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// No memory: an optional tensor that is absent.
    pub const NULL: Address = Address(0);

    /// Whether there is no memory.
    #[inline(always)]
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }

    /// The address `bytes` further on.
    #[inline(always)]
    pub const fn offset(self, bytes: u64) -> Address {
        Address(self.0.wrapping_add(bytes))
    }
}
