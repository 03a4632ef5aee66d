//! Failover and failback: whoever leads the control group watches the primary region, and carries a change of the primary out ([`super::regions`]).
//!
//! 1. **Detect.** The primary is silent when of some shard no majority answers. It must be so for `detect_ms`, to the leader.
//! 2. **Validate.** For `validate_ms` more, and to every node of the control group outside the region: one that reaches it withdraws all.
//! 3. **Grant.** The old right is renewed no more; when it has run out on every clock, the next epoch is granted. There is no way back.
//! 4. **Check.** Every replica of the new region halts, and says what it has. All but one must ([`crate::ledger::elsewhere`]), or `--accept-data-loss`.
//! 5. **Promote.** The one with most begins the epoch; the map says so. All replicas of the new region vote in it, also one that has not said what it has: nobody stands
//!    for election in it before having all that it began with ([`crate::ledger::Ledger::has_begun`]).
//! 6. **Verify.** Each shard takes a write, and confirms a read.
//! 7. **Announce.** The change, with the time of each step, is in the map's history, and an incident ([`super::incidents`]); the failback is the operator's to order.
//!
//! A planned change skips the first two, and waits before the grant until the old right has run out *and* the new region has all that the old one wrote: so
//! nothing is lost, and writes pause for about the length of a lease.
//!
//! A region that goes on by itself after a recovery of the control group ([`super::recover`]) goes through the same steps, from the third on, with itself as the new one.
//!
//! The leader is to be in the witness, or outside of the primary region ([`Failover::lead_from_elsewhere`]), so that it does not die with what it watches.
//!
//! What can go wrong: *the leader of the control group dies*: the step is in the map, and each step may be repeated; what it had observed is observed
//! anew, for the whole windows. *The old region comes back in the middle*: until the grant it withdraws the change; from then on it has no right,
//! and its replicas follow. *A replica of the new region is missing*: the others are enough but for one. *The new region fails too*: the change
//! stays where it is, says what it waits for, and goes on when there are enough replicas again. *The replica that was to begin loses its disk before it does*: nobody
//! else can, since the others follow it; the change goes back to the grant, and one of those that are left begins the epoch after.

use super::Control;
use super::grants::{Granted, Grants};
use super::lease::HolderId;
use super::map::{ClusterMap, NodeId, ShardId};
use super::regions::{End, RegionChange, RegionPolicy, Regions, Step, choose, needed};
use crate::error::Error;
use crate::groups::{CONTROL, GroupId, Groups};
use crate::ledger::epochs::Report;
use crate::peers::Peers;
use crate::proto::internal::Body;
use crate::router::Router;
use crate::views::{Ask, Freshness};
use futures::future::join_all;
use sim::time::{self, Duration, Instant};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use storage::codec;
use storage::slots::SlotSet;

/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// While the primary is silent, and while a change is carried out.
const HURRY: Duration = Duration::from_millis(100);
/// Looks of who does not answer take as long as each other, but for so much.
const MARGIN: Duration = Duration::from_millis(20);
/// How long a node may take to say that it is there.
const REACH_WITHIN: Duration = Duration::from_millis(800);
/// One step's time.
const STEP: Duration = Duration::from_secs(5);
/// How long those that are slow to halt are waited for when the others are enough.
const HALT_WITHIN: Duration = Duration::from_secs(2);
/// A planned change that keeps writers waiting for so long is given up.
const PAUSE_MAX: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub struct Failover {
    pub id: NodeId,
    pub control: Control,
    pub groups: Groups,
    pub peers: Peers,
    pub router: Router,
    pub grants: Grants,
    /// What a change waits for, for whoever asks.
    pub waits_for: Arc<Mutex<String>>,
}

/// The map, if it was changed.
type Made = Result<Option<Arc<ClusterMap>>, Error>;

/// What the leader has seen so far.
#[derive(Default)]
struct Seen {
    /// Since when the primary has been silent.
    silent: Option<Instant>,
    /// Since when it has been so to all observers.
    validated: Option<Instant>,
    /// When it was last told that the other region is not ready.
    told: Option<Instant>,
    /// Since when all has been well, or the leadership was last offered to another node.
    quiet: Option<Instant>,
    /// Since when a planned change has waited for the new region to have everything.
    pausing: Option<Instant>,
    /// The map was compared with the right to write since this node leads.
    compared: bool,
}

/// How long all must have been well before the leadership is offered, and then how often it is.
const OFFER_EVERY: Duration = Duration::from_secs(10);
/// How often somebody is told of the same.
const TELL_EVERY: Duration = Duration::from_secs(60);

