//! The exchange of partial sums between hosts, of one rank: NCCL's communicator with the ranks of the same place, the buffer
//! that they gather, and the comparison of their calls.
//!
//! In the buffer each host has a head of [`HEAD`] bytes and then its rows. The head holds a digest of the calls that the rank
//! has made so far. It travels with the rows, so the ranks of a place compare their calls without another message, and the
//! ranks of a host compare theirs in shared memory: together these are all ranks.
//!
//! The head is written after the first kernel has begun, and read only while no gather is under way. So it is never read
//! while it changes. Where it lies depends on the round that was gathered last. So it is read only if that is known to be
//! the last one that the host has enqueued: graphs that nobody told of are noticed by the number of rounds.

use std::{
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use fused_collective_core::{
    agreement::Chain,
    fusion::PartialSums,
    launch::{Address, Partials, Status},
    plan::{Plan, Round},
};

use super::{
    super::{
        device::Context,
        driver::{Handle, check},
        memory::{DeviceMemory, MappedStatus, PinnedMemory},
        nccl::{ABORT_LIMIT, Bounds, Comm, LEAVE_LIMIT, Library, Seat, UniqueId},
    },
    abort_flag::AbortFlag,
    stream::OwnStream,
    unanimous::all_or_none,
    watchdog::{Watchdog, Watched},
};
use crate::{
    error::Error,
    group::{Bootstrap, Hosts, Monitor},
};

/// Bytes of a host's head in the buffer, and the alignment of its rows.
const HEAD: u64 = 256;
/// Words of a head that hold the digest.
const DIGEST_WORDS: usize = 4;
/// The time that a gather may take beyond the deadlines of two kernels: this rank's and those of the hosts that it waits for.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes of a host for which NCCL does as for any larger number.
const MANY_BYTES: u64 = 16 << 20;

const COMPARING: &str = "compare the calls of hosts";

/// One rank's end of the exchange between hosts.
#[derive(Debug)]
pub(super) struct Across {
    hosts: Hosts,
    comm: Arc<Comm>,
    /// Stopped before the communicator is left.
    watchdog: Option<Watchdog>,
    gather_limit: Duration,
    /// Freed by `close`, or left to NCCL.
    buffer: Option<DeviceMemory>,
    stream: OwnStream,
    heads: PinnedMemory,
    status: Arc<MappedStatus>,
    abort: Arc<AbortFlag>,
    monitor: Option<Arc<dyn Monitor>>,
    /// Rounds that were enqueued, as far as the host knows.
    rounds: u32,
    /// The last one, until its calls were compared.
    last: Option<(u32, Gathered)>,
}

/// A gather: where its heads are, and what the own one holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gathered {
    stride: u64,
    digest: u32,
}

/// Looks at a rank's kernels for its watchdog.
struct Kernels {
    status: Arc<MappedStatus>,
    abort: Arc<AbortFlag>,
}

impl Watched for Kernels {
    fn gathers(&self) -> [u32; 2] {
        gathers(&self.status)
    }

    fn is_over(&self) -> bool {
        self.abort.is_set()
    }

    fn end(&self) {
        self.abort.set();
    }
}

/// The operations whose gathers have begun and ended last.
fn gathers(status: &MappedStatus) -> [u32; 2] {
    // The end first: a gather that begins in between is seen as under way.
    let ended = status.word(Status::GATHERS_ENDED).load(Acquire);
    [status.word(Status::GATHERS_BEGUN).load(Acquire), ended]
}

/// The parts of a communicator that the exchange needs.
pub(super) struct Parts<'a> {
    pub(super) bootstrap: &'a dyn Bootstrap,
    pub(super) context: &'a Context,
    pub(super) hosts: Hosts,
    pub(super) library: Arc<Library>,
    pub(super) slot_bytes: u64,
    pub(super) deadline: Duration,
    pub(super) status: &'a Arc<MappedStatus>,
    pub(super) abort: &'a Arc<AbortFlag>,
}

