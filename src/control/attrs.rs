//! Objects to and from netlink attributes.
//!
//! Messages are read by neli, and written here: it takes 20 us for a connection, most of it for boxes and for asking
//! bytes how long they are, and a table has a hundred thousand.
//!
//! An object is a plain struct; [`attributes!`] gives each field its attribute number, once.
//! Numbers are never reused for something else. Decoding ignores numbers it does not know (a newer
//! daemon may say more) and refuses an object that lacks a field that is not optional.

use std::io::Cursor;
use std::net::IpAddr;

use ipnet::IpNet;
use neli::consts::genl::NlAttrType;
use neli::genl::{AttrTypeBuilder, Nlattr, NlattrBuilder};
use neli::types::{Buffer, GenlBuffer};
use neli::{FromBytes, FromBytesWithInput, ToBytes};
use netdev_providers::{Direction, L4Proto, Tuple};

use super::error::WireError;

/// The attributes of a message or of a nested object.
pub(super) type Attrs = GenlBuffer<u16, Buffer>;

/// `nla_len` is 16 bits wide and counts its own header of four bytes.
const MAX_PAYLOAD: usize = u16::MAX as usize - 4;

/// Longer texts are cut: none of ours is, but the kernel's and a provider's words are not ours.
const MAX_TEXT: usize = 1024;

/// One attribute. Shared with the error messages, whose numbers are an enum of neli's.
pub(super) fn attribute<T: NlAttrType>(
    number: T,
    nested: bool,
    payload: Vec<u8>,
) -> Result<Nlattr<T, Buffer>, WireError> {
    if payload.len() > MAX_PAYLOAD {
        return Err(WireError::TooLarge(payload.len()));
    }
    let kind = AttrTypeBuilder::default()
        .nla_type(number)
        .nla_nested(nested)
        .build()
        .map_err(|e| WireError::Encode(e.to_string()))?;
    NlattrBuilder::default()
        .nla_type(kind)
        .nla_payload(Buffer::from(payload))
        .build()
        .map_err(|e| WireError::Encode(e.to_string()))
}

/// The longest beginning of `text` that fits an attribute.
pub(super) fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

pub(super) fn text_payload(text: &str) -> Result<Vec<u8>, WireError> {
    encoded(&cut(text))
}

pub(super) fn parse_text(bytes: &[u8]) -> Result<String, WireError> {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| WireError::Value("a text"))
}

fn encoded<T: ToBytes>(value: &T) -> Result<Vec<u8>, WireError> {
    let mut out = Cursor::new(Vec::new());
    value.to_bytes(&mut out).map_err(|e| WireError::Encode(e.to_string()))?;
    Ok(out.into_inner())
}

/// A value that is the payload of one attribute.
pub(super) trait Element: Sized {
    /// Whether the payload is attributes again (`NLA_F_NESTED`).
    const NESTED: bool = false;
    /// Appends the payload.
    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError>;
    fn from_payload(bytes: &[u8]) -> Result<Self, WireError>;

    #[cfg(test)]
    fn to_payload(&self) -> Result<Vec<u8>, WireError> {
        let mut out = Vec::new();
        self.append(&mut out)?;
        Ok(out)
    }
}

/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

/// Appends an attribute: `struct nlattr`, the payload, zeros up to a multiple of four bytes.
fn append<T: Element>(number: u16, value: &T, out: &mut Vec<u8>) -> Result<(), WireError> {
    let begin = out.len();
    out.extend([0; 4]);
    value.append(out)?;
    let len = out.len() - begin;
    let told = u16::try_from(len).map_err(|_| WireError::TooLarge(len - 4))?;
    let kind = if T::NESTED { number | NESTED } else { number };
    out[begin..begin + 2].copy_from_slice(&told.to_ne_bytes());
    out[begin + 2..begin + 4].copy_from_slice(&kind.to_ne_bytes());
    out.resize(begin + len.next_multiple_of(4), 0);
    Ok(())
}

/// A field of an object: an element, an `Option` of one, or a `Vec` of them (the attribute
/// repeats).
pub(super) trait Field: Sized {
    /// Appends its attributes.
    fn put(&self, number: u16, out: &mut Vec<u8>) -> Result<(), WireError>;
    fn take(attrs: &Attrs, number: u16) -> Result<Self, WireError>;
}

/// A struct with numbered fields.
pub(super) trait Object: Sized {
    /// Its name, and the numbers that it has.
    const NAME: &'static str;
    const NUMBERS: &'static [u16];
    /// Its attributes.
    fn encode(&self) -> Result<Vec<u8>, WireError>;
    fn decode(attrs: &Attrs) -> Result<Self, WireError>;
}

/// An object of a request: with nothing in it that we do not know.
pub(super) fn strict<T: Object>(attrs: &Attrs) -> Result<T, WireError> {
    let numbers = attrs.iter().map(|a| *a.nla_type().nla_type());
    match numbers.into_iter().find(|number| !T::NUMBERS.contains(number)) {
        Some(number) => Err(WireError::Unknown { object: T::NAME, number }),
        None => T::decode(attrs),
    }
}

