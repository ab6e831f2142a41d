//! Bytes of netlink messages (`include/uapi/linux/netlink.h`): a writer that appends to a buffer,
//! and readers that never panic on what they are given.
//!
//! Header and attribute fields are in host byte order; payloads are what their family says.

/// Size of `struct nlmsghdr`.
pub const NLMSG_HDRLEN: usize = 16;
/// Size of `struct nlattr`.
pub const NLA_HDRLEN: usize = 4;
/// `NLA_F_NESTED`.
pub const NLA_F_NESTED: u16 = 1 << 15;
/// `NLA_TYPE_MASK`: the type without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
pub const NLA_TYPE_MASK: u16 = 0x3fff;

/// Rounds up to the alignment of messages and attributes, 4.
#[must_use]
pub const fn align(len: usize) -> usize {
    (len + 3) & !3
}

/// One message being written at the end of a buffer, so that several stand behind each other for a
/// single send. The length field is filled in by [`finish`](Self::finish).
#[derive(Debug)]
pub struct Message<'a> {
    buf: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Message<'a> {
    /// Starts a message; port id 0 lets the kernel fill in ours.
    pub fn new(buf: &'a mut Vec<u8>, ty: u16, flags: u16, seq: u32) -> Self {
        let start = buf.len();
        buf.extend_from_slice(&[0; 4]);
        buf.extend_from_slice(&ty.to_ne_bytes());
        buf.extend_from_slice(&flags.to_ne_bytes());
        buf.extend_from_slice(&seq.to_ne_bytes());
        buf.extend_from_slice(&[0; 4]);
        Self { buf, start }
    }

    /// Appends the family's fixed header.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.buf.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Appends an attribute.
    ///
    /// # Panics
    /// When the payload is longer than an attribute can be (65531 bytes): a defect of the caller.
    pub fn attr(&mut self, ty: u16, payload: &[u8]) -> &mut Self {
        #[expect(clippy::expect_used, reason = "a defect of the caller, not input")]
        let len = u16::try_from(NLA_HDRLEN + payload.len()).expect("attribute payload too long");
        self.buf.extend_from_slice(&len.to_ne_bytes());
        self.buf.extend_from_slice(&ty.to_ne_bytes());
        self.buf.extend_from_slice(payload);
        self.pad();
        self
    }

    /// An 8-bit attribute.
    pub fn u8(&mut self, ty: u16, v: u8) -> &mut Self {
        self.attr(ty, &[v])
    }
    /// A 16-bit attribute in host order.
    pub fn u16(&mut self, ty: u16, v: u16) -> &mut Self {
        self.attr(ty, &v.to_ne_bytes())
    }
    /// A 16-bit attribute in network order.
    pub fn be16(&mut self, ty: u16, v: u16) -> &mut Self {
        self.attr(ty, &v.to_be_bytes())
    }
    /// A 32-bit attribute in host order.
    pub fn u32(&mut self, ty: u16, v: u32) -> &mut Self {
        self.attr(ty, &v.to_ne_bytes())
    }
    /// A 32-bit attribute in network order.
    pub fn be32(&mut self, ty: u16, v: u32) -> &mut Self {
        self.attr(ty, &v.to_be_bytes())
    }
    /// A 64-bit attribute in network order.
    pub fn be64(&mut self, ty: u16, v: u64) -> &mut Self {
        self.attr(ty, &v.to_be_bytes())
    }
    /// A string attribute with its terminating NUL.
    pub fn str(&mut self, ty: u16, s: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(s.len() + 1);
        bytes.extend_from_slice(s.as_bytes());
        bytes.push(0);
        self.attr(ty, &bytes)
    }

    /// An attribute whose payload is attributes, with `NLA_F_NESTED`.
    pub fn nested(&mut self, ty: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.container(ty | NLA_F_NESTED, fill)
    }

    /// The same without the flag, as the older families (TC) write it.
    pub fn nested_plain(&mut self, ty: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.container(ty, fill)
    }

    fn container(&mut self, ty: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let at = self.buf.len();
        self.buf.extend_from_slice(&[0; NLA_HDRLEN]);
        fill(self);
        #[expect(clippy::expect_used, reason = "a defect of the caller, not input")]
        let len = u16::try_from(self.buf.len() - at).expect("nested attribute too long");
        self.buf[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self.buf[at + 2..at + 4].copy_from_slice(&ty.to_ne_bytes());
        self
    }

    /// Where the next byte goes, counted from the start of the message: for templates, which are
    /// patched at known offsets.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.buf.len() - self.start
    }

    /// Writes the length and ends the message.
    ///
    /// # Panics
    /// When the message is longer than 4 GB.
    pub fn finish(self) {
        #[expect(clippy::expect_used, reason = "a defect of the caller, not input")]
        let len = u32::try_from(self.buf.len() - self.start).expect("message too long");
        self.buf[self.start..self.start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    fn pad(&mut self) {
        let to = self.start + align(self.buf.len() - self.start);
        self.buf.resize(to, 0);
    }
}

/// A message as received: header fields and what stands behind the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received<'a> {
    /// `nlmsg_type`.
    pub ty: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub seq: u32,
    /// `nlmsg_pid`.
    pub port: u32,
    /// The family's fixed header and attributes.
    pub payload: &'a [u8],
}

