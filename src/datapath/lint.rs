//! Looks for what packets that rules forward go without on this machine: what the firewall does to each packet, what
//! stands at egress and is passed by on purpose, what a NIC leaves undone. It changes nothing.

use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netdev_providers::HwFlags;
use netdev_providers::netlink::netfilter::NFGENMSG_LEN;
use netdev_providers::netlink::netfilter::nft::{NFT_MSG_GETTABLE, NFTA_TABLE_NAME, get_of};
use netdev_providers::netlink::socket::DUMP;
use netdev_providers::netlink::{Family, NetlinkError, Socket};

use super::backend::{Backend, Shared};
use super::firewall::met::Ruleset;
use super::firewall::{dump, legacy};
use super::netfilter::conntrack::accounting;
use super::skipped::Skipped;
use crate::engine::Engine;
use crate::engine::view::Chosen;

/// `NFTA_TABLE_OWNER`.
const NFTA_TABLE_OWNER: u16 = 7;

/// What of one kind is skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The kind.
    pub what: Skipped,
    /// Where it stands.
    pub places: Vec<String>,
}

/// What offloaded packets skip here, by kind, in the order of [`Skipped::ALL`]. Reads the ruleset anew, on a socket of
/// its own: with 100,000 rules that takes a second.
///
/// # Errors
/// The ruleset cannot be read, or changes all the time.
pub fn lint(backend: &Backend, engine: &Engine) -> Result<Vec<Finding>, NetlinkError> {
    let mut found: BTreeMap<Skipped, Vec<String>> = BTreeMap::new();
    let mut add = |what, place: String| found.entry(what).or_default().push(place);
    for met in ruleset(backend)?.met() {
        add(met.what, met.place);
    }
    for (family, table) in legacy::tables().filter(|(_, table)| table != "nat") {
        add(Skipped::Legacy, format!("{family}tables-legacy -t {table}"));
    }
    let tunables = backend.tunables();
    for link in backend.links().all() {
        if tunables.may_be_passed(&link.name)
            && let Some(who) = backend.egress().at(link.ifindex)
        {
            add(Skipped::Egress, format!("{}: {who}", link.name));
        }
    }
    for port in engine.ports() {
        let flags = port.netdev.hw_flags;
        let in_nic = port.in_hw > 0 || flags == HwFlags::SkipSw;
        let by_choice = port.chosen == Some(Chosen::InHardware) && flags != HwFlags::SkipHw;
        if port.provider.is_some() && (in_nic || by_choice) {
            add(Skipped::InHardware, format!("port {}", backend.links().name(port.netdev.ifindex)));
        }
    }
    if accounting().unwrap_or(false) {
        add(Skipped::Accounting, "net.netfilter.nf_conntrack_acct = 1".to_owned());
    }
    Ok(found.into_iter().map(|(what, places)| Finding { what, places }).collect())
}

/// The ruleset of others.
fn ruleset(backend: &Backend) -> Result<Ruleset, NetlinkError> {
    let mut socket = Socket::open(Family::Netfilter)?;
    let mut ours = Vec::new();
    let seq = socket.next_seq();
    socket.dump(&get_of(0, NFT_MSG_GETTABLE, DUMP, seq, |_| {}), seq, |m| {
        let attrs = m.attrs(NFGENMSG_LEN);
        let owner = attrs.find_type(NFTA_TABLE_OWNER).and_then(|a| a.be32());
        if owner.is_some_and(|owner| backend.is_own_change(owner)) {
            ours.extend(attrs.find_type(NFTA_TABLE_NAME).and_then(|a| a.str()).map(str::to_owned));
        }
    })?;
    let (mut ruleset, began) = (Ruleset::default(), Instant::now());
    dump::read(&mut socket, |table| ours.iter().any(|o| o == table), &mut ruleset);
    // It may have grown since it was read first.
    backend.rearming().ruleset_took(began.elapsed());
    match ruleset.take_error() {
        None => Ok(ruleset),
        Some(e) => Err(e),
    }
}

/// Tells in the log, in a line, when the kinds of what is skipped have become others: at the start, and some time after a
/// change of the firewall. Looks on a thread of its own, since a large ruleset takes longer than others can wait.
#[derive(Debug, Default)]
pub(super) struct Teller {
    looking: Option<JoinHandle<Option<Vec<Skipped>>>>,
    /// When it is to be looked, if something has changed.
    due: Option<Instant>,
    looked: Option<Instant>,
    told: Vec<Skipped>,
}

/// Who changes the firewall has done so for this long.
const QUIET: Duration = Duration::from_secs(2);
/// It is looked again no sooner.
const NOT_BEFORE: Duration = Duration::from_secs(30);

impl Teller {
    /// Something may be skipped from now on, or not any more.
    pub(super) fn changed(&mut self) {
        let now = Instant::now();
        let earliest = self.looked.map_or(now, |looked| looked + NOT_BEFORE);
        self.due = Some((now + QUIET).max(earliest));
    }

    /// Looks, when it is time, and tells what was found. Never waits.
    pub(super) fn go_on(&mut self, backend: &Shared, engine: &Engine) {
        if let Some(looking) = self.looking.take_if(|l| l.is_finished()) {
            match looking.join() {
                Ok(Some(now)) => self.tell(now),
                // A change came between; or there is no answer.
                Ok(None) => self.changed(),
                Err(_) => tracing::warn!("whoever looked for what offloaded packets skip panicked"),
            }
        }
        if self.looking.is_some() || self.due.is_none_or(|due| Instant::now() < due) {
            return;
        }
        (self.due, self.looked) = (None, Some(Instant::now()));
        let (backend, engine) = (backend.clone(), engine.clone());
        let look = move || match lint(&backend, &engine) {
            Ok(found) => Some(found.into_iter().map(|f| f.what).collect()),
            Err(e) => {
                tracing::debug!("what offloaded packets skip cannot be looked for: {e}");
                None
            }
        };
        let named = std::thread::Builder::new().name("ctoff-lint".into());
        match named.spawn(look) {
            Ok(looking) => self.looking = Some(looking),
            Err(e) => tracing::warn!("no thread to look for what offloaded packets skip: {e}"),
        }
    }

    fn tell(&mut self, now: Vec<Skipped>) {
        if now == self.told {
            return;
        }
        let (decides, counts): (Vec<_>, Vec<_>) = now.iter().partition(|s| s.decides());
        let names =
            |all: Vec<&Skipped>| all.into_iter().map(|s| s.name()).collect::<Vec<_>>().join(", ");
        let (decides, counts) = (names(decides), names(counts));
        if !decides.is_empty() {
            tracing::warn!(
                decides,
                counts,
                "offloaded packets skip what can decide about them: `ctoffload lint` says where, and what can be done"
            );
        } else {
            tracing::info!(counts, "offloaded packets skip nothing that decides about them");
        }
        self.told = now;
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        if let Some(looking) = self.looking.take() {
            let _ = looking.join();
        }
    }
}
