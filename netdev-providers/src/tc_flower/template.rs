//! Templates: the message that adds a flow's rule, encoded once per shape and patched per connection.
//!
//! Most bytes of such a message are the same for all flows of one **shape**: the same family and
//! protocol, the same parts of the tuple rewritten, routed or bridged, on the same port. What
//! differs (sequence number, handle, cookie, addresses, ports, MAC addresses, egress) is copied
//! byte by byte, as the encoder writes it, into places that are the same for the whole shape.
//!
//! # How the places are found
//! The encoder is not asked, it is watched: a flow of the shape whose every byte is a mark of its
//! own is encoded, and then another with other marks. Where the two messages differ, the pair of
//! marks names the byte that stands there. A difference that is no such pair means that the
//! encoder computes something from the flow; then the shape has no template, and its flows are
//! encoded one by one, which is right always and merely slower. So nothing here knows the layout
//! of a message, and an encoder that changes is followed.
//!
//! Whatever of a flow is not patched is part of the shape: a field that flows get one day is told
//! apart without a word here.
//!
//! In builds with debug assertions every patched message is compared with a freshly encoded one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::ops::Range;

use super::actions::NatForm;
use super::rule::{self, Form, Place};
use super::uapi::*;
use crate::contract::flow::{Flow, MacRewrite};
use crate::contract::types::{Cookie, Direction, Epoch, Ifindex, Instance, MacAddr, Tuple};

/// Shapes remembered per port. A port sees a handful; beyond the bound flows are encoded one by one.
const MAX_SHAPES: usize = 64;

// Where each field stands among the values of a flow.
const SEQ: Range<usize> = 0..4;
const HANDLE: Range<usize> = 4..8;
const COOKIE: Range<usize> = 8..24;
const ETH_DST: Range<usize> = 24..30;
const SRC: Range<usize> = 30..46;
const DST: Range<usize> = 46..62;
const SPORT: Range<usize> = 62..64;
const DPORT: Range<usize> = 64..66;
const NEW_SRC: Range<usize> = 66..82;
const NEW_DST: Range<usize> = 82..98;
const NEW_SPORT: Range<usize> = 98..100;
const NEW_DPORT: Range<usize> = 100..102;
const MAC_SRC: Range<usize> = 102..108;
const MAC_DST: Range<usize> = 108..114;
const EGRESS: Range<usize> = 114..118;
const VALUES: usize = 118;

/// Everything about one rule that is patched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    pub(super) seq: u32,
    pub(super) handle: Handle,
    pub(super) cookie: Cookie,
    pub(super) flow: &'a Flow,
}

/// The same, byte by byte in the order and the byte order in which a message has them.
struct Values([u8; VALUES]);

impl Values {
    fn of(s: &Subject<'_>) -> Self {
        let mut v = [0; VALUES];
        v[SEQ].copy_from_slice(&s.seq.to_ne_bytes());
        v[HANDLE].copy_from_slice(&s.handle.0.get().to_ne_bytes());
        v[COOKIE].copy_from_slice(&s.cookie.to_bytes());
        if let Some(mac) = s.flow.matches.eth_dst {
            v[ETH_DST].copy_from_slice(&mac.0);
        }
        let mut tuple = |t: &Tuple, src, dst, sport: Range<usize>, dport: Range<usize>| {
            address(&mut v, src, t.src());
            address(&mut v, dst, t.dst());
            v[sport].copy_from_slice(&t.sport().to_be_bytes());
            v[dport].copy_from_slice(&t.dport().to_be_bytes());
        };
        tuple(&s.flow.matches.tuple, SRC, DST, SPORT, DPORT);
        tuple(&s.flow.forward.tuple, NEW_SRC, NEW_DST, NEW_SPORT, NEW_DPORT);
        if let Some(macs) = s.flow.forward.macs {
            v[MAC_SRC].copy_from_slice(&macs.src.0);
            v[MAC_DST].copy_from_slice(&macs.dst.0);
        }
        v[EGRESS].copy_from_slice(&s.flow.forward.egress.get().to_ne_bytes());
        Self(v)
    }
}

