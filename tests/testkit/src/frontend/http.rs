//! A few HTTP routes in front of a fake frontend, for what wants to talk to `vllm serve` from
//! outside: `GET /health`, `GET /v1/models`, `POST /v1/completions` (no streaming). And one that vLLM lacks:
//! `POST /utility` with `{"method": ..., "args": [...]}` calls a method of all engines, as many routes of vLLM do.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Completion, FakeFrontend, FrontendError, NewRequest};
use crate::msg;

/// How long a completion may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);

/// What a connection asks for.
enum Ask {
    Completion(CompletionAsk),
    Utility { method: String, args: Vec<rmpv::Value>, answer: SyncSender<Vec<Answer>> },
}

/// What one engine says to a call.
type Answer = Result<rmpv::Value, String>;

struct CompletionAsk {
    prompt: Vec<u64>,
    max_tokens: u32,
    /// Header `X-data-parallel-rank`, as vLLM reads it.
    rank: Option<u16>,
    answer: SyncSender<Completion>,
}

/// Serves until `stopped` says so. The frontend must have started.
pub fn serve(
    frontend: &mut FakeFrontend,
    listener: TcpListener,
    model: &str,
    stopped: &dyn Fn() -> bool,
) -> Result<(), FrontendError> {
    let (sender, asks) = mpsc::sync_channel(256);
    let model = model.to_owned();
    // The acceptor ends with the process; nothing waits for it.
    let _ = std::thread::Builder::new().name("http".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let (sender, model) = (sender.clone(), model.clone());
            let _ = std::thread::Builder::new().name("http-connection".to_owned()).spawn(move || {
                // A client that went away needs no answer.
                let _ = connection(stream, &sender, &model);
            });
        }
    });
    pump(frontend, &asks, stopped)
}

/// A call of all engines that has not been answered by all.
struct Call {
    open: Vec<u64>,
    answers: Vec<Answer>,
    answer: SyncSender<Vec<Answer>>,
}

fn pump(
    frontend: &mut FakeFrontend,
    asks: &Receiver<Ask>,
    stopped: &dyn Fn() -> bool,
) -> Result<(), FrontendError> {
    let mut open: BTreeMap<String, (usize, SyncSender<Completion>, Instant)> = BTreeMap::new();
    let mut calls: Vec<Call> = Vec::new();
    let mut number = 0_u64;
    while !stopped() {
        while let Ok(ask) = asks.try_recv() {
            let ask = match ask {
                Ask::Completion(ask) => ask,
                Ask::Utility { method, args, answer } => {
                    let (server, ranks) = (&mut frontend.servers[0], 0..frontend.options.size);
                    let open: Result<_, _> =
                        ranks.map(|rank| server.start_call(rank, &method, args.clone())).collect();
                    calls.push(Call { open: open?, answers: Vec::new(), answer });
                    continue;
                }
            };
            number += 1;
            let id = format!("cmpl-{}-{number}", std::process::id());
            let count = frontend.servers.len() as u64;
            let server = usize::try_from(number % count).unwrap_or_default();
            frontend.servers[server].add(&NewRequest {
                id: id.clone(),
                prompt: ask.prompt,
                max_tokens: ask.max_tokens,
                rank: ask.rank,
            })?;
            open.insert(id, (server, ask.answer, Instant::now()));
        }
        for server in &mut frontend.servers {
            server.pump_for(Duration::from_millis(2))?;
        }
        calls.retain_mut(|call| {
            while let Some(answer) = call.open.first().and_then(|id| frontend.servers[0].result(*id)) {
                call.open.remove(0);
                call.answers.push(answer);
            }
            if call.open.is_empty() {
                // The connection may be gone.
                let _ = call.answer.try_send(std::mem::take(&mut call.answers));
            }
            !call.open.is_empty()
        });
        let mut overdue = Vec::new();
        open.retain(|id, (server, answer, since)| {
            let request = frontend.servers[*server].request(id);
            match request.filter(|request| request.finish.is_some()) {
                Some(done) => {
                    // The connection may be gone.
                    let _ = answer.try_send(done.clone());
                    false
                }
                None if since.elapsed() > REQUEST_LIMIT => {
                    overdue.push((*server, id.clone()));
                    false
                }
                None => true,
            }
        });
        for (server, id) in overdue {
            frontend.servers[server].abort(&[&id])?;
        }
    }
    Ok(())
}

