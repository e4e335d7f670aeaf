//! Processes as `/proc` shows them: who is alive, who belongs to whom, and signals that cannot hit
//! a process that got the pid of a dead one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Name of the variable that marks every process of one state directory.
pub const RUN_MARKER: &str = "DP_SIDECAR_RUN_ID";

/// Name of the variable that marks every process of one child: `name:incarnation`.
pub const CHILD_MARKER: &str = "DP_SIDECAR_CHILD";

/// Name of the variable that names the keeper of a process: [`keeper_mark`].
pub const KEEPER_MARKER: &str = "DP_SIDECAR_KEEPER";

/// This process, as the keeper of a state directory: `pid:started:path`.
pub fn keeper_mark(state_dir: &Path) -> io::Result<String> {
    let own = Process::own().ok_or_else(|| io::Error::other("/proc does not show this process"))?;
    Ok(format!("{}:{}:{}", own.pid, own.started, state_dir.display()))
}

/// A process, from `/proc/<pid>/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    pub session: i32,
    /// `R`, `S`, `Z` ...
    pub state: u8,
    /// Clock ticks from boot to its start; with the pid it names a process for good.
    pub started: u64,
}

impl Process {
    /// Reads one process; `None` if there is no such process.
    pub fn read(pid: i32) -> Option<Self> {
        parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// This process.
    pub fn own() -> Option<Self> {
        Self::read(own_pid())
    }

    /// Dead, only not reaped yet.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }

    /// Sends a signal, unless the pid belongs to another process by now. Returns whether it was sent.
    pub fn signal(&self, signal: Signal) -> bool {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return false;
        };
        // The pidfd pins the process; only then is it checked that it is still the one we mean.
        let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return false;
        };
        Self::read(self.pid).is_some_and(|now| now.started == self.started)
            && pidfd_send_signal(&fd, signal).is_ok()
    }
}

/// Takes the fields out of `/proc/<pid>/stat`. The command name is in parentheses and may contain
/// anything, parentheses and spaces too.
fn parse_stat(stat: &str) -> Option<Process> {
    let pid = stat.split_once(' ')?.0.parse().ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let session = fields.next()?.parse().ok()?;
    // Fields 7 to 21 are of no interest; the start time is the 22nd.
    let started = fields.nth(15)?.parse().ok()?;
    Some(Process { pid, parent, group, session, state, started })
}

/// All processes that can be seen.
pub fn processes() -> io::Result<Vec<Process>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
            found.extend(Process::read(pid));
        }
    }
    Ok(found)
}

/// Living and unreaped children of this process, which has one thread.
pub fn own_children() -> io::Result<Vec<Process>> {
    let own = own_pid();
    match children_by_thread(own, own) {
        Ok(children) => Ok(children),
        // Not every kernel has that file.
        Err(_) => Ok(processes()?.into_iter().filter(|process| process.parent == own).collect()),
    }
}

/// Whether a process has living children.
pub fn has_children(pid: i32) -> io::Result<bool> {
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(children) = thread.and_then(|thread| children_by_thread(pid, thread).ok()) else {
            return Ok(processes()?.iter().any(|process| process.parent == pid && !process.is_dead()));
        };
        if children.iter().any(|child| !child.is_dead()) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn children_by_thread(pid: i32, thread: i32) -> io::Result<Vec<Process>> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{thread}/children"))?;
    Ok(list.split_ascii_whitespace().filter_map(|pid| Process::read(pid.parse().ok()?)).collect())
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

/// Which processes belong together.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    /// Those whose environment carries this run id.
    pub run_id: String,
    /// Only those of this child (`name:incarnation`); all children of the run if absent.
    pub child: Option<String>,
    /// Also those of these sessions or process groups.
    pub sessions: BTreeSet<i32>,
    /// Also those of any run of this state directory whose keeper is dead: the directory, and with it the run id that
    /// they carry, may have been lost.
    pub orphans_of: Option<PathBuf>,
}

impl Selector {
    /// The living processes that are selected, and all their descendants, whatever those did to
    /// their session and environment. This process and its ancestors are never selected.
    pub fn find(&self) -> io::Result<Vec<Process>> {
        let all: BTreeMap<i32, Process> =
            processes()?.into_iter().map(|process| (process.pid, process)).collect();
        let protected = lineage(&all, own_pid());
        let mut selected: BTreeSet<i32> = all
            .values()
            .filter(|process| {
                self.sessions.contains(&process.session)
                    || self.sessions.contains(&process.group)
                    || self.is_marked(process.pid)
            })
            .map(|process| process.pid)
            .filter(|pid| !protected.contains(pid))
            .collect();
        // Parents may have larger pids than their children: repeat until nothing is added.
        loop {
            let before = selected.len();
            for process in all.values() {
                if selected.contains(&process.parent) && !protected.contains(&process.pid) {
                    selected.insert(process.pid);
                }
            }
            if selected.len() == before {
                break;
            }
        }
        Ok(selected
            .into_iter()
            .filter_map(|pid| all.get(&pid).copied())
            .filter(|process| !process.is_dead())
            .collect())
    }

