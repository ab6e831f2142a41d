//! The tc-flower provider on a real kernel: a router between a client and a server, each in a network
//! namespace of its own, and packets made byte by byte, so that nothing but the rules can have done
//! what is seen.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test: clippy spares the test functions, but not what they call"
)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::{NonZeroU32, NonZeroUsize};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use netdev_providers::tc_flower::{TcFlowerClass, TcFlowerConfig};
use netdev_providers::{
    Above, BindError, Cookie, Direction, Done, Epoch, Flow, FlowMatch, Forward, HwFlags, Ifindex,
    Instance, L4Proto, MacAddr, MacRewrite, Netdev, Outcome, Provider, ProviderClass, Reason,
    Request, RuleId, RuleReport, Tuple, Zone,
};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{setsockopt, sockopt};

use crate::host::Host;
use crate::netns::NetNs;
use crate::shown::as_shown;
use crate::submit::{ifindex, netdev, submit};

mod slow_path;
mod tagged;

const LAN: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 1, 2]);
const WAN: MacAddr = MacAddr([2, 0, 0, 0, 2, 1]);
const SERVER: MacAddr = MacAddr([2, 0, 0, 0, 2, 2]);

// --- A network ------------------------------------------------------------------------------------

/// `client c0 --- lan0 [router: the test's thread] wan0 --- s0 server`
struct Net {
    client: Host,
    server: Host,
    ns: NetNs,
}

impl Net {
    fn new() -> Self {
        let ns = NetNs::new();
        let (client, server) = (Host::new(), Host::new());
        ns.run(&format!(
            "ip link add lan0 address {LAN} type veth peer name c0 address {CLIENT} netns {}
             ip link add wan0 address {WAN} type veth peer name s0 address {SERVER} netns {}
             sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
             ip addr add 10.0.1.1/24 dev lan0; ip addr add fd01::1/64 dev lan0 nodad
             ip addr add 10.0.2.1/24 dev wan0; ip addr add fd02::1/64 dev wan0 nodad
             ip link set lan0 up; ip link set wan0 up",
            client.tid, server.tid
        ));
        for (host, dev, net) in [(&client, "c0", 1), (&server, "s0", 2)] {
            host.sh(&format!(
                "ip link set lo up; ip link set {dev} up
                 ip addr add 10.0.{net}.2/24 dev {dev}
                 ip addr add fd0{net}::2/64 dev {dev} nodad
                 ip route add default via 10.0.{net}.1
                 ip -6 route add default via fd0{net}::1"
            ));
        }
        Self { client, server, ns }
    }

    /// A provider on one of the router's netdevs.
    fn bind(&self, name: &str) -> Port {
        self.try_bind(name, HwFlags::Both, 1).unwrap()
    }

    fn try_bind(&self, name: &str, hw_flags: HwFlags, instance: u32) -> Result<Port, BindError> {
        let netdev = netdev(name, hw_flags);
        // Several writers, whatever the machine has.
        let config = TcFlowerConfig { writers: NonZeroUsize::new(3), ..Default::default() };
        let class = TcFlowerClass::new(config);
        let provider = class.bind(&netdev, self::instance(instance))?;
        Ok(Port { provider, instance: self::instance(instance) })
    }

    fn filters(&self, name: &str) -> String {
        self.ns.run(&format!("tc -d -s filter show dev {name} ingress"))
    }
}

fn instance(n: u32) -> Instance {
    Instance(NonZeroU32::new(n).unwrap())
}

/// A bound provider, called as the engine calls it.
struct Port {
    provider: Arc<dyn Provider>,
    instance: Instance,
}

impl Port {
    fn cookie(&self, epoch: u64) -> Cookie {
        Cookie { instance: self.instance, epoch: Epoch(epoch), direction: Direction::Original }
    }

    fn submit(&self, requests: Vec<Request>) -> Vec<Outcome> {
        submit(&*self.provider, requests)
    }

    fn try_add(&self, epoch: u64, flow: Flow) -> Outcome {
        let request = Request::Add { cookie: self.cookie(epoch), flow: Box::new(flow) };
        self.submit(vec![request]).remove(0)
    }

    fn add(&self, epoch: u64, flow: Flow) -> RuleId {
        match self.try_add(epoch, flow) {
            Ok(Done::Added { rule, .. }) => rule,
            other => panic!("{other:?}"),
        }
    }

    fn delete(&self, epoch: u64, rule: RuleId) -> Outcome {
        self.submit(vec![Request::Delete { rule, cookie: self.cookie(epoch) }]).remove(0)
    }

    fn usage(&self) -> Vec<RuleReport> {
        let mut reports = Vec::new();
        self.provider.usage(&mut |r| reports.push(r)).unwrap();
        reports
    }

    /// Packets that the rule of this epoch has carried.
    fn packets(&self, epoch: u64) -> u64 {
        let cookie = self.cookie(epoch);
        self.usage().iter().find(|r| r.cookie == cookie).expect("a rule").counters.packets
    }
}

fn tuple(text: &str) -> Tuple {
    text.parse().unwrap()
}

/// From the client to the server, on lan0, routed to wan0.
fn flow(arrival: Tuple, departure: Tuple) -> Flow {
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(LAN), vlan: None, tuple: arrival },
        forward: Forward {
            egress: ifindex("wan0"),
            vlan: None,
            mtu: 1500,
            tuple: departure,
            macs: Some(MacRewrite { src: WAN, dst: SERVER }),
        },
        above: Above::default(),
    }
}

const TCP4: &str = "tcp 10.0.1.2:4000 > 10.0.2.2:80";
const UDP4: &str = "udp 10.0.1.2:4000 > 10.0.2.2:53";
const TCP6: &str = "tcp [fd01::2]:4000 > [fd02::2]:80";
const UDP6: &str = "udp [fd01::2]:4000 > [fd02::2]:53";

// --- Packets --------------------------------------------------------------------------------------

/// A raw socket on one netdev of the calling thread's namespace.
pub(crate) struct Wire(OwnedFd);

const SOL_PACKET: i32 = 263;
const PACKET_AUXDATA: i32 = 8;
const PACKET_VNET_HDR: i32 = 15;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;

