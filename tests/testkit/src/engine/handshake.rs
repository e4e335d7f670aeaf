//! From HELLO to READY (`EngineCoreProc._perform_handshakes`, `process_input_sockets`).

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rmpv::Value;
use serde_json::json;
use zmq::{Context, PollEvents, Socket, SocketType};

use super::core::{Engine, Sockets};
use super::group::{Group, GroupError};
use super::options::{EngineOptions, Stage};
use super::{Command, EngineEnd, Orders};
use crate::{Reporter, msg, sockets};

/// How long an engine that ends keeps trying to deliver what it has said. vLLM: 4 s; a test whose
/// peer is gone need not wait as long.
const OUTPUT_LINGER_MS: i32 = 500;

/// INIT, read as strictly as msgspec reads it into `EngineHandshakeMetadata`.
struct Init {
    inputs: Vec<String>,
    outputs: Vec<String>,
    coordinator_input: Option<String>,
    coordinator_output: Option<String>,
    stats_address: Option<String>,
    parallel_config: Value,
}

fn read_init(payload: &[u8]) -> Result<Init, String> {
    let value = msg::decode(payload).map_err(|error| error.to_string())?;
    let addresses = msg::get(&value, "addresses").ok_or("no addresses")?;
    let parallel_config = msg::get(&value, "parallel_config").ok_or("no parallel_config")?;
    for (key, value) in parallel_config.as_map().ok_or("parallel_config is not a map")? {
        let whole = |value: &Value| value.is_i64() || value.is_u64();
        let fine =
            whole(value) || value.is_str() || value.as_array().is_some_and(|items| items.iter().all(whole));
        if !fine {
            return Err(format!("parallel_config[{key}] is {value}"));
        }
    }
    let inputs = msg::texts(addresses, "inputs").ok_or("inputs is not a list of texts")?;
    let outputs = msg::texts(addresses, "outputs").ok_or("outputs is not a list of texts")?;
    if inputs.len() != outputs.len() || inputs.is_empty() {
        return Err(format!("{} inputs and {} outputs", inputs.len(), outputs.len()));
    }
    Ok(Init {
        inputs,
        outputs,
        coordinator_input: msg::text(addresses, "coordinator_input"),
        coordinator_output: msg::text(addresses, "coordinator_output"),
        stats_address: msg::text(addresses, "frontend_stats_publish_address"),
        parallel_config: parallel_config.clone(),
    })
}

