//! What a node's state says to a DP coordinator that takes over.

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::coordinator::Adopted;
use dp_sidecar_protocol::output::OutputsView;

use crate::driver::handles::CoordinatorCommand;
use crate::driver::handles::{NodeState, RankReport};

/// [`CoordinatorCommand::Adopt`] for a node that was connected (again). Only those ranks are named that are to be adopted:
/// engines that are given up are of no interest, and `EngineDown` tells of engines that were known before.
pub fn adoption(state: &NodeState, ranks: impl Fn(EngineIndex) -> bool) -> CoordinatorCommand {
    let report = |rank: &RankReport| OutputsView::parse(rank.wave_report.as_deref()?).ok()?.wave_edge();
    let reported = state.ranks.values().filter_map(report);
    let wave = state.wave.into_iter().chain(reported).max();
    let engines = state.ranks.iter().filter(|(rank, of)| ranks(**rank) && of.subscribed);
    let engines = engines.filter_map(|(&rank, of)| {
        let incarnation = of.prepared?;
        let ready = of.facts.is_some();
        Some(Adopted { rank, incarnation, ready, admitted: ready && of.snapshot.admitted })
    });
    CoordinatorCommand::Adopt { wave, engines: engines.collect() }
}

#[cfg(test)]
mod tests {
    use dp_sidecar_protocol::layout::Layout;
    use dp_sidecar_protocol::output::{start_wave_message, wave_complete_message};
    use dp_sidecar_protocol::{Incarnation, Wave};

    use super::*;
    use crate::driver::handles::EngineFacts;

    #[test]
    fn the_newest_wave_counts_whoever_spoke_of_it() {
        let layout = Layout::newest();
        let mut rank = RankReport { prepared: Some(Incarnation(4)), ..RankReport::default() };
        rank.wave_report = Some(wave_complete_message(&layout, EngineIndex(0), Wave(8), 0.0));
        let mut ready = RankReport { facts: Some(EngineFacts::of(layout)), subscribed: true, ..rank.clone() };
        ready.wave_report = Some(start_wave_message(&layout, EngineIndex(1), Wave(7), 0.0));
        ready.snapshot.admitted = true;
        let waiting = RankReport { subscribed: true, wave_report: None, ..rank.clone() };
        let ranks = [rank, ready.clone(), waiting, ready];
        let ranks = (0..).map(EngineIndex).zip(ranks).collect();
        let state = NodeState { ranks, wave: Some((Wave(6), true)), ..NodeState::default() };
        let CoordinatorCommand::Adopt { wave, engines } = adoption(&state, |rank| rank.0 < 3) else {
            panic!("another command");
        };
        assert_eq!(wave, Some((Wave(9), false)));
        let adopted = |rank, ready| Adopted {
            rank: EngineIndex(rank),
            incarnation: Incarnation(4),
            ready,
            admitted: ready,
        };
        assert_eq!(engines, [adopted(1, true), adopted(2, false)]);
    }
}
