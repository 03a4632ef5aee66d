//! One node: opens what its roles need, serves, and ends in order. The same function in both worlds.

use crate::access::Accesses;
use crate::auth::KeyRing;
use crate::cache::CacheView;
use crate::config::NodeConfig;
use crate::control::announce::Announcer;
use crate::control::failover::Failover;
use crate::control::grants::Grants;
use crate::control::keeper::Keeper;
use crate::control::recover::{Incarnation, Recoverer, Recovery};
use crate::control::rights::Rights;
use crate::control::since::Since;
use crate::control::{self, Control, driver::Driver, liveness::Watch};
use crate::edge::EdgeLayer;
use crate::error::Error;
use crate::gateway::{About, AdminService, DirectorService, GraphService, MemoryService};
use crate::groups::{CONTROL, Groups, Replica, Settings, Start};
use crate::ledger::epochs::Plan;
use crate::ledger::service::ReplicaService;
use crate::limits::MESSAGE_BYTES_MAX;
use crate::peers::{self, Peers};
use crate::proto::internal::replica_server::ReplicaServer;
use crate::proto::v1::{
    admin_service_server::AdminServiceServer, director_service_server::DirectorServiceServer,
    graph_service_server::GraphServiceServer, memory_service_server::MemoryServiceServer,
};
use crate::reader::Reader;
use crate::roles::Role;
use crate::router::Router;
use crate::writer::Writer;
use sim::disk::Disk;
use sim::net::Routes;
use sim::time::{Duration, Instant};
use std::sync::{Arc, Mutex};

/// A node that is about to serve.
pub struct Node {
    config: NodeConfig,
    routes: Routes,
    pub about: Arc<About>,
    groups: Groups,
}

