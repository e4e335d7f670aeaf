//! Rank tasks for tests: a queue and a scripted engine behind it, no sockets.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation};
use parking_lot::Mutex;
use rmpv::Value;
use tokio::sync::{Notify, mpsc, watch};

use super::handles::{
    Admission, Call, EngineDown, Envelope, HandleError, HeldCall, RankAsk, RankHandle, RankSnapshot, Release,
    ReplyTo, Verdict, queue,
};

/// What the engine does with a load.
#[derive(Clone, Debug)]
pub(crate) enum LoadScript {
    /// Loads.
    Good,
    /// Fails in this state, with this kind of error.
    Fails(&'static str, &'static str),
    /// Says it is fine, but consumed something else.
    Lies,
    /// Never answers.
    Hangs,
    /// The utility call fails.
    Raises,
}

/// The engine behind a fake rank.
#[derive(Debug)]
pub(crate) struct Engine {
    /// What it was told, in order.
    pub(crate) log: Vec<String>,
    /// Directory of the command line's checkpoint.
    pub(crate) model_path: String,
    /// None: the shim is not installed.
    pub(crate) shim_protocol: Option<u64>,
    /// What it holds: a directory, or how it is torn.
    pub(crate) weights: String,
    pub(crate) version: String,
    pub(crate) paused: bool,
    /// For the next loads; `Good` after the last.
    pub(crate) loads: VecDeque<LoadScript>,
    /// A pause with mode `wait` is not answered before one with `abort` comes.
    pub(crate) wait_needs_abort: bool,
    /// Answers of `reset_prefix_cache`; true after the last.
    pub(crate) resets: VecDeque<bool>,
    /// LoRA adapters by name, and what a name was before an update.
    pub(crate) adapters: BTreeMap<String, String>,
    undo: BTreeMap<(String, String), Option<String>>,
    /// The next change of an adapter fails.
    pub(crate) lora_fails: bool,
    /// A resume is not answered, and has no effect.
    pub(crate) no_resume: bool,
    /// `set_weight_version` and `get_weight_version` are not known.
    pub(crate) no_version_stamp: bool,
    /// What the shim says.
    pub(crate) vllm_version: &'static str,
    pub(crate) load_format: &'static str,
    /// Parameters that are one tensor: a copy, and what it is a copy of.
    pub(crate) tied: Vec<(&'static str, &'static str)>,
    /// Names of tensors that its loader passes over.
    pub(crate) ignored: Vec<String>,
    pub(crate) draft: Option<&'static str>,
    /// KV connectors that cannot drop what they keep.
    pub(crate) kv_connectors: Vec<&'static str>,
}

/// A fake rank and its engine.
#[derive(Debug)]
pub(crate) struct FakeRank {
    pub(crate) handle: RankHandle,
    pub(crate) engine: Arc<Mutex<Engine>>,
    pub(crate) snapshot: Arc<watch::Sender<RankSnapshot>>,
    changed: Arc<Notify>,
}

impl FakeRank {
    /// A rank whose engine is admitted, with the weights of `model_path`.
    pub(crate) fn start(rank: u16, model_path: &str) -> Self {
        let (commands, inbox) = queue("rank");
        let (snapshot, receiver) = watch::channel(RankSnapshot {
            rank: EngineIndex(rank),
            incarnation: Incarnation(1),
            admitted: true,
            admission_open: true,
            ..RankSnapshot::default()
        });
        let snapshot = Arc::new(snapshot);
        let engine = Arc::new(Mutex::new(Engine {
            log: Vec::new(),
            model_path: model_path.to_owned(),
            shim_protocol: Some(6),
            weights: model_path.to_owned(),
            version: "default".to_owned(),
            paused: false,
            loads: VecDeque::new(),
            wait_needs_abort: false,
            resets: VecDeque::new(),
            adapters: BTreeMap::new(),
            undo: BTreeMap::new(),
            lora_fails: false,
            no_resume: false,
            no_version_stamp: false,
            vllm_version: "0.32.0",
            load_format: "auto",
            tied: Vec::new(),
            ignored: Vec::new(),
            draft: None,
            kv_connectors: Vec::new(),
        }));
        let changed = Arc::new(Notify::new());
        // Ends with its queue, which ends with the handle.
        tokio::spawn(run(inbox, engine.clone(), snapshot.clone(), changed.clone()));
        Self {
            handle: RankHandle { rank: EngineIndex(rank), commands, snapshot: receiver },
            engine,
            snapshot,
            changed,
        }
    }

