//! A connection's addresses and ports, as people have them: as this program prints them, as a line of `conntrack -L`, as
//! a line of tcpdump.

use std::net::{IpAddr, SocketAddr};

use netdev_providers::{L4Proto, Tuple};

/// Why some words are no tuple: which of them, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoTuple {
    #[error("a tuple is PROTO SRC:SPORT DST:DPORT: there is no {0} in '{1}'")]
    Missing(&'static str, String),
    #[error("'{0}' is no protocol that is offloaded: tcp and udp are")]
    Protocol(String),
    #[error("'{0}' has no port: write ADDRESS:PORT")]
    NoPort(String),
    #[error("'{0}': a port is a number from 0 to 65535")]
    Port(String),
    #[error("'{0}': an IPv6 address with a port stands in brackets, [ADDRESS]:PORT")]
    Brackets(String),
    #[error("'{0}' is no address (names are not looked up)")]
    Address(String),
    #[error("'{0}' and '{1}' are of different families")]
    Families(IpAddr, IpAddr),
    #[error("'{0}' is one word too many")]
    TooMany(String),
}

pub(super) fn parse(words: &[String]) -> Result<Tuple, NoTuple> {
    let text = words.join(" ");
    if text.contains("src=") {
        return of_conntrack(&text);
    }
    if text.starts_with("IP ")
        || text.contains(" IP ")
        || text.starts_with("IP6 ")
        || text.contains(" IP6 ")
    {
        return of_tcpdump(&text);
    }
    let mut words = text
        .split(|c: char| c.is_whitespace() || c == ',' || c == '>')
        .filter(|w| !w.is_empty() && *w != "-");
    let missing = |what| NoTuple::Missing(what, text.clone());
    let proto = protocol(words.next().ok_or_else(|| missing("protocol"))?)?;
    let src = end(words.next().ok_or_else(|| missing("source"))?)?;
    let dst = end(words.next().ok_or_else(|| missing("destination"))?)?;
    if let Some(more) = words.next() {
        return Err(NoTuple::TooMany(more.to_owned()));
    }
    tuple(proto, src, dst)
}

fn tuple(proto: L4Proto, src: SocketAddr, dst: SocketAddr) -> Result<Tuple, NoTuple> {
    Tuple::new(proto, src.ip(), src.port(), dst.ip(), dst.port())
        .ok_or(NoTuple::Families(src.ip(), dst.ip()))
}

fn protocol(word: &str) -> Result<L4Proto, NoTuple> {
    match word.to_ascii_lowercase().as_str() {
        "tcp" | "6" => Ok(L4Proto::Tcp),
        "udp" | "17" => Ok(L4Proto::Udp),
        _ => Err(NoTuple::Protocol(word.to_owned())),
    }
}

fn end(word: &str) -> Result<SocketAddr, NoTuple> {
    if let Ok(end) = word.parse() {
        return Ok(end);
    }
    let whole = word.to_owned();
    Err(match word.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => NoTuple::NoPort(whole),
        Ok(IpAddr::V6(_)) => NoTuple::Brackets(whole),
        Err(_) => match word.rsplit_once(':') {
            None => NoTuple::NoPort(whole),
            Some((address, port)) => match address.trim_matches(['[', ']']).parse::<IpAddr>() {
                Err(_) => NoTuple::Address(whole),
                Ok(_) if port.parse::<u16>().is_err() => NoTuple::Port(whole),
                Ok(_) => NoTuple::Brackets(whole),
            },
        },
    })
}

/// `tcp 6 431999 ESTABLISHED src=… dst=… sport=… dport=… src=… …`: the first of each is the original's.
fn of_conntrack(text: &str) -> Result<Tuple, NoTuple> {
    let missing = |what| NoTuple::Missing(what, text.to_owned());
    let value = |key: &str| {
        let of = |word: &str| word.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
        text.split_whitespace().find_map(of)
    };
    let names = text.split_whitespace().take_while(|w| !w.contains('='));
    // With `-o extended` and in /proc the family comes first. Numbers may be timeouts.
    let proto = names
        .filter(|w| !["ipv4", "ipv6"].contains(w))
        .find(|w| w.chars().all(|c| c.is_ascii_lowercase()))
        .ok_or_else(|| missing("protocol"))?;
    let proto = protocol(proto)?;
    let address = |key, what| -> Result<IpAddr, NoTuple> {
        let text = value(key).ok_or_else(|| missing(what))?;
        text.parse().map_err(|_| NoTuple::Address(text))
    };
    let port = |key, what| -> Result<u16, NoTuple> {
        let text = value(key).ok_or_else(|| missing(what))?;
        text.parse().map_err(|_| NoTuple::Port(text))
    };
    let src = SocketAddr::new(address("src", "source")?, port("sport", "source port")?);
    let dst = SocketAddr::new(address("dst", "destination")?, port("dport", "destination port")?);
    tuple(proto, src, dst)
}