fn address(v: &mut [u8; VALUES], at: Range<usize>, a: IpAddr) {
    match a {
        IpAddr::V4(a) => v[at.start..at.start + 4].copy_from_slice(&a.octets()),
        IpAddr::V6(a) => v[at].copy_from_slice(&a.octets()),
    }
}

/// Marks: a byte for every byte of the values, no two alike, and none with its top bit set, so that
/// an ifindex made of them is one.
#[derive(Clone, Copy)]
enum Marks {
    First,
    Second,
}

impl Marks {
    #[expect(clippy::cast_possible_truncation, reason = "there are fewer than 127 values")]
    const fn at(self, i: usize) -> u8 {
        // From 1 to 118; and from 126 down to 9.
        let mark = (i + 1) as u8;
        match self {
            Self::First => mark,
            Self::Second => mark ^ 0x7f,
        }
    }

    fn bytes<const N: usize>(self, field: &Range<usize>) -> [u8; N] {
        std::array::from_fn(|i| self.at(field.start + i))
    }

    fn u16(self, field: &Range<usize>) -> u16 {
        u16::from_be_bytes(self.bytes(field))
    }

    fn u32(self, field: &Range<usize>) -> u32 {
        u32::from_ne_bytes(self.bytes(field))
    }

    fn address(self, field: &Range<usize>, ipv6: bool) -> IpAddr {
        if ipv6 {
            Ipv6Addr::from(self.bytes::<16>(field)).into()
        } else {
            Ipv4Addr::from(self.bytes::<4>(field)).into()
        }
    }

    /// The flow of this shape whose patched fields are these marks: the same for every flow of the
    /// shape, and so its name.
    fn flow(self, of: &Flow) -> Option<Flow> {
        let (from, to) = (&of.matches.tuple, &of.forward.tuple);
        let v6 = from.is_ipv6();
        let src = self.address(&SRC, v6);
        let dst = self.address(&DST, v6);
        let (sport, dport) = (self.u16(&SPORT), self.u16(&DPORT));
        // What is the same on departure stays the same.
        let new_src = if from.src() == to.src() { src } else { self.address(&NEW_SRC, v6) };
        let new_dst = if from.dst() == to.dst() { dst } else { self.address(&NEW_DST, v6) };
        let new_sport = if from.sport() == to.sport() { sport } else { self.u16(&NEW_SPORT) };
        let new_dport = if from.dport() == to.dport() { dport } else { self.u16(&NEW_DPORT) };
        let mut flow = *of;
        flow.matches.tuple = Tuple::new(from.proto(), src, sport, dst, dport)?;
        flow.matches.eth_dst = of.matches.eth_dst.map(|_| MacAddr(self.bytes(&ETH_DST)));
        flow.forward.tuple = Tuple::new(to.proto(), new_src, new_sport, new_dst, new_dport)?;
        flow.forward.macs = of.forward.macs.map(|_| MacRewrite {
            src: MacAddr(self.bytes(&MAC_SRC)),
            dst: MacAddr(self.bytes(&MAC_DST)),
        });
        flow.forward.egress = Ifindex::new(self.u32(&EGRESS))?;
        Some(flow)
    }

    fn cookie(self) -> Option<Cookie> {
        let b = self.bytes::<16>(&COOKIE);
        let instance = u32::from_be_bytes([b[4], b[5], b[6], b[7]]);
        let epoch = u64::from_be_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]);
        let direction = match self {
            Self::First => Direction::Original,
            Self::Second => Direction::Reply,
        };
        Some(Cookie {
            instance: Instance(NonZeroU32::new(instance)?),
            epoch: Epoch(epoch),
            direction,
        })
    }
}

