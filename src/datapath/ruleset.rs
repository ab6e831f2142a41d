//! Changes of the firewall. Packets that rules of ours forward do not pass it, so a connection that
//! the new ruleset would stop has to come back to the slow path, where it is stopped; one that it
//! lets pass is sighted again and offloaded again; or it stays where it is, as configured.
//!
//! What a change of nf_tables concerns, [`model`](super::firewall::model) tells: rules of those
//! connections are taken back at once, or so many a second as `[revalidate] rate` says.
//!
//! What changes without an announcement (iptables-legacy, ipset, sets with timeouts or that packets add
//! to, limits, rules on the time) is looked for, and where there is such a thing every offloaded
//! connection goes through the stack again within `[revalidate] every`, a few at a time.
//!
//! `nft flush ruleset` passes over tables that have an owner, as ours have: nothing is to be repaired.
//! It is a change like others, and reported, since the firewall is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::netlink::netfilter::nft::{
    NF_INET_FORWARD, NF_INET_POST_ROUTING, NFPROTO_BRIDGE, NFPROTO_IPV4, NFPROTO_IPV6,
};
use netdev_providers::netlink::netfilter::{SUBSYS_NFTABLES, msg_type};
use netdev_providers::netlink::wire::Received;
use netdev_providers::netlink::{Family, NetlinkError, Socket};
use netdev_providers::{Direction, Reason};
use nix::errno::Errno;

use super::TICK;
use super::backend::Shared;
use super::config::OnRulesetChange;
use super::firewall::model::{Concerns, Model, Transaction};
use super::firewall::{Behind, Zones};
use super::firewall::{dump, legacy};
use super::lint::Teller;
use super::netfilter::hooks::{Hooks, Registered, behind, is_absent, place_of};
use super::netfilter::ledger::{CHAIN, Hook};
use super::supervisor::Failures;
use crate::engine::conn::ConnHandle;
use crate::engine::slot::SlotState;
use crate::engine::taken::TakenBack;
use crate::engine::{Engine, FlushFilter};

/// `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h).
const NFNLGRP_NFTABLES: u32 = 7;
/// `NFT_MSG_NEWGEN`: ends the announcement of every transaction.
const NEWGEN: u16 = msg_type(SUBSYS_NFTABLES, 15);
/// `NFT_MSG_DELTABLE`.
const DELTABLE: u16 = msg_type(SUBSYS_NFTABLES, 2);
/// `NF_INET_PRE_ROUTING`.
const NF_INET_PRE_ROUTING: u32 = 0;
/// A tool that changes what concerns everybody all the time makes us take everything back this often at
/// most: the second of two such changes waits so long.
const AT_MOST_EVERY: Duration = Duration::from_millis(250);
/// Who stands in the hooks is looked at this often when nothing is announced, and at least six times
/// in `[revalidate] every`.
const LOOK_EVERY: Duration = Duration::from_secs(10);

pub(super) struct Watch {
    socket: Socket,
    dumps: Socket,
    hooks: Hooks,
    backend: Shared,
    model: Model,
    transaction: Transaction,
    /// What the transactions concern that have not been answered yet.
    concerns: Concerns,
    /// Tables that are gone.
    tables_gone: u32,
    /// Connections that are to be taken back, a few at a time, and the part of one that is due.
    paced: Paced,
    /// The present round of connections whose decision is renewed.
    round: Paced,
    /// What can change without a word.
    silent: Vec<String>,
    looked: Option<Instant>,
    /// The kernel has no nfnetlink_hook; told.
    blind: bool,
    failures: Failures,
    lint: Teller,
}

/// Connections that go through the stack again, so many a second.
#[derive(Default)]
struct Paced {
    conns: Vec<ConnHandle>,
    per_second: f64,
    due: f64,
}

impl Paced {
    fn new(conns: Vec<ConnHandle>, per_second: f64) -> Self {
        Self { conns, per_second, due: 0.0 }
    }

