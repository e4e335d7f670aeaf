use super::*;
use crate::staging::upload::{UploadError, UploadFile, UploadStatus};

fn files(dir: &Path) -> Vec<(UploadFile, Vec<u8>)> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let file = |name: String| {
        let bytes = std::fs::read(dir.join(&name)).unwrap();
        (UploadFile { name, size: bytes.len() as u64 }, bytes)
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

#[tokio::test(flavor = "multi_thread")]
async fn bad_uploads_are_refused() {
    let (dir, other) = (checkpoint(1, 1, 20_000), checkpoint(1, 2, 2000));
    let mut chain = Chain::new(1);
    let node = &chain.nodes[0];
    let uploads = &node.uploads;
    let unknown = UploadError::Unknown { id: "up".to_owned() };
    assert_eq!(uploads.write("up", "x", 0, &[1]).unwrap_err(), unknown);
    assert_eq!(uploads.discard("up").await.unwrap_err(), unknown);
    let bad = vec![UploadFile { name: "../x.safetensors".to_owned(), size: 1 }];
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