impl Seen {
    /// How much is left of the window in which the primary must be silent.
    fn window_left(&self, policy: &RegionPolicy) -> Option<Duration> {
        let (since, window) = match self.validated {
            Some(since) => (since, policy.validate_ms),
            None => (self.silent?, policy.detect_ms),
        };
        Some(Duration::from_millis(window).saturating_sub(since.elapsed()))
    }
}

/// How long to wait for the next look. `window`: what is left of the window in which the primary is silent. Looks that wait for who does not answer take long; so that
/// the window is no longer than it must be, the last one ends with it. `took`: how long the one before took.
fn pause(window: Option<Duration>, took: Duration, changing: bool) -> Duration {
    match window {
        Some(left) if left >= took + HURRY && left < took * 2 + HURRY * 2 => left - took + MARGIN,
        None if !changing => LOOK,
        _ => HURRY,
    }
}

fn soon() -> Instant {
    Instant::now() + STEP
}

/// Which of some nodes answer. `version`: of the map that they should know.
pub async fn reach(peers: &Peers, addrs: &[String], version: u64) -> Vec<bool> {
    join_all(addrs.iter().map(|addr| peers.is_there(addr, version, REACH_WITHIN))).await
}

/// Halts a group's replica for an epoch; what it has. `ended`: how the epochs before ended, and the last one that is known.
pub async fn halt(
    peers: &Peers,
    addr: &str,
    group: GroupId,
    ended: (BTreeMap<u64, End>, u64),
    epoch: u64,
    within: Duration,
) -> Result<Option<Report>, Error> {
    let body = Body { body: codec::encode_serde(&ended).into(), group, epoch };
    let halted = peers.ask(addr, body, within, |mut to, body| async move { to.halt(body).await }).await?;
    codec::decode(&halted).map_err(|e| Error::Internal(e.to_string()))
}

/// Whether of each shard a majority of those who vote is there, of whom some were reached.
fn well(map: &ClusterMap, addrs: &[String], reached: &[bool]) -> bool {
    let there = addrs.iter().zip(reached).filter(|(_, there)| **there);
    let there: BTreeSet<&String> = there.map(|(addr, _)| addr).collect();
    map.shards.keys().all(|shard| {
        let addrs = map.addrs(*shard);
        addrs.iter().filter(|addr| there.contains(addr)).count() * 2 > addrs.len()
    })
}

/// Whether of each shard enough replicas of a region answer for it to go on.
pub async fn has_replicas(peers: &Peers, map: &ClusterMap, region: &str) -> Result<(), Error> {
    for shard in map.shards.keys() {
        let there = map.replicas_in(*shard, region);
        let nodes = there.iter().filter_map(|node| map.nodes.get(node));
        let addrs: Vec<String> = nodes.map(|node| node.addr.clone()).collect();
        let answer = reach(peers, &addrs, 0).await.into_iter().filter(|there| *there).count();
        if answer < needed(there.len()) {
            let problem = format!("shard {shard}: {answer} of {} replicas in {region} answer", there.len());
            return Err(Error::Unavailable(format!("{problem}, {} are needed", needed(there.len()))));
        }
    }
    Ok(())
}

/// The nodes that vote in some shard.
fn voters(map: &ClusterMap) -> Vec<String> {
    let all: BTreeSet<String> = map.shards.keys().flat_map(|shard| map.addrs(*shard)).collect();
    all.into_iter().collect()
}

impl Failover {
    /// Watches for ever; only the leader of the control group does anything.
    pub async fn keep(self) {
        if !self.control.has_regions().await {
            return;
        }
        let (mut seen, mut made) = (Seen::default(), None);
        loop {
            let leads = self.groups.get(CONTROL).is_some_and(|replica| replica.ledger.raft.is_leader());
            let known = self.control.map();
            let Some(regions) = known.regions.as_ref().filter(|_| leads) else {
                (seen, made) = (Seen::default(), None);
                self.wait_for("");
                time::sleep(LOOK).await;
                continue;
            };
            let began = Instant::now();
            let looked = self.look(made.take(), &mut seen).await;
            match &looked {
                Err(error) => self.wait_for(&error.to_string()),
                Ok(_) => self.wait_for(""),
            }
            made = looked.ok().flatten();
            // A step that is done is followed by the next one at once.
            if made.is_none() {
                let changing = regions.change.is_some();
                time::sleep(pause(seen.window_left(&regions.policy), began.elapsed(), changing)).await;
            }
        }
    }

