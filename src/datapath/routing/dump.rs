//! A dump of rules or routes as the kernel gives them, for what the codec of announced ones does not decode.

use std::io;

use netdev_providers::netlink::socket::{DUMP, REQUEST};
use netdev_providers::netlink::wire::{Message, Received};
use netdev_providers::netlink::{Family, NetlinkError, Socket};

/// `struct fib_rule_hdr` and `struct rtmsg`: the family comes first in both.
pub(super) const HEADER: usize = 12;

/// Asks for each of these, a request and an address family, in the network namespace of the calling thread.
///
/// # Errors
/// A failure of the exchange.
pub(super) fn dump(
    asked: &[(u16, libc::c_int)],
    mut each: impl FnMut(&Received<'_>),
) -> io::Result<()> {
    let mut socket = Socket::open(Family::Route).map_err(io::Error::other)?;
    for &(get, family) in asked {
        let (mut buf, seq) = (Vec::new(), socket.next_seq());
        let mut m = Message::new(&mut buf, get, REQUEST | DUMP, seq);
        let mut header = [0; HEADER];
        header[0] = u8::try_from(family).unwrap_or(0);
        m.raw(&header);
        m.finish();
        match socket.dump(&buf, seq, |m| each(&m)) {
            // What came meanwhile was announced. A kernel without policy routing has no rules.
            Ok(()) | Err(NetlinkError::Interrupted | NetlinkError::Kernel(_)) => {}
            Err(e) => return Err(io::Error::other(e)),
        }
    }
    Ok(())
}
