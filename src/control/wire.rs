//! Messages on the wire: netlink header, generic-netlink header, attributes.
//!
//! neli is the codec. It trusts some lengths (it subtracts them unchecked), so `parse` checks
//! each length of the headers before neli sees it: no bytes from others make it panic.

use std::io::Cursor;

use neli::consts::nl::{NlmF, Nlmsg, NlmsgerrAttr};
use neli::err::{NlmsgerrBuilder, NlmsghdrAckBuilder, NlmsghdrErrBuilder};
use neli::genl::Genlmsghdr;
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::types::{Buffer, GenlBuffer};
use neli::{FromBytes, ToBytes, neli_enum};
use nix::errno::Errno;

use super::attrs::{self, Attrs};
use super::error::{ControlError, ErrorKind, WireError};

/// The port id of the daemon: "ctof". The kernel binds a socket without a port id of its own to the
/// process id (at most 2^22), or, when that is taken, to a negative number below -4096
/// (`netlink_autobind`); a positive number above 2^22 collides with neither.
pub const PORT_ID: u32 = 0x6374_6f66;

/// The multicast group of events. `NETLINK_USERSOCK` has 32, without names: one that is not the
/// first that comes to others' minds.
pub const EVENT_GROUP: u32 = 23;

/// The multicast group that the daemon is in, so that it is found also where somebody else has taken
/// [`PORT_ID`]. Nothing is sent to it.
pub const DAEMON_GROUP: u32 = 29;

/// The version of this protocol, in every generic-netlink header. 2: the filter of [`Command::GetConns`], which a daemon
/// of version 1 would pass over, and answer with more than was asked for.
pub const VERSION: u8 = 2;

/// No datagram is longer, in either direction.
pub const MAX_DATAGRAM: usize = 32 * 1024;

/// `nlmsg_type` of every message that is not netlink's own: the first that netlink leaves free
/// (`NLMSG_MIN_TYPE`), as there is one family only.
const MESSAGE_TYPE: u16 = 0x10;

const HEADER: usize = 16; // struct nlmsghdr
const GENL_HEADER: usize = 4; // struct genlmsghdr
const ERRNO: usize = 4;

/// `genlmsghdr.cmd`. Numbers are stable.
#[neli_enum(serialized_type = "u8")]
pub enum Command {
    /// Request: all ports.
    GetPorts = 1,
    /// Request: connections, or how many, by [filter](super::filter::ConnFilter).
    GetConns = 2,
    /// Request: provider classes.
    GetProviders = 3,
    /// Request: the engine's counters.
    GetStats = 4,
    /// Request: why a connection is offloaded or not.
    Explain = 5,
    /// Request, change: flush.
    Flush = 6,
    /// Request, change: attach a netdev.
    PortAdd = 7,
    /// Request, change: detach a netdev.
    PortDel = 8,
    /// Request: the next datagram of the answer with this sequence number.
    Next = 9,
    /// Request: publish events for some seconds.
    Watch = 10,
    /// Request, change: adopt or remove what dead daemons have left.
    Reconcile = 11,
    /// Request: what offloaded packets skip.
    GetLint = 13,
    /// Request, change: read the configuration anew.
    Reload = 12,
    /// Answer: a port.
    Port = 33,
    /// Answer: a connection.
    Conn = 34,
    /// Answer: a provider class.
    Provider = 35,
    /// Answer: the engine's counters.
    Stats = 36,
    /// Answer: what one port does with one direction of a connection.
    Verdict = 37,
    /// Answer: how many a flush removed.
    Flushed = 38,
    /// Answer: how many of them on one port.
    PortFlushed = 39,
    /// Answer: the change is still being made, go on waiting.
    Working = 40,
    /// Answer: what a reconciliation did on one port.
    PortReconciled = 41,
    /// Answer: how far a connection is offloaded, and why not farther.
    Summary = 42,
    /// Answer: nothing found so far, and there is more to be looked at. Without attributes; the client asks for the next.
    Searching = 43,
    /// Answer: how many connections fit a filter.
    ConnCount = 44,
    /// Answer: what reading the configuration anew has changed, and what not.
    Reloaded = 45,
    /// Answer: what of one kind offloaded packets skip.
    Lint = 46,
    /// Multicast: an event. `nlmsg_seq` counts them, so that a gap tells how many were lost.
    Event = 65,
}
impl neli::consts::genl::Cmd for Command {}

