//! Loopback proxies that cut real processes off from each other: what the links of the simulated world do, done to TCP connections.
//!
//! ```text
//! node a ──► listener of (a, b) ──► node b        one listener for each pair: who connects, to whom
//! node b ──► listener of (b, a) ──► node a
//! ```
//!
//! Each node is told to reach its peers by listeners of its own, so that what happens to a link is set for each direction and each
//! peer. A link from `a` to `b` carries what `a` sends to `b`: the requests of its own connections, and the answers on those that `b` opened.
//!
//! | set | a connection | a new one |
//! |---|---|---|
//! | held | stays, its bytes wait in that direction and arrive later, as TCP's would | is accepted, and nothing is forwarded: a black hole |
//! | refused | is reset, both ends see it | is refused |
//!
//! What a real network does and this cannot: a handshake that gets no answer. Where the simulated world's connect times out, here it
//! succeeds, and the call on it waits for its deadline or the keepalive.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Who sends, to whom.
pub type Link = (usize, usize);

const BUFFER_BYTES: usize = 64 << 10;
/// Between two attempts to listen where somebody else's connection is in the way.
const LISTEN_AGAIN: Duration = Duration::from_millis(50);
/// Where ports are taken from: below those that the system gives to outgoing connections, which would be in the way when a listener comes back.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

#[derive(Clone, Debug, Default)]
struct Links {
    held: BTreeSet<Link>,
    refused: BTreeSet<Link>,
}

/// The proxies of one cluster. They end with this value.
#[derive(Default)]
pub struct Proxies {
    links: Arc<watch::Sender<Links>>,
    /// Messages and connections that ran into what is held or refused.
    met: Arc<AtomicU64>,
    listening: Mutex<Vec<JoinHandle<()>>>,
}

/// An address of this machine where nobody listens.
pub fn free_address() -> io::Result<SocketAddr> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let ports = u64::from(PORTS.end - PORTS.start);
    for _ in 0..ports {
        // Processes side by side begin in different places.
        let turn = NEXT.fetch_add(1, Ordering::Relaxed) + u64::from(std::process::id()) * 131;
        let addr = SocketAddr::from(([127, 0, 0, 1], PORTS.start + (turn % ports) as u16));
        if std::net::TcpListener::bind(addr).is_ok() {
            return Ok(addr);
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "no free port on loopback"))
}

impl Proxies {
    /// Listens for connections of `from` to `to`, which serves at `target`; where.
    pub async fn listen(&self, (from, to): Link, target: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(free_address()?).await?;
        let at = listener.local_addr()?;
        let (links, met) = (self.links.clone(), self.met.clone());
        let listening = tokio::spawn(accept((from, to), (at, target), Some(listener), links, met));
        self.listening.lock().unwrap_or_else(|p| p.into_inner()).push(listening);
        Ok(at)
    }

    /// Holds what `from` sends to `to`, until [`Proxies::release_all`].
    pub fn hold(&self, link: Link) {
        self.links.send_modify(|links| {
            links.held.insert(link);
        });
    }

    pub fn release_all(&self) {
        self.links.send_modify(|links| links.held.clear());
    }

    /// Cuts the connections of `from` to `to` and refuses new ones, or lets them in again.
    pub fn refuse(&self, link: Link, refused: bool) {
        self.links.send_modify(|links| {
            let _changed = if refused { links.refused.insert(link) } else { links.refused.remove(&link) };
        });
    }

    /// How often something has run into what is held: proof that a cut took place.
    pub fn met(&self) -> u64 {
        self.met.load(Ordering::SeqCst)
    }
}

impl Drop for Proxies {
    fn drop(&mut self) {
        self.listening.lock().unwrap_or_else(|p| p.into_inner()).iter().for_each(JoinHandle::abort);
    }
}

async fn accept(
    link: Link,
    (at, target): (SocketAddr, SocketAddr),
    mut listener: Option<TcpListener>,
    links: Arc<watch::Sender<Links>>,
    met: Arc<AtomicU64>,
) {
    let mut seen = links.subscribe();
    // Connections end with the proxy.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        if seen.borrow_and_update().refused.contains(&link) {
            // Nobody listens: the system itself refuses.
            listener = None;
            if seen.changed().await.is_err() {
                return;
            }
            continue;
        }
        let Some(open) = &listener else {
            listener = TcpListener::bind(at).await.ok();
            if listener.is_none() {
                tokio::time::sleep(LISTEN_AGAIN).await;
            }
            continue;
        };
        crate::select! {
            changed = seen.changed() => if changed.is_err() { return },
            accepted = open.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                connections.spawn(carry(link, stream, target, links.subscribe(), met.clone()));
                while connections.try_join_next().is_some() {}
            }
        }
    }
}