/// Does everything up to the busy loop.
pub(crate) fn start(
    context: &Context,
    options: EngineOptions,
    reporter: &Reporter,
    orders: Orders,
) -> Result<Engine, EngineEnd> {
    let rank = options.rank;
    let faults = options.faults.clone();
    let die = |stage: Stage| {
        if faults.die == Some(stage) { Err(EngineEnd::Fault(format!("die at {stage:?}"))) } else { Ok(()) }
    };
    die(Stage::BeforeHello)?;
    let on_the_wire = faults.rank_on_the_wire.unwrap_or(rank);
    let identity = sockets::identity(on_the_wire);
    let handshake = sockets::connect(context, SocketType::DEALER, &options.handshake, Some(&identity))
        .map_err(|error| EngineEnd::Handshake(format!("{}: {error}", options.handshake)))?;
    let status = |status: &str| {
        msg::map([
            ("status", Value::from(status)),
            ("local", Value::from(false)),
            ("headless", Value::from(true)),
        ])
    };
    if faults.ready_first {
        handshake.send(msg::encode(&status("READY")), 0)?;
    }
    handshake.send(msg::encode(&status("HELLO")), 0)?;
    reporter.report("hello", json!({"rank": rank}));
    if faults.hello_twice {
        handshake.send(msg::encode(&status("HELLO")), 0)?;
    }
    let payload = wait_for(&handshake, &orders, options.init_timeout, "INIT")?;
    let init = read_init(&payload).map_err(|text| EngineEnd::Handshake(format!("bad INIT: {text}")))?;
    reporter.report(
        "init",
        json!({
            "rank": rank,
            "inputs": init.inputs,
            "outputs": init.outputs,
            "coordinator_input": init.coordinator_input,
            "coordinator_output": init.coordinator_output,
            "frontend_stats_publish_address": init.stats_address,
            "parallel_config": msg::to_json(&init.parallel_config),
        }),
    );
    die(Stage::AfterInit)?;

    let group = if options.lockstep() {
        Some(form_group(&options, &init, &orders)?)
    } else {
        if msg::get(&init.parallel_config, "data_parallel_size").is_some()
            && options.version.dense_is_independent()
        {
            return Err(EngineEnd::Handshake(
                "INIT sets data_parallel_size of a dense engine, which undoes its rewrite to 1".to_owned(),
            ));
        }
        None
    };
    if !options.start.is_zero() {
        idle(&orders, options.start)?;
    }

    let identity = sockets::identity(rank);
    let registration = if faults.garbage_registration {
        vec![0xc1, 0xff]
    } else if options.version.registers_with_a_map() {
        msg::encode(&ready_response(&options, init.stats_address.as_deref()))
    } else {
        Vec::new()
    };
    let mut inputs = Vec::new();
    for address in &init.inputs {
        inputs.push(sockets::connect(context, SocketType::DEALER, address, Some(&identity))?);
    }
    let coordinator_input = match &init.coordinator_input {
        None => None,
        Some(address) => {
            let socket = sockets::connect(context, SocketType::XSUB, address, Some(&identity))?;
            socket.send(&b"\x01"[..], 0)?;
            Some(socket)
        }
    };
    for socket in &inputs {
        socket.send(&registration[..], 0)?;
    }
    reporter.report("registered", json!({"rank": rank, "slots": inputs.len()}));
    die(Stage::AfterRegistration)?;
    if let Some(socket) = &coordinator_input {
        // No timeout in vLLM; the orders end it.
        let first = wait_for(socket, &orders, Duration::from_secs(3600), "READY")?;
        if first != b"READY" {
            return Err(EngineEnd::InputThread(format!(
                "first message of the DP coordinator is {}, not READY",
                msg::hex(&first)
            )));
        }
        reporter.report("coordinator_ready", json!({"rank": rank}));
    }
    let mut outputs = Vec::new();
    for address in &init.outputs {
        let socket = sockets::connect(context, SocketType::PUSH, address, None)?;
        socket.set_linger(OUTPUT_LINGER_MS)?;
        outputs.push(socket);
    }
    let coordinator_output = match &init.coordinator_output {
        None => None,
        Some(address) => {
            let socket = sockets::connect(context, SocketType::PUSH, address, None)?;
            socket.set_linger(OUTPUT_LINGER_MS)?;
            Some(socket)
        }
    };
    if !faults.never_ready {
        // As vLLM: READY must not be lost when the process ends right after it.
        handshake.set_linger(5000)?;
        handshake.send(msg::encode(&ready(&options, init.stats_address.as_deref())), 0)?;
        reporter.report("ready", json!({"rank": rank}));
    }
    drop(handshake);
    Engine::new(
        options,
        reporter.clone(),
        orders,
        Sockets { inputs, outputs, coordinator_input, coordinator_output },
        group,
    )
}

/// READY of the handshake.
fn ready(options: &EngineOptions, stats_address: Option<&str>) -> Value {
    let mut entries = vec![
        ("status", Value::from("READY")),
        ("local", Value::from(false)),
        ("headless", Value::from(true)),
    ];
    if options.version.ready_carries_blocks() {
        entries.push(("num_gpu_blocks", Value::from(1024)));
        entries.push(("dp_stats_address", stats_address.map_or(Value::Nil, Value::from)));
    }
    if options.version.ready_carries_hash() && options.lockstep() {
        let hash =
            if options.faults.wrong_hash { "another-parallel-config" } else { &options.parallel_config_hash };
        entries.push(("parallel_config_hash", Value::from(hash)));
    }
    Value::Map(entries.into_iter().map(|(key, value)| (Value::from(key), value)).collect())
}

