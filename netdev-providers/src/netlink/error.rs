//! Errors of a netlink exchange.

use std::fmt;
use std::io;

use nix::errno::Errno;

use crate::contract::provider::Fault;
use crate::contract::reason::{Reason, Rejection};

/// The kernel's refusal of one request: `struct nlmsgerr` and, where the kernel gave one, the text
/// of the extended ACK (`NLMSGERR_ATTR_MSG`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError {
    /// The error, positive as in `errno.h`.
    pub errno: Errno,
    /// The kernel's words.
    pub extack: Option<Box<str>>,
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.extack {
            Some(text) => write!(f, "{text} ({:?})", self.errno),
            None => write!(f, "{} ({:?})", self.errno.desc(), self.errno),
        }
    }
}

impl std::error::Error for KernelError {}

/// Why a netlink exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// A system call failed; for a receive, ENOBUFS means that messages were lost.
    #[error("netlink {call}")]
    Io {
        /// Which call.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the request.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// What was changed during a dump made it inconsistent (`NLM_F_DUMP_INTR`): repeat it.
    #[error("the dump was interrupted by a change")]
    Interrupted,
    /// The kernel's answer is not a well-formed message.
    #[error("malformed netlink answer: {0}")]
    Malformed(&'static str),
    /// No answer within the time allowed.
    #[error("no answer from the kernel within {0} ms")]
    TimedOut(u128),
}

impl NetlinkError {
    /// The kernel's or the system call's error number.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Io { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Kernel(k) => Some(k.errno),
            _ => None,
        }
    }

    /// This failure as one of a whole backend, with what was being done.
    #[must_use]
    pub fn into_fault(self, what: impl Into<String>) -> Fault {
        let errno = self.errno();
        let detail = match self {
            Self::Kernel(KernelError { extack, .. }) => extack.map(String::from),
            Self::Io { call, .. } => Some(format!("netlink {call}")),
            other => Some(other.to_string()),
        };
        Fault { what: what.into(), errno, detail }
    }
}

/// Which reason an error number is: the one place where that is decided.
///
/// | errno | reason | who says it |
/// |---|---|---|
/// | EOPNOTSUPP, EPROTONOSUPPORT, EAFNOSUPPORT, ENOENT | unsupported, permanent | a driver that does not offload a key or an action; a classifier or action whose module is missing |
/// | ENOSPC | table-full, transient | a NIC whose table is full; handles used up |
/// | EAGAIN, EBUSY, EINTR, ENOBUFS, ENOMEM, ETIMEDOUT | busy, transient | a module that was loaded meanwhile, a chain that is just going, memory, a device that did not answer in time |
/// | EIO, EREMOTEIO, EPROTO, ENOLINK, ECOMM | device-error, transient | a driver whose device or firmware fails (mlx5 says EREMOTEIO) |
/// | EEXIST | conflict, transient | a rule with the same match |
/// | ENODEV, ENXIO | netdev-gone, permanent | the netdev |
/// | all others (EINVAL, EPERM, ERANGE ...) | refused, permanent | whoever found something wrong with the rule |
///
/// Providers refine it where they know more: ENODEV can be the netdev to redirect to, EINVAL a qdisc
/// that is gone.
pub const REASONS: &[(Errno, Reason)] = &[
    (Errno::EOPNOTSUPP, Reason::Unsupported),
    (Errno::EPROTONOSUPPORT, Reason::Unsupported),
    (Errno::EAFNOSUPPORT, Reason::Unsupported),
    (Errno::ENOENT, Reason::Unsupported),
    (Errno::ENOSPC, Reason::TableFull),
    (Errno::EAGAIN, Reason::Busy),
    (Errno::EBUSY, Reason::Busy),
    (Errno::EINTR, Reason::Busy),
    (Errno::ENOBUFS, Reason::Busy),
    (Errno::ENOMEM, Reason::Busy),
    (Errno::ETIMEDOUT, Reason::Busy),
    (Errno::EIO, Reason::DeviceError),
    (Errno::EREMOTEIO, Reason::DeviceError),
    (Errno::EPROTO, Reason::DeviceError),
    (Errno::ENOLINK, Reason::DeviceError),
    (Errno::ECOMM, Reason::DeviceError),
    (Errno::EEXIST, Reason::Conflict),
    (Errno::ENODEV, Reason::NetdevGone),
    (Errno::ENXIO, Reason::NetdevGone),
];

