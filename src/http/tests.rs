use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::uploads::parse_range;
use super::*;
use dp_sidecar_protocol::{UpdateId, WeightVersion};

use crate::api::{AdminError, Command, ErrorKind, ReportStatus, Response, UpdateProgress, UpdateReport};
use crate::staging::{self, StageConfig, upload};

const LIMIT: Duration = Duration::from_secs(20);
const SECRET: &str = "0123456789abcdef0123";
const QUICK: Limits =
    Limits { head: Duration::from_secs(5), body: Duration::from_secs(1), place: Duration::from_secs(1) };

struct Server {
    dir: tempfile::TempDir,
    address: SocketAddr,
    admin: mpsc::Receiver<AdminCommand>,
    _commands: mpsc::Sender<AdminCommand>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Server {
    async fn start() -> Self {
        Self::start_within(QUICK).await
    }

    async fn start_within(limits: Limits) -> Self {
        let (server, requests) = Self::waiting(tempfile::tempdir().unwrap(), limits).await;
        server.open(requests);
        server
    }

    /// The staging area begins when these requests are served, see [`Self::open`].
    async fn waiting(dir: tempfile::TempDir, limits: Limits) -> (Self, upload::UploadRequests) {
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let (uploads, requests) = upload::channel();
        let (commands, admin) = mpsc::channel(4);
        let mut server = HttpServer::bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        server.limits = limits;
        let address = server.address();
        let token = Token::new(SECRET.as_bytes()).unwrap();
        let names = BTreeSet::from(["x".to_owned()]);
        server.serve(token, names, uploads, commands.downgrade(), &tracker, stop.clone());
        (Self { dir, address, admin, _commands: commands, tracker, stop }, requests)
    }

    fn open(&self, requests: upload::UploadRequests) {
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut config = StageConfig::new("node", self.dir.path(), "run", host, None);
        config.shm_dir = self.dir.path().to_owned();
        config.chunk = 4096;
        config.uploads = Some(requests);
        let stage = staging::spawn(config, mpsc::channel(16).0, &self.tracker, self.stop.clone()).unwrap();
        // The task lives as long as it has a handle.
        let kept = self.stop.clone();
        self.tracker.spawn(async move {
            kept.cancelled().await;
            drop(stage);
        });
    }

    /// Sends a request with these extra header lines, and the token unless they say another one; gives status, head
    /// and body.
    async fn ask(&self, request: &str, headers: &str, body: &[u8]) -> (u16, String, String) {
        let length = if headers.contains("Content-Length") {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        let token = match headers.contains("Authorization") {
            true => String::new(),
            false => format!("Authorization: Bearer {SECRET}\r\n"),
        };
        let head =
            format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{token}{length}{headers}\r\n");
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        if headers.contains("Content-Length") {
            // Cut off in the middle of the body.
            stream.shutdown().await.unwrap();
        }
        let mut answer = Vec::new();
        timeout(LIMIT, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).map_or(0, |status| status.parse().unwrap());
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    async fn json(&self, request: &str, headers: &str, body: &[u8]) -> (u16, Value) {
        let (status, _, body) = self.ask(request, headers, body).await;
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    async fn create(&self, id: &str, size: usize) -> (u16, Value) {
        let body = json!({"id": id, "files": [{"name": "a.safetensors", "size": size}]}).to_string();
        self.json("POST /v1/weights/uploads", "Content-Type: application/json\r\n", body.as_bytes()).await
    }

    /// Gives what is on disk and in memory.
    async fn end(self) -> tempfile::TempDir {
        self.stop.cancel();
        self.tracker.close();
        timeout(LIMIT, self.tracker.wait()).await.unwrap();
        self.dir
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_put_in_ranges_and_goes_on_where_it_was() {
    let server = Server::start().await;
    let bytes: Vec<u8> = (0..20_000u32).map(|at| (at % 251) as u8).collect();
    assert_eq!(server.create("t1", bytes.len()).await.0, 200);
    let file = "/v1/weights/uploads/t1/a.safetensors";
    let put = format!("PUT {file}");
    let (status, answer) = server.json(&put, "Content-Range: bytes 0-4999/20000\r\n", &bytes[..5000]).await;
    assert_eq!((status, &answer["ranges"]), (200, &json!([[0, 5000]])));
    // The trainer dies in the middle of a piece.
    let cut = "Content-Range: bytes 5000-9999/20000\r\nContent-Length: 5000\r\n";
    server.ask(&put, cut, &bytes[5000..7000]).await;
    let (status, head, body) = server.ask(&format!("HEAD {file}"), "", b"").await;
    assert_eq!((status, body.as_str()), (200, ""));
    assert!(head.contains("upload-offset: 7000") && head.contains("upload-length: 20000"), "{head}");
    // Somebody else's successor does not know, and begins it again.
    assert_eq!(server.create("t1", bytes.len()).await.1["received"], 7000);
    let rest = "Content-Range: bytes 7000-19999/*\r\n";
    let (status, answer) = server.json(&put, rest, &bytes[7000..]).await;
    assert_eq!((status, &answer["ranges"]), (200, &json!([[0, 20000]])));
    let (_, status) = server.json("GET /v1/weights/uploads/t1", "", b"").await;
    assert_eq!(status["complete"], true);
    let segment = std::fs::read(server.dir.path().join("dp-sidecar-run-a")).unwrap();
    assert_eq!(&segment[..20_000], bytes);
    assert_eq!(server.ask("DELETE /v1/weights/uploads/t1", "", b"").await.0, 204);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_of_an_upload_before_the_segments_are_checked() {
    let server = Server::start().await;
    assert_eq!(server.create("t1", 9000).await.0, 200);
    let put = "PUT /v1/weights/uploads/t1/a.safetensors";
    server.json(put, "Content-Range: bytes 0-4999/9000\r\n", &[1; 5000]).await;
    let (server, requests) = Server::waiting(server.end().await, QUICK).await;
    let mut asked = Box::pin(server.json("GET /v1/weights/uploads/t1", "", b""));
    let early = timeout(Duration::from_millis(300), &mut asked).await;
    assert!(early.is_err(), "told that there is no such upload: {early:?}");
    server.open(requests);
    let (status, answer) = asked.await;
    assert_eq!((status, &answer["received"]), (200, &json!(4096)), "the chunk that was complete");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_say_what_was_expected() {
    let server = Server::start().await;
    let (status, answer) = server.json("GET /v1/weights/uploads/none", "", b"").await;
    assert_eq!((status, &answer["error"]["message"]), (404, &json!("no upload \"none\"")));
    assert_eq!(server.create("../x", 10).await.0, 400);
    server.create("t1", 100).await;
    let (status, answer) = server.create("t2", 100).await;
    assert_eq!(status, 409, "{answer}");
    let put = "PUT /v1/weights/uploads/t1/a.safetensors";
    for (headers, body, expected) in [
        ("Content-Range: bytes 0-100/100\r\n", &[1u8; 100][..], "expected \"bytes FROM-TO/100\""),
        ("Content-Range: bytes 0-9/200\r\n", &[1; 10], "expected \"bytes FROM-TO/100\""),
        ("Content-Range: bytes 0-9/100\r\n", &[1; 11], "longer than the 10 bytes"),
        ("Content-Range: bytes 10-29/100\r\n", &[1; 5], "ended at byte 15"),
    ] {
        let (status, answer) = server.json(put, headers, body).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(expected), "{headers}: {answer}");
    }
    assert_eq!(server.ask("PUT /v1/weights/uploads/t1/b.safetensors", "", b"").await.0, 404);
    assert_eq!(server.ask("GET /v2", "", b"").await.0, 404);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_the_token() {
    let server = Server::start().await;
    let get = "GET /v1/weights/uploads/t1";
    assert_eq!(server.ask(get, "Authorization:\r\n", b"").await.0, 401);
    assert_eq!(server.ask(get, "Authorization: Bearer 0123456789abcdef0124\r\n", b"").await.0, 401);
    assert_eq!(server.ask(get, "Authorization: Bearer\r\n", b"").await.0, 401);
    assert_eq!(server.ask(get, &format!("Authorization: Bearer {SECRET}\r\n"), b"").await.0, 404);
    server.end().await;
}

/// Everything that comes until the other side closes.
async fn rest_of(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let _ = timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("the connection stays open");
    String::from_utf8(answer).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_take_the_places_of_clients() {
    let server = Server::start().await;
    let get = "GET /v1/weights/uploads/t1";
    let mut silent = Vec::new();
    for _ in 0..2 * CONNECTIONS {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(server.address).await.unwrap());
    }
    let begun = std::time::Instant::now();
    assert_eq!(server.ask(get, "", b"").await.0, 404);
    assert!(begun.elapsed() < QUICK.head, "it waited for a place of a stranger");
    for stream in &mut silent {
        assert_eq!(rest_of(stream).await, "");
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_beyond_the_limit_are_told_and_others_go_on() {
    let server = Server::start_within(Limits { head: 3 * LIMIT, ..QUICK }).await;
    let head = format!("GET /v2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n\r\n");
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        timeout(LIMIT, stream.read_exact(&mut start)).await.unwrap().unwrap();
        assert_eq!(&start, b"HTTP/1.1 404");
        open.push(stream);
    }
    let (status, _, body) = server.ask("GET /v2", "", b"").await;
    assert!(status == 503 && body.contains("too many clients"), "{status} {body}");
    drop(open.pop());
    assert_eq!(server.ask("GET /v2", "", b"").await.0, 404);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_no_more_is_closed() {
    let server = Server::start_within(Limits { head: Duration::from_secs(1), ..QUICK }).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!("GET /v2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    assert!(rest_of(&mut stream).await.contains("no such path"));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_is_bounded_in_time_and_size_and_an_unfinished_one_ends_its_connection() {
    let server = Server::start().await;
    let typed = "Content-Type: application/json\r\n";
    let large = vec![b' '; routes::JSON_LIMIT + 1];
    let (status, head, body) = server.ask("POST /v1/weights/uploads", typed, &large).await;
    assert!(status == 413 && head.contains("connection: close") && body.contains("8388608"), "{head} {body}");
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /v1/weights/updates HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n{typed}Content-Length: 100\r\n\r\n{{"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = rest_of(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("was not there within 1s"), "{answer}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_clients_that_name_this_server_and_come_from_no_page_are_answered() {
    let server = Server::start().await;
    for (headers, expected) in [
        ("Host: evil.example\r\n", 421),
        ("Host: localhost:8090\r\n", 404),
        ("Host: x\r\nOrigin: http://localhost\r\n", 403),
    ] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let token = format!("Authorization: Bearer {SECRET}\r\nConnection: close\r\n");
        let head = format!("GET /v1/weights/uploads/t1 HTTP/1.1\r\n{token}{headers}\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let answer = rest_of(&mut stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "{headers}: {answer}");
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_is_told_as_a_stream_of_events() {
    let mut server = Server::start().await;
    let mut admin = std::mem::replace(&mut server.admin, mpsc::channel(1).1);
    let answering = tokio::spawn(async move {
        for outcome in [Ok(ReportStatus::Committed), Ok(ReportStatus::Refused), Err("upload t1 is taken")] {
            let Some(AdminCommand { command: Command::Update(request), reply }) = admin.recv().await else {
                panic!("no update was asked for");
            };
            assert_eq!((request.path, request.upload.as_deref()), (None, Some("t1")));
            assert_eq!(request.version, Some(WeightVersion("v7".to_owned())));
            let step = UpdateProgress {
                phase: "staging".into(),
                message: "m".into(),
                done: 1,
                total: 2,
                event: None,
            };
            reply.progress(step);
            let report = outcome.map(|status| Response::Update(report(status)));
            reply.send(report.map_err(|text| AdminError::new(ErrorKind::Busy, text)));
        }
    });
    let body = json!({"upload": "t1", "version": "v7"}).to_string();
    let post = "POST /v1/weights/updates";
    let typed = "Content-Type: application/json\r\n";
    let (status, head, events) =
        server.ask(post, &format!("{typed}Accept: text/event-stream\r\n"), body.as_bytes()).await;
    assert!(status == 200 && head.contains("text/event-stream"), "{head}");
    let progress = events.find("event: progress").expect("progress");
    let end = events.find("event: report").expect("report");
    assert!(progress < end && events.contains("\"status\":\"committed\""), "{events}");
    let (status, answer) = server.json(post, typed, body.as_bytes()).await;
    assert_eq!((status, &answer["status"]), (422, &json!("refused")));
    let (status, answer) = server.json(post, typed, body.as_bytes()).await;
    assert_eq!((status, &answer["error"]["message"]), (409, &json!("upload t1 is taken")));
    answering.await.unwrap();
    let neither = server.json(post, typed, b"{}").await.1;
    assert_eq!(neither["error"]["message"], "expected either path or upload");
    server.end().await;
}

fn report(status: ReportStatus) -> UpdateReport {
    UpdateReport {
        id: UpdateId("u1".to_owned()),
        status,
        version: WeightVersion("v7".to_owned()),
        previous: WeightVersion("v6".to_owned()),
        reason: None,
        fenced: Vec::new(),
        total_s: 1.0,
        paused_s: 0.5,
        asleep: false,
        bytes: 100,
        engines: Default::default(),
        phases: Default::default(),
        warnings: Vec::new(),
    }
}

#[test]
fn content_ranges_are_read_strictly() {
    for (text, expected) in [
        ("bytes 0-99/100", Some((0, 100))),
        ("bytes 5-5/*", Some((5, 6))),
        ("bytes 99-99/100", Some((99, 100))),
        ("bytes 0-100/100", None),
        ("bytes 9-8/100", None),
        ("bytes 0-9/99", None),
        ("bytes +0-9/100", None),
        ("bytes 0-18446744073709551615/*", None),
        ("bytes */100", None),
        ("items 0-9/100", None),
        ("", None),
    ] {
        assert_eq!(parse_range(text, 100), expected, "{text:?}");
    }
}
