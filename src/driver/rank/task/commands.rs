//! What the rank task is told.

use std::sync::atomic::Ordering::Relaxed;

use tracing::warn;

use super::*;
use crate::driver::engine_calls::is_own;
use crate::driver::handles::{Call, GiveUp};

impl RankTask {
    pub(super) async fn handle_command(&mut self, Envelope { ask, reply, .. }: Envelope<RankAsk>) {
        self.changed = true;
        let now = self.clock.now();
        match ask {
            RankAsk::Prepare(Prepare { incarnation }) => {
                let result = self.prepare(now, incarnation).await;
                self.urgent = true;
                self.publish();
                reply.send::<Prepare>(result);
            }
            RankAsk::EngineReady(EngineReady { incarnation, facts }) => {
                let layout = Box::new(facts.layout);
                self.machine.handle_event(now, Event::Ready { incarnation, layout });
                reply.send::<EngineReady>(Ok(()));
            }
            RankAsk::Admit(Admit { incarnation }) => {
                self.machine.handle_event(now, Event::Admitted(incarnation));
                self.urgent = true;
                reply.send::<Admit>(Ok(()));
            }
            RankAsk::EngineDown(EngineDown { incarnation, reason }) => {
                self.engine_down(now, incarnation, reason);
                reply.send::<EngineDown>(Ok(()));
            }
            RankAsk::GiveUp(GiveUp { reason }) => {
                self.machine.handle_event(now, Event::GivenUp { reason });
                reply.send::<GiveUp>(Ok(()));
            }
            RankAsk::Admission(Admission { open }) => {
                self.machine.handle_event(now, Event::Gate { open });
                self.perform().await;
                reply.send::<Admission>(Ok(()));
            }
            RankAsk::Call(call) if !is_own(&call.method, &call.args) => {
                let method = call.method;
                warn!(
                    method,
                    "a call that no sidecar makes was refused: who else knows the deployment's secret?"
                );
                let error = HandleError::failed(format!("{method}: the sidecar makes no such call"));
                reply.send::<Call>(Err(error));
            }
            RankAsk::Call(call) => {
                if let Some(token) = self.calls.take(call.key, reply) {
                    let (method, args, timeout) = (call.method, call.args, call.timeout);
                    self.machine.handle_event(now, Event::Call { token, method, args, timeout });
                }
            }
            RankAsk::SetLimits(SetLimits { limits }) => {
                self.config.machine.limits = limits;
                self.request_bytes.store(limits.request_bytes, Relaxed);
                self.machine.handle_event(now, Event::Limits(limits));
                reply.send::<SetLimits>(Ok(()));
            }
            RankAsk::OpenRoute(route) => self.open_route(route, reply),
            RankAsk::AdoptRoute(AdoptRoute { frontend, api_server }) => {
                reply.send::<AdoptRoute>(self.adopt_route(frontend, api_server));
            }
            RankAsk::CloseRoutes(CloseRoutes { frontend, orphaned }) => {
                if orphaned {
                    let routes = self.routes.values().filter(|route| route.frontend == frontend);
                    for output in routes.map(|route| route.output_address.clone()) {
                        self.connecting.spawn(async move {
                            routes::say_dead(&output).await;
                            None
                        });
                    }
                }
                self.close_routes(now, frontend);
                self.perform().await;
                reply.send::<CloseRoutes>(Ok(()));
            }
            RankAsk::Release(Release { ticket, verdict }) => {
                self.releases.insert(ticket, reply);
                self.machine.release(ticket, verdict);
            }
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
        self.machine.handle_event(now, Event::Down { incarnation, reason });
    }

    /// What we saw ourselves says that the engine is gone.
    pub(super) fn engine_lost(&mut self, reason: String) {
        let Some(engine) = self.engine.take() else {
            return;
        };
        self.urgent = true;
        let incarnation = engine.incarnation;
        tracing::warn!(rank = %self.rank(), %incarnation, reason, "engine lost");
        let lost = RankEvent::Lost { rank: self.rank(), incarnation, reason: reason.clone() };
        self.events.push_back(NodeEvent::Rank(lost));
        self.machine.handle_event(self.clock.now(), Event::Down { incarnation, reason });
    }

    pub(super) fn open_route(&mut self, request: OpenRoute, reply: ReplyTo) {
        let slot = match self.machine.open_slot(request.frontend, request.api_server) {
            Ok(slot) => slot,
            Err(error) => {
                reply.send::<OpenRoute>(Err(HandleError::failed(error.to_string())));
                return;
            }
        };
        let epoch = self.epoch();
        let opening = Opening { epoch, frontend: request.frontend };
        self.opening.insert(slot.0, opening);
        let identity = self.rank().identity();
        self.connecting.spawn(async move {
            let result = routes::connect(&request, identity).await;
            Some(Opened { epoch, slot: slot.0, request, reply, result })
        });
    }

    pub(super) fn handle_opened(&mut self, opened: Opened) {
        self.changed = true;
        let Opened { epoch, slot, request, reply, result } = opened;
        let wanted = self.opening.get(&slot).is_some_and(|opening| opening.epoch == epoch);
        if !wanted {
            let error = HandleError::failed("the route was closed while it was being opened");
            reply.send::<OpenRoute>(Err(error));
            return;
        }
        self.opening.remove(&slot);
        match result {
            Ok(connections) => {
                let limit = self.request_bytes.clone();
                let (route, sources) = Route::new(&request, connections, epoch, slot, limit);
                self.sources.extend(sources);
                self.routes.insert(slot, route);
                reply.send::<OpenRoute>(Ok(Slot(slot)));
            }
            Err(error) => {
                self.machine.handle_event(self.clock.now(), Event::CloseSlot { slot: Slot(slot) });
                let error =
                    format!("route of DP rank {} to API server {}: {error}", self.rank(), request.api_server);
                reply.send::<OpenRoute>(Err(HandleError::failed(error)));
            }
        }
    }

    pub(super) fn adopt_route(&self, frontend: FrontendId, api_server: u32) -> Result<Slot, HandleError> {
        let mut routes = self.routes.iter();
        let found = routes.find(|(_, route)| route.frontend == frontend && route.api_server == api_server);
        let (slot, _) = found.ok_or_else(|| {
            HandleError::failed(format!(
                "DP rank {} has no route to API server {api_server} of frontend {frontend}",
                self.rank()
            ))
        })?;
        Ok(Slot(*slot))
    }

    pub(super) fn close_routes(&mut self, now: Time, frontend: FrontendId) {
        self.routes.retain(|_, route| route.frontend != frontend);
        self.opening.retain(|_, opening| opening.frontend != frontend);
        self.machine.close_frontend(now, frontend);
    }
}
