//! Load for `scripts/bench relay`: plays an engine and a frontend over libzmq, first connected to each
//! other, then through the sidecar's rank tasks (`tests/bench/relay.rs`), and prints the difference.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::output::{FinishReason, NewOutput, NewOutputs};
use dp_sidecar_protocol::request::NewRequest;
use dp_sidecar_protocol::{ClientIndex, EngineIndex, Wave};
use serde_json::{Value, json};
use zmq::{Context, Socket, SocketType};

type Failure = Box<dyn Error + Send + Sync>;

/// Milliseconds after which a missing message fails the bench.
const LIMIT_MS: i32 = 20_000;
const SLOTS: usize = 8;

#[derive(Parser)]
struct Args {
    /// The relay program.
    #[arg(long)]
    relay: String,
    /// Directory for its sockets.
    #[arg(long)]
    dir: String,
    /// Only the JSON line.
    #[arg(long)]
    json: bool,
    /// A tenth of the messages, 32 engines.
    #[arg(long)]
    quick: bool,
}

fn main() -> Result<(), Failure> {
    let args = Args::parse();
    let scale = if args.quick { 10 } else { 1 };
    let say = |line: String| {
        if !args.json {
            println!("{line}");
        }
    };

    let mut relay = Relay::start(&args.relay, 1, &args.dir)?;
    let context = Context::new();
    let mut engine = Engine::connect(&context, 0, &relay.ranks[0])?;
    relay.ask("admit")?;
    let frontend = Frontend::bind(&context)?;
    frontend.attach(&mut relay, 1, 1)?;
    let mut direct = Direct::new(&context)?;

    let mut added = serde_json::Map::new();
    let mut bare = serde_json::Map::new();
    for (name, size) in [("64", 64), ("4k", 4096)] {
        let (mut bare_us, mut relay_us) = (Vec::new(), Vec::new());
        // Alternating blocks, so that a busy moment of the machine meets both.
        for _ in 0..10 {
            let count = 1000 / scale;
            ping(&mut direct.engine.0, &mut direct.engine.1, &direct.frontend, size, count, &mut bare_us)?;
            let (input, output) = engine.slot(1);
            ping(input, output, &frontend, size, count, &mut relay_us)?;
        }
        let (bare_us, relay_us) = (Percentiles::of(bare_us), Percentiles::of(relay_us));
        say(format!(
            "round trip {name:>3}: direct p50 {:.0} p99 {:.0} us, relayed p50 {:.0} p99 {:.0} us",
            bare_us.p50, bare_us.p99, relay_us.p50, relay_us.p99
        ));
        added.insert(
            name.to_owned(),
            json!({"p50": round(relay_us.p50 - bare_us.p50), "p99": round(relay_us.p99 - bare_us.p99)}),
        );
        bare.insert(name.to_owned(), json!({"p50": round(bare_us.p50), "p99": round(bare_us.p99)}));
    }

    let mut rates = serde_json::Map::new();
    let mut bare_rates = serde_json::Map::new();
    let mut cpu = serde_json::Map::new();
    for (name, size, count) in [("1k", 1024, 300_000), ("16k", 16 * 1024, 60_000)] {
        let count = count / scale;
        let (mut relayed, mut straight) = (Vec::new(), Vec::new());
        let before = relay.number("cpu", "cpu_s")?;
        for _ in 0..3 {
            straight.push(flood(&mut direct.engine.1, &direct.frontend, size, count)?);
            relayed.push(flood(engine.slot(1).1, &frontend, size, count)?);
        }
        let used = relay.number("cpu", "cpu_s")? - before;
        let (relayed, straight) = (median(relayed), median(straight));
        let per_message = used / (3 * count) as f64 * 1e6;
        say(format!(
            "outputs of {name:>3}: relayed {relayed:.0} /s, direct {straight:.0} /s, {per_message:.1} us of CPU each"
        ));
        rates.insert(name.to_owned(), json!(relayed.round()));
        bare_rates.insert(name.to_owned(), json!(straight.round()));
        cpu.insert(name.to_owned(), json!(round(per_message)));
    }
    // The engine would connect to the next relay's sockets of the same name.
    drop((engine, direct, frontend, context));
    drop(relay);

    let engines = if args.quick { 32 } else { 256 };
    let (idle, loaded) = memory(&args, engines)?;
    say(format!(
        "resident memory with {engines} engines: {idle:.0} MB without frontends, {loaded:.0} MB with 4"
    ));

    println!(
        "{}",
        json!({
            "bench": "relay",
            "added_us": {
                "p50": added["64"]["p50"], "p99": added["64"]["p99"],
                "64": added["64"], "4k": added["4k"],
            },
            "messages_per_s": rates,
            "bare_messages_per_s": bare_rates,
            "cpu_us_per_message": cpu,
            "rss_mb": round(loaded),
            "rss_idle_mb": round(idle),
            "engines": engines,
            "bare_hop_us": bare,
        })
    );
    Ok(())
}