impl Wire {
    pub(crate) fn open(name: &str, vnet_hdr: bool) -> Self {
        let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
        // SAFETY: a system call without pointers; the descriptor is new and nobody else's.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol);
            assert!(fd >= 0, "AF_PACKET");
            OwnedFd::from_raw_fd(fd)
        };
        let int = |level, option, value: i32| {
            // SAFETY: `value` is an int, and lives through the call.
            let r = unsafe {
                libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), 4)
            };
            assert_eq!(r, 0, "setsockopt");
        };
        int(SOL_PACKET, PACKET_AUXDATA, 1);
        setsockopt(&fd, sockopt::RcvBufForce, &(16 << 20)).unwrap();
        if vnet_hdr {
            int(SOL_PACKET, PACKET_VNET_HDR, 1);
        }
        // SAFETY: all zeros is a valid sockaddr_ll, and the length given is its size.
        unsafe {
            let mut at: libc::sockaddr_ll = std::mem::zeroed();
            at.sll_family = libc::AF_PACKET as u16;
            at.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            at.sll_ifindex = i32::try_from(if_nametoindex(name).unwrap()).unwrap();
            let len = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd.as_raw_fd(), (&raw const at).cast(), len), 0, "bind");
        }
        Self(fd)
    }

    fn send(&self, bytes: &[u8]) {
        let n = nix::unistd::write(&self.0, bytes).unwrap();
        assert_eq!(n, bytes.len());
    }

    /// The next frame, with the VLAN tag that the kernel has taken out of it put back.
    fn receive_one(&self, buf: &mut [u8]) -> nix::Result<Vec<u8>> {
        // struct cmsghdr and struct tpacket_auxdata: status, two lengths, two offsets, TCI, TPID.
        let mut control = [0u64; 8];
        let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: all zeros is a valid msghdr; what it is then pointed to (one iovec over `buf`, and
        // `control`) outlives the call. Of the control messages only the header that
        // `CMSG_FIRSTHDR` finds within `control`, and the 20 bytes behind it, are read.
        let (n, aux) = unsafe {
            let mut msg: libc::msghdr = std::mem::zeroed();
            msg.msg_iov = &raw mut iov;
            msg.msg_iovlen = 1;
            msg.msg_control = control.as_mut_ptr().cast();
            msg.msg_controllen = size_of_val(&control);
            let n = libc::recvmsg(self.0.as_raw_fd(), &raw mut msg, libc::MSG_DONTWAIT);
            let n = nix::errno::Errno::result(n)?;
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            let aux = (!header.is_null() && (*header).cmsg_level == SOL_PACKET)
                .then(|| libc::CMSG_DATA(header).cast::<[u8; 20]>().read_unaligned());
            (n as usize, aux)
        };
        let mut frame = buf[..n].to_vec();
        if let Some(aux) = aux
            && u32::from_ne_bytes([aux[0], aux[1], aux[2], aux[3]]) & TP_STATUS_VLAN_VALID != 0
        {
            let half = |at: usize| u16::from_ne_bytes([aux[at], aux[at + 1]]).to_be_bytes();
            frame.splice(12..12, [half(18), half(16)].concat());
        }
        Ok(frame)
    }

    /// Frames that arrive until `within` has passed without one that `want` wants, at most `max`.
    pub(crate) fn receive(
        &self,
        max: usize,
        within: Duration,
        want: impl Fn(&[u8]) -> bool,
    ) -> Vec<Vec<u8>> {
        let mut got = Vec::new();
        let mut until = Instant::now() + within;
        let mut buf = vec![0; 70_000];
        while got.len() < max && Instant::now() < until {
            match self.receive_one(&mut buf) {
                Ok(frame) => {
                    if want(&frame) {
                        got.push(frame);
                        until = Instant::now() + within;
                    }
                }
                Err(nix::errno::Errno::EAGAIN) => std::thread::sleep(Duration::from_millis(2)),
                Err(e) => panic!("recv: {e}"),
            }
        }
        got
    }
}

