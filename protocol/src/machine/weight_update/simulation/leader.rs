//! The leader dies and is started again; nodes are lost and found.

use super::*;

impl World {
    /// Its engines are stopped with it (by the keeper, when the grace is over), and start again by the journal.
    pub(super) fn controller_dies(&mut self) {
        self.leader_dies();
        self.external = false;
        if self.fault(0.3) {
            self.model = format!("not {}", self.model);
        }
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
        self.paused_before = false;
        self.tickets.clear();
        self.open.clear();
        self.concluding = None;
        let work = |happening: &Happening| matches!(happening, Happening::Work(..));
        let keys: Vec<(Time, u64)> =
            self.queue.iter().filter(|(_, happening)| work(happening)).map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(Happening::Work(_, action)) = self.queue.remove(&key)
                && self.chance(0.5)
            {
                self.work(0, *action);
            }
        }
        self.after(5_000, Happening::LeaderStarts);
    }

    pub(super) fn leader_starts(&mut self) {
        // What is on the way to an engine comes before whatever it is asked next.
        let on_the_way = self.queue.values().any(|happening| matches!(happening, Happening::Arrives(..)));
        if self.journal.is_some() && !on_the_way && self.fault(0.1) {
            (self.journal, self.ledger) = (None, Ledger::default());
            self.state_lost = true;
            self.states_lost += 1;
        }
        let committed = self.journal.as_ref().map(|committed| committed.commit.id.clone());
        let open = self.ledger.begun.as_ref().map(|begun| begun.id.clone());
        let suspects = &self.ledger.suspects;
        self.log.push(format!(
            "{:?} the leader starts: {committed:?} committed, {open:?} open, suspects {suspects:?}",
            self.now
        ));
        self.leader = true;
        self.epoch += 1;
        let nodes = (0..self.engines.len()).map(|rank| (index(rank), self.node_of(rank))).collect();
        let (journal, ledger) = (self.journal.clone(), self.ledger.clone());
        self.machine = Updates::new(config(self.lockstep), nodes, journal, ledger);
        self.control_seen = (false, false);
        self.seen.fill(Seen::default());
        self.blind.clear();
        for node in 0..self.nodes {
            if self.fault(0.15) {
                self.blind.insert(node);
                self.after(60_000, Happening::Mounted(node));
            }
        }
        let (there, gone): (Vec<usize>, Vec<usize>) = (0..self.engines.len())
            .partition(|rank| self.engines[*rank].alive && self.engines[*rank].admitted);
        for rank in gone {
            self.stop(rank);
        }
        if self.lockstep {
            if self.away.is_empty() {
                self.take_over(there);
            }
            return; // the others come with the last node
        }
        for node in 0..self.nodes {
            if !self.away.contains(&node) {
                let ranks = there.iter().copied().filter(|rank| self.node_of(*rank).0 == node);
                self.take_over(ranks.collect());
            }
        }
    }

    fn take_over(&mut self, ranks: Vec<usize>) {
        if self.lockstep && ranks.len() < self.engines.len() {
            for rank in ranks {
                self.stop(rank);
            }
        } else if !ranks.is_empty() {
            self.after(2_000, Happening::Adopt(ranks));
        }
    }

    /// As the lifecycle does, with those that still live.
    pub(super) fn adopt(&mut self, ranks: &[usize]) {
        if !self.leader {
            return;
        }
        let unknown = |rank: &usize| {
            let engine = &self.engines[*rank];
            engine.alive && engine.admitted && !self.is_away(*rank) && !self.is_known(*rank)
        };
        let there: Vec<usize> = ranks.iter().copied().filter(unknown).collect();
        if self.lockstep && there.len() < self.engines.len() {
            if self.away.is_empty() && there.iter().any(|rank| !self.is_known(*rank)) {
                for rank in there {
                    self.stop(rank);
                }
            }
        } else if !there.is_empty() {
            self.ask_for(&there, true);
        }
    }

    /// The leader counts it as in service.
    pub(super) fn is_in_service(&self, rank: usize) -> bool {
        let life = Incarnation(self.engines[rank].incarnation);
        self.machine.lives().any(|known| known == (index(rank), life))
    }

    /// The leader is just asked about it.
    pub(super) fn is_asked_for(&self, rank: usize) -> bool {
        let life = Incarnation(self.engines[rank].incarnation);
        self.tickets.values().any(|(engines, _)| engines.get(&index(rank)) == Some(&life))
    }

    fn is_known(&self, rank: usize) -> bool {
        self.is_asked_for(rank) || self.is_in_service(rank)
    }

    pub(super) fn ask_for(&mut self, ranks: &[usize], adopt: bool) {
        let life = |rank: &usize| (index(*rank), Incarnation(self.engines[*rank].incarnation));
        let engines: Engines = ranks.iter().map(life).collect();
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.tickets.insert(ticket, (engines.clone(), adopt));
        self.tell(match adopt {
            true => Event::AdoptAsked { ticket, engines },
            false => Event::RestoreAsked { ticket, engines },
        });
    }

    /// Engines that hold the committed weights are admitted, others start again.
    pub(super) fn answered(&mut self, ticket: Ticket, good: bool) {
        let Some((engines, adopted)) = self.tickets.remove(&ticket) else {
            self.law(Law::EveryEngineIsAnswered, false, || format!("{ticket:?} is answered twice"));
            return;
        };
        for (rank, life) in &engines {
            let at = usize::from(rank.0);
            let there = self.engines[at].alive && self.engines[at].incarnation == life.0;
            if !good && there {
                self.stop(at); // hung or not
            } else if good && !adopted && self.living(at, life.0) {
                self.engines[at].admitted = true;
                // The pause of a frontend still holds.
                self.engines[at].paused = self.paused_before;
            }
        }
        if self.lockstep && good && !adopted {
            self.external = false;
        }
    }

    pub(super) fn heal(&mut self, node: u16) {
        if !self.away.remove(&node) {
            return;
        }
        for rank in std::mem::take(&mut self.gates_due) {
            self.open_gates(std::iter::once(index(rank)));
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
        let serves = |rank: &usize| self.engines[*rank].alive && self.engines[*rank].admitted;
        let unknown: Vec<usize> = if self.lockstep {
            let all: Vec<usize> = (0..self.engines.len()).collect();
            if !self.away.is_empty() || all.iter().all(|rank| self.is_known(*rank)) {
                Vec::new()
            } else {
                all
            }
        } else {
            (0..self.engines.len()).filter(|rank| self.node_of(*rank).0 == node).collect()
        };
        let unknown: Vec<usize> =
            unknown.into_iter().filter(serves).filter(|rank| !self.is_known(*rank)).collect();
        self.look();
        for rank in 0..self.engines.len() {
            if !self.engines[rank].alive && self.node_of(rank).0 == node {
                self.schedule_restart(rank);
            }
        }
        if !unknown.is_empty() {
            self.take_over(unknown);
        }
    }
}
