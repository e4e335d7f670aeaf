//! Checkpoints, and the programs that serve them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

use dp_sidecar_testkit::engine::weights;
use serde_json::Value;

use super::harness::PROMPT;

/// A checkpoint whose tensors are filled with `fill`; the same shapes for every `fill`.
pub(crate) struct Model {
    pub(crate) path: PathBuf,
    pub(crate) digest: String,
}

impl Model {
    /// Tokens that an engine with these weights gives for [`PROMPT`].
    pub(crate) fn tokens(&self, count: u32) -> Vec<u32> {
        weights::tokens(&self.digest, &PROMPT, count)
    }
}

/// Writes a model directory.
pub(crate) fn model(parent: &Path, name: &str, fill: u8, moe: bool) -> Model {
    let path = parent.join(name);
    std::fs::create_dir_all(&path).unwrap();
    let mut config = serde_json::json!({
        "architectures": [if moe { "Qwen3MoeForCausalLM" } else { "LlamaForCausalLM" }],
        "model_type": if moe { "qwen3_moe" } else { "llama" },
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 320,
    });
    if moe {
        config["num_experts"] = Value::from(4);
    }
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    weights::write_checkpoint(
        &path.join("model.safetensors"),
        &[
            ("lm_head.weight", &[320, 8], fill),
            ("model.embed_tokens.weight", &[320, 8], fill),
            ("model.norm.weight", &[8], fill),
        ],
    )
    .unwrap();
    let files = weights::files(&path).unwrap();
    let digest = weights::read(&path, &files).unwrap().digest;
    Model { path, digest }
}

/// `fake-vllm`, beside the sidecar under test. Built here if it is not there or older than its
/// sources: cargo builds programs of the tested package only.
pub(crate) fn fake_vllm() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = Path::new(env!("CARGO_BIN_EXE_sidecar")).with_file_name("fake-vllm");
        let built = program.metadata().and_then(|data| data.modified()).ok();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testkit");
        if built.is_none_or(|built| newest(&sources) > built) {
            let status = Command::new(env!("CARGO"))
                .args(["build", "--quiet", "-p", "dp-sidecar-testkit", "--bins"])
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .status()
                .unwrap();
            assert!(status.success(), "fake-vllm cannot be built");
        }
        program
    })
}

fn newest(directory: &Path) -> SystemTime {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        let of = if path.is_dir() {
            newest_of_sources(&path)
        } else {
            path.metadata().unwrap().modified().unwrap()
        };
        newest = newest.max(of);
    }
    newest
}

fn newest_of_sources(directory: &Path) -> SystemTime {
    // Its tests are no part of the programs.
    if directory.ends_with("testkit/tests") {
        return SystemTime::UNIX_EPOCH;
    }
    newest(directory)
}