/// One connection, until an end of it closes or breaks, or it is cut.
async fn carry(
    (from, to): Link,
    mut near: TcpStream,
    target: SocketAddr,
    mut links: watch::Receiver<Links>,
    met: Arc<AtomicU64>,
) {
    let mut watching = links.clone();
    // A connection that is dropped is reset: nobody may take that for a good end.
    let _ = (near.set_nodelay(true), near.set_zero_linger());
    let carried = async {
        // A handshake needs both directions.
        let through = |links: &Links| !links.held.contains(&(from, to)) && !links.held.contains(&(to, from));
        if !through(&links.borrow()) {
            met.fetch_add(1, Ordering::SeqCst);
        }
        links.wait_for(through).await.map_err(io::Error::other)?;
        let mut far = TcpStream::connect(target).await?;
        far.set_nodelay(true)?;
        far.set_zero_linger()?;
        let ((near_read, near_write), (far_read, far_write)) = (near.split(), far.split());
        let there = pump((from, to), near_read, far_write, links.clone(), &met);
        let back = pump((to, from), far_read, near_write, links, &met);
        tokio::try_join!(there, back)
    };
    crate::select! {
        _ = watching.wait_for(|links| links.refused.contains(&(from, to))) => {}
        _ = carried => {}
    }
}

async fn pump(
    link: Link,
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut links: watch::Receiver<Links>,
    met: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        if links.borrow().held.contains(&link) {
            met.fetch_add(1, Ordering::SeqCst);
            links.wait_for(|links| !links.held.contains(&link)).await.map_err(io::Error::other)?;
        }
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    const LINK: Link = (1, 2);
    const BACK: Link = (2, 1);
    /// Long enough for a loopback to carry a byte, so that one which did not come was held.
    const WHILE: Duration = Duration::from_millis(100);

    /// Answers each byte with the same byte.
    async fn echo() -> io::Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let at = listener.local_addr()?;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.into_split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        Ok(at)
    }

    fn with_proxy<F: Future<Output = io::Result<()>>>(
        test: impl FnOnce(Proxies, SocketAddr) -> F,
    ) -> io::Result<()> {
        crate::task::run_test(async {
            let proxies = Proxies::default();
            let at = proxies.listen(LINK, echo().await?).await?;
            test(proxies, at).await
        })?
    }

    async fn said(stream: &mut TcpStream, byte: u8) -> io::Result<u8> {
        stream.write_u8(byte).await?;
        stream.read_u8().await
    }

    #[test]
    fn bytes_pass_and_what_is_held_in_either_direction_arrives_later() -> io::Result<()> {
        with_proxy(async |proxies, at| {
            let mut stream = TcpStream::connect(at).await?;
            assert_eq!(said(&mut stream, 1).await?, 1);
            for (turn, link) in [LINK, BACK].into_iter().enumerate() {
                let met = proxies.met();
                proxies.hold(link);
                let byte = 2 + turn as u8;
                assert!(tokio::time::timeout(WHILE, said(&mut stream, byte)).await.is_err(), "{link:?}");
                assert!(proxies.met() > met, "a byte ran into it");
                proxies.release_all();
                assert_eq!(stream.read_u8().await?, byte);
            }
            Ok(())
        })
    }

    #[test]
    fn a_held_link_accepts_and_forwards_nothing_until_it_is_released() -> io::Result<()> {
        with_proxy(async |proxies, at| {
            proxies.hold(BACK);
            let mut stream = TcpStream::connect(at).await?;
            assert!(tokio::time::timeout(WHILE, said(&mut stream, 1)).await.is_err());
            assert!(proxies.met() > 0);
            proxies.release_all();
            assert_eq!(stream.read_u8().await?, 1);
            Ok(())
        })
    }

    #[test]
    fn a_refused_link_breaks_its_connections_refuses_new_ones_and_comes_back_at_its_address() -> io::Result<()>
    {
        with_proxy(async |proxies, at| {
            let mut stream = TcpStream::connect(at).await?;
            assert_eq!(said(&mut stream, 1).await?, 1);
            proxies.refuse(LINK, true);
            let broken = stream.read_u8().await.err().map(|e| e.kind());
            assert!(matches!(broken, Some(ErrorKind::ConnectionReset)), "{broken:?}");
            let mut refused = TcpStream::connect(at).await;
            // One that arrives as the listener goes is reset: it was neither taken nor refused.
            while refused.as_ref().map_or_else(|e| e.kind() == ErrorKind::ConnectionReset, |_| true) {
                refused = TcpStream::connect(at).await;
            }
            assert_eq!(refused.err().map(|e| e.kind()), Some(ErrorKind::ConnectionRefused));
            proxies.refuse(LINK, false);
            let mut again = TcpStream::connect(at).await;
            while again.is_err() {
                tokio::time::sleep(LISTEN_AGAIN).await;
                again = TcpStream::connect(at).await;
            }
            assert_eq!(said(&mut again?, 2).await?, 2);
            Ok(())
        })
    }
}