    /// Waits until the log has this entry.
    pub(crate) async fn logged(&self, entry: &str) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if self.engine.lock().log.iter().any(|line| line == entry) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(120), wait).await.is_err() {
            panic!("{entry:?} is not in {:?}", self.engine.lock().log);
        }
    }

    /// What it was told so far, and forgets it.
    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.engine.lock().log)
    }

    /// The engine is lost.
    pub(crate) fn lose(&self) {
        self.snapshot.send_modify(|state| state.admitted = false);
    }

    /// A new life of the engine is admitted, with the command line's weights.
    pub(crate) fn restart(&self) {
        {
            let mut engine = self.engine.lock();
            engine.weights = engine.model_path.clone();
            engine.version = "default".to_owned();
            engine.paused = false;
            engine.adapters.clear();
            engine.undo.clear();
        }
        self.snapshot.send_modify(|state| {
            state.incarnation.0 += 1;
            state.admitted = false;
        });
    }

    /// Its traffic is let through.
    pub(crate) fn admit(&self) {
        self.snapshot.send_modify(|state| state.admitted = true);
    }
}

/// A control call of frontend 1 at a rank.
pub(crate) fn held(rank: u16, ticket: u64, method: &str) -> HeldCall {
    HeldCall {
        rank: EngineIndex(rank),
        ticket,
        frontend: FrontendId(1),
        api_server: 0,
        method: method.to_owned(),
        args: Vec::new(),
    }
}

async fn run(
    mut inbox: mpsc::Receiver<Envelope<RankAsk>>,
    engine: Arc<Mutex<Engine>>,
    snapshot: Arc<watch::Sender<RankSnapshot>>,
    changed: Arc<Notify>,
) {
    let mut waiting: Vec<ReplyTo> = Vec::new();
    while let Some(Envelope { ask, reply, .. }) = inbox.recv().await {
        let mut engine = engine.lock();
        match ask {
            RankAsk::Call(asked) => call(&mut engine, &asked.method, &asked.args, reply, &mut waiting),
            RankAsk::Admission(Admission { open }) => {
                engine.log.push(format!("admission {open}"));
                snapshot.send_modify(|state| state.admission_open = open);
                reply.send::<Admission>(Ok(()));
            }
            RankAsk::Release(Release { ticket, verdict }) => {
                let text = match verdict {
                    Verdict::Forward => format!("forward {ticket}"),
                    Verdict::Answer(value) => format!("answer {ticket} {value}"),
                    Verdict::Refuse(text) => format!("refuse {ticket} {text}"),
                };
                engine.log.push(text);
                reply.send::<Release>(Ok(Value::Nil));
            }
            RankAsk::EngineDown(EngineDown { reason, .. }) => {
                engine.log.push(format!("down {reason}"));
                snapshot.send_modify(|state| state.admitted = false);
            }
            other => panic!("not expected: {other:?}"),
        }
        changed.notify_waiters();
    }
}

