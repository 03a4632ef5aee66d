//! Clients: each is a session of one tenant, does one thing after the other, and records what it saw.
//!
//! A write carries an idempotency key and is retried, at any gateway, until its answer is certain or patience ends. Now and then a
//! client sends an answered key again, as a confused caller would, and expects the same answer. An operation whose time has passed by more
//! than [`LATE`] when the one before it ends is left out: a client that had to wait does not make up for it.
//!
//! Where recovery is measured, clients are what good ones are: reads too are sent again, and each gateway is pinged, as HTTP/2 keeps a connection
//! alive that is not used. One that does not answer is left out until it answers a ping.

use super::cluster::{Cluster, tenant};
use super::machines::{Machines, Waiting};
use crate::history::is_a_persons;
use crate::history::{At, Attempt, Call, Id, Op, Outcome, Refusal, Request, Response, Row, SEARCH_K};
use crate::operation::{Act, Operation};
use crate::spec::Scenario;
use nodes::error::{reason, token_in};
use nodes::proto::v1::{
    self, graph_service_client::GraphServiceClient, memory_service_client::MemoryServiceClient,
};
use sim::net::Channel;
use sim::rand;
use sim::time::{self, Duration};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use storage::embed::{LEXICAL_SPACE, embed};
use tonic::{Code, Status};

const ATTEMPT: Duration = Duration::from_secs(2);
const ATTEMPTS_MAX: usize = 12;
const LATE: Duration = Duration::from_secs(1);
/// How often a gateway is pinged, and one that is left out; and how long an answer may take.
const PING_EVERY: Duration = Duration::from_secs(2);
const PING_AGAIN: Duration = Duration::from_millis(250);
const PING_LIMIT: Duration = Duration::from_secs(1);

/// Whom erasures are about.
const PERSON: &str = "a person";

/// What all clients write into.
pub type Recorder = Arc<Mutex<Recorded>>;

#[derive(Default)]
pub struct Recorded {
    pub ops: Vec<Op>,
    pub calls: Vec<Call>,
}

type Sending = Pin<Box<dyn Future<Output = Result<Response, Status>> + Send>>;

struct Client {
    number: usize,
    tenant: usize,
    key: String,
    machines: Arc<dyn Machines>,
    /// The gateways' names.
    gateways: Vec<String>,
    channels: Vec<Channel>,
    at: usize,
    recorder: Recorder,
    /// The session: the greatest position seen, and the last version of each memory.
    token: v1::Token,
    versions: BTreeMap<Id, u64>,
    writes: u64,
    /// There are several shards, at some time.
    several: bool,
    /// The gateway that the last attempt asked.
    asked: String,
    /// There are several regions.
    regions: bool,
    /// Some memories are a person's who is erased now and then.
    erases: bool,
    /// Whether reads are sent again, and gateways left out that do not answer.
    fails_over: bool,
    /// Those left out now.
    out: Arc<Mutex<Vec<bool>>>,
}

/// Starts the scenario's clients, each on a machine of its own; how many have not ended yet.
pub fn start(cluster: &Cluster, scenario: &Scenario, recorder: &Recorder) -> Arc<Mutex<usize>> {
    let running = Arc::new(Mutex::new(scenario.workload.clients));
    let several = scenario.topology.shards > 1 || !scenario.changes.is_empty();
    for number in 0..scenario.workload.clients {
        let tenant = number % scenario.workload.tenants;
        let (fails_over, regions) = (scenario.recovery.is_some(), scenario.topology.regions.is_some());
        let erases = scenario.workload.erasures > 0.0;
        let mine = scenario.operations.iter().flatten().filter(|o| o.client == number).copied();
        let operations: Arc<[Operation]> = mine.collect();
        let (key, machines) = (cluster.keys[tenant].clone(), cluster.machines.clone());
        let of_gateways = |of: &dyn Fn(usize) -> String| -> Vec<String> {
            cluster.gateways.iter().map(|node| of(*node)).collect()
        };
        let gateways = of_gateways(&|node| machines.name(node));
        let ways = of_gateways(&|node| machines.clients_way(node));
        let (recorder, running) = (recorder.clone(), running.clone());
        let session = move || -> Waiting<'static, ()> {
            let mut client = Client {
                number,
                tenant,
                key: key.clone(),
                machines: machines.clone(),
                channels: ways.iter().filter_map(|way| sim::net::connect(way).ok()).collect(),
                gateways: gateways.clone(),
                at: number % gateways.len(),
                recorder: recorder.clone(),
                token: v1::Token::default(),
                versions: BTreeMap::new(),
                writes: 0,
                several,
                regions,
                erases,
                asked: String::new(),
                fails_over,
                out: Arc::new(Mutex::new(vec![false; gateways.len()])),
            };
            let (machines, running, operations) = (machines.clone(), running.clone(), operations.clone());
            Box::pin(async move {
                if client.fails_over {
                    client.keep_alive();
                }
                for operation in operations.iter() {
                    let at = Duration::from_millis(operation.at_ms);
                    let now = machines.now();
                    if now < at {
                        time::sleep(at - now).await;
                    } else if now > at + LATE {
                        continue;
                    }
                    client.act(operation).await;
                }
                *running.lock().unwrap_or_else(|p| p.into_inner()) -= 1;
            })
        };
        cluster.machines.add_client(number, Box::new(session));
    }
    running
}

