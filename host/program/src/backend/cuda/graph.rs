//! What was captured from a stream, to be launched again and again.

use std::ptr::null_mut;

use fused_collective::{
    Error,
    cuda::{
        Captured,
        driver::{Functions, Handle, check, load},
    },
};

use crate::backend::{error::Error as BackendError, steps::Step};

/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: other threads (NCCL's, for one) do as they like meanwhile.
const THREAD_LOCAL: u32 = 1;

/// A graph that can be launched.
#[derive(Debug)]
pub(super) struct Graph {
    driver: &'static Functions,
    executable: Handle,
}

impl Graph {
    /// Captures what `enqueue` enqueues on `stream`.
    ///
    /// # Errors
    /// `enqueue`'s; the driver's, for what cannot be captured.
    ///
    /// # Safety
    /// `stream` is a stream of the current context, and what `enqueue` enqueues may run whenever the graph is
    /// launched, as long as the graph lives.
    pub(super) unsafe fn capture(
        stream: Handle,
        enqueue: impl FnOnce() -> Result<(), BackendError>,
    ) -> Result<Graph, BackendError> {
        let driver = load()?;
        // SAFETY: the caller vouches for the stream.
        check("begin a graph", unsafe { (driver.cuStreamBeginCapture_v2)(stream, THREAD_LOCAL) })?;
        let enqueued = enqueue();
        let mut graph = null_mut();
        // SAFETY: the capture was begun; this ends it, whatever became of it.
        let ended = check("capture a graph", unsafe { (driver.cuStreamEndCapture)(stream, &mut graph) });
        let instantiated = enqueued.and(ended.map_err(BackendError::from)).and_then(|()| {
            let mut executable = null_mut();
            // SAFETY: a graph that was captured, and room for what is made of it.
            let code = unsafe { (driver.cuGraphInstantiateWithFlags)(&mut executable, graph, 0) };
            check("make a graph ready", code)?;
            Ok(Graph { driver, executable })
        });
        if !graph.is_null() {
            // SAFETY: used no more; what was made of it is independent.
            unsafe { (driver.cuGraphDestroy)(graph) };
        }
        instantiated
    }

    /// Launches the graph on `stream`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `stream` is a stream of the current context, and what was captured may run now.
    pub(super) unsafe fn launch(&self, stream: Handle) -> Result<(), Error> {
        // SAFETY: the caller vouches for the stream, and that what was captured may run.
        check("launch a graph", unsafe { (self.driver.cuGraphLaunch)(self.executable, stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: used no more. The driver keeps what a launch under way needs.
        unsafe { (self.driver.cuGraphExecDestroy)(self.executable) };
    }
}

/// A graph that is timed, with what it runs.
#[derive(Debug)]
pub(super) struct TimedGraph {
    pub(super) steps: Vec<Step>,
    pub(super) operations: u32,
    pub(super) graph: Graph,
    pub(super) captured: Captured,
}
