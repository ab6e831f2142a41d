//! What a backend implements. A vendor can work from this page.
//!
//! # Life
//! [`ProviderClass::bind`](super::class::ProviderClass::bind) makes a provider for one netdev. From
//! then on the engine calls [`submit`](Provider::submit), [`usage`](Provider::usage) and
//! [`flush`](Provider::flush) until it calls [`release`](Provider::release), once, as the last
//! call. Nothing rebinds a provider to another netdev, and no netdev has two providers.
//!
//! # Threads
//! | call | thread | may block |
//! |---|---|---|
//! | [`can_offload`](Provider::can_offload), [`can_track`](Provider::can_track) | any, also a packet thread, concurrently | **no**: no lock, no system call |
//! | [`submit`](Provider::submit) | the port's queue thread, one call at a time | yes |
//! | [`repair`](Provider::repair), [`observe`](Provider::observe), [`flush`](Provider::flush), [`release`](Provider::release) | the port's queue thread: never during a `submit` | yes |
//! | [`usage`](Provider::usage) | a sweep thread, one call at a time, **concurrently** with `submit` | yes |
//!
//! # Promises of the engine
//! * At most one operation on a rule is in flight: no delete of a rule whose add has not
//!   completed, no second add of a flow that is installed or pending.
//! * Operations of one match are submitted in the order in which they must take effect: when a
//!   tuple is reused, the delete of the old rule comes before the add of the new one.
//! * A cookie is never used for two rules of one port at the same time.
//! * After [`flush`](Provider::flush) returned, no delete follows for the rules it removed.
//! * [`release`](Provider::release) is the last call. Operations that have not completed by then, for
//!   longer than the limit, are the only thing that it can come before.
//!
//! # Duties of the provider
//! * Complete every operation exactly once ([`Operation`] sees to that), in any order, on any
//!   thread, at once or later.
//! * **Failure means the slow path, never a drop**: packets that no rule matches go on as if the
//!   provider were not there. A rule is installed whole or not at all.
//! * Take effect in submission order for operations of one match.
//! * Touch only rules it installed itself, recognised by [`Cookie`].
//! * Come back, in whatever time it takes. While nothing has for longer than the engine's limit, the
//!   port counts as slow: it gets no offers, and others go on; it goes on by itself when something
//!   comes back. A `usage` that takes long should report what it has as it goes.
//! * Install nothing after [`release`](Provider::release): an add that completes behind it completes
//!   with [`NetdevGone`](super::reason::Reason::NetdevGone).
//! * Do not panic. A panic is contained: the port is marked faulty and offers stop.
//!
//! # Not promised
//! * That `Established` or a delete is ever called for a rule: a flush may come first, or the
//!   netdev may vanish.
//! * That [`Forward::egress`](super::flow::Forward::egress) still exists when the operation is
//!   carried out. The engine deletes rules that forward into a port that goes.

use nix::errno::Errno;

use super::flow::{Flow, Tracked};
use super::operation::Operation;
use super::reason::Rejection;
use super::types::{Cookie, RuleId, Tuple};

/// A failure of the backend as a whole, not of one operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}{}{}", detail_of(.detail.as_deref()), errno_of(*.errno))]
pub struct Fault {
    /// What was being done, in words: `adding the clsact qdisc`.
    pub what: String,
    /// The kernel's error, where there was one.
    pub errno: Option<Errno>,
    /// The kernel's extended ACK, where there was one.
    pub detail: Option<String>,
}

fn detail_of(detail: Option<&str>) -> String {
    detail.map(|d| format!(": {d}")).unwrap_or_default()
}

fn errno_of(errno: Option<Errno>) -> String {
    errno.map(|e| format!(": {} ({e:?})", e.desc())).unwrap_or_default()
}

impl Fault {
    /// A failure with words only.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), errno: None, detail: None }
    }

    /// True when the netdev does not exist (any more).
    #[must_use]
    pub fn is_netdev_gone(&self) -> bool {
        self.errno == Some(Errno::ENODEV)
    }
}

/// Traffic that a rule has carried, since it was installed. Monotonic while the rule lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets, in hardware and software together.
    pub packets: u64,
    /// Bytes, of whole frames as the backend counts them.
    pub bytes: u64,
}

/// One rule as a usage sweep found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleReport {
    /// Which rule: the engine finds the slot by it.
    pub cookie: Cookie,
    /// The provider's name for it.
    pub rule: RuleId,
    /// What it carried.
    pub counters: Counters,
    /// Whether the NIC has it, where the backend can tell.
    pub in_hw: Option<bool>,
}

/// A rule that an engine which died has left on the netdev, as the backend reads it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The provider's name for it: for [`Request::Adopt`](super::operation::Request::Adopt) or
    /// [`Request::Delete`](super::operation::Request::Delete).
    pub rule: RuleId,
    /// What marks it.
    pub cookie: Cookie,
    /// Addresses and ports of its packets on arrival; `None` where the backend cannot tell.
    pub tuple: Option<Tuple>,
    /// What it has carried.
    pub counters: Counters,
}

/// What stands on a netdev beside the provider's own rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Rules of engines that died, and of this one that nobody holds.
    pub leftovers: Vec<Leftover>,
    /// How many rules of anybody else there are. They are never touched.
    pub foreign: u64,
}

/// What became of the rules while a provider was putting things in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Repaired {
    /// Nothing that the engine would have to know.
    AsItWas,
    /// All of them are gone, or had to go: the engine flushes the port, and offers again what is seen.
    RulesGone,
}

