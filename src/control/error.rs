//! What can go wrong, on either side.

use std::time::Duration;

use nix::errno::Errno;

/// Bytes that are no message, or an object that does not fit one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A length in a header contradicts the datagram.
    #[error("a message of wrong length")]
    Length,
    /// A message type that is not of this protocol.
    #[error("a message of unknown type {0}")]
    Type(u16),
    /// A datagram was longer than the receiver's buffer.
    #[error("a datagram longer than any of this protocol")]
    Truncated,
    /// An attribute is missing that an object cannot be without.
    #[error("an attribute is missing")]
    Missing,
    /// A request has an attribute that the daemon does not know.
    #[error(
        "{object} has an attribute {number} that this daemon does not know: use programs of one release"
    )]
    Unknown {
        /// What was asked.
        object: &'static str,
        /// The attribute's number.
        number: u16,
    },
    /// An attribute holds something else.
    #[error("an attribute is not {0}")]
    Value(&'static str),
    /// A field of an object, and what is wrong with it.
    #[error("{object}.{field}: {source}")]
    Field {
        /// The object.
        object: &'static str,
        /// Its field.
        field: &'static str,
        /// What is wrong with it.
        source: Box<WireError>,
    },
    /// The codec refused the bytes.
    #[error("{0}")]
    Decode(String),
    /// The codec refused the object.
    #[error("{0}")]
    Encode(String),
    /// An object does not fit a datagram.
    #[error("an object of {0} bytes does not fit a datagram")]
    TooLarge(usize),
    /// An answer of another kind, or more or fewer objects, than the request calls for.
    #[error("an answer to another question")]
    Unexpected,
}

impl WireError {
    pub(super) fn inside(self, object: &'static str, field: &'static str) -> Self {
        Self::Field { object, field, source: Box::new(self) }
    }
}

/// The class of a refusal. Travels as an errno; the CLI makes its exit code of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No such port, connection or netdev (`ENOENT`).
    NotFound,
    /// The netdev is a port already (`EEXIST`).
    AlreadyBound,
    /// A value of the request makes no sense (`EINVAL`).
    InvalidArgument,
    /// This daemon, kernel or netdev cannot do that (`EOPNOTSUPP`).
    Unsupported,
    /// The caller may not do that (`EPERM`).
    Permission,
    /// Too much is asked at once, or a dump was given up because nobody read it (`EBUSY`).
    Busy,
    /// The two programs speak different versions of the protocol (`EPROTONOSUPPORT`).
    Version,
    /// Anything else (`EIO`).
    Internal,
}

impl ErrorKind {
    /// The errno that stands for it on the wire.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::NotFound => Errno::ENOENT,
            Self::AlreadyBound => Errno::EEXIST,
            Self::InvalidArgument => Errno::EINVAL,
            Self::Unsupported => Errno::EOPNOTSUPP,
            Self::Permission => Errno::EPERM,
            Self::Busy => Errno::EBUSY,
            Self::Version => Errno::EPROTONOSUPPORT,
            Self::Internal => Errno::EIO,
        }
    }

    /// What an errno of the wire stands for; one that is not ours is [`Self::Internal`].
    #[must_use]
    pub const fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::ENOENT => Self::NotFound,
            Errno::EEXIST => Self::AlreadyBound,
            Errno::EINVAL => Self::InvalidArgument,
            Errno::EOPNOTSUPP => Self::Unsupported,
            Errno::EPERM => Self::Permission,
            Errno::EBUSY => Self::Busy,
            Errno::EPROTONOSUPPORT => Self::Version,
            _ => Self::Internal,
        }
    }
}

/// A refusal by the daemon: its class, and one line for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// The class.
    pub kind: ErrorKind,
    /// What exactly, without the class's name and without a final dot.
    pub message: String,
}

impl ControlError {
    /// A refusal of this class.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// [`ErrorKind::NotFound`].
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// [`ErrorKind::InvalidArgument`].
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// [`ErrorKind::Internal`].
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
}

