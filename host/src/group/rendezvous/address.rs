//! The address where ranks of several hosts meet.

use std::{
    fmt,
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    str::FromStr,
    sync::mpsc,
    thread,
    time::Instant,
};

/// The most characters of a host's name in the DNS.
const MAX_NAME: usize = 253;

/// A host and a port: `node1:29501`, `10.0.0.1:29501`, `[fd00::1]:29501`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
}

/// The error of a text that is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressError;

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "not an address: use HOST:PORT, with a name or number of a host and a port from 1 to 65535",
        )
    }
}

impl std::error::Error for AddressError {}

impl Address {
    /// Takes a name or an IP address, the latter of version 6 without brackets, and a port.
    ///
    /// # Errors
    /// The host is empty, too long or has characters of no name, or the port is 0.
    pub fn new(host: &str, port: u16) -> Result<Self, AddressError> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        let valid = host.parse::<IpAddr>().is_ok() || (!host.is_empty() && host.bytes().all(is_name));
        if !valid || host.len() > MAX_NAME || port == 0 {
            return Err(AddressError);
        }
        Ok(Address { host: host.to_owned(), port })
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The same host with another port.
    pub(super) fn at(&self, port: u16) -> Self {
        Address { host: self.host.clone(), port }
    }

    /// The loopback address that this is by its number or as `localhost`, if it is one.
    pub(super) fn loopback(&self) -> Option<IpAddr> {
        let host = if self.host == "localhost" { "127.0.0.1" } else { &self.host };
        host.parse().ok().filter(IpAddr::is_loopback)
    }

    /// Looks the name up, until `end` at most: a server that does not answer may take a resolver half a minute.
    pub(super) fn resolve(&self, end: Instant) -> Result<Vec<SocketAddr>, String> {
        if let Ok(number) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(number, self.port)]);
        }
        let (found, looked_up) = mpsc::channel();
        let (host, port) = (self.host.clone(), self.port);
        // Outlives this call if nobody answers, and ends with the resolver's own limits.
        let look_up = move || {
            let addresses = (host, port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            // Nobody listens any more if the time was up.
            let _ = found.send(addresses.map_err(|error| error.to_string()));
        };
        thread::Builder::new()
            .name("name-lookup".to_owned())
            .spawn(look_up)
            .map_err(|error| error.to_string())?;
        let left = end.saturating_duration_since(Instant::now());
        match looked_up.recv_timeout(left) {
            Ok(Ok(addresses)) if addresses.is_empty() => Err("its name has no address".to_owned()),
            Ok(result) => result,
            Err(_) => Err("its name was not looked up in time".to_owned()),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    /// Reads `HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (host, port) = text.trim().rsplit_once(':').ok_or(AddressError)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // A number of version 6 has colons of its own.
        if bracketed.is_none() && host.contains(':') {
            return Err(AddressError);
        }
        Address::new(bracketed.unwrap_or(host), port.parse().map_err(|_| AddressError)?)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{FEW, cases};

    #[test]
    fn an_address_is_read_and_shown_as_it_was_written() {
        for text in ["node1:29501", "10.0.0.1:1", "[fd00::1]:65535", "a-b.c_d.example:80"] {
            assert_eq!(text.parse::<Address>().map(|address| address.to_string()), Ok(text.to_owned()));
        }
        for text in
            ["", ":", "node1", "node1:", ":80", "node1:0", "node1:65536", "fd00::1:80", "a b:80", "[]:1"]
        {
            assert_eq!(text.parse::<Address>(), Err(AddressError), "{text}");
        }
    }

    #[test]
    fn numbers_and_this_hosts_own_name_need_no_server() {
        let end = Instant::now() + Duration::from_secs(10);
        let resolved = |text: &str| text.parse::<Address>().expect("an address").resolve(end);
        assert_eq!(resolved("127.0.0.1:80"), Ok(vec![([127, 0, 0, 1], 80).into()]));
        assert!(resolved("localhost:80").is_ok_and(|all| all.iter().all(|one| one.ip().is_loopback())));
    }

    proptest! {
        #![proptest_config(cases(FEW))]

        #[test]
        fn any_text_is_an_address_or_refused(text in ".{0,40}", host in "[a-z0-9.:\\[\\]-]{0,20}", port: u32) {
            for text in [text, format!("{host}:{port}")] {
                if let Ok(address) = text.parse::<Address>() {
                    prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
                }
            }
        }
    }
}
