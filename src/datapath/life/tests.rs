use proptest::prelude::*;

use super::*;

const fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn timeouts() -> Timeouts {
    Timeouts {
        tcp_established: s(432_000),
        tcp_fin_wait: s(120),
        tcp_close_wait: s(60),
        tcp_last_ack: s(30),
        tcp_time_wait: s(120),
        tcp_close: s(10),
        udp: s(30),
        udp_stream: s(120),
    }
}

fn tcp(left: u64) -> Seen {
    Seen {
        left: s(left),
        tcp: Some(TcpState::Established),
        assured: true,
        assurable: true,
        fixed: false,
        acked: false,
        kept: false,
    }
}

/// The kernel tells neither timeout nor state of what its flowtable has.
fn kept() -> Seen {
    Seen { tcp: None, kept: true, ..tcp(0) }
}

fn udp(left: u64) -> Seen {
    Seen { tcp: None, assured: false, ..tcp(left) }
}

/// Counters are as of now, and are read every five seconds.
fn at(now_ms: u64) -> Times {
    Times { now_ms, swept_ms: now_ms, pause: s(5) }
}

fn life(proto: L4Proto, learnt: Option<u64>) -> Life {
    Life::new(proto, 0, learnt.map(s), 0)
}

fn look(life: &mut Life, seen: Seen, used_ms: Option<u64>, now_ms: u64) -> Verdict {
    life.look(Some(&seen), used_ms, true, at(now_ms), &timeouts())
}

fn timeout(seconds: u64) -> Verdict {
    Verdict::Keep(Some(Write { timeout: Some(s(seconds)), ..Write::default() }))
}

#[test]
fn what_is_open_and_used_gets_the_timeout_of_its_state_when_half_is_gone() {
    let mut l = life(L4Proto::Tcp, None);
    assert_eq!(look(&mut l, tcp(432_000), Some(900), 1000), Verdict::Keep(None));
    assert_eq!(look(&mut l, tcp(216_001), Some(60_000), 60_000), Verdict::Keep(None));
    assert_eq!(look(&mut l, tcp(216_000), Some(120_000), 121_000), timeout(431_999));
    // Data was not acknowledged when conntrack saw the last packet.
    assert_eq!(look(&mut l, tcp(300), Some(180_000), 181_000), timeout(431_999));
    let policy = life(L4Proto::Tcp, Some(500_000));
    assert_eq!(look(&mut policy.clone(), tcp(300), Some(1000), 1000), timeout(500_000));
    assert_eq!(
        look(&mut policy.clone(), Seen { fixed: true, ..tcp(300) }, Some(1000), 1000),
        Verdict::Keep(None)
    );
}

#[test]
fn what_the_kernels_flowtable_has_is_left_to_it_also_when_it_is_silent() {
    let mut l = life(L4Proto::Tcp, None);
    // But for what conntrack has seen acknowledged: once.
    let forget = Verdict::Keep(Some(Write { forget_acked: true, ..Write::default() }));
    assert_eq!(look(&mut l, kept(), Some(1000), 1000), forget);
    for now_ms in (1000..600_000).step_by(5000) {
        assert_eq!(look(&mut l, kept(), Some(1000), now_ms), Verdict::Keep(None));
        assert!((now_ms + 5000..=now_ms + 60_000).contains(&l.due_ms()));
        assert_eq!(l.step(Some(1000), true, at(now_ms + 60_000)), Step::Look);
    }
    // When it has left it, conntrack's word counts again.
    assert_eq!(look(&mut l, tcp(9), Some(1000), 601_000), Verdict::TakeBack);
    // A stream is assured all the same: nothing else lets conntrack see that it is one.
    let mut l = life(L4Proto::Udp, None);
    let assured = Verdict::Keep(Some(Write { assure: true, ..Write::default() }));
    let stream = Seen { assured: false, ..kept() };
    assert_eq!(look(&mut l, stream, Some(1500), 2000), Verdict::Keep(None));
    assert_eq!(l.due_ms(), 7000, "it may have become one by then");
    assert_eq!(look(&mut l, stream, Some(8000), 9000), assured);
    assert_eq!(
        look(&mut l, Seen { assured: true, ..stream }, Some(8000), 99_000),
        Verdict::Keep(None)
    );
}

