//! Staging alone: chains of nodes in this process, over loopback, against a bare TCP copy down the same chain.
//!
//! `bench-staging [NODES [MIB [ROUNDS]]]` prints one JSON line per round, and the ratio of the best ones. The first
//! round of a chain takes fresh memory, the later ones reuse it.
#![expect(clippy::print_stdout, reason = "standard output is its interface")]

use std::error::Error;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dp_sidecar::api::{Retain, StageProgress};
use dp_sidecar::driver::handles::{
    CheckpointDir, NodeEvent, StageEvent, StageHandle, StageRequest, StageSource, StageSpec, StageState,
};
use dp_sidecar::shared_memory::{self, SHM_DIR};
use dp_sidecar::staging::{self, StageConfig};
use dp_sidecar_protocol::{UpdateId, WeightVersion};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const LIMIT: Duration = Duration::from_secs(120);
const CHUNK: usize = 4 << 20;
/// As many as an 8B model has.
const TENSORS: usize = 291;

type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let mut number = |default: usize| args.next().map_or(Ok(default), |arg| arg.parse());
    let (nodes, mib, rounds) = (number(2)?, number(1024)?, number(4)?);
    let base = tempfile::tempdir()?;
    // Three, so that no segment holds the bytes of the next round.
    let sources = ["a", "b", "c"].map(|name| base.path().join(name));
    for (seed, source) in (1..).zip(&sources) {
        std::fs::create_dir(source)?;
        write_checkpoint(source, seed, mib << 20)?;
    }
    let mut chain = Chain::start(base.path(), nodes)?;
    let (mut best_bare, mut best) = (f64::MAX, f64::MAX);
    for round in 0..rounds {
        let bare = bare_copy(nodes, mib << 20).await?;
        let started = Instant::now();
        let progress = chain.stage(&format!("u{round}"), &sources[round % sources.len()]).await?;
        let seconds = started.elapsed().as_secs_f64();
        let received: Vec<f64> =
            progress[1..].iter().map(|progress| progress.received as f64 / progress.total as f64).collect();
        println!(
            "{}",
            serde_json::json!({
                "round": round, "bare_s": bare, "stage_s": seconds, "received": received,
            })
        );
        chain.commit(&format!("u{round}")).await?;
        best_bare = best_bare.min(bare);
        best = best.min(seconds);
    }
    let unchanged = chain.stage("same", &sources[(rounds - 1) % sources.len()]).await?;
    let again: Vec<u64> = unchanged[1..].iter().map(|progress| progress.received).collect();
    println!(
        "{}",
        serde_json::json!({
            "bench": "staging", "nodes": nodes, "mib": mib, "bare_s": best_bare, "stage_s": best,
            "stage_ratio": best_bare / best, "received_unchanged": again, "memory": chain.memory().await?,
        })
    );
    chain.end().await;
    Ok(())
}