    fn wait_for(&self, what: &str) {
        let mut told = self.waits_for.lock().unwrap_or_else(|p| p.into_inner());
        if *told != what {
            if !what.is_empty() {
                sim::warn!("the change of the primary region waits: {what}");
            }
            *told = what.into();
        }
    }

    /// A leader before this one may have granted an epoch and not written it into the map, or another one have withdrawn the change meanwhile.
    async fn follow_the_grant(&self, regions: &Regions) -> Result<(), Error> {
        let (record, _) = self.control.lease(soon()).await?;
        let to = record.holder.and_then(|holder| regions.names.get(holder as usize));
        if let Some(to) = to.filter(|_| record.epoch > regions.epoch) {
            sim::warn!("epoch {} is {to}'s, which the map does not say", record.epoch);
            let granted = |map: &ClusterMap| Ok(map.region_granted(record.epoch, to, time::calendar_ms()));
            self.control.update(granted, soon()).await?;
        }
        Ok(())
    }

    /// Does what is to be done; the map, if it was changed by a step. `made`: the map that the step before made, which needs no confirmation.
    async fn look(&self, made: Option<Arc<ClusterMap>>, seen: &mut Seen) -> Made {
        let known = self.control.map();
        if let Some(regions) = known.regions.as_ref().filter(|_| !seen.compared) {
            self.follow_the_grant(regions).await?;
            seen.compared = true;
        }
        let map = match (made, &known.regions) {
            (Some(map), _) => map,
            // What is watched needs no confirmed map; what is carried out does.
            (None, Some(Regions { change: None, .. })) => self.control.glance(soon()).await?,
            _ => self.control.read(soon()).await?,
        };
        let Some(regions) = &map.regions else { return Ok(None) };
        let Some(change) = &regions.change else { return self.detect(&map, regions, seen).await };
        seen.quiet = None;
        match change.step() {
            Step::Validating => self.validate(&map, regions, seen).await,
            Step::Granting => self.grant(&map, regions, change, seen).await,
            Step::Promoting => self.promote(&map, change).await,
            _ => self.verify(&map).await,
        }
    }

    async fn detect(&self, map: &ClusterMap, regions: &Regions, seen: &mut Seen) -> Made {
        seen.validated = None;
        let (addrs, began) = (voters(map), Instant::now());
        let reached = reach(&self.peers, &addrs, 0).await;
        if well(map, &addrs, &reached) {
            seen.silent = None;
            self.lead_from_elsewhere(map, regions, seen).await;
            if map.account(time::calendar_ms()) != *map {
                self.control.update(|map| Ok(map.account(time::calendar_ms())), soon()).await?;
            }
            return Ok(None);
        }
        // Whoever did not answer was silent when it was asked.
        let since = *seen.silent.get_or_insert(began);
        seen.quiet = None;
        if !regions.policy.automatic || since.elapsed() < Duration::from_millis(regions.policy.detect_ms) {
            return Ok(None);
        }
        let Some(to) = regions.serving().find(|name| **name != regions.primary) else { return Ok(None) };
        if let Some((shard, ready)) = map.unready_in(to) {
            if seen.told.is_none_or(|at| at.elapsed() > TELL_EVERY) {
                seen.told = Some(Instant::now());
                sim::error!(
                    "region {} is silent, and {to} is still being filled: {ready} of its replicas of shard {shard} have caught up. It does not take over by \
                     itself; if {} is lost for good, order it: loci region failover --to {to} --accept-data-loss",
                    regions.primary,
                    regions.primary
                );
                sim::trace::probe("region: not given up, since the other one is being filled");
            }
            return Ok(None);
        }
        let cause = format!("no majority of its replicas answers for {:.0?}", since.elapsed());
        sim::trace::probe("region: found silent");
        sim::error!(
            "region {}: {cause}; unless another observer reaches it, {to} takes over",
            regions.primary
        );
        let first = (Step::Validating, cause.as_str());
        let silent_ms = since.elapsed().as_millis() as i64;
        let begun = |map: &ClusterMap| {
            let now = time::calendar_ms();
            let begun = map.begin_region_change(to, false, false, first, now)?;
            Ok(begun.region_silent_since(now - silent_ms))
        };
        let map = self.control.update(begun, soon()).await?;
        seen.validated = Some(Instant::now());
        Ok(Some(map))
    }