fn payloads(attrs: &Attrs, number: u16) -> impl Iterator<Item = &[u8]> {
    attrs
        .iter()
        .filter(move |a| *a.nla_type().nla_type() == number)
        .map(|a| a.nla_payload().as_ref())
}

impl<T: Element> Field for T {
    fn put(&self, number: u16, out: &mut Vec<u8>) -> Result<(), WireError> {
        append(number, self, out)
    }

    fn take(attrs: &Attrs, number: u16) -> Result<Self, WireError> {
        T::from_payload(payloads(attrs, number).next().ok_or(WireError::Missing)?)
    }
}

impl<T: Element> Field for Option<T> {
    fn put(&self, number: u16, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.as_ref().map_or(Ok(()), |v| v.put(number, out))
    }

    fn take(attrs: &Attrs, number: u16) -> Result<Self, WireError> {
        payloads(attrs, number).next().map(T::from_payload).transpose()
    }
}

impl<T: Element> Field for Vec<T> {
    fn put(&self, number: u16, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.iter().try_for_each(|v| v.put(number, out))
    }

    fn take(attrs: &Attrs, number: u16) -> Result<Self, WireError> {
        payloads(attrs, number).map(T::from_payload).collect()
    }
}

macro_rules! integers {
    ($($int:ty),+) => {$(
        impl Element for $int {
            fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
                out.extend(self.to_ne_bytes());
                Ok(())
            }

            fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
                if bytes.len() != size_of::<Self>() {
                    return Err(WireError::Value(concat!("a ", stringify!($int))));
                }
                <$int>::from_bytes(&mut Cursor::new(bytes))
                    .map_err(|e| WireError::Decode(e.to_string()))
            }
        }
    )+};
}
integers!(u8, u16, u32, u64);

impl Element for bool {
    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        u8::from(*self).append(out)
    }

    fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
        Ok(u8::from_payload(bytes)? != 0)
    }
}

impl Element for String {
    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        // As the kernel's: with a zero behind it.
        out.extend(cut(self).as_bytes());
        out.push(0);
        Ok(())
    }

    fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
        parse_text(bytes)
    }
}

impl Element for Direction {
    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        (*self as u8).append(out)
    }

    fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
        match u8::from_payload(bytes)? {
            0 => Ok(Self::Original),
            1 => Ok(Self::Reply),
            _ => Err(WireError::Value("a direction")),
        }
    }
}

impl Element for IpAddr {
    /// Four or sixteen bytes, in network order.
    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        match self {
            Self::V4(a) => out.extend(a.octets()),
            Self::V6(a) => out.extend(a.octets()),
        }
        Ok(())
    }

    fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
        if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
            return Ok(v4.into());
        }
        <[u8; 16]>::try_from(bytes).map(Into::into).map_err(|_| WireError::Value("an address"))
    }
}

/// As in `/etc/protocols`.
impl Element for L4Proto {
    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.number().append(out)
    }

    fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
        Self::from_number(u8::from_payload(bytes)?).ok_or(WireError::Value("a protocol"))
    }
}

/// 1 address, 2 length of the prefix.
impl Element for IpNet {
    const NESTED: bool = true;

    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.addr().put(1, out)?;
        self.prefix_len().put(2, out)
    }

    fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
        let attrs = from_bytes(bytes)?;
        Self::new(IpAddr::take(&attrs, 1)?, u8::take(&attrs, 2)?)
            .map_err(|_| WireError::Value("an address and the length of its prefix"))
    }
}

/// 1 protocol number, 2 source, 3 source port, 4 destination, 5 destination port.
impl Element for Tuple {
    const NESTED: bool = true;

    fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.proto().put(1, out)?;
        self.src().put(2, out)?;
        self.sport().put(3, out)?;
        self.dst().put(4, out)?;
        self.dport().put(5, out)
    }

    fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
        let attrs = from_bytes(bytes)?;
        Self::new(
            L4Proto::take(&attrs, 1)?,
            IpAddr::take(&attrs, 2)?,
            u16::take(&attrs, 3)?,
            IpAddr::take(&attrs, 4)?,
            u16::take(&attrs, 5)?,
        )
        .ok_or(WireError::Value("a tuple of one address family"))
    }
}

pub(super) fn from_bytes(bytes: &[u8]) -> Result<Attrs, WireError> {
    Attrs::from_bytes_with_input(&mut Cursor::new(bytes), bytes.len())
        .map_err(|e| WireError::Decode(e.to_string()))
}

