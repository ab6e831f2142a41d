//! How long the entry of an offloaded connection is to live in conntrack, which does not see the
//! packets that rules carry. Decisions only: nothing here asks the kernel or waits.
//!
//! The rules of it:
//! - What is written is what conntrack would have set at the last packet that a rule carried: the
//!   timeout of the state that the packets have reached. Never for a connection that is closing, only
//!   when half of it or less is left, never less than there is.
//! - A UDP flow is a stream, and assured, when a packet comes more than two seconds after its first
//!   (`nf_conntrack_udp_packet`); before that it has the shorter timeout.
//! - What conntrack has set itself since, it has set because of a packet that it saw, and knows better:
//!   a connection whose rules have carried nothing since is left alone.
//! - A RST that conntrack saw and did not believe leaves the state and 10 seconds (`nf_conntrack_tcp_packet`:
//!   `timeouts[TCP_CONNTRACK_CLOSE]`; where retransmissions have been counted before, that of RETRANS: such a RST
//!   is heard of by itself, see [`ends`](super::ends)). Rules go then: if the connection lives, its packets set that right
//!   and it is offloaded again; if not, the entry goes as that of a closed one.
//! - While the kernel's flowtable has a connection it keeps the timeout up itself, and tells neither that
//!   nor the state; where the connection leaves it, its packets are conntrack's again.
//! - What is silent goes back into software before its entry ends: a late packet then prolongs it as it
//!   would without us, and no rule outlives its entry.
//! - conntrack is asked again after each write: a FIN between the question and the write would leave a
//!   closed connection with the timeout of an open one.

use std::time::Duration;

use netdev_providers::L4Proto;

use super::netfilter::conntrack::{CtEntry, TcpState, Timeouts};

/// After it was installed: packets that were on their way have passed by then.
const FIRST_LOOK_MS: u64 = 1000;
/// At least so often what carries packets is looked at: conntrack may have lowered a timeout because of a
/// packet that missed the rules (to 300 s at least, if the connection lives).
const LOOK_MS: u64 = 60_000;
/// So often what has no events is looked at, and what is to be assured in the kernel's flowtable.
pub(super) const POLL_MS: u64 = 5000;
/// A decision that something is silent needs counters that are not older: what comes between the two is
/// missed. It is made right after a sweep.
const FRESH_MS: u64 = 99;
/// The kernel tells whole seconds: an expiry that differs by less is the same.
const SAME_MS: u64 = 2000;
/// `nf_conntrack_proto_udp.c`: a stream is what has packets later than that after its first.
const STREAM_MS: u64 = 2000;

/// What conntrack says of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Until it expires.
    pub left: Duration,
    /// `None` for UDP.
    pub tcp: Option<TcpState>,
    pub assured: bool,
    /// It may become assured: answered, and not one of two that raced.
    pub assurable: bool,
    /// Its timeout cannot be changed.
    pub fixed: bool,
    /// conntrack compares a RST with what it has seen acknowledged.
    pub acked: bool,
    /// The kernel's flowtable has it.
    pub kept: bool,
}

impl Seen {
    pub(super) fn of(entry: &CtEntry) -> Self {
        let status = entry.status;
        Self {
            left: entry.timeout.unwrap_or_default(),
            tcp: entry.tcp_state,
            assured: status.assured(),
            assurable: status.seen_reply() && !status.nat_clash(),
            fixed: status.fixed_timeout(),
            acked: entry.tcp_maxack != [false; 2],
            kept: status.offload(),
        }
    }
}

/// When it is, on the engine's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub now_ms: u64,
    /// When the last reading of the counters was done.
    pub swept_ms: u64,
    /// How long it is at most from one reading to the next.
    pub pause: Duration,
}

/// What is to be done with a connection that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing until it is due again.
    Wait,
    /// Ask conntrack, and then [`Life::look`].
    Look,
}

/// What follows from what conntrack says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There is no entry: the connection has ended.
    Gone,
    /// It is closing: its rules go. Its entry gets this timeout, since it has a longer one.
    Closing(Option<Duration>),
    /// Its rules go, so that conntrack sees what comes.
    TakeBack,
    Keep(Option<Write>),
}

