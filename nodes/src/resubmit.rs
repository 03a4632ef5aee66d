//! Re-submission: what was lost with a region, and came back with its disks, is written again where nobody has written since.
//!
//! ```text
//!   quarantines of the epoch's old disks ─► at each index the entry of the greatest term ─► commands, memory by memory, in the ledger's order
//!        ─► is the memory as the epoch left it? ─► Again { its version } ─► the ledger ─► the next one of that memory expects what this one made
//! ```
//!
//! | what can go wrong | what keeps it true |
//! |---|---|
//! | somebody wrote the memory since, or deleted it | it has a version of a later epoch, or gets one before the command is decided: that is decided in the ledger ([`Operation::Again`]). A conflict is told, and what follows it of that memory is left alone |
//! | the caller of the lost write tried again meanwhile | the key is the caller's own: the ledger answers what it answered then |
//! | the re-submission is interrupted, or asked for twice | it begins anew; what was written is recognised by its key, for 24 hours, and is a conflict after that: it is not written twice |
//! | whose memory it is was erased since | the list of erasures is asked, the map's first and then, in the ledger, the shard's own: it is a conflict |
//! | an old disk is not there | nothing of that shard is touched: another disk may have had less |
//!
//! Edges have no versions, so nobody can say whether one was set or removed since: they are written again only if asked for. Counts of accesses, dropped months and steps
//! of moves are not: what moved is somewhere else by now, and a month that was dropped by an operator is dropped by an operator.

use crate::control::Control;
use crate::control::map::{ClusterMap, NodeId, ShardId};
use crate::control::regions::End;
use crate::convert::id_text;
use crate::error::Error;
use crate::ledger::epochs::Place;
use crate::ledger::quarantine::{Look, Page};
use crate::peers::Peers;
use crate::proto::internal::Body;
use crate::proto::v1::{self, ResubmitVerdict as Verdict};
use crate::router::{Reading, Router};
use crate::views::{Ask, Found};
use sim::sync::mpsc;
use sim::time::{Duration, Instant};
use std::collections::BTreeMap;
use storage::codec;
use storage::model::{ChangeKind, Command, MemoryId, Operation, Outcome, Position};

/// How long one question or one write may take.
const WITHIN: Duration = Duration::from_secs(10);

/// A command that an epoch lost.
#[derive(Clone, Debug, PartialEq)]
struct Lost {
    index: u64,
    item: u32,
    command: Command,
}

#[derive(Clone)]
pub struct Resubmission {
    pub control: Control,
    pub peers: Peers,
    pub router: Router,
}

type Told = mpsc::Sender<Result<v1::Resubmitted, tonic::Status>>;

/// Nobody listens any more.
struct Gone;

fn soon() -> Instant {
    Instant::now() + WITHIN
}

/// What the old disks have together: at each index the entry of the greatest term, which is the committed one if there is any, up to where the term falls:
/// what lies behind there is of a leader that was no longer one. A disk whose log began behind what is left of it, since it had been sent a snapshot, lacks what
/// another one has.
fn together(logs: Vec<Vec<(Place, Vec<Command>)>>) -> Vec<(Place, Vec<Command>)> {
    let mut by_index: BTreeMap<u64, (Place, Vec<Command>)> = BTreeMap::new();
    for entry in logs.into_iter().flatten() {
        let held = by_index.get(&entry.0.index);
        if held.is_none_or(|(place, _)| place.term < entry.0.term) {
            by_index.insert(entry.0.index, entry);
        }
    }
    let mut term = 0;
    let rises = |(place, _): &(Place, _)| std::mem::replace(&mut term, place.term) <= place.term;
    by_index.into_values().take_while(rises).collect()
}

/// The entries that none of them has, between what the next epoch has and the last one: from and to.
fn holes(after: u64, entries: &[(Place, Vec<Command>)]) -> Vec<(u64, u64)> {
    let ends = entries.iter().map(|(place, _)| place.index);
    let begins = std::iter::once(after).chain(ends.clone());
    begins.zip(ends).filter(|(from, to)| from + 1 < *to).map(|(from, to)| (from + 1, to - 1)).collect()
}

fn in_order(entries: Vec<(Place, Vec<Command>)>) -> Vec<Lost> {
    let of = |(place, commands): (Place, Vec<Command>)| {
        let numbered = commands.into_iter().enumerate();
        numbered.map(move |(item, command)| Lost { index: place.index, item: item as u32, command })
    };
    entries.into_iter().flat_map(of).collect()
}

