//! Sleep and wake-up: what is refused because of what the engines' memory holds.

use dp_sidecar_protocol::machine::memory::Weights;

use super::*;

/// A call of frontend 1 at all ranks, with these answers if it is forwarded. Gives the verdicts.
fn round(
    control: &mut Control,
    ticket: u64,
    method: &str,
    args: &[Value],
    answers: &[Result<Value, String>],
) -> Vec<Verdict> {
    let ranks: Vec<EngineIndex> = (0..).map(EngineIndex).take(answers.len()).collect();
    for rank in &ranks {
        control.handle_event(
            at(0),
            Event::Held(HeldCall {
                rank: *rank,
                ticket,
                frontend: FrontendId(1),
                api_server: 0,
                method: method.to_owned(),
                args: args.to_vec(),
            }),
        );
    }
    let verdicts: Vec<Verdict> = decisions(control).into_iter().map(|(_, _, verdict)| verdict).collect();
    for (rank, result) in ranks.into_iter().zip(answers) {
        if verdicts[usize::from(rank.0)] == Verdict::Forward {
            control.handle_event(at(1), Event::Answered { rank, ticket, result: result.clone() });
        }
    }
    verdicts
}

fn tags(names: &[&str]) -> Vec<Value> {
    vec![Value::Array(names.iter().map(|name| Value::from(*name)).collect())]
}

const NIL: Result<Value, String> = Ok(Value::Nil);
const YES: Result<Value, String> = Ok(Value::Boolean(true));
const NO: Result<Value, String> = Ok(Value::Boolean(false));

/// What an owner of the lock finds; it loads weights if it is an `update`.
fn granted(control: &mut Control, owner: u64, update: bool) -> Grant {
    control.handle_event(at(2), acquire(owner, "update", 0));
    let grant = actions(control).into_iter().find_map(|action| match action {
        Action::Granted { grant, .. } => Some(grant),
        _ => None,
    });
    if update {
        control.handle_event(at(2), Event::WeightsKnown { owner: OwnerId(owner) });
    }
    control.handle_event(at(2), Event::Release { owner: OwnerId(owner) });
    grant.unwrap()
}

#[test]
fn engines_whose_weights_were_discarded_are_woken_up_in_parts_and_resumed_only_with_weights() {
    for lockstep in [false, true] {
        let mut control = control(2, lockstep);
        let forward = vec![Verdict::Forward; 2];
        assert_eq!(round(&mut control, 1, "sleep", &[Value::from(2)], &[NIL, NIL]), forward);
        let state = control.snapshot();
        assert!(state.asleep && state.without_weights && state.external_weights, "{state:?}");
        assert_eq!(granted(&mut control, 1, false).weights_asleep(), [EngineIndex(0), EngineIndex(1)]);

        for whole in [vec![], tags(&["kv_cache"]), tags(&["kv_cache", "weights", "scheduling"])] {
            let refused = round(&mut control, 2, "wake_up", &whole, &[YES, YES]);
            assert!(
                refusal(&refused[1]).contains("wake_up with tags=[\"weights\"], load weights"),
                "{refused:?}"
            );
        }
        assert_eq!(round(&mut control, 3, "wake_up", &tags(&["weights"]), &[NO, NO]), forward);
        let refused = round(&mut control, 4, "wake_up", &tags(&["kv_cache"]), &[YES, YES]);
        assert!(refusal(&refused[0]).contains("discarded"), "{refused:?}");
        let refused = round(&mut control, 5, "resume_scheduler", &[], &[NIL, NIL]);
        assert!(refusal(&refused[0]).contains("the engines sleep: call wake_up"), "{refused:?}");

        let grant = granted(&mut control, 2, true);
        assert!(grant.weights_asleep().is_empty() && grant.asleep() && grant.without_weights(), "{grant:?}");
        let state = control.snapshot();
        assert!(state.asleep && !state.without_weights && !state.external_weights, "{state:?}");
        assert_eq!(round(&mut control, 6, "wake_up", &tags(&["kv_cache"]), &[YES, YES]), forward);
        let state = control.snapshot();
        assert_eq!((state.asleep, state.paused_by), (false, None));
    }
}

