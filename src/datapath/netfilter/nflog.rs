//! The sights: what the ledger's rule logs, read from nfnetlink_log.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netdev_providers::netlink::error::KernelError;
use netdev_providers::netlink::netfilter::conntrack::{AF_INET, AF_INET6};
use netdev_providers::netlink::netfilter::nft::NFPROTO_BRIDGE;
use netdev_providers::netlink::netfilter::{NFGENMSG_LEN, SUBSYS_ULOG, msg_type, nfgenmsg};
use netdev_providers::netlink::socket::{ACK, REQUEST};
use netdev_providers::netlink::wire::{AttrIter, MessageIter, Received};
use netdev_providers::netlink::{Family, Message, NetlinkError, Socket};
use netdev_providers::{Direction, Ifindex, L4Proto, Tuple};
use nix::errno::Errno;
use tracing::debug;

use super::conntrack::{self, CtEntry};
use super::ledger::{Hook, TCP_RST};

// linux/netfilter/nfnetlink_log.h
const NFULNL_MSG_PACKET: u16 = 0;
const NFULNL_MSG_CONFIG: u16 = 1;
const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;
const NFULNL_CFG_F_SEQ: u16 = 1;
const NFULNL_CFG_F_CONNTRACK: u16 = 4;
// enum nfulnl_attr_config
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_TIMEOUT: u16 = 4;
const NFULA_CFG_QTHRESH: u16 = 5;
const NFULA_CFG_FLAGS: u16 = 6;
// enum nfulnl_attr_type
const NFULA_PACKET_HDR: u16 = 1;
const NFULA_MARK: u16 = 2;
const NFULA_IFINDEX_INDEV: u16 = 4;
const NFULA_IFINDEX_OUTDEV: u16 = 5;
const NFULA_IFINDEX_PHYSINDEV: u16 = 6;
const NFULA_IFINDEX_PHYSOUTDEV: u16 = 7;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_SEQ: u16 = 12;
const NFULA_HWHEADER: u16 = 16;
const NFULA_CT: u16 = 18;
const NFULA_CT_INFO: u16 = 19;
const NFULA_VLAN: u16 = 20;
const NFULA_L2HDR: u16 = 21;
// enum nfulnl_vlan_attr
const NFULA_VLAN_TCI: u16 = 2;
/// `IP_CT_IS_REPLY` (`linux/netfilter/nf_conntrack_common.h`): from here on a packet is a reply.
const IP_CT_IS_REPLY: u32 = 3;
/// `VLAN_VID_MASK` (`linux/if_vlan.h`).
const VLAN_VID_MASK: u16 = 0x0fff;

/// Bytes of the packet that are asked for: the rule's own `snaplen` is less.
const COPY_RANGE: u32 = 128;
/// Hundredths of a second that a message may wait for company (the rule's queue threshold of 1
/// sends it at once).
const FLUSH_AFTER: u32 = 1;
/// Datagrams that one read takes at most, so that it returns while logs keep coming.
const DATAGRAMS_PER_READ: usize = 256;
/// Room for bursts: a log of ours takes about 1 kB in the kernel's accounting.
const RCVBUF: usize = 32 * 1024 * 1024;