/// What is to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Write {
    pub timeout: Option<Duration>,
    /// Make it assured.
    pub assure: bool,
    /// Let conntrack forget what has been acknowledged.
    pub forget_acked: bool,
}

/// One connection that has rules.
#[derive(Clone, Debug)]
pub(super) struct Life {
    proto: L4Proto,
    created_ms: u64,
    /// What conntrack had set when it was sighted.
    learnt: Option<Duration>,
    due_ms: u64,
    looked: Option<Looked>,
    /// It was in the kernel's flowtable when it was looked at.
    kept: bool,
}

#[derive(Clone, Copy, Debug)]
struct Looked {
    expires_ms: u64,
    timeout: Duration,
    used_ms: Option<u64>,
    /// When rules carried something that the entry's timeout does not count from, and conntrack has seen
    /// nothing since. It is written when half is gone.
    owed_ms: Option<u64>,
}

impl Looked {
    fn half_ms(&self) -> u64 {
        self.expires_ms.saturating_sub(ms(self.timeout / 2))
    }
}

impl Life {
    pub(super) fn new(
        proto: L4Proto,
        created_ms: u64,
        learnt: Option<Duration>,
        now_ms: u64,
    ) -> Self {
        let due_ms = now_ms.saturating_add(FIRST_LOOK_MS);
        Self { proto, created_ms, learnt, due_ms, looked: None, kept: false }
    }

    /// When something is to be decided.
    pub(super) const fn due_ms(&self) -> u64 {
        self.due_ms
    }

    /// The timeout that it is kept up with; the shortest that it can have before it was looked at.
    pub(super) fn timeout(&self, timeouts: &Timeouts) -> Duration {
        self.looked.map_or_else(|| self.timeout_of(false, timeouts), |l| l.timeout)
    }

    /// What conntrack itself had set when the connection was sighted can be longer than the namespace's,
    /// by a timeout policy. It can also be shorter, and then says nothing for TCP: data was not yet
    /// acknowledged.
    fn timeout_of(&self, assured: bool, timeouts: &Timeouts) -> Duration {
        let learnt = self.learnt.unwrap_or_default();
        match self.proto {
            L4Proto::Tcp => learnt.max(timeouts.tcp_established),
            L4Proto::Udp if assured => learnt.max(timeouts.udp_stream),
            L4Proto::Udp => self.learnt.unwrap_or(timeouts.udp),
        }
    }

    /// Something of it is under way: it is due again when that is over.
    pub(super) const fn wait(&mut self, now_ms: u64) {
        self.due_ms = now_ms.saturating_add(FIRST_LOOK_MS);
    }

    /// It is due. `used_ms`: when a rule of it was last seen to have carried something, if ever;
    /// `evented`: whether conntrack tells when it closes or ends.
    pub(super) fn step(&mut self, used_ms: Option<u64>, evented: bool, times: Times) -> Step {
        let Some(looked) = self.looked else { return Step::Look };
        if !evented || used_ms > looked.used_ms {
            return Step::Look;
        }
        let last_chance = match looked.owed_ms {
            Some(_) => looked.half_ms(),
            None => last_chance_ms(looked.expires_ms, looked.timeout, times.pause),
        };
        if times.now_ms < last_chance {
            self.due_ms = last_chance.min(times.now_ms.saturating_add(LOOK_MS));
            return Step::Wait;
        }
        if looked.owed_ms.is_some() || times.is_fresh() {
            return Step::Look;
        }
        // Until the next sweep, which is in time: that is what the last chance counts with.
        self.due_ms = times.now_ms;
        Step::Wait
    }

