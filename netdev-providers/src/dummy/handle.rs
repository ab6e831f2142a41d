//! The handle by which a test drives the class: how it behaves, what happens, what is there.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::state::{Call, DummyRule, Pending, State, complete};
use crate::contract::flow::Flow;
use crate::contract::provider::{Counters, Fault};
use crate::contract::reason::Rejection;
use crate::contract::types::{Cookie, Ifindex, RuleId};

/// The class, and the handle that a test drives it by: clones share everything.
#[derive(Clone)]
pub struct DummyClass {
    pub(super) name: &'static str,
    state: Arc<Mutex<State>>,
    /// What hangs may have been let go.
    let_go: Arc<Condvar>,
}

impl Default for DummyClass {
    fn default() -> Self {
        Self::new("dummy")
    }
}

impl DummyClass {
    /// A class of this name, which accepts every netdev and every flow, completes at once, and has
    /// room for any number of rules.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self { name, state: Arc::default(), let_go: Arc::default() }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Panics on demand are raised outside the lock; should another occur, tests want to look on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- How it behaves ---------------------------------------------------------------------------

    /// From now on each port holds that many rules at most; further adds get
    /// [`Reason::TableFull`](crate::Reason::TableFull).
    pub fn set_capacity(&self, rules: usize) {
        self.state().capacity = rules;
    }

    /// Operations submitted from now on complete that long after, by the clock of the test
    /// ([`advance`](Self::advance)), or when they are released. `None`: at once, in `submit`.
    /// [`Duration::MAX`]: only when they are released.
    pub fn set_latency(&self, latency: Option<Duration>) {
        self.state().latency = latency;
    }

    /// Operations submitted to this netdev from now on take that long each, one after the other, by
    /// the clock of the test, as those of a NIC that writes its rules one by one; any
    /// [latency](Self::set_latency) comes on top. `None`: no time, and what waits is done at once.
    pub fn set_service_time(&self, ifindex: Ifindex, each: Option<Duration>) {
        let decided = {
            let mut state = self.state();
            match each {
                Some(each) => {
                    state.service.insert(ifindex, each);
                    Vec::new()
                }
                None if state.service.remove(&ifindex).is_some() => state.hurry(ifindex),
                None => Vec::new(),
            }
        };
        complete(decided);
    }

    /// What adds report of the hardware from now on; `Some(true)` at the beginning.
    pub fn set_in_hw(&self, in_hw: Option<bool>) {
        self.state().in_hw = in_hw;
    }

    /// What the driver says of adds from now on that succeed; nothing at the beginning.
    pub fn set_nic_said(&self, words: Option<&str>) {
        self.state().nic_said = words.map(Into::into);
    }

    /// The next `n` operations that complete fail like this, and have no effect.
    pub fn fail_next(&self, n: u64, why: impl Into<Rejection>) {
        let why = why.into();
        self.state().failures.extend((0..n).map(|_| (0, why.clone())));
    }

    /// Once: after `skip` further completions, the next one fails like this. Failures that were
    /// asked for earlier come first.
    pub fn fail_after(&self, skip: u64, why: impl Into<Rejection>) {
        self.state().failures.push_back((skip, why.into()));
    }

    /// Once: after `skip` further calls of this kind, the next one panics.
    pub fn panic_after(&self, call: Call, skip: u64) {
        self.state().panics.push((call, skip));
    }

    /// Calls of this kind do not come back from now on, as those of a driver that hangs.
    pub fn hang(&self, call: Call) {
        self.state().hanging.insert((call, None));
    }

    /// The same for calls about this netdev alone.
    pub fn hang_on(&self, call: Call, ifindex: Ifindex) {
        self.state().hanging.insert((call, Some(ifindex)));
    }

    /// Calls of this kind, about this netdev alone or (`None`) about all, do what they are for, and come
    /// back late: with what was true at their beginning. A `usage` has read the rules and has reported
    /// none; the operations of a `submit` are carried out and have not completed.
    pub fn be_late(&self, call: Call, ifindex: Option<Ifindex>) {
        self.state().late.insert((call, ifindex));
    }

