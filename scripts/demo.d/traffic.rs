//! The two ends of the connections that scripts/demo looks at. Nothing but std: scripts/demo has
//! rustc make a program of this one file.
//!
//! ```text
//! traffic serve FILE PORT-PORT ADDRESS...      answers TCP and UDP on these ports and addresses
//! traffic tcp|udp ADDRESS PORT FILE            makes one connection, and does as it is told
//! ```
//! The second prints `connected SOURCE:PORT`, reads commands from stdin, one a line, and answers each
//! with one line. Unless it is told to be quiet, it exchanges a small message with the server every
//! 0.1 s: a connection that is alive but has little to say.
//!
//! ```text
//! quiet, talk    stop and resume that                   quiet, talking
//! ask            one small message                      answered | unanswered
//! send           FILE, once                             intact BYTES | corrupt BYTES
//! stream RATE    FILE again and again, RATE kB/s, until told to stop (TCP)
//!                                                       streaming
//! finish         end the stream                         intact BYTES | corrupt BYTES
//! blast SECONDS  as much as goes through (TCP)          rate KB/S
//! count          small messages                         count SENT ANSWERED
//! spoil          every byte of FILE, so that what is sent is corrupt; once more, and it is not
//!                                                       spoilt
//! close          end the connection                     closed
//! ```
//! "intact": the server has FILE too, and every byte that it received was the one that belongs
//! there. Whatever goes wrong ends the program with a line `error ...`.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, Error, ErrorKind, Read, Result, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Between small messages.
const TICK: Duration = Duration::from_millis(100);
/// A transfer that makes no progress for so long has failed.
const PATIENCE: Duration = Duration::from_secs(90);
/// TCP data, per frame.
const CHUNK: usize = 16 * 1024;
/// UDP data, per datagram: fits in the least MTU of IPv6.
const DATAGRAM: usize = 1200;
/// Datagrams on the way.
const WINDOW: usize = 16;

// TCP: a kind and a length, in 5 bytes, and so many bytes.
//   T  echoed
//   D  data: the next bytes of the file, which starts again at its end
//   N  data that nobody looks at
//   E  answered with the number of bytes since the last E, and how many of them were wrong
// UDP: a kind, the number of the transfer, the number of the datagram, in 9 bytes; and data. Each is
// answered with these 9 bytes; E with the two numbers behind them.

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["serve", file, ports, addresses @ ..] => serve(file, ports, addresses),
        [proto @ ("tcp" | "udp"), address, port, file] => client(proto, address, port, file),
        _ => Err(bad("see the top of traffic.rs")),
    };
    if let Err(e) = done {
        println!("error {e}");
        std::process::exit(1);
    }
}

fn bad(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Other, text.into())
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| bad(format!("'{text}' is no number")))
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many bytes differ from the file's at `at`, where it starts again at its end.
fn wrong(data: &[u8], file: &[u8], mut at: usize) -> u64 {
    let mut rest = data;
    let mut wrong = 0;
    while !rest.is_empty() {
        let n = rest.len().min(file.len() - at);
        let (part, expected) = (&rest[..n], &file[at..at + n]);
        if part != expected {
            wrong += part.iter().zip(expected).filter(|(a, b)| a != b).count() as u64;
        }
        rest = &rest[n..];
        at = (at + n) % file.len();
    }
    wrong
}

// --- The server -----------------------------------------------------------------------------------

fn serve(file: &str, ports: &str, addresses: &[&str]) -> Result<()> {
    let file = Arc::new(std::fs::read(file)?);
    let (first, last) = ports.split_once('-').ok_or_else(|| bad("FIRST-LAST"))?;
    for address in addresses {
        let address: IpAddr = number(address)?;
        for port in number::<u16>(first)?..=number(last)? {
            let listener = TcpListener::bind((address, port))?;
            let of = Arc::clone(&file);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let of = Arc::clone(&of);
                    thread::spawn(move || serve_stream(stream, &of));
                }
            });
            // One for each address: answers come from the address that was asked.
            let socket = UdpSocket::bind((address, port))?;
            let of = Arc::clone(&file);
            thread::spawn(move || serve_datagrams(&socket, &of));
        }
    }
    println!("serving");
    loop {
        thread::park();
    }
}

fn serve_stream(mut stream: TcpStream, file: &[u8]) -> Result<()> {
    stream.set_nodelay(true)?;
    let (mut count, mut errors) = (0u64, 0u64);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let [kind, a, b, c, d] = head;
        let mut left = u32::from_be_bytes([a, b, c, d]) as usize;
        while left > 0 {
            let most = left.min(buffer.len());
            let n = stream.read(&mut buffer[..most])?;
            if n == 0 {
                return Ok(());
            }
            if kind == b'D' {
                errors += wrong(&buffer[..n], file, (count % file.len() as u64) as usize);
            }
            count += n as u64;
            left -= n;
        }
        match kind {
            b'T' => stream.write_all(b"T")?,
            b'E' => {
                stream.write_all(&[count.to_be_bytes(), errors.to_be_bytes()].concat())?;
                (count, errors) = (0, 0);
            }
            _ => {}
        }
    }
}

