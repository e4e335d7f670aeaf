//! What a connection reports first: everything that was missed while there was none.

use super::*;

impl Task {
    /// The first answer on a connection: what was missed is reported.
    pub(super) fn state(&mut self, state: NodeState) -> Result<(), Full> {
        let first = !std::mem::replace(&mut self.ever_connected, true);
        for rank in self.views.keys().copied().collect::<Vec<_>>() {
            let known = state.ranks.get(&rank).cloned().unwrap_or_default();
            self.rank_state(rank, known, first)?;
        }
        let gone: Vec<RouteKey> = self
            .routes
            .iter()
            .filter(|((rank, frontend, api_server), route)| {
                let known =
                    state.ranks.get(rank).is_some_and(|r| r.routes.contains(&(*frontend, *api_server)));
                route.open && !known
            })
            .map(|(key, _)| *key)
            .collect();
        for key in gone {
            if let Some(route) = self.routes.remove(&key) {
                self.report_loss(key, route, "it was lost while the link was down");
            }
        }
        if let Some((wave, running)) = self.note
            && state.wave != self.note
        {
            self.ask(Asked::client(Request::EdgeNote { wave, running }));
        }
        let taken = self.sinks.state(state);
        tracing::debug!(peer = self.options.name, "link made");
        self.publish.send_modify(|status| {
            status.connected = true;
            status.detail = None;
        });
        taken
    }

    pub(super) fn rank_state(
        &mut self,
        rank: EngineIndex,
        state: RankReport,
        first: bool,
    ) -> Result<(), Full> {
        let Some(view) = self.views.get_mut(&rank) else {
            return Ok(());
        };
        view.publish.send_replace(RankSnapshot { rank, ..state.snapshot });
        if first {
            view.known = state.prepared;
            view.registered = state.registered.is_some();
            view.subscribed = state.subscribed;
            view.wave_report = state.wave_report;
            return Ok(());
        }
        let Some(incarnation) = view.known else {
            return Ok(());
        };
        if state.prepared != Some(incarnation) {
            view.forget();
            let reason = state.lost.filter(|(of, _)| *of == incarnation).map(|(_, reason)| reason);
            let reason = reason.unwrap_or_else(|| format!("its sockets are gone from {}", self.options.name));
            return self.sinks.rank(RankEvent::Lost { rank, incarnation, reason });
        }
        if let Some(frame) = state.registered
            && !std::mem::replace(&mut view.registered, true)
        {
            self.sinks.rank(RankEvent::Registered { rank, incarnation, frame })?;
        }
        if state.subscribed && !std::mem::replace(&mut view.subscribed, true) {
            self.sinks.edge(EdgeEvent::Subscribed { rank, incarnation })?;
        }
        if let Some(frame) = state.wave_report
            && view.wave_report.as_ref() != Some(&frame)
        {
            view.wave_report = Some(frame.clone());
            self.sinks.edge(EdgeEvent::Report { rank, incarnation, frame })?;
        }
        Ok(())
    }

    pub(super) fn report_loss(&mut self, key: RouteKey, route: Route, reason: &str) {
        let (rank, frontend, api_server) = key;
        let loss = RouteLost { frontend, rank, api_server, reason: reason.to_owned() };
        if let Err(mpsc::error::TrySendError::Full(loss)) = route.lost.try_send(loss) {
            self.reports.spawn(async move {
                if tokio::time::timeout(LOSS_LIMIT, route.lost.send(loss.clone())).await.is_err() {
                    tracing::error!(?loss, "the attachment does not take the loss of a route");
                }
            });
        }
    }
}
