//! One replica's views of a shard: records and graph in SQLite, vectors in mapped segments, a cache of records; changed by one writer, read by
//! many. Opening reads no rows but those that no segment of vectors has yet.
//!
//! Order of an apply: the transaction commits; the vector view and the cache change; the position is published. A
//! reader that saw a position therefore finds at least its effects everywhere. Commit and change of the vector view are one step
//! under the view's lock, so a search, which holds it too, finds the very records that its vectors came from.

use crate::apply::{Applier, Effect};
use crate::cache::{Cache, Lookup};
use crate::codec;
use crate::error::StorageError;
use crate::filter;
use crate::graph::{self, Walk, Walked};
use crate::model::*;
use crate::moves;
use crate::query::{Hit, ListQuery, Page, Partition, SearchQuery, TimeRange};
use crate::records::fields;
use crate::records::months::{self, Months, suffix};
use crate::records::rows::{self, HISTORY, KEY, MEMORY, State, Stored};
use crate::records::words;
use crate::records::{LazyReader, RECORDS, Records};
use crate::shown::Shown;
use crate::slots::{Moving, Slot, SlotSet, Slots, slot_of};
use crate::touched::Touched;
use crate::upkeep::Upkeep;
use crate::vectors::conditions::Meeting;
use crate::vectors::{Failed, Meets, Scan, Tree, VectorOptions, facets};
use rusqlite::{Connection, params};
use sim::disk::Disk;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// Records kept in memory, without their vectors.
    pub cache_bytes_max: usize,
    /// Whether memories are found by their words; without, neither the index nor [`Shard::by_words`] is there. Views that were made otherwise
    /// are refused as damaged, so that they are made anew.
    pub words: bool,
    pub vectors: VectorOptions,
    /// A simulated run's trace shows how far these views are applied, under this name.
    pub gauge: Option<&'static str>,
}

impl Default for ShardOptions {
    fn default() -> ShardOptions {
        ShardOptions {
            cache_bytes_max: 128 << 20,
            words: true,
            vectors: VectorOptions::default(),
            gauge: None,
        }
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
    pub edges: u64,
}

pub struct Shard {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) dir: String,
    pub(crate) records: Records,
    vectors: RwLock<Tree>,
    pub(crate) vector_options: VectorOptions,
    pub(crate) words: bool,
    gauge: Option<&'static str>,
    pub(crate) upkeep: Upkeep,
    pub(crate) cache: Cache,
    pub(crate) published: Mutex<Arc<State>>,
    /// Where the last transaction that began to commit leads.
    pub(crate) committing: Mutex<Position>,
    pub(crate) touched: Touched,
    /// Held by whoever changes the views.
    pub(crate) applying: Mutex<()>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A memory by tenant, slot and id, and its score.
type Scored = ((String, Slot, MemoryId), f32);

/// The fact that views have no index of words.
const WORDLESS: &str = "wordless";
/// The fact that views are damaged.
pub(crate) const CONDEMNED: &str = "condemned";

/// What a fact says whose being there is what matters.
fn fact(disk: &dyn Disk, dir: &str, name: &str) -> Result<Option<String>, StorageError> {
    match crate::facts::get(disk, dir, name) {
        Ok(reason) => Ok(reason.map(|r| String::from_utf8_lossy(&r).into_owned())),
        Err(crate::facts::FactError::Io(error)) => Err(error.into()),
        // Damaged itself, it says the same.
        Err(crate::facts::FactError::Damaged(_)) => Ok(Some("for a reason that is lost".into())),
    }
}

impl Shard {
    /// Opens the views in `dir`, creating them if there are none. Fails if they were condemned.
    pub fn open(disk: Arc<dyn Disk>, dir: &str, options: ShardOptions) -> Result<Shard, StorageError> {
        disk.create_dir_all(dir)?;
        if let Some(reason) = fact(&*disk, dir, CONDEMNED)? {
            return Err(StorageError::Damaged { what: format!("what is stored in {dir}"), problem: reason });
        }
        let wordless = fact(&*disk, dir, WORDLESS)?.is_some();
        if wordless == options.words && disk.list(dir)?.iter().any(|name| name == RECORDS) {
            let with = if wordless { "without" } else { "with" };
            let problem =
                format!("they were made {with} an index of words, which this node now has otherwise");
            return Err(StorageError::Damaged { what: format!("the views in {dir}"), problem });
        }
        Shard::open_any(disk, dir, options, wordless)
    }

    /// Removes the views in `dir`, whatever their state, and opens empty ones. They count as condemned until [`Shard::acquit`], so that a
    /// crash in between leaves nothing that looks whole.
    pub fn open_anew(disk: Arc<dyn Disk>, dir: &str, options: ShardOptions) -> Result<Shard, StorageError> {
        disk.create_dir_all(dir)?;
        crate::facts::put(&*disk, dir, CONDEMNED, b"being made anew")?;
        let mark = format!("{CONDEMNED}.meta");
        for name in disk.list(dir)?.into_iter().filter(|name| *name != mark) {
            disk.remove(&format!("{dir}/{name}"))?;
        }
        disk.sync_dir(dir)?;
        Shard::open_any(disk, dir, options, false)
    }

