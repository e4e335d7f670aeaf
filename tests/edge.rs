//! The edge task over libzmq: what engines report while nobody takes it.

use std::time::Duration;

use dp_sidecar::driver::edge::{self, Edge};
use dp_sidecar::driver::handles::{EdgeEvent, EdgeNote, EdgePrepare, EdgePublish, NodeEvent};
use dp_sidecar::transport::PrivateDir;
use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::output::{OutputsView, start_wave_message, stats_message, wave_complete_message};
use dp_sidecar_protocol::stats::SchedulerStats;
use dp_sidecar_protocol::{EngineIndex, Incarnation, Wave};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

const PATIENCE: Duration = Duration::from_secs(10);
const RANK: EngineIndex = EngineIndex(3);

fn layout() -> Layout {
    Layout::for_version(VllmVersion::new(0, 32, 0)).unwrap()
}

async fn prepare(edge: &Edge, life: u64) -> (String, String) {
    let prepare = EdgePrepare { rank: RANK, incarnation: Incarnation(life) };
    edge.handle.ask_within(PATIENCE, prepare).await.unwrap()
}

/// Connects to both sockets as an engine does.
fn connect(context: &zmq::Context, (input, output): &(String, String)) -> (zmq::Socket, zmq::Socket) {
    let subscriber = context.socket(zmq::XSUB).unwrap();
    let push = context.socket(zmq::PUSH).unwrap();
    for socket in [&subscriber, &push] {
        socket.set_linger(0).unwrap();
    }
    subscriber.set_rcvtimeo(10_000).unwrap();
    subscriber.connect(input).unwrap();
    subscriber.send("\x01", 0).unwrap();
    push.connect(output).unwrap();
    (subscriber, push)
}

/// In words.
async fn next(events: &mut mpsc::Receiver<NodeEvent>) -> String {
    match timeout(PATIENCE, events.recv()).await.unwrap().unwrap() {
        NodeEvent::Edge(EdgeEvent::Subscribed { rank, incarnation }) => {
            format!("{rank}/{incarnation} subscribed")
        }
        NodeEvent::Edge(EdgeEvent::Report { frame, .. }) => {
            let view = OutputsView::parse(&frame).unwrap();
            let step = view.stats().map(|stats| stats.unwrap().step_counter);
            format!("load {step:?} end {:?} start {:?}", view.wave_complete, view.start_wave)
        }
        other => panic!("not of an edge: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_matters_is_lost_while_nobody_takes_events() {
    let dir = tempfile::tempdir().unwrap();
    let private = PrivateDir::create(dir.path().join("ipc")).unwrap();
    let tracker = TaskTracker::new();
    // Room for one event: the rest has to be kept.
    let (reports, mut events) = mpsc::channel(1);
    let edge = edge::spawn(private, reports, &tracker);
    let addresses = prepare(&edge, 1).await;
    assert_eq!(prepare(&edge, 1).await, addresses, "the same incarnation got other sockets");
    let context = zmq::Context::new();
    let (subscriber, push) = connect(&context, &addresses);
    let mut state = edge.state.clone();
    let subscribed = |state: &edge::EdgeState| state.subscribed.get(&RANK) == Some(&Incarnation(1));
    timeout(PATIENCE, state.wait_for(subscribed)).await.unwrap().unwrap();

    for step in 1..=2000 {
        let stats = SchedulerStats { step_counter: step, ..SchedulerStats::default() };
        push.send(&stats_message(&layout(), RANK, stats.encode(), 0.0)[..], 0).unwrap();
    }
    for wave in 0..100 {
        push.send(&start_wave_message(&layout(), RANK, Wave(wave), 0.0)[..], 0).unwrap();
        push.send(&wave_complete_message(&layout(), RANK, Wave(wave), 0.0)[..], 0).unwrap();
    }
    let done = |state: &edge::EdgeState| state.wave == Some((Wave(100), false));
    timeout(PATIENCE, state.wait_for(done)).await.unwrap().unwrap();

    // Meanwhile the engine can be reached.
    let (ranks, frames) = (vec![RANK], vec!["READY".into()]);
    edge.handle.tell(EdgePublish { ranks, frames }).await.unwrap();
    let got = tokio::task::block_in_place(|| subscriber.recv_multipart(0));
    assert_eq!(got.unwrap(), [b"READY"]);

    assert_eq!(next(&mut events).await, "3/1 subscribed");
    let mut rest = Vec::new();
    while rest.last().is_none_or(|last: &String| !last.starts_with("load Some(2000)")) {
        rest.push(next(&mut events).await);
    }
    assert!(rest.len() < 40, "{} events were kept", rest.len());
    let edges: Vec<&String> = rest.iter().filter(|event| event.starts_with("load None")).collect();
    let last: Vec<&&String> = edges.iter().rev().take(2).collect();
    assert_eq!(*last[0], "load None end Some(Wave(99)) start None");
    assert_eq!(*last[1], "load None end None start Some(Wave(99))");

    // An older word on waves changes nothing, a newer one does.
    for (wave, running) in [(40, true), (101, true)] {
        edge.handle.tell(EdgeNote { wave: Wave(wave), running }).await.unwrap();
    }
    let newer = |state: &edge::EdgeState| state.wave.is_some_and(|(wave, _)| wave != Wave(100));
    let seen = timeout(PATIENCE, state.wait_for(newer)).await.unwrap().unwrap().wave;
    assert_eq!(seen, Some((Wave(101), true)));

    // A new life has new sockets, and must subscribe again. What comes late for the one before takes them from nobody.
    let second = prepare(&edge, 2).await;
    assert_ne!(second, addresses);
    assert!(edge.state.borrow().subscribed.is_empty());
    let late = EdgePrepare { rank: RANK, incarnation: Incarnation(1) };
    let refused = edge.handle.ask_within(PATIENCE, late).await.unwrap_err().to_string();
    assert!(refused.contains("life 1: life 2 has some"), "{refused}");
    assert_eq!(prepare(&edge, 2).await, second);
    drop((edge, state));
    tracker.close();
    timeout(PATIENCE, tracker.wait()).await.unwrap();
}
