//! One controller: control calls of frontends and the sidecar's own take the same lock, and reach
//! all ranks.

use dp_sidecar_testkit::frontend::NewRequest;
use rmpv::Value;

use super::harness::{SOON, Setup, complete_all, directory, engine, frontend, model};

#[test]
fn a_lockstep_group_paused_by_two_frontends_at_once_neither_hangs_nor_splits() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, true);
    let mut a = frontend(2, |options| options.moe = true);
    let mut b = frontend(2, |options| options.moe = true);
    let sidecar = Setup::spawning(2, &model).frontend(&a).frontend(&b).start();
    a.startup(SOON).unwrap();
    b.startup(SOON).unwrap();
    for round in 0..3 {
        // Interleaved, and in opposite order of ranks: on bare engines a recipe for a hang.
        let mode = || vec![Value::from("abort")];
        let calls_a: Vec<u64> =
            [0, 1].map(|rank| a.server().start_call(rank, "pause_scheduler", mode()).unwrap()).to_vec();
        let calls_b: Vec<u64> =
            [1, 0].map(|rank| b.server().start_call(rank, "pause_scheduler", mode()).unwrap()).to_vec();
        let mut granted = 0;
        for (frontend, calls) in [(&mut a, &calls_a), (&mut b, &calls_b)] {
            let results: Vec<_> =
                calls.iter().map(|call| frontend.server().await_call(*call, SOON)).collect();
            assert!(
                results.iter().all(Result::is_ok) || results.iter().all(Result::is_err),
                "round {round}: one answer for all ranks: {results:?}"
            );
            granted += usize::from(results[0].is_ok());
        }
        assert!(granted >= 1, "round {round}");
        let paused = a.server().call_all("is_scheduler_paused", &[], SOON).unwrap();
        assert_eq!(paused, vec![Value::from(true); 2]);
        for frontend in [&mut a, &mut b] {
            // The one that was refused may not resume; either way nothing hangs.
            let _ = frontend.server().call_all("resume_scheduler", &[], SOON);
        }
        let paused = b.server().call_all("is_scheduler_paused", &[], SOON).unwrap();
        assert_eq!(paused, vec![Value::from(false); 2]);
        for (name, frontend) in [("a", &mut a), ("b", &mut b)] {
            let done = complete_all(frontend, &format!("{name}{round}"), 4, 3);
            assert!(done.iter().all(|done| done.tokens == model.tokens(3)));
        }
    }
    drop(sidecar);
}

#[test]
fn pause_and_resume_by_command_hold_requests_and_let_them_go() {
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::waiting(2, false).frontend(&frontend).start();
    let _engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    frontend.startup(SOON).unwrap();
    let said = sidecar.command(&["pause"]);
    assert_eq!(said.code, 0, "{}", said.text());
    sidecar.await_status("paused", |status| status["controller"]["paused"] == true);
    frontend.server().add(&NewRequest::new("held", 3)).unwrap();
    let again = sidecar.command(&["pause"]);
    assert_eq!(again.code, 0, "{}", again.text());
    assert_eq!(frontend.server().request("held").unwrap().tokens.len(), 0);
    let said = sidecar.command(&["resume"]);
    assert_eq!(said.code, 0, "{}", said.text());
    let done = frontend.server().await_request("held", SOON).unwrap();
    assert_eq!(done.tokens.len(), 3);
}

#[test]
fn a_weight_call_of_a_frontend_during_an_update_is_refused_and_names_it() {
    let directory = directory();
    let old = model(directory.path(), "old", 1, false);
    let new = model(directory.path(), "new", 2, false);
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::spawning(2, &old).env("FAKE_VLLM_LOAD_MS", "1500").frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    let mut update = sidecar.begin_update(&new.path, &["--version", "v2", "--id", "the-update"]);
    sidecar.await_update("the-update");
    let calls: Vec<u64> =
        [0, 1].map(|rank| frontend.server().start_call(rank, "resume_scheduler", vec![]).unwrap()).to_vec();
    for call in calls {
        let refused = frontend.server().await_call(call, SOON).unwrap_err();
        assert!(refused.to_string().contains("the-update"), "{refused}");
    }
    let said = update.wait();
    assert_eq!(said.code, 0, "{}", said.text());
    let done = complete_all(&mut frontend, "after", 4, 4);
    assert!(done.iter().all(|done| done.tokens == new.tokens(4)));
}
