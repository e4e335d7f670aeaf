//! One script of calls to a fake engine and to one of vLLM: what they answer is compared, step by step.
//!
//! `tests/likeness/vllm-0.32.0.json` was recorded with vLLM 0.32.0 on its CPU platform. With `DP_SIDECAR_PYTHON` set to
//! a Python that has vLLM, vLLM is asked again and compared (`REWRITE=1`: written); that test is ignored unless asked
//! for, as in `cargo test -- --ignored vllm`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dp_sidecar_testkit::Reporter;
use dp_sidecar_testkit::engine::{SHIM_PROTOCOL, weights};
use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, FrontendOptions, NewRequest};
use dp_sidecar_testkit::msg;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rmpv::Value;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;

use crate::conformance::harness::{directory, fake_vllm, model};

const RECORDED: &str = "tests/likeness/vllm-0.32.0.json";
/// For vLLM to start on a busy machine.
const START: Duration = Duration::from_secs(300);
const ANSWER: Duration = Duration::from_secs(60);

/// `vllm serve MODEL --headless`, in a process group of its own.
struct Engine(Child);

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

/// A checkpoint with other tensors than `from` has.
fn variant(from: &Path, name: &str, change: impl FnOnce(&mut Tensors)) -> tempfile::TempDir {
    let to = tempfile::Builder::new().prefix(name).tempdir().unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = read
        .iter()
        .map(|(name, view)| (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &to.path().join("model.safetensors")).unwrap();
    to
}

fn widened(tensors: &mut Tensors) {
    for (_, dtype, _, data) in tensors {
        assert_eq!(*dtype, Dtype::BF16);
        *dtype = Dtype::F32;
        *data = data.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
    }
}

/// What the engine was asked and said, step by step.
struct Script {
    frontend: FakeFrontend,
    said: Vec<serde_json::Value>,
}

impl Script {
    fn call(&mut self, method: &str, args: Vec<Value>) {
        let shown: Vec<String> = args.iter().map(ToString::to_string).collect();
        self.named(&format!("{method}({})", shown.join(", ")), method, args);
    }

    fn named(&mut self, step: &str, method: &str, args: Vec<Value>) {
        let answer = match self.frontend.server().call(0, method, args, ANSWER) {
            Ok(value) => json!({ "answers": msg::to_json(&value) }),
            // By these the sidecar tells what an engine does not have. Other texts are vLLM's own business.
            Err(FrontendError::Call { reason, .. }) => {
                let text = reason.split_once(" failed: ").map_or(&*reason, |(_, text)| text);
                let known = ["has no attribute", "is not implemented"].iter().any(|it| text.contains(it));
                json!({ "fails": if known { text } else { "" } })
            }
            Err(error) => json!({ "no answer": error.to_string() }),
        };
        self.said.push(json!([step, answer]));
    }

    fn state(&mut self) {
        for method in ["is_sleeping", "is_scheduler_paused"] {
            self.call(method, Vec::new());
        }
    }

    /// `dp_sidecar_load` of a directory; `change` makes the request wrong.
    fn load(&mut self, step: &str, from: &Path, change: impl FnOnce(&mut [(&str, Value)])) {
        let files = weights::files(from).unwrap();
        let read = weights::read(from, &files).unwrap();
        let mut request = [
            ("protocol", Value::from(SHIM_PROTOCOL)),
            ("update_id", Value::from("u")),
            ("path", Value::from(from.to_str().unwrap())),
            ("files", Value::Array(files.iter().map(|file| Value::from(&**file)).collect())),
            ("tensors", Value::from(read.tensors)),
            ("bytes", Value::from(read.bytes)),
            ("digest", Value::from(read.digest)),
            ("digest_kind", Value::from("blake3")),
        ];
        change(&mut request);
        let args = rpc("dp_sidecar_load", msg::map([("request", msg::map(request))]));
        let answer = self.frontend.server().call(0, "collective_rpc", args, ANSWER).unwrap();
        let report = &answer[0];
        let said = ["ok", "state", "error_kind"].map(|key| (key, msg::get(report, key).map(msg::to_json)));
        self.said.push(json!([format!("load {step}"), said]));
    }

    fn generate(&mut self, id: &str) {
        let done = self.frontend.server().complete(&NewRequest::new(id, 4), ANSWER).unwrap();
        self.said.push(json!([
            "a request of 4 tokens",
            { "tokens": done.tokens.len(), "finish": done.finish, "versions": done.versions },
        ]));
    }
}

/// `collective_rpc(method, timeout, args, kwargs)`.
fn rpc(method: &str, kwargs: Value) -> Vec<Value> {
    vec![Value::from(method), Value::Nil, Value::Array(Vec::new()), kwargs]
}

fn set(request: &mut [(&str, Value)], key: &str, value: impl Into<Value>) {
    request.iter_mut().find(|(known, _)| *known == key).unwrap().1 = value.into();
}

/// Plays the script with an engine of `models[0]`; `models[1]` has other weights.
fn play(mut command: Command, models: &[PathBuf; 2]) -> Vec<serde_json::Value> {
    let options = FrontendOptions { size: 1, ..FrontendOptions::default() };
    let frontend = FakeFrontend::bind(options, Reporter::quiet()).unwrap();
    let (host, port) = frontend.host_port().rsplit_once(':').unwrap();
    command
        .arg("serve")
        .arg(&models[0])
        .args(["--headless", "--data-parallel-size", "1", "--data-parallel-size-local", "1"])
        .args(["--data-parallel-address", host, "--data-parallel-rpc-port", port])
        .args(["--max-model-len", "256", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.1"])
        .args(["--enforce-eager", "--dtype", "bfloat16", "--distributed-executor-backend", "uni"])
        // What every fake takes.
        .args(["--enable-lora", "--max-lora-rank", "16"])
        .stdin(Stdio::null())
        .process_group(0);
    let _engine = Engine(command.spawn().unwrap());
    let mut script = Script { frontend, said: Vec::new() };
    script.frontend.startup(START).unwrap();

    let tags = |tags: &[&str]| Value::Array(tags.iter().map(|tag| Value::from(*tag)).collect());
    script.state();
    script.call("get_weight_version", Vec::new());
    script.generate("a");
    script.call("set_weight_version", vec!["v1".into()]);
    script.call("get_weight_version", Vec::new());
    script.generate("b");
    for (method, args) in [
        ("no_such_method", vec![]),
        ("_private", vec![]),
        ("is_sleeping", vec![1.into()]),
        ("set_weight_version", vec![]),
        ("get_supported_tasks", vec![]),
        ("list_loras", vec![]),
        ("reset_prefix_cache", vec![]),
        ("reset_prefix_cache", vec![true.into(), false.into()]),
        ("reset_mm_cache", vec![]),
        ("reset_encoder_cache", vec![]),
        ("resume_scheduler", vec![]),
        ("wake_up", vec![]),
        ("wake_up", vec![tags(&["weights"])]),
        ("pause_scheduler", vec!["no such mode".into(), true.into()]),
        ("release_kv_cache_memory", vec![]),
    ] {
        script.call(method, args);
    }
    script.state();
    for mode in ["abort", "wait", "keep"] {
        script.call("pause_scheduler", vec![mode.into(), false.into()]);
        script.state();
        script.call("pause_scheduler", vec![mode.into(), true.into()]);
        script.call("resume_scheduler", vec![]);
    }
    script.state();

    // Sleep and its wakes; the allocator of vLLM's CPU platform does nothing, so no call touches what sleeps.
    for level in [0, 1, 2] {
        script.call("sleep", vec![level.into()]);
        script.state();
        script.call("sleep", vec![level.into(), "keep".into()]);
        script.call("wake_up", vec![tags(&["no such tag"])]);
        script.state();
        script.call("wake_up", vec![tags(&["weights"])]);
        script.state();
        script.call("wake_up", vec![tags(&["weights"])]);
        script.state();
        script.call("sleep", vec![level.into()]);
        script.state();
        script.call("wake_up", vec![tags(&["scheduling"])]);
        script.state();
        script.call("wake_up", vec![tags(&["kv_cache"])]);
        script.state();
        script.call("wake_up", vec![]);
        script.state();
        script.call("resume_scheduler", vec![]);
        script.state();
    }
    script.call("sleep", vec![1.into()]);
    script.call("wake_up", vec![tags(&["weights", "kv_cache"])]);
    script.state();
    script.call("wake_up", vec![tags(&[])]);
    script.state();
    script.call("resume_scheduler", vec![]);

    // Workers.
    for method in ["check_health", "no_such_method"] {
        script.named(&format!("worker: {method}"), "collective_rpc", rpc(method, msg::map([])));
    }
    let path = |path: &Path| msg::map([("weights_path", Value::from(path.to_str().unwrap()))]);
    script.named("worker: reload_weights", "collective_rpc", rpc("reload_weights", path(&models[1])));
    script.generate("c");

    // Loads of the shim.
    let (one, other) = (&*models[0], &*models[1]);
    let wide = variant(other, "wide", widened);
    let extra = |name: &'static str| {
        variant(other, "extra", move |tensors| {
            tensors.push((name.to_owned(), Dtype::BF16, vec![4], vec![0; 8]));
        })
    };
    let (unknown, ignored) =
        (extra("model.no_such.weight"), extra("model.layers.0.self_attn.rotary_emb.inv_freq"));
    let norm = "model.norm.weight";
    let missing = variant(other, "missing", |tensors| tensors.retain(|(name, ..)| name != norm));
    let short = variant(other, "short", |tensors| {
        let (_, _, shape, data) = tensors.iter_mut().find(|(name, ..)| name == norm).unwrap();
        shape[0] /= 2;
        data.truncate(data.len() / 2);
    });
    script.load("of other weights", other, |_| ());
    script.load("of the first ones", one, |_| ());
    script.load("of the same again", one, |_| ());
    script.load("in another protocol", other, |request| set(request, "protocol", 1));
    script.load("without files", other, |request| set(request, "files", Value::Array(Vec::new())));
    script.load("of a file that is not there", other, |request| {
        set(request, "files", tags(&["no.safetensors"]))
    });
    script.load("of a file twice", other, |request| {
        set(request, "files", tags(&["model.safetensors", "model.safetensors"]));
    });
    script.load("of a path", other, |request| set(request, "files", tags(&["../model.safetensors"])));
    script.load("of more tensors than there are", other, |request| set(request, "tensors", 10_000));
    script.load("of another digest", other, |request| set(request, "digest", "0".repeat(64)));
    script.load("in float32", wide.path(), |_| ());
    script.load("with a name that the model does not have", unknown.path(), |_| ());
    script.load("with a name that loaders pass over", ignored.path(), |_| ());
    script.load("without a tensor", missing.path(), |_| ());
    script.load("with half of a tensor", short.path(), |_| ());
    script.load("of the first ones at the end", one, |_| ());
    script.generate("d");
    script.said
}

fn recorded() -> Vec<serde_json::Value> {
    serde_json::from_str(&std::fs::read_to_string(RECORDED).unwrap()).unwrap()
}

/// All steps that differ, each with both answers.
fn compare(said: &[serde_json::Value], recorded: &[serde_json::Value]) {
    assert_eq!(said.len(), recorded.len());
    let differ = |(at, (said, recorded)): (usize, (&serde_json::Value, &serde_json::Value))| {
        (said != recorded).then(|| format!("step {at}: {said}\n    recorded: {recorded}\n"))
    };
    let all: String = said.iter().zip(recorded).enumerate().filter_map(differ).collect();
    assert!(all.is_empty(), "{all}");
}

#[test]
fn a_fake_engine_answers_what_vllm_was_recorded_to_answer() {
    let directory = directory();
    let models = [1, 2].map(|fill| model(directory.path(), &format!("m{fill}"), fill, false).path);
    compare(&play(Command::new(fake_vllm()), &models), &recorded());
}

#[test]
#[ignore = "needs vLLM: scripts/test runs it"]
fn what_was_recorded_is_what_vllm_answers() {
    let root = env!("CARGO_MANIFEST_DIR");
    let python = std::env::var("DP_SIDECAR_PYTHON").expect("DP_SIDECAR_PYTHON, see scripts/vllm_env.py");
    let made = Command::new(&python).arg(format!("{root}/scripts/make_tiny_models.py")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let folder = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
    let models = [0, 1].map(|seed| folder.join(format!("dense-{seed}")));
    let mut vllm = Command::new(Path::new(&python).with_file_name("vllm"));
    vllm.env("PYTHONPATH", format!("{root}/target/e2e-site"))
        .env("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        .env("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        .env("VLLM_CPU_KVCACHE_SPACE", "1")
        .env("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        .env("OMP_NUM_THREADS", "1")
        .env("VLLM_NO_USAGE_STATS", "1")
        .env("VLLM_LOGGING_LEVEL", "ERROR")
        .env("HF_HUB_OFFLINE", "1");
    let said = play(vllm, &models);
    if std::env::var_os("REWRITE").is_some() {
        let lines: Vec<String> = said.iter().map(ToString::to_string).collect();
        std::fs::write(RECORDED, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
    }
    compare(&said, &recorded());
}
