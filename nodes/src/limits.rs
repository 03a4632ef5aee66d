//! Every limit of the public protocol, in one place. What exceeds one is refused with INVALID_ARGUMENT that names it.

pub const TEXT_BYTES_MAX: usize = 64 << 10;
pub const METADATA_BYTES_MAX: usize = 16 << 10;
/// user, agent, session, space, a category, an idempotency key.
pub const NAME_BYTES_MAX: usize = 256;
pub const CATEGORIES_MAX: usize = 32;
pub const LINKS_MAX: usize = 64;
pub const BATCH_ITEMS_MAX: usize = 1000;
pub const BATCH_SEARCHES_MAX: usize = 100;
pub const K_MAX: u32 = 1000;
pub const K_DEFAULT: u32 = 10;
/// Conditions in one filter, and how deep they may nest.
pub const FILTER_NODES_MAX: usize = 100;
pub const FILTER_DEPTH_MAX: usize = 10;
pub const LIST_PAGE: usize = 200;
/// Largest public message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
pub const EDGES_MAX: usize = 1000;
pub const WALK_STARTS_MAX: usize = 100;
