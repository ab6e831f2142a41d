//! Answers the CLI from the engine's views.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use netdev_providers::{Capability, Direction, HwFlags, Netdev, Reason, Tuple, Zone};

use super::config::{Config, parse_offload};
use super::conns::{Wanted, walk};
use super::explain::{Explained, explain};
use super::notify;
use super::source::Source;
use super::told::Told;
use crate::control::error::{ControlError, ErrorKind};
use crate::control::events::Publisher;
use crate::control::filter::ConnFilter;
use crate::control::info::{
    CapabilityInfo, Event, EventKind, Explain, FlushRequest, Flushed, LatencyCount, LintInfo,
    PortAddRequest, PortDelRequest, PortFlushed, PortInfo, PortReconciled, ProviderInfo,
    ReasonCount, ReconcileRequest, Refusal, Reloaded, Stats,
};
use crate::control::server::{ConnDump, ControlHandler};
use crate::control::wire::MAX_DATAGRAM;
use crate::datapath::lint::{Finding, lint};
use crate::datapath::routing::links::Links;
use crate::datapath::{AttachError, Backend, KernelDatapath, Left, Observer, PortSpec};
use crate::engine::conn::ConnHandle;
use crate::engine::datapath::SlotChange;
use crate::engine::latency::LatencyBucket;
use crate::engine::taken::TakenBack;
use crate::engine::view::{Chosen, PortView};
use crate::engine::{Engine, FlushFilter, NO_PROVIDER, PortAddError, PortDeleted};
use crate::one_line::one_line;

/// The daemon, as the control server sees it.
pub(super) struct Handler {
    engine: Engine,
    backend: Arc<Backend>,
    datapath: Mutex<KernelDatapath>,
    config: Arc<ArcSwap<Config>>,
    /// The configuration of the start: some of it counts until the end.
    started: Arc<Config>,
    source: Source,
    /// Held by who reads it anew.
    reloading: Mutex<()>,
}

/// Publishes what happens, when somebody watches.
pub(super) struct Events(pub(super) Publisher);

impl Observer for Events {
    fn slot_changed(&self, port: &Netdev, conn: &ConnHandle, d: Direction, change: SlotChange<'_>) {
        if !self.0.is_watched() {
            return;
        }
        let (kind, rejection) = match change {
            SlotChange::Installed => (EventKind::Installed, None),
            SlotChange::Deleted => (EventKind::Deleted, None),
            SlotChange::Rejected(r) => (EventKind::Rejected, Some(r)),
        };
        self.0.publish(Event {
            kind,
            port: Some(port.name.clone()),
            ifindex: Some(port.ifindex.get()),
            zone: Some(conn.key().zone.0),
            tuple: Some(conn.key().original),
            epoch: Some(conn.epoch().0),
            direction: Some(d),
            reason: rejection.map(|r| r.reason.name().to_owned()),
            detail: rejection.and_then(|r| r.detail.as_deref().map(str::to_owned)),
            ..Event::default()
        });
    }

    fn port_added(&self, port: &Netdev, class: Option<&str>) {
        self.0.publish(Event {
            kind: EventKind::PortAdded,
            port: Some(port.name.clone()),
            ifindex: Some(port.ifindex.get()),
            provider: class.map(str::to_owned),
            ..Event::default()
        });
    }

    fn port_deleted(&self, port: &Netdev, _: &PortDeleted) {
        self.0.publish(Event {
            kind: EventKind::PortDeleted,
            port: Some(port.name.clone()),
            ifindex: Some(port.ifindex.get()),
            ..Event::default()
        });
    }
}

impl Handler {
    pub(super) fn new(
        engine: Engine,
        backend: Arc<Backend>,
        datapath: KernelDatapath,
        config: Arc<ArcSwap<Config>>,
        source: Source,
    ) -> Self {
        let (datapath, started) = (Mutex::new(datapath), config.load_full());
        Self { engine, backend, datapath, config, started, source, reloading: Mutex::default() }
    }