impl Node {
    /// Opens everything on `disk`, the node's data directory, and recovers.
    pub async fn open(config: NodeConfig, disk: Arc<dyn Disk>) -> Result<Node, Error> {
        let started = Instant::now();
        let internal = |what: &str, e: &dyn std::fmt::Display| Error::Internal(format!("{what}: {e}"));
        let keys = KeyRing::open(disk.clone()).await.map_err(|e| internal("keys", &e))?;
        let here = config.here()?;
        // It may not reach itself by what others know it by.
        let mut via = config.via.clone();
        if config.advertise.is_some() {
            via.entry(here.clone()).or_insert(config.listen.clone());
        }
        let peers = Peers::new(&config.cluster_secret, via)
            .map_err(|e| Error::invalid("cluster_secret", e.to_string()))?;
        let voters = config.voters()?;
        let configured = voters.clone();
        let groups = Groups::default();
        let addrs: Vec<String> = voters.values().cloned().collect();
        let control =
            Control::open(groups.clone(), peers.clone(), disk.clone(), addrs.clone(), here.clone())?;
        let router = Router::new(
            control.clone(),
            groups.clone(),
            peers.clone(),
            (here.clone(), config.region.clone()),
        );
        let (mut grants, mut keeper, mut recovery, waits_for) = (None, None, None, Arc::default());
        let roles = config.replica_roles();
        if let (false, Some(id)) = (roles.is_empty(), config.id) {
            let settings = Settings {
                node: config.name.clone(),
                id,
                here: here.clone(),
                roles,
                gateway: config.gateway()?,
                disk: disk.clone(),
                peers: peers.clone(),
                ledger: config.ledger_options(),
                shard: config.shard_options(),
                product_after_days: config.tuning.product_after_days,
                // Before it has a map, it goes by what its file says.
                rights: Rights::new(config.regions.is_some() || control.map().regions.is_some()),
            };
            let of = disk.clone();
            let since = sim::task::blocking(move || Since::open(of)).await;
            let since = since.map_err(|e| Error::Internal(format!("since when this disk is there: {e}")))?;
            sim::task::spawn(since.clone().note(control.clone()));
            let kept = Keeper::new(settings.clone(), groups.clone(), control.clone(), since);
            keeper = Some(kept.clone());
            if voters.contains_key(&id) {
                let others: Vec<String> = addrs.iter().filter(|addr| **addr != here).cloned().collect();
                let is_new = control.map().version == 0;
                let start =
                    match is_new && (config.rejoin || control::founded_elsewhere(&peers, &others).await) {
                        true => Start::Rejoin { voters: voters.len(), older: false },
                        false => Start::Found { voters: voters.clone(), older: false },
                    };
                let of = disk.clone();
                let incarnation = sim::task::blocking(move || Incarnation::load(&*of)).await?;
                let plan = incarnation.as_ref().map_or(Plan::first(), |held| held.plan(id));
                groups.insert(CONTROL, Replica::open(&settings, CONTROL, start, plan).await?);
                let recovered = Recovery {
                    id,
                    control: control.clone(),
                    groups: groups.clone(),
                    peers: peers.clone(),
                    keeper: kept.clone(),
                    disk: disk.clone(),
                    configured: voters.clone(),
                    incarnation: Arc::new(Mutex::new(incarnation)),
                };
                sim::task::spawn(recovered.clone().keep());
                recovery = Some(recovered);
                let driver = Driver {
                    control: control.clone(),
                    router: router.clone(),
                    groups: groups.clone(),
                    first: (voters, config.shards, config.regions.clone()),
                };
                driver.start();
                let granted = Grants::new(control.clone(), groups.clone());
                sim::task::spawn(granted.clone().keep());
                let failover = Failover {
                    id,
                    control: control.clone(),
                    groups: groups.clone(),
                    peers: peers.clone(),
                    router: router.clone(),
                    grants: granted.clone(),
                    waits_for: Arc::clone(&waits_for),
                };
                sim::task::spawn(failover.keep());
                grants = Some(granted);
                let (control, groups, peers) = (control.clone(), groups.clone(), peers.clone());
                let announcer = Announcer { control: control.clone(), groups: groups.clone() };
                for webhook in config.announce.webhooks()? {
                    sim::task::spawn(announcer.clone().keep(webhook));
                }
                let watch = Watch { control, groups, peers, patience: config.patience() };
                sim::task::spawn(watch.keep());
            }
            kept.open_all(&control.map()).await?;
            sim::info!("replicas opened, {:?} after start", started.elapsed());
            sim::task::spawn(kept.keep());
            let (rights, control, groups, peers) =
                (settings.rights, control.clone(), groups.clone(), peers.clone());
            sim::task::spawn(rights.keep(id, control, groups, peers, addrs));
        }
        let cache = config.replica_roles().contains(&Role::Cache).then(|| {
            let cache = CacheView::new(&config.name, router.clone(), config.cache_options());
            sim::task::spawn(cache.clone().follow(control.clone(), peers.clone()));
            cache
        });
        sim::task::spawn(control.clone().follow());
        let counted = disk.clone();
        let about = Arc::new(About {
            node: config.name.clone(),
            roles: config.roles.clone(),
            started,
            groups: groups.clone(),
            disk_bytes: Box::new(move || disk_bytes(&*counted, "", 0)),
            cache: cache.clone(),
            control: control.clone(),
            peers: peers.clone(),
            waits_for,
        });

        let mut edge_services = None;
        let mut builder = Routes::builder();
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        builder.add_service(health_service);
        let server = ReplicaServer::new(ReplicaService {
            groups: groups.clone(),
            cache,
            control: control.clone(),
            peers: peers.clone(),
            grants,
            keeper,
            recovery,
        });
        let limit = peers::MESSAGE_BYTES_MAX;
        builder.add_service(server.max_decoding_message_size(limit).max_encoding_message_size(limit));
        if config.is_edge()? {
            let accesses = Accesses::default();
            let interval = Duration::from_millis(config.tuning.access_flush_ms.max(1));
            sim::task::spawn(accesses.clone().flush_forever(router.clone(), interval));
            let (writer, reader) = (Writer { router: router.clone() }, Reader { router, accesses });
            edge_services = Some((writer.clone(), reader.clone()));
            let graph = GraphService { writer: writer.clone(), reader: reader.clone() };
            let server = MemoryServiceServer::new(MemoryService { writer, reader });
            let limit = MESSAGE_BYTES_MAX;
            builder.add_service(server.max_decoding_message_size(limit).max_encoding_message_size(limit));
            builder.add_service(GraphServiceServer::new(graph));
        }
        let recoverer = Recoverer { control, peers, configured };
        let admin = AdminService { about: about.clone(), edge: edge_services, recoverer };
        builder.add_service(AdminServiceServer::new(admin));
        builder.add_service(DirectorServiceServer::new(DirectorService { about: about.clone() }));
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
            .build_v1()
            .map_err(|e| internal("reflection", &e))?;
        builder.add_service(reflection);
        let edge = EdgeLayer::new(keys, &config.cluster_secret);
        let routes = Routes::from(builder.routes().prepare().into_axum_router().layer(edge));
        Ok(Node { config, routes, about, groups })
    }

    /// Serves until `shutdown`; `ready` gets the bound address.
    pub async fn serve(
        self,
        ready: impl FnOnce(String),
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Error> {
        let groups = self.groups.clone();
        let shutdown = async move {
            shutdown.await;
            for replica in groups.all() {
                replica.ledger.hand_over().await;
            }
        };
        let served = sim::net::serve(&self.config.listen, self.routes, ready, shutdown).await;
        for replica in self.groups.all() {
            replica.ledger.stop().await;
            let closed = sim::task::blocking(move || replica.ledger.shard.checkpoint()).await;
            closed.map_err(|e| Error::Internal(format!("views: {e}")))?;
        }
        served.map_err(|e| Error::Internal(e.to_string()))
    }
}

/// Bytes of all files under `dir`; what cannot be read counts nothing.
fn disk_bytes(disk: &dyn Disk, dir: &str, depth: usize) -> u64 {
    let names = disk.list(dir).unwrap_or_default();
    let size = |name: &String| {
        let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
        match disk.open(&path).and_then(|f| f.len()) {
            Ok(len) => len,
            Err(_) if depth < 4 => disk_bytes(disk, &path, depth + 1),
            Err(_) => 0,
        }
    };
    names.iter().map(size).sum()
}
