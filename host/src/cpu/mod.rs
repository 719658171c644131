//! The CPU backend: ranks are processes, or threads, that share memory.
//!
//! [`Communicator`] is one rank's end. It runs fused operations ([`Communicator::all_reduce`]) on slices.
//! Every rank of the group must call the same operations in the same order. Where one does not, where one is late,
//! gone, or [aborted](Aborter), every rank's call fails and says why; the group is then over, and a new one can be
//! made in the same processes.

mod exchange;
pub mod experts;
pub mod finish;
mod fused;
mod lanes;
pub mod line;
#[cfg(all(test, not(emulated)))]
mod model;
mod region;
pub mod rows;
pub mod sum;
pub mod wait;
mod wire;

use std::{os::fd::AsFd as _, sync::Arc, time::Duration};

use fused_collective_core::{
    agreement::Call,
    fusion::{Operation, Residual, WeightType},
    norm::Weights,
    plan::{Limits, Plan},
    quant::Quantization,
    workspace::{Header, Layout, LayoutError},
};
use pulp::Arch;

use crate::{
    error::{Error, TensorProblem},
    group::{
        Aborter, Bootstrap,
        calls::{CallLog, Place},
        failure::{Cause, Failure, Fault},
        shared_memory::SharedMemory,
    },
    query::Query,
};
pub use exchange::EMPTY;
use exchange::Exchange;
pub use experts::ExpertRows;
use finish::Finish;
use fused::{Addend, Job, Scratch};
use region::Regions;
pub use rows::Plain;
pub use sum::Operand;
use wait::WaitGuard;

/// The tensors that an operation reads on one rank.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, E> {
    /// `[tokens, hidden]`: this rank's addend, or with experts the shared expert's rows; empty if there is none.
    pub input: Operand<&'a [E]>,
    /// `[tokens, hidden]`, if the operation has a residual, the same on every rank; or this rank's rows of a
    /// [sharded](Residual::Sharded) one.
    pub residual: Option<Operand<&'a [E]>>,
    /// `[hidden]`: the bias of the sum, if the operation has one.
    pub bias: Option<&'a [E]>,
    /// `[hidden]`: the weight of the norm of the sum, if the operation has one.
    pub post_gamma: Option<Weights<'a, E>>,
    /// The rows that this rank's addend is made of, if the operation has experts.
    pub experts: Option<ExpertRows<'a, E>>,
    /// `[hidden]`, if the operation has a norm; else not read.
    pub gamma: Weights<'a, E>,
    /// The per-tensor scale of static FP8 or the global scale of NVFP4; else not read.
    pub scale: f32,
}

/// The tensors that an operation writes on one rank. A tensor that the operation does not write may be empty, and is
/// left as it is.
#[derive(Debug)]
pub struct Outputs<'a, E> {
    /// `[tokens, hidden]`: the sum, plus the residual; or this rank's rows, if the residual is sharded.
    pub residual_out: &'a mut [E],
    /// `[tokens, hidden]`: the norm.
    pub norm_out: &'a mut [E],
    /// The quantized norm, [`Quantization::value_bytes_per_row`] for each token.
    pub quant_out: &'a mut [u8],
    /// Its scales, [`Quantization::scale_bytes`].
    pub scale_out: &'a mut [u8],
}

/// Bytes of a slot for each rank, unless one token needs more. What a round moves stays in a core's own caches, and
/// in a two-shot round of usual rows every rank owns a few tokens.
pub const SLOT_BYTES_PER_RANK: u64 = 128 << 10;

/// The first control line of what ranks tell each other; line 0 is the barriers'.
const CALLS_LINE: u64 = 1;
/// The use of the shared memory, for errors.
const MEMORY: &str = "share memory between the ranks";
/// Announced calls that are kept. A rank cannot be more than two rounds ahead of another.
const CALLS_KEPT: u64 = 4;

/// The layout of a group's memory for rows of at most `row_bytes`.
///
/// # Errors
/// A group that is too small or too large, or sizes beyond 64 bits.
pub fn layout(world_size: u32, row_bytes: u64) -> Result<Layout, LayoutError> {
    // The smallest round of any operation: with a sharded residual a token for each rank, a row from each for the one
    // that a rank owns and a row of results for each.
    let smallest = row_bytes.saturating_mul(2 * u64::from(world_size));
    Layout::new(world_size, (SLOT_BYTES_PER_RANK * u64::from(world_size)).max(smallest))
}

/// A group's settings. All ranks give the same.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of the longest row of any operation, hidden size times bytes of an element.
    pub max_row_bytes: u64,
    /// The longest wait for another rank.
    pub deadline: Duration,
}

