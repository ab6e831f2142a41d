//! Who else stands in a netfilter hook, in which order (nfnetlink_hook, `linux/netfilter/nfnetlink_hook.h`;
//! since 5.14).
//!
//! The order is not that of priorities alone: a hook of equal priority goes in front of those that are
//! there already, so among those of the last priority only this tells who is last. The kernel tells
//! nobody when a hook comes or goes that is not of nf_tables.

use netdev_providers::netlink::netfilter::{NFGENMSG_LEN, SUBSYS_HOOK, msg_type, nfgenmsg};
use netdev_providers::netlink::socket::{DUMP, REQUEST};
use netdev_providers::netlink::wire::Received;
use netdev_providers::netlink::{Family, Message, NetlinkError, Socket};
use nix::errno::Errno;

const NFNL_MSG_HOOK_GET: u16 = 0;
// enum nfnl_hook_attributes
const NFNLA_HOOK_HOOKNUM: u16 = 1;
const NFNLA_HOOK_PRIORITY: u16 = 2;
const NFNLA_HOOK_FUNCTION_NAME: u16 = 4;
const NFNLA_HOOK_MODULE_NAME: u16 = 5;
const NFNLA_HOOK_CHAIN_INFO: u16 = 6;
// enum nfnl_hook_chain_info_attributes, nfnl_hook_chain_desc_attributes
const NFNLA_HOOK_INFO_DESC: u16 = 1;
const NFNLA_CHAIN_TABLE: u16 = 1;
const NFNLA_CHAIN_NAME: u16 = 3;
/// How often a dump that a change of the hook interrupted is repeated.
const TRIES: u32 = 8;

/// Somebody in a hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    /// Its priority.
    pub priority: i32,
    /// Its table and chain, when it is one of nf_tables.
    pub chain: Option<(String, String)>,
    /// The kernel function, where the kernel tells names.
    pub function: Option<String>,
    /// The kernel module, when it is in one.
    pub module: Option<String>,
}

impl Registered {
    fn parse(m: &Received<'_>) -> Self {
        let mut r = Self::default();
        let text = |a: netdev_providers::netlink::wire::Attr<'_>| a.str().map(str::to_owned);
        for a in m.attrs(NFGENMSG_LEN) {
            match a.ty {
                NFNLA_HOOK_PRIORITY => r.priority = a.be32().unwrap_or(0).cast_signed(),
                NFNLA_HOOK_FUNCTION_NAME => r.function = text(a),
                NFNLA_HOOK_MODULE_NAME => r.module = text(a),
                NFNLA_HOOK_CHAIN_INFO => {
                    let desc = a.nested().find_type(NFNLA_HOOK_INFO_DESC);
                    r.chain = desc.and_then(|d| {
                        let of = |ty| d.nested().find_type(ty).and_then(text);
                        Some((of(NFNLA_CHAIN_TABLE)?, of(NFNLA_CHAIN_NAME)?))
                    });
                }
                _ => {}
            }
        }
        r
    }

    /// Conntrack's own last step, which confirms the entry of a connection's first packet and refuses
    /// no other; a bridge's conntrack; and what has a bridge's frames pass the stack's hooks.
    #[must_use]
    pub fn is_conntracks(&self) -> bool {
        const MODULES: [&str; 3] = ["nf_conntrack", "nf_conntrack_bridge", "br_netfilter"];
        // Where conntrack is no module.
        const FUNCTIONS: [&str; 3] = ["nf_confirm", "ipv4_confirm", "ipv6_confirm"];
        self.chain.is_none()
            && match (&self.module, &self.function) {
                (Some(module), _) => MODULES.contains(&module.as_str()),
                (None, function) => function.as_deref().is_some_and(|f| FUNCTIONS.contains(&f)),
            }
    }
}

impl std::fmt::Display for Registered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.chain, &self.function, &self.module) {
            (Some((table, chain)), ..) => write!(f, "chain {chain} of table {table}")?,
            (None, Some(function), Some(module)) => write!(f, "{function} of module {module}")?,
            (None, Some(name), None) => write!(f, "{name}")?,
            (None, None, Some(module)) => write!(f, "module {module}")?,
            (None, None, None) => f.write_str("a hook without a name")?,
        }
        write!(f, " (priority {})", self.priority)
    }
}

