//! The rules of the virtual engine, one by one. The simulation in the machine's folder mixes them.
#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod memory;

use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::held_call::{HeldCall, Verdict};
use dp_sidecar_protocol::machine::memory::Memory;
use dp_sidecar_protocol::machine::virtual_engine::{Action, CallError, Config, Event, Limits, VirtualEngine};
use dp_sidecar_protocol::output::{EngineOutput, FinishReason, NewOutput, NewOutputs};
use dp_sidecar_protocol::request::{NewRequest, encode_abort};
use dp_sidecar_protocol::utility::{UtilityCall, UtilityOutput};
use dp_sidecar_protocol::{
    CallId, ClientIndex, EngineIndex, Frames, FrontendId, Incarnation, Slot, Time, Wave,
};

const RANK: EngineIndex = EngineIndex(3);

struct Bed {
    machine: VirtualEngine,
    now: Time,
    incarnation: Incarnation,
}

/// What a frontend can tell from a message.
#[derive(Debug, PartialEq)]
enum Heard {
    Finish(String, FinishReason),
    Finished(Vec<String>),
    Answer(i128, Result<rmpv::Value, String>),
    Stats,
    Other,
}

impl Bed {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(RANK, 3, Limits::default());
        change(&mut config);
        Self {
            machine: VirtualEngine::new(config),
            now: Time::from_millis(1000),
            incarnation: Incarnation(0),
        }
    }

    fn admitted() -> Self {
        let mut bed = Self::new();
        bed.admit();
        bed
    }

    fn admit(&mut self) -> Vec<Action> {
        self.incarnation.0 += 1;
        let incarnation = self.incarnation;
        self.event(Event::Prepared(incarnation));
        self.event(Event::Ready { incarnation, layout: Box::new(Layout::newest()) });
        self.event(Event::Admitted(incarnation))
    }

    fn event(&mut self, event: Event) -> Vec<Action> {
        self.machine.handle_event(self.now, event);
        self.actions()
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.machine.poll_action()).filter(|action| *action != Action::Wake).collect()
    }

    fn open(&mut self, frontend: u64, api_server: u32) -> Slot {
        self.machine.open_slot(FrontendId(frontend), api_server).unwrap()
    }

    fn down(&mut self, reason: &str) -> Vec<Action> {
        let incarnation = self.incarnation;
        let reason = reason.to_owned();
        self.event(Event::Down { incarnation, reason })
    }

    fn wait(&mut self, seconds: u64) -> Vec<Action> {
        self.now = self.now + Duration::from_secs(seconds);
        self.machine.handle_timeout(self.now);
        self.actions()
    }

    fn add(&mut self, slot: Slot, id: &str) -> Vec<Action> {
        let frames = add(id);
        self.event(Event::FromFrontend { slot, frames })
    }

    fn abort(&mut self, slot: Slot, ids: &[&str]) -> Vec<Action> {
        let frames = encode_abort(ids.iter().copied());
        self.event(Event::FromFrontend { slot, frames })
    }

    fn call(&mut self, slot: Slot, id: i128, method: &str, args: Vec<rmpv::Value>) -> Vec<Action> {
        let call = UtilityCall {
            client_index: ClientIndex(9),
            call_id: CallId(id),
            method: method.to_owned(),
            args,
        };
        let frames = call.encode();
        self.event(Event::FromFrontend { slot, frames })
    }

    fn engine(&mut self, slot: Slot, outputs: NewOutputs) -> Vec<Action> {
        let outputs = NewOutputs { engine_index: RANK, timestamp: 5.0, ..outputs };
        let incarnation = self.incarnation;
        let frames = vec![outputs.encode(&Layout::newest())];
        self.event(Event::FromEngine { incarnation, slot, frames })
    }

    fn answer(&mut self, slot: Slot, id: i128, value: &str) -> Vec<Action> {
        let utility_output = Some(UtilityOutput { call_id: CallId(id), result: Ok(value.into()) });
        self.engine(slot, NewOutputs { utility_output, ..NewOutputs::default() })
    }
}