/// `12:00:00.000000 IP 10.0.0.1.1234 > 10.9.0.2.80: Flags [S], …`, or `… UDP, length 4`. Of other protocols' ports
/// tcpdump has names of its own for what they carry, so one that is not said to be TCP is UDP.
fn of_tcpdump(text: &str) -> Result<Tuple, NoTuple> {
    let missing = |what| NoTuple::Missing(what, text.to_owned());
    let mut words = text.split_whitespace().skip_while(|w| !["IP", "IP6"].contains(w)).skip(1);
    let src = words.next().ok_or_else(|| missing("source"))?;
    let dst = words.find(|w| *w != ">").ok_or_else(|| missing("destination"))?;
    let proto =
        if words.clone().any(|w| w == "Flags" || w == "tcp") { L4Proto::Tcp } else { L4Proto::Udp };
    tuple(proto, dotted(src)?, dotted(dst.trim_end_matches(':'))?)
}

/// `ADDRESS.PORT`.
fn dotted(word: &str) -> Result<SocketAddr, NoTuple> {
    let (address, port) = word.rsplit_once('.').ok_or_else(|| NoTuple::NoPort(word.to_owned()))?;
    let address: IpAddr = match address.parse() {
        Ok(address) => address,
        // `10.0.0.1` alone: its last byte is no port.
        Err(_) if word.parse::<IpAddr>().is_ok() => return Err(NoTuple::NoPort(word.to_owned())),
        Err(_) => return Err(NoTuple::Address(word.to_owned())),
    };
    // Names of services without `-n`.
    let port = port.parse().map_err(|_| NoTuple::Port(word.to_owned()))?;
    Ok(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Tuple, String> {
        let words: Vec<_> = text.split(' ').map(str::to_owned).collect();
        parse(&words).map_err(|e| e.to_string())
    }

    #[test]
    fn a_tuple_may_come_from_wherever_it_is_seen() {
        let tcp: Tuple = "tcp 10.0.0.1:1234 > 10.9.0.2:80".parse().unwrap();
        for text in [
            "tcp 10.0.0.1:1234 10.9.0.2:80",
            "tcp 10.0.0.1:1234 > 10.9.0.2:80",
            "tcp 10.0.0.1:1234 -> 10.9.0.2:80",
            "TCP,10.0.0.1:1234,10.9.0.2:80",
            "6 10.0.0.1:1234 10.9.0.2:80",
            "tcp      6 431999 ESTABLISHED src=10.0.0.1 dst=10.9.0.2 sport=1234 dport=80 src=10.9.0.2 dst=192.0.2.1 sport=80 dport=1234 [ASSURED] mark=0 use=1",
            "ipv4     2 tcp      6 src=10.0.0.1 dst=10.9.0.2 sport=1234 dport=80",
            "IP 10.0.0.1.1234 > 10.9.0.2.80: Flags [P.], seq 1:5, ack 1, win 502, length 4",
            "12:34:56.789 eth0 In IP 10.0.0.1.1234 > 10.9.0.2.80: Flags [.], ack 1",
        ] {
            assert_eq!(of(text), Ok(tcp), "{text}");
        }
        let udp: Tuple = "udp [2001:db8::1]:5000 > [2001:db8::2]:53".parse().unwrap();
        for text in [
            "udp [2001:db8::1]:5000 [2001:db8::2]:53",
            "udp      17 29 src=2001:db8::1 dst=2001:db8::2 sport=5000 dport=53 [UNREPLIED] src=2001:db8::2 dst=2001:db8::1 sport=53 dport=5000",
            "IP6 2001:db8::1.5000 > 2001:db8::2.53: UDP, length 4",
        ] {
            assert_eq!(of(text), Ok(udp), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("tcp 10.0.0.1:1", "no destination"),
            ("", "no protocol"),
            ("tcp 10.0.0.1:1 10.0.0.2:2 x", "'x' is one word too many"),
            ("sctp 10.0.0.1:1 10.0.0.2:2", "'sctp' is no protocol"),
            ("icmp 10.0.0.1 10.0.0.2", "'icmp' is no protocol"),
            ("tcp 10.0.0.1 10.0.0.2:2", "'10.0.0.1' has no port"),
            ("tcp 10.0.0.1:99999 10.0.0.2:2", "'10.0.0.1:99999': a port is"),
            ("tcp 2001:db8::1 [2001:db8::2]:2", "stands in brackets"),
            ("tcp www.example.org:80 10.0.0.2:2", "names are not looked up"),
            ("tcp 10.0.0.1:1 [2001:db8::2]:2", "different families"),
            ("icmp 1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=3", "'icmp' is no protocol"),
            ("tcp 6 1 src=10.0.0.1 dst=10.0.0.2 sport=x dport=2", "'x': a port is"),
            ("IP 10.0.0.1.http > 10.0.0.2.2: Flags [S]", "a port is"),
            ("IP 10.0.0.1 > 10.0.0.2: ICMP echo request", "'10.0.0.1' has no port"),
        ] {
            let said = of(text).unwrap_err();
            assert!(said.contains(words), "{text}: {said}");
        }
    }

    proptest::proptest! {
        #[test]
        fn anything_that_is_typed_is_a_tuple_or_told(words in proptest::collection::vec("\\PC{0,24}", 0..6)) {
            let _ = parse(&words);
        }
    }
}