    /// Reads the configuration anew, and has what can be changed changed; `who` asks for it. `None`: there is none.
    pub(super) fn reread(&self, who: &str) -> Result<Option<Reloaded>, ControlError> {
        let _one_at_a_time = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = self.source.file().map(|f| f.display().to_string()) else {
            tracing::info!("{who}: going on as before (there is no configuration file)");
            return Ok(None);
        };
        notify::reloading();
        let reloaded = self.read_anew(who, file);
        notify::ready(&self.status());
        reloaded.map(Some)
    }

    fn read_anew(&self, who: &str, file: String) -> Result<Reloaded, ControlError> {
        let new = self.source.read().map_err(|e| {
            let why = one_line(&e);
            tracing::error!("{who}: nothing changes: {why}");
            ControlError::invalid(why)
        })?;
        let kept = self.started.fixed_keys_that_differ(&new);
        if !kept.is_empty() {
            tracing::warn!(
                keys = kept.join(", "),
                "{who}: read at the start only, and left as they were"
            );
        }
        let ports_changed = self.config.load().has_other_ports(&new);
        if ports_changed {
            tracing::info!(
                "{who}: [[port]] holds for netdevs that come from now on; ports stay bound"
            );
        }
        let flushed = self.reconfigure(new);
        tracing::info!(file, "{who}: the configuration was read anew");
        let kept = kept.into_iter().map(str::to_owned).collect();
        Ok(Reloaded { file, kept, ports_changed, flushed })
    }

    /// In one line, for the service manager. It is an answer of the engine's, which a daemon that hangs does not give.
    pub(super) fn status(&self) -> String {
        let (ports, conns) = (self.engine.ports(), self.engine.conn_count());
        let bound = ports.iter().filter(|p| p.provider.is_some()).count();
        let rules: u64 = ports.iter().map(|p| p.slots.installed).sum();
        format!(
            "{} ports, {bound} of them with a provider; {conns} connections, {rules} rules",
            ports.len()
        )
    }

    /// Has what can be changed be as this configuration says, from now on. How many rules were taken back, if
    /// connections are looked at anew.
    fn reconfigure(&self, config: Config) -> Option<u64> {
        let (before, now) = (self.backend.tunables(), config.tunables());
        let admission =
            (&before.admission, &before.bypass_egress) != (&now.admission, &now.bypass_egress);
        self.backend.set_tunables(now);
        self.config.store(Arc::new(config));
        admission.then(|| {
            let all = FlushFilter { why: TakenBack::Admission, ..FlushFilter::default() };
            let flushed = self.engine.flush(&all).unwrap_or_default();
            let rules: u64 = flushed.iter().map(|(_, n)| n).sum();
            tracing::info!(rules, "admission changed: all connections are looked at anew");
            rules
        })
    }

    /// Nothing is sighted any more, and rules go, also while somebody is changing a port, which may take its
    /// time: then [`stop`](Self::stop) has to wait.
    pub(super) fn take_back(&self) {
        self.backend.remove_ledger();
        let flushed = self.engine.flush(&FlushFilter::default()).unwrap_or_default();
        let rules: u64 = flushed.iter().map(|(_, n)| n).sum();
        tracing::info!(rules, "rules taken back");
    }

    /// Ends the datapath; returns what may be left in the kernel, in words.
    pub(super) fn stop(&self) -> Vec<String> {
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner).stop()
    }

    /// The same, but the rules stay for the next daemon.
    pub(super) fn leave(&self) -> Left {
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner).leave()
    }

    /// Whether they are to, as things are configured now.
    pub(super) fn keeps_rules(&self) -> bool {
        self.config.load().keep_rules
    }

    fn links(&self) -> &Links {
        self.backend.links()
    }

    fn told(&self) -> Told {
        Told {
            engine: self.engine.clone(),
            links: self.links().clone(),
            fdb: self.backend.fdb().clone(),
        }
    }

    fn port_view(&self, name: &str) -> Result<PortView, ControlError> {
        let is_meant = |n: &Netdev| self.links().name(n.ifindex) == name || n.name == name;
        let netdev = self.engine.netdevs().into_iter().find(is_meant);
        netdev
            .and_then(|netdev| self.engine.port_view(netdev.ifindex))
            .ok_or_else(|| ControlError::not_found(format!("there is no port '{name}'")))
    }

    fn find_conn(&self, tuple: &Tuple, zone: Option<Zone>) -> Option<ConnHandle> {
        self.engine.conns_of(Some(tuple), zone).into_iter().next()
    }
}

