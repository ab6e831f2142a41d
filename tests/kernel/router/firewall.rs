//! What the firewall refuses is not forwarded, offloaded or not: a datagram flow goes on and on, a rule
//! comes, and from a bounded time after it not one packet arrives, for as long as the sender goes on.
//! Beside it a flow that no rule is for arrives all the while.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;

const VICTIM: u16 = 5000;
const CONTROL: u16 = 5001;
/// Within this time after the tool that made the change has come back, its effect must be there. Emulated
/// kernels on busy machines.
const AT_ONCE: Duration = Duration::from_millis(1500);
/// How long nothing may arrive then.
const STAYS: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(10);

/// Datagrams from the host behind `lan` to one behind `wan`, which answers each; when they arrived
/// there.
struct Flow {
    stop: Arc<AtomicBool>,
    arrivals: Arc<Mutex<Vec<Instant>>>,
    sent: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Flow {
    fn start(r: &Router, port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let arrivals: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let sent = Arc::new(AtomicU64::new(0));
        let (ready, listening) = mpsc::channel();
        let server = in_netns(r.host("wan"), {
            let (stop, arrivals) = (Arc::clone(&stop), Arc::clone(&arrivals));
            move || {
                let socket = UdpSocket::bind(("10.2.0.2", port)).expect("bind");
                socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a time-out");
                ready.send(()).expect("ready");
                let mut buf = [0; 100];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((n, from)) = socket.recv_from(&mut buf) else { continue };
                    arrivals.lock().expect("a lock").push(Instant::now());
                    let _ = socket.send_to(&buf[..n], from);
                }
            }
        });
        listening.recv().expect("the server listens");
        let client = in_netns(r.host("lan"), {
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            move || {
                let socket = UdpSocket::bind(("10.1.0.2", port)).expect("bind");
                socket.connect(("10.2.0.2", port)).expect("connect");
                socket.set_nonblocking(true).expect("nonblocking");
                while !stop.load(Ordering::Relaxed) {
                    if socket.send(b"from lan").is_ok() {
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                    while socket.recv(&mut [0; 100]).is_ok() {}
                    std::thread::sleep(INTERVAL);
                }
            }
        });
        Self { stop, arrivals, sent, threads: vec![server, client] }
    }

    /// The arrivals since then.
    fn since(&self, then: Instant) -> Vec<Duration> {
        let arrivals = self.arrivals.lock().expect("a lock");
        arrivals.iter().filter_map(|at| at.checked_duration_since(then)).collect()
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What drops the flow of this port, and what takes that back.
type RuleFor = Box<dyn Fn(u16) -> [String; 2]>;

/// Flows that are to be stopped, one that is not, and how each change is looked at.
struct Watched<'a> {
    r: &'a Router,
    victims: Vec<Flow>,
    control: Flow,
}

impl<'a> Watched<'a> {
    fn start(r: &'a Router) -> Self {
        Self::start_with(r, &[VICTIM])
    }

    fn start_with(r: &'a Router, victims: &[u16]) -> Self {
        let victims = victims.iter().map(|port| Flow::start(r, *port)).collect();
        Self { r, victims, control: Flow::start(r, CONTROL) }
    }

    fn wait_offloaded(&self, what: &str) {
        let flows = self.victims.len() + 1;
        let want = [vec!["lan original"; flows], vec!["wan reply"; flows]].concat();
        wait_until(&format!("{what}: all flows are offloaded"), || self.r.installed() == want);
    }

    /// Makes a change that must stop the victim within so long, and nothing else; then takes it back.
    fn must_stop(&self, what: &str, within: Duration, change: &str, back: &str) {
        self.each_must_stop(&[what], within, change, back);
    }

    /// The same with a change for each victim, all of them at once; `whats` are in the order of the victims.
    fn each_must_stop(
        &self,
        whats: &[impl AsRef<str>],
        within: Duration,
        change: &str,
        back: &str,
    ) {
        assert_eq!(whats.len(), self.victims.len());
        let whats: Vec<&str> = whats.iter().map(AsRef::as_ref).collect();
        self.wait_offloaded(&whats.join(", "));
        let before = Instant::now();
        self.r.run(change);
        let done = Instant::now();
        std::thread::sleep(within);
        let late = Instant::now();
        let sent: Vec<u64> = self.victims.iter().map(Flow::sent).collect();
        std::thread::sleep(STAYS);
        for ((victim, sent), what) in self.victims.iter().zip(sent).zip(whats) {
            // A busy machine sends fewer of them in that time.
            wait_until(&format!("{what}: the sender goes on, and the other flow"), || {
                victim.sent() - sent > 20 && self.control.since(late).len() > 20
            });
            let arrived = victim.since(late).len();
            let tried = victim.sent() - sent;
            let last = victim.since(before).last().copied().unwrap_or_default();
            let others = self.control.since(late).len();
            println!(
                "{what}: the last packet {} ms after the change was begun, {} ms after the tool had come back; then {tried} sent, {arrived} arrived; of the other flow {others}",
                last.as_millis(),
                (before + last).saturating_duration_since(done).as_millis(),
            );
            assert!(tried > 20 && others > 20, "{what}: the sender goes on, and the other flow");
            assert_eq!(arrived, 0, "{what}: arrivals after {within:?}");
        }
        self.r.run(back);
    }
}

/// Every hook and priority, before our chain is there and afterwards: `filter + 10` is firewalld's, 50
/// `security`, 100 `srcnat`.
#[test]
fn a_drop_in_any_chain_of_any_priority_stops_an_offloaded_flow_and_it_stays_stopped() {
    let mut r = Router::new("anyprio");
    let hooks = [
        ("forward", "-400"),
        ("forward", "0"),
        ("forward", "10"),
        ("forward", "50"),
        ("forward", "2147483646"),
        ("forward", "2147483647"),
        ("postrouting", "-400"),
        ("postrouting", "10"),
        ("postrouting", "100"),
        ("postrouting", "2147483646"),
    ];
    let name = |when: &str, hook: &str, n: usize| format!("{when}_{hook}_{n}");
    let make = |r: &Router, when: &str| {
        for (n, (hook, priority)) in hooks.iter().enumerate() {
            let family = if n % 2 == 0 { "inet" } else { "ip" };
            let table = name(when, hook, n);
            r.run(&format!("nft 'table {family} {table} {{ chain c {{ type filter hook {hook} priority {priority}; }}; }}'"));
        }
    };
    make(&r, "before");
    r.run("nft 'table netdev before { chain c { type filter hook ingress device lan priority 0; }; }'");
    r.start(&PORTS);
    make(&r, "after");
    // In front of ours, since it comes later.
    r.run(
        "nft 'table inet last { chain c { type filter hook postrouting priority 2147483647; }; }'",
    );
    let mut tables = vec!["netdev before".to_owned(), "inet last".to_owned()];
    for when in ["before", "after"] {
        for (n, (hook, _)) in hooks.iter().enumerate() {
            let family = if n % 2 == 0 { "inet" } else { "ip" };
            tables.push(format!("{family} {}", name(when, hook, n)));
        }
    }
    let mut changes: Vec<(String, RuleFor)> = Vec::new();
    for table in tables {
        let of = table.clone();
        let rule = move |victim| {
            [
                format!("nft add rule {of} c udp dport {victim} drop"),
                format!("nft flush chain {of} c"),
            ]
        };
        changes.push((table, Box::new(rule)));
    }
    // And as other tools make them.
    for (table, chain) in [("filter", "FORWARD"), ("mangle", "POSTROUTING"), ("mangle", "FORWARD")]
    {
        let rule = move |victim| {
            ["-A", "-D"].map(|add| {
                format!("iptables-nft -t {table} {add} {chain} -p udp --dport {victim} -j DROP")
            })
        };
        changes.push((format!("iptables-nft {table} {chain}"), Box::new(rule)));
    }
    let victims = [0, 10, 20, 30, 40].map(|n| VICTIM + n);
    let w = Watched::start_with(&r, &victims);
    assert_eq!(changes.len() % victims.len(), 0);
    for some in changes.chunks(victims.len()) {
        let whats: Vec<&str> = some.iter().map(|(what, _)| what.as_str()).collect();
        let [change, back] = [0, 1].map(|n| {
            let each = some.iter().zip(victims).map(|((_, rule), victim)| rule(victim)[n].clone());
            each.collect::<Vec<_>>().join("\n")
        });
        w.each_must_stop(&whats, AT_ONCE, &change, &back);
    }
}

#[test]
fn a_chain_that_stands_behind_ours_keeps_from_offloading_and_is_named() {
    let mut r = Router::new("behind");
    // Who is registered in a hook only some kernels tell (CONFIG_NETFILTER_NETLINK_HOOK): Debian's 6.12
    // and 7.3 do, its 6.1 and 6.18 do not.
    let told = r.try_run("modprobe nfnetlink_hook").status.success();
    let tells_not = ["6.1", "6.18"];
    let kernel = std::env::var("LAB_KERNEL").unwrap_or_default();
    assert!(told || tells_not.contains(&&*kernel), "nfnetlink_hook");
    if !told {
        return;
    }
    r.run(
        "nft 'table ip late { chain last { type filter hook postrouting priority 2147483647; }; }'",
    );
    r.start(&PORTS);
    let flow = Flow::start(&r, VICTIM);
    let refused = || {
        let found = r.refusal("lan", "original").unwrap_or_default();
        found.0 == "firewall-behind" && found.1.contains("chain last of table late")
    };
    wait_until("it is refused, and who is behind is named", refused);
    assert_eq!(r.installed(), <[&str; 0]>::default());
    wait_until("the port counts it", || {
        r.json(&["port", "show", "lan"]).to_string().contains("firewall-behind")
    });
    wait_until("explain names it", || {
        let told = r.cli(&["explain", "udp", "10.1.0.2:5000", "10.2.0.2:5000"]);
        String::from_utf8_lossy(&told.stdout)
            .contains("chain last of table late (priority 2147483647)")
    });
    // It goes, and comes back: in front of ours now.
    r.run("nft delete table ip late");
    wait_until("it is offloaded", || r.installed() == BOTH);
    r.run(
        "nft 'table ip late { chain last { type filter hook postrouting priority 2147483647; }; }'",
    );
    wait_until("it is still, or again", || r.installed() == BOTH);
    drop(flow);
}

/// What a netdev sends is not seen before by the chain that sights.
#[test]
fn a_chain_at_egress_with_rules_keeps_what_leaves_there_from_offloading() {
    let mut r = Router::new("egress");
    if !r.try_run("nft 'table netdev out { chain c { type filter hook egress device wan priority 0; }; }'").status.success() {
        let kernel = std::env::var("LAB_KERNEL").unwrap_or_default();
        assert!(!["6.1", "6.12", "6.18", "7.3"].contains(&&*kernel), "no egress hook");
        return;
    }
    r.start(&PORTS);
    let flow = Flow::start(&r, VICTIM);
    wait_until("a chain without rules refuses nothing", || r.installed() == BOTH);
    for (rule, passes) in [("udp dport 9 drop", true), ("udp dport 5000 drop", false)] {
        r.run(&format!("nft add rule netdev out c {rule}"));
        wait_until("it is refused, and the chain is named", || {
            let found = r.refusal("lan", "original").unwrap_or_default();
            found.0 == "firewall-behind" && found.1.contains("chain c of table netdev out")
        });
        wait_until("packets go through the stack", || r.rules("lan") == 0);
        let settled = Instant::now();
        if passes {
            wait_until("packets arrive", || flow.since(settled).len() > 20);
        } else {
            std::thread::sleep(STAYS);
            assert_eq!(flow.since(settled + Duration::from_millis(500)).len(), 0, "{rule}");
        }
        assert_eq!(r.rules("lan"), 0, "{rule}");
        r.run("nft flush chain netdev out c");
        wait_until("it is offloaded again", || r.installed() == BOTH);
    }
    // What leaves by another netdev is not concerned: replies.
    r.run("nft add rule netdev out c udp dport 9 drop");
    wait_until("replies are offloaded", || r.installed() == ["wan reply"]);
}

#[test]
fn by_address_mark_label_set_and_policy() {
    let mut r = Router::new("kinds");
    r.run(
        "nft 'table inet fw {
           set bad { type ipv4_addr; flags interval; }
           chain f { type filter hook forward priority 10; ct mark 7 drop; ip saddr @bad udp dport 5000 drop; }
           chain sub { }
           chain p { type filter hook postrouting priority 300; udp dport 5000 jump sub; }
         }'",
    );
    r.start(&PORTS);
    let w = Watched::start(&r);
    let mark = |n| format!("conntrack -U -p udp -s 10.1.0.2 -d 10.2.0.2 --dport 5000 --mark {n}");
    w.must_stop("conntrack mark", AT_ONCE, &mark(7), &mark(0));
    w.must_stop(
        "an element of a set",
        AT_ONCE,
        "nft add element inet fw bad { 10.1.0.0/24 }",
        "nft delete element inet fw bad { 10.1.0.0/24 }",
    );
    w.must_stop(
        "a rule in a chain that is jumped to",
        AT_ONCE,
        "nft add rule inet fw sub drop",
        "nft flush chain inet fw sub",
    );
    w.must_stop(
        "a rule with an address",
        AT_ONCE,
        "nft add rule inet fw f ip daddr 10.2.0.2 udp dport 5000 drop",
        "nft flush chain inet fw f; nft add rule inet fw f ct mark 7 drop",
    );
    w.must_stop(
        "a policy",
        AT_ONCE,
        "nft 'add rule inet fw p udp dport 5001 accept; add rule inet fw p udp sport 5001 accept; add chain inet fw p { policy drop; }'",
        "nft 'add chain inet fw p { policy accept; }; flush chain inet fw p'",
    );
}

#[test]
fn what_changes_without_a_word_is_found_within_the_time_configured() {
    let mut r = Router::new("silent");
    r.run("ipset create gone hash:ip && iptables-nft -A FORWARD -m set --match-set gone src -p udp --dport 5000 -j DROP");
    r.run(
        "nft 'table inet portal {
           set guests { type ipv4_addr; flags timeout; }
           chain f { type filter hook forward priority 5; iifname lan udp dport 5000 ip saddr != @guests drop; }
         }' && nft add element inet portal guests { 10.1.0.2 timeout 1h }",
    );
    let every = 6;
    r.start_with(&format!("[revalidate]\nevery = {every}\n[[port]]\nmatch = \"?an\"\n"));
    // A round takes half of it; sighting again comes to it.
    let bound = Duration::from_secs(every) + AT_ONCE;
    let w = Watched::start(&r);
    w.must_stop("ipset", bound, "ipset add gone 10.1.0.2", "ipset del gone 10.1.0.2");
    // Nobody tells of an element that goes by itself.
    w.must_stop(
        "an element that times out",
        bound + Duration::from_secs(2),
        "nft delete element inet portal guests { 10.1.0.2 } && nft add element inet portal guests { 10.1.0.2 timeout 2s }",
        "nft add element inet portal guests { 10.1.0.2 timeout 1h }",
    );
    // What the first packet behind the change passes, and no later one.
    w.must_stop(
        "a limit",
        bound,
        "nft add rule inet portal f udp dport 5000 limit rate over 1/hour burst 1 packets drop",
        "nft 'flush chain inet portal f; add rule inet portal f iifname lan udp dport 5000 ip saddr != @guests drop'",
    );
    // The time comes by itself. (In seconds since 1970, which is no matter of time zones.)
    w.must_stop(
        "a rule on the time",
        bound + Duration::from_secs(2),
        "nft add rule inet portal f udp dport 5000 meta time '>' $(( $(date +%s) + 2 )) drop",
        "nft 'flush chain inet portal f; add rule inet portal f iifname lan udp dport 5000 ip saddr != @guests drop'",
    );
    for (table, chain) in [("filter", "FORWARD"), ("mangle", "POSTROUTING")] {
        let rule = format!("{chain} -p udp --dport {VICTIM} -j DROP");
        w.must_stop(
            &format!("iptables-legacy {table} {chain}"),
            bound,
            &format!("iptables-legacy -t {table} -A {rule}"),
            &format!("iptables-legacy -t {table} -D {rule}"),
        );
    }
}