fn add(id: &str) -> Frames {
    let request = NewRequest {
        request_id: id.to_owned(),
        prompt_token_ids: vec![1],
        max_tokens: 1,
        client_index: ClientIndex(0),
        current_wave: Wave(0),
        arrival_time: 1.0,
    };
    request.encode(&Layout::newest())
}

/// What goes to a frontend, by slot.
fn heard(actions: &[Action]) -> Vec<(u32, Heard)> {
    let messages = actions.iter().filter_map(|action| match action {
        Action::ToFrontend { slot, frames } => Some((slot.0, frames)),
        _ => None,
    });
    messages
        .map(|(slot, frames)| {
            let Ok(EngineOutput::Outputs(view)) = EngineOutput::parse(frames) else {
                panic!("a frontend got {frames:?}");
            };
            let what = if let Some(answer) = view.utility_output() {
                let answer = answer.unwrap();
                Heard::Answer(answer.call_id.0, answer.result)
            } else if let Some(output) = view.outputs().next() {
                let output = output.unwrap();
                output
                    .finished
                    .map_or(Heard::Other, |reason| Heard::Finish(output.request_id.to_owned(), reason))
            } else if view.scheduler_stats.is_some() {
                Heard::Stats
            } else {
                let ids = view.finished_requests().unwrap();
                Heard::Finished(ids.into_iter().map(str::to_owned).collect())
            };
            (slot, what)
        })
        .collect()
}

fn to_engine(actions: &[Action]) -> Vec<(u32, &Frames)> {
    let messages = actions.iter().filter_map(|action| match action {
        Action::ToEngine { slot, frames } => Some((slot.0, frames)),
        _ => None,
    });
    messages.collect()
}

fn stats() -> NewOutputs {
    NewOutputs { scheduler_stats: Some(vec![0x80]), ..NewOutputs::default() }
}

fn output(id: &str) -> NewOutputs {
    NewOutputs {
        outputs: vec![NewOutput { request_id: id.to_owned(), new_token_ids: vec![1], finish_reason: None }],
        ..NewOutputs::default()
    }
}

#[test]
fn nothing_of_a_frontend_reaches_an_engine_before_it_is_admitted() {
    let mut bed = Bed::new();
    let slot = bed.open(1, 0);
    bed.event(Event::Prepared(Incarnation(1)));
    bed.incarnation = Incarnation(1);
    assert_eq!(to_engine(&bed.add(slot, "a")), []);
    assert_eq!(to_engine(&bed.call(slot, 1, "is_sleeping", vec![])), []);
    let ready = bed.event(Event::Ready { incarnation: Incarnation(1), layout: Box::new(Layout::newest()) });
    assert_eq!(to_engine(&ready), []);
    let admitted = bed.event(Event::Admitted(Incarnation(1)));
    assert_eq!(to_engine(&admitted).len(), 2);
    assert_eq!(bed.machine.snapshot().held, 0);
}

#[test]
fn a_held_request_is_answered_at_its_deadline_and_one_beyond_the_bound_at_once() {
    let mut bed = Bed::with(|config| {
        config.limits.held_bytes = 1;
        config.limits.hold = Duration::from_secs(10);
    });
    let slot = bed.open(1, 0);
    assert_eq!(heard(&bed.add(slot, "held")), []);
    let refused = bed.add(slot, "too many");
    let error = |id: &str| (slot.0, Heard::Finish(id.to_owned(), FinishReason::Error));
    assert_eq!(heard(&refused), [error("too many")]);
    assert_eq!(heard(&bed.wait(9)), []);
    assert_eq!(bed.machine.poll_timeout(), Some(Time::from_millis(11_000)));
    assert_eq!(heard(&bed.wait(1)), [error("held")]);
    assert_eq!(bed.machine.poll_timeout(), None);
}

#[test]
fn a_request_waits_as_long_as_it_must_behind_an_engine_that_takes_requests() {
    let mut bed = Bed::with(|config| {
        config.max_in_flight = 1;
        config.limits.hold = Duration::from_secs(10);
    });
    bed.admit();
    let slot = bed.open(1, 0);
    bed.add(slot, "running");
    bed.add(slot, "waiting");
    assert_eq!(bed.machine.poll_timeout(), None);
    assert_eq!(heard(&bed.wait(3600)), []);
    // From the moment at which the gate closes it waits for something else.
    bed.event(Event::Gate { open: false });
    assert_eq!(heard(&bed.wait(9)), []);
    let error = Heard::Finish("waiting".into(), FinishReason::Error);
    assert_eq!(heard(&bed.wait(1)), [(slot.0, error)]);
}