fn what(operation: &Operation) -> &'static str {
    match operation.plain() {
        Operation::Add(_) => "add",
        Operation::Update { .. } => "update",
        Operation::Delete { .. } => "delete",
        Operation::UpsertEdges(_) => "set edges",
        Operation::DeleteEdges(_) => "delete edges",
        Operation::Touch(_) => "count accesses",
        Operation::DropMonth(_) => "drop a month",
        Operation::Move(_) => "move slots",
        Operation::Erase { .. } => "erase",
        Operation::Again { .. } => "again",
    }
}

/// How the next command of a memory is decided.
#[derive(Clone, Debug, PartialEq)]
enum Next {
    /// If the memory is at this version.
    At(u64),
    /// Only if its key was used since.
    Remembered(u64),
    Stopped,
}

impl Next {
    /// `last`: the memory's last version, deletions counted, and the epoch that it was made in.
    fn after(epoch: u64, last: Option<(u64, u64)>) -> Next {
        match last {
            None => Next::At(0),
            Some((version, of)) if of <= epoch => Next::At(version),
            Some((version, _)) => Next::Remembered(version),
        }
    }

    /// No memory is ever at the greatest one.
    fn guard(&self) -> u64 {
        match self {
            Next::At(version) => *version,
            Next::Remembered(_) | Next::Stopped => u64::MAX,
        }
    }

    /// What an outcome says, and how the next command is decided after it.
    fn take(&self, outcome: &Outcome) -> (Verdict, String, Next) {
        let refused = |why: String| (Verdict::Refused, why, self.clone());
        match outcome {
            Outcome::Done { version, .. } => {
                sim::trace::probe("region: a lost write written again");
                (Verdict::Again, String::new(), Next::At(*version))
            }
            Outcome::VersionMismatch { actual, .. } if *actual != self.guard() => {
                sim::trace::probe("region: a lost write left, since somebody wrote");
                let why = format!("the memory was written since, and is at version {actual}");
                (Verdict::Conflict, why, Next::Stopped)
            }
            Outcome::VersionMismatch { actual, .. } => {
                refused(format!("it expected another version than {actual}, as it did then"))
            }
            Outcome::AlreadyExists { version, .. } => {
                refused(format!("the memory exists at version {version}"))
            }
            Outcome::NotFound { .. } => refused("there is no such memory".into()),
            Outcome::KeyReused => {
                (Verdict::Conflict, "its key was used since for another request".into(), Next::Stopped)
            }
            Outcome::NotHere | Outcome::MoveRefused | Outcome::Erased { .. } => {
                (Verdict::Conflict, "it has no place in the cluster as it is now".into(), Next::Stopped)
            }
        }
    }
}

/// Whether a lost addition is of somebody who was erased later. What is erased only now is found by the ledger.
fn is_erased(map: &ClusterMap, (shard, epoch): (ShardId, u64), lost: &Lost) -> bool {
    let Operation::Add(memory) = &lost.command.operation else { return false };
    let position = Position { epoch, index: lost.index, item: lost.item };
    map.erased_behind(&memory.tenant, (&memory.user, &memory.agent), shard, position)
}

impl Resubmission {
    /// Goes through all that was lost, and tells of each command what became of it.
    pub async fn run(self, ask: v1::ResubmitRequest, told: Told) {
        let map = match self.control.read(soon()).await {
            Ok(map) => map,
            Err(error) => return drop(told.send(Err(error.into())).await),
        };
        for (shard, entry) in &map.shards {
            for (epoch, end) in entry.ends.iter().filter(|(of, _)| ask.epoch == 0 || ask.epoch == **of) {
                match self.epoch(&map, (*shard, *epoch, end), &ask, &told).await {
                    Ok(Ok(())) => {}
                    Ok(Err(Gone)) => return,
                    Err(error) => return drop(told.send(Err(error.into())).await),
                }
            }
        }
    }

