//! The network over which the ranks of several hosts meet, from the environment of their launcher.

use std::{env, fmt, fs};

use super::{
    rank_env::{self, ADDRESS, RankEnv, SECRET},
    rendezvous::{Address, Network, Secret},
};

/// NCCL's variable with the name of the host, by which it tells hosts apart.
pub const NCCL_HOST: &str = "NCCL_HOSTID";
/// The most bytes of a host's name.
const MAX_HOST: usize = 255;

/// The reason that ranks of several hosts cannot meet; the text says what to set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoNetwork(String);

impl fmt::Display for NoNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoNetwork {}

/// The network over which the ranks of a job meet, if they are on several hosts.
///
/// # Errors
/// The environment has no secret or no address for them.
pub fn network(environment: &RankEnv) -> Result<Option<Network>, NoNetwork> {
    let Some(hosts) = &environment.hosts else { return Ok(None) };
    let secret = secret(hosts)?;
    let address = hosts.address.clone().ok_or_else(|| {
        NoNetwork(format!(
            "{hosts}, and nothing says where these meet: set MASTER_ADDR to the host of rank 0 and MASTER_PORT, or {ADDRESS} \
             to HOST:PORT of a free port there"
        ))
    })?;
    Ok(Some(Network { address, secret, host: host()? }))
}

/// The network of ranks on several hosts that meet at `address`, on the host of rank 0, which all were told.
///
/// # Errors
/// As [`network`].
pub fn at(address: Address) -> Result<Network, NoNetwork> {
    let secret = secret(&"the group has ranks on several hosts")?;
    Ok(Network { address, secret, host: host()? })
}

fn secret(what: &dyn fmt::Display) -> Result<Secret, NoNetwork> {
    rank_env::secret().map_err(|error| NoNetwork(error.to_string()))?.ok_or_else(|| {
        NoNetwork(format!(
            "{what}, and these meet only if they have a secret in common: set {SECRET} on all ranks to the same random text, \
             such as that of `openssl rand -hex 32`, or start all ranks on one host"
        ))
    })
}

/// The name of this host: NCCL's, if that is set, so that both tell the same hosts apart. Otherwise the system's, with a part
/// of the number of its boot: two hosts may have one name.
///
/// # Errors
/// The name is too long, or the system does not say it.
pub fn host() -> Result<String, NoNetwork> {
    if let Some(name) = env::var_os(NCCL_HOST).filter(|name| !name.is_empty()) {
        if name.len() > MAX_HOST {
            let length = name.len();
            return Err(NoNetwork(format!("{NCCL_HOST}: {length} bytes name no host: use up to {MAX_HOST}")));
        }
        return Ok(name.to_string_lossy().replace(char::is_control, " "));
    }
    let read = |file: &str| {
        let path = format!("/proc/sys/kernel/{file}");
        fs::read_to_string(&path)
            .map_err(|error| NoNetwork(format!("cannot read this host's name from {path}: {error}")))
    };
    let (name, boot) = (read("hostname")?, read("random/boot_id")?);
    Ok(format!("{}/{}", name.trim(), boot.split('-').next().unwrap_or_default()))
}