#[test]
fn a_change_that_concerns_nobody_or_somebody_else_takes_nothing_back() {
    let mut r = Router::new("nobody");
    r.run(
        "nft 'table inet fw {
           set bad { type ipv4_addr; }
           set mine { type ipv4_addr; }
           chain i { type filter hook input priority 0; ip saddr @mine drop; }
           chain f { type filter hook forward priority 0; ip saddr @bad drop; }
           chain n { type nat hook postrouting priority 100; }
         }'",
    );
    r.start(&PORTS);
    let w = Watched::start(&r);
    w.wait_offloaded("at first");
    let deleted =
        || ["lan", "wan"].map(|port| r.port(port)["deletes"].as_u64().expect("a counter"));
    let handles = || r.run("tc filter show dev lan ingress | grep -o 'cookie [0-9a-f]*' | sort");
    let (before, rules) = (deleted(), handles());
    for change in [
        "nft add element inet fw mine { 10.1.0.2 }",
        "nft add rule inet fw i udp dport 5000 drop",
        "nft add rule inet fw n oifname wan masquerade",
        "nft add table inet other && nft 'add chain inet other c { type filter hook output priority 0; }' && nft add rule inet other c drop",
        "nft delete table inet other",
        // Somebody else's address.
        "nft add element inet fw bad { 10.9.9.9 }",
        "nft delete element inet fw bad { 10.9.9.9 }",
        "nft insert rule inet fw f ip saddr 10.9.9.0/24 drop",
    ] {
        r.run(change);
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!((deleted(), handles()), (before, rules.clone()), "{change}");
    }
    // And one that does.
    w.must_stop(
        "its own",
        AT_ONCE,
        "nft insert rule inet fw f ip saddr 10.1.0.2 udp dport 5000 drop",
        "nft flush chain inet fw f",
    );
    assert_ne!(deleted(), before, "the counter counts");
}

