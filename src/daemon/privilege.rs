//! What the daemon may do. It need not be root's: capabilities are what the kernel asks for.

/// `CAP_NET_ADMIN` (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;

/// Whether this process may administer the network. Where the kernel does not tell, it is to be tried.
pub(super) fn may_administer() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    effective(&status).is_none_or(|set| set & (1 << CAP_NET_ADMIN) != 0)
}

/// The effective capabilities in a `status` file of a process.
fn effective(status: &str) -> Option<u64> {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_as_the_kernel_writes_them() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t000000c000001000\nCapBnd:\t0\n";
        assert_eq!(effective(status), Some(0xc0_0000_1000));
        assert_eq!(effective("Name:\tx\n"), None);
        assert_eq!(effective("CapEff:\tx\n"), None);
    }
}