    /// What conntrack says of it, `None` that there is no such entry.
    pub(super) fn look(
        &mut self,
        seen: Option<&Seen>,
        used_ms: Option<u64>,
        evented: bool,
        times: Times,
        timeouts: &Timeouts,
    ) -> Verdict {
        let Some(seen) = seen else { return Verdict::Gone };
        if seen.tcp.is_some_and(|s| timeouts.closing(s).is_some()) {
            return Verdict::Closing(mend(seen, timeouts));
        }
        let now_ms = times.now_ms;
        let moved = used_ms > self.looked.and_then(|l| l.used_ms);
        // The packet came after the sweep before, which was a pause earlier. Whether that was late enough
        // is not always certain: then it gets the time of a stream, but is not assured.
        let stream_ms = self.created_ms.saturating_add(STREAM_MS);
        let after = |ms| used_ms.is_some_and(|used| used >= stream_ms.saturating_add(ms));
        let becomes = self.proto == L4Proto::Udp && !seen.assured && seen.assurable;
        let assure = becomes && after(ms(times.pause));
        let timeout = self.timeout_of(seen.assured || (becomes && after(0)), timeouts);
        if seen.kept {
            self.looked = None;
            // What may yet become assured is looked at soon: nobody tells when it has come to that.
            let pause_ms = if becomes { POLL_MS } else { LOOK_MS.min(ms(timeout / 2)) };
            self.due_ms = now_ms.saturating_add(pause_ms);
            // What was acknowledged grows old there, and is not told of; only newer kernels (6.14) forget it
            // themselves when the connection leaves.
            let forget_acked = self.proto == L4Proto::Tcp && !self.kept;
            self.kept = true;
            let write = Write { assure, forget_acked, timeout: None };
            return Verdict::Keep((write != Write::default()).then_some(write));
        }
        self.kept = false;
        let not_believed = seen.tcp == Some(TcpState::Established)
            && seen.left <= timeouts.tcp_close
            && timeout > timeouts.tcp_close * 2;
        let expires_ms = now_ms.saturating_add(ms(seen.left));
        let untouched = |l: &Looked| l.expires_ms.abs_diff(expires_ms) <= SAME_MS;
        let owed_ms = match self.looked.filter(untouched) {
            _ if moved => used_ms,
            Some(looked) => looked.owed_ms,
            None => None,
        };
        let at_its_end =
            owed_ms.is_none() && now_ms >= last_chance_ms(expires_ms, timeout, times.pause);
        if not_believed || (at_its_end && times.is_fresh()) {
            return Verdict::TakeBack;
        }
        let mut write = Write { assure, forget_acked: seen.acked, timeout: None };
        let mut left = seen.left;
        let mut still_owed_ms = owed_ms;
        if let Some(owed_ms) = owed_ms {
            let wanted = owed_ms.min(now_ms).saturating_add(ms(timeout)).saturating_sub(now_ms);
            // Whole seconds are written: never one too few.
            let wanted = Duration::from_secs(wanted.div_ceil(1000));
            if !seen.fixed && wanted > left && (left <= timeout / 2 || assure) {
                write.timeout = Some(wanted);
                left = wanted;
                still_owed_ms = None;
            }
        }
        let expires_ms = now_ms.saturating_add(ms(left));
        let looked = Looked { expires_ms, timeout, used_ms, owed_ms: still_owed_ms };
        self.looked = Some(looked);
        self.due_ms = if at_its_end {
            now_ms // until the next sweep, see `step`
        } else if evented {
            let half = looked.half_ms().max(now_ms + 1000);
            let last_chance = last_chance_ms(expires_ms, timeout, times.pause);
            half.min(last_chance).min(now_ms.saturating_add(LOOK_MS))
        } else {
            now_ms.saturating_add(POLL_MS)
        };
        Verdict::Keep((write != Write::default()).then_some(write))
    }
}

impl Times {
    const fn is_fresh(&self) -> bool {
        self.now_ms.saturating_sub(self.swept_ms) <= FRESH_MS
    }
}

/// What the entry of a connection that is closing has too much: the timeout that it is to have.
pub(super) fn mend(seen: &Seen, timeouts: &Timeouts) -> Option<Duration> {
    let closing = timeouts.closing(seen.tcp?)?;
    (!seen.fixed && seen.left > closing).then_some(closing)
}

/// When something silent is taken back into software. Before it expires, by the longest time until the
/// next sweep and some seconds for a packet to come by; and not before half of its timeout has passed.
fn last_chance_ms(expires_ms: u64, timeout: Duration, pause: Duration) -> u64 {
    let before = pause.saturating_mul(2).saturating_add(Duration::from_secs(5)).min(timeout / 2);
    expires_ms.saturating_sub(ms(before))
}

fn ms(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
