//! Field positions and behaviour per vLLM version.
//!
//! Most messages are positional, and positions move between versions; the version itself is on the
//! wire only since 0.23.0 (`vllm_version` in the engine's ready response). A [`Layout`] is what the
//! rest of the crate asks instead of comparing versions itself.

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A vLLM release. Suffixes (`+cpu`, `rc2`, `.dev3`) are dropped: they do not change the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VllmVersion {
    /// First number.
    pub major: u16,
    /// Second number.
    pub minor: u16,
    /// Third number.
    pub patch: u16,
}

impl VllmVersion {
    /// Oldest version with a known layout.
    pub const OLDEST: Self = Self::new(0, 11, 0);
    /// Newest version that was read and tested; later patch releases of it count as known.
    pub const NEWEST: Self = Self::new(0, 33, 0);

    pub const fn new(major: u16, minor: u16, patch: u16) -> Self {
        Self { major, minor, patch }
    }

    /// What a build is called that knows no release: `0.1.dev493+g1234`.
    const fn is_unnumbered(self) -> bool {
        self.major == 0 && self.minor == 1
    }

    const fn at_least(self, minor: u16, patch: u16) -> bool {
        self.major > 0 || self.minor > minor || (self.minor == minor && self.patch >= patch)
    }
}

impl fmt::Display for VllmVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl From<VllmVersion> for String {
    fn from(version: VllmVersion) -> Self {
        version.to_string()
    }
}

impl TryFrom<String> for VllmVersion {
    type Error = BadVersion;

    fn try_from(text: String) -> Result<Self, BadVersion> {
        text.parse()
    }
}

/// Text that is not a version of vLLM.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not a vllm version, expected e.g. 0.32.0")]
pub struct BadVersion(pub String);

impl FromStr for VllmVersion {
    type Err = BadVersion;

    fn from_str(text: &str) -> Result<Self, BadVersion> {
        let bad = || BadVersion(text.chars().take(64).collect());
        let public = text.trim();
        let public = public.strip_prefix('v').unwrap_or(public);
        let public = public.split('+').next().unwrap_or_default();
        let mut parts = public.split('.');
        let mut numbers = [0; 3];
        for (position, number) in numbers.iter_mut().enumerate() {
            let part = match parts.next() {
                Some(part) => part,
                None if position == 2 => break,
                None => return Err(bad()),
            };
            let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            // Only the last number may carry a suffix: 1rc2, 0a1, 0.post1 comes as a part of its own.
            let (digits, suffix) = part.split_at(digits);
            if !suffix.is_empty() && (position == 0 || !suffix.starts_with(char::is_alphabetic)) {
                return Err(bad());
            }
            // `0.1.dev493`: a development version before the first release that its builder knows.
            let none = position == 2 && digits.is_empty() && suffix.starts_with("dev");
            *number = if none { 0 } else { digits.parse().map_err(|_| bad())? };
            if !suffix.is_empty() {
                break;
            }
        }
        let [major, minor, patch] = numbers;
        Ok(Self::new(major, minor, patch))
    }
}

/// A version outside of the range that was read and tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub struct UnknownVersion(pub VllmVersion);

impl fmt::Display for UnknownVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (oldest, newest) = (VllmVersion::OLDEST, "0.33");
        if self.0.is_unnumbered() {
            write!(
                f,
                "vllm is a development build without a release number (0.1.devN, built without the tags of its \
                 repository), expected {oldest} to {newest}.x: build it with its tags (or with \
                 SETUPTOOLS_SCM_PRETEND_VERSION); --allow-untested-vllm takes it for the newest of these"
            )
        } else {
            write!(
                f,
                "vllm {} is not supported, expected {oldest} to {newest}.x; --allow-untested-vllm uses the closest \
                 known layout",
                self.0
            )
        }
    }
}

/// Positions in `EngineCoreRequest` (`vllm/v1/engine/__init__.py`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddPositions {
    /// `eos_token_id`, up to 0.16.
    pub eos_token_id: Option<usize>,
    /// `arrival_time`, required float.
    pub arrival_time: usize,
    /// `lora_request`, required array or nil.
    pub lora_request: usize,
    /// `cache_salt`, required str or nil.
    pub cache_salt: usize,
    /// `data_parallel_rank`, int or nil; the last required field.
    pub data_parallel_rank: usize,
    /// `prompt_embeds`, a tensor or nil.
    pub prompt_embeds: usize,
    /// `prompt_is_token_ids`, since 0.21.0.
    pub prompt_is_token_ids: Option<usize>,
    /// `client_index`.
    pub client_index: usize,
    /// `current_wave`.
    pub current_wave: usize,
    /// `priority`.
    pub priority: usize,
    /// `trace_headers`.
    pub trace_headers: usize,
    /// `resumable`, since 0.15.
    pub resumable: Option<usize>,
    /// `external_req_id`, since 0.14.
    pub external_req_id: Option<usize>,
    /// `reasoning_ended`, since 0.16.
    pub reasoning_ended: Option<usize>,
    /// `reasoning_parser_kwargs`, since 0.20.1.
    pub reasoning_parser_kwargs: Option<usize>,
    /// `abort_immediately`, since 0.21.
    pub abort_immediately: Option<usize>,
    /// `session_id`, since 0.28.
    pub session_id: Option<usize>,
    /// `kv_hints`, since 0.31.
    pub kv_hints: Option<usize>,
    /// How many fields there are.
    pub fields: usize,
}