/// The one's-complement sum of RFC 1071, not complemented.
fn sum(start: u32, bytes: &[u8]) -> u16 {
    let mut s = u64::from(start);
    for pair in bytes.chunks(2) {
        s += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while s > 0xffff {
        s = (s & 0xffff) + (s >> 16);
    }
    s as u16
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn pseudo_header(src: &[u8], dst: &[u8], proto: u8, len: usize) -> u32 {
    let addresses = sum(0, &[src, dst].concat());
    u32::from(addresses) + u32::from(proto) + u32::try_from(len).unwrap()
}

/// How a packet that is sent looks, beyond its tuple.
#[derive(Clone, Debug)]
struct Packet {
    tuple: Tuple,
    ttl: u8,
    tcp_flags: u8,
    /// IPv4 options, a multiple of 4 bytes.
    options: Vec<u8>,
    /// IPv6 extension headers: the type of the first, and all their bytes (whose last next-header
    /// field is to be filled in by the caller).
    extension: Option<(u8, Vec<u8>)>,
    /// The fragment field of IPv4: flags and offset.
    fragment: u16,
    payload: Vec<u8>,
    /// UDP without a checksum.
    no_checksum: bool,
    eth_dst: MacAddr,
    /// VLAN tags, the outermost first: ethertype and TCI.
    tags: Vec<(u16, u16)>,
}

impl Packet {
    fn new(tuple: Tuple) -> Self {
        Self {
            tuple,
            ttl: 64,
            tcp_flags: 0x18, // PSH, ACK
            options: Vec::new(),
            extension: None,
            fragment: 0,
            payload: (0..101).collect(),
            no_checksum: false,
            eth_dst: LAN,
            tags: Vec::new(),
        }
    }

    /// With a hop-by-hop (0), routing (43) or destination (60) header of 8 bytes with padding, or a
    /// fragment header (44) that says "whole packet".
    fn with_extension(self, kind: u8) -> Self {
        let next = self.tuple.proto().number();
        let bytes = match kind {
            44 => vec![next, 0, 0, 0, 0, 0, 0, 9],
            43 => vec![next, 0, 0, 0, 0, 0, 0, 0],
            _ => vec![next, 0, 1, 4, 0, 0, 0, 0],
        };
        Self { extension: Some((kind, bytes)), ..self }
    }

    /// Where the IP header begins.
    fn l3_at(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    fn l3_len(&self) -> usize {
        let extension = self.extension.as_ref().map_or(0, |(_, b)| b.len());
        if self.tuple.is_ipv6() { 40 + extension } else { 20 + self.options.len() }
    }

    fn l4_header_len(&self) -> usize {
        match self.tuple.proto() {
            L4Proto::Tcp => 20,
            L4Proto::Udp => 8,
        }
    }

    /// Offset of the checksum within the L4 header.
    fn check_at(&self) -> usize {
        match self.tuple.proto() {
            L4Proto::Tcp => 16,
            L4Proto::Udp => 6,
        }
    }

    /// The frame; `partial`: with the pseudo-header sum where the L4 checksum belongs.
    fn frame(&self, partial: bool) -> Vec<u8> {
        let t = &self.tuple;
        let mut l4 = [t.sport().to_be_bytes(), t.dport().to_be_bytes()].concat();
        let len = self.l4_header_len() + self.payload.len();
        match t.proto() {
            L4Proto::Tcp => {
                l4.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, self.tcp_flags, 0xff, 0, 0, 0, 0, 0]);
            }
            L4Proto::Udp => {
                l4.extend(u16::try_from(len).unwrap().to_be_bytes());
                l4.extend([0, 0]);
            }
        }
        l4.extend(&self.payload);
        let (src, dst) = (octets(t.src()), octets(t.dst()));
        let pseudo = pseudo_header(&src, &dst, t.proto().number(), len);
        let check = if partial {
            sum(pseudo, &[])
        } else if self.no_checksum {
            0
        } else {
            match !sum(pseudo, &l4) {
                0 => 0xffff,
                c => c,
            }
        };
        let at = self.check_at();
        l4[at..at + 2].copy_from_slice(&check.to_be_bytes());

        let mut f = [self.eth_dst.0, CLIENT.0].concat();
        for (ethertype, tci) in &self.tags {
            f.extend([ethertype.to_be_bytes(), tci.to_be_bytes()].concat());
        }
        if t.is_ipv6() {
            let (first, extension) = self.extension.clone().unwrap_or((t.proto().number(), vec![]));
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend(u16::try_from(extension.len() + l4.len()).unwrap().to_be_bytes());
            f.extend([first, self.ttl]);
            f.extend([src, dst, extension].concat());
        } else {
            let ihl = 5 + self.options.len() / 4;
            let mut ip = vec![0x40 | u8::try_from(ihl).unwrap(), 0];
            ip.extend(u16::try_from(ihl * 4 + l4.len()).unwrap().to_be_bytes());
            ip.extend([0x12, 0x34]);
            ip.extend(self.fragment.to_be_bytes());
            ip.extend([self.ttl, t.proto().number(), 0, 0]);
            ip.extend([src, dst, self.options.clone()].concat());
            let check = !sum(0, &ip);
            ip[10..12].copy_from_slice(&check.to_be_bytes());
            f.extend([8, 0]);
            f.extend(ip);
        }
        f.extend(l4);
        f
    }

    /// `struct virtio_net_hdr` for the frame: checksum to be completed by the receiver, and
    /// segmentation into `gso` bytes of payload, if not 0.
    fn vnet_header(&self, partial: bool, gso: u16) -> [u8; 10] {
        let mut h = [0; 10];
        if partial {
            h[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
            let start = self.l3_at() + self.l3_len();
            h[6..8].copy_from_slice(&u16::try_from(start).unwrap().to_ne_bytes());
            h[8..10].copy_from_slice(&u16::try_from(self.check_at()).unwrap().to_ne_bytes());
        }
        if gso != 0 {
            h[1] = match (self.tuple.proto(), self.tuple.is_ipv6()) {
                (L4Proto::Tcp, false) => 1, // VIRTIO_NET_HDR_GSO_TCPV4
                (L4Proto::Tcp, true) => 4,  // VIRTIO_NET_HDR_GSO_TCPV6
                (L4Proto::Udp, _) => 5,     // VIRTIO_NET_HDR_GSO_UDP_L4
            };
            let headers = self.l3_at() + self.l3_len() + self.l4_header_len();
            h[2..4].copy_from_slice(&u16::try_from(headers).unwrap().to_ne_bytes());
            h[4..6].copy_from_slice(&gso.to_ne_bytes());
        }
        h
    }
}

/// A frame as it was received.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) dst: MacAddr,
    src: MacAddr,
    /// VLAN tags, the outermost first: ethertype and TCI.
    tags: Vec<(u16, u16)>,
    tuple: Tuple,
    ttl: u8,
    pub(crate) ip_checksum_right: bool,
    l4_check: u16,
    pub(crate) l4_checksum_right: bool,
    pub(crate) payload: Vec<u8>,
}

/// `None` for frames that are not plain TCP or UDP over IP.
pub(crate) fn parse(frame: &[u8]) -> Option<Seen> {
    let mac = |at: usize| Some(MacAddr(frame.get(at..at + 6)?.try_into().ok()?));
    let mut tags = Vec::new();
    let mut rest = frame.get(12..)?;
    while let &[0x81, 0, t0, t1, ..] | &[0x88, 0xa8, t0, t1, ..] = rest {
        tags.push((u16::from_be_bytes([rest[0], rest[1]]), u16::from_be_bytes([t0, t1])));
        rest = &rest[4..];
    }
    let ip = rest.get(2..)?;
    let (proto, ttl, src, dst, l4, ip_ok): (_, _, IpAddr, IpAddr, _, _) = match rest.get(..2)? {
        [8, 0] => {
            let header = ip.get(..usize::from(ip.first()? & 15) * 4)?;
            let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            let a = |at: usize| -> [u8; 4] { header[at..at + 4].try_into().unwrap() };
            let (src, dst) = (Ipv4Addr::from(a(12)), Ipv4Addr::from(a(16)));
            let ok = sum(0, header) == 0xffff;
            (ip[9], ip[8], src.into(), dst.into(), ip.get(header.len()..total)?, ok)
        }
        [0x86, 0xdd] => {
            let total = 40 + usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
            let a = |at: usize| -> Option<[u8; 16]> { ip.get(at..at + 16)?.try_into().ok() };
            let (src, dst) = (Ipv6Addr::from(a(8)?), Ipv6Addr::from(a(24)?));
            (ip[6], ip[7], src.into(), dst.into(), ip.get(40..total)?, true)
        }
        _ => return None,
    };
    let proto = L4Proto::from_number(proto)?;
    let (header, at) = if proto == L4Proto::Tcp { (20, 16) } else { (8, 6) };
    let port = |at: usize| Some(u16::from_be_bytes([*l4.get(at)?, *l4.get(at + 1)?]));
    let pseudo = pseudo_header(&octets(src), &octets(dst), proto.number(), l4.len());
    Some(Seen {
        dst: mac(0)?,
        src: mac(6)?,
        tags,
        tuple: Tuple::new(proto, src, port(0)?, dst, port(2)?)?,
        ttl,
        ip_checksum_right: ip_ok,
        l4_check: port(at)?,
        l4_checksum_right: sum(pseudo, l4) == 0xffff,
        payload: l4.get(header..)?.to_vec(),
    })
}

impl Net {
    /// Sends a frame from the client, and returns what of `tuple` the server receives.
    fn pass(&self, bytes: Vec<u8>, vnet_hdr: bool, tuple: Tuple, max: usize) -> Vec<Seen> {
        let within = Duration::from_millis(if max == 0 { 150 } else { 1500 });
        let (ready_tx, ready) = mpsc::channel();
        let seen = self.server.start(move || {
            let wire = Wire::open("s0", false);
            ready_tx.send(()).unwrap();
            let is_wanted = |f: &[u8]| parse(f).is_some_and(|s| s.tuple == tuple);
            let got = wire.receive(max.max(1), within, is_wanted);
            got.iter().filter_map(|f| parse(f)).collect()
        });
        ready.recv().unwrap();
        self.client.call(move || Wire::open("c0", vnet_hdr).send(&bytes));
        seen.recv().unwrap()
    }
}

impl Net {
    /// Sends one run of datagrams from a socket of the client, to be segmented into 1400 bytes each
    /// (`UDP_SEGMENT`), and returns what of `to` the server receives.
    fn pass_datagrams(&self, from: Tuple, to: Tuple, max: usize) -> Vec<Seen> {
        let (ready_tx, ready) = mpsc::channel();
        let seen = self.server.start(move || {
            let wire = Wire::open("s0", false);
            ready_tx.send(()).unwrap();
            let is_wanted = |f: &[u8]| parse(f).is_some_and(|s| s.tuple == to);
            let got = wire.receive(max, Duration::from_millis(1500), is_wanted);
            got.iter().filter_map(|f| parse(f)).collect()
        });
        ready.recv().unwrap();
        self.client.call(move || {
            let socket = UdpSocket::bind((from.src(), from.sport())).unwrap();
            setsockopt(&socket, sockopt::UdpGsoSegment, &1400).unwrap();
            assert_eq!(socket.send_to(&[9; 4200], (from.dst(), from.dport())).unwrap(), 4200);
        });
        seen.recv().unwrap()
    }
}

// --- Rules ----------------------------------------------------------------------------------------

#[test]
fn rules_read_back_as_they_were_meant() {
    let net = Net::new();
    let port = net.bind("lan0");
    port.add(1, flow(tuple(TCP4), tuple(TCP4)));
    port.add(2, flow(tuple(UDP6), tuple(UDP6)));
    port.add(3, flow(tuple(UDP4), tuple("udp 10.0.2.1:5000 > 10.0.2.2:5353")));
    let text = net.filters("lan0");
    println!("{}\n{text}", port.provider.describe());
    for line in [
        "filter protocol ip pref 49410 u32",
        "filter protocol ipv6 pref 49411 u32",
        "filter protocol ip pref 49412 flower chain 0 handle 0x1",
        "filter protocol ipv6 pref 49413 flower chain 0 handle 0x1",
        "dst_mac 02:00:00:00:01:01",
        "eth_type ipv4",
        "ip_proto tcp",
        "dst_ip 10.0.2.2",
        "src_ip 10.0.1.2",
        "dst_port 80",
        "src_port 4000",
        "tcp_flags 0x0/7",
        "ip_flags nofrag",
        "mirred (Egress Redirect to device wan0) stolen",
        "csum (iph) action pipe",
        "cookie c70f010000000001",
        "nat4_udp_before",
        "nat4_udp_after",
        "src_ip fd01::2",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    assert_eq!(port.usage().len(), 3);
    assert_eq!(port.provider.flush().unwrap(), 3);
    assert_eq!(port.usage().len(), 0);
    port.provider.release().unwrap();
    assert_eq!(net.ns.run("tc qdisc show dev lan0").matches("clsact").count(), 0);
}

#[test]
fn tc_shows_our_rules_as_it_shows_those_that_are_written_with_it() {
    let net = Net::new();
    let port = net.bind("lan0");
    let macs = format!("munge eth dst set {SERVER} munge eth src set {WAN}");
    let to = "action mirred egress redirect dev wan0";
    net.ns.run("tc qdisc add dev wan0 clsact");
    for (pref, ip, ours, matches, actions) in [
        (
            49412,
            "ip",
            TCP4,
            "ip_proto tcp dst_ip 10.0.2.2 src_ip 10.0.1.2 dst_port 80 src_port 4000 tcp_flags 0x0/0x7",
            "munge ip ttl dec pipe action csum ip4h pipe",
        ),
        (
            49412,
            "ip",
            UDP4,
            "ip_proto udp dst_ip 10.0.2.2 src_ip 10.0.1.2 dst_port 53 src_port 4000",
            "munge ip ttl dec pipe action csum ip4h pipe",
        ),
        (
            49413,
            "ipv6",
            TCP6,
            "ip_proto tcp dst_ip fd02::2 src_ip fd01::2 dst_port 80 src_port 4000 tcp_flags 0x0/0x7",
            "munge ip6 hoplimit add 0xff pipe",
        ),
    ] {
        let rule = port.add(1, flow(tuple(ours), tuple(ours)));
        net.ns.run(&format!(
            "tc filter add dev wan0 ingress protocol {ip} pref {pref} handle 1 flower skip_hw \
             dst_mac {LAN} {matches} ip_flags nofrag action pedit ex {macs} {actions} {to}"
        ));
        let show = |dev: &str| net.ns.run(&format!("tc filter show dev {dev} ingress pref {pref}"));
        assert_eq!(as_shown(&show("lan0")), as_shown(&show("wan0")));
        port.delete(1, rule).unwrap();
        net.ns.run("tc filter del dev wan0 ingress");
    }
}

#[test]
fn a_routed_packet_is_redirected_with_new_macs_and_one_less_ttl() {
    let net = Net::new();
    let port = net.bind("lan0");
    for (epoch, t) in [TCP4, UDP4, TCP6, UDP6].into_iter().map(tuple).enumerate() {
        let epoch = epoch as u64;
        let packet = Packet::new(t);
        // The router does not forward: without a rule nothing arrives.
        assert_eq!(net.pass(packet.frame(false), false, t, 0).len(), 0, "{t}");
        let rule = port.add(epoch, flow(t, t));
        let seen = net.pass(packet.frame(false), false, t, 1).pop().expect("a packet");
        assert_eq!((seen.dst, seen.src, seen.ttl), (SERVER, WAN, 63), "{t}");
        assert!(seen.ip_checksum_right && seen.l4_checksum_right, "{t} {seen:?}");
        assert_eq!(seen.payload, packet.payload);
        assert_eq!(port.packets(epoch), 1);
        assert_eq!(port.delete(epoch, rule), Ok(Done::Deleted));
        assert_eq!(net.pass(packet.frame(false), false, t, 0).len(), 0, "{t} after the delete");
    }
}

#[test]
fn what_a_rule_must_not_take_goes_up_the_stack() {
    let net = Net::new();
    let port = net.bind("lan0");
    for (epoch, t) in [TCP4, UDP4, TCP6, UDP6].into_iter().map(tuple).enumerate() {
        port.add(epoch as u64, flow(t, t));
    }
    let of = |name: &str| Packet::new(tuple(name));
    let mut cases: Vec<(String, Packet)> = Vec::new();
    for name in [TCP4, UDP4, TCP6, UDP6] {
        for ttl in [0, 1] {
            cases.push((format!("TTL {ttl}"), Packet { ttl, ..of(name) }));
        }
        let other = MacAddr([2, 0, 0, 0, 1, 3]);
        cases.push(("another MAC address".into(), Packet { eth_dst: other, ..of(name) }));
    }
    for name in [TCP4, TCP6] {
        for (what, flag) in [("FIN", 1), ("SYN", 2), ("RST", 4)] {
            cases.push((what.into(), Packet { tcp_flags: 0x10 | flag, ..of(name) }));
        }
    }
    for name in [TCP4, UDP4] {
        for words in 1..=10 {
            let options = [vec![1; words * 4 - 1], vec![0]].concat();
            cases.push((format!("{words} words of options"), Packet { options, ..of(name) }));
        }
        cases.push(("a first fragment".into(), Packet { fragment: 0x2000, ..of(name) }));
        cases.push(("a later fragment".into(), Packet { fragment: 0x0010, ..of(name) }));
    }
    for name in [TCP6, UDP6] {
        for kind in [0, 43, 60, 44] {
            cases.push((format!("extension header {kind}"), of(name).with_extension(kind)));
        }
    }
    let taken = || {
        let mut packets = 0;
        // Fails when the guards have been removed, further down, after it has reported the rules.
        let _ = port.provider.usage(&mut |r| packets += r.counters.packets);
        packets
    };
    for (what, packet) in &cases {
        let frame = packet.frame(false);
        net.client.call(move || Wire::open("c0", false).send(&frame));
        assert_eq!(taken(), 0, "{what}: {packet:?} was taken\n{}", net.filters("lan0"));
    }
    // TTL 2 is the first that is forwarded, and it leaves with 1; ECE, PSH, URG are no obstacles.
    let packet = Packet { ttl: 2, tcp_flags: 0x78, ..of(TCP4) };
    assert_eq!(net.pass(packet.frame(false), false, packet.tuple, 1)[0].ttl, 1);
    let packet = Packet { ttl: 2, ..of(UDP6) };
    assert_eq!(net.pass(packet.frame(false), false, packet.tuple, 1)[0].ttl, 1);
    assert_eq!(taken(), 2);
    // Without the guards, all that they are there for would have been taken.
    net.ns.run(
        "tc filter del dev lan0 ingress prio 49410 protocol ip
         tc filter del dev lan0 ingress prio 49411 protocol ipv6",
    );
    for (what, packet) in &cases {
        let guarded = what.starts_with("TTL")
            || what.ends_with("options")
            || (what.starts_with("extension") && !what.ends_with("44"));
        let (frame, before) = (packet.frame(false), taken());
        net.client.call(move || Wire::open("c0", false).send(&frame));
        assert_eq!(taken() > before, guarded, "{what}: {packet:?}");
    }
}

/// Payloads of one word with which the checksum before or after the rewrite is 0xffff, 0, or one
/// beside them.
fn special_words(packet: &Packet, to: Tuple) -> Vec<u16> {
    let base = |tuple: Tuple| {
        let frame = Packet { tuple, payload: vec![0, 0], ..packet.clone() }.frame(false);
        parse(&frame).unwrap().l4_check
    };
    let (before, after) = (base(packet.tuple), base(to));
    [before, before.wrapping_add(1), after].to_vec()
}

/// NAT of every kind, over packets in every state that a checksum can be in.
#[test]
fn nat_keeps_every_checksum_right() {
    let net = Net::new();
    // What leaves is completed and segmented in software: what the server captures is what would be
    // on a wire. What arrives is left in the state in which it was sent.
    net.ns.run("ethtool -K wan0 tx off tso off gso off tx-udp-segmentation off");
    net.server.sh("ethtool -K s0 rx off gro off");
    let port = net.bind("lan0");
    let pairs = [
        // Both addresses and both ports; source only (SNAT); destination only; one port only.
        (TCP4, "tcp 10.0.2.1:5000 > 10.0.2.77:8080"),
        (TCP4, "tcp 10.0.2.1:4000 > 10.0.2.2:80"),
        (TCP4, "tcp 10.0.1.2:4000 > 10.0.2.77:80"),
        (TCP4, "tcp 10.0.1.2:4001 > 10.0.2.2:80"),
        (UDP4, "udp 10.0.2.1:5000 > 10.0.2.77:5353"),
        (UDP4, "udp 10.0.1.2:4000 > 10.0.2.2:54"),
        (TCP6, "tcp [fd02::1]:5000 > [fd02::77]:8080"),
        (TCP6, "tcp [fd02::1]:4000 > [fd02::2]:80"),
        (UDP6, "udp [fd02::1]:5000 > [fd02::77]:5353"),
        (UDP6, "udp [fd01::2]:4000 > [fd02::2]:5353"),
    ];
    for (epoch, (arrival, departure)) in pairs.into_iter().enumerate() {
        let (epoch, from, to) = (epoch as u64, tuple(arrival), tuple(departure));
        let rule = port.add(epoch, flow(from, to));
        let check = |what: &str, seen: &[Seen], bytes: usize| {
            let payload: usize = seen.iter().map(|s| s.payload.len()).sum();
            assert_eq!(payload, bytes, "{what} {from} -> {to}");
            for s in seen {
                assert!(s.ip_checksum_right && s.l4_checksum_right, "{what} {from} -> {to}: {s:?}");
                assert_eq!((s.ttl, s.src, s.dst), (63, WAN, SERVER));
            }
        };
        let packet = Packet::new(from);
        check("complete", &net.pass(packet.frame(false), false, to, 1), 101);
        // The same without "the checksum has been verified on arrival".
        net.ns.run("ethtool -K lan0 rx off");
        check("unverified", &net.pass(packet.frame(false), false, to, 1), 101);
        net.ns.run("ethtool -K lan0 rx on");
        let with_header = |packet: &Packet, gso| {
            [packet.vnet_header(true, gso).to_vec(), packet.frame(true)].concat()
        };
        check("partial", &net.pass(with_header(&packet, 0), true, to, 1), 101);
        let long = Packet { payload: (0..4200).map(|i| i as u8).collect(), ..packet.clone() };
        let bytes = with_header(&long, 1400);
        match from.proto() {
            L4Proto::Tcp => check("GSO", &net.pass(bytes, true, to, 3), 4200),
            L4Proto::Udp => check("UDP GSO", &net.pass_datagrams(from, to, 3), 4200),
        }
        // Payloads that make checksums and intermediate sums hit their special values.
        for word in special_words(&packet, to) {
            let odd = Packet { payload: word.to_be_bytes().to_vec(), ..packet.clone() };
            check("special", &net.pass(odd.frame(false), false, to, 1), 2);
        }
        if from.proto() == L4Proto::Udp && !from.is_ipv6() {
            let none = Packet { no_checksum: true, ..packet.clone() };
            let seen = net.pass(none.frame(false), false, to, 1);
            assert_eq!(seen.len(), 1);
            assert_eq!(seen[0].l4_check, 0, "no checksum stays none");
        }
        assert_eq!(port.delete(epoch, rule), Ok(Done::Deleted));
    }
}

/// `act_csum` in the place of the programs: this is what they are for.
#[test]
fn a_csum_action_would_leave_gso_packets_wrong() {
    let net = Net::new();
    net.ns.run("ethtool -K wan0 tx off tso off gso off");
    net.ns.run(&format!(
        "tc qdisc add dev lan0 clsact
         tc filter add dev lan0 ingress protocol ip flower skip_hw ip_proto tcp dst_port 80 \
           action pedit ex munge eth dst set {SERVER} munge ip src set 10.0.2.1 pipe \
           action csum ip and tcp pipe action mirred egress redirect dev wan0"
    ));
    let to = tuple("tcp 10.0.2.1:4000 > 10.0.2.2:80");
    let long = Packet { payload: vec![7; 4200], ..Packet::new(tuple(TCP4)) };
    let bytes = [long.vnet_header(true, 1400).to_vec(), long.frame(true)].concat();
    let seen = net.pass(bytes, true, to, 3);
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|s| !s.l4_checksum_right), "{seen:?}");
}