    /// Makes views that were opened anew durable, and good from now on.
    pub fn acquit(&self) -> Result<(), StorageError> {
        self.checkpoint()?;
        Ok(crate::facts::remove(&*self.disk, &self.dir, CONDEMNED)?)
    }

    /// `wordless`: whether that fact is there.
    fn open_any(
        disk: Arc<dyn Disk>,
        dir: &str,
        options: ShardOptions,
        wordless: bool,
    ) -> Result<Shard, StorageError> {
        match (options.words, wordless) {
            (true, true) => crate::facts::remove(&*disk, dir, WORDLESS)?,
            (false, false) => crate::facts::put(&*disk, dir, WORDLESS, b"")?,
            _ => {}
        }
        let records = Records::open(disk.clone(), &format!("{dir}/{RECORDS}"))?;
        let state = rows::load_state(&records.reader())?;
        let (upkeep, vector_options, gauge) = (Upkeep::default(), options.vectors, options.gauge);
        if let Some(name) = gauge {
            sim::trace::gauge(name, state.position.index);
        }
        let tree = upkeep.open(&*disk, dir, &records, state.position, vector_options.clone())?;
        Ok(Shard {
            disk,
            dir: dir.into(),
            records,
            vectors: RwLock::new(tree),
            vector_options,
            words: options.words,
            gauge,
            upkeep,
            cache: Cache::new(options.cache_bytes_max),
            touched: Touched::new(state.position.index),
            committing: Mutex::new(state.position),
            published: Mutex::new(Arc::new(state)),
            applying: Mutex::new(()),
        })
    }

    /// Marks the views as damaged, durably: they will not be opened again, but made anew.
    pub fn condemn(&self, reason: &str) -> Result<(), StorageError> {
        if crate::facts::put(&*self.disk, &self.dir, CONDEMNED, reason.as_bytes()).is_err() {
            // A disk that cannot sync may still keep a name until the next start.
            self.disk.create(&format!("{}/{CONDEMNED}.meta", self.dir))?;
        }
        Ok(())
    }

    pub(crate) fn tree(&self) -> RwLockReadGuard<'_, Tree> {
        self.vectors.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn tree_mut(&self) -> RwLockWriteGuard<'_, Tree> {
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

    /// The position's index alone.
    pub fn applied_index(&self) -> u64 {
        self.state().position.index
    }

    /// What no read that has ended by now shows more than. It may be ahead of [`Shard::applied`]: rows can be read before their position is
    /// published.
    pub fn seen_at_most(&self) -> Position {
        *lock(&self.committing)
    }

    /// Which slots are here, and the move that this shard takes part in.
    pub fn slots(&self) -> Slots {
        self.state().slots.clone()
    }

    /// The memories that changed between an index of the ledger and the position that is shown, and that position with the slots that it
    /// shows; without the memories if anything may have changed.
    pub fn touched_after(&self, index: u64) -> (Position, SlotSet, Option<Vec<MemoryId>>) {
        let state = self.state();
        (state.position, state.slots.owned(), self.touched.after(index))
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
        let mut applier = Applier::new(&transaction, state, self.words)?;
        let mut outcomes = Vec::with_capacity(entries.len());
        for entry in entries {
            let skipped = (entry.epoch, entry.index) <= (before.position.epoch, before.position.index)
                && !sim::planted!("apply-entries-again");
            outcomes.push(if skipped {
                vec![]
            } else {
                applier.entry(entry.epoch, entry.index, entry.batch)?
            });
        }
        if applier.state.position == before.position {
            return Ok(outcomes);
        }
        let (state, effects) = applier.finish()?;
        let sealed = self.tree().sealed;
        rows::forget_dropped(&transaction, sealed)?;
        // Searches wait for the commit, which is short if the words are in their index before (a savepoint does that), and the pages in the log.
        transaction.execute_batch("SAVEPOINT words; RELEASE words")?;
        transaction.cache_flush()?;
        // Nor do they wait while what the buffer has is copied to where there is room for more.
        let mut grown = self.tree().buffer.grown(effects.iter().filter_map(Effect::coded));
        let mut tree = self.tree_mut();
        *lock(&self.committing) = state.position;
        transaction.commit()?;
        tree.buffer.take_grown(&mut grown);
        let (mut touched, mut any) = (vec![], state.slots != before.slots);
        let cache = |memory: &Arc<Memory>| {
            self.cache.store_applied(&memory.tenant, memory.slot(), memory.id, Some(memory.clone()));
        };
        for effect in &effects {
            match effect {
                Effect::Put { memory, coded } => {
                    touched.push(memory.id);
                    tree.conditions.forget(&memory.owner());
                    if let Some(coded) = coded {
                        tree.put(coded);
                    }
                    if !sim::planted!("keep-an-old-version-in-the-cache") {
                        cache(memory);
                    }
                }
                // No condition asks for accesses.
                Effect::Touch { memory } => cache(memory),
                Effect::Remove { memory, position, dimension } => {
                    touched.push(memory.id);
                    tree.conditions.forget(&memory.owner());
                    tree.remove(memory, *position, *dimension);
                    self.cache.store_applied(&memory.tenant, memory.slot(), memory.id, None);
                }
                Effect::Arrive { coded } => tree.put(coded),
                Effect::Leave { memory, position, dimension } => {
                    tree.conditions.forget(&memory.owner());
                    tree.remove(memory, *position, *dimension);
                }
                Effect::ForgetRecords => {
                    any = true;
                    tree.conditions.clear();
                    self.cache.clear();
                }
                Effect::Erased => tree.erased = Some(tree.next_kill()),
                Effect::DropMonth(month) => {
                    any = true;
                    tree.conditions.clear();
                    tree.drop_month(*month);
                    self.cache.clear();
                }
            }
        }
        tree.applied = state.position;
        match any {
            true => self.touched.forget(state.position.index),
            false => self.touched.add(state.position.index, touched),
        }
        if let Some(name) = self.gauge {
            sim::trace::gauge(name, state.position.index);
        }
        *lock(&self.published) = Arc::new(state);
        Ok(outcomes)
    }

