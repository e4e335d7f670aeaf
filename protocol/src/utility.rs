//! Utility calls: calls of methods of the engine core, and their answers.
//!
//! Mirrors `EngineCoreRequestType.UTILITY`, `UtilityOutput` (`vllm/v1/engine/__init__.py`) and
//! `UtilityResult` (`vllm/v1/serial_utils.py`), the same in 0.11.0 to 0.33.0.

use crate::error::DecodeError;
use crate::frames::{Frames, RequestType};
use crate::ids::{CallId, ClientIndex};
use crate::positional::{self, Scanner};
use crate::write;

const NAME: &str = "UtilityOutput";

/// A call to an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct UtilityCall {
    /// Whose output socket gets the answer: the caller's slot. An index the engine does not have
    /// kills its output thread.
    pub client_index: ClientIndex,
    /// Any number of the caller's that is not in use; negative ones are vLLM's.
    pub call_id: CallId,
    /// Method of the engine core.
    pub method: String,
    /// Positional arguments; trailing ones with defaults may be left out.
    pub args: Vec<rmpv::Value>,
}

impl UtilityCall {
    pub fn encode(&self) -> Frames {
        let mut out = Vec::with_capacity(64);
        write::array(&mut out, 4);
        write::uint(&mut out, u64::from(self.client_index.0));
        write::wide(&mut out, self.call_id.0);
        write::str(&mut out, &self.method);
        write::array(&mut out, self.args.len());
        for arg in &self.args {
            write::value(&mut out, arg);
        }
        vec![RequestType::Utility.to_frame(), out.into()]
    }
}

/// The answer to a call: the result, or the failure message.
#[derive(Clone, Debug, PartialEq)]
pub struct UtilityOutput {
    pub call_id: CallId,
    /// What the method returned; tensors stay `[dtype, shape, data]`.
    pub result: Result<rmpv::Value, String>,
}

impl UtilityOutput {
    /// Reads `[call_id, failure_message, [type_info, data]]`. `type_info` is ignored: it only tells
    /// Python which class to build.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut scanner = Scanner::new(bytes);
        let fields = scanner.array().map_err(|e| e.within(NAME, "top level"))?;
        if fields == 0 {
            return Err(DecodeError::TooShort { message: NAME, unit: "fields", expected: 1, actual: 0 });
        }
        let call_id = CallId(scanner.int().map_err(|e| e.within(NAME, "call_id"))?);
        if fields > 1
            && let Some(message) =
                scanner.optional(Scanner::str).map_err(|e| e.within(NAME, "failure_message"))?
        {
            return Ok(Self { call_id, result: Err(message.to_owned()) });
        }
        let mut result = rmpv::Value::Nil;
        let fail = |e: positional::ScanError| e.within(NAME, "result");
        if fields > 2 && !scanner.nil().map_err(fail)? {
            let parts = scanner.array().map_err(fail)?;
            if parts != 2 {
                return Err(DecodeError::Unexpected {
                    message: NAME,
                    at: "result".to_owned(),
                    expected: "array of 2",
                    actual: format!("array of {parts}"),
                });
            }
            scanner.skip().map_err(fail)?;
            let data = scanner.raw().map_err(fail)?;
            result = positional::value(data).map_err(fail)?;
        }
        Ok(Self { call_id, result: Ok(result) })
    }

    /// The array, to stand in an `EngineCoreOutputs`.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        write::array(out, 3);
        write::wide(out, self.call_id.0);
        match &self.result {
            Ok(value) => {
                write::nil(out);
                write::array(out, 2);
                write::nil(out);
                write::value(out, value);
            }
            Err(message) => {
                write::str(out, message);
                write::nil(out);
            }
        }
    }
}
