//! The sight ledger: an nf_tables table of our own whose rule logs a packet **once** per (netdev,
//! connection, direction), and remembers that it did.
//!
//! ```text
//! table inet ctoffload {                       # owned by our socket: gone when it closes
//!   set ports   { type iface_index; }
//!   set sighted { typeof iif . ct id . ct direction . ct original proto-src; size N; flags dynamic; }
//!   chain sight { type filter hook postrouting priority 2147483647; policy accept;
//!     iif != @ports accept
//!     ct status & (seq-adjust|dying|nat-clash|template|helper[|offload|hw-offload]) != 0 accept
//!     rt ipsec exists accept                   # goes into one
//!     [ct packets != 0 ct packets < N accept]  # both directions together, this packet included
//!     [ct bytes < N accept]                    # likewise
//!     meta pkttype != host accept              # multicast routing
//!     ip ihl != 5 accept                       # IPv4 options
//!     ip6 nexthdr != tcp ip6 nexthdr != udp accept   # extension headers
//!     meta l4proto tcp ct status & assured != 0 tcp flags & (fin|syn|rst) == 0 <once> log ...
//!     meta l4proto tcp ct status & assured != 0 tcp flags & rst != 0 ct expiration > 10s limit rate 1000/second log ...
//!     meta l4proto udp ct status & seen-reply != 0                             <once> log ...
//!   }
//!   chain from-ipsec { type filter hook forward priority 2147483647; policy accept;
//!     iif @ports meta secpath exists <once>    # came out of an IPsec tunnel: postrouting is not told
//!   }
//! }
//! <once> = add @sighted { iif . ct id . ct direction . ct original proto-src counter limit rate 1/hour burst 1 packets }
//! ```
//! **It is the last chain of the last hook**: what any chain of others drops before, in forward or in
//! postrouting, is never sighted. The kernel tells postrouting the ingress netdev of forwarded packets
//! (since 5.7); those of the router itself have none there. By then NAT has been done: addresses and
//! ports are those that the packet leaves with ([`CtEntry::outgoing`](super::conntrack::CtEntry::outgoing)).
//!
//! Where connections that a bridge forwards are to be sighted too ([`LedgerConfig::bridged`]), there is
//! a second table of the same kind, with sets of its own, in the bridge's forward hook:
//! ```text
//! table bridge ctoffload {
//!   chain sight { type filter hook forward priority 2147483647; policy accept;
//!     iif != @ports accept                     # a port of the bridge
//!     ct status & ...                          # as above; [ct packets ...], [ct bytes ...]
//!     meta pkttype != other accept             # flooded: broadcast, multicast
//!     ...                                      # as above
//!   }
//! }
//! ```
//! What a rule accepts leaves this chain only; packets never meet a verdict other than accept here.
//!
//! Things to know:
//! - The counter of an element says how many packets were forwarded in software since the sight:
//!   what an offload that works leaves alone ([`Ledger::counted`]).
//! - The token of an element comes back after an hour: a connection that is still forwarded in
//!   software is sighted again then.
//! - **An id is no name**: it is a hash of 32 bits, and among a million entries some hundred pairs have it in
//!   common. The second of a pair would never be sighted where the first was; so the source port
//!   of the original direction stands beside it, which two of such a pair have in common once in tens of
//!   thousands (and the token comes back after an hour).
//! - An entry's id is a hash over its address and its original tuple, and the kernel may give the
//!   same address to the same tuple again: **[`Ledger::rearm`] the keys of a connection when it
//!   ends**, or its successor may go unseen. Elements do not go by themselves either.
//! - The rule tests `assured`, which a connection keeps while it closes, and the ACK of a FIN
//!   carries no FIN: after a re-arm it is a sight. The state in the record
//!   ([`CtEntry::tcp_state`](super::conntrack::CtEntry::tcp_state)) tells.
//! - A RST is no sight: what is logged of them are those that conntrack did not believe and left more time than
//!   one that it believes ([`Sight::is_reset`](super::nflog::Sight::is_reset)).
//! - With the rules on packets and on bytes the kernel switches accounting (`net.netfilter.nf_conntrack_acct`) on for
//!   the namespace, and leaves it on. Connections that are older than that have no counters: to the
//!   rule on bytes they never carry anything; that on packets lets them pass.
//! - A helper that came with an expectation (H.245) does not set the status bit; the record's
//!   [`CtEntry::helper`](super::conntrack::CtEntry::helper) tells.
//! - Fragments do not get here: conntrack, which the `ct` expressions switch on for the namespace,
//!   reassembles them before. Should one come all the same, the kernel does not load a transport
//!   header from it, and the TCP rule does not match.
//! - A full set logs nothing: compare [`Ledger::len`] with [`Ledger::size`].
//! - In family `bridge` the `ct` expressions switch **bridge conntrack** on for the namespace
//!   (`nf_conntrack_bridge`, which the kernel loads for it), as long as the table stands: every IP
//!   packet that comes into a bridge there is tracked, in a VLAN or not, and fragments are reassembled
//!   and cut up again. Connections that were there before are picked up in the middle
//!   (`net.netfilter.nf_conntrack_tcp_loose`).
//! - A frame whose receiver the bridge does not know passes its forward hook once for every port that
//!   it is flooded to. The first of them is the sight.