    /// A leader in the primary region dies with it, and whoever follows has to find out anew that it is silent. So it lets one of the witness lead, whose links carry
    /// nothing else; where there is no witness, one of the other region.
    async fn lead_from_elsewhere(&self, map: &ClusterMap, regions: &Regions, seen: &mut Seen) {
        let wanted = |node: NodeId| match &regions.witness {
            Some(witness) => map.region_of(node) == witness,
            None => map.region_of(node) != regions.primary,
        };
        if wanted(self.id) || seen.quiet.get_or_insert_with(Instant::now).elapsed() < OFFER_EVERY {
            return;
        }
        seen.quiet = Some(Instant::now());
        let Some(group) = self.groups.get(CONTROL) else { return };
        let others = group.ledger.voter_addrs().into_iter().filter(|(id, _)| wanted(*id));
        for (id, addr) in others {
            if self.peers.is_there(&addr, 0, REACH_WITHIN).await && group.ledger.hand_over_to_node(id).await {
                sim::trace::probe("control: the leader let one lead that does not die with what it watches");
                return;
            }
        }
    }

    /// Whether no observer reaches the region: neither this node nor any of the control group outside of it.
    async fn is_silent_to_all(&self, map: &ClusterMap, regions: &Regions) -> bool {
        let addrs = voters(map);
        let group = self.groups.get(CONTROL);
        let members = group.iter().flat_map(|replica| replica.ledger.member_addrs()).collect::<Vec<_>>();
        let observers =
            members.into_iter().filter(|(id, _)| *id != self.id && map.region_of(*id) != regions.primary);
        let body = bytes::Bytes::from(codec::encode(&addrs));
        let others = join_all(observers.map(|(_, addr)| {
            let body = Body { body: body.clone(), ..Body::default() };
            async move {
                let mut client = self.peers.client(&addr).ok()?;
                let limit = REACH_WITHIN * 2;
                let asked = time::timeout(limit, client.reaches(self.peers.request(body, limit))).await;
                let reached: Vec<bool> = codec::decode(&asked.ok()?.ok()?.into_inner().body).ok()?;
                Some(reached)
            }
        }));
        let (own, others) = futures::future::join(reach(&self.peers, &addrs, 0), others).await;
        if well(map, &addrs, &own) {
            return false;
        }
        if sim::planted!("validate-with-one-observer") {
            return true;
        }
        // Who does not answer says nothing.
        !others.into_iter().flatten().any(|reached| well(map, &addrs, &reached))
    }

    /// Whether enough replicas of the other region are there.
    async fn can_take_over(&self, map: &ClusterMap, regions: &Regions) -> Result<(), Error> {
        match &regions.change {
            Some(change) if !change.accept_data_loss => has_replicas(&self.peers, map, &change.to).await,
            _ => Ok(()),
        }
    }

    async fn validate(&self, map: &ClusterMap, regions: &Regions, seen: &mut Seen) -> Made {
        let since = *seen.validated.get_or_insert_with(Instant::now);
        let next = match self.is_silent_to_all(map, regions).await {
            false => Step::Withdrawn,
            true if since.elapsed() >= Duration::from_millis(regions.policy.validate_ms) => {
                // Nobody would be helped by a right that its holder cannot use.
                self.can_take_over(map, regions).await?;
                Step::Granting
            }
            true => return Ok(None),
        };
        if next == Step::Withdrawn {
            sim::trace::probe("region: a failover was withdrawn");
            sim::warn!("region {} answers: the failover is withdrawn", regions.primary);
        } else {
            sim::error!("region {} is silent to every observer: it is given up", regions.primary);
        }
        let step = |map: &ClusterMap| Ok(map.region_step(Step::Validating, next, time::calendar_ms()));
        let map = self.control.update(step, soon()).await?;
        *seen = Seen { compared: true, ..Seen::default() };
        Ok(Some(map))
    }

