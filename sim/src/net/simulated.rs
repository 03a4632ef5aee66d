//! Simulation: HTTP requests over modelled links.
//!
//! A call is a request message, then response frames in order, each delayed by the link from its sender to its receiver (see
//! [`crate::world::Links`]). A [`Channel`] behaves as one TCP connection: a handshake before the first call, bytes in order per
//! direction, and a memory of which incarnation of the peer it reached, so that a restarted peer breaks it.
//! Dropping a call cancels its handler.

use super::Routes;
use crate::time::{Duration, sleep};
use crate::world::{self, Arrival, NodeIndex, World};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::sync::{mpsc, oneshot};
use tonic::body::Body;
use tower::Service;

/// How long a caller waits on a silent peer before it gives the connection up.
const KEEPALIVE: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A longer request is sent in pieces, each when the link has carried the one before it: what others send goes in between, as with HTTP/2's frames.
const PIECE_BYTES: usize = 16 << 10;

/// What arrives at a listening node.
pub struct Incoming {
    request: http::Request<Body>,
    reply: oneshot::Sender<http::Response<Frames>>,
}

/// A client's end of a simulated connection.
#[derive(Clone)]
pub struct Channel {
    addr: Arc<str>,
    connection: Arc<Mutex<Connection>>,
}

#[derive(Default)]
struct Connection {
    /// The incarnation of the listener that the handshake reached.
    listener: Option<u64>,
    /// When the last byte towards the peer arrives, in global nanoseconds: later ones queue behind it.
    last_arrival_ns: u64,
}

pub fn connect(addr: &str) -> io::Result<Channel> {
    if !addr.contains(':') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{addr} is no host:port")));
    }
    Ok(Channel { addr: addr.into(), connection: Arc::default() })
}

/// Sends a request on a connection of its own; the status of its answer.
pub async fn send(addr: &str, request: http::Request<http_body_util::Full<Bytes>>) -> io::Result<u16> {
    let answer = connect(addr)?.exchange(request.map(Body::new)).await;
    Ok(answer.map_err(|status| io::Error::other(status.message().to_string()))?.status().as_u16())
}

fn broken(message: String) -> tonic::Status {
    tonic::Status::unavailable(message)
}

impl Channel {
    async fn exchange(self, request: http::Request<Body>) -> Result<http::Response<Body>, tonic::Status> {
        let from = world::current_node();
        let to = world::resolve(&self.addr).ok_or_else(|| broken(format!("{}: no such host", self.addr)))?;
        let known = self.connection.lock().map_or(None, |c| c.listener);
        if known.is_none() {
            let handshake = async {
                wait(world::transmit(from, to, 64, 0)).await?;
                // A machine without power does not say so.
                if !world::powered(to) {
                    std::future::pending::<()>().await;
                }
                wait(world::transmit(to, from, 64, 0)).await
            };
            match crate::time::timeout(CONNECT_TIMEOUT, handshake).await {
                Ok(Ok(())) if world::powered(to) => {}
                _ => return Err(broken(format!("{}: connect timed out", self.addr))),
            }
        }
        let Some((incarnation, listener)) = world::listener(&self.addr) else {
            self.reset();
            return if world::powered(to) {
                Err(broken(format!("{}: connection refused", self.addr)))
            } else {
                sleep(KEEPALIVE).await;
                Err(broken(format!("{}: peer is silent", self.addr)))
            };
        };
        if known.is_some_and(|k| k != incarnation) {
            self.reset();
            sleep(world::base_latency(from, to) * 2).await;
            return Err(broken(format!("{}: connection reset by peer", self.addr)));
        }
        let (request, (bytes, hash)) = gather(request).await?;
        let method = request.uri().path().to_string();
        let mut left = bytes;
        let arrival = loop {
            let piece = left.min(PIECE_BYTES);
            left -= piece;
            let arrival = {
                let mut connection = self.connection.lock().map_err(|_| broken("poisoned".into()))?;
                connection.listener = Some(incarnation);
                let arrival = world::transmit(from, to, piece, connection.last_arrival_ns);
                if let Arrival::At(ns) = arrival {
                    connection.last_arrival_ns = ns;
                }
                arrival
            };
            match arrival {
                _ if left == 0 => break arrival,
                Arrival::At(_) => world::sent_off(from, to).await,
                Arrival::Stalled { .. } => {
                    if let Err(error) = wait(arrival).await {
                        self.reset();
                        return Err(error);
                    }
                }
            }
        };
        tell(from, to, (&method, false), (bytes, hash), arrival);
        if let Err(error) = wait(arrival).await {
            self.reset();
            return Err(error);
        }
        let (reply, response) = oneshot::channel();
        if listener.send(Incoming { request, reply }).is_err() {
            return Err(self.lost(to).await);
        }
        let response = match response.await {
            Ok(response) => response,
            Err(_) => return Err(self.lost(to).await),
        };
        let (parts, frames) = response.into_parts();
        let arrival = world::transmit(to, from, frames.head_bytes, 0);
        tell(to, from, (&method, true), (frames.head_bytes, 0), arrival);
        if let Err(error) = wait(arrival).await {
            self.reset();
            return Err(error);
        }
        Ok(http::Response::from_parts(
            parts,
            Body::new(Received { frames, to, from, current: None, silent: None }),
        ))
    }

