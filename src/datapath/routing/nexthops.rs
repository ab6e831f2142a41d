//! Events of nexthop objects (`ip nexthop`), which the codec of everything else does not decode.
//!
//! Routes change with the object that they use. Of that the kernel tells as of routes (`RTM_NEWROUTE`) only
//! where an object was replaced, and only with `net.ipv4.nexthop_compat_mode`, the default
//! (`nexthop_replace_notify`). Where an object was deleted, IPv4's routes are gone without a word
//! (`__remove_nexthop_fib`, `fib_table_flush`).

/// `RTNLGRP_NEXTHOP` (`linux/rtnetlink.h`).
pub(super) const GROUP: u32 = 32;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

/// Whether a message of this type tells that an object was made, changed or deleted.
pub(super) const fn tells_of_one(ty: u16) -> bool {
    matches!(ty, RTM_NEWNEXTHOP | RTM_DELNEXTHOP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nexthop_is_told_from_other_messages() {
        assert!(tells_of_one(RTM_NEWNEXTHOP) && tells_of_one(RTM_DELNEXTHOP));
        // RTM_NEWROUTE, RTM_GETNEXTHOP.
        assert!(!tells_of_one(24) && !tells_of_one(106));
    }
}
