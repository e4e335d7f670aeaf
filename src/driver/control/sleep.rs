//! The operator puts all engines to sleep, and wakes them up.

use std::collections::BTreeMap;
use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::memory::Memory;
use dp_sidecar_protocol::machine::policy::{Effect, Wake};
use dp_sidecar_protocol::machine::weight_update::PauseMode;
use futures::FutureExt as _;
use futures::future::{BoxFuture, join_all};
use rmpv::Value;

use super::{ControlError, ControlGuard, ControlHandle};
use crate::api::SLEEP_LIMIT;
use crate::driver::engine_calls;
use crate::driver::handles::{CallResult, RankHandle};

/// How the engines are after a sleep or a wake-up.
#[derive(Debug, Default)]
pub struct Slept {
    /// What each rank's memory holds, as far as is known, and why it did not do what it was told.
    pub engines: BTreeMap<EngineIndex, (Memory, Option<String>)>,
    pub paused: bool,
}

impl ControlHandle {
    /// Pauses all engines and puts them to sleep. A rank that is not there makes it a refusal, before any is touched.
    pub async fn sleep(
        &self,
        level: u8,
        mode: PauseMode,
        deadline: Duration,
        patience: Duration,
    ) -> Result<Slept, ControlError> {
        let guard = self.acquire("operator sleep", patience).await?;
        let result = self.sleep_all(&guard, level, mode, deadline).await;
        guard.release().await;
        result
    }

    async fn sleep_all(
        &self,
        guard: &ControlGuard,
        level: u8,
        mode: PauseMode,
        deadline: Duration,
    ) -> Result<Slept, ControlError> {
        let ranks = self.all_serving()?;
        self.pause_all(guard, mode, deadline).await?;
        guard.doing("falling asleep");
        let args = [Value::from(level)];
        let call = |rank: &RankHandle| {
            let rank = rank.clone();
            (rank.rank, async move { engine_calls::sleep(&rank, level, SLEEP_LIMIT).await }.boxed())
        };
        let engines = guard.call_all("sleep", &args, ranks.iter().map(call).collect()).await;
        Ok(Slept { engines, paused: true })
    }

    /// Wakes up what has these tags on all engines; none: whatever sleeps. Engines that are fully awake then are resumed,
    /// whoever had paused them.
    pub async fn wake(&self, tags: &[String], patience: Duration) -> Result<Slept, ControlError> {
        let guard = self.acquire("operator wake", patience).await?;
        let result = self.wake_all(&guard, tags).await;
        guard.release().await;
        result
    }

    async fn wake_all(&self, guard: &ControlGuard, tags: &[String]) -> Result<Slept, ControlError> {
        let ranks = self.all_serving()?;
        let grant = &guard.grant;
        let tags = (!tags.is_empty()).then(|| tags.iter().map(|tag| Value::from(tag.as_str())).collect());
        let args = [tags.map_or(Value::Nil, Value::Array)];
        let wake = Wake::of(&args);
        if grant.wakes_without_weights(wake) {
            return Err(ControlError::NoWeights);
        }
        let untouched = |rank: &RankHandle| {
            (rank.rank, (grant.memory.get(&rank.rank).copied().unwrap_or_default(), None))
        };
        if !grant.asleep() {
            let engines = ranks.iter().map(untouched).collect();
            return Ok(Slept { engines, paused: grant.paused_by.is_some() });
        }
        // An independent engine that has started again meanwhile would be resumed before the others.
        let (ahead, ranks): (Vec<_>, Vec<_>) =
            ranks.into_iter().partition(|rank| grant.would_go_ahead(rank.rank, wake, self.kind));
        let call = |rank: &RankHandle| {
            let (rank, args) = (rank.clone(), args.clone());
            (rank.rank, async move { engine_calls::wake_up(&rank, &args, SLEEP_LIMIT).await }.boxed())
        };
        let mut engines = guard.call_all("wake_up", &args, ranks.iter().map(call).collect()).await;
        engines.extend(ahead.iter().map(untouched));
        let awake = engines.values().all(|(memory, error)| !memory.sleeps() && error.is_none());
        if awake {
            guard.set_paused(None).await;
        }
        Ok(Slept { engines, paused: !awake })
    }

    /// All ranks of the deployment, or which are missing.
    fn all_serving(&self) -> Result<Vec<RankHandle>, ControlError> {
        let serving = self.serving()?;
        let missing = self.ranks.iter().filter(|rank| serving.iter().all(|other| other.rank != rank.rank));
        let missing: Vec<String> = missing.map(|rank| rank.rank.to_string()).collect();
        match missing.is_empty() {
            true => Ok(serving),
            false => Err(ControlError::Incomplete { ranks: missing.join(", ") }),
        }
    }
}

impl ControlGuard {
    /// Makes all of these calls of a method at the same time, and keeps the control task informed of what that does to
    /// the engines' memory.
    async fn call_all(
        &self,
        method: &'static str,
        args: &[Value],
        calls: Vec<(EngineIndex, BoxFuture<'static, CallResult>)>,
    ) -> BTreeMap<EngineIndex, (Memory, Option<String>)> {
        let effect = Effect::of(method, args);
        self.calling(calls.iter().map(|(rank, _)| *rank).collect(), effect).await;
        let calls = calls.into_iter().map(|(rank, call)| async move { (rank, call.await) });
        let mut engines = BTreeMap::new();
        for (rank, result) in join_all(calls).await {
            let result = result.map_err(|error| error.to_string());
            let mut memory = self.grant.memory.get(&rank).copied().unwrap_or_default();
            memory.sent(effect);
            memory.answered(effect, &result);
            let still = matches!(result, Ok(Value::Boolean(false))) && !memory.sleeps();
            let still = still.then(|| "it says that a part of its memory still sleeps".to_owned());
            let error = result.as_ref().err().cloned().or(still);
            self.called(rank, effect, result).await;
            engines.insert(rank, (memory, error));
        }
        engines
    }
}
