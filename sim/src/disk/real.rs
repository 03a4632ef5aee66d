//! Production: files under a directory.

use super::{Disk, File, SqliteLocation};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

pub struct RealDisk {
    root: PathBuf,
}

impl RealDisk {
    /// Opens a disk rooted at `root`, creating the directory if it is missing.
    pub fn open(root: impl Into<PathBuf>) -> io::Result<Arc<dyn Disk>> {
        let root = root.into();
        fs::create_dir_all(&root)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", root.display())))?;
        Ok(Arc::new(RealDisk { root }))
    }

    fn at(&self, path: &str) -> io::Result<PathBuf> {
        if Path::new(path).components().all(|c| matches!(c, Component::Normal(_))) {
            return Ok(self.root.join(path));
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{path} leaves the disk's root")))
    }
}

struct RealFile(fs::File);

impl File for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    #[cfg(not(madsim))]
    fn map(&self) -> io::Result<super::Map> {
        super::Map::of(&self.0)
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let file = fs::OpenOptions::new().read(true).write(true).open(self.at(path)?)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(self.at(path)?)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        let path = self.at(path)?;
        fs::create_dir_all(&path)?;
        let mut parent = path.as_path();
        while let Some(above) = parent.parent().filter(|p| p.starts_with(&self.root)) {
            fs::File::open(above)?.sync_all()?;
            parent = above;
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.at(from)?, self.at(to)?)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.at(path)?)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        fs::File::open(self.at(dir)?)?.sync_all()
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.at(dir)?) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(error),
        };
        let name = |e: io::Result<fs::DirEntry>| Ok(e?.file_name().to_string_lossy().into_owned());
        let mut names = entries.map(name).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn exists(&self, path: &str) -> io::Result<bool> {
        self.at(path)?.try_exists()
    }

    fn sqlite(&self, path: &str) -> io::Result<SqliteLocation> {
        let file = self.at(path)?.into_os_string().into_string();
        let file =
            file.map_err(|p| io::Error::new(io::ErrorKind::InvalidInput, format!("{p:?} is not UTF-8")))?;
        Ok(SqliteLocation { file, vfs: None })
    }
}
