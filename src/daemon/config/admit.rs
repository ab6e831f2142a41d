//! The admission policy in the configuration file: `[admission]` and the `[[admit]]` rules.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use netdev_providers::L4Proto;
use serde::Deserialize;
use toml::Spanned;

use super::Wrong;
use crate::datapath::admission::{Admission, Masked, Rule, Verdict};

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct RawAdmission {
    default: RawVerdict,
    pub(super) min_packets: Option<u64>,
    pub(super) min_bytes: u64,
    pub(super) bypass_egress: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawAdmit {
    verdict: RawVerdict,
    netdev: Option<Spanned<String>>,
    source: Option<List<String>>,
    destination: Option<List<String>>,
    protocol: Option<RawProtocol>,
    source_ports: Option<List<RawRange>>,
    destination_ports: Option<List<RawRange>>,
    zones: Option<List<RawRange>>,
    ct_mark: Option<Spanned<RawNumber>>,
    ct_label: Option<Spanned<RawNumber>>,
    mark: Option<Spanned<RawNumber>>,
    dscp: Option<List<RawRange>>,
}

/// Each element knows its line.
type List<T> = Spanned<Vec<Spanned<T>>>;

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawVerdict {
    #[default]
    Offload,
    Never,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawProtocol {
    Tcp,
    Udp,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, or a range such as \"8000-8999\"")]
enum RawRange {
    One(i64),
    Text(String),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, or one with a mask such as \"0x10/0xf0\"")]
enum RawNumber {
    One(u32),
    Text(String),
}

impl From<RawVerdict> for Verdict {
    fn from(v: RawVerdict) -> Self {
        match v {
            RawVerdict::Offload => Self::Offload,
            RawVerdict::Never => Self::Never,
        }
    }
}

/// `line` tells the line that a byte of the file is in.
pub(super) fn check(
    admission: &RawAdmission,
    rules: Vec<Spanned<RawAdmit>>,
    line: impl Fn(usize) -> usize,
) -> Result<Admission, Wrong> {
    let rules = rules
        .into_iter()
        .map(|rule| {
            let line = line(rule.span().start);
            check_rule(rule.into_inner(), line)
        })
        .collect::<Result<_, _>>()?;
    Ok(Admission { rules, default: admission.default.into() })
}

fn check_rule(raw: RawAdmit, line: usize) -> Result<Rule, Wrong> {
    let netdev = raw.netdev.map(|p| super::pattern(&p)).transpose()?;
    Ok(Rule {
        line,
        netdev,
        source: list("source", raw.source, |s| prefix(s))?,
        destination: list("destination", raw.destination, |s| prefix(s))?,
        protocol: raw.protocol.map(|p| match p {
            RawProtocol::Tcp => L4Proto::Tcp,
            RawProtocol::Udp => L4Proto::Udp,
        }),
        source_ports: list("source-ports", raw.source_ports, range)?,
        destination_ports: list("destination-ports", raw.destination_ports, range)?,
        zones: list("zones", raw.zones, range)?,
        ct_mark: raw.ct_mark.map(mark).transpose()?,
        ct_label: raw.ct_label.map(|n| masked(n, u128::MAX)).transpose()?,
        mark: raw.mark.map(mark).transpose()?,
        dscp: list("dscp", raw.dscp, dscp)?,
        verdict: raw.verdict.into(),
    })
}

fn mark(raw: Spanned<RawNumber>) -> Result<Masked<u32>, Wrong> {
    let Masked { value, mask } = masked(raw, u32::MAX.into())?;
    let [value, mask] = [value, mask].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    Ok(Masked { value, mask })
}

/// `VALUE` or `VALUE/MASK`, as nft and iptables write marks.
fn masked(raw: Spanned<RawNumber>, max: u128) -> Result<Masked<u128>, Wrong> {
    let span = raw.span();
    let wrong = |why: String| (span.clone(), why);
    let text = match raw.into_inner() {
        RawNumber::One(n) => n.to_string(),
        RawNumber::Text(text) => text,
    };
    let number = |s: &str| {
        let s = s.trim();
        let n = match s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
            Some(digits) => u128::from_str_radix(digits, 16),
            None => s.parse(),
        };
        n.ok().filter(|n| *n <= max)
    };
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value), number(mask)),
        None => (number(&text), Some(max)),
    };
    let (Some(value), Some(mask)) = (value, mask) else {
        return Err(wrong(format!(
            "'{text}' is neither a number up to {max:#x} nor one with a mask such as \"0x10/0xf0\""
        )));
    };
    if value & mask != value {
        return Err(wrong(format!(
            "'{text}' matches nothing: {value:#x} has bits that {mask:#x} has not"
        )));
    }
    Ok(Masked { value, mask })
}

