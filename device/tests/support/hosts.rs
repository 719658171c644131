//! Groups of several hosts: the kernels that they run, and what NCCL does in between.

use std::{
    sync::{Barrier, atomic::Ordering},
    thread,
    time::Duration,
};

use fused_collective_core::{
    dtype::Element,
    fusion::{Mode, Operation, PartialSums},
    kernels as table,
    plan::{Limits, Plan, Round},
};
use fused_collective_device::{
    collective,
    launch::{
        ABORTED, AnyEpilogue, Fused, FusedHosts, HOST_FAILED, HostSum, Partials, Shape, Status, TIMED_OUT,
    },
    simt::{
        self,
        host::{Launch, Stream, launch},
    },
};

use super::{Buffer, CALL, Case, Launched, POISON, Random, Rows, Tensors, What, World, check_all, geometry};

/// The hosts of a group: ranks are numbered host by host, and those of the same place gather sums.
pub struct Hosts {
    pub worlds: Vec<World>,
    /// The meeting point of each place's ranks.
    places: Vec<Barrier>,
}

/// One rank's memory for a case across hosts.
pub struct Member {
    pub tensors: Tensors,
    /// The sums of all hosts, for one round.
    pub partials: Buffer,
}

/// The two kernels of a round, each with the geometry that it has tokens for.
pub struct Kernels {
    pub geometry: Launch,
    pub sum: Launched,
    pub fused: Launched,
    /// Bytes of a host's sums.
    pub host_bytes: usize,
}

impl Hosts {
    pub fn new(hosts: u32, ranks: u32, slot_bytes: u64) -> Hosts {
        Hosts {
            worlds: (0..hosts).map(|_| World::new(ranks, slot_bytes)).collect(),
            places: (0..ranks).map(|_| Barrier::new(hosts as usize)).collect(),
        }
    }

    pub fn hosts(&self) -> u32 {
        self.worlds.len() as u32
    }

    /// Ranks of a host.
    pub fn ranks(&self) -> u32 {
        self.worlds[0].size
    }

    /// All ranks.
    pub fn size(&self) -> u32 {
        self.hosts() * self.ranks()
    }

    /// A rank's host, and its place there.
    pub fn place(&self, rank: u32) -> (&World, u32) {
        (&self.worlds[(rank / self.ranks()) as usize], rank % self.ranks())
    }

    pub fn plan(&self, operation: &Operation) -> Plan {
        let limits = Limits { world_size: self.size(), hosts: self.hosts(), ..self.worlds[0].limits() };
        Plan::new(&Operation { mode: Mode::Auto, ..*operation }, &limits).unwrap()
    }

    /// Bytes of a host's sums in the first round of a case, which is the largest.
    pub fn host_bytes<E: Element>(&self, case: &Case<E>) -> usize {
        let plan = self.plan(&case.operation);
        plan.rounds().next().map_or(0, |round| plan.host_bytes(&round)) as usize
    }

    /// The memory of every rank.
    pub fn members<E: Element>(&self, case: &Case<E>) -> Vec<Member> {
        assert_eq!((case.hosts, case.inputs.len() as u32), (self.hosts(), self.size()));
        let bytes = self.hosts() as usize * self.host_bytes(case);
        let member =
            |rank| Member { tensors: Tensors::new(case, rank), partials: Buffer::new(bytes, POISON) };
        (0..self.size()).map(member).collect()
    }

    /// One rank's part of a case: its rounds, as the plan has them, each with as much of `geometry` as it has tokens for.
    pub fn rounds_of<E: Element>(
        &self,
        rank: u32,
        case: &Case<E>,
        member: &Member,
        rows: Rows,
        geometry: Launch,
    ) -> Vec<Kernels> {
        let plan = self.plan(&case.operation);
        let kernels = |round: Round| {
            let teams = u64::from(geometry.blocks / geometry.cluster).min(round.rows.tokens) as u32;
            let geometry = Launch { blocks: teams * geometry.cluster, ..geometry };
            let [sum, fused] = self.kernels_of(rank, case, member, (&plan, &round), rows);
            Kernels { geometry, sum, fused, host_bytes: plan.host_bytes(&round) as usize }
        };
        plan.rounds().map(kernels).collect()
    }

