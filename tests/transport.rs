//! The sockets against libzmq, which is what vLLM's peers speak.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar::transport::{
    Connected, Encoded, PrivateDir, PullEvent, PullListener, RouterEvent, RouterListener, TransportError,
    XpubListener, zmtp,
};
use tempfile::TempDir;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(5);

fn private() -> (TempDir, PrivateDir) {
    let base = tempfile::tempdir().unwrap();
    let dir = PrivateDir::create(base.path().join("p")).unwrap();
    (base, dir)
}

fn peer(context: &zmq::Context, kind: zmq::SocketType) -> zmq::Socket {
    let socket = context.socket(kind).unwrap();
    socket.set_linger(0).unwrap();
    socket.set_rcvtimeo(5000).unwrap();
    socket.set_sndtimeo(5000).unwrap();
    socket
}

fn bytes(frames: &[&[u8]]) -> Vec<Bytes> {
    frames.iter().map(|frame| Bytes::copy_from_slice(frame)).collect()
}

fn bound(socket: &zmq::Socket) -> String {
    socket.bind("tcp://127.0.0.1:0").unwrap();
    socket.get_last_endpoint().unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_exchanges_messages_with_an_engine_and_reports_its_end_after_the_last_one() {
    let (_base, dir) = private();
    let mut router = RouterListener::bind(&dir.ipc_address("r").unwrap()).await.unwrap();
    let context = zmq::Context::new();
    let engine = peer(&context, zmq::DEALER);
    engine.set_identity(&[0, 0]).unwrap();
    engine.set_linger(2000).unwrap();
    engine.connect(router.address()).unwrap();
    engine.send_multipart([&b"first"[..], b"", &[7; 300]], 0).unwrap();
    let event = timeout(LIMIT, router.recv()).await.unwrap();
    assert_eq!(
        event,
        RouterEvent::Message {
            identity: Bytes::from_static(&[0, 0]),
            frames: bytes(&[b"first", b"", &[7; 300]]),
        }
    );
    let mut sender = router.sender();
    sender.send(&[0, 0], bytes(&[b"\x00", b"payload"])).await.unwrap();
    assert_eq!(engine.recv_multipart(0).unwrap(), vec![b"\x00".to_vec(), b"payload".to_vec()]);
    let absent = sender.send(&[1, 0], bytes(&[b"x"])).await.unwrap_err();
    assert!(matches!(absent, TransportError::Disconnected { .. }));
    engine.send("last", 0).unwrap();
    drop(engine);
    drop(context);
    let last = timeout(LIMIT, router.recv()).await.unwrap();
    assert!(matches!(last, RouterEvent::Message { .. }), "{last:?}");
    assert_eq!(
        timeout(LIMIT, router.recv()).await.unwrap(),
        RouterEvent::Disconnected { identity: Bytes::from_static(&[0, 0]) }
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_reports_messages_in_order_and_the_end_of_its_engine() {
    let (_base, dir) = private();
    let address = dir.ipc_address("p").unwrap();
    let mut pull = PullListener::bind(&address).await.unwrap();
    let context = zmq::Context::new();
    let engine = peer(&context, zmq::PUSH);
    engine.connect(&address).unwrap();
    for number in 0..1000u32 {
        engine.send(&number.to_le_bytes()[..], 0).unwrap();
    }
    for number in 0..1000u32 {
        let PullEvent::Message(frames) = timeout(LIMIT, pull.recv()).await.unwrap() else {
            panic!("disconnected before message {number}");
        };
        assert_eq!(frames, bytes(&[&number.to_le_bytes()]));
    }
    drop((engine, context));
    assert_eq!(timeout(LIMIT, pull.recv()).await.unwrap(), PullEvent::Disconnected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_takes_one_engine_and_closes_its_connection_when_dropped() {
    let (_base, dir) = private();
    let address = dir.ipc_address("p").unwrap();
    let mut pull = PullListener::bind(&address).await.unwrap();
    let mut push = Connected::push(&address, LIMIT).await.unwrap();
    push.send(bytes(&[b"seen"])).await.unwrap();
    timeout(LIMIT, pull.recv()).await.unwrap();
    let reading = tokio::spawn(async move {
        pull.recv().await;
    });
    let gone = async {
        while std::fs::exists(address.trim_start_matches("ipc://")).unwrap() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, gone).await.expect("others can connect beside the engine");
    reading.abort();
    let end = timeout(LIMIT, push.disconnected()).await.unwrap();
    assert!(matches!(end, TransportError::Disconnected { .. }), "{end}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_xpub_reports_each_subscription_and_reaches_each_subscriber() {
    let (_base, dir) = private();
    let mut xpub = XpubListener::bind(&dir.ipc_address("x").unwrap(), LIMIT).await.unwrap();
    let context = zmq::Context::new();
    let engines: Vec<_> = (0..2)
        .map(|_| {
            let engine = peer(&context, zmq::XSUB);
            engine.connect(xpub.address()).unwrap();
            engine.send(&b"\x01"[..], 0).unwrap();
            engine
        })
        .collect();
    for _ in &engines {
        let upstream = timeout(LIMIT, xpub.recv()).await.unwrap().unwrap();
        assert_eq!(upstream, bytes(&[b"\x01"]));
    }
    xpub.publisher().send(&Encoded::from(bytes(&[b"\x02", b"wave"]))).unwrap();
    for engine in &engines {
        assert_eq!(engine.recv_multipart(0).unwrap(), vec![b"\x02".to_vec(), b"wave".to_vec()]);
    }
    let mut ours = Connected::xsub(xpub.address(), LIMIT).await.unwrap();
    ours.subscribe().await.unwrap();
    timeout(LIMIT, xpub.recv()).await.unwrap().unwrap();
    drop(xpub);
    let end = timeout(LIMIT, ours.recv()).await.unwrap();
    assert!(end.is_err(), "the connection outlived the socket");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_that_does_not_read_ends_the_xpub_and_blocks_nobody() {
    let (_base, dir) = private();
    let mut xpub =
        XpubListener::bind(&dir.ipc_address("x").unwrap(), Duration::from_millis(200)).await.unwrap();
    let mut stuck = Connected::xsub(xpub.address(), LIMIT).await.unwrap();
    stuck.subscribe().await.unwrap();
    timeout(LIMIT, xpub.recv()).await.unwrap().unwrap();
    let publisher = xpub.publisher();
    let filler = Encoded::from(vec![Bytes::from(vec![2; 1 << 20])]);
    let mut refused = None;
    for _ in 0..1000 {
        refused = publisher.send(&filler).err();
        if refused.is_some() {
            break;
        }
    }
    assert!(refused.is_some());
    assert!(timeout(LIMIT, xpub.recv()).await.unwrap().is_err());
}

/// Speaks ZMTP by hand.
fn raw_subscriber(address: &str) -> UnixStream {
    let mut stream = UnixStream::connect(address.strip_prefix("ipc://").unwrap()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(&zmtp::greeting()).unwrap();
    stream.write_all(&zmtp::ready("XSUB", None)).unwrap();
    let mut hello = vec![0; zmtp::GREETING_LENGTH + zmtp::ready("XPUB", None).len()];
    stream.read_exact(&mut hello).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_xpub_sends_what_is_subscribed_to_and_no_longer_after_the_end_of_it() {
    let (_base, dir) = private();
    let mut xpub = XpubListener::bind(&dir.ipc_address("x").unwrap(), LIMIT).await.unwrap();
    let context = zmq::Context::new();
    let subscriber = peer(&context, zmq::SUB);
    subscriber.connect(xpub.address()).unwrap();
    for topic in ["a", "ab"] {
        subscriber.set_subscribe(topic.as_bytes()).unwrap();
        let upstream = timeout(LIMIT, xpub.recv()).await.unwrap().unwrap();
        assert_eq!(upstream, bytes(&[&[b"\x01", topic.as_bytes()].concat()]));
    }
    subscriber.set_unsubscribe(b"a").unwrap();
    assert_eq!(timeout(LIMIT, xpub.recv()).await.unwrap().unwrap(), bytes(&[b"\x00a"]));
    let publisher = xpub.publisher();
    for message in [&[&b"ax"[..], b"no"], &[b"b", b"no"], &[b"abx", b"yes"]] {
        publisher.send(&Encoded::from(bytes(message))).unwrap();
    }
    assert_eq!(subscriber.recv_multipart(0).unwrap(), vec![b"abx".to_vec(), b"yes".to_vec()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_subscriber_is_closed_and_the_others_are_served() {
    let (_base, dir) = private();
    let mut xpub = XpubListener::bind(&dir.ipc_address("x").unwrap(), LIMIT).await.unwrap();
    let context = zmq::Context::new();
    let engine = peer(&context, zmq::XSUB);
    engine.connect(xpub.address()).unwrap();
    engine.send(&b"\x01"[..], 0).unwrap();
    timeout(LIMIT, xpub.recv()).await.unwrap().unwrap();

    let mut topics = Vec::new();
    for number in 0..2000u16 {
        topics.extend([0, 3, 1]);
        topics.extend(number.to_be_bytes());
    }
    let hostile: [(&str, &[u8]); 5] = [
        ("a frame of 2^62 bytes", &[2, 0x40, 0, 0, 0, 0, 0, 0, 0]),
        ("a command of 2^62 bytes", &[6, 0x40, 0, 0, 0, 0, 0, 0, 0]),
        ("reserved flags", &[0x80, 0]),
        ("frames without an end", &[1, 0].repeat(100)),
        ("subscriptions without an end", &topics),
    ];
    for (what, sent) in hostile {
        let mut stream = raw_subscriber(xpub.address());
        // It may be closed before all is written.
        let _ = stream.write_all(sent);
        let reader = tokio::task::spawn_blocking(move || stream.read(&mut [0]));
        // What it subscribed to before it went too far is reported.
        let drained = async { while xpub.recv().await.is_ok() {} };
        let read = tokio::select! {
            read = reader => read.unwrap(),
            () = drained => panic!("{what} ended the socket"),
        };
        // A reset is an end, too; a time limit is none.
        let closed = match read {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        };
        assert!(closed, "{what} is taken");
    }
    xpub.publisher().send(&Encoded::from(bytes(&[b"READY"]))).unwrap();
    assert_eq!(engine.recv_multipart(0).unwrap(), vec![b"READY".to_vec()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stopped_subscriber_could_not_take_comes_whole_and_in_order_when_it_reads_again() {
    let (_base, dir) = private();
    let mut xpub = XpubListener::bind(&dir.ipc_address("x").unwrap(), LIMIT).await.unwrap();
    let mut ours = Connected::xsub(xpub.address(), LIMIT).await.unwrap();
    ours.subscribe().await.unwrap();
    timeout(LIMIT, xpub.recv()).await.unwrap().unwrap();
    let publisher = xpub.publisher();
    let mut sent = 0u32;
    while publisher.send(&Encoded::from(bytes(&[b"\x02", &sent.to_be_bytes()]))).is_ok() {
        sent += 1;
        assert!(sent < 1_000_000, "the backlog has no bound");
    }
    for number in 0..sent {
        let frames = timeout(LIMIT, ours.recv()).await.unwrap().unwrap();
        assert_eq!(frames, bytes(&[b"\x02", &number.to_be_bytes()]));
    }
    // Now it takes messages again.
    publisher.send(&Encoded::from(bytes(&[b"later"]))).unwrap();
    assert_eq!(timeout(LIMIT, ours.recv()).await.unwrap().unwrap(), bytes(&[b"later"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dealer_talks_to_a_router_of_libzmq_under_its_engine_identity() {
    let context = zmq::Context::new();
    let router = peer(&context, zmq::ROUTER);
    router.set_router_mandatory(true).unwrap();
    let address = bound(&router);
    let mut dealer = Connected::dealer(&address, &[1, 0], LIMIT).await.unwrap();
    dealer.send(bytes(&[b"", &[3; 100_000], b"tail"])).await.unwrap();
    assert_eq!(
        router.recv_multipart(0).unwrap(),
        vec![vec![1, 0], vec![], vec![3; 100_000], b"tail".to_vec()]
    );
    let large = vec![9; 20 << 20];
    router.send_multipart([&[1u8, 0][..], b"\x00", &large], 0).unwrap();
    let frames = timeout(LIMIT, dealer.recv()).await.unwrap().unwrap();
    assert_eq!(frames, bytes(&[b"\x00", &large]));
    drop((router, context));
    let end = timeout(LIMIT, dealer.recv()).await.unwrap().unwrap_err();
    assert!(matches!(end, TransportError::Disconnected { .. }), "{end}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_to_a_peer_that_does_not_read_waits_instead_of_queueing_and_sees_it_leave() {
    let context = zmq::Context::new();
    let pull = peer(&context, zmq::PULL);
    pull.set_rcvhwm(1).unwrap();
    pull.set_rcvbuf(65536).unwrap();
    let address = bound(&pull);
    let mut push = Connected::push(&address, LIMIT).await.unwrap();
    let filler = Bytes::from(vec![0; 1 << 20]);
    let mut sent = 0;
    while let Ok(result) = timeout(Duration::from_secs(1), push.send(vec![filler.clone()])).await {
        result.unwrap();
        sent += 1;
        assert!(sent < 200, "200 MiB went out to a peer that does not read");
    }
    drop((pull, context));
    let end = timeout(LIMIT, push.disconnected()).await.unwrap();
    assert!(matches!(end, TransportError::Disconnected { .. }), "{end}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_xsub_hears_what_an_xpub_of_libzmq_publishes() {
    let context = zmq::Context::new();
    let xpub = peer(&context, zmq::XPUB);
    xpub.set_xpub_verbose(true).unwrap();
    let address = bound(&xpub);
    let mut xsub = Connected::xsub(&address, LIMIT).await.unwrap();
    xsub.subscribe().await.unwrap();
    assert_eq!(xpub.recv_bytes(0).unwrap(), b"\x01");
    xpub.send("READY", 0).unwrap();
    let frames = timeout(LIMIT, xsub.recv()).await.unwrap().unwrap();
    assert_eq!(frames, bytes(&[b"READY"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_waits_for_a_listener_and_gives_up_at_the_limit() {
    let (_base, dir) = private();
    let address = dir.ipc_address("late").unwrap();
    let started = std::time::Instant::now();
    let error = Connected::dealer(&address, &[0, 0], Duration::from_millis(150)).await.unwrap_err();
    assert!(matches!(error, TransportError::Timeout { stage: "connect", .. }));
    assert!(started.elapsed() < LIMIT);
    let connecting = {
        let address = address.clone();
        tokio::spawn(async move { Connected::dealer(&address, &[0, 0], LIMIT).await })
    };
    tokio::time::sleep(Duration::from_millis(120)).await;
    let _router = RouterListener::bind(&address).await.unwrap();
    connecting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_of_another_kind_or_silent_is_named() {
    // Scripted, and not a PUB of libzmq: that may hang up before its own words are read.
    let publisher = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", publisher.local_addr().unwrap());
    let saying = std::thread::spawn(move || {
        let (mut stream, _) = publisher.accept().unwrap();
        let mut words = b"\xff\0\0\0\0\0\0\0\0\x7f\x03\0NULL".to_vec();
        words.resize(64, 0);
        words.extend_from_slice(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB");
        stream.write_all(&words).unwrap();
        // Until the other side has had enough of it.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = Connected::dealer(&address, &[0, 0], LIMIT).await.unwrap_err().to_string();
    saying.join().unwrap();
    assert!(error.contains("ROUTER"), "{error}");
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", silent.local_addr().unwrap());
    let error = Connected::push(&address, Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, TransportError::Timeout { stage: "ZMTP handshake", .. }), "{error}");
}