fn call(engine: &mut Engine, method: &str, args: &[Value], reply: ReplyTo, waiting: &mut Vec<ReplyTo>) {
    let answer = match method {
        "pause_scheduler" => {
            let mode = args[0].as_str().unwrap_or_default().to_owned();
            engine.log.push(format!("pause {mode} {}", args[1]));
            if mode == "wait" && engine.wait_needs_abort {
                waiting.push(reply);
                return;
            }
            engine.paused = true;
            for earlier in waiting.drain(..) {
                earlier.send::<Call>(Ok(Value::Nil));
            }
            Ok(Value::Nil)
        }
        "resume_scheduler" => {
            engine.log.push("resume".to_owned());
            if engine.no_resume {
                waiting.push(reply);
                return;
            }
            engine.paused = false;
            Ok(Value::Nil)
        }
        "reset_prefix_cache" => {
            engine.log.push(format!("reset {} {}", args[0], args[1]));
            Ok(Value::Boolean(engine.resets.pop_front().unwrap_or(true)))
        }
        "get_weight_version" if engine.no_version_stamp => Err(HandleError::failed(
            "Call to get_weight_version method failed: 'EngineCoreProc' object has no attribute",
        )),
        "get_weight_version" => Ok(engine.version.as_str().into()),
        "is_scheduler_paused" => Ok(Value::Boolean(engine.paused)),
        "reset_encoder_cache" => Ok(Value::Nil),
        "reset_mm_cache" => Err(HandleError::failed("a frontend's cache mirrors this one")),
        "set_weight_version" if engine.no_version_stamp => Err(HandleError::failed(
            "Call to set_weight_version method failed: 'EngineCoreProc' object has no attribute",
        )),
        "set_weight_version" => {
            engine.version = args[0].as_str().unwrap_or_default().to_owned();
            engine.log.push(format!("version {}", engine.version));
            Ok(Value::Nil)
        }
        "collective_rpc" => match args[0].as_str().unwrap_or_default() {
            "dp_sidecar_info" => info(engine, args[3]["path"].as_str(), &args[3]["tensors"]),
            "dp_sidecar_lora" => lora(engine, &args[3]["request"]),
            "dp_sidecar_load" => match load(engine, &args[3]["request"]) {
                Some(answer) => answer,
                None => {
                    waiting.push(reply);
                    return;
                }
            },
            other => panic!("unexpected worker method {other}"),
        },
        other => panic!("unexpected method {other}"),
    };
    reply.send::<Call>(answer);
}

fn map(entries: Vec<(&str, Value)>) -> Value {
    let entries = entries.into_iter();
    Value::Map(entries.map(|(key, value)| (Value::from(key), value)).collect())
}

/// Names of the files in a directory, as vLLM's loader would name them for `--load-format auto`.
fn files(directory: &str) -> Value {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let (mut names, others): (Vec<String>, Vec<_>) = names.partition(|name| name.ends_with(".safetensors"));
    if names.is_empty() {
        names = others.into_iter().filter(|name| name.ends_with(".bin")).collect();
    }
    names.sort();
    if names.iter().any(|name| name.starts_with("consolidated")) {
        names.retain(|name| name.starts_with("consolidated"));
    }
    if names.is_empty() { Value::Nil } else { names.into_iter().map(Value::from).collect::<Vec<_>>().into() }
}

fn info(engine: &Engine, path: Option<&str>, tensors: &Value) -> Result<Value, HandleError> {
    let Some(protocol) = engine.shim_protocol else {
        return Err(HandleError::failed(
            "Call to collective_rpc method failed: 'Worker' object has no attribute 'dp_sidecar_info'",
        ));
    };
    let asked = tensors.as_array().map_or(&[][..], Vec::as_slice).iter();
    let ignored = asked.filter(|tensor| engine.ignored.iter().any(|name| tensor[0] == name.as_str().into()));
    let ignored = ignored.map(|tensor| tensor[0].clone());
    let tied = engine.tied.iter().map(|(copy, of)| Value::Array(vec![(*copy).into(), (*of).into()]));
    Ok(Value::Array(vec![map(vec![
        ("ok", Value::Boolean(true)),
        ("protocol", Value::from(protocol)),
        ("shim_version", Value::from("0.1.0")),
        ("model_path", Value::from(engine.model_path.as_str())),
        ("vllm_version", Value::from(engine.vllm_version)),
        ("load_format", Value::from(engine.load_format)),
        ("files", files(path.unwrap_or(&engine.model_path))),
        ("tied", Value::Array(tied.collect())),
        ("ignored", Value::Array(ignored.collect())),
        ("draft", engine.draft.map_or(Value::Nil, Value::from)),
        (
            "kv_connectors",
            engine.kv_connectors.iter().map(|name| Value::from(*name)).collect::<Vec<_>>().into(),
        ),
        ("rank", Value::from(0)),
        ("max_lora_rank", Value::from(16)),
    ])]))
}