/// Refuses ranks on several hosts.
fn check_host(bootstrap: &dyn Bootstrap) -> Result<(), Error> {
    // Where the host cannot be named, on some sandbox, the memory shows whether ranks share it.
    let hosts = bootstrap.all_gather(&bootstrap.host().unwrap_or_default()).map_err(Error::bootstrap)?;
    let rank = bootstrap.rank();
    let own = hosts.get(rank as usize);
    let Some((peer, other)) = (0..).zip(&hosts).find(|(_, host)| Some(*host) != own) else { return Ok(()) };
    let name = |host: &[u8]| String::from_utf8_lossy(host).trim().to_owned();
    let own = name(own.map_or(&[], Vec::as_slice));
    let why = format!(
        "rank {rank} is on host {own}, rank {peer} on host {}, and the CPU backend is for ranks of one host",
        name(other)
    );
    Err(Error::Pair { rank, peer, why })
}

/// One rank's end of a group.
#[derive(Debug)]
pub struct Communicator {
    rank: u32,
    exchange: Exchange,
    aborter: Aborter,
    limits: Limits,
    scratch: Scratch,
    barriers: u64,
    failed: Option<Box<Failure>>,
    arch: Arch,
}

impl Communicator {
    /// Joins the ranks of `bootstrap`: makes the memory that they share, [`layout`]`.total_bytes()` bytes that are gone
    /// with their last user, and waits for every peer to be ready. All ranks call this with the same `options`.
    ///
    /// Waits end early when the bootstrap's monitor tells of a lost rank; without one, at the deadline.
    ///
    /// # Errors
    /// The bootstrap's; [`Error::Pair`] if ranks are on several hosts; the memory cannot be made or mapped; a peer's region
    /// has another layout, or is not ready in time.
    pub fn join(bootstrap: &dyn Bootstrap, options: Options) -> Result<Communicator, Error> {
        let (rank, world_size) = (bootstrap.rank(), bootstrap.world_size());
        let Options { max_row_bytes, deadline } = options;
        check_host(bootstrap)?;
        let layout = layout(world_size, max_row_bytes)?;
        let own = match rank {
            0 => Some(SharedMemory::create(layout.total_bytes()).map_err(Error::system(MEMORY))?),
            _ => None,
        };
        let file = bootstrap.share_file(own.as_ref().map(|file| file.as_fd())).map_err(Error::bootstrap)?;
        let regions = Regions::map(file.as_fd(), layout).map_err(Error::system(MEMORY))?;
        let place = Place {
            first: layout.control_offset(CALLS_LINE),
            stride: layout.region_bytes(),
            calls: CALLS_KEPT,
        };
        let log = CallLog::new(Arc::clone(regions.memory()), place, rank, world_size);
        let aborter = log.aborter();
        let monitor = bootstrap.monitor();
        let exchange = Exchange::new(regions, WaitGuard { rank, deadline, monitor, log: Some(log) });
        let header = |rank| Header { world_size, rank, slot_bytes: layout.slot_bytes() };
        exchange.publish_header(header(rank));
        for peer in 0..layout.world_size() {
            let words = exchange.wait_for_header(peer).map_err(Error::Failed)?;
            header(peer).check(words).map_err(|source| {
                // The others need not wait for this rank either.
                if let Some(log) = &exchange.guard().log {
                    log.give_up(Fault::OutOfStep, peer);
                }
                Error::Header { peer, source }
            })?;
        }
        let limits = Limits {
            world_size: layout.world_size(),
            hosts: 1,
            slot_bytes: layout.slot_bytes(),
            compute_units: 1,
            max_cluster: 1,
            one_shot_bytes: ONE_SHOT_BYTES,
        };
        let scratch = Scratch::default();
        Ok(Communicator {
            rank,
            exchange,
            aborter,
            limits,
            scratch,
            barriers: 0,
            failed: None,
            arch: Arch::new(),
        })
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> u32 {
        self.limits.world_size
    }

    /// The limits that operations are planned with; the same on every rank.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Plans `operation` without running it: the collective that it would use, and its rounds.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce) has, but for tensors: the operation is invalid or too large, or the group is
    /// over.
    pub fn query(&mut self, operation: &Operation) -> Result<Query, Error> {
        self.check_usable()?;
        let plan = Plan::new(operation, &self.limits)?;
        Ok(Query { algorithm: plan.algorithm, rounds: plan.rounds().count() as u64 })
    }

    /// Runs `operation` with this rank's tensors. Returns when this rank's outputs are complete.
    ///
    /// # Errors
    /// Before anything is sent: what [`Plan::new`] refuses, and tensors that do not fit the operation. After
    /// [`Error::Failed`] the communicator is poisoned: every later call fails at once, and outputs mean nothing.
    /// The other ranks' calls fail too.
    pub fn all_reduce<E: Plain>(
        &mut self,
        operation: &Operation,
        inputs: Inputs<'_, E>,
        outputs: Outputs<'_, E>,
    ) -> Result<(), Error> {
        self.check_usable()?;
        let plan = Plan::new(operation, &self.limits)?;
        let call = Call::operation(operation, plan.algorithm, Some(inputs.scale));
        let job = check(operation, self.rank, self.limits.world_size, inputs, outputs)?;
        // An operation without tokens waits for nobody, so there is nobody to compare it with yet.
        let alone = operation.tokens == 0;
        self.announce(call, alone);
        fused::run(&mut self.exchange, self.rank, &plan, job, &mut self.scratch, self.arch)
            .and_then(|()| if alone { Ok(()) } else { self.agree() })
            .map_err(|failure| self.fail(failure))
    }

    /// Returns once every rank of the group has called it as often.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn barrier(&mut self) -> Result<(), Error> {
        self.check_usable()?;
        self.barriers += 1;
        self.announce(Call::Barrier, false);
        self.exchange.barrier(self.barriers).and_then(|()| self.agree()).map_err(|failure| self.fail(failure))
    }

