//! The sidecar's data path alone: rank tasks, and nothing else. `scripts/bench relay` drives it.
//!
//! Prints one JSON line with the addresses for the engines, then obeys lines on standard input:
//! `admit`, `attach ID INPUT OUTPUT`, `rss`, `cpu`; each is answered with one JSON line. Ends with its input.
#![expect(clippy::print_stdout, reason = "standard output is its interface")]

use std::error::Error;
use std::io::{BufRead, Write};
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar::driver::handles::{
    Admit, EngineFacts, EngineReady, GroupKind, NodeEvent, OpenRoute, Prepare, RankEvent, RankHandle,
    SlotAddresses,
};
use dp_sidecar::driver::rank::{self, RankConfig};
use dp_sidecar::transport::PrivateDir;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::virtual_engine::Limits;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

const LIMIT: Duration = Duration::from_secs(30);
const FIRST: Incarnation = Incarnation(1);

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let ranks: u16 = args.next().ok_or("usage: bench-relay RANKS SLOTS DIR")?.parse()?;
    let slots: u32 = args.next().ok_or("usage: bench-relay RANKS SLOTS DIR")?.parse()?;
    let dir = args.next().ok_or("usage: bench-relay RANKS SLOTS DIR")?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(
        ranks,
        slots,
        PrivateDir::create(dir)?,
    ))
}

async fn serve(ranks: u16, slots: u32, dir: PrivateDir) -> Result<(), Failure> {
    let tracker = TaskTracker::new();
    let (reports, mut events) = mpsc::channel(1024);
    let mut handles = Vec::new();
    let mut addresses = Vec::new();
    for rank in 0..ranks {
        let config =
            RankConfig::new(EngineIndex(rank), slots, Limits::default(), GroupKind::Independent, dir.clone());
        let handle = rank::spawn(config, &tracker, reports.clone());
        let bound: SlotAddresses = handle.ask_within(LIMIT, Prepare { incarnation: FIRST }).await?;
        addresses.push(json!({"inputs": bound.inputs, "outputs": bound.outputs}));
        handles.push(handle);
    }
    say(&json!({ "ranks": addresses }))?;
    let mut lines = lines();
    while let Some(line) = lines.recv().await {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["admit"] => admit(&handles, &mut events).await?,
            ["attach", id, input, output] => attach(&handles, id.parse()?, input, output).await?,
            ["rss"] => json!({"rss_kb": status_kb("VmRSS:")?}),
            ["cpu"] => json!({"cpu_s": cpu_seconds()?}),
            _ => return Err(format!("not a command: {line:?}").into()),
        };
        say(&answer)?;
    }
    Ok(())
}

async fn admit(
    handles: &[RankHandle],
    events: &mut mpsc::Receiver<NodeEvent>,
) -> Result<serde_json::Value, Failure> {
    for _ in handles {
        match tokio::time::timeout(LIMIT, events.recv()).await? {
            Some(NodeEvent::Rank(RankEvent::Registered { .. })) => {}
            other => return Err(format!("expected a registration, got {other:?}").into()),
        }
    }
    for handle in handles {
        let facts = Box::new(EngineFacts::of(Layout::newest()));
        let ready = EngineReady { incarnation: FIRST, facts };
        handle.commands.tell(ready).await?;
        handle.commands.tell(Admit { incarnation: FIRST }).await?;
    }
    Ok(json!({ "admitted": handles.len() }))
}

async fn attach(
    handles: &[RankHandle],
    id: u64,
    input: &str,
    output: &str,
) -> Result<serde_json::Value, Failure> {
    for handle in handles {
        let route = OpenRoute {
            frontend: FrontendId(id),
            api_server: 0,
            input_address: input.to_owned(),
            output_address: output.to_owned(),
            registration: Bytes::from_static(b"\x80"),
            connect_timeout: LIMIT,
        };
        handle.ask_within(LIMIT, route).await?;
    }
    Ok(json!({ "attached": id }))
}

fn say(line: &serde_json::Value) -> Result<(), Failure> {
    println!("{line}");
    std::io::stdout().flush()?;
    Ok(())
}

/// Lines of standard input. Its thread ends with it, or with the process.
fn lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

fn status_kb(key: &str) -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    Ok(number.ok_or("no such line")?.parse()?)
}

fn cpu_seconds() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after = stat.rsplit(')').next().ok_or("no stat")?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    // USER_HZ is 100 on every Linux that vLLM runs on.
    Ok(ticks / 100.0)
}