#[test]
fn a_bridged_flow_is_left_as_it_is() {
    let net = Net::new();
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    let mut bridged = flow(t, t);
    bridged.matches.eth_dst = None;
    bridged.forward.macs = None;
    port.add(1, bridged);
    let seen = net.pass(Packet::new(t).frame(false), false, t, 1).pop().expect("a packet");
    assert_eq!((seen.dst, seen.src, seen.ttl), (LAN, CLIENT, 64));
}

#[test]
fn a_large_batch_gives_every_operation_its_own_result() {
    let net = Net::new();
    let port = net.bind("lan0");
    let flow_of = |n: u16| {
        let t = Tuple::new(
            L4Proto::Udp,
            Ipv4Addr::new(10, 0, 1, 2).into(),
            10_000 + n,
            Ipv4Addr::new(10, 0, 2, 2).into(),
            53,
        );
        flow(t.unwrap(), t.unwrap())
    };
    let add = |epoch: u64, f: Flow| Request::Add { cookie: port.cookie(epoch), flow: Box::new(f) };
    // 300 adds, of which some are refused: a match that is there already, an egress that does not
    // exist, an MTU that is too small.
    let mut requests = Vec::new();
    for n in 0..300u16 {
        let mut f = flow_of(n);
        match n % 50 {
            7 => f = flow_of(n - 1),
            13 => f.forward.egress = Ifindex::new(9999).unwrap(),
            29 => f.forward.tuple = tuple(TCP4),
            _ => {}
        }
        requests.push(add(u64::from(n), f));
    }
    let outcomes = port.submit(requests);
    let mut rules = Vec::new();
    for (n, outcome) in outcomes.iter().enumerate() {
        let reason = outcome.as_ref().err().map(|r| r.reason);
        match n % 50 {
            7 => assert_eq!(reason, Some(Reason::Conflict), "{n} {outcome:?}"),
            13 => assert_eq!(reason, Some(Reason::EgressUnsupported), "{n} {outcome:?}"),
            29 => assert_eq!(reason, Some(Reason::Unsupported), "{n} {outcome:?}"),
            _ => match outcome {
                Ok(Done::Added { rule, in_hw: Some(false), .. }) => rules.push((n as u64, *rule)),
                other => panic!("{n}: {other:?}"),
            },
        }
    }
    assert!(outcomes[7].as_ref().unwrap_err().detail.is_some());
    assert_eq!(port.usage().len(), rules.len());
    // Deletes and adds of the same tuple, mixed in one batch, in order.
    let mut requests = Vec::new();
    for &(epoch, rule) in &rules {
        requests.push(Request::Delete { rule, cookie: port.cookie(epoch) });
        requests.push(add(epoch + 1000, flow_of(epoch as u16)));
    }
    let outcomes = port.submit(requests);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let usage = port.usage();
    assert_eq!(usage.len(), rules.len());
    assert!(usage.iter().all(|r| r.cookie.epoch.0 >= 1000 && r.in_hw == Some(false)));
    // A rule that somebody else deleted: its delete succeeds.
    let one = usage[0];
    net.ns.run(&format!(
        "tc filter del dev lan0 ingress protocol ip pref 49412 handle {} flower",
        one.rule.0 & 0xffff_ffff
    ));
    assert_eq!(port.delete(one.cookie.epoch.0, one.rule), Ok(Done::Deleted));
    assert_eq!(port.provider.flush().unwrap(), rules.len() as u64 - 1);
    assert_eq!(port.provider.flush().unwrap(), 0);
    assert!(!net.filters("lan0").contains("flower"));
}

