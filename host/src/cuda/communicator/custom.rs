//! Operations with a kernel of the caller's: one of this project's collectives with an epilogue of one's own.

use fused_collective_core::{
    agreement::Call,
    dtype::DType,
    fusion::{Mode, Operation, PartialSums, Residual, Rounding},
    kernels::{Family, Version},
    launch::{Activations, Extras},
    plan::Plan,
    quant::Quantization,
};

use super::{
    super::{
        driver::Handle,
        epilogue::Epilogue,
        kernels::{Module, Versions},
        tensors::{DeviceTensor, TensorType, address, check},
    },
    Communicator,
    launches::choose,
};
use crate::error::Error;

/// FNV-1a's start and factor (Fowler, Noll and Vo, 64 bits).
const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

/// An entry point of the caller's, loaded: see [`Communicator::load_kernel`].
#[derive(Debug)]
pub struct CustomKernel {
    versions: Versions,
    /// Tells it from other kernels, on every rank alike.
    digest: u64,
    /// Compiled for a processor with clusters and dependent launch.
    has_clusters: bool,
}

/// An operation with a kernel of the caller's: all-reduce, residual add, and the kernel's epilogue.
#[derive(Clone, Copy, Debug)]
pub struct CustomOperation {
    /// Element type of all activations: the kernel's.
    pub dtype: DType,
    /// Rows.
    pub tokens: u64,
    /// Elements of a row: a multiple of 16.
    pub hidden: u64,
    /// This rank's addend, `[tokens, hidden]`.
    pub input: DeviceTensor,
    /// The residual, `[tokens, hidden]`, the same on every rank, if there is one; with a sharded kernel this rank's rows.
    pub residual: Option<DeviceTensor>,
    /// The sum, plus the residual, of the residual's shape.
    pub residual_out: DeviceTensor,
}

impl Communicator {
    /// Loads the entry point `entry` of `image`, PTX as text or machine code that was built from
    /// `fused-collective-device`: its kernel takes a `Fused<X>` with an epilogue `X` of the caller's. `family` is the
    /// collective in it, and `version` how many packs of a row a thread of it keeps. All ranks load the same.
    ///
    /// # Errors
    /// The driver cannot use the image, it was built for another version of the launch structs, or it lacks the entry
    /// point; `family` is none that ranks take part in.
    pub fn load_kernel(
        &self,
        image: &[u8],
        entry: &str,
        family: Family,
        version: Version,
    ) -> Result<CustomKernel, Error> {
        if family == Family::Local {
            return Err(Error::Unsupported("a custom kernel without a collective"));
        }
        let digest = [image, &[0], entry.as_bytes()]
            .concat()
            .iter()
            .fold(FNV_BASIS, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME));
        let has_clusters = target_capability(image).unwrap_or(self.gpu.capability) >= 90;
        let function = Module::load(self.gpu.context(), image.to_vec())?.function(entry)?;
        Ok(CustomKernel { versions: Versions::of_one(family, version, function), digest, has_clusters })
    }

    /// Enqueues `operation` with `kernel` on `stream`, as [`enqueue`](Self::enqueue) does the library's own: planned,
    /// announced, in rounds, with bounded waits, and captured into graphs. `epilogue` is the bytes of the kernel's epilogue
    /// parameters. Rows of later rounds are the epilogue's by the shape that the kernel is told.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue); rows that the kernel's version cannot hold.
    ///
    /// # Safety
    /// As [`enqueue`](Self::enqueue); the kernel keeps the rules of [`fused_collective_core::launch`] and takes an epilogue
    /// of these bytes, whose addresses are what the kernel needs until the operation has ended.
    pub unsafe fn enqueue_kernel(
        &mut self,
        kernel: &mut CustomKernel,
        operation: &CustomOperation,
        epilogue: &[u8],
        stream: Handle,
    ) -> Result<(), Error> {
        self.check_usable()?;
        let family = kernel.versions.family();
        let &CustomOperation { dtype, tokens, hidden, input, residual, residual_out } = operation;
        let shape = Operation {
            dtype,
            tokens,
            hidden,
            residual: match (family, residual) {
                (Family::Sharded, _) => Residual::Sharded,
                (_, residual) => Residual::replicated(residual.is_some()),
            },
            norm: None,
            quantization: Quantization::None,
            keep_norm: false,
            rounding: Rounding::Once,
            bias: false,
            post_norm: None,
            experts: None,
            wire: None,
            partial_sums: PartialSums::F32,
            mode: if family == Family::OneShot { Mode::OneShot } else { Mode::TwoShot },
        };
        if self.limits.hosts > 1 {
            return Err(Error::Unsupported("kernels of one's own between hosts"));
        }
        let plan = Plan::new(&shape, &self.limits)?;
        let element = TensorType::Element(dtype);
        let rows = shape.residual_rows(self.rank, self.limits.world_size) * hidden;
        check("input", Some(input), Some((tokens * hidden, element)))?;
        check("residual", residual, shape.residual.is_some().then_some((rows, element)))?;
        check("residual_out", Some(residual_out), Some((rows, element)))?;
        let _entered = self.gpu.context().clone().enter()?;
        let limits = self.kernels.limits().of_processor(kernel.has_clusters);
        choose(&plan, limits, &mut kernel.versions, &mut self.launches)?;
        let epilogue = Epilogue::of_bytes(epilogue);
        let call = Call::custom(&shape, plan.algorithm, kernel.digest);
        let [to_sum, sum] = [input, residual_out].map(|tensor| address(Some(tensor)));
        let activations = Activations::new(to_sum, address(residual), sum, shape.rounding);
        // SAFETY: the launches were chosen for the kernel, which takes this epilogue, as this function's caller says, who
        // vouches for the addresses and the stream, too.
        unsafe { self.launch_rounds(&plan, call, (activations, Extras::NONE), &epilogue, stream) }
    }
}

/// The compute capability that PTX was compiled for, from its `.target`; `None` for machine code, which runs on the GPU that
/// it was compiled for.
fn target_capability(image: &[u8]) -> Option<u32> {
    let text = str::from_utf8(image).ok()?;
    let target = text.lines().find_map(|line| line.trim().strip_prefix(".target sm_"))?;
    let digits = target.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_read_from_ptx() {
        let capability =
            |target: &str| target_capability(format!(".version 8.6\n.target {target}\n").as_bytes());
        assert_eq!(capability("sm_90"), Some(90));
        assert_eq!(capability("sm_100a, texmode_independent"), Some(100));
        assert_eq!(target_capability(b"\x7fELF\xff"), None);
    }
}
