//! LoRA adapters through the transaction.

use super::nodes::{Nodes, nodes};
use super::*;
use crate::api::AdapterChange;

fn adapter(dir: &Path, name: &str, seed: u8) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("adapter_config.json"), "{}").unwrap();
    write(&path, "adapter_model.safetensors", &[("lora_A", "U8", &[1], &[seed])]);
    path
}

fn change(name: &str, path: Option<&Path>) -> AdapterChange {
    AdapterChange { name: name.to_owned(), path: path.map(Path::to_owned) }
}

impl Nodes {
    async fn adapters(&self, id: &str, changes: Vec<AdapterChange>) -> UpdateRecord {
        let id = Some(UpdateId(id.to_owned()));
        self.update(UpdateRequest { id, adapters: changes, ..UpdateRequest::default() }).await
    }

    fn all_have(&self, expected: &[(&str, &Path)]) {
        for rank in &self.ranks {
            let have = rank.engine.lock().adapters.clone();
            let have: Vec<(&str, &Path)> =
                have.iter().map(|(name, path)| (name.as_str(), Path::new(path))).collect();
            assert_eq!(have, expected, "rank {}", rank.handle.rank);
            assert!(!rank.engine.lock().paused);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn adapters_are_added_replaced_and_removed_on_all_engines_in_a_pause() {
    let nodes = nodes(GroupKind::Lockstep).await;
    let (one, two) = (adapter(nodes.dir.path(), "one", 1), adapter(nodes.dir.path(), "two", 2));
    let record = nodes.adapters("u1", vec![change("style", Some(&one)), change("b", Some(&two))]).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    nodes.all_have(&[("b", &two), ("style", &one)]);
    let log = nodes.ranks[0].take_log();
    let at = |line: &str| log.iter().position(|entry| entry == line).unwrap();
    assert!(at("lora check style") < at("pause wait false"), "{log:?}");
    assert!(at("pause wait false") < at("lora replace style"), "{log:?}");
    assert!(at("lora replace style") < at("reset false true"), "{log:?}");
    assert!(!log.iter().any(|line| line.starts_with("load")), "{log:?}");
    assert_eq!(nodes.updates.snapshot.borrow().version.0, "default");
    let record = nodes.adapters("u2", vec![change("style", Some(&two)), change("b", None)]).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    nodes.all_have(&[("style", &two)]);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn adapters_alone_do_not_make_weights_known_that_a_frontend_has_loaded() {
    let nodes = nodes(GroupKind::Independent).await;
    for rank in 0..4 {
        let mut call = held(rank, 9, "collective_rpc");
        call.args = vec!["reload_weights".into()];
        nodes.calls.send(call).await.unwrap();
    }
    nodes.control.snapshot.clone().wait_for(|state| state.external_weights).await.unwrap();
    let one = adapter(nodes.dir.path(), "one", 1);
    let record = nodes.adapters("u1", vec![change("style", Some(&one))]).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert!(nodes.control.snapshot.borrow().external_weights);
    let record = nodes.update(nodes.request("u2", "new")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert!(!nodes.control.snapshot.borrow().external_weights);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_adapter_that_fails_on_one_engine_is_taken_back_on_all() {
    let nodes = nodes(GroupKind::Independent).await;
    let (one, two) = (adapter(nodes.dir.path(), "one", 1), adapter(nodes.dir.path(), "two", 2));
    nodes.adapters("u1", vec![change("style", Some(&one))]).await;
    nodes.ranks[2].engine.lock().lora_fails = true;
    let record = nodes.adapters("u2", vec![change("style", Some(&two))]).await;
    assert_eq!(*record.outcome(), Outcome::RolledBack, "{}", record.message);
    assert!(record.message.contains("rank 2"), "{}", record.message);
    nodes.all_have(&[("style", &one)]);
    // A directory without an adapter touches nothing.
    let record = nodes.adapters("u3", vec![change("style", Some(nodes.dir.path()))]).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn adapters_and_weights_outlive_each_others_updates_and_late_engines_get_both() {
    let nodes = nodes(GroupKind::Independent).await;
    let one = adapter(nodes.dir.path(), "one", 1);
    nodes.adapters("u1", vec![change("style", Some(&one))]).await;
    let record = nodes.update(nodes.request("u2", "new")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    let record = nodes.adapters("u3", vec![change("more", Some(&one))]).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    nodes.all_hold_segments("u2");
    nodes.ranks[3].restart();
    nodes.updates.restore(nodes.lives()[3..].to_vec()).await.unwrap();
    nodes.ranks[3].admit();
    nodes.all_hold_segments("u2");
    nodes.all_have(&[("more", &one), ("style", &one)]);
    // Weights and an adapter in one update.
    let both = UpdateRequest { adapters: vec![change("more", None)], ..nodes.request("u4", "newer") };
    let record = nodes.update(both).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    nodes.all_hold_segments("u4");
    nodes.all_have(&[("style", &one)]);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_read_an_adapter_gets_it_from_the_leader() {
    let nodes = nodes(GroupKind::Lockstep).await;
    let (one, two) = (adapter(nodes.dir.path(), "one", 1), adapter(nodes.dir.path(), "two", 2));
    let blind = [&one, &two].map(|path| path.display().to_string());
    nodes.stages[1].area.lock().blind = blind.to_vec();
    let record = nodes.adapters("u1", vec![change("style", Some(&one))]).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    let log = nodes.stages[1].take_log();
    assert!(log.iter().any(|line| line.starts_with("piece 0 ")), "{log:?}");
    assert!(!nodes.stages[0].take_log().iter().any(|line| line.starts_with("piece")));
    let path = |rank: usize| nodes.ranks[rank].engine.lock().adapters["style"].clone();
    assert_eq!(Path::new(&path(0)), one);
    assert!(path(2).starts_with("/state/1/"), "{}", path(2));
    assert_eq!(path(2), path(3));
    // An engine that comes later finds it there, and so does one on a node that lost it.
    let late = async |rank: usize| {
        nodes.ranks[rank].restart();
        nodes.updates.restore(nodes.lives()[rank..=rank].to_vec()).await.unwrap();
        nodes.ranks[rank].admit();
        assert!(path(rank).starts_with("/state/1/"));
    };
    late(2).await;
    assert!(nodes.stages[1].take_log().iter().all(|line| !line.starts_with("piece")));
    nodes.stages[1].area.lock().adapters.clear();
    late(3).await;
    assert!(nodes.stages[1].take_log().iter().any(|line| line.starts_with("piece")));
    // What nobody uses any more is removed.
    let record = nodes.adapters("u2", vec![change("style", Some(&two))]).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    for stage in &nodes.stages {
        assert_eq!(stage.area.lock().adapters.len(), 1);
    }
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_engines_have_the_committed_adapters() {
    let nodes = nodes(GroupKind::Lockstep).await;
    let (one, two) = (adapter(nodes.dir.path(), "one", 1), adapter(nodes.dir.path(), "two", 2));
    nodes.adapters("u1", vec![change("style", Some(&one))]).await;
    let run = {
        for rank in &nodes.ranks {
            rank.take_log();
        }
        nodes.ranks[1].engine.lock().loads.push_back(LoadScript::Hangs);
        let adapters = vec![change("style", Some(two.as_path())), change("b", Some(two.as_path()))];
        let request = UpdateRequest { adapters, ..nodes.request("u2", "new") };
        let run = nodes.updates.start(request).await.unwrap();
        nodes.ranks[0].logged("lora replace style").await;
        run
    };
    let nodes = nodes.next_leader().await;
    drop(run);
    nodes.adopt_all().await.unwrap();
    nodes.all_have(&[("style", &one)]);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_adapter_that_does_not_fit_reaches_no_engine() {
    let nodes = nodes(GroupKind::Independent).await;
    let path = adapter(nodes.dir.path(), "bad", 1);
    let config = path.join("adapter_config.json");
    let file = "adapter_model.safetensors";
    let half = ("base_model.model.a.lora_A.weight", "U8", &[1, 1][..], &[1][..]);
    for (text, tensors, reason) in [
        ("{}", vec![half], "a: has no lora_B"),
        ("no json", Vec::new(), "adapter_config.json: expected"),
        ("[]", Vec::new(), "adapter_config.json: invalid type"),
        (r#"{"peft_type": "IA3"}"#, Vec::new(), "describes no LoRA adapter"),
        (r#"{"peft_type": 7}"#, Vec::new(), "describes no LoRA adapter"),
        (&" ".repeat((1 << 20) + 1), Vec::new(), "more than 1048576 bytes"),
    ] {
        std::fs::write(&config, text).unwrap();
        write(&path, file, &tensors);
        let record = nodes.adapters("u1", vec![change("style", Some(&path))]).await;
        assert_eq!(*record.outcome(), Outcome::RefusedInvalid, "{}", record.message);
        assert!(record.message.contains(reason), "{}", record.message);
    }
    for rank in &nodes.ranks {
        let log = rank.take_log();
        assert!(!log.iter().any(|line| line.starts_with("lora") || line.starts_with("pause")), "{log:?}");
    }
    nodes.end().await;
}