    fn is_marked(&self, pid: i32) -> bool {
        let Ok(environ) = fs::read(format!("/proc/{pid}/environ")) else {
            return false;
        };
        let of_run = has_variable(&environ, RUN_MARKER, &self.run_id)
            && self.child.as_ref().is_none_or(|child| has_variable(&environ, CHILD_MARKER, child));
        of_run || self.orphans_of.as_ref().is_some_and(|state_dir| is_orphan(pid, &environ, state_dir))
    }
}

/// Whether a keeper of this state directory started the process, and is dead. Elsewhere, in a container, its path and
/// pids may mean something else.
fn is_orphan(pid: i32, environ: &[u8], state_dir: &Path) -> bool {
    let Some(mark) = variable(environ, KEEPER_MARKER) else {
        return false;
    };
    let mut parts = mark.splitn(3, |byte| *byte == b':');
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
    let (Some(keeper), Some(started)) = (number().and_then(|pid| i32::try_from(pid).ok()), number()) else {
        return false;
    };
    let lives = || Process::read(keeper).is_some_and(|now| now.started == started && !now.is_dead());
    parts.next() == Some(state_dir.as_os_str().as_bytes())
        && ["mnt", "pid"].iter().all(|kind| {
            let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
            namespace("self").is_some_and(|own| namespace(&pid.to_string()) == Some(own))
        })
        && !lives()
}

/// Those of `processes` whose parent is not among them: the ones to ask first, so that they can
/// stop the others in order.
pub fn roots(processes: &[Process]) -> Vec<Process> {
    let pids: BTreeSet<i32> = processes.iter().map(|process| process.pid).collect();
    processes.iter().filter(|process| !pids.contains(&process.parent)).copied().collect()
}

fn has_variable(environ: &[u8], name: &str, value: &str) -> bool {
    variable(environ, name) == Some(value.as_bytes())
}

fn variable<'a>(environ: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut entries = environ.split(|byte| *byte == 0);
    entries.find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

fn lineage(all: &BTreeMap<i32, Process>, pid: i32) -> BTreeSet<i32> {
    let mut found = BTreeSet::from([1]);
    let mut next = pid;
    while next > 0 && found.insert(next) {
        next = all.get(&next).map_or(0, |process| process.parent);
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_stat_line_is_read_although_its_name_has_parentheses_and_spaces() {
        let line = "4242 (tmux: (a) b) S 17 4242 4240 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 99887 1 2";
        let process = parse_stat(line).unwrap();
        assert_eq!(
            process,
            Process { pid: 4242, parent: 17, group: 4242, session: 4240, state: b'S', started: 99887 }
        );
        assert_eq!(parse_stat("1 (x) S 0"), None);
    }

    #[test]
    fn a_marked_process_and_its_unmarked_child_are_found_and_this_process_is_not() {
        let run_id = format!("test-{}", std::process::id());
        let mut child = Command::new("/bin/sh")
            .args(["-c", "env -i /bin/sleep 30 & echo started; wait"])
            .env(RUN_MARKER, &run_id)
            .env(CHILD_MARKER, "engine-0:1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        let selector = |child: Option<&str>| Selector {
            run_id: run_id.clone(),
            child: child.map(str::to_owned),
            ..Selector::default()
        };
        let found = selector(None).find().unwrap();
        let pids: Vec<u32> = found.iter().map(|p| p.pid.unsigned_abs()).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(pids.contains(&child.id()), "{found:?}");
        assert_eq!(roots(&found).len(), 1);
        assert_eq!(selector(Some("engine-0:1")).find().unwrap().len(), 2);
        assert!(selector(Some("engine-0:2")).find().unwrap().is_empty());
        for process in &found {
            assert!(process.signal(Signal::KILL));
        }
        child.wait().unwrap();
        assert!(selector(None).find().unwrap().is_empty());
        assert!(!found[0].signal(Signal::KILL), "a dead process is not signalled");
    }

    #[test]
    fn processes_of_any_run_of_a_state_directory_are_found_when_their_keeper_is_dead_and_only_then() {
        let base = tempfile::tempdir().unwrap();
        let lives = keeper_mark(base.path()).unwrap();
        let [pid, started, path] = lives.splitn(3, ':').collect::<Vec<_>>().try_into().unwrap();
        // The keeper's pid belongs to a process that has started later.
        let dead = format!("{pid}:{}:{path}", started.parse::<u64>().unwrap() - 1);
        let elsewhere = format!("{dead}/another");
        let selector = Selector {
            run_id: "of-the-new-run".to_owned(),
            orphans_of: Some(base.path().to_owned()),
            ..Selector::default()
        };
        for (mark, found) in [(lives.as_str(), 0), (&dead, 1), (&elsewhere, 0), ("", 0), ("x:y", 0)] {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", "echo ready; read end"]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.env(KEEPER_MARKER, mark).spawn().unwrap();
            // For a moment after it was spawned, a process shows no environment.
            child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
            let selected = selector.find().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(selected.len(), found, "{mark}: {selected:?}");
        }
    }

    #[test]
    fn a_variable_is_matched_as_a_whole() {
        let environ = b"A=1\0DP_SIDECAR_RUN_ID=abc\0B=2\0";
        assert!(has_variable(environ, RUN_MARKER, "abc"));
        assert!(!has_variable(environ, RUN_MARKER, "ab"));
        assert!(!has_variable(environ, "SIDECAR_RUN_ID", "abc"));
    }
}
