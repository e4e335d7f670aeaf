//! Verbs of the DP coordinator's scripts.

use std::time::Duration;

use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::machine::coordinator::{
    Action, Adopted, Config, Coordinator, Event, Exclude, Report, Stamp,
};
use dp_sidecar_protocol::stats::Load;
use dp_sidecar_protocol::wave::Publication;
use dp_sidecar_protocol::{EngineIndex, FrontendId, GroupKind, Incarnation, Time, Wave};

use super::{Line, Script};

#[derive(Default)]
pub(crate) struct Coordinated {
    machine: Option<Coordinator>,
    now: Time,
    size: u16,
}

impl Script for Coordinated {
    fn line(&mut self, line: &Line<'_>) -> Vec<String> {
        match line.verb {
            "new" => self.new_machine(line),
            "sleep" => return self.sleep(Duration::from_millis(line.required("ms"))),
            "state" => return vec![self.state()],
            "subscribe-all" => {
                for rank in (0..self.size).map(EngineIndex) {
                    let incarnation = Incarnation(line.required("life"));
                    self.handle(Event::Subscribed { rank, incarnation });
                }
            }
            "admit-all" => {
                for rank in (0..self.size).map(EngineIndex) {
                    self.handle(Event::Admitted { rank });
                }
            }
            _ => self.handle(event(line)),
        }
        self.drain()
    }
}

impl Coordinated {
    fn new_machine(&mut self, line: &Line<'_>) {
        self.size = line.required("size");
        let kind = match line.text("kind") {
            Some("independent") => GroupKind::Independent,
            _ => GroupKind::Lockstep,
        };
        let minor = line.number("minor").unwrap_or(32);
        let patch = line.number("patch").unwrap_or(1);
        let layout = Layout::closest(VllmVersion::new(0, minor, patch));
        let mut config = Config::hosted(kind, self.size);
        config.layout = layout;
        if line.text("upstream").is_some() {
            config = Config::upstream(kind, self.size, layout);
        }
        config.upstream.publish |= line.text("publish").is_some();
        config.wave = Wave(line.number("wave").unwrap_or(0));
        self.machine = Some(Coordinator::new(config));
    }

    fn machine(&mut self) -> &mut Coordinator {
        self.machine.as_mut().expect("a script begins with new")
    }

    fn handle(&mut self, event: Event) {
        let now = self.now;
        self.machine().handle_event(now, event);
    }

    fn drain(&mut self) -> Vec<String> {
        let machine = self.machine();
        let mut output: Vec<String> =
            std::iter::from_fn(|| machine.poll_action().map(|action| show(&action))).collect();
        output.extend(std::iter::from_fn(|| machine.poll_publication().map(show_publication)));
        output
    }

    fn sleep(&mut self, time: Duration) -> Vec<String> {
        let end = self.now + time;
        let mut output = Vec::new();
        while let Some(due) = self.machine().poll_timeout().filter(|due| *due <= end) {
            self.now = due.max(self.now);
            let now = self.now;
            self.machine().handle_timeout(now);
            for action in self.drain() {
                let at = now.since_start().as_millis();
                output.push(format!("at {at} ms: {action}"));
            }
        }
        self.now = end;
        output
    }

    fn state(&mut self) -> String {
        let state = self.machine().snapshot();
        format!(
            "wave={} running={} subscribed={} in-step={} loads={}",
            state.wave,
            state.running,
            state.subscribed,
            state.in_step,
            loads(&state.loads)
        )
    }
}