#[test]
fn one_request_fits_whatever_its_size_when_nothing_else_is_held() {
    let mut bed = Bed::with(|config| (config.limits.held_bytes, config.limits.in_flight_bytes) = (1, 1));
    let slot = bed.open(1, 0);
    assert_eq!(heard(&bed.add(slot, "large")), []);
    bed.add(slot, "beyond");
    let snapshot = bed.machine.snapshot();
    assert_eq!((snapshot.held, snapshot.refused), (1, 1));
    let why = snapshot.last_refusal.unwrap();
    assert!(why.contains("--max-held-bytes") && why.contains("DP rank 3 is down"), "{why}");
    assert_eq!(to_engine(&bed.admit()).len(), 1);
}

#[test]
fn a_request_too_large_to_be_read_is_answered_by_its_id_and_so_is_a_call() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    let mut head = add("large");
    let half = head[1].len() / 2;
    head[1].truncate(half);
    let answered = heard(&bed.event(Event::TooLarge { slot, head, size: 5 << 30 }));
    assert_eq!(answered, [(slot.0, Heard::Finish("large".into(), FinishReason::Error))]);
    let why = bed.machine.snapshot().last_refusal.unwrap();
    assert!(why.contains("5368709120 bytes") && why.contains("--max-request-bytes"), "{why}");
    let method = "reset_prefix_cache".to_owned();
    let call = UtilityCall { client_index: ClientIndex(9), call_id: CallId(7), method, args: Vec::new() };
    let answered = heard(&bed.event(Event::TooLarge { slot, head: call.encode(), size: 5 << 30 }));
    let [(_, Heard::Answer(7, Err(why)))] = &answered[..] else { panic!("{answered:?}") };
    assert!(why.contains("--max-request-bytes"), "{why}");
}

#[test]
fn an_abort_of_a_held_request_is_answered_here_and_tells_the_load_balancer() {
    let mut bed = Bed::new();
    let slot = bed.open(1, 0);
    bed.add(slot, "a");
    let aborted = bed.abort(slot, &["a"]);
    assert_eq!(heard(&aborted), [(slot.0, Heard::Finished(vec!["a".into()]))]);
    assert_eq!(to_engine(&bed.admit()), []);
}

#[test]
fn a_frontend_cannot_abort_or_repeat_the_requests_of_another() {
    let mut bed = Bed::admitted();
    let (a, b) = (bed.open(1, 0), bed.open(2, 0));
    bed.add(a, "mine");
    assert_eq!(to_engine(&bed.abort(b, &["mine"])), []);
    let repeated = bed.add(b, "mine");
    assert_eq!(to_engine(&repeated), []);
    let error = Heard::Finish("mine".into(), FinishReason::Error);
    assert_eq!(heard(&repeated), [(b.0, error)]);
    assert_eq!(to_engine(&bed.abort(a, &["mine", "unknown"])).len(), 1);
}

#[test]
fn a_request_id_sent_twice_by_one_frontend_reaches_the_engine_once() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    assert_eq!(to_engine(&bed.add(slot, "a")).len(), 1);
    let again = bed.add(slot, "a");
    assert_eq!((to_engine(&again), heard(&again)), (vec![], vec![]));
}

#[test]
fn requests_beyond_the_bound_wait_until_others_have_finished() {
    let mut bed = Bed::with(|config| config.max_in_flight = 1);
    bed.admit();
    let slot = bed.open(1, 0);
    assert_eq!(to_engine(&bed.add(slot, "a")).len(), 1);
    assert_eq!(to_engine(&bed.add(slot, "b")), []);
    let mut finish = output("a");
    finish.outputs[0].finish_reason = Some(FinishReason::Stop);
    let finished = bed.engine(slot, finish);
    assert_eq!(to_engine(&finished).len(), 1);
}

