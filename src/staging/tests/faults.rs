use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;
use crate::staging::records::Records;

/// What a proxy does to the bytes that go down.
#[derive(Clone, Copy, Debug)]
enum Harm {
    /// Flips a bit of the byte at this position, on so many connections' passes.
    Flip { at: u64, every: Option<u64> },
    /// Closes after so many bytes.
    Cut { at: u64 },
    /// Passes nothing on after so many bytes.
    Stall { at: u64 },
    /// Waits after each piece.
    Slow,
}

/// A proxy in front of a node.
async fn proxy(to: SocketAddr, harm: Harm) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (from, _) = listener.accept().await.unwrap();
        let to = TcpStream::connect(to).await.unwrap();
        let (mut from_read, mut from_write) = from.into_split();
        let (mut to_read, mut to_write) = to.into_split();
        let up = tokio::spawn(async move {
            let _ = tokio::io::copy(&mut to_read, &mut from_write).await;
        });
        let mut passed = 0u64;
        let mut buffer = vec![0; 3000];
        while let Ok(count @ 1..) = from_read.read(&mut buffer).await {
            let end = passed + count as u64;
            match harm {
                Harm::Flip { at, every } => {
                    for (position, byte) in (passed..).zip(&mut buffer[..count]) {
                        let again =
                            every.is_some_and(|every| position > at && (position - at).is_multiple_of(every));
                        if position == at || again {
                            *byte ^= 4;
                        }
                    }
                }
                Harm::Cut { at } if end > at => break,
                Harm::Stall { at } if end > at => std::future::pending().await,
                Harm::Slow => tokio::time::sleep(Duration::from_millis(1)).await,
                Harm::Cut { .. } | Harm::Stall { .. } => {}
            }
            passed = end;
            if to_write.write_all(&buffer[..count]).await.is_err() {
                break;
            }
        }
        drop(to_write);
        up.abort();
    });
    (address, task)
}

