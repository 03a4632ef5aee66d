//! The network: one way to call a node and one way to be called.
//!
//! Both worlds carry the same HTTP requests of the same generated gRPC services through the same tower layers. In
//! production [`connect`] and [`serve`] are tonic's HTTP/2 transport; in simulation they are a transport of ours over
//! link models (`simulated`). What lives in tonic's own transport, and so would be missing in simulation
//! (deadlines, concurrency limits, authentication), is therefore done by layers inside the [`Routes`] given to [`serve`].
//!
//! What can go wrong, and what a caller sees:
//!
//! | what | a caller sees |
//! |---|---|
//! | the peer's process is dead, its machine lives | connection refused; calls under way break at once |
//! | the peer's machine lost power | silence, until its own deadline or the keepalive; then UNAVAILABLE |
//! | a cut link, one way or both | silence; TCP retransmits, so a short cut is only a delay |
//! | the peer restarted behind an idle connection | the first call on it breaks, the next one connects anew |
//! | lost packets | delay, never a lost or reordered byte within a call |
//!
//! A call that broke may have been executed: only the caller's idempotency key makes a retry safe.

use std::future::Future;
use std::io;
pub use tonic::service::Routes;

#[cfg(not(madsim))]
pub mod proxy;
#[cfg(not(madsim))]
mod real;
#[cfg(not(madsim))]
pub use real::Channel;
#[cfg(madsim)]
pub mod simulated;
#[cfg(madsim)]
pub use simulated::Channel;

/// A lazily connected, multiplexed channel to `addr` (`host:port`). Cheap to clone. Errors show at the first call.
pub fn connect(addr: &str) -> io::Result<Channel> {
    #[cfg(not(madsim))]
    return real::connect(addr);
    #[cfg(madsim)]
    simulated::connect(addr)
}

/// Serves `routes` at `addr` until `shutdown` completes or the node dies. `AddrInUse` if somebody else listens there.
/// `ready` is called with the bound address once calls are accepted.
pub async fn serve(
    addr: &str,
    routes: Routes,
    ready: impl FnOnce(String),
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    #[cfg(not(madsim))]
    return real::serve(addr, routes, ready, shutdown).await;
    #[cfg(madsim)]
    simulated::serve(addr, routes, ready, shutdown).await
}

/// Posts JSON to an HTTP/1.1 server at `addr`, on a connection of its own; the status of the answer. `key`: what a server knows a repeated post by.
pub async fn post(addr: &str, path: &str, key: &str, body: bytes::Bytes) -> io::Result<u16> {
    let request = http::Request::post(path)
        .header(http::header::HOST, addr)
        .header(http::header::CONTENT_TYPE, "application/json")
        .header("idempotency-key", key)
        .body(http_body_util::Full::new(body))
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    #[cfg(not(madsim))]
    return real::send(addr, request).await;
    #[cfg(madsim)]
    simulated::send(addr, request).await
}