/// Why a port has the class that it has.
const fn chosen_by(chosen: Chosen, hw_flags: HwFlags) -> &'static str {
    match (chosen, hw_flags) {
        (Chosen::Listed, _) => "the first of its list that accepts",
        (Chosen::InHardware, _) => "by default: the NIC carries its rules",
        (Chosen::First, HwFlags::SkipHw) => "by default: the first that accepts",
        (Chosen::First, _) => "by default: the first that accepts, as the NIC carries no rules",
    }
}

fn port_info(links: &Links, v: PortView) -> PortInfo {
    let state = match (v.draining, &v.fault, &v.slow, v.provider) {
        (true, ..) => "draining",
        (false, Some(_), ..) => "faulty",
        (false, None, Some(_), _) => "slow",
        (false, None, None, Some(_)) => "bound",
        (false, None, None, None) => "unbound",
    };
    PortInfo {
        ifindex: v.netdev.ifindex.get(),
        name: links.name(v.netdev.ifindex),
        generation: v.netdev.generation.get(),
        provider: v.provider.map(str::to_owned),
        chosen: v.chosen.map(|chosen| chosen_by(chosen, v.netdev.hw_flags).to_owned()),
        about: v.about,
        capabilities: v.capabilities.into_iter().map(capability_info).collect(),
        offload: v.netdev.hw_flags.to_string(),
        state: state.to_owned(),
        fault: v.fault,
        slow: v.slow.map(|s| s.to_string()),
        undeleted: v.undeleted,
        in_front: v.in_front,
        refusals: v
            .refusals
            .into_iter()
            .map(|r| Refusal { class: r.class.to_owned(), why: r.why })
            .collect(),
        pending: v.slots.pending,
        installed: v.slots.installed,
        rejected: v.slots.rejected,
        in_hw: v.in_hw,
        capacity: v.capacity,
        capacity_learnt: v.capacity_learnt,
        evictions: v.evictions,
        sights: v.sights,
        adds: v.totals.adds,
        deletes: v.totals.deletes,
        flushed: v.totals.flushed,
        packets: v.packets,
        bytes: v.bytes,
        reasons: reason_counts(v.totals.reasons),
        latency: latency_counts(&v.latency),
    }
}

fn capability_info(c: Capability) -> CapabilityInfo {
    let yes = |answer: &Option<Result<(), String>>| answer.as_ref().map(Result::is_ok);
    let (software, hardware) = (yes(&c.software), yes(&c.hardware));
    CapabilityInfo {
        name: c.name,
        software,
        software_why: c.software.and_then(Result::err),
        hardware,
        hardware_why: c.hardware.and_then(Result::err),
    }
}

fn latency_counts<'a>(buckets: impl IntoIterator<Item = &'a LatencyBucket>) -> Vec<LatencyCount> {
    let mut sums = std::collections::BTreeMap::new();
    for b in buckets {
        *sums.entry((b.op.name(), b.below_us)).or_insert(0) += b.count;
    }
    sums.into_iter()
        .map(|((op, below_us), count)| LatencyCount {
            op: op.to_owned(),
            below_us: (below_us != u64::MAX).then_some(below_us),
            count,
        })
        .collect()
}

fn reason_counts(reasons: Vec<(Reason, u64)>) -> Vec<ReasonCount> {
    reasons
        .into_iter()
        .map(|(r, count)| ReasonCount { reason: r.name().to_owned(), count })
        .collect()
}

/// Of very many places, as many as a message has room for.
fn lint_info(found: Finding) -> LintInfo {
    const ROOM: usize = MAX_DATAGRAM / 2;
    let Finding { what, places } = found;
    let count = places.len() as u64;
    let mut left = ROOM;
    let fits = |place: &String| {
        // With its attribute's header, and filled up.
        left = left.saturating_sub(place.len() + 8);
        left > 0
    };
    LintInfo {
        name: what.name().to_owned(),
        decides: what.decides(),
        skips: what.words().to_owned(),
        advice: what.advice().to_owned(),
        count,
        places: places.into_iter().take_while(fits).collect(),
    }
}

