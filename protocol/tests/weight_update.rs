//! The update transaction, step by step. What happens under all other circumstances is the business of
//! the simulation (`src/machine/weight_update/simulation.rs`).

use std::collections::BTreeMap;
use std::time::Duration;

use dp_sidecar_protocol::machine::weight_update::{
    Action, Begin, Call, Checkpoint, Config, Event, NodeId, Outcome, Participant, PauseMode, Phase, Record,
    Refusal, Target, WeightUpdate, WorkerReport, WorkerState,
};
use dp_sidecar_protocol::{EngineIndex, GroupKind, Incarnation, Time, UpdateId, WeightVersion};

const LIFE: Incarnation = Incarnation(1);

fn machine(lockstep: bool) -> WeightUpdate {
    let config = Config { kind: GroupKind::of(lockstep), ..Config::default() };
    WeightUpdate::new(config, WeightVersion::default(), None)
}

fn begin(id: &str) -> Begin {
    let participant = Participant { incarnation: LIFE, node: NodeId(0) };
    Begin {
        id: UpdateId(id.to_owned()),
        from_version: None,
        to_version: WeightVersion("v1".to_owned()),
        source: "/new".to_owned(),
        mode: PauseMode::Wait,
        pause_deadline: Duration::from_secs(30),
        participants: (0..2).map(|rank| (EngineIndex(rank), participant)).collect(),
        paused_before: false,
        asleep: false,
        external_weights: false,
        forward_only: false,
    }
}

fn checkpoint(path: &str) -> Checkpoint {
    Checkpoint {
        path: path.to_owned(),
        files: vec!["model.safetensors".to_owned()],
        tensors: 3,
        bytes: 30,
        digest: Some(format!("digest of {path}")),
        ..Checkpoint::default()
    }
}

fn good(path: &str) -> WorkerReport {
    WorkerReport {
        ok: true,
        state: WorkerState::Loaded,
        tensors: 3,
        bytes: 30,
        digest: Some(format!("digest of {path}")),
        ..WorkerReport::default()
    }
}

fn at(ms: u64) -> Time {
    Time::from_millis(ms)
}

/// Actions by short name and rank; without progress.
fn names(machine: &mut WeightUpdate) -> Vec<String> {
    actions(machine)
        .iter()
        .filter_map(|action| {
            Some(match action {
                Action::Stage { node, .. } => format!("stage {node}"),
                Action::WriteBegun { begun } => format!("begun {}", begun.id),
                Action::CloseAdmission => "close".to_owned(),
                Action::Pause { call, mode, .. } => format!("pause {} {mode}", call.rank),
                Action::Load { call, checkpoint, .. } => format!("load {} {}", call.rank, checkpoint.path),
                Action::WriteCommit { commit } => format!("commit {}", commit.version),
                Action::SetVersion { call, .. } => format!("version {}", call.rank),
                Action::ResetCaches { call, reset_running_requests } => {
                    format!("reset {} {reset_running_requests}", call.rank)
                }
                Action::Resume { call } => format!("resume {}", call.rank),
                Action::OpenAdmission => "open".to_owned(),
                Action::Fence { rank, .. } => format!("fence {rank}"),
                Action::Refuse { .. } => "refuse".to_owned(),
                Action::Done(record) => format!("done {:?}", record.outcome),
                Action::Progress => return None,
            })
        })
        .collect()
}

fn actions(machine: &mut WeightUpdate) -> Vec<Action> {
    std::iter::from_fn(|| machine.poll_action()).collect()
}

fn record(machine: &mut WeightUpdate) -> Record {
    let done = actions(machine).into_iter().find_map(|action| match action {
        Action::Done(record) => Some(*record),
        _ => None,
    });
    done.expect("the update has ended")
}

fn stage(machine: &mut WeightUpdate, now: Time) {
    let staged =
        Event::Staged { node: NodeId(0), new: checkpoint("/new"), previous: Some(checkpoint("/old")) };
    machine.handle_event(now, staged);
    machine.handle_event(now, Event::BegunWritten { result: Ok(()) });
}