    async fn epoch(
        &self,
        map: &ClusterMap,
        (shard, epoch, end): (ShardId, u64, &End),
        ask: &v1::ResubmitRequest,
        told: &Told,
    ) -> Result<Result<(), Gone>, Error> {
        let mut logs = vec![];
        for (node, old) in &end.old_disks {
            if old.commands > 0 {
                logs.push(self.read(map, *node, shard, epoch).await?);
            }
        }
        let mut memories: BTreeMap<(String, MemoryId), Vec<Lost>> = BTreeMap::new();
        let mut others = vec![];
        let entries = together(logs);
        let kept = end.old_disks.values().map(|old| old.kept).max().unwrap_or(end.last);
        for (from, to) in holes(kept, &entries) {
            let why = format!("entries {from} to {to} are in no quarantine: every old disk had purged them");
            let (index, verdict, what) = (from, Verdict::Left as i32, "unknown".into());
            let said = v1::Resubmitted { shard, epoch, index, what, verdict, why, ..Default::default() };
            if told.send(Ok(said)).await.is_err() {
                return Ok(Err(Gone));
            }
        }
        for lost in in_order(entries) {
            match lost.command.operation.id() {
                Some(id) => memories.entry((lost.command.tenant.clone(), id)).or_default().push(lost),
                None => others.push(lost),
            }
        }
        let tell = |lost: &Lost, verdict: Verdict, why: String| {
            let Lost { index, item, command } = lost;
            let id = command.operation.id().map_or(String::new(), |id| id_text(&id));
            let what = what(&command.operation).into();
            let tenant = command.tenant.clone();
            let said = v1::Resubmitted {
                shard,
                epoch,
                index: *index,
                item: *item,
                tenant,
                id,
                what,
                verdict: verdict as i32,
                why,
            };
            async move { told.send(Ok(said)).await.map_err(|_| Gone) }
        };
        for ((tenant, id), all) in &memories {
            let mut next = Next::after(epoch, self.last_of(tenant, id).await?);
            for lost in all {
                let erased = is_erased(map, (shard, epoch), lost);
                let (verdict, why, then) = match (&next, ask.dry_run) {
                    _ if erased => (Verdict::Conflict, "whose it is was erased since".into(), Next::Stopped),
                    (Next::Stopped, _) => {
                        (Verdict::Conflict, "the one before it was not written".into(), Next::Stopped)
                    }
                    (Next::Remembered(version), true) => {
                        let why = format!("the memory was written since, and is at version {version}");
                        (Verdict::Conflict, why, next.clone())
                    }
                    (Next::At(_), true) => (Verdict::Again, String::new(), next.clone()),
                    (_, false) => {
                        let outcome = self.submit((shard, epoch), lost, Some(next.guard())).await?;
                        next.take(&outcome)
                    }
                };
                if tell(lost, verdict, why).await.is_err() {
                    return Ok(Err(Gone));
                }
                next = then;
            }
        }
        for lost in &others {
            let edges =
                matches!(lost.command.operation, Operation::UpsertEdges(_) | Operation::DeleteEdges(_));
            let (verdict, why) = match (edges, ask.edges) {
                (true, true) if ask.dry_run => (Verdict::Again, String::new()),
                (true, true) => {
                    let outcome = self.submit((shard, epoch), lost, None).await?;
                    let (verdict, why, _) = Next::At(0).take(&outcome);
                    (verdict, why)
                }
                (true, false) => (Verdict::Left, "edges have no versions: ask for them by name".into()),
                (false, _) => (Verdict::Left, "such commands are not written again".into()),
            };
            if tell(lost, verdict, why).await.is_err() {
                return Ok(Err(Gone));
            }
        }
        Ok(Ok(()))
    }

    /// All that an epoch took away from a node's replica.
    async fn read(
        &self,
        map: &ClusterMap,
        node: NodeId,
        shard: ShardId,
        epoch: u64,
    ) -> Result<Vec<(Place, Vec<Command>)>, Error> {
        let without = |problem: String| {
            Error::Unavailable(format!(
                "the quarantine of node {node} for shard {shard} is needed and cannot be read: {problem}"
            ))
        };
        let addr = map.nodes.get(&node).map(|node| &node.addr);
        let addr = addr.ok_or_else(|| without("the node is no longer in the cluster".into()))?;
        let mut client = self.peers.client(addr).map_err(|e| without(e.to_string()))?;
        let (mut found, mut from) = (vec![], Some(0));
        while let Some(at) = from {
            let body = codec::encode(&Look { epoch, from: at }).into();
            let asked = client
                .quarantined(self.peers.request(Body { body, group: shard, ..Body::default() }, WITHIN));
            let page: Page = match sim::time::timeout(WITHIN, asked).await {
                Ok(Ok(answer)) => {
                    codec::decode(&answer.into_inner().body).map_err(|e| without(e.to_string()))?
                }
                Ok(Err(status)) => return Err(without(status.message().into())),
                Err(_) => return Err(without("it does not answer".into())),
            };
            found.extend(page.entries);
            from = page.next;
        }
        Ok(found)
    }

