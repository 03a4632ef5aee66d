//! Announcements: whoever leads the control group posts what happens to incidents to the webhooks that its file names.
//!
//! ```text
//!   the map ─► its incidents' events ─► the first that a receiver has not taken ─► POST ── 2xx ──► a note in the control group: taken
//!                     ▲                                                             └─ else: again, ever more rarely
//!                     └ the same for every leader, in the same order, with the same ids
//! ```
//!
//! What was taken is a record in the control group beside the map, so it survives a change of leader, and all restarts. Events are made from the map: none is
//! missed because nobody led while it happened, and none is kept in memory.
//!
//! What a receiver can count on:
//! - **Nothing is lost, some may come twice** (*at least once*): a leader that dies between the answer and the note is followed by one that posts again. The
//!   event's id is the same (`event`, and the header `idempotency-key`): drop those that are known.
//! - **In order**: the next event is not posted before this one is taken, so a receiver that refuses one for ever hears nothing more; others do.
//! - **From when it is named**: a receiver that is new hears of incidents that go on, and of those that come. Name the same ones on every node of the
//!   control group.
//! - The map remembers 32 changes: what a receiver has not taken until its incident is forgotten does not come any more.
//!
//! Plain HTTP only: a receiver behind TLS, or one that wants another form, needs a relay before it.

use super::Control;
use super::incidents::Event;
use crate::error::Error;
use crate::groups::{CONTROL, Groups};
use crate::http::{figures, headline, incident_json};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sim::time::{self, Duration, Instant};
use std::collections::{BTreeMap, BTreeSet};
use storage::model::MemoryId;

/// The record of what was taken.
const RECORD: MemoryId = *b"announced events";
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// How long a receiver may take.
const POST_WITHIN: Duration = Duration::from_secs(10);
/// The pause after a refusal doubles from this to that.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// One step's time.
const STEP: Duration = Duration::from_secs(5);

/// Where to post: `http://host:port/path`.
#[derive(Clone, Debug, PartialEq)]
pub struct Webhook {
    pub url: String,
    addr: String,
    path: String,
}

impl Webhook {
    pub fn parse(url: &str) -> Result<Webhook, Error> {
        let wrong = |problem: &str| Error::invalid("announce.webhooks", format!("'{url}' {problem}"));
        if url.starts_with("https://") {
            return Err(wrong("wants TLS, which a node does not speak here: name a relay's http:// address"));
        }
        let rest = url.strip_prefix("http://").ok_or_else(|| wrong("is no http://host:port/path"))?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let path = if path.is_empty() { "/" } else { path };
        let port = authority.rsplit_once(':').map_or(Ok(80), |(_, port)| port.parse::<u16>());
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let odd = |c: char| c.is_whitespace() || c.is_control() || c == '@';
        match port {
            Ok(port @ 1..) if !host.is_empty() && !url.contains(odd) && path.parse::<http::Uri>().is_ok() => {
                Ok(Webhook { url: url.into(), addr: format!("{host}:{port}"), path: path.into() })
            }
            _ => Err(wrong("is no http://host:port/path")),
        }
    }

    /// Posts an event once; why it was not taken.
    async fn post(&self, event: &Event) -> Result<(), String> {
        let body = Bytes::from(body_of(event).to_string());
        let posted = sim::net::post(&self.addr, &self.path, &event.id, body);
        match time::timeout(POST_WITHIN, posted).await {
            Ok(Ok(200..=299)) => Ok(()),
            Ok(Ok(status)) => Err(format!("HTTP status {status}")),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {POST_WITHIN:?}")),
        }
    }
}

fn body_of(event: &Event) -> serde_json::Value {
    let figures = figures(&event.incident);
    serde_json::json!({
        "event": event.id, "kind": event.kind, "step": event.what, "at_ms": event.at_ms,
        "text": format!("Loci, {}. {}", headline(&event.incident), figures.join(". ")),
        "incident": incident_json(&event.incident),
    })
}

/// Which events each receiver has taken, by the ids of both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Announced {
    taken: BTreeMap<String, BTreeSet<String>>,
}