/// Why sights cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum NflogError {
    /// Another socket is bound to the group.
    #[error(
        "nflog group {group} is in use by another process (netlink port {port}): choose another group"
    )]
    GroupInUse {
        /// The group.
        group: u16,
        /// The netlink port id of its owner, often its process id.
        port: u32,
    },
    /// `CAP_NET_ADMIN` in the user namespace of the network namespace is needed.
    #[error("binding an nflog group needs CAP_NET_ADMIN")]
    NotPermitted,
    /// The kernel lacks nfnetlink_log.
    #[error("the kernel lacks nfnetlink_log (CONFIG_NETFILTER_NETLINK_LOG)")]
    Unsupported(#[source] KernelError),
    /// The exchange failed, or the kernel refused it.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// A packet of a connection seen in software on a netdev, as it is about to leave: after all NAT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Which hook.
    pub hook: Hook,
    /// The netdev it came in on: the one that routed it, or the port of the bridge.
    pub in_dev: Ifindex,
    /// The netdev it was routed to, or the port that the bridge sends it out of.
    pub out_dev: Option<Ifindex>,
    /// The VLAN tag that it has in the bridge.
    pub vlan: Option<u16>,
    /// The packet's mark.
    pub mark: u32,
    /// Its direction in the connection; `None` where the kernel does not give the connection.
    pub direction: Option<Direction>,
    /// The connection; `None` where the kernel does not give it
    /// ([`SightLog::has_conntrack`]): look [`leaving_tuple`](Self::leaving_tuple) up.
    pub ct: Option<CtEntry>,
    /// The Ethernet header that it arrived with. The kernel has taken a VLAN tag out of it. `None` where
    /// the egress netdev's own headers are shorter: the kernel copies as many bytes as those have. What
    /// this says of an ingress netdev without Ethernet headers is nothing.
    pub hw_header: Option<[u8; 14]>,
    /// The packet from its IP header on: 64 bytes.
    pub packet: Box<[u8]>,
}

impl Sight {
    /// The DSCP that the packet leaves with.
    #[must_use]
    pub fn dscp(&self) -> Option<u8> {
        let [first, second] = *self.packet.first_chunk()?;
        match first >> 4 {
            4 => Some(second >> 2),
            // The traffic class is the second half of the one and the first of the other.
            6 => Some((first << 4 | second >> 4) >> 2),
            _ => None,
        }
    }

    /// Addresses and ports that the packet leaves with, for
    /// [`Conntrack::find_leaving`](conntrack::Conntrack::find_leaving). `None` when it has
    /// IPv4 options, IPv6 extension headers, or another protocol than TCP and UDP: the rule does
    /// not log such packets.
    #[must_use]
    pub fn leaving_tuple(&self) -> Option<Tuple> {
        let b = &self.packet;
        let (proto, l4) = self.l4()?;
        let (src, dst): (IpAddr, IpAddr) = if b.first()? >> 4 == 4 {
            let src: [u8; 4] = *b.get(12..)?.first_chunk()?;
            let dst: [u8; 4] = *b.get(16..)?.first_chunk()?;
            (Ipv4Addr::from(src).into(), Ipv4Addr::from(dst).into())
        } else {
            let src: [u8; 16] = *b.get(8..)?.first_chunk()?;
            let dst: [u8; 16] = *b.get(24..)?.first_chunk()?;
            (Ipv6Addr::from(src).into(), Ipv6Addr::from(dst).into())
        };
        let [s0, s1, d0, d1] = *l4.first_chunk()?;
        Tuple::new(proto, src, u16::from_be_bytes([s0, s1]), dst, u16::from_be_bytes([d0, d1]))
    }

    /// Whether it has the RST flag of TCP. Of those only some are logged, and none for its path: see
    /// [`ledger`](super::ledger).
    #[must_use]
    pub fn is_reset(&self) -> bool {
        let flags =
            self.l4().filter(|(proto, _)| *proto == L4Proto::Tcp).and_then(|(_, l4)| l4.get(13));
        flags.is_some_and(|f| f & TCP_RST != 0)
    }

    /// The protocol, and the packet from its header on; see [`leaving_tuple`](Self::leaving_tuple).
    fn l4(&self) -> Option<(L4Proto, &[u8])> {
        let b = &self.packet;
        let (proto, l4) = match b.first()? {
            0x45 => (*b.get(9)?, b.get(20..)?),
            v if v >> 4 == 6 => (*b.get(6)?, b.get(40..)?),
            _ => return None,
        };
        Some((L4Proto::from_number(proto)?, l4))
    }
}

