//! This process's rank, from the environment of `torchrun`, `mpirun`, `mpiexec` or `srun`.
//!
//! | started by | rank, size | rank on this host, ranks on this host | key |
//! | --- | --- | --- | --- |
//! | `torchrun`, the program `fused-collective` | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` | `MASTER_ADDR`, `MASTER_PORT`, `TORCHELASTIC_RUN_ID`, `TORCHELASTIC_RESTART_COUNT` |
//! | Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK`, `_LOCAL_SIZE` | `PMIX_NAMESPACE`, else `OMPI_MCA_ess_base_jobid` |
//! | MPICH, Intel MPI | `PMI_RANK`, `PMI_SIZE` | `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` | the process that started the ranks; between hosts none but the address |
//! | others with PMI | `PMI_RANK`, `PMI_SIZE` | hosts: `SLURM_STEP_NUM_NODES` | `PMI_JOBID`, else the process that started the ranks |
//! | Slurm | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` or `SLURM_NTASKS` | `SLURM_LOCALID`; hosts: `SLURM_STEP_NUM_NODES` | `SLURM_JOB_ID`, `SLURM_STEP_ID` |
//!
//! If a launcher says that its ranks are on several hosts, these meet at an [address](RankEnv::hosts):
//!
//! | started by | address of rank 0 |
//! | --- | --- |
//! | any | [`ADDRESS`], `HOST:PORT` |
//! | any, without it | `MASTER_ADDR`, and the port after `MASTER_PORT`, at which `torchrun` itself listens |
//! | Slurm, without these | the first node of `SLURM_STEP_NODELIST`, which has rank 0 unless the distribution is arbitrary, and a port from 15000 to 24999 by `SLURM_JOB_ID` and `SLURM_STEP_ID` |
//!
//! The first line whose rank or size is set counts, so `torchrun` inside a Slurm job is `torchrun`. `srun` with PMI sets the
//! same rank and size twice; there Slurm's own line counts. The key is the same for all ranks of a job, and differs from every
//! other job's on the host; [`KEY`] overrides it.
//!
//! A process that is the only rank of its job is no rank: it may start ranks of its own.
//!
//! Slurm sets its variables for every process of a job, even if it is no rank: a batch script, or a shell of `srun --pty` or
//! `salloc`. Only the tasks of a job step with several tasks are ranks.

use std::{env, fmt};

use super::{
    rendezvous::{Address, Secret, SecretError},
    slurm_nodes,
    starting_process::starting_process,
};

/// The variable with the job's key, for starters whose own variables do not tell jobs apart. Any text, the same on all
/// ranks.
pub const KEY: &str = "FUSED_COLLECTIVE_KEY";

/// The variable with the [secret](Secret) of a job on several hosts, the same on all ranks.
pub const SECRET: &str = "FUSED_COLLECTIVE_SECRET";
/// The variable with the [address](Address) where ranks of several hosts meet, on the host of rank 0.
pub const ADDRESS: &str = "FUSED_COLLECTIVE_ADDRESS";

/// The first of Slurm's special step numbers, which belong to interactive shells, batch scripts and the like.
const SLURM_SPECIAL_STEPS: u64 = 0xffff_fff0;

/// The program that started this process as a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// `torchrun`, or another program that sets the same variables.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// MPICH's or Intel MPI's `mpiexec`.
    Pmi,
    /// Slurm's `srun`.
    Slurm,
}

/// A process's place in its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankEnv {
    /// The rank, below `world_size`.
    pub rank: u32,
    /// Ranks in the job.
    pub world_size: u32,
    /// The variable that says so.
    pub size_variable: &'static str,
    /// The rank among those on this host, which chooses the device.
    pub local_rank: u32,
    /// The same on all ranks of the job, and different from every other job's on this host.
    pub key: String,
    /// The program that started it.
    pub starter: Starter,
    /// The variable by which the launcher says that ranks are on several hosts; `None` if all are on this one.
    pub hosts: Option<SeveralHosts>,
}

/// Ranks on several hosts, as a launcher says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeveralHosts {
    /// The variable that says so.
    pub variable: &'static str,
    /// Its value: the number of ranks on this host, or of hosts.
    pub value: u32,
    /// The address where the ranks can meet, if the variables have one.
    pub address: Option<Address>,
}

impl fmt::Display for SeveralHosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={} says that the job has ranks on several hosts", self.variable, self.value)
    }
}

