//! What the rank task is told.

use super::*;

impl RankTask {
    pub(super) async fn handle_command(&mut self, command: RankCommand) {
        self.changed = true;
        let now = self.now();
        match command {
            RankCommand::Prepare { incarnation, reply } => {
                let result = self.prepare(now, incarnation).await;
                self.urgent = true;
                self.publish();
                let _ = reply.send(result);
            }
            RankCommand::EngineReady { incarnation, facts } => {
                let layout = Box::new(facts.layout);
                let event = Event::Ready { incarnation, layout };
                self.machine.handle_event(now, event);
            }
            RankCommand::Admit { incarnation } => {
                self.machine.handle_event(now, Event::Admitted(incarnation));
                self.urgent = true;
            }
            RankCommand::EngineDown { incarnation, reason } => self.engine_down(now, incarnation, reason),
            RankCommand::Admission { open, reply } => {
                self.machine.handle_event(now, Event::Gate { open });
                self.perform().await;
                let _ = reply.send(Ok(()));
            }
            RankCommand::Call { key, method, args, timeout, reply } => {
                if let Some(token) = self.calls.take(key, reply) {
                    let event = Event::Call { token, method, args, timeout };
                    self.machine.handle_event(now, event);
                }
            }
            RankCommand::OpenRoute { route, reply } => self.open_route(route, reply),
            RankCommand::AdoptRoute { frontend, api_server, lost, reply } => {
                let _ = reply.send(self.adopt_route(frontend, api_server, lost));
            }
            RankCommand::CloseRoutes { frontend, reply } => {
                self.close_routes(now, frontend);
                self.perform().await;
                let _ = reply.send(Ok(()));
            }
            RankCommand::Release { ticket, verdict, reply } => {
                self.releases.insert(ticket, reply);
                let verdict = match verdict {
                    Verdict::Forward => virtual_engine::Verdict::Forward,
                    Verdict::Answer(value) => virtual_engine::Verdict::Answer(value),
                    Verdict::Refuse(message) => virtual_engine::Verdict::Refuse(message),
                };
                self.machine.release(ticket, verdict);
            }
            // Ends the loop.
            RankCommand::Shutdown { .. } => {}
        }
    }

    pub(super) async fn prepare(
        &mut self,
        now: Time,
        incarnation: Incarnation,
    ) -> Result<SlotAddresses, HandleError> {
        if let Some(engine) = self.engine.as_ref().filter(|engine| engine.incarnation == incarnation) {
            return Ok(engine.addresses.clone());
        }
        self.engine = None;
        self.machine.handle_event(now, Event::Prepared(incarnation));
        let generation = self.epoch();
        let rank = self.rank();
        let slots = self.config.machine.frontend_slots + 1;
        let bound = EngineSockets::bind(&self.config.dir, rank, incarnation, generation, slots).await;
        let (sockets, sources) = bound.map_err(|error| {
            HandleError::failed(format!("sockets for the engine of DP rank {rank}: {error}"))
        })?;
        let addresses = sockets.addresses.clone();
        self.engine = Some(sockets);
        self.sources.extend(sources);
        Ok(addresses)
    }

    pub(super) fn engine_down(&mut self, now: Time, incarnation: Incarnation, reason: String) {
        self.urgent = true;
        if self.engine.as_ref().is_some_and(|engine| engine.incarnation == incarnation) {
            self.engine = None;
        }
        let event = Event::Down { incarnation, reason };
        self.machine.handle_event(now, event);
    }

    /// What we saw ourselves says that the engine is gone.
    pub(super) fn engine_lost(&mut self, reason: String) {
        let Some(engine) = self.engine.take() else {
            return;
        };
        self.urgent = true;
        let incarnation = engine.incarnation;
        tracing::warn!(rank = %self.rank(), %incarnation, reason, "engine lost");
        self.events.push_back(RankEvent::Lost { rank: self.rank(), incarnation, reason: reason.clone() });
        let now = self.now();
        let event = Event::Down { incarnation, reason };
        self.machine.handle_event(now, event);
    }

    pub(super) fn open_route(&mut self, request: OpenRoute, reply: Reply<Slot>) {
        let slot = match self.machine.open_slot(request.frontend, request.api_server) {
            Ok(slot) => slot,
            Err(error) => {
                let _ = reply.send(Err(HandleError::failed(error.to_string())));
                return;
            }
        };
        let epoch = self.epoch();
        let opening = Opening { epoch, frontend: request.frontend };
        self.opening.insert(slot.0, opening);
        let identity = self.rank().identity();
        self.connecting.spawn(async move {
            let result = routes::connect(&request, identity).await;
            Opened { epoch, slot: slot.0, request, reply, result }
        });
    }

    pub(super) fn handle_opened(&mut self, opened: Opened) {
        self.changed = true;
        let Opened { epoch, slot, request, reply, result } = opened;
        let wanted = self.opening.get(&slot).is_some_and(|opening| opening.epoch == epoch);
        if !wanted {
            let error = HandleError::failed("the route was closed while it was being opened");
            let _ = reply.send(Err(error));
            return;
        }
        self.opening.remove(&slot);
        match result {
            Ok(connections) => {
                let (route, sources) = Route::new(&request, connections, epoch, slot);
                self.sources.extend(sources);
                self.routes.insert(slot, route);
                let _ = reply.send(Ok(Slot(slot)));
            }
            Err(error) => {
                let now = self.now();
                let event = Event::CloseSlot { slot: Slot(slot) };
                self.machine.handle_event(now, event);
                let error =
                    format!("route of DP rank {} to API server {}: {error}", self.rank(), request.api_server);
                let _ = reply.send(Err(HandleError::failed(error)));
            }
        }
    }

    pub(super) fn adopt_route(
        &mut self,
        frontend: FrontendId,
        api_server: u32,
        lost: mpsc::Sender<RouteLost>,
    ) -> Result<Slot, HandleError> {
        let rank = self.rank();
        let found = self
            .routes
            .iter_mut()
            .find(|(_, route)| route.frontend == frontend && route.api_server == api_server);
        let (slot, route) = found.ok_or_else(|| {
            HandleError::failed(format!(
                "DP rank {rank} has no route to API server {api_server} of frontend {frontend}"
            ))
        })?;
        route.lost = lost;
        Ok(Slot(*slot))
    }

    pub(super) fn close_routes(&mut self, now: Time, frontend: FrontendId) {
        self.routes.retain(|_, route| route.frontend != frontend);
        self.opening.retain(|_, opening| opening.frontend != frontend);
        self.machine.close_frontend(now, frontend);
    }
}