impl AddPositions {
    /// Fields without a default: an array must have at least these.
    pub const fn required(&self) -> usize {
        self.data_parallel_rank + 1
    }
}

/// Positions in `EngineCoreOutputs` and `EngineCoreOutput`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputPositions {
    /// Number of fields of `EngineCoreOutputs`: 8, or 9 with `weight_version`.
    pub outputs_fields: usize,
    /// `weight_version` in `EngineCoreOutputs`, since 0.32.0.
    pub weight_version: Option<usize>,
    /// Number of fields of `EngineCoreOutput`.
    pub output_fields: usize,
    /// `num_cached_tokens`, an int with default 0 up to 0.19.
    pub num_cached_tokens: Option<usize>,
    /// `num_external_computed_tokens`, an int with default 0, 0.16 to 0.19.
    pub num_external_computed_tokens: Option<usize>,
    /// `num_nans_in_logits`, an int with default 0 since 0.11.1.
    pub num_nans_in_logits: Option<usize>,
}

/// `finish_reason` in `EngineCoreOutput`, in all versions.
pub const FINISH_REASON: usize = 5;

/// What a DP coordinator does with a frontend's FIRST_REQ while the group is not running.
#[cfg(any(test, feature = "test-support"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstReq {
    /// Up to 0.28: sends START_DP_WAVE, takes the group for running and publishes that.
    StartsAndSetsRunning,
    /// 0.29 to 0.32: sends START_DP_WAVE; only an engine's start_wave makes the group running.
    Starts,
    /// 0.33: frontends do not send it; engines start waves themselves.
    None,
}

/// How `MultiModalKwargsItem` is written (`vllm/v1/serial_utils.py`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MmForm {
    /// Up to 0.12: an array of elements; `field` is a name and its arguments.
    Positional,
    /// 0.13 to 0.15: an array of elements; `field` is a name and a map.
    Listed,
    /// Since 0.16: a map from key to element.
    Keyed,
}

/// Field positions and behaviour of one vLLM version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The version the layout was asked for.
    pub version: VllmVersion,
    /// Positions in `EngineCoreRequest`.
    pub add: AddPositions,
    /// Positions in `EngineCoreOutputs`.
    pub output: OutputPositions,
}

impl Layout {
    /// The layout of a version.
    pub fn for_version(version: VllmVersion) -> Result<Self, UnknownVersion> {
        if Self::is_known(version) { Ok(Self::build(version)) } else { Err(UnknownVersion(version)) }
    }

    /// The layout of a version, or of the closest known one (`--allow-untested-vllm`).
    pub fn closest(version: VllmVersion) -> Self {
        if Self::is_known(version) {
            Self::build(version)
        } else if version < VllmVersion::OLDEST && !version.is_unnumbered() {
            Self::build(VllmVersion::OLDEST)
        } else {
            Self::build(VllmVersion::NEWEST)
        }
    }

    /// Of the newest known version.
    pub fn newest() -> Self {
        Self::build(VllmVersion::NEWEST)
    }

    const fn is_known(version: VllmVersion) -> bool {
        version.major == 0
            && version.minor >= VllmVersion::OLDEST.minor
            && version.minor <= VllmVersion::NEWEST.minor
    }

    /// Of a version within the known range.
    pub(crate) fn build(version: VllmVersion) -> Self {
        Self { version, add: add_positions(version), output: output_positions(version) }
    }

    /// Length of an entry of `counts` in a publication: `[waiting, running]`, since 0.27 with
    /// `kv_cache_usage`. A frontend unpacks exactly this many.
    pub const fn counts_arity(&self) -> usize {
        if self.version.at_least(27, 0) { 3 } else { 2 }
    }

    /// What FIRST_REQ does.
    #[cfg(any(test, feature = "test-support"))]
    pub const fn first_req(&self) -> FirstReq {
        if self.version.at_least(33, 0) {
            FirstReq::None
        } else if self.version.at_least(29, 0) {
            FirstReq::Starts
        } else {
            FirstReq::StartsAndSetsRunning
        }
    }

    /// Whether an engine survives a second `READY` of the coordinator.
    pub const fn second_ready_tolerated(&self) -> bool {
        self.version.at_least(17, 0)
    }

    /// Whether `FinishReason.ERROR` exists.
    pub const fn error_finish_known(&self) -> bool {
        self.version.at_least(13, 0)
    }