fn call(rank: u16, attempt: u32) -> Call {
    Call { rank: EngineIndex(rank), incarnation: LIFE, attempt }
}

fn paused(machine: &mut WeightUpdate, now: Time, rank: u16, attempt: u32) {
    let event = Event::Paused { call: call(rank, attempt), result: Ok(()) };
    machine.handle_event(now, event);
}

fn loaded(machine: &mut WeightUpdate, now: Time, rank: u16, target: Target, workers: Vec<WorkerReport>) {
    let event = Event::Loaded { call: call(rank, 1), target, result: Ok(workers) };
    machine.handle_event(now, event);
}

fn reset(machine: &mut WeightUpdate, now: Time, rank: u16, attempt: u32, done: bool) {
    let event = Event::CachesReset { call: call(rank, attempt), result: Ok(done) };
    machine.handle_event(now, event);
}

fn stamped(machine: &mut WeightUpdate, now: Time, rank: u16) {
    let event = Event::VersionSet { call: call(rank, 1), result: Ok(true) };
    machine.handle_event(now, event);
}

fn resumed(machine: &mut WeightUpdate, now: Time, rank: u16) {
    let event = Event::Resumed { call: call(rank, 1), result: Ok(()) };
    machine.handle_event(now, event);
}

/// Up to the point where both ranks load.
fn until_loading(machine: &mut WeightUpdate, update: Begin) {
    machine.handle_event(at(0), Event::Begin(update));
    stage(machine, at(100));
    machine.handle_event(at(110), Event::AdmissionClosed);
    paused(machine, at(200), 0, 1);
    paused(machine, at(210), 1, 1);
    assert_eq!(machine.snapshot().phase, Phase::Loading);
    actions(machine);
}

fn until_committed(machine: &mut WeightUpdate, update: Begin) {
    until_loading(machine, update);
    for rank in [0, 1] {
        loaded(machine, at(300), rank, Target::New, vec![good("/new")]);
    }
    machine.handle_event(at(310), Event::CommitWritten { result: Ok(None) });
    actions(machine);
}

fn to_the_end(machine: &mut WeightUpdate) -> Record {
    for rank in [0, 1] {
        stamped(machine, at(320), rank);
        reset(machine, at(320), rank, 1, true);
    }
    for rank in [0, 1] {
        resumed(machine, at(330), rank);
    }
    record(machine)
}

#[test]
fn an_update_goes_through_its_phases_in_order() {
    let mut machine = machine(true);
    machine.handle_event(at(0), Event::Begin(begin("u1")));
    assert_eq!(names(&mut machine), ["stage 0"]);
    stage(&mut machine, at(100));
    assert_eq!(names(&mut machine), ["begun u1", "close"]);
    machine.handle_event(at(110), Event::AdmissionClosed);
    assert_eq!(names(&mut machine), ["pause 0 wait", "pause 1 wait"]);
    paused(&mut machine, at(200), 0, 1);
    assert_eq!(names(&mut machine), [""; 0]);
    paused(&mut machine, at(210), 1, 1);
    assert_eq!(names(&mut machine), ["load 0 /new", "load 1 /new"]);
    loaded(&mut machine, at(300), 1, Target::New, vec![good("/new")]);
    assert_eq!(names(&mut machine), [""; 0]);
    loaded(&mut machine, at(310), 0, Target::New, vec![good("/new")]);
    assert_eq!(names(&mut machine), ["commit v1"]);
    assert_eq!(machine.snapshot().version.0, "default");
    machine.handle_event(at(320), Event::CommitWritten { result: Ok(None) });
    assert_eq!(machine.snapshot().version.0, "v1");
    assert_eq!(names(&mut machine), ["version 0", "version 1", "reset 0 false", "reset 1 false"]);
    for rank in [0, 1] {
        stamped(&mut machine, at(330), rank);
        reset(&mut machine, at(330), rank, 1, true);
    }
    assert_eq!(names(&mut machine), ["resume 0", "resume 1"]);
    resumed(&mut machine, at(340), 1);
    resumed(&mut machine, at(350), 0);
    let record = record(&mut machine);
    assert_eq!(record.outcome, Outcome::Committed);
    assert_eq!(record.paused_ms, Some(240));
    assert_eq!(record.phases[&Phase::Pausing], 100);
    assert_eq!(record.phases[&Phase::Loading], 100);
    assert_eq!(record.ranks[&EngineIndex(1)].times.pause_ms, Some(100));
    assert_eq!(machine.poll_timeout(), None);
}