    /// Those whose turn has come after so long.
    fn after(&mut self, elapsed: Duration) -> Vec<ConnHandle> {
        self.due += elapsed.as_secs_f64() * self.per_second;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a float saturates, and this one is not negative"
        )]
        let n = (self.due.floor() as usize).min(self.conns.len());
        self.due -= self.due.floor();
        self.conns.split_off(self.conns.len() - n)
    }
}

impl Watch {
    pub(super) fn open(backend: Shared) -> Result<Self, NetlinkError> {
        let socket = Socket::open(Family::Netfilter)?;
        socket.join(NFNLGRP_NFTABLES)?;
        let mut watch = Self {
            socket,
            dumps: Socket::open(Family::Netfilter)?,
            hooks: Hooks::open()?,
            backend,
            model: Model::default(),
            transaction: Transaction::default(),
            concerns: Concerns::default(),
            tables_gone: 0,
            paced: Paced::default(),
            round: Paced::default(),
            silent: Vec::new(),
            looked: None,
            blind: false,
            failures: Failures::default(),
            lint: Teller::default(),
        };
        watch.lint.changed();
        watch.read_all();
        watch.tell();
        watch.look();
        Ok(watch)
    }

    /// # Errors
    /// When the announcements cannot be read any more.
    pub(super) fn run(mut self, engine: &Engine, stop: &AtomicBool) -> Result<(), NetlinkError> {
        // Due at once for the first change; the last of a burst is never forgotten.
        let (mut earliest, mut ticked) = (Instant::now(), Instant::now());
        while !stop.load(Ordering::Relaxed) {
            self.read_announcements(earliest)?;
            // At a stop our own tables go, with the socket that told them from others.
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if self.concerns != Concerns::Nobody
                && (self.concerns != Concerns::All || Instant::now() >= earliest)
            {
                let concerns = std::mem::take(&mut self.concerns);
                if concerns == Concerns::All {
                    earliest = Instant::now() + AT_MOST_EVERY;
                }
                self.answer(engine, &concerns);
            }
            let now = Instant::now();
            self.renew(engine, now.saturating_duration_since(ticked));
            self.lint.go_on(&self.backend, engine);
            ticked = now;
        }
        Ok(())
    }

    /// Waits for announcements, not longer than something else can wait.
    fn read_announcements(&mut self, earliest: Instant) -> Result<(), NetlinkError> {
        let wait = if self.concerns == Concerns::Nobody {
            TICK
        } else {
            earliest.saturating_duration_since(Instant::now()).min(TICK)
        };
        let Self { backend, model, transaction, concerns, tables_gone, looked, lint, .. } = self;
        let read = self.socket.recv(wait, |messages| {
            for m in messages {
                if backend.is_own_change(m.port) {
                    continue;
                }
                *tables_gone += u32::from(m.ty == DELTABLE);
                if m.ty == NEWGEN {
                    concerns.add(model.end(std::mem::take(transaction)));
                    // Chains may have come or gone.
                    *looked = None;
                    lint.changed();
                } else {
                    model.message(&m, transaction);
                }
            }
        });
        let lost = |e: &NetlinkError| e.errno() == Some(Errno::ENOBUFS);
        let passed = match read {
            Err(NetlinkError::TimedOut(_)) => Ok(()),
            Err(e) if lost(&e) => {
                tracing::warn!("announcements of nf_tables were lost: reading the ruleset anew");
                self.read_anew();
                Ok(())
            }
            other => other,
        };
        if self.failures.passed("nf_tables events", passed)?.is_none() {
            std::thread::sleep(TICK);
            // Whatever could not be read was something.
            self.read_anew();
        }
        Ok(())
    }

    /// Anything may have changed.
    fn read_anew(&mut self) {
        self.concerns = Concerns::All;
        self.lint.changed();
        self.read_all();
        self.looked = None;
    }

