//! Which law of a simulation notices a bug.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use dp_sidecar_protocol::machine::mutation::{self, Mutation};

/// What broke in a run, also if it was an assertion.
pub(crate) fn broken(run: impl FnOnce() -> Result<(), String>) -> Option<String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(text(&*panic))).err()
}

/// What an assertion said.
pub(crate) fn text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a model panicked").to_owned()
}

/// Asserts that with this bug one of the seeds breaks this very law.
#[track_caller]
pub(crate) fn caught(mutation: Mutation, law: &str, seeds: u64, run: impl Fn(u64) -> Result<(), String>) {
    mutation::set(Some(mutation));
    let mut others = Vec::new();
    let found = (0..seeds).any(|seed| {
        let broken = broken(|| run(seed));
        let is_it = broken.as_ref().is_some_and(|broken| broken.contains(law));
        others.extend(broken.filter(|_| !is_it && others.len() < 5));
        is_it
    });
    mutation::set(None);
    assert!(found, "{mutation:?} breaks no law named {law:?} in {seeds} seeds, but: {others:#?}");
}
