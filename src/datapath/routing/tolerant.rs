//! A netlink socket whose messages can all be decoded.
//!
//! Some of what the kernel says are bytes that somebody chose: a netdev's alias and its name need not be
//! UTF-8. A codec that takes them for text refuses the whole message, and `netlink-proto` then drops it
//! without a word to anybody: the netdev would not exist. And what kernels to come say of a netdev can be
//! longer or shorter than a codec of today believes.
//!
//! So a message that cannot be decoded loses, before it is decoded, the attributes that are to blame, and
//! those alone. One of which nothing can be made all the same becomes `NLMSG_OVERRUN`: something
//! was said that we have not heard, and everything is read anew. (In the answer to a request it is left
//! out: reading the same again would help nobody.)

use std::io;
use std::task::{Context, Poll, ready};

use bytes::BufMut;
use netdev_providers::netlink::MessageIter;
use netdev_providers::netlink::wire::{AttrIter, NLA_HDRLEN, NLMSG_HDRLEN, Received, align};
use netlink_packet_core::{NLMSG_OVERRUN, NetlinkDeserializable, NetlinkHeader};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{AsyncSocket, Socket, SocketAddr, TokioSocket};

/// More than the kernel puts into one datagram (32 kB).
const DATAGRAM: usize = 1 << 16;
/// Below this, message types are netlink's own (`NLMSG_MIN_TYPE`).
const MIN_TYPE: u16 = 16;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;

/// See the [module](self).
pub(super) struct Tolerant(TokioSocket);

impl AsyncSocket for Tolerant {
    fn socket_ref(&self) -> &Socket {
        self.0.socket_ref()
    }

    fn socket_mut(&mut self) -> &mut Socket {
        self.0.socket_mut()
    }

    fn new(protocol: isize) -> io::Result<Self> {
        TokioSocket::new(protocol).map(Self)
    }

    fn poll_send(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_send(cx, buf)
    }

    fn poll_send_to(
        &self,
        cx: &mut Context<'_>,
        buf: &[u8],
        addr: &SocketAddr,
    ) -> Poll<io::Result<usize>> {
        self.0.poll_send_to(cx, buf, addr)
    }

    fn poll_recv<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<()>> {
        self.poll_recv_from(cx, buf).map_ok(|_| ())
    }

    fn poll_recv_from<B: BufMut>(
        &self,
        cx: &mut Context<'_>,
        buf: &mut B,
    ) -> Poll<io::Result<SocketAddr>> {
        let mut datagram = Vec::with_capacity(DATAGRAM);
        let from = ready!(self.0.poll_recv_from(cx, &mut datagram))?;
        let decodable = decodable(&datagram);
        if buf.remaining_mut() < decodable.len() {
            return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
        }
        buf.put_slice(&decodable);
        Poll::Ready(Ok(from))
    }

    fn poll_recv_from_full(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Vec<u8>, SocketAddr)>> {
        let (datagram, from) = ready!(self.0.poll_recv_from_full(cx))?;
        Poll::Ready(Ok((decodable(&datagram), from)))
    }
}

/// The messages of a datagram, each such that it can be decoded.
fn decodable(datagram: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(datagram.len());
    for m in MessageIter::new(datagram) {
        if m.ty < MIN_TYPE || decodes(&m, m.payload) {
            push(&mut out, &m, m.ty, m.payload);
            continue;
        }
        match reduced(&m) {
            Some(payload) => push(&mut out, &m, m.ty, &payload),
            None if m.seq == 0 => push(&mut out, &m, NLMSG_OVERRUN, &[]),
            None => tracing::error!(ty = m.ty, "a part of an answer of the kernel is not read"),
        }
    }
    out
}

fn push(out: &mut Vec<u8>, m: &Received<'_>, ty: u16, payload: &[u8]) {
    let len = u32::try_from(NLMSG_HDRLEN + payload.len()).unwrap_or(u32::MAX);
    out.extend(len.to_ne_bytes());
    out.extend(ty.to_ne_bytes());
    out.extend(m.flags.to_ne_bytes());
    out.extend(m.seq.to_ne_bytes());
    out.extend(m.port.to_ne_bytes());
    out.extend(payload);
    out.resize(align(out.len()), 0);
}

fn decodes(m: &Received<'_>, payload: &[u8]) -> bool {
    let mut header = NetlinkHeader::default();
    header.message_type = m.ty;
    header.flags = m.flags;
    RouteNetlinkMessage::deserialize(&header, payload).is_ok()
}

/// The bytes before the attributes of a message of this type (linux/rtnetlink.h: new, del, get and set
/// of one kind are four in a row).
const fn fixed_len(ty: u16) -> Option<usize> {
    match ty & !3 {
        16 => Some(16),           // struct ifinfomsg
        20 => Some(8),            // struct ifaddrmsg
        24 | 28 | 32 => Some(12), // struct rtmsg, ndmsg, fib_rule_hdr
        _ => None,
    }
}

