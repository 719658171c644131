//! The contents of tensors, without a copy of them to the host.

use fused_collective::cuda::{driver::check, kernels::Parameters, memory::DeviceMemory};
use fused_collective_bench::{digest, launch::Digest, table::Probe};
use fused_collective_core::pack::Pack;
use zerocopy::IntoBytes as _;

use super::engine::{EAGER_THREADS, Engine};
use crate::backend::{error::Error, problem::Tensor};

/// The most blocks of a digest: enough for the memory's bandwidth, and few sums to read.
const DIGEST_BLOCKS: u64 = 256;

impl Engine<'_> {
    /// [`Collective::fill`](crate::backend::collective::Collective::fill).
    pub(super) fn fill_tensor(&mut self, tensor: Tensor, byte: u8) -> Result<(), Error> {
        let context = self.context();
        let _entered = context.enter()?;
        for (set, tensors) in self.sets.iter().enumerate() {
            let Some(memory) = tensors.get(&tensor).filter(|memory| memory.bytes() > 0) else { continue };
            let in_window = self.window.as_ref().and_then(|window| window.address(set, tensor));
            for address in [Some(memory.address()), in_window].into_iter().flatten() {
                // SAFETY: a tensor of the current problem, which is as long in the window; what reads and writes it follows in
                // the same stream, or is a copy, which waits for that stream.
                let code = unsafe {
                    (context.driver().cuMemsetD8Async)(
                        address.0,
                        byte,
                        memory.bytes() as usize,
                        self.handle(),
                    )
                };
                check("fill a tensor", code)?;
            }
        }
        Ok(())
    }

    /// [`Collective::digest`](crate::backend::collective::Collective::digest).
    pub(super) fn digest_tensor(&mut self, tensor: Tensor) -> Result<u64, Error> {
        let (bytes, stream) = (self.address(tensor), self.handle());
        let Some(memory) = self.sets.first().and_then(|tensors| tensors.get(&tensor)) else { return Ok(0) };
        let packs = memory.bytes() / Pack::BYTES;
        // The bytes past the last pack: those of a tensor in the window are packs.
        let rest = digest::of(2 * packs, &memory.read_from(packs * Pack::BYTES)?);
        let (context, kernels) = (self.context(), &mut self.probes);
        let limits = kernels.limits();
        let function = kernels.function(Probe::Digest.entry())?;
        let threads = EAGER_THREADS.min(function.max_threads());
        let blocks = packs.div_ceil(u64::from(threads)).min(DIGEST_BLOCKS);
        let launch = limits.for_elements(function, threads, blocks)?;
        let mut sums = vec![0u64; (launch.blocks() * threads) as usize];
        let out = match &mut self.sums {
            Some(out) if out.bytes() >= size_of_val(&*sums) as u64 => out,
            out => out.insert(DeviceMemory::new(&context, size_of_val(&*sums) as u64)?),
        };
        // SAFETY: the struct has no padding, which its crate asserts.
        let parameters = unsafe { Parameters::of(&Digest { bytes, sums: out.address(), packs }) };
        // SAFETY: the entry point takes these parameters; the tensor has as many packs, and `out` a number for each thread.
        unsafe { kernels.launch(launch, &parameters, stream)? };
        self.settle()?;
        if let Some(out) = &self.sums {
            out.read(0, sums.as_mut_bytes())?;
        }
        Ok(sums.into_iter().fold(rest, u64::wrapping_add))
    }
}
