//! Connections as they are on the Internet, drawn from published distributions.
//!
//! How many packets a flow has: the mixtures that were fitted to 2.2 thousand million TCP and 1.7 thousand million
//! UDP flows of a campus with 8,000 residents, `agh_2015/mixtures/{tcp,udp}/length/flows.json`, P. Jurkiewicz,
//! G. Rzym, P. Boryło, "Flow length and size distributions in campus Internet traffic", Computer Communications
//! 167, 2021. How large its packets are: from the shares of packets and octets by length that are published there.
//!
//! What those do not say is assumed, and printed with the figures ([`ASSUMED`]).

use rand::RngExt;
use rand::rngs::StdRng;
use rand_distr::weighted::WeightedIndex;
use rand_distr::{Distribution, LogNormal, Uniform};

/// What the distributions do not say.
pub(crate) const ASSUMED: &str = "Connections begin as a Poisson process, on netdevs at random. The larger \
    direction (0.85 of the time the reply) is as long as a flow of the model; the other has a packet for every two \
    (RFC 1122 4.2.3.2), of 64 bytes. TCP flows of one or two packets are attempts that nobody answers. Packets of a \
    direction are evenly spaced, 10 a second in the median (log-normal, sigma 1), more by the root of the length \
    above 100. TCP ends with its last packet; the rest by nf_conntrack's timeouts.";

/// Of all connections, those by TCP: flows by protocol in the model.
const TCP: f64 = 2_171_291_495.0 / (2_171_291_495.0 + 1_737_523_167.0);
/// Replies that are the larger direction.
const DOWNSTREAM: f64 = 0.85;
/// Between a packet and its answer.
const RTT_US: f64 = 20_000.0;

enum Part {
    /// From 0 to here.
    Uniform(f64),
    /// Sigma, and the median.
    LogNormal(f64, f64),
}
use Part::{LogNormal as Log, Uniform as Uni};

const TCP_LENGTH: &[(f64, Part)] = &[
    (0.058_043_754_929_076_714, Uni(1.0)),
    (0.310_524_991_982_801_8, Uni(2.0)),
    (0.055_097_316_587_327_91, Uni(3.0)),
    (0.047_754_043_431_934_55, Uni(4.0)),
    (0.005_882_528_205_165_834, Uni(5.0)),
    (0.125_291_128_846_966_28, Uni(6.0)),
    (0.206_543_283_412_878_23, Log(0.512_238_156_148_962_2, 7.954_331_995_007_458)),
    (0.121_895_836_956_486_4, Log(0.750_762_734_168_645_3, 21.741_573_277_740_04)),
    (0.052_507_436_335_709_035, Log(1.108_544_227_212_631_1, 115.968_893_833_866_37)),
    (0.016_459_679_311_651_095, Log(1.993_211_895_787_746_3, 845.912_178_801_779_5)),
];

const UDP_LENGTH: &[(f64, Part)] = &[
    (0.582_734_080_906_151_9, Uni(1.0)),
    (0.187_225_867_168_895_25, Uni(2.0)),
    (0.091_470_523_727_472_16, Uni(3.0)),
    (0.056_223_518_652_683_65, Uni(4.0)),
    (0.029_447_542_558_586_896, Log(0.489_467_551_428_777_85, 9.674_436_486_545_002)),
    (0.040_227_837_684_793_37, Log(0.260_264_676_226_986_96, 4.883_836_307_520_148_5)),
    (0.004_722_552_787_759_103, Log(0.449_429_947_008_459_56, 29.410_908_580_577_08)),
    (0.005_631_263_608_965_612, Log(0.924_717_339_779_291_4, 67.481_219_177_079_35)),
    (0.001_811_827_156_074_481_5, Log(1.049_808_765_187_308_3, 594.492_187_819_485_9)),
    (0.000_320_770_170_265_833_67, Log(1.854_772_916_744_629_6, 7_892.503_625_889_563)),
    (0.000_156_499_316_417_900_45, Log(1.126_363_680_101_363_2, 19_824.000_189_566_883)),
    (2.756_716_956_778_995e-5, Log(0.401_289_708_293_971_04, 90_369.610_881_544_34)),
    (1.490_923_658_800_934_6e-7, Log(0.573_387_778_156_512_4, 12_757_029.472_787_634)),
];