/// Something that a rule can consist of, and whether the netdev takes it: in software, in hardware;
/// `None`: not tried, because the port puts no rules there. An error has the kernel's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What was tried, in the backend's words: `flow ipv6 udp nat`, `action pedit`.
    pub name: String,
    /// In the kernel.
    pub software: Option<Result<(), String>>,
    /// In the NIC.
    pub hardware: Option<Result<(), String>>,
}

/// An offload backend on one netdev. See the [module](self) for life, threads, promises, duties.
pub trait Provider: Send + Sync {
    /// Whether a flow of this shape can be offloaded at all: the address family, the protocol, NAT
    /// or none, the MTUs. Cheap and pure; a flow that is refused here is not
    /// submitted. `Ok` is no promise that an add succeeds.
    ///
    /// # Errors
    /// The reason, which is counted and shown.
    fn can_offload(&self, flow: &Flow) -> Result<(), Rejection>;

    /// Whether these packets can be tracked without being forwarded by the same rule. As
    /// [`can_offload`](Self::can_offload); a backend that does not write this forwards only.
    ///
    /// # Errors
    /// The reason, which is counted and shown.
    fn can_track(&self, tracked: &Tracked) -> Result<(), Rejection> {
        let _ = tracked;
        Err(Tracked::unsupported())
    }

    /// Carries out operations. The vector is a batch: a backend that talks to a kernel or a device
    /// should need few round trips for it. Ownership of the operations passes to the provider,
    /// which may complete them before it returns or later.
    ///
    fn submit(&self, batch: Vec<Operation>);

    /// Puts in order what was found broken, or may be: called on the port's queue thread, never during a
    /// `submit`, after a [`usage`](Self::usage) that failed, a change of the netdev's name, and when others have
    /// done something to the netdev (its ingress qdisc, filters, XDP programs). An empty batch, for those who
    /// look after such things whenever they are called.
    fn repair(&self) -> Repaired {
        self.submit(Vec::new());
        Repaired::AsItWas
    }

    /// Filters and programs of others that packets pass before they come to rules of this provider, as far as is
    /// known, in words: what these take does not reach the rules. For `ctoffload port show` and `explain`.
    fn in_front(&self) -> Vec<String> {
        Vec::new()
    }

    /// Reads what stands on the netdev beside this provider's own rules. The first half of a
    /// **reconciliation**, whose parts are apart so that each backend does only what it can:
    ///
    /// | | |
    /// |---|---|
    /// | observe | this call: says what is there, changes nothing |
    /// | create | [`Request::Add`](super::operation::Request::Add) |
    /// | update | [`Request::Adopt`](super::operation::Request::Adopt): what is there becomes what should be there |
    /// | remove | [`Request::Delete`](super::operation::Request::Delete) |
    ///
    /// The engine observes once after bind, and on demand; it finds the connections that the
    /// leftovers belong to, and submits an `Adopt` or a `Delete` for **every** one of them. Until
    /// then they are as they were: a backend whose rules outlive their engine leaves them forwarding
    /// over a restart. One that keeps nothing beyond its process has nothing to observe.
    ///
    /// # Errors
    /// When the netdev could not be read to the end; nothing is adopted or removed then.
    fn observe(&self) -> Result<Observed, Fault> {
        Ok(Observed::default())
    }

    /// Reports every rule of this provider: one call of `report` per rule, in any order.
    ///
    /// # Errors
    /// When the sweep could not be finished (interrupted, netdev gone). What was reported until
    /// then is valid; rules that were not reported are merely unknown, not gone.
    fn usage(&self, report: &mut dyn FnMut(RuleReport)) -> Result<(), Fault>;

    /// The NIC may have lost all that it was given (a firmware reset): a rule that was reported as
    /// [`in_hw`](RuleReport::in_hw) does nothing, whose delete follows, and maybe an add; or the netdev's
    /// link has come back after it was down, and [`repair`](Self::repair) follows. Whatever
    /// else the provider has put there is to be put there again before the next add. Called on
    /// threads of the engine's and the datapath's, concurrently with `submit`; it does not block.
    fn hardware_suspect(&self) {}

    /// Removes every rule of this provider, in as few messages as the backend allows, and returns
    /// how many there were. Rules that the netdev lost on its own count too. All operations given
    /// to `submit` have completed when this is called.
    ///
    /// # Errors
    /// When rules may be left. The engine calls again, or goes on to `release`.
    fn flush(&self) -> Result<u64, Fault>;

    /// Whether the rules go on forwarding when the process ends, however it ends, so that the next one
    /// [observes](Self::observe) them and they can be adopted. An engine that is
    /// left to a successor then calls neither [`flush`](Self::flush) nor
    /// [`release`](Self::release), and never drops this: its rules, its program or its qdisc are to stay
    /// as they are. Called on the port's thread, after the last `submit`.
    fn outlives(&self) -> bool {
        false
    }

    /// The last call: removes rules that are left, and whatever `bind` made on the netdev (the
    /// qdisc, if it was made there and nobody else uses it). That the netdev is gone is success.
    ///
    /// # Errors
    /// When something of ours may be left on the netdev.
    fn release(&self) -> Result<(), Fault>;

    /// What was found out about **this** netdev at bind, by trial: what it takes and what not. It is
    /// shown (`ctoffload port show NAME`), and [`can_offload`](Self::can_offload) answers by it.
    fn capabilities(&self) -> Vec<Capability> {
        Vec::new()
    }

    /// One line on what was found out about the netdev at bind, for `ctoffload port show`.
    fn describe(&self) -> String {
        String::new()
    }
}