    /// Takes back what the change concerns.
    fn answer(&mut self, engine: &Engine, concerns: &Concerns) {
        let gone = std::mem::take(&mut self.tables_gone);
        if gone > 0 {
            tracing::warn!(tables = gone, "tables were deleted from nf_tables; ours stand");
        }
        if self.backend.tunables().on_ruleset_change == OnRulesetChange::Keep {
            tracing::debug!("the ruleset changed");
            return;
        }
        // First: what was sighted before is not installed any more.
        let marks = self.tell();
        self.backend.firewall().changed();
        if marks {
            ask_marked_again(engine);
        }
        match (concerns, self.backend.tunables().revalidation.rate) {
            (Concerns::All, None) => {
                let all = FlushFilter { why: TakenBack::Firewall, ..FlushFilter::default() };
                let flushed = engine.flush(&all).unwrap_or_default();
                let rules: u64 = flushed.iter().map(|(_, n)| n).sum();
                tracing::info!(rules, "the ruleset changed: connections go back to the slow path");
            }
            (Concerns::All, Some(rate)) => {
                let conns: Vec<_> = engine.conns().collect();
                let count = conns.len();
                tracing::info!(
                    connections = count,
                    rate,
                    "the ruleset changed: connections go back to the slow path, so many a second"
                );
                self.paced = Paced::new(conns, rate.into());
            }
            (concerns, _) => {
                let mut connections = 0;
                for conn in engine.conns() {
                    let [o, r] = Direction::BOTH.map(|d| conn.arriving(d));
                    if [o.src(), o.dst(), r.src(), r.dst()].iter().any(|a| concerns.address(*a)) {
                        connections += 1;
                        engine.conn_retract(&conn, TakenBack::Firewall);
                    }
                }
                if connections > 0 {
                    tracing::info!(
                        connections,
                        "the ruleset changed: those that it names go back to the slow path"
                    );
                }
            }
        }
    }

    /// Lets those go through the stack whose turn it is, and looks whether anything changes without a
    /// word.
    fn renew(&mut self, engine: &Engine, elapsed: Duration) {
        for conn in self.paced.after(elapsed) {
            engine.conn_retract(&conn, TakenBack::Firewall);
        }
        let every = self.backend.tunables().revalidation.every;
        let look_every = if every.is_zero() { LOOK_EVERY } else { LOOK_EVERY.min(every / 6) };
        let due = self.looked.is_none_or(|at| at.elapsed() >= look_every);
        if due && self.look() {
            ask_marked_again(engine);
        }
        if every.is_zero() || self.silent.is_empty() {
            self.round = Paced::default();
            return;
        }
        for conn in self.round.after(elapsed) {
            engine.conn_retract(&conn, TakenBack::Renewed);
        }
        if self.round.conns.is_empty() {
            // Twice in the time: what was sighted just after a round has begun is in the next.
            let has_rule =
                |c: &ConnHandle| engine.slots(c).iter().any(|s| s.state == SlotState::Installed);
            let conns: Vec<_> = engine.conns().filter(has_rule).collect();
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let per_second = conns.len() as f64 / (every / 2).as_secs_f64();
            self.round = Paced::new(conns, per_second);
        }
    }

    /// What is known of the ruleset now. True when what sets marks of packets that have been routed is news.
    fn tell(&self) -> bool {
        self.tell_zones();
        self.tell_egress();
        self.tell_marks()
    }

    /// What stands at egress now.
    fn tell_egress(&self) {
        let egress = self.model.egress_chains();
        let told: Vec<_> = egress.iter().map(|c| (c.what.clone(), c.netdevs.clone())).collect();
        if self.backend.firewall().set_egress(egress) {
            for (what, netdevs) in told {
                tracing::warn!(
                    ?netdevs,
                    "{what} can refuse packets as they leave: what leaves there is not offloaded"
                );
            }
        }
    }