#[test]
fn what_rules_never_carried_is_conntracks_business() {
    let mut l = life(L4Proto::Tcp, None);
    assert_eq!(look(&mut l, tcp(300), None, 1000), Verdict::Keep(None));
    let mut l = life(L4Proto::Udp, Some(30));
    assert_eq!(look(&mut l, udp(29), None, 1000), Verdict::Keep(None));
}

#[test]
fn what_is_closing_is_never_prolonged_and_what_was_is_put_right() {
    use TcpState::{
        Close, CloseWait, Established, FinWait, LastAck, SynRecv, SynSent, SynSent2, TimeWait,
    };
    for (state, of_it) in
        [(FinWait, 120), (CloseWait, 60), (LastAck, 30), (TimeWait, 120), (Close, 10)]
    {
        for (left, mended) in [(5, None), (of_it, None), (431_999, Some(s(of_it)))] {
            let seen = Seen { tcp: Some(state), ..tcp(left) };
            let verdict = look(&mut life(L4Proto::Tcp, None), seen, Some(1000), 1000);
            assert_eq!(verdict, Verdict::Closing(mended), "{state:?} {left}");
            assert_eq!(mend(&seen, &timeouts()), mended);
        }
    }
    for state in [TcpState::None, SynSent, SynRecv, Established, SynSent2] {
        assert_eq!(mend(&Seen { tcp: Some(state), ..tcp(431_999) }, &timeouts()), None);
    }
    assert_eq!(mend(&udp(431_999), &timeouts()), None);
    let mut l = life(L4Proto::Tcp, None);
    assert_eq!(l.look(None, Some(1), true, at(1000), &timeouts()), Verdict::Gone);
}

#[test]
fn a_reset_that_conntrack_did_not_believe_takes_the_rules_back() {
    let mut l = life(L4Proto::Tcp, None);
    assert_eq!(look(&mut l, tcp(432_000), Some(900), 1000), Verdict::Keep(None));
    assert_eq!(look(&mut l, tcp(9), Some(60_000), 61_000), Verdict::TakeBack);
    // Where that is what an open connection gets, it says nothing.
    let short = Timeouts { tcp_established: s(15), ..timeouts() };
    let verdict = l.look(Some(&tcp(7)), Some(120_000), true, at(121_000), &short);
    assert_eq!(verdict, timeout(14));
}

#[test]
fn what_conntrack_remembers_as_acknowledged_is_forgotten() {
    let seen = Seen { acked: true, ..tcp(432_000) };
    let write = Write { forget_acked: true, ..Write::default() };
    let mut l = life(L4Proto::Tcp, None);
    assert_eq!(look(&mut l, seen, None, 1000), Verdict::Keep(Some(write)));
}

#[test]
fn a_udp_flow_is_a_stream_from_its_first_packet_after_two_seconds() {
    // Of a flow that was answered once.
    let mut l = life(L4Proto::Udp, Some(30));
    assert_eq!(look(&mut l, udp(29), None, 1000), Verdict::Keep(None));
    assert!(l.due_ms() <= 15_000);
    // Something came between two sweeps, which were before the two seconds, or on both sides of them.
    assert_eq!(look(&mut l.clone(), udp(15), Some(1900), 15_000), timeout(17));
    assert_eq!(look(&mut l.clone(), udp(15), Some(6900), 15_000), timeout(112));
    let assured = Write { assure: true, timeout: Some(s(112)), ..Write::default() };
    let verdict = look(&mut l, udp(15), Some(7000), 15_000);
    assert_eq!(verdict, Verdict::Keep(Some(assured)));
    for seen in [
        Seen { assured: true, ..udp(15) },
        Seen { assurable: false, ..udp(15) },
        Seen { fixed: true, ..udp(15) },
    ] {
        let Verdict::Keep(Some(write)) =
            look(&mut life(L4Proto::Udp, Some(30)), seen, Some(14_000), 15_000)
        else {
            assert!(seen.fixed);
            continue;
        };
        assert_eq!(write.assure, seen.fixed, "{seen:?}");
        let wanted = if seen.assured { 119 } else { 29 };
        assert_eq!(write.timeout, (!seen.fixed).then_some(s(wanted)), "{seen:?}");
    }
}

