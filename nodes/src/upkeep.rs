//! The vector view's upkeep on a replica: its buffer is sealed when it is full, segments are merged and old months compressed when that is due.
//!
//! The two go on side by side and beside everything else ([`storage::Shard::seal`]). A full disk leaves the vectors where they are, in memory and
//! in the records, and is tried again; any other failure of the disk ends the process, as it does everywhere.

use crate::ledger::recovery;
use sim::time::Duration;
use std::sync::{Arc, Weak};
use storage::model::Month;
use storage::{Shard, StorageError};

/// How often it is looked whether something is due.
const LOOK: Duration = Duration::from_millis(500);
const DAY_MS: i64 = 24 * 3600 * 1000;
/// The pause after a full disk doubles up to this.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// `product_after_days`: see [`crate::config::Tuning`].
pub fn start(shard: &Arc<Shard>, product_after_days: Option<i64>) {
    let sealed = |shard: &Shard| match shard.seal_due() {
        true => shard.seal().map(|()| true),
        false => Ok(false),
    };
    sim::task::spawn(keep(Arc::downgrade(shard), "sealing vectors", sealed));
    let merged = move |shard: &Shard| match product_after_days {
        _ if shard.merge()? => Ok(true),
        Some(days) => {
            shard.compress(Month::of(sim::time::calendar_ms().saturating_sub(days.saturating_mul(DAY_MS))))
        }
        None => Ok(false),
    };
    sim::task::spawn(keep(Arc::downgrade(shard), "merging vectors", merged));
}

/// Does what is due, as long as the shard is there. `work` says whether it did something: then there may be more.
async fn keep<W>(shard: Weak<Shard>, what: &str, work: W)
where
    W: Fn(&Shard) -> Result<bool, StorageError> + Copy + Send + 'static,
{
    let mut pause = LOOK;
    while let Some(shard) = shard.upgrade() {
        let worker = shard.clone();
        match sim::task::blocking(move || work(&worker)).await {
            Ok(true) => pause = Duration::ZERO,
            Ok(false) => pause = LOOK,
            Err(error) if recovery::is_fatal_to_views(&error) => recovery::give_up_views(&shard, error).await,
            Err(error) if error.is_full() => {
                pause = (pause * 2).clamp(LOOK, PAUSE_MAX);
                sim::warn!("{what}: {error}; trying again in {pause:?}");
            }
            Err(error) => sim::task::abort(&format!("{what}: {error}")).await,
        }
        drop(shard);
        sim::time::sleep(pause).await;
    }
}
