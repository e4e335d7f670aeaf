//! The wire types against captures written by vLLM's own classes (`scripts/capture_golden.py`).
//!
//! Each capture comes with what vLLM decodes from it. A message is decoded and compared, written
//! again where the sidecar is the writer, lengthened, and cut at every byte.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use dp_sidecar_protocol::frames::{COORDINATOR_READY, RequestType};
use dp_sidecar_protocol::handshake::{Addresses, ConfigValue, EngineMessage, GroupPorts, Hello, Init, Ready};
use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::output::{self, EngineOutput, FinishReason, OutputsView};
use dp_sidecar_protocol::positional::{self, Scanner, element};
use dp_sidecar_protocol::registration::{EngineReadyResponse, detect_layout, with_dp_stats_address};
use dp_sidecar_protocol::request::{FrontendMessage, check_frontend_message, encode_abort};
use dp_sidecar_protocol::stats::{Load, SchedulerStats};
use dp_sidecar_protocol::utility::UtilityCall;
use dp_sidecar_protocol::wave::{FrontendUpstream, Publication, StartDpWave};
use dp_sidecar_protocol::{CallId, ClientIndex, EngineIndex, Wave};
use serde_json::Value as Json;

use crate::golden_support::{captures, each, folder, json, read_json, rmpv_value, strings};

#[test]
fn layouts_agree_with_the_field_lists_of_every_version() {
    let sources = read_json(folder().join("fields.json"));
    let mut lists: Vec<(String, Json)> = sources
        .as_object()
        .unwrap()
        .iter()
        .map(|(version, fields)| (version.clone(), fields.clone()))
        .collect();
    assert!(lists.len() >= 30, "{} versions in fields.json", lists.len());
    for golden in captures() {
        lists.push((golden.layout.version.to_string(), golden.fields));
    }
    for (version, fields) in lists {
        let layout = Layout::for_version(version.parse().unwrap()).unwrap();
        let at = |class: &str, field: &str| strings(&fields[class]).iter().position(|name| *name == field);
        let add = |field| at("EngineCoreRequest", field);
        let positions = layout.add;
        assert_eq!(strings(&fields["EngineCoreRequest"]).len(), positions.fields);
        for (field, position) in [
            ("arrival_time", positions.arrival_time),
            ("lora_request", positions.lora_request),
            ("cache_salt", positions.cache_salt),
            ("data_parallel_rank", positions.data_parallel_rank),
            ("prompt_embeds", positions.prompt_embeds),
            ("client_index", positions.client_index),
            ("current_wave", positions.current_wave),
            ("priority", positions.priority),
            ("trace_headers", positions.trace_headers),
        ] {
            assert_eq!(add(field), Some(position), "{version} {field}");
        }
        for (field, position) in [
            ("eos_token_id", positions.eos_token_id),
            ("prompt_is_token_ids", positions.prompt_is_token_ids),
            ("resumable", positions.resumable),
            ("external_req_id", positions.external_req_id),
            ("reasoning_ended", positions.reasoning_ended),
            ("reasoning_parser_kwargs", positions.reasoning_parser_kwargs),
            ("abort_immediately", positions.abort_immediately),
            ("session_id", positions.session_id),
            ("kv_hints", positions.kv_hints),
        ] {
            assert_eq!(add(field), position, "{version} {field}");
        }
        let output = |field| at("EngineCoreOutput", field);
        assert_eq!(strings(&fields["EngineCoreOutput"]).len(), layout.output.output_fields, "{version}");
        assert_eq!(output("finish_reason"), Some(5), "{version}");
        for (field, position) in [
            ("num_cached_tokens", layout.output.num_cached_tokens),
            ("num_external_computed_tokens", layout.output.num_external_computed_tokens),
            ("num_nans_in_logits", layout.output.num_nans_in_logits),
        ] {
            assert_eq!(output(field), position, "{version} {field}");
        }
        let outputs = strings(&fields["EngineCoreOutputs"]);
        assert_eq!(outputs.len(), layout.output.outputs_fields, "{version}");
        assert_eq!(at("EngineCoreOutputs", "weight_version"), layout.output.weight_version, "{version}");
        assert_eq!(fields["EngineCoreReadyResponse"].is_null(), layout.registration_is_empty(), "{version}");
        assert_eq!(fields["FinishReason"]["ERROR"] == 3, layout.error_finish_known(), "{version}");
    }
}

