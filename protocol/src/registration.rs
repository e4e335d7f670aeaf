//! Registration: the first frame of an engine on each input socket, and what it says about the engine.
//!
//! Mirrors `EngineCoreReadyResponse` of `vllm/v1/engine/__init__.py`.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::DecodeError;
use crate::handshake::read_map;
use crate::layout::{BadVersion, Layout, UnknownVersion, VllmVersion};
use crate::positional::{self, Scanner};
use crate::write;

/// What an engine says of itself on each input socket once it is started
/// (vLLM: `EngineCoreReadyResponse`). Which keys there are depends on the version; up to 0.19 the
/// frame is empty. Sizes are in tokens, counts without unit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineReadyResponse {
    /// Longest sequence, after the KV cache was fitted.
    pub max_model_len: Option<u64>,
    /// KV cache blocks.
    pub num_gpu_blocks: Option<u64>,
    /// Tokens per block.
    pub block_size: Option<u64>,
    /// Stats address of the frontend this engine was started by.
    pub dp_stats_address: Option<String>,
    /// Model dtype, e.g. `bfloat16`.
    pub dtype: Option<String>,
    /// Version of vLLM, since 0.23.0.
    pub vllm_version: Option<String>,
    /// Workers of one DP rank.
    pub world_size: Option<u64>,
    /// 1 for dense engines, whatever the deployment's size.
    pub data_parallel_size: Option<u64>,
    /// TP.
    pub tensor_parallel_size: Option<u64>,
    /// PP.
    pub pipeline_parallel_size: Option<u64>,
    /// DCP.
    pub decode_context_parallel_size: Option<u64>,
    /// True global rank, since 0.27.0.
    pub data_parallel_rank: Option<u64>,
    /// Scheduler limit.
    pub max_num_seqs: Option<u64>,
    /// Scheduler limit.
    pub max_num_batched_tokens: Option<u64>,
    /// Random name of the instance.
    pub instance_id: Option<String>,
    /// KV cache capacity in tokens.
    pub kv_cache_size_tokens: Option<u64>,
    /// Whole sequences that fit the KV cache.
    pub kv_cache_max_concurrency: Option<f64>,
    /// `--weight-transfer-config` backend.
    pub weight_transfer_backend: Option<String>,
    /// `--enable-sleep-mode`.
    pub enable_sleep_mode: Option<bool>,
    /// `--enable-lora`.
    pub supports_lora: Option<bool>,
    /// Keys not named here, each with its raw value.
    pub other: BTreeMap<String, Vec<u8>>,
}

impl EngineReadyResponse {
    /// Reads a registration frame. An empty frame gives an empty response.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        const NAME: &str = "EngineCoreReadyResponse";
        let mut ready = Self::default();
        if frame.is_empty() {
            return Ok(ready);
        }
        read_map(frame, NAME, |key, scanner| {
            let number = |s: &mut Scanner<'_>| s.optional(|s| s.integer("int of 64 bits"));
            let text = |s: &mut Scanner<'_>| s.optional(|s| s.str().map(str::to_owned));
            match key {
                "max_model_len" => ready.max_model_len = number(scanner)?,
                "num_gpu_blocks" => ready.num_gpu_blocks = number(scanner)?,
                "block_size" => ready.block_size = number(scanner)?,
                "dp_stats_address" => ready.dp_stats_address = text(scanner)?,
                "dtype" => ready.dtype = text(scanner)?,
                "vllm_version" => ready.vllm_version = text(scanner)?,
                "world_size" => ready.world_size = number(scanner)?,
                "data_parallel_size" => ready.data_parallel_size = number(scanner)?,
                "tensor_parallel_size" => ready.tensor_parallel_size = number(scanner)?,
                "pipeline_parallel_size" => ready.pipeline_parallel_size = number(scanner)?,
                "decode_context_parallel_size" => {
                    ready.decode_context_parallel_size = number(scanner)?;
                }
                "data_parallel_rank" => ready.data_parallel_rank = number(scanner)?,
                "max_num_seqs" => ready.max_num_seqs = number(scanner)?,
                "max_num_batched_tokens" => ready.max_num_batched_tokens = number(scanner)?,
                "instance_id" => ready.instance_id = text(scanner)?,
                "kv_cache_size_tokens" => ready.kv_cache_size_tokens = number(scanner)?,
                "kv_cache_max_concurrency" => {
                    ready.kv_cache_max_concurrency = scanner.optional(Scanner::float)?;
                }
                "weight_transfer_backend" => ready.weight_transfer_backend = text(scanner)?,
                "enable_sleep_mode" => ready.enable_sleep_mode = scanner.optional(Scanner::bool)?,
                "supports_lora" => ready.supports_lora = scanner.optional(Scanner::bool)?,
                _ => {
                    let value = scanner.raw()?.to_vec();
                    ready.other.insert(key.to_owned(), value);
                }
            }
            Ok(())
        })?;
        Ok(ready)
    }
}

