//! Adapters of a node.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::driver::handles::{ADAPTER_FILE, AdapterPlace};
use crate::manifest::Manifest;

/// An adapter: its directory, its digest, the bytes of its file.
fn adapter(dir: &Path, seed: u8) -> (PathBuf, String, Vec<u8>) {
    let path = dir.join(format!("adapter-{seed}"));
    std::fs::create_dir_all(&path).unwrap();
    let data = vec![seed; 10_000];
    write(&path, ADAPTER_FILE, &[("lora_A", "U8", &[10_000], &data)]);
    let manifest = Manifest::read(&path, None).unwrap();
    let digest = manifest.digests(&|_| {}, &AtomicBool::new(false)).unwrap().whole;
    let bytes = std::fs::read(path.join(ADAPTER_FILE)).unwrap();
    (path, digest, bytes)
}

impl Node {
    async fn take_adapter(&self, digest: &str, path: Option<&Path>) -> AdapterPlace {
        let path = path.map(|path| path.display().to_string());
        let request = StageRequest::TakeAdapter { digest: digest.to_owned(), path };
        self.ask(request).await.unwrap().adapter.unwrap()
    }

    async fn piece(
        &self,
        digest: &str,
        file: &[u8],
        range: std::ops::Range<usize>,
    ) -> Result<AdapterPlace, String> {
        let request = StageRequest::AdapterPiece {
            digest: digest.to_owned(),
            offset: range.start as u64,
            size: file.len() as u64,
            bytes: file[range].to_vec().into(),
        };
        let state = self.ask(request).await.map_err(|error| error.to_string())?;
        Ok(state.adapter.unwrap())
    }
}

fn content(place: &AdapterPlace) -> Vec<u8> {
    let AdapterPlace::Here { path } = place else { panic!("{place:?}") };
    std::fs::read(Path::new(path).join(ADAPTER_FILE)).unwrap()
}

#[tokio::test]
async fn an_adapter_outlives_the_directory_it_came_from_and_a_restart() {
    let place = Place::new("node 0");
    let node = Node::start(&place);
    let (path, digest, bytes) = adapter(place.dir.path(), 1);
    assert_eq!(content(&node.take_adapter(&digest, Some(&path)).await), bytes);
    std::fs::remove_dir_all(&path).unwrap();
    assert_eq!(content(&node.take_adapter(&digest, Some(&path)).await), bytes);
    node.end().await;
    let node = Node::start(&place);
    let there = node.take_adapter(&digest, None).await;
    assert_eq!(content(&there), bytes);
    node.end().await;
    // A damaged one is none.
    let AdapterPlace::Here { path } = there else { panic!("{there:?}") };
    let file = Path::new(&path).join(ADAPTER_FILE);
    let mut damaged = bytes;
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(file, damaged).unwrap();
    let node = Node::start(&place);
    assert_eq!(node.take_adapter(&digest, None).await, AdapterPlace::Lacks { from: 0 });
    node.end().await;
}

#[tokio::test]
async fn a_directory_with_another_adapter_is_not_taken_for_it() {
    let place = Place::new("node 0");
    let node = Node::start(&place);
    let (_, digest, _) = adapter(place.dir.path(), 1);
    let (other, ..) = adapter(place.dir.path(), 2);
    assert_eq!(node.take_adapter(&digest, Some(&other)).await, AdapterPlace::Lacks { from: 0 });
    node.end().await;
}

#[tokio::test]
async fn pieces_go_on_where_they_were_after_a_restart() {
    let place = Place::new("node 0");
    let (_, digest, bytes) = adapter(place.dir.path(), 1);
    let node = Node::start(&place);
    assert_eq!(node.piece(&digest, &bytes, 0..4000).await.unwrap(), AdapterPlace::Lacks { from: 4000 });
    // One that is not the next changes nothing.
    for wrong in [0..4000, 5000..6000] {
        assert_eq!(node.piece(&digest, &bytes, wrong).await.unwrap(), AdapterPlace::Lacks { from: 4000 });
    }
    node.end().await;
    let node = Node::start(&place);
    assert_eq!(node.take_adapter(&digest, None).await, AdapterPlace::Lacks { from: 4000 });
    let done = node.piece(&digest, &bytes, 4000..bytes.len()).await.unwrap();
    assert_eq!(content(&done), bytes);
    assert_eq!(node.piece(&digest, &bytes, 0..10).await.unwrap(), done);
    node.end().await;
}

#[tokio::test]
async fn pieces_of_other_bytes_are_refused_and_removed() {
    let place = Place::new("node 0");
    let (_, digest, _) = adapter(place.dir.path(), 1);
    let (_, actual, other) = adapter(place.dir.path(), 2);
    let node = Node::start(&place);
    let error = node.piece(&digest, &other, 0..other.len()).await.unwrap_err();
    assert!(error.contains("node 0") && error.contains(&digest) && error.contains(&actual), "{error}");
    assert_eq!(node.take_adapter(&digest, None).await, AdapterPlace::Lacks { from: 0 });
    let error = node.piece("../../escape", &other, 0..10).await.unwrap_err();
    assert!(error.contains("is no digest"), "{error}");
    node.end().await;
}

#[tokio::test]
async fn only_what_is_to_be_kept_is_kept() {
    let place = Place::new("node 0");
    let node = Node::start(&place);
    let ((one, first, _), (two, second, bytes)) =
        (adapter(place.dir.path(), 1), adapter(place.dir.path(), 2));
    node.take_adapter(&first, Some(&one)).await;
    node.take_adapter(&second, Some(&two)).await;
    node.ask(StageRequest::KeepAdapters { digests: BTreeSet::from([second.clone()]) }).await.unwrap();
    assert_eq!(node.take_adapter(&first, None).await, AdapterPlace::Lacks { from: 0 });
    assert_eq!(content(&node.take_adapter(&second, None).await), bytes);
    node.end().await;
}
