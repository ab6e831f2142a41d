//! Every transition from every word that can be reached, against the same rules written without bits.

use std::collections::HashSet;

use super::*;

/// A slot as plain fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plain {
    key: u32,
    state: SlotState,
    in_flight: bool,
    cancel: bool,
    sent: bool,
    reason: Option<Reason>,
    op: u16,
}

/// What is asked of a slot. Completions come with the number of the present operation, or of one
/// before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Claim(u32),
    /// The same, where the port that has the slot is gone.
    TakeOver(u32),
    DispatchAdd,
    Added(u16),
    Refused(u16, Reason),
    Unclaim,
    Unwind,
    DispatchDelete,
    DeleteFailed(u16),
    Deleted(u16),
    DeletedBecause(u16, Reason),
    Retry,
    Reset,
    DispatchEstablished,
    Established(u16),
    ReplySeen,
}

impl Plain {
    fn of(s: Snapshot) -> Self {
        Self {
            key: s.generation().map_or(0, Generation::get),
            state: s.state(),
            in_flight: s.in_flight(),
            cancel: s.is_cancelled(),
            sent: s.has(REPLY_SENT),
            reason: s.reason(),
            op: s.op().0,
        }
    }

    fn emptied(self) -> Self {
        let (key, op) = (self.key, self.op);
        let state = SlotState::Empty;
        Self { key, op, state, in_flight: false, cancel: false, sent: false, reason: None }
    }

    fn rejected(self, reason: Reason) -> Self {
        Self { state: SlotState::Rejected, reason: Some(reason), ..self.emptied() }
    }

    /// What it becomes, and what is answered.
    fn after(self, ask: Ask) -> (Self, String) {
        use SlotState::{Deleting, Empty, Installed, Pending, Rejected};
        let with_provider = |state, op| self.state == state && self.in_flight && self.op == op;
        let said = |what: &dyn std::fmt::Debug| format!("{what:?}");
        let dispatched = |ok: bool| {
            let op = ok.then_some(OpNumber(self.op));
            (Self { in_flight: self.in_flight || ok, ..self }, said(&op))
        };
        let answer = |ok: bool, becomes: Self| (if ok { becomes } else { self }, said(&ok));
        match ask {
            Ask::Claim(key) if self.key != 0 && self.key != key => (self, said(&Claim::Other)),
            Ask::Claim(_) | Ask::TakeOver(_)
                if self.state != Empty
                    && [Ask::Claim(self.key), Ask::TakeOver(self.key)].contains(&ask) =>
            {
                (self, said(&Claim::Decided))
            }
            Ask::Claim(key) | Ask::TakeOver(key) => {
                let won =
                    Self { key, state: Pending, op: self.op.wrapping_add(1), ..self.emptied() };
                (won, said(&Claim::Won))
            }
            Ask::DispatchAdd if self.state == Pending && !self.in_flight && self.cancel => {
                (self.emptied(), said(&None::<OpNumber>))
            }
            Ask::DispatchAdd => dispatched(self.state == Pending && !self.in_flight),
            Ask::Added(op) if !with_provider(Pending, op) => (self, said(&AfterAdd::Late)),
            Ask::Added(_) if self.cancel => {
                let deleting = Self { state: Deleting, in_flight: false, cancel: false, ..self };
                (deleting, said(&AfterAdd::Delete))
            }
            Ask::Added(_) => {
                (Self { state: Installed, in_flight: false, ..self }, said(&AfterAdd::Settled))
            }
            Ask::Refused(op, _) if self.state != Pending || self.op != op => (self, said(&false)),
            Ask::Refused(..) if self.cancel => (self.emptied(), said(&false)),
            Ask::Refused(_, reason) => (self.rejected(reason), said(&true)),
            Ask::Unclaim => {
                let queued = self.state == Pending && !self.in_flight;
                (if queued { self.emptied() } else { self }, said(&()))
            }
            Ask::Unwind => match self.state {
                Empty | Deleting => (self, said(&Unwind::Nothing)),
                Rejected => (self.emptied(), said(&Unwind::Reopened)),
                Installed if !self.in_flight => {
                    (Self { state: Deleting, ..self }, said(&Unwind::Delete))
                }
                Pending | Installed => (Self { cancel: true, ..self }, said(&Unwind::Cancelling)),
            },
            Ask::DispatchDelete => dispatched(self.state == Deleting && !self.in_flight),
            Ask::DeleteFailed(op) => {
                answer(with_provider(Deleting, op), Self { in_flight: false, ..self })
            }
            Ask::Deleted(op) => answer(with_provider(Deleting, op), self.emptied()),
            Ask::DeletedBecause(op, reason) => {
                answer(with_provider(Deleting, op), self.rejected(reason))
            }
            Ask::Retry => answer(self.state == Rejected, self.emptied()),
            Ask::Reset => {
                (if self.state == Empty { self } else { self.emptied() }, said(&Some(self.state)))
            }
            Ask::DispatchEstablished => dispatched(self.state == Installed && !self.in_flight),
            Ask::Established(op) if !with_provider(Installed, op) => (self, said(&false)),
            Ask::Established(_) if self.cancel => {
                let deleting = Self { state: Deleting, in_flight: false, cancel: false, ..self };
                (deleting, said(&true))
            }
            Ask::Established(_) => (Self { in_flight: false, ..self }, said(&false)),
            Ask::ReplySeen => {
                answer(self.state == Installed && !self.sent, Self { sent: true, ..self })
            }
        }
    }
}

