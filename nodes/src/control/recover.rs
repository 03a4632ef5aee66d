//! Recovery of the control group after most of its nodes were lost for good.
//!
//! Nobody but an operator can order it: a majority that is dead and one that cannot be reached look alike. Until then no right to write is renewed and no plan
//! goes on, while reads are answered as before.
//!
//! ```text
//!   loci control recover ─► any node: who answers, and who has most? ── a majority does: refused
//!     every survivor:  halt ── no message of the old incarnation is taken from now on ── report
//!     with most:       begin ── one more entry: the survivors vote now ──► leads
//!     the others:      return ──► follow
//!     who leads:       the map leaps (below), and a region goes on with the next epoch; who comes back is taken in again
//! ```
//!
//! **An incarnation of the control group is an epoch of its ledger** ([`crate::ledger::epochs`]): halting, choosing, beginning, returning and quarantine are those of a
//! shard that another region goes on with. What differs is who says so. For a shard that is the map; for the group that keeps the map it is the [`Incarnation`], which
//! each of its nodes keeps on disk and gives to whoever has an older one.
//!
//! **What the survivors never heard of.** The last entries of the old majority may be on lost disks only. So nothing that the new incarnation does may look like something
//! that the old one can have done: the map's version and the regions' epoch leap ([`VERSIONS`], [`EPOCHS`]); every shard goes over to an epoch of the new incarnation, in
//! the region that the operator names or that has the replicas for it, and what replicas wrote in epochs that nobody knows any more is taken away and kept in
//! quarantine. The ceiling of the last epoch is unknown as well, so its loss has no upper bound before old disks have been read.
//!
//! **What can go wrong.**
//! - *The others are not lost, only cut off.* They go on by their own map, and where they hold the primary they renew its right: two regions write. Nothing in the cluster can see
//!   that; hence the command lists them, and wants `--yes`. When they are reached again they are refused, give up their incarnation and return; what they
//!   acknowledged after the recovery is in quarantine, and can be written again (`loci region resubmit`).
//! - *The command breaks off.* Halted nodes stay halted, and the command may be given again, with a higher number. If the chosen one has begun, the others learn it from it.
//! - *A survivor restarts in the middle.* Its incarnation is on its disk before its ledger goes over, which may be done again.
//! - *A plan was decided by the old majority alone* (a move of slots, a pin, a node that joined). It is forgotten; give the command again. If data was moved for it already,
//!   those slots are refused by both shards, and nothing here repairs that.

use super::keeper::Keeper;
use super::map::{ClusterMap, NodeId};
use super::regions::{End, RegionChange, Step, choose};
use super::{Control, DIR, failover};
use crate::control::driver::Membership;
use crate::error::Error;
use crate::groups::{CONTROL, Groups, Replica};
use crate::ledger::epochs::{FIRST_EPOCH, Plan, Report, Way};
use crate::peers::Peers;
use crate::proto::internal::Body;
use crate::proto::v1;
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use sim::disk::Disk;
use sim::time::{self, Duration, Instant};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use storage::{codec, facts};

/// The fact in which a node keeps its incarnation.
const FACT: &str = "incarnation";
/// By so many epochs the next one leaps: no control group grants that many without its survivors hearing of one.
pub const EPOCHS: u64 = 1000;
/// By so many versions the map leaps.
const VERSIONS: u64 = 1 << 20;
/// How often a node looks whether there is a newer incarnation, while it may have missed one.
const LOOK: Duration = Duration::from_secs(2);
/// How long a node may take to say where it stands.
const STAND_WITHIN: Duration = Duration::from_secs(1);
/// How long one that halts, begins or returns may take.
const STEP: Duration = Duration::from_secs(30);

/// The control group since it was recovered: who began it, with what, and who votes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incarnation {
    /// The epoch of the control group's ledger.
    pub number: u64,
    /// How the incarnations before it ended.
    pub ends: BTreeMap<u64, End>,
    pub chosen: NodeId,
    /// Who votes at its beginning, and their addresses.
    pub voters: BTreeMap<NodeId, String>,
    /// The region that goes on; empty where there is one.
    pub to: String,
    pub accept_data_loss: bool,
}

