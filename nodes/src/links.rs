//! The link to a peer: the ledgers' messages of all groups share its calls, so that a hundred shards do not cost a hundred heartbeats.
//!
//! ```text
//! group 0 ─┐                                              ┌─► group 0 ─┐
//! group 1 ─┼─► waiting ─► one call of many messages ──────┼─► group 1 ─┼─► answers, each when it is ready
//! group 2 ─┘   (all that wait when a call begins)         └─► group 2 ─┘   (those ready together travel together)
//! ```
//!
//! A message that comes while few calls are under way leaves at once, together with what others send in the same moment; under load
//! those that wait share the next call. All leaders of a node send their heartbeats in the same moments ([`Links::next_beat`]).
//!
//! What can go wrong:
//! - *One group is slow.* Its answer comes later than those of the others in the same call. Its call is one of [`CALLS_MAX`] until the
//!   message's time is up.
//! - *The peer is dead, silent or cut off.* Each message fails when its own time is up, or when the call breaks. openraft sends again.
//! - *The peer takes calls more slowly than messages come.* What has waited until its time was up is not sent.
//! - *A sender gives up.* Its message may have arrived: openraft's messages may come twice.

use crate::peers::Peers;
use crate::proto::internal::{Answer, Answers, Message, Messages};
use bytes::Bytes;
use sim::sync::oneshot;
use sim::time::{Duration, Instant};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use tonic::Status;

/// Calls to one peer under way at once.
const CALLS_MAX: usize = 4;
/// A call takes messages until their bodies have so many bytes.
const CALL_BYTES: usize = 4 << 20;

/// The links of this node. Cheap to clone.
#[derive(Clone)]
pub struct Links {
    began: Instant,
    links: Arc<Mutex<BTreeMap<String, Arc<Mutex<Link>>>>>,
}

#[derive(Default)]
struct Link {
    waiting: Vec<Waiting>,
    calls: usize,
}

struct Waiting {
    message: Message,
    until: Instant,
    answer: oneshot::Sender<Result<Bytes, String>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(|p| p.into_inner())
}

impl Default for Links {
    fn default() -> Links {
        Links { began: Instant::now(), links: Arc::default() }
    }
}

impl Links {
    /// When heartbeats with this interval are due next: at the same moment for all who ask.
    pub fn next_beat(&self, interval: Duration) -> Instant {
        let interval = interval.max(Duration::from_millis(1));
        let beats = self.began.elapsed().as_nanos() / interval.as_nanos() + 1;
        self.began + interval * beats.min(u32::MAX as u128) as u32
    }
}

impl Peers {
    /// Sends a message to the group at `addr`; its answer, or why there is none.
    pub async fn tell(&self, addr: &str, message: Message, ttl: Duration) -> Result<Bytes, String> {
        let link = lock(&self.links.links).entry(addr.to_string()).or_default().clone();
        let (answer, answered) = oneshot::channel();
        let begin = {
            let mut link = lock(&link);
            link.waiting.push(Waiting { message, until: Instant::now() + ttl, answer });
            let begin = link.calls < CALLS_MAX;
            link.calls += begin as usize;
            begin
        };
        if begin {
            sim::task::spawn(self.clone().carry(addr.to_string(), link));
        }
        match sim::time::timeout(ttl, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(format!("{addr} broke the call off")),
            Err(_) => Err(format!("{addr} did not answer within {ttl:?}")),
        }
    }

    /// Makes calls while messages wait.
    async fn carry(self, addr: String, link: Arc<Mutex<Link>>) {
        loop {
            // Whoever is about to send in this moment joins.
            sim::task::yield_now().await;
            let sent = {
                let mut link = lock(&link);
                let sent = take(&mut link.waiting);
                if sent.is_empty() {
                    link.calls -= 1;
                    return;
                }
                sent
            };
            self.call(&addr, sent).await;
        }
    }

    /// One call. Who is left without an answer learns why.
    async fn call(&self, addr: &str, sent: Vec<Waiting>) {
        let until = sent.iter().map(|waiting| waiting.until).max().unwrap_or_else(Instant::now);
        let (messages, mut senders): (Vec<_>, Vec<_>) =
            sent.into_iter().map(|waiting| (waiting.message, Some(waiting.answer))).unzip();
        let ttl = until - Instant::now();
        let call = async {
            let mut client = self.client(addr).map_err(|e| Status::unavailable(e.to_string()))?;
            let mut answers = client.exchange(self.request(Messages { messages }, ttl)).await?.into_inner();
            while let Some(Answers { answers }) = answers.message().await? {
                for Answer { at, body, refused } in answers {
                    let Some(sender) = senders.get_mut(at as usize).and_then(Option::take) else { continue };
                    // Who has given up does not listen.
                    let _ = sender.send(if refused.is_empty() { Ok(body) } else { Err(refused) });
                }
            }
            Ok::<_, Status>(())
        };
        let why = match sim::time::timeout(ttl, call).await {
            Ok(Ok(())) => format!("{addr} left the message out"),
            Ok(Err(status)) => status.message().to_string(),
            Err(_) => format!("{addr} did not answer in time"),
        };
        for sender in senders.into_iter().flatten() {
            let _ = sender.send(Err(why.clone()));
        }
    }
}

