//! Tensors on the GPU between guards.

use fused_collective::{
    Error, TensorProblem,
    cuda::{device::Context, memory::DeviceMemory},
};

use crate::backend::guards::{GUARD, GUARD_BYTES, stray_write};
use fused_collective_core::launch::Address;

/// A tensor on the GPU between its guards.
#[derive(Debug)]
pub(crate) struct GuardedMemory {
    memory: DeviceMemory,
    bytes: u64,
}

impl GuardedMemory {
    /// Bytes of one guard. A multiple of 256, so that the tensor is aligned as an allocation is.
    const GUARD_BYTES: u64 = GUARD_BYTES as u64;

    /// Allocates `bytes` bytes with unspecified contents.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(context: &Context, bytes: u64) -> Result<Self, Error> {
        let mut memory = DeviceMemory::new(context, bytes.saturating_add(2 * Self::GUARD_BYTES))?;
        for offset in [0, Self::GUARD_BYTES + bytes] {
            memory.write(offset, &[GUARD; GUARD_BYTES])?;
        }
        Ok(GuardedMemory { memory, bytes })
    }

    /// Address of the tensor.
    pub(crate) fn address(&self) -> Address {
        self.memory.address().offset(Self::GUARD_BYTES)
    }

    /// Size of the tensor.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes `bytes` at `offset`. Returns when they are there.
    ///
    /// # Errors
    /// They do not fit, or the driver's.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.bytes) {
            let problem = TensorProblem::Range { bytes: self.bytes, offset, length: bytes.len() as u64 };
            return Err(Error::Tensor { tensor: "the tensor", problem });
        }
        self.memory.write(Self::GUARD_BYTES + offset, bytes)
    }

    /// The contents from `offset` on.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn read_from(&self, offset: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.bytes.saturating_sub(offset) as usize];
        self.memory.read(Self::GUARD_BYTES + offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Describes the writes to the guards, if there were any.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn stray_write(&self) -> Result<Option<String>, Error> {
        let (mut before, mut after) = ([0; GUARD_BYTES], [0; GUARD_BYTES]);
        self.memory.read(0, &mut before)?;
        self.memory.read(Self::GUARD_BYTES + self.bytes, &mut after)?;
        Ok(stray_write(&before, &after))
    }
}
