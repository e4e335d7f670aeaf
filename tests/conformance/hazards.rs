//! Bytes of a frontend cannot kill an engine for the others: what kills a fake engine (and a real
//! one, see `testkit/tests/fakes.rs`) is refused in front of it.

use dp_sidecar_testkit::msg;
use rmpv::Value;

use super::harness::{SOON, Setup, complete_all, engine, frontend};

fn add(client_index: i64) -> Vec<u8> {
    let mut fields = vec![Value::Nil; 22];
    fields[0] = Value::from("hazard");
    fields[1] = Value::Array(vec![Value::from(1)]);
    fields[3] = Value::Map(Vec::new());
    fields[5] = Value::from(0.0);
    fields[11] = Value::from(client_index);
    fields[12] = Value::from(0);
    fields[13] = Value::from(0);
    fields[15] = Value::from(false);
    fields[19] = Value::from(false);
    msg::encode(&Value::Array(fields))
}

fn call(method: &str, args: Vec<Value>) -> Vec<u8> {
    let fields = vec![Value::from(0), Value::from(77), Value::from(method), Value::Array(args)];
    msg::encode(&Value::Array(fields))
}

#[test]
fn messages_that_kill_an_engine_are_refused_and_counted() {
    let sidecar = Setup::waiting(2, false);
    let mut bad = frontend(2, |_| {});
    let mut good = frontend(2, |_| {});
    let sidecar = sidecar.frontend(&bad).frontend(&good).start();
    let engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    bad.startup(SOON).unwrap();
    good.startup(SOON).unwrap();

    let not_array = msg::encode(&Value::from("x"));
    let short = msg::encode(&Value::Array(vec![Value::from("x")]));
    let wrong_type = {
        let mut fields = vec![Value::Nil; 22];
        fields[0] = Value::from(5);
        msg::encode(&Value::Array(fields))
    };
    let nil_flag = {
        let fields = msg::decode(&add(0)).unwrap();
        let mut fields = fields.as_array().unwrap().clone();
        fields[15] = Value::Nil;
        msg::encode(&Value::Array(fields))
    };
    let short_call = msg::encode(&Value::Array(vec![Value::from(0), Value::from(1)]));
    let ft = call("handle_fault_tolerance", vec![Value::Map(Vec::new())]);
    let get_model = call(
        "collective_rpc",
        vec![Value::from("get_model"), Value::Nil, Value::Array(Vec::new()), Value::Nil],
    );
    let shutdown = call("shutdown", Vec::new());
    let (minus, huge) = (add(-1), add(1 << 40));
    let ext = {
        // A pickle in a utility argument: NotImplementedError in the engine's input thread.
        let fields = vec![
            Value::from(0),
            Value::from(78),
            Value::from("collective_rpc"),
            Value::Array(vec![Value::Ext(1, vec![0x80, 0x04])]),
        ];
        msg::encode(&Value::Array(fields))
    };
    let hazards: Vec<(&str, Vec<&[u8]>)> = vec![
        ("malformed msgpack", vec![b"\x00", b"\x92\xc0"]),
        ("bytes after the value", vec![b"\x01", b"\x90\xc0"]),
        ("ADD that is no array", vec![b"\x00", &not_array]),
        ("ADD too short", vec![b"\x00", &short]),
        ("ADD with a number as id", vec![b"\x00", &wrong_type]),
        ("ADD with nil for a boolean", vec![b"\x00", &nil_flag]),
        ("negative client index", vec![b"\x00", &minus]),
        ("huge client index", vec![b"\x00", &huge]),
        ("unknown type byte", vec![b"\x09", b"\x90"]),
        ("two type bytes", vec![b"\x00\x00", b"\x90"]),
        ("READY", vec![b"READY"]),
        ("a type byte alone", vec![b"\x00"]),
        ("EXECUTOR_FAILED", vec![b"\x04", b"\xc0"]),
        ("START_DP_WAVE of a client", vec![b"\x02", b"\x92\x00\xc0"]),
        ("short UTILITY", vec![b"\x03", &short_call]),
        ("handle_fault_tolerance", vec![b"\x03", &ft]),
        ("result that cannot be serialized", vec![b"\x03", &get_model]),
        ("shutdown", vec![b"\x03", &shutdown]),
        ("pickle", vec![b"\x03", &ext]),
        ("ABORT that is no array", vec![b"\x01", &not_array]),
    ];
    let count = hazards.len();
    for (what, frames) in hazards {
        bad.server().send_raw(1, &frames).unwrap();
        // The engine answers the next one, so it has survived this one.
        let done = good
            .server()
            .complete(&dp_sidecar_testkit::frontend::NewRequest::new(format!("after {what}"), 2).to(1), SOON)
            .unwrap();
        assert_eq!(done.tokens.len(), 2, "after {what}");
        assert!(!engines[1].ended(), "killed by: {what}");
    }
    let line = sidecar.await_log(&["refused"]);
    assert!(line.contains("rank"), "{line}");
    assert!(count > 10);
    complete_all(&mut good, "end", 4, 3);
    assert!(engines.iter().all(|engine| !engine.ended()));
}
