//! Why a socket has no zero copy, or its zero-copy sends are copied, or cut into small pieces: looked for where operators
//! would look, and said in their words.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};

use super::within_host::{self, address, ends};
use crate::sys::{errqueue, link};

/// Asks for zero copy; if it cannot be had, says why.
pub(super) fn request_zero_copy(
    fd: BorrowedFd<'_>,
    family: libc::c_int,
) -> Option<Cow<'static, str>> {
    match family {
        libc::AF_UNIX => Some("AF_UNIX sockets cannot send from user pages".into()),
        // Linux 6.7 to 7.0 report memory released while later parts of the same send still use it.
        libc::AF_VSOCK => Some("vsock sockets of some kernels release memory too early".into()),
        _ => match errqueue::allow_zero_copy(fd) {
            Ok(()) => None,
            Err(error) => Some(format!("the kernel refused SO_ZEROCOPY: {error}").into()),
        },
    }
}

/// What keeps zero copy from working on `socket`. `refused`: the kernel would not pin memory.
pub(super) fn trouble(socket: BorrowedFd<'_>, refused: bool, all_copied: bool) -> Option<String> {
    if refused {
        return Some(
            "the kernel refused to pin memory, so sends are smaller or copied: raise the memlock limit \
             (LimitMEMLOCK=, ulimit -l) or net.core.optmem_max"
                .to_owned(),
        );
    }
    all_copied.then(|| {
        why_copied(socket).unwrap_or_else(|| {
            "the kernel copied every zero-copy send, for a reason that it does not tell".to_owned()
        })
    })
}

/// Bytes that the queue of a connection out of this host may seem to have, if it sends registered memory in huge
/// pages; the kernel doubles the number. It charges each fragment with all that lies before it in its huge page (as
/// of Linux 6.18 `io_sg_from_iter` in io_uring/net.c, where compound pages are still to be done): 1 MiB on average for
/// 60 KiB, so that a queue of usual length is full with four of them, and every acknowledgement makes room for one.
/// This is room for some 7 MiB.
const QUEUE_OF_HUGE_PAGES_BYTES: usize = 64 << 20;

/// Has room for sends of registered huge pages in the queue of a connection that leaves this host: all of it for who
/// may administer the network, or as much as `net.core.wmem_max` allows.
pub(super) fn make_room_for_huge_pages(socket: BorrowedFd<'_>) -> io::Result<()> {
    let bytes = QUEUE_OF_HUGE_PAGES_BYTES;
    if within_host::is(socket) || setsockopt(&socket, SndBufForce, &bytes).is_ok() {
        return Ok(());
    }
    // What is set is not adapted any more: it must not be less than what the kernel would come to by itself.
    match (allowed(bytes), usual_queue_max()) {
        (Some(allowed), Some(usual)) if allowed > usual => Ok(setsockopt(&socket, SndBuf, &bytes)?),
        _ => Ok(()),
    }
}

/// Length of the queue that comes of asking for `bytes`.
fn allowed(bytes: usize) -> Option<usize> {
    let most = fs::read_to_string("/proc/sys/net/core/wmem_max").ok()?;
    Some(2 * bytes.min(most.trim().parse().ok()?))
}

/// The longest queue that TCP gives a socket by itself.
fn usual_queue_max() -> Option<usize> {
    let sizes = fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").ok()?;
    sizes.split_whitespace().nth(2)?.parse().ok()
}

fn why_copied(socket: BorrowedFd<'_>) -> Option<String> {
    let (near, far) = ends(socket)?;
    if within_host::joins(near, far) {
        return Some("loopback: the receiver is on this host, and the kernel copies".to_owned());
    }
    let interface = getifaddrs()
        .ok()?
        .find(|found| found.address.as_ref().and_then(address) == Some(near))?
        .interface_name;
    if link::scatter_gather(socket, &interface).is_ok_and(|has| !has) {
        return Some(format!(
            "{interface} sends without scatter-gather (ethtool -K {interface} sg on)"
        ));
    }
    let packets = fs::read_to_string("/proc/net/packet").unwrap_or_default();
    if captures(&packets, if_nametoindex(interface.as_str()).ok()) {
        return Some(format!("packets on {interface} are being captured"));
    }
    // Devices of hardware link to a bus; veth, bridges and tunnels do not.
    let path = fs::canonicalize(format!("/sys/class/net/{interface}")).ok()?;
    path.starts_with("/sys/devices/virtual").then(|| {
        format!("{interface} is virtual (veth, bridge or tunnel), where the kernel copies")
    })
}

/// Whether a line of `/proc/net/packet` is a packet socket on this interface, or on all (0).
fn captures(packets: &str, interface: Option<u32>) -> bool {
    packets.lines().skip(1).any(|line| {
        // sk RefCnt Type Proto Iface R Rmem User Inode
        let fields: Vec<_> = line.split_whitespace().collect();
        let bound = fields.get(4).and_then(|field| field.parse::<u32>().ok());
        // Protocol 0 receives nothing.
        let listens = fields.get(3).is_some_and(|proto| *proto != "0000");
        listens && bound.is_some_and(|bound| bound == 0 || Some(bound) == interface)
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::channel::suite::{tcp_pair, unix_pair};

    #[test]
    fn loopback_is_named_and_so_is_a_refusal_to_pin() {
        let (near, _far) = tcp_pair("127.0.0.1");
        let why = |refused, copied| trouble(near.as_fd(), refused, copied);
        assert_eq!(why(false, false), None);
        assert!(why(false, true).unwrap().contains("loopback"));
        assert!(why(true, true).unwrap().contains("memlock"));
        let (near, _far) = tcp_pair("::1");
        assert!(
            trouble(near.as_fd(), false, true)
                .unwrap()
                .contains("loopback")
        );
        let (near, _far) = unix_pair();
        assert!(trouble(near.as_fd(), false, true).is_some());
    }

    #[test]
    fn a_packet_socket_counts_on_its_interface_or_on_all() {
        let head = "sk RefCnt Type Proto Iface R Rmem User Inode\n";
        let on = |iface, proto| format!("{head}00 3 3 {proto} {iface} 1 0 0 1\n");
        assert!(captures(&on(2, "0003"), Some(2)));
        assert!(captures(&on(0, "0003"), Some(2)));
        assert!(!captures(&on(3, "0003"), Some(2)));
        assert!(!captures(&on(2, "0000"), Some(2)));
        assert!(!captures(head, Some(2)));
    }
}
