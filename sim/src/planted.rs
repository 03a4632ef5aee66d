//! Planted bugs: realistic mistakes, each behind a name, that a simulated run switches on to see whether the promises' checkers find it.
//!
//! `planted!("name")` is true in a run that planted that bug. In production it is the constant `false`, and neither the branch nor the
//! name is in the program.

/// Whether this run has the named bug.
#[cfg(madsim)]
#[macro_export]
macro_rules! planted {
    ($name:literal) => {
        $crate::planted::is_on($name)
    };
}

/// Whether this run has the named bug: never in production.
#[cfg(not(madsim))]
#[macro_export]
macro_rules! planted {
    ($name:literal) => {
        false
    };
}

#[cfg(madsim)]
mod imp {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    static PLANTED: OnceLock<String> = OnceLock::new();
    static REACHED: AtomicU64 = AtomicU64::new(0);

    /// Plants a bug in this process, for good.
    pub fn plant(name: &str) {
        PLANTED.get_or_init(|| name.to_string());
    }

    #[doc(hidden)]
    pub fn is_on(name: &'static str) -> bool {
        let on = PLANTED.get().is_some_and(|planted| planted == name);
        REACHED.fetch_add(on as u64, Relaxed);
        on
    }

    /// How often the planted bug was come upon.
    pub fn reached() -> u64 {
        REACHED.load(Relaxed)
    }
}

#[cfg(madsim)]
pub use imp::{is_on, plant, reached};