#[test]
fn requests_are_read_as_vllm_reads_them() {
    let count = each("input", |layout, label, message| {
        let expect = &message.expect;
        let checked = check_frontend_message(layout, &message.frames)
            .unwrap_or_else(|refusal| panic!("{label}: {refusal}"));
        match checked {
            FrontendMessage::Add(add) => {
                assert_eq!(expect["type"], "ADD", "{label}");
                assert_eq!(add.request_id, expect["request_id"], "{label}");
                assert_eq!(add.client_index.0, expect["client_index"], "{label}");
                assert_eq!(add.current_wave.0, expect["current_wave"], "{label}");
                assert_eq!(add.data_parallel_rank, expect["data_parallel_rank"].as_i64(), "{label}");
                assert_eq!(message.frames.len(), expect["frames"], "{label}");
            }
            FrontendMessage::Abort(ids) => {
                assert_eq!(ids, strings(&expect["request_ids"]), "{label}");
            }
            FrontendMessage::Utility(call) => {
                assert_eq!(call.client_index.0, expect["client_index"], "{label}");
                assert_eq!(call.call_id.0, i128::from(expect["call_id"].as_u64().unwrap()), "{label}");
                assert_eq!(call.method, expect["method"], "{label}");
                let args = json(&rmpv::Value::Array(call.decode_args()));
                assert_eq!(args, expect["args"], "{label}");
            }
        }
    });
    assert!(count >= 14);
}

#[test]
fn only_client_index_changes_when_it_is_rewritten() {
    each("input", |layout, label, message| {
        for index in [0, 1, 127, 128, 255, 256, 65535, 65536, u32::MAX] {
            let index = ClientIndex(index);
            let before = check_frontend_message(layout, &message.frames).unwrap();
            let position = match before {
                FrontendMessage::Add(_) => layout.add.client_index,
                FrontendMessage::Utility(_) => 0,
                FrontendMessage::Abort(_) => continue,
            };
            let frames = before.rewrite_client_index(&message.frames, index);
            let now = match check_frontend_message(layout, &frames).unwrap() {
                FrontendMessage::Add(add) => add.client_index,
                FrontendMessage::Utility(call) => call.client_index,
                FrontendMessage::Abort(_) => unreachable!(),
            };
            assert_eq!(now, index, "{label}");
            assert_eq!(frames.len(), message.frames.len(), "{label}");
            assert_eq!(frames[0], message.frames[0], "{label}");
            assert_eq!(frames[2..], message.frames[2..], "{label}");
            let fields = Scanner::new(&frames[1]).array().unwrap();
            for other in (0..fields).filter(|other| *other != position) {
                assert_eq!(
                    element(&frames[1], other).unwrap(),
                    element(&message.frames[1], other).unwrap(),
                    "{label} position {other}"
                );
            }
        }
    });
}

fn compare_outputs(label: &str, view: &OutputsView<'_>, expect: &Json) {
    assert_eq!(view.engine_index.0, expect["engine_index"], "{label}");
    let outputs: Json = view
        .outputs()
        .map(|output| {
            let output = output.unwrap();
            serde_json::json!([output.request_id, output.finished.map(i64::from)])
        })
        .collect();
    assert_eq!(outputs, expect["outputs"], "{label}");
    assert_eq!(view.output_count(), expect["outputs"].as_array().unwrap().len());
    match view.stats() {
        Some(stats) => {
            let stats = stats.unwrap();
            let wanted = &expect["stats"];
            assert_eq!(stats.load.running, wanted["num_running_reqs"], "{label}");
            assert_eq!(stats.load.waiting, wanted["num_waiting_reqs"], "{label}");
            assert_eq!(stats.step_counter, wanted["step_counter"], "{label}");
            assert_eq!(stats.current_wave, wanted["current_wave"], "{label}");
            assert_eq!(stats.load.kv_cache_usage, wanted["kv_cache_usage"], "{label}");
        }
        None => assert!(expect["stats"].is_null(), "{label}"),
    }
    assert_eq!(view.timestamp, expect["timestamp"], "{label}");
    let call_id = view.utility_call_id().map(|id| id.0);
    let wanted = expect["call_id"].as_u64().map(i128::from);
    assert_eq!(call_id, wanted, "{label}");
    match view.utility_output() {
        Some(answer) => {
            let answer = answer.unwrap();
            assert_eq!(Some(answer.call_id.0), wanted, "{label}");
            match answer.result {
                Ok(value) => {
                    assert_eq!(json(&value), expect["answer"]["result"], "{label}");
                    assert!(expect["answer"]["failure"].is_null(), "{label}");
                }
                Err(message) => assert_eq!(message, expect["answer"]["failure"], "{label}"),
            }
        }
        None => assert!(expect["answer"].is_null(), "{label}"),
    }
    let mut finished = view.finished_requests().unwrap();
    finished.sort_unstable();
    match &expect["finished_requests"] {
        Json::Null => assert!(finished.is_empty(), "{label}"),
        ids => assert_eq!(finished, strings(ids), "{label}"),
    }
    let wave = |wave: Option<Wave>| wave.map(|wave| wave.0);
    assert_eq!(wave(view.wave_complete), expect["wave_complete"].as_u64());
    assert_eq!(wave(view.start_wave), expect["start_wave"].as_u64());
    assert_eq!(view.weight_version, expect["weight_version"].as_str());
}