    fn kernels_of<E: Element>(
        &self,
        rank: u32,
        case: &Case<E>,
        member: &Member,
        (plan, round): (&Plan, &Round),
        rows: Rows,
    ) -> [Launched; 2] {
        let (world, place) = self.place(rank);
        let Member { tensors, partials } = member;
        let partials = Partials {
            rows: partials.address(),
            host_stride: plan.host_bytes(round),
            hosts: plan.hosts,
            host: rank / self.ranks(),
            element: (case.operation.partial_sums == PartialSums::Element).into(),
            reserved: 0,
        };
        let (group, extras) = (world.group(place), tensors.extras());
        let shape = Shape::of_round(plan, round, CALL).unwrap();
        let activations = tensors.activations().of_round(plan, round);
        let sum = HostSum { group, shape, activations, experts: extras.experts, partials };
        let fused = Fused { group, shape, activations, epilogue: tensors.any_epilogue(case), extras };
        let fused = FusedHosts { fused, partials };
        let (sharded, resident) = (plan.algorithm.is_sharded(), rows != Rows::Streamed);
        // What the table has: one pack a thread, or none that stays.
        assert!(plan.algorithm.spans_hosts() && rows != Rows::P2);
        let version = if resident { table::Version::P1 } else { table::Version::Streamed };
        let (_, found) = table::Kernel::of(&case.operation, plan.algorithm, self.ranks()).unwrap();
        let entry = |kernel: &table::Kernel| kernel.name(version).to_owned();
        type Fusion = unsafe fn(&FusedHosts<AnyEpilogue>);
        let kernel: Fusion = match (sharded, resident) {
            (false, true) => collective::two_shot_hosts::<E, _, 8, 1, true>,
            (false, false) => collective::two_shot_hosts::<E, _, 8, 1, false>,
            (true, true) => collective::sharded_hosts::<E, _, 8, 1, true>,
            (true, false) => collective::sharded_hosts::<E, _, 8, 1, false>,
        };
        let host_sum: unsafe fn(&HostSum) = if resident {
            // SAFETY: as the kernel's own caller says; so below.
            |params| unsafe { collective::host_sum::<E, _, 8, 1, true>(params, &params.experts) }
        } else {
            // SAFETY: see above.
            |params| unsafe { collective::host_sum::<E, _, 8, 1, false>(params, &params.experts) }
        };
        [
            Launched::of(entry(table::Kernel::host_sum().unwrap()), host_sum, sum),
            Launched::of(entry(found), kernel, fused),
        ]
    }

    /// Runs one kernel of a rank's, as source or by the runner of its host.
    pub fn launch(&self, rank: u32, member: &Member, geometry: Launch, kernel: &Launched) {
        let (world, place) = self.place(rank);
        match &world.runner {
            None => launch(geometry, || kernel.run()),
            Some(run) => {
                let own = [member.partials.range()];
                run(
                    rank,
                    geometry,
                    kernel,
                    world.ranges(place).chain(member.tensors.ranges()).chain(own).collect(),
                );
            }
        }
    }

    /// Gathers what the hosts have summed, as NCCL does: returns when the ranks of this place on all hosts are there, and have
    /// each other's sums.
    pub fn gather(&self, rank: u32, members: &[Member], host_bytes: usize) {
        let place = &self.places[(rank % self.ranks()) as usize];
        place.wait();
        self.copy_sums(rank, members, host_bytes);
        // Nobody sums the next round where others still read.
        place.wait();
    }

    /// The same without waiting for anybody.
    pub fn copy_sums(&self, rank: u32, members: &[Member], host_bytes: usize) {
        for host in (0..self.hosts()).filter(|&host| host != rank / self.ranks()) {
            let other = &members[(host * self.ranks() + rank % self.ranks()) as usize];
            let start = host as usize * host_bytes;
            members[rank as usize].partials.copy(&other.partials, start..start + host_bytes);
        }
    }

    /// Runs one rank's part of a case.
    pub fn run_rank<E: Element>(
        &self,
        rank: u32,
        case: &Case<E>,
        members: &[Member],
        rows: Rows,
        geometry: Launch,
    ) {
        let member = &members[rank as usize];
        for round in self.rounds_of(rank, case, member, rows, geometry) {
            self.launch(rank, member, round.geometry, &round.sum);
            self.gather(rank, members, round.host_bytes);
            self.launch(rank, member, round.geometry, &round.fused);
        }
    }

