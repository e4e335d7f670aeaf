//! The attachment tasks against fake frontends over libzmq. The ranks and the coordinator are played
//! by the test, so that only the attachment is looked at.

mod adoption;
mod fixture;

use std::time::Duration;

use dp_sidecar::driver::handles::{AttachmentCommand, ForFrontendCoordinator, GroupKind, Origin};
use dp_sidecar_protocol::{EngineIndex, FrontendId};
use dp_sidecar_testkit::free_port;
use dp_sidecar_testkit::frontend::{FrontendError, FrontendOptions};
use rmpv::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use fixture::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_frontends_with_three_api_servers_attach_and_a_removed_one_fails_fast() {
    let fixture = fixture(2, GroupKind::Independent, 4);
    let one = frontend(options(2));
    let two = frontend(FrontendOptions { api_servers: 2, ..options(2) });
    let addresses = [one.host_port().to_owned(), two.host_port().to_owned()];
    fixture.add(&addresses[0]).await;
    fixture.add(&addresses[1]).await;
    let ((one, first), (two, second)) = tokio::join!(start(one), start(two));
    assert_eq!((first.unwrap(), second.unwrap()), (2, 2));
    for (frontend, address) in [(&one, &addresses[0]), (&two, &addresses[1])] {
        let shown = fixture.until(address, "attached", &[]).await;
        assert_eq!(shown.api_servers as usize, frontend.servers.len());
        assert_eq!((shown.detail, shown.attachments), (None, 1));
        let stats = &frontend.coordinator.as_ref().unwrap().addresses().front;
        for server in &frontend.servers {
            for rank in 0..2 {
                let ready = &server.registrations()[&rank];
                let address =
                    ready.as_map().unwrap().iter().find(|(key, _)| key.as_str() == Some("dp_stats_address"));
                assert_eq!(address.unwrap().1.as_str(), Some(stats.as_str()));
            }
        }
    }
    let error = fixture.ask(|reply| AttachmentCommand::Add {
        address: addresses[0].clone(),
        origin: Origin::Command,
        reply,
    });
    assert!(error.await.unwrap_err().to_string().contains("already"));

    fixture.remove(&addresses[0]).await.unwrap();
    assert!(hears_of_death(one).await);
    let left = fixture.handle.snapshot.borrow().clone();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].state, "attached");
    assert_eq!(fixture.seen.lock().closed.len(), 2);
    let error = fixture.remove(&addresses[0]).await.unwrap_err().to_string();
    assert!(error.contains(&addresses[1]), "{error}");
    fixture.shut_down().await;
    assert!(hears_of_death(two).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waves_and_stats_pass_between_the_engines_and_the_frontends_coordinator() {
    let fixture = fixture(2, GroupKind::Lockstep, 1);
    let moe = frontend(FrontendOptions { moe: true, ..options(2) });
    let address = moe.host_port().to_owned();
    fixture.add(&address).await;
    let (mut moe, started) = start(moe).await;
    started.unwrap();
    let shown = fixture.until(&address, "attached", &[]).await;
    let id = FrontendId(shown.id.unwrap());

    // Two ranks hear START_DP_WAVE; the coordinator task hears it once.
    moe = tokio::task::spawn_blocking(move || {
        moe.server().first_request(0).unwrap();
        moe
    })
    .await
    .unwrap();
    wait_for("START_DP_WAVE", || !fixture.seen.lock().waves.is_empty()).await;

    // wave_complete(0) of rank 1.
    let mut outputs = vec![Value::Nil; 9];
    outputs[0] = 1.into();
    outputs[1] = Value::Array(Vec::new());
    outputs[3] = Value::F64(1.0);
    outputs[6] = 0.into();
    let sink = fixture.seen.lock().sinks[&id].clone();
    sink.send(ForFrontendCoordinator { rank: EngineIndex(1), frame: encode(&Value::Array(outputs)) })
        .await
        .unwrap();
    let coordinator = moe.coordinator.as_ref().unwrap();
    wait_for("the next wave", || coordinator.state().wave == 1).await;
    assert_eq!(coordinator.state().died, None);
    assert_eq!(fixture.seen.lock().waves, [0]);
    drop(moe);
    wait_for("RemoveFrontend", || fixture.seen.lock().removed.contains(&id)).await;
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_frontend_is_attached_again_when_it_comes_back() {
    let fixture = fixture(2, GroupKind::Independent, 2);
    let first = frontend(options(2));
    let (address, host_port) = (first.address().to_owned(), first.host_port().to_owned());
    fixture.add(&host_port).await;
    // Killed before its engines came: nobody has run its startup.
    fixture.until(&host_port, "handshake", &[]).await;
    drop(first);
    fixture.until(&host_port, "waiting", &[]).await;
    for life in 1..3 {
        let (frontend, started) =
            start(frontend(FrontendOptions { address: address.clone(), ..options(2) })).await;
        assert_eq!(started.unwrap(), 2, "life {life}");
        let shown = fixture.until(&host_port, "attached", &[]).await;
        assert_eq!(shown.attachments, life);
        drop(frontend);
        fixture.until(&host_port, "waiting", &["no listener at"]).await;
        wait_for("the routes to be closed", || fixture.seen.lock().closed.len() as u64 == life * 2).await;
    }
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_waits_for_the_deployment_and_is_told_what_is_missing() {
    let fixture = fixture(2, GroupKind::Independent, 2);
    fixture.deployment.send_replace(deployment(2, GroupKind::Independent, 1));
    let frontend = frontend(options(2));
    let address = frontend.host_port().to_owned();
    fixture.add(&address).await;
    fixture.until(&address, "waiting", &["waiting for ranks 1"]).await;
    fixture.deployment.send_replace(deployment(2, GroupKind::Independent, 2));
    start(frontend).await.1.unwrap();
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frontends_of_another_size_are_refused_by_name_and_the_others_go_on() {
    let fixture = fixture(2, GroupKind::Independent, 8);
    let fits = frontend(options(2));
    let large = frontend(options(3));
    let small = frontend(options(1));
    let addresses: Vec<String> =
        [&fits, &large, &small].map(|frontend| frontend.host_port().to_owned()).to_vec();
    for address in &addresses {
        fixture.add(address).await;
    }
    let small = tokio::spawn(start(small));
    let large = tokio::spawn(async move {
        let mut large = large;
        tokio::task::spawn_blocking(move || {
            let result = large.startup(Duration::from_secs(3));
            (large, result.is_err())
        })
        .await
        .unwrap()
    });
    let (fits, started) = start(fits).await;
    assert_eq!(started.unwrap(), 2);
    fixture.until(&addresses[0], "attached", &[]).await;
    fixture.until(&addresses[1], "refused", &["--data-parallel-size is probably larger than 2"]).await;
    let (small, result) = small.await.unwrap();
    assert!(matches!(result, Err(FrontendError::UnknownIdentity(_))));
    drop(small);
    fixture.until(&addresses[2], "refused", &["--data-parallel-size 1 while this deployment has 2"]).await;
    let (large, failed) = large.await.unwrap();
    assert!(failed);
    fixture.until(&addresses[0], "attached", &[]).await;
    drop((fits, large));
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_parallel_flags_and_other_models_are_refused_with_both_sides_named() {
    let fixture = fixture(2, GroupKind::Lockstep, 8);
    let moe = |size, hash: &str| FrontendOptions {
        moe: true,
        parallel_config_hash: hash.to_owned(),
        ..options(size)
    };
    let flags = frontend(moe(2, "other"));
    let size = frontend(moe(4, "fake-parallel-config"));
    let dense = frontend(options(2));
    let addresses: Vec<String> =
        [&flags, &size, &dense].map(|frontend| frontend.host_port().to_owned()).to_vec();
    for address in &addresses {
        fixture.add(address).await;
    }
    let refused = tokio::spawn(start(flags));
    let others: Vec<_> = [size, dense]
        .into_iter()
        .map(|mut frontend| {
            tokio::task::spawn_blocking(move || {
                let _ = frontend.startup(Duration::from_secs(3));
                frontend
            })
        })
        .collect();
    fixture.until(&addresses[1], "refused", &["--data-parallel-size 4", "this deployment has 2"]).await;
    fixture.until(&addresses[2], "refused", &["does it serve another model"]).await;
    let (flags, result) = refused.await.unwrap();
    assert!(matches!(result, Err(FrontendError::HashMismatch { .. })));
    drop(flags);
    fixture.until(&addresses[0], "refused", &["right after READY", "fake-parallel-config"]).await;
    for other in others {
        other.await.unwrap();
    }
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_without_free_slots_waits_for_them_without_a_second_hello() {
    let fixture = fixture(1, GroupKind::Independent, 2);
    let many = frontend(FrontendOptions { api_servers: 3, ..options(1) });
    let address = many.host_port().to_owned();
    fixture.add(&address).await;
    let started = tokio::spawn(start(many));
    fixture.until(&address, "refused", &["3 API servers", "2 slots are free", "--frontend-slots"]).await;
    assert!(fixture.seen.lock().opened.is_empty());
    fixture.slots[0].send_modify(|snapshot| snapshot.slots.all = 3);
    let (many, started) = started.await.unwrap();
    started.unwrap();
    fixture.until(&address, "attached", &[]).await;
    drop(many);
    fixture.shut_down().await;
}

// === Against vLLM's own startup code ===

/// `scripts/frontend_reference.py`, in a process group of its own.
struct Reference {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Reference {
    fn start(port: u16, arguments: &[&str]) -> Self {
        let python =
            std::env::var_os("DP_SIDECAR_PYTHON").expect("DP_SIDECAR_PYTHON, see scripts/vllm_env.py");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/frontend_reference.py");
        let mut child = Command::new(python)
            .arg(script)
            .args(["--port", &port.to_string()])
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The next event of this name; those before it are dropped.
    async fn event(&mut self, name: &str) -> serde_json::Value {
        let wanted = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                // vLLM's own log lines go there, too.
                let Ok(event) = serde_json::from_str::<serde_json::Value>(&line) else {
                    continue;
                };
                if event["event"] == name {
                    return event;
                }
                assert_ne!(event["event"], "failed", "{event}");
            }
            panic!("the frontend ended without {name}");
        };
        let waited = timeout(PATIENCE, wanted).await;
        waited.unwrap_or_else(|_| panic!("no {name}"))
    }
}

impl Drop for Reference {
    /// SIGKILL to the frontend and its DP coordinator.
    fn drop(&mut self) {
        if let Some(pid) = self.child.id() {
            let group = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs vLLM: scripts/test runs it"]
async fn the_startup_code_of_vllm_accepts_the_virtual_engines_again_and_again() {
    let port = free_port();
    let arguments = ["--api-servers", "2"];
    let mut vllm = Reference::start(port, &arguments);
    let fixture = fixture(2, GroupKind::Independent, 2);
    let address = format!("127.0.0.1:{port}");
    fixture.add(&address).await;
    for life in 1..3 {
        let stats = vllm.event("listening").await["stats"].clone();
        assert!(stats.is_string());
        for _ in 0..4 {
            assert_eq!(vllm.event("registered").await["stats"], stats);
        }
        vllm.event("started").await;
        let shown = fixture.until(&address, "attached", &[]).await;
        assert_eq!((shown.attachments, shown.api_servers), (life, 2));
        if life == 1 {
            drop(vllm);
            fixture.until(&address, "waiting", &["no listener at"]).await;
            vllm = Reference::start(port, &arguments);
        }
    }
    fixture.remove(&address).await.unwrap();
    assert_eq!(vllm.event("output").await["text"], "ENGINE_CORE_DEAD");
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs vLLM: scripts/test runs it"]
async fn vllm_checks_the_config_hash_of_moe_engines_and_the_sidecar_says_which() {
    let port = free_port();
    let mut vllm = Reference::start(port, &["--moe"]);
    let fixture = fixture(2, GroupKind::Lockstep, 2);
    let address = format!("127.0.0.1:{port}");
    fixture.add(&address).await;
    let hash = vllm.event("hash").await["value"].clone();
    let hash = hash.as_str().unwrap();
    let failed = timeout(PATIENCE, async {
        while let Some(line) = vllm.lines.next_line().await.unwrap() {
            if line.contains("Configuration mismatch") {
                return;
            }
        }
        panic!("no mismatch");
    });
    failed.await.unwrap();
    fixture.until(&address, "refused", &["right after READY", "fake-parallel-config"]).await;
    drop(vllm);
    // As if the engines had been started with the frontend's flags.
    let fits = with_hash(2, GroupKind::Lockstep, 2, hash);
    fixture.deployment.send_replace(fits);
    let mut vllm = Reference::start(port, &["--moe"]);
    vllm.event("started").await;
    fixture.until(&address, "attached", &[]).await;
    fixture.shut_down().await;
    assert_eq!(vllm.event("output").await["text"], "ENGINE_CORE_DEAD");
}
