//! The ingress hook of one netdev: its link, its qdisc, its filters, one request at a time.

use nix::errno::Errno;

use super::parse::Filter;
use super::rule::{self, Place};
use super::uapi::*;
use crate::contract::types::Ifindex;
use crate::netlink::error::{KernelError, NetlinkError};
use crate::netlink::modules::{Lacking, while_modules_come};
use crate::netlink::socket::{ACK, CREATE, DUMP, EXCL, Family as Netlink, REQUEST, Socket};
use crate::netlink::wire::Message;

/// A qdisc that has an ingress hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Qdisc {
    /// `clsact` or `ingress`.
    pub(super) kind: String,
    /// The shared block that its ingress filters are in, if they are in one.
    pub(super) shared_block: Option<u32>,
}

/// A kind of qdisc that has an ingress hook. A netdev has one of them at most, and who wants the other kind is
/// refused: to add it, to replace this one by it, even to delete it by that name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QdiscKind {
    /// `ingress`, which has nothing else. Shapers of incoming traffic (SQM, wondershaper, FireQOS) delete it and
    /// make their own, or use the one that is there. Whoever takes it for a `clsact` without looking gets
    /// filters for egress into ingress.
    #[default]
    Ingress,
    /// `clsact`, which has an egress hook too. Tools that load BPF programs use the one that is there; those
    /// of the other kind cannot start beside it.
    Clsact,
}

impl QdiscKind {
    /// As `tc` calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Clsact => "clsact",
        }
    }

    /// The kind of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Ingress, Self::Clsact].into_iter().find(|k| k.name() == name)
    }
}

/// A socket and a buffer for requests about one netdev.
#[derive(Debug)]
pub(super) struct Hook {
    pub(super) socket: Socket,
    pub(super) buf: Vec<u8>,
    pub(super) ifindex: Ifindex,
}

/// A dump that changes interrupt every time is given up after so many: what it found is valid, but may
/// not be all.
const DUMP_ATTEMPTS: u32 = 4;

/// Whether this is what the kernel says of a qdisc, a classifier or an action that it has not
/// (`qdisc_create`, `tcf_proto_lookup_ops`, `tc_action_load_ops`). ENOENT alone is also what a rule is
/// that is not there.
fn lacks_a_module(e: &NetlinkError) -> bool {
    const WORDS: [&str; 3] = [
        "Specified qdisc kind is unknown",
        "TC classifier not found",
        "Failed to load TC action module",
    ];
    let NetlinkError::Kernel(e) = e else { return false };
    e.errno == Errno::ENOENT && e.extack.as_deref().is_some_and(|said| WORDS.contains(&said))
}

// linux/if_link.h
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;

/// `NLM_F_ECHO`.
const ECHO: u16 = 8;