    async fn grant(
        &self,
        map: &ClusterMap,
        regions: &Regions,
        change: &RegionChange,
        seen: &mut Seen,
    ) -> Made {
        let holder: HolderId = regions
            .holder(&change.to)
            .ok_or_else(|| Error::Internal(format!("region {} is none", change.to)))?;
        // With an epoch of its own it writes, or is about to.
        let writes_yet = change.planned && change.epoch == 0;
        if writes_yet && self.control.lease(soon()).await?.0.epoch == regions.epoch {
            let since = *seen.pausing.get_or_insert_with(Instant::now);
            if let Some(left) = self.grants.prepare(holder)? {
                time::sleep(left.min(LOOK)).await;
                return Ok(None);
            }
            if let Err(error) = self.has_everything(map, change).await {
                if since.elapsed() < PAUSE_MAX || !self.grants.withdraw() {
                    return Err(error);
                }
                seen.pausing = None;
                sim::error!("{error}: the change to {} is given up, {} goes on", change.to, change.from);
                sim::trace::probe("region: a planned change was given up");
                let back = |map: &ClusterMap| {
                    Ok(map.region_step(Step::Granting, Step::Withdrawn, time::calendar_ms()))
                };
                return self.control.update(back, soon()).await.map(Some);
            }
        }
        seen.pausing = None;
        sim::rand::buggify_wait("before an epoch is granted", 0.2, Duration::from_secs(3)).await;
        match self.grants.grant(holder, regions.epoch, change.leap).await? {
            Granted::Epoch(epoch) => {
                sim::trace::probe("region: an epoch granted");
                sim::warn!("epoch {epoch} is {}'s", change.to);
                let to = &change.to;
                let granted = |map: &ClusterMap| Ok(map.region_granted(epoch, to, time::calendar_ms()));
                self.control.update(granted, soon()).await.map(Some)
            }
            Granted::Wait(left) => {
                time::sleep(left.min(LOOK)).await;
                Ok(None)
            }
        }
    }

    /// Whether the new region has all that the old one, which writes no more, has written.
    async fn has_everything(&self, map: &ClusterMap, change: &RegionChange) -> Result<(), Error> {
        if sim::planted!("fail-back-without-waiting-for-the-tail") {
            return Ok(());
        }
        for shard in map.shards.keys() {
            let mut has_all =
                Err(Error::Unavailable(format!("nobody leads shard {shard} in {}", change.from)));
            for addr in map.addrs(*shard) {
                let request = Body { group: *shard, ..Body::default() };
                let Ok(mut client) = self.peers.client(&addr) else { continue };
                let asked = time::timeout(STEP, client.has_tail(self.peers.request(request, STEP))).await;
                if let Ok(Ok(answer)) = asked {
                    has_all = match codec::decode::<u64>(&answer.into_inner().body) {
                        Ok(0) => Ok(()),
                        Ok(left) => Err(Error::Unavailable(format!(
                            "shard {shard}: {left} entries are still on their way to {}",
                            change.to
                        ))),
                        Err(error) => Err(Error::Internal(error.to_string())),
                    };
                    break;
                }
            }
            has_all?;
        }
        Ok(())
    }

    async fn promote(&self, map: &ClusterMap, change: &RegionChange) -> Made {
        let left = map.to_promote();
        if left.is_empty() {
            // Those who vote now should not wait until they look by themselves.
            let voters = voters(map);
            let tell = reach(&self.peers, &voters, map.version);
            let next =
                |map: &ClusterMap| Ok(map.region_step(Step::Promoting, Step::Verifying, time::calendar_ms()));
            let (_, map) = futures::future::join(tell, self.control.update(next, soon())).await;
            return map.map(Some);
        }
        let (record, _) = self.control.lease(soon()).await?;
        let promoted = left.iter().map(|shard| self.promote_one(map, *shard, change, record.ceiling_before));
        let promoted: Vec<_> = join_all(promoted).await.into_iter().collect::<Result<_, _>>()?;
        // The last one has them all.
        Ok(promoted.into_iter().max_by_key(|map| map.version))
    }

