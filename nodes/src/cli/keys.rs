//! `loci keys`: API keys of a data directory. A running service notices within two seconds.

use super::{Done, Failure, serve};
use clap::Subcommand;
use nodes::auth;
use std::path::PathBuf;

#[derive(Subcommand)]
pub enum Keys {
    /// Makes a key and prints it, once.
    Add {
        tenant: String,
        /// May ask the admin service and write GLOBAL memories.
        #[arg(long)]
        operator: bool,
    },
    /// Lists keys, without their secrets.
    List,
    /// Ends a key.
    Revoke { id: String },
}

pub fn run(command: Keys, data: PathBuf) -> Done {
    if !data.is_dir() {
        return Err(Failure(format!("{} is no data directory; give --data", data.display())));
    }
    // A service of several nodes has the same keys at each.
    let dirs = serve::dirs_in(&data);
    let disks = dirs.iter().map(|dir| sim::disk::open(&dir.to_string_lossy()));
    let disks = disks.collect::<Result<Vec<_>, _>>()?;
    let save = |keys: &auth::Keys| disks.iter().try_for_each(|disk| keys.save(&**disk));
    let mut keys = auth::Keys::load(&*disks[0])?;
    match command {
        Keys::Add { tenant, operator } => {
            let key = keys.add(&tenant, operator)?;
            save(&keys)?;
            println!("{key}");
            eprintln!("this is the only time that the key is shown; use it as --key or LOCI_KEY");
        }
        Keys::List => {
            for key in &keys.key {
                let operator = if key.operator { "  operator" } else { "" };
                println!("{}  {}  {}{operator}", key.id, super::time::format_time(key.created), key.tenant);
            }
        }
        Keys::Revoke { id } => {
            if !keys.revoke(&id) {
                return Err(Failure(format!("there is no key {id}; see `loci keys list`")));
            }
            save(&keys)?;
            println!("revoked {id}");
        }
    }
    Ok(())
}
