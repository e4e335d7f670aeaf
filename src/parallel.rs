//! Numbered pieces of work that threads share.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;

/// Has the pieces below `count` done, in their order, by as many threads as the machine has cores, but at most `most`.
/// Each thread does its pieces with a worker of its own. Blocks until all are done, or one has failed.
///
/// # Errors
/// That of the piece whose failure was noticed first, which need not be the lowest one.
pub(crate) fn for_each<W, E>(count: usize, most: usize, worker: impl Fn() -> W + Sync) -> Result<(), E>
where
    W: FnMut(usize) -> Result<(), E>,
    E: Send,
{
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let run = || {
        let mut work = worker();
        while failed.lock().is_none() {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= count {
                return;
            }
            if let Err(error) = work(piece) {
                failed.lock().get_or_insert(error);
            }
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 1..cores.min(most).min(count) {
            scope.spawn(run);
        }
        run();
    });
    failed.into_inner().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_and_the_first_failure_ends_the_work() {
        let done: Vec<AtomicUsize> = (0..1000).map(AtomicUsize::new).collect();
        let count = |piece: usize| {
            done[piece].fetch_add(1, Ordering::Relaxed);
            Ok::<(), usize>(())
        };
        assert_eq!(for_each(done.len(), 4, || count), Ok(()));
        assert!(done.iter().enumerate().all(|(piece, done)| done.load(Ordering::Relaxed) == piece + 1));
        assert_eq!(for_each(0, 4, || |_| Err("there is none")), Ok(()));
        let failing = |piece| if piece >= 10 { Err(piece) } else { Ok(()) };
        assert!(for_each(1 << 40, 4, || failing).is_err_and(|piece| piece < 20));
    }
}
