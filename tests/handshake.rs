//! The handshake port under garbage, and with real libzmq engines: the guarded socket and the
//! handshake task.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar::driver::handles::{Expect, HandshakeEvent, HandshakeHandle, Listen, NodeEvent};
use dp_sidecar::driver::handshake::{HandshakeConfig, spawn};
use dp_sidecar::transport::{GuardEvent, GuardLimits, GuardedRouter};
use dp_sidecar_protocol::handshake::Hello;
use dp_sidecar_protocol::machine::handshake::Config;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

const PATIENCE: Duration = Duration::from_secs(10);
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn quick() -> GuardLimits {
    GuardLimits {
        handshake: Duration::from_millis(300),
        message: Duration::from_millis(300),
        ..GuardLimits::default()
    }
}

async fn guarded(limits: GuardLimits) -> GuardedRouter {
    GuardedRouter::bind(LOOPBACK, limits).await.unwrap()
}

/// A libzmq DEALER with an engine's identity.
fn dealer(context: &zmq::Context, address: SocketAddr, rank: u16) -> zmq::Socket {
    let socket = context.socket(zmq::DEALER).unwrap();
    socket.set_identity(&rank.to_le_bytes()).unwrap();
    socket.set_linger(0).unwrap();
    socket.set_rcvtimeo(10_000).unwrap();
    socket.connect(&format!("tcp://{address}")).unwrap();
    socket
}

async fn event(router: &mut GuardedRouter) -> GuardEvent {
    timeout(PATIENCE, std::future::poll_fn(|cx| router.poll_recv(cx))).await.unwrap().unwrap()
}

/// Greeting and READY of a DEALER with this identity, as bytes.
fn opening(identity: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3, 0];
    bytes.extend_from_slice(b"NULL");
    bytes.resize(64, 0);
    let mut body = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0".to_vec();
    body.push(u8::try_from(identity.len()).unwrap());
    body.extend_from_slice(identity);
    bytes.extend_from_slice(&[4, u8::try_from(body.len()).unwrap()]);
    bytes.extend_from_slice(&body);
    bytes
}