/// Two nodes with a proxy between them.
async fn pair(
    chain: &mut Chain,
    id: &str,
    dir: &Path,
    harm: Harm,
) -> Vec<Result<(Checkpoint, StageProgress), String>> {
    let address = chain.nodes[1].begin(spec(id, StageSource::Upstream, None)).await.unwrap();
    let (proxied, task) = proxy(address, harm).await;
    chain.nodes[0].begin(spec(id, directory(dir), Some(proxied))).await;
    let outcomes = chain.outcomes().await;
    task.abort();
    outcomes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_is_found_and_the_chunk_sent_again() {
    let dir = checkpoint(1, 2, 30_000);
    let mut again = 0;
    for seed in 0..12 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut chain = Chain::new(2);
        // Somewhere in the second half there are only chunks and their heads.
        let at = random.random_range(180_000..340_000);
        let outcomes = pair(&mut chain, "u1", dir.path(), Harm::Flip { at, every: None }).await;
        match outcomes.into_iter().nth(1).unwrap() {
            Ok((checkpoint, progress)) => {
                assert_holds(&checkpoint, dir.path());
                again += progress.received - progress.total;
            }
            // The head of a frame was hit.
            Err(error) => assert!(error.starts_with("transfer node 0 -> node 1"), "{error}"),
        }
        chain.end().await;
    }
    assert!(again > 0, "no chunk was sent twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_stays_damaged_is_named() {
    let dir = checkpoint(1, 1, 3000);
    let mut chain = Chain::new(2);
    // Every frame of a full chunk has 9 + 4096 bytes; hit one byte in each from some place on.
    let outcomes = pair(&mut chain, "u1", dir.path(), Harm::Flip { at: 5000, every: Some(1500) }).await;
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert!(error.contains("node 0 -> node 1"), "{error}");
        assert!(error.contains("model-0.safetensors, bytes") && error.contains("expected"), "{error}");
    }
    for node in &chain.nodes {
        assert_eq!(node.state().await.staged, None);
    }
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_before_a_cut_is_not_sent_again() {
    let dir = checkpoint(1, 2, 30_000);
    let mut most = 0;
    for seed in 0..12 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut chain = Chain::new(2);
        let at = random.random_range(5000..350_000);
        let outcomes = pair(&mut chain, "u1", dir.path(), Harm::Cut { at }).await;
        for outcome in &outcomes {
            let error = outcome.as_ref().unwrap_err();
            assert!(error.contains("node 0"), "seed {seed}: {error}");
        }
        // What was in the buffers of the connection may be lost with it.
        let records = Records::read(&chain.places[1].dir.path().join("state")).unwrap();
        let kept = records.segments["a"].digests().iter().flatten().count() as u64;
        let mut restart = chain.nodes.pop().unwrap();
        if seed % 2 == 0 {
            // The receiver is started again in between.
            restart.end().await;
            restart = Node::start(&chain.places[1]);
        }
        chain.nodes.push(restart);
        let progress = chain.update("u2", dir.path()).await[1];
        assert_eq!(progress.received + progress.reused, progress.total, "seed {seed}");
        assert!(
            progress.reused + u64::from(CHUNK) > kept * u64::from(CHUNK),
            "seed {seed}: {progress:?}, {kept} kept"
        );
        most = most.max(kept);
        chain.end().await;
    }
    assert!(most > 20, "{most} chunks at most were kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_that_hangs_is_given_up() {
    let dir = checkpoint(1, 2, 30_000);
    let places: Vec<Place> = (0..2).map(|at| Place::new(&format!("node {at}"))).collect();
    let impatient = |place: &Place| {
        let mut config = place.config();
        config.idle_limit = Duration::from_millis(1500);
        Node::with(config)
    };
    let nodes = places.iter().map(impatient).collect();
    let mut chain = Chain { places, nodes };
    for outcome in pair(&mut chain, "u1", dir.path(), Harm::Stall { at: 100_000 }).await {
        let error = outcome.unwrap_err();
        assert!(error.contains("for 1.5s") || error.contains("lost"), "{error}");
    }
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_node_is_waited_for() {
    let dir = checkpoint(1, 1, 30_000);
    let mut chain = Chain::new(2);
    for outcome in pair(&mut chain, "u1", dir.path(), Harm::Slow).await {
        assert_holds(&outcome.unwrap().0, dir.path());
    }
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discard_ends_a_staging_at_once() {
    let dir = checkpoint(1, 1, 30_000);
    let mut chain = Chain::new(2);
    let address = chain.nodes[1].begin(spec("u1", StageSource::Upstream, None)).await.unwrap();
    let (proxied, task) = proxy(address, Harm::Stall { at: 20_000 }).await;
    chain.nodes[0].begin(spec("u1", directory(dir.path()), Some(proxied))).await;
    let started = std::time::Instant::now();
    for node in &chain.nodes {
        let state = node.discard("u1").await;
        assert_eq!((state.running, state.staged), (None, None));
    }
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    task.abort();
    // The second node may have noticed the loss of the first before it was told to discard.
    for node in &mut chain.nodes {
        while let Ok(event) = node.events.try_recv() {
            assert!(!matches!(event, NodeEvent::Stage(StageEvent::Staged { .. })), "{event:?}");
        }
    }
    chain.update("u2", dir.path()).await;
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_of_another_model_is_refused_on_every_node() {
    let (model, wrong) = (checkpoint(1, 1, 9000), checkpoint(1, 1, 9001));
    let model = Some(checkpoint_dir(model.path()));
    let mut chain = Chain::new(2);
    // The first node does not know the model, the second one does.
    let checked = StageSpec { model: model.clone(), ..spec("u1", StageSource::Upstream, None) };
    let address = chain.nodes[1].begin(checked).await;
    chain.nodes[0].begin(spec("u1", directory(wrong.path()), address)).await;
    for outcome in chain.outcomes().await {
        let error = outcome.unwrap_err();
        assert!(error.contains("node 1") && error.contains("has shape [9001], expected [9000]"), "{error}");
    }
    // Before anything is begun, if the reader knows it.
    let at_once = StageSpec { model, ..spec("u2", directory(wrong.path()), None) };
    let error = chain.nodes[0].ask(StageRequest::Begin(at_once)).await.unwrap_err().to_string();
    assert!(error.starts_with("node 0: ") && error.contains("has shape [9001]"), "{error}");
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_that_the_model_has_as_one_are_compared_when_all_is_there() {
    let (equal, differs) = (checkpoint(1, 1, 9000), checkpoint(1, 1, 9000));
    let file = equal.path().join("model-0.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let data = bytes.len() - 3 * 18_000;
    bytes.copy_within(data..data + 18_000, data + 18_000);
    std::fs::write(&file, bytes).unwrap();
    let tied = vec![("layer.0.1".to_owned(), "layer.0.0".to_owned())];
    let mut chain = Chain::new(2);
    for (id, dir, fits) in [("u1", &differs, false), ("u2", &equal, true)] {
        let checked = StageSpec {
            model: Some(checkpoint_dir(differs.path())),
            fit: Box::new(Fit { tied: tied.clone(), ..Fit::default() }),
            ..spec(id, StageSource::Upstream, None)
        };
        let address = chain.nodes[1].begin(checked).await;
        chain.nodes[0].begin(spec(id, directory(dir.path()), address)).await;
        for outcome in chain.outcomes().await {
            assert_eq!(outcome.is_ok(), fits, "{outcome:?}");
            let error = outcome.err().unwrap_or_default();
            assert!(fits || error.contains("layer.0.1 differs from layer.0.0"), "{error}");
        }
    }
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_not_there_is_asked_for_first() {
    let dir = checkpoint(1, 1, 30_000);
    let places = vec![Place::new("node 0"), Place::new("node 1")];
    let mut config = places[1].config();
    config.max_memory = Some(100_000);
    let nodes = vec![Node::start(&places[0]), Node::with(config)];
    let mut chain = Chain { places, nodes };
    chain.begin("u1", directory(dir.path())).await;
    for outcome in chain.outcomes().await {
        let error = outcome.unwrap_err();
        let expected = "node 1: 184320 bytes of shared memory are needed, at most 100000 are allowed";
        assert!(error.contains(expected), "{error}");
    }
    assert!(chain.end().await[1].segments().values().all(|length| *length == 0), "nothing was taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_a_control_group_does_not_have_is_refused() {
    let dir = checkpoint(1, 1, 30_000);
    let system = tempfile::tempdir().unwrap();
    let write = |path: &str, content: &str| {
        let path = system.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    };
    write("proc/self/cgroup", "0::/pod\n");
    write("proc/self/mountinfo", "31 23 0:28 / /cgroup rw - cgroup2 cgroup2 rw\n");
    write("cgroup/pod/memory.max", "1073741824\n");
    // All but 100,000 bytes besides the reserve of 64 MiB.
    write("cgroup/pod/memory.current", &(1_073_741_824 - (64 << 20) - 100_000).to_string());
    let places = vec![Place::new("node 0"), Place::new("node 1")];
    let mut config = places[1].config();
    config.system = system.path().to_owned();
    let nodes = vec![Node::start(&places[0]), Node::with(config)];
    let mut chain = Chain { places, nodes };
    chain.begin("u1", directory(dir.path())).await;
    for outcome in chain.outcomes().await {
        let error = outcome.unwrap_err();
        let expected =
            "node 1: 184320 more bytes of shared memory are needed, 100000 are free by the control group";
        assert!(error.contains(expected), "{error}");
    }
    assert!(chain.end().await[1].segments().values().all(|length| *length == 0), "nothing was taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_cannot_prove_to_know_the_token_is_ignored() {
    let dir = checkpoint(1, 1, 9000);
    let mut chain = Chain::new(2);
    let address = chain.nodes[1].begin(spec("u1", StageSource::Upstream, None)).await.unwrap();
    // Not our protocol, another update, and one that says nothing.
    let mut garbage = TcpStream::connect(address).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = timeout(LIMIT, garbage.read_to_end(&mut Vec::new())).await.unwrap();
    chain.nodes[0].begin(spec("other", directory(dir.path()), Some(address))).await;
    let error = chain.nodes[0].outcome().await.unwrap_err();
    assert!(error.contains("node 1 awaits update u1, not other"), "{error}");
    chain.nodes[0].begin(spec("u1", directory(dir.path()), Some(address))).await;
    for outcome in chain.outcomes().await {
        assert_holds(&outcome.unwrap().0, dir.path());
    }
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_nobody_connects_to_gives_up() {
    let place = Place::new("node 1");
    let mut config = place.config();
    config.accept_limit = Duration::from_millis(300);
    let mut node = Node::with(config);
    node.begin(spec("u1", StageSource::Upstream, None)).await;
    let error = node.outcome().await.unwrap_err();
    assert!(error.contains("the node before did not connect in time"), "{error}");
    node.end().await;
}