#[test]
fn a_dead_engine_ends_its_requests_and_calls_once_and_late_outputs_are_dropped() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.add(slot, "a");
    bed.call(slot, 7, "reset_prefix_cache", vec![]);
    let down = heard(&bed.down("signal 9"));
    assert_eq!(down.len(), 2);
    assert_eq!(down[0].1, Heard::Finish("a".into(), FinishReason::Error));
    let Heard::Answer(7, Err(message)) = &down[1].1 else {
        panic!("{down:?}");
    };
    assert!(message.contains("DP rank 3") && message.contains("signal 9"), "{message}");
    assert_eq!(bed.engine(slot, output("a")), []);
    assert_eq!(bed.down("again"), []);
}

#[test]
fn supported_tasks_are_answered_from_memory_while_the_engine_is_away() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.call(slot, 1, "get_supported_tasks", vec![]);
    bed.answer(slot, 1, "generate");
    bed.down("restart");
    let answered = heard(&bed.call(slot, 2, "get_supported_tasks", vec![]));
    assert_eq!(answered, [(slot.0, Heard::Answer(2, Ok("generate".into())))]);
    assert_eq!(heard(&bed.call(slot, 3, "reset_mm_cache", vec![])), []);
    assert_eq!(heard(&bed.wait(2000)), [], "an engine that starts may take so long");
    let late = heard(&bed.wait(1000));
    assert!(matches!(&late[..], [(_, Heard::Answer(3, Err(_)))]), "{late:?}");
}

#[test]
fn a_frontend_that_starts_leaves_the_inputs_that_others_have_cached() {
    let mut bed = Bed::admitted();
    let first = bed.open(1, 0);
    let alone = bed.call(first, 1, "reset_mm_cache", vec![]);
    assert_eq!((to_engine(&alone).len(), heard(&alone)), (1, vec![]));
    bed.answer(first, 1, "done");
    for frontend in [2, 1] {
        let slot = bed.open(frontend, 1);
        let beside = bed.call(slot, 1, "reset_mm_cache", vec![]);
        assert_eq!(to_engine(&beside), []);
        assert_eq!(heard(&beside), [(slot.0, Heard::Answer(1, Ok(rmpv::Value::Nil)))]);
    }
    // What weights are in is dropped for all.
    assert_eq!(to_engine(&bed.call(first, 2, "reset_encoder_cache", vec![])).len(), 1);
}

#[test]
fn answers_to_calls_that_nobody_made_are_not_passed_on() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    assert_eq!(bed.answer(slot, 1234, "x"), []);
    assert_eq!(bed.answer(Slot::CONTROL, 1234, "x"), []);
}

#[test]
fn a_control_call_waits_for_its_verdict_with_its_arguments_and_a_deadline() {
    let mut bed = Bed::admitted();
    let slot = bed.open(5, 1);
    let rpc = vec![rmpv::Value::from("reload_weights"), rmpv::Value::Nil];
    let held = bed.call(slot, 9, "collective_rpc", rpc.clone());
    assert_eq!(
        held,
        [Action::HeldCall(HeldCall {
            rank: RANK,
            ticket: 0,
            frontend: FrontendId(5),
            api_server: 1,
            method: "collective_rpc".to_owned(),
            args: rpc,
        })]
    );
    bed.machine.release(0, Verdict::Refuse("update u1 is running".to_owned()));
    let released = bed.actions();
    let refusal = Heard::Answer(9, Err("update u1 is running".to_owned()));
    assert_eq!(heard(&released), [(slot.0, refusal)]);
    bed.call(slot, 10, "sleep", vec![]);
    let late = heard(&bed.wait(3600));
    assert!(matches!(&late[..], [(_, Heard::Answer(10, Err(_)))]), "{late:?}");
    bed.machine.release(1, Verdict::Forward);
    let gone = bed.actions();
    assert!(matches!(&gone[..], [Action::Released { ticket: 1, result: Err(_) }]), "{gone:?}");
}

