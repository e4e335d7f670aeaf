//! The `sidecar` program from outside: command lines, checks, exit codes, and the subcommands
//! against an admin socket with scripted answers.

mod scripted;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

fn command(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidecar"));
    command
        .args(line.split_whitespace())
        .env_clear()
        .env("PATH", "/bin:/usr/bin")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

async fn output(command: &mut Command) -> Output {
    timeout(PATIENCE, command.output()).await.unwrap().unwrap()
}

async fn sidecar(line: &str) -> Output {
    output(&mut command(line)).await
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn model(config: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    dir
}

// === run: command lines and checks ===

/// The lines of a dry run that start with `name`, without that name.
async fn planned(command: &mut Command, name: &str) -> String {
    let output = output(command).await;
    let stdout = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let prefix = format!("{name}: ");
    stdout
        .lines()
        .find_map(|line| line.strip_prefix(&prefix))
        .unwrap_or_else(|| panic!("{name} in {stdout}"))
        .to_owned()
}

#[tokio::test]
async fn variables_that_mislead_are_named() {
    let line = "run --dp-rank 0 -dp 2 --model-kind dense --serve --dry-run -- tiny";
    let with = |variables: &[(&str, &str)]| {
        let mut command = command(line.strip_prefix("run ").unwrap());
        command.envs(variables.iter().copied());
        command
    };
    let said =
        output(&mut with(&[("SIDECAR_PORT", "tcp://10.0.0.1:80"), ("SIDECAR_PORT_80_TCP_PORT", "80")])).await;
    assert!(said.status.success(), "{}", text(&said.stderr));
    let stderr = text(&said.stderr);
    assert!(stderr.contains("SIDECAR_PORT is not used: its value is that of Kubernetes"), "{stderr}");
    let bind = with(&[("VLLM_CPU_OMP_THREADS_BIND", "0|1"), ("CUDA_VISIBLE_DEVICES", "")]);
    for (name, cores) in [("engine-0", "=0 "), ("engine-1", "=1 ")] {
        let mut command = with(&[("VLLM_CPU_OMP_THREADS_BIND", "0|1")]);
        let planned = planned(&mut command, name).await;
        assert!(planned.starts_with(&format!("VLLM_CPU_OMP_THREADS_BIND{cores}")), "{planned}");
    }
    let mut bind = bind;
    let said = text(&output(&mut bind).await.stdout);
    assert!(said.contains("CUDA_VISIBLE_DEVICES is empty: engines get no accelerators"), "{said}");
    let said = text(&output(&mut with(&[("VLLM_CPU_OMP_THREADS_BIND", "0")])).await.stderr);
    assert!(said.contains("VLLM_CPU_OMP_THREADS_BIND=\"0\" has 1 lists of cores"), "{said}");
    let said = text(&output(&mut with(&[("VLLM_PLUGINS", "mine")])).await.stdout);
    assert!(said.contains("VLLM_PLUGINS=\"mine\" leaves out dp_sidecar"), "{said}");
}

#[tokio::test]
async fn a_frontend_on_loopback_is_refused_where_other_hosts_are_to_reach_it() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef").unwrap();
    for (leader, frontend, refused) in [
        ("10.0.0.1:7000", "127.0.0.1:13345", true),
        ("leader.svc:7000", "localhost:13345", true),
        ("10.0.0.1:7000", "[::1]:13345", true),
        ("10.0.0.1:7000", "10.0.0.1:13345", false),
        // Nodes of one host, as in tests.
        ("127.0.0.1:7000", "127.0.0.1:13345", false),
    ] {
        let line = format!(
            "--dp-rank 0 -dp 4 -dpl 2 --model-kind dense --dry-run --leader {leader} --frontend {frontend} \
             --auth-token-file {}",
            secret.display()
        );
        let said = sidecar(&line).await;
        let stderr = text(&said.stderr);
        assert_eq!(said.status.code(), Some(if refused { 2 } else { 0 }), "{stderr}");
        assert_eq!(
            stderr.contains("a loopback address, but the sidecars of other nodes connect to it"),
            refused
        );
    }
}

#[tokio::test]
async fn each_rank_gets_a_launcher_of_its_own_and_the_frontend_its_own_flags() {
    let line = "--dp-rank 0 -dp 2 --model-kind dense --serve --port 8100 --dry-run -- tiny \
                --max-model-len 256 -tp 2 --api-key secret --uvicorn-log-level warning";
    let with_devices = |line: &str| -> Command {
        let mut command = command(line);
        command.env("CUDA_VISIBLE_DEVICES", "4,5,6,7");
        command
    };
    assert_eq!(
        planned(&mut with_devices(line), "engine-1").await,
        "CUDA_VISIBLE_DEVICES=6,7 vllm serve tiny --headless --data-parallel-size 2 \
         --data-parallel-size-local 1 --data-parallel-start-rank 1 --data-parallel-address \
         127.0.0.1 --data-parallel-rpc-port 0 --max-model-len 256 -tp 2"
    );
    assert_eq!(
        planned(&mut with_devices(line), "frontend").await,
        "vllm serve tiny --data-parallel-size 2 --data-parallel-size-local 0 \
         --data-parallel-address 127.0.0.1 --data-parallel-rpc-port 0 --port 8100 \
         --api-server-count 1 --shutdown-timeout 20 --max-model-len 256 -tp 2 --api-key secret \
         --uvicorn-log-level warning"
    );
}

#[tokio::test]
async fn a_dry_run_says_where_each_value_comes_from() {
    let mut command = command("-dpr 0 -dp 2 --dry-run --model-kind moe");
    command.env("SIDECAR_FRONTEND", "a:1,b:2");
    command.env("SIDECAR_DATA_PARALLEL_SIZE", "9");
    let output = output(&mut command).await;
    let stdout = text(&output.stdout);
    for (option, value, origin) in [
        ("--data-parallel-size", "2", "flag"),
        ("--frontend", "a:1,b:2", "SIDECAR_FRONTEND"),
        ("--orphan-grace", "60s", "default"),
    ] {
        let found =
            stdout.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == [option, value, origin]);
        assert!(found, "{option} {value} {origin} in {stdout}");
    }
    assert!(stdout.contains("waits for engines at 127.0.0.1:29550"), "{stdout}");
}

