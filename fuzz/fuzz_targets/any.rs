//! Hands libFuzzer's inputs to the target named by `DP_SIDECAR_FUZZ_TARGET`; see `src/fuzz.rs`.
#![no_main]

use std::sync::OnceLock;

use dp_sidecar::fuzz::{TARGETS, Target, target};
use libfuzzer_sys::fuzz_target;

static CHOSEN: OnceLock<Target> = OnceLock::new();

fuzz_target!(init: {
    let name = std::env::var("DP_SIDECAR_FUZZ_TARGET").unwrap_or_default();
    let chosen = target(&name).unwrap_or_else(|| {
        panic!("no target {name:?}: {}", TARGETS.map(|(known, _)| known).join(" "))
    });
    CHOSEN.get_or_init(|| chosen);
}, |data: &[u8]| {
    if let Some(chosen) = CHOSEN.get() {
        chosen(data);
    }
});