/// The error of an environment that does not give a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// A variable is set without another that it needs.
    Missing {
        /// The variable that is set.
        set: &'static str,
        /// The missing variable.
        missing: &'static str,
    },
    /// A variable has an invalid value.
    Invalid {
        /// The variable.
        variable: &'static str,
        /// The value.
        value: String,
        /// The valid values.
        valid: String,
    },
    /// The variable [`SECRET`] has no secret. Its value is not shown.
    Secret(SecretError),
    /// The error of a process that knows its rank.
    OfRank {
        /// The rank.
        rank: u32,
        /// The error.
        source: Box<Error>,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Missing { set, missing } => {
                write!(f, "{set} is set without {missing}: set both, or neither to start without a launcher")
            }
            Error::Invalid { variable, value, valid } => {
                write!(f, "{variable}={value:?} is not valid: use {valid}")
            }
            Error::Secret(error) => write!(f, "{SECRET}: {error}"),
            Error::OfRank { rank, source } => write!(f, "rank {rank}: {source}"),
        }
    }
}

impl std::error::Error for Error {}

/// The secret of this process's job, if it has one.
///
/// # Errors
/// [`Error::Secret`].
pub fn secret() -> Result<Option<Secret>, Error> {
    let Some(value) = env::var_os(SECRET) else { return Ok(None) };
    Secret::new(&value.to_string_lossy()).map(Some).map_err(Error::Secret)
}

impl RankEnv {
    /// Reads this process's environment. `None` if the process was started plainly, or as the only rank of its job.
    ///
    /// # Errors
    /// The variables are incomplete or contradict each other.
    pub fn from_env() -> Result<Option<Self>, Error> {
        let lookup = |name: &str| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self::parse(lookup, starting_process)
    }

    /// Like [`from_env`](Self::from_env), with the environment as a function, and one that finds the number of the process
    /// that started the ranks.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn parse(
        lookup: impl Fn(&str) -> Option<String>,
        starting_process: impl Fn() -> u32,
    ) -> Result<Option<Self>, Error> {
        let environment = Environment(lookup);
        let Some((starter, names)) = environment.starter()? else { return Ok(None) };
        let world_size = environment.number(names.size)?.ok_or(missing(names.rank, names.size))?;
        if world_size == 0 {
            return Err(environment.invalid(names.size, "the number of ranks, 1 or more"));
        }
        let below_size = format!("a number from 0 to {}, as {} is {world_size}", world_size - 1, names.size);
        let rank = environment.number(names.rank)?.ok_or(missing(names.size, names.rank))?;
        if rank >= world_size {
            return Err(environment.invalid(names.rank, below_size));
        }
        if world_size == 1 {
            return Ok(None);
        }
        let of_rank = |error| Error::OfRank { rank, source: Box::new(error) };
        let hosts = environment.hosts(starter, &names, world_size).map_err(of_rank)?;
        // Of other programs with PMI only Slurm says it, if it is what lies below.
        let local_rank = match environment.number(names.local_rank).map_err(of_rank)? {
            None if hosts.is_some() => environment.number(Names::SLURM.local_rank).map_err(of_rank)?,
            local_rank => local_rank,
        };
        let local_rank = local_rank.unwrap_or(rank);
        if local_rank >= world_size {
            return Err(of_rank(environment.invalid(names.local_rank, below_size)));
        }
        let key = environment.key(starter, hosts.as_ref(), starting_process).map_err(of_rank)?;
        Ok(Some(RankEnv { rank, world_size, size_variable: names.size, local_rank, key, starter, hosts }))
    }
}

/// One starter's variables.
struct Names {
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    /// The number of ranks on this host. For Slurm, which has none, the number of hosts.
    local_size: &'static str,
}

impl Names {
    const TORCHRUN: Names =
        Names { rank: "RANK", size: "WORLD_SIZE", local_rank: "LOCAL_RANK", local_size: "LOCAL_WORLD_SIZE" };
    const OPEN_MPI: Names = Names {
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
    };
    const PMI: Names = Names {
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
    };
    const SLURM: Names = Names {
        rank: "SLURM_PROCID",
        size: "SLURM_STEP_NUM_TASKS",
        local_rank: "SLURM_LOCALID",
        local_size: SLURM_HOSTS,
    };
    /// The variables of Slurm versions that do not count a step's own tasks.
    const SLURM_JOB: Names = Names { size: "SLURM_NTASKS", ..Names::SLURM };
}

const SLURM_HOSTS: &str = "SLURM_STEP_NUM_NODES";

struct Environment<F>(F);

