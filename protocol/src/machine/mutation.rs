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
    /// `control`: a whole wake passes although the weights were discarded and nothing was loaded since.
    WakeWithoutWeights,
    /// `control`: a resume passes while a part of the memory sleeps.
    ResumeAsleep,
    /// `control`: what an engine's memory holds is not taken over from the sidecar before.
    ForgetMemory,
    /// `memory`: a gate is open in front of an engine whose weights were discarded.
    ServeWithoutWeights,
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
    /// `coordinator`: a FIRST_REQ with an old wave sets the wave back (vllm #46833).
    StaleHintRewindsWave,
    /// `coordinator`: a FIRST_REQ with an old wave still excludes its engine (vllm #46833).
    StaleHintKeepsExclude,
    /// `coordinator`: a START_DP_WAVE of ours counts as a running group (vllm #51481).
    ForwardedWakeSetsRunning,
    /// `coordinator`: a group that was started again is used before it counts waves as the frontends do.
    NoWaveForFreshGroup,
    /// `coordinator`: START_DP_WAVE is sent once, though paused engines drop it.
    NoSecondStart,
    /// `coordinator`: a machine that takes over engines counts from 0.
    AdoptFromZero,
    /// `coordinator`: a machine that takes over engines does not wake them.
    AdoptWithoutWake,
    /// `virtual_engine`: what was in flight on a lost engine is not answered.
    ForgetInFlightAtDown,
    /// `virtual_engine`: a slot is given away before the engine has confirmed.
    ReuseSlotWithoutFence,
    /// `weight_update`: goes on as if the commit record had been written.
    SkipCommitRecord,
    /// `weight_update`: an engine that loads is said to hold what it held before.
    NeverInDoubt,
    /// `weight_update`: resumes when the first rank has answered.
    ResumeBeforeAllAcks,
    /// `weight_update`: leaves the highest rank out of the pause.
    ForgetOneRankInPause,
    /// `weight_update`: rolls back only the ranks whose load failed.
    RollBackFailedRanksOnly,
    /// `weight_update`: takes an engine for fenced before that is in force.
    TrustFences,
    /// `weight_update`: touches engines before that is on record.
    SkipBegunRecord,
    /// `weight_update`: resumes what it takes over without loading the committed weights.
    RecoverWithoutReload,
    /// `weight_update`: work that was lost is not noticed.
    DropJobLost,
    /// `weight_update`: a restore that failed counts as under way for ever.
    KeepFailedRestores,
    /// `weight_update`: where a node does not find the committed weights, its engines stay at the start-up checkpoint.
    ForgetPerJob,
    /// `weight_update`: takes over engines that are stamped with another version than the committed one.
    TrustStamps,
    /// `weight_update`: loads into memory that sleeps.
    UpdateAsleep,
    /// `weight_update`: brings engines to the committed weights that sleep.
    RecoverAsleep,
    /// `weight_update`: takes over engines that are paused for no reason on record as they are.
    TrustPaused,
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
