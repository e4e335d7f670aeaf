use super::*;
use crate::staging::FileSize;
use crate::staging::upload::{UploadError, UploadStatus};

fn files(dir: &Path) -> Vec<(FileSize, Vec<u8>)> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let file = |name: String| {
        let bytes = std::fs::read(dir.join(&name)).unwrap();
        (FileSize { name, size: bytes.len() as u64 }, bytes)
    };
    names.into_iter().map(file).collect()
}

async fn create(node: &Node, id: &str, dir: &Path) -> Result<UploadStatus, UploadError> {
    node.uploads.create(id, files(dir).into_iter().map(|(file, _)| file).collect()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn uploaded_bytes_flow_down_the_chain_in_any_order() {
    for seed in 0..10 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let dir = checkpoint(seed, 2, 20_000);
        let mut chain = Chain::new(3);
        assert!(!create(&chain.nodes[0], "up", dir.path()).await.unwrap().complete);
        // Some bytes come before the update begins, the rest while it runs.
        let mut pieces = Vec::new();
        for (file, bytes) in files(dir.path()) {
            let mut at = 0;
            while at < bytes.len() {
                let end = bytes.len().min(at + random.random_range(1..20_000));
                // Pieces overlap.
                let from = at.saturating_sub(random.random_range(0..100));
                pieces.push((file.name.clone(), from, bytes[from..end].to_vec()));
                at = end;
            }
        }
        for at in (1..pieces.len()).rev() {
            pieces.swap(at, random.random_range(0..=at));
        }
        let later = pieces.split_off(random.random_range(0..pieces.len()));
        let put = |pieces: &[(String, usize, Vec<u8>)]| {
            for (name, from, bytes) in pieces {
                chain.nodes[0].uploads.write("up", name, *from as u64, bytes).unwrap();
            }
        };
        put(&pieces);
        chain.begin("u1", StageSource::Upload("up".to_owned())).await;
        put(&later);
        assert!(chain.nodes[0].uploads.status("up").unwrap().complete);
        for outcome in chain.outcomes().await {
            assert_holds(&outcome.unwrap().0, dir.path());
        }
        chain.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_where_it_was() {
    let dir = checkpoint(1, 1, 20_000);
    let mut chain = Chain::new(1);
    let node = &chain.nodes[0];
    create(node, "up", dir.path()).await.unwrap();
    let (file, bytes) = files(dir.path()).remove(0);
    node.uploads.write("up", &file.name, 0, &bytes[..5000]).unwrap();
    node.uploads.write("up", &file.name, 9000, &bytes[9000..9001]).unwrap();
    let status = create(node, "up", dir.path()).await.unwrap();
    assert_eq!(status.files[0].ranges, [(0, 5000), (9000, 9001)]);
    assert_eq!((status.received, status.complete), (5001, false));
    // An update that is called off keeps the bytes.
    node.begin(spec("u1", StageSource::Upload("up".to_owned()), None)).await;
    node.discard("u1").await;
    assert_eq!(node.uploads.status("up").unwrap(), status);
    // Bytes that are there are not written again.
    node.uploads.write("up", &file.name, 0, &vec![0; 5000]).unwrap();
    node.begin(spec("u2", StageSource::Upload("up".to_owned()), None)).await;
    node.uploads.write("up", &file.name, 4000, &bytes[4000..]).unwrap();
    let (checkpoint, _) = chain.nodes[0].outcome().await.unwrap();
    assert_holds(&checkpoint, dir.path());
    assert!(chain.nodes[0].uploads.status("up").unwrap().complete, "remembered");
    chain.nodes[0].uploads.write("up", &file.name, 0, &bytes[..10]).unwrap();
    chain.end().await;
}

/// Ends the only node of a chain and starts it again.
async fn again(chain: Chain, between: impl FnOnce(&Place)) -> Chain {
    let places = chain.end().await;
    between(&places[0]);
    let nodes: Vec<Node> = places.iter().map(Node::start).collect();
    timeout(LIMIT, nodes[0].uploads.opened()).await.unwrap();
    Chain { places, nodes }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_after_a_restart_of_the_sidecar() {
    let (before, dir) = (checkpoint(1, 1, 20_000), checkpoint(2, 2, 9000));
    let chunk = CHUNK as usize;
    let mut chain = Chain::new(1);
    chain.update("u1", before.path()).await;
    let node = &chain.nodes[0];
    create(node, "up", dir.path()).await.unwrap();
    let files = files(dir.path());
    let (file, bytes) = &files[0];
    node.uploads.write("up", &file.name, 0, &bytes[..3 * chunk + 10]).unwrap();
    node.begin(spec("u2", StageSource::Upload("up".to_owned()), None)).await;
    node.uploads.write("up", &file.name, 5 * chunk as u64, &bytes[5 * chunk..6 * chunk]).unwrap();

    let chain = again(chain, |_| {}).await;
    let status = chain.nodes[0].uploads.status("up").unwrap();
    let whole = [(0, 3 * u64::from(CHUNK)), (5 * u64::from(CHUNK), 6 * u64::from(CHUNK))];
    assert_eq!(status.files[0].ranges, whole, "what is in unfinished chunks comes again");
    assert_eq!((status.received, status.complete), (4 * u64::from(CHUNK), false));
    assert_eq!(create(&chain.nodes[0], "up", dir.path()).await.unwrap(), status);
    assert_eq!(chain.nodes[0].state().await.current.unwrap().id.0, "u1");
    // A second time, and bytes were damaged meanwhile.
    let mut chain = again(chain, |place| {
        let path = place.shm().join("dp-sidecar-run-b");
        let mut segment = std::fs::read(&path).unwrap();
        segment[5 * chunk] ^= 1;
        std::fs::write(&path, segment).unwrap();
    })
    .await;
    let node = &chain.nodes[0];
    assert_eq!(node.uploads.status("up").unwrap().files[0].ranges, whole[..1]);
    node.begin(spec("u2", StageSource::Upload("up".to_owned()), None)).await;
    for (file, bytes) in &files {
        node.uploads.write("up", &file.name, 0, bytes).unwrap();
    }
    let (checkpoint, _) = chain.nodes[0].outcome().await.unwrap();
    assert_holds(&checkpoint, dir.path());
    chain.nodes[0].commit("u2").await;

    let chain = again(chain, |_| {}).await;
    let error = chain.nodes[0].uploads.status("up").unwrap_err();
    assert_eq!(error, UploadError::Unknown { id: "up".to_owned() }, "it has ended");
    assert_eq!(chain.nodes[0].state().await.current.unwrap().id.0, "u2");
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_a_predecessor_gives_way_and_is_forgotten_with_its_segment() {
    let (dir, other) = (checkpoint(1, 1, 9000), checkpoint(2, 1, 9000));
    let chain = Chain::new(1);
    create(&chain.nodes[0], "up", dir.path()).await.unwrap();
    let (file, bytes) = files(dir.path()).remove(0);
    chain.nodes[0].uploads.write("up", &file.name, 0, &bytes[..CHUNK as usize]).unwrap();
    let mut chain = again(chain, |_| {}).await;
    // Nobody has come back to it.
    chain.update("u1", other.path()).await;
    let error = chain.nodes[0].uploads.write("up", &file.name, 0, &bytes).unwrap_err();
    assert!(matches!(error, UploadError::Gone { .. }), "{error}");

    // Given up, it is not found again.
    create(&chain.nodes[0], "up", dir.path()).await.unwrap();
    chain.nodes[0].uploads.write("up", &file.name, 0, &bytes[..CHUNK as usize]).unwrap();
    chain.nodes[0].uploads.discard("up").await.unwrap();
    let chain = again(chain, |_| {}).await;
    assert!(matches!(chain.nodes[0].uploads.status("up"), Err(UploadError::Unknown { .. })));

    create(&chain.nodes[0], "up", dir.path()).await.unwrap();
    let chain = again(chain, |place| {
        std::fs::remove_file(place.shm().join("dp-sidecar-run-b")).unwrap();
    })
    .await;
    assert!(matches!(chain.nodes[0].uploads.status("up"), Err(UploadError::Unknown { .. })));
    let left = chain.places[0].dir.path().join("state");
    assert!(!left.join("upload.json").exists() && !left.join("upload.digests").exists());
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_uploads_are_refused() {
    let (dir, other) = (checkpoint(1, 1, 20_000), checkpoint(1, 2, 2000));
    let mut chain = Chain::new(1);
    let node = &chain.nodes[0];
    let uploads = &node.uploads;
    let unknown = UploadError::Unknown { id: "up".to_owned() };
    assert_eq!(uploads.write("up", "x", 0, &[1]).unwrap_err(), unknown);
    assert_eq!(uploads.discard("up").await.unwrap_err(), unknown);
    let bad = vec![FileSize { name: "../x.safetensors".to_owned(), size: 1 }];
    assert!(matches!(uploads.create("up", bad).await.unwrap_err(), UploadError::Invalid { .. }));
    create(node, "up", dir.path()).await.unwrap();
    let (file, bytes) = files(dir.path()).remove(0);
    let error = uploads.write("up", &file.name, file.size - 1, &[1, 2]).unwrap_err();
    assert!(matches!(error, UploadError::Invalid { .. }), "{error}");
    let error = uploads.write("up", "y.safetensors", 0, &[1]).unwrap_err();
    assert!(matches!(error, UploadError::UnknownFile { .. }), "{error}");
    let error = create(node, "up", other.path()).await.unwrap_err();
    assert!(error.to_string().ends_with("it was begun with other files"), "{error}");
    let error = create(node, "another", other.path()).await.unwrap_err();
    assert!(error.to_string().ends_with("upload \"up\" has the spare segment"), "{error}");
    let error = node.ask(StageRequest::Begin(spec("u", directory(dir.path()), None))).await.unwrap_err();
    assert!(error.to_string().ends_with("upload \"up\" has the spare segment"), "{error}");
    uploads.write("up", &file.name, 0, &bytes[..9000]).unwrap();
    uploads.discard("up").await.unwrap();
    chain.update("u1", dir.path()).await;
    chain.end().await;
}