/// Bytes that go from the values into the message.
#[derive(Clone, Copy, Debug)]
struct Copy {
    to: u16,
    from: u8,
    len: u8,
}

/// The message of one shape.
#[derive(Debug)]
struct Template {
    message: Vec<u8>,
    copies: Vec<Copy>,
}

impl Template {
    /// `None`: the encoder does not only copy for flows of this shape.
    fn make(of: &Flow, encode: impl Fn(&mut Vec<u8>, &Subject<'_>)) -> Option<Self> {
        let encoded = |marks: Marks| {
            let subject = Subject {
                seq: marks.u32(&SEQ),
                handle: Handle(NonZeroU32::new(marks.u32(&HANDLE))?),
                cookie: marks.cookie()?,
                flow: &marks.flow(of)?,
            };
            let mut message = Vec::new();
            encode(&mut message, &subject);
            Some((message, Values::of(&subject)))
        };
        let (first, first_values) = encoded(Marks::First)?;
        let (second, second_values) = encoded(Marks::Second)?;
        if first.len() != second.len() {
            return None;
        }
        let mut copies: Vec<Copy> = Vec::new();
        for (at, pair) in first.iter().zip(&second).enumerate().filter(|(_, (a, b))| a != b) {
            // Two values with the same marks are equal in every flow of the shape: either does.
            let from = first_values.0.iter().zip(&second_values.0).position(|p| p == pair)?;
            let (to, from) = (u16::try_from(at).ok()?, u8::try_from(from).ok()?);
            match copies.last_mut() {
                Some(c) if c.to + u16::from(c.len) == to && c.from + c.len == from => c.len += 1,
                _ => copies.push(Copy { to, from, len: 1 }),
            }
        }
        let template = Self { message: first, copies };
        let mut patched = Vec::new();
        template.patch(&mut patched, &second_values)?;
        (patched == second).then_some(template)
    }

    /// Appends the message with these values.
    fn patch(&self, buf: &mut Vec<u8>, values: &Values) -> Option<()> {
        let start = buf.len();
        buf.extend_from_slice(&self.message);
        let message = buf.get_mut(start..)?;
        for c in &self.copies {
            let (to, from, len) = (usize::from(c.to), usize::from(c.from), usize::from(c.len));
            message.get_mut(to..to + len)?.copy_from_slice(values.0.get(from..from + len)?);
        }
        Some(())
    }
}

/// What else the bytes of a message depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    place: Place,
    flags: u32,
    /// The programs are the same for all flows of one family and protocol.
    software_nat: Option<bool>,
    header: bool,
    percpu_stats: bool,
    flow: Flow,
}

impl Key {
    fn of(place: Place, form: Form<'_>, flow: &Flow) -> Option<Self> {
        Some(Self {
            place,
            flags: form.flags,
            software_nat: form.nat.map(|n| matches!(n, NatForm::Software { .. })),
            header: form.header.is_some(),
            percpu_stats: form.percpu_stats,
            flow: Marks::First.flow(flow)?,
        })
    }
}

/// The templates of one port.
#[derive(Debug, Default)]
pub(super) struct Templates(Vec<(Key, Option<Template>)>);

