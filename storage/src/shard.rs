//! One replica's views of a shard: records in SQLite, vectors in memory, a cache of records; changed by one writer, read by many.
//!
//! Order of an apply: the transaction commits; the vector view and the cache change; the position is published. A
//! reader that saw a position therefore finds at least its effects everywhere.

use crate::apply::{Applier, Effect};
use crate::cache::{Cache, Lookup};
use crate::error::StorageError;
use crate::filter;
use crate::model::*;
use crate::query::{Hit, ListQuery, Page, SearchQuery};
use crate::records::Records;
use crate::records::rows::{self, State};
use crate::vectors::{Scan, Vectors};
use rusqlite::{Connection, params};
use sim::disk::Disk;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// Records kept in memory, without their vectors.
    pub cache_bytes_max: usize,
}

impl Default for ShardOptions {
    fn default() -> ShardOptions {
        ShardOptions { cache_bytes_max: 128 << 20 }
    }
}

/// One entry of the ledger to apply; without a batch it only moves the position.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    pub epoch: u64,
    pub index: u64,
    pub batch: Option<&'a Batch>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub memories: u64,
    pub vectors: u64,
    pub idempotency_keys: u64,
}

pub struct Shard {
    pub(crate) records: Records,
    vectors: RwLock<Vectors>,
    cache: Cache,
    pub(crate) published: Mutex<Arc<State>>,
    /// Held by whoever changes the views.
    pub(crate) applying: Mutex<()>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Tries of a search whose vector view and records were caught a moment apart.
const SEARCH_TRIES: usize = 5;

impl Shard {
    /// Opens the views in `dir`, creating them if there are none. Blocks while the vectors are loaded.
    pub fn open(disk: Arc<dyn Disk>, dir: &str, options: ShardOptions) -> Result<Shard, StorageError> {
        disk.create_dir_all(dir)?;
        let records = Records::open(&*disk, &format!("{dir}/records.db"))?;
        let state = rows::load_state(&records.reader())?;
        let shard = Shard {
            records,
            vectors: RwLock::default(),
            cache: Cache::new(options.cache_bytes_max),
            published: Mutex::new(Arc::new(state)),
            applying: Mutex::new(()),
        };
        shard.load_vectors()?;
        Ok(shard)
    }

    pub(crate) fn load_vectors(&self) -> Result<(), StorageError> {
        let mut vectors = Vectors::default();
        let reader = self.records.reader();
        let mut statement =
            reader.prepare("SELECT position, kind, body, vector FROM memories ORDER BY position")?;
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let row = rows::stored(row)?;
            vectors.insert(&rows::decode_body(&row.body)?, &rows::vector_from(&row.vector));
        }
        *self.vectors_mut() = vectors;
        self.cache.clear();
        Ok(())
    }

    fn vectors(&self) -> RwLockReadGuard<'_, Vectors> {
        self.vectors.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn vectors_mut(&self) -> RwLockWriteGuard<'_, Vectors> {
        self.vectors.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn state(&self) -> Arc<State> {
        lock(&self.published).clone()
    }

    /// Position of the last applied entry, and the bytes stored with it.
    pub fn applied(&self) -> (Position, Vec<u8>) {
        let state = self.state();
        (state.position, state.meta.clone())
    }

