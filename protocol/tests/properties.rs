//! Properties of the wire types that hold for any input.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use dp_sidecar_protocol::frames::RequestType;
use dp_sidecar_protocol::handshake::{Addresses, ConfigValue, EngineMessage, Init, Ready};
use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::output::{
    EngineOutput, FinishReason, NewOutput, NewOutputs, OutputsView, error_finish, error_reason,
};
use dp_sidecar_protocol::positional::{self, Scanner, element};
use dp_sidecar_protocol::registration::{EngineReadyResponse, detect_layout, with_dp_stats_address};
use dp_sidecar_protocol::request::{FrontendMessage, NewRequest, check_frontend_message, encode_abort};
use dp_sidecar_protocol::stats::{Load, SchedulerStats};
use dp_sidecar_protocol::utility::{UtilityCall, UtilityOutput};
use dp_sidecar_protocol::wave::{FrontendUpstream, Publication, StartDpWave};
use dp_sidecar_protocol::{CallId, ClientIndex, EngineIndex, Wave};
use proptest::collection::vec;
use proptest::prelude::*;

fn layouts() -> impl Strategy<Value = Layout> {
    (11u16..=33, 0u16..4)
        .prop_map(|(minor, patch)| Layout::for_version(VllmVersion::new(0, minor, patch)).unwrap())
}

/// Any msgpack value that travels in a message.
fn values() -> impl Strategy<Value = rmpv::Value> {
    let leaf = prop_oneof![
        Just(rmpv::Value::Nil),
        any::<bool>().prop_map(rmpv::Value::from),
        any::<i64>().prop_map(rmpv::Value::from),
        any::<u64>().prop_map(rmpv::Value::from),
        any::<f64>().prop_filter("NaN differs from itself", |f| !f.is_nan()).prop_map(rmpv::Value::from),
        ".{0,40}".prop_map(|text: String| rmpv::Value::from(text)),
        vec(any::<u8>(), 0..300).prop_map(rmpv::Value::from),
    ];
    leaf.prop_recursive(4, 40, 20, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..20).prop_map(rmpv::Value::from),
            vec(("[a-z]{0,8}", inner), 0..20).prop_map(|pairs| rmpv::Value::Map(
                pairs.into_iter().map(|(key, value)| (rmpv::Value::from(key), value)).collect()
            )),
        ]
    })
}

fn bytes_of(value: &rmpv::Value) -> Bytes {
    let mut out = Vec::new();
    rmpv::encode::write_value(&mut out, value).unwrap();
    out.into()
}

fn requests() -> impl Strategy<Value = NewRequest> {
    ("[ -~]{0,64}", vec(any::<u32>(), 0..200), 1..u32::MAX, any::<u32>(), any::<u64>(), 0.0..4e9).prop_map(
        |(request_id, prompt_token_ids, max_tokens, client, wave, arrival_time)| NewRequest {
            request_id,
            prompt_token_ids,
            max_tokens,
            client_index: ClientIndex(client),
            current_wave: Wave(wave),
            arrival_time,
        },
    )
}

