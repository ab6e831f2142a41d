//! The netlink plumbing against a real kernel.

use netdev_providers::netlink::NetlinkError;
use netdev_providers::netlink::socket::{DUMP, Family, REQUEST, Socket};
use netdev_providers::netlink::wire::Message;

use crate::netns::NetNs;

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;

/// Dumps the links; `meanwhile` runs when the first has come, with the others still to come: the
/// kernel fills the next datagram when one is read.
fn links(socket: &mut Socket, mut meanwhile: impl FnMut()) -> (usize, Result<(), NetlinkError>) {
    let seq = socket.next_seq();
    let mut buf = Vec::new();
    let mut m = Message::new(&mut buf, RTM_GETLINK, REQUEST | DUMP, seq);
    m.raw(&[0; 16]);
    m.finish();
    let mut seen = 0;
    let result = socket.dump(&buf, seq, |m| {
        if m.ty == RTM_NEWLINK {
            if seen == 0 {
                meanwhile();
            }
            seen += 1;
        }
    });
    (seen, result)
}

#[test]
fn a_dump_that_a_change_interrupts_says_so_and_the_next_one_is_whole() {
    let ns = NetNs::new();
    // More than fit one datagram.
    ns.run("for i in $(seq 100); do echo link add v$i type veth peer name w$i; done | ip -batch -");
    let mut socket = Socket::open(Family::Route).expect("a socket");
    let (seen, result) = links(&mut socket, || {
        ns.run("ip link add late type veth peer name later");
    });
    assert!(matches!(result, Err(NetlinkError::Interrupted)), "{seen} links: {result:?}");
    let (seen, result) = links(&mut socket, || {});
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(seen, 203, "200, the two that came late, and lo");
}
