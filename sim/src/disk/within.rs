//! A directory of a disk as a disk of its own.

use super::{Disk, File, SqliteLocation};
use std::io;
use std::sync::Arc;

/// The directory `dir` of `disk`, made if it is missing.
pub fn within(disk: Arc<dyn Disk>, dir: &str) -> io::Result<Arc<dyn Disk>> {
    disk.create_dir_all(dir)?;
    Ok(Arc::new(Within { disk, dir: dir.into() }))
}

struct Within {
    disk: Arc<dyn Disk>,
    dir: String,
}

impl Within {
    fn at(&self, path: &str) -> String {
        if path.is_empty() { self.dir.clone() } else { format!("{}/{path}", self.dir) }
    }
}

impl Disk for Within {
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        self.disk.open(&self.at(path))
    }
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        self.disk.create(&self.at(path))
    }
    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.disk.create_dir_all(&self.at(path))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(&self.at(from), &self.at(to))
    }
    fn remove(&self, path: &str) -> io::Result<()> {
        self.disk.remove(&self.at(path))
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.disk.sync_dir(&self.at(dir))
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.disk.list(&self.at(dir))
    }
    fn exists(&self, path: &str) -> io::Result<bool> {
        self.disk.exists(&self.at(path))
    }
    fn sqlite(&self, path: &str) -> io::Result<SqliteLocation> {
        self.disk.sqlite(&self.at(path))
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulated::SimDisk;
    use super::*;

    #[test]
    fn what_is_written_within_lies_in_the_directory() -> io::Result<()> {
        let whole: Arc<dyn Disk> = SimDisk::new(1);
        let part = within(whole.clone(), "a")?;
        part.create_dir_all("b")?;
        part.create("b/f")?.write_at(b"x", 0)?;
        assert_eq!(whole.open("a/b/f")?.len()?, 1);
        assert_eq!((part.list("")?, part.list("b")?), (vec!["b".to_string()], vec!["f".to_string()]));
        assert!(part.exists("b/f")? && !part.exists("a")?);
        Ok(())
    }
}
