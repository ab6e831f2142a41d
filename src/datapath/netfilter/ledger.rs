//! The sight ledger: an nf_tables table of our own whose rule logs a packet **once** per (netdev,
//! connection, direction), and remembers that it did.
//!
//! ```text
//! table inet ctoffload {                       # owned by our socket: gone when it closes
//!   set ports   { type iface_index; }
//!   set sighted { typeof iif . ct id . ct direction; size N; flags dynamic; }
//!   chain sight { type filter hook forward priority filter + 10; policy accept;
//!     iif != @ports accept
//!     ct status & (seq-adjust|dying|nat-clash|template|helper[|offload|hw-offload]) != 0 accept
//!     meta secpath exists accept               # came out of an IPsec tunnel
//!     rt ipsec exists accept                   # goes into one
//!     meta pkttype != host accept              # multicast routing
//!     ip ihl != 5 accept                       # IPv4 options
//!     ip6 nexthdr != tcp ip6 nexthdr != udp accept   # extension headers
//!     meta l4proto tcp ct status & assured != 0 tcp flags & (fin|syn|rst) == 0 <once> log ...
//!     meta l4proto udp ct status & seen-reply != 0                             <once> log ...
//!   }
//! }
//! <once> = add @sighted { iif . ct id . ct direction limit rate 1/hour burst 1 packets }
//! ```
//! What a rule accepts leaves this chain only; packets never meet a verdict other than accept here.
//!
//! Things to know:
//! - The token of an element comes back after an hour: a connection that is still forwarded in
//!   software is sighted again then.
//! - An entry's id is a hash over its address and its original tuple, and the kernel may give the
//!   same address to the same tuple again: **[`Ledger::rearm`] the keys of a connection when it
//!   ends**, or its successor may go unseen. Elements do not go by themselves either.
//! - The rule tests `assured`, which a connection keeps while it closes, and the ACK of a FIN
//!   carries no FIN: after a re-arm it is a sight. The state in the record
//!   ([`CtEntry::tcp_state`](super::conntrack::CtEntry::tcp_state)) tells.
//! - A helper that came with an expectation (H.245) does not set the status bit; the record's
//!   [`CtEntry::helper`](super::conntrack::CtEntry::helper) tells.
//! - Fragments do not get here: conntrack, which the `ct` expressions switch on for the namespace,
//!   reassembles them before. Should one come all the same, the kernel does not load a transport
//!   header from it, and the TCP rule does not match.
//! - A full set logs nothing: compare [`Ledger::len`] with [`Ledger::size`].

use std::time::Duration;

use netdev_providers::netlink::error::KernelError;
use netdev_providers::netlink::socket::{ACK, Ack, CREATE, DUMP, EXCL, REQUEST};
use netdev_providers::netlink::wire::Received;
use netdev_providers::netlink::{Family, Message, NetlinkError, Socket};
use netdev_providers::{Direction, Ifindex};
use nix::errno::Errno;
use tracing::{debug, warn};

use super::conntrack::{CtId, CtStatus};
use super::nft::{self, Cmp};
use super::{NFGENMSG_LEN, SUBSYS_NFTABLES, msg_type, nfgenmsg};

// linux/netfilter/nfnetlink.h
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
// linux/netfilter/nf_tables.h: enum nf_tables_msg_types
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_GETSET: u16 = 10;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFT_MSG_DELSETELEM: u16 = 14;
const NFT_MSG_DESTROYSETELEM: u16 = 30; // since 6.3
// enum nft_table_attributes, nft_table_flags
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFT_TABLE_F_OWNER: u32 = 2;
// enum nft_chain_attributes, nft_hook_attributes
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NF_INET_FORWARD: u32 = 2; // linux/netfilter.h
const NF_ACCEPT: u32 = 1;
const NF_IP_PRI_FILTER: u32 = 0;
// enum nft_set_attributes, nft_set_desc_attributes, nft_set_flags
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DESC: u16 = 9;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_USERDATA: u16 = 13;
const NFTA_SET_COUNT: u16 = 20; // newer kernels only
const NFTA_SET_DESC_SIZE: u16 = 1;
const NFT_SET_EVAL: u32 = 0x20;
// enum nft_set_elem_list_attributes, nft_set_elem_attributes
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
// enum nft_rule_attributes
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;

