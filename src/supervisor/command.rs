//! How vLLM is started, and what its processes are called.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::flags::flag_name;

/// Name of the supervised frontend among the keeper's children.
pub const FRONTEND: &str = "frontend";
/// Name of the relay process among the keeper's children.
pub const RELAY: &str = "relay";
/// The frontend is stopped before the engines, so that it can drain.
pub(crate) const FRONTEND_STOP_ORDER: u32 = 0;
/// Engines are stopped after the frontend.
pub(crate) const ENGINE_STOP_ORDER: u32 = 1;
/// The relay process is stopped after the engines, which are connected to it.
pub const RELAY_STOP_ORDER: u32 = 2;

/// How vLLM is started: everything that does not depend on the rank.
#[derive(Clone, Debug)]
pub struct VllmLaunch {
    /// The `vllm` program.
    pub bin: PathBuf,
    /// Model as given.
    pub model: Option<String>,
    /// Flags of all processes, as the user gave them.
    pub common_flags: Vec<String>,
    /// Flags of the frontend alone.
    pub frontend_flags: Vec<String>,
    /// Environment of all vLLM processes, cleaned.
    pub env: BTreeMap<String, String>,
    /// Devices of each local rank. Empty when there are no accelerators.
    pub devices: Vec<DeviceSlice>,
    /// Directory in which relative paths of the flags mean something.
    pub cwd: Option<PathBuf>,
}

/// Devices of one local rank.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeviceSlice {
    /// `CUDA_VISIBLE_DEVICES`, `HIP_VISIBLE_DEVICES` or `ROCR_VISIBLE_DEVICES`.
    pub variable: String,
    /// Its value for the rank.
    pub value: String,
}

/// Flags of vLLM whose values are secrets; `--api-key` takes several.
const SECRETS: [&str; 2] = ["--api-key", "--hf-token"];

/// Name of a rank's engine among the keeper's children.
pub fn engine_name(rank: u16) -> String {
    format!("engine-{rank}")
}

/// The rank behind a child's name.
pub fn engine_rank(name: &str) -> Option<u16> {
    name.strip_prefix("engine-")?.parse().ok()
}

impl VllmLaunch {
    /// What requests to the model itself name: `--served-model-name`, else the model.
    pub fn served_names(&self) -> Vec<String> {
        let mut flags = self.common_flags.iter().map(String::as_str);
        while let Some(flag) = flags.next() {
            if let (name, value) = flag_name(flag)
                && name == "--served-model-name"
            {
                let more = flags.by_ref().take_while(|token| !token.starts_with('-'));
                return value.into_iter().chain(more).map(str::to_owned).collect();
            }
        }
        self.model.clone().into_iter().collect()
    }

    /// A path of the command line, as vLLM will see it.
    pub fn in_cwd(&self, path: &Path) -> PathBuf {
        self.cwd.as_ref().map_or_else(|| path.to_owned(), |cwd| cwd.join(path))
    }

    /// A program by name or path, as the keeper will look for it.
    pub fn find(&self, program: &Path) -> Option<PathBuf> {
        let is_program = |path: &PathBuf| {
            path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
        };
        if program.components().count() > 1 {
            return Some(self.in_cwd(program)).filter(is_program);
        }
        let path = self.env.get("PATH").map_or("/bin:/usr/bin", String::as_str);
        path.split(':').map(|entry| self.in_cwd(Path::new(entry)).join(program)).find(is_program)
    }

    /// `vllm serve MODEL`, to be followed by flags.
    pub(crate) fn serve(&self) -> Vec<String> {
        let mut argv = vec![self.bin.display().to_string(), "serve".to_owned()];
        argv.extend(self.model.clone());
        argv
    }
}

/// A command line as one would type it into a shell.
pub fn shell_line(argv: &[String]) -> String {
    let words: Vec<String> = argv.iter().map(|word| shell_word(word)).collect();
    words.join(" ")
}

/// As [`shell_line`], for logs: without the values of flags that are secrets.
pub fn log_line(argv: &[String]) -> String {
    let is_secret = |flag: &str| SECRETS.contains(&&*flag.replace('_', "-"));
    let mut hidden = false;
    let words: Vec<String> = argv
        .iter()
        .map(|word| {
            if !word.starts_with('-') {
                return if hidden { "***".to_owned() } else { shell_word(word) };
            }
            hidden = is_secret(word);
            match word.split_once('=') {
                Some((flag, _)) if is_secret(flag) => format!("{flag}=***"),
                _ => shell_word(word),
            }
        })
        .collect();
    words.join(" ")
}

fn shell_word(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=,@%+".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_a_shell_needs_it() {
        let argv = ["vllm", "--hf-overrides", r#"{"a": 1}"#, "", "it's"].map(str::to_owned);
        assert_eq!(shell_line(&argv), r#"vllm --hf-overrides '{"a": 1}' '' 'it'\''s'"#);
    }

    #[test]
    fn the_model_is_served_under_its_own_name_unless_the_flags_say_others() {
        let names = |flags: &[&str]| {
            let common_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
            let launch = VllmLaunch {
                bin: PathBuf::new(),
                model: Some("org/model".to_owned()),
                common_flags,
                frontend_flags: Vec::new(),
                env: BTreeMap::new(),
                devices: Vec::new(),
                cwd: None,
            };
            launch.served_names()
        };
        assert_eq!(names(&["--seed", "1"]), ["org/model"]);
        assert_eq!(names(&["--served-model-name", "a", "b", "--seed", "1"]), ["a", "b"]);
        assert_eq!(names(&["--served_model_name=a"]), ["a"]);
    }

    #[test]
    fn the_rank_is_read_off_a_childs_name() {
        assert_eq!(engine_rank(&engine_name(17)), Some(17));
        assert_eq!(engine_rank(FRONTEND), None);
    }

    #[test]
    fn secrets_are_not_in_logs() {
        let argv =
            ["vllm", "--api-key", "k1", "k2", "-tp", "2", "--api_key=k3", "--hf-token", "t", "--seed", "0"];
        let line = log_line(&argv.map(str::to_owned));
        assert_eq!(line, "vllm --api-key *** *** -tp 2 --api_key=*** --hf-token *** --seed 0");
    }
}