/// The id of a tenant's `number`-th memory.
pub fn id_of(tenant: usize, number: u64) -> Id {
    let mut bytes = [0; 16];
    bytes[0] = tenant as u8 + 1;
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

/// The text of a memory: whose it is and which write made it, and words to search for.
fn text(tenant: usize, marker: &str) -> String {
    const WORDS: [&str; 8] =
        ["harbour", "violin", "orchard", "lantern", "glacier", "saffron", "compass", "meadow"];
    let mut hash = sim::trace::Hash::default();
    hash.bytes(marker.as_bytes());
    let words: Vec<&str> = (0..3).map(|i| WORDS[(hash.value() >> (8 * i) & 7) as usize]).collect();
    format!("t{tenant} {marker} {}", words.join(" "))
}

pub fn row(memory: &v1::Memory) -> Row {
    let mut parts = memory.text.split(' ');
    let owner = parts.next().and_then(|t| t.strip_prefix('t')).and_then(|t| t.parse().ok());
    let marker = parts.next().unwrap_or_default().to_string();
    Row { id: memory.id.clone(), version: memory.version, tenant: owner.unwrap_or(usize::MAX), marker }
}

/// What a token names of the shard that an answer came from, which the answer's own token names first.
fn position(token: Option<&v1::Token>, shard: u32) -> v1::ShardPosition {
    let of = |t: &v1::Token| t.positions.iter().find(|p| p.shard == shard).copied();
    token.and_then(of).unwrap_or_default()
}

fn shard(token: Option<&v1::Token>) -> u32 {
    token.and_then(|t| t.positions.first()).map_or(0, |p| p.shard)
}

fn at(info: Option<&v1::WriteInfo>) -> At {
    let position =
        info.and_then(|i| i.token.as_ref()).and_then(|t| t.positions.first().copied()).unwrap_or_default();
    At {
        shard: position.shard,
        epoch: position.epoch,
        index: position.index,
        item: info.map_or(0, |i| i.item),
    }
}

/// Whether an answered key was decided again in a later epoch, since what was decided first is lost with its region. An answer that names no epoch is of the
/// first one, as far as anybody knows.
fn decided_anew(first: &Response, again: &Response) -> bool {
    let epoch = |response: &Response| response.at().map_or(1, |at| at.epoch);
    epoch(again) > epoch(first)
}

/// Whether an answered key got the same answer again. On the way to another shard a write gets another place.
fn same(first: &Response, again: &Response) -> bool {
    match (first, again) {
        (
            Response::Written { version, at, map_version, .. },
            Response::Written { version: then, at: then_at, map_version: later, .. },
        ) => version == then && (at == then_at || map_version != later),
        (first, again) => first == again,
    }
}

/// What a status says for certain; `None`: ask again.
fn certain(status: &Status) -> Option<Refusal> {
    let metadata = |name: &str| {
        use tonic_types::StatusExt;
        status.get_details_error_info().and_then(|i| i.metadata.get(name)?.parse().ok()).unwrap_or(0)
    };
    match reason(status)?.as_str() {
        "NOT_FOUND" => Some(Refusal::NotFound),
        "ALREADY_EXISTS" => Some(Refusal::AlreadyExists { version: metadata("version") }),
        "VERSION_MISMATCH" => Some(Refusal::VersionMismatch { actual: metadata("actual_version") }),
        _ => None,
    }
}

impl Client {
    fn now_ns(&self) -> u64 {
        self.machines.now().as_nanos() as u64
    }

    /// A call's request, with the key, a deadline and the session's token where asked for.
    fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Ok(value) = format!("Bearer {}", self.key).parse() {
            request.metadata_mut().insert("authorization", value);
        }
        request.set_timeout(ATTEMPT);
        request
    }

    fn memories(&self) -> MemoryServiceClient<Channel> {
        MemoryServiceClient::new(self.channels[self.at].clone())
    }

    fn graph(&self) -> GraphServiceClient<Channel> {
        GraphServiceClient::new(self.channels[self.at].clone())
    }

    /// Turns to the gateway whose turn it is, or to the next one that is not left out.
    fn turn(&mut self) {
        let out = self.out.lock().unwrap_or_else(|p| p.into_inner());
        let others = (self.at..self.at + self.gateways.len()).map(|at| at % self.gateways.len());
        self.at = others.into_iter().find(|at| !out[*at]).unwrap_or(self.at);
        self.asked = self.gateways[self.at].clone();
    }

    /// One attempt at whom it is the turn of. What is no answer at all may leave the gateway out.
    async fn attempt<T>(
        &mut self,
        limit: Duration,
        attempts: &mut Vec<Attempt>,
        send: impl Future<Output = Result<T, Status>>,
    ) -> Option<Result<T, Status>> {
        let call_ns = self.now_ns();
        let answer = time::timeout(limit, send).await.ok();
        let answered = match &answer {
            Some(Ok(_)) => true,
            Some(Err(status)) => {
                let lost = reason(status).as_deref() == Some("LOST_IN_FAILOVER");
                lost || status.code() == Code::NotFound || certain(status).is_some()
            }
            None => false,
        };
        attempts.push(Attempt { node: self.asked.clone(), call_ns, return_ns: self.now_ns(), answered });
        let silent = answer.as_ref().is_none_or(|answer| {
            answer.as_ref().is_err_and(|s| {
                s.code() == Code::Unavailable && reason(s).is_none() || s.code() == Code::DeadlineExceeded
            })
        });
        if silent && self.fails_over {
            self.out.lock().unwrap_or_else(|p| p.into_inner())[self.at] = true;
        }
        answer
    }

    /// Pings each gateway for ever, to know which to leave out.
    fn keep_alive(&self) {
        for (gateway, channel) in self.channels.iter().cloned().enumerate() {
            let out = self.out.clone();
            let is_out = move |out: &Mutex<Vec<bool>>| out.lock().unwrap_or_else(|p| p.into_inner())[gateway];
            sim::task::spawn(async move {
                time::sleep(Duration::from_millis(rand::below(PING_EVERY.as_millis() as u64))).await;
                loop {
                    let mut service = MemoryServiceClient::new(channel.clone());
                    let ping = time::timeout(PING_LIMIT, service.get(v1::GetRequest::default())).await;
                    // It says something, if only that it does not know who asks.
                    let answers =
                        ping.is_ok_and(|answer| answer.is_err_and(|s| s.code() == Code::Unauthenticated));
                    out.lock().unwrap_or_else(|p| p.into_inner())[gateway] = !answers;
                    let mut waited = Duration::ZERO;
                    while waited < if is_out(&out) { PING_AGAIN } else { PING_EVERY } {
                        time::sleep(PING_AGAIN).await;
                        waited += PING_AGAIN;
                    }
                }
            });
        }
    }

    /// Writes down how it went with something that this client wanted.
    fn called(&self, kind: &'static str, key: Option<u64>, attempts: Vec<Attempt>, outcome: Outcome) {
        let (Some(first), return_ns) = (attempts.first(), self.now_ns()) else { return };
        let (client, tenant, call_ns) = (self.number, self.tenant, first.call_ns);
        let call = Call { client, tenant, kind, key, call_ns, return_ns, outcome, attempts };
        self.recorder.lock().unwrap_or_else(|p| p.into_inner()).calls.push(call);
    }

    /// Asks something that may be asked again; `None` if there was no answer. `poor` says whether an answer is a degraded one.
    async fn ask<T, F: Future<Output = Result<T, Status>>>(
        &mut self,
        (kind, key): (&'static str, Option<u64>),
        poor: impl Fn(&T) -> bool,
        send: impl Fn(&Client) -> F,
    ) -> Option<Result<T, Status>> {
        let mut attempts = vec![];
        for attempt in 0..if self.fails_over { ATTEMPTS_MAX } else { 1 } {
            self.turn();
            let sent = send(self);
            let answer = self.attempt(ATTEMPT, &mut attempts, sent).await;
            if attempts.last().is_some_and(|a| a.answered) {
                let poor = answer.as_ref().is_some_and(|a| a.as_ref().is_ok_and(&poor));
                self.called(kind, key, attempts, if poor { Outcome::Degraded } else { Outcome::Answered });
                return answer;
            }
            self.at = (self.at + 1) % self.gateways.len();
            // Another gateway is asked at once, the same one again only after a while.
            if self.fails_over && attempt > 0 {
                pause(attempt).await;
            }
        }
        self.called(kind, key, attempts, Outcome::Failed);
        None
    }

    /// Where there are several regions, every third write is to be in both.
    fn durability(&self, key: &str) -> i32 {
        let mut hash = sim::trace::Hash::default();
        hash.bytes(key.as_bytes());
        match self.regions && hash.value().is_multiple_of(3) {
            true => v1::Durability::Region.into(),
            false => 0,
        }
    }

    /// Where people are erased, all lie together with one agent: a search finds everybody's.
    fn agent(&self) -> &'static str {
        if self.erases { "helper" } else { "" }
    }

    fn id(&self, key: u64) -> Id {
        id_of(self.tenant, key)
    }

    async fn act(&mut self, operation: &Operation) {
        if let Some(gateway) = operation.gateway {
            self.at = gateway % self.gateways.len();
        }
        match operation.act {
            Act::Add { key } => self.write(Kind::Add, key, operation).await,
            Act::Update { key } => self.write(Kind::Update, key, operation).await,
            Act::Delete { key } => self.write(Kind::Delete, key, operation).await,
            Act::Get { key } => self.get(key, operation.session).await,
            // Half of them are by a vector, and strong.
            Act::Search => self.search(operation.at_ms.is_multiple_of(2)).await,
            Act::List => self.list().await,
            Act::Link { from, to } => self.link(from, to, true).await,
            Act::Unlink { from, to } => self.link(from, to, false).await,
            Act::Walk { key } => self.walk(key, operation.inbound).await,
            Act::Erase => self.erase().await,
        }
    }

    fn record(&self, call: Duration, request: Request, response: Response) {
        let return_ns = self.now_ns();
        let (client, tenant, node, call_ns) =
            (self.number, self.tenant, self.asked.clone(), call.as_nanos() as u64);
        let op = Op { client, tenant, node, call_ns, return_ns, request, response };
        self.recorder.lock().unwrap_or_else(|p| p.into_inner()).ops.push(op);
    }

    fn saw(&mut self, token: Option<&v1::Token>) {
        let Some(token) = token else { return };
        for position in &token.positions {
            match self.token.positions.iter_mut().find(|held| held.shard == position.shard) {
                Some(held) if (held.epoch, held.index) < (position.epoch, position.index) => {
                    *held = *position
                }
                Some(_) => {}
                None => self.token.positions.push(*position),
            }
        }
        self.token.map_version = self.token.map_version.max(token.map_version);
    }

    async fn write(&mut self, kind: Kind, key: u64, operation: &Operation) {
        let id = self.id(key);
        self.writes += 1;
        let marker = format!("c{}w{}", self.number, self.writes);
        let known = self.versions.get(&id).copied();
        let expected = known.filter(|_| operation.expecting);
        let request = match kind {
            Kind::Add => Request::Add { id: id.clone(), marker: marker.clone() },
            Kind::Update => Request::Update { id: id.clone(), expected, marker: marker.clone() },
            Kind::Delete => Request::Delete { id: id.clone(), expected },
        };
        let text = text(self.tenant, &marker);
        let call = self.machines.now();
        let what = (kind.name(), Some(key));
        let mut answer = self.attempts(what, &request, &marker, &text).await;
        let first_ns = self.now_ns();
        if !matches!(answer, Response::Unknown) && operation.again {
            let again = self.attempts(what, &request, &marker, &text).await;
            if self.several && answer == Response::Refused(Refusal::NotFound) {
                // Where there are several shards, what was refused because nothing with that id ever was is not remembered.
                answer = again;
            } else if decided_anew(&answer, &again) {
                // P2 judges the one that stands.
                answer = again;
            } else if !matches!(again, Response::Unknown) && !same(&answer, &again) {
                let at = answer.at();
                let (first, then) = (answer.to_string(), again.to_string());
                answer = Response::Changed { first, first_ns, then, at };
            }
        }
        if let Response::Written { version, at, map_version, .. } = &answer {
            self.versions.insert(id, *version);
            let position = v1::ShardPosition { shard: at.shard, epoch: at.epoch, index: at.index };
            self.saw(Some(&v1::Token { positions: vec![position], map_version: *map_version }));
        }
        self.record(call, request, answer);
    }

    async fn erase(&mut self) {
        self.writes += 1;
        let key = format!("c{}w{}", self.number, self.writes);
        let call = self.machines.now();
        let answer = self.attempts(("erase", None), &Request::Erase, &key, "").await;
        self.record(call, Request::Erase, answer);
    }

    /// Sends a write with one key until its outcome is certain.
    async fn attempts(
        &mut self,
        (kind, number): (&'static str, Option<u64>),
        request: &Request,
        key: &str,
        text: &str,
    ) -> Response {
        let mut attempts = vec![];
        for attempt in 0..ATTEMPTS_MAX {
            self.turn();
            let sent = self.send(request, key, text);
            let limit = ATTEMPT + Duration::from_millis(200);
            match self.attempt(limit, &mut attempts, sent).await {
                Some(Ok(response)) => {
                    self.called(kind, number, attempts, Outcome::Answered);
                    return response;
                }
                Some(Err(status)) => {
                    if let Some(refusal) = certain(&status) {
                        self.called(kind, number, attempts, Outcome::Answered);
                        return Response::Refused(refusal);
                    }
                    if matches!(
                        status.code(),
                        Code::InvalidArgument | Code::Unauthenticated | Code::PermissionDenied
                    ) {
                        // Clients of a scenario send nothing wrong: make it visible.
                        return Response::Changed {
                            first: "a valid request".into(),
                            // No loss explains it.
                            first_ns: 0,
                            then: status.to_string(),
                            at: None,
                        };
                    }
                }
                None => {}
            }
            self.at = (self.at + 1) % self.gateways.len();
            pause(attempt).await;
        }
        self.called(kind, number, attempts, Outcome::Failed);
        Response::Unknown
    }

    /// One write as it is sent.
    fn send(&self, request: &Request, key: &str, text: &str) -> Sending {
        let options = Some(v1::WriteOptions {
            idempotency_key: format!("{}/{key}", tenant(self.tenant)),
            // An erasure is to be in every region, unless it says otherwise.
            durability: if *request == Request::Erase { 0 } else { self.durability(key) },
        });
        let mut service = self.memories();
        let written = |version, info: Option<v1::WriteInfo>| {
            let map_version = info.as_ref().and_then(|i| i.token.as_ref()).map_or(0, |t| t.map_version);
            let elsewhere = info.as_ref().is_some_and(|i| i.durability == v1::Durability::Region as i32);
            Response::Written { version, at: at(info.as_ref()), map_version, elsewhere }
        };
        match request {
            Request::Add { id, .. } => {
                let persons = self.erases && is_a_persons(id);
                let memory = v1::NewMemory {
                    id: id.clone(),
                    user: if persons { PERSON } else { "shared user" }.into(),
                    agent: self.agent().into(),
                    text: text.into(),
                    metadata: format!(r#"{{"client": {}}}"#, self.number),
                    ..Default::default()
                };
                let request = self.request(v1::AddRequest { memory: Some(memory), options });
                Box::pin(async move {
                    let answer = service.add(request).await?.into_inner();
                    Ok(written(answer.version, answer.info))
                })
            }
            Request::Update { id, expected, .. } => {
                let request = self.request(v1::UpdateRequest {
                    id: id.clone(),
                    expected_version: *expected,
                    text: Some(text.into()),
                    options,
                    ..Default::default()
                });
                Box::pin(async move {
                    let answer = service.update(request).await?.into_inner();
                    Ok(written(answer.version, answer.info))
                })
            }
            Request::Delete { id, expected } => {
                let request =
                    self.request(v1::DeleteRequest { id: id.clone(), expected_version: *expected, options });
                Box::pin(async move {
                    let answer = service.delete(request).await?.into_inner();
                    Ok(written(answer.version, answer.info))
                })
            }
            Request::Erase => {
                let message = v1::EraseRequest { user: PERSON.into(), agent: String::new(), options };
                let request = self.request(message);
                Box::pin(async move {
                    let info = service.erase(request).await?.into_inner().info;
                    let elsewhere = info.is_some_and(|i| i.durability == v1::Durability::Region as i32);
                    Ok(Response::Erased { elsewhere })
                })
            }
            Request::Get { .. }
            | Request::Search { .. }
            | Request::List
            | Request::Link { .. }
            | Request::Walk => Box::pin(async { Err(Status::internal("not a write")) }),
        }
    }

    /// A read that gets no answer says nothing about the state, and leaves no [`Op`].
    async fn get(&mut self, key: u64, session: bool) {
        let id = self.id(key);
        let session = session && !self.token.positions.is_empty();
        let token = session.then(|| self.token.clone());
        let options = Some(v1::ReadOptions {
            consistency: if session { v1::Consistency::Session } else { v1::Consistency::Strong } as i32,
            token: token.clone(),
            ..Default::default()
        });
        let call = self.machines.now();
        let kind = if session { "session get" } else { "strong get" };
        let message = v1::GetRequest { id: id.clone(), options };
        let poor = |answer: &tonic::Response<v1::GetResponse>| poor(answer.get_ref().info.as_ref());
        let answer = self.ask((kind, Some(key)), poor, |client| {
            let (mut service, request) = (client.memories(), client.request(message.clone()));
            async move { service.get(request).await }
        });
        let answer = answer.await;
        let mut asked = token.as_ref().map(|_| 0);
        let response = match answer {
            Some(Ok(answer)) => {
                let answer = answer.into_inner();
                let info = answer.info.unwrap_or_default();
                let shown = info.complete_to.as_ref();
                let shard = shard(shown);
                asked = token.map(|token| position(Some(&token), shard).index);
                let v1::ShardPosition { epoch, index, .. } = position(shown, shard);
                self.saw(info.token.as_ref());
                let Some(memory) = &answer.memory else { return };
                self.versions.insert(id.clone(), memory.version);
                Response::Value { row: row(memory), shown: index, epoch }
            }
            Some(Err(status)) if reason(&status).as_deref() == Some("LOST_IN_FAILOVER") => {
                self.token = v1::Token::default();
                self.versions.clear();
                Response::Lost
            }
            Some(Err(status)) if status.code() == Code::NotFound => {
                // Where several shards were asked, none of them answers for all.
                let shown = token_in(&status, "complete_to").filter(|shown| shown.positions.len() == 1);
                let shard = shard(shown.as_ref());
                let least = |token| shown.as_ref().map_or(0, |_| position(Some(&token), shard).index);
                asked = token.map(least);
                self.saw(token_in(&status, "token").as_ref());
                Response::Absent { shown: position(shown.as_ref(), shard).index }
            }
            _ => return,
        };
        self.record(call, Request::Get { id, token: asked }, response);
    }

    async fn search(&mut self, by_vector: bool) {
        let call = self.machines.now();
        let (user, agent) = ("shared user".into(), self.agent().into());
        let owners = Some(v1::Owners { user, agent, ..Default::default() });
        let text = text(self.tenant, "c0w1");
        let (vector, space) = match by_vector {
            true => (embed(&text), LEXICAL_SPACE.to_string()),
            false => Default::default(),
        };
        let text = if by_vector { String::new() } else { text };
        let consistency = if by_vector { v1::Consistency::Strong } else { v1::Consistency::Unspecified };
        let options = Some(v1::ReadOptions { consistency: consistency as i32, ..Default::default() });
        let k = SEARCH_K as u32;
        let message = v1::SearchRequest { text, vector, space, owners, k, options, ..Default::default() };
        let kind = if by_vector { "search by vector" } else { "search" };
        let poor = |answer: &tonic::Response<v1::SearchResponse>| poor(answer.get_ref().info.as_ref());
        let answer = self.ask((kind, None), poor, |client| {
            let (mut service, request) = (client.memories(), client.request(message.clone()));
            async move { service.search(request).await }
        });
        if let Some(Ok(answer)) = answer.await {
            let hits = answer.into_inner().hits;
            let rows = hits.iter().filter_map(|h| h.memory.as_ref()).map(row).collect();
            self.record(call, Request::Search { by_vector }, Response::Rows(rows));
        }
    }

    /// Sets or removes an edge between two memories, of which either may not be there.
    async fn link(&mut self, from: u64, to: u64, set: bool) {
        let call = self.machines.now();
        let (key, source, target) = (from, self.id(from), self.id(to));
        let weight = ((from * 7 + to * 3) % 10) as f32 / 10.0;
        let (from, to) = (source.clone(), target.clone());
        let edge = v1::Edge { source, target, relation: "knows".into(), weight, ..Default::default() };
        if !set {
            let message = v1::DeleteEdgesRequest { edges: vec![edge], options: None };
            let answer = self.ask(
                ("unlink", Some(key)),
                |_| false,
                |client| {
                    let (mut service, request) = (client.graph(), client.request(message.clone()));
                    async move { service.delete_edges(request).await }
                },
            );
            let _answer = answer.await;
            return;
        }
        let message = v1::UpsertEdgesRequest { edges: vec![edge], options: None };
        let answer = self.ask(
            ("link", Some(key)),
            |_| false,
            |client| {
                let (mut service, request) = (client.graph(), client.request(message.clone()));
                async move { service.upsert_edges(request).await }
            },
        );
        match answer.await {
            Some(Ok(_)) => self.record(call, Request::Link { from, to }, Response::Linked),
            Some(Err(_)) => {}
            None => self.record(call, Request::Link { from, to }, Response::Unknown),
        }
    }

    async fn walk(&mut self, key: u64, inbound: bool) {
        let call = self.machines.now();
        let message =
            v1::TraverseRequest { start: vec![self.id(key)], hops: 3, inbound, ..Default::default() };
        let poor = |answer: &tonic::Response<v1::TraverseResponse>| {
            // Cut at its limits it is not complete, and that is no fault.
            answer.get_ref().info.as_ref().is_some_and(|info| info.level != WELL)
        };
        let answer = self.ask(("walk", Some(key)), poor, |client| {
            let (mut service, request) = (client.graph(), client.request(message.clone()));
            async move { service.traverse(request).await }
        });
        if let Some(Ok(answer)) = answer.await {
            let answer = answer.into_inner();
            let edges = answer.edges.into_iter().map(|e| (e.source, e.target)).collect();
            let rows = answer.memories.iter().map(row).collect();
            self.record(call, Request::Walk, Response::Walked { rows, edges });
        }
    }

    async fn list(&mut self) {
        let call = self.machines.now();
        let answer = self.ask(
            ("list", None),
            |(_, whole): &(Vec<Row>, bool)| !whole,
            |client| {
                let (mut service, request) = (client.memories(), client.request(v1::ListRequest::default()));
                async move {
                    let mut stream = service.list(request).await?.into_inner();
                    let (mut rows, mut whole) = (vec![], true);
                    while let Some(page) = stream.message().await? {
                        rows.extend(page.memories.iter().map(row));
                        whole &= !poor(page.info.as_ref());
                    }
                    Ok((rows, whole))
                }
            },
        );
        if let Some(Ok((rows, _))) = answer.await {
            self.record(call, Request::List, Response::Rows(rows));
        }
    }
}

/// The degradation level of an answer that is all it should be.
const WELL: &str = "L0";

fn poor(info: Option<&v1::ReadInfo>) -> bool {
    info.is_some_and(|info| info.level != WELL || !info.complete)
}

/// What a client waits before it tries once more.
async fn pause(attempt: usize) {
    time::sleep(Duration::from_millis(20 + rand::below(80) * (attempt as u64 + 1))).await;
}

#[derive(Clone, Copy)]
enum Kind {
    Add,
    Update,
    Delete,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Add => "add",
            Kind::Update => "update",
            Kind::Delete => "delete",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_decided_anew_only_in_a_later_epoch() {
        let written = |epoch, index| {
            let at = At { shard: 0, epoch, index, item: 0 };
            Response::Written { version: 1, at, map_version: 1, elsewhere: false }
        };
        let refused = Response::Refused(Refusal::AlreadyExists { version: 4 });
        for (first, again, anew) in [
            (&refused, &written(1, 9), false),
            (&written(1, 5), &written(1, 9), false),
            (&written(1, 5), &refused, false),
            (&written(2, 5), &written(2, 9), false),
            (&written(1, 5), &written(2, 4), true),
            (&refused, &written(2, 9), true),
        ] {
            assert_eq!(decided_anew(first, again), anew, "{first} {again}");
        }
    }
}
