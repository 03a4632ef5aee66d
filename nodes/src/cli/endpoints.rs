//! Several gateways as one: a call goes to the one that answered last, and to the next one when that does not.
//!
//! A call that broke may have been carried out. It is sent to the next gateway with the same bytes, so with the same idempotency key: commands that write
//! give each write one ([`super::client::Client::write_key`]).

use bytes::Bytes;
use http::{Request, Response};
use sim::net::Channel;
use sim::time::{Duration, timeout};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tonic::body::Body;
use tower::{Service, ServiceExt};

type Problem = Box<dyn std::error::Error + Send + Sync>;
type Answer = Result<Response<Body>, Problem>;

#[derive(Clone)]
pub struct Endpoints {
    channels: Arc<Vec<Channel>>,
    /// The one that answered last.
    first: Arc<AtomicUsize>,
    /// How long all of them together may take to begin an answer.
    within: Duration,
}

impl Endpoints {
    /// `addrs`: at least one.
    pub fn new(addrs: &[String], within: Duration) -> std::io::Result<Endpoints> {
        let channels = addrs.iter().map(|addr| sim::net::connect(addr)).collect::<Result<Vec<_>, _>>()?;
        Ok(Endpoints { channels: Arc::new(channels), first: Arc::default(), within })
    }

    pub fn are_several(&self) -> bool {
        self.channels.len() > 1
    }

    /// Those that are there, by themselves.
    pub fn each(&self) -> &[Channel] {
        &self.channels
    }

    async fn ask(self, request: Request<Body>) -> Answer {
        let (count, first) = (self.channels.len(), self.first.load(Ordering::Relaxed));
        let (parts, body) = request.into_parts();
        let body = gather(body).await?;
        let mut last: Answer = Err("no gateway is named".into());
        for turn in 0..count {
            let at = (first + turn) % count;
            let request = Request::from_parts(parts.clone(), Body::new(axum::body::Body::from(body.clone())));
            let asked = self.channels[at].clone().oneshot(request);
            // The last one may take as long as the caller's deadline allows.
            let share = if turn + 1 < count { self.within / count as u32 } else { self.within };
            last = match timeout(share, asked).await {
                Ok(Ok(response)) if is_unavailable(&response) => Ok(response),
                Ok(Ok(response)) => {
                    self.first.store(at, Ordering::Relaxed);
                    return Ok(response);
                }
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(tonic::Status::unavailable(format!("no answer within {share:.0?}")).into()),
            };
        }
        last
    }
}

/// Whether a gateway says that it cannot answer now; another one may.
fn is_unavailable(response: &Response<Body>) -> bool {
    let code = response.headers().get("grpc-status").and_then(|value| value.to_str().ok());
    code.and_then(|code| code.parse().ok()) == Some(tonic::Code::Unavailable as i32)
}

/// The whole request. Ours are unary, so their end is there.
async fn gather(mut body: Body) -> Result<Bytes, Problem> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| http_body::Body::poll_frame(Pin::new(&mut body), cx)).await {
        if let Ok(data) = frame?.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes.into())
}

impl Service<Request<Body>> for Endpoints {
    type Response = Response<Body>;
    type Error = Problem;
    type Future = Pin<Box<dyn Future<Output = Answer> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Problem>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().ask(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::routing::post;
    use sim::net::Routes;
    use std::sync::Mutex;

    #[test]
    fn a_write_goes_with_the_same_bytes_to_the_gateway_that_takes_it() -> Result<(), Problem> {
        sim::task::run_test(async {
            let seen = Arc::<Mutex<Vec<Bytes>>>::default();
            let noted = seen.clone();
            // Unavailable at first.
            let take = move |body: Bytes| async move {
                let mut seen = noted.lock().unwrap_or_else(|p| p.into_inner());
                seen.push(body);
                [("grpc-status", if seen.len() == 1 { "14" } else { "0" })]
            };
            let routes = Routes::from(Router::new().route("/write", post(take)));
            let (told, bound) = sim::sync::oneshot::channel();
            let ready = move |addr: String| drop(told.send(addr));
            let serving = sim::task::spawn(async move {
                sim::net::serve("127.0.0.1:0", routes, ready, std::future::pending()).await
            });
            let (absent, there) = ("127.0.0.1:1".to_string(), bound.await?);
            let mut endpoints = Endpoints::new(&[absent, there.clone(), there], Duration::from_secs(10))?;
            for _ in 0..2 {
                let body = Body::new(axum::body::Body::from("a key and a memory"));
                let answer = endpoints.call(Request::post("http://any/write").body(body)?).await?;
                assert!(answer.status().is_success() && !is_unavailable(&answer));
            }
            serving.abort();
            // The second call began with who took the first one.
            let seen = seen.lock().unwrap_or_else(|p| p.into_inner()).clone();
            assert_eq!(seen, vec![Bytes::from("a key and a memory"); 3]);
            assert_eq!(endpoints.first.load(Ordering::Relaxed), 2);
            Ok(())
        })?
    }
}