/// The payload without the attributes that cannot be decoded; `None`: that does not help either.
fn reduced(m: &Received<'_>) -> Option<Vec<u8>> {
    let fixed = fixed_len(m.ty)?;
    let mut out = m.payload.get(..fixed)?.to_vec();
    if !decodes(m, &out) {
        return None;
    }
    let is_link = fixed == 16;
    for (attr, raw) in with_bytes(&m.payload[fixed..]) {
        let before = out.len();
        out.extend(raw);
        if decodes(m, &out) {
            continue;
        }
        out.truncate(before);
        match attr {
            IFLA_IFNAME if is_link => {
                let end = raw.iter().skip(NLA_HDRLEN).position(|&b| b == 0);
                let name = &raw[NLA_HDRLEN..end.map_or(raw.len(), |n| NLA_HDRLEN + n)];
                push_attr(
                    &mut out,
                    attr,
                    &[String::from_utf8_lossy(name).as_bytes(), &[0]].concat(),
                );
            }
            // Its kind can be told without its details; what they would say is not guessed.
            IFLA_LINKINFO if is_link => {
                let mut info = Vec::new();
                for (_, raw) in with_bytes(&raw[NLA_HDRLEN..]) {
                    let known = info.len();
                    info.extend(raw);
                    let mut trial = out.clone();
                    push_attr(&mut trial, attr, &info);
                    if !decodes(m, &trial) {
                        info.truncate(known);
                    }
                }
                push_attr(&mut out, attr, &info);
            }
            _ => tracing::debug!(ty = m.ty, attr, "an attribute is not read"),
        }
        if !decodes(m, &out) {
            out.truncate(before);
        }
    }
    Some(out)
}

/// Attributes, each with its type and its bytes, header and padding included.
fn with_bytes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let attr = AttrIter::new(bytes).next()?;
        let len = align(NLA_HDRLEN + attr.payload.len()).min(bytes.len());
        let (raw, rest) = bytes.split_at(len);
        bytes = rest;
        Some((attr.ty, raw))
    })
}

fn push_attr(out: &mut Vec<u8>, ty: u16, payload: &[u8]) {
    let len = u16::try_from(NLA_HDRLEN + payload.len()).unwrap_or(u16::MAX);
    out.extend(len.to_ne_bytes());
    out.extend(ty.to_ne_bytes());
    out.extend(payload);
    out.resize(align(out.len()), 0);
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::Message;
    use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
    use proptest::prelude::*;

    use super::super::links::{Layer, Link};
    use super::*;

    const RTM_NEWLINK: u16 = 16;
    const IFLA_MTU: u16 = 4;
    const IFLA_IFALIAS: u16 = 20;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;

    fn link_message(seq: u32, fill: impl FnOnce(&mut Message<'_>)) -> Vec<u8> {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_NEWLINK, 0, seq);
        let mut ifinfomsg = [0; 16];
        ifinfomsg[4..8].copy_from_slice(&7i32.to_ne_bytes());
        m.raw(&ifinfomsg);
        fill(&mut m);
        m.finish();
        buf
    }

    fn decoded(bytes: &[u8]) -> Option<NetlinkPayload<RouteNetlinkMessage>> {
        NetlinkMessage::deserialize(bytes).ok().map(|m| m.payload)
    }

    /// What is made of a message that the codec itself refuses.
    fn link(message: &[u8]) -> Link {
        assert!(decoded(message).is_none(), "the codec takes it as it is");
        match decoded(&decodable(message)) {
            Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(m))) => {
                Link::from_message(&m).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_netdev_is_heard_of_whatever_its_alias_and_its_name_are() {
        let aliased = link_message(0, |m| {
            m.str(IFLA_IFNAME, "wan").attr(IFLA_IFALIAS, b"\xff\xfe\0").u32(IFLA_MTU, 1400);
        });
        let l = link(&aliased);
        assert_eq!((l.name.as_str(), l.mtu, l.ifindex.get()), ("wan", 1400, 7));
        let named = link_message(3, |m| {
            m.attr(IFLA_IFNAME, b"w\xffn\0").u32(IFLA_MTU, 1400);
        });
        let l = link(&named);
        assert_eq!((l.name.as_str(), l.mtu), ("w\u{fffd}n", 1400));
    }

    #[test]
    fn what_cannot_be_read_of_its_kind_is_not_guessed() {
        let odd = link_message(0, |m| {
            m.u32(IFLA_MTU, 1500).nested(IFLA_LINKINFO, |m| {
                m.str(IFLA_INFO_KIND, "vlan").nested(IFLA_INFO_DATA, |m| {
                    // IFLA_VLAN_ID of one byte.
                    m.u8(1, 9);
                });
            });
        });
        assert_eq!(link(&odd).layer, Layer::Other { kind: "vlan".into(), lower: None });
    }

    #[test]
    fn what_cannot_be_read_at_all_is_a_loss_and_what_stands_beside_it_is_read() {
        let good = link_message(0, |m| {
            m.u32(IFLA_MTU, 1280);
        });
        let cut_short = |seq: u32| {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, RTM_NEWLINK, 0, seq);
            m.raw(&[0; 4]);
            m.finish();
            buf
        };
        assert!(decoded(&cut_short(0)).is_none());
        let both = decodable(&[cut_short(0), good.clone()].concat());
        let types: Vec<_> = MessageIter::new(&both).map(|m| m.ty).collect();
        assert_eq!(types, [NLMSG_OVERRUN, RTM_NEWLINK]);
        assert!(matches!(decoded(&both), Some(NetlinkPayload::Overrun(_))));
        assert_eq!(decodable(&[cut_short(5), good.clone()].concat()), good);
        assert_eq!(decodable(&good), good);
    }

    proptest! {
        #[test]
        fn whatever_comes_can_be_decoded(
            ty in 16u16..40,
            payload in proptest::collection::vec(any::<u8>(), 0..96),
        ) {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, ty, 0, 0);
            m.raw(&payload);
            m.finish();
            for m in MessageIter::new(&decodable(&buf)) {
                prop_assert!(m.ty == NLMSG_OVERRUN || decodes(&m, m.payload));
            }
        }
    }
}
