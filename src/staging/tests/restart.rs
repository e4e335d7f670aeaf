use super::*;
use crate::shared_memory::remove_segments;

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_sidecar_finds_its_segments() {
    let (one, two, three) = (checkpoint(1, 2, 9000), checkpoint(2, 2, 9000), checkpoint(3, 2, 9000));
    let mut chain = Chain::new(2);
    chain.update("u1", one.path()).await;
    chain.update("u2", two.path()).await;
    let before = chain.nodes[1].state().await;
    let places = chain.end().await;
    let nodes = places.iter().map(Node::start).collect();
    let mut chain = Chain { places, nodes };
    let after = chain.nodes[1].state().await;
    assert_eq!(after, before);
    assert_eq!(after.current.as_ref().unwrap().id.0, "u2");
    assert_eq!(after.previous.as_ref().unwrap().id.0, "u1");
    // Staged bytes are there, too.
    chain.begin("u3", directory(three.path())).await;
    chain.outcomes().await;
    let places = chain.end().await;
    let mut again = Node::start(&places[1]);
    assert_eq!(again.state().await.staged.unwrap().id.0, "u3");
    again.begin(spec("u3", StageSource::Upstream, None)).await;
    assert_holds(&again.outcome().await.unwrap().0, three.path());
    again.end().await;
    assert_eq!(remove_segments(&places[1].shm(), "run").unwrap(), 2);
    assert_eq!(remove_segments(&places[1].shm(), "run").unwrap(), 0);
    let gone = Node::start(&places[1]);
    assert_eq!(gone.state().await, StageState::default(), "a record without its segment means nothing");
    gone.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_segments_are_not_used() {
    let dir = checkpoint(1, 2, 9000);
    let mut chain = Chain::new(2);
    chain.update("u1", dir.path()).await;
    let places = chain.end().await;
    let path = places[1].shm().join("dp-sidecar-run-a");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let nodes = places.iter().map(Node::start).collect();
    let mut chain = Chain { places, nodes };
    assert!(chain.nodes[0].state().await.current.is_some());
    assert_eq!(chain.nodes[1].state().await.current, None);
    // All but the damaged chunk is still good.
    let progress = chain.update("u2", dir.path()).await[1];
    assert_eq!(progress.received, u64::from(CHUNK));
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_killed_while_filling_leaves_bytes_that_are_checked() {
    let dir = checkpoint(1, 2, 30_000);
    let mut chain = Chain::new(2);
    chain.update("u1", dir.path()).await;
    let places = chain.end().await;
    // As after `kill -9` during a staging: the segment has bytes, and no record.
    std::fs::write(places[1].dir.path().join("state/segments.json"), b"{}").unwrap();
    let nodes = places.iter().map(Node::start).collect();
    let mut chain = Chain { places, nodes };
    let state = chain.nodes[1].state().await;
    assert_eq!((state.current.is_none(), state.memory > 0), (true, true));
    let progress = chain.update("u2", dir.path()).await[1];
    assert_eq!((progress.received, progress.reused), (0, progress.total));
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_of_a_running_sidecar_are_not_taken() {
    let dir = checkpoint(1, 1, 9000);
    let mut chain = Chain::new(1);
    chain.update("u1", dir.path()).await;
    let second = Node::start(&chain.places[0]);
    assert_eq!(second.state().await.current, None);
    let refused = second.ask(StageRequest::Begin(spec("u2", directory(dir.path()), None))).await;
    assert!(refused.unwrap_err().to_string().contains("opening"), "locked");
    second.end().await;
    assert_eq!(chain.nodes[0].state().await.current.unwrap().id.0, "u1");
    chain.end().await;
}