/// Flows of up to so many packets: their share of all packets, and of all octets, in per cent.
const SHARES: &[(u64, f64, f64)] = &[
    (1, 0.6087, 0.1047),
    (2, 1.0544, 0.1728),
    (4, 1.4696, 0.2537),
    (8, 2.1958, 0.4412),
    (16, 3.1633, 0.7830),
    (32, 4.2601, 1.2432),
    (64, 5.4778, 1.8863),
    (128, 6.9597, 2.7813),
    (256, 8.9276, 4.1445),
    (512, 11.3677, 5.8630),
    (1024, 14.4387, 8.1638),
    (2048, 18.2982, 11.5607),
    (4096, 22.9151, 15.7909),
    (8192, 28.5232, 21.1317),
    (16384, 35.6866, 28.1781),
    (32768, 45.4771, 37.5978),
    (65536, 58.5799, 50.6331),
    (131_072, 73.2677, 67.2524),
    (262_144, 83.9341, 80.4658),
    (524_288, 89.9643, 87.8132),
    (u64::MAX, 100.0, 100.0),
];
/// Bytes of a packet, of all.
const MEAN_PACKET: f64 = 870.607;

/// What is published of the lengths of all flows: so many packets at most, in per cent of flows.
const PUBLISHED: &[(u64, f64)] = &[
    (1, 47.83),
    (2, 65.34),
    (4, 74.89),
    (8, 84.13),
    (16, 90.58),
    (64, 96.46),
    (1024, 99.46),
    (65536, 99.98),
];
/// How far a mixture may be from that: it is of TCP and UDP alone, and fitted.
const TOLERATED: f64 = 3.0;

struct Mixture {
    which: WeightedIndex<f64>,
    parts: Vec<Drawn>,
}

enum Drawn {
    Uniform(Uniform<f64>),
    LogNormal(LogNormal<f64>),
}

impl Mixture {
    fn new(parts: &[(f64, Part)]) -> Self {
        let drawn = |part: &Part| match *part {
            Uni(to) => Drawn::Uniform(Uniform::new(0.0, to).expect("from 0 to more")),
            Log(sigma, median) => {
                Drawn::LogNormal(LogNormal::new(median.ln(), sigma).expect("a positive sigma"))
            }
        };
        Self {
            which: WeightedIndex::new(parts.iter().map(|(w, _)| *w)).expect("positive weights"),
            parts: parts.iter().map(|(_, part)| drawn(part)).collect(),
        }
    }

    /// Packets of a flow.
    fn length(&self, rng: &mut StdRng) -> u64 {
        let drawn = match &self.parts[self.which.sample(rng)] {
            Drawn::Uniform(d) => d.sample(rng),
            Drawn::LogNormal(d) => d.sample(rng),
        };
        drawn as u64 + 1
    }
}

/// Bytes of a packet in a flow of this length, in the mean.
fn packet_bytes(length: u64) -> f64 {
    let n = SHARES.partition_point(|(up_to, ..)| *up_to < length);
    let (_, packets, octets) = SHARES[n];
    let (packets_below, octets_below) =
        n.checked_sub(1).map_or((0.0, 0.0), |n| (SHARES[n].1, SHARES[n].2));
    MEAN_PACKET * (octets - octets_below) / (packets - packets_below)
}

/// The packets of one direction: the first one, and every so often another. Microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Train {
    pub(crate) packets: u64,
    first_us: f64,
    gap_us: f64,
    bytes: f64,
}

impl Train {
    /// How many come before this time.
    pub(crate) fn before(&self, us: u64) -> u64 {
        let after_first = us as f64 - self.first_us;
        if self.packets == 0 || after_first <= 0.0 {
            return 0;
        }
        let more =
            if self.gap_us > 0.0 { (after_first / self.gap_us).ceil() as u64 } else { u64::MAX };
        more.clamp(1, self.packets)
    }

    /// When the first one comes that is not before this time.
    pub(crate) fn next(&self, us: u64) -> Option<u64> {
        let n = self.before(us);
        (n < self.packets).then(|| ((self.first_us + n as f64 * self.gap_us).ceil() as u64).max(us))
    }

    fn last_us(&self) -> u64 {
        (self.first_us + self.packets.saturating_sub(1) as f64 * self.gap_us).ceil() as u64
    }
}

