//! The world: machines, engines, frontends, the sidecar's other tasks as far as they matter, links
//! with delays, and faults.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use dp_sidecar_protocol::machine::coordinator::{Config, Coordinator, Event, Report};
use dp_sidecar_protocol::machine::mutation::{self, Mutation};
use dp_sidecar_protocol::{EngineIndex, FrontendId, GroupKind, Incarnation, Time, Wave};

use super::engine_model::{Engine, Input, Output, Phase, RequestId, Version};
use super::frontend_model::{Frontend, layout};
pub(crate) use checks::law;

#[path = "checks.rs"]
mod checks;
#[path = "edges.rs"]
mod edges;
#[path = "faults.rs"]
mod faults;
#[path = "machine.rs"]
mod machine;
#[path = "schedule.rs"]
mod schedule;

use schedule::{Rng, Scheduled};

/// After this long without an end the run is judged as it stands.
const HORIZON: u64 = 20_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    /// As in vLLM: frontends talk to engines and to the DP coordinator.
    Stock,
    /// Through the sidecar: each frontend has a DP coordinator of its own; engines can be replaced.
    Hosted,
}

#[derive(Debug)]
enum Happening {
    /// Something from outside, see [`World::outside`].
    Outside,
    ToEngine {
        rank: u16,
        life: u64,
        input: Input,
    },
    /// From the DP coordinator of that session through an edge.
    Published {
        rank: u16,
        session: u64,
        life: u64,
        input: Input,
    },
    /// Where the DP coordinator of that session says the wave is.
    Noted {
        rank: u16,
        session: u64,
        wave: Wave,
    },
    /// An engine's message arrives at its edge.
    AtEdge {
        rank: u16,
        event: Event,
    },
    /// The sidecar is started again.
    SidecarStarts,
    /// It reads what stands behind an edge.
    EdgeRead {
        rank: u16,
        session: u64,
    },
    /// It attaches to the frontends again.
    Rejoin {
        session: u64,
    },
    StepDone {
        life: u64,
    },
    ResumeDone {
        life: u64,
    },
    /// To the DP coordinator of that session.
    ToMachine(u64, Event),
    MachineTimer,
    /// To the DP coordinator of an attached frontend.
    ToTheirs(FrontendId, Event),
    TheirTimer(FrontendId),
    View {
        to: FrontendId,
        wave: u64,
        running: bool,
    },
    /// A request arrives at the virtual engine.
    AtRelay {
        rank: u16,
        from: FrontendId,
        id: RequestId,
        steps: u32,
        wave: u64,
    },
    AbortAtRelay {
        rank: u16,
        from: FrontendId,
        id: RequestId,
    },
    /// The node task hears of the crash, rank by rank.
    CrashSeen {
        rank: u16,
        life: u64,
    },
    EngineStarts {
        rank: u16,
        life: u64,
    },
    Admit {
        life: u64,
    },
    Resume {
        life: u64,
    },
}

/// Who talks to whom; messages on one link keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Link {
    /// XPUB of a rank.
    ToSubscriber(u16),
    /// DEALER of a slot at a rank; the sidecar's own is frontend 0.
    Slot(FrontendId, u16),
    /// PUSH of a rank to its edge.
    FromEngine(u16),
    /// From the edge of a rank on.
    FromEdge(u16),
    /// From a frontend to a virtual engine.
    ToRelay(FrontendId, u16),
    /// Commands of a rank task to the coordinator task.
    RelayCommands(u16),
    NodeCommands,
    FrontendToMachine(FrontendId),
    MachineToFrontend(FrontendId),
    /// PUSH of a virtual engine to a frontend's DP coordinator.
    ToTheirs(FrontendId, u16),
    FromTheirs(FrontendId),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Control {
    Free,
    Pausing(BTreeSet<u16>),
    Resuming(BTreeSet<u16>),
}

struct Request {
    rank: u16,
    ended: bool,
    /// Life of the engine it was given to.
    life: Option<u64>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) result: Result<(), String>,
    pub(crate) events: u64,
}