/// What one read brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogRead {
    /// The sights, in the order of their packets; none when the time ran out.
    pub sights: Vec<Sight>,
    /// Some log messages were lost (the receive buffer was full, or a gap in the sequence): the
    /// ledger's dump has what they said.
    pub lost: bool,
    /// Nothing was left to be read.
    pub emptied: bool,
}

/// A socket bound to the nflog group of the ledger.
#[derive(Debug)]
pub struct SightLog {
    socket: Socket,
    conntrack: bool,
    /// The sequence number that the next log message must have.
    expected: Option<u32>,
}

impl SightLog {
    /// Binds the group in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`NflogError::GroupInUse`], missing privilege, or a kernel without nfnetlink_log.
    pub fn open(group: u16) -> Result<Self, NflogError> {
        // Loads nf_conntrack_netlink, which gives log messages their connection; a kernel without
        // it refuses the flag below.
        if let Err(e) = conntrack::Conntrack::open() {
            debug!(error = %e, "ctnetlink");
        }
        let mut socket = Socket::open(Family::Netfilter)?;
        conntrack::grow_buffer(&socket, RCVBUF);
        // No NFULNL_CFG_CMD_PF_BIND: that chooses the default logger of a family, and a rule with a
        // group names its logger.
        configure(&mut socket, group, |m| {
            m.u8(NFULA_CFG_CMD, NFULNL_CFG_CMD_BIND);
        })
        .map_err(|e| match e.errno() {
            // Of another's group, and without the capability: both are EPERM.
            Some(Errno::EPERM) => match owner_of(group) {
                Some(port) => NflogError::GroupInUse { group, port },
                None => NflogError::NotPermitted,
            },
            Some(Errno::EBUSY) => {
                NflogError::GroupInUse { group, port: owner_of(group).unwrap_or(0) }
            }
            // The answer of nfnetlink when there is no such subsystem.
            Some(Errno::EINVAL | Errno::EOPNOTSUPP) => match e {
                NetlinkError::Kernel(k) => NflogError::Unsupported(k),
                other => other.into(),
            },
            _ => e.into(),
        })?;
        configure(&mut socket, group, |m| {
            let range = COPY_RANGE.to_be_bytes();
            let mode = [range[0], range[1], range[2], range[3], NFULNL_COPY_PACKET, 0];
            m.attr(NFULA_CFG_MODE, &mode)
                .be32(NFULA_CFG_TIMEOUT, FLUSH_AFTER)
                .be32(NFULA_CFG_QTHRESH, 1)
                .be16(NFULA_CFG_FLAGS, NFULNL_CFG_F_SEQ);
        })?;
        let with_conntrack = configure(&mut socket, group, |m| {
            m.be16(NFULA_CFG_FLAGS, NFULNL_CFG_F_SEQ | NFULNL_CFG_F_CONNTRACK);
        });
        let conntrack = match with_conntrack {
            Ok(()) => true,
            Err(e) if e.errno() == Some(Errno::EOPNOTSUPP) => {
                debug!("no CONFIG_NETFILTER_NETLINK_GLUE_CT: sights come without connection");
                false
            }
            Err(e) => return Err(e.into()),
        };
        Ok(Self { socket, conntrack, expected: None })
    }

    /// Whether log messages carry the connection: the kernel has
    /// `CONFIG_NETFILTER_NETLINK_GLUE_CT` and nf_conntrack_netlink.
    #[must_use]
    pub const fn has_conntrack(&self) -> bool {
        self.conntrack
    }

    /// Waits for sights, then takes all that are there, up to some hundreds.
    ///
    /// # Errors
    /// A failure of the socket. Lost messages are no error, but [`LogRead::lost`].
    pub fn next(&mut self, within: Duration) -> Result<LogRead, NflogError> {
        let mut read = LogRead::default();
        let expected = &mut self.expected;
        let drained = conntrack::drain(&mut self.socket, within, DATAGRAMS_PER_READ, |messages| {
            read_logs(messages, expected, &mut read.sights)
        })?;
        (read.lost, read.emptied) = (drained.lost, drained.emptied);
        Ok(read)
    }
}