#[test]
fn outputs_are_read_as_vllm_reads_them() {
    let count = each("output", |_, label, message| {
        let EngineOutput::Outputs(view) = EngineOutput::parse(&message.frames).unwrap() else {
            panic!("{label}: taken for ENGINE_CORE_DEAD");
        };
        compare_outputs(label, &view, &message.expect);
        assert_eq!(message.frames.len(), message.expect["frames"], "{label}");
    });
    assert!(count >= 13);
}

#[test]
fn what_the_sidecar_says_for_an_engine_is_what_the_engine_would_say() {
    const CLOCK: f64 = 1234.5;
    each("output", |layout, label, message| {
        let name = label.split(' ').next_back().unwrap();
        let engine = |index| EngineIndex(index);
        let written = match name {
            "error_finish" => output::error_finish(layout, engine(3), ["req-a", "req-b"], CLOCK),
            "abort_finish" => output::finish(layout, engine(0), ["req-a"], FinishReason::Abort, CLOCK),
            "wave_complete" => output::wave_complete_message(layout, engine(0), Wave(7), CLOCK),
            "start_wave" => output::start_wave_message(layout, engine(2), Wave(0), CLOCK),
            "empty" => output::finish(layout, engine(0), [], FinishReason::Abort, CLOCK),
            _ if name.starts_with("answer_") => {
                let expect = &message.expect;
                let call = CallId(i128::from(expect["call_id"].as_u64().unwrap()));
                let result = match expect["answer"]["failure"].as_str() {
                    Some(failure) => Err(failure.to_owned()),
                    None => Ok(rmpv_value(&expect["answer"]["result"])),
                };
                output::utility_answer(layout, engine(0), call, result, CLOCK)
            }
            "stats_only" => {
                let stats = message.frames[0].clone();
                let view = OutputsView::parse(&stats).unwrap();
                let raw = view.scheduler_stats.unwrap().to_vec();
                output::stats_message(layout, engine(0), raw, CLOCK)
            }
            _ => return,
        };
        if name == "empty" {
            // Ends nothing, but says so with an empty list where vLLM has nil.
            assert_eq!(written.len(), message.frames[0].len(), "{label}");
            return;
        }
        assert_eq!(written, message.frames[0], "{label}");
    });
}

#[test]
fn stats_of_a_few_keys_are_read_back() {
    let stats = SchedulerStats {
        load: Load { running: 300, waiting: 2, kv_cache_usage: 0.75 },
        step_counter: 70000,
        current_wave: 5,
    };
    assert_eq!(SchedulerStats::decode(&stats.encode()).unwrap(), stats);
}

#[test]
fn handshake_messages_are_read_and_written_as_vllm_does() {
    let count = each("handshake", |layout, label, message| {
        let frame = &message.frames[0];
        let expect = &message.expect;
        let name = label.split(' ').next_back().unwrap();
        match name {
            "hello_headless" | "hello_local" => {
                let hello = Hello {
                    local: expect["local"].as_bool().unwrap(),
                    headless: expect["headless"].as_bool().unwrap(),
                };
                assert_eq!(EngineMessage::decode(frame).unwrap(), EngineMessage::Hello(hello), "{label}");
                assert_eq!(hello.encode(), *frame, "{label}");
            }
            "ready" | "ready_hash" => {
                let text = |key: &str| expect[key].as_str().map(str::to_owned);
                let ready = Ready {
                    local: false,
                    headless: true,
                    num_gpu_blocks: expect["num_gpu_blocks"].as_u64(),
                    dp_stats_address: text("dp_stats_address"),
                    parallel_config_hash: text("parallel_config_hash"),
                };
                assert_eq!(
                    EngineMessage::decode(frame).unwrap(),
                    EngineMessage::Ready(ready.clone()),
                    "{label}"
                );
                assert_eq!(ready.encode(layout), *frame, "{label}");
            }
            "init_independent" | "init_lockstep" => check_init(layout, label, frame, expect),
            "ready_response" => check_ready_response(layout, label, frame, expect),
            _ => panic!("{label} is not checked"),
        }
    });
    assert!(count >= 7);
}