impl ControlHandler for Handler {
    fn ports(&self) -> Result<Vec<PortInfo>, ControlError> {
        Ok(self.engine.ports().into_iter().map(|p| port_info(self.links(), p)).collect())
    }

    fn conns(&self, filter: &ConnFilter) -> Result<ConnDump, ControlError> {
        let port = match &filter.port {
            Some(name) => Some(self.port_view(name)?.netdev.generation),
            None => None,
        };
        let told = self.told();
        let wanted = Wanted::new(filter.clone(), port, &told)?;
        Ok(Box::new(walk(told, wanted)))
    }

    fn providers(&self) -> Result<Vec<ProviderInfo>, ControlError> {
        let classes = self.engine.classes();
        Ok((0..)
            .zip(classes)
            .map(|(priority, (class, ports))| ProviderInfo {
                class: class.to_owned(),
                priority,
                ports: ports as u64,
                note: match class {
                    "tc-flower" => "Linux TC flower rules, in NIC hardware where it takes them",
                    "nf-flowtable" => {
                        "the flowtable of nf_tables, in NIC hardware where it takes it"
                    }
                    "ebpf" => "a BPF program and a table for each port: XDP, tcx",
                    _ => "",
                }
                .to_owned(),
            })
            .collect())
    }

    fn lint(&self) -> Result<Vec<LintInfo>, ControlError> {
        let found = lint(&self.backend, &self.engine)
            .map_err(|e| ControlError::internal(format!("the ruleset cannot be read: {e}")))?;
        Ok(found.into_iter().map(lint_info).collect())
    }

    fn stats(&self) -> Result<Stats, ControlError> {
        let ports = self.engine.ports();
        let counts = self.backend.counts();
        let totals = self.engine.totals();
        let get = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
        Ok(Stats {
            instance: self.engine.instance().0.get(),
            uptime_ms: self.engine.now_ms(),
            connections: self.engine.conn_count() as u64,
            slots_installed: ports.iter().map(|p| p.slots.installed).sum(),
            slots_pending: ports.iter().map(|p| p.slots.pending).sum(),
            slots_rejected: ports.iter().map(|p| p.slots.rejected).sum(),
            sights: get(&counts.sights),
            sights_lost: get(&counts.sights_lost),
            ledger_elements: self.backend.ledger_elements(),
            ledger_size: self.backend.ledger_size(),
            conntrack_events: get(&counts.conntrack_events),
            conntrack_lost: get(&counts.conntrack_lost),
            sweeps: get(&counts.sweeps),
            last_sweep_ms: get(&counts.last_sweep_ms),
            sweep_pause_ms: get(&counts.sweep_pause_ms),
            adds: totals.adds,
            deletes: totals.deletes,
            flushed: totals.flushed,
            add_failures: totals.reasons.iter().map(|(_, n)| n).sum(),
            reasons: reason_counts(totals.reasons),
            latency: latency_counts(ports.iter().flat_map(|p| &p.latency)),
        })
    }

    fn explain(&self, tuple: &Tuple, zone: Option<Zone>) -> Result<Explain, ControlError> {
        let explained = explain(&self.engine, &self.backend, &self.config.load_full(), tuple, zone)
            .map_err(|e| ControlError::internal(format!("conntrack was asked for it: {e}")))?;
        let Explained { summary, conn, verdicts } = explained;
        let told = self.told();
        let info = |conn| told.conn(&conn, &self.engine.slots(&conn));
        Ok(Explain { summary, conn: conn.map(info), verdicts })
    }

    fn flush(&self, request: &FlushRequest) -> Result<Flushed, ControlError> {
        let zone = request.zone.map(Zone);
        if let Some(tuple) = &request.tuple
            && self.find_conn(tuple, zone).is_none()
        {
            return Err(ControlError::not_found(format!("there is no connection {tuple}")));
        }
        let port = match &request.port {
            Some(name) => Some(self.port_view(name)?.netdev.ifindex),
            None => None,
        };
        let filter = FlushFilter { port, zone, tuple: request.tuple, why: TakenBack::Asked };
        let flushed =
            self.engine.flush(&filter).map_err(|e| ControlError::not_found(e.to_string()))?;
        Ok(Flushed {
            count: flushed.iter().map(|(_, n)| n).sum(),
            ports: flushed
                .into_iter()
                .map(|(netdev, count)| PortFlushed {
                    port: self.links().name(netdev.ifindex),
                    count,
                })
                .collect(),
        })
    }