impl Hook {
    pub(super) fn open(ifindex: Ifindex) -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open(Netlink::Route)?, buf: Vec::new(), ifindex })
    }

    /// Sends the one message that `write` appends, which asks for an acknowledgement.
    pub(super) fn request(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>, u32, Ifindex),
    ) -> Result<(), NetlinkError> {
        let seq = self.write(write);
        while_modules_come(lacks_a_module, || self.socket.request(&self.buf, seq, |_| ()))
    }

    /// The same, of which nobody waits again for what the kernel lacks.
    pub(super) fn request_unless_lacking(
        &mut self,
        lacking: &Lacking,
        write: impl FnOnce(&mut Vec<u8>, u32, Ifindex),
    ) -> Result<(), NetlinkError> {
        let seq = self.write(write);
        lacking.ask(lacks_a_module, || self.socket.request(&self.buf, seq, |_| ()))
    }

    fn ask(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>, u32, Ifindex),
        each: impl FnMut(crate::netlink::wire::Received<'_>),
    ) -> Result<(), NetlinkError> {
        let seq = self.write(write);
        self.socket.request(&self.buf, seq, each)
    }

    /// The sequence number of what is in the buffer then.
    fn write(&mut self, write: impl FnOnce(&mut Vec<u8>, u32, Ifindex)) -> u32 {
        let seq = self.socket.next_seq();
        self.buf.clear();
        write(&mut self.buf, seq, self.ifindex);
        seq
    }

    /// The netdev's hardware type (`ARPHRD_*`).
    ///
    /// # Errors
    /// ENODEV when there is no such netdev.
    pub(super) fn hardware_type(&mut self) -> Result<u16, NetlinkError> {
        let mut found = None;
        self.ask(
            |buf, seq, ifindex| {
                let mut m = Message::new(buf, RTM_GETLINK, REQUEST | ACK, seq);
                let mut ifinfomsg = [0; 16];
                ifinfomsg[4..8].copy_from_slice(&ifindex.get().to_ne_bytes());
                m.raw(&ifinfomsg);
                m.finish();
            },
            |m| {
                if let (RTM_NEWLINK, Some(b)) = (m.ty, m.fixed::<16>()) {
                    found = Some(u16::from_ne_bytes([b[2], b[3]]));
                }
            },
        )?;
        found.ok_or(NetlinkError::Malformed("no link in the answer"))
    }

    /// True when the kernel says that the netdev does not exist.
    pub(super) fn is_gone(&mut self) -> bool {
        matches!(self.hardware_type(), Err(e) if e.errno() == Some(Errno::ENODEV))
    }

    /// Whether a VLAN device with the number 0 stands on the netdev: frames with a priority tag are its.
    pub(super) fn has_vlan_0_above(&mut self) -> Result<bool, NetlinkError> {
        let seq = self.socket.next_seq();
        self.buf.clear();
        let mut m = Message::new(&mut self.buf, RTM_GETLINK, REQUEST | DUMP, seq);
        m.raw(&[0; 16]);
        m.nested(IFLA_LINKINFO, |m| _ = m.str(IFLA_INFO_KIND, "vlan"));
        m.finish();
        let (below, mut found) = (self.ifindex.get(), false);
        let dumped = self.socket.dump(&self.buf, seq, |m| {
            let attrs = m.attrs(16);
            if m.ty != RTM_NEWLINK
                || attrs.find_type(IFLA_LINK).and_then(|a| a.u32()) != Some(below)
            {
                return;
            }
            let Some(info) = attrs.find_type(IFLA_LINKINFO).map(|a| a.nested()) else { return };
            let kind = info.find_type(IFLA_INFO_KIND).and_then(|a| a.str());
            let data = info.find_type(IFLA_INFO_DATA).map(|a| a.nested());
            let id = data.and_then(|d| d.find_type(IFLA_VLAN_ID)).and_then(|a| a.u16());
            found |= kind == Some("vlan") && id == Some(0);
        });
        match dumped {
            // What it has brought stands; whoever changes netdevs is heard of.
            Ok(()) | Err(NetlinkError::Interrupted) => Ok(found),
            Err(e) => Err(e),
        }
    }

    /// Makes a qdisc with an ingress hook. `false`: there is one already.
    pub(super) fn add_qdisc(&mut self, kind: QdiscKind) -> Result<bool, NetlinkError> {
        let made = self.request(|buf, seq, ifindex| {
            let flags = REQUEST | ACK | CREATE | EXCL;
            qdisc_message(buf, RTM_NEWQDISC, flags, seq, ifindex, kind);
        });
        match made {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == Some(Errno::EEXIST) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Removes the qdisc with the ingress hook, which is one of ours, unless it is not there or somebody
    /// has filters at it.
    pub(super) fn delete_unused_qdisc(&mut self) -> Result<(), NetlinkError> {
        let Some(qdisc) = self.qdisc()?.filter(|q| q.shared_block.is_none()) else { return Ok(()) };
        let Some(kind) = QdiscKind::named(&qdisc.kind) else { return Ok(()) };
        let mut filters = 0;
        for parent in [PARENT_INGRESS, PARENT_EGRESS] {
            self.filters(parent, |_| filters += 1)?;
        }
        if filters > 0 {
            return Ok(());
        }
        self.request(|buf, seq, ifindex| {
            qdisc_message(buf, RTM_DELQDISC, REQUEST | ACK, seq, ifindex, kind);
        })
    }

    /// The qdisc with the ingress hook, if there is one.
    pub(super) fn qdisc(&mut self) -> Result<Option<Qdisc>, NetlinkError> {
        let mut found = None;
        let asked = self.ask(
            |buf, seq, ifindex| {
                // The kernel notifies instead of answering (`qdisc_notify`): without the echo, only
                // those who listen to the group get to see it.
                let mut m = Message::new(buf, RTM_GETQDISC, REQUEST | ACK | ECHO, seq);
                let tcmsg = TcMsg {
                    ifindex: ifindex.get(),
                    handle: INGRESS_QDISC_HANDLE,
                    parent: 0,
                    prio: 0,
                    ethertype: 0,
                };
                m.raw(&tcmsg.to_bytes());
                m.finish();
            },
            |m| {
                let attrs = m.attrs(TcMsg::LEN);
                if let (RTM_NEWQDISC, Some(kind)) = (m.ty, attrs.find_type(TCA_KIND)) {
                    found = Some(Qdisc {
                        kind: kind.str().unwrap_or("").to_owned(),
                        shared_block: attrs
                            .find_type(TCA_INGRESS_BLOCK)
                            .and_then(|a| a.u32())
                            .filter(|&b| b != 0),
                    });
                }
            },
        );
        match asked {
            Ok(()) => Ok(found),
            Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Dumps with `dump` until no change interrupts it, [`DUMP_ATTEMPTS`] times at most; `begin` is
    /// called before each attempt, to forget what the one before found.
    pub(super) fn repeated<S>(
        &mut self,
        state: &mut S,
        begin: impl Fn(&mut S),
        mut dump: impl FnMut(&mut Self, &mut S) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let mut attempt = 1;
        loop {
            begin(state);
            match dump(self, state) {
                Err(NetlinkError::Interrupted) if attempt < DUMP_ATTEMPTS => attempt += 1,
                other => return other,
            }
        }
    }

    /// Hands every filter at this parent to `each`.
    pub(super) fn filters(
        &mut self,
        parent: u32,
        each: impl FnMut(Filter<'_>),
    ) -> Result<(), NetlinkError> {
        self.dump(each, |buf, seq, ifindex| rule::dump_all(buf, seq, ifindex, parent))
    }

    /// Hands every filter of a prio to `each`, in full (u32 knows no terse dump).
    pub(super) fn filters_at(
        &mut self,
        prio: Prio,
        family: Family,
        each: impl FnMut(Filter<'_>),
    ) -> Result<(), NetlinkError> {
        self.dump(each, |buf, seq, ifindex| {
            rule::dump(buf, seq, Place { ifindex, prio, family }, false);
        })
    }

    /// Hands every filter of a prio to `each`, as a terse dump has it.
    pub(super) fn filters_terse(
        &mut self,
        prio: Prio,
        family: Family,
        each: impl FnMut(Filter<'_>),
    ) -> Result<(), NetlinkError> {
        self.dump(each, |buf, seq, ifindex| {
            rule::dump(buf, seq, Place { ifindex, prio, family }, true);
        })
    }

    fn dump(
        &mut self,
        mut each: impl FnMut(Filter<'_>),
        write: impl FnOnce(&mut Vec<u8>, u32, Ifindex),
    ) -> Result<(), NetlinkError> {
        let seq = self.socket.next_seq();
        self.buf.clear();
        write(&mut self.buf, seq, self.ifindex);
        self.socket.dump(&self.buf, seq, |m| {
            if let Some(filter) = Filter::of(&m) {
                each(filter);
            }
        })
    }

    /// One rule, by its handle: what `read` makes of it, or `None` when there is no such rule.
    pub(super) fn filter<R>(
        &mut self,
        prio: Prio,
        family: Family,
        handle: Handle,
        mut read: impl FnMut(Filter<'_>) -> R,
    ) -> Result<Option<R>, NetlinkError> {
        let mut found = None;
        let asked = self.ask(
            |buf, seq, ifindex| rule::get(buf, seq, Place { ifindex, prio, family }, handle),
            |m| found = Filter::of(&m).map(&mut read),
        );
        match asked {
            Ok(()) => Ok(found),
            Err(NetlinkError::Kernel(e)) if means_no_such_rule(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Deletes every rule of a prio. That there is none is success.
    pub(super) fn delete_all(&mut self, prio: Prio, family: Family) -> Result<(), NetlinkError> {
        let deleted = self.request(|buf, seq, ifindex| {
            rule::delete_all(buf, seq, Place { ifindex, prio, family });
        });
        self.forgive_absence(deleted)
    }

    /// Deletes one rule. That there is none is success.
    pub(super) fn delete(
        &mut self,
        prio: Prio,
        family: Family,
        handle: Handle,
    ) -> Result<(), NetlinkError> {
        let deleted = self.request(|buf, seq, ifindex| {
            rule::delete(buf, seq, Place { ifindex, prio, family }, handle);
            rule::ask_for_ack(buf, 0);
        });
        self.forgive_absence(deleted)
    }

    /// Deletes one rule of another classifier. That there is none is success.
    pub(super) fn delete_of_kind(
        &mut self,
        prio: Prio,
        family: Family,
        handle: Handle,
        kind: &str,
    ) -> Result<(), NetlinkError> {
        let kind = [kind.as_bytes(), b"\0"].concat();
        let deleted = self.request(|buf, seq, ifindex| {
            let place = Place { ifindex, prio, family };
            rule::delete_of_kind(buf, seq, place, handle, &kind);
            rule::ask_for_ack(buf, 0);
        });
        self.forgive_absence(deleted)
    }

    fn forgive_absence(&mut self, deleted: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
        match deleted {
            Err(NetlinkError::Kernel(e)) if means_no_such_rule(&e) => Ok(()),
            // What a request about a filter gets when the qdisc is not there (`__tcf_qdisc_find`).
            Err(NetlinkError::Kernel(e)) if e.errno == Errno::EINVAL => {
                if matches!(self.qdisc(), Ok(None)) { Ok(()) } else { Err(e.into()) }
            }
            other => other,
        }
    }
}

/// ENOENT: no such rule or prio; ENODEV: no such netdev.
pub(super) fn means_no_such_rule(e: &KernelError) -> bool {
    matches!(e.errno, Errno::ENOENT | Errno::ENODEV)
}

fn qdisc_message(
    buf: &mut Vec<u8>,
    ty: u16,
    flags: u16,
    seq: u32,
    ifindex: Ifindex,
    kind: QdiscKind,
) {
    let mut m = Message::new(buf, ty, flags, seq);
    let tcmsg = TcMsg {
        ifindex: ifindex.get(),
        handle: INGRESS_QDISC_HANDLE,
        parent: TC_H_CLSACT,
        prio: 0,
        ethertype: 0,
    };
    m.raw(&tcmsg.to_bytes());
    m.str(TCA_KIND, kind.name());
    m.finish();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dumped(mut interruptions: u32) -> (u32, Vec<u32>, Result<(), NetlinkError>) {
        let mut hook = Hook::open(Ifindex::new(1).unwrap()).unwrap();
        let (mut attempts, mut seen) = (0, Vec::new());
        let result = hook.repeated(&mut seen, Vec::clear, |_, seen| {
            attempts += 1;
            seen.extend([1, 2]);
            if interruptions == 0 {
                return Ok(());
            }
            interruptions -= 1;
            Err(NetlinkError::Interrupted)
        });
        (attempts, seen, result)
    }

    #[test]
    fn an_interrupted_dump_is_repeated_and_nothing_is_seen_twice() {
        let (attempts, seen, result) = dumped(DUMP_ATTEMPTS - 1);
        assert_eq!((attempts, seen), (DUMP_ATTEMPTS, vec![1, 2]));
        assert!(result.is_ok());
    }

    #[test]
    fn it_is_given_up_after_some_attempts() {
        let (attempts, seen, result) = dumped(u32::MAX);
        assert_eq!((attempts, seen), (DUMP_ATTEMPTS, vec![1, 2]));
        assert!(matches!(result, Err(NetlinkError::Interrupted)));
    }
}
