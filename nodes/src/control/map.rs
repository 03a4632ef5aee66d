//! The cluster map: which nodes there are, which of them hold which shard, and which shard has which slots. Its changes are plain functions from one map to the
//! next; [`super`] writes them down, one version after the other.
//!
//! Long operations stand in the map itself, as a plan and how far it is: whoever leads the control group goes on with them.
//! A change that was made already changes nothing, so a command that is repeated, or two drivers at once, do no harm.

use super::erasures::Erasures;
use super::regions::{End, Regions, RegionsConfig};
use crate::auth::check_tenant;
use crate::error::Error;
use crate::roles::{self, Role, Roles};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use storage::model::GLOBAL_TENANT;
use storage::slots::{MoveId, Ranges, SLOTS, Slot, SlotSet};

/// A node's number, the same in every group that it is a member of.
pub type NodeId = u64;
pub type ShardId = u32;

/// Shards at most; a slot cannot be divided.
pub const SHARDS_MAX: u32 = 256;
/// Slots in one move: what is sealed at a time, so that writers wait briefly.
pub const SLOTS_PER_MOVE: usize = 64;
/// The same of one tenant's own slots, in which there is less.
pub const PINNED_SLOTS_PER_MOVE: usize = 512;
/// Tenants with slots of their own, at most: every map and every shard names them.
pub const PINS_MAX: usize = 256;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClusterMap {
    /// Greater with every change. 0: there is no map yet.
    pub version: u64,
    pub nodes: BTreeMap<NodeId, NodeEntry>,
    pub shards: BTreeMap<ShardId, ShardEntry>,
    /// The number of the next new shard. None is given twice: an old map, or a step that comes late, never means a shard that came after it.
    pub next_shard: ShardId,
    /// The last move of slots that was begun.
    pub last_move: MoveId,
    /// A change of the number of shards that is under way.
    pub resize: Option<Resize>,
    /// Tenants whose memories are to lie in one shard, whatever their slots say. Where each of their own slots is, the shards' entries say.
    #[serde(default)]
    pub pins: BTreeMap<String, ShardId>,
    /// A move of a tenant's own slots, to where it is pinned or back.
    #[serde(default)]
    pub pinning: Option<Move>,
    /// Where there are several ([`super::regions`]).
    #[serde(default)]
    pub regions: Option<Regions>,
    /// Who was erased, and is to be.
    #[serde(default)]
    pub erasures: Erasures,
    /// Of the control group that wrote this ([`super::recover`]); 0: it was never recovered.
    #[serde(default)]
    pub incarnation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeEntry {
    pub addr: String,
    pub state: NodeState,
    /// What it may be given, by its own account once it runs.
    #[serde(default = "roles::all")]
    pub roles: Roles,
    #[serde(default)]
    pub liveness: Liveness,
    /// Empty in a cluster that has one.
    #[serde(default)]
    pub region: String,
    /// Where callers reach its gateway, by its own account once it runs.
    #[serde(default)]
    pub gateway: Gateway,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gateway {
    /// Where peers reach the node.
    #[default]
    Here,
    At(String),
    /// It has none.
    Nowhere,
}

impl NodeEntry {
    fn new(addr: String, roles: Roles) -> NodeEntry {
        let (state, liveness) = (NodeState::Member, Liveness::Up);
        NodeEntry { addr, state, roles, liveness, region: String::new(), gateway: Gateway::Here }
    }

    /// Whether it may keep the replicas for this that it has.
    fn keeps(&self, role: Role) -> bool {
        self.state == NodeState::Member && self.liveness != Liveness::Lost && self.roles.contains(&role)
    }

    /// Whether it may be given replicas for this.
    fn may(&self, role: Role) -> bool {
        self.liveness == Liveness::Up && self.keeps(role)
    }

    /// Whether it may have a replica that does not vote: for a view, or, away from where writes go, for the ledger too.
    fn follows(&self, primary: &str, allowed: impl Fn(&NodeEntry, Role) -> bool) -> bool {
        let replica = |role: Role| role.is_view() || (role == Role::Ledger && self.region != primary);
        self.roles.iter().any(|role| replica(*role) && allowed(self, *role))
    }
}

/// What the control group's leader hears of a node ([`super::liveness`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Liveness {
    #[default]
    Up,
    /// It does not answer.
    Down,
    /// It has not answered for so long that its replicas go to others.
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// It may be given shards.
    Member,
    /// Its shards go to others, then it may be removed.
    Draining,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShardEntry {
    pub epoch: u64,
    /// Those whose ledgers vote.
    pub members: BTreeSet<NodeId>,
    #[serde(flatten)]
    pub slots: SlotSet,
    /// Its replicas have been told their slots: from now on none of them is new.
    pub founded: bool,
    /// A replica that goes from one node to another.
    pub handover: Option<Handover>,
    /// Replicas that do not vote, for the views of their nodes' roles.
    #[serde(default)]
    pub learners: BTreeMap<NodeId, Learner>,
    /// Who began the epoch, if it is not the shard's first.
    #[serde(default)]
    pub chosen: Option<NodeId>,
    /// The epoch in which it was founded.
    #[serde(default = "one")]
    pub first_epoch: u64,
    /// How the epochs before ended.
    #[serde(default)]
    pub ends: BTreeMap<u64, End>,
    /// The other region may lack a step of a move up to this index of the ledger: it does not take over by itself before it has that.
    #[serde(default)]
    pub lacks: Option<u64>,
    /// The version of the map in which it came; 0: nobody noted it ([`super::since`]).
    #[serde(default)]
    pub created: u64,
}

fn one() -> u64 {
    1
}

impl ShardEntry {
    /// One whose ledger begins in an epoch.
    pub fn new(epoch: u64, members: BTreeSet<NodeId>, slots: SlotSet) -> ShardEntry {
        let (founded, handover, learners, chosen, ends, lacks, created) = Default::default();
        let first_epoch = epoch;
        ShardEntry {
            epoch,
            members,
            slots,
            founded,
            handover,
            learners,
            chosen,
            first_epoch,
            ends,
            lacks,
            created,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learner {
    /// The ledger is yet to take it in.
    Joining,
    Serving,
    /// Nobody asks it any more; the ledger is yet to let it go.
    Leaving,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Handover {
    /// The one that leaves, if one does.
    pub from: Option<NodeId>,
    pub to: NodeId,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resize {
    /// Shards that there are to be.
    pub shards: u32,
    pub slots_moved: usize,
    pub slots_to_move: usize,
    pub moving: Option<Move>,
}

/// Slots on their way from one shard to another.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Move {
    pub id: MoveId,
    pub from: ShardId,
    pub to: ShardId,
    #[serde(flatten)]
    pub slots: SlotSet,
    /// The map sends callers to the destination; the source's rows are still to be removed.
    pub switched: bool,
}

impl ClusterMap {
    /// The first map: `count` shards over `nodes`.
    pub fn found(nodes: &BTreeMap<NodeId, String>, count: u32) -> Result<ClusterMap, Error> {
        ClusterMap::found_in(nodes, count, None)
    }

    /// The same in several regions.
    pub fn found_in(
        nodes: &BTreeMap<NodeId, String>,
        count: u32,
        regions: Option<&RegionsConfig>,
    ) -> Result<ClusterMap, Error> {
        if nodes.is_empty() || !(1..=SHARDS_MAX).contains(&count) {
            return Err(Error::invalid("shards", format!("at least one node, and 1 to {SHARDS_MAX} shards")));
        }
        let entry = |(id, addr): (&NodeId, &String)| (*id, NodeEntry::new(addr.clone(), roles::all()));
        let mut map =
            ClusterMap { version: 1, nodes: nodes.iter().map(entry).collect(), ..ClusterMap::default() };
        if let Some(config) = regions {
            map.found_regions(config);
        }
        for shard in 0..count {
            let share = |shard: u32| (u32::from(SLOTS) * shard / count) as Slot;
            let slots = (share(shard)..share(shard + 1)).collect();
            let entry = ShardEntry::new(map.epoch(), map.fresh_members(), slots);
            map.shards.insert(shard, ShardEntry { created: map.version, ..entry });
        }
        map.next_shard = count;
        Ok(map)
    }

    /// The shard that has a slot of a tenant.
    pub fn shard_of(&self, tenant: &str, slot: Slot) -> Option<ShardId> {
        self.shards.iter().find(|(_, shard)| shard.slots.contains(tenant, slot)).map(|(id, _)| *id)
    }

    /// The move that is under way.
    pub fn moving(&self) -> Option<&Move> {
        self.pinning.as_ref().or(self.resize.as_ref().and_then(|resize| resize.moving.as_ref()))
    }

    /// The tenants with slots of their own: those that are pinned, and those on their way back.
    pub fn apart(&self) -> BTreeSet<&String> {
        self.pins.keys().chain(self.shards.values().flat_map(|shard| shard.slots.apart().keys())).collect()
    }

    /// Of a tenant's slots those that are still to come to a shard.
    fn awaited(&self, tenant: &str, shard: ShardId) -> Ranges {
        let Some(entry) = self.shards.get(&shard) else { return Ranges::default() };
        let wanted = match self.pins.get(tenant) {
            Some(pinned) if *pinned == shard => Ranges::all(),
            Some(_) => Ranges::default(),
            None => entry.slots.everybody().clone(),
        };
        wanted.minus(entry.slots.of(tenant))
    }

    /// How many of a tenant's slots are not where they are to be.
    pub fn slots_awaited(&self, tenant: &str) -> usize {
        self.shards.keys().map(|shard| self.awaited(tenant, *shard).len()).sum()
    }

    /// Addresses of a shard's voting replicas.
    pub fn addrs(&self, shard: ShardId) -> Vec<String> {
        let members = self.shards.get(&shard).map(|shard| &shard.members);
        members.into_iter().flatten().filter_map(|id| self.nodes.get(id)).map(|n| n.addr.clone()).collect()
    }

    /// Addresses of the replicas of a shard whose nodes have all of these roles.
    pub fn addrs_with(&self, shard: ShardId, roles: &[Role]) -> Vec<String> {
        let Some(shard) = self.shards.get(&shard) else { return vec![] };
        let serving = |(id, learner): (&NodeId, &Learner)| (*learner == Learner::Serving).then_some(*id);
        let ids = shard.members.iter().copied().chain(shard.learners.iter().filter_map(serving));
        let nodes = ids.filter_map(|id| self.nodes.get(&id));
        nodes
            .filter(|node| roles.iter().all(|role| node.roles.contains(role)))
            .map(|node| node.addr.clone())
            .collect()
    }

    /// Addresses of the nodes that cache.
    pub fn caches(&self) -> Vec<String> {
        self.nodes.values().filter(|node| node.may(Role::Cache)).map(|node| node.addr.clone()).collect()
    }

    /// Shards whose replica a node keeps: as a member or a learner, or about to be one.
    pub fn kept_by(&self, node: NodeId) -> BTreeSet<ShardId> {
        let keeps = |shard: &ShardEntry| {
            shard.members.contains(&node)
                || shard.learners.contains_key(&node)
                || shard.handover.is_some_and(|handover| handover.to == node)
        };
        self.shards.iter().filter(|(_, shard)| keeps(shard)).map(|(id, _)| *id).collect()
    }

    /// How many replicas each node of a region has that may be given more for a role.
    fn loads(&self, role: Role, region: &str) -> BTreeMap<NodeId, usize> {
        let nodes = self.nodes.iter().filter(|(_, node)| node.may(role) && node.region == region);
        nodes.map(|(id, _)| (*id, self.kept_by(*id).len())).collect()
    }

    /// The nodes of a region that may be given more for a role, those with the fewest replicas first.
    fn least_loaded(&self, role: Role, region: &str) -> impl Iterator<Item = NodeId> + use<> {
        let mut loads: Vec<(usize, NodeId)> =
            self.loads(role, region).into_iter().map(|(id, load)| (load, id)).collect();
        loads.sort_unstable();
        loads.into_iter().map(|(_, id)| id)
    }

    /// The nodes with the fewest replicas, where writes go.
    fn fresh_members(&self) -> BTreeSet<NodeId> {
        self.least_loaded(Role::Ledger, self.primary()).take(Role::Ledger.policy().replicas).collect()
    }

    pub(super) fn changed(&self, change: impl FnOnce(&mut ClusterMap)) -> ClusterMap {
        let mut map = self.clone();
        change(&mut map);
        if map != *self {
            map.version += 1;
        }
        map
    }

    /// Takes a node in; if it is there, its address and roles are brought up to date, and it is drained no longer.
    pub fn join(&self, id: NodeId, addr: &str, roles: &Roles) -> Result<ClusterMap, Error> {
        self.join_in(id, addr, roles, self.primary())
    }

    /// Takes a node of a region in.
    pub fn join_in(&self, id: NodeId, addr: &str, roles: &Roles, region: &str) -> Result<ClusterMap, Error> {
        if !self.regions.as_ref().map_or(region.is_empty(), |r| r.names.iter().any(|name| name == region)) {
            return Err(Error::invalid("region", format!("there is none that is called '{region}'")));
        }
        if roles.is_empty() {
            return Err(Error::invalid("roles", "are empty: this node would be given nothing"));
        }
        roles::check(roles)?;
        if let Some((other, _)) = self.nodes.iter().find(|(other, node)| **other != id && node.addr == addr) {
            return Err(Error::invalid(
                "addr",
                format!("{addr} is node {other}'s; every node needs its own"),
            ));
        }
        let held = self.nodes.get(&id);
        if held.is_some_and(|node| node.region != region && !self.kept_by(id).is_empty()) {
            let problem = format!("node {id} has replicas for another region; drain and remove it first");
            return Err(Error::invalid("region", problem));
        }
        let (liveness, region) = (held.map(|node| node.liveness).unwrap_or_default(), region.to_string());
        let gateway = held.map(|node| node.gateway.clone()).unwrap_or_default();
        let entry = NodeEntry { liveness, region, gateway, ..NodeEntry::new(addr.into(), roles.clone()) };
        Ok(self.changed(|map| drop(map.nodes.insert(id, entry))))
    }

    /// Says of nodes whether they are there.
    pub fn heard(&self, found: &BTreeMap<NodeId, Liveness>) -> ClusterMap {
        self.changed(|map| {
            for (id, node) in &mut map.nodes {
                node.liveness = found.get(id).copied().unwrap_or(node.liveness);
            }
        })
    }

    /// A node says where it is and what it does, if the map has it and says otherwise.
    pub fn told(&self, id: NodeId, addr: &str, roles: &Roles, gateway: &Gateway) -> ClusterMap {
        self.changed(|map| {
            map.nodes.entry(id).and_modify(|node| {
                (node.addr, node.roles, node.gateway) = (addr.into(), roles.clone(), gateway.clone());
            });
        })
    }

    /// Gives a node's shards to others, one after the other.
    pub fn drain(&self, id: NodeId) -> Result<ClusterMap, Error> {
        let Some(node) = self.nodes.get(&id) else { return Err(Error::NotFound(format!("node {id}"))) };
        let rest = |role| self.loads(role, &node.region).keys().filter(|other| **other != id).count();
        let (voters, votes) = (rest(Role::Ledger), node.roles.contains(&Role::Ledger));
        let short =
            self.shards.iter().find(|(_, e)| votes && e.members.contains(&id) && e.members.len() > voters);
        if let Some((shard, entry)) = short {
            let problem = format!(
                "shard {shard} has {} replicas that vote, and {voters} nodes would be left",
                entry.members.len()
            );
            return Err(Error::invalid("node", format!("{problem}; join another node first")));
        }
        let needed = |role: &&Role| **role != Role::Cache && rest(**role) == 0;
        if let Some(role) = node.roles.iter().find(needed) {
            let problem = format!("{id} is the last with the role {}; join another node first", role.name());
            return Err(Error::invalid("node", problem));
        }
        Ok(self.changed(|map| {
            map.nodes.entry(id).and_modify(|node| node.state = NodeState::Draining);
        }))
    }

    /// Forgets a node that has no shard.
    pub fn remove(&self, id: NodeId) -> Result<ClusterMap, Error> {
        if let Some(shard) = self.kept_by(id).first() {
            return Err(Error::invalid("node", format!("{id} still has shard {shard}; drain it first")));
        }
        Ok(self.changed(|map| drop(map.nodes.remove(&id))))
    }

    /// The shards that are there when there are to be so many: the oldest.
    fn stay(&self, shards: u32) -> BTreeSet<ShardId> {
        self.shards.keys().copied().take(shards as usize).collect()
    }

    /// Begins to change the number of shards.
    pub fn begin_resize(&self, shards: u32) -> Result<ClusterMap, Error> {
        if !(1..=SHARDS_MAX).contains(&shards) {
            return Err(Error::invalid("shards", format!("is {shards}; 1 to {SHARDS_MAX} are possible")));
        }
        if let Some(resize) = self.resize.as_ref().filter(|resize| resize.shards != shards) {
            let problem = format!("a change to {} shards is under way; wait for its end", resize.shards);
            return Err(Error::invalid("shards", problem));
        }
        if self.resize.is_some() || self.shards.len() == shards as usize {
            return Ok(self.clone());
        }
        let staying = self.stay(shards);
        if let Some((tenant, shard)) = self.pins.iter().find(|(_, shard)| !staying.contains(shard)) {
            let problem = format!("tenant {tenant} is pinned to shard {shard}, which would go");
            return Err(Error::invalid(
                "shards",
                format!("{problem}; unpin it, or pin it to another shard first"),
            ));
        }
        Ok(self.changed(|map| {
            while map.shards.len() < shards as usize {
                let entry = ShardEntry::new(map.epoch(), map.fresh_members(), SlotSet::default());
                map.shards.insert(map.next_shard, ShardEntry { created: self.version + 1, ..entry });
                map.next_shard += 1;
            }
            let slots_to_move = map.surplus(shards).values().sum();
            map.resize = Some(Resize { shards, slots_moved: 0, slots_to_move, moving: None });
        }))
    }

    /// How many slots each shard has at the end: as equal as can be, and no more moves than needed: those that have more than others
    /// keep one more.
    fn shares(&self, shards: u32) -> BTreeMap<ShardId, usize> {
        let (each, more) = (SLOTS as usize / shards as usize, SLOTS as usize % shards as usize);
        let staying = self.stay(shards);
        let mut stay: Vec<(usize, ShardId)> = self
            .shards
            .iter()
            .filter(|(id, _)| staying.contains(id))
            .map(|(id, shard)| (usize::MAX - shard.slots.everybody().len(), *id))
            .collect();
        stay.sort_unstable();
        stay.into_iter().enumerate().map(|(at, (_, id))| (id, each + (at < more) as usize)).collect()
    }

    /// How many slots each shard has more than it is to have.
    fn surplus(&self, shards: u32) -> BTreeMap<ShardId, usize> {
        let shares = self.shares(shards);
        let more = |(id, shard): (&ShardId, &ShardEntry)| {
            (*id, shard.slots.everybody().len().saturating_sub(shares.get(id).copied().unwrap_or(0)))
        };
        self.shards.iter().map(more).filter(|(_, more)| *more > 0).collect()
    }

    /// A shard's replicas have been told what they have.
    pub fn founded(&self, shard: ShardId) -> ClusterMap {
        self.changed(|map| {
            map.shards.entry(shard).and_modify(|entry| entry.founded = true);
        })
    }

    /// Pins a tenant: its memories, and those to come, go to one shard.
    pub fn pin(&self, tenant: &str, shard: ShardId) -> Result<ClusterMap, Error> {
        if tenant == GLOBAL_TENANT {
            let problem =
                "GLOBAL memories, which every tenant reads, lie in all shards; they cannot be pinned";
            return Err(Error::invalid("tenant", problem));
        }
        check_tenant(tenant)?;
        if !self.shards.contains_key(&shard) {
            let ids: Vec<String> = self.shards.keys().map(ShardId::to_string).collect();
            return Err(Error::invalid(
                "shard",
                format!("there is no {shard}; there are {}", ids.join(", ")),
            ));
        }
        if let Some(resize) = self.resize.as_ref().filter(|resize| !self.stay(resize.shards).contains(&shard))
        {
            let problem = format!("{shard} goes with the change to {} shards", resize.shards);
            return Err(Error::invalid("shard", format!("{problem}; pin the tenant to one that stays")));
        }
        let apart = self.apart();
        if apart.len() >= PINS_MAX && !apart.contains(&tenant.to_string()) {
            let problem = format!("{} are pinned or on their way back, as many as can be", apart.len());
            return Err(Error::invalid("tenant", format!("{problem}; unpin another one first")));
        }
        Ok(self.changed(|map| {
            map.pins.insert(tenant.into(), shard);
        }))
    }

    /// Unpins a tenant: its memories go back to where its slots say.
    pub fn unpin(&self, tenant: &str) -> ClusterMap {
        self.changed(|map| {
            map.pins.remove(tenant);
        })
    }

    /// The next move of a tenant's own slots: from where, to where, which.
    fn next_pinning(&self) -> Option<(ShardId, ShardId, SlotSet)> {
        for tenant in self.apart() {
            for to in self.shards.keys() {
                let awaited = self.awaited(tenant, *to);
                let here = |(from, entry): (&ShardId, &ShardEntry)| {
                    let slots: Ranges =
                        awaited.meet(entry.slots.of(tenant)).iter().take(PINNED_SLOTS_PER_MOVE).collect();
                    (!slots.is_empty()).then(|| (*from, *to, SlotSet::of_tenant(tenant, slots)))
                };
                if let Some(next) = self.shards.iter().find_map(here) {
                    return Some(next);
                }
            }
        }
        None
    }

    /// Plans the next move: of a tenant that is not where it is to be, else of a resize; where all is moved, ends that.
    pub fn plan_move(&self) -> ClusterMap {
        // What is erased stays where it is until that is done everywhere.
        if self.moving().is_some() || !self.open_erasures().is_empty() {
            return self.clone();
        }
        if let Some((from, to, slots)) = self.next_pinning() {
            return self.changed(|map| {
                map.last_move += 1;
                map.pinning = Some(Move { id: map.last_move, from, to, slots, switched: false });
            });
        }
        let Some(resize) = &self.resize else { return self.clone() };
        let shares = self.shares(resize.shards);
        let surplus = self.surplus(resize.shards);
        let lacks = |(id, share): (&ShardId, &usize)| {
            let has = self.shards.get(id).map_or(0, |shard| shard.slots.everybody().len());
            (*id, share.saturating_sub(has))
        };
        let lacking = shares.iter().map(lacks).find(|(_, lack)| *lack > 0);
        self.changed(|map| match (surplus.first_key_value(), lacking) {
            (Some((&from, &more)), Some((to, lack))) => {
                let count = more.min(lack).min(SLOTS_PER_MOVE);
                // From the end, so that ranges stay few. Pinned tenants' memories stay where they are.
                let has: Vec<Slot> = map.shards[&from].slots.everybody().iter().collect();
                let slots: SlotSet = has[has.len() - count..].iter().copied().collect();
                let slots =
                    self.apart().into_iter().fold(slots, |set, tenant| set.with(tenant, Ranges::default()));
                map.last_move += 1;
                let moving = Move { id: map.last_move, from, to, slots, switched: false };
                map.resize.iter_mut().for_each(|resize| resize.moving = Some(moving.clone()));
            }
            _ => {
                let shards = map.resize.take().map_or(u32::MAX, |resize| resize.shards);
                let staying = map.stay(shards);
                map.shards.retain(|id, _| staying.contains(id));
            }
        })
    }

    /// Sends callers to a move's destination. The source has released the slots, the destination has adopted them.
    pub fn switch(&self, id: MoveId) -> ClusterMap {
        self.changed(|map| {
            let of_resize = map.resize.as_mut().and_then(|resize| resize.moving.as_mut());
            let mut under_way = map.pinning.as_mut().into_iter().chain(of_resize);
            let Some(moving) = under_way.find(|moving| moving.id == id && !moving.switched) else { return };
            moving.switched = true;
            let Move { from, to, slots, .. } = moving.clone();
            if let Some(resize) = &mut map.resize {
                resize.slots_moved += slots.everybody().len();
            }
            if let Some(source) = map.shards.get_mut(&from) {
                source.slots = source.slots.minus(&slots);
            }
            if let Some(destination) = map.shards.get_mut(&to) {
                destination.slots = destination.slots.union(&slots);
            }
        })
    }

    /// Ends a move: the source has no rows of it left.
    pub fn end_move(&self, id: MoveId) -> ClusterMap {
        self.changed(|map| {
            let goes_on = |moving: &Move| moving.id != id || !moving.switched;
            map.pinning = map.pinning.take().filter(goes_on);
            if let Some(resize) = &mut map.resize {
                resize.moving = resize.moving.take().filter(goes_on);
            }
        })
    }

    /// Plans the next handover: away from nodes that are drained, lost, or may not vote, then to shards that lack replicas. Of more voters than there are to be,
    /// as where a failover overtook a handover in the other region, one leaves to those that stay.
    pub fn plan_handover(&self) -> ClusterMap {
        let draining = |id: &NodeId| self.nodes.get(id).is_none_or(|node| !node.keeps(Role::Ledger));
        if self.holds_still() {
            return self.clone();
        }
        let primary = self.primary();
        self.changed(|map| {
            for (id, shard) in &self.shards {
                if shard.handover.is_some() {
                    continue;
                }
                let mut from = shard.members.iter().copied().find(draining);
                let nodes = self.loads(Role::Ledger, primary).len();
                let lacks = shard.members.len() < Role::Ledger.policy().replicas.min(nodes);
                let stays = |node: &NodeId| shard.members.contains(node);
                let surplus = shard.members.len() > Role::Ledger.policy().replicas;
                if surplus {
                    from = from.or(shard.members.last().copied());
                }
                if from.is_none() && !lacks {
                    continue;
                }
                // Who follows it already has nearly everything.
                let mut free: Vec<NodeId> = map
                    .least_loaded(Role::Ledger, primary)
                    .filter(|node| stays(node) == surplus && Some(*node) != from)
                    .collect();
                free.sort_by_key(|node| !shard.learners.contains_key(node));
                let Some(&to) = free.first() else { continue };
                map.shards.entry(*id).and_modify(|shard| shard.handover = Some(Handover { from, to }));
            }
        })
    }

    /// Gives a handover up whose target is not in the ledger, nor on its way to be.
    pub fn cancel_handover(&self, shard: ShardId, given_up: Handover) -> ClusterMap {
        self.changed(|map| {
            if let Some(entry) = map.shards.get_mut(&shard).filter(|entry| entry.handover == Some(given_up)) {
                entry.handover = None;
            }
        })
    }

    /// Whether a node has been silent for so long that nothing is expected of it.
    pub fn is_lost(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.liveness == Liveness::Lost)
    }

    /// A handover is done: the ledger has the new member, and the old one no longer.
    pub fn end_handover(&self, shard: ShardId, done: Handover) -> ClusterMap {
        self.changed(|map| {
            let Some(entry) = map.shards.get_mut(&shard).filter(|entry| entry.handover == Some(done)) else {
                return;
            };
            entry.handover = None;
            entry.members.insert(done.to);
            entry.learners.remove(&done.to);
            if let Some(from) = done.from {
                entry.members.remove(&from);
            }
        })
    }

    /// Plans learners: of each view as many replicas as its policy has, voters included, where there are as many nodes; in a region that keeps
    /// replicas but takes no writes, as many of the ledger too. None for nodes that are drained, or gone, or have no view any more.
    pub fn plan_learners(&self) -> ClusterMap {
        if self.holds_still() {
            return self.clone();
        }
        let primary = self.primary();
        self.changed(|map| {
            for (id, shard) in
                self.shards.iter().filter(|(_, shard)| shard.founded && shard.handover.is_none())
            {
                let mut planned = shard.clone();
                let mut short = BTreeSet::new();
                for region in self.serving() {
                    let away = region != primary;
                    let roles = Role::ALL
                        .into_iter()
                        .filter(|role| role.is_view() || (away && *role == Role::Ledger));
                    for role in roles {
                        let holds = |node: &NodeId| {
                            planned.members.contains(node) || planned.learners.contains_key(node)
                        };
                        let keeps = |id: &NodeId, node: &NodeEntry| {
                            node.keeps(role) && node.region == region && holds(id)
                        };
                        let held = map.nodes.iter().filter(|(id, node)| keeps(id, node)).count();
                        let free: Vec<NodeId> =
                            map.least_loaded(role, region).filter(|node| !holds(node)).collect();
                        let lacking = role.policy().replicas.saturating_sub(held);
                        if away && free.len() < lacking {
                            short.insert(region);
                        }
                        planned
                            .learners
                            .extend(free.into_iter().take(lacking).map(|node| (node, Learner::Joining)));
                    }
                }
                // Whoever takes its place answers before it goes.
                let settled = planned.learners.values().all(|learner| *learner != Learner::Joining);
                for (node, learner) in &mut planned.learners {
                    let joins = *learner == Learner::Joining;
                    let stays = self.nodes.get(node).is_some_and(|node| {
                        let new = joins && shard.epoch == shard.first_epoch;
                        let allowed = if new { NodeEntry::may } else { NodeEntry::keeps };
                        // A region that is away as a whole comes back with what it had: nobody there could take its place.
                        let away = node.state == NodeState::Member && short.contains(node.region.as_str());
                        node.follows(primary, allowed) || away
                    });
                    if !stays && (settled || joins) {
                        *learner = Learner::Leaving;
                    }
                }
                map.shards.insert(*id, planned);
            }
        })
    }

    /// A learner has been taken in, or let go.
    pub fn end_learner(&self, shard: ShardId, node: NodeId, done: Learner) -> ClusterMap {
        self.changed(|map| {
            let Some(entry) = map.shards.get_mut(&shard) else { return };
            match (entry.learners.get(&node).copied(), done) {
                (Some(Learner::Joining), Learner::Joining) => {
                    entry.learners.insert(node, Learner::Serving);
                }
                (Some(Learner::Leaving), Learner::Leaving) => {
                    entry.learners.remove(&node);
                }
                _ => {}
            }
        })
    }

    /// What no map may be.
    pub fn check(&self) -> Result<(), String> {
        let (mut all, mut twice) = (SlotSet::default(), false);
        for shard in self.shards.values() {
            twice |= all.meets(&shard.slots);
            all = all.union(&shard.slots);
        }
        if twice || all != SlotSet::all() {
            return Err(format!("{all} have a shard, of {SLOTS} slots, each of which needs just one"));
        }
        if let Some((tenant, shard)) = self.pins.iter().find(|(_, shard)| !self.shards.contains_key(shard)) {
            return Err(format!("tenant {tenant} is pinned to shard {shard}, which is none"));
        }
        let unknown = |(_, shard): &(&ShardId, &ShardEntry)| {
            shard.members.is_empty() || shard.members.iter().any(|id| !self.nodes.contains_key(id))
        };
        if let Some((id, _)) = self.shards.iter().find(unknown) {
            return Err(format!("shard {id} has no members, or one that is no node"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(count: u64) -> BTreeMap<NodeId, String> {
        (1..=count).map(|id| (id, format!("n{id}:1"))).collect()
    }

    /// Resizes to the end, without any data; how many slots moved.
    fn resized(map: &ClusterMap, shards: u32) -> Result<(ClusterMap, usize), Error> {
        let mut map = map.begin_resize(shards)?;
        let mut moved = 0;
        while map.resize.is_some() {
            map = map.plan_move();
            let Some(moving) = map.resize.as_ref().and_then(|resize| resize.moving.clone()) else { continue };
            moved += moving.slots.everybody().len();
            map = map.switch(moving.id);
            assert_eq!(map.check(), Ok(()));
            map = map.end_move(moving.id);
        }
        Ok((map, moved))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// No slot moves that need not: to a shard that had too few, never between two that stay as they are.
        #[test]
        fn resizing_moves_the_least_that_it_can(from in 1u32..20, to in 1u32..20, then in 1u32..20) {
            let map = ClusterMap::found(&nodes(5), from).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let mut map = map;
            for target in [to, then] {
                let before: Vec<usize> = map.shards.values().map(|shard| shard.slots.everybody().len()).collect();
                let (after, moved) = resized(&map, target).map_err(|e| TestCaseError::fail(e.to_string()))?;
                let sizes: Vec<usize> = after.shards.values().map(|shard| shard.slots.everybody().len()).collect();
                prop_assert_eq!(sizes.len(), target as usize);
                prop_assert!(sizes.iter().max().zip(sizes.iter().min()).is_some_and(|(max, min)| max - min <= 1));
                let changed = (0..SLOTS).filter(|slot| map.shard_of("t", *slot) != after.shard_of("t", *slot)).count();
                prop_assert_eq!(changed, moved, "a slot moved more than once");
                // Whoever stays gives only what is beyond its share; whoever goes gives all.
                let share = SLOTS as usize / target as usize;
                let least: usize = before.iter().enumerate().map(|(id, has)| match id < target as usize {
                    true => has.saturating_sub(share + 1),
                    false => *has,
                }).sum();
                let most: usize = before.iter().enumerate().map(|(id, has)| match id < target as usize {
                    true => has.saturating_sub(share),
                    false => *has,
                }).sum();
                prop_assert!((least..=most).contains(&moved), "{} slots moved, {} to {} had to", moved, least, most);
                map = after;
            }
        }
    }

    /// Moves until nothing is left to move, without any data.
    fn settled(mut map: ClusterMap) -> ClusterMap {
        loop {
            let next = map.plan_move();
            assert_eq!(next.check(), Ok(()));
            let Some(moving) = next.moving().cloned() else {
                if next == map {
                    return map;
                }
                map = next;
                continue;
            };
            assert!(next.shards[&moving.from].slots.includes(&moving.slots), "{moving:?}");
            assert!(!next.shards[&moving.to].slots.meets(&moving.slots), "{moving:?}");
            assert!(moving.slots.everybody().len() <= SLOTS_PER_MOVE);
            map = next.switch(moving.id).end_move(moving.id);
            assert_eq!(map.check(), Ok(()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever is pinned, unpinned and resized: each pinned tenant lies in its shard, all others where everybody's slots are.
        #[test]
        fn pinned_tenants_are_where_they_are_pinned(steps in proptest::collection::vec((0usize..4, 0u32..8, 0usize..6), 1..10)) {
            let mut map = ClusterMap::found(&nodes(3), 3).map_err(|e| TestCaseError::fail(e.to_string()))?;
            for (what, shard, left) in steps {
                let tenant = ["a", "b", "c", "d"][what];
                // A change may come while the one before is on its way.
                for _ in 0..left {
                    map = map.plan_move();
                    let Some(moving) = map.moving().cloned() else { break };
                    map = map.switch(moving.id).end_move(moving.id);
                }
                map = match what {
                    3 => map.begin_resize(shard + 1).unwrap_or(map),
                    _ if shard == 7 => map.unpin(tenant),
                    _ => map.pin(tenant, shard).unwrap_or(map),
                };
            }
            let map = settled(map);
            prop_assert!(map.resize.is_none() && map.pinning.is_none());
            for tenant in ["a", "b", "c", "d"] {
                prop_assert_eq!(map.slots_awaited(tenant), 0);
                for slot in [0, 1, 700, 2000, SLOTS - 1] {
                    let at = map.pins.get(tenant).copied().or(map.shard_of("nobody", slot));
                    prop_assert_eq!(map.shard_of(tenant, slot), at);
                }
            }
            // A tenant that is not pinned any more is like all others, in the map too.
            prop_assert!(map.apart().into_iter().all(|tenant| map.pins.contains_key(tenant)));
        }
    }

    #[test]
    fn a_pin_may_be_repeated_and_says_what_stands_in_its_way() -> Result<(), Error> {
        let map = ClusterMap::found(&nodes(3), 4)?;
        assert_eq!(map.unpin("t"), map);
        let pinned = settled(map.pin("t", 3)?);
        assert_eq!(pinned.pin("t", 3)?, pinned);
        assert_eq!(pinned.plan_move(), pinned);
        for refused in [
            map.pin(GLOBAL_TENANT, 1),
            map.pin("t", 4),
            pinned.begin_resize(3),
            map.begin_resize(3)?.pin("t", 3),
        ] {
            assert!(refused.is_err(), "{refused:?}");
        }
        assert_eq!(settled(pinned.pin("t", 0)?.begin_resize(2)?).shards.len(), 2);
        assert_eq!(settled(pinned.unpin("t")).shards, map.shards);
        let mut full = map;
        for tenant in 0..PINS_MAX {
            full = full.pin(&tenant.to_string(), 1)?;
        }
        assert!(full.pin("t", 1).is_err() && full.pin("7", 2).is_ok());
        Ok(())
    }

    #[test]
    fn a_drained_node_gives_its_shards_away_and_can_then_be_removed() -> Result<(), Error> {
        let map = ClusterMap::found(&nodes(3), 4)?;
        assert!(map.drain(2).is_err(), "two nodes cannot hold three replicas");
        let mut map = map.join(4, "n4:1", &roles::all())?.drain(2)?;
        assert_eq!(map, map.drain(2)?, "a repeated command changes nothing");
        assert!(map.remove(2).is_err());
        map = map.plan_handover();
        assert_eq!(map, map.plan_handover());
        for (id, shard) in map.shards.clone() {
            assert_eq!(shard.handover, Some(Handover { from: Some(2), to: 4 }));
            map = map.end_handover(id, Handover { from: Some(2), to: 4 });
        }
        assert_eq!(map.check(), Ok(()));
        assert!(map.kept_by(2).is_empty());
        assert_eq!(map.remove(2)?.check(), Ok(()));
        assert!(map.join(5, "n4:1", &roles::all()).is_err(), "an address of another node");
        Ok(())
    }

    #[test]
    fn of_more_voters_than_there_are_to_be_one_leaves_the_drained_one_first() -> Result<(), Error> {
        let map = ClusterMap::found(&nodes(5), 1)?.founded(0).drain(2)?;
        let voting = |members: &[NodeId]| {
            let mut map = map.clone();
            map.shards.entry(0).and_modify(|entry| entry.members = members.iter().copied().collect());
            map
        };
        for (members, leaves, stay) in
            [(vec![1, 2, 3, 4], 2, vec![1, 3, 4]), (vec![1, 3, 4, 5], 5, vec![1, 3, 4])]
        {
            let planned = voting(&members).plan_handover();
            let handover = planned.shards[&0].handover.ok_or_else(|| Error::NotFound("handover".into()))?;
            assert_eq!(handover.from, Some(leaves));
            assert!(stay.contains(&handover.to), "{handover:?}");
            let done = planned.end_handover(0, handover);
            assert_eq!(done.shards[&0].members, stay.into_iter().collect());
            assert_eq!(done.plan_handover(), done);
        }
        Ok(())
    }

    #[test]
    fn what_a_lost_node_had_goes_to_others_and_nothing_goes_to_one_that_is_down() -> Result<(), Error> {
        let mut map = ClusterMap::found(&nodes(4), 4)?;
        for shard in 0..4 {
            map = map.founded(shard);
        }
        let says = |map: &ClusterMap, node, liveness| map.heard(&BTreeMap::from([(node, liveness)]));
        let lost = 2;
        let had = map.kept_by(lost);
        map = says(&map, lost, Liveness::Down);
        assert_eq!(
            (map.plan_handover(), map.plan_learners()),
            (map.clone(), map.clone()),
            "it may come back"
        );
        let grown = map.begin_resize(5)?;
        assert!(!grown.shards[&4].members.contains(&lost), "a new shard on a node that is down");
        assert_eq!(map, says(&map, lost, Liveness::Down), "said twice");
        map = says(&map, lost, Liveness::Lost).plan_handover();
        for shard in &had {
            let handover = map.shards[shard].handover.ok_or_else(|| Error::NotFound("handover".into()))?;
            assert_eq!(handover.from, Some(lost));
            map = map.end_handover(*shard, handover);
        }
        assert!(map.kept_by(lost).is_empty());
        assert_eq!((map.plan_handover(), map.check()), (map.clone(), Ok(())));
        // Who was to take a place, and is lost too, gives it up.
        map = says(&map, 1, Liveness::Lost);
        map = says(&map, lost, Liveness::Up).plan_handover();
        let shard = *map.kept_by(1).first().ok_or_else(|| Error::NotFound("shard".into()))?;
        let handover = Handover { from: Some(1), to: lost };
        assert_eq!(map.shards[&shard].handover, Some(handover));
        map = says(&says(&map, lost, Liveness::Lost), 1, Liveness::Up).cancel_handover(shard, handover);
        assert_eq!(map.shards[&shard].handover, None);
        assert!(!map.kept_by(lost).contains(&shard));
        // A node that lacks room stays where it is.
        for node in [1, 3] {
            map = says(&map, node, Liveness::Lost);
        }
        assert_eq!(map.plan_handover().check(), Ok(()));
        Ok(())
    }

    #[test]
    fn views_live_on_their_own_nodes_and_go_with_them() -> Result<(), Error> {
        let ledger = Roles::from([Role::Ledger, Role::Records, Role::Graph]);
        let vector = Roles::from([Role::Vector]);
        let mut map = ClusterMap::found(&nodes(3), 2)?;
        assert_eq!(map, map.plan_learners(), "where everybody does everything, nobody else is needed");
        for id in 1..=3 {
            map = map.told(id, &format!("n{id}:1"), &ledger, &Gateway::Here);
        }
        for id in 4..=7 {
            map = map.join(id, &format!("n{id}:1"), &vector)?;
        }
        for shard in [0, 1] {
            map = map.founded(shard);
        }
        assert_eq!(map.plan_handover(), map, "voters stay");
        assert!(map.addrs_with(0, &[Role::Vector]).is_empty());
        map = map.plan_learners();
        assert_eq!(map, map.plan_learners());
        for shard in [0, 1] {
            let joining: Vec<NodeId> = map.shards[&shard].learners.keys().copied().collect();
            assert_eq!(joining.len(), Role::Vector.policy().replicas);
            for node in joining {
                map = map.end_learner(shard, node, Learner::Joining);
            }
            assert_eq!(map.addrs_with(shard, &[Role::Vector]).len(), 3);
            assert_eq!(map.addrs_with(shard, &[Role::Graph]).len(), 3);
            assert!(map.addrs_with(shard, &[Role::Records, Role::Vector]).is_empty());
        }
        assert_eq!((4..=7).map(|node| map.kept_by(node).len()).sum::<usize>(), 6);
        // One is drained: another takes its place before it goes.
        let drained = map.shards[&0].learners.keys().copied().next().unwrap_or_default();
        map = map.drain(drained)?.plan_learners();
        let of = |map: &ClusterMap| map.shards[&0].learners.clone();
        assert_eq!(of(&map).get(&drained), Some(&Learner::Serving));
        for shard in [0, 1] {
            for node in 4..=7 {
                map = map.end_learner(shard, node, Learner::Joining);
            }
        }
        map = map.plan_learners();
        assert_eq!(of(&map).get(&drained), Some(&Learner::Leaving));
        assert_eq!(map.addrs_with(0, &[Role::Vector]).len(), 3);
        for shard in [0, 1] {
            map = map.end_learner(shard, drained, Learner::Leaving);
        }
        assert!(map.kept_by(drained).is_empty());
        // A node that may no longer vote gives its votes away.
        map = map.told(3, "n3:1", &vector, &Gateway::Here).join(8, "n8:1", &ledger)?.plan_handover();
        assert_eq!(map.shards[&0].handover, Some(Handover { from: Some(3), to: 8 }));
        for last in [4, 5, 6, 7] {
            map = map.drain(last)?;
        }
        assert!(map.drain(3).is_err(), "the last with vectors");
        Ok(())
    }

    #[test]
    fn a_map_survives_being_written_down() -> Result<(), Box<dyn std::error::Error>> {
        let map = ClusterMap::found(&nodes(5), 7)?.begin_resize(9)?.pin("t", 3)?.plan_move();
        assert_eq!(serde_json::from_str::<ClusterMap>(&serde_json::to_string(&map)?)?, map);
        let map = settled(map).begin_resize(11)?.plan_move();
        assert_eq!(serde_json::from_str::<ClusterMap>(&serde_json::to_string(&map)?)?, map);
        Ok(())
    }
}