/// Resident memory of the relay in MB: with engines only, then with four frontends that have had some
/// requests answered by every engine.
fn memory(args: &Args, engines: u16) -> Result<(f64, f64), Failure> {
    let mut relay = Relay::start(&args.relay, engines, &args.dir)?;
    let context = Context::new();
    let ranks = relay.ranks.clone();
    // A context takes 1023 sockets.
    let contexts: Vec<Context> = (0..=engines / 50).map(|_| Context::new()).collect();
    let mut fakes = (0..engines)
        .zip(&ranks)
        .map(|(rank, addresses)| Engine::connect(&contexts[usize::from(rank / 50)], rank, addresses))
        .collect::<Result<Vec<_>, _>>()?;
    relay.ask("admit")?;
    let idle = relay.number("rss", "rss_kb")? / 1024.0;
    let mut frontends = Vec::new();
    for id in 1..=4 {
        let frontend = Frontend::bind(&context)?;
        frontend.attach(&mut relay, id, engines)?;
        frontends.push(frontend);
    }
    for round in 0..8 {
        for (number, frontend) in frontends.iter().enumerate() {
            for fake in &mut fakes {
                let id = format!("{number}-{round}");
                frontend.send(fake.rank, &request(&id, 1024))?;
                let (input, output) = fake.slot(number + 1);
                input.recv_multipart(0)?;
                output.send(reply(&id, 1024), 0)?;
                frontend.pull.recv_multipart(0)?;
            }
        }
    }
    let loaded = relay.number("rss", "rss_kb")? / 1024.0;
    Ok((idle, loaded))
}

// === load ===

/// An ADD of about `size` bytes.
fn request(id: &str, size: usize) -> [Vec<u8>; 2] {
    let request = NewRequest {
        request_id: id.to_owned(),
        prompt_token_ids: vec![1; size.saturating_sub(60)],
        max_tokens: 1,
        client_index: ClientIndex(0),
        current_wave: Wave(0),
        arrival_time: 1.0,
    };
    let frames = request.encode(&Layout::newest());
    [frames[0].to_vec(), frames[1].to_vec()]
}

/// The last output of a request, about `size` bytes.
fn reply(id: &str, size: usize) -> Vec<u8> {
    let outputs = NewOutputs {
        outputs: vec![NewOutput {
            request_id: id.to_owned(),
            new_token_ids: vec![1; size.saturating_sub(60)],
            finish_reason: Some(FinishReason::Length),
        }],
        timestamp: 1.0,
        ..NewOutputs::default()
    };
    outputs.encode(&Layout::newest()).to_vec()
}

/// One step's outputs for as many running requests as make `size` bytes.
fn step_outputs(size: usize) -> Vec<u8> {
    let encode = |count: usize| {
        let outputs = NewOutputs {
            outputs: (0..count)
                .map(|number| NewOutput {
                    request_id: format!("cmpl-4f0c7a2e9b5d4c1e-{number:08}"),
                    new_token_ids: vec![1234],
                    finish_reason: None,
                })
                .collect(),
            timestamp: 1.0,
            ..NewOutputs::default()
        };
        outputs.encode(&Layout::newest()).to_vec()
    };
    let one = encode(2).len() - encode(1).len();
    let mut bytes = encode(size / one);
    bytes.shrink_to_fit();
    bytes
}

fn ping(
    input: &mut Socket,
    output: &mut Socket,
    frontend: &Frontend,
    size: usize,
    count: usize,
    times: &mut Vec<f64>,
) -> Result<(), Failure> {
    let warm_up = count / 10;
    let (request, reply) = (request("ping", size), reply("ping", size));
    thread::scope(|scope| {
        // The engine's side sleeps in poll, as vLLM's does.
        let engine = scope.spawn(move || -> Result<(), zmq::Error> {
            for _ in 0..warm_up + count {
                input.recv_multipart(0)?;
                output.send(&reply[..], 0)?;
            }
            Ok(())
        });
        for number in 0..warm_up + count {
            let sent = Instant::now();
            frontend.send(0, &request)?;
            frontend.pull.recv_multipart(0)?;
            if number >= warm_up {
                times.push(sent.elapsed().as_secs_f64() * 1e6);
            }
        }
        engine.join().map_err(|_| "the engine's thread failed")??;
        Ok(())
    })
}

/// Messages per second from the first to the last.
fn flood(output: &mut Socket, frontend: &Frontend, size: usize, count: usize) -> Result<f64, Failure> {
    let message = step_outputs(size);
    thread::scope(|scope| {
        let engine = scope.spawn(move || -> Result<(), zmq::Error> {
            for _ in 0..count {
                output.send(&message[..], 0)?;
            }
            Ok(())
        });
        frontend.pull.recv_multipart(0)?;
        let first = Instant::now();
        for _ in 1..count {
            frontend.pull.recv_msg(0)?;
        }
        let rate = (count - 1) as f64 / first.elapsed().as_secs_f64();
        engine.join().map_err(|_| "the engine's thread failed")??;
        Ok(rate)
    })
}

