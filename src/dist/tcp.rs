//! Collectives over TCP and host memory: ranks without MPI.
//!
//! Every pair of ranks has one connection. A message names its group and the number of the collective in that group, so that
//! messages of several groups and of collectives that were started early share it; a reader thread a peer sorts them.
//! Reductions exchange parts and add them up in rank order, as over MPI.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::rc::Rc;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::group::{Reduce, Ticket, Transport};
use crate::abi::slices;

/// First bytes of every connection: another program's, or another version's, is refused.
const MAGIC: &[u8; 8] = b"dunlrn01";

/// The group of a rank's last message.
const FAREWELL: u32 = u32::MAX;

/// Where the ranks of a job find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    pub rank: usize,
    pub world: usize,
    /// Host name or address of rank 0.
    pub host: String,
    /// Port on which rank 0 listens while the ranks gather.
    pub port: u16,
}

/// Why a rank did not find the others.
#[derive(Debug, thiserror::Error)]
pub enum MeetError {
    /// Ranks that did not come in time or left again: another try may find them.
    #[error("{0}")]
    Late(String),
    /// An address, a port or an answer that will be wrong the next time too.
    #[error("{0}")]
    Refused(String),
}

/// The connections of one rank to all others.
pub struct Peers {
    rank: usize,
    world: usize,
    /// One a rank; None for this one.
    writers: Vec<Option<Sender<Vec<u8>>>>,
    threads: Vec<JoinHandle<()>>,
    inbox: Arc<Inbox>,
}

/// Messages that came, and whose connection ended.
#[derive(Default)]
struct Inbox {
    state: Mutex<Mail>,
    changed: Condvar,
}

#[derive(Default)]
struct Mail {
    /// By sender, group and number of the collective.
    messages: HashMap<(usize, u32, u64), Vec<u8>>,
    lost: Vec<usize>,
    /// One of them had not said that it was done.
    broken: bool,
}

impl Peers {
    /// Meets the other ranks. All ranks of the job call it.
    ///
    /// `on_loss` is called, on another thread, with the first rank whose connection ends before it said that it was done.
    ///
    /// # Errors
    /// `Late` where ranks did not come before `timeout` or left, `Refused` for a rank that cannot be, a port that is taken and strangers.
    pub fn connect(
        meeting: &Rendezvous,
        timeout: Duration,
        on_loss: impl Fn(usize) + Send + Sync + 'static,
    ) -> Result<Rc<Self>, MeetError> {
        use MeetError::{Late, Refused};
        let deadline = Instant::now() + timeout;
        let Rendezvous { rank, world, host, port } = meeting;
        let (rank, world) = (*rank, *world);
        if rank >= world {
            return Err(Refused(format!("this is rank {rank} of {world}; ranks count from 0")));
        }
        let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        if rank == 0 {
            let listener = TcpListener::bind(("0.0.0.0", *port)).map_err(|error| {
                Refused(format!("rank 0 cannot listen on port {port}: {error}; choose another MASTER_PORT"))
            })?;
            let mut addresses = vec![SocketAddr::from(([0, 0, 0, 0], 0)); world];
            for _ in 1..world {
                let (mut stream, from) = accept(&listener, deadline).map_err(|why| {
                    let missing = (1..world).filter(|&r| streams[r].is_none()).map(|r| r.to_string());
                    Late(format!(
                        "ranks {} did not come to {host}:{port}: {why}",
                        missing.collect::<Vec<_>>().join(", ")
                    ))
                })?;
                let [peer, size, own_port] = read_hello(&mut stream, deadline)?;
                if size != world || peer == 0 || peer >= world || streams[peer].is_some() {
                    return Err(Refused(format!(
                        "{from} says that it is rank {peer} of {size}; this job has {world} ranks, each once"
                    )));
                }
                addresses[peer] = SocketAddr::new(from.ip(), own_port as u16);
                streams[peer] = Some(stream);
            }
            let table: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            let table = table.join("\n").into_bytes();
            for stream in streams.iter_mut().flatten() {
                write_bytes(stream, &table).map_err(|error| Late(format!("a rank left the rendezvous: {error}")))?;
            }
        } else {
            let listener =
                TcpListener::bind("0.0.0.0:0").map_err(|error| Refused(format!("cannot listen: {error}")))?;
            let own_port = listener.local_addr().map_err(|error| Refused(error.to_string()))?.port();
            let mut first = knock((host.as_str(), *port), deadline).map_err(Late)?;
            hello(&mut first, [rank, world, usize::from(own_port)])
                .map_err(|error| Late(format!("rank 0: {error}")))?;
            let table = read_bytes(&mut first, deadline).map_err(|error| {
                Late(format!("rank 0 at {host}:{port} said nothing: {error}; some rank may be missing"))
            })?;
            let table = String::from_utf8_lossy(&table).into_owned();
            let master: IpAddr = first.peer_addr().map_err(|error| Late(error.to_string()))?.ip();
            streams[0] = Some(first);
            for (peer, line) in table.lines().enumerate().take(rank).skip(1) {
                let mut address: SocketAddr = line.parse().map_err(|_| Refused(format!("rank 0 sent {line:?}")))?;
                if address.ip().is_loopback() {
                    address.set_ip(master); // that rank lives where rank 0 lives
                }
                let mut stream = knock(address, deadline).map_err(Late)?;
                hello(&mut stream, [rank, world, 0]).map_err(|error| Late(format!("rank {peer}: {error}")))?;
                streams[peer] = Some(stream);
            }
            for _ in rank + 1..world {
                let (mut stream, from) = accept(&listener, deadline).map_err(Late)?;
                let [peer, size, _] = read_hello(&mut stream, deadline)?;
                if size != world || peer <= rank || peer >= world || streams[peer].is_some() {
                    return Err(Refused(format!("{from} says that it is rank {peer} of {size}")));
                }
                streams[peer] = Some(stream);
            }
        }
        Self::start(rank, world, streams, Arc::new(on_loss)).map(Rc::new).map_err(|error| Late(error.to_string()))
    }