#[test]
fn a_decided_call_is_followed_to_its_end_when_its_frontend_has_gone() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.call(slot, 9, "pause_scheduler", vec![]);
    bed.machine.release(0, Verdict::Forward);
    assert_eq!(to_engine(&bed.actions()).len(), 1);
    bed.event(Event::CloseSlot { slot });
    let answered = bed.answer(slot, 9, "paused");
    assert_eq!(answered, [Action::Released { ticket: 0, result: Ok("paused".into()) }]);
}

#[test]
fn own_calls_fail_without_an_engine_and_at_their_deadline() {
    let mut bed = Bed::new();
    let call = |token| Event::Call {
        token,
        method: "is_sleeping".to_owned(),
        args: Vec::new(),
        timeout: Duration::from_secs(2),
    };
    let actions = bed.event(call(1));
    let [Action::CallAnswered { token: 1, result: Err(CallError::Down(reason)) }] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert!(reason.contains("DP rank 3"), "{reason}");
    bed.admit();
    assert_eq!(to_engine(&bed.event(call(2))).len(), 1);
    let late = bed.wait(2);
    let deadline = Err(CallError::Deadline(Duration::from_secs(2)));
    assert_eq!(late, [Action::CallAnswered { token: 2, result: deadline }]);
}

#[test]
fn idle_stats_reach_the_first_api_server_of_every_frontend() {
    let mut bed = Bed::admitted();
    let (a, _second, b) = (bed.open(1, 0), bed.open(1, 1), bed.open(2, 0));
    let idle = heard(&bed.engine(Slot::CONTROL, stats()));
    assert_eq!(idle, [(a.0, Heard::Stats), (b.0, Heard::Stats)]);
}

#[test]
fn stats_on_one_frontends_outputs_are_copied_to_the_others_now_and_then() {
    let mut bed = Bed::admitted();
    let (a, b) = (bed.open(1, 0), bed.open(2, 0));
    let with_output = NewOutputs { scheduler_stats: Some(vec![0x80]), ..output("x") };
    let first = heard(&bed.engine(a, with_output.clone()));
    assert_eq!(first, [(b.0, Heard::Stats), (a.0, Heard::Other)]);
    let soon = heard(&bed.engine(a, with_output.clone()));
    assert_eq!(soon, [(a.0, Heard::Other)]);
    bed.now = bed.now + Duration::from_millis(250);
    assert_eq!(heard(&bed.engine(a, with_output)).len(), 2);
}

#[test]
fn the_death_notice_of_an_engine_stays_here() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    let incarnation = bed.incarnation;
    let dead = bed.event(Event::FromEngine {
        incarnation,
        slot,
        frames: vec![Bytes::from_static(b"ENGINE_CORE_DEAD")],
    });
    let reason = "it reported ENGINE_CORE_DEAD".to_owned();
    assert_eq!(dead, [Action::EngineDead { reason }]);
}

#[test]
fn a_slot_comes_back_when_the_engine_has_answered_the_fence_and_let_go_of_the_requests() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.add(slot, "a");
    let closed = bed.event(Event::CloseSlot { slot });
    assert_eq!(to_engine(&closed).len(), 2, "{closed:?}");
    assert_eq!(bed.machine.snapshot().draining, 1);
    assert_eq!(bed.engine(slot, output("a")), []);
    assert_eq!(bed.answer(slot, 1, "false"), []);
    let finished = NewOutputs { finished_requests: Some(vec!["a".to_owned()]), ..NewOutputs::default() };
    assert_eq!(bed.engine(slot, finished), [Action::SlotFree { slot }]);
}

