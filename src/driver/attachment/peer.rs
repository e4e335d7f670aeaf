//! Who listens on a port of this host: a look at the frontend's command line, so that one that cannot
//! fit is refused by name instead of being killed by a HELLO it does not expect.

use std::fs;
use std::path::{Path, PathBuf};

use crate::files;

/// The process behind a listening port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListeningProcess {
    pub pid: u32,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its command line.
    pub argv: Vec<String>,
}

/// Finds the process that listens on a TCP port of this network namespace. `None` if there is none, or
/// if it belongs to somebody whose processes cannot be looked at. Of several (a socket survives in
/// forked children) it is the oldest.
pub(super) fn listening_process(port: u16) -> Option<ListeningProcess> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .find_map(|table| listening_inode(&table, port))?;
    let socket = PathBuf::from(format!("socket:[{inode}]"));
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.into_iter().filter(|pid| has_descriptor(*pid, &socket)).find_map(process)
}

/// The inode of the socket that listens (state 0A) on `port`, from `/proc/net/tcp`.
fn listening_inode(table: &str, port: u16) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let local = fields.nth(1)?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?;
        let (_, local_port) = local.rsplit_once(':')?;
        let matches = state == "0A" && u16::from_str_radix(local_port, 16).ok()? == port;
        if matches { inode.parse().ok() } else { None }
    })
}

fn has_descriptor(pid: u32, target: &Path) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors
        .filter_map(Result::ok)
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|link| link == target))
}

fn process(pid: u32) -> Option<ListeningProcess> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let argv = raw
        .split(|byte| *byte == 0)
        .map(|arg| String::from_utf8_lossy(arg).into_owned())
        .filter(|arg| !arg.is_empty())
        .collect();
    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
    Some(ListeningProcess { pid, cwd, argv })
}

impl ListeningProcess {
    /// The model, if this is a `vllm serve MODEL ..` (or has `--model`).
    fn model(&self) -> Option<&str> {
        let serve = self.argv.iter().position(|arg| arg == "serve")?;
        let next = self.argv.get(serve + 1).map(String::as_str);
        match next {
            Some(model) if !model.starts_with('-') => Some(model),
            _ => self.flag(&["--model"]),
        }
    }

    /// `--data-parallel-size`, if it is on the command line.
    fn data_parallel_size(&self) -> Option<u64> {
        self.flag(&["--data-parallel-size", "-dp"])?.parse().ok()
    }

    /// The last value of a flag: that is the one which counts.
    fn flag(&self, names: &[&str]) -> Option<&str> {
        self.argv.iter().enumerate().rev().find_map(|(at, arg)| {
            if names.contains(&arg.as_str()) {
                return self.argv.get(at + 1).map(String::as_str);
            }
            let (name, value) = arg.split_once('=')?;
            names.contains(&name).then_some(value)
        })
    }
}

/// Why this process cannot be a frontend of the deployment. `None` if it fits, or if it cannot be told.
pub(super) fn mismatch(
    address: &str,
    process: &ListeningProcess,
    model: Option<&str>,
    size: u16,
) -> Option<String> {
    let pid = process.pid;
    // A process that is not a `vllm serve` may be anything, e.g. a proxy.
    let theirs = process.model()?;
    if let Some(their_size) = process.data_parallel_size()
        && their_size != u64::from(size)
    {
        return Some(format!(
            "frontend {address} (pid {pid}) runs with --data-parallel-size {their_size}, this deployment has {size}"
        ));
    }
    let ours = model?;
    if same_model(ours, theirs, &process.cwd) {
        return None;
    }
    Some(format!("frontend {address} (pid {pid}) serves model {theirs}, this deployment runs {ours}"))
}

/// Two names of a model fit if they are the same, or directories with the same `config.json`: a
/// frontend may well be started with a newer checkpoint than the engines were.
fn same_model(ours: &str, theirs: &str, their_cwd: &Path) -> bool {
    if ours == theirs {
        return true;
    }
    let config = |directory: PathBuf| files::read_regular(&directory.join("config.json")).ok();
    let ours_dir = Path::new(ours).is_dir().then(|| PathBuf::from(ours));
    let theirs_dir = Some(their_cwd.join(theirs)).filter(|dir| dir.is_dir());
    match (ours_dir, theirs_dir) {
        (Some(ours), Some(theirs)) => {
            ours.canonicalize().ok() == theirs.canonicalize().ok()
                || match (config(ours), config(theirs)) {
                    (Some(ours), Some(theirs)) => ours == theirs,
                    _ => true,
                }
        }
        (None, None) => false,
        // A name of the hub and a directory: cannot be told.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vllm(args: &[&str]) -> ListeningProcess {
        let mut argv = vec!["python3".to_owned(), "/venv/bin/vllm".to_owned()];
        argv.extend(args.iter().map(|arg| (*arg).to_owned()));
        ListeningProcess { pid: 7, cwd: PathBuf::from("/nonexistent"), argv }
    }

    #[test]
    fn the_process_behind_a_port_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let process = listening_process(port).unwrap();
        assert_eq!(process.pid, std::process::id());
        assert_eq!(process.cwd, std::env::current_dir().unwrap());
        assert!(!process.argv.is_empty());
        drop(listener);
        assert_eq!(listening_process(port), None);
    }

    #[test]
    fn another_size_or_model_is_named_with_both_values() {
        let fits = vllm(&["serve", "org/model", "--data-parallel-size", "2"]);
        assert_eq!(mismatch("a:1", &fits, Some("org/model"), 2), None);
        assert_eq!(mismatch("a:1", &fits, None, 2), None);
        for flags in [
            &["-dp", "3"][..],
            &["--data-parallel-size=3"][..],
            &["-dp", "2", "--data-parallel-size", "3"][..],
        ] {
            let other = vllm(&[&["serve", "org/model"][..], flags].concat());
            let error = mismatch("a:1", &other, Some("org/model"), 2).unwrap();
            assert!(error.contains("a:1") && error.contains("size 3") && error.contains("has 2"), "{error}");
        }
        for args in [
            &["serve", "org/other"][..],
            &["serve", "--model=org/other"][..],
            &["serve", "--port", "1", "--model", "org/other"][..],
        ] {
            let error = mismatch("a:1", &vllm(args), Some("org/model"), 2).unwrap();
            assert!(error.contains("org/other") && error.contains("org/model"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_not_refused() {
        let proxy = ListeningProcess { argv: vec!["haproxy".to_owned()], ..vllm(&[]) };
        assert_eq!(mismatch("a:1", &proxy, Some("org/model"), 2), None);
        let titled = ListeningProcess { argv: vec!["VLLM::APIServer".to_owned()], ..vllm(&[]) };
        assert_eq!(mismatch("a:1", &titled, Some("org/model"), 2), None);
        // Model in a config file.
        let config = vllm(&["serve", "--config", "x.yaml"]);
        assert_eq!(mismatch("a:1", &config, Some("org/model"), 2), None);
    }

    #[test]
    fn checkpoints_of_one_model_are_the_same_model() {
        let root = tempfile::tempdir().unwrap();
        for (name, config) in [("v1", "{}"), ("v2", "{}"), ("other", "{\"a\": 1}")] {
            let directory = root.path().join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("config.json"), config).unwrap();
        }
        let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
        assert!(same_model(&path("v1"), "v2", root.path()));
        assert!(same_model(&path("v1"), &path("v1"), Path::new("/")));
        assert!(!same_model(&path("v1"), "other", root.path()));
        assert!(same_model(&path("v1"), "org/model", root.path()));
    }
}