/// None: no answer.
fn load(engine: &mut Engine, request: &Value) -> Option<Result<Value, HandleError>> {
    let path = request["path"].as_str().unwrap_or_default().to_owned();
    engine.log.push(format!("load {path}"));
    let script = engine.loads.pop_front().unwrap_or(LoadScript::Good);
    let (state, kind) = match script {
        LoadScript::Good | LoadScript::Lies => ("loaded", Value::Nil),
        LoadScript::Fails(state, kind) => (state, Value::from(kind)),
        LoadScript::Hangs => return None,
        LoadScript::Raises => {
            engine.weights = "torn".to_owned();
            return Some(Err(HandleError::failed("Call to collective_rpc failed: boom")));
        }
    };
    let good = state == "loaded";
    if good {
        engine.weights = path;
    } else if state != "unchanged" {
        engine.weights = format!("torn {state}");
    }
    let digest = match script {
        LoadScript::Lies => {
            engine.weights = "something else".to_owned();
            Value::from("0123")
        }
        _ => request["digest"].clone(),
    };
    let error = if good { Value::Nil } else { Value::from("injected") };
    Some(Ok(Value::Array(vec![map(vec![
        ("ok", Value::Boolean(good)),
        ("protocol", Value::from(2)),
        ("rank", Value::from(0)),
        ("tensors", request["tensors"].clone()),
        ("bytes", request["bytes"].clone()),
        ("digest", digest),
        ("digest_kind", Value::from("blake3")),
        ("ms", Value::F64(1.5)),
        ("state", Value::from(state)),
        ("error", error),
        ("error_kind", kind),
    ])])))
}

fn lora(engine: &mut Engine, request: &Value) -> Result<Value, HandleError> {
    let text = |key: &str| request[key].as_str().unwrap_or_default().to_owned();
    let (op, name, id) = (text("op"), text("name"), text("update_id"));
    engine.log.push(format!("lora {op} {name}"));
    let fails = op == "replace" && std::mem::take(&mut engine.lora_fails);
    if !fails {
        let before = engine.adapters.get(&name).cloned();
        match op.as_str() {
            "replace" => {
                engine.undo.insert((id, name.clone()), before);
                engine.adapters.insert(name, text("path"));
            }
            "remove" => {
                engine.undo.insert((id, name.clone()), before);
                engine.adapters.remove(&name);
            }
            "undo" => match engine.undo.remove(&(id, name.clone())) {
                Some(Some(path)) => {
                    engine.adapters.insert(name, path);
                }
                Some(None) => {
                    engine.adapters.remove(&name);
                }
                None => {}
            },
            _ => {}
        }
    }
    let adapters = engine.adapters.keys().map(|name| map(vec![("name", Value::from(name.as_str()))]));
    Ok(Value::Array(vec![map(vec![
        ("ok", Value::Boolean(!fails)),
        ("state", Value::from(if fails { "unchanged" } else { "applied" })),
        ("tensors", request["tensors"].clone()),
        ("bytes", request["bytes"].clone()),
        ("error", if fails { Value::from("injected") } else { Value::Nil }),
        ("adapters", Value::Array(adapters.collect())),
    ])]))
}
