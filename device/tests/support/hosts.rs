//! Groups of several hosts: the kernels that they run, and what NCCL does in between.

use std::{sync::Barrier, thread, time::Duration};

use fused_collective_core::{
    dtype::Element,
    fusion::{Mode, Operation},
    kernels as table,
    plan::{Limits, Plan, Round},
};
use fused_collective_device::{
    collective,
    launch::{AnyEpilogue, Fused, FusedHosts, HostSum, Partials, Shape},
    simt::{
        self,
        host::{Launch, Stream, launch},
    },
};

use super::{Buffer, CALL, Case, Launched, POISON, Random, Rows, Tensors, World, check_all};

/// The hosts of a group: ranks are numbered host by host, and those of the same place gather sums.
pub struct Hosts {
    pub worlds: Vec<World>,
    /// Where the ranks of each place meet.
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
        let host = rank / self.ranks();
        let Member { tensors, partials } = member;
        let partials = Partials::of_round(partials.address(), plan, round, host, case.operation.partial_sums);
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
        let entry = |kernel: Option<&table::Kernel>| kernel.unwrap().name(version).to_owned();
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
            Launched::of(entry(table::Kernel::host_sum()), host_sum, sum),
            Launched::of(entry(table::Kernel::across_hosts(sharded)), kernel, fused),
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

    pub fn failed(&self, rank: u32) -> u32 {
        let (world, place) = self.place(rank);
        world.failed(place)
    }

    /// Holds every rank's outputs to the specification and to each other's.
    pub fn check<E: Element>(&self, case: &Case<E>, members: Vec<Member>) -> [Vec<u8>; 4] {
        for rank in 0..self.size() {
            assert_eq!(self.failed(rank), 0, "rank {rank} failed ({:?})", case.operation);
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
