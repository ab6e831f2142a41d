//! `ctoffload lint` finds what offloaded packets skip, where it stands, and nothing that packets of established
//! connections do not meet. `nft` and `iptables-nft` make the rules.

use std::collections::BTreeMap;
use std::fs::File;

use super::*;

type Found = BTreeMap<String, Vec<String>>;

fn lint(r: &Router) -> Found {
    let told = r.cli(&["-j", "lint"]);
    let found: Vec<Value> = serde_json::from_slice(&told.stdout).expect("JSON");
    let decides = found.iter().any(|f| f["decides"] == true);
    assert_eq!(told.status.code(), Some(if decides { 12 } else { 0 }), "{found:?}");
    let places = |f: &Value| {
        let places = f["places"].as_array().expect("places");
        places.iter().map(|p| p.as_str().expect("a place").to_owned()).collect()
    };
    found.iter().map(|f| (f["name"].as_str().expect("a name").to_owned(), places(f))).collect()
}

/// What of these kinds is found, by what a chain is called.
fn of_rules(r: &Router) -> Vec<String> {
    let of_machine = ["accounting", "in-hardware", "iptables-legacy"];
    let found = lint(r).into_iter().filter(|(name, _)| !of_machine.contains(&name.as_str()));
    found
        .flat_map(|(name, places)| places.into_iter().map(move |p| format!("{name} {p}")))
        .collect()
}

/// Makes it, or says that this kernel cannot; those of the lab can all.
fn made(r: &Router, what: &str) -> bool {
    let out = r.try_run(what);
    let lab = std::env::var_os("LAB_KERNEL").is_some();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!said.contains("syntax error") && !said.contains("nrecognized"), "{what}: {said}");
    assert!(out.status.success() || !lab, "{what}: {said}");
    out.status.success()
}

fn handle(r: &Router, chain: &str) -> String {
    let listed = r.run(&format!("nft -a list chain {chain}"));
    let rule =
        listed.lines().rfind(|l| l.contains("# handle") && !l.contains("chain")).expect("a rule");
    rule.rsplit(' ').next().expect("a handle").to_owned()
}

#[test]
fn each_kind_of_rule_is_found_where_it_stands() {
    let mut r = Router::new("lint");
    r.start(&PORTS);
    assert_eq!(of_rules(&r), Vec::<String>::new(), "nothing of our own");
    r.run(
        "nft 'table inet fw {
           set heard { type ipv4_addr; flags dynamic,timeout; timeout 1m; }
           set guests { type ipv4_addr; flags timeout; }
           chain f { type filter hook forward priority 0; }
         }'",
    );
    let rules = [
        ("udp dport 5000 limit rate over 10/second drop", "limit", ""),
        ("quota over 10 mbytes drop", "quota", ""),
        ("ct bytes > 1000000 drop", "ct-bytes", ""),
        ("ct packets > 1000000 drop", "ct-bytes", ""),
        ("ct count over 10 drop", "ct-count", ""),
        ("update @heard { ip saddr }", "set-update", " (heard)"),
        ("ip saddr != @guests drop", "set-timeout", " (guests)"),
        ("meta hour \"17:00\"-\"19:00\" drop", "time", ""),
        ("numgen random mod 2 == 0 drop", "random", ""),
        ("meta mark set 7", "mark", ""),
        ("meta priority set 1:2", "priority", ""),
        ("ip dscp set cs1", "header", ""),
        ("ip ttl set 7", "header", ""),
        ("tcp option maxseg size set 1200", "header", ""),
        ("queue num 7", "queue", ""),
        ("dup to 10.2.0.9", "copy", ""),
        ("log prefix \"seen\"", "log", ""),
        ("counter", "counter", ""),
        // The state of both: a packet of an established connection comes to it.
        ("ct state { established, new } limit rate 10/second accept", "limit", ""),
        ("ct state != new limit rate 10/second accept", "limit", ""),
        ("tcp flags != syn limit rate 10/second accept", "limit", ""),
    ];
    let mut looked = 0;
    for (rule, kind, with) in rules {
        let family = if rule.starts_with("dup") { "ip" } else { "inet" };
        if family == "ip" {
            r.run(
                "nft 'add table ip fw; add chain ip fw f { type filter hook forward priority 0; }'",
            );
        }
        if !made(&r, &format!("nft 'add rule {family} fw f {rule}'")) {
            continue;
        }
        looked += 1;
        let at = handle(&r, &format!("{family} fw f"));
        let place = format!("{kind} table {family} fw chain f handle {at}{with}");
        let found = of_rules(&r);
        assert!(found.contains(&place), "{rule}: {found:?}");
        let others = found.iter().filter(|f| **f != place);
        // A set that packets add to is one whose elements go by themselves.
        assert!(others.clone().all(|f| f.starts_with("set-timeout")), "{rule}: {others:?}");
        r.run(&format!("nft flush chain {family} fw f"));
    }
    assert!(looked > 12, "only {looked} kinds of rules could be made");
}