    /// Makes a handle that ends the group's operations, on all ranks, from any thread. It may outlive the communicator.
    pub fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }

    /// Looks, while no operation runs, for what this rank's region holds all the same: for tests.
    pub fn find_stray_write(&self) -> Option<String> {
        self.exchange.find_stray_write(self.header(self.rank))
    }

    /// The end of this rank's waits, for waits of one's own.
    pub fn guard(&self) -> &WaitGuard {
        self.exchange.guard()
    }

    /// The instructions that [rows] are computed with.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    fn header(&self, rank: u32) -> Header {
        Header { world_size: self.limits.world_size, rank, slot_bytes: self.limits.slot_bytes }
    }

    /// Refuses a group that has failed or was aborted.
    ///
    /// # Errors
    /// [`Error::Poisoned`], or [`Error::Failed`] the first time that an abort is noticed.
    pub fn check_usable(&mut self) -> Result<(), Error> {
        if let Some(failure) = &self.failed {
            return Err(Error::Poisoned(failure.clone()));
        }
        if self.exchange.guard().log.as_ref().is_some_and(CallLog::is_aborted) {
            let failure = Failure { rank: self.rank, wait: None, cause: Cause::Aborted };
            return Err(self.fail(Box::new(failure)));
        }
        Ok(())
    }

    /// Tells the others what is called, before anything is sent for it.
    fn announce(&mut self, call: Call, alone: bool) {
        if let Some(log) = &mut self.exchange.guard_mut().log {
            if alone { log.pass(&call) } else { log.announce(call) }
        }
    }

    /// Checks that all ranks made this call. Data of every one of them has come, and so have their announcements.
    fn agree(&self) -> Result<(), Box<Failure>> {
        let disagreement = self.exchange.guard().log.as_ref().and_then(CallLog::disagreement_at_end);
        disagreement.map_or(Ok(()), |disagreement| {
            Err(Box::new(Failure { rank: self.rank, wait: None, cause: Cause::OutOfStep(disagreement) }))
        })
    }

    /// Gives the group up because of a failed wait of one's own, as the other ranks learn.
    pub fn fail(&mut self, failure: Box<Failure>) -> Error {
        if let (Some(log), Some((fault, because_of))) = (&self.exchange.guard().log, failure.fault()) {
            log.give_up(fault, because_of);
        }
        self.failed = Some(failure.clone());
        Error::Failed(failure)
    }
}

/// [`Mode::Auto`](fused_collective_core::fusion::Mode) takes one-shot up to this many bytes of activation. Here every rank
/// adds up in one-shot what its owner alone adds up in two-shot, which outweighs the second wait soon: two ranks took 0.85
/// times as long in one-shot with 0.5 KiB, 0.97 times with 4 KiB, 1.05 times with 8 KiB and 1.15 times with 32 KiB.
const ONE_SHOT_BYTES: u64 = 6 << 10;

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Communicator>();
};