/// The reason of an error number, by [`REASONS`].
#[must_use]
pub fn reason_of(errno: Errno) -> Reason {
    REASONS.iter().find(|(e, _)| *e == errno).map_or(Reason::Refused, |(_, r)| *r)
}

impl From<KernelError> for Rejection {
    /// The reason code of a kernel error, by the errno; the extended ACK is kept.
    fn from(e: KernelError) -> Self {
        Self { reason: reason_of(e.errno), errno: Some(e.errno), detail: e.extack }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::reason::Permanence;

    #[test]
    fn the_table_in_the_documentation_is_the_table() {
        let documented: Vec<(String, String, String)> = include_str!("error.rs")
            .lines()
            .filter_map(|l| l.strip_prefix("/// | E"))
            .flat_map(|l| {
                let mut cells = l.split('|').map(str::trim);
                let errnos = format!("E{}", cells.next().unwrap());
                let reason = cells.next().unwrap().to_owned();
                let (name, permanence) = reason.split_once(", ").unwrap();
                let (name, permanence) = (name.to_owned(), permanence.to_owned());
                errnos
                    .split(", ")
                    .map(|e| (e.to_owned(), name.clone(), permanence.clone()))
                    .collect::<Vec<_>>()
            })
            .collect();
        let decided: Vec<_> = REASONS
            .iter()
            .map(|(e, r)| {
                let permanence = format!("{:?}", r.permanence()).to_lowercase();
                (format!("{e:?}"), r.name().to_owned(), permanence)
            })
            .collect();
        assert_eq!(documented, decided);
    }

    #[test]
    fn no_errno_stands_twice_and_what_is_not_in_the_table_is_refused_for_good() {
        let errnos: std::collections::HashSet<_> = REASONS.iter().map(|(e, _)| *e as i32).collect();
        assert_eq!(errnos.len(), REASONS.len());
        for errno in [Errno::EINVAL, Errno::EPERM, Errno::ERANGE] {
            assert_eq!(reason_of(errno), Reason::Refused);
        }
        assert_eq!(Reason::Refused.permanence(), Permanence::Permanent);
    }

    #[test]
    fn the_words_of_the_kernel_are_kept() {
        let extack = Some("Unsupported mask".into());
        let r = Rejection::from(KernelError { errno: Errno::EOPNOTSUPP, extack });
        assert_eq!(r.to_string(), "unsupported: Unsupported mask (EOPNOTSUPP)");
    }

    #[test]
    fn a_failure_is_a_fault_with_the_words_of_whoever_said_it() {
        let kernel = |extack: Option<&str>| KernelError {
            errno: Errno::EBUSY,
            extack: extack.map(Into::into),
        };
        assert_eq!(kernel(Some("in use")).to_string(), "in use (EBUSY)");
        assert_eq!(kernel(None).to_string(), "Device or resource busy (EBUSY)");
        let told = |e: NetlinkError| (e.errno(), e.into_fault("adding the qdisc").to_string());
        let refused = told(kernel(Some("in use")).into());
        assert_eq!(refused.0, Some(Errno::EBUSY));
        assert!(refused.1.starts_with("adding the qdisc: in use: "), "{}", refused.1);
        let source = io::Error::from_raw_os_error(Errno::ENOBUFS as i32);
        let lost = told(NetlinkError::Io { call: "recvmsg", source });
        assert_eq!(lost.0, Some(Errno::ENOBUFS));
        assert!(lost.1.starts_with("adding the qdisc: netlink recvmsg: "), "{}", lost.1);
        let late = told(NetlinkError::TimedOut(5));
        assert_eq!(
            late,
            (None, "adding the qdisc: no answer from the kernel within 5 ms".to_owned())
        );
    }
}
