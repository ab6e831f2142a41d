//! A network to switch, and bounded traffic in it, whose contents are checked:
//!
//! ```text
//!   a  10.9.0.1 fd09::1 eth0 --- p1 [            ]
//!   b  10.9.0.2 fd09::2 eth0 --- p2 [ pmd_switch ]
//!   c  10.9.0.3 fd09::3 eth0 --- p3 [            ]
//! ```
//! Each station is a thread in a network namespace of its own, the switch is in another one. They
//! have no names in /run/netns: when the threads end, whatever the reason, all of it is gone.
//!
//! * a to b: one TCP stream over IPv4 and one over IPv6, and short ones all the time;
//! * a to b and c to b: numbered UDP datagrams, which b sends back. TCP would hide a packet that is
//!   delivered twice; these do not;
//! * in the middle p3 goes down for a second, and comes back as a new port.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

/// The switch's ports.
pub(crate) const PORTS: [&str; 3] = ["p1", "p2", "p3"];
const PORT: u16 = 7000;
/// Of each long stream, per second.
const RATE: u64 = 2_000_000;
const SHORT: u64 = 20_000;
const SHORT_EVERY: Duration = Duration::from_millis(250);
const DATAGRAM_EVERY: Duration = Duration::from_millis(5);
/// No answer within this time: something is broken.
const PATIENCE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;
type Client = JoinHandle<io::Result<()>>;

/// A host: a thread in a network namespace of its own. Threads started from there are in it too.
struct Station {
    jobs: mpsc::Sender<Job>,
    tid: i32,
}

fn gone() -> io::Error {
    io::Error::other("a station's thread is gone")
}

impl Station {
    fn new(name: &str) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (tx, rx) = mpsc::channel();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            let _ = tx.send(unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid().as_raw()));
            for job in queue {
                job();
            }
        })?;
        let tid = rx.recv().map_err(|_| gone())??;
        Ok(Self { jobs, tid })
    }

    /// Calls `f` there.
    fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce() -> io::Result<R> + Send + 'static,
    ) -> io::Result<R> {
        let (tx, rx) = mpsc::channel();
        let job: Job = Box::new(move || {
            let _ = tx.send(f());
        });
        self.jobs.send(job).map_err(|_| gone())?;
        rx.recv().map_err(|_| gone())?
    }
}

fn ip(line: &str) -> io::Result<()> {
    let out = Command::new("ip")
        .args(line.split(' '))
        .output()
        .map_err(|e| io::Error::other(format!("the demo needs `ip` (iproute2): {e}")))?;
    if out.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("ip {line}: {}", words.trim())))
}

/// What the stations found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Bytes of TCP that arrived as they were sent.
    pub(crate) good: AtomicU64,
    /// Streams that ended well.
    pub(crate) streams: AtomicU64,
    /// Streams in which a byte was wrong or missing.
    pub(crate) bad: AtomicU64,
    /// Of the datagrams, by who sent them.
    pub(crate) a: Echoes,
    pub(crate) c: Echoes,
    /// Datagrams that arrived more than once, at b or on their way back.
    pub(crate) twice: AtomicU64,
}

/// Datagrams of one station.
#[derive(Debug, Default)]
pub(crate) struct Echoes {
    pub(crate) sent: AtomicU64,
    pub(crate) answered: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// The network, with its traffic.
pub(crate) struct Demo {
    stations: Vec<Station>,
    ipv6: bool,
    pub(crate) findings: Arc<Findings>,
    /// The traffic is over.
    pub(crate) done: Arc<AtomicBool>,
}

impl Demo {
    /// Puts the calling thread into a fresh network namespace, and the stations around it. Called
    /// before any other thread is started: they are to be in the same namespace.
    pub(crate) fn new() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|e| io::Error::other(format!("a network namespace (root is needed): {e}")))?;
        let mut stations = Vec::new();
        let mut ipv6 = true;
        for (n, port) in (1..).zip(PORTS) {
            let station = Station::new(["a", "b", "c"].get(n - 1).copied().unwrap_or("x"))?;
            ip(&format!("link add {port} type veth peer name eth0 netns {}", station.tid))?;
            // A port has no address: the kernel neither answers nor forwards what the switch does.
            let _ = ip(&format!("link set {port} addrgenmode none")); // no IPv6: no need
            ip(&format!("link set {port} up"))?;
            ipv6 &= station.call(move || {
                ip("link set lo up")?;
                ip("link set eth0 up")?;
                ip(&format!("addr add 10.9.0.{n}/24 dev eth0"))?;
                Ok(ip(&format!("addr add fd09::{n}/64 dev eth0 nodad")).is_ok())
            })?;
            stations.push(station);
        }
        if !ipv6 {
            println!("no IPv6 on this kernel: without it");
        }
        Ok(Self { stations, ipv6, findings: Arc::default(), done: Arc::default() })
    }

    /// Starts the traffic. Called when the switch runs.
    pub(crate) fn start(&self, lasts: Duration) -> io::Result<JoinHandle<io::Result<()>>> {
        let [a, b, c] = self.stations.as_slice() else { return Err(gone()) };
        let findings = Arc::clone(&self.findings);
        b.call(move || serve(&findings))?;
        let until = Instant::now() + lasts;
        let v4 = SocketAddr::new([10, 9, 0, 2].into(), PORT);
        let v6 = SocketAddr::new(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 2).into(), PORT);
        let mut clients: Vec<Client> = Vec::new();
        let mut spawn = |station: &Station,
                         f: fn(&Findings, SocketAddr, Instant) -> io::Result<()>,
                         to: SocketAddr| {
            let findings = Arc::clone(&self.findings);
            let client = station
                .call(move || std::thread::Builder::new().spawn(move || f(&findings, to, until)))?;
            clients.push(client);
            Ok::<_, io::Error>(())
        };
        spawn(a, long_stream, v4)?;
        if self.ipv6 {
            spawn(a, long_stream, v6)?;
        }
        spawn(a, short_streams, v4)?;
        spawn(a, |f, to, until| datagrams(f, &f.a, to, until), v4)?;
        spawn(c, |f, to, until| datagrams(f, &f.c, to, until), v4)?;
        let done = Arc::clone(&self.done);
        std::thread::Builder::new().name("demo".into()).spawn(move || {
            std::thread::sleep(lasts / 2);
            ip("link set p3 down")?;
            std::thread::sleep(Duration::from_secs(1));
            ip("link set p3 up")?;
            let mut result = Ok(());
            for client in clients {
                let r = client.join().map_err(|_| io::Error::other("a thread panicked"));
                result = result.and(r.and_then(|r| r));
            }
            // The last packets, FIN among them, come to rest.
            std::thread::sleep(Duration::from_millis(500));
            done.store(true, Ordering::Relaxed);
            result
        })
    }
}