impl Incarnation {
    /// How a node opens its replica of the control group.
    pub fn plan(&self, node: NodeId) -> Plan {
        let way = if node == self.chosen { Way::Begin(self.voters.clone()) } else { Way::Return };
        Plan { epoch: self.number, first: FIRST_EPOCH, ends: self.ends.clone(), known: self.number, way }
    }

    /// What a node's disk holds; `None`: its control group was never recovered, as far as it knows.
    pub fn load(disk: &dyn Disk) -> Result<Option<Incarnation>, Error> {
        let failed = |problem: String| {
            Error::Internal(format!(
                "{DIR}/{FACT}.meta: {problem}; remove the file, and this node asks the others again"
            ))
        };
        let held = facts::get(disk, DIR, FACT).map_err(|e| failed(e.to_string()))?;
        held.map(|bytes| codec::decode_serde(&bytes).map_err(|e| failed(e.to_string()))).transpose()
    }
}

/// Where a node of the control group stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Standing {
    pub node: NodeId,
    pub incarnation: Option<Incarnation>,
    /// The epoch of its ledger: ahead of the incarnation when it halted for one that did not begin.
    pub epoch: u64,
    pub repairing: bool,
    /// The last entry that it has.
    pub last: u64,
    /// Who votes, by its ledger.
    pub voters: BTreeMap<NodeId, String>,
}

fn number_of(incarnation: &Option<Incarnation>) -> u64 {
    incarnation.as_ref().map_or(FIRST_EPOCH, |incarnation| incarnation.number)
}

impl Standing {
    fn number(&self) -> u64 {
        number_of(&self.incarnation)
    }
}

/// A node's part in recoveries, if it is of the control group.
#[derive(Clone)]
pub struct Recovery {
    pub id: NodeId,
    pub control: Control,
    pub groups: Groups,
    pub peers: Peers,
    pub keeper: Keeper,
    pub disk: Arc<dyn Disk>,
    /// All nodes of the control group, by this one's file.
    pub configured: BTreeMap<NodeId, String>,
    pub incarnation: Arc<Mutex<Option<Incarnation>>>,
}

async fn stands(peers: &Peers, addr: &str) -> Result<Standing, Error> {
    let asked =
        peers.ask(addr, Body::default(), STAND_WITHIN, |mut to, body| async move { to.stands(body).await });
    let stands = asked.await?;
    codec::decode_serde(&stands).map_err(|e| Error::Internal(e.to_string()))
}

impl Recovery {
    fn held(&self) -> Option<Incarnation> {
        self.incarnation.lock().unwrap_or_else(|p| p.into_inner()).clone()
    }

    fn replica(&self) -> Result<Replica, Error> {
        let closed = || Error::Unavailable("the replica of the control group is being opened".into());
        self.groups.get(CONTROL).ok_or_else(closed)
    }

    pub fn standing(&self) -> Result<Standing, Error> {
        let ledger = self.replica()?.ledger;
        Ok(Standing {
            node: self.id,
            incarnation: self.held(),
            epoch: ledger.epoch(),
            repairing: ledger.is_repairing(),
            last: ledger.reached(),
            voters: ledger.voter_addrs(),
        })
    }

    /// Goes over to an incarnation, unless this node has it or a newer one.
    pub async fn adopt(&self, incarnation: Incarnation) -> Result<(), Error> {
        let (number, halted) = (incarnation.number, self.replica()?.ledger.epoch());
        if number_of(&self.held()) >= number {
            return Ok(());
        }
        if halted > number {
            return Err(Error::Unavailable(format!("this node has halted for incarnation {halted}")));
        }
        let (disk, bytes) = (self.disk.clone(), codec::encode_serde(&incarnation));
        let kept = sim::task::blocking(move || facts::put(&*disk, DIR, FACT, &bytes)).await;
        kept.map_err(|e| Error::Internal(format!("incarnation {number} cannot be kept on this disk: {e}")))?;
        let plan = incarnation.plan(self.id);
        sim::trace::probe("control: a node went over to another incarnation");
        sim::warn!(
            "the control group was recovered: this node goes over to its incarnation {number}, which node {} began",
            incarnation.chosen
        );
        *self.incarnation.lock().unwrap_or_else(|p| p.into_inner()) = Some(incarnation);
        self.keeper.turn_control(plan).await
    }