/// Checks the tensors against a valid operation.
fn check<'a, E: Plain>(
    operation: &Operation,
    rank: u32,
    world_size: u32,
    inputs: Inputs<'a, E>,
    outputs: Outputs<'a, E>,
) -> Result<Job<'a, E>, Error> {
    let wrong = |tensor, problem| Error::Tensor { tensor, problem };
    if operation.dtype != E::DTYPE {
        let (given, needed) = (E::DTYPE.name(), operation.dtype.name());
        return Err(wrong("input", TensorProblem::Type { given, needed }));
    }
    for (tensor, needed, given) in [
        ("residual", operation.residual.is_some(), inputs.residual.is_some()),
        ("bias", operation.bias, inputs.bias.is_some()),
        ("post_gamma", operation.post_norm.is_some(), inputs.post_gamma.is_some()),
        ("expert_rows", operation.experts.is_some(), inputs.experts.is_some()),
    ] {
        match (needed, given) {
            (true, false) => return Err(wrong(tensor, TensorProblem::Missing)),
            (false, true) => return Err(wrong(tensor, TensorProblem::Superfluous)),
            _ => {}
        }
    }
    let quantization = operation.quantization;
    let elements = operation.tokens * operation.hidden;
    let residual_elements = operation.residual_rows(rank, world_size) * operation.hidden;
    let quant_row_bytes = quantization.value_bytes_per_row(operation.hidden);
    let length = |tensor, given: usize, needed: u64| match given as u64 {
        given if given == needed => Ok(()),
        given => Err(Error::Tensor { tensor, problem: TensorProblem::Length { given, needed } }),
    };
    let scale_bytes = quantization.scale_bytes(operation.tokens, operation.hidden).unwrap_or(u64::MAX);
    match inputs.input {
        Operand::Apart(input) if !operation.reads_input() => length("input", input.len(), 0)?,
        Operand::Apart(input) => length("input", input.len(), elements)?,
        Operand::InPlace if !operation.reads_input() => {
            return Err(wrong("input", TensorProblem::Superfluous));
        }
        Operand::InPlace if !operation.writes_norm() => {
            return Err(wrong("input", TensorProblem::NoPlace { output: "norm_out" }));
        }
        Operand::InPlace => {}
    }
    if let Some(Operand::Apart(residual)) = inputs.residual {
        length("residual", residual.len(), residual_elements)?;
    }
    if let Some(bias) = inputs.bias {
        length("bias", bias.len(), operation.hidden)?;
    }
    let weights = |tensor, given: Weights<'_, E>, needed: WeightType, count: u64| {
        if needed != given.weight_type() {
            let name = |weights| match weights {
                WeightType::Element => operation.dtype.name(),
                WeightType::F32 => "float32 beside the element type",
            };
            let (given, needed) = (name(given.weight_type()), name(needed));
            return Err(wrong(tensor, TensorProblem::Type { given, needed }));
        }
        length(tensor, given.len(), count)
    };
    if let Some(norm) = operation.norm {
        weights("gamma", inputs.gamma, norm.gamma, operation.hidden)?;
    }
    let post_norm = operation.post_norm.zip(inputs.post_gamma);
    if let Some((norm, gamma)) = post_norm {
        weights("post_gamma", gamma, norm.gamma, operation.hidden)?;
    }
    let experts = inputs.experts.zip(operation.experts);
    if let Some((tensors, experts)) = &experts {
        let (given, hidden) = (tensors.rows.len() as u64, operation.hidden);
        if !given.is_multiple_of(hidden) {
            return Err(wrong("expert_rows", TensorProblem::Rows { given, hidden }));
        }
        let chosen = operation.tokens * u64::from(experts.top_k);
        length("expert_index", tensors.index.len(), chosen)?;
        weights("expert_scales", tensors.scales, experts.scales, chosen)?;
        tensors.check(experts.top_k, hidden).map_err(|problem| wrong("expert_index", problem))?;
    }
    quantization.check_scale(inputs.scale).map_err(Error::Scale)?;
    length("residual_out", outputs.residual_out.len(), residual_elements)?;
    let norm_out = if operation.writes_norm() {
        length("norm_out", outputs.norm_out.len(), elements)?;
        outputs.norm_out
    } else {
        &mut []
    };
    let (quant_out, scale_out) = if quantization == Quantization::None {
        (Default::default(), Default::default())
    } else {
        length("quant_out", outputs.quant_out.len(), operation.tokens * quant_row_bytes)?;
        length("scale_out", outputs.scale_out.len(), scale_bytes)?;
        (outputs.quant_out, outputs.scale_out)
    };
    let finish = operation.norm.map(|norm| Finish {
        norm,
        gamma: inputs.gamma,
        quantization,
        scale: inputs.scale,
        tokens: operation.tokens,
    });
    Ok(Job {
        addend: Addend { input: inputs.input, experts },
        residual: inputs.residual,
        bias: inputs.bias,
        post_norm,
        rounding: operation.rounding,
        wire: operation.wire,
        residual_out: outputs.residual_out,
        norm_out,
        quant_out,
        scale_out,
        finish,
        hidden: operation.hidden as usize,
        quant_row_bytes: quant_row_bytes as usize,
        dealt_to: if operation.residual == Residual::Sharded { world_size } else { 1 },
    })
}
