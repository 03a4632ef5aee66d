//! The command line: serve, and use a service from a shell.
//!
//! Output is for people; with `--json` each result is one JSON line. Exit status: 0 done, 1 the service said no, 2 wrong usage.

mod client;
mod cluster;
mod control;
mod demo;
mod endpoints;
mod erase;
mod graph;
mod import;
mod jsonl;
mod keys;
mod memories;
mod operate;
mod region;
mod serve;
mod split;

use clap::{Parser, Subcommand};
use nodes::time;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "loci", version = nodes::BUILD, about = "A memory store for AI agents")]
struct Cli {
    #[command(flatten)]
    to: client::To,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the whole service in this process.
    Up(serve::Up),
    /// Runs one node of a cluster.
    Node {
        /// The node's TOML file; see `nodes/src/config.rs` or the README.
        #[arg(long)]
        config: PathBuf,
    },
    /// Shows a service of three replicas that loses its leader and nothing else.
    Demo(demo::Demo),
    /// API keys of a data directory.
    #[command(subcommand)]
    Keys(keys::Keys),
    /// Adds a memory.
    Add(memories::Add),
    /// Imports files or folders: JSONL, Markdown, plain text. Running it again adds nothing twice.
    Import(import::Import),
    /// Finds memories.
    Search(memories::Search),
    /// Shows one memory.
    Get {
        id: String,
        /// As some replica or cache has it, which may be a little behind.
        #[arg(long)]
        eventual: bool,
    },
    /// Lists memories.
    List(memories::List),
    /// Changes a memory.
    Update(memories::Update),
    /// Deletes a memory.
    Delete { id: String },
    /// Erases everything of a user, or of an agent, for good, and prints a receipt.
    Erase(erase::Erase),
    /// Shows every version of a memory.
    History { id: String },
    /// Relates one memory to another.
    Link(graph::Link),
    /// Walks along relations.
    Graph(graph::Graph),
    /// Prints changes as they happen.
    Watch,
    /// Shows how the service is.
    Status,
    /// Nodes and shards: showing and changing them. Needs an operator's key.
    #[command(subcommand)]
    Cluster(cluster::Cluster),
    /// The group of nodes that keeps the cluster map. Needs an operator's key.
    #[command(subcommand)]
    Control(control::Control),
    /// Regions: which one writes, how far the other one is, failover and failback. Needs an operator's key.
    #[command(subcommand)]
    Region(region::Region),
    /// Months of memories: what each holds, and dropping one. Needs an operator's key.
    #[command(subcommand)]
    Partitions(operate::Partitions),
    /// Says what a file of a stopped node holds, and whether it is sound.
    Inspect { file: PathBuf },
}

/// Why a command failed, in words for the person at the shell.
#[derive(Debug)]
pub struct Failure(pub String);

impl<E: std::fmt::Display> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(error.to_string())
    }
}

pub type Done = Result<(), Failure>;

/// The program's main.
pub fn main() -> ExitCode {
    let Cli { to, command } = Cli::parse();
    let run = async move {
        match command {
            Command::Up(up) => serve::up(up, to.data).await,
            Command::Node { config } => serve::node(config).await,
            Command::Demo(demo) => demo::run(demo).await,
            Command::Keys(keys) => keys::run(keys, to.data),
            Command::Add(add) => memories::add(&to, add).await,
            Command::Import(import) => import::run(&to, import).await,
            Command::Search(search) => memories::search(&to, search).await,
            Command::Get { id, eventual } => memories::get(&to, id, eventual).await,
            Command::List(list) => memories::list(&to, list).await,
            Command::Update(update) => memories::update(&to, update).await,
            Command::Delete { id } => memories::delete(&to, id).await,
            Command::Erase(erase) => erase::erase(&to, erase).await,
            Command::History { id } => memories::history(&to, id).await,
            Command::Link(link) => graph::link(&to, link).await,
            Command::Graph(walk) => graph::graph(&to, walk).await,
            Command::Cluster(what) => cluster::run(&to, what).await,
            Command::Control(what) => control::run(&to, what).await,
            Command::Region(what) => region::run(&to, what).await,
            Command::Partitions(what) => operate::partitions(&to, what).await,
            Command::Inspect { file } => operate::inspect(&file),
            Command::Watch => memories::watch(&to).await,
            Command::Status => memories::status(&to).await,
        }
    };
    match sim::task::run_process(0, run) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(Failure(message))) => {
            eprintln!("loci: {message}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("loci: cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}
