//! The gateway role: the public services. Thin: who calls and until when comes from the edge, checks and work are the writer's and
//! the reader's.

mod admin;
pub mod director;
mod graph;
mod memory;

pub use admin::{About, AdminService};
pub use director::DirectorService;
pub use graph::GraphService;
pub use memory::MemoryService;

use crate::auth::Caller;
use crate::edge::{DEADLINE_DEFAULT, Deadline};
use crate::error::Error;
use sim::time::Instant;
use tonic::Request;

/// The caller and the deadline that the edge put into the request.
fn context<T>(request: &Request<T>) -> Result<(Caller, Instant), Error> {
    let caller = request.extensions().get::<Caller>().cloned();
    let caller = caller.ok_or_else(|| Error::Unauthenticated("no API key".into()))?;
    let deadline = request.extensions().get::<Deadline>().map(|d| d.0);
    Ok((caller, deadline.unwrap_or_else(|| Instant::now() + DEADLINE_DEFAULT)))
}