/// `NLM_F_APPEND`.
const APPEND: u16 = 0x800;
/// `NFPROTO_INET` (`linux/netfilter.h`).
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// What `nft` calls the key types (its `enum datatypes`; the kernel does not care): `iface_index`,
/// and the concatenation `iface_index . integer . ct_dir`, six bits each.
const NFT_TYPE_IFINDEX: u32 = 20;
const NFT_TYPE_SIGHTED: u32 = 20 << 12 | 4 << 6 | 27;
/// What `nft` 1.0.6 stores beside a set so that it can list it: the byte order of the key.
const PORTS_USERDATA: &[u8] = &[0x00, 0x04, 0x01, 0x00, 0x00, 0x00];
/// The same for `typeof meta iif . ct id . ct direction`.
const SIGHTED_USERDATA: &[u8] = &[
    0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x03, 0x44, 0x00, 0x04, 0x0d, 0x00, 0x00, 0x00, 0x01, 0x3c,
    0x00, 0x0e, 0x00, 0x04, 0x09, 0x00, 0x00, 0x00, 0x01, 0x06, 0x00, 0x04, 0x04, 0x00, 0x00, 0x00,
    0x01, 0x14, 0x00, 0x04, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x0c, 0x00, 0x04, 0x17, 0x00, 0x00, 0x00,
    0x01, 0x04, 0xff, 0xff, 0xff, 0xff, 0x02, 0x14, 0x00, 0x04, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x0c,
    0x00, 0x04, 0x01, 0x00, 0x00, 0x00, 0x01, 0x04, 0xff, 0xff, 0xff, 0xff,
];

const PORTS: &str = "ports";
const PORTS_ID: u32 = 1;
const SIGHTED: &str = "sighted";
const SIGHTED_ID: u32 = 2;
const SIGHTED_KEY_LEN: u32 = 12;
const CHAIN: &str = "sight";
/// After the chains that filter at priority 0, so that only what they accepted is sighted.
const PRIORITY: u32 = NF_IP_PRI_FILTER + 10;
/// The L3 and L4 headers: 40 + 20 bytes in IPv6, rounded up.
const SNAPLEN: u32 = 64;

/// Elements that one message names (28 bytes each; an attribute holds 64 kB).
const KEYS_PER_MESSAGE: usize = 1024;
/// Deletions in one send where each is a message of its own (about 100 bytes; the default send
/// buffer holds 212 kB).
const MESSAGES_PER_SEND: usize = 512;
/// How often a dump that other changes interrupted is repeated before the caller has to decide.
const DUMP_TRIES: u32 = 8;
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Why the ledger could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A table of that name belongs to another process that is alive.
    #[error(
        "table inet {table} belongs to another process: is another daemon running in this network namespace?"
    )]
    AlreadyOwned {
        /// The table's name.
        table: String,
    },
    /// A table of that name exists and belongs to no process: ours always do, so it is a person's.
    #[error(
        "table inet {table} exists and is not ours: rename or delete it (`nft delete table inet {table}`)"
    )]
    TableExists {
        /// The table's name.
        table: String,
    },
    /// The kernel lacks something.
    #[error("the kernel lacks what {what} needs: {needs}")]
    Unsupported {
        /// Which part of the table.
        what: &'static str,
        /// The modules and configuration symbols that provide it.
        needs: &'static str,
        /// What the kernel said.
        #[source]
        source: KernelError,
    },
    /// `CAP_NET_ADMIN` in the user namespace of the network namespace is needed.
    #[error("changing nf_tables needs CAP_NET_ADMIN")]
    NotPermitted,
    /// A configuration that no table can have.
    #[error("{0}")]
    BadConfig(&'static str),
    /// The kernel refused a part of a transaction, and so all of it.
    #[error("nf_tables refused {what}")]
    Refused {
        /// Which part.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: KernelError,
    },
    /// The exchange failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// What the ledger is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerConfig {
    /// Name of the table in family `inet`.
    pub table: String,
    /// The nfnetlink_log group that sights go to: the one given to
    /// [`SightLog::open`](super::nflog::SightLog::open).
    pub group: u16,
    /// How many (netdev, connection, direction) it can hold; kernel memory is taken as they come.
    pub size: u32,
    /// Sight UDP connections that never had a reply, from their second packet on.
    pub one_way_udp: bool,
    /// Do not sight connections that a flowtable has taken (`IPS_OFFLOAD`). Off when a flowtable on
    /// some netdevs is to stand beside other providers on others.
    pub skip_offloaded: bool,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            table: "ctoffload".to_owned(),
            group: 0xc70f,
            size: 1 << 20,
            one_way_udp: false,
            skip_offloaded: true,
        }
    }
}