impl<'a> Received<'a> {
    /// The payload behind a fixed header of `len` bytes, as attributes. Empty when the message is
    /// shorter than that.
    #[must_use]
    pub fn attrs(&self, len: usize) -> AttrIter<'a> {
        AttrIter::new(self.payload.get(align(len)..).unwrap_or(&[]))
    }

    /// The fixed header, when the message has that many bytes.
    #[must_use]
    pub fn fixed<const N: usize>(&self) -> Option<&'a [u8; N]> {
        self.payload.first_chunk()
    }
}

/// The messages of one datagram. Stops at the first that is cut short.
#[derive(Clone, Debug)]
pub struct MessageIter<'a>(&'a [u8]);

impl<'a> MessageIter<'a> {
    /// Over a received datagram.
    #[must_use]
    pub const fn new(datagram: &'a [u8]) -> Self {
        Self(datagram)
    }
}

fn ne16(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*b.get(at..)?.first_chunk()?))
}

fn ne32(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*b.get(at..)?.first_chunk()?))
}

impl<'a> Iterator for MessageIter<'a> {
    type Item = Received<'a>;

    fn next(&mut self) -> Option<Received<'a>> {
        let b = self.0;
        let len = usize::try_from(ne32(b, 0)?).ok()?;
        let payload = b.get(NLMSG_HDRLEN..len)?;
        let m = Received {
            ty: ne16(b, 4)?,
            flags: ne16(b, 6)?,
            seq: ne32(b, 8)?,
            port: ne32(b, 12)?,
            payload,
        };
        self.0 = b.get(align(len)..).unwrap_or(&[]);
        Some(m)
    }
}

/// One attribute as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr<'a> {
    /// The type, without flags.
    pub ty: u16,
    /// The payload, without padding.
    pub payload: &'a [u8],
}

/// Attributes inside an attribute.
pub type Nested<'a> = AttrIter<'a>;