fn ask_for(s: &SlotWord, port: u32, ask: Ask) -> String {
    let g = |n| Generation::new(n).unwrap();
    let port = g(port);
    match ask {
        Ask::Claim(n) => format!("{:?}", s.claim(g(n), |_| false)),
        Ask::TakeOver(n) => format!("{:?}", s.claim(g(n), |_| true)),
        Ask::DispatchAdd => format!("{:?}", s.dispatch_add(port)),
        Ask::Added(op) => format!("{:?}", s.added(OpNumber(op))),
        Ask::Refused(op, why) => format!("{:?}", s.refused(OpNumber(op), why)),
        Ask::Unclaim => {
            s.unclaim(port);
            "()".to_owned()
        }
        Ask::Unwind => format!("{:?}", s.unwind(port)),
        Ask::DispatchDelete => format!("{:?}", s.dispatch_delete(port)),
        Ask::DeleteFailed(op) => format!("{:?}", s.delete_failed(OpNumber(op))),
        Ask::Deleted(op) => format!("{:?}", s.deleted(OpNumber(op))),
        Ask::DeletedBecause(op, why) => format!("{:?}", s.deleted_because(OpNumber(op), why)),
        Ask::Retry => format!("{:?}", s.retry(port)),
        Ask::Reset => format!("{:?}", s.reset(port)),
        Ask::DispatchEstablished => format!("{:?}", s.dispatch_established(port)),
        Ask::Established(op) => format!("{:?}", s.established(OpNumber(op))),
        Ask::ReplySeen => format!("{:?}", s.reply_seen(port)),
    }
}

/// Whether it comes from a port, and not with the number of an operation.
fn by_port(ask: Ask) -> bool {
    use Ask::{DispatchAdd, DispatchDelete, DispatchEstablished};
    use Ask::{ReplySeen, Reset, Retry, Unclaim, Unwind};
    let asks = [
        DispatchAdd,
        Unclaim,
        Unwind,
        DispatchDelete,
        Retry,
        Reset,
        DispatchEstablished,
        ReplySeen,
    ];
    asks.contains(&ask)
}

fn asks(op: u16) -> Vec<Ask> {
    let mut all = vec![
        Ask::Claim(5),
        Ask::Claim(6),
        Ask::TakeOver(6),
        Ask::DispatchAdd,
        Ask::Unclaim,
        Ask::Unwind,
        Ask::DispatchDelete,
        Ask::Retry,
        Ask::Reset,
        Ask::DispatchEstablished,
        Ask::ReplySeen,
    ];
    for op in [op, op.wrapping_sub(1)] {
        all.extend([
            Ask::Added(op),
            Ask::Refused(op, Reason::Busy),
            Ask::DeleteFailed(op),
            Ask::Deleted(op),
            Ask::DeletedBecause(op, Reason::NoEffect),
            Ask::Established(op),
        ]);
    }
    all
}

#[test]
fn every_transition_of_every_word_is_the_one_that_the_rules_say() {
    let (mut seen, mut next) = (HashSet::new(), vec![0]);
    while let Some(word) = next.pop() {
        let plain = Plain::of(Snapshot(word));
        // Three operations of a slot are enough for what is late to meet what is not.
        if plain.op > 3 || !seen.insert(word) {
            continue;
        }
        for n in [5, 6] {
            let g = Generation::new(n).unwrap();
            let decided = plain.key == n && plain.state != SlotState::Empty;
            assert_eq!(Snapshot(word).is_decided(g), decided, "{plain:?}");
        }
        for ask in asks(plain.op) {
            let s = SlotWord(AtomicU64::new(word));
            // One that was never claimed is nobody's, and does not answer.
            if plain.key == 0 && !matches!(ask, Ask::Claim(_) | Ask::TakeOver(_)) {
                continue;
            }
            let answer = ask_for(&s, plain.key.max(1), ask);
            assert_eq!((Plain::of(s.load()), answer), plain.after(ask), "{plain:?}, {ask:?}");
            next.push(s.load().0);
            // Of another port it is not asked, whatever that found before.
            if by_port(ask) {
                let s = SlotWord(AtomicU64::new(word));
                ask_for(&s, 7, ask);
                assert_eq!(s.load().0, word, "{plain:?}, {ask:?}");
            }
        }
    }
    // Both keys, three operations, and per operation what flags there can be.
    assert!((100..10_000).contains(&seen.len()), "{} words", seen.len());
}

#[test]
fn the_number_of_an_operation_wraps_into_nothing() {
    let last = Snapshot(u64::from(u16::MAX) << OP_SHIFT);
    let s = SlotWord(AtomicU64::new(last.0));
    assert_eq!(s.claim(Generation::new(9).unwrap(), |_| false), Claim::Won);
    let now = Plain::of(s.load());
    assert_eq!((now.op, now.key, now.state), (0, 9, SlotState::Pending));
}

#[test]
fn states_and_words_are_shown_in_words() {
    use SlotState::{Deleting, Empty, Installed, Pending, Rejected};
    let names = [Empty, Pending, Installed, Deleting, Rejected].map(SlotState::name);
    assert_eq!(names, ["empty", "pending", "installed", "deleting", "rejected"]);
    let s = SlotWord::default();
    assert_eq!(format!("{:?}", s.load()), "Empty");
    let port = Generation::new(1).unwrap();
    s.claim(port, |_| false);
    let op = s.dispatch_add(port).unwrap();
    s.unwind(port);
    assert_eq!(format!("{:?}", s.load()), "Pending+in-flight+cancel");
    s.reset(port);
    s.claim(port, |_| false);
    assert_eq!(s.added(op), AfterAdd::Late);
    s.dispatch_add(port).map(|op| s.added(op));
    s.reply_seen(port);
    assert_eq!(format!("{:?}", s.load()), "Installed+sent");
}