/// One element of the ledger: this netdev has seen this direction of this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LedgerKey {
    /// The ingress netdev.
    pub iif: Ifindex,
    /// The connection.
    pub ct_id: CtId,
    /// The packet's direction within the connection.
    pub direction: Direction,
}

impl LedgerKey {
    /// As the registers hold it: ifindex in host order, the id as ctnetlink shows it, the direction
    /// in the first byte of its four.
    fn to_bytes(self) -> [u8; SIGHTED_KEY_LEN as usize] {
        let mut b = [0; SIGHTED_KEY_LEN as usize];
        b[..4].copy_from_slice(&self.iif.get().to_ne_bytes());
        b[4..8].copy_from_slice(&self.ct_id.0.to_be_bytes());
        b[8] = self.direction as u8;
        b
    }

    fn from_bytes(b: &[u8]) -> Option<Self> {
        let b: &[u8; SIGHTED_KEY_LEN as usize] = b.try_into().ok()?;
        Some(Self {
            iif: Ifindex::new(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))?,
            ct_id: CtId(u32::from_be_bytes([b[4], b[5], b[6], b[7]])),
            direction: match b[8] {
                0 => Direction::Original,
                1 => Direction::Reply,
                _ => return None,
            },
        })
    }
}

/// One message of a transaction: what it is for people, and what the kernel must have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    what: &'static str,
    needs: &'static str,
    /// A rule against something that a kernel which refuses the rule cannot have.
    optional: bool,
}

const fn step(what: &'static str, needs: &'static str) -> Step {
    Step { what, needs, optional: false }
}

const NEEDS_NFT: &str = "nf_tables (CONFIG_NF_TABLES)";
const NEEDS_INET: &str = "family inet of nf_tables (CONFIG_NF_TABLES_INET)";
const NEEDS_CT: &str = "nft_ct (CONFIG_NFT_CT) and nf_conntrack (CONFIG_NF_CONNTRACK)";
const NEEDS_LOG: &str = "nft_ct, nft_limit, nft_log and nfnetlink_log (CONFIG_NFT_CT, \
                         CONFIG_NFT_LIMIT, CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG)";
const NEEDS_XFRM: &str = "CONFIG_XFRM";

/// A batch of nf_tables messages: all of it takes effect, or nothing.
struct Transaction<'a> {
    socket: &'a mut Socket,
    buf: Vec<u8>,
    first_seq: u32,
    steps: Vec<Step>,
}

impl<'a> Transaction<'a> {
    fn new(socket: &'a mut Socket) -> Self {
        let first_seq = socket.next_seq();
        let mut buf = Vec::with_capacity(4096);
        let mut m = Message::new(&mut buf, NFNL_MSG_BATCH_BEGIN, REQUEST, first_seq);
        m.raw(&nfgenmsg(0, SUBSYS_NFTABLES));
        m.finish();
        Self { socket, buf, first_seq, steps: Vec::new() }
    }

