//! What this crate's tests share.

use crate::model::*;

/// A small memory of user `u`, without a vector; its id ends in `id`.
pub fn memory(tenant: &str, id: u64, text: &str) -> Memory {
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&id.to_be_bytes());
    Memory {
        id: bytes,
        tenant: tenant.into(),
        scope: Scope::Private,
        user: "u".into(),
        agent: String::new(),
        session: String::new(),
        text: text.into(),
        metadata: String::new(),
        kind: MemoryType::Semantic,
        status: Status::Active,
        importance: 0.0,
        categories: vec![],
        links: vec![],
        event_time: None,
        valid_from: None,
        valid_to: None,
        created: 1,
        updated: 1,
        expires: None,
        access_count: 0,
        last_access: None,
        version: 1,
        space: "s".into(),
        tier: Tier::Hot,
        vector: vec![],
    }
}
