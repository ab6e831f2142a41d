//! Log lines that there would be one of for each of many rules: of a port, one of a kind in a minute, and how many there
//! were. `tc filter del` on 2,000 rules is two lines.

use std::sync::{Mutex, PoisonError};

use netdev_providers::Reason;

/// No line of a kind comes sooner after another.
pub(super) const INTERVAL_MS: u64 = 60_000;

/// A kind of line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A rule did nothing, and goes.
    NoEffect,
    /// A rule is not deleted, though the provider was asked to.
    Undeleted,
    /// A rule of ours stood that nobody holds.
    Stray,
    /// A rule was removed by somebody else.
    Removed,
    /// A rule that nobody holds is not deleted.
    StrayUndeleted,
    /// A rule of a dead engine is not deleted.
    LeftUndeleted,
}

impl Line {
    const ALL: [Self; 6] = [
        Self::NoEffect,
        Self::Undeleted,
        Self::Stray,
        Self::Removed,
        Self::StrayUndeleted,
        Self::LeftUndeleted,
    ];

    /// Of many.
    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::NoEffect => "more rules did nothing, and went (no-effect)",
            Self::Undeleted => "more times a rule was not deleted",
            Self::Stray => "more rules of ours that nobody holds were deleted",
            Self::Removed => "more rules were removed by somebody else",
            Self::StrayUndeleted => "more rules that nobody holds were not deleted",
            Self::LeftUndeleted => "more rules of dead engines were not removed",
        }
    }
}

/// Refusals for these reasons are worth a line: something is full, fails, or is not as it should be. Others say how the
/// network is (no route, no neighbour), or what was configured.
const TROUBLES: [Reason; 8] = [
    Reason::TableFull,
    Reason::QueueFull,
    Reason::Conflict,
    Reason::Refused,
    Reason::ProviderFault,
    Reason::DeviceError,
    Reason::ConnTableFull,
    Reason::TooManyPorts,
];

#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    /// Not told before then.
    next_ms: u64,
    /// Of lines: those that were not told. Of refusals: those that were, since the port was added.
    count: u64,
}

/// Of one port.
#[derive(Debug, Default)]
pub(super) struct Lines(Mutex<Kinds>);

#[derive(Debug, Default)]
struct Kinds {
    lines: [Kept; Line::ALL.len()],
    troubles: [Kept; TROUBLES.len()],
}

impl Lines {
    fn kinds<R>(&self, with: impl FnOnce(&mut Kinds) -> R) -> R {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether this line is for the log; otherwise it is counted, and [`due`](Self::due) tells of it.
    pub(super) fn is_told(&self, line: Line, now_ms: u64) -> bool {
        self.kinds(|kinds| {
            let kept = &mut kinds.lines[line as usize];
            if now_ms >= kept.next_ms && kept.count == 0 {
                kept.next_ms = now_ms.saturating_add(INTERVAL_MS);
                return true;
            }
            kept.count += 1;
            false
        })
    }

    /// The kinds of which it is time to say how many there were that were not told.
    pub(super) fn due(&self, now_ms: u64) -> Vec<(Line, u64)> {
        self.kinds(|kinds| {
            let all = Line::ALL.into_iter().zip(&mut kinds.lines);
            let due = all.filter(|(_, kept)| kept.count > 0 && now_ms >= kept.next_ms);
            due.map(|(line, kept)| {
                kept.next_ms = now_ms.saturating_add(INTERVAL_MS);
                (line, std::mem::take(&mut kept.count))
            })
            .collect()
        })
    }

    /// How often offers were refused since it was told last, for reasons of which it is time to tell. `counts`: all
    /// there have been.
    pub(super) fn refusals(&self, counts: &[(Reason, u64)], now_ms: u64) -> Vec<(Reason, u64)> {
        self.kinds(|kinds| {
            let all = TROUBLES.into_iter().zip(&mut kinds.troubles);
            all.filter_map(|(reason, kept)| {
                let count = counts.iter().find(|(r, _)| *r == reason)?.1;
                let news = count.saturating_sub(kept.count);
                if news == 0 || now_ms < kept.next_ms {
                    return None;
                }
                *kept = Kept { next_ms: now_ms.saturating_add(INTERVAL_MS), count };
                Some((reason, news))
            })
            .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_lines_of_a_kind_one_is_told_and_then_how_many_there_were() {
        let lines = Lines::default();
        assert!(lines.is_told(Line::Removed, 1000));
        let told = (0..2000).filter(|_| lines.is_told(Line::Removed, 1001)).count();
        assert_eq!((told, lines.due(1002)), (0, vec![]));
        assert!(lines.is_told(Line::NoEffect, 1002), "another kind");
        // Whoever comes later does not go before those that wait.
        let later = 1000 + INTERVAL_MS;
        assert!(!lines.is_told(Line::Removed, later));
        assert_eq!(lines.due(later), [(Line::Removed, 2001)]);
        assert_eq!(lines.due(later + INTERVAL_MS), []);
        assert!(lines.is_told(Line::Removed, later + INTERVAL_MS));
    }

    #[test]
    fn refusals_are_told_by_reason_once_in_a_minute_and_what_is_no_trouble_never() {
        let lines = Lines::default();
        let counts = |full, route| [(Reason::TableFull, full), (Reason::NoRoute, route)];
        assert_eq!(lines.refusals(&counts(0, 9), 0), []);
        assert_eq!(lines.refusals(&counts(3, 9), 5), [(Reason::TableFull, 3)]);
        assert_eq!(lines.refusals(&counts(10, 9), 6), []);
        assert_eq!(lines.refusals(&counts(10, 9), 5 + INTERVAL_MS), [(Reason::TableFull, 7)]);
        assert_eq!(lines.refusals(&counts(10, 9), 5 + 2 * INTERVAL_MS), []);
    }
}