fn connection(stream: TcpStream, asks: &SyncSender<Ask>, model: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace();
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let (method, path) = (method.to_owned(), path.to_owned());
        let (mut length, mut rank) = (0, None);
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            let Some((name, value)) = header.split_once(':') else { continue };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().unwrap_or(0);
            } else if name.eq_ignore_ascii_case("x-data-parallel-rank") {
                rank = value.trim().parse().ok();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let (status, answer) = match (method.as_str(), path.as_str()) {
            ("GET", "/health") => ("200 OK", String::new()),
            ("GET", "/v1/models") => {
                ("200 OK", json!({"object": "list", "data": [{"id": model, "object": "model"}]}).to_string())
            }
            ("POST", "/v1/completions") => completion(&body, rank, asks, model),
            ("POST", "/utility") => utility(&body, asks),
            _ => ("404 Not Found", json!({"error": "no such route"}).to_string()),
        };
        write!(
            writer,
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}",
            answer.len()
        )?;
        writer.flush()?;
    }
}

fn completion(body: &[u8], rank: Option<u16>, asks: &SyncSender<Ask>, model: &str) -> (&'static str, String) {
    let bad = |text: &str| ("400 Bad Request", json!({"error": text}).to_string());
    let Ok(request) = serde_json::from_slice::<Value>(body) else {
        return bad("the body is not JSON");
    };
    let prompt: Vec<u64> = match &request["prompt"] {
        // A byte is a token, as with the tiny models of the tests.
        Value::String(text) => text.bytes().map(u64::from).collect(),
        Value::Array(tokens) => tokens.iter().filter_map(Value::as_u64).collect(),
        _ => return bad("prompt is neither text nor tokens"),
    };
    let max_tokens =
        request["max_tokens"].as_u64().and_then(|tokens| u32::try_from(tokens).ok()).unwrap_or(16);
    let (answer, done) = mpsc::sync_channel(1);
    let ask = Ask::Completion(CompletionAsk { prompt, max_tokens, rank, answer });
    if asks.send(ask).is_err() {
        return ("503 Service Unavailable", json!({"error": "stopping"}).to_string());
    }
    let Ok(done) = done.recv_timeout(REQUEST_LIMIT) else {
        return ("504 Gateway Timeout", json!({"error": "no answer"}).to_string());
    };
    let reason = match done.finish {
        Some(0) => "stop",
        Some(1) => "length",
        Some(2) => "abort",
        _ => {
            return ("500 Internal Server Error", json!({"error": "engine error"}).to_string());
        }
    };
    let text: Vec<String> = done.tokens.iter().map(|token| format!("<{token}>")).collect();
    let answer = json!({
        "object": "text_completion",
        "model": model,
        "choices": [{
            "index": 0,
            "text": text.concat(),
            "token_ids": done.tokens,
            "finish_reason": reason,
        }],
        "usage": {"completion_tokens": done.tokens.len()},
        "rank": done.rank,
        "weight_versions": done.versions,
    });
    ("200 OK", answer.to_string())
}

/// The answers of all ranks, in their order: `{"result": ...}` or `{"error": ...}`.
fn utility(body: &[u8], asks: &SyncSender<Ask>) -> (&'static str, String) {
    let request: Value = serde_json::from_slice(body).unwrap_or_default();
    let (Some(method), Some(args)) = (request["method"].as_str(), request["args"].as_array()) else {
        return ("400 Bad Request", json!({"error": "method or args is missing"}).to_string());
    };
    let Ok(args) = args.iter().map(rmpv::ext::to_value).collect::<Result<Vec<_>, _>>() else {
        return ("400 Bad Request", json!({"error": "args cannot be sent"}).to_string());
    };
    let (answer, done) = mpsc::sync_channel(1);
    if asks.send(Ask::Utility { method: method.to_owned(), args, answer }).is_err() {
        return ("503 Service Unavailable", json!({"error": "stopping"}).to_string());
    }
    let Ok(answers) = done.recv_timeout(REQUEST_LIMIT) else {
        return ("504 Gateway Timeout", json!({"error": "no answer"}).to_string());
    };
    let answers = answers.iter().map(|answer| match answer {
        Ok(value) => json!({"result": msg::to_json(value)}),
        Err(error) => json!({"error": error}),
    });
    ("200 OK", answers.collect::<Value>().to_string())
}