    /// Applies entries in order, in one transaction, and stores `meta` with it. Entries at or below the applied position are skipped:
    /// their outcomes are empty. One list of outcomes per entry.
    pub fn apply(&self, entries: &[Entry<'_>], meta: &[u8]) -> Result<Vec<Vec<Outcome>>, StorageError> {
        let _applying = lock(&self.applying);
        let before = self.state();
        let mut writer = self.records.writer();
        let transaction = writer.transaction()?;
        let state = State { meta: meta.to_vec(), ..State::clone(&before) };
        let mut applier = Applier { db: &transaction, state, effects: vec![] };
        let mut outcomes = Vec::with_capacity(entries.len());
        for entry in entries {
            let skipped = (entry.epoch, entry.index) <= (before.position.epoch, before.position.index);
            outcomes.push(if skipped {
                vec![]
            } else {
                applier.entry(entry.epoch, entry.index, entry.batch)?
            });
        }
        let Applier { state, effects, .. } = applier;
        if state.position == before.position {
            return Ok(outcomes);
        }
        rows::save_state(&transaction, &state)?;
        transaction.commit()?;
        drop(writer);
        {
            let mut vectors = self.vectors_mut();
            for effect in effects {
                match effect {
                    Effect::Put { memory, vector } => {
                        vectors.insert(&memory, &vector);
                        let (tenant, id) = (memory.tenant.clone(), memory.id);
                        self.cache.store_applied(&tenant, id, Some(Arc::new(memory)));
                    }
                    Effect::Remove { memory, dimension } => {
                        vectors.remove(&memory, dimension);
                        self.cache.store_applied(&memory.tenant, memory.id, None);
                    }
                }
            }
        }
        *lock(&self.published) = Arc::new(state);
        Ok(outcomes)
    }

    /// A record of exactly this tenant, through the cache.
    fn record(&self, tenant: &str, id: &MemoryId) -> Result<Option<Arc<Memory>>, StorageError> {
        let evictions = match self.cache.get(tenant, id) {
            Lookup::Found(memory) => return Ok(Some(memory)),
            Lookup::Gone => return Ok(None),
            Lookup::Unknown(evictions) => evictions,
        };
        let Some(body) = rows::find_body(&self.records.reader(), tenant, id)? else { return Ok(None) };
        let memory = Arc::new(rows::decode_body(&body)?);
        self.cache.store_read(memory.clone(), evictions);
        Ok(Some(memory))
    }

    /// A memory of the tenant, or a GLOBAL one, with its vector. Expired ones are not found.
    pub fn get(&self, tenant: &str, id: &MemoryId, now: UnixMs) -> Result<Option<Arc<Memory>>, StorageError> {
        for tenant in [tenant, GLOBAL_TENANT] {
            let Some(row) = rows::find(&self.records.reader(), tenant, id)? else { continue };
            let mut memory = rows::decode_body(&row.body)?;
            memory.vector = rows::vector_from(&row.vector);
            return Ok(Some(Arc::new(memory)).filter(|m| alive(m, now)));
        }
        Ok(None)
    }

    /// Memories of the tenant (and GLOBAL ones, if their owner is asked for) in the order of their ids.
    pub fn list(&self, query: &ListQuery) -> Result<Page, StorageError> {
        let global = query.owners.contains(&Owner::Global);
        let reader = self.records.reader();
        let mut statement = reader.prepare_cached(
            "SELECT position, kind, body, vector, id FROM memories
             WHERE tenant = ?1 AND id > ?2 ORDER BY id LIMIT ?3",
        )?;
        let after = query.after.map_or(vec![], |id| id.to_vec());
        let mut found = vec![];
        let mut next = None;
        for tenant in [Some(query.tenant.as_str()), global.then_some(GLOBAL_TENANT)].into_iter().flatten() {
            let (mut after, mut taken) = (after.clone(), 0);
            'pages: loop {
                let mut rows = statement.query(params![tenant, after, 256])?;
                let mut seen = 0;
                while let Some(row) = rows.next()? {
                    seen += 1;
                    after = row.get(4)?;
                    let row = rows::stored(row)?;
                    let mut memory = rows::decode_body(&row.body)?;
                    if !wanted(query, &memory) {
                        continue;
                    }
                    if taken == query.limit {
                        next = Some(());
                        break 'pages;
                    }
                    if query.with_vector {
                        memory.vector = rows::vector_from(&row.vector);
                    }
                    taken += 1;
                    found.push(Arc::new(memory));
                }
                if seen < 256 {
                    break;
                }
            }
        }
        found.sort_by_key(|m| m.id);
        if found.len() > query.limit {
            found.truncate(query.limit);
            next = Some(());
        }
        let next = next.and_then(|()| found.last().map(|m| m.id));
        Ok(Page { memories: found, next })
    }

