//! Requests: how they are handed to the tasks, and how their answers get back.

use super::*;

impl Task {
    pub(super) fn request(&mut self, session: Uuid, id: u64, request: Request) {
        // Asked again after a reconnect.
        if self.running_ids.contains(&(session, id)) {
            return;
        }
        if let Some((_, frame)) = self.recent.iter().find(|(of, _)| *of == id) {
            let frame = frame.clone();
            if let Some(connection) = &mut self.connection {
                connection.wire.push(frame);
            }
            return;
        }
        if self.running.len() >= MAX_RUNNING {
            let error = format!("{}: {MAX_RUNNING} requests run already", self.options.name);
            return self.respond(session, id, Err(error));
        }
        tracing::trace!(id, what = request.name(), "request");
        let what = request.name();
        match self.begin(session, id, request) {
            Ok(Begun::Runs) => {}
            Ok(Begun::Done(answer)) => self.respond(session, id, Ok(answer)),
            Err(error) => {
                let error = format!("{}: {what}: {error}", self.options.name);
                self.respond(session, id, Err(error));
            }
        }
    }

    pub(super) fn begin(&mut self, session: Uuid, id: u64, request: Request) -> Result<Begun, String> {
        let run = Ask { session, id, limit: ANSWER_LIMIT, after: After::Nothing };
        let noted = request.clone();
        let begun = match request {
            Request::State if self.lanes.has_stage() => {
                let (reply, answer) = oneshot::channel();
                self.lanes.stage(StageCommand { request: StageRequest::State, reply })?;
                let run = Ask { limit: STATE_LIMIT, after: After::State, ..run };
                self.run_until(run, answer, |state: StageState| Answer::Stage(Box::new(state)))
            }
            Request::State => Begun::Done(Answer::State(Box::new(self.state(None)))),
            Request::Prepare { rank, incarnation } => {
                let (reply, answer) = oneshot::channel();
                self.lanes.rank(rank, RankCommand::Prepare { incarnation, reply })?;
                let run = Ask { after: After::Prepared(rank, incarnation), ..run };
                self.run_until(run, answer, Answer::Addresses)
            }
            Request::EngineReady { rank, incarnation, facts } => {
                let facts = Box::new(facts);
                self.lanes.rank(rank, RankCommand::EngineReady { incarnation, facts })?;
                Begun::Done(Answer::Done)
            }
            Request::Admit { rank, incarnation } => {
                self.lanes.rank(rank, RankCommand::Admit { incarnation })?;
                Begun::Done(Answer::Done)
            }
            Request::EngineDown { rank, incarnation, reason } => {
                self.lanes.rank(rank, RankCommand::EngineDown { incarnation, reason })?;
                Begun::Done(Answer::Done)
            }
            Request::Admission { rank, open } => {
                let (reply, answer) = oneshot::channel();
                self.lanes.rank(rank, RankCommand::Admission { open, reply })?;
                self.run_until(run, answer, done)
            }
            Request::Call { rank, key, method, args, timeout_ms } => {
                let timeout = Duration::from_millis(timeout_ms);
                let (reply, answer) = oneshot::channel();
                self.lanes.rank(rank, RankCommand::Call { key, method, args, timeout, reply })?;
                let run = Ask { limit: timeout.saturating_add(MARGIN), ..run };
                self.run_until(run, answer, Answer::Value)
            }
            Request::OpenRoute {
                rank,
                frontend,
                api_server,
                input_address,
                output_address,
                registration,
                connect_timeout_ms,
            } => {
                let connect_timeout = Duration::from_millis(connect_timeout_ms);
                let lost = self.losses.clone();
                let route = OpenRoute {
                    frontend,
                    api_server,
                    input_address,
                    output_address,
                    registration,
                    connect_timeout,
                    lost,
                };
                let (reply, answer) = oneshot::channel();
                self.lanes.rank(rank, RankCommand::OpenRoute { route, reply })?;
                let limit = connect_timeout.saturating_add(MARGIN);
                let run = Ask { limit, after: After::Route(rank, frontend, api_server), ..run };
                self.run_until(run, answer, slot)
            }
            Request::AdoptRoute { rank, frontend, api_server } => {
                let (reply, answer) = oneshot::channel();
                let lost = self.losses.clone();
                self.lanes.rank(rank, RankCommand::AdoptRoute { frontend, api_server, lost, reply })?;
                let run = Ask { after: After::Route(rank, frontend, api_server), ..run };
                self.run_until(run, answer, slot)
            }
            Request::CloseRoutes { rank, frontend } => {
                let (reply, answer) = oneshot::channel();
                self.lanes.rank(rank, RankCommand::CloseRoutes { frontend, reply })?;
                self.held.frontend_gone(rank, frontend);
                self.run_until(run, answer, done)
            }
            Request::Release { rank, ticket, verdict } => {
                let (reply, answer) = oneshot::channel();
                self.lanes.rank(rank, RankCommand::Release { ticket, verdict, reply })?;
                self.held.released(rank, ticket);
                let run = Ask { limit: RELEASE_LIMIT, ..run };
                self.run_until(run, answer, Answer::Value)
            }
            Request::EdgePrepare { rank, incarnation } => {
                let (reply, answer) = oneshot::channel();
                self.lanes.edge(EdgeCommand::Prepare { rank, incarnation, reply })?;
                self.run_until(run, answer, |(input, output)| Answer::Coordinator(input, output))
            }
            Request::EdgePublish { ranks, frames } => {
                self.lanes.edge(EdgeCommand::Publish { ranks, frames })?;
                Begun::Done(Answer::Done)
            }
            Request::EdgeNote { wave, running } => {
                // Kept here; the edge task wants to know if there is one.
                if self.services.edge.is_some() {
                    self.lanes.edge(EdgeCommand::Note { wave, running })?;
                }
                Begun::Done(Answer::Done)
            }
            Request::EdgeClose { rank, incarnation } => {
                self.lanes.edge(EdgeCommand::Close { rank, incarnation })?;
                Begun::Done(Answer::Done)
            }
            Request::Expect { rank, incarnation, init } => {
                let listen = self.options.listen;
                let expectation = Expectation { rank, incarnation, listen, init };
                let (reply, answer) = oneshot::channel();
                self.lanes.handshake(HandshakeCommand::Expect { expectation, reply })?;
                self.run_until(run, answer, Answer::Address)
            }
            Request::Forget { rank, incarnation } => {
                self.lanes.handshake(HandshakeCommand::Forget { rank, incarnation })?;
                Begun::Done(Answer::Done)
            }
            Request::Spawn { rank, incarnation, handshake } => {
                let (reply, answer) = oneshot::channel();
                self.lanes.processes(ProcessCommand::Spawn { rank, incarnation, handshake, reply })?;
                let run = Ask { after: After::Spawned(rank, incarnation), ..run };
                self.run_until(run, answer, Answer::Pid)
            }
            Request::StopEngine { rank } => {
                let (reply, answer) = oneshot::channel();
                self.lanes.processes(ProcessCommand::Stop { rank, reply })?;
                self.run_until(run, answer, done)
            }
            Request::Stage(request) => {
                let (reply, answer) = oneshot::channel();
                self.lanes.stage(StageCommand { request, reply })?;
                let run = Ask { limit: STAGE_LIMIT, ..run };
                self.run_until(run, answer, |state: StageState| Answer::Stage(Box::new(state)))
            }
            Request::Shutdown => {
                self.ending = true;
                Begun::Done(Answer::Done)
            }
        };
        self.known.requested(&noted);
        Ok(begun)
    }

