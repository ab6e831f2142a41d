//! Tables of iptables-legacy: that there are any, and which. Nobody can read their rules here, or is told of a change.

/// The tables of this network namespace, after the family: `ip`, `ip6`.
pub(crate) fn tables() -> impl Iterator<Item = (&'static str, String)> {
    ["ip", "ip6"].into_iter().flat_map(|family| {
        let path = format!("/proc/self/net/{family}_tables_names");
        let names = std::fs::read_to_string(path).unwrap_or_default();
        let names: Vec<_> = names.split_whitespace().map(str::to_owned).collect();
        names.into_iter().map(move |name| (family, name))
    })
}
