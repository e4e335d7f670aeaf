//! Load for a DP coordinator, ours or vLLM's: all engines and one frontend, over libzmq.
//!
//! `--addresses` names a JSON file `{"front": "ipc://..", "engines": [["ipc://..", "ipc://.."], ..]}`;
//! vLLM's has the same two addresses for all engines. Writes one JSON object: the time from FIRST_REQ
//! until the last engine has START_DP_WAVE, CPU time of process `--pid` per 100,000 stats messages,
//! and its resident memory.
#![expect(
    clippy::disallowed_methods,
    reason = "a load generator paces itself; it has one thread and no runtime"
)]

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use rmpv::Value;
use serde_json::json;
use zmq::{Context, Socket, SocketType};

use dp_sidecar_testkit::sockets;

/// Nothing takes longer.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Parser)]
struct Args {
    /// File with the addresses.
    #[arg(long)]
    addresses: PathBuf,
    /// Process to measure.
    #[arg(long)]
    pid: u32,
    /// A stats message of an engine; wave, step and counts are filled in.
    #[arg(long)]
    template: PathBuf,
    /// Rounds of FIRST_REQ, START_DP_WAVE, start_wave, wave_complete.
    #[arg(long, default_value_t = 1000)]
    rounds: u64,
    /// Stats messages.
    #[arg(long, default_value_t = 100_000)]
    stats: u64,
    /// Time between two steps of the group; in each every engine sends its stats.
    #[arg(long, default_value_t = 10)]
    step_ms: u64,
}

struct Engine {
    subscriber: Socket,
    push: Socket,
}

struct Load {
    front: Socket,
    engines: Vec<Engine>,
    wave: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let addresses: serde_json::Value = serde_json::from_slice(&std::fs::read(&args.addresses)?)?;
    let template = rmpv::decode::read_value(&mut &std::fs::read(&args.template)?[..])?;
    let context = Context::new();
    let mut load = Load::connect(&context, &addresses)?;
    for round in 0..50 {
        load.round(round)?;
    }
    let mut wakes = Vec::new();
    for round in 0..args.rounds {
        wakes.push(load.round(round)?);
        std::thread::sleep(Duration::from_micros(500 + 137 * (round % 11)));
    }
    wakes.sort_unstable();
    let messages = load.prepare_stats(&template, args.stats)?;
    let before = cpu_seconds(args.pid)?;
    let began = Instant::now();
    load.send_stats(&messages, Duration::from_millis(args.step_ms))?;
    let sent_in = began.elapsed();
    load.settle()?;
    let cpu = cpu_seconds(args.pid)? - before;
    let sent = u32::try_from(messages.iter().map(Vec::len).sum::<usize>())?;
    let result = json!({
        "wake_us": {
            "p50": at(&wakes, 50).as_micros() as u64,
            "p99": at(&wakes, 99).as_micros() as u64,
            "max": at(&wakes, 100).as_micros() as u64,
        },
        "cpu_s_per_100k": cpu / f64::from(sent) * 100_000.0,
        "stats_messages": sent,
        "stats_message_bytes": messages[0][0].len(),
        "stats_seconds": sent_in.as_secs_f64(),
        "rss_mb": resident_mb(args.pid)?,
    });
    println!("{result}");
    Ok(())
}

fn at(sorted: &[Duration], percent: usize) -> Duration {
    let index = (sorted.len() * percent / 100).min(sorted.len() - 1);
    sorted[index]
}

impl Load {
    fn connect(context: &Context, addresses: &serde_json::Value) -> Result<Self, Box<dyn Error>> {
        let connect = |kind: SocketType, address: &serde_json::Value| {
            let address = address.as_str().ok_or(zmq::Error::EINVAL)?;
            let socket = sockets::connect(context, kind, address, None)?;
            socket.set_rcvtimeo(i32::try_from(LIMIT.as_millis()).unwrap_or(i32::MAX))?;
            if kind == SocketType::XSUB {
                socket.send("\x01", 0)?;
            }
            Ok::<_, zmq::Error>(socket)
        };
        let front = connect(SocketType::XSUB, &addresses["front"])?;
        let mut engines = Vec::new();
        for pair in addresses["engines"].as_array().ok_or("no engines")? {
            engines.push(Engine {
                subscriber: connect(SocketType::XSUB, &pair[0])?,
                push: connect(SocketType::PUSH, &pair[1])?,
            });
        }
        for engine in &engines {
            let frames = engine.subscriber.recv_multipart(0)?;
            if frames != [b"READY"] {
                return Err(format!("expected READY, got {frames:?}").into());
            }
        }
        Ok(Self { front, engines, wave: 0 })
    }

