//! FIRST_REQ from frontends and publications to them (channel F), for fakes and tests.

use bytes::Bytes;

use super::fields;
use crate::error::DecodeError;
use crate::ids::{EngineIdentity, EngineIndex, Wave};
use crate::layout::Layout;
use crate::positional::{Kind, ScanError, Scanner};
use crate::stats::Load;
use crate::write;

/// What a frontend sends upstream on the subscription socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendUpstream {
    /// It sent a request to an engine while the group was not running (up to 0.32).
    FirstReq {
        target: EngineIndex,
        /// The wave it believed in.
        wave: Wave,
    },
    /// The number of engines changed (elastic EP).
    ScaleElasticEp {
        /// The new number.
        engines: u64,
    },
}

impl FrontendUpstream {
    /// Reads the message.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        const NAME: &str = "FIRST_REQ";
        let mut scanner = Scanner::new(frame);
        fields(&mut scanner, NAME, 2)?;
        let fail = |e: ScanError| e.within(NAME, "target");
        let target = match scanner.kind().map_err(fail)? {
            Kind::Str => {
                let name = scanner.str().map_err(fail)?;
                if name != "SCALE_ELASTIC_EP" {
                    return Err(DecodeError::Unexpected {
                        message: NAME,
                        at: "target".to_owned(),
                        expected: "an identity, or SCALE_ELASTIC_EP",
                        actual: name.chars().take(40).collect(),
                    });
                }
                let engines = scanner.integer("int of 0 or more").map_err(|e| e.within(NAME, "engines"))?;
                return Ok(Self::ScaleElasticEp { engines });
            }
            Kind::Int => EngineIndex(scanner.integer("engine index").map_err(fail)?),
            _ => {
                let identity = scanner.bin().map_err(fail)?;
                EngineIdentity::from_frame(identity)
                    .ok_or_else(|| DecodeError::Unexpected {
                        message: NAME,
                        at: "target".to_owned(),
                        expected: "bin of 2",
                        actual: format!("bin of {}", identity.len()),
                    })?
                    .index()
            }
        };
        let wave = scanner.integer("wave of 0 or more").map_err(|e| e.within(NAME, "wave"))?;
        Ok(Self::FirstReq { target, wave: Wave(wave) })
    }

    /// The message as a frontend sends it.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(24);
        write::array(&mut out, 2);
        match self {
            Self::FirstReq { target, wave } => {
                write::bin(&mut out, &target.identity().0);
                write::uint(&mut out, wave.0);
            }
            Self::ScaleElasticEp { engines } => {
                write::str(&mut out, "SCALE_ELASTIC_EP");
                write::uint(&mut out, *engines);
            }
        }
        out.into()
    }
}

/// What the coordinator tells frontends.
#[derive(Clone, Debug, PartialEq)]
pub struct Publication {
    /// Load by rank; `None` if only wave or running changed.
    pub counts: Option<Vec<Load>>,
    pub wave: Wave,
    /// Whether the group runs.
    pub running: bool,
}

impl Publication {
    /// The message, with counts of the arity the frontend's version unpacks.
    pub fn encode(&self, layout: &Layout) -> Bytes {
        let arity = layout.counts_arity();
        let mut out = Vec::with_capacity(16 + self.counts.as_ref().map_or(0, Vec::len) * 16);
        write::array(&mut out, 3);
        match &self.counts {
            Some(counts) => {
                write::array(&mut out, counts.len());
                for engine in counts {
                    write::array(&mut out, arity);
                    write::uint(&mut out, engine.waiting);
                    write::uint(&mut out, engine.running);
                    if arity > 2 {
                        write::float(&mut out, engine.kv_cache_usage);
                    }
                }
            }
            None => write::nil(&mut out),
        }
        write::uint(&mut out, self.wave.0);
        write::bool(&mut out, self.running);
        out.into()
    }

    /// Reads a publication of either arity.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        const NAME: &str = "publication";
        let mut scanner = Scanner::new(frame);
        fields(&mut scanner, NAME, 3)?;
        let counts = scanner.optional(read_counts).map_err(|e| e.within(NAME, "counts"))?;
        let wave = scanner.integer("wave of 0 or more").map_err(|e| e.within(NAME, "wave"))?;
        let running = scanner.bool().map_err(|e| e.within(NAME, "running"))?;
        Ok(Self { counts, wave: Wave(wave), running })
    }
}

fn read_counts(scanner: &mut Scanner<'_>) -> Result<Vec<Load>, ScanError> {
    let engines = scanner.array()?;
    let mut counts = Vec::new();
    for _ in 0..engines {
        let mut entry = Load::default();
        for position in 0..scanner.array()? {
            match position {
                0 => entry.waiting = scanner.integer("int of 0 or more")?,
                1 => entry.running = scanner.integer("int of 0 or more")?,
                2 => entry.kv_cache_usage = scanner.float()?,
                _ => scanner.skip()?,
            }
        }
        counts.push(entry);
    }
    Ok(counts)
}
