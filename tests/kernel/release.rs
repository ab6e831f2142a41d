//! Which kernel this is: what it does differs, and nothing but its version tells.

/// From 6.14 on a FIN or a RST goes through the flowtable as everything else does, and conntrack is not
/// told: the connection has ended when nothing has come for `nf_flowtable_tcp_timeout`, and then for
/// `nf_conntrack_tcp_timeout_close`. Before, such a packet took the slow path, and ended the entry.
fn flowtable_keeps_fin() -> bool {
    is_at_least((6, 14))
}

/// Where the flowtable keeps FIN and RST to itself, the ends of connections are heard of soon all the same.
pub(crate) fn hear_of_ends_soon(run: impl FnOnce(&str) -> String) {
    // A kernel without flowtables has no such thing.
    let has_flowtables =
        std::path::Path::new("/proc/sys/net/netfilter/nf_flowtable_tcp_timeout").exists();
    if flowtable_keeps_fin() && has_flowtables {
        run(
            "sysctl -qw net.netfilter.nf_flowtable_tcp_timeout=4 net.netfilter.nf_conntrack_tcp_timeout_close=2",
        );
    }
}

/// From 7.2 on an entry is made only where both netdevs of the connection are in the flowtable.
pub(crate) fn flowtable_wants_both() -> bool {
    is_at_least((7, 2))
}

/// From 6.14 on a rule of IPv6 may be for a flow label.
pub(crate) fn rules_know_flow_labels() -> bool {
    is_at_least((6, 14))
}

/// # Panics
/// When the kernel does not say which it is.
pub(crate) fn is_at_least(version: (u32, u32)) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("osrelease");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (major, minor) = (numbers.next().expect("a major"), numbers.next().expect("a minor"));
    (major.expect("a number"), minor.expect("a number")) >= version
}