    /// Adds a message; the first step has the sequence number after the begin message's.
    fn add(
        &mut self,
        step: Step,
        last: bool,
        msg: u16,
        flags: u16,
        fill: impl FnOnce(&mut Message<'_>),
    ) {
        let seq = self.socket.next_seq();
        self.steps.push(step);
        let flags = REQUEST | flags | if last { ACK } else { 0 };
        let mut m = Message::new(&mut self.buf, msg_type(SUBSYS_NFTABLES, msg), flags, seq);
        m.raw(&nfgenmsg(NFPROTO_INET, 0));
        fill(&mut m);
        m.finish();
    }

    /// Sends it; one answer per step. The kernel goes on after a failure to report all of them, and
    /// answers in order, so the last step's answer (it asks for one) is the end.
    ///
    /// An error means that not the steps, but the transaction as such was refused.
    fn commit(mut self) -> Result<Vec<(Step, Ack)>, NetlinkError> {
        let end = self.socket.next_seq();
        let mut m = Message::new(&mut self.buf, NFNL_MSG_BATCH_END, REQUEST, end);
        m.raw(&nfgenmsg(0, SUBSYS_NFTABLES));
        m.finish();
        // The begin message is item 0: what is answered to it concerns all.
        let count = self.steps.len() + 1;
        let mut acks: Vec<Ack> = vec![Ok(()); count];
        self.socket.send(&self.buf)?;
        let mut whole = false;
        let mut ended = false;
        while !ended {
            // All answers are queued before the send returns; after a refusal of the whole there
            // may be none to the last step.
            let within = if whole { Duration::ZERO } else { ANSWER_WITHIN };
            let got = self.socket.recv(within, |answers| {
                for m in answers {
                    let index = m.seq.wrapping_sub(self.first_seq) as usize;
                    if let (Some(slot), Some(ack)) = (acks.get_mut(index), m.ack()) {
                        *slot = ack;
                        whole |= index == 0;
                        ended |= index + 1 == count;
                    }
                }
            });
            match got {
                Ok(()) => {}
                Err(NetlinkError::TimedOut(_)) if whole => break,
                Err(e) => return Err(e),
            }
        }
        let mut acks = acks.into_iter();
        if let Some(Err(refused)) = acks.next() {
            return Err(refused.into());
        }
        Ok(self.steps.into_iter().zip(acks).collect())
    }
}

/// The table, for as long as this value lives: it belongs to the socket inside, and the kernel
/// removes it when the socket closes, also after `kill -9`. Others can list it, not change it.
#[derive(Debug)]
pub struct Ledger {
    socket: Socket,
    config: LedgerConfig,
    /// Whether the kernel knows `NFT_MSG_DESTROYSETELEM`; unknown until first tried.
    destroy: Option<bool>,
}

impl Ledger {
    /// Creates the table in the network namespace of the calling thread, with no port yet. This
    /// also switches conntrack on in the namespace.
    ///
    /// # Errors
    /// [`LedgerError::AlreadyOwned`], [`LedgerError::TableExists`], and what the kernel lacks;
    /// nothing is left behind.
    pub fn install(config: LedgerConfig) -> Result<Self, LedgerError> {
        if config.table.is_empty() || config.table.len() > 127 || config.table.contains('\0') {
            return Err(LedgerError::BadConfig("the ledger's table name: 1 to 127 bytes"));
        }
        if config.size == 0 {
            return Err(LedgerError::BadConfig("the ledger's size: at least 1"));
        }
        let mut socket = Socket::open(Family::Netfilter)?;
        let first = install_into(&mut socket, &config, true);
        let result = match first {
            Err(LedgerError::Unsupported { needs: NEEDS_XFRM, source, .. }) => {
                debug!(%source, "no IPsec in this kernel: rules about it are left out");
                install_into(&mut socket, &config, false)
            }
            other => other,
        };
        result?;
        debug!(table = %config.table, size = config.size, group = config.group, "ledger installed");
        Ok(Self { socket, config, destroy: None })
    }

    /// What it was installed with.
    #[must_use]
    pub const fn config(&self) -> &LedgerConfig {
        &self.config
    }

    /// The netlink port id that our own changes of nf_tables are announced with.
    ///
    /// # Errors
    /// When the socket does not tell.
    pub fn port_id(&self) -> Result<u32, LedgerError> {
        Ok(self.socket.port_id()?)
    }

    /// Sights packets that come in on this netdev from now on. A netdev that is a port already is
    /// success. The set holds a bare ifindex: [`port_del`](Self::port_del) when the netdev goes.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange.
    pub fn port_add(&mut self, port: Ifindex) -> Result<(), LedgerError> {
        self.change_port(port, NFT_MSG_NEWSETELEM, CREATE, Errno::EEXIST, "adding a port")
    }

    /// Sights nothing on this netdev from now on; its elements stay. A netdev that is no port is
    /// success.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange.
    pub fn port_del(&mut self, port: Ifindex) -> Result<(), LedgerError> {
        self.change_port(port, NFT_MSG_DELSETELEM, 0, Errno::ENOENT, "removing a port")
    }

    fn change_port(
        &mut self,
        port: Ifindex,
        msg: u16,
        flags: u16,
        done_already: Errno,
        what: &'static str,
    ) -> Result<(), LedgerError> {
        let table = &self.config.table;
        let mut t = Transaction::new(&mut self.socket);
        t.add(step(what, NEEDS_NFT), true, msg, flags, |m| {
            elements(m, table, PORTS, [port.get().to_ne_bytes()].iter());
        });
        match first_refusal(t.commit()?) {
            None => Ok(()),
            Some((_, e)) if e.errno == done_already => Ok(()),
            Some((step, source)) => Err(LedgerError::Refused { what: step.what, source }),
        }
    }

