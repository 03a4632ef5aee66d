//! One node: opens what its roles need, serves, and ends in order. The same function in both worlds.

use crate::access::Accesses;
use crate::auth::KeyRing;
use crate::config::{EDGE_ROLES, NodeConfig, REPLICA_ROLES};
use crate::edge::EdgeLayer;
use crate::error::Error;
use crate::gateway::{About, AdminService, GraphService, MemoryService};
use crate::ledger::service::ReplicaService;
use crate::ledger::{Ledger, recovery};
use crate::limits::MESSAGE_BYTES_MAX;
use crate::peers::{self, Peers};
use crate::proto::internal::replica_server::ReplicaServer;
use crate::proto::v1::{
    admin_service_server::AdminServiceServer, graph_service_server::GraphServiceServer,
    memory_service_server::MemoryServiceServer,
};
use crate::reader::Reader;
use crate::remote::Remote;
use crate::views::{LocalViews, Views};
use crate::writer::{Proposer, Writer};
use sim::disk::Disk;
use sim::net::Routes;
use sim::time::{Duration, Instant};
use std::sync::Arc;

/// A node that is about to serve.
pub struct Node {
    config: NodeConfig,
    routes: Routes,
    pub about: Arc<About>,
    ledger: Option<Ledger>,
}

impl Node {
    /// Opens everything on `disk`, the node's data directory, and recovers.
    pub async fn open(config: NodeConfig, disk: Arc<dyn Disk>) -> Result<Node, Error> {
        let started = Instant::now();
        let internal = |what: &str, e: &dyn std::fmt::Display| Error::Internal(format!("{what}: {e}"));
        let keys = KeyRing::open(disk.clone()).await.map_err(|e| internal("keys", &e))?;
        let peers = Peers::new(&config.cluster_secret)
            .map_err(|e| Error::invalid("cluster_secret", e.to_string()))?;
        let voters = config.voters()?;
        let replicas: Vec<String> = voters.values().cloned().collect();

        let ledger = match (config.has_group(&REPLICA_ROLES)?, config.id) {
            (true, Some(id)) => {
                let (options, views_disk) = (config.ledger_options(), disk.clone());
                let (log, shard) = (options.log.clone(), config.shard_options());
                let alone = voters.len() == 1;
                let opened = sim::task::blocking(move || recovery::open(&views_disk, log, shard, alone));
                let opened = opened.await?;
                if config.rejoin {
                    opened.rejoin()?;
                }
                sim::info!(
                    "views opened at {}, {:?} after start",
                    opened.shard.applied().0.index,
                    started.elapsed()
                );
                crate::upkeep::start(&opened.shard, config.tuning.product_after_days);
                Some(Ledger::open(id, voters, disk.clone(), opened, peers.clone(), options).await?)
            }
            _ => None,
        };
        let remote = Remote::new(peers.clone(), replicas);
        let views: Arc<dyn Views> = match &ledger {
            Some(ledger) => Arc::new(LocalViews::new(ledger.clone(), config.name.clone())),
            None => Arc::new(remote.clone()),
        };
        let counted = disk.clone();
        let about = Arc::new(About {
            node: config.name.clone(),
            roles: config.roles.clone(),
            started,
            ledger: ledger.clone(),
            disk_bytes: Box::new(move || disk_bytes(&*counted, "", 0)),
        });

        let mut edge_services = None;
        let mut builder = Routes::builder();
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        builder.add_service(health_service);
        if let Some(ledger) = &ledger {
            let (views, received) = (views.clone(), Default::default());
            let service = ReplicaService { ledger: ledger.clone(), views, disk: disk.clone(), received };
            let server = ReplicaServer::new(service);
            let limit = peers::MESSAGE_BYTES_MAX;
            builder.add_service(server.max_decoding_message_size(limit).max_encoding_message_size(limit));
        }
        if config.has_group(&EDGE_ROLES)? {
            let proposer: Arc<dyn Proposer> = match &ledger {
                Some(ledger) => Arc::new(ledger.clone()),
                None => Arc::new(remote),
            };
            let accesses = Accesses::default();
            let interval = Duration::from_millis(config.tuning.access_flush_ms.max(1));
            sim::task::spawn(accesses.clone().flush_forever(proposer.clone(), interval));
            let (writer, reader) = (Writer { ledger: proposer }, Reader { views, accesses });
            edge_services = Some((writer.clone(), reader.clone()));
            let graph = GraphService { writer: writer.clone(), reader: reader.clone() };
            let server = MemoryServiceServer::new(MemoryService { writer, reader });
            let limit = MESSAGE_BYTES_MAX;
            builder.add_service(server.max_decoding_message_size(limit).max_encoding_message_size(limit));
            builder.add_service(GraphServiceServer::new(graph));
        }
        let admin = AdminService { about: about.clone(), edge: edge_services };
        builder.add_service(AdminServiceServer::new(admin));
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
            .build_v1()
            .map_err(|e| internal("reflection", &e))?;
        builder.add_service(reflection);
        let edge = EdgeLayer::new(keys, &config.cluster_secret);
        let routes = Routes::from(builder.routes().prepare().into_axum_router().layer(edge));
        Ok(Node { config, routes, about, ledger })
    }

    /// Serves until `shutdown`; `ready` gets the bound address.
    pub async fn serve(
        self,
        ready: impl FnOnce(String),
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Error> {
        let leaving = self.ledger.clone();
        let shutdown = async move {
            shutdown.await;
            if let Some(ledger) = leaving {
                ledger.hand_over().await;
            }
        };
        let served = sim::net::serve(&self.config.listen, self.routes, ready, shutdown).await;
        if let Some(ledger) = self.ledger {
            ledger.stop().await;
            let closed = sim::task::blocking(move || ledger.shard.checkpoint()).await;
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
