//! What a fake engine is, and what is wrong with it.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use crate::VllmVersion;

/// Properties of one fake engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Global data parallel rank.
    pub rank: u16,
    /// `--data-parallel-size`.
    pub size: u16,
    /// A mixture-of-experts model: the ranks step in lockstep.
    pub moe: bool,
    /// Which vLLM it plays.
    pub version: VllmVersion,
    /// Where to say HELLO.
    pub handshake: String,
    /// Directory of the checkpoint that "the command line loads"; what the engine answers depends
    /// on its bytes. Without one the engine has made-up weights.
    pub model: Option<PathBuf>,
    /// Tokens of a response whose request does not say `max_tokens`.
    pub tokens: u32,
    /// Tokens that one step adds to a response.
    pub tokens_per_step: u32,
    /// Duration of one step. Zero: as fast as possible.
    pub step: Duration,
    /// How long a load takes, on top of copying.
    pub load: Duration,
    /// Size in bytes of the buffer that loads copy to.
    pub load_buffer: usize,
    /// How long the start takes, between INIT and registration.
    pub start: Duration,
    /// How many requests run at once.
    pub max_num_seqs: usize,
    /// What a lockstep engine calls its parallel flags in READY.
    pub parallel_config_hash: String,
    /// How long to wait for INIT (vLLM: 5 minutes).
    pub init_timeout: Duration,
    /// What is wrong with it from the start.
    pub faults: Faults,
    /// Directory of control files: while it runs, the content of `rank-<rank>` replaces `faults`.
    pub control: Option<PathBuf>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            rank: 0,
            size: 1,
            moe: false,
            version: VllmVersion::default(),
            handshake: String::new(),
            model: None,
            tokens: 16,
            tokens_per_step: 1,
            step: Duration::from_millis(2),
            load: Duration::ZERO,
            load_buffer: 16 << 20,
            start: Duration::ZERO,
            max_num_seqs: 256,
            parallel_config_hash: "fake-parallel-config".to_owned(),
            init_timeout: Duration::from_secs(300),
            faults: Faults::default(),
            control: None,
        }
    }
}

impl EngineOptions {
    /// Does this engine step in lockstep with its peers?
    pub fn lockstep(&self) -> bool {
        self.size > 1 && (self.moe || !self.version.dense_is_independent())
    }

    /// Path of this rank's control file.
    pub(crate) fn control_file(&self) -> Option<PathBuf> {
        self.control.as_ref().map(|dir| dir.join(format!("rank-{}", self.rank)))
    }
}

/// A point in an engine's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before it says HELLO.
    BeforeHello,
    /// It has got INIT.
    AfterInit,
    /// It has registered on its input sockets.
    AfterRegistration,
    /// It has said READY.
    AfterReady,
    /// A request has got its first token.
    MidRequest,
    /// Between two steps, at once.
    Now,
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "before-hello" => Self::BeforeHello,
            "after-init" => Self::AfterInit,
            "after-registration" => Self::AfterRegistration,
            "after-ready" => Self::AfterReady,
            "mid-request" => Self::MidRequest,
            "now" => Self::Now,
            _ => return Err(format!("unknown stage `{text}`")),
        })
    }
}

/// Faults to order. Written as a list separated by commas, see [`Faults::for_rank`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// `die:STAGE`: end without a word, as after SIGKILL.
    pub die: Option<Stage>,
    /// `dead:STAGE`: say ENGINE_CORE_DEAD on every output socket and end.
    pub dead: Option<Stage>,
    /// `never-ready`: stop after registration.
    pub never_ready: bool,
    /// `hello-twice`.
    pub hello_twice: bool,
    /// `ready-first`: READY instead of HELLO.
    pub ready_first: bool,
    /// `wrong-hash`: other parallel flags than its peers.
    pub wrong_hash: bool,
    /// `rank-on-the-wire:N`: say another rank than its own.
    pub rank_on_the_wire: Option<u16>,
    /// `garbage-registration`: a registration frame that is not msgpack.
    pub garbage_registration: bool,
    /// `stop-reading`: leave everything in the input sockets.
    pub stop_reading: bool,
    /// `garbled-output`: messages to frontends lack their second half.
    pub garbled_output: bool,
    /// `slow:MS`: this much longer per step.
    pub slow: Duration,
    /// `load-fails[:STATE]`: loads fail and leave the worker in this state (default
    /// `restored-meta`).
    pub load_fails: Option<String>,
    /// `load-times:N`: only the first N loads fail.
    pub load_times: Option<u32>,
    /// `load-hangs`: loads are never answered, nor is anything else.
    pub load_hangs: bool,
    /// `load-wrong-digest`: the loader reports another digest than the request's; where none is asked for, a
    /// tensor too few.
    pub load_wrong_digest: bool,
    /// `lora-fails`: adapters cannot be read.
    pub lora_fails: bool,
    /// `reset-false`: `reset_prefix_cache` answers False.
    pub reset_false: bool,
    /// `sleep-fails`: `sleep` fails before it does anything.
    pub sleep_fails: bool,
    /// `no-shim`: the worker methods of the shim do not exist.
    pub no_shim: bool,
    /// `shim-version:V`: the shim says this version.
    pub shim_version: Option<String>,
    /// `shim-protocol:N`.
    pub shim_protocol: Option<u64>,
}

