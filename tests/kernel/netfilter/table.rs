//! The table of the ledger and the group of the log: whose they are, and when they go.

use std::collections::HashSet;
use std::thread;

use ctoffload::datapath::netfilter::ledger::LedgerError;
use ctoffload::datapath::netfilter::nflog::NflogError;

use super::*;
use crate::wait::wait_until;

#[test]
fn netfilter_the_table_lives_and_dies_with_its_owner() {
    let r = Router::new();
    r.ns.run("nft add table inet user");
    let user = r.ns.run("nft list ruleset");
    let config = LedgerConfig { group: GROUP, ..LedgerConfig::default() };
    let ledger = Ledger::install(config.clone()).unwrap();
    let listed = r.ns.run("nft list table inet ctoffload");
    for part in [
        "typeof iif . ct id . ct direction . ct original proto-src",
        "type filter hook postrouting priority 2147483647; policy accept;",
        "add @sighted { iif . ct id . ct direction . ct original proto-src counter limit rate 1/hour burst 1 packets } \
         log group 77 snaplen 64 queue-threshold 1",
        "iif != @ports accept",
    ] {
        assert!(listed.contains(part), "{part}\n{listed}");
    }
    println!("{listed}");
    // The second one, even from elsewhere.
    assert!(matches!(Ledger::install(config.clone()), Err(LedgerError::AlreadyOwned { .. })));
    // Others cannot touch it, and a flush of everything passes it over.
    assert!(!r.ns.try_run("nft add chain inet ctoffload x").status.success());
    assert!(!r.ns.try_run("nft delete table inet ctoffload").status.success());
    r.ns.run("nft flush ruleset; nft add table inet user");
    assert_eq!(r.ns.run("nft list table inet ctoffload"), listed);
    // A close of the socket, as the kernel does after kill -9.
    drop(ledger);
    wait_until("the table goes", || r.ns.run("nft list ruleset") == user);
    // A person's table of that name is left alone.
    r.ns.run("nft add table inet ctoffload");
    assert!(matches!(Ledger::install(config.clone()), Err(LedgerError::TableExists { .. })));
    r.ns.run("nft delete table inet ctoffload");
    Ledger::install(config).unwrap().remove().unwrap();
    assert_eq!(r.ns.run("nft list ruleset"), user);
}

#[test]
fn netfilter_a_killed_owner_leaves_no_table() {
    let r = Router::new();
    // Another process owns the table: this program again, with only the test below.
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "netfilter::table::netfilter_owner_for_the_test_of_its_kill",
            "--nocapture",
        ])
        .env("CTOFFLOAD_TEST_OWNER", "1")
        .spawn()
        .unwrap();
    wait_until("it has a table", || r.ns.run("nft list tables").contains("ctoffload"));
    let refused = Ledger::install(LedgerConfig::default());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(refused, Err(LedgerError::AlreadyOwned { .. })), "{refused:?}");
    wait_until("the table goes", || !r.ns.run("nft list tables").contains("ctoffload"));
    Ledger::install(LedgerConfig::default()).unwrap();
}

/// Nothing by itself: the process that the test above kills, in the namespace it was started in.
#[test]
fn netfilter_owner_for_the_test_of_its_kill() {
    if std::env::var_os("CTOFFLOAD_TEST_OWNER").is_some() {
        let _ledger = Ledger::install(LedgerConfig::default()).unwrap();
        thread::sleep(SOON * 6);
    }
}

#[test]
fn netfilter_a_group_in_use_is_told() {
    let _ns = NetNs::new();
    let first = SightLog::open(GROUP).unwrap();
    match SightLog::open(GROUP) {
        Err(NflogError::GroupInUse { group, port }) => assert!(group == GROUP && port != 0),
        other => panic!("{other:?}"),
    }
    drop(first);
    wait_until("the group is free", || SightLog::open(GROUP).is_ok());
}

/// The kernel takes the tables of a socket that was closed away after it has freed its port id.
#[test]
fn netfilter_a_table_stays_while_the_owners_of_others_come_and_go() {
    let _ns = NetNs::new();
    let mut ids = HashSet::new();
    let come_and_go = |n| {
        let times = (0..30).map(|time| {
            // A child that another test is just starting may hold the socket of the one before still.
            let table = format!("ledger{n}_{time}");
            let config = LedgerConfig { table, ..LedgerConfig::default() };
            let mut ledger = Ledger::install(config).unwrap();
            assert!(ledger.is_empty().unwrap());
            ledger.port_id().unwrap()
        });
        times.collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let threads = [0, 1, 2].map(|n| scope.spawn(move || come_and_go(n)));
        for thread in threads {
            ids.extend(thread.join().unwrap());
        }
    });
    assert_eq!(ids.len(), 90, "each owner has a port id of its own");
}