/// One safetensors file of about `bytes` bytes that do not repeat.
fn write_checkpoint(dir: &Path, seed: u64, bytes: usize) -> Result<(), Failure> {
    let each = bytes / TENSORS / 2 * 2;
    let mut header = serde_json::Map::new();
    for tensor in 0..TENSORS {
        let at = tensor * each;
        header.insert(
            format!("model.layers.{tensor}.weight"),
            serde_json::json!({"dtype": "BF16", "shape": [each / 2], "data_offsets": [at, at + each]}),
        );
    }
    let header = serde_json::to_vec(&header)?;
    let mut file = std::io::BufWriter::new(std::fs::File::create(dir.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut state = seed;
    for _ in 0..(each * TENSORS) / 8 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        file.write_all(&state.to_le_bytes())?;
    }
    for _ in 0..(each * TENSORS) % 8 {
        file.write_all(&[0])?;
    }
    file.flush()?;
    Ok(())
}

struct Chain {
    nodes: Vec<(StageHandle, mpsc::Receiver<NodeEvent>)>,
    runs: Vec<String>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Chain {
    fn start(base: &Path, nodes: usize) -> Result<Self, Failure> {
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let mut chain = Self { nodes: Vec::new(), runs: Vec::new(), tracker, stop };
        for node in 0..nodes {
            let state = base.join(format!("node{node}"));
            std::fs::create_dir(&state)?;
            let run = format!("bench-{}-{node}", std::process::id());
            let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let config = StageConfig::new(format!("node {node}"), state, run.clone(), host, None);
            let (events_in, events) = mpsc::channel(64);
            let handle = staging::spawn(config, events_in, &chain.tracker, chain.stop.clone())?;
            chain.nodes.push((handle, events));
            chain.runs.push(run);
        }
        Ok(chain)
    }

    async fn ask(&self, node: usize, request: StageRequest) -> Result<StageState, Failure> {
        Ok(self.nodes[node].0.ask_within(LIMIT, request).await?)
    }

    async fn stage(&mut self, id: &str, source: &Path) -> Result<Vec<StageProgress>, Failure> {
        let mut downstream = None;
        for node in (0..self.nodes.len()).rev() {
            let source = match node {
                0 => StageSource::Directory(CheckpointDir {
                    path: source.to_string_lossy().into_owned(),
                    files: None,
                }),
                _ => StageSource::Upstream,
            };
            let spec = StageSpec {
                id: UpdateId(id.to_owned()),
                version: WeightVersion(id.to_owned()),
                source,
                downstream,
                retain: Retain::Memory,
                model: None,
                fit: Box::default(),
            };
            downstream = self.ask(node, StageRequest::Begin(spec)).await?.data_address;
        }
        let mut all = Vec::new();
        for (_, events) in &mut self.nodes {
            loop {
                match tokio::time::timeout(LIMIT, events.recv()).await?.ok_or("ended")? {
                    NodeEvent::Stage(StageEvent::Progress { .. }) => {}
                    NodeEvent::Stage(StageEvent::Staged { progress, .. }) => {
                        all.push(progress);
                        break;
                    }
                    NodeEvent::Stage(StageEvent::Failed { error, .. }) => return Err(error.into()),
                    other => return Err(format!("{other:?}").into()),
                }
            }
        }
        Ok(all)
    }

    async fn commit(&self, id: &str) -> Result<(), Failure> {
        for node in 0..self.nodes.len() {
            self.ask(node, StageRequest::Commit { id: UpdateId(id.to_owned()) }).await?;
        }
        Ok(())
    }

    async fn memory(&self) -> Result<u64, Failure> {
        Ok(self.ask(0, StageRequest::State).await?.memory)
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        for run in self.runs {
            // What is left is told by the file system.
            let _ = shared_memory::remove_segments(Path::new(SHM_DIR), &run);
        }
    }
}

/// The same bytes down a chain without hashes, checks or protocol; gives seconds.
async fn bare_copy(nodes: usize, bytes: usize) -> Result<f64, Failure> {
    let memory = |fill: u8| -> Vec<Vec<u8>> {
        (0..bytes).step_by(CHUNK).map(|at| vec![fill; CHUNK.min(bytes - at)]).collect()
    };
    let mut next: Option<SocketAddr> = None;
    let mut tasks = Vec::new();
    for _ in 1..nodes {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (to, memory) = (next, memory(1));
        tasks.push(tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            let (sender, chunks) = mpsc::channel(memory.len());
            let forward = to.map(|to| tokio::spawn(write_all(to, chunks)));
            let mut kept = Vec::with_capacity(memory.len());
            for mut chunk in memory {
                stream.read_exact(&mut chunk).await?;
                let chunk = Bytes::from(chunk);
                // Nobody takes them at the end of the chain.
                let _ = sender.send(chunk.clone()).await;
                kept.push(chunk);
            }
            drop(sender);
            if let Some(forward) = forward {
                forward.await.map_err(std::io::Error::other)??;
            }
            stream.write_u8(1).await?;
            Ok::<_, std::io::Error>(kept)
        }));
        next = Some(address);
    }
    let source: Vec<Bytes> = memory(2).into_iter().map(Bytes::from).collect();
    let started = Instant::now();
    if let Some(to) = next {
        let (sender, chunks) = mpsc::channel(source.len());
        for chunk in &source {
            sender.send(chunk.clone()).await?;
        }
        drop(sender);
        write_all(to, chunks).await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    for task in tasks {
        task.await??;
    }
    Ok(seconds)
}

async fn write_all(to: SocketAddr, mut chunks: mpsc::Receiver<Bytes>) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    while let Some(chunk) = chunks.recv().await {
        stream.write_all(&chunk).await?;
    }
    stream.read_u8().await?;
    Ok(())
}
