//! Connections between ranks of several hosts: TCP, of which a host that vanishes is noticed within the deadline.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::{AsFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketFlags, SocketType, bind, getsockname, listen, socket_with,
        sockopt::{
            set_ipv6_v6only, set_socket_keepalive, set_socket_reuseaddr, set_tcp_keepidle, set_tcp_keepintvl,
            set_tcp_nodelay, set_tcp_user_timeout,
        },
    },
};

use super::{super::loss::ENDED, address::Address, error::Error, secret::Secret};

/// The longest time for one attempt to connect: packets to a host that is not there yet are lost.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Between two attempts to connect, or to listen.
const RETRY: Duration = Duration::from_millis(50);
/// The shortest times that the kernel can tell apart: it probes a silent connection every second at most.
const SECOND: Duration = Duration::from_secs(1);

/// The place where ranks of several hosts meet, and what lets them in.
#[derive(Clone, Debug)]
pub struct Network {
    /// The address of rank 0, which listens on the port on all of its host's addresses; on a loopback address on that alone.
    pub address: Address,
    /// The job's secret. A rank without it is no rank of the job.
    pub secret: Secret,
    /// This rank's host, as all ranks are told: those that give the same name share memory. At most 255 bytes.
    pub host: String,
}

/// A socket that listens on the port of `address`, as soon as it is free, at most until `until`. Port 0 is a free one.
pub(super) fn listen_at(
    address: &Address,
    port: u16,
    backlog: u16,
    until: Instant,
) -> Result<OwnedFd, Errno> {
    let everywhere = [IpAddr::from(Ipv6Addr::UNSPECIFIED), IpAddr::from(Ipv4Addr::UNSPECIFIED)];
    let loopback = address.loopback();
    let addresses = loopback.as_ref().map_or(&everywhere[..], std::slice::from_ref);
    loop {
        let mut failure = Errno::ADDRNOTAVAIL;
        for &address in addresses {
            match try_listen(SocketAddr::new(address, port), backlog) {
                Ok(listener) => return Ok(listener),
                // The second address is for hosts without the other version, and no way around a port in use.
                Err(error) => failure = error,
            }
            if failure == Errno::ADDRINUSE {
                break;
            }
        }
        // The group before this one may be about to let go of the port.
        if failure != Errno::ADDRINUSE || Instant::now() >= until {
            return Err(failure);
        }
        thread::sleep(RETRY);
    }
}

fn try_listen(address: SocketAddr, backlog: u16) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let listener = socket_with(family, SocketType::STREAM, flags, None)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&listener, false)?;
    }
    // Connections of an earlier group that wait for their end keep nobody from listening.
    set_socket_reuseaddr(&listener, true)?;
    bind(&listener, &address)?;
    listen(&listener, backlog.into())?;
    Ok(listener)
}

/// The port that a socket has.
pub(super) fn port(socket: impl AsFd) -> Result<u16, Error> {
    Ok(own_address(socket)?.port())
}

/// The address of this end of a connection.
pub(super) fn own_address(socket: impl AsFd) -> Result<SocketAddr, Error> {
    let doing = "ask for a socket's address";
    SocketAddr::try_from(getsockname(socket).map_err(Error::system(doing))?).map_err(Error::system(doing))
}

/// Connects to one of the `addresses`. A failure may be over at the next attempt, which comes after a while.
pub(super) fn connect_to(addresses: &[SocketAddr], until: Instant) -> io::Result<OwnedFd> {
    let mut failure = io::Error::from(io::ErrorKind::TimedOut);
    for address in addresses {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(address, left.min(ATTEMPT)) {
            Ok(connected) => {
                connected.set_nonblocking(true)?;
                return Ok(connected.into());
            }
            Err(error) => failure = error,
        }
    }
    thread::sleep(RETRY.min(until.saturating_duration_since(Instant::now())));
    Err(failure)
}

/// The address of the other end of a connection, if it still has one.
pub(super) fn other_end(socket: &OwnedFd) -> Option<IpAddr> {
    SocketAddr::try_from(rustix::net::getpeername(socket).ok()??)
        .ok()
        .map(|address| address.ip().to_canonical())
}

/// The time after which a connection ends on which nothing was heard from the other host's kernel: half of the deadline, so
/// that it has passed well within it, but no less than a second.
pub(super) fn silence(deadline: Duration) -> Duration {
    (deadline / 2).max(SECOND)
}

/// Makes the kernel send messages at once, and end the connection when nothing was heard for the time of [`silence`]: it then
/// probes the other side four times as often, to the second.
pub(super) fn watch(socket: &OwnedFd, deadline: Duration) -> Result<(), Error> {
    let silence = silence(deadline);
    let milliseconds = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    // The kernel takes times of 9 hours at most.
    let probes = Duration::from_secs((silence / 4).as_secs().clamp(1, 32_767));
    let set = || {
        set_tcp_nodelay(socket, true)?;
        set_tcp_keepidle(socket, probes)?;
        set_tcp_keepintvl(socket, probes)?;
        // Signed, for the kernel.
        set_tcp_user_timeout(socket, milliseconds.min(i32::MAX as u32))?;
        set_socket_keepalive(socket, true)
    };
    set().map_err(Error::system("watch a rank's connection"))
}

/// The detail of the loss of a rank whose connection ended. Between hosts it names the rank's `host`, and tells a host of which
/// nothing is heard from a process that ended.
pub(super) fn ended(is_silent: bool, host: Option<&str>, deadline: Duration) -> String {
    match (host, is_silent) {
        (None, _) => String::new(),
        (Some(host), false) => format!("{ENDED} (host {host})"),
        (Some(host), true) => {
            format!("nothing was heard from it for {:.1?} (host {host})", silence(deadline))
        }
    }
}
