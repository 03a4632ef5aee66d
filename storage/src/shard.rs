//! One replica's views of a shard: records in SQLite, vectors in memory, a cache of records; changed by one writer, read by many.
//!
//! Order of an apply: the transaction commits; the vector view and the cache change; the position is published. A
//! reader that saw a position therefore finds at least its effects everywhere. Commit and change of the vector view are one step
//! under the view's lock, so a search, which holds it too, finds the very records that its vectors came from.

use crate::apply::{Applier, Effect};
use crate::cache::{Cache, Lookup};
use crate::error::StorageError;
use crate::filter;
use crate::model::*;
use crate::query::{Hit, ListQuery, Page, SearchQuery, TimeRange};
use crate::records::Records;
use crate::records::rows::{self, HISTORY, MEMORY, State, Stored};
use crate::vectors::{Scan, Vectors};
use rusqlite::{Connection, ToSql, params};
use sim::disk::Disk;
use std::collections::{BTreeSet, HashSet};
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
    pub(crate) cache: Cache,
    pub(crate) published: Mutex<Arc<State>>,
    /// Held by whoever changes the views.
    pub(crate) applying: Mutex<()>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Shard {
    /// Opens the views in `dir`, creating them if there are none. Blocks while the vectors are loaded.
    pub fn open(disk: Arc<dyn Disk>, dir: &str, options: ShardOptions) -> Result<Shard, StorageError> {
        disk.create_dir_all(dir)?;
        let records = Records::open(disk, &format!("{dir}/records.db"))?;
        let state = rows::load_state(&records.reader())?;
        let shard = Shard {
            records,
            vectors: RwLock::default(),
            cache: Cache::new(options.cache_bytes_max),
            published: Mutex::new(Arc::new(state)),
            applying: Mutex::new(()),
        };
        *shard.vectors_mut() = load_vectors(&shard.records.reader())?;
        Ok(shard)
    }

    fn vectors(&self) -> RwLockReadGuard<'_, Vectors> {
        self.vectors.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn vectors_mut(&self) -> RwLockWriteGuard<'_, Vectors> {
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
        self.records.bound_wal(&writer)?;
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
        let mut vectors = self.vectors_mut();
        transaction.commit()?;
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
        let reader = self.records.reader();
        let whole = |tenant| rows::find(&reader, tenant, id)?.map(|row| whole(&row)).transpose();
        let found = match whole(tenant)? {
            None => whole(GLOBAL_TENANT)?.filter(|m| m.scope == Scope::Global),
            own => own,
        };
        Ok(found.filter(|m| !m.expired(now)).map(Arc::new))
    }

    /// Memories of the tenant (and GLOBAL ones, if their owner is asked for) in the order of their ids.
    pub fn list(&self, query: &ListQuery) -> Result<Page, StorageError> {
        let reader = self.records.reader();
        let after = query.after.map_or(vec![], |id| id.to_vec());
        let mut found = vec![];
        // Of each owner one more than asked for: it tells whether the listing goes on.
        let mut take = |column: &str, key: &dyn ToSql| -> Result<(), StorageError> {
            let mut statement = reader.prepare_cached(&format!(
                "SELECT {MEMORY} FROM memories WHERE {column} = ?1 AND id > ?2 ORDER BY id"
            ))?;
            let mut rows = statement.query(params![key, after])?;
            let mut taken = 0;
            while let (true, Some(row)) = (taken <= query.limit, rows.next()?) {
                let row = rows::stored(row)?;
                let memory = if query.with_vector { whole(&row)? } else { rows::decode_body(&row.body)? };
                if wanted(query, &memory) {
                    taken += 1;
                    found.push(Arc::new(memory));
                }
            }
            Ok(())
        };
        if query.owners.is_empty() {
            take("tenant", &query.tenant)?;
        }
        for owner in readable(&query.tenant, &query.owners) {
            take("owner", &rows::owner_key(owner))?;
        }
        found.sort_by_key(|m| m.id);
        let mut end = query.limit.min(found.len());
        // A GLOBAL memory may share an id with one of the tenant's: a page never ends between them.
        while end > 0 && end < found.len() && found[end].id == found[end - 1].id {
            end += 1;
        }
        let next = if end < found.len() { found[..end].last().map(|m| m.id) } else { None };
        found.truncate(end);
        Ok(Page { memories: found, next })
    }

    /// Every version of a memory, oldest first, deletions included; without vectors.
    pub fn history(&self, tenant: &str, id: &MemoryId) -> Result<Vec<Change>, StorageError> {
        let reader = self.records.reader();
        let mut statement = reader.prepare_cached(
            "SELECT epoch, position, kind, body, x'' FROM history WHERE tenant = ?1 AND id = ?2
             UNION ALL SELECT epoch, position, kind, body, x'' FROM memories WHERE tenant = ?1 AND id = ?2 ORDER BY 2",
        )?;
        changes(statement.query(params![tenant, &id[..]])?)
    }

    /// The tenant's changes after a position, in the order of the ledger; without vectors.
    pub fn changes_after(
        &self,
        tenant: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Change>, StorageError> {
        let reader = self.records.reader();
        let mut statement = reader.prepare_cached(
            "SELECT epoch, position, kind, body, x'' FROM history WHERE position > ?2 AND tenant = ?1
             UNION ALL SELECT epoch, position, kind, body, x'' FROM memories WHERE position > ?2 AND tenant = ?1
             ORDER BY 2 LIMIT ?3",
        )?;
        changes(statement.query(params![tenant, rows::pack(after), limit as i64])?)
    }

    /// How many vectors a search compares at most.
    pub fn vectors_of(&self, query: &SearchQuery) -> usize {
        self.vectors().count_of(&readable(&query.tenant, &query.owners), &query.space, query.vector.len())
    }

    /// The k nearest memories by cosine, best first, equal ones by id; filters apply before the scan.
    pub fn search(&self, query: &SearchQuery) -> Result<Vec<Hit>, StorageError> {
        let owners = readable(&query.tenant, &query.owners);
        // No transaction commits while this is held.
        let vectors = self.vectors();
        let allowed = match (&query.filter, &query.time) {
            (None, None) => None,
            _ => Some(owners.iter().map(|owner| self.allowed(owner, query)).collect::<Result<Vec<_>, _>>()?),
        };
        let nearest = vectors.scan(&Scan {
            owners: &owners,
            space: &query.space,
            vector: &query.vector,
            k: query.k,
            threshold: query.threshold,
            statuses: or_active(&query.statuses),
            now: query.now,
            allowed: allowed.as_deref(),
        });
        let hit = |(id, similarity, whose): (MemoryId, f32, usize)| {
            let tenant = if *owners[whose] == Owner::Global { GLOBAL_TENANT } else { &query.tenant };
            let Some(mut memory) = self.record(tenant, &id)? else {
                let problem = format!("memory {id:02x?} has a vector and no record");
                return Err(StorageError::Corrupt { what: "the vector view".into(), problem });
            };
            if query.with_vector {
                let vector = vectors.get(&memory, query.vector.len()).map_or(vec![], <[f32]>::to_vec);
                memory = Arc::new(Memory { vector, ..Memory::clone(&memory) });
            }
            Ok(Hit { memory, similarity })
        };
        nearest.into_iter().map(hit).collect()
    }

    /// Ids of an owner's memories that meet a search's conditions.
    fn allowed(&self, owner: &Owner, query: &SearchQuery) -> Result<HashSet<MemoryId>, StorageError> {
        let reader = self.records.reader();
        let mut allowed = HashSet::new();
        let mut statement = reader.prepare_cached("SELECT body FROM memories WHERE owner = ?1")?;
        let mut found = statement.query([rows::owner_key(owner)])?;
        while let Some(row) = found.next()? {
            let memory = rows::decode_body(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?)?;
            if meets(&query.filter, &query.time, &memory) {
                allowed.insert(memory.id);
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
        each(&reader, &format!("SELECT {MEMORY} FROM memories"), |row| {
            let row = rows::stored(row)?;
            digest = digest.wrapping_add(rows::memory_hash("memories", &row));
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
        each(&reader, &format!("SELECT {HISTORY} FROM history"), |row| {
            digest = digest.wrapping_add(rows::memory_hash("history", &rows::stored(row)?));
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

/// The vector view of a database.
pub(crate) fn load_vectors(db: &Connection) -> Result<Vectors, StorageError> {
    let mut vectors = Vectors::default();
    each(db, &format!("SELECT {MEMORY} FROM memories ORDER BY position"), |row| {
        let row = rows::stored(row)?;
        vectors.insert(&rows::decode_body(&row.body)?, &rows::vector_from(&row.vector));
        Ok(())
    })?;
    Ok(vectors)
}

/// A memory with its vector.
fn whole(row: &Stored) -> Result<Memory, StorageError> {
    Ok(Memory { vector: rows::vector_from(&row.vector), ..rows::decode_body(&row.body)? })
}

fn changes(mut found: rusqlite::Rows<'_>) -> Result<Vec<Change>, StorageError> {
    let mut changes = vec![];
    while let Some(row) = found.next()? {
        let row = rows::stored(row)?;
        let position = rows::unpack(row.epoch, row.position);
        changes.push(Change {
            position,
            kind: rows::change_kind(row.kind)?,
            memory: rows::decode_body(&row.body)?,
        });
    }
    Ok(changes)
}

/// The owners that a tenant may read, each once.
fn readable<'a>(tenant: &str, owners: &'a [Owner]) -> Vec<&'a Owner> {
    let own = |owner: &&Owner| match owner {
        Owner::Agent { tenant: of, .. } | Owner::User { tenant: of, .. } | Owner::Shared { tenant: of } => {
            of == tenant
        }
        Owner::Global => true,
    };
    owners.iter().filter(own).collect::<BTreeSet<_>>().into_iter().collect()
}

fn or_active(statuses: &[Status]) -> &[Status] {
    if statuses.is_empty() { &[Status::Active] } else { statuses }
}

fn meets(filter: &Option<Filter>, time: &Option<TimeRange>, memory: &Memory) -> bool {
    time.as_ref().is_none_or(|t| filter::in_time(memory, t))
        && filter.as_ref().is_none_or(|f| filter::matches(f, memory))
}

fn wanted(query: &ListQuery, memory: &Memory) -> bool {
    !memory.expired(query.now)
        && or_active(&query.statuses).contains(&memory.status)
        && meets(&query.filter, &query.time, memory)
}
