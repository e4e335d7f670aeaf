//! Messages of the DP coordinator: START_DP_WAVE to engines (channel B), `vllm/v1/engine/coordinator.py`, 0.11.0 to
//! 0.33.0. What it has with frontends (channel F) stays between them and their own: for fakes and tests.

use crate::error::DecodeError;
use crate::frames::{Frames, RequestType};
use crate::ids::{EngineIdentity, EngineIndex, Wave};
use crate::positional::{Kind, ScanError, Scanner};
use crate::write;

#[cfg(any(test, feature = "test-support"))]
mod frontends;

#[cfg(any(test, feature = "test-support"))]
pub use frontends::{FrontendUpstream, Publication};

/// Wakes the engines of a lockstep group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartDpWave {
    /// The wave to run.
    pub wave: Wave,
    /// The engine that runs already.
    pub exclude: Option<EngineIndex>,
}

impl StartDpWave {
    /// The message, `[02][wave, exclude]`.
    pub fn encode(&self) -> Frames {
        let mut out = Vec::with_capacity(8);
        write::array(&mut out, 2);
        write::uint(&mut out, self.wave.0);
        write::optional(&mut out, self.exclude, |out, index| write::uint(out, u64::from(index.0)));
        vec![RequestType::StartDpWave.to_frame(), out.into()]
    }

    /// Reads the payload. vLLM's coordinator names the excluded engine by index, or, relaying
    /// FIRST_REQ, by its two-byte identity, which no engine recognizes as itself: that one is
    /// reported as nobody, too.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        const NAME: &str = "START_DP_WAVE";
        let mut scanner = Scanner::new(payload);
        fields(&mut scanner, NAME, 2)?;
        let wave = scanner.integer("wave of 0 or more").map_err(|e| e.within(NAME, "wave"))?;
        let fail = |e: ScanError| e.within(NAME, "exclude");
        let exclude = match scanner.kind().map_err(fail)? {
            Kind::Int => Some(EngineIndex(scanner.integer("engine index").map_err(fail)?)),
            Kind::Bin => {
                let identity = scanner.bin().map_err(fail)?;
                EngineIdentity::from_frame(identity).ok_or_else(|| DecodeError::Unexpected {
                    message: NAME,
                    at: "exclude".to_owned(),
                    expected: "bin of 2",
                    actual: format!("bin of {}", identity.len()),
                })?;
                None
            }
            _ => scanner.optional(|s| s.integer("nil, int or bin")).map_err(fail)?.map(EngineIndex),
        };
        Ok(Self { wave: Wave(wave), exclude })
    }
}

fn fields(scanner: &mut Scanner<'_>, message: &'static str, expected: usize) -> Result<(), DecodeError> {
    let actual = scanner.array().map_err(|e| e.within(message, "top level"))?;
    if actual < expected {
        return Err(DecodeError::TooShort { message, unit: "fields", expected, actual });
    }
    Ok(())
}