mod rules;

use std::collections::HashMap;

use netdev_providers::netlink::error::KernelError;
use netdev_providers::netlink::modules::while_modules_come;
use netdev_providers::netlink::netfilter::NFGENMSG_LEN;
use netdev_providers::netlink::netfilter::nft::set::{
    NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE, element_keys, element_packets, elements,
};
use netdev_providers::netlink::netfilter::nft::table::{self, NetdevSet};
use netdev_providers::netlink::netfilter::nft::*;
use netdev_providers::netlink::socket::{ACK, DUMP};
use netdev_providers::netlink::wire::Received;
use netdev_providers::netlink::{Family, NetlinkError, Socket};
use netdev_providers::{Direction, Ifindex};
use nix::errno::Errno;
use tracing::{debug, warn};

pub use self::rules::{CHAIN, Hook, TCP_RST};
use self::rules::{NEEDS_NFT, NEEDS_XFRM, PORTS, SIGHTED, SIGHTED_KEY_LEN, describe};
use super::conntrack::CtId;

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
    #[error("table {table} of this network namespace belongs to another process: a second daemon?")]
    AlreadyOwned {
        /// The table's family and name.
        table: String,
    },
    /// A table of that name exists and belongs to no process: ours always do, so it is a person's.
    #[error(
        "table {table} exists and is not ours: rename or delete it (`nft delete table {table}`)"
    )]
    TableExists {
        /// The table's family and name.
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

impl LedgerError {
    /// Something is not there, or not yet.
    fn is_of_something_absent(&self) -> bool {
        matches!(self, Self::Unsupported { source, .. } if source.errno == Errno::ENOENT)
    }
}

/// What the ledger is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerConfig {
    /// Name of the table in family `inet`, and of that in family `bridge`.
    pub table: String,
    /// The nfnetlink_log group that sights go to: the one given to
    /// [`SightLog::open`](super::nflog::SightLog::open).
    pub group: u16,
    /// How many (netdev, connection, direction) each table can hold; kernel memory is taken as they
    /// come.
    pub size: u32,
    /// Sight also what bridges forward without routing it. Switches bridge conntrack on.
    pub bridged: bool,
    /// Sight UDP connections that never had a reply, from their second packet on.
    pub one_way_udp: bool,
    /// Do not sight connections before conntrack has counted so many of their packets, both directions
    /// together; 0: at once. Those that it does not count are sighted at once too.
    pub min_packets: u64,
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
            bridged: false,
            one_way_udp: false,
            min_packets: 0,
            min_bytes: 0,
            skip_offloaded: true,
        }
    }
}

impl LedgerConfig {
    /// The hooks that there is a table in.
    fn hooks(&self) -> impl Iterator<Item = Hook> + use<> {
        let bridged = self.bridged;
        Hook::BOTH.into_iter().filter(move |h| bridged || *h == Hook::Inet)
    }
}

/// One element of the ledger: this netdev has seen this direction of this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LedgerKey {
    /// Where.
    pub hook: Hook,
    /// The ingress netdev: the one that routed the packet, or the port of the bridge.
    pub iif: Ifindex,
    /// The connection, together with
    pub ct_id: CtId,
    /// the source port of its original direction.
    pub sport: u16,
    /// The packet's direction within the connection.
    pub direction: Direction,
}

