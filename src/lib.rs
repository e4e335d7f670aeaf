//! dp-sidecar: hosts vLLM data-parallel engines on one node. See ARCHITECTURE.md.
//!
//! The program is [`cli::main`]. Everything else is private, so that what is used by tests alone shows as dead code in
//! an ordinary build; the feature `test-support` opens it to the tests and benchmarks of this repository.
#![deny(unsafe_code)]
#![cfg_attr(
    not(feature = "test-support"),
    allow(unreachable_pub, reason = "`pub` says what a module offers to the others and to tests")
)]

/// Makes modules public with the feature, private without. `cargo fmt` looks for modules in macros of this name only.
macro_rules! cfg_if {
    (if #[cfg(feature = "test-support")] { $(pub mod $name:ident;)* }) => {
        $(
            #[cfg(feature = "test-support")]
            pub mod $name;
            #[cfg(not(feature = "test-support"))]
            mod $name;
        )*
    };
}

cfg_if! {
    if #[cfg(feature = "test-support")] {
        pub mod admin;
        pub mod api;
        pub mod app;
        pub mod config;
        pub mod driver;
        pub mod exit_code;
        pub mod gpu;
        pub mod http;
        pub mod link;
        pub mod manifest;
        pub mod peer;
        pub mod relay;
        pub mod shared_memory;
        pub mod shutdown;
        pub mod staging;
        pub mod state_dir;
        pub mod supervisor;
        pub mod tasks;
        pub mod telemetry;
        pub mod token;
        pub mod transport;
    }
}

pub mod cli;
mod duration;
mod files;
mod log_limit;
mod memory;
mod msgpack;
mod net;
mod parallel;
mod strangers;

#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