    async fn promote_one(
        &self,
        map: &ClusterMap,
        shard: ShardId,
        change: &RegionChange,
        ceiling: u64,
    ) -> Result<Arc<ClusterMap>, Error> {
        let there = map.replicas_in(shard, &change.to);
        let needed = if sim::planted!("promote-the-first-that-halts") { 1 } else { needed(there.len()) };
        let mut waiting: futures::stream::FuturesUnordered<_> = there
            .iter()
            .map(|node| async move { (*node, self.halt(map, shard, *node, change.epoch).await) })
            .collect();
        let mut halted: Vec<(NodeId, Report)> = vec![];
        // By node, so that what is waited for reads the same as long as it is the same.
        let mut without: BTreeMap<NodeId, String> =
            there.iter().map(|node| (*node, format!("node {node} did not answer"))).collect();
        let began = Instant::now();
        loop {
            let enough = halted.len() >= needed;
            let patience = if enough { HALT_WITHIN } else { STEP }.saturating_sub(began.elapsed());
            match time::timeout(patience, futures::StreamExt::next(&mut waiting)).await {
                Ok(Some((node, Ok(Some(report))))) => {
                    without.remove(&node);
                    halted.push((node, report));
                }
                Ok(Some((node, Ok(None)))) => {
                    without.insert(node, format!("node {node} has forgotten what it had"));
                }
                Ok(Some((node, Err(error)))) => {
                    without.insert(node, error.to_string());
                }
                Ok(None) | Err(_) => break,
            }
        }
        let missing = || {
            let problem = format!(
                "shard {shard}: {} of {} replicas in {} say what they have, {needed} are needed; bring the others back, or give --accept-data-loss ({})",
                halted.len(),
                there.len(),
                change.to,
                without.values().map(String::as_str).collect::<Vec<_>>().join("; ")
            );
            Error::Unavailable(problem)
        };
        if halted.is_empty() || (halted.len() < needed && !change.accept_data_loss) {
            return Err(missing());
        }
        let said: BTreeSet<NodeId> = halted.iter().map(|(node, _)| *node).collect();
        // Who is late votes too, unless the others could not go on without it: were there two voters, the loss of one more disk would end all writing.
        let voters = if said.len() * 2 > there.len() { there.clone() } else { said };
        let least = halted.iter().min_by_key(|(node, report)| (report.last, *node));
        let chosen = if sim::planted!("promote-the-one-with-least") { least } else { choose(&halted) };
        let Some((chosen, report)) = chosen else { return Err(missing()) };
        sim::trace::probe("region: a shard promoted");
        sim::warn!(
            "shard {shard} goes on in {} with entry {} of node {chosen}; behind {} something may be lost",
            change.to,
            report.last.map_or(0, |last| last.index),
            report.certain
        );
        let promoted =
            |map: &ClusterMap| Ok(map.promote(shard, change.epoch, &voters, (*chosen, report), ceiling));
        self.control.update(promoted, soon()).await
    }

    async fn halt(
        &self,
        map: &ClusterMap,
        shard: ShardId,
        node: NodeId,
        epoch: u64,
    ) -> Result<Option<Report>, Error> {
        let missing = || Error::NotFound(format!("node {node}"));
        let addr = map.nodes.get(&node).map(|node| &node.addr).ok_or_else(missing)?;
        let entry = map.shards.get(&shard).ok_or_else(|| Error::NotFound(format!("shard {shard}")))?;
        let ended = (entry.ends.clone(), entry.epoch);
        let halted = halt(&self.peers, addr, shard, ended, epoch, STEP).await;
        halted.map_err(|error| Error::Unavailable(format!("node {node}: {error}")))
    }

    /// Goes back to the grant if the replica that was to begin a shard's epoch has forgotten what it had.
    async fn choose_again(&self, map: &ClusterMap, shard: ShardId) -> Result<(), Error> {
        if sim::planted!("wait-for-a-chosen-replica-that-has-forgotten") {
            return Ok(());
        }
        let Some(entry) = map.shards.get(&shard) else { return Ok(()) };
        let Some(chosen) = entry.chosen else { return Ok(()) };
        let Ok(None) = self.halt(map, shard, chosen, entry.epoch).await else { return Ok(()) };
        sim::trace::probe("region: the chosen replica has forgotten what it had");
        sim::error!(
            "shard {shard}: node {chosen}, which was to begin epoch {}, has forgotten what it had: another one begins the epoch after",
            entry.epoch
        );
        let again =
            |map: &ClusterMap| Ok(map.region_step(Step::Verifying, Step::Granting, time::calendar_ms()));
        self.control.update(again, soon()).await.map(drop)
    }

    /// A write that changes nothing, and a confirmed read, on every shard.
    async fn verify(&self, map: &ClusterMap) -> Made {
        for shard in map.shards.keys() {
            let at = self.router.at(map, *shard, &[]);
            if let Err(error) = at.reach.propose(vec![], soon()).await {
                // It may be that one of those who vote does not know of it.
                reach(&self.peers, &voters(map), map.version).await;
                self.choose_again(map, *shard).await?;
                return Err(error);
            }
            at.ask(Ask::Slots, Freshness::Strong, &SlotSet::default(), soon()).await?;
        }
        let done = |map: &ClusterMap| Ok(map.region_step(Step::Verifying, Step::Done, time::calendar_ms()));
        let map = self.control.update(done, soon()).await?;
        sim::trace::probe("region: a change done");
        sim::warn!("{} writes now, in epoch {}", map.primary(), map.epoch());
        Ok(Some(map))
    }
}
