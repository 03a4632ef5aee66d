//! Child processes of a person's machine, hit by signals: what `world` does to simulated nodes, done to real ones.
//!
//! A child dies with the thread that started it, also if that is killed, and also if the child is stopped just then. So it must be started
//! by a thread that lives as long as it is wanted: a runtime's worker does.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// A child, killed with its value.
pub struct Process(Child);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: stop in good order.
    Terminate,
    /// SIGSTOP and SIGCONT.
    Stop,
    Continue,
}

impl Process {
    pub fn start(command: &mut Command) -> io::Result<Process> {
        let parent = std::process::id();
        // SAFETY: between fork and exec the closure makes two system calls and builds an error without allocating; it takes no lock.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // It may have died before the call.
                if libc::getppid() as u32 != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                Ok(())
            });
        }
        Ok(Process(command.spawn()?))
    }

    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let number = match signal {
            Signal::Terminate => libc::SIGTERM,
            Signal::Stop => libc::SIGSTOP,
            Signal::Continue => libc::SIGCONT,
        };
        // SAFETY: a plain system call; the child is not waited for before `ended` or `kill`, so its number is still its own.
        match unsafe { libc::kill(self.0.id() as libc::pid_t, number) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) -> io::Result<()> {
        self.0.kill()?;
        self.0.wait().map(drop)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    /// How long its threads have worked, all together; `None` if the system does not say.
    pub fn busy(&self) -> Option<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).ok()?;
        // After the name, which may hold anything, the 12th and 13th field are ticks in user and system mode (proc(5)).
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<u64>);
        let ticks = fields.next()?.ok()? + fields.next()?.ok()?;
        // SAFETY: a plain call that reads a constant of the system.
        let per_second =
            u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).ok().filter(|n| *n > 0)?;
        Some(Duration::from_millis(ticks * 1000 / per_second))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_stopped_goes_on_and_ends() -> io::Result<()> {
        let mut process = Process::start(Command::new("sleep").arg("600"))?;
        let state = |process: &Process| -> io::Result<char> {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.0.id()))?;
            Ok(stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or(' '))
        };
        assert!(process.busy().is_some());
        process.signal(Signal::Stop)?;
        while state(&process)? != 'T' {
            std::thread::yield_now();
        }
        process.signal(Signal::Continue)?;
        while state(&process)? == 'T' {
            std::thread::yield_now();
        }
        assert!(process.ended()?.is_none());
        process.signal(Signal::Terminate)?;
        while process.ended()?.is_none() {
            std::thread::yield_now();
        }
        Ok(())
    }

    #[test]
    fn a_process_dies_with_the_thread_that_started_it() -> io::Result<()> {
        let started = std::thread::spawn(|| Process::start(Command::new("sleep").arg("600")));
        let mut process = started.join().map_err(|_| io::Error::other("the thread panicked"))??;
        while process.ended()?.is_none() {
            std::thread::yield_now();
        }
        Ok(())
    }
}