fn check_init(layout: &Layout, label: &str, frame: &Bytes, expect: &Json) {
    let init = Init::decode(frame).unwrap();
    let text = |key: &str| expect["addresses"][key].as_str().map(str::to_owned);
    let list = |key: &str| strings(&expect["addresses"][key]).into_iter().map(str::to_owned).collect();
    let addresses = Addresses {
        inputs: list("inputs"),
        outputs: list("outputs"),
        coordinator_input: text("coordinator_input"),
        coordinator_output: text("coordinator_output"),
        frontend_stats_publish_address: text("frontend_stats_publish_address"),
    };
    assert_eq!(init.addresses, addresses, "{label}");
    // 0.12 and 0.13 add a hash that no engine reads; the sidecar does not send it.
    if !(12..14).contains(&layout.version.minor) {
        assert_eq!(init.encode(), *frame, "{label}");
    }
    if label.ends_with("lockstep") {
        assert_eq!(init.data_parallel_size(), Some(4), "{label}");
        assert_eq!(
            init.config("_data_parallel_master_port_list"),
            Some(&ConfigValue::Ints(vec![29501, 29502, 29503])),
            "{label}"
        );
        let group = GroupPorts {
            master_ip: "127.0.0.1".to_owned(),
            master_port: 29500,
            ports: vec![29501, 29502, 29503],
            size: 4,
        };
        assert_eq!(Init::lockstep(addresses, &group, layout), init, "{label}");
    } else {
        assert_eq!(Init::independent(addresses), init, "{label}");
    }
}

fn check_ready_response(layout: &Layout, label: &str, frame: &Bytes, expect: &Json) {
    let ready = EngineReadyResponse::decode(frame).unwrap();
    let expected = expect.as_object().unwrap();
    let size = expected.get("data_parallel_size").and_then(Json::as_u64);
    assert_eq!(ready.data_parallel_size, size, "{label}");
    for (key, value) in [
        ("dtype", &ready.dtype),
        ("vllm_version", &ready.vllm_version),
        ("dp_stats_address", &ready.dp_stats_address),
    ] {
        let wanted = expected.get(key).and_then(Json::as_str);
        assert_eq!(value.as_deref(), wanted, "{label} {key}");
    }
    for (key, value) in expected {
        let named =
            ["data_parallel_size", "dtype", "vllm_version", "dp_stats_address"].contains(&key.as_str());
        assert!(named || ready.other.contains_key(key), "{label} {key} {value}");
    }
    for key in ready.other.keys() {
        let value = positional::value(&ready.other[key]).unwrap();
        assert_eq!(json(&value), expected[key], "{label} {key}");
    }
    let detected = detect_layout(frame, Some(layout.version)).unwrap();
    assert_eq!(detected.layout, *layout, "{label}");

    let changed = with_dp_stats_address(frame, Some("tcp://elsewhere:1")).unwrap();
    if frame.is_empty() {
        assert!(changed.is_empty(), "{label}");
        return;
    }
    let again = EngineReadyResponse::decode(&changed).unwrap();
    assert_eq!(again.dp_stats_address.as_deref(), Some("tcp://elsewhere:1"));
    let wanted = EngineReadyResponse { dp_stats_address: again.dp_stats_address.clone(), ..ready };
    assert_eq!(again, wanted, "{label}");
    let address = expect["dp_stats_address"].as_str();
    assert_eq!(with_dp_stats_address(&changed, address).unwrap(), *frame, "{label}");
    let none = with_dp_stats_address(frame, None).unwrap();
    let none = EngineReadyResponse::decode(&none).unwrap();
    assert_eq!(none.dp_stats_address, None, "{label}");
}