/// The registration frame with another `dp_stats_address`; everything else stays byte for byte.
///
/// A frontend insists on its own stats address (it asserts equality since 0.20). An empty frame
/// (up to 0.19), or one without the key, is returned as it is.
pub fn with_dp_stats_address(frame: &Bytes, address: Option<&str>) -> Result<Bytes, DecodeError> {
    const NAME: &str = "EngineCoreReadyResponse";
    if frame.is_empty() {
        return Ok(frame.clone());
    }
    let mut found = None;
    read_map(frame, NAME, |key, scanner| {
        let start = scanner.position();
        scanner.skip()?;
        if key == "dp_stats_address" {
            found = Some(start..scanner.position());
        }
        Ok(())
    })?;
    let Some(range) = found else {
        return Ok(frame.clone());
    };
    let mut value = Vec::new();
    write::opt_str(&mut value, address);
    Ok(positional::splice(frame, range, &value))
}

/// Finds the layout from an engine's registration frame (its ready response).
///
/// `expected` is what the operator or the installed package says, if known; it decides where
/// the frame alone cannot, and must agree where it can.
pub fn detect_layout(frame: &[u8], expected: Option<VllmVersion>) -> Result<Detected, DetectError> {
    let (first, last) = if frame.is_empty() {
        (VllmVersion::OLDEST, VllmVersion::new(0, 19, u16::MAX))
    } else {
        let ready = EngineReadyResponse::decode(frame).map_err(DetectError::Registration)?;
        if let Some(text) = &ready.vllm_version {
            let version: VllmVersion = text.parse().map_err(DetectError::Version)?;
            let layout = Layout::for_version(version).map_err(DetectError::Unknown)?;
            return Ok(Detected { layout, certain: true });
        }
        if ready.dtype.is_some() {
            (VllmVersion::new(0, 22, 0), VllmVersion::new(0, 22, u16::MAX))
        } else {
            (VllmVersion::new(0, 20, 0), VllmVersion::new(0, 21, u16::MAX))
        }
    };
    match expected {
        Some(version) if (first..=last).contains(&version) => Ok(Detected {
            layout: Layout::for_version(version).map_err(DetectError::Unknown)?,
            certain: true,
        }),
        Some(version) => Err(DetectError::Differs { expected: version, first, last: last.minor }),
        None => {
            // The releases that were run without a version on the wire.
            let guess = match last.minor {
                19 => VllmVersion::new(0, 19, 1),
                21 => VllmVersion::new(0, 20, 2),
                _ => VllmVersion::new(0, 22, 1),
            };
            Ok(Detected { layout: Layout::build(guess), certain: last.minor == 22 })
        }
    }
}

/// What [`detect_layout`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detected {
    /// The layout to use.
    pub layout: Layout,
    /// False if the frame fits several layouts and no expected version was given: up to 0.19 and
    /// 0.20 / 0.21 look the same on the wire.
    pub certain: bool,
}

/// Why the layout of an engine could not be told.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DetectError {
    /// The frame is not a ready response.
    #[error("registration: {0}")]
    Registration(#[source] crate::DecodeError),
    /// `vllm_version` is not a version.
    #[error("registration: {0}")]
    Version(#[source] BadVersion),
    /// A version out of range.
    #[error("registration: {0}")]
    Unknown(#[source] UnknownVersion),
    /// The expected version does not register like this.
    #[error("registration: looks like vllm {first} to 0.{last}.x, expected {expected}")]
    Differs {
        /// What was expected.
        expected: VllmVersion,
        /// Oldest version that registers like this.
        first: VllmVersion,
        /// Minor number of the newest one.
        last: u16,
    },
}
