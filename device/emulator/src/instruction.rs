//! What a decoded entry point consists of.

use crate::alu::Compute;

/// An entry point, ready to run.
#[derive(Debug)]
pub struct Entry {
    pub(crate) name: String,
    pub(crate) code: Vec<Instruction>,
    pub(crate) registers: usize,
    pub(crate) shared_bytes: u32,
    /// Bytes of local memory of each thread.
    pub(crate) local_bytes: usize,
    pub(crate) param_bytes: u64,
    /// Whether it has a `griddepcontrol.wait`, and so must not access what an earlier kernel may write before it.
    pub(crate) waits_for_grid: bool,
}

/// An instruction, with the line that it is in.
#[derive(Debug)]
pub(crate) struct Instruction {
    /// The predicate under which it is executed, and the value that it must have.
    pub(crate) guard: Option<(Register, bool)>,
    pub(crate) operation: Operation,
    pub(crate) line: usize,
}

/// A register of a thread, by number.
pub(crate) type Register = usize;

/// What an instruction reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Register(Register),
    Constant(u64),
}

/// Where a load or a store is: an address and a distance from it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) address: Source,
    pub(crate) offset: u64,
}

/// Start of the addresses of local memory. They are the same in every thread, each of which has its own bytes there. No
/// allocation of the host has such addresses.
pub(crate) const LOCAL: u64 = 1 << 62;

/// The state space that an address is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Local,
    /// Either.
    Generic,
}

/// What threads ask about themselves.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Special {
    Thread,
    Threads,
    Block,
    Blocks,
    ClusterRank,
    ClusterSize,
    Cluster,
    Clusters,
    Nanoseconds,
}

#[derive(Debug)]
pub(crate) enum Operation {
    Compute {
        compute: Compute,
        to: Register,
        from: [Source; 3],
    },
    Special {
        to: Register,
        of: Special,
    },
    /// Parts of a value, the lowest first, each of so many bits.
    Unpack {
        to: [Option<Register>; 2],
        from: Source,
        bits: u32,
    },
    Pack {
        to: Register,
        from: [Source; 2],
        bits: u32,
    },
    LoadParameter {
        to: Register,
        offset: u64,
        bytes: u64,
    },
    Load {
        space: Space,
        to: Vec<Register>,
        bytes: u64,
        /// True if the value's sign fills the register.
        signed: bool,
        from: Place,
        constant: bool,
        is_weak: bool,
    },
    Store {
        space: Space,
        to: Place,
        bytes: u64,
        from: Vec<Source>,
        release: bool,
        is_weak: bool,
    },
    CompareAndSwap {
        old: Register,
        at: Place,
        expected: Source,
        new: Source,
    },
    LoadShared {
        to: Vec<Register>,
        from: Place,
    },
    StoreShared {
        to: Place,
        from: Source,
    },
    Branch {
        target: usize,
    },
    BranchIndexed {
        index: Source,
        targets: Vec<usize>,
    },
    Return,
    Shuffle {
        to: Register,
        value: Source,
        distance: Source,
        clamp: Source,
        mask: Source,
    },
    SynchronizeWarp {
        mask: Source,
    },
    Barrier,
    BarrierAny {
        to: Register,
        value: Source,
    },
    ArriveAtCluster,
    WaitForCluster,
    InitializeCounter {
        at: Place,
        count: Source,
    },
    Expect {
        at: Place,
        bytes: Source,
    },
    Map {
        to: Register,
        address: Source,
        rank: Source,
    },
    Send {
        to: Place,
        value: Source,
        counter: Place,
    },
    TryWait {
        to: Register,
        at: Place,
        parity: Source,
    },
    WaitForGrid,
    /// Ends the run: with what the thread did.
    Fail(String),
    Nothing,
}