    /// A memory's last version, deletions counted, and its epoch.
    async fn last_of(&self, tenant: &str, id: &MemoryId) -> Result<Option<(u64, u64)>, Error> {
        let ask = |slot| Ask::History { tenant: tenant.into(), slot, id: *id };
        let answers = self.router.ask_of((tenant, id), &Reading::strong(), soon(), ask).await?;
        let changes = answers.into_iter().flat_map(|(_, answered)| match answered.found {
            Found::Changes(changes) => changes,
            _ => vec![],
        });
        let last = changes.max_by_key(|change| change.position);
        Ok(last.map(|change| {
            let deleted = change.kind == ChangeKind::Deleted;
            (change.memory.version + deleted as u64, change.position.epoch)
        }))
    }

    async fn submit(
        &self,
        (shard, epoch): (ShardId, u64),
        lost: &Lost,
        last: Option<u64>,
    ) -> Result<Outcome, Error> {
        let mut command = lost.command.clone();
        if command.idempotency_key.is_empty() {
            command.idempotency_key = format!("quarantine-{shard}-{epoch}-{}-{}", lost.index, lost.item);
        }
        if let Some(last) = last {
            let since = Position { epoch, index: lost.index, item: lost.item };
            command.operation = Operation::Again { last, since, operation: Box::new(command.operation) };
        }
        let (decided, _) = self.router.propose(vec![command], soon()).await;
        let missing = || Error::Internal("the ledger gave no outcome".into());
        Ok(decided.into_iter().next().ok_or_else(missing)??.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(term: u64, index: u64, keys: &[&str]) -> (Place, Vec<Command>) {
        let command = |key: &&str| Command {
            tenant: "t".into(),
            slot: None,
            idempotency_key: key.to_string(),
            request_hash: [0; 16],
            now: 1,
            operation: Operation::Delete { id: [1; 16], expected_version: None },
        };
        (Place { term, node: term, index }, keys.iter().map(command).collect())
    }

    #[test]
    fn old_disks_that_differ_have_together_what_would_have_won() {
        // The first one led, was cut off, and kept what nobody acknowledged; the second one was sent a snapshot.
        let cut_off = vec![entry(3, 8, &["a"]), entry(3, 9, &["b"]), entry(3, 10, &["c"])];
        let followed = vec![entry(4, 9, &["d", "e"])];
        let entries = together(vec![cut_off, followed, vec![]]);
        assert_eq!(holes(7, &entries), []);
        assert_eq!(holes(5, &entries), [(6, 7)]);
        let lost = in_order(entries);
        let keys: Vec<_> =
            lost.iter().map(|lost| (lost.index, lost.item, &lost.command.idempotency_key[..])).collect();
        assert_eq!(keys, [(8, 0, "a"), (9, 0, "d"), (9, 1, "e")]);
    }

    #[test]
    fn what_was_written_since_stops_the_rest_of_its_memory_unless_the_key_was_used() {
        let position = Position { epoch: 3, index: 7, item: 0 };
        let id = [1; 16];
        assert_eq!(Next::after(2, None), Next::At(0));
        let next = Next::after(2, Some((5, 2)));
        assert_eq!(next.guard(), 5);
        let (verdict, _, next) = next.take(&Outcome::Done { id, version: 6, position });
        assert_eq!((verdict, &next), (Verdict::Again, &Next::At(6)));
        // Its own expectation was not met, then neither.
        let (verdict, _, next) = next.take(&Outcome::VersionMismatch { id, actual: 6 });
        assert_eq!((verdict, &next), (Verdict::Refused, &Next::At(6)));
        let (verdict, why, next) = next.take(&Outcome::VersionMismatch { id, actual: 7 });
        assert_eq!((verdict, &next), (Verdict::Conflict, &Next::Stopped));
        assert!(why.contains("version 7"), "{why}");
        // Written since; but if that was the caller's own retry, the next one follows it.
        let since = Next::after(2, Some((9, 3)));
        assert_eq!(since.guard(), u64::MAX);
        let (verdict, _, next) = since.take(&Outcome::Done { id, version: 9, position });
        assert_eq!((verdict, next), (Verdict::Again, Next::At(9)));
        let (verdict, _, next) = since.take(&Outcome::VersionMismatch { id, actual: 9 });
        assert_eq!((verdict, next), (Verdict::Conflict, Next::Stopped));
    }
}
