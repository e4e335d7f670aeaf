//! Seeded simulation: the machine that runs, in front of modelled engines that are slow, refuse, hang, lie and die at
//! every point, nodes that come and go and do not see what they should, work that is lost, and a leader that dies and
//! is started again at every point. One `u64` decides everything. What must hold are the [`Law`]s.

mod engines;
mod leader;
mod plan;
mod work;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::PausedBy;
use crate::machine::control::Grant;
use crate::machine::memory::{self, Memory};
use crate::machine::mutation::{self, Mutation};

use super::updates::{Action, Ask, Conclusion, Engines, Event, RunId, Seen, Staging, Ticket, Updates};
use super::{Action as Step, Event as Answer, *};

const SEEDS: u64 = 20_000;

/// What must hold whatever happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Law {
    /// An engine that serves holds the committed weights.
    OneVersion,
    /// An engine whose version is not in doubt holds the committed weights.
    ReportsAreTrue,
    /// Torn weights do not serve, and are not resumed.
    NothingTornServes,
    /// Only a paused engine is loaded.
    LoadedWhilePaused,
    /// Nothing is loaded into memory that sleeps, and no engine is resumed of which a part does.
    MemoryIsThere,
    /// A lockstep engine that is resumed was paused.
    LockstepInStep,
    /// Pauses do not clear caches.
    CachesAreResetExplicitly,
    /// A cache is used with the weights it was computed with.
    CachesMatchWeights,
    /// A response has tokens of one version, unless `keep` was asked for.
    ResponsesAreNotMixed,
    /// The record, the machine's version and the journal say the same.
    RecordFollowsJournal,
    /// What ends without a load has loaded nothing.
    RefusalsTouchNothing,
    /// No engine that serves is left paused, or in a barrier.
    NothingStaysPaused,
    /// No gate of an engine that serves is left closed.
    GatesOpen,
    /// One update at a time.
    OneAtATime,
    /// The same name gives the same record.
    RepeatsAreAnswered,
    EveryUpdateEnds,
    /// Every restore and adoption is answered, once.
    EveryEngineIsAnswered,
    /// It comes to rest, with nothing open in the ledger.
    ComesToRest,
}

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
    /// As its rank's task reports it.
    memory: Memory,
    paused: bool,
    /// Pause calls that are not answered yet: whose, which, how.
    pausing: Vec<(Caller, Call, PauseMode)>,
    /// Resume call in the lockstep barrier.
    resuming: Option<(Caller, Call)>,
    /// What came while it was in the barrier.
    inbox: VecDeque<(Caller, Step)>,
    /// Version on its outputs.
    stamp: String,
    /// A running request: the weights its tokens came from.
    request: Option<BTreeSet<String>>,
    /// Whose keys and values the prefix cache holds.
    cache: Option<String>,
    hung: bool,
    /// It does nothing else until then.
    loads_until: Time,
    /// Scheduled to be started again.
    restarting: bool,
}

impl Engine {
    /// As it comes up: with the start-up checkpoint.
    fn new(incarnation: u64) -> Self {
        Self {
            incarnation,
            alive: true,
            admitted: false,
            weights: Weights::Whole("start".to_owned()),
            memory: Memory::default(),
            paused: false,
            pausing: Vec::new(),
            resuming: None,
            inbox: VecDeque::new(),
            stamp: "default".to_owned(),
            request: None,
            cache: None,
            hung: false,
            loads_until: Time::ZERO,
            restarting: false,
        }
    }
}

/// Who waits for an answer: a life of the leader (0: nobody), and one of its runs.
type Caller = (u64, RunId);

#[derive(Clone, Debug)]
enum Happening {
    /// A rank, if it is one, answers to a step of a run.
    Answer(Option<usize>, Caller, Answer),
    /// One life of the leader hears this.
    Event(u64, Event),
    /// Work that the leader has begun takes effect.
    Work(u64, Box<Action>),
    /// A call reaches an engine.
    Arrives(usize, Caller, Step),
    Drained(usize, u64),
    /// With the weights before.
    LoadEnds(usize, Caller, Step, Weights),
    Step(usize),
    Dies(usize, u64),
    Restart(usize),
    Asked(Box<Ask>),
    OperatorAbort,
    FrontendResumes,
    ControllerDies,
    LeaderDies,
    LeaderStarts,
    Adopt(Vec<usize>),
    Cut(u16),
    Heal(u16),
    Mounted(u16),
}

