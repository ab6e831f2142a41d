//! A small userspace datapath with offload: a learning switch between netdevs, over AF_PACKET, with
//! its own connection table, and rules of ctoffload below it that take over what it has seen.
//!
//! ```text
//! cargo run --example pmd_switch -- --demo                       # as root, on any Linux
//! cargo run --example pmd_switch -- --provider tc-flower p1 p2   # between netdevs of yours
//! ```
//! Every second it prints how many packets it forwarded itself, and how many the rules did ("in
//! hardware", be it a NIC's or the kernel's classifier), which it never saw.
//!
//! # The way of a packet
//! ```text
//!   netdev --> tc ingress: a rule? --yes--> egress netdev
//!                   | no                                              control thread:
//!              AF_PACKET ring                                         sweep, expiry, links
//!                   |                                                      |
//!   packet thread:  MAC table, connection table --> is it decided here? --yes--> send
//!                                                     | no                 |
//!                                                   offer --> engine --> rule
//! ```
//!
//! | file | what a datapath author finds there |
//! |---|---|
//! | `pmd.rs` | **the packet thread**: worker, quiescent states, offers; start here |
//! | `conns.rs` | a connection table that carries the engine's handles |
//! | `control.rs` | ports that come and go, sweeps, expiry, the end |
//! | `afpacket.rs` | rings; why a packet that a rule took is not seen a second time |
//! | `macs.rs`, `packet.rs` | a MAC table without locks for readers; a parser |
//! | `demo.rs` | the network of `--demo` |
//!
//! # What it does not do
//! No VLANs and no other ethertypes than IPv4, IPv6 and ARP (see `afpacket.rs`), no loops (there is
//! no spanning tree), no policy: what comes first is offered at once. A datapath that faces
//! strangers offers when a connection has been answered, so that a flood of SYNs makes no rules.
//! Give the ports no addresses: the kernel would answer too.

mod afpacket;
mod conns;
mod control;
mod demo;
mod macs;
mod packet;
mod pmd;

use std::io;
use std::num::NonZeroU32;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::{ArgGroup, Parser, ValueEnum};
use ctoffload::engine::clock::Clock;
use ctoffload::engine::datapath::NoDatapath;
use ctoffload::engine::{Engine, Limits, NO_PROVIDER};
use netdev_providers::dummy::DummyClass;
use netdev_providers::tc_flower::TcFlowerClass;

use conns::Timeouts;
use control::{Control, Totals};
use demo::{Demo, Findings};