// === peers ===

fn socket(context: &Context, kind: SocketType) -> Result<Socket, zmq::Error> {
    let socket = context.socket(kind)?;
    socket.set_linger(0)?;
    socket.set_rcvtimeo(LIMIT_MS)?;
    socket.set_sndtimeo(LIMIT_MS)?;
    socket.set_rcvhwm(0)?;
    if kind == zmq::ROUTER {
        socket.set_router_mandatory(true)?;
    }
    Ok(socket)
}

struct Engine {
    rank: u16,
    slots: Vec<(Socket, Socket)>,
}

impl Engine {
    fn connect(context: &Context, rank: u16, addresses: &Value) -> Result<Self, Failure> {
        let mut slots = Vec::new();
        for slot in 0..=SLOTS {
            let address = |kind: &str| addresses[kind][slot].as_str().unwrap_or_default();
            let input = socket(context, zmq::DEALER)?;
            input.set_identity(&EngineIndex(rank).identity().0)?;
            input.connect(address("inputs"))?;
            input.send(&b"\x80"[..], 0)?;
            let output = socket(context, zmq::PUSH)?;
            output.set_sndhwm(1000)?;
            output.connect(address("outputs"))?;
            slots.push((input, output));
        }
        Ok(Self { rank, slots })
    }

    fn slot(&mut self, slot: usize) -> (&mut Socket, &mut Socket) {
        let (input, output) = &mut self.slots[slot];
        (input, output)
    }
}

struct Frontend {
    router: Socket,
    pull: Socket,
    addresses: (String, String),
}

impl Frontend {
    fn bind(context: &Context) -> Result<Self, Failure> {
        let bind = |kind| -> Result<(Socket, String), Failure> {
            let socket = socket(context, kind)?;
            socket.bind("tcp://127.0.0.1:0")?;
            let address = socket.get_last_endpoint()?.map_err(|_| "bad endpoint")?;
            Ok((socket, address))
        };
        let (router, input) = bind(zmq::ROUTER)?;
        let (pull, output) = bind(zmq::PULL)?;
        Ok(Self { router, pull, addresses: (input, output) })
    }

    fn attach(&self, relay: &mut Relay, id: u64, engines: u16) -> Result<(), Failure> {
        let (input, output) = &self.addresses;
        relay.ask(&format!("attach {id} {input} {output}"))?;
        for _ in 0..engines {
            self.router.recv_multipart(0)?;
        }
        Ok(())
    }

    fn send(&self, rank: u16, request: &[Vec<u8>; 2]) -> Result<(), zmq::Error> {
        let identity = EngineIndex(rank).identity().0;
        let [kind, payload] = request;
        self.router.send_multipart([&identity[..], kind, payload], 0)
    }
}

/// An engine connected straight to a frontend.
struct Direct {
    engine: (Socket, Socket),
    frontend: Frontend,
}

impl Direct {
    fn new(context: &Context) -> Result<Self, Failure> {
        let frontend = Frontend::bind(context)?;
        let input = socket(context, zmq::DEALER)?;
        input.set_identity(&EngineIndex(0).identity().0)?;
        input.connect(&frontend.addresses.0)?;
        input.send(&b"\x80"[..], 0)?;
        let output = socket(context, zmq::PUSH)?;
        output.set_sndhwm(1000)?;
        output.connect(&frontend.addresses.1)?;
        frontend.router.recv_multipart(0)?;
        Ok(Self { engine: (input, output), frontend })
    }
}

struct Relay {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    ranks: Vec<Value>,
}

impl Relay {
    fn start(program: &str, ranks: u16, dir: &str) -> Result<Self, Failure> {
        let mut child = Command::new(program)
            .args([ranks.to_string(), SLOTS.to_string(), dir.to_owned()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or("no output")?;
        let mut relay = Self { child, input, output: BufReader::new(output), ranks: Vec::new() };
        let first = relay.read()?;
        relay.ranks = first["ranks"].as_array().cloned().unwrap_or_default();
        Ok(relay)
    }

    fn read(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, command: &str) -> Result<Value, Failure> {
        let input = self.input.as_mut().ok_or("no input")?;
        writeln!(input, "{command}")?;
        self.read()
    }

    fn number(&mut self, command: &str, key: &str) -> Result<f64, Failure> {
        let answer = self.ask(command)?;
        Ok(answer[key].as_f64().ok_or("no number")?)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The end of its input ends it; if not, it is ended.
        self.input = None;
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            thread::yield_now();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === figures ===

struct Percentiles {
    p50: f64,
    p99: f64,
}

impl Percentiles {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| values[((values.len() - 1) as f64 * part) as usize];
        Self { p50: at(0.50), p99: at(0.99) }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