#[test]
fn what_is_silent_goes_back_before_its_entry_ends_by_counters_that_are_fresh() {
    let mut l = life(L4Proto::Udp, Some(120));
    let seen = Seen { assured: true, ..udp(120) };
    assert_eq!(look(&mut l, seen, None, 1000), Verdict::Keep(None));
    let stale = |now_ms| Times { now_ms, swept_ms: now_ms - 4000, pause: s(5) };
    assert_eq!(l.step(None, true, stale(105_999)), Step::Wait);
    assert_eq!(l.step(None, true, stale(106_000)), Step::Wait);
    assert_eq!(l.due_ms(), 106_000, "after the next sweep");
    assert_eq!(l.step(None, true, at(107_000)), Step::Look);
    assert_eq!(look(&mut l, Seen { left: s(14), ..seen }, None, 107_000), Verdict::TakeBack);
    // Its entry was prolonged by a packet in software: nothing of that kind.
    assert_eq!(look(&mut l, Seen { left: s(100), ..seen }, None, 107_000), Verdict::Keep(None));
}

#[test]
fn what_has_no_events_is_looked_at_again_and_again() {
    let mut l = life(L4Proto::Tcp, None);
    for now_ms in [1000, 6000, 11_000] {
        assert_eq!(l.step(None, false, at(now_ms)), Step::Look);
        let verdict = l.look(Some(&tcp(432_000)), None, false, at(now_ms), &timeouts());
        assert_eq!((verdict, l.due_ms()), (Verdict::Keep(None), now_ms + POLL_MS));
    }
}

#[test]
fn the_last_chance_comes_before_the_end_and_in_the_second_half() {
    assert_eq!(last_chance_ms(121_000, s(120), s(5)), 1000 + 105_000);
    assert_eq!(last_chance_ms(12_000, s(12), s(5)), 6000);
    assert_eq!(last_chance_ms(u64::MAX, s(12), s(5)), u64::MAX - 6000);
}

/// conntrack, as the kernel has it for packets that it sees (`nf_conntrack_proto_{tcp,udp}.c`), and
/// beside it what it would have if it saw all.
#[derive(Clone, Debug)]
struct Model {
    udp: bool,
    state: TcpState,
    assured: bool,
    acked: bool,
    /// `None` once it has expired.
    expires_ms: Option<u64>,
}

impl Model {
    fn new(udp: bool) -> Self {
        let timeout = if udp { 30_000 } else { 432_000_000 };
        Self {
            udp,
            state: TcpState::Established,
            assured: !udp,
            acked: !udp,
            expires_ms: Some(timeout),
        }
    }

    fn expire(&mut self, now_ms: u64) {
        self.expires_ms.take_if(|e| *e <= now_ms);
    }

    /// A packet that is neither FIN nor RST.
    fn packet(&mut self, now_ms: u64) {
        self.expire(now_ms);
        if self.expires_ms.is_none() {
            return;
        }
        let t = timeouts();
        let timeout = if self.udp {
            let stream = now_ms > STREAM_MS;
            self.assured |= stream;
            if stream { t.udp_stream } else { t.udp }
        } else {
            t.closing(self.state).unwrap_or(t.tcp_established)
        };
        self.expires_ms = Some(now_ms + ms(timeout));
    }

    fn close(&mut self, now_ms: u64, state: TcpState) {
        self.expire(now_ms);
        if self.expires_ms.is_some() && !self.udp {
            self.state = state;
            self.expires_ms = Some(now_ms + ms(timeouts().closing(state).unwrap()));
        }
    }

    /// One with a sequence number that is not what conntrack expects.
    fn reset(&mut self, now_ms: u64) {
        if self.acked && self.state == TcpState::Established {
            self.expire(now_ms);
            self.expires_ms = self.expires_ms.map(|_| now_ms + 10_000);
        } else {
            self.close(now_ms, TcpState::Close);
        }
    }

