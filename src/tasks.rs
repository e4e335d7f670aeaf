//! The tasks of our processes, by name, and the end of a process in which one panics.
//!
//! A panic anywhere (task, job, thread that blocks) ends the process: a sidecar that goes on without one of its tasks
//! is worse than one that is started again, and that way back is tested. Only [`exit_on_panic`], called by the
//! program, makes it so; in unit tests a panic stays in its task.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;
use std::thread;
use std::time::Duration;

use crate::exit_code;

/// A stderr that nobody reads must not keep the process from ending within a second.
const LOG_LIMIT: Duration = Duration::from_millis(900);
/// Of that, for reading the symbols of a backtrace.
const TRACE_LIMIT: Duration = Duration::from_millis(400);

tokio::task_local! {
    static CURRENT: Task;
}

macro_rules! tasks {
    ($($task:ident => $name:literal,)+) => {
        /// What runs for long, or serves a stranger.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Task { $(#[doc = $name] $task,)+ }

        impl Task {
            #[cfg(any(test, feature = "test-support"))]
            pub const ALL: &[Self] = &[$(Self::$task,)+];

            /// Its name in the log.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$task => $name,)+ }
            }
        }
    };
}

tasks! {
    Accelerators => "accelerators thread",
    Admin => "admin",
    AdminCommand => "admin command",
    AdminConnection => "admin connection",
    Attachment => "attachment",
    Attachments => "attachments",
    Control => "control",
    Coordinator => "coordinator",
    Edge => "edge",
    EdgeReader => "edge reader",
    EnginePublisher => "engine publisher",
    Follower => "follower link server",
    FollowerLinking => "follower linking",
    Handshake => "handshake",
    HandshakeConnection => "handshake connection",
    HandshakeListener => "handshake listener",
    Http => "http",
    HttpConnection => "http connection",
    Keeper => "keeper",
    KeeperClient => "keeper client",
    KeeperEvents => "keeper events",
    Lifeline => "lifeline thread",
    LinkClient => "link client",
    Node => "node",
    Outside => "signals and lifeline",
    PauseWatch => "pause watch",
    PeerConnection => "peer connection",
    PeerListener => "peer listener",
    Processes => "processes",
    Queue => "queue",
    Rank => "rank",
    RelayHost => "relay host",
    RelayListener => "relay listener",
    RelayServer => "relay link server",
    Staging => "staging",
    StagingThread => "staging thread",
    SupervisedFrontend => "supervised frontend",
    WeightUpdate => "weight update",
}

/// The future of a task, so that a panic in it is logged with the task's name.
pub async fn named<F: Future>(task: Task, future: F) -> F::Output {
    #[cfg(debug_assertions)]
    let future = rehearsal::panicking(task, future);
    CURRENT.scope(task, future).await
}

/// Ends the process with exit code 1 after any panic, from now on. `last_word` is called with the reason.
pub fn exit_on_panic(last_word: impl Fn(&str) + Send + Sync + 'static) {
    std::panic::set_hook(Box::new(move |panic| {
        let _ = thread::Builder::new().spawn(|| {
            thread::park_timeout(LOG_LIMIT);
            exit();
        });
        last_word(&report(panic));
        exit();
    }));
}

fn report(panic: &PanicHookInfo<'_>) -> String {
    let thread = thread::current();
    let who = CURRENT.try_with(|task| format!("task {}", task.name()));
    let who = who.unwrap_or_else(|_| format!("thread {}", thread.name().unwrap_or("without a name")));
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    let what = panic.payload_as_str().unwrap_or("no reason was given");
    tracing::error!(%who, %at, what, "a panic ends this process");
    if let Some(trace) = backtrace() {
        tracing::error!("{trace}");
    }
    format!("{who} panicked at {at}: {what}")
}

/// If it is asked for. Its symbols are read beside, so that they cannot take the time of what is said after it.
fn backtrace() -> Option<String> {
    let trace = Backtrace::capture();
    if trace.status() != BacktraceStatus::Captured {
        return None;
    }
    let (text, read) = std::sync::mpsc::sync_channel(1);
    thread::Builder::new().spawn(move || text.send(trace.to_string())).ok()?;
    let late = |_| format!("reading the symbols of the backtrace takes longer than {TRACE_LIMIT:?}");
    Some(read.recv_timeout(TRACE_LIMIT).unwrap_or_else(late))
}

/// Without destructors and handlers, which may wait for what the panic has left behind.
#[expect(unsafe_code, reason = "there is no safe way to end a process at once with an exit code")]
fn exit() -> ! {
    // SAFETY: `_exit` may be called at any time, and nothing of this process runs after it.
    unsafe { nix::libc::_exit(i32::from(exit_code::INTERNAL)) }
}

/// Panics in a thread that a test wants to panic.
pub fn rehearse(task: Task) {
    #[cfg(debug_assertions)]
    rehearsal::panic_if_told(task);
    #[cfg(not(debug_assertions))]
    let _ = task;
}

/// Panics that tests ask for. Not in a release build.
#[cfg(debug_assertions)]
mod rehearsal {
    use std::path::PathBuf;
    use std::sync::LazyLock;
    use std::time::Duration;

    use super::Task;

    /// A file with the name of the task that is to panic; the first that finds its name removes the file.
    static ORDER: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| std::env::var_os("DP_SIDECAR_TEST_PANIC").map(PathBuf::from));

    const LOOK: Duration = Duration::from_millis(50);

    pub(super) fn panic_if_told(task: Task) {
        if let Some(order) = &*ORDER
            && std::fs::read_to_string(order).is_ok_and(|name| name == task.name())
            && std::fs::remove_file(order).is_ok()
        {
            panic!("a test asked for it");
        }
    }

    pub(super) async fn panicking<F: Future>(task: Task, future: F) -> F::Output {
        if ORDER.is_none() {
            return future.await;
        }
        let look = async {
            loop {
                panic_if_told(task);
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            biased;
            () = look => unreachable!("it looks for ever"),
            output = future => output,
        }
    }
}
