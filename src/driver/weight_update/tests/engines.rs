//! What engines hold that come, go, or were changed by others.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_engine_that_starts_again_is_brought_to_the_committed_weights() {
    let world = world(GroupKind::Independent).await;
    assert!(world.ranks[1].take_log().is_empty(), "nothing to restore before the first update");
    world.update(world.request("u1")).await;
    world.ranks[1].take_log();
    world.ranks[1].restart();
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    let load = format!("load {}", world.path("new"));
    assert_eq!(world.ranks[1].take_log(), [load, "version v1".to_owned()]);
    world.all_hold("new");

    world.ranks[1].restart();
    let script = LoadScript::Fails("mixed", "load");
    world.engine(1).loads.push_back(script);
    let error = world.updates.restore(vec![world.life(1)]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "rank 1: cannot be brought to weight version v1: worker 0: load failed (load): injected"
    );
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_next_sidecar_brings_its_engines_to_what_was_committed() {
    let world = world(GroupKind::Lockstep).await;
    let record = world.update(world.request("u1")).await;
    let mut world = world.next_sidecar().await;
    world.restore_all().await.unwrap();
    world.all_hold("new");
    assert_eq!(world.engine(1).version, "v1");
    assert_eq!(world.updates.snapshot.borrow().version.0, "v1");
    // It also knows the update by name.
    let again = world.update(world.request("u1")).await;
    assert_eq!(again.record, record.record);

    // So it does after an end as planned, unless it is told to forget it.
    for (forget, holds) in [(false, "new"), (true, "start"), (false, "start")] {
        world.updates.shutdown(true).await.unwrap();
        world = world.next_sidecar_with(|config| config.forget_committed = forget).await;
        world.restore_all().await.unwrap();
        world.all_hold(holds);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_else_is_served_while_the_committed_directory_is_gone() {
    let world = world(GroupKind::Lockstep).await;
    world.update(world.request("u1")).await;
    std::fs::remove_dir_all(world.path("new")).unwrap();
    // While this sidecar's other engines hold it, there is no other way.
    world.ranks[1].restart();
    let script = LoadScript::Fails("unchanged", "files");
    world.engine(1).loads.push_back(script);
    world.updates.restore(vec![world.life(1)]).await.unwrap_err();
    let limit = Duration::from_secs(60);
    let world = world.next_sidecar_with(|config| config.startup_timeout = limit).await;
    let began = Instant::now();
    let error = world.restore_all().await.unwrap_err().to_string();
    assert!(began.elapsed() >= limit && error.contains(&world.path("new")), "{error}");
    assert!(error.contains("--forget-committed"), "{error}");
    // It is mounted late.
    let world = world.next_sidecar_with(|config| config.startup_timeout = limit).await;
    let (restored, ()) = tokio::join!(world.restore_all(), async {
        tokio::time::sleep(limit / 2).await;
        checkpoint(world.dir.path(), "new", 1);
    });
    restored.unwrap();
    world.all_hold("new");
    assert_eq!(world.updates.snapshot.borrow().version.0, "v1");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn engines_with_dummy_weights_have_no_way_back_until_the_first_commit() {
    let world = world(GroupKind::Independent).await;
    for rank in 0..2 {
        world.engine(rank).load_format = "dummy";
        world.ranks[rank].restart();
    }
    world.restore_all().await.unwrap();
    let updates = world.updates.snapshot.borrow().updates.clone();
    assert!(
        updates.starts_with("only with --allow-no-rollback: rank 0: with --load-format dummy"),
        "{updates}"
    );
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("--load-format dummy"), "{}", record.message);
    let accepted = UpdateRequest { allow_no_rollback: true, ..world.request("u1") };
    let record = world.update(accepted).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert_eq!(world.updates.snapshot.borrow().updates, "possible");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn blocks_that_a_kv_connector_keeps_are_no_update_unless_the_caller_accepts_them() {
    let world = world(GroupKind::Independent).await;
    world.engine(1).kv_connectors = vec!["LMCacheConnectorV1"];
    world.ranks[1].restart();
    world.restore_all().await.unwrap();
    let updates = world.updates.snapshot.borrow().updates.clone();
    assert!(updates.starts_with("only with --allow-stale-kv: rank 1: its KV connector LMCache"), "{updates}");
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("rank 1: its KV connector LMCacheConnectorV1"), "{}", record.message);
    assert!(record.message.contains("--allow-stale-kv"), "{}", record.message);
    let accepted = UpdateRequest { allow_stale_kv: true, ..world.request("u1") };
    let record = world.update(accepted).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_committed_update_says_that_the_weights_of_drafts_stay() {
    for (method, warned) in [(None, false), (Some("ngram"), false), (Some("mtp"), true)] {
        let world = world(GroupKind::Independent).await;
        world.engine(0).draft = method;
        world.ranks[0].restart();
        world.restore_all().await.unwrap();
        let record = world.update(world.request("u1")).await;
        assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
        let said = record.record.warnings.iter().any(|text| text.contains("rank 0: the weights that draft"));
        assert_eq!(said, warned, "{method:?}: {:?}", record.record.warnings);
        world.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_model_in_another_form_than_safetensors_is_not_updated_and_said_so_at_once() {
    let world = world(GroupKind::Independent).await;
    std::fs::rename(
        world.dir.path().join("start/model.safetensors"),
        world.dir.path().join("start/model.bin"),
    )
    .unwrap();
    for rank in 0..2 {
        world.ranks[rank].restart();
    }
    world.restore_all().await.unwrap();
    let updates = world.updates.snapshot.borrow().updates.clone();
    let expected = format!("no: rank 0: its model was loaded from model.bin in {}", world.path("start"));
    assert!(updates.starts_with(&expected), "{updates}");
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("model.bin"), "{}", record.message);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn weights_committed_for_another_model_are_not_loaded() {
    let world = world(GroupKind::Independent).await;
    world.update(world.request("u1")).await;
    let other = checkpoint(world.dir.path(), "other", 9);
    for rank in 0..2 {
        world.engine(rank).model_path = other.clone();
    }
    let world = world.next_sidecar().await;
    world.restore_all().await.unwrap();
    world.all_hold("other");
    assert_eq!(world.updates.snapshot.borrow().committed, None);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_independent_engine_lost_in_the_middle_is_brought_to_the_new_weights_later() {
    let world = world(GroupKind::Independent).await;
    world.engine(1).loads.push_back(LoadScript::Hangs);
    let run = world.updates.start(world.request("u1")).await.unwrap();
    world.ranks[1].logged(&format!("load {}", world.path("new"))).await;
    world.ranks[1].lose();
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    world.ranks[1].restart();
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    world.all_hold("new");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_lockstep_group_that_is_not_complete_is_not_updated() {
    let world = world(GroupKind::Lockstep).await;
    world.ranks[1].lose();
    world.control.snapshot.clone().wait_for(|_| true).await.unwrap();
    // The loss reaches the task before a command that is sent later, or is found out by the pause.
    tokio::time::sleep(Duration::from_millis(10)).await;
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("not complete: rank 1 is not serving"), "{}", record.message);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_without_version_stamps_is_updated_with_a_warning() {
    let world = world(GroupKind::Independent).await;
    world.engine(0).no_version_stamp = true;
    world.ranks[0].restart();
    world.engine(0).vllm_version = "0.26.1";
    world.updates.restore(vec![world.life(0)]).await.unwrap();
    world.ranks[0].admit();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert!(record.record.warnings[0].contains("rank 0: outputs do not carry the version"));
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_should_stamp_its_outputs_and_fails_does_not_serve() {
    let mut world = world(GroupKind::Independent).await;
    world.engine(0).no_version_stamp = true;
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Degraded { fenced: vec![EngineIndex(0)] }, "{}", record.message);
    assert!(record.message.contains("the version could not be stamped"), "{}", record.message);
    assert_eq!(world.fences.recv().await.unwrap().rank, EngineIndex(0));
    world.ranks[0].restart();
    let error = world.updates.restore(vec![world.life(0)]).await.unwrap_err();
    assert!(error.to_string().contains("has no attribute"), "{error}");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn weights_overwritten_in_place_are_an_update_without_a_way_back() {
    let world = world(GroupKind::Independent).await;
    world.update(world.request("u1")).await;
    checkpoint(world.dir.path(), "new", 2);
    let version = Some(WeightVersion("v2".to_owned()));
    let mut request = UpdateRequest { version, ..world.request("u2") };
    let record = world.update(request.clone()).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(
        record.message.contains("could not be rolled back: the directory of the current weights"),
        "{}",
        record.message
    );
    request.allow_no_rollback = true;
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert!(record.record.warnings[0].contains("no way back"));
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn weights_that_a_frontend_loaded_are_replaced_everywhere_even_by_a_rollback() {
    let world = world(GroupKind::Independent).await;
    for rank in [0, 1] {
        world.engine(usize::from(rank)).weights = "external".to_owned();
        let mut call = held(rank, 9, "collective_rpc");
        call.args = vec!["reload_weights".into()];
        world.calls.send(call).await.unwrap();
    }
    let mut control = world.control.snapshot.clone();
    control.wait_for(|state| state.external_weights).await.unwrap();
    let mut request = world.request("u1");
    request.from_version = Some(WeightVersion::default());
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::RefusedVersion);
    let script = LoadScript::Fails("unchanged", "files");
    world.engine(0).loads.push_back(script);
    let record = world.update(world.request("u2")).await;
    assert_eq!(*record.outcome(), Outcome::RolledBack);
    world.all_hold("start");
    assert!(!world.control.snapshot.borrow().external_weights);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_whose_rank_task_reports_late_is_not_taken_for_lost() {
    let world = world(GroupKind::Independent).await;
    let (rank, life) = world.life(1);
    let next = Incarnation(life.0 + 1);
    // The restore of the next life comes before the snapshot shows that life.
    world.updates.restore(vec![(rank, next)]).await.unwrap();
    world.ranks[1].restart();
    world.ranks[1].admit();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert_eq!(record.record.ranks[&rank].incarnation, next);
    world.all_hold("new");
    world.end().await;
}
