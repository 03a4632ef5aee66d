//! `loci up` and `loci node`: a process that serves until it is asked to stop.

use super::client::{CLIENT_FILE, Client, ClientFile};
use super::{Done, Failure};
use clap::Args;
use futures::future::try_join_all;
use nodes::auth::Keys;
use nodes::config::NodeConfig;
use nodes::node::Node;
use nodes::proto::v1::{self, change_cluster_request::Change};
use sim::disk::Disk;
use sim::time::{Duration, Instant};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const NODE_FILE: &str = "node.toml";
const LOCAL_TENANT: &str = "local";
/// The first so many nodes of a local service keep the cluster map.
const VOTERS_MAX: u16 = 3;
/// How long a node may take to be taken in.
const JOIN_MAX: Duration = Duration::from_secs(60);

#[derive(Args)]
pub struct Up {
    /// Where to serve gRPC.
    #[arg(long, default_value = "127.0.0.1:7400")]
    listen: String,
    /// Where to serve the status page.
    #[arg(long, default_value = "127.0.0.1:7480")]
    http: String,
    /// Nodes of the cluster, all in this process; each listens one port above the one before it.
    #[arg(long, default_value_t = 1)]
    nodes: u16,
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

/// The directory of one node of a local service.
fn dir_of(data: &Path, number: u16, nodes: u16) -> PathBuf {
    if nodes == 1 { data.to_path_buf() } else { data.join(format!("n{number}")) }
}

/// How many nodes made what lies in a data directory; 0: nobody did.
fn nodes_in(data: &Path) -> u16 {
    let made = |number: &u16| data.join(format!("n{number}")).join(NODE_FILE).exists();
    if data.join(NODE_FILE).exists() { 1 } else { (1..u16::MAX).take_while(made).count() as u16 }
}

/// The directories of the nodes whose data lies in one: itself, or those of a service of several nodes.
pub fn dirs_in(data: &Path) -> Vec<PathBuf> {
    match nodes_in(data) {
        0 | 1 => vec![data.to_path_buf()],
        nodes => (1..=nodes).map(|number| dir_of(data, number, nodes)).collect(),
    }
}

/// The address whose port is so many above.
fn above(addr: &str, ports: u16) -> Result<String, Failure> {
    let port = addr.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let above = port.and_then(|(host, port)| Some(format!("{host}:{}", port.checked_add(ports)?)));
    above.ok_or_else(|| Failure(format!("'{addr}' is no host:port with {ports} more ports above it")))
}

/// The configurations of a local service's nodes, made at the first start; addresses are this start's.
fn local_configs(data: &Path, up: &Up) -> Result<Vec<NodeConfig>, Failure> {
    let held = nodes_in(data);
    if up.nodes == 0 || held > up.nodes || (held == 1 && up.nodes > 1) {
        return Err(Failure(format!(
            "{} holds what {held} nodes made, which `--nodes {}` cannot serve; give `--nodes {}`, or another --data",
            data.display(),
            up.nodes,
            held.max(1)
        )));
    }
    let path = dir_of(data, 1, up.nodes).join(NODE_FILE);
    let secret = match fs::read_to_string(&path) {
        Ok(text) => {
            NodeConfig::parse(&text).map_err(|e| Failure(format!("{}: {e}", path.display())))?.cluster_secret
        }
        Err(_) => (0..4).map(|_| format!("{:016x}", sim::rand::u64())).collect(),
    };
    let replicas = (1..=up.nodes.min(VOTERS_MAX))
        .map(|number| Ok((number.to_string(), above(&up.listen, number - 1)?)))
        .collect::<Result<BTreeMap<_, _>, Failure>>()?;
    let config = |number: u16| -> Result<NodeConfig, Failure> {
        let dir = dir_of(data, number, up.nodes);
        let config = NodeConfig {
            name: if up.nodes == 1 { "local".into() } else { format!("n{number}") },
            listen: above(&up.listen, number - 1)?,
            advertise: None,
            public: None,
            http: Some(above(&up.http, number - 1)?),
            data: dir.to_string_lossy().into_owned(),
            roles: nodes::config::all_roles(),
            cluster_secret: secret.clone(),
            id: Some(number.into()),
            rejoin: false,
            shards: 1,
            replicas: replicas.clone(),
            via: BTreeMap::new(),
            regions: None,
            region: None,
            announce: Default::default(),
            tuning: Default::default(),
        };
        fs::create_dir_all(&dir).map_err(|e| Failure(format!("{}: {e}", dir.display())))?;
        write_private(&dir.join(NODE_FILE), &toml::to_string(&config)?)?;
        Ok(config)
    };
    (1..=up.nodes).map(config).collect()
}

pub async fn up(up: Up, data: PathBuf) -> Done {
    let _held = hold(&data)?;
    let configs = local_configs(&data, &up)?;
    let disks = configs.iter().map(|config| sim::disk::open(&config.data)).collect::<Result<Vec<_>, _>>()?;
    let client_path = data.join(CLIENT_FILE);
    let known: Option<ClientFile> =
        fs::read_to_string(&client_path).ok().and_then(|t| toml::from_str(&t).ok());
    let mut keys = Keys::load(&*disks[0])?;
    let key = match known.filter(|known| keys.check(&known.key).is_some()) {
        Some(known) => known.key,
        None => keys.add(LOCAL_TENANT, true)?,
    };
    for disk in &disks {
        if Keys::load(&**disk)? != keys {
            keys.save(&**disk)?;
        }
    }
    let client = ClientFile { addr: up.listen.clone(), key };
    write_private(&client_path, &toml::to_string(&client)?)?;
    let joining: Vec<(u64, String)> = configs
        .iter()
        .filter_map(|config| Some((config.id?, config.listen.clone())))
        .skip(VOTERS_MAX.into())
        .collect();
    let grpc: Vec<String> = configs.iter().map(|config| config.listen.clone()).collect();
    let http: Vec<String> =
        configs.iter().flat_map(|c| &c.http).map(|http| format!("http://{http}")).collect();
    let told = move || {
        println!("loci {} is up", nodes::BUILD);
        println!("  gRPC    {}", grpc.join(" "));
        println!("  status  {}", http.join(" "));
        println!("  data    {}", data.display());
        println!(
            "try: loci add \"The spare key is under the blue pot\", then: loci search \"where is the key\""
        );
        println!("stop with Ctrl-C; everything acknowledged is on disk");
    };
    let waiting = Arc::new(AtomicUsize::new(configs.len()));
    let serving = configs.into_iter().zip(disks).map(|(config, disk)| {
        let (waiting, told) = (waiting.clone(), told.clone());
        serve(config, disk, move |_, _| {
            if waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
                told();
            }
        })
    });
    let serving = try_join_all(serving.collect::<Vec<_>>());
    sim::task::spawn(async move {
        if let Err(Failure(problem)) = join(&client, joining).await {
            sim::warn!("not every node has joined the cluster: {problem}; the next start tries again");
        }
    });
    serving.await.map(drop)
}

/// Takes nodes into the cluster that those before them have made.
async fn join(service: &ClientFile, nodes: Vec<(u64, String)>) -> Done {
    let client = Client::new(&service.addr, &service.key)?;
    for (id, address) in nodes {
        let change = Change::Join(v1::ClusterNode { id, address, ..Default::default() });
        let until = Instant::now() + JOIN_MAX;
        loop {
            let request = v1::ChangeClusterRequest { change: Some(change.clone()) };
            match client.admin().change_cluster(client.request(request)).await {
                Ok(_) => break,
                Err(status) if Instant::now() > until => return Err(client.explain(status)),
                Err(_) => sim::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
    Ok(())
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
