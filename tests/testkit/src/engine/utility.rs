//! Utility calls (`EngineCoreProc._invoke_utility_method`).

use std::path::{Path, PathBuf};
use std::time::Instant;

use rmpv::Value;
use serde_json::json;

use super::EngineEnd;
use super::core::{Engine, FINISH_ABORT, PendingPause};
use super::group::Operation;
use super::memory;
use super::scheduler::PauseState;
use super::weights::{self, Hashing};
use crate::msg;

/// Version of the worker RPC between sidecar and shim.
pub const SHIM_PROTOCOL: u64 = 6;

/// What a method does with its call.
enum Outcome {
    /// Answers at once.
    Done(Result<Value, String>),
    /// Answers later.
    Deferred,
}

fn ok(value: impl Into<Value>) -> Outcome {
    Outcome::Done(Ok(value.into()))
}

fn fail(text: impl Into<String>) -> Outcome {
    Outcome::Done(Err(text.into()))
}

impl Engine {
    pub(crate) fn utility(&mut self, payload: &Value) -> Result<(), EngineEnd> {
        let parts = payload.as_array().filter(|parts| parts.len() == 4);
        let Some([client, call, method, args]) = parts.map(Vec::as_slice) else {
            let text = format!("UTILITY of {payload}");
            return Err(if self.options.version.at_least(27, 0) {
                EngineEnd::InputThread(text)
            } else {
                EngineEnd::Core(text)
            });
        };
        let method = method.as_str().unwrap_or_default().to_owned();
        if method == "handle_fault_tolerance" && self.options.version.at_least(27, 0) {
            return Err(EngineEnd::InputThread("handle_fault_tolerance without fault tolerance".to_owned()));
        }
        let args = match args.as_array() {
            Some(args) => args.clone(),
            None => return Err(EngineEnd::Core(format!("arguments of {method}: {args}"))),
        };
        self.reporter.report(
            "utility",
            json!({
                "rank": self.options.rank,
                "client_index": client.as_i64(),
                "method": method,
                "args": args.iter().map(msg::to_json).collect::<Vec<_>>(),
            }),
        );
        let client =
            client.as_i64().ok_or_else(|| EngineEnd::OutputThread(format!("client_index {client}")))?;
        let client = self.client(client)?;
        let outcome = self.invoke(&method, &args, client, call)?;
        match outcome {
            Outcome::Deferred => Ok(()),
            Outcome::Done(result) => {
                let result = result.map_err(|text| format!("Call to {method} method failed: {text}"));
                self.answer(client, call.clone(), result)
            }
        }
    }

    fn invoke(
        &mut self,
        method: &str,
        args: &[Value],
        client: usize,
        call: &Value,
    ) -> Result<Outcome, EngineEnd> {
        let version = self.options.version;
        let parameters = match method {
            "get_supported_tasks"
            | "is_scheduler_paused"
            | "resume_scheduler"
            | "is_sleeping"
            | "get_weight_version"
            | "reset_mm_cache"
            | "reset_encoder_cache"
            | "barrier"
            | "execute_dummy_batch"
            | "list_loras"
            | "compute_weight_checksums"
            | "shutdown"
            | "release_kv_cache_memory"
            | "get_kv_cache_group_metadata" => 0,
            "set_weight_version" | "wake_up" => 1,
            "pause_scheduler" | "pause_generation" | "reset_prefix_cache" | "sleep" => 2,
            "profile" | "save_sharded_state" => 3,
            "collective_rpc" => 4,
            _ => usize::MAX,
        };
        let exists = match method {
            "pause_generation" => version.has_pause_generation(),
            "set_weight_version" | "get_weight_version" => version.has_weight_version(),
            "barrier" => self.lockstep.is_some() && version.at_least(21, 0),
            "compute_weight_checksums" => version.stamps_weight_version(),
            _ => parameters != usize::MAX,
        };
        if !exists {
            let class = if self.lockstep.is_some() { "DPEngineCoreProc" } else { "EngineCoreProc" };
            return Ok(fail(format!("'{class}' object has no attribute '{method}'")));
        }
        if args.len() > parameters {
            return Ok(fail("too many arguments"));
        }
        let flag = |at: usize| args.get(at).and_then(Value::as_bool);
        Ok(match method {
            "get_supported_tasks" => ok(Value::Array(vec![Value::from("generate")])),
            "is_scheduler_paused" => ok(self.scheduler.pause != PauseState::Unpaused),
            "is_sleeping" => ok(self.memory.is_sleeping() || self.scheduler.pause != PauseState::Unpaused),
            "release_kv_cache_memory" => {
                Outcome::Done(self.release_cache(self.scheduler.pause != PauseState::Unpaused))
            }
            "get_weight_version" => ok(self.weight_version.as_str()),
            "set_weight_version" => match args.first().and_then(Value::as_str) {
                Some(label) => {
                    self.weight_version = label.to_owned();
                    ok(Value::Nil)
                }
                None => fail("set_weight_version needs a text"),
            },
            "pause_scheduler" | "pause_generation" => {
                let mode = args.first().and_then(Value::as_str).unwrap_or("abort");
                self.refusing = method == "pause_generation" && mode != "keep";
                self.pause(mode, client, call, 0)?
            }
            "sleep" if self.faults.sleep_fails => fail("ordered fault: sleep-fails"),
            "sleep" => {
                let mode = args.get(1).and_then(Value::as_str).unwrap_or("abort");
                let level = args.first().and_then(Value::as_u64).unwrap_or(1);
                self.pause(mode, client, call, level)?
            }
            "resume_scheduler" => self.resume()?,
            "wake_up" => {
                if !self.wake(memory::tags(args.first())) {
                    return Ok(ok(false));
                }
                match self.resume()? {
                    Outcome::Done(Ok(_)) => ok(true),
                    other => other,
                }
            }
            "reset_prefix_cache" => {
                let running = !self.scheduler.running.is_empty();
                ok(!self.faults.reset_false && (!running || flag(0) == Some(true)))
            }
            "barrier" => {
                self.collective(Operation::Barrier, false)?;
                ok(Value::Nil)
            }
            "compute_weight_checksums" => {
                let digest = Value::from(self.digest.as_str());
                ok(Value::Array(vec![msg::map([("whole", digest)])]))
            }
            "list_loras" | "get_kv_cache_group_metadata" => ok(Value::Array(Vec::new())),
            "shutdown" => return Err(EngineEnd::Core("shutdown() called by a client".to_owned())),
            "collective_rpc" => self.collective_rpc(args)?,
            _ => ok(Value::Nil),
        })
    }