impl Templates {
    /// Appends the message that adds a flow's rule: byte for byte what [`rule::add`] appends.
    pub(super) fn add(&mut self, buf: &mut Vec<u8>, place: Place, form: Form<'_>, s: &Subject<'_>) {
        let start = buf.len();
        let encode = |buf: &mut Vec<u8>, s: &Subject<'_>| {
            rule::add(buf, s.seq, place, s.handle, s.flow, s.cookie, form);
        };
        let patched = self
            .template(place, form, s.flow, encode)
            .and_then(|template| template.patch(buf, &Values::of(s)));
        if patched.is_none() {
            buf.truncate(start);
            encode(buf, s);
        }
        debug_assert!(
            {
                let mut fresh = Vec::new();
                encode(&mut fresh, s);
                fresh == buf[start..]
            },
            "a patched template is not what the encoder writes for {s:?}"
        );
    }

    fn template(
        &mut self,
        place: Place,
        form: Form<'_>,
        flow: &Flow,
        encode: impl Fn(&mut Vec<u8>, &Subject<'_>),
    ) -> Option<&Template> {
        let key = Key::of(place, form, flow)?;
        if let Some(at) = self.0.iter().position(|(k, _)| *k == key) {
            return self.0.get(at)?.1.as_ref();
        }
        if self.0.len() < MAX_SHAPES {
            self.0.push((key, Template::make(flow, encode)));
            return self.0.last()?.1.as_ref();
        }
        None
    }

    /// How many shapes there are, and how many of them have a template.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.0.len(), self.0.iter().filter(|(_, t)| t.is_some()).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::types::L4Proto;
    use crate::tc_flower::capability::{Shape, trial_flow};

    #[test]
    fn marks_are_distinct_and_positive() {
        let pairs: std::collections::HashSet<_> =
            (0..VALUES).map(|i| (Marks::First.at(i), Marks::Second.at(i))).collect();
        assert_eq!(pairs.len(), VALUES);
        assert!(pairs.iter().all(|&(a, b)| (1..0x80).contains(&a) && (1..0x80).contains(&b)));
        // The direction in a cookie is 0 and then 1: no pair of marks.
        assert!(!pairs.contains(&(0, 1)));
    }

    fn example() -> (Place, Flow) {
        let place = |n| Place {
            ifindex: Ifindex::new(n).unwrap(),
            prio: Prio(0xc104),
            family: Family::Ipv4,
        };
        let shape = Shape::new(false, L4Proto::Tcp, false);
        (place(2), trial_flow(Ifindex::new(3).unwrap(), shape))
    }

    const FORM: Form<'_> = Form { flags: 0, nat: None, header: None, percpu_stats: true };

    /// What stands together in the message and in the values goes in one copy.
    #[test]
    fn bytes_that_follow_each_other_are_copied_together() {
        let (place, flow) = example();
        let template = Template::make(&flow, |buf, s| {
            rule::add(buf, s.seq, place, s.handle, s.flow, s.cookie, FORM);
        })
        .unwrap();
        let follows =
            |a: &Copy, b: &Copy| (a.to + u16::from(a.len), a.from + a.len) == (b.to, b.from);
        assert!(!template.copies.windows(2).any(|pair| follows(&pair[0], &pair[1])));
        // All but the magic of the cookie, in which nothing differs, and what IPv4 does not have of
        // addresses; the new tuple is the old.
        let copied: usize = template.copies.iter().map(|c| usize::from(c.len)).sum();
        assert_eq!(copied, 4 + 4 + (16 - 3) + 6 + 2 * 4 + 2 * 2 + 2 * 6 + 4);
    }

    #[test]
    fn beyond_so_many_shapes_flows_are_encoded_one_by_one() {
        let (place, flow) = example();
        let mut templates = Templates::default();
        let instance = Instance(NonZeroU32::MIN);
        let cookie = Cookie { instance, epoch: Epoch(1), direction: Direction::Original };
        for n in (1..=70).chain(1..=70) {
            let place = Place { ifindex: Ifindex::new(n).unwrap(), ..place };
            let subject = Subject { seq: n, handle: Handle(NonZeroU32::MIN), cookie, flow: &flow };
            let (mut patched, mut encoded) = (vec![7], vec![7]);
            templates.add(&mut patched, place, FORM, &subject);
            rule::add(&mut encoded, n, place, subject.handle, &flow, cookie, FORM);
            assert_eq!(patched, encoded);
            let known = (n as usize).min(MAX_SHAPES);
            assert!(templates.counts().0 >= known && templates.counts().1 <= MAX_SHAPES);
        }
        assert_eq!(templates.counts(), (MAX_SHAPES, MAX_SHAPES));
    }
}
