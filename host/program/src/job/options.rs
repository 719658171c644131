//! The options that all commands share, parsed and checked once.

use std::{fmt, ops::Not, str::FromStr, time::Duration};

use fused_collective::{
    cuda,
    group::{
        rank_env::SeveralHosts,
        rendezvous::{MAX_RANKS, MIN_RANKS},
    },
};
use fused_collective_core::{MAX_WORLD_SIZE, fusion::PartialSums};
use serde::{Deserialize, Serialize};

use crate::{
    usage::UsageError,
    values::{name, number, one, seconds},
};

/// The longest deadline for ranks, in seconds: the limit of the kernels, which every backend keeps.
const MAX_DEADLINE: f64 = cuda::MAX_DEADLINE.as_secs() as f64;

/// The ranks of a job, the backend that they use, and the time that they wait for each other.
///
/// The field names are those of the JSON report. A default that older reports do not have is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobOptions {
    /// The backend asked for.
    pub backend: BackendChoice,
    /// Ranks of a group; `None` leaves the number to the launcher or to the backend.
    pub nproc_per_node: Option<u32>,
    /// Groups that run at the same time, all of one size.
    #[serde(default = "one_group", skip_serializing_if = "is_one_group")]
    pub groups: u32,
    /// Hosts that this program simulates on its own, for tests; 1 for none but this one. Each has `nproc_per_node` ranks.
    #[serde(default = "one_host", skip_serializing_if = "is_one_host")]
    pub hosts: u32,
    /// True if sums cross between hosts in the element type.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub element_partial_sums: bool,
    /// True if ranks may share a GPU, which makes times meaningless.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub oversubscribe: bool,
    /// Longest wait for another rank, in seconds; finite and above 0.
    pub deadline_seconds: f64,
}

impl Default for JobOptions {
    fn default() -> Self {
        JobOptions {
            backend: BackendChoice::Auto,
            nproc_per_node: None,
            groups: 1,
            hosts: 1,
            element_partial_sums: false,
            oversubscribe: false,
            deadline_seconds: 10.0,
        }
    }
}

/// The shared options as a command's arguments have them. A command without one of the options leaves it `None`.
#[derive(Default)]
pub(crate) struct JobArgs {
    pub(crate) backend: Option<String>,
    pub(crate) nproc_per_node: Option<String>,
    pub(crate) groups: Option<String>,
    pub(crate) hosts: Option<String>,
    pub(crate) partial_sums: Option<String>,
    pub(crate) oversubscribe: bool,
    pub(crate) deadline: Option<String>,
}

impl JobArgs {
    /// Checks every value. Options that were not given keep the value in `default`.
    pub(crate) fn parse(self, default: JobOptions) -> Result<JobOptions, UsageError> {
        let groups =
            |text: &str| number("--groups", text, "a number of groups", 1, Some(MAX_WORLD_SIZE / MIN_RANKS));
        let hosts = |text: &str| number("--hosts", text, "a number of hosts", 1, Some(MAX_RANKS));
        let hosts = one(self.hosts, hosts, default.hosts)?;
        let ranks = |text: &str| ranks_of_host(text, hosts).map(Some);
        let options = JobOptions {
            hosts,
            element_partial_sums: one(self.partial_sums, partial_sums, default.element_partial_sums)?,
            backend: one(self.backend, |text| name("--backend", text), default.backend)?,
            nproc_per_node: one(self.nproc_per_node, ranks, default.nproc_per_node)?,
            groups: one(self.groups, groups, default.groups)?,
            oversubscribe: self.oversubscribe,
            deadline_seconds: one(
                self.deadline,
                |text| seconds("--deadline", text, MAX_DEADLINE),
                default.deadline_seconds,
            )?,
        };
        if hosts > 1 {
            return options.of_hosts();
        }
        let (groups, ranks) = (options.groups, options.nproc_per_node.unwrap_or(MIN_RANKS));
        if ranks * groups > MAX_WORLD_SIZE {
            return Err(UsageError::new(format_args!(
                "--groups: {groups} groups of {ranks} ranks are more than {MAX_WORLD_SIZE} ranks: use fewer"
            )));
        }
        Ok(options)
    }
}

impl JobOptions {
    /// These options, of several hosts that are simulated.
    fn of_hosts(self) -> Result<JobOptions, UsageError> {
        let hosts = self.hosts;
        let Some(ranks) = self.nproc_per_node else {
            return Err(UsageError::new(format_args!(
                "--hosts: {hosts} hosts need a number of ranks each: give it by --nproc-per-node"
            )));
        };
        if self.groups > 1 {
            return Err(UsageError::new(
                "--groups: ranks of several hosts form one group: leave it or --hosts out",
            ));
        }
        if !(MIN_RANKS..=MAX_RANKS).contains(&(ranks * hosts)) {
            return Err(UsageError::new(format_args!(
                "--hosts: {hosts} hosts of {ranks} ranks are {} ranks: use {MIN_RANKS} to {MAX_RANKS}",
                ranks * hosts
            )));
        }
        Ok(self)
    }