#[test]
fn a_load_of_the_trainers_own_counts_and_leaves_the_version_unknown() {
    let mut control = control(1, false);
    round(&mut control, 1, "sleep", &[Value::from(2)], &[NIL]);
    round(&mut control, 2, "wake_up", &tags(&["weights"]), &[NO]);
    round(&mut control, 3, "collective_rpc", &[Value::from("start_weight_update")], &[NIL]);
    assert!(control.snapshot().without_weights, "nothing was loaded yet");
    round(&mut control, 4, "collective_rpc", &[Value::from("update_weights_from_ipc")], &[NIL]);
    assert!(!control.snapshot().without_weights);
    assert_eq!(round(&mut control, 5, "wake_up", &[], &[YES]), [Verdict::Forward]);
    let state = control.snapshot();
    assert!(!state.asleep && state.external_weights && state.paused_by.is_none(), "{state:?}");
}

#[test]
fn a_sleep_that_fails_on_a_rank_is_taken_for_the_worse() {
    let mut control = control(2, false);
    round(&mut control, 1, "sleep", &[Value::from(2)], &[NIL, Err("CUDA".to_owned())]);
    let grant = granted(&mut control, 1, false);
    for memory in grant.memory.values() {
        assert_eq!((memory.weights, memory.weights_sleep), (Weights::Gone, true));
    }
    assert_eq!(grant.paused_by, Some(PausedBy::Frontend { id: FrontendId(1) }));
}

#[test]
fn a_memory_that_is_found_at_a_start_counts_as_much() {
    let mut control = Control::new([EngineIndex(0)], GroupKind::Independent);
    let memory = Memory { weights: Weights::Gone, weights_sleep: false, cache_sleeps: true };
    control.handle_event(at(0), Event::EngineUp { rank: EngineIndex(0), memory });
    let state = control.snapshot();
    assert!(state.asleep && state.without_weights && state.external_weights, "{state:?}");
    let refused = round(&mut control, 1, "wake_up", &[], &[YES]);
    assert!(refusal(&refused[0]).contains("discarded"), "{refused:?}");
}

#[test]
fn an_engine_that_has_started_again_waits_for_those_that_still_sleep() {
    let mut control = control(2, false);
    round(&mut control, 1, "sleep", &[Value::from(1)], &[NIL, NIL]);
    control.handle_event(at(2), Event::EngineDown { rank: EngineIndex(1), reason: "killed".to_owned() });
    control.handle_event(at(3), up(1));
    let pauses = actions(&mut control);
    let Some(Action::Call { operation, .. }) =
        pauses.iter().find(|action| matches!(action, Action::Call { .. }))
    else {
        panic!("it is not paused: {pauses:?}");
    };
    let (rank, operation) = (EngineIndex(1), *operation);
    control.handle_event(at(4), Event::CallAnswered { rank, operation, result: NIL });
    let partial = round(&mut control, 2, "wake_up", &tags(&["weights"]), &[NO, YES]);
    assert_eq!(partial, [Verdict::Forward, Verdict::Answer(Value::Boolean(false))]);
    let whole = round(&mut control, 3, "wake_up", &[], &[YES, YES]);
    assert_eq!(whole, [Verdict::Forward, Verdict::Forward]);
    assert!(!control.snapshot().asleep);
}

#[test]
fn engines_without_weights_stay_asleep_when_their_frontend_does_not_come_back() {
    for (level, calls) in [(1, 2), (2, 0)] {
        let mut control = control(2, true);
        round(&mut control, 1, "sleep", &[Value::from(level)], &[NIL, NIL]);
        if level == 2 {
            round(&mut control, 2, "wake_up", &tags(&["weights"]), &[NO, NO]);
        }
        control.handle_event(at(5), Event::FrontendGone { frontend: FrontendId(1) });
        control.handle_timeout(at(5 + 31_000));
        let actions = actions(&mut control);
        let woken = actions.iter().filter(|action| matches!(action, Action::Call { method: "wake_up", .. }));
        assert_eq!(woken.count(), calls, "{actions:?}");
        assert_eq!(control.poll_timeout().is_some(), calls > 0, "nothing is tried again");
        assert!(control.snapshot().asleep);
    }
}
