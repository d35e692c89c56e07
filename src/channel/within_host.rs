//! Connections that do not leave this host: which they are, and what is fast there.
//!
//! There is no line to be filled or shared. What bounds them is how often memory is read and written, so what
//! counts is that it is still in the caches when the other end takes it.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread::available_parallelism;

use nix::sys::socket::sockopt::{SndBuf, TcpCongestion};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname, setsockopt};

/// Bytes that a sender within this host queues before it waits; the kernel doubles the number. What was just
/// written is still in the caches then when it is read: with the megabytes that the kernel would let it queue, a
/// loop over loopback takes up to a half longer, on both sides. No shorter either: with half of it a single stream
/// waits for its other end so often that it takes a third longer, and with 32 KiB only one segment of
/// loopback's 64 KiB fits, and each waits for a delayed acknowledgement (40 ms).
const QUEUE_BYTES: usize = 256 << 10;

/// The congestion control of a connection within this host. Every kernel has this one, and anybody may choose it.
/// BBR, the default of some, measures what there is as if it were a line, and sends on a timer: with packets of
/// 512 KiB to cold memory the sender took 0.6 s/GiB, and takes 0.4.
const CONGESTION_CONTROL: &str = "reno";

/// Streams that are of use where CPUs are few: while one waits for its other end, another has its CPU.
const STREAMS: usize = 4;

/// Prepares a TCP socket for a connection to `to`, before it is made: the kernel goes on sending by a timer where
/// the first congestion control did, whatever comes after it.
pub fn prepare(socket: BorrowedFd<'_>, to: SocketAddr) {
    if leads_here(to) {
        // Where a sandbox forbids it, a transfer is only slower.
        let _ = setsockopt(&socket, TcpCongestion, &OsString::from(CONGESTION_CONTROL));
    }
}

/// Whether a connection to this address stays within this host: we would be there ourselves.
fn leads_here(to: SocketAddr) -> bool {
    // Connecting a socket of datagrams sends nothing; it is given the address from which it would.
    let near = || {
        let anywhere: IpAddr = match to {
            SocketAddr::V4(_) => [0; 4].into(),
            SocketAddr::V6(_) => [0_u16; 8].into(),
        };
        let socket = UdpSocket::bind((anywhere, 0))?;
        socket.connect(to)?;
        socket.local_addr()
    };
    to.ip().is_loopback() || near().is_ok_and(|near| joins(near.ip(), to.ip()))
}

/// Keeps the queue of a connection short that does not leave this host, and says whether it is one. Others need
/// what is on the line.
pub fn keep_queue_short(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let within_host = is(socket);
    if within_host {
        setsockopt(&socket, SndBuf, &QUEUE_BYTES)?;
    }
    Ok(within_host)
}

/// How many streams of a transfer make it faster: more of them take each other's turns, and what one has left in
/// the caches is gone when it comes back. With 32 on two CPUs the sender took 0.12 s/GiB more than with 2.
#[must_use]
pub fn useful_streams() -> usize {
    available_parallelism().map_or(STREAMS, |cpus| cpus.get().max(STREAMS))
}

/// Whether a TCP connection is known not to leave this host.
pub(super) fn is(socket: BorrowedFd<'_>) -> bool {
    ends(socket).is_some_and(|(near, far)| joins(near, far))
}

/// Whether both ends of a connection are on this host.
pub(super) fn joins(near: IpAddr, far: IpAddr) -> bool {
    near.is_loopback() || far.is_loopback() || near == far
}

/// The addresses of a TCP connection: ours and the other one.
pub(super) fn ends(socket: BorrowedFd<'_>) -> Option<(IpAddr, IpAddr)> {
    let near = address(&getsockname(socket.as_raw_fd()).ok()?)?;
    let far = address(&getpeername(socket.as_raw_fd()).ok()?)?;
    Some((near, far))
}

/// The address of one end.
pub(super) fn address(found: &SockaddrStorage) -> Option<IpAddr> {
    if let Some(v4) = found.as_sockaddr_in() {
        return Some(v4.ip().into());
    }
    let v6 = found.as_sockaddr_in6()?.ip();
    Some(v6.to_ipv4_mapped().map_or_else(|| v6.into(), IpAddr::from))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::getsockopt;

    use super::*;

    #[tokio::test]
    async fn an_own_address_is_within_this_host_and_has_its_ways() {
        for (to, here) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("192.0.2.1:1", false), // set aside for documentation (RFC 5737)
        ] {
            assert_eq!(leads_here(to.parse().unwrap()), here, "{to}");
        }
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        prepare(socket.as_fd(), to);
        let connected = socket.connect(to).await.unwrap();
        let chosen = getsockopt(&connected, TcpCongestion).unwrap();
        assert!(chosen.to_string_lossy().starts_with(CONGESTION_CONTROL));
        assert!(keep_queue_short(connected.as_fd()).unwrap());
        assert_eq!(getsockopt(&connected, SndBuf).unwrap(), 2 * QUEUE_BYTES);
    }
}
