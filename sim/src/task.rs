//! Tasks and the process: spawn, yield, leave the executor for blocking work, give up.

use std::future::Future;
pub use tokio::task::JoinHandle;

/// The niceness of work that gives way: where there is too little, it gets a tenth of what others get, and so comes to its end.
#[cfg(not(madsim))]
const GIVING_WAY: libc::c_int = 10;

/// Starts a task on this node. It ends with the node.
#[track_caller]
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::task::spawn(future)
}

/// Lets other tasks run.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await
}

/// Runs synchronous work (disk, SQLite, scans) where it may block. In simulation it runs in place, and then the caller sleeps
/// off the latency that the node's disk ran up.
pub async fn blocking<F, T>(work: F) -> T
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    #[cfg(madsim)]
    {
        let value = work();
        crate::world::sleep_off_disk_debt().await;
        value
    }
    #[cfg(not(madsim))]
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down: there is nobody left to answer to.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Runs long work that nobody waits for, which holds no lock that others want, on a thread that gives way: where cores are few, what wakes up
/// meanwhile takes one from it at once. In simulation it runs in place.
pub fn giving_way<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    #[cfg(madsim)]
    return work();
    #[cfg(not(madsim))]
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // SAFETY: it touches no memory. On Linux 0 is the calling thread; if it is refused, the thread is as any other.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, GIVING_WAY) };
            work()
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Ends this process because going on would risk acknowledged data. `reason` says what happened and what to do. Its
/// supervisor starts it again; recovery from disk and peers does the rest.
pub async fn abort(reason: &str) -> ! {
    crate::error!("fatal: {reason}");
    #[cfg(madsim)]
    crate::world::abort_current_node();
    #[cfg(not(madsim))]
    std::process::exit(70);
    #[cfg(madsim)]
    std::future::pending().await
}

/// Completes when the process is asked to stop (SIGINT or SIGTERM); never in simulation, where nodes are killed.
pub async fn shutdown_signal() {
    #[cfg(madsim)]
    std::future::pending::<()>().await;
    #[cfg(not(madsim))]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = match signal(SignalKind::terminate()) {
            Ok(signal) => signal,
            Err(_) => return std::future::pending().await,
        };
        crate::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
    }
}

/// Runs a process's main future on tokio, with `threads` workers (0: one per core).
#[cfg(not(madsim))]
pub fn run_process<F: Future>(threads: usize, main: F) -> std::io::Result<F::Output> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if threads > 0 {
        builder.worker_threads(threads);
    }
    Ok(builder.enable_all().build()?.block_on(main))
}

/// In simulation a process is a node of a world, and this is an error.
#[cfg(madsim)]
pub fn run_process<F: Future>(_threads: usize, _main: F) -> std::io::Result<F::Output> {
    Err(std::io::Error::other("this is the simulated build: processes run in a world, see `cargo sim list`"))
}

/// Runs a test's future to its end in whichever world this is.
pub fn run_test<F: Future>(test: F) -> std::io::Result<F::Output> {
    #[cfg(not(madsim))]
    return run_process(1, test);
    #[cfg(madsim)]
    return Ok(crate::world::run(1, false, |_| test).value);
}
