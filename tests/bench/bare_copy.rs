//! What `scripts/bench update` compares with: the same bytes over bare TCP connections of the same runtime,
//! down the same chain of nodes, without hashes, checks or protocol; and copied within memory.
//!
//! ```text
//! bench-bare-copy receive --listen IP [--next HOST:PORT] --bytes N    a node of the chain, forwards while it receives
//! bench-bare-copy send --to HOST:PORT --bytes N                       its beginning; prints the seconds
//! bench-bare-copy memcpy --bytes N --threads T                        prints the seconds
//! ```
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its interface")]

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Parser, Subcommand};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Bytes read or written at once, as staging's chunks.
const CHUNK: usize = 4 << 20;
/// Destination of the copies in memory, as large as a fake engine's: a device is not in the cache either.
const RING: usize = 16 << 20;
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Debug, Subcommand)]
enum Mode {
    Receive {
        #[arg(long)]
        listen: std::net::IpAddr,
        #[arg(long)]
        next: Option<SocketAddr>,
        #[arg(long)]
        bytes: usize,
    },
    Send {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        bytes: usize,
    },
    Memcpy {
        #[arg(long)]
        bytes: usize,
        #[arg(long)]
        threads: usize,
    },
}

/// Memory for all bytes, touched, in chunks.
fn memory(bytes: usize, fill: u8) -> Vec<Vec<u8>> {
    (0..bytes).step_by(CHUNK).map(|at| vec![fill; CHUNK.min(bytes - at)]).collect()
}

/// Writes everything and waits for the other end's byte: it has everything.
async fn write_all(to: SocketAddr, mut chunks: mpsc::Receiver<Bytes>) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    while let Some(chunk) = chunks.recv().await {
        stream.write_all(&chunk).await?;
    }
    stream.read_u8().await?;
    Ok(())
}

async fn receive(listen: std::net::IpAddr, next: Option<SocketAddr>, bytes: usize) -> std::io::Result<()> {
    let listener = TcpListener::bind((listen, 0)).await?;
    println!("listening {}", listener.local_addr()?);
    let memory = memory(bytes, 1);
    println!("ready");
    let (mut stream, _) = listener.accept().await?;
    let (sender, chunks) = mpsc::channel(memory.len());
    let forward = next.map(|next| tokio::spawn(write_all(next, chunks)));
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
    stream.write_u8(1).await
}

async fn send(to: SocketAddr, bytes: usize) -> std::io::Result<f64> {
    let memory: Vec<Bytes> = memory(bytes, 2).into_iter().map(Bytes::from).collect();
    let began = Instant::now();
    let (sender, chunks) = mpsc::channel(memory.len());
    let writing = tokio::spawn(write_all(to, chunks));
    for chunk in &memory {
        // The writer tells its own failure below.
        let _ = sender.send(chunk.clone()).await;
    }
    drop(sender);
    writing.await.map_err(std::io::Error::other)??;
    Ok(began.elapsed().as_secs_f64())
}

/// All threads copy the same source, as the engines of a node do.
fn memcpy(bytes: usize, threads: usize) -> f64 {
    let source = memory(bytes, 3);
    let mut rings: Vec<Vec<u8>> = (0..threads).map(|_| vec![1; RING]).collect();
    let began = Instant::now();
    std::thread::scope(|scope| {
        for ring in &mut rings {
            let source = &source;
            scope.spawn(move || {
                let mut at = 0;
                for chunk in source {
                    if at + chunk.len() > ring.len() {
                        at = 0;
                    }
                    ring[at..at + chunk.len()].copy_from_slice(chunk);
                    at += chunk.len();
                }
                std::hint::black_box(ring);
            });
        }
    });
    began.elapsed().as_secs_f64()
}

#[tokio::main]
async fn main() -> ExitCode {
    let work = async {
        match Cli::parse().mode {
            Mode::Receive { listen, next, bytes } => receive(listen, next, bytes).await,
            Mode::Send { to, bytes } => send(to, bytes).await.map(|seconds| println!("seconds {seconds}")),
            Mode::Memcpy { bytes, threads } => {
                println!("seconds {}", memcpy(bytes, threads));
                Ok(())
            }
        }
    };
    match tokio::time::timeout(LIMIT, work).await {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("bare_copy: {error}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("bare_copy: not done in {LIMIT:?}");
            ExitCode::FAILURE
        }
    }
}