    /// The type in which sums cross between hosts.
    pub fn partial_sums(&self) -> PartialSums {
        if self.element_partial_sums { PartialSums::Element } else { PartialSums::F32 }
    }

    /// Longest wait for another rank.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds)
    }

    /// Ranks of all groups together: by `--nproc-per-node`, or by a launcher that `launched` them and set a variable to their
    /// number. `None` if neither says; both must agree.
    pub(crate) fn world_size(&self, launched: Option<(&str, u32)>) -> Result<Option<u32>, UsageError> {
        let asked = self.nproc_per_node.map(|ranks| ranks * self.groups * self.hosts);
        let Some((variable, world)) = launched else { return Ok(asked) };
        check_ranks(variable, world, MAX_WORLD_SIZE)?;
        if let Some(asked) = asked.filter(|&asked| asked != world) {
            return Err(UsageError::new(format_args!(
                "--nproc-per-node: {asked} disagrees with the launcher's {variable}, {world}: leave it out or use {world}"
            )));
        }
        Ok(Some(world))
    }

    /// Like [`world_size`](Self::world_size), of a launcher that starts ranks on several `hosts`.
    pub(crate) fn world_size_of_hosts(
        &self,
        hosts: &SeveralHosts,
        variable: &str,
        world: u32,
    ) -> Result<Option<u32>, UsageError> {
        check_ranks(variable, world, MAX_RANKS)?;
        let refuse =
            |what: &str| Err(UsageError::new(format_args!("{what} ({hosts}): leave the option out")));
        if self.nproc_per_node.is_some() && self.hosts == 1 {
            return refuse("--nproc-per-node: the launcher gives the ranks of each host");
        }
        if self.groups > 1 {
            return refuse("--groups: ranks of several hosts form one group");
        }
        Ok(Some(world))
    }
}

/// A number of ranks of one of `hosts` hosts.
fn ranks_of_host(text: &str, hosts: u32) -> Result<u32, UsageError> {
    if hosts == 1 {
        return ranks(text);
    }
    number("--nproc-per-node", text, "a number of ranks of a host", 1, Some(MAX_WORLD_SIZE))
}

/// The type of partial sums: true for the element type.
fn partial_sums(text: &str) -> Result<bool, UsageError> {
    match text {
        "f32" => Ok(false),
        "element" => Ok(true),
        _ => Err(UsageError::new(format_args!(
            "--partial-sums: '{text}' is not a type of partial sums: use f32 or element"
        ))),
    }
}

/// A number of ranks that can form a group.
pub(crate) fn ranks(text: &str) -> Result<u32, UsageError> {
    let option = "--nproc-per-node";
    let ranks = text.parse().map_err(|_| {
        UsageError::new(format_args!(
            "{option}: '{text}' is not a number of ranks: use {MIN_RANKS} to {MAX_WORLD_SIZE}"
        ))
    })?;
    check_ranks(option, ranks, MAX_WORLD_SIZE).map(|()| ranks)
}

fn check_ranks(name: &str, ranks: u32, most: u32) -> Result<(), UsageError> {
    if (MIN_RANKS..=most).contains(&ranks) {
        return Ok(());
    }
    let noun = if ranks == 1 { "rank" } else { "ranks" };
    Err(UsageError::new(format_args!(
        "{name}: {ranks} {noun} cannot form a group: use {MIN_RANKS} to {most}"
    )))
}

const fn one_host() -> u32 {
    1
}

fn is_one_host(hosts: &u32) -> bool {
    *hosts == 1
}

const fn one_group() -> u32 {
    1
}

fn is_one_group(groups: &u32) -> bool {
    *groups == 1
}

/// The backend that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// CUDA if there is a GPU for every rank, else the CPU.
    Auto,
    /// Rank processes over shared memory.
    Cpu,
    /// One process per GPU.
    Cuda,
}

impl FromStr for BackendChoice {
    type Err = UnknownBackend;

    /// Reads `auto`, `cpu` or `cuda`.
    fn from_str(text: &str) -> Result<Self, UnknownBackend> {
        match text {
            "auto" => Ok(BackendChoice::Auto),
            "cpu" => Ok(BackendChoice::Cpu),
            "cuda" => Ok(BackendChoice::Cuda),
            _ => Err(UnknownBackend),
        }
    }
}