impl Across {
    /// Connects the ranks of each place, and gathers once, so that no operation has to connect them. All ranks call this.
    ///
    /// # Errors
    /// Not enough memory; NCCL's, on any rank, by number; what does not connect within the deadline; the bootstrap's.
    pub(super) fn join(parts: Parts<'_>) -> Result<Across, Error> {
        let Parts { bootstrap, context, hosts, library, slot_bytes, deadline, status, abort } = parts;
        let prepared = (|| {
            let id = if hosts.host() == 0 { library.unique_id()?.to_bytes().to_vec() } else { Vec::new() };
            let buffer = DeviceMemory::new(context, u64::from(hosts.count()) * 2 * HEAD + slot_bytes)?;
            let heads = PinnedMemory::new(context, hosts.count() as usize * DIGEST_WORDS * 4)?;
            Ok((id, buffer, OwnStream::new(context)?, heads))
        })();
        // All that may fail on one rank alone comes ahead of NCCL, in which the others would wait for it.
        let ((_, buffer, stream, heads), ids) = all_or_none(bootstrap, prepared, |(id, ..)| id.clone())?;
        let id = &ids[hosts.rank_at(0, hosts.place()) as usize];
        let monitor = bootstrap.monitor();
        let joined = UniqueId::from_bytes(id).and_then(|id| {
            let lost = monitor.clone();
            let is_over = || abort.is_set() || lost.as_ref().is_some_and(|monitor| monitor.lost().is_some());
            let bounds = Bounds { limit: deadline, is_over: &is_over };
            let seat = Seat { ranks: hosts.count(), rank: hosts.host() };
            let comm = Arc::new(Comm::connect(&library, context, id, seat, bounds)?);
            let mut across = Across {
                gather_limit: deadline.saturating_mul(2).saturating_add(GRACE),
                hosts,
                comm,
                watchdog: None,
                buffer: Some(buffer),
                stream,
                heads,
                status: Arc::clone(status),
                abort: Arc::clone(abort),
                monitor: monitor.clone(),
                rounds: 0,
                last: None,
            };
            across.gather_once(slot_bytes, bounds)?;
            let watched = Kernels { status: Arc::clone(status), abort: Arc::clone(abort) };
            let comm = Arc::clone(&across.comm);
            across.watchdog = Some(Watchdog::start(comm, watched, across.gather_limit)?);
            Ok(across)
        });
        if let (Err(error), Some(monitor)) = (&joined, &monitor)
            && monitor.lost().is_none()
        {
            // The others see it while they connect, and need not come to the deadline.
            monitor.abort(&error.to_string());
        }
        Ok(all_or_none(bootstrap, joined, |_| Vec::new())?.0)
    }

    /// Gathers a head, and then many bytes of each host, by which NCCL connects what it uses for few and for many.
    fn gather_once(&mut self, slot_bytes: u64, bounds: Bounds<'_>) -> Result<(), Error> {
        let _entered = self.stream.context().clone().enter()?;
        let most = (slot_bytes / u64::from(self.hosts.count())).min(MANY_BYTES) / HEAD * HEAD;
        for bytes in [HEAD, most.max(HEAD)] {
            // SAFETY: the buffer has so many bytes for each host, and the stream is of its context.
            unsafe {
                self.write_head(self.hosts.host() + 1, bytes, self.stream.handle())?;
                self.comm.all_gather(self.address(), bytes, self.stream.handle(), bounds)?;
                self.read_heads(bytes)?;
            }
            if !self.stream.ends_within("gather for the first time", bounds.limit)? {
                let limit = bounds.limit.as_secs_f64();
                return Err(Error::Nccl(format!("did not gather for the first time within {limit:.1} s")));
            }
            let heads = self.heads();
            if !(1..).zip(&heads).all(|(number, head)| *head == number) {
                return Err(Error::Nccl(format!("gathered {heads:?} of hosts numbered from 1 on")));
            }
        }
        Ok(())
    }

    /// The hosts.
    pub(super) fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    fn address(&self) -> Address {
        self.buffer.as_ref().map_or(Address::NULL, DeviceMemory::address)
    }

    /// The partial sums of a round.
    pub(super) fn partials(&self, plan: &Plan, round: &Round, kind: PartialSums) -> Partials {
        Partials {
            rows: self.address().offset(HEAD),
            host_stride: host_stride(plan, round),
            hosts: self.hosts.count(),
            host: self.hosts.host(),
            element: (kind == PartialSums::Element).into(),
            reserved: 0,
        }
    }

