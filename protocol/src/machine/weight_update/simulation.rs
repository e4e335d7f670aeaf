//! Seeded simulation: the machine in front of modelled engines that are slow, refuse, hang, lie and die
//! at every point, and a controller that dies too. One `u64` decides everything.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const SEEDS: u64 = 20_000;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Weights {
    Whole(String),
    Torn,
}

#[derive(Clone, Debug)]
struct Engine {
    incarnation: u64,
    alive: bool,
    /// Admitted by the node: requests may reach it. False from a fence or a loss until restored.
    admitted: bool,
    weights: Weights,
    paused: bool,
    /// Pause calls that are not answered yet, with their mode.
    pausing: Vec<(u32, PauseMode)>,
    /// Resume call in the lockstep barrier.
    resuming: Option<u32>,
    /// A running request: the weights its tokens came from.
    request: Option<BTreeSet<String>>,
    /// Whose keys and values the prefix cache holds.
    cache: Option<String>,
    hung: bool,
    /// Scheduled to be started again.
    restarting: bool,
}

#[derive(Clone, Debug)]
enum Happening {
    Answer(Event),
    PauseArrives(usize, u64, u32, PauseMode),
    Drained(usize, u64),
    LoadEnds(usize, u64, Target, Checkpoint),
    ResumeArrives(usize, u64, u32),
    Step(usize),
    Dies(usize, u64),
    Restart(usize),
    Begin(Box<Begin>),
    OperatorAbort,
    ControllerDies,
    CommitLands(Commit, bool),
}

struct World {
    rng: ChaCha8Rng,
    now: Time,
    seq: u64,
    queue: BTreeMap<(Time, u64), Happening>,
    machine: WeightUpdate,
    mutation: Option<Mutation>,
    lockstep: bool,
    engines: Vec<Engine>,
    /// When the last message to each engine arrives.
    links: Vec<Time>,
    nodes: u16,
    gate_open: bool,
    journal: Commit,
    journal_record: Option<Record>,
    external: bool,
    paused_before: bool,
    faults: bool,
    done: BTreeMap<UpdateId, Vec<Record>>,
    refused: u64,
    log: Vec<String>,
    broken: Option<String>,
}

fn config(lockstep: bool) -> Config {
    Config {
        lockstep,
        stage_timeout: Duration::from_secs(20),
        admission_timeout: Duration::from_secs(2),
        abort_pause_timeout: Duration::from_secs(5),
        load_timeout: Duration::from_secs(30),
        commit_timeout: Duration::from_secs(5),
        resume_timeout: Duration::from_secs(10),
    }
}

fn checkpoint(source: &str) -> Checkpoint {
    Checkpoint {
        path: source.to_owned(),
        files: vec!["model.safetensors".to_owned()],
        tensors: 7,
        bytes: 700,
        digest: Some(format!("digest of {source}")),
    }
}