#[test]
fn foreign_filters_are_left_alone_and_given_way_to() {
    let net = Net::new();
    net.ns.run(
        "tc qdisc add dev lan0 clsact
         tc filter add dev lan0 ingress protocol ip flower ip_proto tcp dst_port 22 action pass
         tc filter add dev lan0 ingress prio 49412 protocol ip matchall action pass
         tc filter add dev lan0 egress protocol ip flower ip_proto tcp dst_port 22 action pass",
    );
    let foreign = net.ns.run("tc filter show dev lan0 ingress");
    let port = net.bind("lan0");
    assert!(port.provider.describe().contains("prios 49420-49431"), "{}", port.provider.describe());
    port.add(1, flow(tuple(TCP4), tuple(TCP4)));
    assert_eq!(port.packets(1), 0);
    assert_eq!(port.provider.flush().unwrap(), 1);
    port.provider.release().unwrap();
    assert_eq!(net.ns.run("tc filter show dev lan0 ingress"), foreign);
    assert!(net.ns.run("tc qdisc show dev lan0").contains("clsact"));
}

#[test]
fn the_qdisc_stays_while_somebody_else_uses_it() {
    let net = Net::new();
    let port = net.bind("lan0");
    net.ns.run("tc filter add dev lan0 egress protocol ip flower ip_proto tcp action pass");
    port.provider.release().unwrap();
    assert!(net.ns.run("tc qdisc show dev lan0").contains("clsact"));
    assert!(net.ns.run("tc filter show dev lan0 ingress").is_empty());
}