#[test]
fn coordinator_messages_are_read_and_written_as_vllm_does() {
    let count = each("coordinator", |layout, label, message| {
        let expect = &message.expect;
        let name = label.split(' ').next_back().unwrap();
        let wave = Wave(expect["wave"].as_u64().unwrap_or_default());
        if name == "ready" {
            assert_eq!(message.frames, [COORDINATOR_READY], "{label}");
        } else if name == "first_req" {
            let first = FrontendUpstream::FirstReq { target: EngineIndex(1), wave };
            assert_eq!(FrontendUpstream::decode(&message.frames[0]).unwrap(), first);
            assert_eq!(first.encode(), message.frames[0], "{label}");
        } else if name.starts_with("start_by") {
            let start = StartDpWave::decode(&message.frames[1]).unwrap();
            let exclude = expect["exclude"].as_u64().map(|i| EngineIndex(i as u16));
            assert_eq!(start, StartDpWave { wave, exclude }, "{label}");
            assert_eq!(message.frames[0], RequestType::StartDpWave.to_frame());
            if exclude.is_some() {
                assert_eq!(start.encode(), message.frames, "{label}");
            }
        } else {
            let publication = Publication::decode(&message.frames[0]).unwrap();
            assert_eq!(publication.wave, wave, "{label}");
            assert_eq!(publication.running, expect["running"], "{label}");
            let counts = expect["counts"].as_array().map(|engines| {
                let counts = engines.iter().map(|engine| Load {
                    waiting: engine[0].as_u64().unwrap(),
                    running: engine[1].as_u64().unwrap(),
                    kv_cache_usage: engine[2].as_f64().unwrap_or_default(),
                });
                counts.collect::<Vec<_>>()
            });
            assert_eq!(publication.counts, counts, "{label}");
            assert_eq!(publication.encode(layout), message.frames[0], "{label}");
        }
    });
    assert!(count >= 7);
}

#[test]
fn calls_and_aborts_are_written_as_vllm_writes_them() {
    each("input", |layout, label, message| match check_frontend_message(layout, &message.frames).unwrap() {
        FrontendMessage::Abort(ids) => {
            assert_eq!(encode_abort(ids.into_iter()), message.frames, "{label}");
        }
        FrontendMessage::Utility(call) => {
            let call = UtilityCall {
                client_index: call.client_index,
                call_id: call.call_id,
                method: call.method.to_owned(),
                args: call.decode_args(),
            };
            assert_eq!(call.encode(), message.frames, "{label}");
        }
        FrontendMessage::Add(_) => {}
    });
}

/// The array with one more element.
fn lengthened(frame: &[u8], element: &[u8]) -> Bytes {
    let mut scanner = Scanner::new(frame);
    let fields = u16::try_from(scanner.array().unwrap()).unwrap();
    let mut out = vec![0xdc];
    out.extend_from_slice(&(fields + 1).to_be_bytes());
    out.extend_from_slice(&frame[scanner.position()..]);
    out.extend_from_slice(element);
    out.into()
}

#[test]
fn one_more_field_changes_nothing() {
    let later = b"\x82\xa1a\x01\xa1b\x92\xc0\xc3";
    each("output", |layout, label, message| {
        // Where the layout has no weight_version, the added field stands in its place.
        if layout.output.weight_version.is_some() {
            let frame = lengthened(&message.frames[0], later);
            compare_outputs(label, &OutputsView::parse(&frame).unwrap(), &message.expect);
        }
    });
    each("input", |layout, label, message| {
        let before = check_frontend_message(layout, &message.frames).unwrap();
        let FrontendMessage::Add(before) = before else {
            return;
        };
        let mut frames = message.frames.clone();
        frames[1] = lengthened(&frames[1], later);
        let FrontendMessage::Add(after) = check_frontend_message(layout, &frames).unwrap() else {
            panic!("{label}");
        };
        assert_eq!(after.request_id, before.request_id, "{label}");
        assert_eq!(after.client_index, before.client_index, "{label}");
        assert_eq!(after.current_wave, before.current_wave, "{label}");
    });
}

