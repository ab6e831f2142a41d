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

impl From<KernelError> for Rejection {
    /// The reason code of a kernel error, by the errno; the extended ACK is kept.
    fn from(e: KernelError) -> Self {
        let reason = match e.errno {
            Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT | Errno::ENOENT => {
                Reason::Unsupported
            }
            Errno::ENOSPC => Reason::TableFull,
            Errno::EAGAIN | Errno::EBUSY | Errno::EINTR | Errno::ENOBUFS | Errno::ENOMEM => {
                Reason::Busy
            }
            Errno::EEXIST => Reason::Conflict,
            Errno::ENODEV | Errno::ENXIO => Reason::NetdevGone,
            _ => Reason::Refused,
        };
        Self { reason, errno: Some(e.errno), detail: e.extack }
    }
}