/// Numbers the fields of structs: `attributes! { Name { field = 1, other = 2 } … }`. A field that is
/// left out does not compile.
macro_rules! attributes {
    ($($name:ident { $($field:ident = $number:literal),* $(,)? })+) => {$(
        impl $crate::control::attrs::Object for $name {
            const NAME: &'static str = stringify!($name);
            const NUMBERS: &'static [u16] = &[$($number),*];

            fn encode(&self) -> Result<Vec<u8>, $crate::control::error::WireError> {
                let mut out = Vec::new();
                $crate::control::attrs::Element::append(self, &mut out)?;
                Ok(out)
            }

            #[allow(unused_variables)]
            fn decode(attrs: &$crate::control::attrs::Attrs) -> Result<Self, $crate::control::error::WireError> {
                Ok(Self {
                    $($field: $crate::control::attrs::Field::take(attrs, $number)
                        .map_err(|e| e.inside(stringify!($name), stringify!($field)))?,)*
                })
            }
        }

        impl $crate::control::attrs::Element for $name {
            const NESTED: bool = true;

            fn append(&self, out: &mut Vec<u8>) -> Result<(), $crate::control::error::WireError> {
                $($crate::control::attrs::Field::put(&self.$field, $number, out)
                    .map_err(|e| e.inside(stringify!($name), stringify!($field)))?;)*
                Ok(())
            }

            fn from_payload(bytes: &[u8]) -> Result<Self, $crate::control::error::WireError> {
                $crate::control::attrs::Object::decode(&$crate::control::attrs::from_bytes(bytes)?)
            }
        }
    )+};
}
pub(super) use attributes;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attribute_holds_what_its_length_can_tell() {
        // 16 bits, of which the header takes four bytes.
        assert!(attribute(1u16, false, vec![0; 65_531]).is_ok());
        assert_eq!(
            attribute(1u16, false, vec![0; 65_532]).unwrap_err(),
            WireError::TooLarge(65_532)
        );
        struct Long(usize);
        impl Element for Long {
            fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
                out.resize(out.len() + self.0, 0);
                Ok(())
            }
            fn from_payload(_: &[u8]) -> Result<Self, WireError> {
                Err(WireError::Missing)
            }
        }
        assert!(Long(65_531).put(1, &mut Vec::new()).is_ok());
        assert_eq!(Long(65_532).put(1, &mut Vec::new()), Err(WireError::TooLarge(65_532)));
    }

    #[test]
    fn attributes_are_laid_out_as_nelis() {
        let tuple: Tuple = "udp [2001:db8::1]:53 > [2001:db8::2]:5353".parse().unwrap();
        let mut out = vec![9; 8];
        for len in 0..6 {
            "x".repeat(len).put(1, &mut out).unwrap();
        }
        Some(7u16).put(2, &mut out).unwrap();
        tuple.put(3, &mut out).unwrap();
        assert_eq!(encoded(&from_bytes(&out[8..]).unwrap()).unwrap(), out[8..]);
        let nested = out.len() - tuple.to_payload().unwrap().len() - 4;
        assert_eq!(out[nested + 2..nested + 4], (3u16 | 1 << 15).to_ne_bytes(), "NLA_F_NESTED");
        assert_eq!(out[8..16], [5, 0, 1, 0, 0, 0, 0, 0], "the end of a text counts");
    }

    #[test]
    fn a_long_text_is_cut_in_front_of_the_character_that_does_not_fit() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"é".repeat(5000)).len(), 1024);
        assert_eq!(cut(&format!("a{}", "é".repeat(5000))).len(), 1023);
        assert_eq!(cut(&format!("ab{}", "𝛼".repeat(5000))).len(), 1022);
    }

    #[test]
    fn a_text_ends_with_a_zero_that_is_not_part_of_it() {
        assert_eq!(text_payload("no").unwrap(), [b'n', b'o', 0]);
        assert_eq!("no".to_owned().to_payload().unwrap(), [b'n', b'o', 0]);
        assert_eq!(parse_text(b"no\0"), Ok("no".to_owned()));
        assert_eq!(parse_text(b"no"), Ok("no".to_owned()), "nor need it be there");
        assert!(parse_text(&[0xff, 0]).is_err());
    }

    #[test]
    fn small_values_have_one_byte_each() {
        assert_eq!([true, false].map(|b| b.to_payload().unwrap()), [[1], [0]]);
        assert_eq!(
            [&[0], &[1], &[2]].map(|b| bool::from_payload(b)),
            [Ok(false), Ok(true), Ok(true)]
        );
        for (n, d) in [0u8, 1].into_iter().zip(Direction::BOTH) {
            assert_eq!(d.to_payload().unwrap(), [n]);
            assert_eq!(Direction::from_payload(&[n]), Ok(d));
        }
        assert!(Direction::from_payload(&[2]).is_err() && Direction::from_payload(&[]).is_err());
    }

    #[test]
    fn a_field_is_found_by_its_number_alone() {
        let mut attrs = Vec::new();
        7u32.put(3, &mut attrs).unwrap();
        vec![1u8, 2].put(4, &mut attrs).unwrap();
        None::<u16>.put(5, &mut attrs).unwrap();
        Some(9u16).put(6, &mut attrs).unwrap();
        let attrs = from_bytes(&attrs).unwrap();
        assert_eq!(u32::take(&attrs, 3), Ok(7));
        assert_eq!(u32::take(&attrs, 2), Err(WireError::Missing));
        assert_eq!(Vec::<u8>::take(&attrs, 4), Ok(vec![1, 2]));
        assert_eq!(Vec::<u8>::take(&attrs, 9), Ok(Vec::new()));
        let option = |number| <Option<u16> as Field>::take(&attrs, number);
        assert_eq!((option(5), option(6)), (Ok(None), Ok(Some(9))));
    }
}
