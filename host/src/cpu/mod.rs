//! The CPU backend: ranks are processes, or threads, that share memory.
//!
//! [`Communicator`] is one rank's end. It runs fused operations ([`Communicator::all_reduce`]) on slices.
//! Every rank of the group must call the same operations in the same order. Where one does not, where one is late,
//! gone, or [aborted](Aborter), every rank's call fails and says why; the group is then over, and a new one can be
//! made in the same processes.

mod cache;
mod engine;
mod exchange;
mod fused;
mod lanes;
mod line;
mod links;
#[cfg(test)]
mod model;
mod region;
mod rows;
mod wait;

use std::{
    fmt, io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use fused_collective_core::{
    agreement::Call,
    dtype::DType,
    fusion::{GammaType, Operation, Residual},
    norm::Gamma,
    plan::{Limits, Plan, PlanError},
    quant::Quantization,
    workspace::{Header, HeaderError, Layout},
};
use pulp::Arch;

pub use crate::board::Aborter;
use crate::{
    board::{Board, Place},
    failure::{Cause, Failure, Fault},
    shared_memory::SharedMemory,
};
pub(crate) use cache::cache_bytes;
pub use engine::Engine;
pub(crate) use engine::sets;
use exchange::Exchange;
use fused::{Job, Scratch};
use region::Regions;
pub use rows::Plain;
use rows::{Finish, RowOutputs};
use wait::Vigil;
pub use wait::Watch;

/// What an operation reads on one rank.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, E> {
    /// `[tokens, hidden]`: this rank's addend.
    pub input: &'a [E],
    /// `[tokens, hidden]`, if the operation has a residual, the same on every rank; or this rank's rows of a
    /// [sharded](Residual::Sharded) one.
    pub residual: Option<&'a [E]>,
    /// `[hidden]`, if the operation has a norm; else not read.
    pub gamma: Gamma<'a, E>,
    /// The per-tensor scale of static FP8 or the global scale of NVFP4; else not read.
    pub scale: f32,
}

/// What an operation writes on one rank. A tensor that the operation does not write may be empty, and is
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

/// Why a call on a communicator failed.
#[derive(Clone, Debug)]
pub enum Error {
    /// The operation cannot be planned.
    Plan(PlanError),
    /// The operation's element type is not the slices'.
    DType {
        /// The operation's.
        operation: DType,
        /// The slices'.
        slices: DType,
    },
    /// Gamma is not of the type that the operation's norm says.
    Gamma {
        /// The norm's.
        operation: GammaType,
        /// The slice's.
        given: GammaType,
    },
    /// A tensor has another length than the operation says.
    Length {
        /// Which tensor.
        tensor: &'static str,
        /// Its length, in elements or bytes as its type has them.
        given: usize,
        /// The length it should have.
        needed: u64,
    },
    /// The operation has a residual and none was given, or the other way round.
    Residual {
        /// Whether the operation has one.
        operation: bool,
    },
    /// The shared memory is not usable.
    Memory(String),
    /// A peer's region is not what it should be.
    Peer {
        /// The peer.
        rank: u32,
        /// What is wrong with it.
        error: HeaderError,
    },
    /// The call failed while it ran, or because the group is known to be over.
    Failed(Box<Failure>),
    /// An earlier call failed so, and what peers sent for it may lie in any slot: create a new communicator.
    Poisoned(Box<Failure>),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Plan(error) => error.fmt(f),
            Error::DType { operation, slices } => {
                write!(f, "the operation is {operation}, its tensors are {slices}")
            }
            Error::Gamma { operation, given } => {
                let name = |gamma| match gamma {
                    GammaType::Element => "the element type",
                    GammaType::F32 => "float32",
                };
                write!(f, "gamma is given in {}, the operation has it in {}", name(*given), name(*operation))
            }
            Error::Length { tensor, given, needed } => {
                write!(f, "{tensor} has length {given}, the operation needs {needed}")
            }
            Error::Residual { operation: true } => {
                f.write_str("the operation has a residual, and none was given")
            }
            Error::Residual { operation: false } => {
                f.write_str("the operation has no residual, and one was given")
            }
            Error::Memory(what) => write!(f, "the group's shared memory: {what}"),
            Error::Peer { rank, error } => write!(f, "rank {rank}: {error}"),
            Error::Failed(failure) => failure.fmt(f),
            Error::Poisoned(failure) => write!(f, "an earlier operation failed: {failure}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        Error::Plan(error)
    }
}

