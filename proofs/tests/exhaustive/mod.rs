//! What the exhaustive model checks share: running stateright's checker over all states, and saying what it found.
//!
//! The checker runs in threads of its own and outside of any world; nothing of Loci's I/O is in a model.

use stateright::report::{ReportData, ReportDiscovery, Reporter};
use stateright::{Checker, HasDiscoveries, Model};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

/// What a check found.
pub struct Checked<A> {
    /// Distinct states.
    pub states: usize,
    /// Properties that were broken, and states that were looked for, each with the shortest way there.
    pub found: BTreeMap<&'static str, Vec<A>>,
}

/// Prints the states and seconds when the check is over.
pub struct AtTheEnd<'a>(pub &'a str);

impl<M: Model> Reporter<M> for AtTheEnd<'_> {
    fn report_checking(&mut self, data: ReportData) {
        if data.done {
            let (states, seconds) = (data.unique_states, data.duration.as_secs_f64());
            println!(
                "{:<44} {states:>9} distinct states, depth {:>3}, {seconds:>6.1} s",
                self.0, data.max_depth
            );
        }
    }

    fn report_discoveries(&mut self, _: &M, _: BTreeMap<&'static str, ReportDiscovery<M>>)
    where
        M::Action: Debug,
        M::State: Debug + Hash,
    {
    }

    fn delay(&self) -> Duration {
        Duration::from_millis(20)
    }
}

/// Visits every state, nearest first, until one of the `safe` properties is broken.
pub fn check<M>(name: &str, model: M, safe: &[&'static str]) -> Checked<M::Action>
where
    M: Model + Send + Sync + 'static,
    M::State: Hash + Debug + Send + Sync + Clone + PartialEq + 'static,
    M::Action: Clone + PartialEq + Debug + Send + Sync,
{
    let until = HasDiscoveries::AnyOf(safe.iter().copied().collect());
    let checker = model.checker().finish_when(until).spawn_bfs().join_and_report(&mut AtTheEnd(name));
    let found = checker.discoveries().into_iter();
    Checked {
        states: checker.unique_state_count(),
        found: found.map(|(property, path)| (property, path.into_actions())).collect(),
    }
}