impl World {
    fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let lockstep = rng.random_bool(0.5);
        let nodes = rng.random_range(1..=2u16);
        let size = usize::from(nodes) * rng.random_range(1..=3);
        let journal = Commit {
            id: UpdateId("none".to_owned()),
            version: WeightVersion::default(),
            checkpoint: checkpoint("start"),
        };
        let engine = Engine {
            incarnation: 1,
            alive: true,
            admitted: true,
            weights: Weights::Whole("start".to_owned()),
            paused: false,
            pausing: Vec::new(),
            resuming: None,
            request: None,
            cache: None,
            hung: false,
            restarting: false,
        };
        let faults = rng.random_bool(0.7);
        let mut machine = WeightUpdate::new(config(lockstep), WeightVersion::default(), None);
        machine.mutation = mutation;
        Self {
            rng,
            now: Time::ZERO,
            seq: 0,
            queue: BTreeMap::new(),
            machine,
            mutation,
            lockstep,
            engines: vec![engine; size],
            links: vec![Time::ZERO; size],
            nodes,
            gate_open: true,
            journal,
            journal_record: None,
            external: false,
            paused_before: false,
            faults,
            done: BTreeMap::new(),
            refused: 0,
            log: Vec::new(),
            broken: None,
        }
    }

    fn chance(&mut self, p: f64) -> bool {
        self.rng.random_bool(p)
    }

    fn fault(&mut self, p: f64) -> bool {
        self.faults && self.rng.random_bool(p)
    }

    fn after(&mut self, max_ms: u64, happening: Happening) {
        let ms = self.rng.random_range(0..=max_ms);
        let at = self.now + Duration::from_millis(ms);
        self.seq += 1;
        self.queue.insert((at, self.seq), happening);
    }

    /// Messages to one engine arrive in the order they were sent.
    fn send(&mut self, rank: usize, happening: Happening) {
        let delay = Duration::from_millis(self.rng.random_range(0..=200));
        let at = (self.now + delay).max(self.links[rank]);
        self.links[rank] = at;
        self.seq += 1;
        self.queue.insert((at, self.seq), happening);
    }

    fn law(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds && self.broken.is_none() {
            self.broken = Some(text());
        }
    }

    /// The engine at `rank`, if this life of it can still act.
    fn living(&self, rank: usize, incarnation: u64) -> bool {
        let engine = &self.engines[rank];
        engine.alive && engine.incarnation == incarnation && !engine.hung
    }

    fn node_of(&self, rank: usize) -> NodeId {
        NodeId(u16::try_from(rank).unwrap() % self.nodes)
    }

    // --- the machine ---

    fn tell(&mut self, event: Event) {
        self.machine.handle_event(self.now, event);
        self.perform();
    }

    fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            let logged = !matches!(action, Action::Progress | Action::Done(_));
            if self.log.len() < 2_000 && logged {
                self.log.push(format!("{:?} {action:?}", self.now));
            }
            self.act(action);
        }
        self.check();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Stage { node, source } => {
                if self.fault(0.05) {
                    return; // never answers
                }
                let event = if self.fault(0.1) {
                    Event::StageFailed {
                        node,
                        error: "missing tensor".to_owned(),
                    }
                } else {
                    let mut new = checkpoint(&source);
                    if self.fault(0.02) {
                        new.digest = Some("other".to_owned());
                    }
                    let previous = Some(self.journal.checkpoint.clone());
                    let gone = self.fault(0.03);
                    Event::Staged {
                        node,
                        new,
                        previous: previous.filter(|_| !gone),
                    }
                };
                self.after(3_000, Happening::Answer(event));
            }
            Action::CloseAdmission => {
                self.gate_open = false;
                if self.fault(0.02) {
                    return;
                }
                let event = if self.fault(0.02) {
                    Event::AdmissionFailed {
                        error: "no".to_owned(),
                    }
                } else {
                    Event::AdmissionClosed
                };
                self.after(20, Happening::Answer(event));
            }
            Action::Pause {
                rank,
                incarnation,
                attempt,
                mode,
                clear_cache,
            } => {
                self.law(!clear_cache, || "pause asked to clear caches".to_owned());
                let rank = usize::from(rank.0);
                self.send(
                    rank,
                    Happening::PauseArrives(rank, incarnation.0, attempt, mode),
                );
            }
            Action::Load {
                rank,
                incarnation,
                target,
                checkpoint,
            } => {
                let rank = usize::from(rank.0);
                if self.living(rank, incarnation.0) {
                    let mixing = !self.engines[rank].paused;
                    self.law(!mixing, || {
                        format!("rank {rank} is loaded while it is not paused")
                    });
                }
                self.after(
                    4_000,
                    Happening::LoadEnds(rank, incarnation.0, target, checkpoint),
                );
            }
            Action::WriteCommit { commit } => {
                let fails = self.fault(0.05);
                if self.fault(0.02) {
                    return; // the disk hangs, nothing is ever written
                }
                self.after(50, Happening::CommitLands(commit, !fails));
            }
            Action::SetVersion {
                rank, incarnation, ..
            } => {
                if self.fault(0.01) {
                    self.engines[usize::from(rank.0)].hung = true;
                }
                if self.living(usize::from(rank.0), incarnation.0) {
                    let result = if self.fault(0.1) {
                        Err("no such method".to_owned())
                    } else {
                        Ok(())
                    };
                    let event = Event::VersionSet {
                        rank,
                        incarnation,
                        result,
                    };
                    self.after(50, Happening::Answer(event));
                }
            }
            Action::ResetCaches {
                rank,
                incarnation,
                attempt,
                reset_running_requests,
            } => {
                let at = usize::from(rank.0);
                if !self.living(at, incarnation.0) {
                    return;
                }
                let result = if self.fault(0.03) {
                    Err("broken".to_owned())
                } else if self.fault(0.03)
                    || (self.engines[at].request.is_some() && !reset_running_requests)
                {
                    Ok(false)
                } else {
                    self.engines[at].cache = None;
                    Ok(true)
                };
                let event = Event::CachesReset {
                    rank,
                    incarnation,
                    attempt,
                    result,
                };
                self.after(50, Happening::Answer(event));
            }
            Action::Resume {
                rank,
                incarnation,
                attempt,
            } => {
                let rank = usize::from(rank.0);
                self.send(rank, Happening::ResumeArrives(rank, incarnation.0, attempt));
            }
            Action::OpenAdmission => self.gate_open = true,
            Action::Fence {
                rank, incarnation, ..
            } => {
                let at = usize::from(rank.0);
                if self.engines[at].incarnation == incarnation.0 {
                    self.stop(at);
                }
            }
            Action::Progress => {}
            Action::Refuse { .. } => self.refused += 1,
            Action::Done(record) => self.ended(*record),
        }
    }

    fn ended(&mut self, record: Record) {
        let id = record.id.clone();
        self.log.push(format!(
            "{:?} done {id} {:?} {:?}",
            self.now, record.outcome, record.error
        ));
        if let Some(earlier) = self.done.get(&id).and_then(|records| records.last())
            && earlier.committed
        {
            let same = *earlier == record;
            self.law(same, || format!("{id} gave another record the second time"));
            return;
        }
        let in_journal = self.journal.id == id;
        let committed = record.committed;
        let hanging = record.error.as_deref().is_some_and(|error| {
            error.starts_with("commit record was not written") // what the journal holds is unknown
        });
        self.law(committed == in_journal || hanging, || {
            format!("{id}: committed is {committed}, in the journal {in_journal}")
        });
        let version = self.machine.snapshot().version;
        let current = self.journal.version.clone();
        self.law(version == current || hanging, || {
            format!("machine says {version}, journal {current}")
        });
        self.law(self.gate_open, || format!("{id}: admission left closed"));
        if matches!(record.outcome, Outcome::Aborted | Outcome::RefusedInvalid) {
            self.law(
                !record.ranks.values().any(|rank| rank.load_ms.is_some()),
                || format!("{id}: {:?} after loads", record.outcome),
            );
        }
        if committed {
            self.external = false;
            self.journal_record = Some(record.clone());
        } else if record.ranks.values().any(|rank| rank.rollback_ms.is_some()) {
            self.external = false;
        }
        // No engine is left between paused and running.
        for rank in 0..self.engines.len() {
            let engine = &self.engines[rank];
            if !engine.alive || !engine.admitted || engine.hung {
                continue;
            }
            let left = engine.paused && !record.left_paused;
            let in_barrier = engine.resuming.is_some();
            let lost_pause = record.left_paused && !engine.paused;
            self.law(!left && !in_barrier && !lost_pause, || {
                format!("{id}: rank {rank} left paused={left} barrier={in_barrier} unpaused={lost_pause}")
            });
        }
        if self.paused_before {
            self.paused_before = false;
            for engine in self.engines.iter_mut().filter(|engine| engine.alive) {
                engine.paused = false;
                engine.pausing.clear();
            }
        }
        self.done.entry(id).or_default().push(record);
        for rank in 0..self.engines.len() {
            if !self.engines[rank].admitted {
                self.schedule_restart(rank);
            }
        }
    }

    // --- engines ---

    fn stop(&mut self, rank: usize) {
        let engine = &mut self.engines[rank];
        engine.alive = false;
        engine.admitted = false;
        engine.request = None;
        engine.pausing.clear();
        engine.resuming = None;
        self.schedule_restart(rank);
    }

    fn schedule_restart(&mut self, rank: usize) {
        if !self.engines[rank].restarting {
            self.engines[rank].restarting = true;
            self.after(8_000, Happening::Restart(rank));
        }
    }

    /// The node brings a new engine up: with the committed weights, and not while an update runs.
    fn restart(&mut self, rank: usize) {
        self.engines[rank].restarting = false;
        if self.engines[rank].admitted {
            return;
        }
        if self.machine.snapshot().running.is_some() {
            return; // `ended` schedules it again
        }
        let group: Vec<usize> = if self.lockstep {
            (0..self.engines.len()).collect()
        } else {
            vec![rank]
        };
        for member in group {
            let weights = Weights::Whole(self.journal.checkpoint.path.clone());
            let engine = &mut self.engines[member];
            *engine = Engine {
                incarnation: engine.incarnation + 1,
                alive: true,
                admitted: true,
                weights,
                paused: false,
                pausing: Vec::new(),
                resuming: None,
                request: None,
                cache: None,
                hung: false,
                restarting: false,
            };
        }
        if self.lockstep {
            self.external = false;
        }
    }

    fn dies(&mut self, rank: usize, incarnation: u64) {
        if !self.engines[rank].alive || self.engines[rank].incarnation != incarnation {
            return;
        }
        self.stop(rank);
        let lost = |rank: usize, incarnation: u64| Event::EngineLost {
            rank: EngineIndex(u16::try_from(rank).unwrap()),
            incarnation: Incarnation(incarnation),
            reason: "killed".to_owned(),
        };
        if self.lockstep {
            for peer in 0..self.engines.len() {
                let life = self.engines[peer].incarnation;
                if peer != rank && self.engines[peer].alive {
                    // Its next collective fails; until then it does not step.
                    self.engines[peer].hung = true;
                    self.engines[peer].admitted = false;
                    self.after(1_500, Happening::Dies(peer, life));
                }
            }
        }
        self.tell(lost(rank, incarnation));
    }

    fn pause_arrives(&mut self, rank: usize, incarnation: u64, attempt: u32, mode: PauseMode) {
        if !self.living(rank, incarnation) {
            return;
        }
        if self.fault(0.01) {
            self.engines[rank].hung = true;
            return;
        }
        if self.fault(0.02) {
            let event = Event::Paused {
                rank: EngineIndex(u16::try_from(rank).unwrap()),
                incarnation: Incarnation(incarnation),
                attempt,
                result: Err("no".to_owned()),
            };
            self.after(50, Happening::Answer(event));
            return;
        }
        let engine = &mut self.engines[rank];
        engine.pausing.push((attempt, mode));
        match mode {
            PauseMode::Abort => engine.request = None,
            PauseMode::Keep => {
                engine.paused = true;
                // Frozen requests may mix versions: forget what they have so far.
                engine.request = engine.request.take().map(|_| BTreeSet::new());
            }
            PauseMode::Wait => {}
        }
        let drain = if mode == PauseMode::Wait { 6_000 } else { 300 };
        self.after(drain, Happening::Drained(rank, incarnation));
    }

    fn drained(&mut self, rank: usize, incarnation: u64) {
        if !self.living(rank, incarnation) || self.engines[rank].pausing.is_empty() {
            return;
        }
        let ready = |engine: &Engine| !engine.pausing.is_empty() || engine.paused;
        if self.lockstep && !self.engines.iter().all(|e| e.alive && !e.hung && ready(e)) {
            // Dummy batches until all ranks have the pause.
            self.after(200, Happening::Drained(rank, incarnation));
            return;
        }
        let engine = &mut self.engines[rank];
        let keep = engine
            .pausing
            .iter()
            .all(|(_, mode)| *mode == PauseMode::Keep);
        if !keep {
            let finished = engine.request.take();
            self.response(finished);
        }
        let engine = &mut self.engines[rank];
        engine.paused = true;
        for (attempt, _) in std::mem::take(&mut engine.pausing) {
            let event = Event::Paused {
                rank: EngineIndex(u16::try_from(rank).unwrap()),
                incarnation: Incarnation(incarnation),
                attempt,
                result: Ok(()),
            };
            self.after(20, Happening::Answer(event));
        }
    }

    fn load_ends(&mut self, rank: usize, incarnation: u64, target: Target, wanted: Checkpoint) {
        if !self.living(rank, incarnation) {
            return;
        }
        let report = |ok: bool, state: WorkerState, digest: Option<String>| WorkerReport {
            ok,
            state,
            tensors: wanted.tensors,
            bytes: wanted.bytes,
            digest,
            error: (!ok).then(|| "injected".to_owned()),
            ..WorkerReport::default()
        };
        let good = report(true, WorkerState::Loaded, wanted.digest.clone());
        let mut weights = Weights::Whole(wanted.path.clone());
        let rate = if target == Target::New { 0.06 } else { 0.03 };
        let result = if self.fault(rate) {
            match self.rng.random_range(0..5) {
                0 => {
                    weights = self.engines[rank].weights.clone();
                    Ok(vec![report(false, WorkerState::Unchanged, None)])
                }
                1 => {
                    weights = Weights::Torn;
                    Ok(vec![good, report(false, WorkerState::RestoredMeta, None)])
                }
                2 => {
                    weights = Weights::Torn;
                    Ok(vec![report(
                        true,
                        WorkerState::Loaded,
                        Some("liar".to_owned()),
                    )])
                }
                3 => {
                    weights = Weights::Torn;
                    Err("worker failed".to_owned())
                }
                _ => {
                    self.engines[rank].weights = Weights::Torn;
                    self.engines[rank].hung = true;
                    return;
                }
            }
        } else {
            Ok(vec![good])
        };
        self.engines[rank].weights = weights;
        let event = Event::Loaded {
            rank: EngineIndex(u16::try_from(rank).unwrap()),
            incarnation: Incarnation(incarnation),
            target,
            result,
        };
        self.after(20, Happening::Answer(event));
    }

    fn resume_arrives(&mut self, rank: usize, incarnation: u64, attempt: u32) {
        if !self.living(rank, incarnation) {
            return;
        }
        let index = EngineIndex(u16::try_from(rank).unwrap());
        let answer = |rank: EngineIndex, incarnation: u64, attempt, result| Event::Resumed {
            rank,
            incarnation: Incarnation(incarnation),
            attempt,
            result,
        };
        let torn = self.engines[rank].weights == Weights::Torn;
        self.law(!torn, || format!("rank {rank} is resumed while torn"));
        let fails = self.fault(0.02) || (self.lockstep && !self.engines[rank].pausing.is_empty());
        if fails {
            let event = answer(index, incarnation, attempt, Err("in flight".to_owned()));
            self.after(20, Happening::Answer(event));
            return;
        }
        if !self.lockstep {
            self.engines[rank].paused = false;
            self.engines[rank].pausing.clear();
            let event = answer(index, incarnation, attempt, Ok(()));
            self.after(20, Happening::Answer(event));
            return;
        }
        let paused = self.engines[rank].paused;
        self.law(paused, || {
            format!("lockstep rank {rank} is resumed, but was not paused")
        });
        self.engines[rank].resuming = Some(attempt);
        if self.engines.iter().all(|engine| engine.resuming.is_some()) {
            for at in 0..self.engines.len() {
                let engine = &mut self.engines[at];
                engine.paused = false;
                let attempt = engine.resuming.take().unwrap();
                let life = engine.incarnation;
                let rank = EngineIndex(u16::try_from(at).unwrap());
                let event = answer(rank, life, attempt, Ok(()));
                self.after(20, Happening::Answer(event));
            }
        }
    }

    /// An engine makes a step: begins, goes on with or ends a request.
    fn step(&mut self, rank: usize) {
        let engine = &self.engines[rank];
        if !engine.alive || !engine.admitted || engine.hung || engine.paused {
            return;
        }
        let Weights::Whole(weights) = engine.weights.clone() else {
            self.law(false, || format!("rank {rank} steps with torn weights"));
            return;
        };
        let begins = self.gate_open && engine.pausing.is_empty();
        if let Some(cache) = engine.cache.clone()
            && cache != weights
            && !self.external
        {
            self.law(false, || {
                format!("rank {rank} serves {weights} with the cache of {cache}")
            });
        }
        let ends = self.chance(0.3);
        let engine = &mut self.engines[rank];
        engine.cache = Some(weights.clone());
        if engine.request.is_none() && begins {
            engine.request = Some(BTreeSet::new());
        }
        if let Some(request) = &mut engine.request {
            request.insert(weights);
        }
        if ends {
            let finished = self.engines[rank].request.take();
            self.response(finished);
        }
    }

    fn response(&mut self, versions: Option<BTreeSet<String>>) {
        let mixed = versions.is_some_and(|versions| versions.len() > 1);
        self.law(!mixed, || {
            "a response mixes weights without keep".to_owned()
        });
    }

    /// What holds at every moment.
    fn check(&mut self) {
        if self.external {
            return;
        }
        let committed = self.journal.checkpoint.path.clone();
        let wrong = self.engines.iter().position(|engine| {
            engine.alive
                && engine.admitted
                && !engine.hung
                && !engine.paused
                && engine.weights != Weights::Whole(committed.clone())
        });
        if let Some(rank) = wrong {
            let holds = self.engines[rank].weights.clone();
            self.law(false, || {
                format!("rank {rank} serves {holds:?}, committed is {committed}")
            });
        }
    }

    // --- the plan ---

    fn begin(&mut self, begin: Begin) {
        let idle = self.machine.snapshot().running.is_none();
        let serving: BTreeMap<_, _> = self
            .engines
            .iter()
            .enumerate()
            .filter(|(_, engine)| engine.alive && engine.admitted)
            .map(|(rank, engine)| {
                let participant = Participant {
                    incarnation: Incarnation(engine.incarnation),
                    node: self.node_of(rank),
                };
                (EngineIndex(u16::try_from(rank).unwrap()), participant)
            })
            .collect();
        let repeated = self
            .done
            .get(&begin.id)
            .is_some_and(|records| records.iter().any(|record| record.committed))
            || self.journal.id == begin.id;
        if self.lockstep && serving.len() < self.engines.len() && idle && !repeated {
            return; // the driver refuses: the group is not complete
        }
        let mut begin = begin;
        begin.participants = serving;
        begin.external_weights = self.external;
        if idle && !repeated && !begin.participants.is_empty() {
            let quiet = !self.engines.iter().any(|engine| engine.hung);
            if quiet && self.chance(0.1) {
                // A frontend had paused all ranks.
                begin.paused_before = true;
                self.paused_before = true;
                for engine in self.engines.iter_mut().filter(|engine| engine.alive) {
                    engine.paused = true;
                    engine.request = None;
                }
            }
            if self.chance(0.05) {
                begin.external_weights = true;
                begin.from_version = None;
                self.external = true;
                for engine in self.engines.iter_mut().filter(|engine| engine.alive) {
                    engine.weights = Weights::Whole("external".to_owned());
                    engine.request = None;
                    engine.cache = None;
                }
            }
        }
        let before = self.refused;
        self.tell(Event::Begin(begin));
        if !idle {
            let refused = self.refused > before;
            self.law(refused, || "a second update was taken".to_owned());
        }
    }

    fn plan(&mut self) {
        let updates = self.rng.random_range(1..=3u64);
        let modes = [PauseMode::Wait, PauseMode::Abort, PauseMode::Keep];
        for n in 0..updates {
            let mode = modes[self.rng.random_range(0..3)];
            let begin = Begin {
                id: UpdateId(format!("u{n}")),
                from_version: None,
                to_version: WeightVersion(format!("v{n}")),
                source: format!("dir{n}"),
                mode,
                pause_deadline: Duration::from_millis(self.rng.random_range(10..5_000)),
                participants: BTreeMap::new(),
                paused_before: false,
                external_weights: false,
            };
            let begin = Box::new(begin);
            let at = self.now + Duration::from_secs(n * 200);
            self.seq += 1;
            self.queue
                .insert((at, self.seq), Happening::Begin(begin.clone()));
            if self.chance(0.3) {
                let at = at + Duration::from_millis(self.rng.random_range(0..190_000));
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::Begin(begin));
            }
            for _ in 0..2 {
                if self.fault(0.35) {
                    let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                    let rank = self.rng.random_range(0..self.engines.len());
                    self.seq += 1;
                    self.queue
                        .insert((at, self.seq), Happening::Dies(rank, u64::MAX));
                }
            }
            if self.chance(0.1) {
                let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::OperatorAbort);
            }
            if self.fault(0.1) {
                let at = at + Duration::from_millis(self.rng.random_range(0..12_000));
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::ControllerDies);
            }
            for _ in 0..30 {
                let at = at + Duration::from_millis(self.rng.random_range(0..15_000));
                let rank = self.rng.random_range(0..self.engines.len());
                self.seq += 1;
                self.queue.insert((at, self.seq), Happening::Step(rank));
            }
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Answer(event) => self.tell(event),
            Happening::PauseArrives(rank, life, attempt, mode) => {
                self.pause_arrives(rank, life, attempt, mode);
            }
            Happening::Drained(rank, life) => self.drained(rank, life),
            Happening::LoadEnds(rank, life, target, wanted) => {
                self.load_ends(rank, life, target, wanted);
            }
            Happening::ResumeArrives(rank, life, attempt) => {
                self.resume_arrives(rank, life, attempt);
            }
            Happening::Step(rank) => self.step(rank),
            Happening::Dies(rank, life) => {
                let life = if life == u64::MAX {
                    self.engines[rank].incarnation
                } else {
                    life
                };
                self.dies(rank, life);
            }
            Happening::Restart(rank) => self.restart(rank),
            Happening::Begin(begin) => self.begin(*begin),
            Happening::OperatorAbort => self.tell(Event::Abort),
            Happening::ControllerDies => {
                // Its engines are stopped with it (by the keeper, when the grace is over), and start
                // again by the journal. Answers of the old life reach nobody.
                self.queue
                    .retain(|_, happening| matches!(happening, Happening::Begin(_)));
                let last = self
                    .journal_record
                    .clone()
                    .filter(|record| record.id == self.journal.id)
                    .unwrap_or_else(|| Record::of_commit(&self.journal));
                self.machine = WeightUpdate::new(
                    config(self.lockstep),
                    self.journal.version.clone(),
                    Some(last),
                );
                self.machine.mutation = self.mutation;
                self.gate_open = true;
                self.external = false;
                self.paused_before = false;
                for rank in 0..self.engines.len() {
                    self.engines[rank].admitted = false;
                    self.engines[rank].restarting = false;
                    self.restart(rank);
                }
            }
            Happening::CommitLands(commit, written) => {
                let result = if written {
                    self.journal = commit;
                    Ok(())
                } else {
                    Err("disk full".to_owned())
                };
                self.tell(Event::CommitWritten { result });
            }
        }
        self.check();
    }

    fn run(&mut self) {
        self.plan();
        for _ in 0..5_000 {
            if self.broken.is_some() {
                return;
            }
            let due = self.machine.poll_timeout();
            let next = self.queue.first_key_value().map(|(key, _)| *key);
            match (due, next) {
                (Some(due), next) if next.is_none_or(|(at, _)| due <= at) => {
                    self.now = self.now.max(due);
                    self.machine.handle_timeout(self.now);
                    self.perform();
                }
                (_, Some(key)) => {
                    let Some(happening) = self.queue.remove(&key) else {
                        return;
                    };
                    self.now = key.0;
                    self.happen(happening);
                }
                (_, None) => {
                    self.quiet();
                    return;
                }
            }
        }
        self.law(false, || "it does not come to rest".to_owned());
    }

    /// Nothing is going to happen any more.
    fn quiet(&mut self) {
        let running = self.machine.snapshot().running;
        self.law(running.is_none(), || format!("{running:?} never ended"));
        if self.external {
            return;
        }
        let committed = Weights::Whole(self.journal.checkpoint.path.clone());
        for rank in 0..self.engines.len() {
            let engine = &self.engines[rank];
            if !engine.admitted || engine.hung {
                continue;
            }
            let holds = engine.weights.clone();
            self.law(holds == committed, || {
                format!("at the end rank {rank} holds {holds:?}, committed is {committed:?}")
            });
        }
    }
}

