//! The laws that hold when everything has come to rest. (That the wave never goes back, that step
//! counters agree and that READY comes first and once is checked on the way.)

use super::super::engine_model::Phase;
use super::{Control, Topology, World};

/// The laws, by name.
pub(crate) mod law {
    pub(crate) const FORWARD: &str = "the wave never goes back";
    pub(crate) const IN_STEP: &str = "the engines of a group count the same steps";
    pub(crate) const ADMITTED: &str = "the group is admitted";
    pub(crate) const AT_REST: &str = "all engines come to rest";
    pub(crate) const ANSWERED: &str = "every request ends";
    pub(crate) const RUNNING: &str = "the machine knows whether the group runs";
    pub(crate) const CONTROLLED: &str = "pause and resume end";
    pub(crate) const INFORMED: &str = "the frontends know the wave";
}

impl World {
    pub(super) fn check_end(&mut self) {
        if self.broken.is_some() {
            return;
        }
        if let Err(why) = self.at_rest() {
            self.fail(why);
        }
    }

    fn at_rest(&self) -> Result<(), String> {
        if self.topology == Topology::Hosted && !self.admitted {
            return Err(law::ADMITTED.to_owned());
        }
        for (rank, engine) in self.engines.iter().enumerate() {
            if engine.phase != Phase::Idle {
                return Err(format!(
                    "{}: engine {rank} is in {:?}, all in {:?}",
                    law::AT_REST,
                    engine.phase,
                    self.engines.iter().map(|e| e.phase).collect::<Vec<_>>()
                ));
            }
        }
        let open = self.requests.iter().find(|(_, request)| !request.ended);
        if let Some((id, request)) = open {
            return Err(format!("{}: {id} to engine {} hangs", law::ANSWERED, request.rank));
        }
        let running = self.engines.iter().any(|engine| engine.running);
        if self.machine.running() != running {
            return Err(format!("{}: it says {}, it is {running}", law::RUNNING, self.machine.running()));
        }
        if self.control != Control::Free {
            return Err(format!("{}: still in {:?}", law::CONTROLLED, self.control));
        }
        for frontend in &self.frontends {
            let Some(theirs) = &frontend.coordinator else {
                continue;
            };
            if theirs.running() != running || theirs.wave() > self.machine.wave() {
                return Err(format!(
                    "{}: frontend {} believes in wave {} running={}, it is {} running={running}",
                    law::INFORMED,
                    frontend.id,
                    theirs.wave(),
                    theirs.running(),
                    self.machine.wave(),
                ));
            }
        }
        Ok(())
    }
}