impl AsFd for SightLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads one datagram; `true` when the sequence numbers tell of a loss before or in it, and when there is
/// a message of which nothing can be made.
fn read_logs(
    messages: MessageIter<'_>,
    expected: &mut Option<u32>,
    sights: &mut Vec<Sight>,
) -> bool {
    let mut lost = false;
    for m in messages.filter(|m| m.ty == msg_type(SUBSYS_ULOG, NFULNL_MSG_PACKET)) {
        if let Some(seq) = m.attrs(NFGENMSG_LEN).find_type(NFULA_SEQ).and_then(|a| a.be32()) {
            lost |= expected.is_some_and(|e| e != seq);
            *expected = Some(seq.wrapping_add(1));
        }
        let sight = parse_sight(&m);
        lost |= sight.is_none();
        sights.extend(sight);
    }
    lost
}

fn parse_sight(m: &Received<'_>) -> Option<Sight> {
    let attrs: AttrIter<'_> = m.attrs(NFGENMSG_LEN);
    let mut family = *m.payload.first()?;
    let hook = if family == NFPROTO_BRIDGE { Hook::Bridge } else { Hook::Inet };
    let (mut in_dev, mut in_port, mut out_port) = (None, None, None);
    let mut sight = Sight {
        hook,
        in_dev: Ifindex::new(1)?,
        out_dev: None,
        vlan: None,
        mark: 0,
        direction: None,
        ct: None,
        hw_header: None,
        packet: Box::default(),
    };
    for a in attrs {
        match a.ty {
            // The family of the connection is not the bridge's. (Comes before it.)
            NFULA_PACKET_HDR if hook == Hook::Bridge => {
                family = match a.payload.first_chunk()? {
                    [0x08, 0x00] => AF_INET,
                    [0x86, 0xdd] => AF_INET6,
                    _ => family,
                };
            }
            NFULA_IFINDEX_INDEV => in_dev = a.be32().and_then(Ifindex::new),
            NFULA_IFINDEX_OUTDEV => sight.out_dev = a.be32().and_then(Ifindex::new),
            NFULA_IFINDEX_PHYSINDEV => in_port = a.be32().and_then(Ifindex::new),
            NFULA_IFINDEX_PHYSOUTDEV => out_port = a.be32().and_then(Ifindex::new),
            NFULA_MARK => sight.mark = a.be32()?,
            NFULA_VLAN => {
                let tci = a.nested().find_type(NFULA_VLAN_TCI).and_then(|a| a.be16());
                sight.vlan = tci.map(|tci| tci & VLAN_VID_MASK);
            }
            NFULA_PAYLOAD => sight.packet = a.payload.into(),
            // What the packet arrived with, in the length of the egress netdev's headers (18 bytes of a
            // VLAN device): in postrouting `skb->dev` is that one.
            NFULA_HWHEADER if hook == Hook::Inet => {
                sight.hw_header = a.payload.first_chunk().copied();
            }
            // In a bridge the length of the other is that of the egress netdev's headers.
            NFULA_L2HDR if hook == Hook::Bridge => sight.hw_header = a.payload.try_into().ok(),
            NFULA_CT => sight.ct = CtEntry::parse(family, a.nested()),
            NFULA_CT_INFO => {
                let reply = a.be32()? >= IP_CT_IS_REPLY;
                sight.direction = Some(if reply { Direction::Reply } else { Direction::Original });
            }
            _ => {}
        }
    }
    if hook == Hook::Bridge {
        // The others are the bridge then; a kernel without CONFIG_BRIDGE_NETFILTER has the ports there.
        (in_dev, sight.out_dev) = (in_port.or(in_dev), out_port.or(sight.out_dev));
    }
    sight.in_dev = in_dev?;
    Some(sight)
}