    /// What chooses conntrack zones now.
    fn tell_zones(&self) {
        let unclear = self.model.unclear_zones();
        let told: Vec<_> = unclear.iter().map(|z| z.what.clone()).collect();
        if self.backend.firewall().set_zones(Zones { unclear, legacy_raw: has_legacy_raw() }) {
            for what in told {
                tracing::warn!(
                    "{what}, which no rule matches: what arrives there is not offloaded"
                );
            }
        }
    }

    /// What sets marks of packets that have been routed now. True when that is news.
    fn tell_marks(&self) -> bool {
        let mut late = self.model.late_marks();
        for (late, family) in late.iter_mut().zip(["ip", "ip6"]) {
            if late.is_none() && legacy::tables().any(|(f, name)| f == family && name == "mangle") {
                *late = Some(Arc::from(format!("table mangle of {family}tables-legacy (perhaps)")));
            }
        }
        let news = self.backend.marks().set_late(late);
        if news {
            self.backend.changed();
        }
        news
    }

    /// Looks who stands in the hooks. True when something else sets marks of packets that have been routed.
    fn look(&mut self) -> bool {
        self.looked = Some(Instant::now());
        let marks = self.tell();
        let mut silent = self.model.silent();
        let (mut others, mut legacy, mut sighting) = (Vec::new(), false, true);
        let hooks = [NF_INET_PRE_ROUTING, NF_INET_FORWARD, NF_INET_POST_ROUTING];
        for (family, hook) in
            [NFPROTO_IPV4, NFPROTO_IPV6].into_iter().flat_map(|f| hooks.map(|h| (f, h)))
        {
            let Some(all) = self.registered(family, hook) else {
                legacy = legacy_tables();
                break;
            };
            legacy |= all.iter().any(is_legacy);
            if hook == NF_INET_POST_ROUTING {
                let ipv6 = family == NFPROTO_IPV6;
                sighting &= place_of(&all, self.ours()).is_some();
                others.extend(self.behind(Hook::Inet, ipv6, &all));
            }
        }
        if self.backend.config().bridged {
            for hook in hooks {
                let Some(all) = self.registered(NFPROTO_BRIDGE, hook) else { break };
                legacy |= all.iter().any(is_legacy);
                // All that is in the hook after the one where we are is behind us.
                if hook != NF_INET_PRE_ROUTING {
                    others.extend(self.behind(Hook::Bridge, false, &all));
                }
            }
        }
        if legacy {
            silent.push("iptables-legacy".to_owned());
        }
        // While the daemon starts or stops nothing is behind a chain that is not there, and nothing is sighted.
        if sighting && self.backend.firewall().set_behind(others.clone()) {
            for b in &others {
                tracing::warn!(
                    hook = %b.hook,
                    ipv6 = b.ipv6,
                    "{} stands behind the chain that sights, and can refuse what it has seen: nothing there is offloaded. Give it a lower priority, or register it after the daemon's start",
                    b.what
                );
            }
            if others.is_empty() {
                tracing::info!("nothing stands behind the chain that sights any more");
            }
        }
        if silent != self.silent {
            let every = self.backend.tunables().revalidation.every;
            if silent.is_empty() {
                tracing::info!("nothing in the firewall changes without an announcement any more");
            } else {
                tracing::info!(
                    what = silent.join(", "),
                    ?every,
                    "parts of the firewall change without an announcement: decisions are renewed ([revalidate] every)"
                );
            }
            self.silent = silent;
        }
        marks
    }

    fn behind(&self, hook: Hook, ipv6: bool, all: &[Registered]) -> Vec<Behind> {
        let of = |r: &Registered| Behind { hook, ipv6, what: r.to_string() };
        behind(all, self.ours()).into_iter().map(of).collect()
    }

    /// The table and the chain that sights.
    fn ours(&self) -> (&str, &str) {
        (self.backend.ledger_table(), CHAIN)
    }