/// Feeds bytes to everything that reads bytes of a peer.
fn decode_all(layout: &Layout, frames: &[Bytes]) {
    let _ = EngineOutput::parse(frames).map(|output| {
        if let EngineOutput::Outputs(view) = output {
            for output in view.outputs() {
                let _ = output;
            }
            let _ = view.finished_requests();
            let _ = view.utility_output();
            let _ = view.stats();
        }
    });
    if let Ok(message) = check_frontend_message(layout, frames) {
        let moved = message.rewrite_client_index(frames, ClientIndex(70_000));
        check_frontend_message(layout, &moved).unwrap();
        if let FrontendMessage::Utility(call) = message {
            let _ = call.decode_args();
        }
    }
    for frame in frames {
        let _ = EngineMessage::decode(frame);
        let _ = Init::decode(frame);
        let _ = EngineReadyResponse::decode(frame);
        let _ = with_dp_stats_address(frame, Some("x"));
        let _ = detect_layout(frame, None);
        let _ = UtilityOutput::decode(frame);
        let _ = SchedulerStats::decode(frame);
        let _ = StartDpWave::decode(frame);
        let _ = FrontendUpstream::decode(frame);
        let _ = Publication::decode(frame);
        let _ = positional::value(frame);
        let _ = element(frame, 3);
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(layout in layouts(), kind in 0u8..8, payload in vec(any::<u8>(), 0..200)) {
        decode_all(&layout, &[Bytes::from(vec![kind]), payload.into()]);
    }

    #[test]
    fn arbitrary_values_never_panic(layout in layouts(), kind in 0u8..4, value in values()) {
        decode_all(&layout, &[Bytes::from(vec![kind]), bytes_of(&value)]);
    }

    #[test]
    fn damaged_requests_never_panic(
        layout in layouts(),
        request in requests(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut frames = request.encode(&layout);
        let mut payload = frames[1].to_vec();
        for (at, byte) in damage {
            let at = at.index(payload.len());
            payload[at] = byte;
        }
        frames[1] = payload.into();
        decode_all(&layout, &frames);
    }

    #[test]
    fn the_scanner_goes_exactly_past_one_value(value in values(), rest in vec(any::<u8>(), 0..20)) {
        let mut bytes = bytes_of(&value).to_vec();
        let length = bytes.len();
        bytes.extend_from_slice(&rest);
        let mut scanner = Scanner::new(&bytes);
        scanner.skip_checked().unwrap();
        prop_assert_eq!(scanner.position(), length);
        prop_assert_eq!(positional::value(&bytes[..length]).unwrap(), value);
        for cut in 0..length {
            prop_assert!(Scanner::new(&bytes[..cut]).skip().is_err());
        }
    }

    #[test]
    fn nesting_is_bounded_and_costs_no_stack(depth in 1usize..100_000, map in any::<bool>()) {
        let mut bytes = if map { b"\x81\x00".repeat(depth) } else { b"\x91".repeat(depth) };
        bytes.push(0xc0);
        let fits = depth <= positional::MAX_DEPTH;
        prop_assert_eq!(Scanner::new(&bytes).skip().is_ok(), fits);
    }

    #[test]
    fn a_declared_length_allocates_nothing(marker in prop_oneof![Just(0xddu8), Just(0xdf), Just(0xdb), Just(0xc6)], length in 16u32.., tail in vec(any::<u8>(), 0..16)) {
        let mut bytes = vec![marker];
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&tail);
        prop_assert!(Scanner::new(&bytes).skip().is_err());
        prop_assert!(positional::value(&bytes).is_err());
    }

    #[test]
    fn a_rewritten_request_differs_in_client_index_alone(
        layout in layouts(),
        request in requests(),
        index in any::<u32>(),
    ) {
        let frames = request.encode(&layout);
        let message = check_frontend_message(&layout, &frames).unwrap();
        let FrontendMessage::Add(add) = &message else { panic!("not an ADD") };
        prop_assert_eq!(add.request_id, &request.request_id);
        prop_assert_eq!(add.client_index, request.client_index);
        prop_assert_eq!(add.current_wave, request.current_wave);
        let moved = message.rewrite_client_index(&frames, ClientIndex(index));
        let wanted = NewRequest { client_index: ClientIndex(index), ..request }.encode(&layout);
        prop_assert_eq!(moved, wanted);
    }

    #[test]
    fn a_short_request_grows_by_what_is_missing(
        layout in layouts(),
        request in requests(),
        index in any::<u32>(),
    ) {
        let full = request.encode(&layout);
        let required = layout.add.required();
        let mut scanner = Scanner::new(&full[1]);
        scanner.array().unwrap();
        let start = scanner.position();
        scanner.skip_many(required).unwrap();
        let mut short = vec![0x90 | u8::try_from(required).unwrap()];
        short.extend_from_slice(&full[1][start..scanner.position()]);
        let frames = vec![RequestType::Add.to_frame(), short.into()];
        let message = check_frontend_message(&layout, &frames).unwrap();
        let moved = message.rewrite_client_index(&frames, ClientIndex(index));
        let FrontendMessage::Add(add) = check_frontend_message(&layout, &moved).unwrap() else {
            panic!("not an ADD")
        };
        prop_assert_eq!(add.client_index, ClientIndex(index));
        for position in 0..required {
            prop_assert_eq!(
                element(&moved[1], position).unwrap(),
                element(&full[1], position).unwrap()
            );
        }
    }

    #[test]
    fn a_rewritten_call_differs_in_client_index_alone(
        client_index in any::<u32>(),
        index in any::<u32>(),
        call_id in any::<u64>(),
        method in "[a-z_]{1,40}",
        args in vec(values(), 0..5),
    ) {
        prop_assume!(!["collective_rpc", "handle_fault_tolerance"].contains(&&*method));
        let layout = Layout::newest();
        let call = UtilityCall {
            client_index: ClientIndex(client_index),
            call_id: CallId(i128::from(call_id)),
            method,
            args,
        };
        let frames = call.encode();
        let message = check_frontend_message(&layout, &frames).unwrap();
        let FrontendMessage::Utility(read) = &message else { panic!("not a UTILITY") };
        prop_assert_eq!(read.call_id, call.call_id);
        prop_assert_eq!(read.method, &call.method);
        prop_assert_eq!(&read.decode_args(), &call.args);
        let moved = message.rewrite_client_index(&frames, ClientIndex(index));
        let wanted = UtilityCall { client_index: ClientIndex(index), ..call }.encode();
        prop_assert_eq!(moved, wanted);
    }

    #[test]
    fn aborts_survive_the_round_trip(ids in vec(".{0,40}", 0..40)) {
        let frames = encode_abort(ids.iter().map(|id| id.as_str()));
        let read = check_frontend_message(&Layout::newest(), &frames).unwrap();
        prop_assert_eq!(read, FrontendMessage::Abort(ids.iter().map(|id| id.as_str()).collect()));
    }

    #[test]
    fn outputs_survive_the_round_trip(
        layout in layouts(),
        engine in any::<u16>(),
        outputs in vec(("[!-~]{0,40}", vec(any::<u32>(), 0..10), proptest::option::of(0i64..9)), 0..40),
        stats in proptest::option::of((any::<u32>(), any::<u32>(), 0.0..1.0)),
        waves in any::<(Option<u64>, Option<u64>)>(),
    ) {
        let stats = stats.map(|(running, waiting, usage)| SchedulerStats {
            load: Load { running: running.into(), waiting: waiting.into(), kv_cache_usage: usage },
            ..SchedulerStats::default()
        });
        let new = NewOutputs {
            engine_index: EngineIndex(engine),
            outputs: outputs
                .iter()
                .map(|(id, tokens, reason)| NewOutput {
                    request_id: id.clone(),
                    new_token_ids: tokens.clone(),
                    finish_reason: reason.map(FinishReason::from),
                })
                .collect(),
            scheduler_stats: stats.map(|stats| stats.encode()),
            timestamp: 5.5,
            wave_complete: waves.0.map(Wave),
            start_wave: waves.1.map(Wave),
            ..NewOutputs::default()
        };
        let frame = new.encode(&layout);
        let view = OutputsView::parse(&frame).unwrap();
        prop_assert_eq!(view.engine_index, EngineIndex(engine));
        prop_assert_eq!(view.stats().transpose().unwrap(), stats);
        prop_assert_eq!(view.wave_complete, waves.0.map(Wave));
        prop_assert_eq!(view.start_wave, waves.1.map(Wave));
        let read: Vec<_> = view.outputs().map(Result::unwrap).collect();
        prop_assert_eq!(read.len(), outputs.len());
        for (read, (id, _, reason)) in read.iter().zip(&outputs) {
            prop_assert_eq!(read.request_id, id);
            prop_assert_eq!(read.finished.map(i64::from), *reason);
            prop_assert_eq!(
                Scanner::new(read.raw).array().unwrap(),
                layout.output.output_fields
            );
        }
        prop_assert_eq!(
            Scanner::new(&frame).array().unwrap(),
            layout.output.outputs_fields
        );
    }

    #[test]
    fn an_error_finish_ends_each_request_once(layout in layouts(), ids in vec("[a-z0-9-]{1,40}", 1..40)) {
        let frame = error_finish(&layout, EngineIndex(3), ids.iter().map(|id| id.as_str()), 1.0);
        let view = OutputsView::parse(&frame).unwrap();
        let read: Vec<_> = view.outputs().map(Result::unwrap).collect();
        prop_assert_eq!(read.len(), ids.len());
        for (output, id) in read.iter().zip(&ids) {
            prop_assert_eq!(output.request_id, id);
            prop_assert_eq!(output.finished, Some(error_reason(&layout)));
        }
        prop_assert_eq!(view.finished_requests().unwrap(), ids);
    }

    #[test]
    fn utility_answers_survive_the_round_trip(call in any::<u64>(), value in values(), failure in proptest::option::of(".{0,80}")) {
        let result = match failure {
            Some(message) => Err(message),
            None => Ok(value),
        };
        let answer = UtilityOutput { call_id: CallId(i128::from(call)), result };
        let frame = dp_sidecar_protocol::output::utility_answer(
            &Layout::newest(),
            EngineIndex(1),
            answer.call_id,
            answer.result.clone(),
            2.0,
        );
        let view = OutputsView::parse(&frame).unwrap();
        prop_assert_eq!(view.utility_call_id(), Some(answer.call_id));
        prop_assert_eq!(view.utility_output().unwrap().unwrap(), answer);
    }

    #[test]
    fn init_survives_the_round_trip(
        pairs in vec((".{0,60}", ".{0,60}"), 1..5),
        optional in proptest::option::of(".{0,60}"),
        config in vec(("[a-z_]{1,30}", prop_oneof![
            any::<i64>().prop_map(ConfigValue::Int),
            ".{0,40}".prop_map(ConfigValue::Str),
            vec(any::<i64>(), 0..20).prop_map(ConfigValue::Ints),
        ]), 0..20),
    ) {
        let (inputs, outputs) = pairs.into_iter().unzip();
        let init = Init {
            addresses: Addresses {
                inputs,
                outputs,
                coordinator_input: optional.clone(),
                coordinator_output: None,
                frontend_stats_publish_address: optional,
            },
            parallel_config: config,
            parallel_config_hash: None,
        };
        prop_assert_eq!(Init::decode(&init.encode()).unwrap(), init);
    }

    #[test]
    fn ready_survives_the_round_trip(
        layout in layouts(),
        local in any::<bool>(),
        headless in any::<bool>(),
        blocks in any::<u64>(),
        hash in proptest::option::of("[0-9a-f]{64}"),
        address in proptest::option::of(".{0,60}"),
    ) {
        let old = layout.registration_is_empty();
        let ready = Ready {
            local,
            headless,
            num_gpu_blocks: old.then_some(blocks),
            dp_stats_address: address.filter(|_| old),
            parallel_config_hash: hash.filter(|_| layout.ready_has_hash()),
        };
        let read = EngineMessage::decode(&ready.encode(&layout)).unwrap();
        prop_assert_eq!(read, EngineMessage::Ready(ready));
    }

    #[test]
    fn coordinator_messages_survive_the_round_trip(
        layout in layouts(),
        wave in any::<u64>(),
        engine in any::<u16>(),
        counts in proptest::option::of(vec((any::<u64>(), any::<u64>(), 0.0..1.0), 0..40)),
        running in any::<bool>(),
    ) {
        let start = StartDpWave { wave: Wave(wave), exclude: Some(EngineIndex(engine)) };
        prop_assert_eq!(StartDpWave::decode(&start.encode()[1]).unwrap(), start);
        let first = FrontendUpstream::FirstReq { target: EngineIndex(engine), wave: Wave(wave) };
        prop_assert_eq!(FrontendUpstream::decode(&first.encode()).unwrap(), first);
        let publication = Publication {
            counts: counts.map(|counts| counts.into_iter().map(|(waiting, running, usage)| Load {
                waiting,
                running,
                kv_cache_usage: if layout.counts_arity() > 2 { usage } else { 0.0 },
            }).collect()),
            wave: Wave(wave),
            running,
        };
        prop_assert_eq!(Publication::decode(&publication.encode(&layout)).unwrap(), publication);
    }

    #[test]
    fn only_the_stats_address_of_a_ready_response_changes(
        keys in vec(("k_[a-z_]{0,20}", values()), 0..20),
        at in any::<prop::sample::Index>(),
        before in proptest::option::of(".{0,60}"),
        after in proptest::option::of(".{0,60}"),
    ) {
        let mut pairs: Vec<(rmpv::Value, rmpv::Value)> = keys
            .into_iter()
            .map(|(key, value)| (key.into(), value))
            .collect();
        let at = at.index(pairs.len() + 1);
        let text = |text: Option<String>| text.map_or(rmpv::Value::Nil, rmpv::Value::from);
        pairs.insert(at, ("dp_stats_address".into(), text(before)));
        let frame = bytes_of(&rmpv::Value::Map(pairs.clone()));
        let changed = with_dp_stats_address(&frame, after.as_deref()).unwrap();
        pairs[at].1 = text(after);
        prop_assert_eq!(changed, bytes_of(&rmpv::Value::Map(pairs)));
    }
}

#[test]
fn the_version_of_an_engine_is_told_from_its_registration() {
    let known = |text: &str| text.parse::<VllmVersion>().unwrap();
    let empty = detect_layout(b"", None).unwrap();
    assert_eq!(empty.layout.add.client_index, 10);
    assert!(!empty.certain);
    let old = detect_layout(b"", Some(known("0.14.1"))).unwrap();
    assert_eq!(old.layout.add.client_index, 11);
    assert!(old.certain);
    assert!(detect_layout(b"", Some(known("0.32.0"))).is_err());
    let named = |version: &str| {
        bytes_of(&rmpv::Value::Map(vec![
            ("vllm_version".into(), version.into()),
            ("dtype".into(), "bfloat16".into()),
        ]))
    };
    let new = detect_layout(&named("0.33.0+cu130"), None).unwrap();
    assert_eq!(new.layout.version, known("0.33.0"));
    assert!(new.certain);
    assert!(detect_layout(&named("0.34.0"), None).is_err());
    assert!(detect_layout(&named("unknown"), None).is_err());
    assert!(detect_layout(b"\x00", None).is_err());
}

#[test]
fn an_output_without_fields_is_not_read_from_its_neighbour() {
    // [0, [[], "x"], nil, 1.0]
    let frame = b"\x94\x00\x92\x90\xa1x\xc0\xcb\x3f\xf0\0\0\0\0\0\0";
    let view = OutputsView::parse(frame).unwrap();
    let read: Vec<_> = view.outputs().collect();
    assert_eq!(read.len(), 1);
    assert!(read[0].is_err());
}
