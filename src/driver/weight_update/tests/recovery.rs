//! The leader is killed and started again; engines and the memory of the nodes live on.

use super::nodes::{Nodes, nodes};
use super::*;

impl Nodes {
    fn clear_logs(&self) {
        for rank in &self.ranks {
            rank.take_log();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_an_open_update_engines_go_on_untouched() {
    let nodes = nodes(GroupKind::Lockstep).await;
    nodes.update(nodes.request("u1", "new")).await;
    nodes.clear_logs();
    let nodes = nodes.next_leader().await;
    nodes.adopt_all().await.unwrap();
    for rank in &nodes.ranks {
        // The one before may have closed the gate for a drain.
        assert_eq!(rank.take_log(), ["admission true"]);
    }
    nodes.all_hold_segments("u1");
    assert_eq!(nodes.updates.snapshot.borrow().version.0, "v-u1");
    let record = nodes.update(nodes.request("u2", "newer")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert_eq!(nodes.updates.history(5).await.unwrap().len(), 2);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_without_a_commit_record_is_rolled_back() {
    for kind in [GroupKind::Lockstep, GroupKind::Independent] {
        let nodes = nodes(kind).await;
        nodes.update(nodes.request("u1", "new")).await;
        nodes.ranks[2].engine.lock().loads.push_back(LoadScript::Hangs);
        let run = nodes.updates.start(nodes.request("u2", "newer")).await.unwrap();
        nodes.ranks[2].logged("load /shm/1/u2").await;
        nodes.ranks[0].logged("load /shm/0/u2").await;
        let nodes = nodes.next_leader().await;
        drop(run);
        nodes.ranks[2].engine.lock().weights = "torn".to_owned();
        nodes.clear_logs();
        nodes.adopt_all().await.unwrap();
        nodes.all_hold_segments("u1");
        assert_eq!(
            nodes.ranks[2].take_log(),
            [
                "admission false",
                "pause wait false",
                "load /shm/1/u1",
                "lora list ",
                "version v-u1",
                "reset false true",
                "resume",
                "admission true"
            ]
        );
        let status = nodes.updates.snapshot.borrow().clone();
        assert_eq!(status.version.0, "v-u1");
        let last = status.last.unwrap();
        assert_eq!((last.record.id.0.as_str(), last.outcome()), ("u2", &Outcome::RolledBack));
        assert!(last.record.recovered);
        // It is over: the next sidecar finds nothing to do, and the update can be sent again.
        let nodes = nodes.next_leader().await;
        nodes.adopt_all().await.unwrap();
        assert_eq!(nodes.ranks[2].take_log(), ["admission true"]);
        let record = nodes.update(nodes.request("u2", "newer")).await;
        assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
        nodes.all_hold_segments("u2");
        nodes.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_update_of_all_is_rolled_back_to_the_start_up_checkpoint() {
    let nodes = nodes(GroupKind::Lockstep).await;
    nodes.ranks[1].engine.lock().loads.push_back(LoadScript::Hangs);
    let run = nodes.updates.start(nodes.request("u1", "new")).await.unwrap();
    nodes.ranks[1].logged("load /shm/0/u1").await;
    let nodes = nodes.next_leader().await;
    drop(run);
    nodes.adopt_all().await.unwrap();
    let start = nodes.path("start");
    nodes.all_hold([&start, &start, &start, &start]);
    assert_eq!(nodes.updates.snapshot.borrow().version.0, "default");
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_with_a_commit_record_is_rolled_forward() {
    let nodes = nodes(GroupKind::Lockstep).await;
    // The resume of one rank is never answered: committed, but not ended.
    for rank in &nodes.ranks {
        rank.engine.lock().no_resume = true;
    }
    let run = nodes.updates.start(nodes.request("u1", "new")).await.unwrap();
    for rank in &nodes.ranks {
        rank.logged("resume").await;
    }
    let nodes = nodes.next_leader().await;
    drop(run);
    for rank in &nodes.ranks {
        rank.engine.lock().no_resume = false;
    }
    nodes.clear_logs();
    nodes.adopt_all().await.unwrap();
    nodes.all_hold_segments("u1");
    let last = nodes.updates.snapshot.borrow().last.clone().unwrap();
    assert_eq!((last.outcome(), last.record.recovered), (&Outcome::Committed, true), "{}", last.message);
    for stage in &nodes.stages {
        assert_eq!(stage.area.lock().state.current.as_ref().unwrap().id.0, "u1");
    }
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn independent_engines_are_taken_over_node_by_node() {
    let nodes = nodes(GroupKind::Independent).await;
    nodes.update(nodes.request("u1", "new")).await;
    nodes.ranks[2].engine.lock().loads.push_back(LoadScript::Hangs);
    let run = nodes.updates.start(nodes.request("u2", "newer")).await.unwrap();
    for rank in &nodes.ranks {
        let node = rank.handle.rank.0 / 2;
        rank.logged(&format!("load /shm/{node}/u2")).await;
    }
    let nodes = nodes.next_leader().await;
    drop(run);
    nodes.updates.adopt(nodes.lives()[..2].to_vec()).await.unwrap();
    assert_eq!(nodes.holds()[..2], nodes.segments("u1")[..2]);
    assert!(nodes.ranks[3].engine.lock().paused);
    // Another restart in between does not make the others trustworthy, although they are stamped with v-u1.
    let nodes = nodes.next_leader().await;
    nodes.adopt_all().await.unwrap();
    nodes.all_hold_segments("u1");
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_engines_of_a_leader_that_has_lost_its_state_serve_the_start_up_checkpoint_again() {
    for torn in [false, true] {
        let nodes = nodes(GroupKind::Independent).await;
        nodes.update(nodes.request("u1", "new")).await;
        if torn {
            nodes.ranks[2].engine.lock().loads.push_back(LoadScript::Hangs);
            drop(nodes.updates.start(nodes.request("u2", "newer")).await.unwrap());
            nodes.ranks[2].logged("load /shm/1/u2").await;
            let mut engine = nodes.ranks[2].engine.lock();
            engine.weights = "torn".to_owned();
            engine.version = "default".to_owned();
        }
        for file in ["committed.json", "ledger.json"] {
            std::fs::remove_file(nodes.dir.path().join(file)).unwrap();
        }
        let nodes = nodes.next_leader().await;
        nodes.adopt_all().await.unwrap();
        let start = nodes.path("start");
        nodes.all_hold([&start, &start, &start, &start]);
        for rank in &nodes.ranks {
            let engine = rank.engine.lock();
            assert_eq!((engine.version.as_str(), engine.paused), ("default", false));
        }
        assert_eq!(nodes.updates.snapshot.borrow().version.0, "default");
        nodes.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn engines_left_paused_are_loaded_and_resumed_unless_the_operator_has_paused_them() {
    for operator in [false, true] {
        let nodes = nodes(GroupKind::Lockstep).await;
        if operator {
            let limit = Duration::from_secs(5);
            nodes.control.pause(PauseMode::Wait, limit, limit).await.unwrap();
        } else {
            for rank in &nodes.ranks {
                rank.engine.lock().paused = true;
            }
        }
        let ledger = nodes.dir.path().join("ledger.json");
        while operator && !ledger.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let nodes = nodes.next_leader().await;
        nodes.adopt_all().await.unwrap();
        for rank in &nodes.ranks {
            assert_eq!(rank.engine.lock().paused, operator);
            // Nobody knows any more what they were paused for.
            assert_eq!(rank.take_log().iter().any(|line| line.starts_with("load")), !operator);
        }
        let by = nodes.control.snapshot.borrow().paused_by.clone();
        assert_eq!(by, operator.then_some(PausedBy::Operator));
        nodes.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_pause_of_a_frontend_outlives_the_leader_and_is_known_to_be_its_own() {
    let nodes = nodes(GroupKind::Lockstep).await;
    for rank in 0..4 {
        nodes.calls.send(held(rank, 7, "pause_scheduler")).await.unwrap();
    }
    for rank in &nodes.ranks {
        rank.engine.lock().paused = true;
    }
    let by = Some(PausedBy::Frontend { id: FrontendId(1) });
    nodes.control.snapshot.clone().wait_for(|state| state.paused_by == by).await.unwrap();
    let ledger = nodes.dir.path().join("ledger.json");
    while !ledger.exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut nodes = nodes;
    for _ in 0..2 {
        nodes = nodes.next_leader().await;
        nodes.adopt_all().await.unwrap();
        for rank in &nodes.ranks {
            assert!(rank.engine.lock().paused);
        }
        assert_eq!(nodes.control.snapshot.borrow().paused_by, by);
    }
    // It is the frontend that resumes, not only the operator.
    for rank in 0..4 {
        nodes.calls.send(held(rank, 8, "resume_scheduler")).await.unwrap();
    }
    nodes.control.snapshot.clone().wait_for(|state| state.paused_by.is_none()).await.unwrap();
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_says_another_version_is_brought_to_the_committed_one() {
    let nodes = nodes(GroupKind::Independent).await;
    nodes.update(nodes.request("u1", "new")).await;
    nodes.ranks[3].engine.lock().version = "v0".to_owned();
    nodes.ranks[3].engine.lock().weights = "somewhere".to_owned();
    nodes.clear_logs();
    let nodes = nodes.next_leader().await;
    nodes.adopt_all().await.unwrap();
    nodes.all_hold_segments("u1");
    assert!(!nodes.ranks[0].take_log().iter().any(|line| line.starts_with("load")));
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_incomplete_lockstep_group_is_not_taken_over() {
    let nodes = nodes(GroupKind::Lockstep).await;
    let nodes = nodes.next_leader().await;
    let error = nodes.updates.adopt(nodes.lives()[..3].to_vec()).await.unwrap_err();
    assert_eq!(error.to_string(), "engines cannot be taken over: 3 of the 4 ranks of the lockstep group");
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_cannot_be_brought_there_is_fenced_and_the_others_serve() {
    let mut nodes = nodes(GroupKind::Independent).await;
    nodes.update(nodes.request("u1", "new")).await;
    nodes.ranks[0].engine.lock().loads.push_back(LoadScript::Hangs);
    let run = nodes.updates.start(nodes.request("u2", "newer")).await.unwrap();
    nodes.ranks[0].logged("load /shm/0/u2").await;
    nodes = nodes.next_leader().await;
    drop(run);
    for _ in 0..2 {
        nodes.ranks[1].engine.lock().loads.push_back(LoadScript::Fails("mixed", "load"));
    }
    nodes.adopt_all().await.unwrap();
    assert_eq!(nodes.fences.recv().await.unwrap().rank, EngineIndex(1));
    let holds = nodes.holds();
    let expected = nodes.segments("u1");
    assert_eq!([&holds[0], &holds[2], &holds[3]], [&expected[0], &expected[2], &expected[3]]);
    nodes.end().await;
}
