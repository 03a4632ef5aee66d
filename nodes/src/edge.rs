//! The edge of every node: authentication, deadlines and concurrency limits, as one layer around all services.
//!
//! The same layer runs in both worlds. A call passes it once: it learns who is calling (never from the message),
//! is turned away when too many are under way, and ends at its deadline with everything that it started.

use crate::auth::KeyRing;
use crate::error::Error;
use crate::peers::SECRET_HEADER;
use axum::body::Body;
use http::{Request, Response};
use sim::sync::Semaphore;
use sim::time::{self, Duration, Instant};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tonic::Status;
use tower::{Layer, Service};

/// Deadline of a call that names none.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(10);
/// Public calls under way at once; more are turned away with OVERLOADED.
pub const CALLS_MAX: usize = 1024;

/// When the caller stops waiting; in a request's extensions.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(pub Instant);

#[derive(Clone)]
pub struct EdgeLayer {
    keys: KeyRing,
    secret: Arc<str>,
    places: Arc<Semaphore>,
}

impl EdgeLayer {
    pub fn new(keys: KeyRing, cluster_secret: &str) -> EdgeLayer {
        EdgeLayer { keys, secret: cluster_secret.into(), places: Arc::new(Semaphore::new(CALLS_MAX)) }
    }
}

impl<S> Layer<S> for EdgeLayer {
    type Service = Edge<S>;
    fn layer(&self, inner: S) -> Edge<S> {
        Edge { layer: self.clone(), inner }
    }
}

#[derive(Clone)]
pub struct Edge<S> {
    layer: EdgeLayer,
    inner: S,
}

fn refused(status: Status) -> Response<Body> {
    status.into_http()
}

/// The `grpc-timeout` header: up to 8 digits and a unit.
fn deadline_of(headers: &http::HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount.saturating_mul(3600)),
        "M" => Duration::from_secs(amount.saturating_mul(60)),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

impl EdgeLayer {
    /// Puts the caller into the request, or says why not.
    fn authenticate(&self, request: &mut Request<Body>) -> Result<bool, Error> {
        let path = request.uri().path();
        if path.starts_with("/loci.internal.") {
            let given = request.headers().get(SECRET_HEADER).map_or(&[][..], |v| v.as_bytes());
            // Hashes compare in constant time.
            if blake3::hash(given) != blake3::hash(self.secret.as_bytes()) {
                return Err(Error::Unauthenticated(
                    "not a node of this cluster: cluster_secret differs".into(),
                ));
            }
            return Ok(false);
        }
        if path.starts_with("/grpc.health.") || path.starts_with("/grpc.reflection.") {
            return Ok(false);
        }
        // Which region to talk to is no secret, and whoever asks may be on its way from one that is gone.
        if path.starts_with("/loci.v1.DirectorService/") {
            return Ok(true);
        }
        let header = request.headers().get(http::header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let key = header.and_then(|h| h.strip_prefix("Bearer ")).ok_or_else(|| {
            Error::Unauthenticated(
                "no API key: send metadata 'authorization: Bearer KEY' (see `loci keys add`)".into(),
            )
        })?;
        let caller = self.keys.check(key).ok_or_else(|| {
            Error::Unauthenticated("unknown or revoked API key (see `loci keys list`)".into())
        })?;
        request.extensions_mut().insert(caller);
        Ok(true)
    }
}

impl<S> Service<Request<Body>> for Edge<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let public = match self.layer.authenticate(&mut request) {
            Ok(public) => public,
            Err(error) => return Box::pin(async { Ok(refused(error.into())) }),
        };
        let place = if public {
            match self.layer.places.clone().try_acquire_owned() {
                Ok(place) => Some(place),
                Err(_) => {
                    let error = Error::Overloaded(format!("{CALLS_MAX} calls are under way"));
                    return Box::pin(async { Ok(refused(error.into())) });
                }
            }
        } else {
            None
        };
        let allowed = deadline_of(request.headers()).unwrap_or(DEADLINE_DEFAULT);
        request.extensions_mut().insert(Deadline(Instant::now() + allowed));
        let call = self.inner.call(request);
        Box::pin(async move {
            let answer = time::timeout(allowed, call).await;
            drop(place);
            match answer {
                Ok(answer) => answer,
                Err(_) => Ok(refused(Status::deadline_exceeded(
                    "the deadline passed; a write may have been applied",
                ))),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_in_every_unit() {
        let of = |text: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().map_err(|_| "header")?);
            Ok::<_, &str>(deadline_of(&headers))
        };
        assert_eq!(of("250m"), Ok(Some(Duration::from_millis(250))));
        assert_eq!(of("3S"), Ok(Some(Duration::from_secs(3))));
        assert_eq!(of("2H"), Ok(Some(Duration::from_secs(7200))));
        for bad in ["", "S", "xS", "12", "3é"] {
            assert_eq!(of(bad), Ok(None), "{bad:?}");
        }
    }
}