    /// Every version of a memory, oldest first, deletions included.
    pub fn history(&self, tenant: &str, id: &MemoryId) -> Result<Vec<Change>, StorageError> {
        let reader = self.records.reader();
        let mut statement = reader.prepare_cached(
            "SELECT position, kind, body FROM history WHERE tenant = ?1 AND id = ?2
             UNION ALL SELECT position, kind, body FROM memories WHERE tenant = ?1 AND id = ?2 ORDER BY 1",
        )?;
        self.changes(statement.query(params![tenant, &id[..]])?)
    }

    /// The tenant's changes after a position, in the order of the ledger.
    pub fn changes_after(
        &self,
        tenant: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Change>, StorageError> {
        let reader = self.records.reader();
        let mut statement = reader.prepare_cached(
            "SELECT position, kind, body FROM history WHERE position > ?2 AND tenant = ?1
             UNION ALL SELECT position, kind, body FROM memories WHERE position > ?2 AND tenant = ?1
             ORDER BY 1 LIMIT ?3",
        )?;
        self.changes(statement.query(params![tenant, rows::pack(after), limit as i64])?)
    }

    fn changes(&self, mut found: rusqlite::Rows<'_>) -> Result<Vec<Change>, StorageError> {
        let epoch = self.state().position.epoch;
        let mut changes = vec![];
        while let Some(row) = found.next()? {
            let (position, kind, body): (i64, u8, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let position = rows::unpack(epoch, position);
            changes.push(Change {
                position,
                kind: rows::change_kind(kind)?,
                memory: rows::decode_body(&body)?,
            });
        }
        Ok(changes)
    }

    /// How many vectors a search compares at most.
    pub fn vectors_of(&self, query: &SearchQuery) -> usize {
        self.vectors().count_of(&query.owners, &query.space, query.vector.len())
    }

    /// The k nearest memories by cosine, best first; filters apply before the scan.
    pub fn search(&self, query: &SearchQuery) -> Result<Vec<Hit>, StorageError> {
        let mut hits = vec![];
        for _ in 0..SEARCH_TRIES {
            let allowed = match (&query.filter, &query.time) {
                (None, None) => None,
                _ => Some(self.allowed(query)?),
            };
            let scan = Scan {
                owners: &query.owners,
                space: &query.space,
                vector: &query.vector,
                k: query.k,
                threshold: query.threshold,
                statuses: &query.statuses,
                now: query.now,
                allowed: allowed.as_ref(),
            };
            let nearest = self.vectors().scan(&scan);
            let wanted = nearest.len();
            hits.clear();
            for (id, similarity) in nearest {
                let own = self.record(&query.tenant, &id)?.filter(|m| query.owners.contains(&m.owner()));
                let memory = match own {
                    Some(memory) => Some(memory),
                    None if query.owners.contains(&Owner::Global) => self.record(GLOBAL_TENANT, &id)?,
                    None => None,
                };
                let Some(mut memory) = memory else { continue };
                if query.with_vector {
                    let mut whole = Memory::clone(&memory);
                    whole.vector =
                        self.vectors().get(&memory, query.vector.len()).map_or(vec![], <[f32]>::to_vec);
                    memory = Arc::new(whole);
                }
                hits.push(Hit { memory, similarity });
            }
            // A transaction is committed a moment before the vector view shows it: then some were not found, and it is asked again.
            if hits.len() == wanted {
                break;
            }
        }
        Ok(hits)
    }

    /// Ids that meet a search's conditions.
    fn allowed(&self, query: &SearchQuery) -> Result<HashSet<MemoryId>, StorageError> {
        let reader = self.records.reader();
        let mut allowed = HashSet::new();
        let mut statement = reader.prepare_cached("SELECT body FROM memories WHERE tenant = ?1")?;
        let global = query.owners.contains(&Owner::Global).then_some(GLOBAL_TENANT);
        for tenant in [Some(query.tenant.as_str()), global].into_iter().flatten() {
            let mut found = statement.query([tenant])?;
            while let Some(row) = found.next()? {
                let memory = rows::decode_body(&row.get::<_, Vec<u8>>(0)?)?;
                let meets = query.time.as_ref().is_none_or(|t| filter::in_time(&memory, t))
                    && query.filter.as_ref().is_none_or(|f| filter::matches(f, &memory));
                if meets && query.owners.contains(&memory.owner()) {
                    allowed.insert(memory.id);
                }
            }
        }
        Ok(allowed)
    }

    pub fn counts(&self) -> Result<Counts, StorageError> {
        let state = self.state();
        let vectors = self.vectors().count();
        Ok(Counts { memories: state.memories, vectors, idempotency_keys: state.keys })
    }

    /// Position and digest of the logical state, as apply keeps it.
    pub fn digest(&self) -> (Position, [u8; 16]) {
        let state = self.state();
        (state.position, state.digest.to_le_bytes())
    }

    /// The same, recomputed from every row; and every vector is compared with its record. Stops applying meanwhile.
    pub fn digest_by_scan(&self) -> Result<(Position, [u8; 16]), StorageError> {
        let _applying = lock(&self.applying);
        let reader = self.records.reader();
        let mut digest = 0u128;
        let vectors = self.vectors();
        let mut with_vector = 0;
        each(&reader, "SELECT position, kind, body, vector FROM memories", |row| {
            let row = rows::stored(row)?;
            digest = digest.wrapping_add(rows::memory_hash(
                "memories",
                row.position,
                row.kind,
                &row.body,
                &row.vector,
            ));
            let memory = rows::decode_body(&row.body)?;
            let vector = rows::vector_from(&row.vector);
            if !vector.is_empty() {
                with_vector += 1;
                if vectors.get(&memory, vector.len()) != Some(&vector[..]) {
                    let problem = format!("it differs from the record of memory {:02x?}", memory.id);
                    return Err(StorageError::Corrupt { what: "the vector view".into(), problem });
                }
            }
            Ok(())
        })?;
        if vectors.count() != with_vector {
            let problem = format!("it holds {} vectors, the records {with_vector}", vectors.count());
            return Err(StorageError::Corrupt { what: "the vector view".into(), problem });
        }
        each(&reader, "SELECT position, kind, body FROM history", |row| {
            let (position, kind, body): (i64, u8, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
            digest = digest.wrapping_add(rows::memory_hash("history", position, kind, &body, &[]));
            Ok(())
        })?;
        each(&reader, "SELECT tenant, key, time, hash, outcome FROM keys", |row| {
            digest = digest.wrapping_add(rows::key_hash(&rows::key_row(row)?));
            Ok(())
        })?;
        Ok((self.state().position, digest.to_le_bytes()))
    }

    /// Makes everything applied so far durable.
    pub fn checkpoint(&self) -> Result<Position, StorageError> {
        let position = self.state().position;
        self.records.checkpoint()?;
        Ok(position)
    }
}

/// Calls `work` for every row of a query.
pub(crate) fn each(
    db: &Connection,
    sql: &str,
    mut work: impl FnMut(&rusqlite::Row<'_>) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached(sql)?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        work(row)?;
    }
    Ok(())
}

fn alive(memory: &Memory, now: UnixMs) -> bool {
    memory.expires.is_none_or(|at| at > now)
}

fn wanted(query: &ListQuery, memory: &Memory) -> bool {
    alive(memory, query.now)
        && query.statuses.contains(&memory.status)
        && (query.owners.is_empty() || query.owners.contains(&memory.owner()))
        && query.time.as_ref().is_none_or(|t| filter::in_time(memory, t))
        && query.filter.as_ref().is_none_or(|f| filter::matches(f, memory))
}