fn event(line: &Line<'_>) -> Event {
    let rank = || EngineIndex(line.required("rank"));
    let incarnation = || Incarnation(line.number("life").unwrap_or(1));
    let frontend = || FrontendId(line.required("frontend"));
    let wave = || Wave(line.required("wave"));
    let report = |report| Event::Report { rank: rank(), incarnation: incarnation(), report };
    match line.verb {
        "subscribe" => Event::Subscribed { rank: rank(), incarnation: incarnation() },
        "stats" => {
            let load = Load {
                waiting: line.required("waiting"),
                running: line.required("running"),
                kv_cache_usage: line.number("kv").unwrap_or(0.0),
            };
            let stamp = Stamp {
                wave: Wave(line.number("wave").unwrap_or(0)),
                step: line.number("step").unwrap_or(0),
            };
            report(Report::stats(load, stamp))
        }
        "wave-complete" => report(Report::wave_complete(wave())),
        "start-wave" => report(Report::start_wave(wave())),
        "start-wave-and-wave-complete" => {
            report(Report { wave_complete: Some(wave()), ..Report::start_wave(wave()) })
        }
        "first-request" => {
            let target = match line.text("target") {
                None | Some("none") => None,
                Some(text) => Some(match text.strip_prefix("identity:") {
                    Some(rank) => Exclude::Identity(EngineIndex(rank.parse().unwrap()).identity()),
                    None => Exclude::Index(EngineIndex(text.parse().unwrap())),
                }),
            };
            Event::FirstRequest { target, wave: wave() }
        }
        // engines=RANK:LIFE[:ready|:admitted],..
        "adopt" => {
            let engines = line.text("engines").into_iter().flat_map(|list| list.split(','));
            Event::Adopted { wave: wave(), engines: engines.map(adopted).collect() }
        }
        "frontend-start-wave" => Event::StartWave { frontend: frontend(), wave: wave() },
        "wake" => Event::Wake { rank: rank() },
        "admit" => Event::Admitted { rank: rank() },
        "down" => Event::EngineDown { rank: rank(), incarnation: incarnation() },
        "attach" => Event::FrontendAttached { frontend: frontend() },
        "detach" => Event::FrontendDetached { frontend: frontend() },
        other => panic!("unknown verb {other}"),
    }
}

fn adopted(text: &str) -> Adopted {
    let mut parts = text.split(':');
    let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok()).expect("RANK:LIFE");
    let (rank, life) = (u16::try_from(number()).unwrap(), number());
    let stage = parts.next();
    let admitted = stage == Some("admitted");
    Adopted {
        rank: EngineIndex(rank),
        incarnation: Incarnation(life),
        ready: admitted || stage == Some("ready"),
        admitted,
    }
}

fn show(action: &Action) -> String {
    match action {
        Action::SendReady { to } => {
            let ranks: Vec<String> = to.iter().map(EngineIndex::to_string).collect();
            format!("ready to {}", ranks.join(" "))
        }
        Action::SendStartWave { wave, exclude } => {
            let exclude = match exclude {
                None => "none".to_owned(),
                Some(Exclude::Index(rank)) => rank.to_string(),
                Some(Exclude::Identity(identity)) => format!("identity:{}", identity.index()),
            };
            format!("start-dp-wave wave={wave} exclude={exclude}")
        }
        Action::Forward { rank } => format!("forward as rank {rank}"),
        Action::Tell { frontend, rank, report } => {
            let to = frontend.map_or_else(|| "all".to_owned(), |id| format!("frontend {id}"));
            format!("tell {to} as rank {rank}: {}", show_report(report))
        }
        Action::Note(note) => format!("note {note:?}"),
    }
}

fn show_publication(Publication { counts, wave, running }: Publication) -> String {
    let counts = counts.as_deref().map_or_else(|| "none".to_owned(), loads);
    format!("publish counts={counts} wave={wave} running={running}")
}

fn show_report(report: &Report) -> String {
    if let Some((load, _)) = report.stats {
        format!("stats {}", loads(&[load]))
    } else if let Some(wave) = report.wave_complete {
        format!("wave-complete {wave}")
    } else if let Some(wave) = report.start_wave {
        format!("start-wave {wave}")
    } else {
        "nothing".to_owned()
    }
}

fn loads(loads: &[Load]) -> String {
    let loads: Vec<String> = loads
        .iter()
        .map(|load| format!("{}/{}/{}", load.waiting, load.running, load.kv_cache_usage))
        .collect();
    loads.join(",")
}