    pub(super) fn run_until<T: Send + 'static>(
        &mut self,
        ask: Ask,
        answer: oneshot::Receiver<Result<T, HandleError>>,
        convert: impl FnOnce(T) -> Answer + Send + 'static,
    ) -> Begun {
        let Ask { session, id, limit, after } = ask;
        self.running_ids.insert((session, id));
        self.running.push(Box::pin(async move {
            let result = match timeout(limit, answer).await {
                Ok(Ok(Ok(value))) => Ok(convert(value)),
                Ok(Ok(Err(error))) => Err(error.to_string()),
                Ok(Err(_)) => Err("the task that should do it has ended".to_owned()),
                Err(_) => Err(format!("no answer within {limit:?}")),
            };
            Finished { session, id, after, result }
        }));
        Begun::Runs
    }

    pub(super) fn finished(&mut self, finished: Finished) {
        let Finished { session, id, after, result } = finished;
        self.running_ids.remove(&(session, id));
        let result = match (after, result) {
            (After::State, stage) => {
                let stage = match stage {
                    Ok(Answer::Stage(stage)) => Some(*stage),
                    _ => None,
                };
                Ok(Answer::State(Box::new(self.state(stage))))
            }
            (After::Prepared(rank, incarnation), Err(error)) => {
                self.known.not_prepared(rank, incarnation);
                Err(error)
            }
            (After::Route(rank, frontend, _), Ok(_)) if self.session != Some(session) => {
                // Who asked for it is dead: nobody would ever use it.
                let (reply, _) = oneshot::channel();
                if let Err(error) = self.lanes.rank(rank, RankCommand::CloseRoutes { frontend, reply }) {
                    tracing::warn!(error, "a route that nobody wants");
                }
                return;
            }
            (After::Route(rank, frontend, api_server), Ok(answer)) => {
                self.known.route_open(rank, frontend, api_server);
                Ok(answer)
            }
            (After::Spawned(rank, incarnation), Ok(Answer::Pid(pid))) => {
                self.known.spawned(rank, incarnation, pid);
                Ok(Answer::Pid(pid))
            }
            (_, result) => result,
        };
        self.respond(session, id, result);
    }

    /// Answers the asker, if it is still the one who is connected, and keeps the answer for it if it may have to
    /// ask again.
    pub(super) fn respond(&mut self, session: Uuid, id: u64, result: Result<Answer, String>) {
        if self.session != Some(session) {
            return;
        }
        let keep = !matches!(result, Ok(Answer::State(_)));
        let frame = encode(&Up::Answer { id, result }).or_else(|error| {
            encode(&Up::Answer { id, result: Err(format!("{}: {error}", self.options.name)) })
        });
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => return tracing::error!(error, "an answer of the link"),
        };
        if keep {
            self.recent_bytes += frame.len();
            self.recent.push_back((id, frame.clone()));
            while self.recent.len() > RECENT || self.recent_bytes > RECENT_BYTES {
                let Some((_, dropped)) = self.recent.pop_front() else {
                    break;
                };
                self.recent_bytes -= dropped.len();
            }
        }
        if let Some((connection, _)) = self.listener() {
            connection.wire.push(frame);
        }
    }

    pub(super) fn state(&self, stage: Option<StageState>) -> NodeState {
        let mut state = self.known.state();
        for handle in &self.services.ranks {
            let known = state.ranks.entry(handle.rank).or_default();
            known.snapshot = RankSnapshot { rank: handle.rank, ..handle.snapshot.borrow().clone() };
        }
        if let Some(edge) = &self.services.edge_state {
            let edge = edge.borrow();
            state.wave = edge.wave.or(state.wave);
            for (rank, known) in &mut state.ranks {
                known.subscribed =
                    known.prepared.is_some() && edge.subscribed.get(rank).copied() == known.prepared;
            }
        }
        state.stage = stage;
        state
    }
}