    /// A record of exactly this tenant and slot, through the cache. `since`: the cache's number of before the reader's snapshot was taken, if
    /// that may be older than this call.
    fn record(
        &self,
        reader: &LazyReader<'_>,
        (tenant, slot, id): (&str, Slot, &MemoryId),
        since: Option<u64>,
    ) -> Result<Option<Arc<Memory>>, StorageError> {
        let evictions = match self.cache.get(tenant, slot, id) {
            Lookup::Found(memory) => return Ok(Some(memory)),
            Lookup::Gone => return Ok(None),
            Lookup::Unknown(evictions) => since.unwrap_or(evictions),
        };
        let Some(body) = rows::find_body(reader.get(), tenant, id, slot)? else { return Ok(None) };
        let memory = Arc::new(rows::decode_body(&body)?);
        self.cache.store_read(slot, memory.clone(), evictions);
        Ok(Some(memory))
    }

    /// A memory of the tenant, or a GLOBAL one, with its vector, of one slot or of the smallest that has it. Expired ones are not found.
    pub fn get(
        &self,
        tenant: &str,
        slot: Option<Slot>,
        id: &MemoryId,
        now: UnixMs,
    ) -> Result<Option<Arc<Memory>>, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let shown = Shown::in_snapshot(&snapshot, &self.state())?;
        for (slot, place) in rows::places(&snapshot, tenant, id, slot)? {
            if place.position == 0 || !shown.slot(tenant, slot) {
                continue;
            }
            let memory = whole(&rows::stored_at(&snapshot, place)?)?;
            if !memory.expired(now) {
                return Ok(Some(Arc::new(memory)));
            }
        }
        let global = slot_of(&Owner::Global, id);
        if slot.is_some_and(|slot| slot != global) || !shown.slot(GLOBAL_TENANT, global) {
            return Ok(None);
        }
        let found = rows::find(&snapshot, GLOBAL_TENANT, id, global)?.map(|row| whole(&row)).transpose()?;
        Ok(found.filter(|m| m.scope == Scope::Global && !m.expired(now)).map(Arc::new))
    }