impl Announced {
    /// The same, with a receiver that is told nothing of incidents that were closed before it was named.
    fn with(&self, url: &str, events: &[Event]) -> Announced {
        let mut next = self.clone();
        next.taken.entry(url.into()).or_insert_with(|| {
            let closed = events.iter().filter(|event| event.kind == "closed");
            let closed: BTreeSet<&String> = closed.map(|event| &event.incident.id).collect();
            let over = events.iter().filter(|event| closed.contains(&event.incident.id));
            over.map(|event| event.id.clone()).collect()
        });
        next
    }

    /// The first event that a receiver has not taken.
    fn next<'a>(&self, url: &str, events: &'a [Event]) -> Option<&'a Event> {
        let taken = self.taken.get(url)?;
        events.iter().find(|event| !taken.contains(&event.id))
    }

    /// The same, after a receiver took an event; events that the map has forgotten are forgotten here too.
    fn took(&self, url: &str, id: &str, events: &[Event]) -> Announced {
        let mut next = self.clone();
        let taken = next.taken.entry(url.into()).or_default();
        taken.insert(id.into());
        taken.retain(|id| events.iter().any(|event| event.id == *id));
        next
    }
}

#[derive(Clone)]
pub struct Announcer {
    pub control: Control,
    pub groups: Groups,
}

