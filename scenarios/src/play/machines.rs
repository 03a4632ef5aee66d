//! What a scenario is played on: simulated machines, or processes of a real one.

use crate::spec::{Fault, NodeDraw};
use nodes::auth::Keys;
use nodes::config::NodeConfig;
use nodes::error::Error;
use sim::time::Duration;
use sim::trace::Level;
use std::collections::BTreeMap;
use std::pin::Pin;

/// A machine; 0 is nobody's: the scenario's own.
pub type NodeIndex = usize;
pub type Waiting<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
/// What a client does, from its machine's start.
pub type Session = Box<dyn Fn() -> Waiting<'static, ()> + Send + Sync>;

/// A node that is to run.
pub struct NewNode {
    /// With the address under which everybody knows it, as if it listened there, and no peers by another way.
    pub config: NodeConfig,
    pub limits: NodeDraw,
    pub keys: Keys,
}

/// Rare paths that the machines took.
#[derive(Default)]
pub struct RarePaths {
    pub taken: BTreeMap<String, u64>,
    /// What was mended, and the node that did it.
    pub mended: Vec<(String, &'static str)>,
}

/// Machines with a node each, and the links between them. What does not exist is not hit: unknown numbers do nothing.
pub trait Machines: Send + Sync {
    /// Boots a machine for each node, in this order; called once, before anything else.
    fn boot(&self, nodes: Vec<NewNode>) -> Waiting<'_, Result<Vec<NodeIndex>, Error>>;
    /// Starts a client.
    fn add_client(&self, number: usize, session: Session);
    /// Time since the scenario began.
    fn now(&self) -> Duration;
    fn name(&self, node: NodeIndex) -> String;
    /// Writes a line about a machine for whoever looks at the run.
    fn note(&self, node: NodeIndex, level: Level, text: &str);
    /// Where an operator, whom no fault concerns, reaches a node.
    fn operators_way(&self, node: NodeIndex) -> String;
    /// Where clients do.
    fn clients_way(&self, node: NodeIndex) -> String;

    fn is_running(&self, node: NodeIndex) -> bool;
    /// How often its process has ended.
    fn boots(&self, node: NodeIndex) -> u64;
    /// The process dies at once, its machine lives.
    fn crash(&self, node: NodeIndex);
    /// Starts what does not run.
    fn start(&self, node: NodeIndex);
    /// The process stands still.
    fn pause(&self, node: NodeIndex);
    fn resume(&self, node: NodeIndex);
    /// Asks the process to stop in good order.
    fn tell_to_stop(&self, node: NodeIndex);
    /// It has; what is left of it goes.
    fn end(&self, node: NodeIndex);
    /// The machine is gone; the one that takes its place is empty and off, and `told` so or not.
    fn replace(&self, node: NodeIndex, told: bool);

    /// Holds what `from` sends to `to`.
    fn cut(&self, from: NodeIndex, to: NodeIndex);
    /// Cuts a node off from all nodes and clients, both ways.
    fn silence(&self, node: NodeIndex);
    fn heal_links(&self);
    /// How many messages have run into cuts.
    fn met(&self) -> u64;

    /// The load has ended: nothing is to misbehave any more that was not planned.
    fn calm(&self) {}
    /// Of each machine.
    fn cores(&self) -> usize;
    /// How long a machine's cores have worked, all together.
    fn busy(&self, node: NodeIndex) -> Duration;
    /// What a node has on its disk.
    fn bytes(&self, node: NodeIndex) -> u64;
    fn rare_paths(&self, _replicas: &[NodeIndex]) -> RarePaths {
        RarePaths::default()
    }
    /// What has happened that makes the run worth nothing, such as a process that ended and nobody had ended it.
    fn broken(&self) -> Option<String> {
        None
    }
    /// What can be done to machines that are only a model.
    fn modelled(&self) -> Option<&dyn Modelled> {
        None
    }
}

/// Power, disks, clocks and links of modelled machines. No real machine has such hands: [`crate::spec::FaultKind::is_modelled`].
pub trait Modelled {
    /// `harsh`: it takes all from the disk that it may take.
    fn power_off(&self, node: NodeIndex, harsh: bool);
    /// Harms what is stored; whether there was something to harm.
    fn harm(&self, node: NodeIndex, fault: &Fault) -> bool;
    /// The disk behaves as the fault says, until [`Modelled::disk_works`].
    fn disk_fails(&self, node: NodeIndex, fault: &Fault);
    fn disk_works(&self, node: NodeIndex);
    fn set_clock(&self, node: NodeIndex, rate_ppm: i64, step_ms: i64);
    /// The link from one to the other carries so much in a second; `None`: as much as usual.
    fn narrow(&self, from: NodeIndex, to: NodeIndex, bytes_per_s: Option<u64>);
}