    /// Removes elements, so that the next packet of each is sighted again. Elements that do not
    /// exist are passed over. When it returns, packets already see the change.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange; some elements may be removed then.
    pub fn rearm(&mut self, keys: &[LedgerKey]) -> Result<(), LedgerError> {
        let mut rest = keys;
        while !rest.is_empty() {
            if self.destroy != Some(false) {
                let (now, later) = rest.split_at(rest.len().min(KEYS_PER_MESSAGE));
                if self.destroy_elements(now)? {
                    rest = later;
                    continue;
                }
            }
            let (now, later) = rest.split_at(rest.len().min(MESSAGES_PER_SEND));
            self.delete_elements(now)?;
            rest = later;
        }
        Ok(())
    }

    /// One message for all, since 6.3. `false` when the kernel does not know the message.
    fn destroy_elements(&mut self, keys: &[LedgerKey]) -> Result<bool, LedgerError> {
        let table = &self.config.table;
        let mut t = Transaction::new(&mut self.socket);
        t.add(step("re-arming", NEEDS_NFT), true, NFT_MSG_DESTROYSETELEM, 0, |m| {
            elements(m, table, SIGHTED, keys.iter().map(|k| k.to_bytes()));
        });
        match first_refusal(t.commit()?) {
            None => {
                self.destroy = Some(true);
                Ok(true)
            }
            // The answer of nfnetlink to a message type that the subsystem does not have.
            Some((_, e)) if e.errno == Errno::EINVAL && self.destroy.is_none() => {
                self.destroy = Some(false);
                Ok(false)
            }
            Some((step, source)) => Err(LedgerError::Refused { what: step.what, source }),
        }
    }

    /// One message each: a missing element fails the transaction, but every missing one is reported
    /// in the same go, so the second attempt is without them. Only a change of the set in between
    /// can ask for a third, and we alone delete.
    fn delete_elements(&mut self, keys: &[LedgerKey]) -> Result<(), LedgerError> {
        let mut keys = keys.to_vec();
        while !keys.is_empty() {
            let table = &self.config.table;
            let mut t = Transaction::new(&mut self.socket);
            for (i, key) in keys.iter().enumerate() {
                let last = i + 1 == keys.len();
                t.add(step("re-arming", NEEDS_NFT), last, NFT_MSG_DELSETELEM, 0, |m| {
                    elements(m, table, SIGHTED, [key.to_bytes()].iter());
                });
            }
            let answers = t.commit()?;
            let mut there = Vec::with_capacity(keys.len());
            for (key, (step, ack)) in keys.iter().zip(&answers) {
                match ack {
                    Ok(()) => there.push(*key),
                    Err(e) if e.errno == Errno::ENOENT => {}
                    Err(e) => {
                        return Err(LedgerError::Refused { what: step.what, source: e.clone() });
                    }
                }
            }
            if there.len() == keys.len() {
                return Ok(());
            }
            keys = there;
        }
        Ok(())
    }

    /// All that stands in the ledger, sorted: what a lost log message is found by.
    ///
    /// # Errors
    /// [`NetlinkError::Interrupted`] when the ruleset changed during each of several dumps.
    pub fn sighted(&mut self) -> Result<Vec<LedgerKey>, LedgerError> {
        self.dump(SIGHTED, LedgerKey::from_bytes)
    }

    /// The netdevs that are sighted on, sorted.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn ports(&mut self) -> Result<Vec<Ifindex>, LedgerError> {
        self.dump(PORTS, |b| Ifindex::new(u32::from_ne_bytes(b.try_into().ok()?)))
    }

