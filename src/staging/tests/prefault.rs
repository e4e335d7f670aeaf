use super::*;

fn config(place: &Place, model: &Path) -> StageConfig {
    StageConfig { prefault: Some(model.to_owned()), ..place.config() }
}

/// Waits until the segments have so many bytes.
async fn memory(node: &Node, bytes: u64) {
    let reached = async {
        while node.state().await.memory != bytes {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, reached).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_for_two_checkpoints_is_taken_at_the_start() {
    let (model, one, two) = (checkpoint(0, 2, 9000), checkpoint(1, 2, 9000), checkpoint(2, 2, 9000));
    let place = Place::new("node 0");
    let node = Node::with(config(&place, model.path()));
    let size = 2 * u64::from(CHUNK) * (9000 * 2 * 3_u64).div_ceil(u64::from(CHUNK));
    memory(&node, 2 * size).await;
    let segments = place.segments();
    assert_eq!(segments.values().copied().collect::<Vec<_>>(), [size, size]);
    let mut chain = Chain { places: vec![place], nodes: vec![node] };
    chain.update("u1", one.path()).await;
    chain.update("u2", two.path()).await;
    assert_eq!(chain.places[0].segments(), segments, "nothing more is taken");
    // The successor finds both.
    let places = chain.end().await;
    let node = Node::with(config(&places[0], model.path()));
    let state = node.state().await;
    assert_eq!(state.current.unwrap().id.0, "u2");
    assert_eq!(state.previous.unwrap().id.0, "u1");
    assert_eq!(state.memory, 2 * size);
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_does_not_wait_for_it_and_it_goes_on_later() {
    let dir = checkpoint(1, 1, 3 << 20);
    let size = std::fs::metadata(dir.path().join("model-0.safetensors")).unwrap().len();
    let size = size.next_multiple_of(u64::from(CHUNK));
    for delay in 0..12 {
        let place = Place::new("node 0");
        let node = Node::with(config(&place, dir.path()));
        // From before it begins to after its end.
        tokio::time::sleep(Duration::from_millis(2 * delay)).await;
        let mut chain = Chain { places: vec![place], nodes: vec![node] };
        chain.update("u1", dir.path()).await;
        memory(&chain.nodes[0], 2 * size).await;
        assert_eq!(chain.nodes[0].state().await.current.unwrap().id.0, "u1");
        chain.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_cannot_be_done_updates_are_possible_all_the_same() {
    let dir = checkpoint(1, 1, 9000);
    let places = [Place::new("too little memory"), Place::new("no model")];
    let limited = StageConfig { max_memory: Some(60_000), ..config(&places[0], dir.path()) };
    let lost = config(&places[1], &dir.path().join("nothing"));
    for (place, config) in places.into_iter().zip([limited, lost]) {
        let node = Node::with(config);
        let mut chain = Chain { places: vec![place], nodes: vec![node] };
        chain.update("u1", dir.path()).await;
        chain.end().await;
    }
}