    /// How many calls are being held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.state().held
    }

    /// Lets go what [`hang`](Self::hang) and [`be_late`](Self::be_late) hold, and keeps nothing more.
    pub fn let_go(&self) {
        let mut state = self.state();
        state.hanging.clear();
        state.late.clear();
        self.let_go.notify_all();
    }

    /// Panics, with nothing locked, or hangs, if the test wants this call to.
    pub(super) fn enter(&self, call: Call, ifindex: Option<Ifindex>) {
        let panics = self.state().panics_now(call);
        #[expect(clippy::panic, reason = "asked for by the test")]
        if panics {
            panic!("{call:?} panics on demand");
        }
        self.wait_while(call, ifindex, |state| &state.hanging);
    }

    /// The call has done what it is for, and may be late.
    pub(super) fn come_back(&self, call: Call, ifindex: Ifindex) {
        self.wait_while(call, Some(ifindex), |state| &state.late);
    }

    fn wait_while(
        &self,
        call: Call,
        ifindex: Option<Ifindex>,
        held: impl Fn(&State) -> &HashSet<(Call, Option<Ifindex>)>,
    ) {
        let is_held = |state: &State| {
            let held = held(state);
            held.contains(&(call, None)) || held.contains(&(call, ifindex))
        };
        let mut state = self.state();
        if is_held(&state) {
            state.held += 1;
            state = self
                .let_go
                .wait_while(state, |state| is_held(state))
                .unwrap_or_else(PoisonError::into_inner);
            state.held -= 1;
        }
    }

    /// `can_offload` refuses every flow like this; `None`: none.
    pub fn refuse_shapes(&self, why: Option<Rejection>) {
        self.state().shape_refusal = why;
    }

    /// Bind declines this netdev (`None`: every netdev) with these words from now on.
    pub fn decline(&self, ifindex: Option<Ifindex>, why: impl Into<String>) {
        self.state().decline.insert(ifindex, why.into());
    }

    /// The NIC of this netdev carries rules of the class from now on; none does at the beginning.
    pub fn carry_in_hardware(&self, ifindex: Ifindex) {
        self.state().hardware.insert(ifindex);
    }

    /// Bind accepts again whatever [`decline`](Self::decline) was told of.
    pub fn accept(&self) {
        self.state().decline.clear();
    }

    /// Bind fails like this from now on; `None`: no more.
    pub fn fail_bind(&self, fault: Option<Fault>) {
        self.state().bind_fault = fault.map(|fault| (u32::MAX, fault));
    }

    /// The next `n` binds fail like this.
    pub fn fail_next_binds(&self, n: u32, fault: Fault) {
        self.state().bind_fault = Some((n, fault));
    }

    /// `init` fails like this from now on; `None`: no more.
    pub fn fail_init(&self, fault: Option<Fault>) {
        self.state().init_fault = fault;
    }

    /// `flush` fails like this from now on, and removes nothing; `None`: no more.
    pub fn fail_flush(&self, fault: Option<Fault>) {
        self.state().flush_fault = fault;
    }

    /// `usage` fails like this from now on, after it has reported half of the rules; `None`: no more.
    pub fn fail_usage(&self, fault: Option<Fault>) {
        self.state().usage_fault = fault;
    }

    /// The netdev vanishes: its rules are gone, adds get
    /// [`Reason::NetdevGone`](crate::Reason::NetdevGone), deletes succeed.
    pub fn unplug(&self, ifindex: Ifindex) {
        if let Some(port) = self.state().ports.get_mut(&ifindex) {
            port.unplugged = true;
            port.clear();
        }
    }

    /// An engine that died has left this rule on a netdev: the next look at it finds the rule, or the next bind
    /// where it is not bound.
    pub fn leave(&self, ifindex: Ifindex, cookie: Cookie, flow: Flow, counters: Counters) {
        let rule = DummyRule { rule: RuleId(0), cookie, flow, counters, established: 0 };
        let mut state = self.state();
        match state.ports.get_mut(&ifindex) {
            Some(port) => port.leave(rule),
            None => state.left.entry(ifindex).or_default().push(rule),
        }
    }

    /// Others have so many rules on every netdev.
    pub fn set_foreign(&self, rules: u64) {
        self.state().foreign = rules;
    }

    /// Whether its rules [outlive](crate::Provider::outlives) the process. (They do not, unless it is said.)
    pub fn set_outlives(&self, outlives: bool) {
        self.state().outlives = outlives;
    }

    /// These of others are in front of the rules of every netdev.
    pub fn set_in_front(&self, others: &[&str]) {
        self.state().in_front = others.iter().map(|o| (*o).to_owned()).collect();
    }

    // --- What happens -----------------------------------------------------------------------------

    /// The clock of the test.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.state().now
    }

    /// Moves the clock; what is due completes, in the order of submission. Returns how many.
    pub fn advance(&self, by: Duration) -> usize {
        let decided = {
            let mut state = self.state();
            state.now = state.now.saturating_add(by);
            state.decide_due()
        };
        complete(decided)
    }

    /// Completes everything that is pending, in the order of submission. Returns how many.
    pub fn release_pending(&self) -> usize {
        let decided = {
            let mut state = self.state();
            let waiting = std::mem::take(&mut state.waiting);
            waiting.into_iter().map(|w| state.decide(w)).collect()
        };
        complete(decided)
    }

    /// Completes the operation at this place of [`pending`](Self::pending), before those that were
    /// submitted earlier. `false` when there is none.
    pub fn release_nth(&self, n: usize) -> bool {
        let decided = {
            let mut state = self.state();
            let Some(w) = state.waiting.remove(n) else { return false };
            state.decide(w)
        };
        complete(vec![decided]) == 1
    }

    /// Drops the operation at this place of [`pending`](Self::pending) without a result, as a
    /// faulty provider would: its ticket reports a
    /// [`ProviderFault`](crate::Reason::ProviderFault). `false` when there is none.
    pub fn lose_nth(&self, n: usize) -> bool {
        let lost = self.state().lose(n);
        lost.is_some()
    }

    /// The rule of this cookie has carried so much more. `false` when there is none.
    pub fn carry(&self, ifindex: Ifindex, cookie: Cookie, packets: u64, bytes: u64) -> bool {
        let mut state = self.state();
        let rule = state.ports.get_mut(&ifindex).and_then(|p| p.by_cookie(cookie));
        if let Some(r) = rule {
            r.counters.packets += packets;
            r.counters.bytes += bytes;
            return true;
        }
        false
    }

    /// The rules of this netdev count from 0 again, as those of a NIC that was reset.
    pub fn reset_counters(&self, ifindex: Ifindex) {
        if let Some(port) = self.state().ports.get_mut(&ifindex) {
            port.reset_counters();
        }
    }

    /// Somebody else removes the rule of this cookie. `false` when there is none.
    pub fn steal(&self, ifindex: Ifindex, cookie: Cookie) -> bool {
        let mut state = self.state();
        let Some(port) = state.ports.get_mut(&ifindex) else { return false };
        let Some(rule) = port.by_cookie(cookie).map(|r| r.rule) else { return false };
        port.remove(rule)
    }

    /// Somebody else removes all rules of a netdev, as with its qdisc: told by the next repair.
    pub fn steal_all(&self, ifindex: Ifindex) {
        let mut state = self.state();
        if let Some(port) = state.ports.get_mut(&ifindex) {
            port.clear();
            state.emptied.insert(ifindex);
        }
    }

    // --- What is there ----------------------------------------------------------------------------

    /// The rules installed on a netdev, in the order in which they were.
    #[must_use]
    pub fn rules(&self, ifindex: Ifindex) -> Vec<DummyRule> {
        self.state().ports.get(&ifindex).map_or_else(Vec::new, |p| p.rules().cloned().collect())
    }

    /// The operations that have not completed, of all netdevs, in the order of submission.
    #[must_use]
    pub fn pending(&self) -> Vec<Pending> {
        self.state().waiting.iter().map(|w| w.pending.clone()).collect()
    }

    /// The netdevs that are bound.
    #[must_use]
    pub fn ports(&self) -> Vec<Ifindex> {
        self.state().ports.keys().copied().collect()
    }

    /// How many operations have been submitted, on all netdevs together.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.state().requests
    }

    /// How often it was told that a NIC may have lost its rules.
    #[must_use]
    pub fn suspected(&self) -> u64 {
        self.state().suspected
    }

    /// True between `init` and `deinit`.
    #[must_use]
    pub fn is_initialised(&self) -> bool {
        self.state().initialised
    }

    /// Promises of the contract that the caller has broken, in words: two operations on one rule at
    /// a time, calls after `release`, a netdev bound twice, a cookie used twice, ...
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }
}

impl fmt::Debug for DummyClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DummyClass").field("name", &self.name).finish_non_exhaustive()
    }
}
