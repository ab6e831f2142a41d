//! The table: what it is made of, and the transactions that change it.

use std::collections::HashSet;

use nix::errno::Errno;
use tracing::debug;

use super::key::{Key, SetOf, load, load_opposite};
use crate::contract::types::{Direction, Ifindex};
use crate::netlink::error::{KernelError, NetlinkError};
use crate::netlink::link::{Link, Links};
use crate::netlink::netfilter::nft::expr::{self, Cmp};
use crate::netlink::netfilter::nft::set::elements;
use crate::netlink::netfilter::nft::table::{self, NetdevSet};
use crate::netlink::netfilter::nft::*;
use crate::netlink::socket::{CREATE, EXCL, Socket};
use crate::netlink::wire::Message;

const PORTS: NetdevSet = NetdevSet { name: "ports", id: 1 };
const SELECT: &str = "select";
const OFFLOAD: &str = "offload";
/// In the forward hook: behind every filter of others, so that what they drop makes no entry. On
/// ingress: behind their ingress filters.
const PRIORITY: i32 = 1000;
/// What `nft` calls the key type (its `enum datatypes`) of keys of more parts than it has room to name:
/// `integer`.
const NFT_TYPE_INTEGER: u32 = 4;
/// What `nft` 1.0.6 stores beside a set so that it can list it: the byte order of the key, the
/// network's.
const NETWORK_ORDER: &[u8] = &[0x00, 0x04, 0x02, 0x00, 0x00, 0x00];

/// Elements that one message of a flush names (some 70 bytes each; an attribute holds 64 kB).
const KEYS_PER_MESSAGE: usize = 700;
/// Elements changed in one transaction, each by a message of its own (about 160 bytes; the default
/// send buffer holds 212 kB).
pub(super) const CHANGES_PER_TRANSACTION: usize = 512;

const NEEDS_NFT: &str = "nf_tables and its family inet (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)";
const NEEDS_FLOWTABLE: &str =
    "nf_flow_table_inet and ingress hooks (CONFIG_NF_FLOW_TABLE_INET, CONFIG_NETFILTER_INGRESS)";
const NEEDS_FLOW: &str = "nft_flow_offload (CONFIG_NFT_FLOW_OFFLOAD)";
const NEEDS_CT: &str = "nft_ct and conntrack zones (CONFIG_NFT_CT, CONFIG_NF_CONNTRACK_ZONES)";

/// Why the table could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TableError {
    #[error("table inet {table} belongs to another process: is another daemon running here?")]
    AlreadyOwned { table: String },
    #[error("table inet {table} exists and is not ours: rename or delete it")]
    TableExists { table: String },
    #[error("the kernel lacks what {what} needs, {needs}: {source}")]
    Unsupported { what: &'static str, needs: &'static str, source: KernelError },
    #[error("nf_tables refused {what}: {source}")]
    Refused { what: &'static str, source: KernelError },
    #[error("{port} is a port of bond {bond}: the kernel's flowtable does not look below a bond")]
    BelowBond { port: String, bond: String },
    #[error("packets are routed on VRF {vrf}: the kernel's flowtable does not look below a VRF")]
    BelowVrf { vrf: String },
    #[error(
        "netdev {top} stands above ports of this provider and above {egress}, which is none: where a packet leaves cannot be told"
    )]
    Ambiguous { top: Ifindex, egress: Ifindex },
    #[error(
        "the flowtable of the other ports has no offload flag, which holds for all its ports or for none"
    )]
    SoftwareOnly,
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

impl TableError {
    pub(super) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Unsupported { source, .. } | Self::Refused { source, .. } => Some(source.errno),
            Self::Netlink(e) => e.errno(),
            Self::AlreadyOwned { .. }
            | Self::TableExists { .. }
            | Self::BelowBond { .. }
            | Self::BelowVrf { .. }
            | Self::Ambiguous { .. }
            | Self::SoftwareOnly => None,
        }
    }
}

/// A change of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Add(Key),
    Delete(Key),
}

/// The table, for as long as this value lives: it belongs to the socket inside.
#[derive(Debug)]
pub(super) struct Table {
    socket: Socket,
    links: Links,
    name: String,
    /// The ports, in the order in which they came.
    ports: Vec<Ifindex>,
    /// By which names the flowtable knows them. From Linux 6.16 on it is about names, not about netdevs: it
    /// lets go of one that is renamed, keeps the name of one that is deleted, and takes the next that has it.
    names: Vec<(Ifindex, String)>,
    /// Netdevs that route, each with a netdev below it, as far as flows have named them. (What has gone
    /// again stays: no index is given twice while the other is in use.)
    above: HashSet<(Ifindex, Ifindex)>,
    /// Counts the flowtables: their names differ.
    generation: u32,
    /// With the `offload` flag.
    hardware: bool,
    /// The flowtable is gone, and was not made again yet.
    without_flowtable: bool,
}

