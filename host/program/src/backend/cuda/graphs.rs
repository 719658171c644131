//! Steps as CUDA graphs: timed, and followed by kernels that depend on them.
//!
//! A trial is timed as inference runs it: a CUDA graph of several operations, launched twice back to back, of which
//! the second is timed by events on the device. The first hides the launch, and by the data that its operations wait
//! for brings all ranks to the same point. In a cold trial the cache is flushed in between, and each operation has
//! tensors of its own.

use fused_collective::cuda::{
    driver::{check, load},
    kernels::Parameters,
};
use fused_collective_bench::{launch::Audit, table::Probe};

use super::{
    cust_driver::failed,
    engine::{EAGER_THREADS, Engine, OPERATIONS_PER_TRIAL},
    graph::{Graph, TimedGraph},
    steps::nccl_elements,
};
use crate::backend::{collective::Collective, error::Error, steps::Step};

/// Graphs of an audit that are launched before it is waited for.
const GRAPHS_AT_ONCE: u64 = 64;

impl Engine<'_> {
    /// [`Collective::time`](Collective::time), in a graph.
    pub(super) fn time_graph(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        let index = self.capture(steps, operations)?;
        self.use_window(steps);
        self.barrier()?;
        let stream = self.handle();
        self.expect_nccl(steps, 2 * operations);
        let TimedGraph { graph, captured, .. } = &self.graphs[index];
        // Both ahead of the first: nothing should come between the launches.
        self.communicator.replay(*captured)?;
        self.communicator.replay(*captured)?;
        // SAFETY: the engine's stream; the tensors that were captured are there.
        unsafe { graph.launch(stream) }.map_err(|error| self.communicator.fail(error))?;
        if let Some(flush) = &self.flush {
            // SAFETY: inside the allocation, which lives as long as this problem.
            let code =
                unsafe { (load()?.cuMemsetD8Async)(flush.address().0, 1, flush.bytes() as usize, stream) };
            check("flush the cache", code)?;
        }
        self.record(0)?;
        // SAFETY: as above.
        unsafe { graph.launch(stream) }.map_err(|error| self.communicator.fail(error))?;
        self.record(1)?;
        self.settle()?;
        Ok(self.elapsed()? / f64::from(operations))
    }

    /// Lets NCCL know that a graph runs its step so many `times`, if it does: what is captured says nothing when it is
    /// launched.
    fn expect_nccl(&mut self, steps: &[Step], times: u32) {
        if let (Some(nccl), Some(problem)) = (&mut self.nccl, &self.problem)
            && steps.iter().any(|step| matches!(step, Step::NcclAllReduce | Step::NcclSymmetricAllReduce))
        {
            nccl.expect(problem.dtype, nccl_elements(problem), times.into());
        }
    }

    /// The index of the graph of `steps`, `operations` times, which is made when it is first timed.
    fn capture(&mut self, steps: &[Step], operations: u32) -> Result<usize, Error> {
        let is_same = |graph: &TimedGraph| graph.steps == steps && graph.operations == operations;
        if let Some(index) = self.graphs.iter().position(is_same) {
            return Ok(index);
        }
        // Whatever is set up at first use is so before the capture.
        self.run(steps)?;
        let stream = self.handle();
        let enqueue = || {
            let enqueued = (0..operations as usize).try_for_each(|operation| {
                self.set = operation % self.sets.len();
                self.enqueue_all(steps)
            });
            self.set = 0;
            enqueued
        };
        // SAFETY: the engine's stream; the graphs are dropped before the tensors.
        let graph = unsafe { Graph::capture(stream, enqueue) }?;
        let captured = self.communicator.captured();
        self.graphs.push(TimedGraph { steps: steps.to_vec(), operations, graph, captured });
        Ok(self.graphs.len() - 1)
    }

    /// Enqueues kernels that depend on what was enqueued before them, and hold outputs to what they should be.
    fn enqueue_audits(&mut self, audits: &[Audit]) -> Result<(), Error> {
        let stream = self.handle();
        let kernels = &mut self.probes;
        let limits = kernels.limits();
        for audit in audits {
            let blocks = audit.packs.div_ceil(u64::from(EAGER_THREADS));
            let function = kernels.function(Probe::AuditOutputs.entry())?;
            let launch = limits.for_elements(function, EAGER_THREADS, blocks)?;
            // SAFETY: the struct has no padding, which its crate asserts.
            let parameters = unsafe { Parameters::of(audit) };
            // SAFETY: the entry point takes these parameters, which are memory of whole packs; its owner settles before
            // it is freed.
            unsafe { kernels.launch(launch, &parameters, stream)? };
        }
        Ok(())
    }

    /// Runs `steps` and `audits`, `times` times, in graphs.
    pub(super) fn run_audited(&mut self, steps: &[Step], audits: &[Audit], times: u64) -> Result<(), Error> {
        // Whatever is set up at first use is so before the capture.
        self.run(steps)?;
        self.enqueue_audits(audits)?;
        self.settle()?;
        let stream = self.handle();
        let enqueue = || {
            (0..OPERATIONS_PER_TRIAL).try_for_each(|_| {
                self.enqueue_all(steps)?;
                self.enqueue_audits(audits)
            })
        };
        // SAFETY: the engine's stream; the graph is dropped, after `settle`, before the tensors.
        let graph = unsafe { Graph::capture(stream, enqueue) }?;
        let captured = self.communicator.captured();
        for launch in 1..=times.div_ceil(u64::from(OPERATIONS_PER_TRIAL)) {
            self.expect_nccl(steps, OPERATIONS_PER_TRIAL);
            self.communicator.replay(captured)?;
            // SAFETY: the engine's stream; the tensors that were captured are there.
            unsafe { graph.launch(stream) }.map_err(|error| self.communicator.fail(error))?;
            if launch.is_multiple_of(GRAPHS_AT_ONCE) {
                self.settle()?;
            }
        }
        self.settle()
    }

    /// Microseconds on the device between the two events.
    pub(super) fn elapsed(&self) -> Result<f64, Error> {
        let [begin, end] = &self.events;
        let milliseconds = end.elapsed_time_f32(begin).map_err(failed("read the time"))?;
        Ok(f64::from(milliseconds) * 1e3)
    }

    pub(super) fn record(&self, event: usize) -> Result<(), Error> {
        Ok(self.events[event].record(&self.stream).map_err(failed("record an event"))?)
    }
}