#[test]
fn an_ingress_qdisc_does_as_well() {
    let net = Net::new();
    net.ns.run("tc qdisc add dev lan0 ingress");
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    port.add(1, flow(t, t));
    assert_eq!(net.pass(Packet::new(t).frame(false), false, t, 1).len(), 1);
    assert_eq!(port.packets(1), 1);
    port.provider.release().unwrap();
    assert!(net.ns.run("tc qdisc show dev lan0").contains("qdisc ingress"));
    assert!(net.ns.run("tc filter show dev lan0 ingress").is_empty());
}

#[test]
fn what_a_dead_engine_left_goes_on_and_is_adopted_if_it_is_what_it_would_be() {
    let net = Net::new();
    let dead = net.try_bind("lan0", HwFlags::Both, 1).unwrap();
    let (tcp, udp) = (tuple(TCP4), tuple(UDP6));
    let nat = (tuple("tcp 10.0.1.2:4009 > 10.0.2.2:80"), tuple("tcp 10.0.2.1:5009 > 10.0.2.2:80"));
    let nat6 = (tuple(TCP6), tuple("tcp [fd02::1]:5000 > [fd02::2]:80"));
    dead.add(1, flow(tcp, tcp));
    dead.add(2, flow(udp, udp));
    dead.add(3, flow(nat.0, nat.1));
    dead.add(4, flow(nat6.0, nat6.1));
    net.ns
        .run("tc filter add dev lan0 ingress prio 7 protocol ip flower dst_ip 1.2.3.4 action pass");
    drop(dead);
    let passes = |what: &str| {
        let seen = net.pass(Packet::new(tcp).frame(false), false, tcp, 1);
        assert_eq!(seen.len(), 1, "{what}");
        assert_eq!(seen[0].src, WAN, "{what}: by the rule");
    };
    passes("without an engine");
    let port = net.try_bind("lan0", HwFlags::Both, 2).unwrap();
    passes("with one that has not looked yet");
    assert_eq!(port.usage(), [], "none of them is its own yet");
    let mut observed = port.provider.observe().unwrap();
    assert_eq!(observed.foreign, 1);
    observed.leftovers.sort_by_key(|l| l.cookie.epoch);
    let tuples: Vec<_> = observed.leftovers.iter().map(|l| l.tuple.unwrap()).collect();
    assert_eq!(tuples, [tcp, udp, nat.0, nat6.0]);
    assert_eq!(observed.leftovers[0].counters.packets, 2);
    assert!(observed.leftovers.iter().all(|l| l.cookie.instance == instance(1)));

    let mut elsewhere = flow(udp, udp);
    elsewhere.forward.macs = Some(MacRewrite { src: WAN, dst: CLIENT });
    let flows = [flow(tcp, tcp), elsewhere, flow(nat.0, nat.1), flow(nat6.0, nat6.1)];
    let adopt = |(l, flow): (&netdev_providers::Leftover, Flow)| Request::Adopt {
        found: l.rule,
        cookie: port.cookie(l.cookie.epoch.0 + 10),
        flow: Box::new(flow),
    };
    let outcomes = port.submit(observed.leftovers.iter().zip(flows).map(adopt).collect());
    let text = net.filters("lan0");
    for (n, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Ok(Done::Added { rule, in_hw: Some(false), .. }) if n != 1 => {
                assert_eq!(*rule, observed.leftovers[n].rule);
            }
            Err(why) if n == 1 => assert_eq!(why.reason, Reason::Conflict),
            other => panic!("{n}: {other:?}\n{text}"),
        }
    }
    passes("adopted");
    assert_eq!(port.packets(11), 3, "it counts on");
    let mut cookies: Vec<_> = port.usage().iter().map(|r| r.cookie.epoch.0).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, [11, 13, 14]);
    assert!(!text.contains("cookie c70f0100000000010000000000000002"), "{text}");
    assert!(text.contains("pref 7 "), "{text}");
    assert_eq!(text.matches("u32").count(), 22, "14 guards, 4 hash tables, 4 prios: {text}");
    assert_eq!(text.matches("cookie c70f010000000002ffff").count(), 14, "all of them ours: {text}");
    assert_eq!(port.provider.observe().unwrap().leftovers, []);

    // From now on they are rules like any other, and their handles are taken.
    let fresh = port.add(20, flow(tuple(UDP4), tuple(UDP4)));
    assert!(observed.leftovers.iter().all(|l| l.rule != fresh), "a handle given twice");
    assert_eq!(port.delete(11, observed.leftovers[0].rule), Ok(Done::Deleted));
    assert!(!net.filters("lan0").contains("cookie c70f0100000000010000000000000001"));
    assert_eq!(port.provider.flush().unwrap(), 3);
    net.ns.run("tc filter del dev lan0 ingress prio 7");
    port.provider.release().unwrap();
    assert!(
        !net.ns.run("tc qdisc show dev lan0").contains("clsact"),
        "inherited from the dead one"
    );
}