    /// `None` when it cannot be told, which is said once.
    fn registered(&mut self, family: u8, hook: u32) -> Option<Vec<Registered>> {
        match self.hooks.read(family, hook) {
            Ok(all) => Some(all),
            Err(e) => {
                if !std::mem::replace(&mut self.blind, true) {
                    let absent = is_absent(&e);
                    tracing::warn!(
                        absent,
                        "who stands behind the chain that sights cannot be told (nfnetlink_hook, CONFIG_NETFILTER_NETLINK_HOOK): {e}. A chain of priority 2147483647 that was there before the daemon is passed by"
                    );
                }
                None
            }
        }
    }

    /// Learns the ruleset as it is. What a change interrupts again and again is left to its announcements.
    fn read_all(&mut self) {
        self.model = Model::default();
        let (ours, began) = (self.backend.ledger_table(), Instant::now());
        dump::read(&mut self.dumps, |table| table == ours, &mut Learns(&mut self.model));
        let took = began.elapsed();
        tracing::debug!(?took, "the ruleset was read");
        self.backend.rearming().ruleset_took(took);
    }
}

/// The model, as it reads a dump: what is read again it knows already.
struct Learns<'a>(&'a mut Model);

impl dump::Reader for Learns<'_> {
    fn begin(&mut self, _: dump::Part<'_>) {}

    fn message(&mut self, m: &Received<'_>) {
        self.0.message(m, &mut Transaction::default());
    }

    fn failed(&mut self, error: NetlinkError) {
        if !matches!(error, NetlinkError::Interrupted) {
            tracing::warn!("the ruleset could not be read: {error}");
        }
    }
}

/// Of the legacy iptables: its rules change without an announcement.
fn is_legacy(r: &Registered) -> bool {
    const MODULES: [&str; 5] = ["ip_tables", "ip6_tables", "iptable_", "ip6table_", "ebtable"];
    const FUNCTIONS: [&str; 3] = ["ipt_do_table", "ip6t_do_table", "ebt_do_table"];
    let of_module =
        |m: &str| MODULES.iter().any(|known| m.starts_with(known)) && !m.ends_with("_nat");
    r.module.as_deref().is_some_and(of_module)
        || r.function.as_deref().is_some_and(|f| FUNCTIONS.contains(&f))
}

/// Whether this network namespace has tables of iptables-legacy: what the kernel tells where it does not
/// tell who is registered in a hook (nfnetlink_hook; Debian's 6.1 has none).
fn legacy_tables() -> bool {
    legacy::tables().next().is_some()
}

/// Whether it has the one of them that can set conntrack zones.
fn has_legacy_raw() -> bool {
    legacy::tables().any(|(_, name)| name == "raw")
}

/// What was refused because marks were set late may be possible now.
fn ask_marked_again(engine: &Engine) {
    for conn in engine.conns() {
        for slot in engine.slots(&conn) {
            if slot.rejection.as_ref().is_some_and(|r| r.reason == Reason::MarkRouted) {
                let generation = slot.netdev.generation;
                engine.slot_retract(&conn, slot.direction, generation, TakenBack::Mark);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_tables_are_known_by_their_modules_and_nat_is_not_asked_twice() {
        let of = |module: &str, function: &str| Registered {
            module: Some(module.to_owned()),
            function: Some(function.to_owned()),
            ..Registered::default()
        };
        assert!(is_legacy(&of("ip_tables", "ipt_do_table")));
        assert!(is_legacy(&of("iptable_mangle", "iptable_mangle_hook")));
        assert!(!is_legacy(&of("iptable_nat", "iptable_nat_do_chain")));
        assert!(!is_legacy(&of("nf_conntrack", "ipv4_confirm")));
    }

    #[test]
    fn a_round_has_as_many_a_second_as_it_needs_and_none_twice() {
        let mut paced = Paced { conns: Vec::new(), per_second: 0.5, due: 0.0 };
        assert!(paced.after(Duration::from_secs(5)).is_empty());
        assert!((paced.due - 0.5).abs() < 1e-9, "the rest of a turn is kept: {}", paced.due);
    }
}