/// A message, taken apart.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    /// A request, an object of an answer, or an event.
    Object { command: Command, version: u8, attrs: Attrs },
    /// `NLMSG_DONE`: the answer is complete.
    Done,
    /// `NLMSG_ERROR` with errno 0: done, nothing to tell.
    Ack,
    /// `NLMSG_ERROR`.
    Refused(ControlError),
}

/// A message and what its header says.
#[derive(Debug, PartialEq)]
pub(super) struct Envelope {
    pub(super) seq: u32,
    pub(super) message: Message,
}

fn bytes<P>(
    kind: u16,
    flags: NlmF,
    seq: u32,
    payload: NlPayload<u16, P>,
) -> Result<Vec<u8>, WireError>
where
    P: neli::Size + ToBytes,
{
    let message = NlmsghdrBuilder::default()
        .nl_type(kind)
        .nl_flags(flags)
        .nl_seq(seq)
        .nl_payload(payload)
        .build()
        .map_err(|e| WireError::Encode(e.to_string()))?;
    let mut out = Cursor::new(Vec::new());
    message.to_bytes(&mut out).map_err(|e| WireError::Encode(e.to_string()))?;
    let out = out.into_inner();
    if out.len() > MAX_DATAGRAM { Err(WireError::TooLarge(out.len())) } else { Ok(out) }
}

/// By hand, as the attributes are: an answer has one for each connection.
fn object(flags: NlmF, command: Command, seq: u32, attrs: &[u8]) -> Result<Vec<u8>, WireError> {
    versioned(flags, command, VERSION, seq, attrs)
}

pub(super) fn versioned(
    flags: NlmF,
    command: Command,
    version: u8,
    seq: u32,
    attrs: &[u8],
) -> Result<Vec<u8>, WireError> {
    let len = HEADER + GENL_HEADER + attrs.len();
    if len > MAX_DATAGRAM {
        return Err(WireError::TooLarge(len));
    }
    let told = u32::try_from(len).map_err(|_| WireError::TooLarge(len))?;
    let mut out = Vec::with_capacity(len);
    out.extend(told.to_ne_bytes());
    out.extend(MESSAGE_TYPE.to_ne_bytes());
    out.extend(u16::from(flags).to_ne_bytes());
    out.extend(seq.to_ne_bytes());
    // The port id is nobody's business: the kernel tells it, see the documentation of `control`.
    out.extend([0; 4]);
    out.extend([command.into(), version, 0, 0]);
    out.extend(attrs);
    Ok(out)
}

/// A request.
pub(super) fn request(command: Command, seq: u32, attrs: &[u8]) -> Result<Vec<u8>, WireError> {
    object(NlmF::REQUEST, command, seq, attrs)
}

/// One object of an answer.
pub(super) fn part(command: Command, seq: u32, attrs: &[u8]) -> Result<Vec<u8>, WireError> {
    object(NlmF::MULTI, command, seq, attrs)
}

/// A message that stands alone: an event, a notice.
pub(super) fn single(command: Command, seq: u32, attrs: &[u8]) -> Result<Vec<u8>, WireError> {
    object(NlmF::empty(), command, seq, attrs)
}

/// The end of an answer.
pub(super) fn done(seq: u32) -> Result<Vec<u8>, WireError> {
    bytes::<Buffer>(Nlmsg::Done.into(), NlmF::MULTI, seq, NlPayload::Empty)
}

/// Done, nothing to tell.
pub(super) fn ack(seq: u32) -> Result<Vec<u8>, WireError> {
    let request = NlmsghdrAckBuilder::default()
        .nl_len(16)
        .nl_type(MESSAGE_TYPE)
        .nl_flags(NlmF::REQUEST)
        .nl_seq(seq)
        .nl_pid(0)
        .build()
        .map_err(|e| WireError::Encode(e.to_string()))?;
    let payload = NlmsgerrBuilder::default()
        .nlmsg(request)
        .build()
        .map_err(|e| WireError::Encode(e.to_string()))?;
    bytes::<Buffer>(Nlmsg::Error.into(), NlmF::CAPPED, seq, NlPayload::Ack(payload))
}

