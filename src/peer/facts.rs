//! What this node tells the leader about itself, found out without starting an engine: which vLLM would run,
//! with which flags, and which model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;
use tracing::warn;

use super::hello::NodeHello;
use crate::config::{Config, Engines, model};
use crate::files;
use crate::supervisor::command::VllmLaunch;
use crate::supervisor::flags::flag_name;
use crate::supervisor::installed::vllm_version;

/// Limit for reading headers and samples of the model's files.
const FILES_LIMIT: Duration = Duration::from_secs(120);
/// Longest header of a safetensors file, as the format has it.
const HEADER: u64 = 100_000_000;
/// Parts of the weights that are read, spread over all files, and bytes of each: seconds also over a network.
const SAMPLES: u64 = 1024;
const SAMPLE: u64 = 4096;

const VLLM_VERSION: &str = "vLLM version";
const MODEL: &str = "model";
const MODEL_FILES: &str = "model files (digest of config.json, names, sizes, headers and samples)";

/// Flags that may differ between nodes: they name paths, addresses or roles of one node.
pub const PER_NODE_FLAGS: &[&str] = &[
    "--device-ids",
    "--download-dir",
    "--ec-transfer-config",
    "--kv-events-config",
    "--kv-transfer-config",
    "--master-addr",
    "--master-port",
    "--otlp-traces-endpoint",
    "--profiler-config",
];

/// Finds out everything that is compared.
pub async fn hello(config: &Config, run_id: &str) -> NodeHello {
    let mut values = BTreeMap::new();
    let mut unknown = BTreeSet::new();
    let mut tell = |name: &str, value: String| {
        values.insert(name.to_owned(), value);
    };
    tell("--data-parallel-size", config.size.to_string());
    tell("--frontend-slots", config.frontend_slots.to_string());
    tell("model kind", config.kind.model().to_owned());
    tell("sidecar version", env!("CARGO_PKG_VERSION").to_owned());
    match &config.engines {
        Engines::Attach => tell("engines", "started by another launcher".to_owned()),
        Engines::Spawn(launch) => {
            tell("engines", "started by the sidecar".to_owned());
            for (name, value) in flags(&launch.common_flags) {
                tell(&format!("vLLM flag {name}"), value);
            }
            let (version, files) = tokio::join!(vllm_version(launch), model_files(launch));
            match version {
                Ok(version) => tell(VLLM_VERSION, version),
                Err(reason) => {
                    warn!(%reason, vllm = %launch.bin.display(), "its version is not compared between nodes");
                    unknown.insert(VLLM_VERSION.to_owned());
                }
            }
            match files {
                Ok(digest) => tell(MODEL_FILES, digest),
                Err(reason) => {
                    warn!(%reason, "the model's files are not compared between nodes");
                    unknown.insert(MODEL_FILES.to_owned());
                }
            }
            // A path may be another one on each node; the files tell whether it is the same model.
            match &launch.model {
                Some(name) if !is_path(name, launch) => tell(MODEL, name.clone()),
                _ => {
                    unknown.insert(MODEL.to_owned());
                }
            }
        }
    }
    NodeHello {
        start_rank: config.start_rank,
        size_local: config.size_local,
        run_id: run_id.to_owned(),
        epoch: 0,
        host: nix::unistd::gethostname()
            .map_or_else(|_| "unknown".to_owned(), |name| name.to_string_lossy().into_owned()),
        pid: std::process::id(),
        address: config.nodes.as_ref().and_then(|nodes| nodes.address),
        values,
        unknown,
    }
}

fn is_path(model: &str, launch: &VllmLaunch) -> bool {
    model.starts_with(['/', '.']) || launch.in_cwd(Path::new(model)).is_dir()
}

/// The engines' flags by full name, without those of one node. The last one counts, as for argparse.
fn flags(tokens: &[String]) -> BTreeMap<String, String> {
    let mut flags = BTreeMap::new();
    let mut current: Option<String> = None;
    for token in tokens {
        let is_flag = token.len() > 1 && token.starts_with('-') && token.parse::<f64>().is_err();
        if is_flag {
            let (name, value) = flag_name(token);
            flags.insert(name.clone(), value.unwrap_or_default().to_owned());
            current = Some(name);
        } else if let Some(values) = current.as_ref().and_then(|name| flags.get_mut(name)) {
            if !values.is_empty() {
                values.push(' ');
            }
            values.push_str(token);
        }
    }
    flags.retain(|name, _| {
        let option = name.split_once('.').map_or(name.as_str(), |(option, _)| option);
        !PER_NODE_FLAGS.contains(&option)
    });
    flags
}

// === the model ===

/// Digest of what tells a model from another without reading all of it.
async fn model_files(launch: &VllmLaunch) -> Result<String, String> {
    let name = launch.model.clone().ok_or("no model is named")?;
    let path = launch.in_cwd(Path::new(&name));
    let name = if path.is_dir() { path.display().to_string() } else { name };
    let flags = flags(&launch.common_flags);
    let revision = flags.get("--revision").cloned();
    let cache = match flag_value(&launch.common_flags, "--download-dir") {
        Some(directory) => launch.in_cwd(Path::new(directory)),
        None => model::cache_path(|name| launch.env.get(name).cloned()),
    };
    let work = tokio::task::spawn_blocking(move || {
        let directory = model::directory_of(&name, revision.as_deref(), &cache)
            .ok_or_else(|| format!("model {name} is not on this node yet"))?;
        fingerprint(&directory).map_err(|error| format!("{}: {error}", directory.display()))
    });
    match timeout(FILES_LIMIT, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("its files could not be read within {FILES_LIMIT:?}")),
    }
}