struct World {
    rng: ChaCha8Rng,
    now: Time,
    seq: u64,
    queue: BTreeMap<(Time, u64), Happening>,
    machine: Updates,
    lockstep: bool,
    engines: Vec<Engine>,
    /// When the last message to each engine arrives.
    links: Vec<Time>,
    nodes: u16,
    /// Open gates, by rank.
    gates: Vec<bool>,
    journal: Option<Committed>,
    ledger: Ledger,
    /// When the last ledger is written: they are written in order.
    disk: Time,
    /// A ledger was not written.
    unwritten: bool,
    /// Which life of the leader this is.
    epoch: u64,
    leader: bool,
    /// How likely it is to die before any one action.
    frailty: f64,
    /// Nodes that the leader does not reach.
    away: BTreeSet<u16>,
    /// Nodes that do not find the directory of the committed weights.
    blind: BTreeSet<u16>,
    /// Fences that could not be told.
    fences_due: BTreeSet<(usize, u64)>,
    /// Gates that could not be opened yet: the link says it again.
    gates_due: BTreeSet<usize>,
    /// What the leader was told of each rank.
    seen: Vec<Seen>,
    external: bool,
    paused_before: bool,
    /// What the leader was told of the two before.
    control_seen: (bool, bool),
    faults: bool,
    /// Which model the command line names.
    model: String,
    /// The state directory was lost: what engines that are not taken over yet hold is unknown.
    state_lost: bool,
    /// The journal has a commit that the leader was never told of: it says, and restores, what was before.
    commit_unknown: bool,
    /// Restores and adoptions that are not answered; whether it is an adoption.
    tickets: BTreeMap<Ticket, (Engines, bool)>,
    next_ticket: u64,
    /// Updates that were taken and have not ended.
    open: BTreeSet<RunId>,
    concluding: Option<Box<Conclusion>>,
    done: BTreeMap<UpdateId, Vec<Record>>,
    /// Recoveries: back, forward.
    recovered: [u64; 2],
    refused: u64,
    joined: u64,
    forgotten: u64,
    states_lost: u64,
    lost: u64,
    log: Vec<String>,
    broken: Option<(Law, String)>,
}

fn config(lockstep: bool) -> Config {
    Config {
        kind: GroupKind::of(lockstep),
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
        ..Checkpoint::default()
    }
}

fn index(rank: usize) -> EngineIndex {
    EngineIndex(u16::try_from(rank).unwrap())
}

