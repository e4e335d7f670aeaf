//! Checkpoints that have other tensors than the one of the start.

use super::*;

fn with_more(world: &World, name: &str, more: &[&str]) -> UpdateRequest {
    let path = world.dir.path().join(name);
    std::fs::create_dir_all(&path).unwrap();
    let mut tensors: Vec<(&str, &str, &[usize], &[u8])> =
        vec![("a", "U8", &[2], &[1, 1]), ("b", "U8", &[1], &[1])];
    tensors.extend(more.iter().map(|name| (*name, "U8", &[1usize] as &[usize], &[7u8] as &[u8])));
    write(&path, "model.safetensors", &tensors);
    UpdateRequest { path: Some(path), ..world.request(name) }
}

#[tokio::test(start_paused = true)]
async fn names_count_unless_the_loader_of_every_engine_passes_over_them() {
    let world = world(GroupKind::Independent).await;
    world.engine(0).ignored = vec!["mtp".to_owned(), "extra".to_owned()];
    world.engine(1).ignored = vec!["mtp".to_owned()];
    let record = world.update(with_more(&world, "more", &["mtp", "extra"])).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.ends_with("1 tensor fault: unexpected extra"), "{}", record.message);
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), [""; 0]);
    }
    let record = world.update(with_more(&world, "mtp", &["mtp"])).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    world.all_hold("mtp");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_tied_copy_counts_where_an_engine_does_not_have_it_so() {
    let world = world(GroupKind::Independent).await;
    for rank in 0..2 {
        world.engine(rank).tied = vec![("head", "b")];
        world.ranks[rank].restart();
    }
    world.restore_all().await.unwrap();
    world.ranks.iter().for_each(FakeRank::admit);
    let mut differs = with_more(&world, "differs", &["head"]);
    let record = world.update(differs.clone()).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("head differs from b: the model has them as one"), "{}", record.message);
    let path = differs.path.clone().unwrap();
    let head = ("head", "U8", &[1usize] as &[usize], &[1u8] as &[u8]);
    write(&path, "model.safetensors", &[("a", "U8", &[2], &[1, 1]), ("b", "U8", &[1], &[1]), head]);
    differs.id = None;
    let record = world.update(differs.clone()).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    world.engine(1).tied.clear();
    world.ranks[1].restart();
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    world.ranks[1].admit();
    let record = world.update(differs).await;
    assert!(record.message.ends_with("1 tensor fault: unexpected head"), "{}", record.message);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_adapters_directory_and_stale_weights_are_refused_with_what_to_do() {
    let world = world(GroupKind::Independent).await;
    let adapter = world.dir.path().join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    write(&adapter, "adapter_model.safetensors", &[("a", "U8", &[1], &[1])]);
    let record = world.update(UpdateRequest { path: Some(adapter), ..world.request("u1") }).await;
    let path = world.path("adapter");
    assert!(
        record.message.ends_with(&format!("{path} holds a LoRA adapter: --lora NAME={path} adds it")),
        "{}",
        record.message
    );
    let bin = world.dir.path().join("new/pytorch_model-1.bin");
    std::fs::write(&bin, "pickle").unwrap();
    let later = SystemTime::now() + Duration::from_secs(60);
    std::fs::File::options().write(true).open(&bin).unwrap().set_modified(later).unwrap();
    let record = world.update(world.request("u2")).await;
    let says =
        "vLLM loads model.safetensors, but pytorch_model-1.bin was written later: remove the stale one";
    assert!(record.message.contains(says), "{}", record.message);
    let earlier = SystemTime::now() - Duration::from_secs(60);
    std::fs::File::options().write(true).open(&bin).unwrap().set_modified(earlier).unwrap();
    let record = world.update(world.request("u3")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn only_an_adapter_that_an_update_has_brought_can_be_removed() {
    let world = world(GroupKind::Independent).await;
    let remove = |id: &str| UpdateRequest {
        id: Some(UpdateId(id.to_owned())),
        adapters: vec![crate::api::AdapterChange { name: "style".to_owned(), path: None }],
        ..UpdateRequest::default()
    };
    let record = world.update(remove("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("no update has brought an adapter style"), "{}", record.message);
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), [""; 0]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_adapter_cannot_have_the_name_of_the_model() {
    let named = |config: &mut UpdateConfig| config.served_names = vec!["llama".to_owned()];
    let world = world(GroupKind::Independent).await.next_sidecar_with(named).await;
    world.restore_all().await.unwrap();
    let adapters =
        vec![crate::api::AdapterChange { name: "llama".to_owned(), path: Some("/adapter".into()) }];
    let request = UpdateRequest { id: Some(UpdateId("u1".to_owned())), adapters, ..UpdateRequest::default() };
    let record = world.update(request).await;
    assert!(record.message.contains("llama is the name of the model itself"), "{}", record.message);
    world.end().await;
}