    /// Adds one rank's part of a case to its stream. The gather lets the next kernel start before it has ended, and so may one of
    /// NCCL's.
    pub fn enqueue<'a, E: Element>(
        &'a self,
        rank: u32,
        case: &Case<E>,
        members: &'a [Member],
        rows: Rows,
        geometry: Launch,
        stream: &mut Stream<'a>,
    ) {
        for round in self.rounds_of(rank, case, &members[rank as usize], rows, geometry) {
            let Kernels { geometry, sum, fused, host_bytes } = round;
            stream.launch(geometry, move || sum.run());
            stream.launch(Launch { blocks: 1, cluster: 1, threads: 32 }, move || {
                simt::launch_dependents();
                simt::wait_for_prerequisites();
                if simt::thread() == 0 {
                    self.gather(rank, members, host_bytes);
                }
            });
            stream.launch(geometry, move || fused.run());
        }
    }

    /// Runs `rank` for every rank at the same time.
    pub fn run(&self, rank: impl Fn(u32) + Sync) {
        thread::scope(|scope| {
            for index in 0..self.size() {
                let rank = &rank;
                scope.spawn(move || rank(index));
            }
        });
    }

    /// Runs one step of every rank that `takes_part`, all at the same time: the first kernel of the first round, or the second.
    pub fn step<E: Element>(
        &self,
        case: &Case<E>,
        members: &[Member],
        rows: Rows,
        second: bool,
        takes_part: impl Fn(u32) -> bool + Sync,
    ) {
        self.run(|rank| {
            if !takes_part(rank) {
                return;
            }
            let (member, launch) = (&members[rank as usize], geometry(&case.operation, rows, 1, 1));
            let round = self.rounds_of(rank, case, member, rows, launch).swap_remove(0);
            self.launch(rank, member, round.geometry, if second { &round.fused } else { &round.sum });
        });
    }

    /// A rank's status: why it failed, the rank or host that was missing, the hop, and how many gathers have begun and ended.
    pub fn status(&self, rank: u32) -> [u32; 5] {
        let (world, place) = self.place(rank);
        let status = world.statuses[place as usize].get::<Status>()[0];
        [status.failed, status.missing_rank, status.hop, status.gathers_begun, status.gathers_ended]
    }

    /// Holds every rank's outputs to the specification and to each other's.
    pub fn check<E: Element>(&self, case: &Case<E>, members: Vec<Member>) -> [Vec<u8>; 4] {
        for rank in 0..self.size() {
            assert_eq!(self.status(rank)[0], 0, "rank {rank} failed ({:?})", case.operation);
        }
        members.iter().for_each(|member| member.partials.assert_guards());
        let tensors: Vec<Tensors> = members.into_iter().map(|member| member.tensors).collect();
        check_all(case, &tensors);
        tensors[0].outputs()
    }

    /// Runs a case on every rank, each after a random delay, perhaps in place, and checks all outputs; returns rank 0's.
    pub fn run_case<E: Element>(
        &self,
        random: &mut Random,
        case: &Case<E>,
        rows: Rows,
        geometry_of: impl Fn(u32) -> Launch + Sync,
    ) -> [Vec<u8>; 4] {
        let in_place = random.below(2) == 1;
        let mut members = self.members(case);
        if in_place {
            members = members
                .into_iter()
                .map(|member| Member { tensors: member.tensors.in_place(), ..member })
                .collect();
        }
        let delays: Vec<Duration> =
            members.iter().map(|_| Duration::from_micros(random.below(2000))).collect();
        self.run(|rank| {
            thread::sleep(delays[rank as usize]);
            self.run_rank(rank, case, &members, rows, geometry_of(rank));
        });
        self.check(case, members)
    }

    pub fn assert_clean(&self) {
        self.worlds.iter().for_each(World::assert_clean);
    }
}

/// A case for all ranks of a group of several hosts, with sums of either type; with a sharded residual, if there is a norm.
pub fn random_case<E: Element>(
    random: &mut Random,
    hosts: &Hosts,
    (tokens, hidden): (u64, u64),
    what: What,
    sharded: bool,
) -> Case<E> {
    let sharded = sharded && what != What::Sum;
    let residual = sharded || random.below(2) == 1;
    let sums = if random.below(2) == 1 { PartialSums::Element } else { PartialSums::F32 };
    let case = Case::<E>::new(random, hosts.size(), tokens, hidden, residual, what);
    let case = case.across(hosts.hosts(), sums);
    if sharded { case.sharded() } else { case }
}

/// Holds that two hosts of two ranks end an operation to which rank 1 of host 0 does not come. Its host's other rank waits in
/// vain, and says so to the same rank of host 1 in its rows. To rank 1 of host 1 nobody says anything, until the library ends its
/// gather.
pub fn missing_rank<E: Element>(random: &mut Random, mut hosts: Hosts, rows: Rows, sharded: bool) {
    hosts.worlds[0].timeout = Duration::from_millis(50);
    let case = random_case::<E>(random, &hosts, (4, 64), What::Norm, sharded).of_rows(rows);
    let members = hosts.members(&case);
    let is_there = |rank| rank != 1;
    hosts.step(&case, &members, rows, false, is_there);
    let statuses = || [0, 2, 3].map(|rank| hosts.status(rank));
    assert_eq!(statuses(), [[TIMED_OUT, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]);
    for rank in [0, 2] {
        hosts.copy_sums(rank, &members, hosts.host_bytes(&case));
    }
    hosts.worlds[1].statuses[1].atomic(Status::ABORT).store(1, Ordering::Relaxed);
    hosts.step(&case, &members, rows, true, is_there);
    let [timed_out, failed, aborted] = statuses();
    assert_eq!(timed_out, [TIMED_OUT, 1, 1, 1, 1]);
    assert_eq!(failed, [HOST_FAILED, 0, HOST_FAILED, 1, 1]);
    assert_eq!(aborted, [ABORTED, 1, HOST_FAILED, 1, 1]);
    // What follows ends at once, whatever the deadlines are.
    hosts.worlds[0].timeout = Duration::from_secs(3600);
    hosts.step(&case, &members, rows, false, is_there);
    hosts.step(&case, &members, rows, true, is_there);
    assert_eq!(hosts.status(2), [HOST_FAILED, 0, HOST_FAILED, 2, 2]);
}