    fn dump<K: Ord>(
        &mut self,
        set: &str,
        parse: impl Fn(&[u8]) -> Option<K>,
    ) -> Result<Vec<K>, LedgerError> {
        let mut tries = 0;
        loop {
            let seq = self.socket.next_seq();
            let buf = get(NFT_MSG_GETSETELEM, DUMP, seq, |m| {
                m.str(NFTA_SET_ELEM_LIST_TABLE, &self.config.table)
                    .str(NFTA_SET_ELEM_LIST_SET, set);
            });
            let mut keys = Vec::new();
            let done = self.socket.dump(&buf, seq, |m| {
                keys.extend(element_keys(&m).filter_map(&parse));
            });
            match done {
                Ok(()) => {
                    // A hash table that grows during the walk shows some elements twice.
                    keys.sort_unstable();
                    keys.dedup();
                    return Ok(keys);
                }
                // Any change of any table in the namespace interrupts it.
                Err(NetlinkError::Interrupted) if tries < DUMP_TRIES => tries += 1,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// How many elements the ledger holds. Newer kernels count them; on others this dumps the set.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn len(&mut self) -> Result<usize, LedgerError> {
        let seq = self.socket.next_seq();
        let buf = get(NFT_MSG_GETSET, ACK, seq, |m| {
            m.str(NFTA_SET_TABLE, &self.config.table).str(NFTA_SET_NAME, SIGHTED);
        });
        let mut count = None;
        self.socket.request(&buf, seq, |m| {
            count = m.attrs(NFGENMSG_LEN).find_type(NFTA_SET_COUNT).and_then(|a| a.be32());
        })?;
        match count {
            Some(n) => Ok(n as usize),
            None => Ok(self.sighted()?.len()),
        }
    }

    /// Whether nothing was sighted yet.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn is_empty(&mut self) -> Result<bool, LedgerError> {
        Ok(self.len()? == 0)
    }

    /// How many elements it can hold: at [`len`](Self::len) = size nothing new is sighted.
    #[must_use]
    pub const fn size(&self) -> u32 {
        self.config.size
    }

    /// Removes the table now, and says so when that failed (dropping the value removes it too).
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange.
    pub fn remove(mut self) -> Result<(), LedgerError> {
        let table = &self.config.table;
        let mut t = Transaction::new(&mut self.socket);
        t.add(step("deleting the table", NEEDS_NFT), true, NFT_MSG_DELTABLE, 0, |m| {
            m.str(NFTA_TABLE_NAME, table);
        });
        match first_refusal(t.commit()?) {
            None => Ok(()),
            Some((_, e)) if e.errno == Errno::ENOENT => {
                warn!(table, "the ledger's table was gone already");
                Ok(())
            }
            Some((step, source)) => Err(LedgerError::Refused { what: step.what, source }),
        }
    }
}

fn first_refusal(answers: Vec<(Step, Ack)>) -> Option<(Step, KernelError)> {
    answers.into_iter().find_map(|(step, ack)| ack.err().map(|e| (step, e)))
}

fn install_into(
    socket: &mut Socket,
    config: &LedgerConfig,
    with_xfrm: bool,
) -> Result<(), LedgerError> {
    let mut t = Transaction::new(socket);
    describe(&mut t, config, with_xfrm);
    let answers = match t.commit() {
        Ok(answers) => answers,
        Err(NetlinkError::Kernel(source)) => {
            return Err(match source.errno {
                Errno::EPERM => LedgerError::NotPermitted,
                Errno::EOPNOTSUPP | Errno::EINVAL => {
                    LedgerError::Unsupported { what: "the ledger", needs: NEEDS_NFT, source }
                }
                _ => LedgerError::Refused { what: "the ledger", source },
            });
        }
        Err(e) => return Err(e.into()),
    };
    // What is optional is told only when nothing else is wrong.
    let refused: Vec<_> =
        answers.into_iter().filter_map(|(s, ack)| ack.err().map(|e| (s, e))).collect();
    let Some((step, source)) =
        refused.iter().find(|(s, _)| !s.optional).or_else(|| refused.first()).cloned()
    else {
        return Ok(());
    };
    let table = || config.table.clone();
    Err(match source.errno {
        // Whose table it is comes before everything else in the transaction.
        Errno::EPERM => LedgerError::AlreadyOwned { table: table() },
        Errno::EEXIST if step.what == "the table" => LedgerError::TableExists { table: table() },
        Errno::EOPNOTSUPP
        | Errno::ENOENT
        | Errno::EAFNOSUPPORT
        | Errno::EPROTONOSUPPORT
        | Errno::EPFNOSUPPORT => {
            LedgerError::Unsupported { what: step.what, needs: step.needs, source }
        }
        _ => LedgerError::Refused { what: step.what, source },
    })
}

/// The messages that make the table.
fn describe(t: &mut Transaction<'_>, config: &LedgerConfig, with_xfrm: bool) {
    let table = config.table.as_str();
    t.add(step("the table", NEEDS_NFT), false, NFT_MSG_NEWTABLE, CREATE | EXCL, |m| {
        m.str(NFTA_TABLE_NAME, table).be32(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER);
    });
    t.add(step("the set of ports", NEEDS_NFT), false, NFT_MSG_NEWSET, CREATE | EXCL, |m| {
        m.str(NFTA_SET_TABLE, table)
            .str(NFTA_SET_NAME, PORTS)
            .be32(NFTA_SET_FLAGS, 0)
            .be32(NFTA_SET_KEY_TYPE, NFT_TYPE_IFINDEX)
            .be32(NFTA_SET_KEY_LEN, 4)
            .be32(NFTA_SET_ID, PORTS_ID)
            .attr(NFTA_SET_USERDATA, PORTS_USERDATA);
    });
    t.add(step("the set of sights", NEEDS_NFT), false, NFT_MSG_NEWSET, CREATE | EXCL, |m| {
        m.str(NFTA_SET_TABLE, table)
            .str(NFTA_SET_NAME, SIGHTED)
            .be32(NFTA_SET_FLAGS, NFT_SET_EVAL)
            .be32(NFTA_SET_KEY_TYPE, NFT_TYPE_SIGHTED)
            .be32(NFTA_SET_KEY_LEN, SIGHTED_KEY_LEN)
            .be32(NFTA_SET_ID, SIGHTED_ID)
            .nested(NFTA_SET_DESC, |m| {
                m.be32(NFTA_SET_DESC_SIZE, config.size);
            })
            .attr(NFTA_SET_USERDATA, SIGHTED_USERDATA);
    });
    t.add(step("the chain", NEEDS_INET), false, NFT_MSG_NEWCHAIN, CREATE | EXCL, |m| {
        m.str(NFTA_CHAIN_TABLE, table)
            .str(NFTA_CHAIN_NAME, CHAIN)
            .str(NFTA_CHAIN_TYPE, "filter")
            .be32(NFTA_CHAIN_POLICY, NF_ACCEPT)
            .nested(NFTA_CHAIN_HOOK, |m| {
                m.be32(NFTA_HOOK_HOOKNUM, NF_INET_FORWARD).be32(NFTA_HOOK_PRIORITY, PRIORITY);
            });
    });
    let mut rule = |step, last, fill: &dyn Fn(&mut Message<'_>)| {
        t.add(step, last, NFT_MSG_NEWRULE, CREATE | APPEND, |m| {
            m.str(NFTA_RULE_TABLE, table).str(NFTA_RULE_CHAIN, CHAIN);
            m.nested(NFTA_RULE_EXPRESSIONS, fill);
        });
    };
    rule(step("the rule on ports", NEEDS_NFT), false, &|m| {
        nft::meta(m, nft::NFT_META_IIF, nft::NFT_REG_1);
        nft::lookup_not(m, PORTS, PORTS_ID);
        nft::accept(m);
    });
    // What nft_flow_offload.c and TC cannot offload, and what is offloaded or dying already.
    let mut never = CtStatus::SEQ_ADJUST
        | CtStatus::DYING
        | CtStatus::TEMPLATE
        | CtStatus::NAT_CLASH
        | CtStatus::HELPER;
    if config.skip_offloaded {
        never |= CtStatus::OFFLOAD | CtStatus::HW_OFFLOAD;
    }
    rule(step("the rule on conntrack status", NEEDS_CT), false, &|m| {
        nft::ct(m, nft::NFT_CT_STATUS, nft::NFT_REG_1);
        nft::mask(m, &never.to_ne_bytes());
        nft::cmp(m, Cmp::Neq, &0u32.to_ne_bytes());
        nft::accept(m);
    });
    if with_xfrm {
        let xfrm = |what| Step { what, needs: NEEDS_XFRM, optional: true };
        rule(xfrm("the rule on packets from IPsec"), false, &|m| {
            nft::meta(m, nft::NFT_META_SECPATH, nft::NFT_REG_1);
            nft::cmp(m, Cmp::Eq, &[1]);
            nft::accept(m);
        });
        rule(xfrm("the rule on packets into IPsec"), false, &|m| {
            nft::rt(m, nft::NFT_RT_XFRM, nft::NFT_REG_1);
            nft::cmp(m, Cmp::Eq, &[1]);
            nft::accept(m);
        });
    }
    rule(step("the rule on multicast", NEEDS_NFT), false, &|m| {
        nft::meta(m, nft::NFT_META_PKTTYPE, nft::NFT_REG_1);
        nft::cmp(m, Cmp::Neq, &[0]); // PACKET_HOST
        nft::accept(m);
    });
    rule(step("the rule on IPv4 options", NEEDS_NFT), false, &|m| {
        nft::meta(m, nft::NFT_META_NFPROTO, nft::NFT_REG_1);
        nft::cmp(m, Cmp::Eq, &[NFPROTO_IPV4]);
        nft::payload(m, nft::NFT_PAYLOAD_NETWORK_HEADER, 0, 1);
        nft::mask(m, &[0x0f]);
        nft::cmp(m, Cmp::Neq, &[5]);
        nft::accept(m);
    });
    rule(step("the rule on IPv6 extension headers", NEEDS_NFT), false, &|m| {
        nft::meta(m, nft::NFT_META_NFPROTO, nft::NFT_REG_1);
        nft::cmp(m, Cmp::Eq, &[NFPROTO_IPV6]);
        nft::payload(m, nft::NFT_PAYLOAD_NETWORK_HEADER, 6, 1);
        nft::cmp(m, Cmp::Neq, &[6]);
        nft::cmp(m, Cmp::Neq, &[17]);
        nft::accept(m);
    });
    let once = |m: &mut Message<'_>| {
        nft::meta(m, nft::NFT_META_IIF, nft::NFT_REG_1);
        nft::ct(m, nft::NFT_CT_ID, nft::NFT_REG32_01);
        nft::ct(m, nft::NFT_CT_DIRECTION, nft::NFT_REG32_02);
        nft::add_once_an_hour(m, SIGHTED, SIGHTED_ID);
        nft::log(m, config.group, SNAPLEN);
    };
    let status = |m: &mut Message<'_>, bits: u32| {
        nft::ct(m, nft::NFT_CT_STATUS, nft::NFT_REG_1);
        nft::mask(m, &bits.to_ne_bytes());
        nft::cmp(m, Cmp::Neq, &0u32.to_ne_bytes());
    };
    rule(step("the rule on TCP", NEEDS_LOG), false, &|m| {
        nft::meta(m, nft::NFT_META_L4PROTO, nft::NFT_REG_1);
        nft::cmp(m, Cmp::Eq, &[6]);
        status(m, CtStatus::ASSURED);
        nft::payload(m, nft::NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1);
        nft::mask(m, &[0x07]); // RST | SYN | FIN
        nft::cmp(m, Cmp::Eq, &[0]);
        once(m);
    });
    rule(step("the rule on UDP", NEEDS_LOG), true, &|m| {
        nft::meta(m, nft::NFT_META_L4PROTO, nft::NFT_REG_1);
        nft::cmp(m, Cmp::Eq, &[17]);
        if !config.one_way_udp {
            status(m, CtStatus::SEEN_REPLY);
        }
        once(m);
    });
}