impl Faults {
    /// Reads `[RANK@]FAULT[:ARGUMENT],...` and keeps what is meant for `rank`.
    pub fn for_rank(text: &str, rank: u16) -> Result<Self, String> {
        let mut faults = Self::default();
        for item in text.split([',', '\n']).map(str::trim).filter(|item| !item.is_empty()) {
            let item = match item.split_once('@') {
                None => item,
                Some((of, item)) => {
                    let of: u16 = of.parse().map_err(|_| format!("bad rank in `{item}`"))?;
                    if of != rank {
                        continue;
                    }
                    item
                }
            };
            faults.set(item)?;
        }
        Ok(faults)
    }

    fn set(&mut self, item: &str) -> Result<(), String> {
        let (name, argument) = item.split_once(':').unwrap_or((item, ""));
        let number = || argument.parse::<u64>().map_err(|_| format!("`{item}` needs a number"));
        match name {
            "die" => self.die = Some(argument.parse()?),
            "dead" => self.dead = Some(argument.parse()?),
            "never-ready" => self.never_ready = true,
            "hello-twice" => self.hello_twice = true,
            "ready-first" => self.ready_first = true,
            "wrong-hash" => self.wrong_hash = true,
            "rank-on-the-wire" => {
                self.rank_on_the_wire =
                    Some(u16::try_from(number()?).map_err(|_| format!("`{item}` is too large"))?);
            }
            "garbage-registration" => self.garbage_registration = true,
            "stop-reading" => self.stop_reading = true,
            "garbled-output" => self.garbled_output = true,
            "slow" => self.slow = Duration::from_millis(number()?),
            "load-fails" => {
                self.load_fails =
                    Some(if argument.is_empty() { "restored-meta".to_owned() } else { argument.to_owned() });
            }
            "load-times" => {
                self.load_times =
                    Some(u32::try_from(number()?).map_err(|_| format!("`{item}` is too large"))?);
            }
            "load-hangs" => self.load_hangs = true,
            "load-wrong-digest" => self.load_wrong_digest = true,
            "lora-fails" => self.lora_fails = true,
            "reset-false" => self.reset_false = true,
            "sleep-fails" => self.sleep_fails = true,
            "no-shim" => self.no_shim = true,
            "shim-version" => self.shim_version = Some(argument.to_owned()),
            "shim-protocol" => self.shim_protocol = Some(number()?),
            _ => return Err(format!("unknown fault `{item}`")),
        }
        Ok(())
    }
}

/// Reads a control file again whenever it changed.
#[derive(Debug, Default)]
pub(crate) struct ControlFile {
    path: Option<PathBuf>,
    seen: Option<SystemTime>,
}

impl ControlFile {
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        Self { path, seen: None }
    }

    /// Is there a file to look at?
    pub(crate) fn wanted(&self) -> bool {
        self.path.is_some()
    }

    /// The new content, if the file changed since the last call.
    pub(crate) fn changed(&mut self) -> Option<String> {
        let path: &Path = self.path.as_deref()?;
        let modified = path.metadata().ok()?.modified().ok()?;
        if self.seen == Some(modified) {
            return None;
        }
        self.seen = Some(modified);
        std::fs::read_to_string(path).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_for_another_rank_is_left_out() {
        let text = "1@load-fails:mixed,slow:5,0@die:mid-request";
        let of_0 = Faults::for_rank(text, 0).unwrap();
        assert_eq!(of_0.die, Some(Stage::MidRequest));
        assert_eq!(of_0.load_fails, None);
        let of_1 = Faults::for_rank(text, 1).unwrap();
        assert_eq!(of_1.load_fails.as_deref(), Some("mixed"));
        assert_eq!(of_1.slow, Duration::from_millis(5));
        assert_eq!(of_1.die, None);
    }

    #[test]
    fn a_misspelt_fault_is_an_error() {
        assert!(Faults::for_rank("die:soon", 0).is_err());
        assert!(Faults::for_rank("explode", 0).is_err());
    }
}
