//! One update, from its request to its end.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_update_reaches_all_engines_in_order_and_is_remembered() {
    let world = world(GroupKind::Lockstep).await;
    let mut run = world.updates.start(world.request("u1")).await.unwrap();
    let (mut phases, mut hashed) = (Vec::new(), None);
    while let Some(event) = run.events.recv().await {
        match event {
            UpdateEvent::Progress { phase, .. } => {
                if phases.last() != Some(&phase) {
                    phases.push(phase);
                }
            }
            UpdateEvent::Hashing { done, total } => hashed = Some((done, total)),
            UpdateEvent::Staging { .. } => panic!("no node has a staging area"),
        }
    }
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Committed, "{record:?}");
    assert_eq!(hashed, Some((3, 3)));
    for phase in [Phase::Staging, Phase::Pausing, Phase::Loading, Phase::Committing, Phase::Resuming] {
        assert!(phases.contains(&phase), "{phase} is not in {phases:?}");
    }
    world.all_hold("new");
    for rank in &world.ranks {
        assert_eq!(
            rank.take_log(),
            [
                "admission false".to_owned(),
                "pause wait false".to_owned(),
                format!("load {}", world.path("new")),
                "version v1".to_owned(),
                "reset false true".to_owned(),
                "resume".to_owned(),
                "admission true".to_owned(),
            ]
        );
    }
    assert_eq!(record.record.ranks[&EngineIndex(1)].workers[0].tensors, 2);
    let status = world.updates.snapshot.borrow().clone();
    assert_eq!((status.version.0.as_str(), status.running), ("v1", None));
    assert_eq!(status.last, Some(record));
    assert!(world.dir.path().join("committed.json").is_file());
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_bad_directory_is_refused_and_no_engine_hears_of_it() {
    let world = world(GroupKind::Independent).await;
    let bad = world.dir.path().join("bad");
    std::fs::create_dir(&bad).unwrap();
    write(&bad, "model.safetensors", &[("a", "U8", &[3], &[1, 2, 3])]);
    let mut request = world.request("u1");
    request.path = Some(bad);
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("a has shape [3], expected [2]; missing b"), "{}", record.message);
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), [""; 0]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_version_is_that_of_one_checkpoint() {
    let world = world(GroupKind::Independent).await;
    assert_eq!(*world.update(world.request("u1")).await.outcome(), Outcome::Committed);
    world.ranks.iter().for_each(|rank| drop(rank.take_log()));
    // The same weights again are no other ones.
    assert_eq!(*world.update(world.request("u2")).await.outcome(), Outcome::Committed);
    world.ranks.iter().for_each(|rank| drop(rank.take_log()));
    let other = UpdateRequest { path: Some(world.path("start").into()), ..world.request("u3") };
    let record = world.update(other.clone()).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    let says = "version v1 is that of the committed weights, digest ";
    assert!(record.message.contains(says) && record.message.contains("these are others"), "{record:?}");
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), [""; 0]);
    }
    let named = UpdateRequest {
        id: Some(UpdateId("u4".to_owned())),
        version: Some(WeightVersion("v2".to_owned())),
        ..other
    };
    assert_eq!(*world.update(named).await.outcome(), Outcome::Committed);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_load_that_fails_on_one_rank_leaves_all_at_the_previous_weights() {
    for (script, why) in [
        (LoadScript::Fails("restored-meta", "injected"), "load failed (injected): injected"),
        (LoadScript::Lies, "digest of the consumed tensors is 0123"),
        (LoadScript::Raises, "boom"),
    ] {
        let world = world(GroupKind::Lockstep).await;
        world.engine(1).loads.push_back(script);
        let record = world.update(world.request("u1")).await;
        assert_eq!(*record.outcome(), Outcome::RolledBack);
        assert!(record.message.contains("rank 1: "), "{}", record.message);
        assert!(record.message.contains(why), "{}", record.message);
        world.all_hold("start");
        assert_eq!(world.updates.snapshot.borrow().version.0, "default");
        assert!(!world.dir.path().join("committed.json").exists());
        // It can be tried again, under the same name.
        let record = world.update(world.request("u1")).await;
        assert_eq!(*record.outcome(), Outcome::Committed);
        world.all_hold("new");
        world.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_finds_the_files_missing_is_left_alone() {
    let world = world(GroupKind::Independent).await;
    for rank in 0..2 {
        let script = LoadScript::Fails("unchanged", "files");
        world.engine(rank).loads.push_back(script);
    }
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RolledBack);
    let report = &record.record.ranks[&EngineIndex(0)].workers[0];
    assert_eq!(report.state, WorkerState::Unchanged);
    let loads = |log: Vec<String>| log.iter().filter(|line| line.starts_with("load")).count();
    assert_eq!(loads(world.ranks[0].take_log()), 1);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_can_go_neither_way_is_fenced_and_the_others_serve() {
    let mut world = world(GroupKind::Independent).await;
    for _ in 0..2 {
        let script = LoadScript::Fails("mixed", "load");
        world.engine(1).loads.push_back(script);
    }
    let record = world.update(world.request("u1")).await;
    let fenced = vec![EngineIndex(1)];
    assert_eq!(*record.outcome(), Outcome::Degraded { fenced });
    let request = world.fences.recv().await.unwrap();
    assert_eq!((request.rank, request.incarnation), (EngineIndex(1), Incarnation(1)));
    let log = world.ranks[1].take_log();
    assert!(log.iter().any(|line| line.starts_with("down fenced: rollback failed")), "{log:?}");
    assert!(!log.contains(&"resume".to_owned()), "{log:?}");
    assert_eq!(world.engine(0).weights, world.path("start"));
    assert!(!world.engine(0).paused);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn without_the_shim_an_update_is_refused_and_says_what_to_install() {
    let world = world(GroupKind::Independent).await;
    world.ranks[1].restart();
    world.engine(1).shim_protocol = None;
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    world.ranks[1].admit();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(
        record.message.contains("rank 1: the shim is not in the engine's Python environment: install it there (pip install dp-sidecar-shim), see that VLLM_PLUGINS"),
        "{}",
        record.message
    );
    world.engine(1).shim_protocol = Some(1);
    let record = world.update(world.request("u2")).await;
    assert!(record.message.contains("speaks protocol 1, expected 6"), "{}", record.message);
    assert_eq!(world.ranks[0].take_log(), [""; 0]);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_still_runs_at_the_pause_deadline_is_aborted_on_all_ranks() {
    let world = world(GroupKind::Lockstep).await;
    world.engine(0).wait_needs_abort = true;
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert!(record.record.pause_escalated);
    assert!(record.record.paused_ms.unwrap() >= 30_000);
    for rank in &world.ranks {
        assert_eq!(rank.take_log()[1..3], ["pause wait false", "pause abort false"]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn there_is_one_controller_at_a_time() {
    let world = world(GroupKind::Lockstep).await;
    world.engine(0).wait_needs_abort = true;
    let run = world.updates.start(world.request("u1")).await.unwrap();
    world.ranks[0].logged("pause wait false").await;
    let second = world.update(world.request("u2")).await;
    assert_eq!(*second.outcome(), Outcome::RefusedBusy);
    assert!(second.message.contains("update u1 is running (pausing)"), "{}", second.message);
    for rank in [0, 1] {
        world.calls.send(held(rank, 7, "resume_scheduler")).await.unwrap();
    }
    let refused = "refuse 7 refused by the sidecar: update u1 (pausing) is running";
    world.ranks[0].logged(refused).await;
    world.ranks[1].logged(refused).await;
    let operator = world.control.resume(Duration::ZERO).await.unwrap_err();
    assert_eq!(operator.to_string(), "engines are controlled by update u1 (pausing)");
    assert_eq!(*run.record().await.unwrap().outcome(), Outcome::Committed);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_waits_for_the_operator_and_then_is_refused() {
    let world = world(GroupKind::Independent).await;
    let guard = world.control.acquire("operator pause", Duration::ZERO).await.unwrap();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedBusy);
    assert!(record.message.contains("controlled by operator pause"), "{}", record.message);
    drop(guard);
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_same_name_again_gives_the_same_record_without_touching_anything() {
    let world = world(GroupKind::Independent).await;
    let first = world.update(world.request("u1")).await;
    world.ranks[0].take_log();
    let again = world.update(world.request("u1")).await;
    assert_eq!(again.record, first.record);
    let mut other = world.request("u1");
    other.path = Some(world.path("start").into());
    let refused = world.update(other).await;
    assert_eq!(*refused.outcome(), Outcome::RefusedInvalid);
    assert!(refused.message.contains("was already committed from"), "{}", refused.message);
    let mut wrong = world.request("u2");
    wrong.from_version = Some(WeightVersion("v7".to_owned()));
    let refused = world.update(wrong).await;
    assert_eq!(*refused.outcome(), Outcome::RefusedVersion);
    assert_eq!(world.ranks[0].take_log(), [""; 0]);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn engines_that_a_frontend_has_paused_stay_paused() {
    let world = world(GroupKind::Lockstep).await;
    for rank in [0, 1] {
        world.calls.send(held(rank, 7, "pause_scheduler")).await.unwrap();
    }
    let mut control = world.control.snapshot.clone();
    let by = PausedBy::Frontend { id: FrontendId(1) };
    control.wait_for(|state| state.paused_by.as_ref() == Some(&by)).await.unwrap();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert!(record.record.left_paused);
    for rank in &world.ranks {
        assert!(!rank.take_log().contains(&"resume".to_owned()));
    }
    assert_eq!(world.control.snapshot.borrow().paused_by, Some(by));
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_cache_that_is_in_use_is_reset_with_its_requests() {
    let world = world(GroupKind::Independent).await;
    world.engine(0).resets.push_back(false);
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    let log = world.ranks[0].take_log();
    let resets: Vec<_> = log.iter().filter(|line| line.starts_with("reset")).collect();
    assert_eq!(resets, ["reset false true", "reset true true"]);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_that_is_called_off_while_it_pauses_resumes_the_engines() {
    let world = world(GroupKind::Independent).await;
    world.engine(0).wait_needs_abort = true;
    let run = world.updates.start(world.request("u1")).await.unwrap();
    world.ranks[0].logged("pause wait false").await;
    world.updates.abort().await.unwrap();
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Aborted);
    assert!(record.message.contains("aborted by the operator"), "{}", record.message);
    world.all_hold("start");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_record_can_be_sent_as_json() {
    let world = world(GroupKind::Independent).await;
    let record = world.update(world.request("u1")).await;
    let text = serde_json::to_string(&record).unwrap();
    let back: UpdateRecord = serde_json::from_str(&text).unwrap();
    assert_eq!(back, record);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_link_is_followed_once_so_that_it_may_be_moved_later() {
    let world = world(GroupKind::Independent).await;
    let latest = world.dir.path().join("latest");
    std::os::unix::fs::symlink(world.path("new"), &latest).unwrap();
    let mut request = world.request("u1");
    request.path = Some(latest.clone());
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    std::fs::remove_file(&latest).unwrap();
    world.all_hold("new");
    world.ranks[1].restart();
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    world.all_hold("new");
    world.end().await;
}