    /// Looks for newer incarnations for ever, and carries its own out while this node leads.
    pub async fn keep(self) {
        let mut turn = 0;
        loop {
            time::sleep(LOOK + LOOK.mul_f64(sim::rand::unit() / 4.0)).await;
            let Ok(replica) = self.replica() else { continue };
            let (leads, led) = (replica.ledger.raft.is_leader(), replica.ledger.leader().is_some());
            let votes = replica.ledger.voter_addrs();
            drop(replica);
            let others: Vec<NodeId> = self.configured.keys().copied().filter(|id| *id != self.id).collect();
            // A majority that was given up has a leader too, and a leader that is gone is named for a while: so one after the other is asked, always.
            let next = others.get(turn % others.len().max(1)).copied();
            turn += 1;
            let missing = |id: &NodeId| leads && !votes.contains_key(id);
            let asked = others.iter().filter(|id| !led || Some(**id) == next || missing(id));
            let asked = asked.filter_map(|id| self.configured.get(id));
            let standings = join_all(asked.map(|addr| stands(&self.peers, addr))).await;
            for standing in standings.into_iter().flatten() {
                if let Err(error) = self.met(standing, leads).await {
                    sim::debug!("control group: {error}");
                }
            }
            if leads && let Err(error) = self.leap().await {
                sim::warn!("the map does not say yet that the control group was recovered: {error}");
            }
        }
    }