impl World {
    fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        mutation::set(mutation);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let lockstep = rng.random_bool(0.5);
        let nodes = rng.random_range(1..=2u16);
        let size = usize::from(nodes) * rng.random_range(1..=3);
        let faults = rng.random_bool(0.7);
        let frailty = if rng.random_bool(0.4) { 0.01 } else { 0.0 };
        let mut world = Self {
            machine: Updates::new(config(lockstep), BTreeMap::new(), None, Ledger::default()),
            rng,
            now: Time::ZERO,
            seq: 0,
            queue: BTreeMap::new(),
            lockstep,
            engines: vec![Engine { alive: false, ..Engine::new(0) }; size],
            links: vec![Time::ZERO; size],
            nodes,
            gates: vec![true; size],
            journal: None,
            ledger: Ledger::default(),
            disk: Time::ZERO,
            unwritten: false,
            epoch: 0,
            leader: false,
            frailty,
            away: BTreeSet::new(),
            blind: BTreeSet::new(),
            fences_due: BTreeSet::new(),
            gates_due: BTreeSet::new(),
            seen: vec![Seen::default(); size],
            external: false,
            paused_before: false,
            control_seen: (false, false),
            faults,
            model: "start".to_owned(),
            state_lost: false,
            commit_unknown: false,
            tickets: BTreeMap::new(),
            next_ticket: 0,
            open: BTreeSet::new(),
            concluding: None,
            done: BTreeMap::new(),
            recovered: [0, 0],
            refused: 0,
            joined: 0,
            forgotten: 0,
            states_lost: 0,
            lost: 0,
            log: Vec::new(),
            broken: None,
        };
        world.leader_starts();
        world
    }

    fn chance(&mut self, p: f64) -> bool {
        self.rng.random_bool(p)
    }

    fn fault(&mut self, p: f64) -> bool {
        self.faults && self.rng.random_bool(p)
    }

    fn after(&mut self, max_ms: u64, happening: Happening) {
        let ms = self.rng.random_range(0..=max_ms);
        self.at(self.now + Duration::from_millis(ms), happening);
    }

    fn at(&mut self, at: Time, happening: Happening) {
        self.seq += 1;
        self.queue.insert((at, self.seq), happening);
    }

    /// Messages to one engine arrive in the order they were sent.
    fn send(&mut self, rank: usize, happening: Happening) {
        let delay = Duration::from_millis(self.rng.random_range(0..=200));
        let at = (self.now + delay).max(self.links[rank]);
        self.links[rank] = at;
        self.at(at, happening);
    }

    fn law(&mut self, law: Law, holds: bool, text: impl FnOnce() -> String) {
        if !holds && self.broken.is_none() {
            self.broken = Some((law, text()));
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
    fn answer(&mut self, rank: Option<usize>, caller: Caller, max_ms: u64, event: Answer) {
        self.after(max_ms, Happening::Answer(rank, caller, event));
    }

    fn is_away(&self, rank: usize) -> bool {
        self.away.contains(&self.node_of(rank).0)
    }

    /// What every engine is to hold.
    fn committed(&self) -> Checkpoint {
        self.journal.as_ref().map_or_else(|| checkpoint("start"), |c| c.commit.checkpoint.clone())
    }

    /// The checkpoint of the version that the leader reports: what is written and not yet answered does not count.
    fn said(&self) -> String {
        let committed = self.machine.committed().map(|committed| committed.commit.checkpoint.path.clone());
        committed.unwrap_or_else(|| "start".to_owned())
    }

    /// What engines must hold.
    fn in_force(&self) -> String {
        if self.commit_unknown { self.said() } else { self.committed().path }
    }

    fn version(&self) -> WeightVersion {
        self.journal.as_ref().map(|committed| committed.commit.version.clone()).unwrap_or_default()
    }

    // --- the machine ---

    fn tell(&mut self, event: Event) {
        if self.leader {
            self.show();
            self.machine.handle_event(self.now, event);
            self.perform();
        }
    }

    /// Tells the leader what it sees by itself.
    fn show(&mut self) {
        for rank in 0..self.engines.len() {
            let engine = &self.engines[rank];
            let seen = Seen {
                incarnation: Incarnation(engine.incarnation),
                admitted: engine.alive && engine.admitted,
                memory: engine.memory,
            };
            if !self.is_away(rank) && self.seen[rank] != seen {
                self.seen[rank] = seen;
                self.machine.handle_event(self.now, Event::RankSeen { rank: index(rank), seen });
            }
        }
        if self.control_seen != (self.paused_before, self.external) {
            self.control_seen = (self.paused_before, self.external);
            let by = PausedBy::Frontend { id: crate::FrontendId(1) };
            let pause = self.paused_before.then_some(Pause { by });
            let seen = Event::ControlSeen { pause, external_weights: self.external };
            self.machine.handle_event(self.now, seen);
        }
    }

    fn perform(&mut self) {
        while self.leader
            && let Some(action) = self.machine.poll_action()
        {
            if self.log.len() < 2_000 && !matches!(&action, Action::Step { action: Step::Progress, .. }) {
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
}

fn run(seed: u64, mutation: Option<Mutation>) -> World {
    let mut world = World::new(seed, mutation);
    world.run();
    world
}

#[test]
fn all_admitted_engines_hold_one_version_whatever_fails_when() {
    let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
    let (mut recovered, mut forgotten, mut states_lost, mut joined, mut lost) = ([0, 0], 0, 0, 0, 0);
    let mut updated_asleep = 0;
    for seed in 0..SEEDS {
        let world = run(seed, None);
        if let Some((law, broken)) = &world.broken {
            panic!("seed {seed}: {law:?}: {broken}\n{}", world.log.join("\n"));
        }
        for (all, here) in recovered.iter_mut().zip(world.recovered) {
            *all += here;
        }
        states_lost += world.states_lost;
        (forgotten, joined, lost) = (forgotten + world.forgotten, joined + world.joined, lost + world.lost);
        for record in world.done.values().flatten() {
            updated_asleep += u64::from(record.left_asleep && record.committed);
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
    assert!(states_lost > 200 && updated_asleep > 200, "{states_lost} {updated_asleep}");
    assert!(forgotten > 200 && joined > 200 && lost > 2_000, "{forgotten} {joined} {lost}");
}

#[test]
fn each_fault_put_into_the_machine_breaks_the_law_that_forbids_it() {
    for (mutation, law) in [
        (Mutation::SkipCommitRecord, Law::RecordFollowsJournal),
        (Mutation::ResumeBeforeAllAcks, Law::NothingTornServes),
        (Mutation::ForgetOneRankInPause, Law::LoadedWhilePaused),
        (Mutation::RollBackFailedRanksOnly, Law::OneVersion),
        (Mutation::TrustFences, Law::OneVersion),
        (Mutation::SkipBegunRecord, Law::ReportsAreTrue),
        (Mutation::RecoverWithoutReload, Law::OneVersion),
        (Mutation::DropJobLost, Law::EveryUpdateEnds),
        (Mutation::KeepFailedRestores, Law::EveryUpdateEnds),
        (Mutation::ForgetPerJob, Law::ReportsAreTrue),
        (Mutation::TrustStamps, Law::OneVersion),
        (Mutation::TrustPaused, Law::NothingStaysPaused),
        (Mutation::NeverInDoubt, Law::ReportsAreTrue),
        (Mutation::UpdateAsleep, Law::MemoryIsThere),
        (Mutation::RecoverAsleep, Law::MemoryIsThere),
    ] {
        let mut broken = BTreeMap::new();
        let caught = (0..SEEDS).any(|seed| {
            let found = run(seed, Some(mutation)).broken;
            if let Some((law, _)) = &found {
                *broken.entry(*law).or_insert(0) += 1;
            }
            found.is_some_and(|(found, _)| found == law)
        });
        assert!(caught, "{mutation:?} does not break {law:?}, but {broken:?}");
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
