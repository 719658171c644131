//! An operation's rounds, each of which is one launch.
//!
//! How they are launched is settled before the other ranks are told of the operation: whatever can be refused is refused
//! while nobody waits for it.

use fused_collective_core::{
    agreement::Call,
    fusion::Operation,
    kernels::{Epilogue, Kernel, Module},
    launch::{Fused, Shape},
    plan::{Plan, Round},
};

use super::{
    super::{
        Error,
        driver::Handle,
        epilogue::{WithEpilogue, with_epilogue},
        kernels::Launch,
        tensors::Tensors,
    },
    Communicator,
};

impl Communicator {
    /// Settles how every round of an operation is launched, which loads its kernels if need be.
    ///
    /// # Errors
    /// There are no kernels for it, or they are missing or unusable.
    pub(super) fn choose_launches(
        &mut self,
        operation: &Operation,
        plan: &Plan,
        tensors: &Tensors,
    ) -> Result<(), Error> {
        self.launches.clear();
        for round in plan.rounds() {
            let chooser = Chooser { communicator: self, plan, round, operation };
            with_epilogue(operation.norm, operation.quantization, operation.hidden, tensors, chooser)?;
        }
        Ok(())
    }

    /// Launches every round of an operation, as [chosen](Self::choose_launches) before.
    ///
    /// # Errors
    /// The driver's; some rounds may have been launched.
    ///
    /// # Safety
    /// As [`enqueue`](Self::enqueue), and the tensors fit the operation.
    pub(super) unsafe fn launch_rounds(
        &mut self,
        operation: &Operation,
        plan: &Plan,
        call: Call,
        tensors: &Tensors,
        stream: Handle,
    ) -> Result<(), Error> {
        let call = self.names.name(call);
        for (round, launch) in plan.rounds().zip(0..) {
            let launch = self.launches[launch];
            let launcher = Launcher { communicator: self, plan, round, launch, call, tensors, stream };
            with_epilogue(operation.norm, operation.quantization, operation.hidden, tensors, launcher)?;
        }
        Ok(())
    }
}

/// Chooses the kernel of one round, and how it is launched.
struct Chooser<'a> {
    communicator: &'a mut Communicator,
    plan: &'a Plan,
    round: Round,
    operation: &'a Operation,
}

impl WithEpilogue for Chooser<'_> {
    fn call<X: Copy>(self, epilogue: Epilogue, _: X) -> Result<(), Error> {
        let Chooser { communicator, plan, round, operation } = self;
        let kernel =
            Kernel::of(plan.algorithm.into(), epilogue).ok_or(Error::Unsupported("this epilogue"))?;
        let module = Module { dtype: operation.dtype, set: communicator.set };
        let tokens = round.rows.tokens;
        let Shape { row_packs, .. } = Shape::of_round(plan, &round, 0).ok_or(TOO_MANY_TOKENS)?;
        let cluster = plan.cluster;
        let launch = communicator.kernels.for_rows(module, kernel, cluster, row_packs, tokens)?;
        communicator.launches.push(launch);
        Ok(())
    }
}

/// Launches one round.
struct Launcher<'a> {
    communicator: &'a mut Communicator,
    plan: &'a Plan,
    round: Round,
    /// Chosen for this round.
    launch: Launch,
    /// What kernels call the operation.
    call: u64,
    tensors: &'a Tensors,
    stream: Handle,
}

impl WithEpilogue for Launcher<'_> {
    fn call<X: Copy>(self, _: Epilogue, epilogue: X) -> Result<(), Error> {
        let Launcher { communicator, plan, round, launch, call, tensors, stream } = self;
        let shape = Shape::of_round(plan, &round, call).ok_or(TOO_MANY_TOKENS)?;
        let activations = tensors.activations().of_round(plan, &round);
        let parameters = Fused { group: communicator.group(), shape, activations, epilogue };
        // SAFETY: the kernel was chosen for this operation's epilogue, which is what the parameters have, and `enqueue`
        // has checked the tensors, whose addresses its caller vouches for.
        unsafe { communicator.kernels.launch(launch, &parameters, stream) }
    }
}

/// Why rows have no [`Shape`].
pub(crate) const TOO_MANY_TOKENS: Error = Error::Unsupported("rounds of 2^31 tokens or more");
