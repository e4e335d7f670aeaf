//! Registration: the first frame of an engine on each input socket, and what it says about the engine.
//!
//! Mirrors `EngineCoreReadyResponse` of `vllm/v1/engine/__init__.py`.

use std::collections::BTreeMap;

use bytes::Bytes;
use thiserror::Error;

use crate::error::DecodeError;
use crate::handshake::{read_map, read_text};
use crate::layout::{BadVersion, Layout, UnknownVersion, VllmVersion};
use crate::positional;
use crate::write;

const NAME: &str = "EngineCoreReadyResponse";

/// What an engine says of itself on each input socket once it is started
/// (vLLM: `EngineCoreReadyResponse`), as far as it is needed here. Which keys there are depends on
/// the version; up to 0.19 the frame is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineReadyResponse {
    /// Stats address of the frontend this engine was started by.
    pub dp_stats_address: Option<String>,
    /// Model dtype, e.g. `bfloat16`; since 0.22.0.
    pub dtype: Option<String>,
    /// Version of vLLM, since 0.23.0.
    pub vllm_version: Option<String>,
    /// 1 for dense engines, whatever the deployment's size.
    pub data_parallel_size: Option<u64>,
    /// All other keys, each with its raw value.
    pub other: BTreeMap<String, Vec<u8>>,
}

impl EngineReadyResponse {
    /// Reads a registration frame. An empty frame gives an empty response.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        let mut ready = Self::default();
        if frame.is_empty() {
            return Ok(ready);
        }
        read_map(frame, NAME, |key, scanner| {
            match key {
                "dp_stats_address" => ready.dp_stats_address = read_text(scanner)?,
                "dtype" => ready.dtype = read_text(scanner)?,
                "vllm_version" => ready.vllm_version = read_text(scanner)?,
                "data_parallel_size" => {
                    ready.data_parallel_size = scanner.optional(|s| s.integer("int of 64 bits"))?;
                }
                _ => {
                    ready.other.insert(key.to_owned(), scanner.raw()?.to_vec());
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
    write::optional(&mut value, address, write::str);
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
