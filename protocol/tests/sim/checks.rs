//! The laws that hold when everything has come to rest. (That the wave never goes back, that step
//! counters agree and that READY comes first and once is checked on the way.)

use super::super::engine_model::Phase;
use super::{Control, Topology, World};

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
            return Err("the group was not admitted".to_owned());
        }
        for (rank, engine) in self.engines.iter().enumerate() {
            if engine.phase != Phase::Idle {
                return Err(format!(
                    "engine {rank} is in {:?}, the others in {:?}",
                    engine.phase,
                    self.engines.iter().map(|e| e.phase).collect::<Vec<_>>()
                ));
            }
        }
        let open = self.requests.iter().find(|(_, request)| !request.ended);
        if let Some((id, request)) = open {
            return Err(format!("request {id} to engine {} hangs", request.rank));
        }
        let running = self.engines.iter().any(|engine| engine.running);
        if self.machine.running() != running {
            return Err(format!(
                "the machine says running={}, the group is running={running}",
                self.machine.running()
            ));
        }
        if self.control != Control::Free {
            return Err(format!("the controller is still in {:?}", self.control));
        }
        for frontend in &self.frontends {
            let Some(theirs) = &frontend.coordinator else {
                continue;
            };
            if theirs.running() != running || theirs.wave() > self.machine.wave() {
                return Err(format!(
                    "frontend {} believes in wave {} running={}, it is {} running={running}",
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
