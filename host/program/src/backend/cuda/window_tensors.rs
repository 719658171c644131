//! The tensors of NCCL's all-reduce over a symmetric window.

use fused_collective::{
    Error, TensorProblem,
    cuda::{device::Context, driver::check},
};
use fused_collective_core::launch::Address;

use crate::backend::problem::{Problem, Tensor};

/// Alignment of each tensor, that of an allocation.
const ALIGNMENT: u64 = 256;

/// Addend and sum of a problem once more, for each set of tensors, in a window that the NCCL group owns. They have no guards
/// around them: NCCL's kernels are not this project's to check.
#[derive(Debug)]
pub(super) struct WindowTensors {
    context: Context,
    base: Address,
    addend: Tensor,
    sum: Tensor,
    /// Bytes of a tensor.
    bytes: u64,
    sets: usize,
}

impl WindowTensors {
    /// Bytes of a window for `sets` sets of the problem's tensors; `None` past 64 bits.
    pub(super) fn needed(problem: &Problem, sets: usize) -> Option<u64> {
        let bytes = problem.bytes(problem.addend())?.checked_next_multiple_of(ALIGNMENT)?;
        bytes.checked_mul(2)?.checked_mul(sets as u64)
    }

    /// The tensors in a window at `base` of as many bytes as [`needed`](Self::needed).
    pub(super) fn new(context: Context, base: Address, problem: &Problem, sets: usize) -> Self {
        let (addend, sum) = (problem.addend(), problem.sum());
        WindowTensors { context, base, addend, sum, bytes: problem.activation_bytes(), sets }
    }

    /// Address of `tensor` of a set, if it is in the window.
    pub(super) fn address(&self, set: usize, tensor: Tensor) -> Option<Address> {
        let place = match tensor {
            addend if addend == self.addend => 0,
            sum if sum == self.sum => 1,
            _ => return None,
        };
        let stride = self.bytes.next_multiple_of(ALIGNMENT);
        Some(self.base.offset((2 * set as u64 + place) * stride))
    }

    /// Writes `bytes` at `offset` into `tensor` of every set, if it is in the window.
    ///
    /// # Errors
    /// They do not fit, or the driver's.
    pub(super) fn write(&mut self, tensor: Tensor, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        if self.address(0, tensor).is_none() {
            return Ok(());
        }
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.bytes) {
            let problem = TensorProblem::Range { bytes: self.bytes, offset, length: bytes.len() as u64 };
            return Err(Error::Tensor { tensor: "the tensor", problem });
        }
        let _entered = self.context.enter()?;
        for address in (0..self.sets).filter_map(|set| self.address(set, tensor)) {
            // SAFETY: inside the window, as checked, which the group keeps as long as the problem.
            let code = unsafe {
                (self.context.driver().cuMemcpyHtoD_v2)(
                    address.0 + offset,
                    bytes.as_ptr().cast(),
                    bytes.len(),
                )
            };
            check("copy to the GPU", code)?;
        }
        Ok(())
    }

    /// The contents of `tensor` of the first set; `None` if it is not in the window.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn read(&self, tensor: Tensor) -> Result<Option<Vec<u8>>, Error> {
        let Some(address) = self.address(0, tensor) else { return Ok(None) };
        let mut bytes = vec![0; self.bytes as usize];
        let _entered = self.context.enter()?;
        // SAFETY: a tensor of the window, which the group keeps as long as the problem; the vector has the room.
        let code = unsafe {
            (self.context.driver().cuMemcpyDtoH_v2)(bytes.as_mut_ptr().cast(), address.0, bytes.len())
        };
        check("copy from the GPU", code)?;
        Ok(Some(bytes))
    }
}