    /// One wave: how long it took until the last engine was woken.
    fn round(&mut self, round: u64) -> Result<Duration, Box<dyn Error>> {
        let target = u16::try_from(round % self.engines.len() as u64)?;
        let target = Value::Binary(target.to_le_bytes().to_vec());
        let first_request = encode(&Value::Array(vec![target, self.wave.into()]))?;
        let began = Instant::now();
        self.front.send(first_request, 0)?;
        self.expect_start()?;
        let woken = began.elapsed();
        self.report(None, Some(self.wave))?;
        self.expect_start()?;
        self.expect_published(true)?;
        self.report(Some(self.wave), None)?;
        self.wave += 1;
        self.expect_published(false)?;
        Ok(woken)
    }

    /// Every engine is told to start the current wave.
    fn expect_start(&self) -> Result<(), Box<dyn Error>> {
        for engine in &self.engines {
            let frames = engine.subscriber.recv_multipart(0)?;
            let wave = match frames.as_slice() {
                [kind, payload] if kind == b"\x02" => {
                    rmpv::decode::read_value(&mut &payload[..])?[0].as_u64()
                }
                _ => None,
            };
            if wave != Some(self.wave) {
                let wanted = self.wave;
                return Err(format!("expected start of wave {wanted}, got {frames:?}").into());
            }
        }
        Ok(())
    }

    /// Reads publications up to this state of the current wave.
    fn expect_published(&self, running: bool) -> Result<(), Box<dyn Error>> {
        loop {
            let frame = self.front.recv_bytes(0)?;
            let publication = rmpv::decode::read_value(&mut &frame[..])?;
            if publication[1].as_u64() == Some(self.wave) && publication[2].as_bool() == Some(running) {
                return Ok(());
            }
        }
    }

    /// Rank 0 reports the end or the start of a wave.
    fn report(&self, complete: Option<u64>, start: Option<u64>) -> Result<(), Box<dyn Error>> {
        let optional = |wave: Option<u64>| wave.map_or(Value::Nil, Value::from);
        let outputs = Value::Array(vec![
            0.into(),
            Value::Array(Vec::new()),
            Value::Nil,
            Value::F64(0.0),
            Value::Nil,
            Value::Nil,
            optional(complete),
            optional(start),
            Value::Nil,
        ]);
        self.engines[0].push.send(encode(&outputs)?, 0)?;
        Ok(())
    }

    /// The messages of each step, made before the clock runs.
    fn prepare_stats(&self, template: &Value, count: u64) -> Result<Vec<Vec<Vec<u8>>>, Box<dyn Error>> {
        let engines = self.engines.len() as u64;
        let mut steps = Vec::new();
        for step in 1..=count.div_ceil(engines) {
            let mut messages = Vec::new();
            for rank in 0..engines {
                let Value::Array(mut fields) = template.clone() else {
                    return Err("the template is no array".into());
                };
                fields[0] = rank.into();
                let Value::Map(stats) = &mut fields[2] else {
                    return Err("the template has no stats".into());
                };
                for (key, value) in stats {
                    match key.as_str() {
                        Some("step_counter") => *value = step.into(),
                        Some("current_wave") => *value = self.wave.into(),
                        Some("num_running_reqs") => *value = ((step + rank) % 200).into(),
                        Some("num_waiting_reqs") => *value = (step % 7).into(),
                        _ => {}
                    }
                }
                messages.push(encode(&Value::Array(fields))?);
            }
            steps.push(messages);
        }
        Ok(steps)
    }

    fn send_stats(&self, steps: &[Vec<Vec<u8>>], per_step: Duration) -> Result<(), Box<dyn Error>> {
        let began = Instant::now();
        for (number, messages) in (0..).zip(steps) {
            for (engine, message) in self.engines.iter().zip(messages) {
                engine.push.send(&message[..], 0)?;
            }
            let due = per_step * number;
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
        Ok(())
    }

    /// Waits until everything that was sent has been handled.
    fn settle(&mut self) -> Result<(), Box<dyn Error>> {
        std::thread::sleep(Duration::from_millis(300));
        self.report(Some(self.wave), None)?;
        self.wave += 1;
        self.expect_published(false)
    }
}

fn encode(value: &Value) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value)?;
    Ok(bytes)
}

/// User and system time of a process.
fn cpu_seconds(pid: u32) -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').ok_or("unexpected /proc/pid/stat")?;
    let field = |number: usize| -> Result<f64, Box<dyn Error>> {
        let field = rest.split_whitespace().nth(number);
        Ok(field.ok_or("short /proc/pid/stat")?.parse::<f64>()?)
    };
    // Clock ticks, 100 a second on every Linux this runs on.
    Ok((field(11)? + field(12)?) / 100.0)
}

fn resident_mb(pid: u32) -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kb = line.and_then(|line| line.split_whitespace().next()).ok_or("no VmRSS")?;
    Ok(kb.parse::<f64>()? / 1024.0)
}