pub(crate) struct World {
    rng: Rng,
    log: bool,
    now: u64,
    number: u64,
    queue: BinaryHeap<Scheduled>,
    /// Things in the queue that are more than a periodic publish.
    pending: u64,
    links: BTreeMap<Link, u64>,
    topology: Topology,
    /// vLLM's own DP coordinator strands requests when START_DP_WAVE is on its way while engines are
    /// paused or resumed: those that are still paused drop it, the others run alone. These worlds are
    /// quiet around a pause.
    fragile: bool,
    version: Version,
    size: u16,
    step_time: u64,
    outside_left: u64,
    config: Config,
    machine: Coordinator,
    /// Number of the sidecar's life.
    session: u64,
    edges: Vec<edges::Edge>,
    machine_timer: Option<u64>,
    /// The report the machine is handling.
    handled: Option<Report>,
    wave_seen: Wave,
    engines: Vec<Engine>,
    /// Number of the group's life, and the engine incarnation.
    life: u64,
    up: bool,
    /// Which life of each rank the DP coordinator's sockets belong to.
    sockets: Vec<u64>,
    admitted: bool,
    admit_planned: bool,
    barrier: bool,
    frontends: Vec<Frontend>,
    next_frontend: u64,
    requests: BTreeMap<RequestId, Request>,
    held: Vec<(FrontendId, u16, RequestId, u32, u64)>,
    control: Control,
    broken: Option<String>,
}