/// Reads who stands in hooks of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Hooks {
    socket: Socket,
}

impl Hooks {
    /// Opens the socket; whether the kernel has nfnetlink_hook, the first [`read`](Self::read) tells.
    ///
    /// # Errors
    /// A failure of the socket.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open(Family::Netfilter)? })
    }

    /// Those in this hook of this family (IPv4, IPv6, bridge), in the order that packets meet them. What
    /// is registered for family `inet` is in both.
    ///
    /// # Errors
    /// [`is_absent`] tells when the kernel lacks nfnetlink_hook; a failure of the exchange.
    pub fn read(&mut self, family: u8, hook: u32) -> Result<Vec<Registered>, NetlinkError> {
        let mut tries = 0;
        loop {
            let seq = self.socket.next_seq();
            let mut buf = Vec::with_capacity(32);
            let ty = msg_type(SUBSYS_HOOK, NFNL_MSG_HOOK_GET);
            let mut m = Message::new(&mut buf, ty, REQUEST | DUMP, seq);
            m.raw(&nfgenmsg(family, 0)).be32(NFNLA_HOOK_HOOKNUM, hook);
            m.finish();
            let mut found = Vec::new();
            match self.socket.dump(&buf, seq, |m| found.push(Registered::parse(&m))) {
                Ok(()) => return Ok(found),
                Err(NetlinkError::Interrupted) if tries < TRIES => tries += 1,
                Err(e) => return Err(e),
            }
        }
    }
}

/// The kernel has no nfnetlink_hook (`CONFIG_NETFILTER_NETLINK_HOOK`).
#[must_use]
pub fn is_absent(e: &NetlinkError) -> bool {
    // The answer of nfnetlink when there is no such subsystem.
    matches!(e.errno(), Some(Errno::EINVAL | Errno::EOPNOTSUPP))
}

/// Where the chain of ours stands among them. `None`: it is not there (yet, or any more).
#[must_use]
pub fn place_of(all: &[Registered], ours: (&str, &str)) -> Option<usize> {
    let is_ours =
        |r: &Registered| r.chain.as_ref().is_some_and(|(t, c)| (t.as_str(), c.as_str()) == ours);
    all.iter().position(is_ours)
}

/// Those that come after the chain of ours, without conntrack's own. All of them, when ours is not there.
#[must_use]
pub fn behind<'a>(all: &'a [Registered], ours: (&str, &str)) -> Vec<&'a Registered> {
    let after = place_of(all, ours).map_or(0, |at| at + 1);
    all[after..].iter().filter(|r| !r.is_conntracks()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_chain(table: &str, priority: i32) -> Registered {
        let chain = Some((table.to_owned(), "c".to_owned()));
        Registered { priority, chain, ..Registered::default() }
    }

    fn of_module(module: &str, priority: i32) -> Registered {
        let function = Some("f".to_owned());
        Registered { priority, chain: None, function, module: Some(module.to_owned()) }
    }

    #[test]
    fn whoever_comes_after_us_is_found_but_conntrack() {
        let last = i32::MAX;
        let all = [
            of_chain("a", 0),
            of_module("nf_conntrack", last),
            of_chain("ours", last),
            of_module("nf_conntrack", last),
            of_chain("late", last),
            of_module("iptable_mangle", last),
        ];
        let names: Vec<_> =
            behind(&all, ("ours", "c")).into_iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            [
                "chain c of table late (priority 2147483647)",
                "f of module iptable_mangle (priority 2147483647)"
            ]
        );
        assert!(behind(&all[..4], ("ours", "c")).is_empty());
        // A table of that name with another chain is somebody else's.
        assert_eq!(behind(&all, ("ours", "other")).len(), 4);
        assert_eq!(
            (place_of(&all, ("ours", "c")), place_of(&all, ("ours", "other"))),
            (Some(2), None)
        );
    }
}
