//! Scenarios as data: topology, workload, fault plan and promises, in TOML.

use serde::{Deserialize, Serialize};

/// The scenarios that ship with Loci, by name.
pub const SHIPPED: [(&str, &str); 5] = [
    ("steady", include_str!("../files/steady.toml")),
    ("leader-power-loss", include_str!("../files/leader-power-loss.toml")),
    ("all-nodes-power-loss", include_str!("../files/all-nodes-power-loss.toml")),
    ("partition-leader", include_str!("../files/partition-leader.toml")),
    ("clock-drift", include_str!("../files/clock-drift.toml")),
];

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub about: String,
    /// Virtual seconds of load; faults fall into it.
    pub workload_s: u64,
    pub topology: Topology,
    pub workload: Workload,
    #[serde(default)]
    pub faults: Faults,
    /// One replica's disk is bad as well, in its own ways and at its own times.
    #[serde(default = "yes")]
    pub bad_disk: bool,
    pub promises: Promises,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Nodes with all roles, named n1, n2, …
    pub replicas: usize,
    /// Nodes with the edge's roles only, named g1, g2, …
    #[serde(default)]
    pub gateways: usize,
    /// Share of messages that must be retransmitted.
    #[serde(default)]
    pub loss: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    pub clients: usize,
    pub tenants: usize,
    /// Ids that the clients of one tenant contend for.
    pub keys_per_tenant: u64,
    /// 1: all alike; the higher, the more the first ones are asked for.
    pub key_skew: f64,
    /// Mean pause of a client between two operations, exponentially distributed.
    pub think_ms: u64,
    /// Share of operations that are strong reads; the rest keep their proportions.
    #[serde(default = "strong_reads_default")]
    pub strong_reads: f64,
}

fn yes() -> bool {
    true
}

fn strong_reads_default() -> f64 {
    0.2
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Faults {
    /// A plan drawn from the seed.
    pub generate: Option<Generate>,
    /// Faults written by hand.
    #[serde(default)]
    pub list: Vec<Fault>,
}

/// Ranges are in virtual seconds, both ends included.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    pub kinds: Vec<FaultKind>,
    pub target: Target,
    pub first_s: [u64; 2],
    pub every_s: [u64; 2],
    pub lasts_s: [u64; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The machine loses power; it boots when the fault ends.
    PowerOff,
    /// The process dies, its machine lives; it is started when the fault ends.
    Crash,
    /// Every task of the node stops for a while.
    Pause,
    /// Cut from the other replicas: both ways, only towards it, only from it.
    Partition,
    PartitionIn,
    PartitionOut,
    /// The clock runs `rate_ppm` fast and the calendar steps; the rate is true again when the fault ends.
    Clock,
    /// A bit of what is stored flips: in the log, the views or the bases.
    BitRot,
    /// So many bits flip in views and bases that neither can be mended from the other.
    Ruin,
    /// A sector cannot be read any more.
    LostSector,
    /// Some writes to the log and the bases land elsewhere.
    Misdirected,
    /// The next sync fails.
    SyncFailure,
    /// No file can grow.
    FullDisk,
    /// Every operation takes long.
    SlowDisk,
    /// No operation returns; the process is restarted when the fault ends.
    StuckDisk,
}

/// What a bad disk does.
const DISK_FAULTS: [FaultKind; 8] = [
    FaultKind::BitRot,
    FaultKind::Ruin,
    FaultKind::LostSector,
    FaultKind::Misdirected,
    FaultKind::SyncFailure,
    FaultKind::FullDisk,
    FaultKind::SlowDisk,
    FaultKind::StuckDisk,
];

/// A bad disk's plan: this seed's own choice of faults, all on one replica, so that the others stay a quorum that has everything.
pub fn disk_plan(seed: u64, workload_s: u64) -> Vec<Fault> {
    let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x1f83_d9ab);
    let kinds: Vec<FaultKind> = DISK_FAULTS.into_iter().filter(|_| random.below(2) == 0).collect();
    let (pick, target) = (random.below(1 << 32), Target::Any);
    let mut plan = vec![];
    let mut at_ms = random.between([4, 14]);
    while let Some(kind) = kinds.get(random.below(kinds.len().max(1) as u64) as usize) {
        let lasts_ms = match kind {
            FaultKind::BitRot | FaultKind::Ruin | FaultKind::LostSector => 100,
            _ => random.between([1, 6]),
        };
        if at_ms + lasts_ms + 2000 > workload_s * 1000 {
            break;
        }
        plan.push(Fault { at_ms, lasts_ms, kind: *kind, target, pick, rate_ppm: 0, step_ms: 0 });
        at_ms += lasts_ms + random.between([2, 10]);
    }
    plan
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Whoever leads when the fault begins.
    Leader,
    /// A replica drawn from the seed.
    Any,
    All,
}

