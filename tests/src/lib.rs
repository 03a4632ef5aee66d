//! What the tests of real processes share: building `loci`, running it in a directory of its own, killing it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Why a test stopped, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The workspace's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// The `loci` program, built on first use.
pub fn loci() -> Result<PathBuf> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root()).args([
            "build",
            "--quiet",
            "-p",
            "nodes",
            "--bin",
            "loci",
            "--message-format",
            "json",
        ]);
        let output = cargo.stderr(Stdio::inherit()).output().map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err("loci does not build".into());
        }
        // Cargo says where it put the program, whatever the target directory.
        let text = String::from_utf8_lossy(&output.stdout);
        let named = |line: &str| {
            line.split_once("\"executable\":\"")
                .and_then(|(_, rest)| rest.split('"').next().map(PathBuf::from))
        };
        text.lines().rev().find_map(named).ok_or_else(|| "cargo named no program".to_string())
    });
    Ok(built.clone()?)
}

/// A directory that is removed with its value.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new(name: &str) -> Result<Directory> {
        let path = std::env::temp_dir().join(format!("loci-test-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Directory(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running `loci`, killed with its value.
pub struct Process(pub Child);

impl Process {
    /// SIGKILL, as `kill -9` does.
    pub fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// SIGSTOP: it stands still until [`Process::resume`].
    pub fn pause(&self) -> Result<()> {
        self.signal("STOP")
    }

    pub fn resume(&self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, name: &str) -> Result<()> {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.0.id().to_string()]).status()?;
        if sent.success() { Ok(()) } else { Err(format!("SIG{name} could not be sent: {sent}").into()) }
    }

    /// SIGTERM, and its exit status.
    pub fn stop(mut self) -> Result<std::process::ExitStatus> {
        Command::new("kill").arg(self.0.id().to_string()).status()?;
        Ok(self.0.wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `loci` with `args` in `dir`.
pub fn start(dir: &Path, args: &[&str]) -> Result<Process> {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("log"))?;
    let mut command = Command::new(loci()?);
    command.current_dir(dir).args(args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Process(command.spawn()?))
}

/// Runs `loci` with `args` in `dir` to its end.
pub fn run(dir: &Path, args: &[&str]) -> Result<Output> {
    Ok(Command::new(loci()?).current_dir(dir).args(args).stdin(Stdio::null()).output()?)
}

/// Runs `loci` until it succeeds, for as long as a service may take to start.
pub fn run_until_ok(dir: &Path, args: &[&str]) -> Result<String> {
    for _ in 0..300 {
        let output = run(dir, args)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let output = run(dir, args)?;
    let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
    Err(format!("{args:?} does not succeed: {}\nlog: {log}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Asks until the answer holds a text, for as long as a cluster may take to get there; that answer.
pub fn until_holds(text: &str, ask: impl Fn() -> Result<String>) -> Result<String> {
    let mut answer = ask()?;
    for _ in 0..1200 {
        if answer.contains(text) {
            return Ok(answer);
        }
        std::thread::sleep(Duration::from_millis(100));
        answer = ask()?;
    }
    Err(format!("'{text}' is not said: {answer}").into())
}

/// Free addresses of this machine.
pub fn addresses(count: usize) -> Result<Vec<String>> {
    let taken = (0..count)
        .map(|_| std::net::TcpListener::bind("127.0.0.1:0"))
        .collect::<std::io::Result<Vec<_>>>()?;
    taken.iter().map(|l| Ok(l.local_addr()?.to_string())).collect()
}