#[test]
fn every_truncation_is_refused_without_a_panic() {
    each("input", |layout, label, message| {
        for length in 0..message.frames[1].len() {
            let mut frames = message.frames.clone();
            frames[1].truncate(length);
            assert!(check_frontend_message(layout, &frames).is_err(), "{label} cut to {length}");
        }
    });
    each("output", |_, label, message| {
        for length in 0..message.frames[0].len() {
            let cut = &message.frames[0][..length];
            assert!(OutputsView::parse(cut).is_err(), "{label} cut to {length}");
        }
    });
    each("handshake", |_, label, message| {
        // An empty frame is how engines up to 0.19 register.
        for length in 1..message.frames[0].len() {
            let cut = Bytes::copy_from_slice(&message.frames[0][..length]);
            assert!(EngineMessage::decode(&cut).is_err(), "{label} at {length}");
            assert!(Init::decode(&cut).is_err(), "{label} at {length}");
            assert!(EngineReadyResponse::decode(&cut).is_err(), "{label} at {length}");
            assert!(with_dp_stats_address(&cut, None).is_err(), "{label} at {length}");
        }
    });
    each("coordinator", |_, label, message| {
        let frame = message.frames.last().unwrap();
        for length in 0..frame.len() {
            let cut = &frame[..length];
            assert!(StartDpWave::decode(cut).is_err(), "{label} cut to {length}");
            assert!(FrontendUpstream::decode(cut).is_err(), "{label} at {length}");
            assert!(Publication::decode(cut).is_err(), "{label} cut to {length}");
        }
    });
}

/// Messages that the engine's decoder takes, in all versions or in older ones, and the check does
/// not.
const STRICTER: [&str; 7] = [
    // A timestamp: no argument of vLLM is one.
    "utility_ext_-1",
    // Arrays as map keys become tuples in Python.
    "utility_array_key",
    // The engine's own check catches it since 0.14; before, it died of it.
    "no_params",
    // Infinite or not a number: refused by vLLM since 0.24.
    "params_temperature_5",
    "params_temperature_6",
    // A field that older versions do not know, of a type that it never has.
    "params__eos_token_id_0",
    "image_edit_14",
];

#[test]
fn what_ends_the_input_thread_of_an_engine_is_refused_and_nothing_else() {
    let mut wrong = Vec::new();
    let count = each("hostile", |layout, label, message| {
        let expect = &message.expect;
        let name = label.split(' ').next_back().unwrap();
        let deadly = !expect["decoder"].is_null();
        let refuse = deadly || expect["must_refuse"] == true || STRICTER.contains(&name);
        match check_frontend_message(layout, &message.frames) {
            Ok(_) if refuse => wrong.push(format!("{label} passes: {expect}")),
            Err(refusal) if !refuse => wrong.push(format!("{label} refused: {refusal}")),
            _ => {}
        }
    });
    assert!(count >= 200);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn versions_are_read_with_their_suffixes() {
    for (text, expected) in [
        ("0.32.0", Some((0, 32, 0))),
        ("0.32.0+cpu", Some((0, 32, 0))),
        ("0.33.1rc2.dev3+g1234", Some((0, 33, 1))),
        ("0.33.dev7", Some((0, 33, 0))),
        ("0.1.dev493+g1234", Some((0, 1, 0))),
        ("0.1.rc1", None),
        ("0.11.0.post2", Some((0, 11, 0))),
        ("v0.20.2", Some((0, 20, 2))),
        ("1.0", Some((1, 0, 0))),
        ("dev", None),
        ("", None),
        ("0", None),
        ("0.32.x-1.5", None),
        ("0..1", None),
        ("99999.0.0", None),
    ] {
        let parsed: Option<VllmVersion> = text.parse().ok();
        let expected = expected.map(|(a, b, c)| VllmVersion::new(a, b, c));
        assert_eq!(parsed, expected, "{text}");
    }
    assert!(Layout::for_version(VllmVersion::new(0, 10, 2)).is_err());
    assert!(Layout::for_version(VllmVersion::new(0, 34, 0)).is_err());
    assert!(Layout::for_version(VllmVersion::new(0, 33, 7)).is_ok());
    let closest = Layout::closest(VllmVersion::new(1, 2, 3));
    assert_eq!(closest.version, VllmVersion::NEWEST);
}

#[test]
fn a_development_build_without_a_number_is_named_and_taken_for_the_newest_if_allowed() {
    let version: VllmVersion = "0.1.dev493+g1234".parse().unwrap();
    let error = Layout::for_version(version).unwrap_err().to_string();
    assert!(
        error.contains("development build without a release number")
            && error.contains("--allow-untested-vllm")
    );
    assert_eq!(Layout::closest(version), Layout::newest());
    assert_eq!(Layout::closest(VllmVersion::new(0, 9, 2)).version, VllmVersion::OLDEST);
}