    fn pause(&mut self, mode: &str, client: usize, call: &Value, sleep: u64) -> Result<Outcome, EngineEnd> {
        let state = match mode {
            "abort" | "wait" => PauseState::PausedNew,
            "keep" => PauseState::PausedAll,
            _ => return Ok(fail(format!("Invalid pause mode: {mode}"))),
        };
        if mode == "abort" {
            let all = self.scheduler.take_all();
            self.finish(all, FINISH_ABORT)?;
        }
        self.scheduler.pause = state;
        let complete = match &mut self.lockstep {
            Some(group) if self.options.version.pauses_by_consensus() => {
                group.pending_pause = true;
                group.running = true;
                false
            }
            Some(group) => !group.running && !self.scheduler.has_unfinished(),
            None => !self.scheduler.has_unfinished(),
        };
        if complete {
            if sleep > 0 {
                self.fall_asleep(sleep);
            }
            return Ok(ok(Value::Nil));
        }
        self.pauses.push(PendingPause { client, call: call.clone(), sleep });
        Ok(Outcome::Deferred)
    }

    fn resume(&mut self) -> Result<Outcome, EngineEnd> {
        let by_consensus = self.options.version.pauses_by_consensus();
        match &mut self.lockstep {
            None => {}
            Some(group) if by_consensus => {
                if group.pending_pause || (group.running && group.ignore_start) {
                    return Ok(fail("resume_scheduler called while pause is still in flight"));
                }
                if group.running {
                    return Ok(ok(Value::Nil));
                }
                group.ignore_start = false;
                self.scheduler.pause = PauseState::Unpaused;
                let unfinished = self.scheduler.has_unfinished();
                let unfinished = self.collective(Operation::Resume, unfinished)?;
                if let (Some(group), true) = (&mut self.lockstep, unfinished) {
                    group.running = true;
                }
            }
            Some(group) if !group.running && !self.scheduler.waiting.is_empty() => {
                group.running = true;
                let wave = group.wave;
                self.send_coordinator(|fields| fields[7] = Value::from(wave))?;
            }
            Some(_) => {}
        }
        self.scheduler.pause = PauseState::Unpaused;
        self.refusing = false;
        Ok(ok(Value::Nil))
    }

