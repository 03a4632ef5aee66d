//! `loci up` and `loci node`: a process that serves until it is asked to stop.

use super::client::{CLIENT_FILE, ClientFile};
use super::{Done, Failure};
use clap::Args;
use nodes::auth::Keys;
use nodes::config::NodeConfig;
use nodes::node::Node;
use sim::disk::Disk;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const NODE_FILE: &str = "node.toml";
const LOCAL_TENANT: &str = "local";

#[derive(Args)]
pub struct Up {
    /// Where to serve gRPC.
    #[arg(long, default_value = "127.0.0.1:7400")]
    listen: String,
    /// Where to serve the status page.
    #[arg(long, default_value = "127.0.0.1:7480")]
    http: String,
}

/// Holds a data directory: a second process that opened it would corrupt it.
fn hold(data: &Path) -> Result<File, Failure> {
    fs::create_dir_all(data).map_err(|e| Failure(format!("{}: {e}", data.display())))?;
    let path = data.join("LOCK");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            Err(Failure(format!("{} is in use by another loci process; stop that one first", data.display())))
        }
        Err(fs::TryLockError::Error(error)) => Err(Failure(format!("{}: {error}", path.display()))),
    }
}

/// Writes a file that only its owner may read.
fn write_private(path: &Path, text: &str) -> Result<(), Failure> {
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}

/// The configuration of a local service, made at the first start; addresses are this start's.
fn local_config(data: &Path, up: &Up) -> Result<NodeConfig, Failure> {
    let path = data.join(NODE_FILE);
    let secret = match fs::read_to_string(&path) {
        Ok(text) => {
            NodeConfig::parse(&text).map_err(|e| Failure(format!("{}: {e}", path.display())))?.cluster_secret
        }
        Err(_) => (0..4).map(|_| format!("{:016x}", sim::rand::u64())).collect(),
    };
    let config = NodeConfig {
        name: "local".into(),
        listen: up.listen.clone(),
        http: Some(up.http.clone()),
        data: data.to_string_lossy().into_owned(),
        roles: nodes::config::EDGE_ROLES
            .iter()
            .chain(&nodes::config::REPLICA_ROLES)
            .map(|r| r.to_string())
            .collect(),
        cluster_secret: secret,
        id: Some(1),
        rejoin: false,
        shards: 1,
        replicas: BTreeMap::from([("1".to_string(), up.listen.clone())]),
        tuning: Default::default(),
    };
    write_private(&path, &toml::to_string(&config)?)?;
    Ok(config)
}

pub async fn up(up: Up, data: PathBuf) -> Done {
    let _held = hold(&data)?;
    let config = local_config(&data, &up)?;
    let disk = sim::disk::open(&config.data)?;
    let client_path = data.join(CLIENT_FILE);
    let known: Option<ClientFile> =
        fs::read_to_string(&client_path).ok().and_then(|t| toml::from_str(&t).ok());
    let mut keys = Keys::load(&*disk)?;
    let key = match known.filter(|known| keys.check(&known.key).is_some()) {
        Some(known) => known.key,
        None => {
            let key = keys.add(LOCAL_TENANT, true)?;
            keys.save(&*disk)?;
            key
        }
    };
    write_private(&client_path, &toml::to_string(&ClientFile { addr: up.listen.clone(), key })?)?;
    serve(config, disk, move |addr, http| {
        println!("loci {} is up", nodes::BUILD);
        println!("  gRPC    {addr}");
        println!("  status  http://{}", http.unwrap_or_default());
        println!("  data    {}", data.display());
        println!(
            "try: loci add \"The spare key is under the blue pot\", then: loci search \"where is the key\""
        );
        println!("stop with Ctrl-C; everything acknowledged is on disk");
    })
    .await
}

pub async fn node(path: PathBuf) -> Done {
    let text = fs::read_to_string(&path).map_err(|e| Failure(format!("{}: {e}", path.display())))?;
    let config = NodeConfig::parse(&text).map_err(|e| Failure(format!("{}: {e}", path.display())))?;
    let _held = hold(Path::new(&config.data))?;
    let disk = sim::disk::open(&config.data)?;
    let name = config.name.clone();
    serve(config, disk, move |addr, _| println!("{name} serves at {addr}")).await
}

async fn serve(
    config: NodeConfig,
    disk: Arc<dyn Disk>,
    ready: impl FnOnce(String, Option<String>) + Send + 'static,
) -> Done {
    let http = config.http.clone();
    let node = Node::open(config, disk).await?;
    if let Some(http) = http.clone() {
        let routes = nodes::http::routes(node.about.clone());
        sim::task::spawn(async move {
            if let Err(error) = sim::net::serve(&http, routes, |_| (), std::future::pending()).await {
                sim::warn!("no status page: {error}");
            }
        });
    }
    node.serve(|addr| ready(addr, http), sim::task::shutdown_signal()).await?;
    sim::info!("stopped");
    Ok(())
}