    fn seen(&mut self, now_ms: u64) -> Option<Seen> {
        self.expire(now_ms);
        Some(Seen {
            // In whole seconds, as the kernel tells it.
            left: s((self.expires_ms? - now_ms) / 1000),
            tcp: (!self.udp).then_some(self.state),
            assured: self.assured,
            assurable: true,
            fixed: false,
            acked: self.acked,
            kept: false,
        })
    }

    fn written(&mut self, now_ms: u64, write: Write) {
        self.assured |= write.assure;
        self.acked &= !write.forget_acked;
        if let (Some(timeout), true) = (write.timeout, self.expires_ms.is_some()) {
            self.expires_ms = Some(now_ms + ms(timeout));
        }
    }

    fn is_open(&self) -> bool {
        self.expires_ms.is_some() && timeouts().closing(self.state).is_none()
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Packet,
    Fin,
    Reset,
    /// Events of conntrack are lost for a second; that is heard of, and all is compared.
    Lost,
}

/// A connection, its rules, the sweeps, and the core between them, a tenth of a second at a time.
struct Timeline {
    now_ms: u64,
    real: Model,
    /// What conntrack would have without rules.
    ideal: Model,
    rules: bool,
    life: Life,
    carried_ms: Option<u64>,
    used_ms: Option<u64>,
    swept_ms: u64,
    evented: bool,
    /// Since then events are lost.
    lost_ms: Option<u64>,
    /// A FIN comes between the question and the write.
    race: bool,
}

const TICK_MS: u64 = 100;
const PAUSE_MS: u64 = 5000;

impl Timeline {
    fn new(udp: bool, evented: bool) -> Self {
        let proto = if udp { L4Proto::Udp } else { L4Proto::Tcp };
        let model = Model::new(udp);
        Self {
            now_ms: 0,
            real: model.clone(),
            ideal: model,
            rules: true,
            life: life(proto, udp.then_some(30)),
            carried_ms: None,
            used_ms: None,
            swept_ms: 0,
            evented,
            lost_ms: None,
            race: false,
        }
    }

    fn happens(&mut self, event: Event) {
        let now = self.now_ms;
        match event {
            Event::Packet => {
                // In the time that an entry may have too much.
                self.ideal.expire(now);
                self.real.expire(now);
                if self.ideal.expires_ms.is_none() && self.real.is_open() {
                    self.ideal.expires_ms = Some(now + 1);
                }
                self.ideal.packet(now);
                if self.rules {
                    self.carried_ms = Some(now);
                    return;
                }
                self.real.packet(now);
                // It is a sight: offloaded again, if it is open.
                if self.real.is_open() {
                    let proto = if self.real.udp { L4Proto::Udp } else { L4Proto::Tcp };
                    let learnt = self.real.seen(now).map(|s| s.left);
                    self.life = Life::new(proto, 0, learnt, now);
                    (self.rules, self.carried_ms, self.used_ms) = (true, None, None);
                }
            }
            Event::Fin => {
                self.ideal.close(now, TcpState::FinWait);
                self.real.close(now, TcpState::FinWait);
                self.told();
            }
            // Both believe it, or neither does: what the sequence numbers are nobody knows here.
            Event::Reset => {
                self.ideal.close(now, TcpState::Close);
                self.real.reset(now);
                self.told();
            }
            Event::Lost => self.lost_ms = Some(now),
        }
    }

    /// By an event of conntrack.
    fn told(&mut self) {
        self.real.expire(self.now_ms);
        if self.evented && self.lost_ms.is_none() && !self.real.is_open() {
            self.rules = false;
        }
    }