/// A refusal: the errno, the header of the request (capped, as the kernel does), the text.
pub(super) fn refusal(seq: u32, error: &ControlError) -> Result<Vec<u8>, WireError> {
    let request = NlmsghdrErrBuilder::default()
        .nl_type(MESSAGE_TYPE)
        .nl_flags(NlmF::REQUEST)
        .nl_seq(seq)
        .nl_payload(Buffer::new())
        .build()
        .map_err(|e| WireError::Encode(e.to_string()))?;
    let text = attrs::attribute(NlmsgerrAttr::Msg, false, attrs::text_payload(&error.message)?)?;
    let payload = NlmsgerrBuilder::default()
        .error(-(error.kind.errno() as i32))
        .nlmsg(request)
        .ext_ack(GenlBuffer::from_iter([text]))
        .build()
        .map_err(|e| WireError::Encode(e.to_string()))?;
    bytes(Nlmsg::Error.into(), NlmF::CAPPED | NlmF::ACK_TLVS, seq, NlPayload::Err(payload))
}

/// The sequence number in the header, even where the rest makes no sense.
pub(super) fn peek_seq(datagram: &[u8]) -> Option<u32> {
    word(datagram, 8)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().map(u32::from_ne_bytes).ok()
}

/// Takes a datagram apart. Nothing of it is believed until it has been looked at.
pub(super) fn parse(datagram: &[u8]) -> Result<Vec<Envelope>, WireError> {
    let mut out = Vec::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let len = word(rest, 0).ok_or(WireError::Length)? as usize;
        if len < HEADER || !len.is_multiple_of(4) || len > rest.len() {
            return Err(WireError::Length);
        }
        let (message, after) = rest.split_at(len);
        out.push(parse_one(message)?);
        rest = after;
    }
    Ok(out)
}

