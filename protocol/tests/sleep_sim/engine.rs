//! An engine that sleeps, as vLLM 0.32.0 has it: `EngineCore`, the executor's tags, and what the workers' memory holds.

use std::collections::{BTreeSet, VecDeque};

use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::request::{FrontendMessage, check_frontend_message};
use dp_sidecar_protocol::{CallId, Frames, Slot};
use rmpv::Value;

use super::law;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Weights {
    /// Of this version of the sidecar's.
    Good(u64),
    /// Of a trainer.
    Own,
    #[default]
    Garbage,
}

#[derive(Debug, Default)]
pub(super) struct Engine {
    pub(super) life: u64,
    pub(super) weights: Weights,
    pub(super) inbox: VecDeque<(Slot, Frames)>,
    pub(super) paused: bool,
    pub(super) asleep: BTreeSet<&'static str>,
    pub(super) requests: Vec<(Slot, String)>,
    /// A sleep has discarded weights, and a trainer has loaded its own, in the last turn.
    pub(super) emptied: bool,
    pub(super) own_load: bool,
}

pub(super) enum Said {
    Answer { slot: Slot, call_id: CallId, result: Result<Value, String> },
    Finished { slot: Slot, id: String },
    Broken(&'static str),
}

impl Engine {
    pub(super) fn serves(&self, version: u64) -> bool {
        !self.paused
            && self.asleep.is_empty()
            && self.weights == Weights::Good(version)
            && self.requests.is_empty()
    }

    /// Reads a message and computes what it may. `fails`: the call fails; `next`: what an update brings.
    pub(super) fn turn(&mut self, fails: bool, next: u64) -> Vec<Said> {
        let mut said = Vec::new();
        if let Some((slot, frames)) = self.inbox.pop_front() {
            match check_frontend_message(&Layout::newest(), &frames).unwrap() {
                FrontendMessage::Add(add) => self.requests.push((slot, add.request_id.to_owned())),
                FrontendMessage::Abort(_) => {}
                FrontendMessage::Utility(call) => {
                    let args = call.decode_args();
                    let result = match (fails, call.method) {
                        (true, "sleep" | "wake_up") => Err("injected".to_owned()),
                        _ => self.invoke(call.method, &args, next, &mut said),
                    };
                    said.push(Said::Answer { slot, call_id: call.call_id, result });
                }
            }
        }
        if !self.paused {
            for (slot, id) in std::mem::take(&mut self.requests) {
                if !self.asleep.is_empty() {
                    said.push(Said::Broken(law::THERE));
                } else if self.weights == Weights::Garbage {
                    said.push(Said::Broken(law::GARBAGE));
                }
                said.push(Said::Finished { slot, id });
            }
        }
        said
    }

    fn invoke(
        &mut self,
        method: &str,
        args: &[Value],
        next: u64,
        said: &mut Vec<Said>,
    ) -> Result<Value, String> {
        match method {
            "pause_scheduler" => self.paused = true,
            "resume_scheduler" => self.paused = false,
            "sleep" => {
                let level = args.first().and_then(Value::as_u64).unwrap_or(1);
                if args.get(1).and_then(Value::as_str) != Some("keep") {
                    let aborted = std::mem::take(&mut self.requests).into_iter();
                    said.extend(aborted.map(|(slot, id)| Said::Finished { slot, id }));
                }
                self.paused = true;
                if level > 0 && !self.asleep.contains("weights") {
                    self.asleep.extend(["weights", "kv_cache"]);
                    if level > 1 {
                        (self.weights, self.emptied) = (Weights::Garbage, true);
                    }
                }
            }
            "wake_up" => {
                let tags = args.first().and_then(Value::as_array);
                let tags: Option<Vec<&str>> =
                    tags.map(|tags| tags.iter().filter_map(Value::as_str).collect());
                match tags {
                    None => self.asleep.clear(),
                    Some(mut tags) => {
                        tags.retain(|tag| *tag != "scheduling");
                        if tags.iter().all(|tag| self.asleep.contains(tag)) {
                            self.asleep.retain(|tag| !tags.contains(tag));
                        }
                    }
                }
                self.paused &= !self.asleep.is_empty();
                return Ok(Value::from(self.asleep.is_empty()));
            }
            "collective_rpc" if args[0].as_str() == Some("dp_sidecar_load") => {
                if self.asleep.contains("weights") {
                    said.push(Said::Broken(law::THERE));
                }
                self.weights = Weights::Good(next);
                let report = vec![("ok".into(), true.into()), ("state".into(), "loaded".into())];
                return Ok(Value::Array(vec![Value::Map(report)]));
            }
            "collective_rpc" => {
                if self.asleep.contains("weights") {
                    return Err("an illegal memory access".to_owned());
                }
                (self.weights, self.own_load) = (Weights::Own, true);
            }
            other => panic!("{other}"),
        }
        Ok(Value::Nil)
    }
}
