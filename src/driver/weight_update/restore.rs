//! Engines that start again are brought to the committed weights before they are admitted.

use super::*;

impl Task {
    pub(super) fn restore(&mut self, ranks: Vec<(EngineIndex, Incarnation)>, reply: RestoreReply) {
        let handles: Vec<(RankHandle, NodeId)> = ranks
            .iter()
            .filter_map(|(rank, _)| Some((self.ranks.get(rank)?.clone(), self.place(*rank))))
            .collect();
        let job = RestoreJob {
            stages: self.stages.clone(),
            stage_timeout: self.config.machine.stage_timeout,
            committed: self.committed.clone(),
            may_forget: !self.any_restored,
            call_timeout: self.config.call_timeout,
            load_timeout: self.config.machine.load_timeout,
            known: self.known.clone(),
            cancel: self.cancel.flag(),
        };
        self.restoring += 1;
        self.jobs.spawn(async move {
            let result = job.run(handles).await;
            Done::Restored { ranks, result, reply }
        });
    }

    pub(super) fn restored(
        &mut self,
        ranks: Vec<(EngineIndex, Incarnation)>,
        result: Result<Restored, UpdateError>,
        reply: RestoreReply,
    ) {
        self.restoring -= 1;
        let result = result.map(|restored| {
            if let Some(why) = restored.forget {
                warn!("{why}: engines stay at the command line's checkpoint");
                self.committed = None;
                if self.active.as_ref().is_none_or(|active| !active.begun) {
                    self.machine = machine(&self.config, None);
                }
            }
            self.any_restored = true;
            self.trust(&ranks);
            for (rank, incarnation) in ranks {
                let admitted = self.ranks.get(&rank).is_some_and(|handle| {
                    let snapshot = handle.snapshot.borrow();
                    snapshot.incarnation == incarnation && snapshot.admitted
                });
                let life = Life { incarnation, admitted, info: restored.infos.get(&rank).cloned() };
                self.lives.insert(rank, life);
            }
        });
        if let Err(error) = &result {
            error!("{error}");
        }
        ignore_gone(reply.send(result));
    }
}