    /// Enqueues the gather of a round, between its two kernels, or captures it. `chain` is that of all calls so far, the
    /// round's included.
    ///
    /// # Errors
    /// The driver's, NCCL's.
    ///
    /// # Safety
    /// `stream` is a stream of the current context, which is the communicator's.
    pub(super) unsafe fn gather(
        &mut self,
        plan: &Plan,
        round: &Round,
        chain: Chain,
        capturing: bool,
        stream: Handle,
    ) -> Result<Gathered, Error> {
        let gathered = Gathered { stride: host_stride(plan, round), digest: digest(chain) };
        if !capturing {
            self.enqueued(1, gathered);
        }
        let monitor = self.monitor.as_ref();
        let is_over = || self.abort.is_set() || monitor.is_some_and(|monitor| monitor.lost().is_some());
        // A host that is far ahead of its GPU waits here for room in NCCL's queue.
        let bounds = Bounds { limit: self.gather_limit.saturating_add(LEAVE_LIMIT), is_over: &is_over };
        // SAFETY: a plan's rounds fit the buffer with the heads, and the stream is as the caller says.
        unsafe {
            self.write_head(gathered.digest, gathered.stride, stream)?;
            self.comm.all_gather(self.address(), gathered.stride, stream, bounds)?;
        }
        Ok(gathered)
    }

    /// Notes that so many rounds more are enqueued, and the last of them.
    pub(super) fn enqueued(&mut self, rounds: u32, last: Gathered) {
        self.rounds = self.rounds.wrapping_add(rounds);
        self.last = Some((self.rounds, last));
    }

    /// Enqueues the write of this host's head.
    ///
    /// # Safety
    /// As [`gather`](Self::gather), with `stride` bytes for each host in the buffer.
    unsafe fn write_head(&self, digest: u32, stride: u64, stream: Handle) -> Result<(), Error> {
        let head = self.address().offset(stride * u64::from(self.hosts.host())).0;
        let driver = self.stream.context().driver();
        // SAFETY: the head lies in the buffer, and the stream is as the caller says.
        let code = unsafe { (driver.cuMemsetD32Async)(head, digest, DIGEST_WORDS, stream) };
        check(COMPARING, code)
    }

    /// Enqueues, on the own stream, the copy of all heads to this host's memory.
    ///
    /// # Safety
    /// As [`write_head`](Self::write_head).
    unsafe fn read_heads(&self, stride: u64) -> Result<(), Error> {
        let driver = self.stream.context().driver();
        for host in 0..self.hosts.count() {
            let from = self.address().offset(stride * u64::from(host)).0;
            let bytes = DIGEST_WORDS * 4;
            let to = self.heads.address().wrapping_byte_add(host as usize * bytes);
            // SAFETY: a head in the buffer, and room for it in memory that lives until `close` has seen the copy end.
            let code = unsafe { (driver.cuMemcpyDtoHAsync_v2)(to, from, bytes, self.stream.handle()) };
            check(COMPARING, code)?;
        }
        Ok(())
    }

    /// The heads that were copied last, once that copy has ended.
    fn heads(&self) -> Vec<u32> {
        // SAFETY: no copy is under way, as the caller has seen.
        let bytes = unsafe { self.heads.bytes() };
        let word = |head: &[u8]| head.first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
        bytes.chunks(DIGEST_WORDS * 4).map(word).collect()
    }

    /// A rank of this rank's place that has made other calls, as far as that is known: while a gather is under way nothing is.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn disagreement(&mut self) -> Result<Option<u32>, Error> {
        let Some((number, Gathered { stride, digest })) = self.last else { return Ok(None) };
        let before = gathers(&self.status);
        let [begun, ended] = before;
        if begun != ended || begun != number {
            // Graphs have run that nobody told of: what was gathered last is not known.
            if begun == ended && begun.wrapping_sub(number) as i32 > 0 {
                (self.rounds, self.last) = (begun, None);
            }
            return Ok(None);
        }
        let _entered = self.stream.context().clone().enter()?;
        // SAFETY: the last round had this stride.
        unsafe { self.read_heads(stride)? };
        if !self.stream.ends_within(COMPARING, self.gather_limit)? {
            return Err(Error::Nccl("leaves the GPU no time to compare the calls of hosts".to_owned()));
        }
        if gathers(&self.status) != before {
            return Ok(None);
        }
        let Some(other) = other_host(&self.heads(), self.hosts.host(), digest) else { return Ok(None) };
        self.last = None;
        Ok(other.map(|host| self.hosts.rank_at(host, self.hosts.place())))
    }

    /// The rank of this rank's place on the next host.
    pub(super) fn next_host(&self) -> u32 {
        self.hosts.rank_at((self.hosts.host() + 1) % self.hosts.count(), self.hosts.place())
    }

    /// The same, if a gather was ended because it took too long.
    pub(super) fn late(&self) -> Option<u32> {
        let is_late = self.watchdog.as_ref().is_some_and(Watchdog::is_late);
        is_late.then(|| self.next_host())
    }

    /// NCCL's error, if a gather was ended because of one.
    pub(super) fn failed(&self) -> Option<String> {
        self.watchdog.as_ref().and_then(Watchdog::failed)
    }

    /// The longest that a gather may take.
    pub(super) fn gather_limit(&self) -> Duration {
        self.gather_limit
    }

    /// Asks NCCL for an error of its own.
    ///
    /// # Errors
    /// NCCL's.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.comm.check()
    }

    /// The operation whose gather is under way or was last.
    pub(super) fn operation(&self) -> u64 {
        u64::from(self.status.word(Status::GATHERS_BEGUN).load(Relaxed).wrapping_sub(1))
    }

    /// Leaves NCCL's communicator, in good order or at once, and frees the buffer.
    ///
    /// # Errors
    /// NCCL has not left yet: it waits for the end of every graph that its gathers were captured in.
    pub(super) fn close(&mut self, abort: bool) -> Result<(), Error> {
        self.watchdog = None;
        if self.buffer.is_none() {
            return Ok(());
        }
        let over: Receiver<()> = Arc::clone(&self.comm).leave_in_thread(abort);
        let limit = if abort { ABORT_LIMIT } else { LEAVE_LIMIT };
        if over.recv_timeout(limit) != Err(RecvTimeoutError::Disconnected) {
            return Err(Error::Nccl(format!(
                "did not leave within {:.0} s: destroy the graphs that the group's operations were captured in first",
                limit.as_secs_f64()
            )));
        }
        self.buffer = None;
        Ok(())
    }
}