/// Bytes of a slot for each rank, unless one token needs more. What a round moves stays in a core's own caches, and
/// in a two-shot round of usual rows every rank owns a few tokens.
const SLOT_BYTES_PER_RANK: u64 = 128 << 10;

/// The first control line of what ranks tell each other; line 0 is the barriers'.
const BOARD_LINE: u64 = 1;
/// Announced calls that are kept. A rank cannot be more than two rounds ahead of another.
const CALLS_KEPT: u64 = 4;

/// The layout of a group's memory for rows of at most `row_bytes`.
///
/// # Errors
/// A group that is too small or too large, or sizes beyond 64 bits.
pub fn layout(
    world_size: u32,
    row_bytes: u64,
) -> Result<Layout, fused_collective_core::workspace::LayoutError> {
    // The smallest round of any operation: with a sharded residual a token for each rank, a row from each for the one
    // that a rank owns and a row of results for each.
    let smallest = row_bytes.saturating_mul(2 * u64::from(world_size));
    Layout::new(world_size, (SLOT_BYTES_PER_RANK * u64::from(world_size)).max(smallest))
}

/// Creates the memory that the ranks of one group share: `layout.total_bytes()` bytes, gone with its last user.
///
/// # Errors
/// The system's.
pub fn create_shared_memory(layout: &Layout) -> io::Result<OwnedFd> {
    SharedMemory::create(layout.total_bytes())
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
    /// Maps `memory`, which one rank made with [`create_shared_memory`] for the same `layout`, prepares this rank's
    /// region in it and waits for every peer to have prepared its own.
    ///
    /// Every wait is bounded by `deadline`, and ends early when `watch` tells of a lost rank.
    ///
    /// # Errors
    /// The memory is not of that layout or cannot be mapped; a peer's region has another layout, or is not
    /// ready in time.
    pub fn join(
        memory: BorrowedFd<'_>,
        layout: Layout,
        rank: u32,
        deadline: Duration,
        watch: Watch,
    ) -> Result<Communicator, Error> {
        if rank >= layout.world_size() {
            return Err(Error::Memory(format!("rank {rank} is not in a group of {}", layout.world_size())));
        }
        let regions = Regions::map(memory, layout).map_err(|error| Error::Memory(error.to_string()))?;
        let place = Place {
            first: layout.control_offset(BOARD_LINE),
            stride: layout.region_bytes(),
            calls: CALLS_KEPT,
        };
        let board = Board::new(Arc::clone(regions.memory()), place, rank, layout.world_size());
        let aborter = board.aborter();
        let exchange = Exchange::new(regions, Vigil { rank, deadline, watch, board: Some(board) });
        let header = |rank| Header { world_size: layout.world_size(), rank, slot_bytes: layout.slot_bytes() };
        exchange.publish_header(header(rank));
        for peer in 0..layout.world_size() {
            let words = exchange.wait_for_header(peer).map_err(Error::Failed)?;
            header(peer).check(words).map_err(|error| {
                // The others need not wait for this rank either.
                if let Some(board) = &exchange.vigil().board {
                    board.give_up(Fault::OutOfStep, peer);
                }
                Error::Peer { rank: peer, error }
            })?;
        }
        let limits = Limits {
            world_size: layout.world_size(),
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

    /// What operations are planned with; the same on every rank.
    pub fn limits(&self) -> &Limits {
        &self.limits
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
            .map_err(|failure| self.poison(failure))
    }

    /// Returns once every rank of the group has called it as often.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn barrier(&mut self) -> Result<(), Error> {
        self.check_usable()?;
        self.barriers += 1;
        self.announce(Call::Barrier, false);
        self.exchange
            .barrier(self.barriers)
            .and_then(|()| self.agree())
            .map_err(|failure| self.poison(failure))
    }

    /// For other threads: ends the group's operations, on all ranks. It may outlive the communicator.
    pub fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }

    /// What this rank's region holds although no operation runs, if anything.
    pub(crate) fn find_stray_write(&self) -> Option<String> {
        self.exchange.find_stray_write(self.header(self.rank))
    }

    pub(crate) fn arch(&self) -> Arch {
        self.arch
    }

    fn header(&self, rank: u32) -> Header {
        Header { world_size: self.limits.world_size, rank, slot_bytes: self.limits.slot_bytes }
    }

    fn check_usable(&mut self) -> Result<(), Error> {
        if let Some(failure) = &self.failed {
            return Err(Error::Poisoned(failure.clone()));
        }
        if self.exchange.vigil().board.as_ref().is_some_and(Board::is_aborted) {
            let failure = Failure { rank: self.rank, wait: None, cause: Cause::Aborted };
            return Err(self.poison(Box::new(failure)));
        }
        Ok(())
    }

    /// Tells the others what is called, before anything is sent for it.
    fn announce(&mut self, call: Call, alone: bool) {
        if let Some(board) = &mut self.exchange.vigil_mut().board {
            if alone { board.pass(&call) } else { board.announce(call) }
        }
    }

    /// Whether all ranks made this call. Data of every one of them has come, and what they announced before it.
    fn agree(&self) -> Result<(), Box<Failure>> {
        let disagreement = self.exchange.vigil().board.as_ref().and_then(Board::disagreement_at_end);
        disagreement.map_or(Ok(()), |disagreement| {
            Err(Box::new(Failure { rank: self.rank, wait: None, cause: Cause::OutOfStep(disagreement) }))
        })
    }

    fn poison(&mut self, failure: Box<Failure>) -> Error {
        if let (Some(board), Some((fault, because_of))) = (&self.exchange.vigil().board, failure.fault()) {
            board.give_up(fault, because_of);
        }
        self.failed = Some(failure.clone());
        Error::Failed(failure)
    }
}