/// The text names no backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownBackend;

impl fmt::Display for UnknownBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a backend: use auto, cpu or cuda")
    }
}

impl std::error::Error for UnknownBackend {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launcher_and_the_option_must_agree() {
        let world_size = |nproc_per_node, groups, launched: Option<u32>| {
            let options = JobOptions { nproc_per_node, groups, ..JobOptions::default() };
            let launched = launched.map(|world| ("PMI_SIZE", world));
            options.world_size(launched).map_err(|error| error.to_string())
        };
        assert_eq!(world_size(None, 1, None), Ok(None));
        assert_eq!(world_size(Some(4), 1, None), Ok(Some(4)));
        assert_eq!(world_size(None, 1, Some(3)), Ok(Some(3)));
        assert_eq!(world_size(Some(3), 1, Some(3)), Ok(Some(3)));
        assert_eq!(world_size(Some(3), 2, Some(6)), Ok(Some(6)));
        let error = |asked, launched| world_size(asked, 1, Some(launched)).unwrap_err();
        assert_eq!(
            error(Some(2), 4),
            "--nproc-per-node: 2 disagrees with the launcher's PMI_SIZE, 4: leave it out or use 4"
        );
        assert_eq!(error(None, 17), "PMI_SIZE: 17 ranks cannot form a group: use 2 to 16");
    }

    #[test]
    fn a_launcher_of_several_hosts_gives_all_numbers() {
        let hosts = SeveralHosts { variable: "LOCAL_WORLD_SIZE", value: 8, address: None };
        let world_size = |nproc_per_node, groups, world| {
            let options = JobOptions { nproc_per_node, groups, ..JobOptions::default() };
            options.world_size_of_hosts(&hosts, "WORLD_SIZE", world).map_err(|error| error.to_string())
        };
        assert_eq!(world_size(None, 1, 64), Ok(Some(64)));
        for (nproc_per_node, groups, world, start) in [
            (
                Some(8),
                1,
                64,
                "--nproc-per-node: the launcher gives the ranks of each host (LOCAL_WORLD_SIZE=8 says",
            ),
            (None, 2, 64, "--groups: ranks of several hosts form one group (LOCAL_WORLD_SIZE=8 says"),
            (None, 1, 129, "WORLD_SIZE: 129 ranks cannot form a group: use 2 to 128"),
        ] {
            let error = world_size(nproc_per_node, groups, world).unwrap_err();
            assert!(error.starts_with(start), "{error}");
        }
    }

    #[test]
    fn hosts_that_are_simulated_have_any_number_of_ranks_and_one_group() {
        let parse = |hosts: &str, ranks: Option<&str>, groups: Option<&str>| {
            let text = |text: &str| text.to_owned();
            let args = JobArgs {
                hosts: Some(text(hosts)),
                nproc_per_node: ranks.map(text),
                groups: groups.map(text),
                ..JobArgs::default()
            };
            let options = args.parse(JobOptions::default()).map_err(|error| error.to_string())?;
            options.world_size(None).map_err(|error| error.to_string())
        };
        assert_eq!(parse("2", Some("1"), None), Ok(Some(2)));
        assert_eq!(parse("3", Some("4"), None), Ok(Some(12)));
        assert_eq!(parse("1", None, None), Ok(None));
        let error = |hosts, ranks, groups| parse(hosts, ranks, groups).unwrap_err();
        assert!(error("2", None, None).contains("--nproc-per-node"));
        assert!(error("1", Some("1"), None).contains("1 rank cannot form a group"));
        assert!(error("2", Some("2"), Some("2")).contains("one group"));
        assert!(error("64", Some("16"), None).contains("1024 ranks: use 2 to 128"));
        let sums = |text: &str| {
            let args = JobArgs { partial_sums: Some(text.to_owned()), ..JobArgs::default() };
            args.parse(JobOptions::default()).map(|options| options.partial_sums())
        };
        assert_eq!(sums("element").unwrap(), PartialSums::Element);
        assert_eq!(sums("f32").unwrap(), PartialSums::F32);
        assert!(sums("f16").unwrap_err().to_string().contains("use f32 or element"));
    }

    #[test]
    fn json_leaves_out_what_reports_had_not_always() {
        let json = |options: &JobOptions| serde_json::to_value(options).unwrap();
        let plain = serde_json::json!({"backend": "auto", "nproc_per_node": null, "deadline_seconds": 10.0});
        assert_eq!(json(&JobOptions::default()), plain);
        let options = JobOptions { groups: 2, oversubscribe: true, ..JobOptions::default() };
        let back: JobOptions = serde_json::from_value(json(&options)).unwrap();
        assert_eq!(back, options);
    }
}
