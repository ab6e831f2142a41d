//! Who may do what.
//!
//! Changing is root's. Reading is root's and, where configured, a group's: connections are other
//! people's business.
//!
//! What the kernel says of a sender (`SCM_CREDENTIALS`) is its uid and its **primary** gid. The
//! supplementary groups are not in there, and looking them up through the pid
//! (`/proc/<pid>/status`) asks about whoever has that pid by then. So the user's groups are looked
//! up in the system's user database, by uid. That is what `newgrp` and `sg` would give the user
//! anyway; a process that dropped a group of its user is still let in.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::socket::UnixCredentials;
use nix::unistd::{Gid, Uid, User, geteuid, getgrouplist};

/// How long the answer of the user database is believed: it may be a directory server far away,
/// and any local user can make us ask.
const REMEMBER: Duration = Duration::from_secs(30);
const REMEMBER_USERS: usize = 1024;

/// The uid and gid that stand for everybody who has none in our user namespace
/// (`kernel.overflowuid`, as every distribution leaves it): nobody's in particular.
const OVERFLOW: u32 = 65534;

/// What is configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Its members may read. `None`: only root may.
    pub group: Option<Gid>,
}

/// [`Access`] with a memory of the groups of users.
#[derive(Debug)]
pub(super) struct Gate {
    access: Access,
    own: Uid,
    members: Mutex<HashMap<u32, (Instant, bool)>>,
}

impl Gate {
    pub(super) fn new(access: Access) -> Self {
        Self { access, own: geteuid(), members: Mutex::default() }
    }

    /// Root, and the user the daemon runs as: who can kill it anyway. A root of another user
    /// namespace arrives here as some other uid.
    pub(super) fn may_change(&self, who: &UnixCredentials) -> bool {
        who.uid() == 0 || (who.uid() == self.own.as_raw() && who.uid() != OVERFLOW)
    }

    pub(super) fn may_read(&self, who: &UnixCredentials) -> bool {
        if self.may_change(who) {
            return true;
        }
        let Some(group) = self.access.group else { return false };
        if who.uid() == OVERFLOW || who.gid() == OVERFLOW {
            return false;
        }
        who.gid() == group.as_raw() || self.is_member(who.uid(), group)
    }

    fn is_member(&self, uid: u32, group: Gid) -> bool {
        let Ok(mut members) = self.members.lock() else { return false };
        let now = Instant::now();
        if let Some((at, member)) = members.get(&uid)
            && now.duration_since(*at) < REMEMBER
        {
            return *member;
        }
        let member = user_is_in(uid, group);
        if members.len() >= REMEMBER_USERS {
            members.clear();
        }
        members.insert(uid, (now, member));
        member
    }
}

fn user_is_in(uid: u32, group: Gid) -> bool {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return false };
    let Ok(name) = CString::new(user.name) else { return false };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(uid: u32, gid: u32) -> UnixCredentials {
        libc::ucred { pid: 1, uid, gid }.into()
    }

    /// A user that is neither root nor whoever runs the test.
    fn other() -> u32 {
        geteuid().as_raw() ^ 0x4000_0000
    }

    #[test]
    fn changing_is_roots_and_the_daemons_own_users() {
        let gate = Gate::new(Access { group: Some(Gid::from_raw(4242)) });
        assert!(gate.may_change(&who(0, 0)));
        assert!(gate.may_change(&who(geteuid().as_raw(), 1)));
        assert!(!gate.may_change(&who(other(), 4242)));
    }

    #[test]
    fn reading_is_also_the_groups() {
        let gate = Gate::new(Access { group: Some(Gid::from_raw(4242)) });
        assert!(gate.may_read(&who(other(), 4242)));
        assert!(!gate.may_read(&who(other(), 4243)));
        let nogroup = Gate::new(Access { group: Some(Gid::from_raw(OVERFLOW)) });
        assert!(!nogroup.may_read(&who(OVERFLOW, OVERFLOW)), "somebody of another user namespace");
        assert!(!Gate::new(Access::default()).may_read(&who(other(), 4242)));
    }

    #[test]
    fn supplementary_groups_are_looked_up_by_user() {
        // `daemon` is uid 1 with primary gid 1 on every Debian; its own group is in its list.
        if let Ok(Some(user)) = User::from_uid(Uid::from_raw(1)) {
            assert!(user_is_in(1, user.gid));
        }
        assert!(!user_is_in(4_000_000_000, Gid::from_raw(1)), "no such user");
    }

    fn gate(own: u32, group: u32) -> Gate {
        let access = Access { group: Some(Gid::from_raw(group)) };
        Gate { access, own: Uid::from_raw(own), members: Mutex::default() }
    }

    #[test]
    fn a_daemon_that_is_not_root_takes_changes_of_root_and_of_its_user() {
        let gate = gate(1000, 4242);
        assert!(gate.may_change(&who(0, 0)) && gate.may_change(&who(1000, 1000)));
        assert!(!gate.may_change(&who(1001, 1000)));
        assert!(gate.may_read(&who(1000, 1)), "who may change may read");
    }

    #[test]
    fn whoever_has_no_id_here_is_nobody_in_particular() {
        let nobody = gate(OVERFLOW, OVERFLOW);
        assert!(!nobody.may_change(&who(OVERFLOW, 0)), "not the daemon's user either");
        assert!(!nobody.may_read(&who(other(), OVERFLOW)), "and not of its group");
        assert!(!gate(1000, 4242).may_read(&who(OVERFLOW, 4242)));
    }

    #[test]
    fn what_the_user_database_said_is_believed_for_a_while() {
        let gate = gate(1000, 4242);
        // No user database has that one.
        let (nobody, now) = (4_000_000_000, Instant::now());
        let remember = |at: Instant| gate.members.lock().unwrap().insert(nobody, (at, true));
        assert!(!gate.may_read(&who(nobody, 1)));
        remember(now);
        assert!(gate.may_read(&who(nobody, 1)));
        if let Some(long_ago) = now.checked_sub(REMEMBER) {
            remember(long_ago);
            assert!(!gate.may_read(&who(nobody, 1)), "asked again");
        }
        assert_eq!(
            gate.members.lock().unwrap().get(&nobody).map(|(_, member)| *member),
            Some(false)
        );
    }

    #[test]
    fn no_more_users_are_remembered_than_there_is_room_for() {
        let gate = gate(1000, 4242);
        let remembered = || gate.members.lock().unwrap().len();
        for n in 0..3 {
            assert!(!gate.may_read(&who(4_000_000_000 + n, 1)));
        }
        assert_eq!(remembered(), 3);
        for n in (0..).take(REMEMBER_USERS - 3) {
            gate.members.lock().unwrap().insert(n, (Instant::now(), false));
        }
        assert_eq!(remembered(), REMEMBER_USERS);
        assert!(!gate.may_read(&who(4_000_000_009, 1)));
        assert_eq!(remembered(), 1, "anybody can make us ask: all are forgotten, and it goes on");
    }
}
