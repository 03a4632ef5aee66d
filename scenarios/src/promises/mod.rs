//! The promises, one file each: the claim, how it is read from the clients' history, and a short check.

mod linearizable;
mod p01;
mod p02;
mod p03;
mod p04;
mod p05;
mod p06;
mod p07;
mod p08;
mod p10;
mod p12;
#[cfg(test)]
mod tests;

use crate::history::{History, Response};
use serde::{Deserialize, Serialize};

/// A promise that did not hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Violation {
    pub promise: String,
    /// Names operations, memories and times, for a person.
    pub what: String,
    pub at_s: f64,
}

fn violation(promise: &str, at_ns: u64, what: String) -> Violation {
    Violation { promise: promise.into(), what, at_s: at_ns as f64 / 1e9 }
}

pub use linearizable::describe;
pub use p01::lost;
pub use p02::reported;

/// Checks every promise.
pub fn check_all(history: &History) -> Vec<Violation> {
    let mut found: Vec<Violation> =
        [p01::check, p02::check, p03::check, p04::check].iter().flat_map(|check| check(history)).collect();
    // To the others, what is lost as was reported was never acknowledged.
    let mut judged = std::borrow::Cow::Borrowed(history);
    for number in p02::doubtful(history) {
        judged.to_mut().ops[number].response = Response::Unknown;
    }
    let checks = [p05::check, p06::check, p07::check, p08::check, p10::check, p12::check];
    found.extend(checks.iter().flat_map(|check| check(&judged)));
    found
}