    /// Whether an engine registers with an empty frame, and READY carries `num_gpu_blocks` and
    /// `dp_stats_address` instead.
    pub const fn registration_is_empty(&self) -> bool {
        !self.version.at_least(20, 0)
    }

    /// Whether READY of a lockstep engine carries `parallel_config_hash`.
    pub const fn ready_has_hash(&self) -> bool {
        self.version.at_least(11, 1)
    }

    /// Whether lockstep engines pause by consensus and resume through a barrier; paused ones drop START_DP_WAVE
    /// then, while earlier ones start to step.
    pub const fn two_phase_pause(&self) -> bool {
        self.version.at_least(21, 0)
    }

    /// Whether `set_weight_version` and `get_weight_version` exist.
    pub const fn has_weight_version(&self) -> bool {
        self.version.at_least(27, 0)
    }

    /// Whether INIT of a lockstep engine names `_coord_store_port`.
    pub const fn init_has_coord_store_port(&self) -> bool {
        self.version.at_least(32, 0)
    }

    /// Highest temperature `SamplingParams` takes; decoding another one raises.
    pub const fn max_temperature(&self) -> f64 {
        if self.version.at_least(24, 0) { 2.0 } else { f64::MAX }
    }

    /// Whether `StructuredOutputsParams` without any constraint raises.
    pub(crate) const fn structured_outputs_need_one(&self) -> bool {
        self.version.at_least(15, 0)
    }

    /// Whether `prompt_logprob_token_ids` is a numpy array instead of a list.
    pub(crate) const fn prompt_logprob_ids_are_ndarray(&self) -> bool {
        self.version.at_least(32, 0)
    }

    /// How `MultiModalKwargsItem` is written.
    pub(crate) const fn mm_form(&self) -> MmForm {
        if self.version.at_least(16, 0) {
            MmForm::Keyed
        } else if self.version.at_least(13, 0) {
            MmForm::Listed
        } else {
            MmForm::Positional
        }
    }

    /// Whether an empty string in `bad_words` raises.
    pub(crate) const fn bad_words_may_be_empty(&self) -> bool {
        !self.version.at_least(22, 0)
    }

    /// Which of the forms of `PoolingParams`, oldest first.
    pub(crate) fn pooling_form(&self) -> usize {
        self.since(&[(11, 1), (16, 0), (17, 0), (18, 0), (33, 0)])
    }

    /// Which of the forms of `LoRARequest`, oldest first.
    pub(crate) fn lora_form(&self) -> usize {
        self.since(&[(14, 0), (32, 0)])
    }

    /// How many of these changes, each given as minor and patch number, the version has.
    fn since(&self, changes: &[(u16, u16)]) -> usize {
        changes.iter().filter(|(minor, patch)| self.version.at_least(*minor, *patch)).count()
    }
}

fn add_positions(version: VllmVersion) -> AddPositions {
    let fields = Cell::new(5);
    let next = || fields.replace(fields.get() + 1);
    let only_if = |present: bool| present.then(next);
    // Fields in their order, with the versions that have each.
    AddPositions {
        eos_token_id: only_if(!version.at_least(17, 0)),
        arrival_time: next(),
        lora_request: next(),
        cache_salt: next(),
        data_parallel_rank: next(),
        prompt_embeds: next(),
        prompt_is_token_ids: only_if(version.at_least(21, 0)),
        client_index: next(),
        current_wave: next(),
        priority: next(),
        trace_headers: next(),
        resumable: only_if(version.at_least(15, 0)),
        external_req_id: only_if(version.at_least(14, 0)),
        reasoning_ended: only_if(version.at_least(16, 0)),
        reasoning_parser_kwargs: only_if(version.at_least(20, 1)),
        abort_immediately: only_if(version.at_least(21, 0)),
        session_id: only_if(version.at_least(28, 0)),
        kv_hints: only_if(version.at_least(31, 0)),
        fields: fields.get(),
    }
}

fn output_positions(version: VllmVersion) -> OutputPositions {
    let stamped = version.at_least(32, 0);
    let output_fields = match version.minor {
        11 if version.patch == 0 => 11,
        ..14 => 12,
        14..16 => 13,
        16..20 => 14,
        20..26 => 13,
        26..28 => 14,
        28 => 16,
        29..31 => 17,
        31..33 => 18,
        _ => 19,
    };
    OutputPositions {
        outputs_fields: if stamped { 9 } else { 8 },
        weight_version: stamped.then_some(8),
        output_fields,
        num_cached_tokens: (!version.at_least(20, 0)).then_some(10),
        num_external_computed_tokens: (version.at_least(16, 0) && !version.at_least(20, 0)).then_some(11),
        // Fields before it came and went.
        num_nans_in_logits: match version.minor {
            11 if version.patch == 0 => None,
            ..14 => Some(11),
            14..16 => Some(12),
            20..26 => Some(12),
            _ => Some(13),
        },
    }
}