fn configure(
    socket: &mut Socket,
    group: u16,
    fill: impl FnOnce(&mut Message<'_>),
) -> Result<(), NetlinkError> {
    let seq = socket.next_seq();
    let mut buf = Vec::with_capacity(64);
    let ty = msg_type(SUBSYS_ULOG, NFULNL_MSG_CONFIG);
    let mut m = Message::new(&mut buf, ty, REQUEST | ACK, seq);
    m.raw(&nfgenmsg(0, group));
    fill(&mut m);
    m.finish();
    socket.request(&buf, seq, |_| {})
}

/// The netlink port that is bound to a group: `group port queued mode range timeout users`.
fn owner_of(group: u16) -> Option<u32> {
    let table = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_log").ok()?;
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let found = words.next()?.parse() == Ok(group);
        words.next()?.parse().ok().filter(|_| found)
    })
}

#[cfg(test)]
mod tests {
    use netdev_providers::Zone;
    use proptest::prelude::*;

    use super::*;
    use crate::datapath::netfilter::conntrack::{CtId, TcpState};
    use crate::datapath::netfilter::unhex;

    /// A log of Debian's 6.1, which has GLUE_CT, of a masqueraded TCP connection, from the forward hook.
    const WITH_CT: &str = "\
        6c0100000004000000000000000000000200004d080001000800020005000a00000000000800040000000002 \
        08000500000000031000080000060000767a70a3939e000006000f000001000006001100000e000012001000 \
        7e0766c8aca2767a70a3939e0800000008000c0000000000bc0012803400018014000180080001000a000002 \
        080002000a0001021c000280050001000600000006000200c9f4000006000300959700003400028014000180 \
        080001000a000102080002000a0001011c0002800500010006000000060002009597000006000300c9f40000 \
        08000c00fbf7d789080003000000019e0800070000069780300004802c000180050001000300000005000200 \
        0700000005000300070000000600040023000000060005002300000008000800000000000800130000000000 \
        380009004500003432fb40003f06f3c50a0000020a000102c9f495972ca3d035126fef55801001f6152a0000 \
        0101080a68546a82b42dd098";
    /// A log of a 6.18 without it, of an IPv6 connection.
    const WITHOUT_CT: &str = "\
        c80000000004000000000000000000000a00004d0800010086dd020005000a00000000000800040000000003 \
        080005000000000210000800000600001a93ce73ba1a000006000f000001000006001100000e000012001000 \
        825dc0971eca1a93ce73ba1a86dd000014000300000000006b048f230000000000035f8508000c0000000006 \
        4400090060056c0c0020063ffd000001000000000000000000000002fd000000000000000000000000000002 \
        e06ab32df85a8e52e4ff042280100040fa2c00000101080a";

    /// A log of Debian's 6.12 in family bridge, without its connection.
    const OF_BRIDGE: &str = "\
        f00000000004000000000000000000000700004d080001000800020005000a000000000008000600 \
        00000004080004000000000208000700000000030800050000000002100008000006000052188b22 \
        07ba000006000f000001000006001100000e000012001000d24b5e1a762c52188b2207ba08000000 \
        14000300000000006b07633300000000000c8ebc08000b000000000008000e000000000008000c00 \
        0000000112001500d24b5e1a762c52188b2207ba080000003800090045000034b19740004006751c \
        0a0700020a07000113899aca9268f44fa078fa7880100201143700000101080a91b115bcab479762";

    fn read(bytes: &[u8], expected: &mut Option<u32>) -> (Vec<Sight>, bool) {
        let mut sights = Vec::new();
        let lost = read_logs(MessageIter::new(bytes), expected, &mut sights);
        (sights, lost)
    }

    #[test]
    fn a_log_that_does_not_say_where_the_packet_came_in_is_a_loss() {
        let mut bytes = unhex(WITH_CT);
        // NFULA_IFINDEX_INDEV becomes an attribute that nobody knows.
        let at = bytes.windows(4).position(|w| w == [8, 0, 4, 0]).unwrap();
        bytes[at + 2] = 0x7f;
        let (sights, lost) = read(&bytes, &mut None);
        assert!(sights.is_empty() && lost, "{sights:?}");
    }