impl<F: Fn(&str) -> Option<String>> Environment<F> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn number(&self, name: &'static str) -> Result<Option<u32>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.trim().parse().map(Some).map_err(|_| self.invalid(name, "a whole number, 0 or more"))
    }

    fn invalid(&self, variable: &'static str, valid: impl Into<String>) -> Error {
        Error::Invalid { variable, value: self.get(variable).unwrap_or_default(), valid: valid.into() }
    }

    /// The starter of this rank, with its variables; `None` if this process is no rank.
    fn starter(&self) -> Result<Option<(Starter, Names)>, Error> {
        let starters = [
            (Starter::Torchrun, Names::TORCHRUN),
            (Starter::OpenMpi, Names::OPEN_MPI),
            (Starter::Pmi, Names::PMI),
        ];
        if let Some(found) =
            starters.into_iter().find(|(_, names)| self.has(names.rank) || self.has(names.size))
            && !(found.0 == Starter::Pmi && self.is_pmi_of_slurm())
        {
            return Ok(Some(found));
        }
        if !self.has("SLURM_PROCID") {
            return Ok(None);
        }
        let Some(step) = self.get("SLURM_STEP_ID") else { return Ok(None) };
        let step: u64 =
            step.trim().parse().map_err(|_| self.invalid("SLURM_STEP_ID", "the number of a job step"))?;
        let names = if self.has(Names::SLURM.size) { Names::SLURM } else { Names::SLURM_JOB };
        let is_task = step < SLURM_SPECIAL_STEPS && self.number(names.size)? != Some(1);
        Ok(is_task.then_some((Starter::Slurm, names)))
    }

    /// True if PMI's variables repeat those of Slurm. Hydra, which Slurm may start, sets a local rank as well.
    fn is_pmi_of_slurm(&self) -> bool {
        let slurm = if self.has(Names::SLURM.size) { Names::SLURM } else { Names::SLURM_JOB };
        let same = |one: &str, other: &str| self.has(one) && self.get(one) == self.get(other);
        !self.has(Names::PMI.local_rank)
            && same(Names::PMI.rank, slurm.rank)
            && same(Names::PMI.size, slurm.size)
    }

    /// Ranks on several hosts, if there are.
    fn hosts(&self, starter: Starter, names: &Names, world_size: u32) -> Result<Option<SeveralHosts>, Error> {
        // PMI need not say it. Slurm does, if it is what lies below.
        let variable = match starter {
            Starter::Pmi if !self.has(names.local_size) => SLURM_HOSTS,
            _ => names.local_size,
        };
        let expected = if variable == SLURM_HOSTS { 1 } else { world_size };
        match self.number(variable)? {
            Some(0) => Err(self.invalid(variable, "a whole number, 1 or more")),
            Some(value) if value != expected => {
                Ok(Some(SeveralHosts { variable, value, address: self.address(starter)? }))
            }
            _ => Ok(None),
        }
    }

    /// The address where ranks of several hosts meet, if the variables have one.
    fn address(&self, starter: Starter) -> Result<Option<Address>, Error> {
        if let Some(text) = self.get(ADDRESS) {
            let valid = "HOST:PORT, of the host of rank 0 and a port that is free there";
            return text.parse().map(Some).map_err(|_| self.invalid(ADDRESS, valid));
        }
        if let Some(host) = self.get("MASTER_ADDR") {
            let port = self.number("MASTER_PORT")?.ok_or(missing("MASTER_ADDR", "MASTER_PORT"))?;
            let after = port.checked_add(1).and_then(|port| u16::try_from(port).ok());
            let valid = "a port number up to 65534, as ranks meet at the next port";
            let port = after.ok_or_else(|| self.invalid("MASTER_PORT", valid))?;
            let valid = "the name or the number of the host of rank 0";
            return Address::new(host.trim(), port).map(Some).map_err(|_| self.invalid("MASTER_ADDR", valid));
        }
        let nodes = ["SLURM_STEP_NODELIST", "SLURM_NODELIST"].into_iter().find_map(|name| self.get(name));
        let number = |name| self.get(name).and_then(|value| value.trim().parse().ok()).unwrap_or(0);
        Ok(nodes
            .filter(|_| starter == Starter::Slurm)
            .and_then(|nodes| slurm_nodes::address(&nodes, number("SLURM_JOB_ID"), number("SLURM_STEP_ID"))))
    }

    /// The key that was given, or else that of the starter's variables.
    fn key(
        &self,
        starter: Starter,
        hosts: Option<&SeveralHosts>,
        starting_process: impl Fn() -> u32,
    ) -> Result<String, Error> {
        match self.get(KEY) {
            Some(key) if key.is_empty() => return Err(self.invalid(KEY, "a text that names the job")),
            Some(key) => return Ok(key),
            None => {}
        }
        let join = |names: &[&str]| {
            let values: Vec<_> = names.iter().map(|name| self.get(name).unwrap_or_default()).collect();
            values.join("/")
        };
        match starter {
            Starter::Torchrun => {
                if !self.has("MASTER_PORT") && !self.has("TORCHELASTIC_RUN_ID") {
                    return Err(missing("RANK", "MASTER_PORT"));
                }
                if let Some(port) = self.get("MASTER_PORT")
                    && port.trim().parse::<u16>().is_err()
                {
                    return Err(self.invalid("MASTER_PORT", "a port number, 0 to 65535"));
                }
                // An elastic restart is another job: ranks of the one before it may still be ending.
                let names =
                    ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"];
                Ok(format!("torchrun/{}", join(&names)))
            }
            Starter::OpenMpi => {
                let job =
                    ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"].into_iter().find_map(|name| self.get(name));
                job.map(|job| format!("mpirun/{job}"))
                    .ok_or(missing("OMPI_COMM_WORLD_RANK", "PMIX_NAMESPACE"))
            }
            // Hydra, which sets a local rank, names no job. One that it inherits is that of a job around it.
            Starter::Pmi => Ok(match self.get("PMI_JOBID").filter(|_| !self.has(Names::PMI.local_rank)) {
                Some(job) => format!("pmi/{job}"),
                // On each host another process has started the ranks. No other job has the address.
                None if hosts.is_some() => "mpiexec".to_owned(),
                None => format!("mpiexec/{}", starting_process()),
            }),
            Starter::Slurm if self.has("SLURM_JOB_ID") => {
                Ok(format!("srun/{}", join(&["SLURM_JOB_ID", "SLURM_STEP_ID"])))
            }
            Starter::Slurm => Err(missing("SLURM_PROCID", "SLURM_JOB_ID")),
        }
    }
}