/// `message` is as long as its header says, and that is at least a header.
fn parse_one(message: &[u8]) -> Result<Envelope, WireError> {
    let kind = u16::from_ne_bytes([message[4], message[5]]);
    let done = u16::from(Nlmsg::Done);
    let error = u16::from(Nlmsg::Error);
    if kind == error {
        // neli subtracts the length of the repeated header from what is left without a look.
        let repeated = word(message, HEADER + ERRNO).ok_or(WireError::Length)? as usize;
        if repeated < HEADER
            || !repeated.is_multiple_of(4)
            || repeated > message.len() - HEADER - ERRNO
        {
            return Err(WireError::Length);
        }
    } else if kind == done {
        if message.len() != HEADER {
            return Err(WireError::Length);
        }
    } else if kind != MESSAGE_TYPE {
        return Err(WireError::Type(kind));
    }
    let seq = peek_seq(message).ok_or(WireError::Length)?;
    if kind == error {
        let parsed = Nlmsghdr::<u16, Buffer>::from_bytes(&mut Cursor::new(message))
            .map_err(|e| WireError::Decode(e.to_string()))?;
        let message = match parsed.nl_payload() {
            NlPayload::Ack(_) => Message::Ack,
            NlPayload::Err(e) => {
                let errno = Errno::from_raw(e.error().checked_neg().unwrap_or(0));
                let text = e
                    .ext_ack()
                    .iter()
                    .find(|a| *a.nla_type().nla_type() == NlmsgerrAttr::Msg)
                    .map(|a| attrs::parse_text(a.nla_payload().as_ref()))
                    .transpose()?
                    .unwrap_or_else(|| errno.desc().to_owned());
                Message::Refused(ControlError::new(ErrorKind::from_errno(errno), text))
            }
            _ => return Err(WireError::Type(kind)),
        };
        return Ok(Envelope { seq, message });
    }
    if kind == done {
        return Ok(Envelope { seq, message: Message::Done });
    }
    let parsed = Nlmsghdr::<u16, Genlmsghdr<Command, u16>>::from_bytes(&mut Cursor::new(message))
        .map_err(|e| WireError::Decode(e.to_string()))?;
    let header = parsed.get_payload().ok_or(WireError::Length)?;
    Ok(Envelope {
        seq,
        message: Message::Object {
            command: *header.cmd(),
            version: *header.version(),
            attrs: header.attrs().clone(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(bytes: &[u8]) -> Envelope {
        let mut all = parse(bytes).unwrap();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    #[test]
    fn headers_are_laid_out_as_the_kernels() {
        let b = request(Command::GetStats, 7, &[]).unwrap();
        assert_eq!(b.len(), 20);
        assert_eq!(b[0..4], 20u32.to_ne_bytes());
        assert_eq!(b[4..6], 0x10u16.to_ne_bytes());
        assert_eq!(b[6..8], 1u16.to_ne_bytes(), "NLM_F_REQUEST");
        assert_eq!(b[8..12], 7u32.to_ne_bytes());
        assert_eq!(b[16..20], [4, VERSION, 0, 0]);
        let b = refusal(9, &ControlError::not_found("no")).unwrap();
        assert_eq!(b[4..6], 2u16.to_ne_bytes(), "NLMSG_ERROR");
        assert_eq!(b[16..20], (-2i32).to_ne_bytes(), "-ENOENT");
        assert_eq!(b[36..], [7, 0, 1, 0, b'n', b'o', 0, 0], "NLMSGERR_ATTR_MSG");
    }

    #[test]
    fn control_messages_read_back() {
        assert_eq!(one(&done(3).unwrap()), Envelope { seq: 3, message: Message::Done });
        assert_eq!(one(&ack(4).unwrap()), Envelope { seq: 4, message: Message::Ack });
        let e = ControlError::new(ErrorKind::AlreadyBound, "eth0 is a port already");
        let b = refusal(5, &e).unwrap();
        assert_eq!(one(&b), Envelope { seq: 5, message: Message::Refused(e) });
        let two = [ack(1).unwrap(), done(2).unwrap()].concat();
        assert_eq!(parse(&two).unwrap().len(), 2);
    }

    #[test]
    fn an_unknown_command_is_a_value_not_an_error() {
        let mut b = request(Command::GetStats, 7, &[]).unwrap();
        b[16] = 250;
        let Message::Object { command, .. } = one(&b).message else { panic!("an object") };
        assert_eq!(u8::from(command), 250);
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let e = ControlError::internal("é".repeat(5000));
        let Message::Refused(back) = one(&refusal(1, &e).unwrap()).message else {
            panic!("an error")
        };
        assert!(e.message.starts_with(&back.message) && back.message.len() > 1000);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_bytes_make_the_parser_panic(b in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&b);
        }

        /// Headers that look right, so that the random rest reaches the codec.
        #[test]
        fn no_plausible_bytes_make_the_parser_panic(
            kind in prop_oneof![Just(0x10u16), Just(2), Just(3)],
            flags: u16,
            errno: i32,
            repeated in 0u32..64,
            nla_len in 0u16..40,
            rest in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut b = vec![0; 4];
            b.extend(kind.to_ne_bytes());
            b.extend(flags.to_ne_bytes());
            b.extend([1, 0, 0, 0, 0, 0, 0, 0]);
            if kind == 2 {
                b.extend(errno.to_ne_bytes());
                b.extend(repeated.to_ne_bytes());
                b.extend([0; 12]);
            } else {
                b.extend([1, 1, 0, 0]);
            }
            b.extend(nla_len.to_ne_bytes());
            b.extend([1, 0]);
            b.extend(rest);
            b.resize(b.len().next_multiple_of(4), 0);
            let len = u32::try_from(b.len()).unwrap();
            b[..4].copy_from_slice(&len.to_ne_bytes());
            let _ = parse(&b);
        }

        #[test]
        fn no_flipped_byte_makes_the_parser_panic(at in 0usize..200, to: u8) {
            for mut b in [refusal(1, &ControlError::not_found("some text")).unwrap(), ack(1).unwrap(), done(1).unwrap()] {
                let n = b.len();
                b[at % n] = to;
                let _ = parse(&b);
            }
        }
    }

    #[test]
    fn an_object_fills_a_datagram_and_no_more() {
        let filled = |payload: usize| part(Command::Port, 1, &vec![0; payload + 4]);
        // Behind two headers of 20 bytes and that of the attribute.
        assert_eq!(filled(32 * 1024 - 24).map(|b| b.len()), Ok(32 * 1024));
        assert_eq!(filled(32 * 1024 - 20), Err(WireError::TooLarge(32 * 1024 + 4)));
    }

    #[test]
    fn flags_say_what_kind_of_answer_it_is() {
        let flags = |b: Result<Vec<u8>, WireError>| {
            let b = b.unwrap();
            (u16::from_ne_bytes([b[6], b[7]]), peek_seq(&b).unwrap())
        };
        assert_eq!(flags(part(Command::Port, 300, &[])), (2, 300), "NLM_F_MULTI");
        assert_eq!(flags(single(Command::Event, 4, &[])), (0, 4));
        assert_eq!(flags(done(5)), (2, 5));
        assert_eq!(flags(ack(6)), (0x100, 6), "NLM_F_CAPPED");
        let refusal = refusal(7, &ControlError::not_found("no"));
        assert_eq!(flags(refusal), (0x300, 7), "and NLM_F_ACK_TLVS");
        assert_eq!(peek_seq(&[0; 11]), None);
    }

    /// A header of that kind that says this length, and so many bytes behind it.
    fn headed(kind: u16, len: u32, behind: &[u8]) -> Vec<u8> {
        let mut b = len.to_ne_bytes().to_vec();
        b.extend(kind.to_ne_bytes());
        b.extend([0; 10]);
        b.extend(behind);
        b
    }

    #[test]
    fn lengths_that_contradict_the_datagram_are_refused() {
        assert_eq!(parse(&[]), Ok(Vec::new()));
        for (len, behind) in [(16, 4), (12, 0), (12, 4), (18, 4), (24, 4), (0, 0)] {
            let b = headed(3, len, &vec![0; behind]);
            assert_eq!(parse(&b), Err(WireError::Length), "{len}, {behind} behind the header");
        }
        assert_eq!(parse(&[16, 0, 0]), Err(WireError::Length));
        assert_eq!(
            parse(&headed(3, 20, &[0; 4])),
            Err(WireError::Length),
            "an end has nothing to say"
        );
        assert_eq!(parse(&headed(0x11, 16, &[])), Err(WireError::Type(0x11)));
    }

    /// `NLMSG_ERROR`: an errno, and the header of the request, which says its own length.
    #[test]
    fn a_refusal_repeats_a_whole_header_and_no_more_than_there_is() {
        let error = |repeated: u32, there: usize| {
            let mut behind = (-2i32).to_ne_bytes().to_vec();
            behind.extend(repeated.to_ne_bytes());
            behind.resize(4 + there, 0);
            let len = u32::try_from(HEADER + behind.len()).unwrap();
            parse(&headed(2, len, &behind)).map(|mut all| all.remove(0).message)
        };
        for (repeated, there) in [(12, 16), (18, 20), (20, 16), (24, 20), (0, 16)] {
            assert_eq!(error(repeated, there), Err(WireError::Length), "{repeated} of {there}");
        }
        for (repeated, there) in [(16, 16), (20, 20)] {
            let Ok(Message::Refused(e)) = error(repeated, there) else { panic!("{repeated}") };
            assert_eq!((e.kind, e.message.as_str()), (ErrorKind::NotFound, Errno::ENOENT.desc()));
        }
        assert_eq!(parse(&headed(2, 20, &[0; 4])), Err(WireError::Length), "without the header");
    }

    #[test]
    fn what_is_wrong_is_told_with_the_object_and_the_field() {
        let why = WireError::Missing.inside("Port", "name");
        assert_eq!(why.to_string(), "Port.name: an attribute is missing");
    }
}