/// The writers of a port do not overtake one another where the same packets are matched.
#[test]
fn what_a_dead_engine_left_is_removed_before_its_match_is_taken_again() {
    let net = Net::new();
    let dead = net.bind("lan0");
    let flow_of = |n: u64| {
        let t = tuple(&format!("udp 10.0.1.2:{} > 10.0.2.2:53", 1000 + n));
        Box::new(flow(t, t))
    };
    let adds = (0..200).map(|n| Request::Add { cookie: dead.cookie(n), flow: flow_of(n) });
    assert!(dead.submit(adds.collect()).iter().all(Result::is_ok));
    drop(dead);
    let port = net.try_bind("lan0", HwFlags::Both, 2).unwrap();
    let left = port.provider.observe().unwrap().leftovers;
    assert_eq!(left.len(), 200);
    let renewed = left.iter().flat_map(|l| {
        let (n, rule) = (l.cookie.epoch.0, l.rule);
        let cookie = port.cookie(n);
        [Request::Delete { rule, cookie }, Request::Add { cookie, flow: flow_of(n) }]
    });
    let outcomes = port.submit(renewed.collect());
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!((port.usage().len(), port.provider.flush()), (200, Ok(200)));
}

#[test]
fn a_bind_that_declines_leaves_nothing_behind() {
    let net = Net::new();
    let declined = |name: &str, flags| match net.try_bind(name, flags, 1) {
        Err(BindError::Declined(why)) => why,
        other => panic!("{:?}", other.map(|p| p.provider.describe())),
    };
    assert!(declined("lo", HwFlags::Both).contains("Ethernet"));
    // veth has no hardware.
    let why = declined("lan0", HwFlags::SkipSw);
    assert!(why.contains("NIC"), "{why}");
    assert!(!net.ns.run("tc qdisc show dev lan0").contains("clsact"));
    net.ns.run("tc qdisc add dev lan0 ingress_block 7 clsact");
    let why = declined("lan0", HwFlags::Both);
    assert!(why.contains("block 7"), "{why}");
    assert!(net.ns.run("tc qdisc show dev lan0").contains("clsact"));
    let gone = Netdev { ifindex: Ifindex::new(4711).unwrap(), ..netdev("lan0", HwFlags::Both) };
    let Err(BindError::Failed(fault)) = TcFlowerClass::default().bind(&gone, instance(1)) else {
        panic!("bound to nothing");
    };
    assert!(fault.is_netdev_gone(), "{fault}");
}

#[test]
fn nobody_has_room_for_our_prios() {
    let net = Net::new();
    net.ns.run(
        "tc qdisc add dev lan0 clsact
         tc filter add dev lan0 ingress prio 65530 protocol ip matchall action pass",
    );
    let class = TcFlowerClass::new(TcFlowerConfig { prio_base: 65530, ..Default::default() });
    let Err(BindError::Declined(why)) = class.bind(&netdev("lan0", HwFlags::Both), instance(1))
    else {
        panic!("bound");
    };
    assert!(why.contains("matchall at prio 65530"), "{why}");
}

#[test]
fn rules_outlive_a_removed_qdisc() {
    let net = Net::new();
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    let rule = port.add(1, flow(t, t));
    net.ns.run("tc qdisc del dev lan0 clsact");
    let fault = port.provider.usage(&mut |_| ()).unwrap_err();
    assert!(fault.to_string().contains("removed"), "{fault}");
    assert_eq!(port.delete(1, rule), Ok(Done::Deleted));
    // Noticed by the sweep: guards are up again before the next rule.
    port.add(2, flow(t, t));
    assert_eq!(net.filters("lan0").matches("gact action pass").count(), 14);
    assert_eq!(net.pass(Packet::new(t).frame(false), false, t, 1).len(), 1);
    // Noticed by the add itself.
    net.ns.run("tc qdisc del dev lan0 clsact");
    let udp = tuple(UDP6);
    port.add(3, flow(udp, udp));
    assert_eq!(net.filters("lan0").matches("gact action pass").count(), 14);
    assert_eq!(port.usage().len(), 1);
    // Put back by somebody else, without our guards: noticed by the sweep.
    net.ns.run("tc qdisc del dev lan0 clsact; tc qdisc add dev lan0 clsact");
    assert!(port.provider.usage(&mut |_| ()).is_err());
    port.add(4, flow(t, t));
    assert_eq!(net.filters("lan0").matches("gact action pass").count(), 14);
    port.provider.release().unwrap();
}

