//! The control group: the cluster map and the long operations on it.

pub mod lease;
pub mod map;