    fn start(
        rank: usize,
        world: usize,
        streams: Vec<Option<TcpStream>>,
        on_loss: Arc<dyn Fn(usize) + Send + Sync>,
    ) -> std::io::Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let (mut writers, mut threads) = (Vec::new(), Vec::new());
        for (peer, stream) in streams.into_iter().enumerate() {
            let Some(stream) = stream else {
                writers.push(None);
                continue;
            };
            stream.set_nodelay(true)?;
            stream.set_read_timeout(None)?;
            let (reader, mut writer) = (stream.try_clone()?, stream);
            let (send, receive) = channel::<Vec<u8>>();
            threads.push(std::thread::spawn(move || {
                for message in receive {
                    if writer.write_all(&message).is_err() {
                        return; // the reader sees the end of the connection and tells
                    }
                }
                let _ = writer.shutdown(Shutdown::Write);
            }));
            let (inbox, on_loss) = (Arc::clone(&inbox), Arc::clone(&on_loss));
            std::thread::spawn(move || {
                if inbox.fill(peer, reader) {
                    on_loss(peer);
                }
            });
            writers.push(Some(send));
        }
        Ok(Self { rank, world, writers, threads, inbox })
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world(&self) -> usize {
        self.world
    }

    fn send(&self, peer: usize, group: u32, number: u64, bytes: &[u8]) {
        let mut message = Vec::with_capacity(20 + bytes.len());
        message.extend(group.to_le_bytes());
        message.extend(number.to_le_bytes());
        message.extend((bytes.len() as u64).to_le_bytes());
        message.extend(bytes);
        // a writer that is gone has lost its connection; the next receive says so
        let _ = self.writers.get(peer).and_then(Option::as_ref).map(|writer| writer.send(message));
    }

