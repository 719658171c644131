//! An operation's rounds, each of which is one launch.
//!
//! Their launches are settled before the other ranks are told of the operation: whatever can be refused is refused
//! while nobody waits for it.

use fused_collective_core::{
    agreement::Call,
    fusion::Operation,
    launch::{Activations, Extras, Shape},
    plan::Plan,
};

use super::{
    super::{
        driver::{Handle, check},
        epilogue::Epilogue,
        kernels::Parameters,
    },
    Captured, Communicator,
    launches::{TOO_MANY_TOKENS, choose, kernel, row_packs},
};
use crate::error::Error;

impl Communicator {
    /// Settles the launch of every round of an operation, which loads its kernels if need be.
    ///
    /// # Errors
    /// There are no kernels for it, or they are missing or unusable.
    pub(super) fn choose_launches(&mut self, operation: &Operation, plan: &Plan) -> Result<(), Error> {
        let (module, kernel) = kernel(operation, plan.algorithm, self.limits.world_size)?;
        let limits = self.kernels.limits();
        let row_packs = row_packs(plan)?;
        let versions = self.kernels.versions(module, kernel, row_packs)?;
        if operation.post_norm.is_some() && !limits.keeps(versions, row_packs) {
            return Err(Error::Unsupported("a norm of the sum of rows that do not fit into registers"));
        }
        choose(plan, limits, versions, &mut self.launches)
    }

    /// Tells the other ranks of `call`, unless it is being captured, and launches every round of `plan` as chosen before.
    ///
    /// # Errors
    /// [`Error::Failed`]: the driver did not launch it, and the group is over, since the others wait. In a capture the
    /// driver's error.
    ///
    /// # Safety
    /// The launches were chosen for a kernel that takes this epilogue, the addresses are as [`enqueue`](Self::enqueue)
    /// asks, and `stream` is a stream of the current context.
    pub(super) unsafe fn launch_rounds(
        &mut self,
        plan: &Plan,
        call: Call,
        (activations, extras): (Activations, Extras),
        epilogue: &Epilogue,
        stream: Handle,
    ) -> Result<(), Error> {
        // SAFETY: a stream of the current context, as this function's caller says.
        let capturing = unsafe { self.is_capturing(stream)? };
        let captured: Captured = self.captured;
        self.announce(call, capturing);
        let number = self.calls.name(call);
        let mut parameters = Parameters::default();
        let launched = plan.rounds().zip(&self.launches).try_for_each(|(round, &launch)| {
            let shape = Shape::of_round(plan, &round, number).ok_or(TOO_MANY_TOKENS)?;
            parameters.clear();
            // SAFETY: the launch structs have no padding, which `core` asserts.
            unsafe {
                parameters.push(&self.group());
                parameters.push(&shape);
                parameters.push(&activations.of_round(plan, &round));
            }
            parameters.append(epilogue.parameters(launch.takes_any_epilogue()));
            // SAFETY: as above.
            unsafe { parameters.push(&extras) };
            // SAFETY: these are the kernel's parameters, as this function's caller says.
            unsafe { self.kernels.launch(launch, &parameters, stream) }
        });
        launched.map_err(|error| {
            if !capturing {
                return self.fail(error);
            }
            self.captured = captured;
            error
        })
    }

    /// Asks whether what is enqueued on `stream` is captured.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `stream` is a stream of the current context.
    pub(super) unsafe fn is_capturing(&self, stream: Handle) -> Result<bool, Error> {
        let mut capturing = 0;
        let driver = self.gpu.context().driver();
        // SAFETY: a stream of the current context, and room for the answer.
        let code = unsafe { (driver.cuStreamIsCapturing)(stream, &mut capturing) };
        check("ask whether the stream is being captured", code)?;
        Ok(capturing != 0)
    }
}
