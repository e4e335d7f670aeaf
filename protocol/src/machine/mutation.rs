//! Bugs that are put into machines on purpose, to show that a simulation finds them and by which of its laws.
//!
//! Without the feature `mutations`, which the tests of this crate alone switch on, there are none.

/// A plausible bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// `control`: the death of an engine frees the lock, whoever has it.
    DeathFreesLock,
    /// `control`: a call goes to the ranks that are up when another rank of its lockstep group is down.
    RunInPart,
    /// `control`: a call that did not come in for all ranks in time is dropped without an answer.
    DropLateRounds,
    /// `control`: of two equal calls the one that came later is completed first.
    GatherNewestFirst,
    /// `lifecycle`: a successor counts incarnations from 0.
    ForgetNewest,
    /// `lifecycle`: a successor admits whatever completed its handshake, restored or not.
    AdoptUnrestored,
    /// `lifecycle`: a successor takes over what is left of a lockstep group.
    AdoptPartOfGroup,
    /// `lifecycle`: an adoption that failed over a lost link is held against the engines.
    BlameLostLink,
    /// `attachment`: READY does not wait for the frontend's DP coordinator.
    ReadyBeforeCoordinator,
    /// `attachment`: a wave is passed on for each rank that hears it.
    WaveForEachRank,
    /// `attachment`: the next attempt begins while the last one is torn down.
    RetryBeforeTornDown,
    /// `attachment`: goes on when a route is lost.
    IgnoreLostRoutes,
}

#[cfg(feature = "mutations")]
mod on {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// All machines of this thread have this bug from now on, or none.
    pub fn set(mutation: Option<Mutation>) {
        ON.set(mutation);
    }

    pub(in crate::machine) fn mutated(mutation: Mutation) -> bool {
        ON.get() == Some(mutation)
    }
}

#[cfg(not(feature = "mutations"))]
mod on {
    pub(in crate::machine) const fn mutated(_: super::Mutation) -> bool {
        false
    }
}

pub(super) use on::mutated;
#[cfg(feature = "mutations")]
pub use on::set;