    /// The slots in which the tenant's, or a GLOBAL, memory with this id is or was, deletions included, by rising slot, with the tenants whose
    /// slots they are; only of slots that are shown here.
    pub fn locate(&self, tenant: &str, id: &MemoryId) -> Result<Vec<(Slot, String)>, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let shown = Shown::in_snapshot(&snapshot, &self.state())?;
        let own = rows::places(&snapshot, tenant, id, None)?;
        let mut found: Vec<(Slot, String)> = own.into_iter().map(|(slot, _)| (slot, tenant.into())).collect();
        let global = slot_of(&Owner::Global, id);
        if tenant != GLOBAL_TENANT && rows::place(&snapshot, GLOBAL_TENANT, id, global)?.is_some() {
            found.push((global, GLOBAL_TENANT.into()));
        }
        found.retain(|(slot, of)| shown.slot(of, *slot));
        found.sort_by_key(|(slot, _)| *slot);
        Ok(found)
    }

    /// Memories of the tenant (and GLOBAL ones, if their owner is asked for) in the order of their ids.
    pub fn list(&self, query: &ListQuery) -> Result<Page, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let (months, shown) =
            (months_in(&snapshot, &query.time)?, Shown::in_snapshot(&snapshot, &self.state())?);
        let after = query.after.map_or(vec![], |id| id.to_vec());
        let mut found: Vec<Arc<Memory>> = vec![];
        let decode = |row: &rusqlite::Row<'_>| -> Result<Option<Arc<Memory>>, StorageError> {
            let row = rows::stored(row)?;
            let memory = if query.with_vector { whole(&row)? } else { rows::decode_body(&row.body)? };
            Ok((wanted(query, &memory) && shown.memory(&memory)).then(|| Arc::new(memory)))
        };
        if query.owners.is_empty() {
            let mut statement = snapshot.prepare_cached(
                "SELECT month, position, slot, id FROM directory WHERE tenant = ?1 AND id > ?2 AND position != 0
                 ORDER BY id, slot",
            )?;
            let mut places = statement.query(params![query.tenant, after])?;
            while let Some(place) = places.next()? {
                // One of another id than the page's last tells that the listing goes on.
                let end = query.limit.checked_sub(1).and_then(|at| found.get(at)).map(|m| m.id);
                if found.len() > query.limit && found.last().map(|m| m.id) != end {
                    break;
                }
                let month = Month(place.get(0)?);
                if !months.contains_key(&month) || !shown.slot(&query.tenant, place.get(2)?) {
                    continue;
                }
                let sql = format!("SELECT {MEMORY} FROM m{} WHERE position = ?1", suffix(month));
                let position: i64 = place.get(1)?;
                let memory = snapshot.prepare_cached(&sql)?.query_row([position], |row| Ok(decode(row)))?;
                found.extend(memory?);
            }
        }
        let condition = query.filter.as_ref().and_then(fields::condition);
        for owner in readable(&query.tenant, &query.owners, &shown) {
            let Some(number) = rows::owner_number(&snapshot, owner)? else { continue };
            for month in months.keys() {
                let taken = Cell::new(0);
                // Those of each month and owner are in order; of each one more than asked for is enough.
                let mut take = |row: &rusqlite::Row<'_>| -> Result<(), StorageError> {
                    if let Some(memory) = decode(row)?.filter(|m| m.id[..] > after[..]) {
                        taken.set(taken.get() + 1);
                        found.push(memory);
                    }
                    Ok(())
                };
                if let Some(condition) = &condition {
                    condition.each(&snapshot, *month, MEMORY, number, &mut take)?;
                    continue;
                }
                let of = suffix(*month);
                let sql = format!("SELECT {MEMORY} FROM m{of} WHERE owner = ?1 AND id > ?2 ORDER BY id");
                let mut statement = snapshot.prepare_cached(&sql)?;
                let mut rows = statement.query(params![number, after])?;
                while let Some(row) = rows.next()? {
                    take(row)?;
                    if taken.get() > query.limit {
                        break;
                    }
                }
            }
        }
        found.sort_by_key(|m| m.id);
        let mut end = query.limit.min(found.len());
        // Memories of several owners may share an id: a page never ends between them.
        while end > 0 && end < found.len() && found[end].id == found[end - 1].id {
            end += 1;
        }
        let next = if end < found.len() { found[..end].last().map(|m| m.id) } else { None };
        found.truncate(end);
        Ok(Page { memories: found, next })
    }

    /// Every version of a memory, oldest first, deletions included; without vectors. Of one slot, or of the smallest that knows the id.
    pub fn history(
        &self,
        tenant: &str,
        slot: Option<Slot>,
        id: &MemoryId,
    ) -> Result<Vec<Change>, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let (months, shown) = (months::load(&snapshot)?, Shown::in_snapshot(&snapshot, &self.state())?);
        let mut found: BTreeMap<Slot, Vec<Stored>> = BTreeMap::new();
        let wanted = |of: Slot| slot.is_none_or(|slot| slot == of) && shown.slot(tenant, of);
        for month in months.keys() {
            let sql =
                format!("SELECT {HISTORY}, slot FROM h{} WHERE tenant = ?1 AND id = ?2", suffix(*month));
            let mut statement = snapshot.prepare_cached(&sql)?;
            let mut rows = statement.query(params![tenant, &id[..]])?;
            while let Some(row) = rows.next()? {
                let slot = row.get(5)?;
                if wanted(slot) {
                    found.entry(slot).or_default().push(rows::stored(row)?);
                }
            }
        }
        for (slot, place) in rows::places(&snapshot, tenant, id, slot)? {
            if place.position != 0 && wanted(slot) {
                found.entry(slot).or_default().push(rows::stored_at(&snapshot, place)?);
            }
        }
        let mut found = found.into_values().next().unwrap_or_default();
        found.sort_by_key(|row| row.position);
        found.iter().map(change).collect()
    }

    /// The tenant's changes after a position, in the order of the ledger; without vectors. What came with a move is told once it is adopted,
    /// at the positions that it has here; whoever was told of something behind those by then is not told of it again.
    pub fn changes_after(
        &self,
        tenant: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Change>, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let mut found = vec![];
        let (months, shown) = (months::load(&snapshot)?, Shown::in_snapshot(&snapshot, &self.state())?);
        for month in months.keys() {
            let of = suffix(*month);
            let memories = format!(
                "SELECT epoch, position, kind, body, x'', slot FROM m{of} WHERE position > ?2
                 AND (SELECT tenant FROM owners WHERE number = m{of}.owner) = ?1 ORDER BY position"
            );
            let history = format!(
                "SELECT {HISTORY}, slot FROM h{of} WHERE position > ?2 AND tenant = ?1 ORDER BY position"
            );
            for sql in [memories, history] {
                let mut statement = snapshot.prepare_cached(&sql)?;
                let mut rows = statement.query(params![tenant, rows::pack(after)])?;
                let mut some = 0;
                while some < limit
                    && let Some(row) = rows.next()?
                {
                    if shown.slot(tenant, row.get(5)?) {
                        some += 1;
                        found.push(rows::stored(row)?);
                    }
                }
            }
        }
        found.sort_by_key(|row| row.position);
        found.truncate(limit);
        found.iter().map(change).collect()
    }

    /// How many vectors a search is about.
    pub fn vectors_of(&self, query: &SearchQuery) -> usize {
        let owners = readable(&query.tenant, &query.owners, &Shown::of(&self.state().slots));
        self.tree().count_of(&owners, &query.space, query.vector.len())
    }

    /// The k nearest memories by cosine, and the k that fit the query's words best; by cosine, best first, equal ones by id. Filters
    /// apply before the search.
    pub fn search(&self, query: &SearchQuery) -> Result<Vec<Hit>, StorageError> {
        loop {
            match self.search_once(query) {
                Ok(hits) => return Ok(hits),
                // Damage is mended, and then the search begins again.
                Err(failed) => self.healed(failed)?,
            }
        }
    }

    fn search_once(&self, query: &SearchQuery) -> Result<Vec<Hit>, Failed> {
        // No transaction commits while this is held, nor is anything published.
        let tree = self.tree();
        let shown = Shown::of(&self.state().slots);
        let owners = &readable(&query.tenant, &query.owners, &shown)[..];
        // Of GLOBAL memories each has its own.
        let slots: Vec<Slot> = owners.iter().map(|owner| slot_of(owner, &[0; 16])).collect();
        let key_of = |whose: usize, id: &MemoryId| match owners[whose] {
            Owner::Global => (GLOBAL_TENANT, slot_of(&Owner::Global, id)),
            _ => (&query.tenant[..], slots[whose]),
        };
        let reader = self.records.lazy_reader();
        let (mut allowed, mut months) = (None, None);
        let by_facets = query.filter.as_ref().filter(|filter| query.time.is_none() && facets::tell(filter));
        if by_facets.is_none() && (query.filter.is_some() || query.time.is_some()) {
            let condition = codec::encode(&(&query.filter, &query.time));
            let meeting = |owner: &&Owner| {
                if let Some(known) = tree.conditions.get(owner, &condition) {
                    return Ok(known);
                }
                let within = months_in(reader.get(), &query.time)?;
                let found = Arc::new(self.allowed(&reader, &within, owner, query)?);
                tree.conditions.remember(owner, &condition, found.clone());
                Ok(found)
            };
            let of = owners.iter().map(meeting).collect::<Result<Vec<_>, StorageError>>()?;
            months = Some(of.iter().flat_map(|meeting| meeting.months.iter().copied()).collect());
            allowed = Some(of);
        }
        let fetch = |whose: usize, id: &MemoryId| -> Result<Vec<f32>, StorageError> {
            let (tenant, slot) = key_of(whose, id);
            if let Some(row) = rows::find(reader.get(), tenant, id, slot)? {
                return Ok(rows::vector_from(&row.vector));
            }
            Err(without_record(id))
        };
        let meets = |whose: usize, id: &MemoryId| -> Result<bool, StorageError> {
            let (tenant, slot) = key_of(whose, id);
            match self.record(&reader, (tenant, slot, id), None)? {
                Some(memory) => Ok(meets(&query.filter, &None, &memory)),
                None => Err(without_record(id)),
            }
        };
        let scan = Scan {
            owners,
            space: &query.space,
            vector: &query.vector,
            k: query.k,
            threshold: query.threshold,
            statuses: or_active(&query.statuses),
            now: query.now,
            filter: by_facets.map(|filter| (filter, &meets as Meets<'_>)),
            allowed: allowed.as_deref(),
            months: months.as_ref(),
            shown: shown.slots(),
        };
        let nearest = tree.search(&scan, &fetch)?;
        let mut keywords = match query.text.is_empty() {
            true => BTreeMap::new(),
            false => self.keywords_with(reader.get(), query, owners, &shown)?.into_iter().collect(),
        };
        let mut hits = vec![];
        for (id, similarity, whose) in nearest {
            let (tenant, slot) = key_of(whose, &id);
            let Some(memory) = self.record(&reader, (tenant, slot, &id), None)? else {
                return Err(without_record(&id).into());
            };
            let keywords = keywords.remove(&(tenant.to_string(), slot, id)).unwrap_or_default();
            hits.push(Hit { memory, similarity, keywords });
        }
        let vector_of = |memory: &Memory| -> Result<Vec<f32>, Failed> {
            if let Some(vector) = tree.get(memory, query.vector.len())? {
                return Ok(vector);
            }
            let row = rows::find(reader.get(), &memory.tenant, &memory.id, memory.slot())?;
            Ok(row.map_or(vec![], |row| rows::vector_from(&row.vector)))
        };
        for ((tenant, slot, id), keywords) in keywords {
            let Some(memory) = self.record(&reader, (&tenant, slot, &id), None)? else { continue };
            let vector = if memory.space == query.space { vector_of(&memory)? } else { vec![] };
            let same = vector.len() == query.vector.len();
            let similarity = if same { crate::vectors::dot(&query.vector, &vector) } else { 0.0 };
            hits.push(Hit { memory, similarity, keywords });
        }
        if query.with_vector {
            for hit in &mut hits {
                let vector = vector_of(&hit.memory)?;
                hit.memory = Arc::new(Memory { vector, ..Memory::clone(&hit.memory) });
            }
        }
        hits.sort_by(|a, b| {
            b.similarity.total_cmp(&a.similarity).then_with(|| a.memory.id.cmp(&b.memory.id))
        });
        Ok(hits)
    }

    /// The k memories that fit the query's words best, best first; their cosines with its vector are those of the records. Needs no vector view.
    pub fn by_words(&self, query: &SearchQuery) -> Result<Vec<Hit>, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let shown = Shown::in_snapshot(&snapshot, &self.state())?;
        let owners = readable(&query.tenant, &query.owners, &shown);
        let mut hits = vec![];
        for ((tenant, slot, id), keywords) in self.keywords_with(&snapshot, query, &owners, &shown)? {
            let Some(row) = rows::find(&snapshot, &tenant, &id, slot)? else { continue };
            let mut memory = whole(&row)?;
            let same = memory.space == query.space && memory.vector.len() == query.vector.len();
            let similarity = if same { crate::vectors::dot(&query.vector, &memory.vector) } else { 0.0 };
            if !query.with_vector {
                memory.vector.clear();
            }
            hits.push(Hit { memory: Arc::new(memory), similarity, keywords });
        }
        Ok(hits)
    }

    fn keywords_with(
        &self,
        snapshot: &Connection,
        query: &SearchQuery,
        owners: &[&Owner],
        shown: &Shown,
    ) -> Result<Vec<Scored>, StorageError> {
        let mut numbers: Vec<i64> = owners
            .iter()
            .filter_map(|owner| rows::owner_number(snapshot, owner).transpose())
            .collect::<Result<_, _>>()?;
        if sim::planted!("search-the-words-of-all-tenants") {
            numbers.extend(0..10);
        }
        let months = months_in(snapshot, &query.time)?;
        let mut best = vec![];
        for found in words::search(snapshot, &months, &numbers, &words::query_terms(&query.text))? {
            if best.len() == query.k {
                break;
            }
            let place = rows::Place { month: found.month, position: found.position, version: 0 };
            let memory = rows::decode_body(&rows::body_at(snapshot, place)?)?;
            if shown.memory(&memory)
                && !memory.expired(query.now)
                && or_active(&query.statuses).contains(&memory.status)
                && meets(&query.filter, &query.time, &memory)
            {
                let slot = memory.slot();
                best.push(((memory.tenant, slot, memory.id), found.score));
            }
        }
        Ok(best)
    }

    /// Ids of an owner's memories that meet a search's conditions.
    fn allowed(
        &self,
        reader: &LazyReader<'_>,
        months: &Months,
        owner: &Owner,
        query: &SearchQuery,
    ) -> Result<Meeting, StorageError> {
        let mut allowed = Meeting::default();
        let snapshot = reader.get().unchecked_transaction()?;
        let Some(number) = rows::owner_number(&snapshot, owner)? else { return Ok(allowed) };
        let condition = query.filter.as_ref().and_then(fields::condition);
        let tenant = if *owner == Owner::Global { GLOBAL_TENANT } else { &query.tenant };
        let slot = (*owner != Owner::Global).then(|| slot_of(owner, &[0; 16]));
        for month in months.keys() {
            if let Some(condition) = &condition {
                condition.each(&snapshot, *month, "id", number, &mut |row| {
                    let id: MemoryId = row.get(0)?;
                    let slot = slot.unwrap_or_else(|| slot_of(owner, &id));
                    let memory = self.record(reader, (tenant, slot, &id), None)?;
                    if memory.is_some_and(|memory| meets(&query.filter, &query.time, &memory)) {
                        allowed.ids.insert(id);
                        allowed.months.insert(*month);
                    }
                    Ok(())
                })?;
                continue;
            }
            let sql = format!("SELECT body FROM m{} WHERE owner = ?1", suffix(*month));
            let mut statement = snapshot.prepare_cached(&sql)?;
            let mut found = statement.query([number])?;
            while let Some(row) = found.next()? {
                let memory = rows::decode_body(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?)?;
                if meets(&query.filter, &query.time, &memory) {
                    allowed.ids.insert(memory.id);
                    allowed.months.insert(*month);
                }
            }
        }
        Ok(allowed)
    }

    /// The erasures that were applied here, oldest first, of the last [`crate::erase::KEPT_MS`].
    pub fn erasures(&self) -> Result<Vec<Erasure>, StorageError> {
        rows::erasures(&self.records.reader())
    }

    /// Walks along edges. What has expired, was deleted or is another tenant's is neither shown nor walked through.
    pub fn walk(&self, walk: &Walk) -> Result<Walked, StorageError> {
        let evictions = self.cache.evictions();
        let reader = self.records.lazy_reader();
        let snapshot = reader.get().unchecked_transaction()?;
        let shown = Shown::in_snapshot(&snapshot, &self.state())?;
        let statuses: &[Status] =
            if walk.include_archived { &[Status::Active, Status::Archived] } else { &[Status::Active] };
        let seen = |memory: &Memory| !memory.expired(walk.now) && statuses.contains(&memory.status);
        graph::walk(&snapshot, walk, &shown, &mut |id, slot| {
            for (slot, place) in rows::places(&snapshot, &walk.tenant, id, slot)? {
                if place.position != 0 && shown.slot(&walk.tenant, slot) {
                    let found = self.record(&reader, (&walk.tenant, slot, id), Some(evictions))?;
                    // The first that is there stands for the id.
                    if let Some(found) = found {
                        return Ok(Some(found).filter(|memory| seen(memory)));
                    }
                }
            }
            let global = slot_of(&Owner::Global, id);
            if slot.is_some_and(|slot| slot != global) || !shown.slot(GLOBAL_TENANT, global) {
                return Ok(None);
            }
            let found = self.record(&reader, (GLOBAL_TENANT, global, id), Some(evictions))?;
            Ok(found.filter(|memory| memory.scope == Scope::Global && seen(memory)))
        })
    }

    /// The edges of a walk's start that it may follow, whatever is at their other ends; of each memory the heaviest first.
    pub fn edges_of(&self, walk: &Walk) -> Result<Vec<Edge>, StorageError> {
        let reader = self.records.lazy_reader();
        let snapshot = reader.get().unchecked_transaction()?;
        graph::edges_of(&snapshot, walk, &Shown::in_snapshot(&snapshot, &self.state())?)
    }

    /// The months that hold something, oldest first, with all that is stored: what a move has brought and not yet shown too.
    pub fn partitions(&self) -> Result<Vec<Partition>, StorageError> {
        let partition = |(month, state): (Month, months::MonthState)| Partition {
            month,
            applied: state.position,
            memories: state.memories,
            vectors: state.vectors,
            history: state.history,
        };
        Ok(months::load(&self.records.reader())?.into_iter().map(partition).collect())
    }

    /// How many there are of each that are shown. While a move has rows here that are not, those are counted each time.
    pub fn counts(&self) -> Result<Counts, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let state = rows::load_state(&snapshot)?;
        let mut counts = Counts {
            memories: state.memories,
            vectors: state.vectors,
            idempotency_keys: state.keys,
            edges: state.edges,
        };
        let hidden = match state.slots.moving() {
            Some((_, Moving::Left(slots))) => slots,
            Some((_, Moving::Arriving(arrived))) => &arrived.slots,
            _ => return Ok(counts),
        };
        for (first, last) in moves::touched(&snapshot, hidden)?.pairs() {
            let of = |table: &str, tenant: &str, what: &str| -> Result<(u64, u64), StorageError> {
                let sql = format!(
                    "SELECT {tenant} AS whose, slot, count(*), {what} FROM {table} WHERE slot BETWEEN ?1 AND ?2
                     GROUP BY whose, slot"
                );
                let mut statement = snapshot.prepare_cached(&sql)?;
                let mut rows = statement.query([*first, *last])?;
                let mut counted = (0, 0);
                while let Some(row) = rows.next()? {
                    if hidden.contains(&row.get::<_, String>(0)?, row.get(1)?) {
                        counted.0 += row.get::<_, i64>(2)? as u64;
                        counted.1 += row.get::<_, i64>(3)? as u64;
                    }
                }
                Ok(counted)
            };
            let tenant_of = |column: &str| format!("(SELECT tenant FROM owners WHERE number = {column})");
            for month in months::load(&snapshot)?.keys() {
                let with_vector = "count(*) FILTER (WHERE length(vector) > 0)";
                let table = format!("m{}", suffix(*month));
                let (memories, vectors) = of(&table, &tenant_of(&format!("{table}.owner")), with_vector)?;
                counts.memories -= memories;
                counts.vectors -= vectors;
            }
            counts.idempotency_keys -= of("keys", "tenant", "0")?.0;
            counts.edges -= of("edges", &tenant_of("edges.tenant"), "0")?.0;
        }
        Ok(counts)
    }

    /// Position and digest of the logical state, as apply keeps it.
    pub fn digest(&self) -> (Position, [u8; 16]) {
        let state = self.state();
        (state.position, state.whole_digest().to_le_bytes())
    }

    /// The same, recomputed from every row; what is derived from rows is compared with them: the directory, the counts, the owners'
    /// words, and every vector in memory. Stops applying meanwhile.
    pub fn digest_by_scan(&self) -> Result<(Position, [u8; 16]), StorageError> {
        loop {
            let damaged = Cell::new(None);
            match (self.scan_all(&damaged), damaged.get()) {
                (Err(error), Some(month)) => self.healed(Failed { month: Some(month), error })?,
                (scanned, _) => return scanned,
            }
        }
    }

    /// Tells a month whose vectors are damaged.
    fn scan_all(&self, damaged: &Cell<Option<Month>>) -> Result<(Position, [u8; 16]), StorageError> {
        let _applying = lock(&self.applying);
        let tree = self.tree();
        let reader = self.records.reader();
        let corrupt = |what: &str, problem: String| StorageError::Corrupt { what: what.into(), problem };
        let mut digest = 0u128;
        let months = months::load(&reader)?;
        let mut counted = Months::new();
        let (mut memories, mut with_vector) = (0, 0);
        let mut owners: HashMap<(Month, i64), (i64, i64)> = HashMap::new();
        rows::each(&reader, &months, (&format!("{MEMORY}, owner, words, slot"), 'm'), &mut |month, row| {
            let (owner, words): (i64, i64) = (row.get(5)?, row.get(6)?);
            let slot: Slot = row.get(7)?;
            let row = rows::stored(row)?;
            let hash = rows::memory_hash("memories", &row);
            digest = digest.wrapping_add(hash);
            let memory = rows::decode_body(&row.body)?;
            let vector = rows::vector_from(&row.vector);
            let place = rows::Place { month, position: row.position, version: memory.version };
            if slot != memory.slot() || rows::place(&reader, &memory.tenant, &memory.id, slot)? != Some(place)
            {
                return Err(corrupt("the directory", format!("it has memory {:02x?} elsewhere", memory.id)));
            }
            let of_month = counted.entry(month).or_default();
            of_month.digest = of_month.digest.wrapping_add(hash);
            of_month.hold(&memory, !vector.is_empty() as u64);
            memories += 1;
            with_vector += !vector.is_empty() as u64;
            let counts = owners.entry((month, owner)).or_default();
            *counts = (counts.0 + 1, counts.1 + words);
            let held = |vector: &[f32]| tree.holds(&memory, row.position, vector);
            let note = |failed: Failed| {
                damaged.set(failed.month);
                failed.error
            };
            if self.vector_options.kept && !vector.is_empty() && !held(&vector).map_err(note)? {
                let problem = format!("it differs from the record of memory {:02x?}", memory.id);
                return Err(corrupt("the vector view", problem));
            }
            Ok(())
        })?;
        let state = self.state();
        digest = digest.wrapping_add(rows::slots_hash(&state.slots));
        let held = if self.vector_options.kept { tree.count() } else { state.vectors };
        if (memories, with_vector, held) != (state.memories, state.vectors, state.vectors) {
            let problem = format!(
                "{memories} memories, {with_vector} with a vector, {held} in the vector view, are not the {} and {} that are counted",
                state.memories, state.vectors,
            );
            return Err(corrupt("the records", problem));
        }
        for ((month, owner), (memories, words)) in owners {
            if self.words && words::counts(&reader, month, owner)? != (memories as u64, words as u64) {
                return Err(corrupt(
                    "the words' index",
                    format!("owner {owner} is counted wrongly in {month}"),
                ));
            }
        }
        rows::each(&reader, &months, (&format!("{HISTORY}, slot"), 'h'), &mut |month, row| {
            let slot: Slot = row.get(5)?;
            let row = rows::stored(row)?;
            if rows::decode_body(&row.body)?.slot() != slot {
                return Err(corrupt(
                    "the history",
                    format!("a row of {month} lies in slot {slot}, not in its own"),
                ));
            }
            let hash = rows::memory_hash("history", &row);
            digest = digest.wrapping_add(hash);
            let of_month = counted.entry(month).or_default();
            of_month.history += 1;
            of_month.digest = of_month.digest.wrapping_add(hash);
            Ok(())
        })?;
        for (month, state) in &months {
            let found = counted.remove(month).unwrap_or_default();
            if (found.memories, found.history, found.digest) != (state.memories, state.history, state.digest)
            {
                return Err(corrupt(
                    "the months",
                    format!("{month} holds something else than is told of it"),
                ));
            }
        }
        each(&reader, &format!("SELECT {KEY} FROM keys"), |row| {
            digest = digest.wrapping_add(rows::key_hash(&rows::key_row(row)?));
            Ok(())
        })?;
        each(&reader, &graph::rows_of(), |row| {
            digest = digest.wrapping_add(graph::hash(&graph::row(row)?));
            Ok(())
        })?;
        for erasure in rows::erasures(&reader)? {
            digest = digest.wrapping_add(rows::erasure_hash(&erasure));
        }
        Ok((state.position, digest.to_le_bytes()))
    }

    /// Reads everything and compares all that must agree: SQLite's structures and indexes, every page's checksum, and the digest.
    pub fn verify(&self) -> Result<(), StorageError> {
        let writer = self.records.writer();
        let mut statement = writer.prepare("PRAGMA integrity_check")?;
        let found: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        if found != ["ok"] {
            let problem = found.join("; ");
            return Err(StorageError::Damaged { what: "the records' database".into(), problem });
        }
        drop(statement);
        drop(writer);
        let (kept, scanned) = (self.digest(), self.digest_by_scan()?);
        if kept != scanned {
            let problem = format!("the digest of its rows at {:?} is not the one it keeps", kept.0);
            return Err(StorageError::Corrupt { what: "the records' database".into(), problem });
        }
        Ok(())
    }

    /// Makes everything applied so far durable.
    pub fn checkpoint(&self) -> Result<Position, StorageError> {
        let position = self.state().position;
        self.records.checkpoint()?;
        Ok(position)
    }
}