#[test]
fn what_packets_of_established_connections_do_not_meet_is_not_told() {
    let mut r = Router::new("lint-not");
    r.start(&PORTS);
    r.run(
        "nft 'table inet fw {
           chain sub { }
           chain other { }
           chain i { type filter hook input priority 0; }
           chain o { type filter hook output priority 0; }
           chain n { type nat hook postrouting priority 100; }
           chain f { type filter hook forward priority 0; }
         }'",
    );
    // A rule that is met, in front of or behind what is between: told, or not.
    let limit = "meta mark set 7";
    for (between, met) in [
        (String::new(), true),
        ("ct state established,related accept".into(), false),
        ("ct state vmap { established : accept, related : accept, invalid : drop }".into(), false),
        ("ct state vmap { new : accept, invalid : drop }".into(), true),
        ("ip saddr 10.1.0.0/16 ct state established accept".into(), true),
        ("ct state new accept".into(), true),
        ("counter accept".into(), false),
        ("drop".into(), false),
        ("jump sub".into(), true),
        ("goto sub".into(), false),
        ("return".into(), false),
    ] {
        if !between.is_empty() {
            r.run(&format!("nft 'add rule inet fw f {between}'"));
        }
        r.run(&format!("nft add rule inet fw f {limit}"));
        let found = of_rules(&r);
        let told = found.iter().any(|f| f.starts_with("mark table inet fw chain f"));
        assert_eq!(told, met, "{between}: {found:?}");
        r.run("nft flush chain inet fw f");
    }
    // By another chain, which ends the way of all that come to it, or of some.
    r.run(&format!("nft 'add rule inet fw sub ct state established accept; add rule inet fw f jump sub; add rule inet fw f {limit}'"));
    assert_eq!(of_rules(&r), Vec::<String>::new());
    r.run(&format!("nft 'flush chain inet fw f; add rule inet fw f ip daddr 10.2.0.0/16 jump sub; add rule inet fw f {limit}'"));
    assert_eq!(of_rules(&r).len(), 1, "{:?}", of_rules(&r));
    r.run(&format!("nft 'flush chain inet fw sub; flush chain inet fw f; add rule inet fw other {limit}; add rule inet fw f ip saddr vmap {{ 10.1.0.2 : jump other }}'"));
    let found = of_rules(&r);
    assert!(found.len() == 1 && found[0].contains("chain other"), "{found:?}");
    r.run("nft 'flush chain inet fw f; flush chain inet fw other'");
    for (rule, where_) in [
        ("ct state new meta mark set 7", "f"),
        ("ct state invalid counter drop", "f"),
        ("tcp flags syn meta mark set 7", "f"),
        ("tcp flags & (fin|syn|rst|ack) == syn meta mark set 7", "f"),
        ("tcp flags & (syn|rst) != 0 meta mark set 7", "f"),
        ("meta l4proto icmp meta mark set 7", "f"),
        ("ip protocol esp meta mark set 7", "f"),
        ("ct mark set 7", "f"),
        // Nobody comes there.
        ("meta mark set 7", "sub"),
        ("meta mark set 7", "i"),
        ("meta mark set 7", "o"),
        ("meta mark set 7", "n"),
    ] {
        r.run(&format!("nft 'add rule inet fw {where_} {rule}'"));
        assert_eq!(of_rules(&r), Vec::<String>::new(), "{rule} in {where_}");
        r.run(&format!("nft flush chain inet fw {where_}"));
    }
}