fn flag_value<'a>(tokens: &'a [String], wanted: &str) -> Option<&'a str> {
    tokens.iter().enumerate().find_map(|(at, token)| {
        let (name, value) = flag_name(token);
        (name == wanted).then(|| value.or_else(|| tokens.get(at + 1).map(String::as_str))).flatten()
    })
}

/// Files that hold weights.
fn is_weights(name: &str) -> bool {
    [".safetensors", ".bin", ".pt", ".pth", ".gguf"].iter().any(|ending| name.ends_with(ending))
}

/// Digest of `config.json`, and of names, sizes, headers and samples of the files with weights. Two trainings of one
/// model have the same headers, and weights of which hardly one is the same.
fn fingerprint(directory: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for name in ["config.json", "params.json"] {
        if let Ok(text) = files::read_regular(&directory.join(name)) {
            part(&mut hasher, name.as_bytes());
            part(&mut hasher, &text);
        }
    }
    let mut names: Vec<String> = fs::read_dir(directory)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| is_weights(name))
        .collect();
    names.sort();
    let mut opened = Vec::new();
    for name in names {
        let file = files::open_regular(&directory.join(&name))?;
        opened.push((name, file.metadata()?.len(), file));
    }
    let total: u64 = opened.iter().map(|(_, length, _)| length).sum();
    let stride = (total / SAMPLES).max(SAMPLE);
    for (name, length, mut file) in opened {
        part(&mut hasher, name.as_bytes());
        part(&mut hasher, &length.to_le_bytes());
        if name.ends_with(".safetensors") {
            let mut header_length = [0; 8];
            // A file that is no safetensors is vLLM's to complain about.
            if file.read_exact(&mut header_length).is_ok() {
                let mut header = Vec::new();
                (&file).take(u64::from_le_bytes(header_length).min(HEADER)).read_to_end(&mut header)?;
                part(&mut hasher, &header);
            }
        }
        let mut at = 0;
        while at < length {
            let mut sample = Vec::new();
            file.seek(SeekFrom::Start(at))?;
            (&file).take(SAMPLE).read_to_end(&mut sample)?;
            part(&mut hasher, &sample);
            at += stride;
        }
    }
    let digest = hasher.finalize().to_hex();
    Ok(digest.as_str()[..16].to_owned())
}

/// Hashes a part with its length, so that parts cannot run into each other.
fn part(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn launch(dir: &Path, flags: &str) -> VllmLaunch {
        VllmLaunch {
            bin: dir.join("vllm"),
            model: Some(dir.display().to_string()),
            common_flags: flags.split_whitespace().map(str::to_owned).collect(),
            frontend_flags: Vec::new(),
            env: [("PATH".to_owned(), dir.display().to_string())].into(),
            devices: Vec::new(),
            cwd: None,
        }
    }

    fn script(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn flags_are_compared_by_full_name_and_those_of_a_node_are_not() {
        let same = [
            "-tp 2 --max_model_len=256 --enforce-eager --download-dir /a --kv-transfer-config {}",
            "--enforce-eager --max-model-len 256 --tensor-parallel-size 2 --kv-transfer-config.kv_ip 1.2.3.4",
        ];
        let [one, other] = same.map(|line| {
            let tokens: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            flags(&tokens)
        });
        assert_eq!(one, other);
        assert_eq!(one.len(), 3);
        let tokens = ["--served-model-name", "a", "b", "--seed", "-1"].map(str::to_owned);
        let flags = flags(&tokens);
        assert_eq!(flags["--served-model-name"], "a b");
        assert_eq!(flags["--seed"], "-1");
    }

    #[tokio::test]
    async fn vllms_version_is_asked_of_the_programs_own_interpreter() {
        let dir = tempfile::tempdir().unwrap();
        let python = dir.path().join("python3");
        script(&python, "#!/bin/sh\n[ \"$1\" = -c ] && echo 0.32.0\n");
        for first_lines in [
            format!("#!{}\n", python.display()),
            "#!/usr/bin/env python3\n".to_owned(),
            format!("#!/bin/sh\n'''exec' \"{}\" \"$0\" \"$@\"\n", python.display()),
        ] {
            script(&dir.path().join("vllm"), &first_lines);
            let version = vllm_version(&launch(dir.path(), "")).await;
            assert_eq!(version.as_deref(), Ok("0.32.0"), "{first_lines}");
        }
        script(&python, "#!/bin/sh\nprintf 'Traceback\\nNot found: vllm\\n\\n' >&2\nexit 1\n");
        assert!(
            vllm_version(&launch(dir.path(), "")).await.unwrap_err().ends_with("python3: Not found: vllm")
        );
        script(&dir.path().join("vllm"), "#!/bin/sh\nexec something\n");
        assert!(vllm_version(&launch(dir.path(), "")).await.unwrap_err().contains("names no Python"));
    }

    #[test]
    fn a_model_is_told_from_another_by_config_names_sizes_headers_and_samples() {
        let make = |config: &str, header: &str, data: &[u8]| {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("config.json"), config).unwrap();
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(header.as_bytes());
            file.extend_from_slice(data);
            fs::write(dir.path().join("model.safetensors"), file).unwrap();
            fs::write(dir.path().join("README.md"), data).unwrap();
            fingerprint(dir.path()).unwrap()
        };
        let one = make("{}", r#"{"a":1}"#, b"12");
        assert_ne!(one, make("{}", r#"{"a":1}"#, b"34"), "another training of the same model");
        assert_ne!(one, make("{ }", r#"{"a":1}"#, b"12"));
        assert_ne!(one, make("{}", r#"{"b":1}"#, b"12"));
        assert_ne!(one, make("{}", r#"{"a":1}"#, b"123"));
    }
}