/// A DSCP by number, a range of them, or by name.
fn dscp(raw: &RawRange) -> Result<RangeInclusive<u16>, String> {
    if let RawRange::Text(text) = raw
        && let Some(n) = dscp_by_name(&text.to_lowercase())
    {
        return Ok(n..=n);
    }
    match range(raw) {
        Ok(range) if *range.end() < 64 => Ok(range),
        _ => Err("expected a DSCP from 0 to 63, a range such as \"8-15\", or a name such as \"ef\" or \"af41\"".to_owned()),
    }
}

/// RFC 2474, 2597, 3246, 5865, 8622.
fn dscp_by_name(name: &str) -> Option<u16> {
    match name {
        "be" | "df" => return Some(0),
        "le" => return Some(1),
        "va" => return Some(44),
        "ef" => return Some(46),
        _ => {}
    }
    let digits = |prefix| {
        Some(name.strip_prefix(prefix)?.as_bytes().iter().map(|b| u16::from(b.wrapping_sub(b'0'))))
    };
    if let Some(class) = digits("cs") {
        return match class.collect::<Vec<_>>()[..] {
            [n @ 0..=7] => Some(n * 8),
            _ => None,
        };
    }
    match digits("af")?.collect::<Vec<_>>()[..] {
        [class @ 1..=4, drop @ 1..=3] => Some(class * 8 + drop * 2),
        _ => None,
    }
}

fn list<T, U>(
    name: &str,
    raw: Option<List<T>>,
    read: impl Fn(&T) -> Result<U, String>,
) -> Result<Vec<U>, Wrong> {
    let Some(raw) = raw else { return Ok(Vec::new()) };
    if raw.get_ref().is_empty() {
        return Err((raw.span(), format!("{name} is empty: leave it out to match all")));
    }
    raw.into_inner()
        .into_iter()
        .map(|element| read(element.get_ref()).map_err(|why| (element.span(), why)))
        .collect()
}

/// `10.0.0.0/8`, or an address alone.
fn prefix(text: &str) -> Result<IpNet, String> {
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => match text.parse::<IpAddr>() {
            Ok(address) => IpNet::from(address),
            Err(_) => {
                return Err(format!(
                    "'{text}' is no address prefix: expected e.g. \"192.0.2.0/24\" or \"2001:db8::/32\""
                ));
            }
        },
    };
    if net == net.trunc() {
        return Ok(net);
    }
    Err(format!("'{text}' has bits behind the prefix length: {} is meant?", net.trunc()))
}

fn range(raw: &RawRange) -> Result<RangeInclusive<u16>, String> {
    let text = match raw {
        RawRange::One(n) => &n.to_string(),
        RawRange::Text(text) => text,
    };
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    match (from.trim().parse::<u16>(), to.trim().parse::<u16>()) {
        (Ok(from), Ok(to)) if from <= to => Ok(from..=to),
        (Ok(_), Ok(_)) => Err(format!("'{text}' is empty: the smaller number stands first")),
        _ => Err(format!(
            "'{text}' is neither a number from 0 to 65535 nor a range such as \"8000-8999\""
        )),
    }
}

#[cfg(test)]
mod tests {
    use netdev_providers::{Reason, Zone};

    use super::super::Config;
    use crate::datapath::MIN_PACKETS;
    use crate::datapath::admission::{Decider, Said};
    use crate::engine::conn::ConnKey;

    const RULES: &str = r#"
[admission]
default = "never"
min-bytes = 100000

[[admit]]
verdict = "never"
destination = ["198.51.100.7", "2001:db8:7::/48"]
destination-ports = [443, "8000-8999"]

[[admit]]
netdev = "eth*"
source = ["10.0.0.0/8"]
protocol = "tcp"
zones = [0, "100-199"]
source-ports = ["1024-65535"]
verdict = "offload"
"#;

    fn parse(text: &str) -> Result<Config, (usize, String)> {
        Config::parse(text, &["tc-flower"])
    }

    fn key(tuple: &str) -> ConnKey {
        ConnKey { zone: Zone(150), original: tuple.parse().unwrap() }
    }

    #[test]
    fn rules_are_read_in_order_and_know_their_lines() {
        let c = parse(RULES).unwrap();
        assert_eq!((c.min_bytes, c.min_packets), (100_000, MIN_PACKETS));
        let admit = |netdev, tuple| c.admission.admit(netdev, &key(tuple), &Said::default());
        assert_eq!(admit("eth0", "tcp 10.0.0.2:4000 > 198.51.100.7:80"), Ok(()));
        let refused = admit("eth0", "tcp 10.0.0.2:4000 > 198.51.100.7:8080").unwrap_err();
        assert_eq!(refused.reason, Reason::NotAdmitted);
        assert_eq!(
            refused.detail.as_deref(),
            Some("[[admit]] rule 1, line 6 of the configuration says never")
        );
        let (_, by) = c.admission.verdict(
            "eth0",
            &key("tcp 10.0.0.2:4000 > 192.0.2.1:8080"),
            &Said::default(),
        );
        assert_eq!(by, Decider::Rule { number: 2, line: 11 });
        let refused = admit("wan", "tcp 10.0.0.2:4000 > 192.0.2.1:8080").unwrap_err();
        assert!(refused.detail.unwrap().contains("the default"));
    }