fn without_record(id: &MemoryId) -> StorageError {
    let problem = format!("memory {id:02x?} has a vector and no record");
    StorageError::Corrupt { what: "the vector view".into(), problem }
}

/// The months that may hold something in a time range.
fn months_in(db: &Connection, range: &Option<TimeRange>) -> Result<Months, StorageError> {
    let mut months = months::load(db)?;
    if let Some(range) = range {
        months.retain(|month, state| state.may_hold(*month, range));
    }
    Ok(months)
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

/// A memory with its vector.
fn whole(row: &Stored) -> Result<Memory, StorageError> {
    Ok(Memory { vector: rows::vector_from(&row.vector), ..rows::decode_body(&row.body)? })
}

fn change(row: &Stored) -> Result<Change, StorageError> {
    let position = rows::unpack(row.epoch, row.position);
    Ok(Change { position, kind: rows::change_kind(row.kind)?, memory: rows::decode_body(&row.body)? })
}

/// The owners that a tenant may read and of whom something is shown, each once.
fn readable<'a>(tenant: &str, owners: &'a [Owner], shown: &Shown) -> Vec<&'a Owner> {
    let own = |owner: &&Owner| **owner == Owner::Global || owner.tenant() == tenant;
    owners
        .iter()
        .filter(own)
        .filter(|owner| shown.owner(owner))
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
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