impl<'a> Attr<'a> {
    /// The payload as an 8-bit number.
    #[must_use]
    pub fn u8(&self) -> Option<u8> {
        self.payload.first().copied()
    }
    /// The payload as a 16-bit number in host order.
    #[must_use]
    pub fn u16(&self) -> Option<u16> {
        self.payload.first_chunk().map(|b| u16::from_ne_bytes(*b))
    }
    /// The payload as a 16-bit number in network order.
    #[must_use]
    pub fn be16(&self) -> Option<u16> {
        self.payload.first_chunk().map(|b| u16::from_be_bytes(*b))
    }
    /// The payload as a 32-bit number in host order.
    #[must_use]
    pub fn u32(&self) -> Option<u32> {
        self.payload.first_chunk().map(|b| u32::from_ne_bytes(*b))
    }
    /// The payload as a 32-bit number in network order.
    #[must_use]
    pub fn be32(&self) -> Option<u32> {
        self.payload.first_chunk().map(|b| u32::from_be_bytes(*b))
    }
    /// The payload as a 64-bit number in host order.
    #[must_use]
    pub fn u64(&self) -> Option<u64> {
        self.payload.first_chunk().map(|b| u64::from_ne_bytes(*b))
    }
    /// The payload as a 64-bit number in network order.
    #[must_use]
    pub fn be64(&self) -> Option<u64> {
        self.payload.first_chunk().map(|b| u64::from_be_bytes(*b))
    }
    /// The payload as text, up to a NUL; `None` when it is not UTF-8.
    #[must_use]
    pub fn str(&self) -> Option<&'a str> {
        let end = self.payload.iter().position(|&b| b == 0).unwrap_or(self.payload.len());
        std::str::from_utf8(&self.payload[..end]).ok()
    }
    /// The attributes inside.
    #[must_use]
    pub const fn nested(&self) -> Nested<'a> {
        AttrIter::new(self.payload)
    }
}

/// The attributes of a message or of a nested attribute. Stops at the first that is cut short.
#[derive(Clone, Debug)]
pub struct AttrIter<'a>(&'a [u8]);

impl<'a> AttrIter<'a> {
    /// Over bytes that are attributes.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The first attribute of this type.
    #[must_use]
    pub fn find_type(&self, ty: u16) -> Option<Attr<'a>> {
        self.clone().find(|a| a.ty == ty)
    }
}

impl<'a> Iterator for AttrIter<'a> {
    type Item = Attr<'a>;

    fn next(&mut self) -> Option<Attr<'a>> {
        let b = self.0;
        let len = usize::from(ne16(b, 0)?);
        let payload = b.get(NLA_HDRLEN..len)?;
        let attr = Attr { ty: ne16(b, 2)? & NLA_TYPE_MASK, payload };
        self.0 = b.get(align(len)..).unwrap_or(&[]);
        Some(attr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_are_those_of_the_kernel_headers() {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, 0x10, 0x305, 7);
        m.raw(&[1, 2, 3, 4]).u8(1, 9).nested(2, |m| {
            m.be16(3, 0x1234);
        });
        m.finish();
        let mut want = Vec::new();
        want.extend_from_slice(&40u32.to_ne_bytes());
        want.extend_from_slice(&0x10u16.to_ne_bytes());
        want.extend_from_slice(&0x305u16.to_ne_bytes());
        want.extend_from_slice(&7u32.to_ne_bytes());
        want.extend_from_slice(&[0; 4]);
        want.extend_from_slice(&[1, 2, 3, 4]);
        want.extend_from_slice(&5u16.to_ne_bytes());
        want.extend_from_slice(&1u16.to_ne_bytes());
        want.extend_from_slice(&[9, 0, 0, 0]);
        want.extend_from_slice(&12u16.to_ne_bytes());
        want.extend_from_slice(&0x8002u16.to_ne_bytes());
        want.extend_from_slice(&6u16.to_ne_bytes());
        want.extend_from_slice(&3u16.to_ne_bytes());
        want.extend_from_slice(&[0x12, 0x34, 0, 0]);
        assert_eq!(buf, want);
    }

    #[test]
    fn two_messages_in_one_buffer_read_back() {
        let mut buf = Vec::new();
        for seq in [1, 2] {
            let mut m = Message::new(&mut buf, 20, 1, seq);
            m.raw(&[0; 20]).str(1, "flower");
            m.finish();
        }
        let seen: Vec<_> = MessageIter::new(&buf)
            .map(|m| (m.seq, m.attrs(20).find_type(1).unwrap().str().unwrap().to_owned()))
            .collect();
        assert_eq!(seen, [(1, "flower".to_owned()), (2, "flower".to_owned())]);
    }

