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
//!     [ct bytes < N accept]                    # both directions together, this packet included
//!     meta pkttype != host accept              # multicast routing
//!     ip ihl != 5 accept                       # IPv4 options
//!     ip6 nexthdr != tcp ip6 nexthdr != udp accept   # extension headers
//!     meta l4proto tcp ct status & assured != 0 tcp flags & (fin|syn|rst) == 0 <once> log ...
//!     meta l4proto udp ct status & seen-reply != 0                             <once> log ...
//!   }
//! }
//! <once> = add @sighted { iif . ct id . ct direction counter limit rate 1/hour burst 1 packets }
//! ```
//! What a rule accepts leaves this chain only; packets never meet a verdict other than accept here.
//!
//! Things to know:
//! - The counter of an element says how many packets were forwarded in software since the sight:
//!   what an offload that works leaves alone ([`Ledger::counted`]).
//! - The token of an element comes back after an hour: a connection that is still forwarded in
//!   software is sighted again then.
//! - An entry's id is a hash over its address and its original tuple, and the kernel may give the
//!   same address to the same tuple again: **[`Ledger::rearm`] the keys of a connection when it
//!   ends**, or its successor may go unseen. Elements do not go by themselves either.
//! - The rule tests `assured`, which a connection keeps while it closes, and the ACK of a FIN
//!   carries no FIN: after a re-arm it is a sight. The state in the record
//!   ([`CtEntry::tcp_state`](super::conntrack::CtEntry::tcp_state)) tells.
//! - With the rule on bytes the kernel switches accounting (`net.netfilter.nf_conntrack_acct`) on for
//!   the namespace, and leaves it on. Connections that are older than that have no counters: to the
//!   rule they never carry anything.
//! - A helper that came with an expectation (H.245) does not set the status bit; the record's
//!   [`CtEntry::helper`](super::conntrack::CtEntry::helper) tells.
//! - Fragments do not get here: conntrack, which the `ct` expressions switch on for the namespace,
//!   reassembles them before. Should one come all the same, the kernel does not load a transport
//!   header from it, and the TCP rule does not match.
//! - A full set logs nothing: compare [`Ledger::len`] with [`Ledger::size`].

use std::collections::HashMap;

use netdev_providers::netlink::error::KernelError;
use netdev_providers::netlink::netfilter::NFGENMSG_LEN;
use netdev_providers::netlink::netfilter::nft::expr::{self, Cmp};
use netdev_providers::netlink::netfilter::nft::set::{
    NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE, element_keys, element_packets, elements,
};
use netdev_providers::netlink::netfilter::nft::table::{self, NFT_TYPE_IFINDEX, NetdevSet};
use netdev_providers::netlink::netfilter::nft::*;
use netdev_providers::netlink::socket::{ACK, CREATE, DUMP, EXCL};
use netdev_providers::netlink::wire::Received;
use netdev_providers::netlink::{Family, Message, NetlinkError, Socket};
use netdev_providers::{Direction, Ifindex};
use nix::errno::Errno;
use tracing::{debug, warn};

use super::conntrack::{CtId, CtStatus};

/// `NF_IP_PRI_FILTER` (`linux/netfilter_ipv4.h`).
const NF_IP_PRI_FILTER: u32 = 0;
/// What `nft` calls the key type (its `enum datatypes`; the kernel does not care): the concatenation
/// `iface_index . integer . ct_dir`, six bits each.
const NFT_TYPE_SIGHTED: u32 = NFT_TYPE_IFINDEX << 12 | 4 << 6 | 27;
/// What `nft` 1.0.6 stores beside a set so that it can list it: `typeof meta iif . ct id . ct direction`.
const SIGHTED_USERDATA: &[u8] = &[
    0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x03, 0x44, 0x00, 0x04, 0x0d, 0x00, 0x00, 0x00, 0x01, 0x3c,
    0x00, 0x0e, 0x00, 0x04, 0x09, 0x00, 0x00, 0x00, 0x01, 0x06, 0x00, 0x04, 0x04, 0x00, 0x00, 0x00,
    0x01, 0x14, 0x00, 0x04, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x0c, 0x00, 0x04, 0x17, 0x00, 0x00, 0x00,
    0x01, 0x04, 0xff, 0xff, 0xff, 0xff, 0x02, 0x14, 0x00, 0x04, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x0c,
    0x00, 0x04, 0x01, 0x00, 0x00, 0x00, 0x01, 0x04, 0xff, 0xff, 0xff, 0xff,
];