/// The slow path is not run over: what concerns everybody takes back so many connections a second, if so configured.
#[test]
fn a_change_that_concerns_all_takes_back_so_many_a_second() {
    const RATE: u32 = 4;
    const CONNECTIONS: u16 = 12;
    let mut r = Router::new("paced");
    r.run("nft add table inet wall && nft 'add chain inet wall forward { type filter hook forward priority 0; }'");
    r.start_with(&format!("[revalidate]\nrate = {RATE}\n[[port]]\nmatch = \"?an\"\n"));
    let mut all: Vec<_> = (0..CONNECTIONS).map(|n| r.connect_to(5100 + n)).collect();
    let rules = usize::from(CONNECTIONS) * 2;
    wait_until("all are offloaded", || {
        all.iter_mut().for_each(Connection::ping);
        r.installed().len() == rules
    });
    let cookies = |r: &Router| {
        let conns = r.conns();
        let slots = conns.as_array().into_iter().flatten().filter_map(|c| c["slots"].as_array());
        let cookies = slots.flatten().filter_map(|s| s["cookie"].as_str().map(str::to_owned));
        cookies.collect::<std::collections::BTreeSet<_>>()
    };
    let before = cookies(&r);
    assert_eq!(before.len(), rules);
    let changed = Instant::now();
    r.run("nft add rule inet wall forward ct mark 77 drop");
    let mut left = rules;
    while left > 0 {
        left = before.intersection(&cookies(&r)).count();
        let at = changed.elapsed();
        println!("{left} of {rules} rules are as they were {at:?} after the change");
        // Of a connection both go, and the first of them soon.
        let due = f64::from(RATE).mul_add(at.as_secs_f64(), 2.0) * 2.0;
        assert!((rules - left) as f64 <= due, "{} rules are gone after {at:?}", rules - left);
        assert!(at < PATIENCE, "{left} rules are as they were");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(changed.elapsed() > Duration::from_secs(u64::from(CONNECTIONS) / u64::from(RATE) - 1));
    wait_until("all are offloaded again", || {
        all.iter_mut().for_each(Connection::ping);
        r.installed().len() == rules
    });
}
