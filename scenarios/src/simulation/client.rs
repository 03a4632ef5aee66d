//! Clients: each is a session of one tenant, does one thing after the other, and records what it saw.
//!
//! A write carries an idempotency key and is retried, at any gateway, until its answer is certain or patience ends. Now and then a
//! client sends an answered key again, as a confused caller would, and expects the same answer. An operation whose time has passed by more
//! than [`LATE`] when the one before it ends is left out: a client that had to wait does not make up for it.

use super::cluster::{Cluster, host_of, tenant};
use crate::history::{At, Id, Op, Refusal, Request, Response, Row};
use crate::operation::{Act, Operation};
use crate::spec::Scenario;
use nodes::error::reason;
use nodes::proto::v1::{
    self, graph_service_client::GraphServiceClient, memory_service_client::MemoryServiceClient,
};
use sim::net::Channel;
use sim::rand;
use sim::time::{self, Duration};
use sim::world::{ClockModel, NodeOptions};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tonic::{Code, Status};

const ATTEMPT: Duration = Duration::from_secs(2);
const ATTEMPTS_MAX: usize = 12;
const LATE: Duration = Duration::from_secs(1);

/// What all clients write into.
pub type Recorder = Arc<Mutex<Vec<Op>>>;

struct Client {
    number: usize,
    tenant: usize,
    key: String,
    gateways: Vec<String>,
    channels: Vec<Channel>,
    at: usize,
    recorder: Recorder,
    /// The session: the greatest position seen, and the last version of each memory.
    token: v1::Token,
    versions: BTreeMap<Id, u64>,
    writes: u64,
    /// The gateway that the last attempt asked.
    asked: String,
}

