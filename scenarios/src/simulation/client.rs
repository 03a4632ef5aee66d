//! Clients: each is a session of one tenant, does one thing after the other, and records what it saw.
//!
//! A write carries an idempotency key and is retried, at any gateway, until its answer is certain or patience ends. Now and then a
//! client sends an answered key again, as a confused caller would, and expects the same answer.

use super::cluster::{Cluster, host_of, tenant};
use crate::history::{At, Id, Op, Refusal, Request, Response, Row};
use crate::spec::Workload;
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
/// Share of answered writes whose key is sent again.
const REPEAT: f64 = 0.05;

/// What all clients write into.
pub type Recorder = Arc<Mutex<Vec<Op>>>;

struct Client {
    number: usize,
    tenant: usize,
    key: String,
    gateways: Vec<String>,
    channels: Vec<Channel>,
    at: usize,
    workload: Workload,
    recorder: Recorder,
    /// The session: the greatest position seen, and the last version of each memory.
    token: v1::Token,
    versions: BTreeMap<Id, u64>,
    writes: u64,
    /// The gateway that the last attempt asked.
    asked: String,
}

/// Starts the scenario's clients, each on a machine of its own; they end at `until` of true time.
pub fn start(
    cluster: &Cluster,
    workload: &Workload,
    recorder: &Recorder,
    until: Duration,
) -> Arc<Mutex<usize>> {
    let running = Arc::new(Mutex::new(workload.clients));
    for number in 0..workload.clients {
        let tenant = number % workload.tenants;
        let (key, gateways) = (cluster.keys[tenant].clone(), cluster.gateways.clone());
        let (workload, recorder, running) = (workload.clone(), recorder.clone(), running.clone());
        let clock = ClockModel { rate_ppm: rand::below(101) as i64 - 50, ..ClockModel::default() };
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
                workload: workload.clone(),
                recorder: recorder.clone(),
                token: v1::Token::default(),
                versions: BTreeMap::new(),
                writes: 0,
                asked: String::new(),
            };
            let (world, running) = (world.clone(), running.clone());
            async move {
                // Nodes elect a leader first.
                time::sleep(Duration::from_secs(2)).await;
                while world.now() < until {
                    let pause = -(1.0 - rand::unit()).max(1e-9).ln() * client.workload.think_ms as f64;
                    time::sleep(Duration::from_micros((pause * 1000.0) as u64)).await;
                    client.act().await;
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
    let words: Vec<&str> = (0..3).map(|_| WORDS[rand::below(8) as usize]).collect();
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

    fn pick_id(&self) -> Id {
        let keys = self.workload.keys_per_tenant;
        id_of(self.tenant, (keys as f64 * rand::unit().powf(self.workload.key_skew)) as u64)
    }

    async fn act(&mut self) {
        let dice = rand::unit();
        if dice < self.workload.strong_reads {
            return self.get(false).await;
        }
        // The rest in fixed proportions.
        let dice = (dice - self.workload.strong_reads) / (1.0 - self.workload.strong_reads);
        match dice {
            d if d < 0.30 => self.write(Kind::Add).await,
            d if d < 0.58 => self.write(Kind::Update).await,
            d if d < 0.68 => self.write(Kind::Delete).await,
            d if d < 0.88 => self.get(true).await,
            d if d < 0.94 => self.search().await,
            d if d < 0.96 => self.link().await,
            d if d < 0.98 => self.walk().await,
            _ => self.list().await,
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

    async fn write(&mut self, kind: Kind) {
        let id = self.pick_id();
        self.writes += 1;
        let marker = format!("c{}w{}", self.number, self.writes);
        let known = self.versions.get(&id).copied();
        let expected = known.filter(|_| rand::chance(0.4));
        let request = match kind {
            Kind::Add => Request::Add { id: id.clone(), marker: marker.clone() },
            Kind::Update => Request::Update { id: id.clone(), expected, marker: marker.clone() },
            Kind::Delete => Request::Delete { id: id.clone(), expected },
        };
        let text = text(self.tenant, &marker);
        let call = sim::world::true_now();
        let mut answer = self.attempts(&request, &marker, &text).await;
        if !matches!(answer, Response::Unknown) && rand::chance(REPEAT) {
            let again = self.attempts(&request, &marker, &text).await;
            if !matches!(again, Response::Unknown) && again != answer {
                answer = Response::Changed { first: format!("{answer:?}"), then: format!("{again:?}") };
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
            Request::Get { .. } | Request::Search | Request::List | Request::Walk => {
                return Err(Status::internal("not a write"));
            }
        };
        Ok(Response::Written { version, at: at(info.as_ref()) })
    }

    /// A read that gets no answer says nothing and leaves no record.
    async fn get(&mut self, session: bool) {
        let id = self.pick_id();
        let session = session && index(Some(&self.token)) > 0;
        let token = session.then(|| self.token.clone());
        let options = Some(v1::ReadOptions {
            consistency: if session { v1::Consistency::Session } else { v1::Consistency::Strong } as i32,
            token: token.clone(),
            ..Default::default()
        });
        if rand::chance(0.3) {
            self.at = rand::below(self.gateways.len() as u64) as usize;
        }
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

    /// Sets an edge between two memories, of which either may not be there.
    async fn link(&mut self) {
        let (source, target) = (self.pick_id(), self.pick_id());
        let weight = rand::unit() as f32;
        let edge = v1::Edge { source, target, relation: "knows".into(), weight, ..Default::default() };
        let mut service = GraphServiceClient::new(self.channels[self.at].clone());
        if rand::chance(0.2) {
            let request = self.request(v1::DeleteEdgesRequest { edges: vec![edge], options: None });
            let _answer = time::timeout(ATTEMPT, service.delete_edges(request)).await;
        } else {
            let request = self.request(v1::UpsertEdgesRequest { edges: vec![edge], options: None });
            let _answer = time::timeout(ATTEMPT, service.upsert_edges(request)).await;
        }
    }

    async fn walk(&mut self) {
        let call = sim::world::true_now();
        let (start, inbound) = (vec![self.pick_id()], rand::chance(0.3));
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