fn serve_datagrams(socket: &UdpSocket, file: &[u8]) {
    let mut transfers: HashMap<(SocketAddr, [u8; 4]), (HashSet<usize>, u64, u64)> = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let Ok((n, peer)) = socket.recv_from(&mut buffer) else { continue };
        let Some((head, data)) = buffer[..n].split_first_chunk::<9>() else { continue };
        let [kind, t0, t1, t2, t3, s0, s1, s2, s3] = *head;
        let sequence = u32::from_be_bytes([s0, s1, s2, s3]) as usize;
        let mut answer = head.to_vec();
        if kind != b'T' {
            let (seen, count, errors) = transfers.entry((peer, [t0, t1, t2, t3])).or_default();
            if kind == b'D' && seen.insert(sequence) {
                *count += data.len() as u64;
                *errors += wrong(data, file, sequence * DATAGRAM % file.len());
            }
            if kind == b'E' {
                answer.extend(count.to_be_bytes());
                answer.extend(errors.to_be_bytes());
            }
        }
        let _ = socket.send_to(&answer, peer);
    }
}

// --- The client -----------------------------------------------------------------------------------

enum Conn {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

struct Client {
    conn: Conn,
    file: Vec<u8>,
    /// Small messages, sent and answered.
    sent: u32,
    answered: u32,
    /// Bytes of the stream or file under way.
    count: u64,
    /// UDP: the number of the transfer.
    transfer: u32,
}

/// What the client does by itself.
#[derive(Clone, Copy)]
enum Mode {
    Quiet,
    Talk,
    /// With so long between chunks.
    Stream(Duration),
}

fn client(proto: &str, address: &str, port: &str, file: &str) -> Result<()> {
    let to = SocketAddr::new(number(address)?, number(port)?);
    let (conn, local) = if proto == "tcp" {
        let s = TcpStream::connect(to)?;
        s.set_nodelay(true)?;
        s.set_read_timeout(Some(PATIENCE))?;
        s.set_write_timeout(Some(PATIENCE))?;
        let local = s.local_addr()?;
        (Conn::Tcp(s), local)
    } else {
        let s = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
        s.connect(to)?;
        let local = s.local_addr()?;
        (Conn::Udp(s), local)
    };
    println!("connected {local}");
    let file = std::fs::read(file)?;
    let client = Client { conn, file, sent: 0, answered: 0, count: 0, transfer: 0 };
    let shared = Arc::new((Mutex::new(Mode::Talk), Mutex::new(client)));
    {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            if let Err(e) = by_itself(&shared.0, &shared.1) {
                println!("error {e}");
                std::process::exit(1);
            }
        });
    }
    let (mode, client) = &*shared;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let told = match words.as_slice() {
            ["quiet"] => {
                *lock(mode) = Mode::Quiet;
                // What was on its way has come when this can be had.
                drop(lock(client));
                "quiet".into()
            }
            ["talk"] => {
                *lock(mode) = Mode::Talk;
                "talking".into()
            }
            ["ask"] => if lock(client).ask()? { "answered" } else { "unanswered" }.into(),
            ["send"] => lock(client).send()?,
            ["stream", rate] => {
                let pause = CHUNK as f64 / (1000.0 * number::<f64>(rate)?);
                *lock(mode) = Mode::Stream(Duration::from_secs_f64(pause));
                "streaming".into()
            }
            ["finish"] => {
                *lock(mode) = Mode::Quiet;
                lock(client).finish()?
            }
            ["blast", seconds] => lock(client).blast(Duration::from_secs(number(seconds)?))?,
            ["count"] => {
                let c = lock(client);
                format!("count {} {}", c.sent, c.answered)
            }
            ["spoil"] => {
                lock(client).file.iter_mut().for_each(|byte| *byte ^= 0xff);
                "spoilt".into()
            }
            ["close"] => {
                *lock(mode) = Mode::Quiet;
                lock(client).close()?;
                println!("closed");
                return Ok(());
            }
            _ => return Err(bad(format!("no command '{line}'"))),
        };
        println!("{told}");
    }
    Ok(())
}