impl Table {
    /// Makes the table with its first port.
    pub(super) fn install(
        mut socket: Socket,
        name: &str,
        mut links: Links,
        port: &Link,
        hardware: bool,
    ) -> Result<Self, TableError> {
        let mut t = Transaction::new(&mut socket);
        describe(&mut t, name, port, hardware);
        done(t, name).map_err(|e| match e {
            // The type of the flowtable, unless it is the netdev.
            TableError::Refused { what: what @ THE_FLOWTABLE, source }
                if source.errno == Errno::ENOENT
                    && matches!(links.get(port.ifindex), Ok(Some(_))) =>
            {
                TableError::Unsupported { what, needs: NEEDS_FLOWTABLE, source }
            }
            other => other,
        })?;
        debug!(table = name, port = port.name, hardware, "flowtable made");
        Ok(Self {
            socket,
            links,
            name: name.to_owned(),
            ports: vec![port.ifindex],
            names: vec![(port.ifindex, port.name.clone())],
            above: HashSet::new(),
            generation: 0,
            hardware,
            without_flowtable: false,
        })
    }

    pub(super) fn is_hardware(&self) -> bool {
        self.hardware
    }

    /// The flowtable's name now.
    pub(super) fn flowtable(&self) -> String {
        flowtable_name(self.generation)
    }

    pub(super) fn ports(&self) -> &[Ifindex] {
        &self.ports
    }

    /// Adds a port, and goes on with or without the `offload` flag. The flowtable is renewed: an entry
    /// that was made while the netdev was no port has its other direction there, which it has not
    /// seen.
    pub(super) fn add_port(&mut self, port: &Link, hardware: bool) -> Result<(), TableError> {
        let members = self.members(port.ifindex);
        self.put_in_set(&members)?;
        self.ports.push(port.ifindex);
        let before = self.hardware;
        let Err(refused) = self.renew_as(hardware) else { return Ok(()) };
        self.ports.pop();
        self.take_out_of_set(&members)?;
        if self.without_flowtable {
            self.renew_as(before)?;
        }
        Err(refused)
    }

    /// Takes a port out: from now on no packet that comes in there is looked up. Entries that other
    /// ports are served by stay.
    pub(super) fn remove_port(&mut self, port: Ifindex) -> Result<(), TableError> {
        self.ports.retain(|p| *p != port);
        let at = self.names.iter().position(|(p, _)| *p == port);
        let known = at.map(|at| self.names.remove(at).1);
        let link = self.links.get(port)?;
        let members = self.members(port);
        let mut t = Transaction::new(&mut self.socket);
        PORTS.delete(&mut t, THE_PORT, &self.name, &members);
        if let Some(link) = &link
            && !self.without_flowtable
        {
            let flowtable = flowtable_name(self.generation);
            delete_device(&mut t, &self.name, &flowtable, self.hardware, &link.name);
        }
        match done(t, &self.name) {
            // The netdev went, or got another name, since it was looked up.
            Err(e) if link.is_some() && e.errno() == Some(Errno::ENOENT) => self.renew(),
            Ok(()) if link.is_none() => self.forget_name(known),
            other => other,
        }
    }