/// [`Mode::Auto`](fused_collective_core::fusion::Mode) takes one-shot up to this many bytes of activation. Here every rank
/// adds up in one-shot what its owner alone adds up in two-shot, which outweighs the second wait soon: two ranks took 0.85
/// times as long in one-shot with 0.5 KiB, 0.97 times with 4 KiB, 1.05 times with 8 KiB and 1.15 times with 32 KiB.
const ONE_SHOT_BYTES: u64 = 6 << 10;

/// Checks the tensors against a valid operation.
fn check<'a, E: Plain>(
    operation: &Operation,
    rank: u32,
    world_size: u32,
    inputs: Inputs<'a, E>,
    outputs: Outputs<'a, E>,
) -> Result<Job<'a, E>, Error> {
    if operation.dtype != E::DTYPE {
        return Err(Error::DType { operation: operation.dtype, slices: E::DTYPE });
    }
    if operation.residual.is_some() != inputs.residual.is_some() {
        return Err(Error::Residual { operation: operation.residual.is_some() });
    }
    let quantization = operation.quantization;
    let elements = operation.tokens * operation.hidden;
    let residual_elements = operation.residual_rows(rank, world_size) * operation.hidden;
    let quant_row_bytes = quantization.value_bytes_per_row(operation.hidden);
    let too_large = Error::Length { tensor: "scale_out", given: outputs.scale_out.len(), needed: u64::MAX };
    let scale_bytes = quantization.scale_bytes(operation.tokens, operation.hidden).ok_or(too_large)?;
    let length = |tensor, given: usize, needed: u64| {
        if given as u64 == needed { Ok(()) } else { Err(Error::Length { tensor, given, needed }) }
    };
    length("input", inputs.input.len(), elements)?;
    if let Some(residual) = inputs.residual {
        length("residual", residual.len(), residual_elements)?;
    }
    if let Some(norm) = operation.norm {
        let given = match inputs.gamma {
            Gamma::Element(_) => GammaType::Element,
            Gamma::F32(_) => GammaType::F32,
        };
        if norm.gamma != given {
            return Err(Error::Gamma { operation: norm.gamma, given });
        }
        length("gamma", inputs.gamma.len(), operation.hidden)?;
    }
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
        input: inputs.input,
        residual: inputs.residual,
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