#[tokio::test]
async fn the_models_configuration_tells_whether_ranks_step_in_lockstep() {
    for (config, expected) in [
        (r#"{"model_type":"llama"}"#, "dense (independent ranks)"),
        (r#"{"num_experts":4}"#, "moe (lockstep ranks)"),
    ] {
        let dir = model(config);
        let line = format!("--dp-rank 0 -dp 2 --dry-run -- {}", dir.path().display());
        let stdout = text(&sidecar(&line).await.stdout);
        assert!(stdout.contains(expected), "{stdout}");
    }
    let single = sidecar("--dp-rank 0 --dry-run -- /no/such/model").await;
    assert!(
        text(&single.stdout).contains("dense (independent ranks)"),
        "a single rank has no group, whatever the model"
    );
}

#[tokio::test]
async fn the_kind_of_a_model_that_is_not_in_the_cache_is_asked_of_its_fetched_configuration() {
    let dir = model(r#"{"num_experts":4}"#);
    let at = dir.path().display();
    let script = |name: &str, text: String| {
        std::fs::write(dir.path().join(name), text).unwrap();
        std::fs::set_permissions(dir.path().join(name), Permissions::from_mode(0o755)).unwrap();
    };
    script("vllm", format!("#!{at}/python3\n"));
    let line = format!("--dp-rank 0 -dp 2 --dry-run --vllm-bin {at}/vllm -- org/name --revision v2");
    script("python3", format!("#!/bin/sh\n[ \"$3 $4\" = 'org/name v2' ] && echo {at}/config.json\n"));
    let stdout = text(&output(command(&line).env("HF_HOME", dir.path())).await.stdout);
    assert!(stdout.contains("moe (lockstep ranks)"), "{stdout}");
    // What it complains of is said, with the ways out.
    script("python3", "#!/bin/sh\nprintf 'Traceback\\n404 Client Error\\n' >&2\nexit 1\n".to_owned());
    let refused = output(command(&line).env("HF_HOME", dir.path())).await;
    assert_eq!(refused.status.code(), Some(2));
    let stderr = text(&refused.stderr);
    for part in ["org/name", &format!("{at}/hub"), "404 Client Error", "HF_TOKEN", "--model-kind dense"] {
        assert!(stderr.contains(part), "{part:?} in {stderr}");
    }
}

#[tokio::test]
async fn a_command_line_that_makes_no_sense_ends_with_2_and_says_what_would_be_right() {
    let dense = model(r#"{"model_type":"llama"}"#);
    let dense = dense.path().display();
    for (line, expected) in [
        ("--model-kind dense".to_owned(), "--dp-rank is required: the first DP rank"),
        ("--dp-rank 2 -dp 2 --model-kind dense".into(), "ranks are 0 to 1"),
        (
            "--dp-rank 1 -dp 2 --model-kind dense".into(),
            "--data-parallel-size-local is required with --dp-rank 1",
        ),
        ("--dp-rank 0 -dp 2 -dpl 3 --model-kind dense".into(), "means ranks 0 to 2"),
        ("--dp-rank 0 -dp 2 -dpl 1 --model-kind dense".into(), "--leader is required: HOST:PORT"),
        (
            "--dp-rank 1 -dp 2 -dpl 1 --leader h:1 --model-kind dense".into(),
            "--auth-token-file is required with --leader: a file",
        ),
        (
            "--dp-rank 0 -dp 2 --leader h:1 --model-kind dense".into(),
            "--data-parallel-size-local is required with --leader",
        ),
        (
            "--dp-rank 0 -dp 2 -dpl 1 --leader h --model-kind dense".into(),
            "--leader \"h\": HOST:PORT expected",
        ),
        (
            format!("--dp-rank 0 -dp 2 -dpl 1 --leader h:1 --auth-token-file /dev/null -- {dense}"),
            "16 to 4096",
        ),
        (
            format!("--dp-rank 0 -dp 2 -dpl 1 --leader h:1 --auth-token-file /no/such/file -- {dense}"),
            "cannot be read",
        ),
        (
            format!("--dp-rank 1 -dp 2 -dpl 1 --leader h:1 --auth-token-file x --serve -- {dense}"),
            "only the sidecar of rank 0 has frontends",
        ),
        ("--dp-rank 0 -dp 0 --model-kind dense".into(), "at least 1 expected"),
        ("--dp-rank 0 -dpa= --model-kind dense".into(), "the address is empty"),
        ("--dp-rank 0 -dpp 0 --model-kind dense".into(), "a port above 0"),
        ("--dp-rank 0 --frontend nohost --model-kind dense".into(), "HOST:PORT expected"),
        ("--dp-rank 0 --frontend h:0 --model-kind dense".into(), "1 to 65535 expected"),
        ("--dp-rank 0 -dp 2".into(), "no model is named"),
        ("--dp-rank 0 -dp 2 -- /no/such/model".into(), "--model-kind dense"),
        ("--dp-rank 0 --serve --model-kind dense".into(), "give the model and vLLM's flags after `--`"),
        ("--dp-rank 0 --prefault --model-kind dense".into(), "--prefault: name the model"),
        ("--dp-rank 0 --prefault --model-kind dense -- no/model".into(), "no/model is neither a directory"),
        (format!("--dp-rank 0 -- {dense} -dp 3"), "3 after `--`, but 1"),
        (format!("--dp-rank 0 -- {dense} -dph"), "cannot be used with hosted engines"),
        (format!("--dp-rank 0 --serve --port 1 -- {dense} --port 2"), "1 before `--`, but 2"),
        (format!("--dp-rank 0 --serve -asc 9 -- {dense}"), "--frontend-slots 8"),
        (format!("--dp-rank 0 --device-ids 0 -- {dense} -tp 2"), "need 2 devices, but 1"),
        (format!("--dp-rank 0 -dp 2 -- {dense} --config x.yaml"), "because --config may change"),
    ] {
        let output = sidecar(&line).await;
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert!(stderr.contains(expected), "{line}: {stderr}");
        let last: serde_json::Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
        assert_eq!(last["exit"], 2, "{line}");
        assert!(last["node_rank"].is_u64(), "{line}");
        assert!(last["reason"].as_str().unwrap().contains(expected), "{line}");
    }
}

#[tokio::test]
async fn a_dry_run_tells_the_role_and_never_the_secret() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "a secret nobody may see").unwrap();
    for (line, role) in [
        ("--dp-rank 0 -dp 4 -dpl 2", "leader, waits at node0:29560 for the nodes of ranks 2 to 3"),
        ("--dp-rank 2 -dp 4 -dpl 2", "follower of the sidecar at node0:29560"),
    ] {
        let line = format!(
            "{line} --leader node0:29560 --auth-token-file {} --model-kind dense --dry-run",
            token.display()
        );
        let output = sidecar(&line).await;
        let stdout = text(&output.stdout);
        assert!(output.status.success(), "{stdout}{}", text(&output.stderr));
        assert!(stdout.contains(role), "{stdout}");
        assert!(!stdout.contains("nobody may see"));
    }
}

#[tokio::test]
async fn a_program_that_is_not_there_is_told_before_anything_is_started() {
    let dense = model(r#"{"model_type":"llama"}"#);
    let state = tempfile::tempdir().unwrap();
    let line = format!(
        "--dp-rank 0 --vllm-bin /no/such/vllm --state-dir {} -- {}",
        state.path().join("s").display(),
        dense.path().display()
    );
    let output = sidecar(&line).await;
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("/no/such/vllm: no such program"));
    assert!(!state.path().join("s").exists());
}

#[tokio::test]
async fn a_state_directory_in_use_names_who_uses_it() {
    let dir = tempfile::tempdir().unwrap();
    let state = dp_sidecar::state_dir::StateDir::open(dir.path()).unwrap();
    let line = format!("--dp-rank 0 --model-kind dense --state-dir {}", state.path().display());
    let output = sidecar(&line).await;
    assert_eq!(output.status.code(), Some(8));
    let expected = format!("is in use by pid {}", std::process::id());
    assert!(text(&output.stderr).contains(&expected));
}

#[tokio::test]
async fn a_port_in_use_is_told_before_anything_is_started() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let dense = model(r#"{"model_type":"llama"}"#);
    let state = tempfile::tempdir().unwrap();
    let line = format!(
        "--dp-rank 0 --vllm-bin /bin/true --state-dir {} --serve --host 127.0.0.1 --port {port} \
         -- {}",
        state.path().display(),
        dense.path().display()
    );
    let output = sidecar(&line).await;
    assert_eq!(output.status.code(), Some(8));
    assert!(text(&output.stderr).contains(&format!("--port {port}: not available to the frontend")));
}

#[tokio::test]
async fn addresses_that_collide_or_are_taken_are_told_before_anything_is_started() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let state = tempfile::tempdir().unwrap();
    let dense = model(r#"{"model_type":"llama"}"#);
    let (state, dense) = (state.path().display(), dense.path().display());
    let start = format!("--dp-rank 0 --vllm-bin /bin/true --state-dir {state} --http 127.0.0.1:{port}");
    for (line, code, expected) in [
        (format!("{start} --dry-run --serve --port {port} -- {dense}"), 2, "--http and --port: both"),
        (
            format!("{start} --dry-run --data-parallel-rpc-port {port}"),
            2,
            "--http and --data-parallel-rpc-port",
        ),
        (format!("{start} -- {dense}"), 8, "cannot listen there"),
    ] {
        let output = sidecar(&line).await;
        assert_eq!(output.status.code(), Some(code), "{line}: {}", text(&output.stderr));
        let said = text(&output.stderr);
        assert!(said.contains(expected) && said.contains(&port.to_string()), "{line}: {said}");
    }
}

#[tokio::test]
async fn help_shows_examples_and_exit_codes() {
    for line in ["--help", "run --help", ""] {
        let output = sidecar(line).await;
        let stdout = text(&output.stdout);
        assert!(output.status.success());
        for expected in ["Examples:", "sidecar update --path", "Exit codes:", "128+n"] {
            assert!(stdout.contains(expected), "{line}: {expected}");
        }
        assert!(!stdout.contains("keeper "), "hidden");
    }
}