    /// `collective_rpc(method, timeout, args, kwargs)`; the engine has one worker.
    fn collective_rpc(&mut self, args: &[Value]) -> Result<Outcome, EngineEnd> {
        let method = args.first().and_then(Value::as_str).unwrap_or_default();
        let kwargs = args.get(3).unwrap_or(&Value::Nil);
        let one = |value: Value| ok(Value::Array(vec![value]));
        Ok(match method {
            "check_health" => one(Value::Nil),
            "dp_sidecar_info" if !self.faults.no_shim => one(self.info(kwargs)),
            "dp_sidecar_load" if !self.faults.no_shim => {
                let request = msg::get(kwargs, "request").cloned().unwrap_or(Value::Nil);
                let answer = self.load(&request)?;
                self.reporter
                    .report("load", json!({"rank": self.options.rank, "answer": msg::to_json(&answer)}));
                one(answer)
            }
            "dp_sidecar_lora" if !self.faults.no_shim => {
                let request = msg::get(kwargs, "request").cloned().unwrap_or(Value::Nil);
                let answer = self.lora(&request);
                self.reporter
                    .report("lora", json!({"rank": self.options.rank, "answer": msg::to_json(&answer)}));
                one(answer)
            }
            "reload_weights" => {
                self.touch("reload_weights", &["weights"])?;
                // Without a path the checkpoint of the command line.
                let path = msg::text(kwargs, "weights_path").map(PathBuf::from);
                match weights::identity(&path.or_else(|| self.options.model.clone()).unwrap_or_default()) {
                    Ok(digest) => {
                        self.set_digest(digest);
                        one(Value::Nil)
                    }
                    Err(error) => {
                        self.torn = true;
                        fail(error.to_string())
                    }
                }
            }
            "get_model" | "get_kv_cache_spec" => {
                return Err(EngineEnd::OutputThread(format!("the result of {method} cannot be serialized")));
            }
            method if self.worker_memory(method, args.get(2), kwargs) => one(Value::Nil),
            _ => fail(format!("Method '{method}' is not implemented.")),
        })
    }

    fn info(&self, kwargs: &Value) -> Value {
        let model = self.options.model.as_deref();
        let asked = msg::get(kwargs, "tensors").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let ignored = asked
            .iter()
            .filter_map(|tensor| tensor[0].as_str())
            .filter(|name| self.parameters.as_ref().is_some_and(|parameters| parameters.ignores(name)));
        let ignored = ignored.map(Value::from).collect::<Vec<_>>();
        let tied = self.parameters.as_ref().and_then(|parameters| parameters.tied());
        let tied = tied.map(|[copy, of]| Value::Array(vec![copy.into(), of.into()])).into_iter().collect();
        let path = msg::text(kwargs, "path");
        let files = path.as_deref().map(Path::new).or(model).map(weights::files).transpose();
        let error = files.as_ref().err().map(|error| Value::from(error.text.as_str()));
        let files = files.as_ref().ok().and_then(Option::as_ref);
        let files = files.map(|files| Value::Array(files.iter().map(|file| file.as_str().into()).collect()));
        let model = model.map(|path| path.to_string_lossy().into_owned());
        let shim = self.faults.shim_version.as_deref();
        msg::map([
            ("ok", Value::from(error.is_none())),
            ("protocol", Value::from(self.faults.shim_protocol.unwrap_or(SHIM_PROTOCOL))),
            ("shim_version", Value::from(shim.unwrap_or(env!("CARGO_PKG_VERSION")))),
            ("model_path", model.map_or(Value::Nil, Value::from)),
            ("vllm_version", Value::from(self.options.version.to_string())),
            ("load_format", Value::from("auto")),
            ("files", files.unwrap_or(Value::Nil)),
            ("tied", Value::Array(tied)),
            ("ignored", Value::Array(ignored)),
            ("draft", Value::Nil),
            ("kv_connectors", Value::Array(Vec::new())),
            ("max_lora_rank", Value::from(16)),
            ("dp_rank", Value::from(self.options.rank)),
            ("rank", Value::from(0)),
            ("error_kind", error.as_ref().map_or(Value::Nil, |_| Value::from("internal"))),
            ("error", error.unwrap_or(Value::Nil)),
        ])
    }

    fn speaks(&self, protocol: Option<u64>) -> bool {
        protocol == Some(self.faults.shim_protocol.unwrap_or(SHIM_PROTOCOL))
    }

    fn raises(&self, loaded: &weights::Loaded) -> Option<String> {
        self.parameters.as_ref()?.refuses(&loaded.contents)
    }