#[test]
fn a_message_that_cannot_be_read_ends_the_engine_and_answers_every_request_once() {
    let two = || {
        let mut two = output("a");
        two.outputs.push(NewOutput { request_id: "b".into(), finish_reason: None, ..two.outputs[0].clone() });
        two.outputs[0].finish_reason = Some(FinishReason::Stop);
        two.encode(&Layout::newest())
    };
    let whole = two();
    // Everywhere: at the top level, in the second output, behind both.
    for cut in 1..whole.len() {
        let mut bed = Bed::admitted();
        let slot = bed.open(1, 0);
        bed.add(slot, "a");
        bed.add(slot, "b");
        let (incarnation, frames) = (bed.incarnation, vec![whole.slice(..cut)]);
        let actions = bed.event(Event::FromEngine { incarnation, slot, frames });
        let [Action::ToFrontend { frames, .. }, Action::EngineDead { reason }] = &actions[..] else {
            panic!("cut at {cut}: {actions:?}");
        };
        let Ok(EngineOutput::Outputs(view)) = EngineOutput::parse(frames) else { panic!("cut at {cut}") };
        let ended = view.outputs().map(|output| output.map(|output| (output.request_id, output.finished)));
        let error = Some(FinishReason::Error);
        assert_eq!(
            ended.collect::<Result<Vec<_>, _>>().unwrap(),
            [("a", error), ("b", error)],
            "cut at {cut}"
        );
        assert!(reason.contains("cannot be read"), "{reason}");
        let snapshot = bed.machine.snapshot();
        assert!(!snapshot.admitted && snapshot.in_flight.values().all(|count| *count == 0), "{snapshot:?}");
    }
}

#[test]
fn what_an_engine_counts_reaches_one_frontend_so_that_sums_add_up() {
    let mut bed = Bed::admitted();
    let (a, b) = (bed.open(1, 0), bed.open(2, 0));
    bed.add(a, "x");
    // {"num_running_reqs": 1, "prefix_cache_stats": {"requests": 1}}
    let counted = b"\x82\xb0num_running_reqs\x01\xb2prefix_cache_stats\x81\xa8requests\x01".to_vec();
    let gauges = b"\x82\xb0num_running_reqs\x01\xb2prefix_cache_stats\x81\xa8requests\x00";
    let stats = Some(counted.clone());
    for (from, outputs) in [
        (a, NewOutputs { scheduler_stats: stats.clone(), ..output("x") }),
        (Slot::CONTROL, NewOutputs { scheduler_stats: stats, ..NewOutputs::default() }),
    ] {
        bed.now = bed.now + Duration::from_secs(1);
        let actions = bed.engine(from, outputs);
        let mut heard: Vec<_> = actions
            .iter()
            .map(|action| {
                let Action::ToFrontend { slot, frames } = action else { panic!("{action:?}") };
                let Ok(EngineOutput::Outputs(view)) = EngineOutput::parse(frames) else {
                    panic!("{frames:?}")
                };
                (slot.0, view.scheduler_stats.unwrap().to_vec())
            })
            .collect();
        heard.sort();
        assert_eq!(heard, [(a.0, counted.clone()), (b.0, gauges.to_vec())], "from slot {from}");
    }
}

#[test]
fn what_waits_for_an_engine_that_is_given_up_is_answered_at_once_and_so_is_what_comes() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.down("exit status 1");
    bed.add(slot, "held");
    bed.call(slot, 1, "reset_mm_cache", vec![]);
    let error = |id: &str| (slot.0, Heard::Finish(id.to_owned(), FinishReason::Error));
    let actions = bed.event(Event::GivenUp { reason: "5 restarts".to_owned() });
    let expected = "1 requests held in vain: engine of DP rank 3 has failed: 5 restarts";
    let said = |action: &Action| matches!(action, Action::Refused { reason, .. } if reason == expected);
    assert!(actions.iter().any(said), "{actions:?}");
    let given_up = heard(&actions);
    assert_eq!(given_up[0], error("held"));
    let [_, (_, Heard::Answer(1, Err(why)))] = &given_up[..] else { panic!("{given_up:?}") };
    assert!(why.contains("DP rank 3 has failed: 5 restarts"), "{why}");
    assert_eq!(heard(&bed.add(slot, "later")), [error("later")]);
    let later = heard(&bed.call(slot, 2, "reset_mm_cache", vec![]));
    assert!(matches!(&later[..], [(_, Heard::Answer(2, Err(_)))]), "{later:?}");
    assert_eq!((bed.machine.snapshot().held, bed.machine.poll_timeout()), (0, None));
    // A successor of the sidecar may try again.
    bed.admit();
    assert_eq!(to_engine(&bed.add(slot, "again")).len(), 1);
}
