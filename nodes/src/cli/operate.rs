//! Commands of an operator: the months of the store, and the files of a node.

use super::client::To;
use super::{Done, Failure};
use clap::Subcommand;
use nodes::proto::v1;
use serde_json::json;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub enum Partitions {
    /// The months that hold memories.
    List,
    /// Removes everything that was created in a month, of every tenant, with its history and edges.
    Drop {
        /// As 2026-11.
        month: String,
        /// Without it nothing is removed.
        #[arg(long)]
        yes: bool,
    },
}

pub async fn partitions(to: &To, what: Partitions) -> Done {
    let client = to.connect()?;
    match what {
        Partitions::List => {
            let answer = client.admin().partitions(client.request(v1::PartitionsRequest {})).await;
            for p in answer.map_err(|s| client.explain(s))?.into_inner().partitions {
                match to.json {
                    true => println!(
                        "{}",
                        json!({ "month": p.month, "memories": p.memories, "vectors": p.vectors, "history": p.history,
                            "applied_index": p.applied_index })
                    ),
                    false => println!(
                        "{}  {:10} memories  {:10} superseded versions and deletions  last changed at {}",
                        p.month, p.memories, p.history, p.applied_index
                    ),
                }
            }
        }
        Partitions::Drop { month, yes: false } => {
            let problem = "of every tenant goes for ever; say --yes if that is meant";
            return Err(Failure(format!("everything that was created in {month} {problem}")));
        }
        Partitions::Drop { month, yes: true } => {
            let request = v1::DropPartitionRequest { month: month.clone(), options: None };
            let answer = client.admin().drop_partition(client.request(request)).await;
            let memories = answer.map_err(|s| client.explain(s))?.into_inner().memories;
            match to.json {
                true => println!("{}", json!({ "done": "dropped", "month": month, "memories": memories })),
                false => println!("dropped {month} with {memories} memories"),
            }
        }
    }
    Ok(())
}

/// A running node holds `LOCK` in its data directory; to read its database beside it could stop it.
fn refuse_if_in_use(file: &Path) -> Result<(), Failure> {
    for dir in file.ancestors().skip(1).take(2) {
        let Ok(lock) = File::open(dir.join("LOCK")) else { continue };
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            let problem = "is in use by a running node: stop it first, or inspect a copy";
            return Err(Failure(format!("{} {problem}", dir.display())));
        }
    }
    Ok(())
}

/// Prints what a file holds and whether it is sound.
pub fn inspect(file: &Path) -> Done {
    let file: PathBuf = file.canonicalize().map_err(|e| Failure(format!("{}: {e}", file.display())))?;
    refuse_if_in_use(&file)?;
    let (Some(dir), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(Failure(format!("{} is no file", file.display())));
    };
    let disk = sim::disk::open(&dir.to_string_lossy())?;
    let found = storage::inspect::inspect(&*disk, &name.to_string_lossy()).map_err(Failure)?;
    print!("{}", found.text);
    if found.problems.is_empty() {
        println!("sound");
        return Ok(());
    }
    found.problems.iter().for_each(|problem| println!("DAMAGED {problem}"));
    Err(Failure(format!("{} has {} damaged places", file.display(), found.problems.len())))
}
