//! Fake frontends and engines in the process of a test, and their requests.

use std::collections::BTreeSet;
use std::time::Instant;

use dp_sidecar_testkit::Reporter;
use dp_sidecar_testkit::engine::{EngineOptions, FakeEngine};
use dp_sidecar_testkit::frontend::{Completion, FakeFrontend, FrontendOptions, NewRequest};

use super::harness::{SOON, Sidecar};

/// A fake frontend of `size` engines.
pub(crate) fn frontend(size: u16, change: impl FnOnce(&mut FrontendOptions)) -> FakeFrontend {
    let mut options = FrontendOptions { size, ..FrontendOptions::default() };
    change(&mut options);
    FakeFrontend::bind(options, Reporter::memory()).unwrap()
}

/// A fake engine in this process, for a sidecar that waits for engines.
pub(crate) fn engine(sidecar: &Sidecar, rank: u16, change: impl FnOnce(&mut EngineOptions)) -> FakeEngine {
    let mut options = EngineOptions {
        rank,
        size: sidecar.size(),
        handshake: sidecar.handshake(),
        ..EngineOptions::default()
    };
    change(&mut options);
    FakeEngine::spawn(options, Reporter::memory()).unwrap()
}

/// Sends `count` requests of `tokens` tokens and waits for all.
#[track_caller]
pub(crate) fn complete_all(
    frontend: &mut FakeFrontend,
    name: &str,
    count: u32,
    tokens: u32,
) -> Vec<Completion> {
    let servers = frontend.servers.len();
    let ids: Vec<(usize, String)> =
        (0..count).map(|at| (usize::try_from(at).unwrap() % servers, format!("{name}-{at}"))).collect();
    for (server, id) in &ids {
        frontend.servers[*server].add(&NewRequest::new(id, tokens)).unwrap();
    }
    ids.iter().map(|(server, id)| frontend.servers[*server].await_request(id, SOON).unwrap()).collect()
}

/// Completes requests, `count` at a time, until each of `size` ranks has answered one; returns them all. A frontend
/// may still hold counts that steer it away from a rank that has been admitted just now.
#[track_caller]
pub(crate) fn complete_on_all_ranks(
    frontend: &mut FakeFrontend,
    name: &str,
    count: u32,
    tokens: u32,
) -> Vec<Completion> {
    let size = usize::from(frontend.options().size);
    let end = Instant::now() + SOON;
    let mut done = Vec::new();
    for round in 0.. {
        done.extend(complete_all(frontend, &format!("{name}-{round}"), count, tokens));
        let ranks: BTreeSet<u16> = done.iter().map(|done| done.rank).collect();
        if ranks.len() == size {
            break;
        }
        assert!(Instant::now() < end, "not all of {size} ranks serve: {ranks:?}");
    }
    done
}