/// What stands at which place of a stream: splitmix64 of the stream's number and the place.
fn word(stream: u64, at: u64) -> [u8; 8] {
    let mut x = stream ^ at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)).to_be_bytes()
}

// ---- the server ----

fn serve(findings: &Arc<Findings>) -> io::Result<()> {
    // One socket for both families, but where there is no IPv6.
    let any = |port| TcpListener::bind(SocketAddr::new(IpAddr::from([0u8; 16]), port));
    let listener = any(PORT).or_else(|_| TcpListener::bind(("0.0.0.0", PORT)))?;
    let streams = Arc::clone(findings);
    std::thread::Builder::new().spawn(move || {
        for stream in listener.incoming().flatten() {
            let findings = Arc::clone(&streams);
            std::thread::spawn(move || {
                if check(stream, &findings).is_err() {
                    add(&findings.bad, 1);
                }
            });
        }
    })?;
    let udp = UdpSocket::bind(("0.0.0.0", PORT))?;
    let findings = Arc::clone(findings);
    std::thread::Builder::new().spawn(move || {
        let mut seen: HashMap<SocketAddr, HashSet<[u8; 8]>> = HashMap::new();
        let mut number = [0; 8];
        while let Ok((_, from)) = udp.recv_from(&mut number) {
            if !seen.entry(from).or_default().insert(number) {
                add(&findings.twice, 1);
            }
            let _ = udp.send_to(&number, from);
        }
    })?;
    Ok(())
}

/// Reads a stream to its end, compares each word, and answers with how many were right.
fn check(mut stream: TcpStream, findings: &Findings) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut number = [0; 8];
    stream.read_exact(&mut number)?;
    let number = u64::from_be_bytes(number);
    let mut reader = io::BufReader::with_capacity(1 << 16, &mut stream);
    let (mut good, mut buffer) = (0, [0; 8]);
    loop {
        match reader.read_exact(&mut buffer) {
            Ok(()) if buffer == word(number, good) => good += 1,
            Ok(()) => return Err(io::ErrorKind::InvalidData.into()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(e) => return Err(e),
        }
    }
    add(&findings.good, good * 8);
    stream.write_all(&good.to_be_bytes())
}

// ---- the clients ----

/// Sends words until there is no more, at no more than the rate; and has the server's word for it.
fn stream(
    findings: &Findings,
    to: SocketAddr,
    mut more: impl FnMut(u64) -> bool,
) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&number.to_be_bytes())?;
    let (begun, mut sent, mut chunk) = (Instant::now(), 0u64, Vec::with_capacity(16_000));
    while more(sent * 8) {
        chunk.clear();
        chunk.extend((sent..sent + 2000).flat_map(|at| word(number, at)));
        stream.write_all(&chunk)?;
        sent += 2000;
        let due = begun + Duration::from_micros(sent * 8 * 1_000_000 / RATE);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    if u64::from_be_bytes(answer) == sent {
        add(&findings.streams, 1);
    } else {
        add(&findings.bad, 1);
    }
    Ok(())
}

fn long_stream(findings: &Findings, to: SocketAddr, until: Instant) -> io::Result<()> {
    stream(findings, to, |_| Instant::now() < until)
}

fn short_streams(findings: &Findings, to: SocketAddr, until: Instant) -> io::Result<()> {
    while Instant::now() < until {
        stream(findings, to, |sent| sent < SHORT)?;
        std::thread::sleep(SHORT_EVERY);
    }
    Ok(())
}

fn datagrams(
    findings: &Findings,
    echoes: &Echoes,
    to: SocketAddr,
    until: Instant,
) -> io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    let (mut seen, mut answer) = (HashSet::new(), [0; 8]);
    let mut take = || {
        while socket.recv(&mut answer).is_ok() {
            add(if seen.insert(answer) { &echoes.answered } else { &findings.twice }, 1);
        }
    };
    for number in 0u64.. {
        if Instant::now() >= until {
            break;
        }
        // What cannot be sent is lost, as is what is sent into a port that is down.
        if socket.send(&number.to_be_bytes()).is_ok() {
            add(&echoes.sent, 1);
        }
        std::thread::sleep(DATAGRAM_EVERY);
        take();
    }
    std::thread::sleep(Duration::from_millis(300));
    take();
    Ok(())
}