    #[test]
    fn what_the_firewall_has_said_is_read_with_its_masks() {
        let c = parse(
            r#"
[admission]
default = "never"
[[admit]]
verdict = "offload"
ct-mark = "0x10/0xF0"
ct-label = "0x8000000000000000000000000000000a/0x8000000000000000000000000000000f"
mark = 7
dscp = ["ef", "AF41", 8, "16-18", "cs5", "va"]
"#,
        )
        .unwrap();
        assert!(c.admission.looks_at_packets());
        let said = Said { ct_mark: 0x1f, labels: 1 << 127 | 0x10 | 0xa, mark: 7, dscp: 46 };
        let admitted =
            |said: Said| c.admission.admit("a", &key("udp [::1]:1 > [::2]:2"), &said).is_ok();
        assert!(admitted(said));
        for dscp in [34, 8, 16, 18, 40, 44] {
            assert!(admitted(Said { dscp, ..said }), "{dscp}");
        }
        for other in [
            Said { ct_mark: 0x2f, ..said },
            Said { labels: said.labels | 1, ..said },
            Said { labels: 0xa, ..said },
            Said { mark: 0x1_0007, ..said },
            Said { dscp: 45, ..said },
            Said { dscp: 0, ..said },
        ] {
            assert!(!admitted(other), "{other:?}");
        }
    }

    #[test]
    fn without_rules_everything_is_admitted_from_the_first_byte() {
        let c = parse("").unwrap();
        assert_eq!((c.min_bytes, c.min_packets), (0, MIN_PACKETS));
        assert_eq!(c.admission.admit("a", &key("udp [::1]:1 > [::2]:2"), &Said::default()), Ok(()));
    }

    #[test]
    fn what_is_wrong_in_a_rule_is_named_with_its_line() {
        for (field, line, words) in [
            ("", 2, "verdict"),
            ("verdict = \"drop\"", 3, "never"),
            ("verdict = \"never\"\nport = [1]", 4, "destination-ports"),
            ("verdict = \"never\"\nnetdev = \"eth[\"", 4, "eth["),
            ("verdict = \"never\"\nprotocol = \"sctp\"", 4, "udp"),
            ("verdict = \"never\"\nsource = []", 4, "leave it out"),
            ("verdict = \"never\"\nsource = [\n\"10.0.0.0/8\",\n\"10.0.0.1/8\"]", 6, "10.0.0.0/8"),
            ("verdict = \"never\"\nsource = [\"10.0.0.0/33\"]", 4, "no address prefix"),
            ("verdict = \"never\"\ndestination = [\"example.net\"]", 4, "no address prefix"),
            ("verdict = \"never\"\ndestination-ports = [1,\n65536]", 5, "65535"),
            ("verdict = \"never\"\ndestination-ports = [\"9-8\"]", 4, "9-8"),
            ("verdict = \"never\"\nzones = [\"a-b\"]", 4, "a-b"),
            ("verdict = \"never\"\nzones = [-1]", 4, "65535"),
            ("verdict = \"never\"\nct-mark = \"0x12/0x10\"", 4, "0x12 has bits that 0x10 has not"),
            ("verdict = \"never\"\nmark = \"0x100000000\"", 4, "up to 0xffffffff"),
            ("verdict = \"never\"\nct-label = \"x\"", 4, "with a mask such as"),
            ("verdict = \"never\"\nct-mark = -1", 4, "with a mask such as"),
            ("verdict = \"never\"\ndscp = [64]", 4, "from 0 to 63"),
            ("verdict = \"never\"\ndscp = [\"af44\"]", 4, "\"af41\""),
            ("verdict = \"never\"\nzones = [true]", 4, "8000-8999"),
        ] {
            let text = format!("\n[[admit]]\n{field}\n");
            let (at, message) = parse(&text).unwrap_err();
            assert!(message.contains(words), "{field}: {message}");
            assert_eq!(at, line, "{field}: {message}");
        }
        assert_eq!(parse("[admission]\nmin-bytes = -1\n").unwrap_err().0, 2);
        assert_eq!(parse("[admission]\nmin-packets = 0\n").unwrap().min_packets, 0);
        assert_eq!(parse("[admission]\nmin-packets = \"no\"\n").unwrap_err().0, 2);
        assert_eq!(parse("[admission]\n\ndefault = \"no\"\n").unwrap_err().0, 3);
    }
}
