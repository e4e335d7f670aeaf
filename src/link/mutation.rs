//! Faults that the simulation puts into the link, to see that its laws find them. In products there are none.

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    /// The serving side keeps no answers.
    ForgetAnswers,
    /// The serving side does not know what it has begun.
    ForgetRunning,
    /// A successor is asked for what died with the process before it.
    AskSuccessor,
    /// After a reconnect the last command is sent first.
    SendBackwards,
    /// Commands wait beyond their limit.
    NeverExpire,
    /// What was asked before a reconnect is not sent again.
    LoseAnswers,
    /// What happened while there was no connection is not reported.
    MissNothing,
    /// Lost routes stay in the state.
    KeepRoutes,
}

#[cfg(test)]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// Whether this fault is in.
#[cfg(test)]
pub(super) fn is(mutation: Mutation) -> bool {
    ACTIVE.get() == Some(mutation)
}

/// Whether this fault is in.
#[cfg(not(test))]
pub(super) const fn is(_: Mutation) -> bool {
    false
}

/// Runs something with a fault, on this thread.
#[cfg(test)]
pub(super) fn with<T>(mutation: Mutation, run: impl FnOnce() -> T) -> T {
    ACTIVE.set(Some(mutation));
    let result = run();
    ACTIVE.set(None);
    result
}