impl World {
    pub(crate) fn new(seed: u64, mutation: Option<Mutation>, log: bool) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5bd1_e995);
        let topology = if rng.chance(40) { Topology::Stock } else { Topology::Hosted };
        let version =
            [Version::V28, Version::V32, Version::V32, Version::V33][usize::try_from(rng.below(4)).unwrap()];
        let size = u16::try_from(2 + rng.below(3)).unwrap();
        let mut config = Config::hosted(GroupKind::Lockstep, size);
        config.layout = layout(version);
        config.upstream.publish = topology == Topology::Stock;
        // The rules of 0.28 are known to strand requests around a pause; nobody is to follow them.
        if topology == Topology::Stock && version != Version::V28 && rng.chance(60) {
            config.upstream.exact = true;
        }
        mutation::set(mutation);
        let fragile = config.upstream.exact;
        let step_time = 100 + rng.below(900);
        let outside_left = 5 + rng.below(30);
        let mut world = Self {
            log,
            now: 0,
            number: 0,
            queue: BinaryHeap::new(),
            pending: 0,
            links: BTreeMap::new(),
            topology,
            fragile,
            version,
            size,
            step_time,
            outside_left,
            machine: Coordinator::new(config.clone()),
            session: 1,
            edges: (0..size).map(|_| edges::Edge::new(1)).collect(),
            config: config.clone(),
            machine_timer: None,
            handled: None,
            sockets: vec![0; usize::from(size)],
            wave_seen: Wave(0),
            engines: Vec::new(),
            life: 0,
            up: false,
            admitted: false,
            admit_planned: false,
            barrier: false,
            frontends: Vec::new(),
            next_frontend: 1,
            requests: BTreeMap::new(),
            held: Vec::new(),
            control: Control::Free,
            broken: None,
            rng,
        };
        world.note(|| format!("{topology:?} {version:?} {config:?}"));
        world.create_group();
        for rank in 0..world.size {
            world.subscribe(rank);
        }
        for _ in 0..1 + world.rng.below(3) {
            world.add_frontend();
        }
        world.schedule(0, Happening::Outside);
        world
    }

    pub(crate) fn run(mut self) -> Outcome {
        let mut events = 0;
        while self.pending > 0 && self.broken.is_none() && self.now < HORIZON {
            let Some(next) = self.queue.pop() else { break };
            self.now = next.at;
            if !background(&next.what) {
                self.pending -= 1;
            }
            events += 1;
            self.note(|| format!("{:?}", next.what));
            self.happen(next.what);
        }
        self.check_end();
        Outcome { result: self.broken.map_or(Ok(()), Err), events }
    }

    fn note(&self, text: impl FnOnce() -> String) {
        if self.log {
            println!("{:>9.3} ms  {}", self.now as f64 / 1000.0, text());
        }
    }

    fn fail(&mut self, why: String) {
        self.note(|| format!("BROKEN {why}"));
        self.broken.get_or_insert(why);
    }

    fn time(&self) -> Time {
        Time::from_start(Duration::from_micros(self.now))
    }

    // --- time and links ---

    fn schedule(&mut self, delay: u64, what: Happening) {
        let at = self.now + delay;
        self.schedule_at(at, what);
    }

    fn schedule_at(&mut self, at: u64, what: Happening) {
        self.number += 1;
        if !background(&what) {
            self.pending += 1;
        }
        let number = self.number;
        self.queue.push(Scheduled { at, number, what });
    }

    fn delay(&mut self) -> u64 {
        match self.rng.below(100) {
            0..60 => self.rng.below(200),
            60..88 => self.rng.below(1_500),
            88..97 => self.rng.below(8_000),
            _ => self.rng.below(60_000),
        }
    }

    fn send(&mut self, link: Link, what: Happening) {
        let arrival = self.now + self.delay();
        let last = self.links.entry(link).or_insert(0);
        let at = arrival.max(*last);
        *last = at;
        self.schedule_at(at, what);
    }

    fn send_to_engine(&mut self, link: Link, rank: u16, input: Input) {
        let life = self.life;
        self.send(link, Happening::ToEngine { rank, life, input });
    }

    // --- engines ---

    /// A new life: engines that wait for READY, and have not subscribed.
    fn create_group(&mut self) {
        self.life += 1;
        self.up = true;
        self.barrier = false;
        self.admitted = false;
        self.admit_planned = false;
        self.engines = (0..self.size).map(|rank| Engine::new(rank, self.version)).collect();
    }

    fn subscribe(&mut self, rank: u16) {
        let event = Event::Subscribed { rank: EngineIndex(rank), incarnation: Incarnation(self.life) };
        self.send(Link::FromEngine(rank), Happening::AtEdge { rank, event });
    }

    fn engine_outputs(&mut self, rank: u16, out: &mut Vec<Output>) {
        for output in out.drain(..) {
            match output {
                Output::Report(report) => {
                    let event = Event::Report {
                        rank: EngineIndex(rank),
                        incarnation: Incarnation(self.life),
                        report,
                    };
                    self.send(Link::FromEngine(rank), Happening::AtEdge { rank, event });
                }
                Output::Ended(id) => self.end(id),
                Output::Paused => {
                    if let Control::Pausing(waiting) = &mut self.control {
                        waiting.remove(&rank);
                        if waiting.is_empty() {
                            let delay = self.rng.below(3_000);
                            let life = self.life;
                            self.schedule(delay, Happening::Resume { life });
                        }
                    }
                }
                Output::Resumed => {
                    if let Control::Resuming(waiting) = &mut self.control {
                        waiting.remove(&rank);
                        if waiting.is_empty() {
                            self.control = Control::Free;
                        }
                    }
                }
            }
        }
        self.check_barriers();
    }

    /// Lets the collectives go on that all ranks have reached.
    fn check_barriers(&mut self) {
        if self.barrier || !self.up {
            return;
        }
        let life = self.life;
        if self.engines.iter().all(|engine| engine.phase == Phase::Step) {
            self.barrier = true;
            self.schedule(self.step_time, Happening::StepDone { life });
        } else if self.engines.iter().all(|engine| engine.phase == Phase::Resume) {
            self.barrier = true;
            self.schedule(1, Happening::ResumeDone { life });
        }
    }

    fn step_done(&mut self) {
        self.barrier = false;
        let mut outs: Vec<Vec<Output>> = vec![Vec::new(); self.engines.len()];
        for (engine, out) in self.engines.iter_mut().zip(&mut outs) {
            engine.finish_forward(out);
        }
        let counters: BTreeSet<u64> = self.engines.iter().map(|e| e.step_counter).collect();
        if counters.len() != 1 {
            self.fail(format!("{}: {counters:?}", checks::law::IN_STEP));
            return;
        }
        let verdict = self.engines[0].syncs().then(|| {
            let pausing = self.engines.iter().filter(|e| e.pending_pause).count();
            let all = pausing == self.engines.len();
            let unfinished = self.engines.iter().any(Engine::unfinished);
            (unfinished || (pausing > 0 && !all), all)
        });
        for (engine, out) in self.engines.iter_mut().zip(&mut outs) {
            engine.finish_step(verdict, out);
        }
        self.outputs_of_all(outs);
    }

    fn resume_done(&mut self) {
        self.barrier = false;
        let mut outs: Vec<Vec<Output>> = vec![Vec::new(); self.engines.len()];
        let any = self.engines.iter().any(Engine::unfinished);
        for (engine, out) in self.engines.iter_mut().zip(&mut outs) {
            engine.finish_resume(any, out);
        }
        self.outputs_of_all(outs);
    }

    fn outputs_of_all(&mut self, outs: Vec<Vec<Output>>) {
        for (rank, mut out) in (0..).zip(outs) {
            self.engine_outputs(rank, &mut out);
        }
    }

    fn end(&mut self, id: RequestId) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.ended = true;
        }
    }

    // --- what happens ---

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Outside => self.outside(),
            Happening::ToEngine { rank, life, input } => {
                if life == self.life && self.up {
                    let mut out = Vec::new();
                    self.engines[usize::from(rank)].deliver(input, &mut out);
                    self.engine_outputs(rank, &mut out);
                }
            }
            Happening::StepDone { life } => {
                if life == self.life && self.up {
                    self.step_done();
                }
            }
            Happening::ResumeDone { life } => {
                if life == self.life && self.up {
                    self.resume_done();
                }
            }
            Happening::Published { rank, session, life, input } => {
                if !self.edges[usize::from(rank)].missed(session) {
                    self.happen(Happening::ToEngine { rank, life, input });
                }
            }
            Happening::Noted { rank, session, wave } => self.noted(rank, session, wave),
            Happening::AtEdge { rank, event } => self.at_edge(rank, event),
            Happening::SidecarStarts => self.sidecar_starts(),
            Happening::EdgeRead { rank, session } => self.edge_read(rank, session),
            Happening::Rejoin { session } => self.rejoin(session),
            Happening::ToMachine(session, event) => {
                if session == self.session {
                    self.tell_machine(event);
                }
            }
            Happening::MachineTimer => {
                self.machine_timer = None;
                self.machine.handle_timeout(self.time());
                self.drain_machine();
            }
            Happening::ToTheirs(id, event) => self.theirs(id, Some(event)),
            Happening::TheirTimer(id) => self.theirs(id, None),
            Happening::View { to, wave, running } => {
                if let Some(frontend) = self.frontends.iter_mut().find(|f| f.id == to) {
                    frontend.wave = wave;
                    frontend.running = running;
                }
            }
            Happening::AtRelay { rank, from, id, steps, wave } => {
                if !self.frontends.iter().any(|f| f.id == from) {
                    self.end(id);
                } else if self.admitted {
                    self.relay(from, rank, id, steps, wave);
                } else {
                    self.held.push((from, rank, id, steps, wave));
                }
            }
            Happening::AbortAtRelay { rank, from, id } => {
                self.held.retain(|held| held.2 != id);
                if self.admitted {
                    self.send_to_engine(Link::Slot(from, rank), rank, Input::Abort { id });
                }
            }
            Happening::CrashSeen { rank, life } => self.crash_seen(rank, life),
            Happening::EngineStarts { rank, life } => {
                if life == self.life {
                    self.subscribe(rank);
                }
            }
            Happening::Admit { life } => self.admit(life),
            Happening::Resume { life } => {
                if life == self.life && self.up {
                    self.control = Control::Resuming((0..self.size).collect());
                    for rank in 0..self.size {
                        self.send_to_engine(Link::Slot(FrontendId(0), rank), rank, Input::Resume);
                    }
                }
            }
        }
    }
}

/// Goes on for ever.
fn background(what: &Happening) -> bool {
    matches!(what, Happening::TheirTimer(_))
}
