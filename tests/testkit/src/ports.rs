//! TCP ports for programs that bind them themselves, without a moment in which another test has the same one.

use std::fs::{File, TryLockError};
use std::net::{Ipv4Addr, TcpListener};
use std::process;
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the ports that a kernel gives out by itself (`net.ipv4.ip_local_port_range`, from 32768), so that no
/// connection of anybody gets one of these. The Python tests have those from 20000 on.
const FIRST: u16 = 10_000;
const COUNT: u16 = 8_000;

/// A port of the loopback that is free, and that no other test process is given as long as this one lives.
///
/// # Panics
/// When all are taken, or the lock files cannot be written.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let folder = std::env::temp_dir().join("dp-sidecar-test-ports");
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    // Processes that start side by side have neighbouring numbers; this spreads them.
    let begin = u16::try_from(u64::from(process::id()) * 7_919 % u64::from(COUNT)).unwrap_or(0);
    for _ in 0..COUNT {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = FIRST + (begin + offset) % COUNT;
        let path = folder.join(port.to_string());
        let claim = File::options().create(true).append(true).open(&path);
        let claim = claim.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        match claim.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(error)) => panic!("{}: {error}", path.display()),
        }
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            // Claimed until this process ends: the kernel gives the lock back then.
            std::mem::forget(claim);
            return port;
        }
    }
    panic!("none of {COUNT} ports from {FIRST} on is free");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_port_is_given_twice_and_each_is_claimed() {
        let ports: Vec<u16> = (0..20).map(|_| free_port()).collect();
        let mut different = ports.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), ports.len(), "{ports:?}");
        for port in ports {
            // A second description of the file stands for another process.
            let path = std::env::temp_dir().join("dp-sidecar-test-ports").join(port.to_string());
            let other = File::options().append(true).open(path).expect("its lock file");
            assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)), "{port} is not claimed");
        }
    }
}