    /// What another node says of itself: this one follows it, or takes it in again.
    async fn met(&self, standing: Standing, leads: bool) -> Result<(), Error> {
        let own = number_of(&self.held());
        match standing.incarnation {
            Some(newer) if newer.number > own => self.adopt(newer).await,
            // It has come back, and followed.
            Some(same) if leads && same.number == own && standing.epoch == own => {
                let ledger = self.replica()?.ledger;
                let (to, votes) = (standing.node, ledger.voter_addrs());
                let Some(addr) = self.configured.get(&to).filter(|_| !votes.contains_key(&to)) else {
                    return Ok(());
                };
                ledger.change(Membership::Voter { to, addr: addr.clone(), from: None }).await?;
                sim::trace::probe("control: a lost node votes again");
                sim::info!("node {to} is back in the control group");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Writes this node's incarnation into the map, once.
    async fn leap(&self) -> Result<(), Error> {
        let Some(held) = self.held().filter(|held| held.number > self.control.map().incarnation) else {
            return Ok(());
        };
        let now = time::calendar_ms();
        let leapt = |map: &ClusterMap| Ok(map.recovered(&held, now));
        self.control.update(leapt, Instant::now() + STAND_WITHIN * 5).await.map(drop)
    }
}

impl ClusterMap {
    /// The map at the beginning of an incarnation.
    fn recovered(&self, incarnation: &Incarnation, now: i64) -> ClusterMap {
        if self.incarnation >= incarnation.number {
            return self.clone();
        }
        self.changed(|map| {
            map.incarnation = incarnation.number;
            map.version += VERSIONS;
            let Some(regions) = map.regions.as_mut().filter(|_| !incarnation.to.is_empty()) else { return };
            regions.end_change((Step::Withdrawn, now));
            let cause = format!(
                "the control group had lost its majority, and was recovered by an operator: incarnation {}",
                incarnation.number
            );
            let begun = RegionChange::new(&regions.primary, &incarnation.to, &cause, (Step::Granting, now));
            let accept_data_loss = incarnation.accept_data_loss;
            regions.change = Some(RegionChange { accept_data_loss, leap: EPOCHS - 1, ..begun });
        })
    }
}

/// Carries a recovery out, from any node.
#[derive(Clone)]
pub struct Recoverer {
    pub control: Control,
    pub peers: Peers,
    /// All nodes of the control group, by this one's file.
    pub configured: BTreeMap<NodeId, String>,
}

/// Who answered, and where it stands.
type Found = BTreeMap<NodeId, Result<Standing, Error>>;

impl Recoverer {
    /// Recovers the control group, or says what would be done.
    pub async fn run(&self, ask: &v1::RecoverControlRequest) -> Result<v1::RecoverControlResponse, Error> {
        let asked = self.configured.iter().map(|(id, addr)| async { (*id, stands(&self.peers, addr).await) });
        let found: Found = join_all(asked).await.into_iter().collect();
        let region = self.region(ask).await;
        let can = able(&found);
        let response = |refused: String, number: u64| v1::RecoverControlResponse {
            nodes: found.iter().map(|(id, said)| self.told(*id, said)).collect(),
            incarnation: number,
            region: region.clone().unwrap_or_default(),
            refused,
        };
        let refused = match (&can, &region) {
            (Err(error), _) | (_, Err(error)) => error.to_string(),
            _ => String::new(),
        };
        if ask.dry_run {
            return Ok(response(refused, 0));
        }
        let (before, region) = (can?, region.clone()?);
        let next = self.begin(&found, &before, ask, region).await?;
        Ok(response(String::new(), next.number))
    }

    fn told(&self, id: NodeId, said: &Result<Standing, Error>) -> v1::ControlNode {
        let address = self.configured.get(&id).cloned().unwrap_or_default();
        match said {
            Ok(standing) => v1::ControlNode {
                id,
                address,
                answers: true,
                incarnation: standing.number(),
                last_index: standing.last,
                problem: match (standing.repairing, standing.epoch > standing.number()) {
                    (true, _) => "its log is damaged, and waits for the others".into(),
                    (_, true) => format!("it has halted for incarnation {}", standing.epoch),
                    _ => String::new(),
                },
            },
            Err(error) => {
                v1::ControlNode { id, address, problem: error.to_string(), ..v1::ControlNode::default() }
            }
        }
    }

    /// The region that is to go on: the named one, or the primary, or another one that has replicas enough.
    async fn region(&self, ask: &v1::RecoverControlRequest) -> Result<String, Error> {
        let map = self.control.map();
        let Some(regions) = &map.regions else { return Ok(String::new()) };
        let serving: Vec<&String> = regions.serving().collect();
        if !ask.to.is_empty() && !serving.contains(&&ask.to) {
            let names = serving.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
            return Err(Error::invalid("to", format!("'{}' is none that serves; there are {names}", ask.to)));
        }
        let mut wanted: Vec<&String> = serving.into_iter().collect();
        wanted.sort_by_key(|name| **name != regions.primary);
        wanted.retain(|name| ask.to.is_empty() || **name == ask.to);
        let mut last = None;
        for region in wanted {
            match failover::has_replicas(&self.peers, &map, region).await {
                Ok(()) => return Ok(region.clone()),
                Err(_) if ask.accept_data_loss && !ask.to.is_empty() => return Ok(region.clone()),
                Err(error) => last = Some(error),
            }
        }
        let problem = last.map_or("no region serves".into(), |error| error.to_string());
        Err(Error::Unavailable(format!(
            "{problem}; bring them back, or go on with what there is: --to REGION --accept-data-loss"
        )))
    }

    /// Halts all who answer, and has the one with most begin the next incarnation.
    async fn begin(
        &self,
        found: &Found,
        before: &Before,
        ask: &v1::RecoverControlRequest,
        to: String,
    ) -> Result<Incarnation, Error> {
        let number = before.highest + 1;
        sim::warn!("an operator recovers the control group: incarnation {number}");
        let there = found.iter().filter(|(_, said)| said.is_ok()).map(|(id, _)| *id);
        let halts = there.map(|id| async move { (id, self.halt(id, before, number).await) });
        let mut halted: Vec<(NodeId, Report)> = vec![];
        let mut last = Error::Unavailable("no node of the control group answers".into());
        for (id, report) in join_all(halts).await {
            match report {
                Ok(Some(report)) => halted.push((id, report)),
                Ok(None) => {
                    sim::warn!("node {id} has forgotten what it had: it is taken in again later");
                }
                Err(error) => last = error,
            }
        }
        let (chosen, Report { last, certain, runs }) = choose(&halted).ok_or(last)?.clone();
        let voters: BTreeMap<NodeId, String> =
            halted.iter().filter_map(|(id, _)| Some((*id, self.configured.get(id)?.clone()))).collect();
        let end = End {
            certain,
            last: last.map_or(0, |last| last.index),
            ceiling: u64::MAX,
            began: 0,
            runs,
            voters: before.voters.clone(),
            old_disks: BTreeMap::new(),
        };
        // Also those that did not begin: somebody may have halted for them.
        let mut ends = before.ends.clone();
        ends.extend((before.number..number).map(|epoch| (epoch, end.clone())));
        let accept_data_loss = ask.accept_data_loss;
        let next = Incarnation { number, ends, chosen, voters: voters.clone(), to, accept_data_loss };
        self.tell(chosen, &next).await.map_err(|error| {
            Error::Unavailable(format!("node {chosen}, which has most, does not begin: {error}; try again"))
        })?;
        let others = voters.keys().filter(|id| **id != chosen);
        for (id, told) in join_all(others.map(|id| async { (*id, self.tell(*id, &next).await) })).await {
            // It asks by itself.
            if let Err(error) = told {
                sim::warn!("node {id} does not follow yet: {error}");
            }
        }
        Ok(next)
    }

    fn addr(&self, node: NodeId) -> Result<&String, Error> {
        self.configured.get(&node).ok_or_else(|| Error::NotFound(format!("node {node}")))
    }

    async fn halt(&self, node: NodeId, before: &Before, number: u64) -> Result<Option<Report>, Error> {
        let ended = (before.ends.clone(), before.number);
        failover::halt(&self.peers, self.addr(node)?, CONTROL, ended, number, STEP).await
    }

    async fn tell(&self, node: NodeId, incarnation: &Incarnation) -> Result<(), Error> {
        let body = Body { body: codec::encode_serde(incarnation).into(), ..Body::default() };
        let call =
            self.peers.ask(self.addr(node)?, body, STEP, |mut to, body| async move { to.adopt(body).await });
        call.await.map(drop)
    }
}

/// What there was before a recovery, by those who answer.
#[derive(Debug)]
struct Before {
    number: u64,
    /// How the incarnations before that one ended.
    ends: BTreeMap<u64, End>,
    /// The highest number that anybody has halted for.
    highest: u64,
    voters: BTreeSet<NodeId>,
}

/// Whether there is something to recover; what there is.
fn able(found: &Found) -> Result<Before, Error> {
    let standings: Vec<&Standing> = found.values().flatten().collect();
    let newest = standings.iter().max_by_key(|standing| (standing.number(), standing.last));
    let newest = newest.ok_or_else(|| Error::Unavailable("no node of the control group answers".into()))?;
    let number = newest.number();
    let voters: BTreeSet<NodeId> = newest.voters.keys().copied().collect();
    // Who halted for an incarnation that never began waits for an operator; who is behind follows by itself.
    let well = |standing: &&&Standing| {
        voters.contains(&standing.node) && !standing.repairing && standing.epoch <= number
    };
    let count = standings.iter().filter(well).count();
    if count * 2 > voters.len() {
        return Err(Error::invalid(
            "recover",
            format!(
                "{count} of the {} nodes that vote in the control group answer, which is a majority: it needs no recovery. If it has no leader, wait a few seconds",
                voters.len()
            ),
        ));
    }
    let highest = standings.iter().map(|standing| standing.epoch.max(standing.number())).max();
    let ends = newest.incarnation.as_ref().map_or(BTreeMap::new(), |held| held.ends.clone());
    Ok(Before { number, ends, highest: highest.unwrap_or(number), voters })
}

#[cfg(test)]
mod tests {
    use super::super::regions::testing::settled;
    use super::*;

    fn standing(node: NodeId) -> Standing {
        let voters = (1..=7).map(|id| (id, format!("n{id}:1"))).collect();
        Standing { node, incarnation: None, epoch: FIRST_EPOCH, repairing: false, last: node, voters }
    }

    fn found(there: impl IntoIterator<Item = Standing>) -> Found {
        let gone = (1..=7).map(|id| (id, Err(Error::Unavailable("no answer".into()))));
        let mut found: Found = gone.collect();
        found.extend(there.into_iter().map(|standing| (standing.node, Ok(standing))));
        found
    }

    fn second() -> Incarnation {
        Incarnation {
            number: 2,
            ends: BTreeMap::from([(1, End::default())]),
            chosen: 5,
            voters: (4..=6).map(|id| (id, format!("n{id}:1"))).collect(),
            to: "west".into(),
            accept_data_loss: false,
        }
    }

    #[test]
    fn a_majority_is_not_recovered_and_less_is() -> Result<(), Error> {
        assert!(able(&found([])).is_err(), "nobody answers");
        assert!(able(&found((4..=7).map(standing))).is_err(), "four of seven");
        let before = able(&found((4..=6).map(standing)))?;
        assert_eq!((before.number, before.highest, before.voters.len()), (1, 1, 7));
        // One whose log is damaged does not vote, nor does one that has halted: an operator's command broke off.
        let damaged = Standing { repairing: true, ..standing(7) };
        assert!(able(&found((4..=6).map(standing).chain([damaged]))).is_ok());
        let halted = (1..=7).map(|id| Standing { epoch: if id > 3 { 2 } else { 1 }, ..standing(id) });
        let before = able(&found(halted))?;
        assert_eq!((before.number, before.highest), (1, 2), "the next attempt has a number of its own");
        Ok(())
    }

    #[test]
    fn who_votes_is_said_by_the_newest_incarnation() {
        let voters = second().voters;
        let recovered =
            |id| Standing { incarnation: Some(second()), epoch: 2, voters: voters.clone(), ..standing(id) };
        let all = (1..=3).map(standing).chain((4..=5).map(recovered)).chain([standing(7)]);
        assert!(able(&found(all)).is_err(), "two of its three voters are there");
        let one = able(&found((1..=3).map(standing).chain([recovered(4)])));
        assert_eq!(
            one.map(|before| before.number).ok(),
            Some(2),
            "those of the old one follow, and do not count"
        );
    }

    #[test]
    fn the_map_leaps_once_and_a_region_goes_on() -> Result<(), Error> {
        let map = settled(1, true)?;
        let first = (Step::Validating, "it is silent");
        let map = map.begin_region_change("west", false, false, first, 1)?;
        let leapt = map.recovered(&second(), 5);
        assert_eq!(leapt, leapt.recovered(&second(), 6), "once");
        assert_eq!((leapt.version, leapt.incarnation), (map.version + VERSIONS + 1, 2));
        let regions = leapt.regions.as_ref().ok_or_else(|| Error::NotFound("regions".into()))?;
        assert_eq!(regions.past.last().map(RegionChange::step), Some(Step::Withdrawn));
        let change = regions.change.as_ref().ok_or_else(|| Error::NotFound("change".into()))?;
        assert_eq!((change.step(), change.to.as_str(), change.leap), (Step::Granting, "west", EPOCHS - 1));
        // Also where the primary goes on: its own replicas may have been in epochs that nobody knows.
        let stays = map.recovered(&Incarnation { to: "east".into(), ..second() }, 5);
        let granted = stays.region_granted(1 + EPOCHS, "east", 7);
        assert_eq!((granted.primary(), granted.epoch(), granted.to_promote()), ("east", 1 + EPOCHS, vec![0]));
        // A cluster of one region has nobody who could go on without it.
        let one = settled(1, false)?.recovered(&Incarnation { to: String::new(), ..second() }, 5);
        assert_eq!((one.incarnation, one.regions), (2, None));
        Ok(())
    }
}
