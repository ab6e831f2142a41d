//! Where the daemon is. Its port id is a known one, as long as nobody else has taken that: any local user can
//! ([`super::wire::PORT_ID`]). But a multicast group of `NETLINK_USERSOCK` takes nobody without
//! `CAP_NET_ADMIN` in the network namespace (no `NL_CFG_F_NONROOT_RECV` in `netlink_bind`), and the kernel shows
//! everybody who is in which: the daemon is in [`super::wire::DAEMON_GROUP`].
//!
//! Who is found there is privileged, which is not yet the daemon: each datagram's credentials say who it is from.

use nix::libc;

use super::wire::{DAEMON_GROUP, PORT_ID};

/// All netlink sockets of the network namespace of the calling thread.
const TABLE: &str = "/proc/thread-self/net/netlink";

/// The port ids of the sockets in the daemon's group; none where the kernel's table cannot be read.
pub(super) fn daemons() -> Vec<u32> {
    let is_member = |groups| groups & (1 << (DAEMON_GROUP - 1)) != 0;
    sockets(|port_id, groups| is_member(groups).then_some(port_id))
}

/// The port ids of all sockets of the protocol, the clients' too; none where the kernel's table cannot be read.
pub(super) fn all() -> Vec<u32> {
    sockets(|port_id, _| Some(port_id))
}

fn sockets(of: impl Fn(u32, u32) -> Option<u32>) -> Vec<u32> {
    let table = std::fs::read_to_string(TABLE).unwrap_or_default();
    table.lines().filter_map(socket).filter_map(|(port_id, groups)| of(port_id, groups)).collect()
}

/// A line of the table (`netlink_native_seq_show`): a pointer, the protocol, the port id, the first 32 groups as a
/// mask, and counters. Of our protocol: port id and groups.
fn socket(line: &str) -> Option<(u32, u32)> {
    let mut words = line.split_whitespace().skip(1);
    let protocol: libc::c_int = words.next()?.parse().ok()?;
    let port_id = words.next()?.parse().ok()?;
    let groups = u32::from_str_radix(words.next()?, 16).ok()?;
    (protocol == libc::NETLINK_USERSOCK).then_some((port_id, groups))
}

/// Where to ask for a daemon that is expected at this port id.
pub(super) fn find(expected: u32) -> u32 {
    // Another one was meant.
    if expected != PORT_ID {
        return expected;
    }
    choose(&daemons())
}

fn choose(daemons: &[u32]) -> u32 {
    match daemons {
        [other, ..] if !daemons.contains(&PORT_ID) => *other,
        _ => PORT_ID,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_the_daemons_group_is_read_from_the_kernels_table() {
        let line = |protocol: u32, port: u32, groups: u32| {
            format!("0000000001e540b6 {protocol:<3} {port:<10} {groups:08x} 0        0")
        };
        let ours = 1 << (DAEMON_GROUP - 1);
        assert_eq!(socket(&line(2, 4_294_963_199, ours)), Some((4_294_963_199, ours)));
        assert_eq!(socket(&line(2, 77, !ours)), Some((77, !ours)));
        assert_eq!(socket(&line(0, 77, ours)), None, "a group of rtnetlink");
        assert_eq!(socket("sk               Eth Pid        Groups   Rmem"), None);
        assert_eq!(socket(""), None);
    }

    #[test]
    fn a_daemon_is_asked_where_it_always_is_if_it_is_there() {
        assert_eq!(choose(&[]), PORT_ID, "nobody can be seen: whoever has it is asked");
        assert_eq!(choose(&[7]), 7);
        assert_eq!(choose(&[7, PORT_ID]), PORT_ID);
        assert_eq!(find(12), 12);
    }
}
