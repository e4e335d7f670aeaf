//! `wait_for_engine_startup` of `v1/engine/utils.py`.

use std::time::{Duration, Instant};

use rmpv::Value;
use serde_json::json;
use zmq::PollEvents;

use super::{FakeFrontend, FrontendError};
use crate::{msg, sockets};

/// What the frontend learned of an engine.
#[derive(Clone, Debug)]
pub struct EngineSeen {
    /// Its rank.
    pub rank: u16,
    /// Its READY.
    pub ready: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    New,
    Connected,
    Ready,
}

pub(super) fn serve(frontend: &mut FakeFrontend, end: Instant, limit: Duration) -> Result<(), FrontendError> {
    let mut states = std::mem::take(&mut frontend.states);
    let mut seen = std::mem::take(&mut frontend.seen);
    let result = serve_with(frontend, &mut states, &mut seen, end, limit);
    seen.sort_by_key(|engine| engine.rank);
    (frontend.states, frontend.seen) = (states, seen);
    result
}

fn serve_with(
    frontend: &FakeFrontend,
    states: &mut [State],
    seen: &mut Vec<EngineSeen>,
    end: Instant,
    limit: Duration,
) -> Result<(), FrontendError> {
    let Some(socket) = &frontend.handshake else {
        return Ok(());
    };
    let options = &frontend.options;
    let coordinated = options.size > 1 && (options.moe || !options.version.dense_is_independent());
    while states.iter().any(|state| *state != State::Ready) {
        let Some(frames) = sockets::take(socket)? else {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let count = |state| states.iter().filter(|have| **have == state).count();
                return Err(FrontendError::Timeout {
                    what: format!(
                        "startup of {} engines that did not say HELLO, {} that did not say READY",
                        count(State::New),
                        count(State::Connected)
                    ),
                    limit,
                });
            }
            let mut items = [socket.as_poll_item(PollEvents::POLLIN)];
            let wait = i64::try_from(left.as_millis() + 1).unwrap_or(i64::MAX);
            zmq::poll(&mut items, wait)?;
            continue;
        };
        let [identity, payload] = frames.as_slice() else {
            return Err(FrontendError::Malformed {
                stage: "handshake",
                reason: format!("{} frames", frames.len()),
            });
        };
        let rank = <[u8; 2]>::try_from(identity.as_slice())
            .map(u16::from_le_bytes)
            .ok()
            .filter(|rank| *rank < options.size)
            .ok_or_else(|| FrontendError::UnknownIdentity(msg::hex(identity)))?;
        let message = msg::decode(payload)
            .map_err(|error| FrontendError::Malformed { stage: "handshake", reason: error.to_string() })?;
        let flag = |key: &str| msg::get(&message, key).and_then(Value::as_bool);
        let status = msg::text(&message, "status").unwrap_or_default();
        frontend.reporter.report("handshake", json!({"rank": rank, "message": msg::to_json(&message)}));
        if flag("local") != Some(false) || flag("headless") != Some(true) {
            return Err(FrontendError::Unexpected {
                rank,
                what: format!("{status} with local {:?}, headless {:?}", flag("local"), flag("headless")),
            });
        }
        let state = &mut states[usize::from(rank)];
        match (status.as_str(), *state) {
            ("HELLO", State::New) => {
                let init = init(frontend, coordinated);
                socket.send_multipart([identity.as_slice(), &msg::encode(&init)], 0)?;
                *state = State::Connected;
            }
            ("READY", State::Connected) => {
                if coordinated && options.version.ready_carries_hash() {
                    let actual = msg::text(&message, "parallel_config_hash");
                    if actual.as_deref() != Some(options.parallel_config_hash.as_str()) {
                        return Err(FrontendError::HashMismatch {
                            rank,
                            actual,
                            expected: options.parallel_config_hash.clone(),
                        });
                    }
                }
                *state = State::Ready;
                seen.push(EngineSeen { rank, ready: message });
            }
            (status, state) => {
                return Err(FrontendError::Unexpected { rank, what: format!("{status} in state {state:?}") });
            }
        }
    }
    Ok(())
}

fn init(frontend: &FakeFrontend, coordinated: bool) -> Value {
    let list = |pick: fn(&super::ApiServer) -> &str| {
        Value::Array(frontend.servers.iter().map(|server| Value::from(pick(server))).collect())
    };
    let of = |pick: fn(&super::coordinator::Addresses) -> &str| {
        frontend
            .coordinator
            .as_ref()
            .map_or(Value::Nil, |coordinator| Value::from(pick(coordinator.addresses())))
    };
    let inputs = match &frontend.options.named_inputs {
        Some(named) => Value::Array(named.iter().map(|address| Value::from(&**address)).collect()),
        None => list(|server| server.input_address()),
    };
    let parallel_config = if coordinated {
        let ports = frontend.group_ports.map(Value::from).to_vec();
        msg::map([
            ("data_parallel_master_ip", Value::from("127.0.0.1")),
            ("data_parallel_master_port", Value::from(frontend.group_ports[0])),
            ("_data_parallel_master_port_list", Value::Array(ports)),
            ("_coord_store_port", Value::from(0)),
            ("data_parallel_size", Value::from(frontend.options.size)),
        ])
    } else {
        Value::Map(Vec::new())
    };
    msg::map([
        (
            "addresses",
            msg::map([
                ("inputs", inputs),
                ("outputs", list(|server| server.output_address())),
                ("coordinator_input", of(|addresses| &addresses.back_input)),
                ("coordinator_output", of(|addresses| &addresses.back_output)),
                ("frontend_stats_publish_address", of(|addresses| &addresses.front)),
            ]),
        ),
        ("parallel_config", parallel_config),
    ])
}