/// Starts the scenario's clients, each on a machine of its own; how many have not ended yet.
pub fn start(cluster: &Cluster, scenario: &Scenario, recorder: &Recorder) -> Arc<Mutex<usize>> {
    let running = Arc::new(Mutex::new(scenario.workload.clients));
    for number in 0..scenario.workload.clients {
        let tenant = number % scenario.workload.tenants;
        let mine = scenario.operations.iter().flatten().filter(|o| o.client == number).copied();
        let operations: Arc<[Operation]> = mine.collect();
        let (key, gateways) = (cluster.keys[tenant].clone(), cluster.gateways.clone());
        let (recorder, running) = (recorder.clone(), running.clone());
        let clock = ClockModel::default();
        let options = NodeOptions { name: format!("client{number}"), region: "here".into(), cores: 1, clock };
        let world = cluster.world.clone();
        cluster.world.add_node(options, move || {
            let mut client = Client {
                number,
                tenant,
                key: key.clone(),
                channels: gateways.iter().filter_map(|g| sim::net::connect(g).ok()).collect(),
                gateways: gateways.clone(),
                at: number % gateways.len(),
                recorder: recorder.clone(),
                token: v1::Token::default(),
                versions: BTreeMap::new(),
                writes: 0,
                asked: String::new(),
            };
            let (world, running, operations) = (world.clone(), running.clone(), operations.clone());
            async move {
                for operation in operations.iter() {
                    let at = Duration::from_millis(operation.at_ms);
                    let now = world.now();
                    if now < at {
                        time::sleep(at - now).await;
                    } else if now > at + LATE {
                        continue;
                    }
                    client.act(operation).await;
                }
                *running.lock().unwrap_or_else(|p| p.into_inner()) -= 1;
            }
        });
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

fn index(token: Option<&v1::Token>) -> u64 {
    token.and_then(|t| t.positions.first()).map_or(0, |p| p.index)
}

fn at(info: Option<&v1::WriteInfo>) -> At {
    let position =
        info.and_then(|i| i.token.as_ref()).and_then(|t| t.positions.first().copied()).unwrap_or_default();
    At { epoch: position.epoch, index: position.index, item: info.map_or(0, |i| i.item) }
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
    /// A call's request, with the key, a deadline and the session's token where asked for.
    fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Ok(value) = format!("Bearer {}", self.key).parse() {
            request.metadata_mut().insert("authorization", value);
        }
        request.set_timeout(ATTEMPT);
        request
    }

    fn service(&mut self) -> MemoryServiceClient<Channel> {
        self.asked = host_of(&self.gateways[self.at]).to_string();
        MemoryServiceClient::new(self.channels[self.at].clone())
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
            Act::Search => self.search().await,
            Act::List => self.list().await,
            Act::Link { from, to } => self.link(from, to, true).await,
            Act::Unlink { from, to } => self.link(from, to, false).await,
            Act::Walk { key } => self.walk(key, operation.inbound).await,
        }
    }

    fn record(&self, call: Duration, request: Request, response: Response) {
        let return_ns = sim::world::true_now().as_nanos() as u64;
        let (client, tenant, node, call_ns) =
            (self.number, self.tenant, self.asked.clone(), call.as_nanos() as u64);
        let op = Op { client, tenant, node, call_ns, return_ns, request, response };
        self.recorder.lock().unwrap_or_else(|p| p.into_inner()).push(op);
    }

    fn saw(&mut self, token: Option<&v1::Token>) {
        if index(token) > index(Some(&self.token)) {
            self.token = token.cloned().unwrap_or_default();
        }
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
        let call = sim::world::true_now();
        let mut answer = self.attempts(&request, &marker, &text).await;
        if !matches!(answer, Response::Unknown) && operation.again {
            let again = self.attempts(&request, &marker, &text).await;
            if !matches!(again, Response::Unknown) && again != answer {
                answer = Response::Changed { first: answer.to_string(), then: again.to_string() };
            }
        }
        if let Response::Written { version, at } = &answer {
            self.versions.insert(id, *version);
            let position = v1::ShardPosition { shard: 0, epoch: at.epoch, index: at.index };
            self.saw(Some(&v1::Token { positions: vec![position] }));
        }
        self.record(call, request, answer);
    }

    /// Sends a write with one key until its outcome is certain.
    async fn attempts(&mut self, request: &Request, key: &str, text: &str) -> Response {
        for attempt in 0..ATTEMPTS_MAX {
            let sent = self.send(request, key, text);
            match time::timeout(ATTEMPT + Duration::from_millis(200), sent).await {
                Ok(Ok(response)) => return response,
                Ok(Err(status)) => {
                    if let Some(refusal) = certain(&status) {
                        return Response::Refused(refusal);
                    }
                    if matches!(
                        status.code(),
                        Code::InvalidArgument | Code::Unauthenticated | Code::PermissionDenied
                    ) {
                        // Clients of a scenario send nothing wrong: make it visible.
                        return Response::Changed {
                            first: "a valid request".into(),
                            then: status.to_string(),
                        };
                    }
                }
                Err(_) => {}
            }
            self.at = (self.at + 1) % self.gateways.len();
            time::sleep(Duration::from_millis(20 + rand::below(80) * (attempt as u64 + 1))).await;
        }
        Response::Unknown
    }

    async fn send(&mut self, request: &Request, key: &str, text: &str) -> Result<Response, Status> {
        let options = Some(v1::WriteOptions {
            idempotency_key: format!("{}/{key}", tenant(self.tenant)),
            durability: 0,
        });
        let mut service = self.service();
        let (version, info) = match request {
            Request::Add { id, .. } => {
                let memory = v1::NewMemory {
                    id: id.clone(),
                    user: "shared user".into(),
                    text: text.into(),
                    metadata: format!(r#"{{"client": {}}}"#, self.number),
                    ..Default::default()
                };
                let request = self.request(v1::AddRequest { memory: Some(memory), options });
                let answer = service.add(request).await?.into_inner();
                (answer.version, answer.info)
            }
            Request::Update { id, expected, .. } => {
                let request = self.request(v1::UpdateRequest {
                    id: id.clone(),
                    expected_version: *expected,
                    text: Some(text.into()),
                    options,
                    ..Default::default()
                });
                let answer = service.update(request).await?.into_inner();
                (answer.version, answer.info)
            }
            Request::Delete { id, expected } => {
                let request =
                    self.request(v1::DeleteRequest { id: id.clone(), expected_version: *expected, options });
                let answer = service.delete(request).await?.into_inner();
                (answer.version, answer.info)
            }
            Request::Get { .. } | Request::Search | Request::List | Request::Link { .. } | Request::Walk => {
                return Err(Status::internal("not a write"));
            }
        };
        Ok(Response::Written { version, at: at(info.as_ref()) })
    }

    /// A read that gets no answer says nothing and leaves no record.
    async fn get(&mut self, key: u64, session: bool) {
        let id = self.id(key);
        let session = session && index(Some(&self.token)) > 0;
        let token = session.then(|| self.token.clone());
        let options = Some(v1::ReadOptions {
            consistency: if session { v1::Consistency::Session } else { v1::Consistency::Strong } as i32,
            token: token.clone(),
            ..Default::default()
        });
        let call = sim::world::true_now();
        let mut service = self.service();
        let request = self.request(v1::GetRequest { id: id.clone(), options });
        let answer = time::timeout(ATTEMPT, service.get(request)).await;
        let token = token.map(|t| index(Some(&t)));
        let response = match answer {
            Ok(Ok(answer)) => {
                let answer = answer.into_inner();
                let shown = answer.info.as_ref().and_then(|i| i.token.as_ref());
                self.saw(shown);
                let Some(memory) = &answer.memory else { return };
                self.versions.insert(id.clone(), memory.version);
                Response::Value { row: row(memory), shown: index(shown) }
            }
            // An absence shows no position; it is what was asked for at least.
            Ok(Err(status)) if status.code() == Code::NotFound => {
                Response::Absent { shown: token.unwrap_or(0) }
            }
            _ => {
                self.at = (self.at + 1) % self.gateways.len();
                return;
            }
        };
        self.record(call, Request::Get { id, token }, response);
    }

    async fn search(&mut self) {
        let call = sim::world::true_now();
        let mut service = self.service();
        let owners = Some(v1::Owners { user: "shared user".into(), ..Default::default() });
        let text = text(self.tenant, "c0w1");
        let request = self.request(v1::SearchRequest { text, owners, k: 5, ..Default::default() });
        match time::timeout(ATTEMPT, service.search(request)).await {
            Ok(Ok(answer)) => {
                let hits = answer.into_inner().hits;
                let rows = hits.iter().filter_map(|h| h.memory.as_ref()).map(row).collect();
                self.record(call, Request::Search, Response::Rows(rows));
            }
            _ => self.at = (self.at + 1) % self.gateways.len(),
        }
    }

    /// Sets or removes an edge between two memories, of which either may not be there.
    async fn link(&mut self, from: u64, to: u64, set: bool) {
        let call = sim::world::true_now();
        let (source, target) = (self.id(from), self.id(to));
        let weight = ((from * 7 + to * 3) % 10) as f32 / 10.0;
        let (from, to) = (source.clone(), target.clone());
        let edge = v1::Edge { source, target, relation: "knows".into(), weight, ..Default::default() };
        self.asked = host_of(&self.gateways[self.at]).to_string();
        let mut service = GraphServiceClient::new(self.channels[self.at].clone());
        if !set {
            let request = self.request(v1::DeleteEdgesRequest { edges: vec![edge], options: None });
            let _answer = time::timeout(ATTEMPT, service.delete_edges(request)).await;
            return;
        }
        let request = self.request(v1::UpsertEdgesRequest { edges: vec![edge], options: None });
        match time::timeout(ATTEMPT, service.upsert_edges(request)).await {
            Ok(Ok(_)) => self.record(call, Request::Link { from, to }, Response::Linked),
            Ok(Err(status)) if certain(&status).is_some() => {}
            _ => self.record(call, Request::Link { from, to }, Response::Unknown),
        }
    }

    async fn walk(&mut self, key: u64, inbound: bool) {
        let call = sim::world::true_now();
        let start = vec![self.id(key)];
        self.asked = host_of(&self.gateways[self.at]).to_string();
        let mut service = GraphServiceClient::new(self.channels[self.at].clone());
        let request = self.request(v1::TraverseRequest { start, hops: 3, inbound, ..Default::default() });
        match time::timeout(ATTEMPT, service.traverse(request)).await {
            Ok(Ok(answer)) => {
                let answer = answer.into_inner();
                let edges = answer.edges.into_iter().map(|e| (e.source, e.target)).collect();
                let rows = answer.memories.iter().map(row).collect();
                self.record(call, Request::Walk, Response::Walked { rows, edges });
            }
            _ => self.at = (self.at + 1) % self.gateways.len(),
        }
    }

    async fn list(&mut self) {
        let call = sim::world::true_now();
        let mut service = self.service();
        let read = async {
            let mut stream = service.list(self.request(v1::ListRequest::default())).await?.into_inner();
            let mut rows = vec![];
            while let Some(page) = stream.message().await? {
                rows.extend(page.memories.iter().map(row));
            }
            Ok::<_, Status>(rows)
        };
        match time::timeout(ATTEMPT, read).await {
            Ok(Ok(rows)) => self.record(call, Request::List, Response::Rows(rows)),
            _ => self.at = (self.at + 1) % self.gateways.len(),
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Add,
    Update,
    Delete,
}
