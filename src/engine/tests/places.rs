//! How many rules a port may have, learnt and configured, and who gives way: without a port.

use super::*;
use crate::engine::capacity::{Candidate, Capacity, IDLE_MS, PROBE_EVERY_MS, Place, Slowest};
use crate::engine::pace::Pace;

fn candidate(pace: Pace, used_ms: u64) -> Candidate {
    let conn = crate::engine::conn::tests::conn();
    Candidate { pace, used_ms, conn, direction: Original }
}

fn full(place: Place) -> Option<Rejection> {
    match place {
        Place::Free => None,
        Place::None(why) => Some(why),
        Place::Of(candidate) => panic!("{candidate:?}"),
    }
}

/// When the rule was last used that may have to give way.
fn of(place: Place) -> Option<u64> {
    match place {
        Place::Of(candidate) => Some(candidate.used_ms),
        Place::Free | Place::None(_) => None,
    }
}

#[test]
fn the_limit_is_the_configured_one_unless_a_smaller_one_was_learnt() {
    let none = Capacity::new(None);
    assert_eq!(none.limit(), None);
    assert!(full(none.place(u64::MAX, Pace::UNKNOWN, 0)).is_none());
    none.took(9);
    assert_eq!(none.limit(), None, "nobody has said that it is full");
    none.refused(3, None, 0);
    assert_eq!(none.limit(), Some((3, true)));
    none.took(3);
    assert_eq!(none.limit(), Some((3, true)));
    none.took(4);
    assert_eq!(none.limit(), Some((4, true)), "it has become larger");
    none.took(2);
    assert_eq!(none.limit(), Some((4, true)));
    let five = Capacity::new(Some(5));
    assert_eq!(five.limit(), Some((5, false)));
    for (learnt, limit) in [(7, (5, false)), (5, (5, false)), (4, (4, true))] {
        five.refused(learnt, None, 0);
        assert_eq!(five.limit(), Some(limit), "learnt {learnt}");
    }
}

#[test]
fn a_port_is_full_with_as_many_rules_as_it_may_have_and_says_whose_limit_it_is() {
    let capacity = Capacity::new(Some(5));
    assert!(full(capacity.place(4, Pace::UNKNOWN, 0)).is_none());
    let why =
        full(capacity.place(5, Pace::UNKNOWN, 1 << 40)).expect("no probe of what was configured");
    assert_eq!(why.reason, Reason::TableFull);
    let words = why.to_string();
    assert!(words.contains("5 rules of 5 (configured), and none"), "{words}");
    capacity.refused(3, None, 0);
    let words = full(capacity.place(3, Pace::UNKNOWN, 0)).unwrap().to_string();
    assert!(words.contains("3 rules of 3 (learnt from the provider), and"), "{words}");
    capacity.refused(3, Some("no space"), 0);
    let words = full(capacity.place(3, Pace::UNKNOWN, 0)).unwrap().to_string();
    assert!(words.contains("(learnt from the provider: no space)"), "{words}");
    // A limit that is configured below what was learnt is not the provider's.
    let smaller = Capacity::new(Some(2));
    smaller.refused(3, Some("no space"), 0);
    let words = full(smaller.place(2, Pace::UNKNOWN, 0)).unwrap().to_string();
    assert!(words.contains("2 rules of 2 (configured)"), "{words}");
}

#[test]
fn behind_a_learnt_limit_one_add_is_let_through_now_and_then() {
    let capacity = Capacity::new(None);
    capacity.refused(3, None, 1000);
    let free = |now| full(capacity.place(3, Pace::UNKNOWN, now)).is_none();
    // One that takes the place of another says nothing about the table.
    capacity.took(3);
    assert!(!free(1000 + PROBE_EVERY_MS - 1));
    assert!(free(1000 + PROBE_EVERY_MS));
    assert!(!free(1000 + PROBE_EVERY_MS), "one");
    assert!(!free(1000 + 2 * PROBE_EVERY_MS - 1));
    assert!(free(1000 + 2 * PROBE_EVERY_MS));
}

#[test]
fn who_is_idle_gives_way_to_anybody_and_who_is_slow_to_twice_its_pace() {
    let capacity = Capacity::new(Some(1));
    let swept = |rules: &[(Pace, u64)]| {
        let mut slowest = Slowest::default();
        rules.iter().for_each(|(pace, used)| slowest.show(candidate(*pace, *used)));
        capacity.swept(slowest);
    };
    let (slow, fast) = (Pace::of(10, 1000), Pace::of(1000, 1000));
    swept(&[(fast, 100)]);
    let place = |pace, now| of(capacity.place(1, pace, now));
    assert_eq!(place(Pace::UNKNOWN, 100 + IDLE_MS - 1), None);
    assert_eq!(place(fast, 100 + IDLE_MS - 1), None, "no faster than it is");
    assert_eq!(place(Pace::UNKNOWN, 100 + IDLE_MS), Some(100));
    assert_eq!(place(Pace::UNKNOWN, 100 + IDLE_MS), None, "each is looked at once");
    // The slowest first; what is idle though it is faster, when the slower ones do not give way.
    swept(&[(fast, 100), (slow, 101), (slow, 102)]);
    assert_eq!(place(fast, 200), Some(101));
    assert_eq!(place(fast, 200), Some(102));
    assert_eq!(place(fast, 200), None);
    swept(&[(fast, 100), (slow, 9000)]);
    assert_eq!(place(slow, 100 + IDLE_MS), Some(100));
    assert_eq!(place(slow, 100 + IDLE_MS), None);
    // What the next sweep does not show is not asked any more.
    swept(&[]);
    assert_eq!(place(fast, 1 << 40), None);
}

#[test]
fn rules_are_ranked_by_pace_and_then_by_their_last_use() {
    let (slow, fast) = (Pace::of(10, 1000), Pace::of(1000, 1000));
    assert!(candidate(slow, 9) < candidate(fast, 1));
    assert!(candidate(slow, 1) < candidate(slow, 2));
    assert!(candidate(slow, 1) == candidate(slow, 1) && candidate(slow, 1) != candidate(slow, 2));
    assert!(candidate(slow, 1) != candidate(fast, 1));
}

#[test]
fn a_pace_is_four_times_the_logarithm_of_sixteen_times_the_rate() {
    let pace = |packets, ms| format!("{:?}", Pace::of(packets, ms));
    // 4 log2(1 + 16 r): of none, of one in a minute, of 1, 10 and a million in a second.
    let paces = [(0, 1000), (1, 60_000), (1, 1000), (10, 1000), (20, 2000), (1_000_000, 1000)];
    assert_eq!(
        paces.map(|(packets, ms)| pace(packets, ms)),
        ["Pace(0)", "Pace(1)", "Pace(16)", "Pace(29)", "Pace(29)", "Pace(96)"]
    );
    assert_eq!(pace(1, 0), pace(1, 1), "no time is a millisecond");
    assert!(Pace::of(u64::MAX, 1).is_known() && Pace::of(0, 1).is_known());
    assert!(!Pace::UNKNOWN.is_known() && !Pace::default().is_known());
    assert!(Pace::of(u64::MAX, 1) > Pace::of(1 << 40, 1));
}