/// Sends bytes and waits until the other side closes; how long that took.
async fn closed_after(address: SocketAddr, bytes: &[u8]) -> Duration {
    let start = std::time::Instant::now();
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The other side may close while this is being written.
    let _ = stream.write_all(bytes).await;
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("the connection was not closed");
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_closes_only_the_connection_it_came_on() {
    let mut router = guarded(quick()).await;
    let address = router.address();
    let context = zmq::Context::new();
    let engine = dealer(&context, address, 1);
    engine.send("before", 0).unwrap();
    let GuardEvent::Message { peer, .. } = event(&mut router).await else {
        panic!("no message");
    };

    let mut huge_command = opening(b"\0\0")[..64].to_vec();
    huge_command.extend_from_slice(&[6, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    let mut huge_frame = opening(b"\0\0");
    huge_frame.extend_from_slice(&[2, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    let mut large_frame = opening(b"\0\0");
    large_frame.extend_from_slice(&[2, 0, 0, 0, 0, 0, 1, 0, 1]);
    let mut endless_more = opening(b"\0\0");
    endless_more.extend_from_slice(&[1, 0].repeat(1000));
    let mut half_message = opening(b"\0\0");
    half_message.extend_from_slice(&[1, 3, b'a']);
    let mut flood = opening(b"\0\0");
    flood.extend_from_slice(&[4, 5, 4, b'P', b'I', b'N', b'G'].repeat(1000));
    let mut subscriber = opening(b"\0\0")[..64].to_vec();
    subscriber.extend_from_slice(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB");
    let cases: [(&str, &[u8]); 11] = [
        ("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("random", &[0x17; 5000]),
        ("half a greeting", &opening(b"\0\0")[..30]),
        ("no READY", &opening(b"\0\0")[..64]),
        ("a command of 2^62 bytes", &huge_command),
        ("a frame of 2^62 bytes", &huge_frame),
        ("a frame of 64 KiB + 1", &large_frame),
        ("endless MORE", &endless_more),
        ("half a message", &half_message),
        ("a flood of commands", &flood),
        ("a subscriber", &subscriber),
    ];
    for (name, bytes) in cases {
        let took = closed_after(address, bytes).await;
        assert!(took < Duration::from_secs(3), "{name}: {took:?}");
    }

    // The engine is still served, in both directions.
    engine.send("after", 0).unwrap();
    let after = loop {
        if let GuardEvent::Message { peer, identity, frames } = event(&mut router).await {
            break (peer, identity, frames);
        }
    };
    assert_eq!(after, (peer, Bytes::from_static(&[1, 0]), vec![Bytes::from_static(b"after")]));
    assert!(router.sender().send(peer, vec![Bytes::from_static(b"INIT")]));
    let answer = tokio::task::spawn_blocking(move || engine.recv_bytes(0).unwrap()).await.unwrap();
    assert_eq!(answer, b"INIT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_connections_with_one_identity_are_told_apart_and_their_end_is_reported() {
    let mut router = guarded(quick()).await;
    let context = zmq::Context::new();
    let mut peers = Vec::new();
    let mut sockets = Vec::new();
    for text in ["first", "second"] {
        let socket = dealer(&context, router.address(), 0);
        socket.send(text, 0).unwrap();
        sockets.push(socket);
        let GuardEvent::Message { peer, frames, .. } = event(&mut router).await else {
            panic!("no message");
        };
        assert_eq!(frames, [Bytes::copy_from_slice(text.as_bytes())]);
        peers.push(peer);
    }
    assert_ne!(peers[0], peers[1]);
    drop(sockets.remove(0));
    assert_eq!(event(&mut router).await, GuardEvent::Closed { peer: peers[0] });
    assert!(!router.sender().send(peers[0], vec![Bytes::new()]));
    assert!(router.sender().send(peers[1], vec![Bytes::new()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded_and_slow_ones_do_not_stay() {
    let mut router = guarded(GuardLimits { of_address: 3, ..quick() }).await;
    let address = router.address();
    let mut idle = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // The greeting shows that it was accepted.
        timeout(PATIENCE, stream.read_exact(&mut [0; 64])).await.unwrap().unwrap();
        idle.push(stream);
    }
    closed_after(address, b"").await;
    // The idle ones run into the time limit; then there is room for an engine.
    for mut stream in idle {
        let mut rest = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("an idle connection stayed").unwrap();
    }
    let context = zmq::Context::new();
    let engine = dealer(&context, address, 0);
    engine.send("hello", 0).unwrap();
    assert!(matches!(event(&mut router).await, GuardEvent::Message { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_after_its_greeting_is_closed_and_an_engine_that_waits_for_init_is_not() {
    let limits = GuardLimits { of_address: 3, hello: Duration::from_millis(300), ..quick() };
    let mut router = guarded(limits).await;
    let address = router.address();
    let context = zmq::Context::new();
    let engine = dealer(&context, address, 0);
    engine.send("hello", 0).unwrap();
    let GuardEvent::Message { peer, .. } = event(&mut router).await else { panic!("no message") };
    // As many as may be there, all of them silent after a complete greeting.
    let mut silent = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&opening(&[])).await.unwrap();
        silent.push(stream);
    }
    for mut stream in silent {
        let mut rest = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("a silent connection stayed").unwrap();
    }
    for _ in 0..2 {
        assert!(matches!(event(&mut router).await, GuardEvent::Closed { peer: closed } if closed != peer));
    }
    assert!(router.sender().send(peer, vec![Bytes::from_static(b"INIT")]), "the engine is still there");
    assert_eq!(engine.recv_bytes(0).unwrap(), b"INIT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engines_that_have_their_init_count_no_more_as_strangers() {
    let mut router = guarded(GuardLimits { of_address: 2, ..quick() }).await;
    let context = zmq::Context::new();
    let mut engines = Vec::new();
    for rank in 0..5 {
        let engine = dealer(&context, router.address(), rank);
        engine.send("hello", 0).unwrap();
        let GuardEvent::Message { peer, .. } = event(&mut router).await else { panic!("no message") };
        assert!(router.sender().send(peer, vec![Bytes::from_static(b"INIT")]));
        assert_eq!(engine.recv_bytes(0).unwrap(), b"INIT");
        engines.push(engine);
    }
}

// === The task ===

struct Fixture {
    handle: HandshakeHandle,
    events: mpsc::Receiver<NodeEvent>,
    tracker: TaskTracker,
}

async fn task(shared: bool) -> Fixture {
    let tracker = TaskTracker::new();
    let (sender, events) = mpsc::channel(16);
    let config =
        HandshakeConfig { machine: Config::new(0..2), shared: shared.then_some(LOOPBACK), limits: quick() };
    let handle = spawn(config, &tracker, sender).await.unwrap();
    Fixture { handle, events, tracker }
}

impl Fixture {
    async fn expect(&self, rank: u16, incarnation: u64, listen: Listen) -> SocketAddr {
        let expect = Expect {
            rank: EngineIndex(rank),
            incarnation: Incarnation(incarnation),
            listen,
            init: Bytes::from(format!("INIT {rank} {incarnation}")),
        };
        self.handle.ask_within(PATIENCE, expect).await.unwrap()
    }

    async fn event(&mut self) -> HandshakeEvent {
        match timeout(PATIENCE, self.events.recv()).await.expect("no event").unwrap() {
            NodeEvent::Handshake(event) => event,
            other => panic!("not of a handshake: {other:?}"),
        }
    }

    async fn shut_down(self) {
        drop(self.handle);
        self.tracker.close();
        timeout(PATIENCE, self.tracker.wait()).await.unwrap();
    }
}

fn ready() -> Vec<u8> {
    let map = rmpv::Value::Map(vec![
        ("status".into(), "READY".into()),
        ("local".into(), false.into()),
        ("headless".into(), true.into()),
        ("parallel_config_hash".into(), "abc".into()),
    ]);
    let mut out = Vec::new();
    rmpv::encode::write_value(&mut out, &map).unwrap();
    out
}

async fn init_of(engine: zmq::Socket) -> (zmq::Socket, String) {
    tokio::task::spawn_blocking(move || {
        let bytes = engine.recv_bytes(0).unwrap();
        (engine, String::from_utf8(bytes).unwrap())
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libzmq_engines_get_through_the_whole_handshake_on_shared_and_own_ports() {
    let mut fixture = task(true).await;
    let context = zmq::Context::new();
    let shared = fixture.expect(0, 1, Listen::Shared).await;
    let own = fixture.expect(1, 1, Listen::Own).await;
    assert_ne!(shared, own);
    for (address, rank) in [(shared, 0), (own, 1)] {
        let engine = dealer(&context, address, rank);
        engine.send(&Hello::HEADLESS.encode()[..], 0).unwrap();
        let (engine, init) = init_of(engine).await;
        assert_eq!(init, format!("INIT {rank} 1"));
        assert!(matches!(
            fixture.event().await,
            HandshakeEvent::Connected { rank: connected, .. } if connected.0 == rank
        ));
        engine.send(ready(), 0).unwrap();
        let HandshakeEvent::Ready { rank: index, parallel_config_hash, .. } = fixture.event().await else {
            panic!("not READY");
        };
        assert_eq!(index.0, rank);
        assert_eq!(parallel_config_hash.as_deref(), Some("abc"));
    }
    // The own port is gone, the shared one stays.
    let gone = timeout(PATIENCE, async {
        while TcpStream::connect(own).await.is_ok() {
            sleep(Duration::from_millis(10)).await;
        }
    });
    gone.await.unwrap();
    TcpStream::connect(shared).await.unwrap();
    fixture.shut_down().await;
    assert!(TcpStream::connect(shared).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_killed_while_loading_is_reported_and_its_successor_is_served() {
    let mut fixture = task(true).await;
    let context = zmq::Context::new();
    let shared = fixture.expect(0, 1, Listen::Shared).await;
    let engine = dealer(&context, shared, 0);
    engine.send(&Hello::HEADLESS.encode()[..], 0).unwrap();
    let (engine, _) = init_of(engine).await;
    fixture.event().await;
    drop(engine);
    let HandshakeEvent::Refused { rank, error } = fixture.event().await else {
        panic!("not refused");
    };
    assert_eq!(rank, Some(EngineIndex(0)));
    assert!(error.contains("died while it was starting"), "{error}");

    // Somebody starts it again, before the sidecar expects it.
    let engine = dealer(&context, shared, 0);
    engine.send(&Hello::HEADLESS.encode()[..], 0).unwrap();
    let HandshakeEvent::Refused { rank: None, .. } = fixture.event().await else {
        panic!("not refused");
    };
    fixture.expect(0, 2, Listen::Shared).await;
    let (_engine, init) = init_of(engine).await;
    assert_eq!(init, "INIT 0 2");
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_that_comes_again_and_again_is_reported_once() {
    let mut fixture = task(true).await;
    let address = fixture.expect(0, 1, Listen::Shared).await;
    let context = zmq::Context::new();
    let mut strangers = Vec::new();
    for _ in 0..20 {
        let stranger = dealer(&context, address, 7);
        stranger.send(&Hello::HEADLESS.encode()[..], 0).unwrap();
        strangers.push(stranger);
    }
    let HandshakeEvent::Refused { rank: None, error } = fixture.event().await else {
        panic!("not refused");
    };
    assert!(error.contains("rank 7"), "{error}");
    // What comes next is the engine, not the other nineteen.
    let engine = dealer(&context, address, 0);
    engine.send(&Hello::HEADLESS.encode()[..], 0).unwrap();
    let event = fixture.event().await;
    assert!(matches!(event, HandshakeEvent::Connected { .. }), "{event:?}");
    fixture.shut_down().await;
}

#[tokio::test]
async fn a_taken_port_is_named_with_its_flag() {
    let taken = tokio::net::TcpListener::bind(LOOPBACK).await.unwrap();
    let address = taken.local_addr().unwrap();
    let (sender, _events) = mpsc::channel(1);
    let config = HandshakeConfig { machine: Config::new(0..1), shared: Some(address), limits: quick() };
    let error = spawn(config, &TaskTracker::new(), sender).await.unwrap_err().to_string();
    assert!(
        error.contains(&format!("port {} of 127.0.0.1", address.port()))
            && error.contains("--data-parallel-rpc-port"),
        "{error}"
    );
}
