//! Who is calling: API keys, hashed in a file, each of one tenant.
//!
//! A key is `loci_ID_SECRET`; the file `keys.toml` holds a BLAKE3 hash of the secret, which is 32 random bytes, so a leaked file
//! gives no key away. Only a key names a tenant: no header or message field ever does. The file is read again when it
//! changes, so keys are added and revoked without a restart. A file that cannot be read keeps the last good keys.

use crate::error::Error;
use serde::{Deserialize, Serialize};
use sim::disk::Disk;
use sim::time::{self, Duration};
use std::io;
use std::sync::{Arc, RwLock};
use storage::model::GLOBAL_TENANT;

/// Name of the key file in the data directory.
pub const KEYS_FILE: &str = "keys.toml";
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);
const KEYS_BYTES_MAX: u64 = 16 << 20;

/// One key, without its secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    pub id: String,
    pub tenant: String,
    /// May ask the admin service and write GLOBAL memories.
    #[serde(default)]
    pub operator: bool,
    /// BLAKE3 of the secret, in hexadecimal.
    pub hash: String,
    /// Milliseconds since the Unix epoch.
    pub created: i64,
}

/// The content of the key file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Keys {
    #[serde(default)]
    pub key: Vec<Key>,
}

/// Whom a credential stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub tenant: Arc<str>,
    pub operator: bool,
}

/// Whether a tenant's name can be used: 1 to 64 of a–z, A–Z, 0–9, `-`, `_`, `.`; not the reserved one.
pub fn check_tenant(tenant: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if tenant.is_empty() || tenant.len() > 64 || !tenant.chars().all(plain) {
        return Err(Error::invalid("tenant", "must be 1 to 64 letters, digits, '-', '_' or '.'"));
    }
    if tenant == GLOBAL_TENANT {
        return Err(Error::invalid("tenant", format!("'{GLOBAL_TENANT}' is reserved for GLOBAL memories")));
    }
    Ok(())
}

impl Keys {
    /// Makes a key of `tenant`; returns it in clear, the only time that it is known.
    pub fn add(&mut self, tenant: &str, operator: bool) -> Result<String, Error> {
        check_tenant(tenant)?;
        let (mut id, mut secret) = ([0; 6], [0; 32]);
        sim::rand::fill(&mut id);
        sim::rand::fill(&mut secret);
        let (id, secret) = (hex(&id), hex(&secret));
        let hash = blake3::hash(secret.as_bytes()).to_hex().to_string();
        let created = time::calendar_ms();
        self.key.push(Key { id: id.clone(), tenant: tenant.into(), operator, hash, created });
        Ok(format!("loci_{id}_{secret}"))
    }

    /// Removes the key with this id; false if there is none.
    pub fn revoke(&mut self, id: &str) -> bool {
        let before = self.key.len();
        self.key.retain(|k| k.id != id);
        self.key.len() < before
    }

    /// Whom `credential` stands for.
    pub fn check(&self, credential: &str) -> Option<Caller> {
        let (id, secret) = credential.strip_prefix("loci_")?.split_once('_')?;
        let key = self.key.iter().find(|k| k.id == id)?;
        let expected = blake3::Hash::from_hex(&key.hash).ok()?;
        // blake3::Hash compares in constant time.
        (blake3::hash(secret.as_bytes()) == expected)
            .then(|| Caller { tenant: key.tenant.as_str().into(), operator: key.operator })
    }

    /// Reads the key file; no file means no keys.
    pub fn load(disk: &dyn Disk) -> io::Result<Keys> {
        let file = match disk.open(KEYS_FILE) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Keys::default()),
            Err(error) => return Err(error),
        };
        let len = file.len()?;
        let invalid =
            |text: String| io::Error::new(io::ErrorKind::InvalidData, format!("{KEYS_FILE}: {text}"));
        if len > KEYS_BYTES_MAX {
            return Err(invalid("is too large".into()));
        }
        let mut bytes = vec![0; len as usize];
        let read = file.read_at(&mut bytes, 0)?;
        let text = std::str::from_utf8(&bytes[..read]).map_err(|e| invalid(e.to_string()))?;
        toml::from_str(text).map_err(|e| invalid(e.to_string()))
    }

    /// Replaces the key file, durably.
    pub fn save(&self, disk: &dyn Disk) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        let temporary = format!("{KEYS_FILE}.tmp");
        let file = disk.create(&temporary)?;
        file.set_len(0)?;
        file.write_at(text.as_bytes(), 0)?;
        file.sync()?;
        disk.rename(&temporary, KEYS_FILE)?;
        disk.sync_dir("")
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The keys in force, kept up to date with the file.
#[derive(Clone)]
pub struct KeyRing(Arc<RwLock<Arc<Keys>>>);

impl KeyRing {
    pub async fn open(disk: Arc<dyn Disk>) -> io::Result<KeyRing> {
        let first = disk.clone();
        let keys = sim::task::blocking(move || Keys::load(&*first)).await?;
        let ring = KeyRing(Arc::new(RwLock::new(Arc::new(keys))));
        let reloaded = ring.clone();
        sim::task::spawn(async move {
            loop {
                time::sleep(RELOAD_INTERVAL).await;
                let disk = disk.clone();
                match sim::task::blocking(move || Keys::load(&*disk)).await {
                    Ok(keys) if *reloaded.keys() != keys => {
                        sim::info!("{KEYS_FILE} changed: {} keys", keys.key.len());
                        *reloaded.0.write().unwrap_or_else(|p| p.into_inner()) = Arc::new(keys);
                    }
                    Ok(_) => {}
                    Err(error) => sim::warn!("{error}; the keys read before stay in force"),
                }
            }
        });
        Ok(ring)
    }

    fn keys(&self) -> Arc<Keys> {
        self.0.read().unwrap_or_else(|p| p.into_inner()).clone()
    }

    pub fn check(&self, credential: &str) -> Option<Caller> {
        self.keys().check(credential)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_is_accepted() -> Result<(), Box<dyn std::error::Error>> {
        let mut keys = Keys::default();
        let key = sim::task::run_test(async { keys.add("acme", false) })??;
        let caller = keys.check(&key).map(|c| c.tenant.to_string());
        assert_eq!(caller.as_deref(), Some("acme"));
        assert_eq!(keys.check(&key[..key.len() - 1]), None);
        assert_eq!(keys.check(&key.replace("loci_", "")), None);
        assert!(!format!("{keys:?}").contains(&key[20..]), "the file must not hold the secret");
        assert!(keys.revoke(&keys.key[0].id.clone()));
        assert_eq!(keys.check(&key), None);
        Ok(())
    }

    #[test]
    fn reserved_and_odd_tenants_are_refused() {
        for tenant in ["", "global", "a b", "ä", &"x".repeat(65)] {
            assert!(check_tenant(tenant).is_err(), "{tenant:?} was accepted");
        }
    }
}