fn missing(set: &'static str, missing: &'static str) -> Error {
    Error::Missing { set, missing }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses `NAME=value NAME=value`.
    fn parse(variables: &str) -> Result<Option<RankEnv>, Error> {
        let lookup = |name: &str| {
            let find = |pair: &str| {
                pair.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value.into())
            };
            variables.split_whitespace().find_map(find)
        };
        RankEnv::parse(lookup, || 77)
    }

    fn rank(variables: &str) -> RankEnv {
        parse(variables).expect("valid").expect("a rank")
    }

    fn error(variables: &str) -> String {
        parse(variables).expect_err("an error").to_string()
    }

    const TORCHRUN: &str = "RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 \
                            MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=0";
    const SRUN: &str = "SLURM_PROCID=2 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=2 SLURM_JOB_ID=9 \
                        SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=1";

    #[test]
    fn an_empty_environment_is_a_plain_start() {
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("MASTER_PORT=1 LOCAL_RANK=0 FUSED_COLLECTIVE_KEY=x"), Ok(None));
    }

    #[test]
    fn each_starter_is_understood() {
        let cases = [
            (TORCHRUN, Starter::Torchrun, 1, "torchrun/127.0.0.1/29500/none/0"),
            (
                "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=3 \
                 OMPI_COMM_WORLD_LOCAL_SIZE=4 OMPI_MCA_ess_base_jobid=123",
                Starter::OpenMpi,
                3,
                "mpirun/123",
            ),
            (
                "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 PMIX_NAMESPACE=prterun-h-5@1",
                Starter::OpenMpi,
                0,
                "mpirun/prterun-h-5@1",
            ),
            ("PMI_RANK=2 PMI_SIZE=4 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=4", Starter::Pmi, 2, "mpiexec/77"),
            ("PMI_RANK=2 PMI_SIZE=4 PMI_JOBID=9.0", Starter::Pmi, 2, "pmi/9.0"),
            (SRUN, Starter::Slurm, 2, "srun/9/0"),
            (&format!("{SRUN} PMI_RANK=2 PMI_SIZE=4 PMI_JOBID=9.0"), Starter::Slurm, 2, "srun/9/0"),
            ("SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_JOB_ID=9 SLURM_STEP_ID=3", Starter::Slurm, 1, "srun/9/3"),
        ];
        for (variables, starter, number, key) in cases {
            let found = rank(variables);
            assert!(variables.contains(&format!("{}=4", found.size_variable)), "{found:?}");
            let expected = RankEnv {
                rank: number,
                world_size: 4,
                size_variable: found.size_variable,
                local_rank: number,
                key: key.to_owned(),
                starter,
                hosts: None,
            };
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn the_starter_nearest_to_the_program_counts() {
        assert_eq!(rank(&format!("{SRUN} {TORCHRUN}")).starter, Starter::Torchrun);
        assert_eq!(rank(&format!("{SRUN} PMI_RANK=1 PMI_SIZE=2")).starter, Starter::Pmi);
        // Hydra in a shell of `srun --mpi=pmi2`: the number of the job is that of the shell.
        let hydra = "PMI_RANK=2 PMI_SIZE=4 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=4 PMI_JOBID=9.0";
        assert_eq!(rank(&format!("{SRUN} {hydra}")).key, "mpiexec/77");
    }

    #[test]
    fn the_only_rank_of_a_job_is_a_plain_start() {
        let slurm = "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_JOB_ID=9 SLURM_STEP_ID=0";
        let single = [
            "RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_PORT=1",
            "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 PMIX_NAMESPACE=1",
            "PMI_RANK=0 PMI_SIZE=1 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1",
            "PMI_RANK=0 PMI_SIZE=1 PMI_JOBID=9.0",
            slurm,
            &format!("{slurm} PMI_RANK=0 PMI_SIZE=1 PMI_JOBID=9.0"),
        ];
        single.iter().for_each(|variables| assert_eq!(parse(variables), Ok(None), "{variables}"));
        assert!(error("RANK=1 WORLD_SIZE=1").contains("use a number from 0 to 0"));
    }

    #[test]
    fn the_key_can_be_given() {
        assert_eq!(rank("RANK=0 WORLD_SIZE=2 FUSED_COLLECTIVE_KEY=mine").key, "mine");
        assert_eq!(rank(&format!("{TORCHRUN} FUSED_COLLECTIVE_KEY=mine")).key, "mine");
        assert!(error("RANK=0 WORLD_SIZE=2 FUSED_COLLECTIVE_KEY=").contains("names the job"));
    }

    #[test]
    fn restarts_of_a_job_have_keys_of_their_own() {
        assert_ne!(rank(TORCHRUN).key, rank(&TORCHRUN.replace("COUNT=0", "COUNT=1")).key);
    }

    #[test]
    fn slurm_shells_and_batch_scripts_are_plain_starts() {
        let plain = [
            "SLURM_JOB_ID=9 SLURM_NTASKS=4",
            "SLURM_JOB_ID=9 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_LOCALID=0",
            "SLURM_JOB_ID=9 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_STEP_ID=4294967290",
            "SLURM_JOB_ID=9 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1",
        ];
        plain.iter().for_each(|variables| assert_eq!(parse(variables), Ok(None), "{variables}"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_what_is_valid() {
        let cases = [
            ("RANK=0", "RANK is set without WORLD_SIZE"),
            ("WORLD_SIZE=2", "WORLD_SIZE is set without RANK"),
            ("RANK=0 WORLD_SIZE=2", "RANK is set without MASTER_PORT"),
            (
                "RANK=2 WORLD_SIZE=2 MASTER_PORT=1",
                "RANK=\"2\" is not valid: use a number from 0 to 1, as WORLD_SIZE is 2",
            ),
            ("RANK=-1 WORLD_SIZE=2", "RANK=\"-1\" is not valid: use a whole number"),
            ("RANK= WORLD_SIZE=2", "RANK=\"\" is not valid"),
            ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE=\"two\" is not valid"),
            ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE=\"0\" is not valid: use the number of ranks, 1 or more"),
            ("RANK=0 WORLD_SIZE=99999999999", "WORLD_SIZE=\"99999999999\" is not valid"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2 MASTER_PORT=1", "LOCAL_RANK=\"2\" is not valid"),
            ("RANK=0 WORLD_SIZE=2 MASTER_PORT=http", "MASTER_PORT=\"http\" is not valid: use a port number"),
            ("OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_RANK is set without OMPI_COMM_WORLD_SIZE"),
            ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2", "without PMIX_NAMESPACE"),
            ("PMI_SIZE=4", "PMI_SIZE is set without PMI_RANK"),
            ("SLURM_PROCID=0 SLURM_STEP_ID=0", "SLURM_PROCID is set without SLURM_NTASKS"),
            ("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_NTASKS=2", "SLURM_PROCID is set without SLURM_JOB_ID"),
            ("SLURM_PROCID=0 SLURM_STEP_ID=x SLURM_NTASKS=2", "SLURM_STEP_ID=\"x\" is not valid"),
        ];
        for (variables, expected) in cases {
            assert!(error(variables).contains(expected), "{variables}: {}", error(variables));
        }
    }

    #[test]
    fn a_launcher_says_that_ranks_are_on_several_hosts() {
        let pmi = "PMI_RANK=0 PMI_SIZE=4 PMI_JOBID=9.0";
        let cases = [
            ("RANK=0 WORLD_SIZE=16 LOCAL_WORLD_SIZE=8 MASTER_PORT=1", "LOCAL_WORLD_SIZE=8"),
            (
                "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=1",
                "OMPI_COMM_WORLD_LOCAL_SIZE=2",
            ),
            ("PMI_RANK=0 PMI_SIZE=4 MPI_LOCALNRANKS=2", "MPI_LOCALNRANKS=2"),
            (&SRUN.replace("NODES=1", "NODES=2"), "SLURM_STEP_NUM_NODES=2"),
            (&format!("{pmi} SLURM_STEP_NUM_NODES=2"), "SLURM_STEP_NUM_NODES=2"),
            (
                &format!("{} PMI_RANK=2 PMI_SIZE=4 PMI_JOBID=9.0", SRUN.replace("NODES=1", "NODES=2")),
                "SLURM_STEP_NUM_NODES=2",
            ),
        ];
        for (variables, expected) in cases {
            let hosts = rank(variables).hosts.expect("several");
            assert_eq!(hosts.to_string(), format!("{expected} says that the job has ranks on several hosts"));
            assert_eq!(hosts.address, None, "{variables}");
        }
        // Other processes have started the ranks of other hosts.
        assert_eq!(rank("PMI_RANK=0 PMI_SIZE=4 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2").key, "mpiexec");
        let slurm = "PMI_RANK=2 PMI_SIZE=4 PMI_JOBID=9.0 SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0";
        assert_eq!(rank(slurm).local_rank, 0);
        // What the program's own starter says of its host counts, not what a job around it has.
        let around = "PMI_RANK=0 PMI_SIZE=2 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2 SLURM_STEP_NUM_NODES=2";
        assert_eq!(rank(around).hosts, None);
        assert_eq!(rank("RANK=0 WORLD_SIZE=2 MASTER_PORT=1 SLURM_STEP_NUM_NODES=2").hosts, None);
        assert!(error("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=0 MASTER_PORT=1").contains("1 or more"));
    }

    #[test]
    fn ranks_of_several_hosts_meet_next_to_the_master_s_port_or_where_they_are_told() {
        let address = |variables: &str| {
            rank(variables).hosts.expect("several").address.map(|address| address.to_string())
        };
        let torchrun = TORCHRUN.replace("LOCAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=2");
        let of = |text: &str| Some(text.to_owned());
        assert_eq!(address(&torchrun), of("127.0.0.1:29501"));
        assert_eq!(address(&format!("{torchrun} FUSED_COLLECTIVE_ADDRESS=a:7")), of("a:7"));
        let srun = SRUN.replace("NODES=1", "NODES=2");
        assert_eq!(address(&srun), None);
        assert_eq!(address(&format!("{srun} SLURM_STEP_NODELIST=gpu[03-05,09],b")), of("gpu03:15279"));
        assert_eq!(address(&format!("{srun} SLURM_STEP_NODELIST=a MASTER_ADDR=b MASTER_PORT=1")), of("b:2"));
        let wrong = [
            (
                "FUSED_COLLECTIVE_ADDRESS=here",
                "FUSED_COLLECTIVE_ADDRESS=\"here\" is not valid: use HOST:PORT",
            ),
            ("MASTER_ADDR=a", "MASTER_ADDR is set without MASTER_PORT"),
            (
                "MASTER_ADDR=a MASTER_PORT=65535",
                "MASTER_PORT=\"65535\" is not valid: use a port number up to 65534",
            ),
            ("MASTER_ADDR=a:b MASTER_PORT=1", "MASTER_ADDR=\"a:b\" is not valid: use the name or the number"),
        ];
        for (variables, expected) in wrong {
            let error = error(&format!("{srun} {variables}"));
            assert!(error.starts_with("rank 2: ") && error.contains(expected), "{error}");
        }
    }
}