/// One timed fault.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub at_ms: u64,
    pub lasts_ms: u64,
    pub kind: FaultKind,
    pub target: Target,
    /// Chooses among `any`.
    #[serde(default)]
    pub pick: u64,
    #[serde(default)]
    pub rate_ppm: i64,
    #[serde(default)]
    pub step_ms: i64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promises {
    /// After the last fault, every replica must agree within this many virtual seconds.
    pub converge_s: u64,
}

/// A shipped scenario by name, or one read from a file that ends in `.toml`.
pub fn find(name: &str) -> Result<Scenario, String> {
    let text = match SHIPPED.iter().find(|(n, _)| *n == name) {
        Some((_, text)) => text.to_string(),
        None if name.ends_with(".toml") => {
            std::fs::read_to_string(name).map_err(|e| format!("{name}: {e}"))?
        }
        None => {
            let known: Vec<&str> = SHIPPED.iter().map(|(n, _)| *n).collect();
            return Err(format!(
                "there is no scenario '{name}'; there are {}, or give a .toml file",
                known.join(", ")
            ));
        }
    };
    toml::from_str(&text).map_err(|e| format!("scenario {name}: {e}"))
}

impl Generate {
    /// Draws a plan for `workload_s` seconds; the last fault ends before the load does.
    pub fn plan(&self, seed: u64, workload_s: u64) -> Vec<Fault> {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bf0_3635);
        let mut plan = vec![];
        let mut at_ms = random.between(self.first_s);
        while let Some(kind) = self.kinds.get(random.below(self.kinds.len() as u64) as usize) {
            let lasts_ms = random.between(self.lasts_s);
            if at_ms + lasts_ms + 2000 > workload_s * 1000 {
                break;
            }
            let rate_ppm = random.below(400_001) as i64 - 200_000;
            let step_ms = (random.below(14_400_001) as i64 - 7_200_000) * (random.below(2) as i64);
            let (rate_ppm, step_ms) = if *kind == FaultKind::Clock { (rate_ppm, step_ms) } else { (0, 0) };
            let pick = random.below(1 << 32);
            plan.push(Fault { at_ms, lasts_ms, kind: *kind, target: self.target, pick, rate_ppm, step_ms });
            at_ms += lasts_ms.max(random.between(self.every_s));
        }
        plan
    }
}

/// splitmix64: plans are drawn before there is a world.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        ((self.next() as u128 * bound as u128) >> 64) as u64
    }

    /// Milliseconds within a range of seconds.
    fn between(&mut self, [from, to]: [u64; 2]) -> u64 {
        from * 1000 + self.below(to.saturating_sub(from) * 1000 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_scenarios_are_readable_and_their_plans_repeat() -> Result<(), String> {
        for (name, _) in SHIPPED {
            let scenario = find(name)?;
            if let Some(generate) = &scenario.faults.generate {
                for seed in 0..50 {
                    let plan = generate.plan(seed, scenario.workload_s);
                    assert!(!plan.is_empty(), "{name} seed {seed} plans nothing");
                    assert_eq!(plan, generate.plan(seed, scenario.workload_s));
                    let text = toml::to_string(&Faults { generate: None, list: plan.clone() })
                        .map_err(|e| e.to_string())?;
                    let read: Faults = toml::from_str(&text).map_err(|e| e.to_string())?;
                    assert_eq!(read.list, plan, "a plan must survive being written down");
                }
            }
        }
        assert!(find("nonsense").is_err());
        Ok(())
    }
}
