//! Seeded simulation: the machine in front of modelled engines that are slow, refuse, hang, lie and die
//! at every point, a leader that dies and is started again at every point, and nodes that come and go. One `u64` decides everything.

mod engines;
mod leader;
mod plan;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
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
    /// Pause calls that are not answered yet: whose, which, how.
    pausing: Vec<(u64, u32, PauseMode)>,
    /// Resume call in the lockstep barrier.
    resuming: Option<(u64, u32)>,
    /// What came while it was in the barrier.
    inbox: VecDeque<(u64, Action)>,
    /// Version on its outputs.
    stamp: String,
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
    /// From a rank, if any, for one life of the leader.
    Answer(Option<usize>, u64, Event),
    /// A call of one life of the leader reaches an engine.
    Arrives(usize, u64, Action),
    Drained(usize, u64),
    /// Of the leader's life; the weights before.
    LoadEnds(usize, u64, Action, Weights),
    Step(usize),
    Dies(usize, u64),
    Restart(usize),
    Begin(Box<Begin>),
    OperatorAbort,
    FrontendResumes,
    ControllerDies,
    LeaderDies,
    LeaderStarts,
    Adopt(Vec<(usize, u64)>),
    Cut(u16),
    Heal(u16),
    BegunLands(Box<Begun>, bool),
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
    ledger: Ledger,
    /// Which life of the leader this is.
    epoch: u64,
    leader: bool,
    /// How likely it is to die before any one action.
    frailty: f64,
    /// Ranks that the leader counts as in service.
    lives: BTreeSet<usize>,
    /// Nodes that the leader does not reach.
    away: BTreeSet<u16>,
    /// Fences that could not be told.
    fences_due: BTreeSet<(usize, u64)>,
    external: bool,
    paused_before: bool,
    faults: bool,
    done: BTreeMap<UpdateId, Vec<Record>>,
    /// Engines to be taken over when the running update has ended.
    waiting: Vec<(usize, u64)>,
    /// An update that was committed is asked for again.
    repeating: bool,
    /// Recoveries: back, forward.
    recovered: [u64; 2],
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
        extents: Vec::new(),
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
            source: "start".to_owned(),
            ..Commit::default()
        };
        let engine = Engine {
            incarnation: 1,
            alive: true,
            admitted: true,
            weights: Weights::Whole("start".to_owned()),
            paused: false,
            pausing: Vec::new(),
            resuming: None,
            inbox: VecDeque::new(),
            stamp: "default".to_owned(),
            request: None,
            cache: None,
            hung: false,
            restarting: false,
        };
        let faults = rng.random_bool(0.7);
        let frailty = if rng.random_bool(0.4) { 0.01 } else { 0.0 };
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
            ledger: Ledger::default(),
            epoch: 1,
            leader: true,
            frailty,
            lives: (0..size).collect(),
            away: BTreeSet::new(),
            fences_due: BTreeSet::new(),
            external: false,
            paused_before: false,
            faults,
            done: BTreeMap::new(),
            waiting: Vec::new(),
            repeating: false,
            recovered: [0, 0],
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

    /// Something of the engine at `rank`, or of the leader itself, comes back to the leader that asked.
    fn answer(&mut self, rank: Option<usize>, epoch: u64, max_ms: u64, event: Event) {
        self.after(max_ms, Happening::Answer(rank, epoch, event));
    }

    fn is_away(&self, rank: usize) -> bool {
        self.away.contains(&self.node_of(rank).0)
    }

    // --- the machine ---

    fn tell(&mut self, event: Event) {
        if self.leader {
            self.machine.handle_event(self.now, event);
            self.perform();
        }
    }

    fn perform(&mut self) {
        while self.leader
            && let Some(action) = self.machine.poll_action()
        {
            let logged = !matches!(action, Action::Progress | Action::Done(_));
            if self.log.len() < 2_000 && logged {
                self.log.push(format!("{:?} {action:?}", self.now));
            }
            if self.frailty > 0.0 && self.chance(self.frailty) {
                self.leader_dies();
                return;
            }
            self.act(action);
        }
        self.check();
    }

    fn act(&mut self, action: Action) {
        let epoch = self.epoch;
        match action {
            Action::Stage { node, source } => {
                if self.fault(0.05) || (self.away.contains(&node.0) && self.chance(0.5)) {
                    return; // never answers
                }
                let event = if self.fault(0.1) || self.away.contains(&node.0) {
                    Event::StageFailed { node, error: "missing tensor".to_owned() }
                } else {
                    let mut new = checkpoint(&source);
                    if self.fault(0.02) {
                        new.digest = Some("other".to_owned());
                    }
                    let previous = Some(self.journal.checkpoint.clone());
                    let gone = self.fault(0.03);
                    Event::Staged { node, new, previous: previous.filter(|_| !gone) }
                };
                self.answer(None, epoch, 3_000, event);
            }
            Action::WriteBegun { begun } => {
                let fails = self.fault(0.03);
                if self.fault(0.01) {
                    return;
                }
                self.after(50, Happening::BegunLands(begun, !fails));
            }
            Action::CloseAdmission => {
                self.gate_open = false;
                if self.fault(0.02) {
                    return;
                }
                let event = if self.fault(0.02) {
                    Event::AdmissionFailed { error: "no".to_owned() }
                } else {
                    Event::AdmissionClosed
                };
                self.answer(None, epoch, 20, event);
            }
            Action::WriteCommit { commit } => {
                let fails = self.fault(0.05);
                if self.fault(0.02) {
                    return; // the disk hangs, nothing is ever written
                }
                self.after(50, Happening::CommitLands(commit, !fails));
            }
            Action::Pause { rank, .. }
            | Action::Load { rank, .. }
            | Action::SetVersion { rank, .. }
            | Action::ResetCaches { rank, .. }
            | Action::Resume { rank, .. } => self.call(usize::from(rank.0), action),
            Action::OpenAdmission => self.gate_open = true,
            Action::Fence { rank, incarnation, .. } => {
                let at = usize::from(rank.0);
                self.lives.remove(&at);
                if self.is_away(at) {
                    self.fences_due.insert((at, incarnation.0));
                    return;
                }
                if self.engines[at].incarnation == incarnation.0 {
                    self.stop(at);
                }
                self.answer(Some(at), epoch, 20, Event::Fenced { rank, incarnation });
            }
            Action::Progress => {}
            Action::Refuse { .. } => self.refused += 1,
            Action::Done(record) => self.ended(*record),
        }
    }

    fn ended(&mut self, record: Record) {
        let id = record.id.clone();
        self.log.push(format!("{:?} done {id} {:?} {:?}", self.now, record.outcome, record.error));
        if let Some(earlier) = self.done.get(&id).and_then(|records| records.last())
            && earlier.committed
        {
            let same = *earlier == record || record.recovered || earlier.recovered;
            self.law(same, || format!("{id} gave another record the second time"));
            return;
        }
        if self.repeating {
            return; // by a client that had not heard of its end
        }
        // The journal is written in order.
        self.queue.retain(|_, happening| !matches!(happening, Happening::BegunLands(..)));
        self.ledger.end(&record);
        if record.recovered {
            self.recovered[usize::from(record.committed)] += 1;
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
        self.law(version == current || hanging, || format!("machine says {version}, journal {current}"));
        self.law(self.gate_open, || format!("{id}: admission left closed"));
        if matches!(record.outcome, Outcome::Aborted | Outcome::RefusedInvalid) {
            self.law(!record.ranks.values().any(|rank| rank.load_ms.is_some()), || {
                format!("{id}: {:?} after loads", record.outcome)
            });
        }
        if committed {
            self.external = false;
            self.journal_record = Some(record.clone());
        } else if record.ranks.values().any(|rank| rank.rollback_ms.is_some()) {
            self.external = false;
        }
        // No engine is left between paused and running.
        for (rank, state) in &record.ranks {
            let rank = usize::from(rank.0);
            let engine = &self.engines[rank];
            let gone = matches!(state.state, RankState::Fenced | RankState::Lost) || self.is_away(rank);
            if !engine.alive || !engine.admitted || engine.hung || gone {
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
            self.after(1_000, Happening::FrontendResumes);
        }
        // A node that is reached again is looked at anew.
        let adopt: Vec<(usize, u64)> = std::mem::take(&mut self.waiting);
        if !adopt.is_empty() {
            self.after(10, Happening::Adopt(adopt));
        }
        self.done.entry(id).or_default().push(record);
        for rank in 0..self.engines.len() {
            if !self.engines[rank].admitted {
                self.schedule_restart(rank);
            }
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
    let mut recovered = [0, 0];
    for seed in 0..SEEDS {
        let world = run(seed, None);
        if let Some(broken) = &world.broken {
            panic!("seed {seed}: {broken}\n{}", world.log.join("\n"));
        }
        for (all, here) in recovered.iter_mut().zip(world.recovered) {
            *all += here;
        }
        for record in world.done.values().flatten() {
            let kind = format!("{:?}", record.outcome);
            let kind = kind.split(' ').next().unwrap_or_default().to_owned();
            *outcomes.entry(kind).or_default() += 1;
        }
    }
    // A simulation that never gets anywhere proves nothing.
    for kind in ["Committed", "RefusedInvalid", "Aborted", "RolledBack", "Degraded"] {
        assert!(outcomes.get(kind).copied().unwrap_or_default() > 200, "{outcomes:?}");
    }
    assert!(recovered.iter().all(|recovered| *recovered > 200), "{recovered:?}");
}

#[test]
fn each_fault_put_into_the_machine_is_noticed_by_the_simulation() {
    for mutation in [
        Mutation::SkipCommitRecord,
        Mutation::ResumeBeforeAllAcks,
        Mutation::ForgetOneRankInPause,
        Mutation::RollBackFailedRanksOnly,
        Mutation::TrustFences,
        Mutation::SkipBegunRecord,
        Mutation::RecoverWithoutReload,
    ] {
        let caught = (0..SEEDS).find(|seed| run(*seed, Some(mutation)).broken.is_some());
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
