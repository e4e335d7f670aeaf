//! The leader dies and is started again; nodes are lost and found.

use super::*;

impl World {
    /// Its engines are stopped with it (by the keeper, when the grace is over), and start again by the journal.
    pub(super) fn controller_dies(&mut self) {
        self.leader_dies();
        self.external = false;
        self.ledger.external_weights = false;
        for rank in 0..self.engines.len() {
            self.stop(rank);
        }
    }

    /// Killed. What it has sent may arrive, what it was writing may be written.
    pub(super) fn leader_dies(&mut self) {
        if !self.leader {
            return;
        }
        self.log.push(format!("{:?} the leader dies", self.now));
        self.leader = false;
        self.epoch += 1;
        self.paused_before = false;
        self.waiting.clear();
        let writes: Vec<(Time, u64)> = self
            .queue
            .iter()
            .filter(|(_, happening)| {
                matches!(happening, Happening::BegunLands(..) | Happening::CommitLands(..))
            })
            .map(|(key, _)| *key)
            .collect();
        for key in writes {
            let lands = self.chance(0.5);
            match self.queue.remove(&key) {
                Some(Happening::BegunLands(begun, true)) if lands => self.ledger.begun = Some(*begun),
                Some(Happening::CommitLands(commit, true)) if lands => self.journal = commit,
                _ => {}
            }
        }
        // A client that was told nothing asks again, or not.
        self.after(5_000, Happening::LeaderStarts);
    }

    pub(super) fn leader_starts(&mut self) {
        self.log.push(format!(
            "{:?} the leader starts: {} committed, {:?} open, suspects {:?}",
            self.now,
            self.journal.id,
            self.ledger.begun.as_ref().map(|begun| &begun.id),
            self.ledger.suspects
        ));
        self.leader = true;
        let last = self
            .journal_record
            .clone()
            .filter(|record| record.id == self.journal.id)
            .unwrap_or_else(|| Record::of_commit(&self.journal));
        self.machine = WeightUpdate::new(config(self.lockstep), self.journal.version.clone(), Some(last));
        self.machine.mutation = self.mutation;
        self.lives.clear();
        let (there, gone): (Vec<usize>, Vec<usize>) = (0..self.engines.len())
            .partition(|rank| self.engines[*rank].alive && self.engines[*rank].admitted);
        for rank in gone {
            self.schedule_restart(rank);
        }
        if self.lockstep {
            if self.away.is_empty() {
                self.take_over(there);
            }
            return; // the others come with the last node
        }
        for node in 0..self.nodes {
            if !self.away.contains(&node) {
                let ranks: Vec<usize> =
                    there.iter().copied().filter(|rank| self.node_of(*rank).0 == node).collect();
                self.take_over(ranks);
            }
        }
    }

    fn take_over(&mut self, ranks: Vec<usize>) {
        if self.lockstep && ranks.len() < self.engines.len() {
            for rank in ranks {
                self.stop(rank);
            }
            return;
        }
        let lives = ranks.into_iter().map(|rank| (rank, self.engines[rank].incarnation)).collect();
        self.after(2_000, Happening::Adopt(lives));
    }

    /// What the driver does in `UpdateHandle::adopt`.
    pub(super) fn adopt(&mut self, ranks: Vec<(usize, u64)>) {
        if !self.leader {
            return;
        }
        if self.machine.snapshot().running.is_some() {
            self.waiting.extend(ranks);
            return;
        }
        let known = ranks.len();
        let ranks: Vec<(usize, u64)> = ranks
            .into_iter()
            .filter(|(rank, life)| {
                let engine = &self.engines[*rank];
                engine.alive && engine.incarnation == *life && engine.admitted && !self.is_away(*rank)
            })
            .collect();
        if self.lockstep && ranks.len() < known {
            for (rank, _) in ranks {
                self.stop(rank);
            }
            return;
        }
        let index = |rank: usize| EngineIndex(u16::try_from(rank).unwrap());
        let suspect = |(rank, life): &(usize, u64)| {
            let stale = self.engines[*rank].stamp != self.journal.version.0;
            stale || self.ledger.suspects(index(*rank), Incarnation(*life))
        };
        let paused = |(rank, _): &(usize, u64)| {
            let engine = &self.engines[*rank];
            engine.paused || !engine.pausing.is_empty()
        };
        let reload = ranks.iter().any(suspect);
        let treat: Vec<(usize, u64)> = if self.lockstep {
            let any = reload || ranks.iter().any(paused);
            ranks.iter().copied().filter(|_| any).collect()
        } else {
            ranks.iter().copied().filter(|rank| suspect(rank) || paused(rank)).collect()
        };
        self.lives.extend(ranks.iter().map(|(rank, _)| *rank));
        if treat.is_empty() {
            self.gate_open = true;
            return;
        }
        let begun = self.ledger.begun.clone();
        let committed = begun.as_ref().is_some_and(|begun| begun.id == self.journal.id);
        let participants = treat.iter().map(|(rank, life)| {
            let participant = Participant { incarnation: Incarnation(*life), node: self.node_of(*rank) };
            (index(*rank), participant)
        });
        let recover = Recover {
            id: begun.as_ref().map_or_else(|| UpdateId("adoption".to_owned()), |begun| begun.id.clone()),
            committed,
            to_version: begun.as_ref().map(|begun| begun.to_version.clone()).unwrap_or_default(),
            source: self.journal.checkpoint.path.clone(),
            version: self.journal.version.clone(),
            digest: self.journal.checkpoint.digest.clone(),
            mode: begun.as_ref().map(|begun| begun.mode).unwrap_or_default(),
            pause_deadline: Duration::from_secs(3),
            participants: participants.collect(),
            stay_paused: false,
            reload,
        };
        self.tell(Event::Recover(recover));
    }

    pub(super) fn heal(&mut self, node: u16) {
        if !self.away.remove(&node) {
            return;
        }
        for (rank, life) in std::mem::take(&mut self.fences_due) {
            if self.is_away(rank) {
                self.fences_due.insert((rank, life));
            } else if self.engines[rank].incarnation == life {
                self.stop(rank);
            }
        }
        if !self.leader {
            return;
        }
        let there: Vec<usize> =
            (0..self.engines.len()).filter(|rank| self.node_of(*rank).0 == node).collect();
        let mut unknown = Vec::new();
        for rank in there {
            let engine = &self.engines[rank];
            let life = engine.incarnation;
            let serving = engine.alive && engine.admitted;
            if self.lives.contains(&rank) && !serving {
                self.lives.remove(&rank);
                self.tell(Event::EngineLost {
                    rank: EngineIndex(u16::try_from(rank).unwrap()),
                    incarnation: Incarnation(life),
                    reason: "killed".to_owned(),
                });
            }
            if !serving {
                self.schedule_restart(rank);
            } else if !self.lives.contains(&rank) {
                unknown.push(rank);
            }
        }
        if self.lockstep && self.away.is_empty() {
            unknown = (0..self.engines.len())
                .filter(|rank| self.engines[*rank].alive && self.engines[*rank].admitted)
                .filter(|rank| !self.lives.contains(rank))
                .collect();
        }
        if !unknown.is_empty() && (!self.lockstep || self.away.is_empty()) {
            self.take_over(unknown);
        }
    }
}