impl LedgerKey {
    /// As the registers hold it: ifindex in host order, the id as ctnetlink shows it, the direction
    /// in the first byte of its four, the port in network order in the first two.
    fn to_bytes(self) -> [u8; SIGHTED_KEY_LEN as usize] {
        let mut b = [0; SIGHTED_KEY_LEN as usize];
        b[..4].copy_from_slice(&self.iif.get().to_ne_bytes());
        b[4..8].copy_from_slice(&self.ct_id.0.to_be_bytes());
        b[8] = self.direction as u8;
        b[12..14].copy_from_slice(&self.sport.to_be_bytes());
        b
    }

    fn from_bytes(hook: Hook, b: &[u8]) -> Option<Self> {
        let b: &[u8; SIGHTED_KEY_LEN as usize] = b.try_into().ok()?;
        Some(Self {
            hook,
            iif: Ifindex::new(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))?,
            ct_id: CtId(u32::from_be_bytes([b[4], b[5], b[6], b[7]])),
            sport: u16::from_be_bytes([b[12], b[13]]),
            direction: match b[8] {
                0 => Direction::Original,
                1 => Direction::Reply,
                _ => return None,
            },
        })
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
        let mut socket = Socket::open_with_new_port_id(Family::Netfilter)?;
        while_modules_come(LedgerError::is_of_something_absent, || {
            match install_into(&mut socket, &config, true) {
                Err(LedgerError::Unsupported { needs: NEEDS_XFRM, source, .. }) => {
                    debug!(%source, "no IPsec in this kernel: rules about it are left out");
                    install_into(&mut socket, &config, false)
                }
                other => other,
            }
        })?;
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
        self.change_ports(Errno::EEXIST, |t, table, set| {
            set.add(t, Step::new("adding a port", NEEDS_NFT), table, &[port]);
        })
    }

    /// Sights nothing on this netdev from now on; its elements stay. A netdev that is no port is
    /// success.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange.
    pub fn port_del(&mut self, port: Ifindex) -> Result<(), LedgerError> {
        self.change_ports(Errno::ENOENT, |t, table, set| {
            set.delete(t, Step::new("removing a port", NEEDS_NFT), table, &[port]);
        })
    }

    /// In every table together, so that they have the same.
    fn change_ports(
        &mut self,
        done_already: Errno,
        change: impl Fn(&mut Transaction<'_>, &str, NetdevSet),
    ) -> Result<(), LedgerError> {
        let hooks = self.config.hooks();
        let mut t = Transaction::new(&mut self.socket);
        for hook in hooks {
            t.of_family(hook.family());
            change(&mut t, &self.config.table, hook.ports());
        }
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
        for hook in self.config.hooks() {
            let keys: Vec<_> = keys.iter().filter(|k| k.hook == hook).copied().collect();
            self.rearm_in(hook, &keys)?;
        }
        Ok(())
    }

    fn rearm_in(&mut self, hook: Hook, keys: &[LedgerKey]) -> Result<(), LedgerError> {
        let mut rest = keys;
        while !rest.is_empty() {
            if self.destroy != Some(false) {
                let (now, later) = rest.split_at(rest.len().min(KEYS_PER_MESSAGE));
                if self.destroy_elements(hook, now)? {
                    rest = later;
                    continue;
                }
            }
            let (now, later) = rest.split_at(rest.len().min(MESSAGES_PER_SEND));
            self.delete_elements(hook, now)?;
            rest = later;
        }
        Ok(())
    }

    /// One message for all, since 6.3. `false` when the kernel does not know the message.
    fn destroy_elements(&mut self, hook: Hook, keys: &[LedgerKey]) -> Result<bool, LedgerError> {
        let table = &self.config.table;
        let mut t = Transaction::new(&mut self.socket);
        t.of_family(hook.family());
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
    fn delete_elements(&mut self, hook: Hook, keys: &[LedgerKey]) -> Result<(), LedgerError> {
        let mut keys = keys.to_vec();
        while !keys.is_empty() {
            let table = &self.config.table;
            let mut t = Transaction::new(&mut self.socket);
            t.of_family(hook.family());
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
        for hook in self.config.hooks() {
            keys.append(&mut self.dump(hook, SIGHTED, |m, keys: &mut Vec<_>| {
                keys.extend(element_keys(m).filter_map(|k| LedgerKey::from_bytes(hook, k)));
            })?);
        }
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
        let mut all = HashMap::new();
        for hook in self.config.hooks() {
            all.extend(self.dump(hook, SIGHTED, |m, counted: &mut Vec<_>| {
                let elements = element_packets(m);
                let key = |k| LedgerKey::from_bytes(hook, k);
                counted.extend(elements.filter_map(|(k, n)| Some((key(k)?, n))));
            })?);
        }
        Ok(all)
    }

    /// The netdevs that are sighted on, sorted.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn ports(&mut self) -> Result<Vec<Ifindex>, LedgerError> {
        let mut ports = self.dump(Hook::Inet, PORTS, |m, ports: &mut Vec<_>| {
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
        hook: Hook,
        set: &str,
        collect: impl Fn(&Received<'_>, &mut C),
    ) -> Result<C, LedgerError> {
        let mut tries = 0;
        loop {
            let seq = self.socket.next_seq();
            let buf = get_of(hook.family(), NFT_MSG_GETSETELEM, DUMP, seq, |m| {
                m.str(NFTA_SET_ELEM_LIST_TABLE, &self.config.table)
                    .str(NFTA_SET_ELEM_LIST_SET, set);
            });
            let mut into = C::default();
            let done = self.socket.dump(&buf, seq, |m| collect(&m, &mut into));
            match done {
                Ok(()) => return Ok(into),
                // Any change of any table in the namespace interrupts it.
                Err(NetlinkError::Interrupted) if tries < DUMP_TRIES => tries += 1,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// How many elements the ledger holds. Newer kernels count them; on others this dumps the sets.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn len(&mut self) -> Result<usize, LedgerError> {
        let mut sum = 0;
        for hook in self.config.hooks() {
            let seq = self.socket.next_seq();
            let buf = get_of(hook.family(), NFT_MSG_GETSET, ACK, seq, |m| {
                m.str(NFTA_SET_TABLE, &self.config.table).str(NFTA_SET_NAME, SIGHTED);
            });
            let mut count = None;
            self.socket.request(&buf, seq, |m| {
                count = m.attrs(NFGENMSG_LEN).find_type(NFTA_SET_COUNT).and_then(|a| a.be32());
            })?;
            match count {
                Some(n) => sum += n as usize,
                None => return Ok(self.sighted()?.len()),
            }
        }
        Ok(sum)
    }

    /// Whether nothing was sighted yet.
    ///
    /// # Errors
    /// As [`sighted`](Self::sighted).
    pub fn is_empty(&mut self) -> Result<bool, LedgerError> {
        Ok(self.len()? == 0)
    }

    /// How many elements a table can hold: one that has so many sights nothing new.
    #[must_use]
    pub const fn size(&self) -> u32 {
        self.config.size
    }

    /// Removes the tables now, and says so when that failed (dropping the value removes it too).
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange.
    pub fn remove(mut self) -> Result<(), LedgerError> {
        let table = &self.config.table;
        for hook in self.config.hooks() {
            let mut t = Transaction::new(&mut self.socket);
            t.of_family(hook.family());
            table::delete(&mut t, Step::new("deleting the table", NEEDS_NFT), table);
            match first_refusal(t.commit()?) {
                None => {}
                Some((_, e)) if e.errno == Errno::ENOENT => {
                    warn!(%hook, table, "the ledger's table was gone already");
                }
                Some((step, source)) => {
                    return Err(LedgerError::Refused { what: step.what, source });
                }
            }
        }
        Ok(())
    }
}

fn install_into(
    socket: &mut Socket,
    config: &LedgerConfig,
    with_xfrm: bool,
) -> Result<(), LedgerError> {
    let mut t = Transaction::new(socket);
    for hook in config.hooks() {
        describe(&mut t, config, hook, with_xfrm);
    }
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
    let table = |hook| format!("{hook} {}", config.table);
    let of_table = Hook::BOTH.into_iter().find(|h| h.steps().table == step);
    Err(match (source.errno, of_table) {
        // Whose table it is comes before everything else in it.
        (Errno::EPERM, hook) => {
            LedgerError::AlreadyOwned { table: table(hook.unwrap_or(Hook::Inet)) }
        }
        (Errno::EEXIST, Some(hook)) => LedgerError::TableExists { table: table(hook) },
        (
            Errno::EOPNOTSUPP
            | Errno::ENOENT
            | Errno::EAFNOSUPPORT
            | Errno::EPROTONOSUPPORT
            | Errno::EPFNOSUPPORT
            // No bridge conntrack (`nf_ct_netns_do_get`).
            | Errno::EPROTO,
            _,
        ) => LedgerError::Unsupported { what: step.what, needs: step.needs, source },
        _ => LedgerError::Refused { what: step.what, source },
    })
}

#[cfg(test)]
mod tests;
