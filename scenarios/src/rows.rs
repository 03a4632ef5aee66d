//! The rows of a chaos table: what many runs of one scenario that measures recovery came to.

use crate::recovery::percentile;
use crate::report::{Report, Verdict};
use crate::spec::{self, Recovery};
use serde::{Deserialize, Serialize};

/// One row; times in seconds, virtual ones of simulated runs, `None` where no run of it measured them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub row: String,
    pub seeds: usize,
    pub recovery_p50_s: Option<f64>,
    pub recovery_p99_s: Option<f64>,
    pub recovery_max_s: Option<f64>,
    pub redundancy_p99_s: Option<f64>,
    /// Of rows in which a region is lost.
    #[serde(flatten)]
    pub region: Option<RegionRow>,
    pub acked: usize,
    pub lost: usize,
    /// Runs whose verdict is not `pass`.
    pub failed: usize,
}

/// What the loss of a region came to; times in seconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RegionRow {
    /// Until the service was restored ([`crate::recovery`]).
    pub rto_p50_s: Option<f64>,
    pub rto_p99_s: Option<f64>,
    pub rpo_p50_s: Option<f64>,
    pub rpo_p99_s: Option<f64>,
    pub mttr_p99_s: Option<f64>,
    /// Acknowledged writes that were lost as was reported.
    pub lost_reported: usize,
}

impl Row {
    pub fn of(name: &str, reports: &[&Report]) -> Row {
        let measured = || reports.iter().filter_map(|report| report.recovery.as_ref());
        let mut recovery: Vec<f64> = measured().map(|m| m.recovery_s).collect();
        let mut restored: Vec<f64> = measured().map(|m| m.restored_s).collect();
        let mut redundancy: Vec<f64> = measured().filter_map(|m| m.redundancy_s).collect();
        let mut rpo: Vec<f64> = measured().filter_map(|m| m.rpo_s).collect();
        let mut mttr: Vec<f64> = measured().filter_map(|m| m.mttr_s).collect();
        let region = (!mttr.is_empty()).then(|| RegionRow {
            rto_p50_s: percentile(&mut restored, 0.5),
            rto_p99_s: percentile(&mut restored, 0.99),
            rpo_p50_s: percentile(&mut rpo, 0.5),
            rpo_p99_s: percentile(&mut rpo, 0.99),
            mttr_p99_s: percentile(&mut mttr, 0.99),
            lost_reported: reports.iter().map(|r| r.lost_reported).sum(),
        });
        Row {
            region,
            row: name.into(),
            seeds: reports.len(),
            recovery_p50_s: percentile(&mut recovery, 0.5),
            recovery_p99_s: percentile(&mut recovery, 0.99),
            recovery_max_s: recovery.last().copied(),
            redundancy_p99_s: percentile(&mut redundancy, 0.99),
            acked: reports.iter().map(|r| r.acked).sum(),
            lost: reports.iter().map(|r| r.lost).sum(),
            failed: reports.iter().filter(|r| r.verdict != Verdict::Pass).count(),
        }
    }

    /// What the loss of a region came to, as a sentence, where one was lost.
    pub fn told(&self) -> Option<String> {
        let region = self.region.as_ref()?;
        Some(format!(
            "RTO p50 {} s and p99 {} s, RPO p50 {} s and p99 {} s, MTTR p99 {} s (the requirements: 900, 300, 600); of {} acknowledged writes {} were lost as was reported",
            seconds(region.rto_p50_s),
            seconds(region.rto_p99_s),
            seconds(region.rpo_p50_s),
            seconds(region.rpo_p99_s),
            seconds(region.mttr_p99_s),
            self.acked,
            region.lost_reported,
        ))
    }
}

/// For a table.
pub fn seconds(value: Option<f64>) -> String {
    value.map_or("-".to_string(), |s| format!("{s:.2}"))
}

/// The rows named, or all of `known`.
pub fn rows(named: Vec<String>, known: &[(&str, &str)]) -> Result<Vec<(String, Recovery)>, String> {
    let names = match named.is_empty() {
        true => known.iter().map(|(name, _)| name.to_string()).collect(),
        false => named,
    };
    let with_recovery = names.into_iter().map(|name| {
        let recovery = spec::find(&name)?.recovery;
        recovery.map(|recovery| (name.clone(), recovery)).ok_or_else(|| {
            let known: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            format!("'{name}' measures no recovery; the rows are {}", known.join(", "))
        })
    });
    with_recovery.collect()
}
