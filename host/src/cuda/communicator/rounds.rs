//! An operation's rounds, each of which is one launch.
//!
//! Their launches are settled before the other ranks are told of the operation: whatever can be refused is refused
//! while nobody waits for it.

use fused_collective_core::{
    agreement::{Call, Chain},
    fusion::{Operation, PartialSums},
    kernels::Kernel,
    launch::{Activations, Extras, Shape},
    plan::{Plan, Round},
};

use super::{
    super::{
        driver::{Handle, check},
        epilogue::Epilogue,
        kernels::{Launch, Parameters},
    },
    Captured, Communicator,
    launches::{TOO_MANY_TOKENS, choose, kernel, row_packs},
};
use crate::error::Error;

/// The parameters of a round's kernels, beside the group.
struct OneRound<'a> {
    shape: Shape,
    activations: Activations,
    extras: Extras,
    epilogue: &'a Epilogue,
}

/// The exchange between hosts that an operation's rounds do.
#[derive(Clone, Copy)]
struct Exchange {
    /// All calls so far, the operation's included.
    chain: Chain,
    partial_sums: PartialSums,
    capturing: bool,
}

/// The type of the partial sums of a call.
fn partial_sums(call: &Call) -> PartialSums {
    match call {
        Call::Operation { operation, .. } => operation.partial_sums,
        Call::Barrier | Call::Replay { .. } => PartialSums::default(),
    }
}

impl Communicator {
    /// Settles the launch of every round of an operation, which loads its kernels if need be.
    ///
    /// # Errors
    /// There are no kernels for it, or they are missing or unusable.
    pub(super) fn choose_launches(&mut self, operation: &Operation, plan: &Plan) -> Result<(), Error> {
        let (module, kernel) = kernel(operation, plan.algorithm, self.limits.ranks_per_host())?;
        let limits = self.kernels.limits();
        let row_packs = row_packs(plan)?;
        let versions = self.kernels.versions(module, kernel, row_packs)?;
        limits.check_post_norm(operation, versions, row_packs)?;
        choose(plan, limits, versions, &mut self.launches)?;
        self.host_sums.clear();
        if plan.algorithm.spans_hosts() {
            let kernel = Kernel::host_sum().ok_or(Error::Unsupported("groups of several hosts"))?;
            let versions = self.kernels.versions(module, kernel, row_packs)?;
            choose(plan, limits, versions, &mut self.host_sums)?;
        }
        Ok(())
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
        let exchange = Exchange {
            chain: if capturing { self.captured.chain } else { self.log.chain() },
            partial_sums: partial_sums(&call),
            capturing,
        };
        let mut parameters = Parameters::default();
        let launched = (0..).zip(plan.rounds()).try_for_each(|(index, round): (usize, Round)| {
            let shape = Shape::of_round(plan, &round, number).ok_or(TOO_MANY_TOKENS)?;
            let of_round =
                OneRound { shape, activations: activations.of_round(plan, &round), extras, epilogue };
            let Some(&launch) = self.launches.get(index) else { return Ok(()) };
            if let Some(&host_sum) = self.host_sums.get(index) {
                let launches = [host_sum, launch];
                // SAFETY: as this function's caller says.
                return unsafe { self.launch_across(plan, &round, &of_round, launches, exchange, stream) };
            }
            parameters.clear();
            self.push_fused(&mut parameters, &of_round, launch);
            // SAFETY: these are the kernel's parameters, as this function's caller says.
            unsafe { self.kernels.launch(launch, &parameters, stream) }
        });
        launched.map_err(|error| {
            if !capturing {
                return self.fail_launch(error);
            }
            self.captured = captured;
            error
        })
    }

    /// Adds the parameters of a fused kernel, which is launched by `launch`.
    fn push_fused(&self, parameters: &mut Parameters, round: &OneRound<'_>, launch: Launch) {
        // SAFETY: the launch structs have no padding, which `core` asserts.
        unsafe {
            parameters.push(&self.group());
            parameters.push(&round.shape);
            parameters.push(&round.activations);
            parameters.append(round.epilogue.parameters(launch.takes_any_epilogue()));
            parameters.push(&round.extras);
        }
    }

    /// Launches a round between hosts: the kernel that sums this host's addends, NCCL's gather, and the fused kernel.
    ///
    /// # Errors
    /// The driver's, NCCL's.
    ///
    /// # Safety
    /// As [`launch_rounds`](Self::launch_rounds).
    unsafe fn launch_across(
        &mut self,
        plan: &Plan,
        round: &Round,
        of_round: &OneRound<'_>,
        [host_sum, fused]: [Launch; 2],
        exchange: Exchange,
        stream: Handle,
    ) -> Result<(), Error> {
        let Exchange { chain, partial_sums, capturing } = exchange;
        let group = self.group();
        let across = self.across.as_mut().ok_or(Error::Unsupported("an exchange with no other host"))?;
        let partials = across.partials(plan, round, partial_sums);
        let mut parameters = Parameters::default();
        // SAFETY: the launch structs have no padding, which `core` asserts. These are the kernel's parameters, and the
        // addresses and the stream are as this function's caller says.
        unsafe {
            parameters.push(&group);
            parameters.push(&of_round.shape);
            parameters.push(&of_round.activations);
            parameters.push(&of_round.extras.experts);
            parameters.push(&partials);
            self.kernels.launch(host_sum, &parameters, stream)?;
        }
        // SAFETY: as above.
        let gathered = unsafe { across.gather(plan, round, chain, capturing, stream)? };
        if capturing {
            self.captured.rounds = self.captured.rounds.wrapping_add(1);
            self.captured.last = Some(gathered);
        }
        parameters.clear();
        self.push_fused(&mut parameters, of_round, fused);
        // SAFETY: as above. NCCL's kernel ahead knows nothing of dependent launches.
        unsafe {
            parameters.push(&partials);
            self.kernels.launch_after(fused, &parameters, stream)
        }
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