/// `EngineCoreReadyResponse` with the keys of the version.
fn ready_response(options: &EngineOptions, stats_address: Option<&str>) -> Value {
    let version = options.version;
    let mut entries: Vec<(&str, Value)> = vec![
        ("max_model_len", Value::from(256)),
        ("num_gpu_blocks", Value::from(1024)),
        ("dp_stats_address", stats_address.map_or(Value::Nil, Value::from)),
    ];
    if version.at_least(22, 0) {
        entries.push(("dtype", Value::from("bfloat16")));
    }
    if version.at_least(23, 0) {
        entries.push(("block_size", Value::from(16)));
        entries.push(("vllm_version", Value::from(version.to_string())));
    }
    if version.at_least(24, 0) {
        let size = if options.lockstep() { options.size } else { 1 };
        entries.push(("world_size", Value::from(1)));
        entries.push(("data_parallel_size", Value::from(size)));
        entries.push(("kv_cache_size_tokens", Value::from(16384)));
        entries.push(("kv_cache_max_concurrency", Value::from(64.0)));
    }
    if version.at_least(27, 0) {
        entries.push(("tensor_parallel_size", Value::from(1)));
        entries.push(("pipeline_parallel_size", Value::from(1)));
        entries.push(("decode_context_parallel_size", Value::from(1)));
        entries.push(("data_parallel_rank", Value::from(options.rank)));
        entries.push(("max_num_seqs", Value::from(options.max_num_seqs as u64)));
        entries.push(("max_num_batched_tokens", Value::from(2048)));
        entries.push(("instance_id", Value::from(format!("fake-{}", std::process::id()))));
        entries.push(("kv_events_config", Value::Nil));
    }
    if version.at_least(28, 0) {
        entries.push(("weight_transfer_backend", Value::Nil));
        entries.push(("enable_sleep_mode", Value::from(false)));
        entries.push(("supports_draft_weight_updates", Value::from(false)));
    }
    if version.at_least(29, 0) {
        entries.push(("supports_lora", Value::from(false)));
        entries.push(("max_loras", Value::from(0)));
        entries.push(("mamba_block_size", Value::Nil));
    }
    if version.at_least(31, 0) {
        entries.push(("effective_attention_block_size", Value::Nil));
    }
    if version.at_least(33, 0) {
        entries.push(("coord_store_port", Value::from(0)));
        entries.push(("coordinator_input_address", Value::Nil));
        entries.push(("coordinator_output_address", Value::Nil));
    }
    Value::Map(entries.into_iter().map(|(key, value)| (Value::from(key), value)).collect())
}

fn form_group(options: &EngineOptions, init: &Init, orders: &Orders) -> Result<Group, EngineEnd> {
    let config = &init.parallel_config;
    let missing = |key: &str| EngineEnd::Handshake(format!("INIT of a lockstep engine lacks {key}"));
    let size = msg::get(config, "data_parallel_size")
        .and_then(Value::as_u64)
        .ok_or_else(|| missing("data_parallel_size"))?;
    if size != u64::from(options.size) {
        return Err(EngineEnd::Handshake(format!(
            "INIT says data_parallel_size {size}, the command line {}",
            options.size
        )));
    }
    let ip =
        msg::text(config, "data_parallel_master_ip").ok_or_else(|| missing("data_parallel_master_ip"))?;
    let ports: Vec<u16> = msg::get(config, "_data_parallel_master_port_list")
        .and_then(Value::as_array)
        .ok_or_else(|| missing("_data_parallel_master_port_list"))?
        .iter()
        .filter_map(|port| port.as_u64().and_then(|port| u16::try_from(port).ok()))
        .collect();
    let stopped = || orders.stop.load(Ordering::Relaxed);
    Group::form(options.rank, options.size, &ip, &ports, Duration::from_secs(120), &stopped).map_err(
        |error| match error {
            GroupError::Stopped => EngineEnd::Stopped,
            error => EngineEnd::Handshake(error.to_string()),
        },
    )
}

/// The next single-frame message of `socket`, or the end.
fn wait_for(socket: &Socket, orders: &Orders, limit: Duration, what: &str) -> Result<Vec<u8>, EngineEnd> {
    let end = Instant::now() + limit;
    loop {
        if let Some(mut frames) = sockets::take(socket)? {
            return Ok(frames.pop().unwrap_or_default());
        }
        obey(orders)?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(EngineEnd::Handshake(format!("no {what} in {limit:?}")));
        }
        let mut items =
            [socket.as_poll_item(PollEvents::POLLIN), orders.wake.as_poll_item(PollEvents::POLLIN)];
        zmq::poll(&mut items, i64::try_from(left.as_millis() + 1).unwrap_or(i64::MAX))?;
    }
}

/// Lets time pass, unless told to end.
fn idle(orders: &Orders, time: Duration) -> Result<(), EngineEnd> {
    let end = Instant::now() + time;
    loop {
        obey(orders)?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let mut items = [orders.wake.as_poll_item(PollEvents::POLLIN)];
        zmq::poll(&mut items, i64::try_from(left.as_millis() + 1).unwrap_or(i64::MAX))?;
    }
}

fn obey(orders: &Orders) -> Result<(), EngineEnd> {
    while sockets::take(&orders.wake)?.is_some() {}
    match orders.commands.try_recv() {
        Ok(Command::Kill | Command::Terminate) => Err(EngineEnd::Stopped),
        _ => Ok(()),
    }
}
