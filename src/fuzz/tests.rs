//! The bounded run of all targets: the corpus, and mutations of it from fixed seeds.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::memory::taken;
use super::{TARGETS, Target, target};

/// Mutated inputs of each target in an ordinary run.
const ROUNDS: usize = 2000;
/// Memory that any input may take at once. Serde asks for up to a mebibyte ahead of what it reads.
const AT_ONCE: usize = 2 << 20;
/// Memory that any input may take in all, in bytes, and for each of its own.
const IN_ALL: (usize, usize) = (16 << 20, 4096);

pub(super) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// Keeps the input that made a target panic.
struct Witness<'a>(&'a str, &'a [u8]);

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
            let file = folder.join(format!("{}-{}", self.0, blake3::hash(self.1).to_hex()));
            let kept = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&file, self.1));
            eprintln!("{}: fails on {} bytes, kept ({kept:?}) as {}", self.0, self.1.len(), file.display());
        }
    }
}

/// Runs a target within its bounds; whether it accepted the input.
fn one(name: &str, target: Target, input: &[u8]) -> bool {
    let _witness = Witness(name, input);
    let (accepted, taken) = taken(|| target(input));
    assert!(
        taken.largest <= AT_ONCE + 64 * input.len() && taken.total <= IN_ALL.0 + IN_ALL.1 * input.len(),
        "{taken:?} for {} bytes",
        input.len()
    );
    accepted
}

/// Changes some bytes, in ways that parsers of lengths and of nested values do not like.
fn mutate(random: &mut ChaCha8Rng, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    const HOSTILE: [&[u8]; 12] = [
        &[0xff; 8],
        &[0x7f, 0xff, 0xff, 0xff],
        &[0; 8],
        // msgpack: array, map, bin, str and ext that claim 4 GiB.
        &[0xdd, 0xff, 0xff, 0xff, 0xff],
        &[0xdf, 0xff, 0xff, 0xff, 0xff],
        &[0xc6, 0xff, 0xff, 0xff, 0xff],
        &[0xdb, 0xff, 0xff, 0xff, 0xff],
        &[0xc9, 0xff, 0xff, 0xff, 0xff, 3],
        &[0xc0],
        &[0xc1],
        b"\"\\u0000",
        b"18446744073709551615",
    ];
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..=input.len());
        let end = input.len().min(at + random.random_range(0..16));
        match random.random_range(0..10) {
            0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
            1 if at < input.len() => input[at] = random.random(),
            2 => input.truncate(at),
            3 => drop(input.drain(at..end)),
            4 => drop(input.splice(at..at, HOSTILE[random.random_range(0..HOSTILE.len())].iter().copied())),
            5 => drop(input.splice(at..end, HOSTILE[random.random_range(0..HOSTILE.len())].iter().copied())),
            6 => {
                let again = input[at..end].to_vec();
                drop(input.splice(at..at, again));
            }
            7 => {
                let other = &corpus[random.random_range(0..corpus.len())];
                let from = random.random_range(0..=other.len());
                drop(input.splice(at.., other[from..].iter().copied()));
            }
            8 => {
                let deep = random.random_range(1..3000);
                let nested = [0x91, 0x81, b'[', b'{'][random.random_range(0..4)];
                drop(input.splice(at..end, std::iter::repeat_n(nested, deep)));
            }
            _ => drop(input.splice(at..at, [random.random::<u8>(), random.random()])),
        }
        input.truncate(1 << 16);
    }
}

fn mutations(name: &str, target: Target, corpus: &[Vec<u8>], seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut input = corpus[random.random_range(0..corpus.len())].clone();
    mutate(&mut random, &mut input, corpus);
    one(name, target, &input);
}

fn bounded(name: &str) {
    let (target, corpus) = (target(name).unwrap(), corpus(name));
    let accepted = corpus.iter().filter(|input| one(name, target, input)).count();
    assert!(
        accepted >= 2,
        "{accepted} of {} inputs of fuzz/corpus/{name} are accepted: write it anew (scripts/fuzz --corpus)",
        corpus.len()
    );
    for round in 0..ROUNDS {
        mutations(name, target, &corpus, round as u64);
    }
}

macro_rules! bounded_runs {
    ($($name:ident)*) => {
        mod runs {
            $(#[test]
            fn $name() {
                super::bounded(stringify!($name));
            })*
        }

        #[test]
        fn every_target_has_a_bounded_run() {
            let run = [$(stringify!($name)),*];
            assert_eq!(TARGETS.map(|(name, _)| name).to_vec(), run.to_vec());
        }
    };
}

bounded_runs! {
    auth coordinator engine frontend handshake http index keeper link manifest peer scan transfer zmtp
}

/// For `scripts/fuzz` where there is no libFuzzer: `DP_SIDECAR_FUZZ=target:seconds`. Otherwise there is nothing to do.
#[test]
fn as_long_as_is_asked_for() {
    let Ok(asked) = std::env::var("DP_SIDECAR_FUZZ") else {
        return;
    };
    let (name, seconds) = asked.split_once(':').expect("TARGET:SECONDS");
    let end = Instant::now() + Duration::from_secs(seconds.parse().expect("seconds"));
    let (target, corpus) = (target(name).expect("a target"), corpus(name));
    let first: u64 = rand::rng().random();
    let mut rounds = 0u64;
    while Instant::now() < end {
        mutations(name, target, &corpus, first.wrapping_add(rounds));
        rounds += 1;
    }
    eprintln!("{name}: {rounds} inputs from seed {first}, no failure");
}

#[test]
fn memory_that_is_only_asked_for_counts() {
    let (_, taken) = taken(|| Vec::<u8>::with_capacity(5 << 20));
    assert!(taken.largest >= 5 << 20 && taken.total >= taken.largest, "{taken:?}");
}