fn run(seed: u64, mutation: Option<Mutation>) -> World {
    let mut world = World::new(seed, mutation);
    world.run();
    world
}

#[test]
fn all_admitted_engines_hold_one_version_whatever_fails_when() {
    let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
    for seed in 0..SEEDS {
        let world = run(seed, None);
        if let Some(broken) = &world.broken {
            panic!("seed {seed}: {broken}\n{}", world.log.join("\n"));
        }
        for record in world.done.values().flatten() {
            let kind = format!("{:?}", record.outcome);
            let kind = kind.split(' ').next().unwrap_or_default().to_owned();
            *outcomes.entry(kind).or_default() += 1;
        }
    }
    // A simulation that never gets anywhere proves nothing.
    for kind in [
        "Committed",
        "RefusedInvalid",
        "Aborted",
        "RolledBack",
        "Degraded",
    ] {
        assert!(
            outcomes.get(kind).copied().unwrap_or_default() > 200,
            "{outcomes:?}"
        );
    }
}

#[test]
fn each_fault_put_into_the_machine_is_noticed_by_the_simulation() {
    for mutation in [
        Mutation::SkipCommitRecord,
        Mutation::ResumeBeforeAllAcks,
        Mutation::ForgetOneRankInPause,
        Mutation::RollBackFailedRanksOnly,
        Mutation::RollBackAtFirstFailure,
    ] {
        let caught = (0..2_000).find(|seed| run(*seed, Some(mutation)).broken.is_some());
        assert!(caught.is_some(), "{mutation:?} goes unnoticed");
    }
}

/// `SIM_SEED=50 cargo test -p dp-sidecar-protocol one_seed -- --nocapture` prints what happens there.
#[test]
fn one_seed_can_be_replayed_with_its_log() {
    let seed = std::env::var("SIM_SEED").ok().and_then(|s| s.parse().ok());
    let world = run(seed.unwrap_or(1), None);
    if seed.is_some() {
        println!("{}", world.log.join("\n"));
    }
    assert_eq!(world.log, run(seed.unwrap_or(1), None).log);
    assert_eq!(world.broken, None);
}