#[test]
fn a_bad_directory_touches_no_engine() {
    let mut machine = machine(false);
    machine.handle_event(at(0), Event::Begin(begin("u1")));
    actions(&mut machine);
    let failed = Event::StageFailed { node: NodeId(0), error: "tensor a.weight is missing".to_owned() };
    machine.handle_event(at(5), failed);
    let all = actions(&mut machine);
    assert!(all.iter().all(|action| matches!(action, Action::Progress | Action::Done(_))));
    let Some(Action::Done(record)) = all.last() else { panic!("{all:?}") };
    assert_eq!(record.outcome, Outcome::RefusedInvalid);
    assert_eq!(record.error.as_deref(), Some("tensor a.weight is missing"));
}

#[test]
fn when_the_pause_deadline_passes_all_ranks_are_paused_with_abort() {
    let mut machine = machine(true);
    machine.handle_event(at(0), Event::Begin(begin("u1")));
    stage(&mut machine, at(0));
    machine.handle_event(at(0), Event::AdmissionClosed);
    actions(&mut machine);
    paused(&mut machine, at(10), 0, 1);
    assert_eq!(machine.poll_timeout(), Some(at(30_000)));
    machine.handle_timeout(at(30_000));
    assert_eq!(names(&mut machine), ["pause 0 abort", "pause 1 abort"]);
    // The answer to the first pause is not enough: the second is still in flight.
    paused(&mut machine, at(30_010), 1, 1);
    paused(&mut machine, at(30_020), 0, 2);
    assert_eq!(names(&mut machine), [""; 0]);
    paused(&mut machine, at(30_030), 1, 2);
    assert_eq!(names(&mut machine), ["load 0 /new", "load 1 /new"]);
}

#[test]
fn a_load_that_fails_on_one_rank_takes_all_touched_ranks_back_and_names_rank_and_worker() {
    let mut machine = machine(false);
    until_loading(&mut machine, begin("u1"));
    let torn = WorkerReport {
        rank: 3,
        state: WorkerState::RestoredMeta,
        error: Some("boom".to_owned()),
        error_kind: Some("injected".to_owned()),
        ..WorkerReport::default()
    };
    loaded(&mut machine, at(300), 1, Target::New, vec![good("/new"), torn]);
    assert_eq!(names(&mut machine), [""; 0], "a load in flight cannot be overtaken");
    loaded(&mut machine, at(310), 0, Target::New, vec![good("/new")]);
    assert_eq!(names(&mut machine), ["load 0 /old", "load 1 /old"]);
    for rank in [0, 1] {
        loaded(&mut machine, at(400), rank, Target::Previous, vec![good("/old")]);
    }
    assert_eq!(names(&mut machine), ["reset 0 false", "reset 1 false"]);
    for rank in [0, 1] {
        reset(&mut machine, at(410), rank, 1, true);
    }
    assert_eq!(names(&mut machine), ["resume 0", "resume 1"]);
    for rank in [0, 1] {
        resumed(&mut machine, at(420), rank);
    }
    let record = record(&mut machine);
    assert_eq!(record.outcome, Outcome::RolledBack);
    assert_eq!(record.error.as_deref(), Some("rank 1: worker 3: load failed (injected): boom"));
    assert_eq!(machine.snapshot().version.0, "default");
}

#[test]
fn ranks_that_were_not_touched_are_not_loaded_again() {
    let mut machine = machine(false);
    until_loading(&mut machine, begin("u1"));
    let refused = WorkerReport {
        state: WorkerState::Unchanged,
        error_kind: Some("files".to_owned()),
        ..WorkerReport::default()
    };
    for rank in [0, 1] {
        loaded(&mut machine, at(300), rank, Target::New, vec![refused.clone()]);
    }
    assert_eq!(names(&mut machine), ["resume 0", "resume 1"]);
}