    #[test]
    fn a_captured_log_with_its_connection_reads() {
        let (sights, lost) = read(&unhex(WITH_CT), &mut None);
        let [s] = &sights[..] else { panic!("{sights:?}") };
        assert!(!lost);
        assert_eq!((s.in_dev.get(), s.out_dev.map(Ifindex::get), s.mark), (2, Some(3), 0));
        assert_eq!(s.direction, Some(Direction::Original));
        let ct = s.ct.as_ref().unwrap();
        assert_eq!(ct.original, "tcp 10.0.0.2:51700 > 10.0.1.2:38295".parse().unwrap());
        assert_eq!(ct.reply, "tcp 10.0.1.2:38295 > 10.0.1.1:51700".parse().unwrap());
        assert_eq!((ct.id, ct.zone), (Some(CtId(0xfbf7d789)), Zone(0)));
        assert!(ct.status.assured() && ct.status.snat() && !ct.status.dnat() && !ct.helper);
        assert_eq!(ct.tcp_state, Some(TcpState::Established));
        // Source NAT was still to come there.
        assert_eq!(s.leaving_tuple(), Some(ct.original));
        assert_eq!(s.hw_header.unwrap()[12..], [8, 0]);
        assert_eq!(s.packet.len(), 52);
    }

    #[test]
    fn the_dscp_is_read_of_either_family() {
        let (sights, _) = read(&unhex(WITHOUT_CT), &mut None);
        let sight = |bytes: &[u8]| Sight { packet: bytes.into(), ..sights[0].clone() };
        // Of IPv4 the rest of the byte, of IPv6 what stands around the traffic class is something else.
        assert_eq!(sight(&[0x45, 46 << 2 | 3]).dscp(), Some(46));
        assert_eq!(sight(&[0x6b, 0x9f, 0xff]).dscp(), Some(46));
        assert_eq!(sight(&[0x45]).dscp(), None);
        assert_eq!(sight(&[0x05, 0]).dscp(), None);
    }

    #[test]
    fn a_captured_log_without_it_reads() {
        let (sights, _) = read(&unhex(WITHOUT_CT), &mut None);
        let [s] = &sights[..] else { panic!("{sights:?}") };
        assert_eq!((&s.ct, s.direction), (&None, None));
        assert!(s.leaving_tuple().unwrap().is_ipv6());
        assert_eq!(s.hw_header.unwrap()[12..], [0x86, 0xdd]);
        assert_eq!(s.packet.len(), 64);
    }

    #[test]
    fn a_captured_log_of_a_bridge_names_the_ports() {
        let (sights, _) = read(&unhex(OF_BRIDGE), &mut None);
        let [s] = &sights[..] else { panic!("{sights:?}") };
        assert_eq!((s.hook, s.vlan), (Hook::Bridge, None));
        // Ports 4 and 3; netdev 2 is the bridge.
        assert_eq!((s.in_dev.get(), s.out_dev.map(Ifindex::get)), (4, Some(3)));
        let header = s.hw_header.unwrap();
        assert_eq!(header[..6], [0xd2, 0x4b, 0x5e, 0x1a, 0x76, 0x2c]);
        assert_eq!(header[12..], [8, 0]);
        let tuple = "tcp 10.7.0.2:5001 > 10.7.0.1:39626".parse().unwrap();
        assert_eq!(s.leaving_tuple(), Some(tuple));
    }

    #[test]
    fn a_reset_is_told_by_its_flag() {
        // Where the header of L4 begins, whose byte 13 has the flags.
        for (text, l4) in [(WITH_CT, 20), (WITHOUT_CT, 40)] {
            let (mut sights, _) = read(&unhex(text), &mut None);
            let s = &mut sights[0];
            assert!(!s.is_reset());
            s.packet[l4 + 13] = 0x04 | 0x10;
            assert!(s.is_reset());
            s.packet = s.packet[..l4 + 13].into();
            assert!(!s.is_reset(), "cut before the flags");
        }
        let (mut sights, _) = read(&unhex(WITH_CT), &mut None);
        sights[0].packet[20 + 13] = 0x04;
        sights[0].packet[9] = 17;
        assert!(!sights[0].is_reset(), "UDP");
    }

