//! Replays what vLLM's own `DPCoordinatorProc` did (`scripts/coordinator_reference.py`) into the
//! machine: every READY, START_DP_WAVE and publish must be the same, publish times included.
//!
//! `COORDINATOR_TRACE=<file>` replays another trace, such as one of another vLLM version.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::time::Duration;

use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::machine::coordinator::{Action, Config, Coordinator, Event, Exclude, Report, Stamp};
use dp_sidecar_protocol::stats::Load;
use dp_sidecar_protocol::wave::Publication;
use dp_sidecar_protocol::{EngineIndex, GroupKind, Incarnation, Time, Wave};
use serde_json::{Value, json};

const LIFE: Incarnation = Incarnation(1);

struct Replay {
    machine: Coordinator,
    now: Time,
    back: Vec<Value>,
    front: Vec<Value>,
}

impl Replay {
    fn handle(&mut self, event: Event) {
        self.machine.handle_event(self.now, event);
        self.drain(None);
        self.publish_due(self.now, None);
    }

    fn sleep(&mut self, time: Duration) {
        let begin = self.now;
        self.publish_due(begin + time, Some(begin));
        self.now = begin + time;
    }

    fn publish_due(&mut self, end: Time, begin: Option<Time>) {
        while let Some(due) = self.machine.poll_timeout().filter(|due| *due <= end) {
            self.now = due;
            self.machine.handle_timeout(due);
            self.drain(begin);
        }
    }

    fn drain(&mut self, begin: Option<Time>) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::SendReady { .. } => self.back.push(json!({"ready": true})),
                Action::SendStartWave { wave, exclude } => {
                    let exclude = match exclude {
                        None => Value::Null,
                        Some(Exclude::Index(rank)) => json!(rank.0),
                        Some(Exclude::Identity(id)) => json!({"identity": id.index().0}),
                    };
                    self.back.push(json!({"wave": wave.0, "exclude": exclude}));
                }
                Action::Note(_) => {}
                other => panic!("{other:?} without frontends"),
            }
        }
        while let Some(Publication { counts, wave, running }) = self.machine.poll_publication() {
            let counts = counts.map(|counts| {
                let entry = |l: &Load| json!([l.waiting, l.running, l.kv_cache_usage]);
                counts.iter().map(entry).collect::<Vec<_>>()
            });
            let mut message = json!({"counts": counts, "wave": wave.0, "running": running});
            if let Some(begin) = begin {
                let after = u64::try_from((self.now - begin).as_millis()).unwrap();
                message["after_ms"] = json!(after);
            }
            self.front.push(message);
        }
    }

    fn event(&mut self, event: &Value) {
        let rank = || EngineIndex(event["rank"].as_u64().unwrap().try_into().unwrap());
        let wave = |value: &Value| value.as_u64().map(Wave);
        match event["kind"].as_str().unwrap() {
            "sleep" => self.sleep(Duration::from_millis(event["ms"].as_u64().unwrap())),
            "subscribe" => self.handle(Event::Subscribed { rank: rank(), incarnation: LIFE }),
            "first_request" => {
                let index = |value: &Value| EngineIndex(value.as_u64().unwrap().try_into().unwrap());
                let target = match &event["target"] {
                    Value::Null => None,
                    Value::Object(map) => Some(Exclude::Identity(index(&map["identity"]).identity())),
                    number => Some(Exclude::Index(index(number))),
                };
                let wave = wave(&event["wave"]).unwrap();
                self.handle(Event::FirstRequest { target, wave });
            }
            "report" => {
                let stats = event["stats"].as_array().map(|stats| {
                    let load = Load {
                        waiting: stats[0].as_u64().unwrap(),
                        running: stats[1].as_u64().unwrap(),
                        kv_cache_usage: stats[2].as_f64().unwrap(),
                    };
                    let stamp = Stamp { wave: wave(&stats[3]).unwrap(), step: stats[4].as_u64().unwrap() };
                    (load, stamp)
                });
                let report = Report {
                    stats,
                    wave_complete: wave(&event["wave_complete"]),
                    start_wave: wave(&event["start_wave"]),
                };
                self.handle(Event::Report { rank: rank(), incarnation: LIFE, report });
            }
            other => panic!("unknown event {other}"),
        }
    }
}

#[test]
fn the_machine_does_what_the_real_dp_coordinator_did() {
    let path = std::env::var_os("COORDINATOR_TRACE").map_or_else(
        || {
            let package = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
            package.join("golden/vllm-0.32.0/coordinator.trace.json")
        },
        PathBuf::from,
    );
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let version: Vec<u16> =
        trace["vllm"].as_str().unwrap().split('.').map(|number| number.parse().unwrap()).collect();
    let layout = Layout::closest(VllmVersion::new(0, version[1], version[2]));
    let mut steps = 0;
    for run in trace["runs"].as_array().unwrap() {
        let kind = if run["wave_coordination"].as_bool().unwrap() {
            GroupKind::Lockstep
        } else {
            GroupKind::Independent
        };
        let size = run["engines"].as_u64().unwrap().try_into().unwrap();
        let mut replay = Replay {
            machine: Coordinator::new(Config::upstream(kind, size, layout)),
            now: Time::from_millis(1_000_000_000),
            back: Vec::new(),
            front: Vec::new(),
        };
        for (number, step) in run["steps"].as_array().unwrap().iter().enumerate() {
            if step["event"].is_null() {
                for rank in (0..size).map(EngineIndex) {
                    replay.handle(Event::Subscribed { rank, incarnation: LIFE });
                }
            } else {
                replay.event(&step["event"]);
            }
            let here = format!("seed {}, step {number}, {}", run["seed"], step["event"]);
            let back = Value::Array(std::mem::take(&mut replay.back));
            let front = Value::Array(std::mem::take(&mut replay.front));
            assert_eq!(back, step["back"], "to the engines: {here}");
            assert_eq!(front, step["front"], "to the frontends: {here}");
            steps += 1;
        }
    }
    assert!(steps >= 300, "the trace has only {steps} steps");
}