/// A learning switch over AF_PACKET that offloads connections.
#[derive(Debug, Parser)]
#[command(name = "pmd_switch", group = ArgGroup::new("what").args(["demo", "ports"]).required(true))]
struct Args {
    /// The offload provider of each port [default: tc-flower where the kernel has it, else dummy]
    #[arg(long, value_enum)]
    provider: Option<ProviderArg>,
    /// How long to run [default: until SIGINT or SIGTERM; --demo: 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
    /// Make three hosts in network namespaces and let them talk through the switch
    #[arg(long)]
    demo: bool,
    /// Netdevs to switch between, two or more. Without addresses, and not in a bridge
    #[arg(value_name = "PORT", num_args = 2..)]
    ports: Vec<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProviderArg {
    TcFlower,
    Dummy,
    None,
}

impl ProviderArg {
    const fn name(self) -> &'static str {
        match self {
            Self::TcFlower => "tc-flower",
            Self::Dummy => "dummy",
            Self::None => NO_PROVIDER,
        }
    }
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("pmd_switch: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> io::Result<bool> {
    // Before any thread is started, so that all have them blocked and only the control thread
    // takes them; and the namespace, so that all are in it.
    let signals = control::block_signals()?;
    let demo = if args.demo { Some(Demo::new()?) } else { None };

    // A number that no other engine's rules carry.
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let instance = NonZeroU32::new(u32::from_ne_bytes(random)).unwrap_or(NonZeroU32::MIN);
    // Paths come with the offers: there is nothing that the engine would have to ask.
    let engine = Engine::new(instance, Arc::new(NoDatapath), Limits::default(), Clock::default());
    // By priority. Each port is bound to the first that accepts it.
    engine.register(Arc::new(TcFlowerClass::default())).map_err(io::Error::other)?;
    let dummy = DummyClass::default();
    dummy.set_in_hw(Some(false));
    engine.register(Arc::new(dummy)).map_err(io::Error::other)?;

    let (names, timeouts) = match &demo {
        // Shorter than the demo, so that a connection which rules carry outlives it only because
        // of the sweeps.
        Some(_) => (
            demo::PORTS.map(String::from).to_vec(),
            Timeouts { udp: 3000, closing: 2000, ..Timeouts::default() },
        ),
        None => (args.ports.clone(), Timeouts::default()),
    };
    let providers = args.provider.map(|p| vec![p.name().to_owned()]);
    let mut control = Control::start(engine, &names, providers, timeouts)?;
    let bound = how_bound(&control);
    if args.provider.is_some_and(|p| p.name() != NO_PROVIDER) && !bound.all {
        control.close();
        return Err(io::Error::other("a port is not bound to the provider that was asked for"));
    }

    let seconds = args.seconds.map(Duration::from_secs);
    let Some(demo) = demo else {
        control.run(&signals, seconds, || false)?;
        print_comparison(&control.close(), bound.real);
        return Ok(true);
    };
    let traffic = demo.start(seconds.unwrap_or(Duration::from_secs(8)))?;
    control.run(&signals, None, || demo.done.load(Ordering::Relaxed))?;
    if !demo.done.load(Ordering::Relaxed) {
        // Interrupted. Namespaces and netdevs go with this process.
        control.close();
        return Ok(false);
    }
    let traffic = traffic.join().map_err(|_| io::Error::other("the demo's thread panicked"))?;
    let totals = control.close();
    if let Err(e) = &traffic {
        println!("the traffic failed: {e}");
    }
    let good = print_findings(&demo.findings, &totals);
    print_comparison(&totals, bound.real);
    Ok(good && traffic.is_ok() && (!bound.real || totals.by_rules > totals.software))
}

/// How ports are bound.
struct Bound {
    /// Every port has a provider.
    all: bool,
    /// Some provider forwards packets.
    real: bool,
}

fn how_bound(control: &Control) -> Bound {
    let mut bound = Bound { all: true, real: false };
    for port in control.ports() {
        let provider = port.provider.unwrap_or(NO_PROVIDER);
        bound.all &= port.provider.is_some();
        bound.real |= !matches!(provider, NO_PROVIDER | "dummy");
    }
    if !bound.real {
        println!(
            "no port has a provider that forwards (dummy only keeps account of rules): every \
             packet stays in software"
        );
    }
    bound
}

fn print_findings(f: &Findings, totals: &Totals) -> bool {
    let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
    println!(
        "TCP: {} streams, {} bytes as they were sent, {} streams broken",
        read(&f.streams),
        read(&f.good),
        read(&f.bad)
    );
    println!(
        "UDP: a sent {}, {} answered; c, which was cut off for a second, sent {}, {} answered; \
         {} delivered twice",
        read(&f.a.sent),
        read(&f.a.answered),
        read(&f.c.sent),
        read(&f.c.answered),
        read(&f.twice)
    );
    println!(
        "{} connections, {} expired while open; {} port deletes; {} frames not sent, {} found a full ring",
        totals.connections, totals.expired, totals.port_deletes, totals.dropped, totals.missed
    );
    read(&f.bad) == 0 && read(&f.twice) == 0 && read(&f.streams) > 0 && read(&f.a.answered) > 0
}

fn print_comparison(t: &Totals, real: bool) {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let share = t.by_rules as f64 * 100.0 / (t.software + t.by_rules).max(1) as f64;
    let how = match (real, t.in_nic) {
        (false, _) => "; nothing below the switch forwards",
        (true, 0) => "; by the kernel's classifier, as no NIC took a rule",
        (true, _) => "",
    };
    println!("{} packets in software, {} in hardware ({share:.1} %{how})", t.software, t.by_rules);
}
