//! Who stands at egress: what decides about packets when they leave a netdev through the stack. A rule in a NIC, and
//! XDP, send past all of it.
//!
//! Queueing disciplines that only queue are nobody: what they do to a packet that finds no queue is what a driver's ring
//! does. One that shapes, classifies, or loses on purpose is somebody, and so are the filters of any of them, those of
//! `clsact` at egress, and programs of tcx.

use std::collections::BTreeMap;

use super::error::NetlinkError;
use super::front::{ALL, TCA_KIND, TCA_OPTIONS, TCMSG_LEN, filters, named};
use super::socket::{DUMP, Family, REQUEST, Socket};
use super::tc::{PARENT_EGRESS, RTM_NEWQDISC, TC_H_INGRESS};
use super::wire::{Message, Received};
use crate::bpf;
use crate::contract::types::Ifindex;

// linux/rtnetlink.h
const RTM_GETQDISC: u16 = 38;
/// `TCA_FQ_FLOW_MAX_RATE` (linux/pkt_sched.h): bytes a second of each flow.
const TCA_FQ_FLOW_MAX_RATE: u16 = 9;
/// How often a dump that a change interrupted is repeated.
const TRIES: u32 = 4;

/// They queue, and drop or mark where the queue is too long or packets stay in it too long: what leaves without having
/// been in it has missed nothing. (`mq` has one for each queue of the NIC.)
const ONLY_QUEUE: [&str; 16] = [
    "noqueue",
    "noop",
    "mq",
    "pfifo",
    "bfifo",
    "pfifo_fast",
    "pfifo_head_drop",
    "codel",
    "fq_codel",
    "fq",
    "sfq",
    "pie",
    "fq_pie",
    "red",
    "choke",
    "sfb",
];

/// What stands at egress of each netdev, in words (`qdisc htb 1:`, `flower at prio 10 (ip): gact`). Netdevs where there is
/// nobody are not in it.
pub type AtEgress = BTreeMap<Ifindex, Vec<String>>;

/// Reads the qdiscs of the network namespace of the calling thread, and their filters. Programs are not in it: see
/// [`programs`].
///
/// # Errors
/// A failure of the exchange.
pub fn qdiscs_and_filters() -> Result<AtEgress, NetlinkError> {
    let mut found = Qdiscs::read()?;
    for (ifindex, parent) in std::mem::take(&mut found.with_filters) {
        let there = match filters(ifindex, parent, ALL) {
            Ok(there) => there,
            // It has gone since, or takes no filters.
            Err(NetlinkError::Kernel(_)) => continue,
            Err(e) => return Err(e),
        };
        if !there.is_empty() {
            let words = there.into_iter().map(|f| f.what);
            found.at.entry(ifindex).or_default().extend(words);
        }
    }
    Ok(found.at)
}

/// The programs of tcx at egress of a netdev, of which the kernel tells nobody that they come or go. One system call.
#[must_use]
pub fn programs(ifindex: Ifindex) -> Vec<u32> {
    bpf::tcx_egress(ifindex)
}

/// A [program](programs) in words.
#[must_use]
pub fn program_in_words(id: u32) -> String {
    format!("tcx program {} at egress", named(id))
}

/// What a dump of all qdiscs brings.
#[derive(Debug, Default)]
struct Qdiscs {
    at: AtEgress,
    /// Parents that can have filters.
    with_filters: Vec<(Ifindex, u32)>,
}

impl Qdiscs {
    fn read() -> Result<Self, NetlinkError> {
        let mut tries = TRIES;
        loop {
            let mut socket = Socket::open(Family::Route)?;
            let (mut buf, seq) = (Vec::with_capacity(64), socket.next_seq());
            let mut m = Message::new(&mut buf, RTM_GETQDISC, REQUEST | DUMP, seq);
            m.raw(&[0; TCMSG_LEN]);
            m.finish();
            let mut found = Self::default();
            tries -= 1;
            match socket.dump(&buf, seq, |m| found.take(&m)) {
                Err(NetlinkError::Interrupted) if tries > 0 => {}
                // What it has found stands.
                Ok(()) | Err(NetlinkError::Interrupted) => return Ok(found),
                Err(e) => return Err(e),
            }
        }
    }