    #[test]
    fn a_gap_in_the_sequence_is_a_loss() {
        let seq = |n: u32| {
            let mut bytes = Vec::new();
            let mut m = Message::new(&mut bytes, msg_type(SUBSYS_ULOG, NFULNL_MSG_PACKET), 0, 0);
            m.raw(&nfgenmsg(2, 1)).be32(NFULA_SEQ, n).be32(NFULA_IFINDEX_INDEV, 3);
            m.finish();
            bytes
        };
        let mut expected = None;
        // The first one seen may have any number: a group can be older than its reader's interest.
        assert!(!read(&seq(5), &mut expected).1);
        assert!(!read(&seq(6), &mut expected).1);
        assert!(read(&seq(8), &mut expected).1);
        assert!(!read(&[seq(9), seq(10)].concat(), &mut expected).1);
        expected = Some(u32::MAX);
        assert!(!read(&[seq(u32::MAX), seq(0)].concat(), &mut expected).1);
        // Without a sequence number nothing is concluded.
        assert!(!read(&unhex(&WITH_CT[..0]), &mut expected).1);
    }

    /// A log with these attributes behind its packet header, which says this ethertype.
    fn log(family: u8, ethertype: [u8; 2], fill: impl FnOnce(&mut Message<'_>)) -> Sight {
        let mut bytes = Vec::new();
        let mut m = Message::new(&mut bytes, msg_type(SUBSYS_ULOG, NFULNL_MSG_PACKET), 0, 0);
        m.raw(&nfgenmsg(family, 1));
        m.attr(NFULA_PACKET_HDR, &[ethertype[0], ethertype[1], 2, 0]);
        m.be32(NFULA_IFINDEX_INDEV, 3).be32(NFULA_IFINDEX_OUTDEV, 4);
        fill(&mut m);
        m.finish();
        read(&bytes, &mut None).0.remove(0)
    }

    const IPV4: [u8; 2] = [0x08, 0x00];
    const IPV6: [u8; 2] = [0x86, 0xdd];

    #[test]
    fn a_log_says_all_of_its_packet() {
        let header = *b"receivsender08+vid";
        let fill = |m: &mut Message<'_>| {
            // Priority 5, VLAN 100; the protocol stands before.
            m.nested(NFULA_VLAN, |m| _ = m.be16(1, 0x8100).be16(NFULA_VLAN_TCI, 5 << 13 | 100));
            m.be32(NFULA_MARK, 0x0102_0304).attr(NFULA_PAYLOAD, &[9; 5]);
            m.be32(NFULA_IFINDEX_PHYSINDEV, 5).be32(NFULA_IFINDEX_PHYSOUTDEV, 6);
            m.attr(NFULA_HWHEADER, &header).attr(NFULA_L2HDR, &[7; 14]);
        };
        let stack = log(AF_INET, IPV4, fill);
        assert_eq!((stack.hook, stack.vlan, stack.mark), (Hook::Inet, Some(100), 0x0102_0304));
        assert_eq!(&*stack.packet, [9; 5]);
        // The netdevs that route; the header in the length of those of the egress.
        assert_eq!((stack.in_dev.get(), stack.out_dev.map(Ifindex::get)), (3, Some(4)));
        assert_eq!(stack.hw_header, header.first_chunk().copied());

        // The ports, and the frame's own header.
        let bridge = log(NFPROTO_BRIDGE, IPV4, fill);
        assert_eq!((bridge.hook, bridge.vlan), (Hook::Bridge, Some(100)));
        assert_eq!((bridge.in_dev.get(), bridge.out_dev.map(Ifindex::get)), (5, Some(6)));
        assert_eq!(bridge.hw_header, Some([7; 14]));

        // A kernel without br_netfilter has the ports in the place of the bridge. What is told of the
        // egress netdev's headers is not the frame's.
        let bare = log(NFPROTO_BRIDGE, IPV4, |m| _ = m.attr(NFULA_HWHEADER, &header));
        assert_eq!((bare.in_dev.get(), bare.out_dev.map(Ifindex::get)), (3, Some(4)));
        assert_eq!((bare.vlan, bare.hw_header, bare.mark), (None, None, 0));
    }