/// What the next call carries, oldest first; whoever gave up is left out.
fn take(waiting: &mut Vec<Waiting>) -> Vec<Waiting> {
    waiting.retain(|waiting| !waiting.answer.is_closed());
    let mut bytes = 0;
    let full = waiting.iter().position(|waiting| {
        let full = bytes >= CALL_BYTES;
        bytes += waiting.message.body.len();
        full
    });
    let rest = waiting.split_off(full.unwrap_or(waiting.len()));
    std::mem::replace(waiting, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groups::Groups;
    use crate::ledger::service::ReplicaService;
    use crate::proto::internal::replica_server::ReplicaServer;
    use sim::net::Routes;
    use std::sync::atomic::{AtomicUsize, Ordering};

    type Tested = Result<(), Box<dyn std::error::Error + Send + Sync>>;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn messages_of_one_moment_share_a_call_and_each_gets_its_own_answer() -> Tested {
        sim::task::run_test(async {
            let calls = Arc::new(AtomicUsize::new(0));
            let (groups, peers) = (Groups::default(), Peers::new("secret", BTreeMap::new())?);
            let disk = sim::disk::simulated::SimDisk::new(1);
            let control =
                crate::control::Control::open(groups.clone(), peers.clone(), disk, vec![], String::new())?;
            let (cache, grants, keeper, recovery) = (None, None, None, None);
            let service = ReplicaService { groups, cache, control, peers, grants, keeper, recovery };
            let service = ReplicaServer::new(service);
            let counted = calls.clone();
            let router = Routes::new(service).prepare().into_axum_router();
            let routes = Routes::from(router.layer(tower::util::MapRequestLayer::new(move |request| {
                counted.fetch_add(1, Ordering::SeqCst);
                request
            })));
            let (ready, addr) = oneshot::channel();
            sim::task::spawn(async move {
                let ready = |addr| {
                    let _ = ready.send(addr);
                };
                sim::net::serve("127.0.0.1:0", routes, ready, std::future::pending()).await
            });
            let (addr, peers) = (addr.await?, Peers::new("secret", BTreeMap::new())?);
            let tell = |group| {
                let message = Message { group, epoch: 1, ..Message::default() };
                peers.tell(&addr, message, SOON)
            };
            let answers = futures::future::join_all((0..100).map(tell)).await;
            for (group, answer) in answers.into_iter().enumerate() {
                let why = answer.err().ok_or("there is no such group")?;
                assert!(why.ends_with(&crate::groups::name_of(group as u32)), "{group}: {why}");
            }
            assert!(calls.load(Ordering::SeqCst) <= CALLS_MAX, "{calls:?} calls");
            Ok(())
        })?
    }

    #[test]
    fn without_a_peer_each_message_learns_it_and_the_link_is_free_again() -> Tested {
        sim::task::run_test(async {
            let peers = Peers::new("secret", BTreeMap::new())?;
            for _ in 0..2 {
                let tell = |group| {
                    peers.tell("127.0.0.1:1", Message { group, epoch: 1, ..Message::default() }, SOON)
                };
                let answers = futures::future::join_all((0..20).map(tell)).await;
                assert!(answers.iter().all(|answer| answer.is_err()));
            }
            sim::time::sleep(Duration::from_millis(1)).await;
            assert!(lock(&peers.links.links).values().all(|link| lock(link).calls == 0));
            Ok(())
        })?
    }

    #[test]
    fn a_call_leaves_out_who_gave_up_and_what_is_too_much() {
        let now = sim::task::run_test(async { Instant::now() }).ok();
        let mut listening = vec![];
        let mut waiting: Vec<Waiting> = (0..5)
            .filter_map(|group| {
                let (answer, answered) = oneshot::channel();
                if group != 1 {
                    listening.push(answered);
                }
                let message = Message { group, body: vec![0; CALL_BYTES / 2].into(), ..Message::default() };
                Some(Waiting { message, until: now?, answer })
            })
            .collect();
        let groups = |of: &[Waiting]| of.iter().map(|w| w.message.group).collect::<Vec<_>>();
        assert_eq!(groups(&take(&mut waiting)), [0, 2]);
        assert_eq!(groups(&waiting), [3, 4]);
        assert_eq!(groups(&take(&mut waiting)), [3, 4]);
    }

    #[test]
    fn beats_are_the_same_moments_for_all() -> Tested {
        sim::task::run_test(async {
            let links = Links::default();
            let interval = Duration::from_millis(20);
            let first = links.next_beat(interval);
            assert!(first > Instant::now());
            sim::time::sleep_until(first).await;
            let second = links.next_beat(interval);
            assert_eq!((second - links.began).as_nanos() % interval.as_nanos(), 0);
            assert!(second > first);
            Ok(())
        })?
    }
}