    /// `dp_sidecar_load`: reads the directory or the segment and compares with the request.
    fn load(&mut self, request: &Value) -> Result<Value, EngineEnd> {
        let began = Instant::now();
        self.block(self.options.load)?;
        self.hang()?;
        self.loads += 1;
        let number = |key: &str| msg::get(request, key).and_then(Value::as_u64);
        let path = msg::text(request, "path").unwrap_or_default();
        let files = msg::texts(request, "files").unwrap_or_default();
        let wanted = msg::text(request, "digest");
        let hashing = msg::text(request, "digest_kind").as_deref() == Some("blake3");

        let (mut consumed, mut mixed) = (None, None);
        let verdict: Result<(), (&str, String, &str)> = if !self.speaks(number("protocol")) {
            Err(("protocol", format!("request {request}"), "unchanged"))
        } else if path.is_empty() {
            Err(("request", format!("request {request}"), "unchanged"))
        } else if let Some(state) = self
            .faults
            .load_fails
            .clone()
            .filter(|_| self.faults.load_times.is_none_or(|times| self.loads <= times))
        {
            let state = match state.as_str() {
                "unchanged" => "unchanged",
                "mixed" => "mixed",
                _ => "restored-meta",
            };
            Err(("injected", "ordered fault: load-fails".to_owned(), state))
        } else {
            let hashes = if hashing { Hashing::Whole } else { Hashing::Identity };
            let extents = extents(request);
            match weights::parts(std::path::Path::new(&path), &files, extents.as_deref())
                .and_then(|parts| self.loader.load(&parts, hashes))
            {
                Err(error) if matches!(error.kind, "request" | "files") => {
                    Err((error.kind, error.to_string(), "unchanged"))
                }
                Err(error) => Err((error.kind, error.to_string(), "restored-meta")),
                // Counted before the loader is asked.
                Ok(loaded)
                    if number("tensors") != Some(loaded.tensors) || number("bytes") != Some(loaded.bytes) =>
                {
                    let text = format!("{} tensors of {} bytes", loaded.tensors, loaded.bytes);
                    Err(("mismatch", text, "unchanged"))
                }
                Ok(mut loaded) => {
                    self.touch("a load", &["weights"])?;
                    loaded.rename(&renames(request));
                    let raised = self.raises(&loaded);
                    if self.parameters.as_ref().is_some_and(|model| model.keeps_some(&loaded.contents)) {
                        mixed = Some(weights::mixed(&self.digest, &loaded.digest));
                    }
                    if self.faults.load_wrong_digest && hashing {
                        loaded.digest = "0".repeat(64);
                    } else if self.faults.load_wrong_digest {
                        loaded.tensors -= 1;
                    }
                    let same = number("tensors") == Some(loaded.tensors)
                        && number("bytes") == Some(loaded.bytes)
                        && (!hashing || wanted.is_none() || wanted.as_ref() == Some(&loaded.digest));
                    consumed = Some(loaded);
                    if let Some(error) = raised {
                        Err(("load", error, "restored-meta"))
                    } else if same {
                        Ok(())
                    } else {
                        Err((
                            "mismatch",
                            "what was read is not what the request says".to_owned(),
                            "restored-meta",
                        ))
                    }
                }
            }
        };
        let (state, error, kind) = match verdict {
            Ok(()) => ("loaded", Value::Nil, Value::Nil),
            Err((kind, text, state)) => (state, Value::from(text), Value::from(kind)),
        };
        match (state, &consumed) {
            ("loaded", Some(loaded)) => {
                self.torn = false;
                self.set_digest(mixed.unwrap_or_else(|| loaded.digest.clone()));
            }
            ("unchanged", _) => {}
            _ => self.torn = true,
        }
        let tensors = consumed.as_ref().map_or(0, |loaded| loaded.tensors);
        let bytes = consumed.as_ref().map_or(0, |loaded| loaded.bytes);
        let digest = consumed.filter(|_| hashing).map(|loaded| loaded.digest);
        Ok(msg::map([
            ("ok", Value::from(state == "loaded")),
            ("protocol", Value::from(SHIM_PROTOCOL)),
            ("update_id", msg::get(request, "update_id").cloned().unwrap_or(Value::Nil)),
            ("dp_rank", Value::from(self.options.rank)),
            ("rank", Value::from(0)),
            ("tensors", Value::from(tensors)),
            ("bytes", Value::from(bytes)),
            ("digest", digest.map_or(Value::Nil, Value::from)),
            ("digest_kind", Value::from(if hashing { "blake3" } else { "none" })),
            ("ms", Value::from(began.elapsed().as_secs_f64() * 1000.0)),
            ("state", Value::from(state)),
            ("error", error),
            ("error_kind", kind),
        ]))
    }
}

/// `rename` of a request, in its order.
fn renames(request: &Value) -> Vec<(String, String)> {
    let pairs = msg::get(request, "rename").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    pairs.iter().map(|pair| (text(&pair[0]), text(&pair[1]))).collect()
}

/// `extents` of a request; what is no pair of numbers makes the list too short, which is refused.
fn extents(request: &Value) -> Option<Vec<(u64, u64)>> {
    let pairs = msg::get(request, "extents").filter(|extents| !extents.is_nil())?;
    let pair = |pair: &Value| Some((pair[0].as_u64()?, pair[1].as_u64()?));
    Some(pairs.as_array().map_or(&[][..], Vec::as_slice).iter().filter_map(pair).collect())
}