#[test]
fn rules_of_iptables_are_read_too() {
    let mut r = Router::new("lint-ipt");
    r.start(&PORTS);
    let rules = [
        ("filter", "FORWARD -m limit --limit 10/sec -j ACCEPT", "limit"),
        (
            "filter",
            "FORWARD -m hashlimit --hashlimit-upto 9/sec --hashlimit-name x -j ACCEPT",
            "limit",
        ),
        (
            "filter",
            "FORWARD -m connbytes --connbytes 9999: --connbytes-dir both --connbytes-mode bytes -j DROP",
            "ct-bytes",
        ),
        ("filter", "FORWARD -m recent --set --name x", "set-update"),
        ("filter", "FORWARD -m statistic --mode random --probability 0.5 -j DROP", "random"),
        ("mangle", "FORWARD -j MARK --set-mark 7", "mark"),
        ("mangle", "POSTROUTING -j CLASSIFY --set-class 1:2", "priority"),
        ("mangle", "POSTROUTING -j DSCP --set-dscp 8", "header"),
        ("mangle", "PREROUTING -j TTL --ttl-set 7", "header"),
        ("mangle", "PREROUTING -j TEE --gateway 10.2.0.9", "copy"),
        ("filter", "FORWARD -j NFQUEUE --queue-num 7", "queue"),
    ];
    let mut looked = 0;
    for (table, rule, kind) in rules {
        if !made(&r, &format!("iptables-nft -t {table} -A {rule}")) {
            continue;
        }
        looked += 1;
        let chain = rule.split(' ').next().expect("a chain");
        let place = format!("{kind} table ip {table} chain {chain} handle ");
        let found = of_rules(&r);
        assert!(found.iter().any(|f| f.starts_with(&place)), "{rule}: {found:?}");
        // Only connections that begin come to it then.
        r.run(&format!("iptables-nft -t {table} -I {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"));
        let found = of_rules(&r);
        assert!(!found.iter().any(|f| f.starts_with(&place)), "{rule}: {found:?}");
        r.run(&format!("iptables-nft -t {table} -F {chain}"));
        // Or it is asked of those only.
        let (chain, rest) = rule.split_once(' ').expect("a rule");
        r.run(&format!("iptables-nft -t {table} -A {chain} -m conntrack --ctstate NEW {rest}"));
        let found = of_rules(&r);
        assert!(!found.iter().any(|f| f.starts_with(&place)), "{rule} of new ones: {found:?}");
        r.run(&format!("iptables-nft -t {table} -F {chain}"));
    }
    let lab = std::env::var_os("LAB_KERNEL").is_some();
    assert!(looked == rules.len() || (!lab && looked > 0), "{looked} of {} rules", rules.len());
}

/// Sets of ipset, tables of iptables-legacy, shapers that are passed by on purpose, and the line in the log.
#[test]
fn what_is_no_rule_is_told_and_the_log_says_so_in_a_line() {
    let mut r = Router::new("lint-rest");
    r.track();
    r.run("sysctl -qw net.netfilter.nf_conntrack_acct=1");
    let log = std::env::temp_dir().join("ctoffload-lint.log");
    let file = r.configure("[admission]\nbypass-egress = [\"wan\"]\n[[port]]\nmatch = \"?an\"\n");
    r.start_logging(&["--config", &file], File::create(&log).expect("a file").into());
    let said = |word: &str| std::fs::read_to_string(&log).expect("the log").contains(word);
    wait_until("it is said at the start", || {
        said("skip nothing that decides about them counts=\"accounting\"")
    });
    let found = lint(&r);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["accounting"]);
    r.run("tc qdisc add dev wan root handle 1: tbf rate 1gbit burst 100k latency 50ms");
    wait_until("the shaper is told", || {
        lint(&r).get("egress").is_some_and(|p| p[0].contains("wan: qdisc tbf 1:"))
    });
    if std::env::var_os("LAB_KERNEL").is_some() {
        r.run("ipset create gone hash:ip && iptables-nft -A FORWARD -m set --match-set gone src -j DROP");
        assert!(lint(&r)["ipset"][0].contains("table ip filter chain FORWARD"));
        r.run("iptables-legacy -t mangle -A FORWARD -j ACCEPT");
        assert_eq!(lint(&r)["iptables-legacy"], ["iptables-legacy -t mangle"]);
    }
    r.run(
        "nft 'table ip m { chain f { type filter hook forward priority 0; meta mark set 7; }; }'",
    );
    wait_until("a change is said", || said("decides=\"") && said("mark"));
    assert!(said("`ctoffload lint` says where"), "{:?}", std::fs::read_to_string(&log));
}