    #[test]
    fn what_is_written_reads_back_with_its_type_and_order_of_bytes() {
        let mut buf = vec![0xee; 4];
        let mut m = Message::new(&mut buf, 0x1234, 0x305, 0x0506_0708);
        assert_eq!(m.offset(), 16);
        m.raw(&[1, 2, 3, 4, 5]).u8(1, 9).u16(2, 0x0102).be16(3, 0x0102).u32(4, 0x0102_0304);
        m.be32(5, 0x0102_0304).be64(6, 0x0102_0304_0506_0708).str(7, "eth0");
        m.attr(8, &0x0102_0304_0506_0708u64.to_ne_bytes());
        m.nested_plain(9, |m| {
            m.nested(10, |m| {
                m.u8(11, 1);
            });
            m.attr(12, &[]);
        });
        assert_eq!(m.offset(), 24 + 4 * 8 + 2 * 12 + 12 + 8 + 20);
        m.finish();
        assert_eq!(buf[..4], [0xee; 4], "what stood there before");
        let m = MessageIter::new(&buf[4..]).next().unwrap();
        assert_eq!((m.ty, m.flags, m.seq, m.port), (0x1234, 0x305, 0x0506_0708, 0));
        assert_eq!(m.fixed::<5>(), Some(&[1, 2, 3, 4, 5]));
        assert_eq!(m.fixed::<1000>(), None);
        let attr = |ty| m.attrs(5).find_type(ty).unwrap();
        assert_eq!(
            (attr(1).u8(), attr(1).u16(), attr(1).u32(), attr(1).u64()),
            (Some(9), None, None, None)
        );
        assert_eq!((attr(2).u16(), attr(3).be16()), (Some(0x0102), Some(0x0102)));
        assert_eq!((attr(4).u32(), attr(5).be32()), (Some(0x0102_0304), Some(0x0102_0304)));
        assert_eq!(attr(6).payload, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(
            (attr(6).be64(), attr(8).u64()),
            (Some(0x0102_0304_0506_0708), Some(0x0102_0304_0506_0708))
        );
        assert_eq!((attr(7).str(), attr(7).payload), (Some("eth0"), &b"eth0\0"[..]));
        let inside: Vec<_> = attr(9).nested().map(|a| (a.ty, a.payload.len())).collect();
        assert_eq!(inside, [(10, 8), (12, 0)], "types without the flag of the nested ones");
        assert_eq!(
            attr(9).nested().find_type(10).unwrap().nested().find_type(11).unwrap().u8(),
            Some(1)
        );
        assert!(m.attrs(5).find_type(13).is_none());
        assert_eq!(m.attrs(1000).count(), 0);
    }

    #[test]
    fn readers_stop_at_what_is_cut_short() {
        let mut buf = Vec::new();
        for seq in [1, 2] {
            let mut m = Message::new(&mut buf, 20, 1, seq);
            m.u8(1, 7).u8(2, 8);
            m.finish();
        }
        let seqs = |b: &[u8]| MessageIter::new(b).map(|m| m.seq).collect::<Vec<_>>();
        assert_eq!(seqs(&buf), [1, 2]);
        assert_eq!(seqs(&buf[..63]), [1]);
        assert_eq!(seqs(&buf[..31]), []);
        let types = |b: &[u8]| AttrIter::new(b).map(|a| a.ty).collect::<Vec<_>>();
        assert_eq!(types(&buf[16..32]), [1, 2]);
        assert_eq!(types(&buf[16..29]), [1, 2], "without its padding");
        assert_eq!(types(&buf[16..28]), [1]);
        assert_eq!(Attr { ty: 1, payload: b"\xff" }.str(), None);
    }

    #[test]
    fn lengths_are_rounded_up_to_four() {
        assert_eq!([0, 1, 3, 4, 5, 8].map(align), [0, 4, 4, 4, 8, 8]);
    }

    proptest! {
        #[test]
        fn no_datagram_makes_the_readers_panic_or_loop(b in proptest::collection::vec(any::<u8>(), 0..256)) {
            for m in MessageIter::new(&b) {
                for a in m.attrs(4) {
                    let _ = (a.u8(), a.be32(), a.be64(), a.str(), a.nested().count());
                }
            }
        }
    }
}