impl Announcer {
    /// Posts to one receiver for ever; only the leader of the control group does anything.
    pub async fn keep(self, webhook: Webhook) {
        if !self.control.has_regions().await {
            return;
        }
        // The map's version of which the receiver has taken all; none while another one leads.
        let mut settled = None;
        let mut pause = PAUSE_MIN;
        loop {
            let version = self.control.map().version;
            let leads = self.groups.get(CONTROL).is_some_and(|replica| replica.ledger.raft.is_leader());
            if !leads || settled == Some(version) {
                settled = settled.filter(|_| leads);
                pause = PAUSE_MIN;
                time::sleep(LOOK).await;
                continue;
            }
            match self.post_next(&webhook).await {
                Ok(true) => pause = PAUSE_MIN,
                Ok(false) => settled = Some(version),
                Err(problem) => {
                    sim::warn!(
                        "{} does not take what happened: {problem}; again in {pause:.0?}",
                        webhook.url
                    );
                    time::sleep(pause.mul_f64(1.0 + sim::rand::unit() / 4.0)).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    /// Posts the first event that the receiver has not taken; false if there is none.
    async fn post_next(&self, webhook: &Webhook) -> Result<bool, String> {
        let url = &webhook.url;
        let events = self.control.map().incident_events();
        // The record is read after a majority has confirmed that this node leads.
        let announced = self.note(|announced| announced.with(url, &events)).await?;
        let Some(event) = announced.next(url, &events) else { return Ok(false) };
        webhook.post(event).await?;
        sim::trace::probe("region: an event announced");
        self.note(|announced| announced.took(url, &event.id, &events)).await?;
        Ok(true)
    }

    /// Changes the record of what was taken; as it is then.
    async fn note(&self, change: impl Fn(&Announced) -> Announced) -> Result<Announced, String> {
        let deadline = Instant::now() + STEP;
        let noted = async {
            loop {
                let read = self.control.read_record::<Announced>(RECORD, super::Freshness::Strong, deadline);
                let Some((announced, version)) = read.await? else {
                    self.control.add(RECORD, &Announced::default(), deadline).await?;
                    continue;
                };
                let next = change(&announced);
                if next == announced || self.control.write(RECORD, &next, version, deadline).await? {
                    return Ok(next);
                }
            }
        };
        noted.await.map_err(|error: Error| format!("the control group's note of it: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1;
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::post;
    use sim::net::Routes;
    use std::sync::{Arc, Mutex};

    fn event(incident: &str, what: &'static str, kind: &'static str) -> Event {
        let id = format!("{incident}/{what}");
        Event {
            id,
            kind,
            what,
            at_ms: 1,
            incident: v1::Incident { id: incident.into(), ..Default::default() },
        }
    }

    fn events() -> Vec<Event> {
        let of = |incident| {
            [("validating", "opened"), ("granting", "updated"), ("done", "updated"), ("whole", "closed")]
                .map(|(what, kind)| event(incident, what, kind))
        };
        [of("a"), of("b")].concat()
    }

    #[test]
    fn webhooks_are_plain_http() -> Result<(), Error> {
        let parsed = Webhook::parse("http://hooks.example:8080/loci?team=1")?;
        assert_eq!((parsed.addr.as_str(), parsed.path.as_str()), ("hooks.example:8080", "/loci?team=1"));
        assert_eq!(Webhook::parse("http://h")?.addr, "h:80");
        for wrong in
            ["https://h/", "h:80/x", "http://", "http://:80/", "http://h:0/", "http://h:x/", "http://h:1/a b"]
        {
            assert!(Webhook::parse(wrong).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn a_new_receiver_hears_of_what_goes_on_and_a_known_one_of_what_it_has_not_taken() {
        let events = events();
        let (first, all) = (&events[..6], &events[..]);
        let announced = Announced::default().with("u", first);
        assert_eq!(announced.next("u", first).map(|e| e.id.as_str()), Some("b/validating"), "a is closed");
        assert_eq!(announced.next("v", first), None, "it was not named yet");
        let announced = announced.took("u", "b/validating", first).took("u", "b/granting", first);
        assert_eq!(announced.next("u", first), None);
        assert_eq!(announced.with("u", all), announced, "it is named already");
        assert_eq!(announced.next("u", all).map(|e| e.id.as_str()), Some("b/done"));
        // What comes late of an older incident comes too.
        let late = [&events[..4], &[event("a", "accounted", "updated")], &events[4..6]].concat();
        assert_eq!(announced.next("u", &late).map(|e| e.id.as_str()), Some("a/accounted"));
        let forgotten = announced.took("u", "b/done", &events[4..]);
        assert_eq!(forgotten.taken["u"].len(), 3, "of a nothing is remembered");
    }

    #[test]
    fn a_receiver_that_refuses_twice_gets_every_event_in_order() -> Result<(), Box<dyn std::error::Error>> {
        sim::task::run_test(async {
            let (seen, asked) = (Arc::new(Mutex::new(vec![])), Arc::new(Mutex::new(0)));
            let (noted, count) = (seen.clone(), asked.clone());
            let take = move |body: String| async move {
                let mut asked = count.lock().unwrap_or_else(|p| p.into_inner());
                *asked += 1;
                if *asked <= 2 {
                    return StatusCode::SERVICE_UNAVAILABLE;
                }
                let body: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
                noted.lock().unwrap_or_else(|p| p.into_inner()).push(body["event"].to_string());
                StatusCode::NO_CONTENT
            };
            let routes = Routes::from(Router::new().route("/hook", post(take)));
            let (told, bound) = sim::sync::oneshot::channel();
            let ready = move |addr: String| drop(told.send(addr));
            let serving = sim::task::spawn(async move {
                sim::net::serve("127.0.0.1:0", routes, ready, std::future::pending()).await
            });
            let webhook = Webhook { url: "u".into(), addr: bound.await?, path: "/hook".into() };
            let (url, events) = (&webhook.url, events());
            let mut announced = Announced { taken: BTreeMap::from([(url.clone(), BTreeSet::new())]) };
            let mut refused = 0;
            while let Some(event) = announced.next(url, &events) {
                match webhook.post(event).await {
                    Ok(()) => announced = announced.took(url, &event.id, &events),
                    Err(problem) => {
                        assert_eq!(problem, "HTTP status 503");
                        refused += 1;
                    }
                }
            }
            serving.abort();
            let seen = seen.lock().unwrap_or_else(|p| p.into_inner()).clone();
            let sent: Vec<String> = events.iter().map(|event| format!("\"{}\"", event.id)).collect();
            assert_eq!((refused, seen), (2, sent));
            Ok::<_, Box<dyn std::error::Error>>(())
        })?
    }
}