    /// The peer's end is gone: at once if its machine lives to say so, else only after a long silence.
    async fn lost(&self, to: NodeIndex) -> tonic::Status {
        let text = lost_text(&self.addr, to);
        self.reset();
        if !world::powered(to) {
            sleep(KEEPALIVE).await;
        }
        broken(text)
    }

    fn reset(&self) {
        if let Ok(mut connection) = self.connection.lock() {
            *connection = Connection::default();
        }
    }
}

fn lost_text(addr: &str, to: NodeIndex) -> String {
    if world::powered(to) {
        format!("{addr}: connection reset by peer")
    } else {
        format!("{addr}: peer is silent")
    }
}

async fn wait(arrival: Arrival) -> Result<(), tonic::Status> {
    match world::arrive(arrival).await {
        true => Ok(()),
        false => Err(broken("link is cut: connection timed out".into())),
    }
}

/// Notes a message for the trace.
fn tell(
    from: NodeIndex,
    to: NodeIndex,
    (method, answer): (&str, bool),
    (bytes, hash): (usize, u64),
    arrival: Arrival,
) {
    world::sent(from, || world::What::Message {
        to,
        method: method.to_string(),
        answer,
        bytes: bytes as u64,
        hash,
        arrives_ns: match arrival {
            Arrival::At(ns) => Some(ns),
            Arrival::Stalled { .. } => None,
        },
    });
}

/// Reads the whole request body; its bytes on the link and their hash. Our clients send unary requests and bounded streams of chunks, whose last frame is ready soon.
async fn gather(request: http::Request<Body>) -> Result<(http::Request<Body>, (usize, u64)), tonic::Status> {
    let (parts, mut body) = request.into_parts();
    let mut bytes = Vec::new();
    while let Some(frame) = next_frame(&mut body).await {
        if let Ok(data) = frame?.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    world::hash_message(parts.uri.path().as_bytes());
    world::hash_message(&bytes);
    let (size, mut hash) = (bytes.len() + 64, crate::trace::Hash::default());
    hash.bytes(&bytes);
    let body = Body::new(http_body_util::Full::new(Bytes::from(bytes)));
    Ok((http::Request::from_parts(parts, body), (size, hash.value())))
}

async fn next_frame(body: &mut Body) -> Option<Result<Frame<Bytes>, tonic::Status>> {
    std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Body>;
    type Error = tonic::Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.clone().exchange(request))
    }
}

/// Response frames on their way: unary answers travel with the head, streams follow one frame at a time (window of 32).
pub struct Frames {
    head_bytes: usize,
    ready: std::collections::VecDeque<Result<Frame<Bytes>, tonic::Status>>,
    rest: Option<mpsc::Receiver<Result<Frame<Bytes>, tonic::Status>>>,
}

type Delivery = Pin<Box<dyn Future<Output = Option<Result<Frame<Bytes>, tonic::Status>>> + Send>>;

/// The client's view of the response body. Frames that came with the head are there; each later one crosses the link.
struct Received {
    frames: Frames,
    to: NodeIndex,
    from: NodeIndex,
    current: Option<Delivery>,
    silent: Option<crate::time::Sleep>,
}

impl http_body::Body for Received {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        let this = &mut *self;
        if let Some(frame) = this.frames.ready.pop_front() {
            return Poll::Ready(Some(frame));
        }
        loop {
            if let Some(delivery) = &mut this.current {
                let Poll::Ready(frame) = delivery.as_mut().poll(cx) else { return Poll::Pending };
                this.current = None;
                return Poll::Ready(frame);
            }
            if let Some(silence) = &mut this.silent {
                let Poll::Ready(()) = Pin::new(silence).poll(cx) else { return Poll::Pending };
                (this.silent, this.frames.rest) = (None, None);
                return Poll::Ready(Some(Err(broken("peer is silent".into()))));
            }
            let Some(rest) = &mut this.frames.rest else { return Poll::Ready(None) };
            let Poll::Ready(next) = rest.poll_recv(cx) else { return Poll::Pending };
            let Some(frame) = next else {
                // A complete body ends with trailers, after which the sender closes on purpose.
                this.frames.rest = None;
                return Poll::Ready(None);
            };
            if frame.is_err() && !world::powered(this.to) {
                this.silent = Some(sleep(KEEPALIVE));
                continue;
            }
            let bytes = frame.as_ref().ok().and_then(|f| f.data_ref()).map_or(64, |d| d.len() + 16);
            let arrival = world::transmit(this.to, this.from, bytes, 0);
            this.current = Some(Box::pin(async move {
                match wait(arrival).await {
                    Ok(()) => Some(frame),
                    Err(error) => Some(Err(error)),
                }
            }));
        }
    }
}