/// The attributes of a message about elements of a set.
fn elements<K: AsRef<[u8]>>(
    m: &mut Message<'_>,
    table: &str,
    set: &str,
    keys: impl Iterator<Item = K>,
) {
    m.str(NFTA_SET_ELEM_LIST_TABLE, table).str(NFTA_SET_ELEM_LIST_SET, set);
    m.nested(NFTA_SET_ELEM_LIST_ELEMENTS, |m| {
        for key in keys {
            m.nested(nft::NFTA_LIST_ELEM, |m| {
                m.nested(NFTA_SET_ELEM_KEY, |m| {
                    m.attr(nft::NFTA_DATA_VALUE, key.as_ref());
                });
            });
        }
    });
}

/// The keys in one message of a set's dump.
fn element_keys<'a>(m: &Received<'a>) -> impl Iterator<Item = &'a [u8]> {
    m.attrs(NFGENMSG_LEN)
        .filter(|a| a.ty == NFTA_SET_ELEM_LIST_ELEMENTS)
        .flat_map(|list| list.nested().filter(|a| a.ty == nft::NFTA_LIST_ELEM))
        .filter_map(|e| e.nested().find_type(NFTA_SET_ELEM_KEY))
        .filter_map(|key| key.nested().find_type(nft::NFTA_DATA_VALUE))
        .map(|value| value.payload)
}

fn get(msg: u16, flags: u16, seq: u32, fill: impl FnOnce(&mut Message<'_>)) -> Vec<u8> {
    let mut buf = Vec::with_capacity(128);
    let mut m = Message::new(&mut buf, msg_type(SUBSYS_NFTABLES, msg), REQUEST | flags, seq);
    m.raw(&nfgenmsg(NFPROTO_INET, 0));
    fill(&mut m);
    m.finish();
    buf
}

#[cfg(test)]
mod tests;
