use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn bytes_go_down_the_chain_once() {
    for seed in 0..20 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let dir = checkpoint(seed, random.random_range(1..4), random.random_range(1..40_000));
        let mut chain = Chain::new(random.random_range(1..5));
        let progress = chain.update("u1", dir.path()).await;
        for (at, progress) in progress.iter().enumerate() {
            assert_eq!(progress.done, progress.total, "seed {seed}, node {at}");
            let received = if at == 0 { 0 } else { progress.total };
            assert_eq!(progress.received, received, "seed {seed}, node {at}");
        }
        chain.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unchanged_chunks_are_not_sent_again() {
    let dir = checkpoint(1, 3, 50_000);
    let mut chain = Chain::new(3);
    chain.update("u1", dir.path()).await;
    let progress = chain.update("u2", dir.path()).await;
    assert_eq!(progress[1].received, 0);
    assert_eq!((progress[2].received, progress[2].reused), (0, progress[2].total));
    // One byte of one tensor: one chunk. Copies of the rest are in both segments by now.
    let path = dir.path().join("model-1.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    for id in ["u3", "u4"] {
        let progress = chain.update(id, dir.path()).await;
        let expected = if id == "u3" { 1..=u64::from(CHUNK) } else { 0..=0 };
        assert!(expected.contains(&progress[2].received), "{id}: {progress:?}");
    }
    for place in chain.end().await {
        assert_eq!(place.segments().len(), 2, "two segments, whatever happens");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_swaps_the_roles_and_a_discard_keeps_them() {
    let (one, two) = (checkpoint(1, 1, 9000), checkpoint(2, 1, 9000));
    let mut chain = Chain::new(1);
    chain.update("u1", one.path()).await;
    let state = chain.nodes[0].state().await;
    assert_eq!(state.current.as_ref().unwrap().id.0, "u1");
    assert_eq!((state.previous, state.staged), (None, None));
    chain.begin("u2", directory(two.path())).await;
    chain.outcomes().await.pop().unwrap().unwrap();
    let state = chain.nodes[0].discard("u2").await;
    assert_eq!((state.current.unwrap().id.0.as_str(), state.staged), ("u1", None));
    let refused = chain.nodes[0].ask(StageRequest::Commit { id: UpdateId("u2".to_owned()) }).await;
    assert_eq!(refused.unwrap_err().to_string(), "node 0: update u2 is not staged");
    chain.update("u3", two.path()).await;
    let state = chain.nodes[0].state().await;
    let (current, previous) = (state.current.unwrap(), state.previous.unwrap());
    assert_eq!((current.id.0.as_str(), previous.id.0.as_str()), ("u3", "u1"));
    assert_eq!(current.version.0, "version of u3");
    assert_holds(&current.checkpoint, two.path());
    assert_holds(&previous.checkpoint, one.path());
    // The same once more changes nothing.
    assert_eq!(chain.nodes[0].commit("u3").await.previous.unwrap().id.0, "u1");
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_update_again_is_done_at_once() {
    let dir = checkpoint(1, 2, 9000);
    let mut chain = Chain::new(2);
    chain.begin("u1", directory(dir.path())).await;
    let first = chain.outcomes().await;
    chain.begin("u1", directory(dir.path())).await;
    for (first, again) in first.into_iter().zip(chain.outcomes().await) {
        assert_eq!(first.unwrap().0, again.unwrap().0);
    }
    for node in &chain.nodes {
        node.commit("u1").await;
    }
    // A newcomer gets the committed version from a node that has it.
    let place = Place::new("late");
    let mut late = Node::start(&place);
    let address = late.begin(spec("u1", StageSource::Upstream, None)).await;
    chain.nodes[1].begin(spec("u1", StageSource::Current, address)).await;
    let (checkpoint, progress) = late.outcome().await.unwrap();
    assert_holds(&checkpoint, dir.path());
    assert_eq!(progress.received, progress.total);
    chain.nodes[1].outcome().await.unwrap();
    assert_eq!(late.commit("u1").await.current.unwrap().id.0, "u1");
    late.end().await;
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_memory_for_the_version_before_one_segment_is_used() {
    let dirs = [checkpoint(1, 1, 9000), checkpoint(2, 1, 9000)];
    for retain in [Retain::Disk, Retain::None] {
        let mut chain = Chain::new(2);
        for (at, dir) in dirs.iter().enumerate() {
            let id = format!("u{at}");
            let change = |spec: StageSpec| StageSpec { retain, ..spec };
            chain.begin_with(&id, directory(dir.path()), change).await;
            for outcome in chain.outcomes().await {
                assert_holds(&outcome.unwrap().0, dir.path());
            }
            for node in &chain.nodes {
                let state = node.commit(&id).await;
                assert_eq!((state.current.unwrap().id.0, state.previous), (id.clone(), None));
            }
        }
        for place in chain.end().await {
            assert_eq!(place.segments().len(), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_update_waits_for_the_first() {
    let dir = checkpoint(1, 1, 9000);
    let place = Place::new("node 1");
    let node = Node::start(&place);
    let first = node.begin(spec("u1", StageSource::Upstream, None)).await;
    let again = node.begin(spec("u1", StageSource::Upstream, None)).await;
    assert_eq!(first, again, "the same update twice is one");
    let refused = node.ask(StageRequest::Begin(spec("u2", directory(dir.path()), None))).await;
    assert_eq!(refused.unwrap_err().to_string(), "node 1: update u1 is being staged");
    let state = node.discard("u1").await;
    assert_eq!(state.data_address, None);
    assert!(node.begin(spec("u2", StageSource::Upstream, None)).await.is_some());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_see_whether_they_have_the_same_directory() {
    let dir = checkpoint(1, 2, 9000);
    let place = Place::new("node");
    let node = Node::start(&place);
    let probe = async |path: &Path| node.ask(StageRequest::Probe(checkpoint_dir(path))).await.unwrap().probed;
    let first = probe(dir.path()).await.unwrap();
    assert_eq!(probe(checkpoint(1, 2, 9000).path()).await, Some(first.clone()));
    assert_ne!(probe(checkpoint(2, 2, 9000).path()).await, Some(first), "other weights of the same model");
    assert_eq!(probe(Path::new("/no/such/directory")).await, None);
    node.end().await;
}
