//! Access counts: gathered in memory, sent as one batched entry now and then.
//!
//! They are statistics for tiering, so they may be lost in a crash, and are dropped beyond a bound; they never delay a read.

use crate::router::Router;
use sim::sync::Notify;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use storage::model::{Command, Memory, MemoryId, Operation, UnixMs};
use storage::slots::{Slot, slot_of};

/// Distinct memories counted between two flushes; what is beyond is not counted.
const COUNTED_MAX: usize = 10_000;
/// Memories in one command.
const TOUCHES_MAX: usize = 1000;

/// By tenant and slot, then by memory.
type Counts = BTreeMap<(String, Slot), BTreeMap<MemoryId, (u64, UnixMs)>>;

#[derive(Clone, Default)]
pub struct Accesses {
    counts: Arc<Mutex<(usize, Counts)>>,
    some: Arc<Notify>,
}

impl Accesses {
    /// Counts one access of each.
    pub fn note<'a>(&self, memories: impl IntoIterator<Item = &'a Arc<Memory>>) {
        let now = time::calendar_ms();
        let mut counts = self.counts.lock().unwrap_or_else(|p| p.into_inner());
        for memory in memories {
            if counts.0 >= COUNTED_MAX {
                break;
            }
            let slot = slot_of(&memory.owner(), &memory.id);
            let of_slot = counts.1.entry((memory.tenant.clone(), slot)).or_default();
            let mut new = 0;
            let entry = of_slot.entry(memory.id).or_insert_with(|| {
                new = 1;
                (0, now)
            });
            *entry = (entry.0 + 1, entry.1.max(now));
            counts.0 += new;
        }
        drop(counts);
        self.some.notify_one();
    }

    /// Sends what was gathered, every `interval` in which there was something.
    pub async fn flush_forever(self, router: Router, interval: Duration) {
        loop {
            self.some.notified().await;
            time::sleep(interval).await;
            let (_, counts) = std::mem::take(&mut *self.counts.lock().unwrap_or_else(|p| p.into_inner()));
            let now = time::calendar_ms();
            let mut commands = vec![];
            for ((tenant, slot), touched) in counts {
                let touched: Vec<_> =
                    touched.into_iter().map(|(id, (count, last))| (id, count, last)).collect();
                for touches in touched.chunks(TOUCHES_MAX) {
                    commands.push(Command {
                        tenant: tenant.clone(),
                        slot: Some(slot),
                        idempotency_key: String::new(),
                        request_hash: [0; 16],
                        now,
                        operation: Operation::Touch(touches.to_vec()),
                    });
                }
            }
            if commands.is_empty() {
                continue;
            }
            let (decided, _) = router.propose(commands, Instant::now() + Duration::from_secs(5)).await;
            if let Some(Err(error)) = decided.iter().find(|decided| decided.is_err()) {
                sim::debug!("access counts lost: {error}");
            }
        }
    }
}