    fn reconcile(&self, request: &ReconcileRequest) -> Result<Vec<PortReconciled>, ControlError> {
        let port = match &request.port {
            Some(name) => Some(self.port_view(name)?.netdev.ifindex),
            None => None,
        };
        let done =
            self.engine.reconcile(port).map_err(|e| ControlError::not_found(e.to_string()))?;
        Ok(done
            .into_iter()
            .map(|(netdev, r)| PortReconciled {
                port: self.links().name(netdev.ifindex),
                adopted: r.adopted,
                removed: r.removed,
                foreign: r.foreign,
                fault: r.fault.map(|f| f.to_string()),
            })
            .collect())
    }

    fn reload(&self) -> Result<Reloaded, ControlError> {
        self.reread("reload")?.ok_or_else(|| {
            ControlError::not_found(
                "there is no configuration file: the daemon was started without --config, and the default one is not there",
            )
        })
    }

    fn port_add(&self, request: &PortAddRequest) -> Result<PortInfo, ControlError> {
        let link = self.links().by_name(&request.name).ok_or_else(|| {
            ControlError::not_found(format!("there is no netdev '{}'", request.name))
        })?;
        let configured = self.config.load().port(&request.name);
        let hw_flags = match &request.offload {
            Some(text) => parse_offload(text).ok_or_else(|| {
                ControlError::invalid(format!("'{text}' is not both, skip_sw or skip_hw"))
            })?,
            None => configured.as_ref().map_or(HwFlags::Both, |c| c.hw_flags),
        };
        let providers = if request.providers.is_empty() {
            configured.and_then(|c| c.providers)
        } else {
            Some(request.providers.clone())
        };
        let capacity =
            request.capacity.or(self.config.load().port(&request.name).and_then(|c| c.capacity));
        let wants_none = providers.as_ref().is_some_and(|p| p.iter().any(|n| n == NO_PROVIDER));
        let datapath = self.datapath.lock().unwrap_or_else(PoisonError::into_inner);
        datapath.attach(&link, PortSpec { providers, hw_flags, capacity }).map_err(|e| {
            let kind = match e {
                AttachError::NotAPort(_) => ErrorKind::Unsupported,
                AttachError::Engine(PortAddError::AlreadyBound { .. }) => ErrorKind::AlreadyBound,
                AttachError::Engine(PortAddError::Busy(_)) => ErrorKind::Busy,
                AttachError::Engine(PortAddError::Registry(_)) => ErrorKind::InvalidArgument,
                AttachError::Engine(PortAddError::Thread(_)) => ErrorKind::Internal,
            };
            ControlError::new(kind, e.to_string())
        })?;
        let info = port_info(self.links(), self.port_view(&request.name)?);
        if info.provider.is_some() || wants_none {
            return Ok(info);
        }
        // Asked for by hand, and nothing took it: as if it had not been asked for.
        let _ = datapath.detach(link.ifindex);
        let why: Vec<_> =
            info.refusals.iter().map(|r| format!("{} declined: {}", r.class, r.why)).collect();
        Err(ControlError::new(ErrorKind::Unsupported, why.join("; ")))
    }

    fn port_del(&self, request: &PortDelRequest) -> Result<(), ControlError> {
        let netdev = self.port_view(&request.name)?.netdev;
        let datapath = self.datapath.lock().unwrap_or_else(PoisonError::into_inner);
        let deleted =
            datapath.detach(netdev.ifindex).map_err(|e| ControlError::not_found(e.to_string()))?;
        match deleted.faults.first() {
            None => Ok(()),
            Some(fault) => Err(ControlError::internal(format!(
                "the port is deleted, but something may be left on the netdev: {fault}"
            ))),
        }
    }
}