#[test]
fn a_worker_that_consumed_something_else_has_not_loaded() {
    let mut machine = machine(false);
    until_loading(&mut machine, begin("u1"));
    let short = WorkerReport { tensors: 2, ..good("/new") };
    loaded(&mut machine, at(300), 0, Target::New, vec![short]);
    loaded(&mut machine, at(300), 1, Target::New, vec![good("/new")]);
    assert_eq!(names(&mut machine), ["load 0 /old", "load 1 /old"]);
}

#[test]
fn an_independent_rank_whose_rollback_fails_is_fenced_and_only_that_one() {
    let mut machine = machine(false);
    until_loading(&mut machine, begin("u1"));
    loaded(&mut machine, at(300), 0, Target::New, vec![good("/new")]);
    loaded(&mut machine, at(300), 1, Target::New, Vec::new());
    actions(&mut machine);
    loaded(&mut machine, at(400), 1, Target::Previous, Vec::new());
    assert_eq!(names(&mut machine), ["fence 1"]);
    loaded(&mut machine, at(410), 0, Target::Previous, vec![good("/old")]);
    reset(&mut machine, at(420), 0, 1, true);
    resumed(&mut machine, at(430), 0);
    let names = names(&mut machine);
    assert!(!names.contains(&"resume 1".to_owned()), "{names:?}");
    assert_eq!(names.last().map(String::as_str), Some("done Degraded { fenced: [EngineIndex(1)] }"));
}

#[test]
fn a_lockstep_group_is_fenced_as_one() {
    let mut machine = machine(true);
    until_loading(&mut machine, begin("u1"));
    loaded(&mut machine, at(300), 0, Target::New, vec![good("/new")]);
    loaded(&mut machine, at(300), 1, Target::New, Vec::new());
    actions(&mut machine);
    loaded(&mut machine, at(400), 1, Target::Previous, Vec::new());
    let names = names(&mut machine);
    assert_eq!(names[..3], ["fence 0", "fence 1", "open"]);
    assert_eq!(names[3], "done Degraded { fenced: [EngineIndex(0), EngineIndex(1)] }");
}

fn lost(rank: u16) -> Event {
    Event::EngineLost { rank: EngineIndex(rank), incarnation: LIFE, reason: "killed".to_owned() }
}

#[test]
fn an_independent_engine_that_is_lost_does_not_hold_up_the_others() {
    let mut machine = machine(false);
    until_loading(&mut machine, begin("u1"));
    machine.handle_event(at(300), lost(1));
    loaded(&mut machine, at(310), 0, Target::New, vec![good("/new")]);
    assert_eq!(names(&mut machine), ["commit v1"]);
}

#[test]
fn a_lockstep_group_that_loses_an_engine_before_the_commit_stays_at_the_old_version() {
    let mut machine = machine(true);
    until_loading(&mut machine, begin("u1"));
    machine.handle_event(at(300), lost(1));
    let record = record(&mut machine);
    assert_eq!(record.outcome, Outcome::RolledBack);
    assert_eq!(machine.snapshot().version.0, "default");
}

#[test]
fn a_lockstep_group_that_loses_an_engine_after_the_commit_goes_on_to_the_new_version() {
    let mut machine = machine(true);
    until_committed(&mut machine, begin("u1"));
    machine.handle_event(at(320), lost(0));
    let record = record(&mut machine);
    assert_eq!(record.outcome, Outcome::Committed);
    assert_eq!(machine.snapshot().version.0, "v1");
}

#[test]
fn the_same_id_after_success_gives_the_same_record() {
    let mut machine = machine(false);
    until_committed(&mut machine, begin("u1"));
    let first = to_the_end(&mut machine);
    machine.handle_event(at(9_000), Event::Begin(begin("u1")));
    assert_eq!(record(&mut machine), first);
    let other = Begin { source: "/other".to_owned(), ..begin("u1") };
    machine.handle_event(at(9_001), Event::Begin(other));
    let all = actions(&mut machine);
    assert!(matches!(&all[0], Action::Refuse { refusal: Refusal::IdUsed { .. }, .. }));
}