impl Drop for Across {
    fn drop(&mut self) {
        if self.close(true).is_err() {
            // NCCL may still use it: it ends with the process.
            std::mem::forget(self.buffer.take());
        }
        let ended = self
            .stream
            .context()
            .clone()
            .enter()
            .is_ok_and(|_entered| self.stream.ends_within(COMPARING, ABORT_LIMIT).unwrap_or(false));
        if !ended {
            self.heads.leak();
        }
    }
}

/// The first host whose head differs from `host`'s, if any does. `None` if that one is not what it should be: then another round
/// was gathered last, and the calls are compared later.
fn other_host(heads: &[u32], host: u32, digest: u32) -> Option<Option<u32>> {
    if heads.get(host as usize) != Some(&digest) {
        return None;
    }
    Some(heads.iter().position(|&head| head != digest).map(|host| host as u32))
}

/// Bytes from one host's head to the next one's, in a round.
fn host_stride(plan: &Plan, round: &Round) -> u64 {
    HEAD + plan.host_bytes(round).next_multiple_of(HEAD)
}

/// The digest of calls, as a head holds it.
fn digest(chain: Chain) -> u32 {
    let digest = chain.digest();
    (digest ^ digest >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_another_head_is_named_if_the_own_one_is_where_it_should_be() {
        assert_eq!(other_host(&[7, 7, 7], 1, 7), Some(None));
        assert_eq!(other_host(&[7, 7, 8], 1, 7), Some(Some(2)));
        assert_eq!(other_host(&[9, 7, 7], 2, 7), Some(Some(0)));
        // Another round was gathered last.
        assert_eq!(other_host(&[9, 5, 7], 1, 7), None);
    }

    /// Heads and rows of all hosts fit the buffer, whatever the round.
    #[test]
    fn a_round_that_a_plan_has_fits_the_buffer() {
        use fused_collective_core::{
            dtype::DType,
            fusion::{Mode, Operation, Residual, Rounding},
            plan::Limits,
            quant::Quantization,
        };
        for (hosts, ranks) in [(2, 1), (2, 8), (3, 4), (16, 8)] {
            for (dtype, hidden) in [(DType::Bf16, 16), (DType::F32, 48), (DType::Bf16, 8192)] {
                let operation = Operation {
                    dtype,
                    tokens: 100_000,
                    hidden,
                    residual: Residual::None,
                    norm: None,
                    quantization: Quantization::None,
                    keep_norm: false,
                    rounding: Rounding::Once,
                    bias: false,
                    post_norm: None,
                    experts: None,
                    wire: None,
                    partial_sums: PartialSums::F32,
                    mode: Mode::Auto,
                };
                let slot_bytes = 1 << 22;
                let world_size = hosts * ranks;
                let limits = Limits {
                    world_size,
                    hosts,
                    slot_bytes,
                    compute_units: 1,
                    max_cluster: 1,
                    one_shot_bytes: 0,
                };
                let plan = Plan::new(&operation, &limits).unwrap();
                let round = plan.rounds().next().unwrap();
                let needed = host_stride(&plan, &round) * u64::from(hosts);
                assert!(needed <= slot_bytes + u64::from(hosts) * 2 * HEAD);
            }
        }
    }
}