/// Why there is no control server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is a daemon.
    #[error(
        "another daemon is in this network namespace, at the control port id {port_id}: a second daemon?"
    )]
    AlreadyRunning {
        /// Its port id.
        port_id: u32,
    },
    /// The port id is taken, and without `CAP_NET_ADMIN` nobody would find the daemon at another one.
    #[error("another process holds the control port id {port_id} in this network namespace")]
    Taken {
        /// Which port id.
        port_id: u32,
    },
    /// A system call failed.
    #[error("control socket: {call}")]
    Io {
        /// Which.
        call: &'static str,
        /// How.
        #[source]
        source: Errno,
    },
}

/// Why the daemon's answer is not there.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody has the daemon's port id in this network namespace.
    #[error("the daemon is not running in this network namespace")]
    NotRunning,
    /// Nothing came in time.
    #[error("the daemon does not answer (waited {0:?})")]
    NoAnswer(Duration),
    /// The port id is held by somebody who is not the daemon.
    #[error(
        "process {pid} of uid {uid} answers in the daemon's place: expected uid {expected} (a daemon that runs as another user needs --daemon-uid)"
    )]
    Impostor {
        /// The answering process.
        pid: i32,
        /// Its user.
        uid: u32,
        /// The user it should have been.
        expected: u32,
    },
    /// The daemon is of another release.
    #[error(
        "the daemon speaks version {daemon} of the control protocol, this program version {ours}: use programs of one release"
    )]
    Version {
        /// The daemon's version.
        daemon: u8,
        /// Ours.
        ours: u8,
    },
    /// The kernel gives multicast messages of this family to `CAP_NET_ADMIN` only.
    #[error("events go to processes with CAP_NET_ADMIN only")]
    EventsDenied,
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] ControlError),
    /// The daemon's bytes make no sense.
    #[error("the daemon's answer")]
    Protocol(#[from] WireError),
    /// A system call failed.
    #[error("control socket: {call}")]
    Io {
        /// Which.
        call: &'static str,
        /// How.
        #[source]
        source: Errno,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for kind in [
            ErrorKind::NotFound,
            ErrorKind::AlreadyBound,
            ErrorKind::InvalidArgument,
            ErrorKind::Unsupported,
            ErrorKind::Permission,
            ErrorKind::Busy,
            ErrorKind::Version,
            ErrorKind::Internal,
        ] {
            assert_eq!(ErrorKind::from_errno(kind.errno()), kind);
        }
        assert_eq!(ErrorKind::from_errno(Errno::ENOMEM), ErrorKind::Internal);
    }

    #[test]
    fn every_kind_travels_as_the_errno_that_people_know() {
        let errnos = [
            (ErrorKind::NotFound, Errno::ENOENT),
            (ErrorKind::AlreadyBound, Errno::EEXIST),
            (ErrorKind::InvalidArgument, Errno::EINVAL),
            (ErrorKind::Unsupported, Errno::EOPNOTSUPP),
            (ErrorKind::Permission, Errno::EPERM),
            (ErrorKind::Busy, Errno::EBUSY),
            (ErrorKind::Version, Errno::EPROTONOSUPPORT),
            (ErrorKind::Internal, Errno::EIO),
        ];
        assert!(errnos.iter().all(|(kind, errno)| kind.errno() == *errno));
    }

    #[test]
    fn a_refusal_is_of_the_kind_that_it_was_made_as() {
        let made =
            [ControlError::not_found("a"), ControlError::invalid("b"), ControlError::internal("c")];
        let kinds = [ErrorKind::NotFound, ErrorKind::InvalidArgument, ErrorKind::Internal];
        assert_eq!(made.clone().map(|e| e.kind), kinds);
        assert_eq!(made.map(|e| e.to_string()), ["a", "b", "c"]);
    }
}