fn by_itself(mode: &Mutex<Mode>, client: &Mutex<Client>) -> Result<()> {
    let mut due = Instant::now();
    loop {
        let mut c = lock(client);
        // Looked at with the client in hand: what is told after "quiet" finds it quiet.
        let now = *lock(mode);
        let pause = match now {
            Mode::Quiet => TICK,
            Mode::Talk => {
                c.ask()?;
                TICK
            }
            Mode::Stream(pause) => {
                c.chunk()?;
                pause
            }
        };
        drop(c);
        // A stream that was held up catches up, but not with everything at once.
        let earliest = Instant::now().checked_sub(pause).unwrap_or(due);
        due = (due + pause).max(earliest);
        thread::sleep(due.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    }
}

fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
    [&[kind][..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn verdict(count: u64, answer: &[u8]) -> Result<String> {
    let word = |at: usize| answer.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    let (Some(received), Some(errors)) = (word(0), word(8)) else { return Err(bad("a short answer")) };
    let word = if received == count && errors == 0 { "intact" } else { "corrupt" };
    Ok(format!("{word} {received}"))
}

impl Client {
    fn stream(&mut self) -> Result<&mut TcpStream> {
        match &mut self.conn {
            Conn::Tcp(s) => Ok(s),
            Conn::Udp(_) => Err(bad("only over TCP")),
        }
    }

    /// A small message, and the answer to it.
    fn ask(&mut self) -> Result<bool> {
        self.sent += 1;
        let answered = match &mut self.conn {
            Conn::Tcp(s) => {
                s.write_all(&frame(b'T', &[]))?;
                s.read_exact(&mut [0])?;
                true
            }
            Conn::Udp(s) => {
                put(s, b'T', 0, self.sent, &[]);
                let until = Instant::now() + Duration::from_secs(2);
                loop {
                    match get(s, until.saturating_duration_since(Instant::now()))? {
                        None => break false,
                        Some(a) if a[0] == b'T' && a[5..9] == self.sent.to_be_bytes() => break true,
                        Some(_) => {}
                    }
                }
            }
        };
        self.answered += u32::from(answered);
        Ok(answered)
    }

    /// The next part of the file.
    fn chunk(&mut self) -> Result<()> {
        let at = (self.count % self.file.len() as u64) as usize;
        let end = self.file.len().min(at + CHUNK);
        let bytes = frame(b'D', &self.file[at..end]);
        self.stream()?.write_all(&bytes)?;
        self.count += (end - at) as u64;
        Ok(())
    }

    fn finish(&mut self) -> Result<String> {
        let s = self.stream()?;
        s.write_all(&frame(b'E', &[]))?;
        let mut answer = [0; 16];
        s.read_exact(&mut answer)?;
        verdict(std::mem::take(&mut self.count), &answer)
    }

    fn send(&mut self) -> Result<String> {
        if matches!(self.conn, Conn::Udp(_)) {
            return self.send_datagrams();
        }
        while self.count < self.file.len() as u64 {
            self.chunk()?;
        }
        self.finish()
    }

    fn send_datagrams(&mut self) -> Result<String> {
        self.transfer += 1;
        let Conn::Udp(s) = &self.conn else { return Err(bad("only over UDP")) };
        let chunks: Vec<&[u8]> = self.file.chunks(DATAGRAM).collect();
        let mut todo: Vec<usize> = (0..chunks.len()).rev().collect();
        let mut under_way = HashSet::new();
        let mut heard = Instant::now();
        let mut ended = false;
        loop {
            while under_way.len() < WINDOW {
                let Some(sequence) = todo.pop() else { break };
                under_way.insert(sequence);
                put(s, b'D', self.transfer, sequence as u32, chunks[sequence]);
            }
            if under_way.is_empty() && !ended {
                put(s, b'E', self.transfer, 0, &[]);
                ended = true;
            }
            let Some(answer) = get(s, Duration::from_secs(3))? else {
                if heard.elapsed() > PATIENCE {
                    return Err(bad("no answer"));
                }
                todo.extend(under_way.drain());
                ended = false;
                continue;
            };
            if answer.len() < 9 || answer[1..5] != self.transfer.to_be_bytes() {
                continue;
            }
            heard = Instant::now();
            match answer[0] {
                b'D' => {
                    let [.., a, b, c, d] = answer[..9] else { continue };
                    under_way.remove(&(u32::from_be_bytes([a, b, c, d]) as usize));
                }
                b'E' => return verdict(self.file.len() as u64, &answer[9..]),
                _ => {}
            }
        }
    }

    fn blast(&mut self, time: Duration) -> Result<String> {
        let s = self.stream()?;
        let bytes = frame(b'N', &[0; 1 << 16]);
        let start = Instant::now();
        while start.elapsed() < time {
            s.write_all(&bytes)?;
        }
        s.write_all(&frame(b'E', &[]))?;
        let mut answer = [0; 16];
        s.read_exact(&mut answer)?;
        let count = answer[..8].try_into().map(u64::from_be_bytes).unwrap_or(0);
        Ok(format!("rate {:.0}", count as f64 / start.elapsed().as_secs_f64() / 1000.0))
    }

    fn close(&mut self) -> Result<()> {
        if let Conn::Tcp(s) = &mut self.conn {
            s.shutdown(std::net::Shutdown::Write)?;
            while s.read(&mut [0; 64])? > 0 {}
        }
        Ok(())
    }
}

/// An error is as good as a loss: the path may be cut.
fn put(s: &UdpSocket, kind: u8, transfer: u32, sequence: u32, data: &[u8]) {
    let head = [&[kind][..], &transfer.to_be_bytes(), &sequence.to_be_bytes(), data];
    let _ = s.send(&head.concat());
}

fn get(s: &UdpSocket, time: Duration) -> Result<Option<Vec<u8>>> {
    if time.is_zero() {
        return Ok(None);
    }
    s.set_read_timeout(Some(time))?;
    let mut buffer = [0; 2048];
    match s.recv(&mut buffer) {
        Ok(n) if n >= 9 => Ok(Some(buffer[..n].to_vec())),
        _ => Ok(None),
    }
}
