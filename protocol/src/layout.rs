//! Field positions and behaviour per vLLM version.

/// Field positions and behaviour of one vLLM version (to be written).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {}