const PORTS: NetdevSet = NetdevSet { name: "ports", id: 1 };
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
    /// Do not sight connections before conntrack has counted so many bytes of their IP packets, both
    /// directions together; 0: at once.
    pub min_bytes: u64,
    /// Do not sight connections that a flowtable has taken (`IPS_OFFLOAD`). The daemon has it off:
    /// a flowtable on some netdevs can stand beside other providers on others.
    pub skip_offloaded: bool,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            table: "ctoffload".to_owned(),
            group: 0xc70f,
            size: 1 << 20,
            one_way_udp: false,
            min_bytes: 0,
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

const NEEDS_NFT: &str = "nf_tables (CONFIG_NF_TABLES)";
const NEEDS_INET: &str = "family inet of nf_tables (CONFIG_NF_TABLES_INET)";
const NEEDS_CT: &str = "nft_ct (CONFIG_NFT_CT) and nf_conntrack (CONFIG_NF_CONNTRACK)";
const NEEDS_LOG: &str = "nft_ct, nft_limit, nft_log and nfnetlink_log (CONFIG_NFT_CT, \
                         CONFIG_NFT_LIMIT, CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG)";
const NEEDS_XFRM: &str = "CONFIG_XFRM";

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
        self.change_ports(Errno::EEXIST, |t, table| {
            PORTS.add(t, Step::new("adding a port", NEEDS_NFT), table, &[port]);
        })
    }

    /// Sights nothing on this netdev from now on; its elements stay. A netdev that is no port is
    /// success.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange.
    pub fn port_del(&mut self, port: Ifindex) -> Result<(), LedgerError> {
        self.change_ports(Errno::ENOENT, |t, table| {
            PORTS.delete(t, Step::new("removing a port", NEEDS_NFT), table, &[port]);
        })
    }

    fn change_ports(
        &mut self,
        done_already: Errno,
        change: impl FnOnce(&mut Transaction<'_>, &str),
    ) -> Result<(), LedgerError> {
        let mut t = Transaction::new(&mut self.socket);
        change(&mut t, &self.config.table);
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
        t.add(Step::new("re-arming", NEEDS_NFT), NFT_MSG_DESTROYSETELEM, 0, |m| {
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
            for key in &keys {
                t.add(Step::new("re-arming", NEEDS_NFT), NFT_MSG_DELSETELEM, 0, |m| {
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
        let mut keys = Vec::new();
        self.dump(SIGHTED, &mut keys, |m, keys| {
            keys.extend(element_keys(m).filter_map(LedgerKey::from_bytes));
        })?;
        // A hash table that grows during the walk shows some elements twice.
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }

    /// The same, with how many packets of each have passed in software since it was sighted.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn counted(&mut self) -> Result<HashMap<LedgerKey, u64>, LedgerError> {
        let mut counted = HashMap::new();
        self.dump(SIGHTED, &mut counted, |m, counted| {
            let elements = element_packets(m);
            counted.extend(elements.filter_map(|(k, n)| Some((LedgerKey::from_bytes(k)?, n))));
        })?;
        Ok(counted)
    }

    /// The netdevs that are sighted on, sorted.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn ports(&mut self) -> Result<Vec<Ifindex>, LedgerError> {
        let mut ports = Vec::new();
        self.dump(PORTS.name, &mut ports, |m, ports| {
            let index = |b: &[u8]| Ifindex::new(u32::from_ne_bytes(b.try_into().ok()?));
            ports.extend(element_keys(m).filter_map(index));
        })?;
        ports.sort_unstable();
        ports.dedup();
        Ok(ports)
    }

    /// Collects what each message of a dump has; after an interruption from the start.
    fn dump<C: Default>(
        &mut self,
        set: &str,
        into: &mut C,
        collect: impl Fn(&Received<'_>, &mut C),
    ) -> Result<(), LedgerError> {
        let mut tries = 0;
        loop {
            let seq = self.socket.next_seq();
            let buf = get(NFT_MSG_GETSETELEM, DUMP, seq, |m| {
                m.str(NFTA_SET_ELEM_LIST_TABLE, &self.config.table)
                    .str(NFTA_SET_ELEM_LIST_SET, set);
            });
            *into = C::default();
            let done = self.socket.dump(&buf, seq, |m| collect(&m, into));
            match done {
                Ok(()) => return Ok(()),
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
        table::delete(&mut t, Step::new("deleting the table", NEEDS_NFT), table);
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
    table::make_owned(t, Step::new("the table", NEEDS_NFT), table);
    PORTS.make(t, Step::new("the set of ports", NEEDS_NFT), table);
    t.add(Step::new("the set of sights", NEEDS_NFT), NFT_MSG_NEWSET, CREATE | EXCL, |m| {
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
    table::make_forward_chain(t, Step::new("the chain", NEEDS_INET), table, CHAIN, PRIORITY);
    let mut rule = |step, fill: &dyn Fn(&mut Message<'_>)| {
        table::append_rule(t, step, table, CHAIN, fill);
    };
    rule(Step::new("the rule on ports", NEEDS_NFT), &|m| {
        PORTS.unless_in(m, expr::NFT_META_IIF);
        expr::accept(m);
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
    rule(Step::new("the rule on conntrack status", NEEDS_CT), &|m| {
        expr::ct(m, expr::NFT_CT_STATUS, expr::NFT_REG_1);
        expr::mask(m, &never.to_ne_bytes());
        expr::cmp(m, Cmp::Neq, &0u32.to_ne_bytes());
        expr::accept(m);
    });
    if config.min_bytes > 0 {
        rule(Step::new("the rule on bytes", NEEDS_CT), &|m| {
            expr::ct(m, expr::NFT_CT_BYTES, expr::NFT_REG_1);
            expr::to_be64(m);
            expr::cmp(m, Cmp::Lt, &config.min_bytes.to_be_bytes());
            expr::accept(m);
        });
    }
    if with_xfrm {
        let xfrm = |what| Step { what, needs: NEEDS_XFRM, optional: true };
        rule(xfrm("the rule on packets from IPsec"), &|m| {
            expr::meta(m, expr::NFT_META_SECPATH, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &[1]);
            expr::accept(m);
        });
        rule(xfrm("the rule on packets into IPsec"), &|m| {
            expr::rt(m, expr::NFT_RT_XFRM, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &[1]);
            expr::accept(m);
        });
    }
    rule(Step::new("the rule on multicast", NEEDS_NFT), &|m| {
        expr::meta(m, expr::NFT_META_PKTTYPE, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Neq, &[0]); // PACKET_HOST
        expr::accept(m);
    });
    rule(Step::new("the rule on IPv4 options", NEEDS_NFT), &|m| {
        expr::meta(m, expr::NFT_META_NFPROTO, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Eq, &[NFPROTO_IPV4]);
        expr::payload(m, expr::NFT_PAYLOAD_NETWORK_HEADER, 0, 1);
        expr::mask(m, &[0x0f]);
        expr::cmp(m, Cmp::Neq, &[5]);
        expr::accept(m);
    });
    rule(Step::new("the rule on IPv6 extension headers", NEEDS_NFT), &|m| {
        expr::meta(m, expr::NFT_META_NFPROTO, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Eq, &[NFPROTO_IPV6]);
        expr::payload(m, expr::NFT_PAYLOAD_NETWORK_HEADER, 6, 1);
        expr::cmp(m, Cmp::Neq, &[6]);
        expr::cmp(m, Cmp::Neq, &[17]);
        expr::accept(m);
    });
    let once = |m: &mut Message<'_>| {
        expr::meta(m, expr::NFT_META_IIF, expr::NFT_REG_1);
        expr::ct(m, expr::NFT_CT_ID, expr::NFT_REG32_01);
        expr::ct(m, expr::NFT_CT_DIRECTION, expr::NFT_REG32_02);
        expr::add_counting_once_an_hour(m, SIGHTED, SIGHTED_ID);
        expr::log(m, config.group, SNAPLEN);
    };
    let status = |m: &mut Message<'_>, bits: u32| {
        expr::ct(m, expr::NFT_CT_STATUS, expr::NFT_REG_1);
        expr::mask(m, &bits.to_ne_bytes());
        expr::cmp(m, Cmp::Neq, &0u32.to_ne_bytes());
    };
    rule(Step::new("the rule on TCP", NEEDS_LOG), &|m| {
        expr::meta(m, expr::NFT_META_L4PROTO, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Eq, &[6]);
        status(m, CtStatus::ASSURED);
        expr::payload(m, expr::NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1);
        expr::mask(m, &[0x07]); // RST | SYN | FIN
        expr::cmp(m, Cmp::Eq, &[0]);
        once(m);
    });
    rule(Step::new("the rule on UDP", NEEDS_LOG), &|m| {
        expr::meta(m, expr::NFT_META_L4PROTO, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Eq, &[17]);
        if !config.one_way_udp {
            status(m, CtStatus::SEEN_REPLY);
        }
        once(m);
    });
}

#[cfg(test)]
mod tests;