/// One connection: original and reply.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection {
    pub(crate) tcp: bool,
    pub(crate) start_us: u64,
    /// When conntrack lets it go.
    pub(crate) end_us: u64,
    pub(crate) trains: [Train; 2],
}

impl Connection {
    /// When it has had so many packets, or so many bytes, in both directions; `None`: never.
    pub(crate) fn after(&self, packets: u64, bytes: f64) -> Option<u64> {
        let reached = |us: u64| {
            let seen = self.trains.map(|t| t.before(us + 1));
            let octets: f64 = seen.iter().zip(self.trains).map(|(n, t)| *n as f64 * t.bytes).sum();
            seen.iter().sum::<u64>() >= packets && octets >= bytes
        };
        let (mut low, mut high) =
            (self.start_us, self.trains.map(|t| t.last_us()).into_iter().max()?);
        if !reached(high) {
            return None;
        }
        while low < high {
            let middle = low + (high - low) / 2;
            if reached(middle) { high = middle } else { low = middle + 1 }
        }
        Some(low)
    }
}

/// Draws connections.
pub(crate) struct Traffic {
    tcp: Mixture,
    udp: Mixture,
    rate: LogNormal<f64>,
}

impl Traffic {
    pub(crate) fn new() -> Self {
        Self {
            tcp: Mixture::new(TCP_LENGTH),
            udp: Mixture::new(UDP_LENGTH),
            rate: LogNormal::new(10f64.ln(), 1.0).expect("a positive sigma"),
        }
    }

    /// The published shares, and what is drawn: an error where they are far apart.
    pub(crate) fn check(&self, rng: &mut StdRng) -> Result<(), String> {
        const DRAWN: u64 = 400_000;
        let mut lengths: Vec<u64> = (0..DRAWN).map(|_| self.length(rng).1).collect();
        lengths.sort_unstable();
        for (up_to, published) in PUBLISHED {
            let drawn = lengths.partition_point(|l| l <= up_to) as f64 * 100.0 / DRAWN as f64;
            if (drawn - published).abs() > TOLERATED {
                return Err(format!(
                    "flows of up to {up_to} packets: {drawn:.2} %, published {published} %"
                ));
            }
        }
        Ok(())
    }

    fn length(&self, rng: &mut StdRng) -> (bool, u64) {
        let tcp = rng.random_bool(TCP);
        (tcp, if tcp { &self.tcp } else { &self.udp }.length(rng))
    }

    pub(crate) fn connection(&self, start_us: u64, rng: &mut StdRng) -> Connection {
        let (tcp, length) = self.length(rng);
        let slow = self.rate.sample(rng);
        let rate = slow * (length as f64 / 100.0).max(1.0).sqrt();
        let gap_us = 1e6 / rate;
        let first_us = start_us as f64;
        let larger = Train { packets: length, first_us, gap_us, bytes: packet_bytes(length) };
        let unanswered = tcp && length <= 2;
        let smaller = Train {
            packets: length.div_ceil(2),
            first_us,
            gap_us: gap_us * length as f64 / length.div_ceil(2) as f64,
            bytes: 64.0,
        };
        let downstream = rng.random_bool(DOWNSTREAM);
        let mut trains = match (unanswered, downstream) {
            (true, _) => [larger, Train::default()],
            (false, true) => [smaller, larger],
            (false, false) => [larger, smaller],
        };
        trains[1].first_us += RTT_US;
        let last = trains
            .map(|t| if t.packets > 0 { t.last_us() } else { 0 })
            .into_iter()
            .max()
            .unwrap_or(start_us);
        // nf_conntrack's: tcp_timeout_syn_sent, udp_timeout, udp_timeout_stream.
        let timeout_s = match (tcp, unanswered) {
            (true, true) => 120,
            (true, false) => 0,
            (false, _) if last - start_us > 2_000_000 => 120,
            (false, _) => 30,
        };
        Connection { tcp, start_us, end_us: last + timeout_s * 1_000_000, trains }
    }

    /// A pause between two connections, of so many a second.
    pub(crate) fn pause_us(per_second: f64, rng: &mut StdRng) -> f64 {
        -(1.0 - rng.random::<f64>()).ln() * 1e6 / per_second
    }
}