#[test]
fn another_update_is_refused_with_the_name_of_the_running_one() {
    let mut machine = machine(false);
    until_loading(&mut machine, begin("u1"));
    machine.handle_event(at(300), Event::Begin(begin("u2")));
    let all = actions(&mut machine);
    let Action::Refuse { refusal, .. } = &all[0] else { panic!("{all:?}") };
    assert_eq!(refusal.to_string(), "update u1 is running (loading)");
}

#[test]
fn a_wrong_from_version_is_refused() {
    let mut machine = machine(false);
    let update = Begin { from_version: Some(WeightVersion("v7".to_owned())), ..begin("u1") };
    machine.handle_event(at(0), Event::Begin(update));
    let all = actions(&mut machine);
    assert!(matches!(&all[..], [Action::Refuse { refusal: Refusal::WrongVersion { .. }, .. }]));
}

#[test]
fn caches_that_are_not_reset_are_reset_with_running_requests_and_then_the_rank_is_fenced() {
    let mut machine = machine(false);
    until_committed(&mut machine, begin("u1"));
    reset(&mut machine, at(320), 0, 1, false);
    assert_eq!(names(&mut machine), ["reset 0 true"]);
    reset(&mut machine, at(330), 0, 2, false);
    assert_eq!(names(&mut machine), ["fence 0"]);
}

#[test]
fn engines_that_somebody_had_paused_stay_paused() {
    let mut machine = machine(true);
    let update = Begin { paused_before: true, ..begin("u1") };
    until_committed(&mut machine, update);
    for rank in [0, 1] {
        stamped(&mut machine, at(320), rank);
        reset(&mut machine, at(320), rank, 1, true);
    }
    let record = record(&mut machine);
    assert_eq!(record.outcome, Outcome::Committed);
    assert!(record.left_paused);
}

#[test]
fn keep_says_in_the_record_that_responses_may_mix() {
    let mut machine = machine(false);
    let update = Begin { mode: PauseMode::Keep, ..begin("u1") };
    until_committed(&mut machine, update);
    assert!(to_the_end(&mut machine).may_mix_versions);
}

#[test]
fn an_operators_abort_while_loading_leads_back_and_after_the_commit_is_ignored() {
    let mut machine = machine(false);
    until_loading(&mut machine, begin("u1"));
    machine.handle_event(at(290), Event::Abort);
    for rank in [0, 1] {
        loaded(&mut machine, at(300), rank, Target::New, vec![good("/new")]);
    }
    assert_eq!(names(&mut machine), ["load 0 /old", "load 1 /old"]);

    let mut machine = self::machine(false);
    until_committed(&mut machine, begin("u2"));
    machine.handle_event(at(315), Event::Abort);
    assert_eq!(to_the_end(&mut machine).outcome, Outcome::Committed);
}

#[test]
fn a_record_survives_json() {
    let mut machine = machine(false);
    until_committed(&mut machine, begin("u1"));
    let record = to_the_end(&mut machine);
    let text = serde_json::to_string(&record).expect("encodes");
    let back: Record = serde_json::from_str(&text).expect("decodes");
    assert_eq!(back, record);
    assert_eq!(back.ranks.len(), 2);
    let phases: &BTreeMap<Phase, u64> = &back.phases;
    assert!(phases.contains_key(&Phase::Committing));
}

#[test]
fn a_commit_record_that_may_not_survive_a_crash_is_told() {
    let mut machine = machine(true);
    until_loading(&mut machine, begin("u1"));
    for rank in [0, 1] {
        loaded(&mut machine, at(300), rank, Target::New, vec![good("/new")]);
    }
    machine.handle_event(at(310), Event::CommitWritten { result: Ok(Some("fsync: EIO".to_owned())) });
    actions(&mut machine);
    let record = to_the_end(&mut machine);
    assert_eq!(record.outcome, Outcome::Committed);
    let told =
        |warning: &String| warning.contains("a crash of the leader's machine") && warning.contains("EIO");
    assert!(record.warnings.iter().any(told), "{:?}", record.warnings);
}