    /// The netdev is gone, and its name is to go too, which another may get. A kernel that keeps no names
    /// has taken it out already.
    fn forget_name(&mut self, name: Option<String>) -> Result<(), TableError> {
        let Some(name) = name else { return Ok(()) };
        if self.without_flowtable || self.names.iter().any(|(_, n)| *n == name) {
            return Ok(());
        }
        let flowtable = flowtable_name(self.generation);
        let mut t = Transaction::new(&mut self.socket);
        delete_device(&mut t, &self.name, &flowtable, self.hardware, &name);
        match done(t, &self.name) {
            Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Whether the flowtable knows the port by the name that it has. (One that is gone has none.)
    pub(super) fn is_known_by_name(&mut self, port: Ifindex) -> Result<bool, TableError> {
        let link = self.links.get(port)?;
        Ok(link.is_none_or(|l| self.names.contains(&(port, l.name))))
    }

    /// What stands in the set of ports for this one alone: itself, and netdevs above it that are above
    /// no other port.
    fn members(&self, port: Ifindex) -> Vec<Ifindex> {
        let others =
            |top: Ifindex| self.ports.iter().any(|p| *p != port && self.above.contains(&(top, *p)));
        let tops = self.above.iter().filter(|(_, below)| *below == port).map(|(top, _)| *top);
        std::iter::once(port).chain(tops.filter(|top| !others(*top))).collect()
    }

    fn put_in_set(&mut self, netdevs: &[Ifindex]) -> Result<(), TableError> {
        let mut t = Transaction::new(&mut self.socket);
        PORTS.add(&mut t, THE_PORT, &self.name, netdevs);
        done(t, &self.name)
    }

    fn take_out_of_set(&mut self, netdevs: &[Ifindex]) -> Result<(), TableError> {
        let mut t = Transaction::new(&mut self.socket);
        PORTS.delete(&mut t, THE_PORT, &self.name, netdevs);
        done(t, &self.name)
    }

    /// Prepares for a flow that is routed on a netdev above `below`: where `below` is a port, what is
    /// routed there is the port's. The kernel finds ports below VLAN devices and bridges, and not
    /// below bonds.
    pub(super) fn route_above(&mut self, top: Ifindex, below: Ifindex) -> Result<(), TableError> {
        let known = self.above.contains(&(top, below));
        if !self.ports.contains(&below) {
            if self.ports.iter().any(|p| self.above.contains(&(top, *p))) {
                return Err(TableError::Ambiguous { top, egress: below });
            }
            self.above.insert((top, below));
            return Ok(());
        }
        if let Some(port) = self.links.get(below)?
            && let Some(controller) = port.controller
            && let Some(bond) = self.links.get(controller)?
            && bond.kind.as_deref() == Some("bond")
        {
            return Err(TableError::BelowBond { port: port.name, bond: bond.name });
        }
        // Its entries would be for packets that arrive on the VRF, and none is looked up there.
        if let Some(vrf) = self.links.get(top)?.filter(|l| l.kind.as_deref() == Some("vrf")) {
            return Err(TableError::BelowVrf { vrf: vrf.name });
        }
        if !known {
            self.put_in_set(&[top])?;
            self.above.insert((top, below));
        }
        Ok(())
    }

    /// Puts a new flowtable in the place of the old: all entries of the old one end. Netdevs that are
    /// gone are left out.
    pub(super) fn renew(&mut self) -> Result<(), TableError> {
        self.renew_as(self.hardware)
    }

    /// The same, with or without the `offload` flag.
    pub(super) fn renew_as(&mut self, hardware: bool) -> Result<(), TableError> {
        let mut tries = 0;
        loop {
            let mut names = Vec::with_capacity(self.ports.len());
            for port in &self.ports {
                names.extend(self.links.get(*port)?.map(|l| (*port, l.name)));
            }
            match self.try_renew(names, hardware) {
                // A driver that takes one flowtable at a time.
                Err(e) if e.errno() == Some(Errno::EBUSY) && !self.without_flowtable => {
                    self.remove_flowtable()?;
                }
                // A name that has changed since it was looked up.
                Err(e) if e.errno() == Some(Errno::ENOENT) && tries < 3 => tries += 1,
                other => return other,
            }
        }
    }

    /// Removes the flowtable; the sets stand.
    fn remove_flowtable(&mut self) -> Result<(), TableError> {
        let mut t = Transaction::new(&mut self.socket);
        delete_flowtable(&mut t, &self.name, &flowtable_name(self.generation));
        done(t, &self.name)?;
        self.without_flowtable = true;
        Ok(())
    }

    fn try_renew(
        &mut self,
        names: Vec<(Ifindex, String)>,
        hardware: bool,
    ) -> Result<(), TableError> {
        let new = flowtable_name(self.generation + 1);
        let table = &*self.name;
        let mut t = Transaction::new(&mut self.socket);
        if !self.without_flowtable {
            delete_flowtable(&mut t, table, &flowtable_name(self.generation));
        }
        t.add(
            Step::new("the new flowtable", NEEDS_FLOWTABLE),
            NFT_MSG_NEWFLOWTABLE,
            CREATE | EXCL,
            |m| {
                put_flowtable(m, table, &new, hardware, names.iter().map(|(_, n)| &**n));
            },
        );
        put_offload_rule(&mut t, table, &new);
        done(t, table)?;
        self.names = names;
        self.generation += 1;
        self.hardware = hardware;
        self.without_flowtable = false;
        debug!(table, flowtable = new, hardware, "flowtable renewed");
        Ok(())
    }

    /// Changes elements, all of them or none: one answer each, in order. When one is refused, the
    /// others' answer says whether they would have been taken, and nothing has changed: see
    /// [`is_whole`].
    pub(super) fn change(
        &mut self,
        changes: &[Change],
    ) -> Result<Vec<Result<(), KernelError>>, NetlinkError> {
        let mut t = Transaction::new(&mut self.socket);
        for change in changes {
            let (msg, flags, key) = match change {
                Change::Add(key) => (NFT_MSG_NEWSETELEM, CREATE, key),
                Change::Delete(key) => (NFT_MSG_DELSETELEM, 0, key),
            };
            t.add(Step::new("an element", NEEDS_NFT), msg, flags, |m| {
                elements(m, &self.name, key.set.name(), [key].into_iter());
            });
        }
        Ok(t.commit()?.into_iter().map(|(_, ack)| ack).collect())
    }

    /// Deletes elements that are there, in few messages.
    pub(super) fn delete_all(&mut self, keys: &[Key]) -> Result<(), TableError> {
        for set in SetOf::ALL {
            let of_set: Vec<_> = keys.iter().filter(|k| k.set == set).collect();
            for chunk in of_set.chunks(KEYS_PER_MESSAGE) {
                let mut t = Transaction::new(&mut self.socket);
                t.add(Step::new("removing elements", NEEDS_NFT), NFT_MSG_DELSETELEM, 0, |m| {
                    elements(m, &self.name, set.name(), chunk.iter());
                });
                done(t, &self.name)?;
            }
        }
        Ok(())
    }

    /// Removes the table now (dropping the value removes it too).
    pub(super) fn remove(mut self) -> Result<(), TableError> {
        let mut t = Transaction::new(&mut self.socket);
        table::delete(&mut t, Step::new("deleting the table", NEEDS_NFT), &self.name);
        match done(t, &self.name) {
            Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(()),
            other => other,
        }
    }
}

/// Whether a transaction with these answers took effect.
pub(super) fn is_whole(answers: &[Result<(), KernelError>]) -> bool {
    answers.iter().all(Result::is_ok)
}

fn flowtable_name(generation: u32) -> String {
    format!("f{generation}")
}

/// Commits; what was refused becomes words.
fn done(t: Transaction<'_>, table: &str) -> Result<(), TableError> {
    let answers = t.commit().map_err(|e| match e {
        NetlinkError::Kernel(source) if source.errno != Errno::EPERM => {
            TableError::Unsupported { what: "the table", needs: NEEDS_NFT, source }
        }
        e => e.into(),
    })?;
    let Some((step, source)) = first_refusal(answers) else { return Ok(()) };
    let table = || table.to_owned();
    Err(match source.errno {
        Errno::EPERM if step.what == THE_TABLE => TableError::AlreadyOwned { table: table() },
        Errno::EEXIST if step.what == THE_TABLE => TableError::TableExists { table: table() },
        Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT | Errno::EPFNOSUPPORT => {
            TableError::Unsupported { what: step.what, needs: step.needs, source }
        }
        // A module that is not there; but about a port it is the netdev that is not there.
        Errno::ENOENT if step.needs != NEEDS_NFT && step.what.starts_with("the rule") => {
            TableError::Unsupported { what: step.what, needs: step.needs, source }
        }
        _ => TableError::Refused { what: step.what, source },
    })
}

const THE_TABLE: &str = "the table";
const THE_FLOWTABLE: &str = "the flowtable";
const THE_PORT: Step = Step::new("the port in the set of ports", NEEDS_NFT);

fn put_flowtable<'n>(
    m: &mut Message<'_>,
    table: &str,
    name: &str,
    hardware: bool,
    devices: impl IntoIterator<Item = &'n str>,
) {
    let flags = NFT_FLOWTABLE_COUNTER | if hardware { NFT_FLOWTABLE_HW_OFFLOAD } else { 0 };
    m.str(NFTA_FLOWTABLE_TABLE, table)
        .str(NFTA_FLOWTABLE_NAME, name)
        .be32(NFTA_FLOWTABLE_FLAGS, flags)
        .nested(NFTA_FLOWTABLE_HOOK, |m| {
            m.be32(NFTA_FLOWTABLE_HOOK_NUM, NF_NETDEV_INGRESS)
                .be32(NFTA_FLOWTABLE_HOOK_PRIORITY, PRIORITY.cast_unsigned())
                .nested(NFTA_FLOWTABLE_HOOK_DEVS, |m| {
                    for device in devices {
                        m.str(NFTA_DEVICE_NAME, device);
                    }
                });
        });
}

fn delete_device(
    t: &mut Transaction<'_>,
    table: &str,
    flowtable: &str,
    hardware: bool,
    device: &str,
) {
    let step = Step::new("taking the port out of the flowtable", NEEDS_FLOWTABLE);
    t.add(step, NFT_MSG_DELFLOWTABLE, 0, |m| {
        put_flowtable(m, table, flowtable, hardware, [device]);
    });
}

fn delete_flowtable(t: &mut Transaction<'_>, table: &str, flowtable: &str) {
    t.add(Step::new("deleting the old rule", NEEDS_NFT), NFT_MSG_DELRULE, 0, |m| {
        m.str(NFTA_RULE_TABLE, table).str(NFTA_RULE_CHAIN, OFFLOAD);
    });
    t.add(Step::new("deleting the old flowtable", NEEDS_NFT), NFT_MSG_DELFLOWTABLE, 0, |m| {
        m.str(NFTA_FLOWTABLE_TABLE, table).str(NFTA_FLOWTABLE_NAME, flowtable);
    });
}

fn put_offload_rule(t: &mut Transaction<'_>, table: &str, flowtable: &str) {
    let step = Step::new("the rule that offloads", NEEDS_FLOW);
    table::append_rule(t, step, table, OFFLOAD, |m| expr::flow_offload(m, flowtable));
}

/// The messages that make the table.
pub(super) fn describe(t: &mut Transaction<'_>, table: &str, port: &Link, hardware: bool) {
    table::make_owned(t, Step::new(THE_TABLE, NEEDS_NFT), table);
    let flowtable = flowtable_name(0);
    t.add(Step::new(THE_FLOWTABLE, NEEDS_FLOWTABLE), NFT_MSG_NEWFLOWTABLE, CREATE | EXCL, |m| {
        put_flowtable(m, table, &flowtable, hardware, [&*port.name]);
    });
    PORTS.make(t, Step::new("the set of ports", NEEDS_NFT), table);
    PORTS.add(t, THE_PORT, table, &[port.ifindex]);
    for set in SetOf::ALL {
        t.add(Step::new("a set of connections", NEEDS_NFT), NFT_MSG_NEWSET, CREATE | EXCL, |m| {
            #[expect(clippy::cast_possible_truncation, reason = "32 or 56")]
            let key_len = set.key_len() as u32;
            m.str(NFTA_SET_TABLE, table)
                .str(NFTA_SET_NAME, set.name())
                .be32(NFTA_SET_FLAGS, 0)
                .be32(NFTA_SET_KEY_TYPE, NFT_TYPE_INTEGER)
                .be32(NFTA_SET_KEY_LEN, key_len)
                .be32(NFTA_SET_ID, set.id())
                .attr(NFTA_SET_USERDATA, NETWORK_ORDER);
        });
    }
    t.add(Step::new("the chain that offloads", NEEDS_NFT), NFT_MSG_NEWCHAIN, CREATE | EXCL, |m| {
        m.str(NFTA_CHAIN_TABLE, table).str(NFTA_CHAIN_NAME, OFFLOAD);
    });
    put_offload_rule(t, table, &flowtable);
    let chain = Step::new("the chain that selects", NEEDS_NFT);
    table::make_base_chain(t, chain, table, SELECT, (NF_INET_FORWARD, PRIORITY));
    let mut rule = |step, fill: &dyn Fn(&mut Message<'_>)| {
        table::append_rule(t, step, table, SELECT, fill);
    };
    rule(Step::new("the rule on other netdevs", NEEDS_NFT), &|m| {
        PORTS.unless_in(m, expr::NFT_META_IIF);
        expr::accept(m);
    });
    for set in SetOf::ALL {
        let of_this_direction = |m: &mut Message<'_>| {
            let family = if set.ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
            expr::meta(m, expr::NFT_META_NFPROTO, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &[family]);
            expr::ct(m, expr::NFT_CT_DIRECTION, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &[set.direction as u8]);
        };
        let (one, both) = match set.direction {
            Direction::Original => {
                ("the rule on original packets", "the rule on original packets between ports")
            }
            Direction::Reply => ("the rule on replies", "the rule on replies between ports"),
        };
        rule(Step::new(one, NEEDS_CT), &|m| {
            of_this_direction(m);
            PORTS.unless_in(m, expr::NFT_META_OIF);
            load(m, set.ipv6);
            expr::lookup(m, set.name(), set.id());
            expr::goto(m, OFFLOAD);
        });
        rule(Step::new(both, NEEDS_CT), &|m| {
            of_this_direction(m);
            load(m, set.ipv6);
            expr::lookup(m, set.name(), set.id());
            load_opposite(m);
            expr::lookup(m, set.opposite().name(), set.opposite().id());
            expr::goto(m, OFFLOAD);
        });
    }
}