pub async fn serve(
    addr: &str,
    routes: Routes,
    ready: impl FnOnce(String),
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let addr = match addr.strip_prefix("127.0.0.1:") {
        Some(port) => format!("{}:{port}", World::current().node_name(world::current_node())),
        None => addr.to_string(),
    };
    let (registration, mut calls) = world::listen(&addr)?;
    ready(addr);
    let mut shutdown = std::pin::pin!(shutdown);
    // Each call under way holds one end.
    let (under_way, mut ended) = mpsc::channel::<()>(1);
    loop {
        crate::select! {
            () = &mut shutdown => break,
            call = calls.recv() => {
                let Some(call) = call else { break };
                let (routes, under_way) = (routes.clone(), under_way.clone());
                crate::task::spawn(async move {
                    handle(call, routes).await;
                    drop(under_way);
                });
            }
        }
    }
    // Nobody else is let in; who is in already gets an answer.
    drop((registration, under_way));
    ended.recv().await;
    Ok(())
}

async fn handle(call: Incoming, mut routes: Routes) {
    let Incoming { request, mut reply } = call;
    let response = crate::select! {
        () = reply.closed() => return,
        response = async {
            crate::cpu::work(crate::cpu::cost::RPC).await;
            routes.call(request).await
        } => response,
    };
    let Ok(response) = response;
    let (parts, mut body) = response.into_parts();
    let mut frames = Frames { head_bytes: 128, ready: Default::default(), rest: None };
    // Whatever is ready now travels with the head: a unary answer is one message on the link.
    let ended = loop {
        match futures::FutureExt::now_or_never(next_frame(&mut body)) {
            Some(Some(frame)) => {
                frames.head_bytes += hash_frame(&frame);
                frames.ready.push_back(frame);
                if frames.ready.len() >= 32 {
                    break false;
                }
            }
            Some(None) => break true,
            None => break false,
        }
    };
    if ended {
        let _ = reply.send(http::Response::from_parts(parts, frames));
        return;
    }
    let (send, receive) = mpsc::channel(32);
    frames.rest = Some(receive);
    if reply.send(http::Response::from_parts(parts, frames)).is_err() {
        return;
    }
    // If this node dies here, the guard tells the client that the body was cut short.
    let mut guard = CutShort(Some(send.clone()));
    loop {
        let frame = crate::select! {
            () = send.closed() => break,
            frame = next_frame(&mut body) => frame,
        };
        let Some(frame) = frame else { break };
        hash_frame(&frame);
        if send.send(frame).await.is_err() {
            break;
        }
    }
    guard.0 = None;
}

fn hash_frame(frame: &Result<Frame<Bytes>, tonic::Status>) -> usize {
    match frame {
        Ok(frame) => match frame.data_ref() {
            Some(data) => {
                world::hash_message(data);
                data.len()
            }
            None => 32,
        },
        Err(status) => {
            world::hash_message(status.message().as_bytes());
            32
        }
    }
}

struct CutShort(Option<mpsc::Sender<Result<Frame<Bytes>, tonic::Status>>>);

impl Drop for CutShort {
    fn drop(&mut self) {
        if let Some(send) = self.0.take() {
            let _ = send.try_send(Err(broken("connection reset by peer".into())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{ClockModel, LinkModel, NodeOptions};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Posts so many bytes to the server on a connection of its own; the milliseconds until it has answered.
    async fn post(bytes: usize) -> u64 {
        let body = http_body_util::Full::new(Bytes::from(vec![7; bytes]));
        let asked = crate::time::Instant::now();
        let request = http::Request::builder().method("POST").uri("/nothing").body(body);
        if let Ok(request) = request {
            let _ = send("server:80", request).await;
        }
        asked.elapsed().as_millis() as u64
    }

    #[test]
    fn a_small_request_does_not_wait_for_all_of_a_large_one_on_a_slow_link() {
        let took = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let noted = took.clone();
        world::run(1, false, |world| async move {
            world.links().set_default(LinkModel { bandwidth: 100_000, ..LinkModel::default() });
            let node = |name: &str| NodeOptions {
                name: name.into(),
                region: "here".into(),
                cores: 1,
                slowdown: 1,
                clock: ClockModel::default(),
            };
            world.add_node(node("server"), || async {
                let _ = serve("server:80", Routes::default(), |_| (), std::future::pending()).await;
            });
            world.add_node(node("client"), move || {
                let noted = noted.clone();
                async move {
                    sleep(Duration::from_millis(100)).await;
                    let large = noted.clone();
                    crate::task::spawn(async move {
                        large[0].store(post(1_000_000).await, Ordering::SeqCst);
                    });
                    sleep(Duration::from_secs(1)).await;
                    noted[1].store(post(100).await, Ordering::SeqCst);
                }
            });
            sleep(Duration::from_secs(20)).await;
        });
        let [large, small] = [&took[0], &took[1]].map(|took| took.load(Ordering::SeqCst));
        assert!((10_000..11_000).contains(&large), "{large} ms for 1 MB at 100 kB/s");
        assert!((1..1500).contains(&small), "{small} ms for 100 bytes beside it");
    }
}