    fn tick(&mut self) {
        self.now_ms += TICK_MS;
        let now = self.now_ms;
        self.ideal.expire(now);
        self.lost_ms.take_if(|lost| now >= *lost + 1000);
        self.told();
        if now >= self.swept_ms + PAUSE_MS {
            self.swept_ms = now;
            if self.carried_ms.take().is_some() {
                self.used_ms = Some(now);
            }
        }
        if !self.rules || self.life.due_ms() > now {
            return;
        }
        let times = Times { now_ms: now, swept_ms: self.swept_ms, pause: s(PAUSE_MS / 1000) };
        if self.life.step(self.used_ms, self.evented, times) == Step::Wait {
            return;
        }
        let seen = self.real.seen(now);
        let used = self.used_ms;
        match self.life.look(seen.as_ref(), used, self.evented, times, &timeouts()) {
            Verdict::Gone | Verdict::TakeBack => self.rules = false,
            Verdict::Closing(mended) => {
                self.rules = false;
                self.real.written(now, Write { timeout: mended, ..Write::default() });
            }
            Verdict::Keep(None) => {}
            Verdict::Keep(Some(write)) => {
                if std::mem::take(&mut self.race) {
                    self.happens(Event::Fin);
                }
                self.real.written(now, write);
                let again = self.real.seen(now);
                let mended = again.and_then(|s| mend(&s, &timeouts()));
                self.real.written(now, Write { timeout: mended, ..Write::default() });
            }
        }
    }
}

fn events(udp: bool) -> impl Strategy<Value = Vec<(u64, Event)>> {
    let event = prop_oneof![
        60 => Just(Event::Packet),
        u32::from(!udp) * 2 => Just(Event::Fin),
        u32::from(!udp) * 2 => Just(Event::Reset),
        1 => Just(Event::Lost),
    ];
    // In bursts, and far apart: around the timeouts.
    let pause = prop_oneof![4 => 0u64..30, 4 => 0u64..400, 1 => 0u64..1500];
    proptest::collection::vec((pause, event), 1..60)
}

fn timeline() -> impl Strategy<Value = (bool, bool, bool, Vec<(u64, Event)>)> {
    any::<bool>().prop_flat_map(|udp| (Just(udp), any::<bool>(), any::<bool>(), events(udp)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// An entry lives as long as it would if conntrack saw every packet: never shorter, and longer by
    /// little more than a sweep; and no rule outlives its entry by more than a look.
    #[test]
    fn an_entry_lives_as_it_would_without_rules((udp, evented, race, events) in timeline()) {
        let mut t = Timeline::new(udp, evented);
        t.race = race;
        let (mut reset, mut silent) = (false, false);
        let mut ended_with_rules = 0;
        let tail = [(2500, Event::Lost)];
        for (pause, event) in events.into_iter().chain(tail) {
            for _ in 0..pause {
                t.tick();
                let slack = PAUSE_MS + 2000;
                if t.ideal.is_open() {
                    prop_assert!(t.real.is_open() || reset, "{} s: ended too early", t.now_ms / 1000);
                }
                // Of the first packets of a flow it is not certain whether they make it a stream.
                let uncertain = udp && !t.ideal.assured && t.used_ms.is_some();
                if let (Some(real), false) = (t.real.expires_ms, reset || uncertain) {
                    let ideal = t.ideal.expires_ms.unwrap_or(t.now_ms);
                    prop_assert!(
                        real <= ideal + slack, "{} s: {real} instead of {ideal}", t.now_ms / 1000
                    );
                }
                ended_with_rules = if t.rules && !t.real.is_open() { ended_with_rules + 1 } else { 0 };
                prop_assert!(ended_with_rules * TICK_MS <= POLL_MS + 1000, "rules outlive the entry");
                // Of a flow that is a stream the sweeps show it.
                if udp && t.ideal.assured && t.rules && t.ideal.is_open() && t.used_ms.is_some() {
                    let since = t.used_ms.unwrap_or(0).saturating_sub(PAUSE_MS + STREAM_MS);
                    let looked = t.now_ms > t.used_ms.unwrap_or(0) + 61_000;
                    prop_assert!(t.real.assured || since == 0 || !looked, "a stream is not assured");
                }
            }
            reset |= matches!(event, Event::Reset);
            silent = !matches!(event, Event::Packet) && (silent || matches!(event, Event::Reset));
            t.happens(event);
        }
        // Whether it was believed or not: what is reset and then silent leaves nothing.
        if silent && t.ideal.expires_ms.is_none() {
            prop_assert!(t.real.expires_ms.is_none() && !t.rules);
        }
    }
}