    fn receive(&self, peer: usize, group: u32, number: u64) -> Vec<u8> {
        let mut state = lock(&self.inbox.state);
        loop {
            if let Some(message) = state.messages.remove(&(peer, group, number)) {
                return message;
            }
            assert!(!state.lost.contains(&peer), "rank {peer} has closed its connection; look for its own message");
            state = self.inbox.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Peers {
    /// What was sent is on its way before the process may end.
    fn drop(&mut self) {
        // a rank that is ending because of an error says no farewell
        if !std::thread::panicking() {
            let others = (0..self.world).filter(|&peer| peer != self.rank);
            others.for_each(|peer| self.send(peer, FAREWELL, 0, &[]));
        }
        self.writers.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Inbox {
    /// Reads one peer's messages until its connection ends; says whether it is the first to end without a farewell.
    fn fill(&self, peer: usize, mut reader: TcpStream) -> bool {
        let mut done = false;
        let mut message = || -> std::io::Result<(u32, u64, Vec<u8>)> {
            let mut head = [0u8; 20];
            reader.read_exact(&mut head)?;
            let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("invariant: 8 bytes"));
            let group = u32::from_le_bytes(head[..4].try_into().expect("invariant: 4 bytes"));
            let mut bytes = vec![0; word(12) as usize];
            reader.read_exact(&mut bytes)?;
            Ok((group, word(4), bytes))
        };
        while let Ok((group, number, bytes)) = message() {
            done |= group == FAREWELL;
            lock(&self.state).messages.insert((peer, group, number), bytes);
            self.changed.notify_all();
        }
        let mut state = lock(&self.state);
        state.lost.push(peer);
        let first = !done && !std::mem::replace(&mut state.broken, !done);
        drop(state);
        self.changed.notify_all();
        first
    }
}

/// Some ranks of the job as a transport.
#[derive(Clone)]
pub(super) struct Tcp {
    peers: Rc<Peers>,
    /// Tells this group's messages from others'; the same on all its ranks.
    group: u32,
    /// Ranks of the job, in group order.
    members: Rc<[usize]>,
    next: Rc<std::cell::Cell<u64>>,
}

impl Tcp {
    pub(super) fn new(peers: &Rc<Peers>, group: u32, members: &[usize]) -> Self {
        Self { peers: Rc::clone(peers), group, members: members.into(), next: Rc::default() }
    }

    fn me(&self) -> usize {
        let me = self.members.iter().position(|&rank| rank == self.peers.rank);
        me.expect("invariant: a rank uses its own groups")
    }

    /// Begins a collective: sends `part(i)` to the group's rank i.
    fn send<'a>(&self, part: impl Fn(usize) -> &'a [u8]) -> u64 {
        let number = self.next.get();
        self.next.set(number + 1);
        for (i, &peer) in self.members.iter().enumerate() {
            if peer != self.peers.rank {
                self.peers.send(peer, self.group, number, part(i));
            }
        }
        number
    }

    /// What each rank of the group sent in collective `number`; `own` stands for this rank's part.
    fn receive(&self, number: u64, own: Vec<u8>) -> Vec<Vec<u8>> {
        let mut own = Some(own);
        let all = self.members.iter().map(|&peer| {
            let mut mine = || own.take().expect("invariant: a rank is in its group once");
            if peer == self.peers.rank { mine() } else { self.peers.receive(peer, self.group, number) }
        });
        let all: Vec<Vec<u8>> = all.collect();
        let len = all[self.me()].len();
        for (i, part) in all.iter().enumerate() {
            assert!(
                part.len() == len,
                "collectives out of step: rank {} brought {} bytes to collective {number}, this rank {len}",
                self.members[i],
                part.len()
            );
        }
        all
    }

    fn exchange(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let number = self.send(|_| bytes);
        self.receive(number, bytes.to_vec())
    }
}

impl Transport for Tcp {
    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) {
        let size = self.members.len() as i64;
        let len = tensor.numel() as i64;
        if len < 1024 || op == Reduce::Max {
            let parts = self.exchange(slices::bytes(tensor));
            let total = combine(&parts, tensor, op);
            tensor.copy_(&total);
            return;
        }
        // each rank adds up its part, then all parts go to all
        let padded = tensor.view([-1]).constant_pad_nd([0, (size - len % size) % size]);
        let own = padded.narrow(0, self.me() as i64 * (padded.size()[0] / size), padded.size()[0] / size);
        let own = self.reduce_scatter(padded.shallow_clone(), own.empty_like()).wait();
        let mut whole = padded;
        self.all_gather(&own, &mut whole);
        tensor.view([-1]).copy_(&whole.narrow(0, 0, len));
    }

    fn reduce_scatter(&self, input: Tensor, output: Tensor) -> Box<dyn Ticket> {
        let bytes = slices::bytes(&input);
        let each = bytes.len() / self.members.len();
        let number = self.send(|i| &bytes[i * each..(i + 1) * each]);
        let own = bytes[self.me() * each..][..each].to_vec();
        Box::new(Sent { number, own, output, group: self.clone() })
    }

    fn all_gather(&self, input: &Tensor, output: &mut Tensor) {
        let all = self.exchange(slices::bytes(&input.contiguous())).concat();
        slices::bytes_mut(output).copy_from_slice(&all);
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) {
        let bytes = if self.me() == root { slices::bytes(tensor).to_vec() } else { Vec::new() };
        let number = self.next.get();
        self.next.set(number + 1);
        if self.me() == root {
            for &peer in self.members.iter().filter(|&&peer| peer != self.peers.rank) {
                self.peers.send(peer, self.group, number, &bytes);
            }
        } else {
            let bytes = self.peers.receive(self.members[root], self.group, number);
            let target = slices::bytes_mut(tensor);
            assert_eq!(bytes.len(), target.len(), "collectives out of step: a broadcast of another size");
            target.copy_from_slice(&bytes);
        }
    }

    fn barrier(&self) {
        self.exchange(&[]);
    }

    fn progress(&self) {}
}

struct Sent {
    number: u64,
    own: Vec<u8>,
    output: Tensor,
    group: Tcp,
}

impl Ticket for Sent {
    fn wait(self: Box<Self>) -> Tensor {
        let Self { number, own, mut output, group } = *self;
        let total = combine(&group.receive(number, own), &output, Reduce::Sum);
        output.copy_(&total);
        output
    }
}

/// The parts, each seen as elements of `like`, in rank order.
fn combine(parts: &[Vec<u8>], like: &Tensor, op: Reduce) -> Tensor {
    let read = |bytes: &Vec<u8>| {
        let mut tensor = like.empty_like();
        slices::bytes_mut(&mut tensor).copy_from_slice(bytes);
        tensor
    };
    let mut total = read(&parts[0]);
    for part in &parts[1..] {
        total = match op {
            Reduce::Sum => total + read(part),
            Reduce::Max => total.maximum(&read(part)),
        };
    }
    total
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tries until the other side listens.
fn knock(address: impl ToSocketAddrs + std::fmt::Debug, deadline: Instant) -> Result<TcpStream, String> {
    loop {
        let refusal = match address.to_socket_addrs() {
            Ok(mut found) => match found.next() {
                Some(found) => match TcpStream::connect_timeout(&found, Duration::from_secs(5)) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => format!("{found}: {error}"),
                },
                None => format!("{address:?} is no address"),
            },
            Err(error) => format!("{address:?}: {error}"),
        };
        if Instant::now() > deadline {
            return Err(format!("no connection to {refusal}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn accept(listener: &TcpListener, deadline: Instant) -> Result<(TcpStream, SocketAddr), String> {
    listener.set_nonblocking(true).map_err(|error| error.to_string())?;
    loop {
        match listener.accept() {
            Ok((stream, from)) => {
                stream.set_nonblocking(false).map_err(|error| error.to_string())?;
                return Ok((stream, from));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    return Err("no connection before the deadline (run.timeout)".to_owned());
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn hello(stream: &mut TcpStream, words: [usize; 3]) -> std::io::Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(words.iter().flat_map(|&word| (word as u64).to_le_bytes()));
    stream.write_all(&bytes)
}

fn read_hello(stream: &mut TcpStream, deadline: Instant) -> Result<[usize; 3], MeetError> {
    let mut bytes = [0u8; 32];
    patience(stream, deadline);
    stream.read_exact(&mut bytes).map_err(|error| MeetError::Late(format!("a connection said nothing: {error}")))?;
    if &bytes[..8] != MAGIC {
        let words = "a connection is not from this version of dunlearn; is the port another program's?";
        return Err(MeetError::Refused(words.to_owned()));
    }
    let word = |i: usize| u64::from_le_bytes(bytes[8 + 8 * i..16 + 8 * i].try_into().expect("invariant: 8 bytes"));
    Ok([word(0) as usize, word(1) as usize, word(2) as usize])
}

fn write_bytes(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(&(bytes.len() as u64).to_le_bytes())?;
    stream.write_all(bytes)
}

fn read_bytes(stream: &mut TcpStream, deadline: Instant) -> std::io::Result<Vec<u8>> {
    patience(stream, deadline);
    let mut length = [0u8; 8];
    stream.read_exact(&mut length)?;
    let mut bytes = vec![0; (u64::from_le_bytes(length) as usize).min(1 << 24)];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn patience(stream: &TcpStream, deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
    let _ = stream.set_read_timeout(Some(left));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::tcp_world;

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    /// Ranks as threads, each with its own connections.
    fn ranks<T: Send>(tp: usize, dp: usize, body: impl Fn(crate::dist::World) -> T + Sync) -> Vec<T> {
        let (port, world) = (free_port(), tp * dp);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..world)
                .map(|rank| {
                    let body = &body;
                    scope.spawn(move || {
                        let meeting = Rendezvous { rank, world, host: "127.0.0.1".to_owned(), port };
                        let peers = Peers::connect(&meeting, Duration::from_secs(30), |_| ()).unwrap();
                        let watchdog = crate::dist::Watchdog::new(Duration::MAX);
                        body(tcp_world(&peers, tp, Some(dp), watchdog).unwrap())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_collective_gives_what_the_threads_give() {
        let body = |world: crate::dist::World| {
            let rank = world.mesh.rank as f64;
            let numbers = |len: i64| Tensor::arange(len, (tch::Kind::Float, tch::Device::Cpu)) * (rank + 1.0) + rank;
            let mut small = numbers(7);
            world.tp.all_reduce(&mut small, Reduce::Sum);
            let mut large = numbers(5003);
            world.world.all_reduce(&mut large, Reduce::Sum);
            let early = world.dp.reduce_scatter(&numbers(4098));
            let gathered = world.dp.all_gather(&numbers(3));
            let words = world.world.gather_bytes(format!("r{rank}").repeat(world.mesh.rank).as_bytes());
            let from_two = world.world.broadcast_bytes(format!("I am {rank}").as_bytes(), 2);
            let mut highest = [rank];
            world.world.all_reduce_f64(&mut highest, Reduce::Max);
            world.world.barrier();
            let flat = |t: Tensor| Vec::<f32>::try_from(t).unwrap();
            (flat(small), flat(large), flat(early.wait()), flat(gathered), words, from_two, highest[0])
        };
        assert_eq!(ranks(2, 3, body), crate::dist::run_threads(2, 3, body));
    }

    #[test]
    fn a_rank_that_leaves_is_named() {
        let texts = ranks(1, 2, |world| {
            if world.mesh.rank == 1 {
                return String::new();
            }
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.world.barrier())).unwrap_err();
            panic.downcast_ref::<String>().cloned().unwrap_or_default()
        });
        assert!(texts[0].starts_with("rank 1 has closed its connection"), "{texts:?}");
    }

    #[test]
    fn only_a_rank_that_breaks_off_is_a_loss() {
        let port = free_port();
        let lost = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|rank| {
                    scope.spawn(move || {
                        let (send, receive) = std::sync::mpsc::channel();
                        let meeting = Rendezvous { rank, world: 3, host: "127.0.0.1".to_owned(), port };
                        let told = Mutex::new(send);
                        let on_loss = move |peer| _ = lock(&told).send(peer);
                        let peers = Peers::connect(&meeting, Duration::from_secs(30), on_loss).unwrap();
                        match rank {
                            0 => receive.recv_timeout(Duration::from_secs(20)).ok(),
                            // done: says so
                            1 => None,
                            _ => {
                                std::thread::sleep(Duration::from_millis(200));
                                // the connections end as those of a process that is killed
                                Rc::into_inner(peers).unwrap().writers.clear();
                                None
                            }
                        }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(lost[0], Some(2));
    }

    #[test]
    fn ranks_that_do_not_come_are_named() {
        let meeting = Rendezvous { rank: 0, world: 3, host: "127.0.0.1".to_owned(), port: free_port() };
        let late = |meeting: &Rendezvous| match Peers::connect(meeting, Duration::from_millis(200), |_| ()) {
            Err(MeetError::Late(words)) => words,
            Err(MeetError::Refused(words)) => panic!("{words}: another try may find them"),
            Ok(_) => panic!("nobody is there"),
        };
        let text = late(&meeting);
        assert!(text.starts_with("ranks 1, 2 did not come to 127.0.0.1:"), "{text}");
        let meeting = Rendezvous { rank: 1, ..meeting };
        let text = late(&meeting);
        assert!(text.starts_with("no connection to 127.0.0.1:"), "{text}");
    }

    #[test]
    fn another_program_on_the_port_is_refused() {
        let port = free_port();
        let stranger = std::thread::spawn(move || {
            let mut stream = knock(("127.0.0.1", port), Instant::now() + Duration::from_secs(10)).unwrap();
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n");
            std::thread::sleep(Duration::from_millis(300));
        });
        let meeting = Rendezvous { rank: 0, world: 2, host: "127.0.0.1".to_owned(), port };
        let error = Peers::connect(&meeting, Duration::from_secs(10), |_| ()).err().unwrap();
        assert!(
            matches!(&error, MeetError::Refused(words) if words.contains("not from this version of dunlearn")),
            "{error}"
        );
        stranger.join().unwrap();
    }
}
