//! How a running update is shown: bars and lines on a terminal, plain lines elsewhere, or its events as JSON.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::weight_update::{NodeId, Phase, RankProgress};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::client::print_line;
use crate::api::{StageProgress, UpdateEvent, UpdateProgress};

/// Between two pictures.
const TICK: Duration = Duration::from_millis(120);

/// Shows the steps of an update.
pub(super) struct View {
    kind: Kind,
    last: Option<UpdateProgress>,
}

enum Kind {
    Bars(Box<Bars>),
    Lines,
    /// Events as JSON lines on stdout.
    Events,
}

struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    nodes: BTreeMap<NodeId, ProgressBar>,
    engines: BTreeMap<EngineIndex, ProgressBar>,
}

impl View {
    pub(super) fn new(events: bool) -> Self {
        let kind = if events {
            Kind::Events
        } else if std::io::stderr().is_terminal() {
            Kind::Bars(Box::new(Bars::new(ProgressDrawTarget::stderr())))
        } else {
            Kind::Lines
        };
        Self { kind, last: None }
    }

    pub(super) fn show(&mut self, step: &UpdateProgress) {
        // A repetition only says that the sidecar lives.
        if self.last.as_ref() == Some(step) {
            return;
        }
        match &mut self.kind {
            Kind::Bars(bars) => bars.show(step),
            Kind::Events => {
                let Some(event) = &step.event else {
                    return;
                };
                print_line(event);
            }
            // Not every byte count gets a line, every phase and message does.
            Kind::Lines => {
                let new = |of: fn(&UpdateProgress) -> &str| {
                    self.last.as_ref().is_none_or(|last| of(last) != of(step))
                };
                if new(|step| &step.phase) || new(|step| &step.message) {
                    eprintln!("{}: {}{}", step.phase, step.message, share(step));
                }
            }
        }
        self.last = Some(step.clone());
    }

    pub(super) fn end(&self) {
        if let Kind::Bars(bars) = &self.kind {
            bars.end();
        }
    }
}

impl Bars {
    fn new(target: ProgressDrawTarget) -> Self {
        let all = MultiProgress::with_draw_target(target);
        let head = all.add(ProgressBar::new_spinner());
        head.set_style(style("{spinner} {msg}  {elapsed}"));
        head.enable_steady_tick(TICK);
        Self { all, head, nodes: BTreeMap::new(), engines: BTreeMap::new() }
    }

    fn show(&mut self, step: &UpdateProgress) {
        match &step.event {
            Some(UpdateEvent::Staging { node, name, progress, rate }) => {
                self.head.set_message(step.phase.clone());
                self.node(*node, name, progress, *rate);
            }
            Some(UpdateEvent::Progress { phase, ranks }) => {
                self.head.set_message(phase.to_string());
                if *phase != Phase::Staging {
                    for (rank, state) in ranks {
                        self.engine(*rank, *state);
                    }
                }
            }
            Some(UpdateEvent::Hashing { .. }) | None => {
                self.head.set_message(format!("{}  {}{}", step.phase, step.message, share(step)));
            }
        }
    }

    fn node(&mut self, node: NodeId, name: &str, progress: &StageProgress, rate: u64) {
        let all = &self.all;
        let bar = self.nodes.entry(node).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(progress.total));
            bar.set_style(style("  {prefix:20} [{bar:30}] {bytes} of {total_bytes}  {msg}"));
            bar.set_prefix(name.to_owned());
            bar
        });
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(staged(progress, rate));
    }

    fn engine(&mut self, rank: EngineIndex, state: RankProgress) {
        let all = &self.all;
        let line = self.engines.entry(rank).or_insert_with(|| {
            let line = all.add(ProgressBar::new_spinner());
            line.set_style(style("  {prefix:8} {msg}  {elapsed}"));
            line.set_prefix(format!("rank {rank}"));
            // The time goes on while the state stays.
            line.enable_steady_tick(TICK);
            line
        });
        let words = state.to_string();
        if line.message() != words {
            line.reset_elapsed();
            line.set_message(words);
        }
    }

    fn end(&self) {
        for bar in self.nodes.values().chain(self.engines.values()) {
            bar.finish_and_clear();
        }
        self.head.finish_and_clear();
    }
}

/// Chunks, rate, and what did not have to travel.
fn staged(progress: &StageProgress, rate: u64) -> String {
    let mut text = format!("{} of {} chunks", progress.chunks.done, progress.chunks.total);
    if rate > 0 {
        text.push_str(&format!(", {}/s", indicatif::HumanBytes(rate)));
    }
    if progress.reused > 0 {
        text.push_str(&format!(", {} unchanged", indicatif::HumanBytes(progress.reused)));
    }
    text
}

fn share(step: &UpdateProgress) -> String {
    if step.total == 0 { String::new() } else { format!(" ({} of {})", step.done, step.total) }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
        .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use indicatif::TermLike;
    use parking_lot::Mutex;

    use super::*;
    use crate::api::Chunks;

    /// A terminal that keeps what is written.
    #[derive(Clone, Debug, Default)]
    struct Terminal(Arc<Mutex<Vec<String>>>);

    impl TermLike for Terminal {
        fn width(&self) -> u16 {
            120
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().push(text.to_owned());
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn the_time_of_a_rank_goes_on_while_its_state_stays() {
        let terminal = Terminal::default();
        let mut bars = Bars::new(ProgressDrawTarget::term_like(Box::new(terminal.clone())));
        bars.engine(EngineIndex(0), RankProgress::Loading);
        let shown = async {
            while !terminal.0.lock().iter().any(|line| line.contains("rank 0") && line.contains(" 1s")) {
                tokio::time::sleep(TICK).await;
            }
        };
        let shown = tokio::time::timeout(Duration::from_secs(10), shown).await;
        assert!(shown.is_ok(), "{:?}", terminal.0.lock());
        bars.end();
    }

    #[test]
    fn chunks_rate_and_reuse_are_told() {
        let mut progress = StageProgress { chunks: Chunks { done: 3, total: 8 }, ..StageProgress::default() };
        assert_eq!(staged(&progress, 0), "3 of 8 chunks");
        progress.reused = 1024;
        assert_eq!(staged(&progress, 2 << 20), "3 of 8 chunks, 2.00 MiB/s, 1.00 KiB unchanged");
    }
}
