//! Much to read, and large messages.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_that_stops_reading_loses_its_route_and_slows_nobody() {
    let mut bed = Bed::with(|config| config.machine.limits.unread_bytes = 4 << 20);
    let engine = bed.start_engine().await;
    let b = bed.attach(2).await;
    let a = Frontend::bind(&bed.context);
    // Its kernel buffer is all that it takes.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let output_address = format!("tcp://{}", listener.local_addr().unwrap());
    let stuck = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        pull_handshake(&mut stream);
        stream
    });
    let a = Frontend { output_address, ..a };
    let slot = bed.open(&a, 1).await.unwrap();
    let _stream = stuck.join().unwrap();
    a.recv_input();
    a.add("flood");
    engine.expect_add(slot, "flood");
    let large = "x".repeat(1 << 20);
    for _ in 0..64 {
        engine.send(
            slot,
            NewOutputs {
                outputs: vec![NewOutput {
                    request_id: large.clone(),
                    new_token_ids: vec![1],
                    finish_reason: None,
                }],
                ..NewOutputs::default()
            },
        );
    }
    let lost = tokio::time::timeout(LIMIT, bed.lost.recv()).await.unwrap().unwrap();
    assert!(
        lost.reason.contains("does not read") && lost.reason.contains("--max-unread-bytes"),
        "{}",
        lost.reason
    );
    b.add("quick");
    engine.expect_add(b.slot, "quick");
    let sent = Instant::now();
    engine.send(b.slot, finish("quick"));
    b.expect_finish("quick");
    assert!(sent.elapsed() < LIMIT);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_or_an_answer_of_any_size_costs_no_route() {
    let mut bed = Bed::with(|config| {
        config.machine.limits.request_bytes = 1 << 20;
        config.machine.limits.unread_bytes = 64 << 10;
    });
    let engine = bed.start_engine().await;
    let a = bed.attach(1).await;
    // Beyond the bound: answered by its id, and not read.
    let mut frames = request("large");
    frames.push(Bytes::from(vec![0; 4 << 20]));
    a.send(&frames);
    assert_eq!(a.expect_finish("large"), FinishReason::Error);
    // An answer that is larger than all that may wait.
    a.add("next");
    engine.expect_add(a.slot, "next");
    let mut answer = finish("next");
    answer.outputs[0].new_token_ids = vec![70_000; 2 << 20];
    engine.send(a.slot, answer);
    a.expect_finish("next");
    bed.until(|snapshot| snapshot.refused == 1).await;
    let why = bed.handle.snapshot.borrow().last_refusal.clone().unwrap();
    assert!(why.contains("at most 1048576 (--max-request-bytes)"), "{why}");
    bed.stop().await;
}

/// The PULL side of a ZMTP handshake, by hand.
fn pull_handshake(stream: &mut std::net::TcpStream) {
    use std::io::{Read, Write};
    let mut greeting = [0; 64];
    stream.write_all(&dp_sidecar::transport::zmtp::greeting()).unwrap();
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&dp_sidecar::transport::zmtp::ready("PULL", None)).unwrap();
    let mut ready = [0; 2];
    stream.read_exact(&mut ready).unwrap();
    let mut body = vec![0; usize::from(ready[1])];
    stream.read_exact(&mut body).unwrap();
}