    fn take(&mut self, m: &Received<'_>) {
        let (RTM_NEWQDISC, Some(b)) = (m.ty, m.fixed::<TCMSG_LEN>()) else { return };
        let word = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let (Some(ifindex), handle, parent) = (Ifindex::new(word(4)), word(8), word(12)) else {
            return;
        };
        let attrs = m.attrs(TCMSG_LEN);
        let Some(kind) = attrs.find_type(TCA_KIND).and_then(|a| a.str()) else { return };
        if parent == TC_H_INGRESS {
            if kind == "clsact" {
                self.with_filters.push((ifindex, PARENT_EGRESS));
            }
            return;
        }
        if handle != 0 {
            self.with_filters.push((ifindex, handle));
        }
        let limits = kind == "fq"
            && attrs
                .find_type(TCA_OPTIONS)
                .and_then(|o| o.nested().find_type(TCA_FQ_FLOW_MAX_RATE)?.u32())
                .is_some_and(|rate| rate != u32::MAX);
        if limits || !ONLY_QUEUE.contains(&kind) {
            let words = format!("qdisc {kind} {:x}:", handle >> 16);
            let there = self.at.entry(ifindex).or_default();
            // A scheduler has one below each of its classes: the first is the root.
            if there.is_empty() {
                there.push(words);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::MessageIter;

    const ROOT: u32 = 0xffff_ffff;

    fn qdisc(ifindex: u32, handle: u32, parent: u32, kind: &str, max_rate: Option<u32>) -> Vec<u8> {
        let mut tcmsg = [0; TCMSG_LEN];
        for (at, word) in [(4, ifindex), (8, handle), (12, parent)] {
            tcmsg[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_NEWQDISC, 0, 1);
        m.raw(&tcmsg).str(TCA_KIND, kind);
        if let Some(rate) = max_rate {
            m.nested(TCA_OPTIONS, |m| _ = m.u32(TCA_FQ_FLOW_MAX_RATE, rate));
        }
        m.finish();
        buf
    }

    fn read(messages: &[Vec<u8>]) -> Qdiscs {
        let mut found = Qdiscs::default();
        for bytes in messages {
            found.take(&MessageIter::new(bytes).next().unwrap());
        }
        found
    }

    #[test]
    fn what_only_queues_is_nobody_and_the_root_of_what_shapes_is_named() {
        let found = read(&[
            qdisc(1, 0, ROOT, "noqueue", None),
            qdisc(2, 0, ROOT, "mq", None),
            qdisc(2, 0, 1, "fq_codel", None),
            qdisc(3, 0x8001_0000, ROOT, "fq", Some(u32::MAX)),
            qdisc(4, 0x8002_0000, ROOT, "fq", Some(125_000)),
            qdisc(5, 0x0001_0000, ROOT, "htb", None),
            qdisc(5, 0x0010_0000, 0x0001_0010, "netem", None),
            qdisc(6, 0x8003_0000, ROOT, "mq", None),
            qdisc(6, 0x8004_0000, 0x8003_0001, "cake", None),
            // Nobody knows what it does.
            qdisc(7, 0, ROOT, "brand_new", None),
        ]);
        let at: Vec<_> = found.at.iter().map(|(i, what)| (i.get(), what.join(", "))).collect();
        let words = |i, what: &str| (i, what.to_owned());
        assert_eq!(
            at,
            [
                words(4, "qdisc fq 8002:"),
                words(5, "qdisc htb 1:"),
                words(6, "qdisc cake 8004:"),
                words(7, "qdisc brand_new 0:")
            ]
        );
    }

    #[test]
    fn filters_are_looked_for_at_clsact_and_where_a_handle_can_be_their_parent() {
        let found = read(&[
            qdisc(1, 0xffff_0000, TC_H_INGRESS, "clsact", None),
            qdisc(2, 0xffff_0000, TC_H_INGRESS, "ingress", None),
            qdisc(3, 0x0001_0000, ROOT, "fq_codel", None),
            qdisc(4, 0, ROOT, "fq_codel", None),
        ]);
        let parents: Vec<_> = found.with_filters.iter().map(|(i, p)| (i.get(), *p)).collect();
        assert_eq!(parents, [(1, PARENT_EGRESS), (3, 0x0001_0000)]);
        assert!(found.at.is_empty());
    }
}