    #[test]
    fn from_the_third_state_on_a_packet_is_a_reply() {
        let direction = |info| log(AF_INET, IPV4, |m| _ = m.be32(NFULA_CT_INFO, info)).direction;
        // Established, related, new; the same of replies.
        assert_eq!([0, 1, 2].map(direction), [Some(Direction::Original); 3]);
        assert_eq!([3, 4, 5].map(direction), [Some(Direction::Reply); 3]);
        assert_eq!(log(AF_INET, IPV4, |_| {}).direction, None);
    }

    /// The connection is of the family of the message; of a bridge's, of that of the frame.
    #[test]
    fn a_frame_says_of_which_family_its_connection_is() {
        let connection = |family, ethertype, tuple: &str| {
            let original: Tuple = tuple.parse().unwrap();
            let mut entry = Vec::new();
            let mut m = netdev_providers::netlink::netfilter::conntrack::about(
                &mut entry,
                0,
                0,
                0,
                Zone(0),
                &original,
            );
            m.be32(3, 0);
            m.finish();
            // The reply is the original once more, under its own number.
            let mut told = entry[20..].to_vec();
            let len = usize::from(u16::from_ne_bytes([told[0], told[1]]));
            let mut reply = told[..len].to_vec();
            reply[2] = 2;
            told.extend_from_slice(&reply);
            let sight = log(family, ethertype, |m| _ = m.attr(NFULA_CT, &told));
            sight.ct.map(|ct| ct.original == original)
        };
        let (v4, v6) = ("udp 10.0.0.1:1 > 10.0.0.2:2", "udp [::1]:1 > [::2]:2");
        assert_eq!(connection(NFPROTO_BRIDGE, IPV4, v4), Some(true));
        assert_eq!(connection(NFPROTO_BRIDGE, IPV6, v6), Some(true));
        assert_eq!(connection(NFPROTO_BRIDGE, IPV4, v6), None);
        assert_eq!(connection(AF_INET, IPV6, v4), Some(true), "whatever the header says");
        assert_eq!(connection(AF_INET6, IPV4, v6), Some(true));
    }

    #[test]
    fn only_a_packet_with_a_plain_header_has_a_tuple() {
        let with = |change: &dyn Fn(&mut [u8])| {
            let mut sight = read(&unhex(WITH_CT), &mut None).0.remove(0);
            change(&mut sight.packet);
            sight.leaving_tuple()
        };
        assert!(with(&|_| {}).is_some());
        // TCP, were it an IPv6 header.
        assert_eq!(with(&|p| (p[0], p[6]) = (0x46, 6)), None, "with options");
        assert_eq!(with(&|p| (p[0], p[6]) = (0x55, 6)), None, "of no IP version");
        assert_eq!(with(&|p| p[9] = 1), None, "ICMP");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(b in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&b, &mut None);
            let packet = Sight { packet: b.into(), ..read(&unhex(WITH_CT), &mut None).0.remove(0) };
            let _ = packet.leaving_tuple();
        }

        #[test]
        fn no_damage_to_a_real_log_makes_the_reader_panic(at: usize, with: u8, cut: usize) {
            for hex in [WITH_CT, WITHOUT_CT, OF_BRIDGE] {
                let mut bytes = unhex(hex);
                let len = bytes.len();
                bytes[at % len] = with;
                for s in read(&bytes[..cut % (len + 1)], &mut None).0 {
                    let _ = s.leaving_tuple();
                }
            }
        }
    }
}
