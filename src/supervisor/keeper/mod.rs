//! The keeper: a process of its own that owns the vLLM processes of one state directory.

pub mod wire;