#[test]
fn a_netdev_that_goes_is_no_failure_of_deletes() {
    let net = Net::new();
    let port = Arc::new(net.bind("lan0"));
    let t = tuple(TCP4);
    let rule = port.add(1, flow(t, t));
    // In the middle of a stream of adds.
    let stream = {
        let port = Arc::clone(&port);
        let flow = flow(t, t);
        std::thread::spawn(move || {
            let mut last = None;
            for n in 0..2000u16 {
                let t = Tuple::new(
                    L4Proto::Udp,
                    Ipv4Addr::new(10, 0, 1, 2).into(),
                    n,
                    Ipv4Addr::new(10, 0, 2, 2).into(),
                    53,
                )
                .unwrap();
                let mut f = flow;
                f.matches.tuple = t;
                f.forward.tuple = t;
                last = Some(port.try_add(u64::from(n) + 10, f));
                if matches!(&last, Some(Err(_))) {
                    break;
                }
            }
            last.unwrap()
        })
    };
    std::thread::sleep(Duration::from_millis(50));
    net.ns.run("ip link del lan0");
    let last = stream.join().unwrap();
    assert_eq!(last.unwrap_err().reason, Reason::NetdevGone);
    assert_eq!(port.delete(1, rule), Ok(Done::Deleted));
    let fault = port.provider.usage(&mut |_| ()).unwrap_err();
    assert!(fault.is_netdev_gone(), "{fault}");
    port.provider.flush().unwrap();
    port.provider.release().unwrap();
}

/// A real connection, translated by the rules alone once it stands: the router stops forwarding.
#[test]
fn a_translated_tcp_connection_goes_on_when_the_router_no_longer_forwards() {
    const LENGTH: usize = 300_000;
    let net = Net::new();
    net.ns.run(
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
         nft add table inet t
         nft add chain inet t post '{ type nat hook postrouting priority 100; }'
         nft add rule inet t post ip saddr 10.0.1.2 tcp dport 80 snat ip to 10.0.2.1:5000
         nft add rule inet t post ip6 saddr fd01::2 tcp dport 80 snat ip6 to '[fd02::1]:5000'
         ethtool -K wan0 tx off tso off gso off gro on
         ethtool -K lan0 tx off tso off gso off gro on",
    );
    // Received checksums are verified by the stacks, in software.
    net.client.sh("ethtool -K c0 rx off");
    net.server.sh("ethtool -K s0 rx off");
    for (arrival, departure) in
        [(TCP4, "tcp 10.0.2.1:5000 > 10.0.2.2:80"), (TCP6, "tcp [fd02::1]:5000 > [fd02::2]:80")]
    {
        let (arrival, departure) = (tuple(arrival), tuple(departure));
        let (port_tx, port) = mpsc::channel();
        let (arrived_tx, arrived) = mpsc::channel::<()>();
        let server_at = SocketAddr::new(departure.dst(), 80);
        net.server.start(move || {
            let listener = TcpListener::bind(server_at).unwrap();
            port_tx.send(None).unwrap();
            let (mut stream, peer) = listener.accept().unwrap();
            port_tx.send(Some(peer)).unwrap();
            // Sends everything back, and closes only when it has arrived: the last data would go with
            // the FIN, the slow way, which is blocked here.
            let mut buf = vec![0; 65536];
            let mut left = LENGTH;
            while left > 0 {
                let n = stream.read(&mut buf).unwrap();
                stream.write_all(&buf[..n]).unwrap();
                left -= n;
            }
            let _ = arrived.recv();
        });
        port.recv().unwrap();
        let mut stream = net.client.call(move || TcpStream::connect(server_at).unwrap());
        let peer = port.recv().unwrap().unwrap();
        assert_eq!(peer, SocketAddr::new(departure.src(), 5000));
        let sport = stream.local_addr().unwrap().port();
        let tuple_at =
            |port: u16| Tuple::new(L4Proto::Tcp, arrival.src(), port, arrival.dst(), 80).unwrap();
        let (lan, wan) = (net.bind("lan0"), net.bind("wan0"));
        lan.add(1, flow(tuple_at(sport), departure));
        wan.add(
            1,
            Flow {
                direction: Direction::Reply,
                matches: FlowMatch { eth_dst: Some(WAN), vlan: None, tuple: departure.inverted() },
                forward: Forward {
                    egress: ifindex("lan0"),
                    vlan: None,
                    mtu: 1500,
                    tuple: tuple_at(sport).inverted(),
                    macs: Some(MacRewrite { src: LAN, dst: CLIENT }),
                },
                ..flow(departure, departure)
            },
        );
        net.ns.run("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0");
        let data: Vec<u8> = (0..LENGTH).map(|i| (i % 251) as u8).collect();
        let sent = data.clone();
        let mut writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut back = vec![0; data.len()];
        if let Err(e) = stream.read_exact(&mut back) {
            let (lan, wan) = (net.filters("lan0"), net.filters("wan0"));
            let stack = "ss -tin; nstat -az | grep -E 'Retrans|CsumErr|InErrs|Discards|TCPAbort'";
            let (client, server) = (net.client.sh(stack), net.server.sh(stack));
            panic!("{e}\n{lan}\n{wan}\nclient:\n{client}\nserver:\n{server}");
        }
        drop(arrived_tx);
        writing.join().unwrap();
        assert!(back == data);
        let cookie = |p: &Port| p.usage()[0].counters;
        let (there, back) = (cookie(&lan), cookie(&wan));
        println!("{arrival}: {there:?} there, {back:?} back");
        assert!(there.bytes > LENGTH as u64 && back.bytes > LENGTH as u64);
        lan.provider.release().unwrap();
        wan.provider.release().unwrap();
        net.ns.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        drop(stream);
    }
}

/// More refusals than the socket's receive buffer has room for: the kernel's answers are lost, and
/// what became of each operation is asked for.
#[test]
fn alone_a_half_acknowledged_batch_is_settled_rule_by_rule() {
    let net = Net::new();
    let port = net.bind("lan0");
    let flow_of = |n: u16| {
        let t: Tuple = tuple(&format!("udp 10.0.1.2:{} > 10.0.2.2:53", 1000 + n));
        flow(t, t)
    };
    let first = port.add(1000, flow_of(0));
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let fd: i32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // SAFETY: should the descriptor be closed meanwhile, the calls fail, which is passed over.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let name = nix::sys::socket::getsockname::<nix::sys::socket::NetlinkAddr>(fd.as_raw_fd());
        if name.is_ok() {
            let _ = setsockopt(&fd, sockopt::RcvBuf, &1);
        }
    }
    // Every second one is there already.
    let requests = (1..=64u16)
        .map(|n| Request::Add {
            cookie: port.cookie(u64::from(n)),
            flow: Box::new(flow_of(if n % 2 == 0 { 0 } else { n })),
        })
        .collect();
    for (n, outcome) in (1u64..).zip(port.submit(requests)) {
        match outcome {
            Ok(Done::Added { .. }) if n % 2 == 1 => {}
            Err(why) if n % 2 == 0 && why.reason == Reason::Busy => {}
            other => panic!("{n}: {other:?}"),
        }
    }
    assert_eq!(port.usage().len(), 33);
    assert_eq!(port.delete(1000, first), Ok(Done::Deleted));
    assert_eq!(port.provider.flush().unwrap(), 32);
}
