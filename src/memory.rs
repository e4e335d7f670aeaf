//! How much memory this process and what it starts may use: what the machine has, and what the control groups on the
//! way up from this process leave of it. A control group that runs out ends a process of its choice, most likely an
//! engine.

use std::fs;
use std::path::{Path, PathBuf};

/// Reads `67108864`, `64MiB`, `64M` or `2g`; units are powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let factor: u64 = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return Err(format!("unit {unit:?}, expected KiB, MiB, GiB or TiB")),
    };
    let number: u64 = number.parse().map_err(|_| "expected a number of bytes, like 512MiB".to_owned())?;
    let bytes = number.checked_mul(factor).filter(|bytes| *bytes < 1 << 62);
    bytes.ok_or_else(|| "more bytes than any machine has".to_owned())
}

/// Bytes that the processes here may use together, by the machine and by every control group.
pub(crate) fn limit() -> u64 {
    limit_below(Path::new("/"))
}

/// Bytes that may still be taken without anything here running out of memory, and what bounds them. Some are left for
/// those who need them meanwhile; what is cached of files counts as free, because it is given up first.
pub(crate) fn available(root: &Path) -> (u64, String) {
    let spare = |limit: u64| (limit / 32).clamp(64 << 20, 1 << 30);
    let own = machine(root, "MemAvailable:").map(|free| {
        let reserve = spare(machine(root, "MemTotal:").unwrap_or(0));
        (free.saturating_sub(reserve), "the machine".to_owned())
    });
    let groups = groups(root);
    let bounded = groups.iter().filter_map(|group| {
        let limit = group.limit()?;
        let free = limit.saturating_sub(group.used()?).saturating_sub(spare(limit));
        Some((free, format!("the control group {}", group.directory.display())))
    });
    own.into_iter().chain(bounded).min().unwrap_or_else(|| (u64::MAX, "nothing".to_owned()))
}

fn limit_below(root: &Path) -> u64 {
    let machine = machine(root, "MemTotal:").unwrap_or(u64::MAX);
    groups(root).iter().filter_map(Group::limit).fold(machine, u64::min)
}

/// A line of `/proc/meminfo`.
fn machine(root: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A control group that this process is in.
struct Group {
    directory: PathBuf,
    /// Version 2, with other names.
    unified: bool,
}

impl Group {
    fn number(&self, unified: &str, legacy: &str) -> Option<u64> {
        let name = if self.unified { unified } else { legacy };
        // "max" is no number, and no limit.
        fs::read_to_string(self.directory.join(name)).ok()?.trim().parse().ok()
    }

    /// Bytes that it cannot give up.
    fn used(&self) -> Option<u64> {
        let all = self.number("memory.current", "memory.usage_in_bytes")?;
        let names = if self.unified {
            ["inactive_file ", "active_file "]
        } else {
            ["total_inactive_file ", "total_active_file "]
        };
        let stat = fs::read_to_string(self.directory.join("memory.stat")).unwrap_or_default();
        let cached = stat.lines().filter_map(|line| {
            let value = names.iter().find_map(|name| line.strip_prefix(name))?;
            value.trim().parse::<u64>().ok()
        });
        Some(all.saturating_sub(cached.sum()))
    }

    fn limit(&self) -> Option<u64> {
        // Beyond `memory.high` processes are slowed down until they hardly run.
        let high = self.number("memory.high", "memory.soft_limit_in_bytes").filter(|_| self.unified);
        let max = self.number("memory.max", "memory.limit_in_bytes");
        // Version 1 writes "no limit" as the largest multiple of a page.
        high.into_iter().chain(max).min().filter(|limit| *limit < 1 << 62)
    }
}

/// The control groups for memory that this process is in, of both versions, from its own up to the topmost that can be
/// seen from here.
fn groups(root: &Path) -> Vec<Group> {
    let read = |name| fs::read_to_string(root.join("proc/self").join(name)).unwrap_or_default();
    let (own, mounts) = (read("cgroup"), read("mountinfo"));
    let mut found = Vec::new();
    // `31 23 0:28 /top /place rw shared:1 - type source options`
    for line in mounts.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        let (mount, kind): (Vec<&str>, Vec<&str>) = (mount.split(' ').collect(), kind.split(' ').collect());
        let ([_, _, _, top, place, ..], [kind, _, options, ..]) = (&mount[..], &kind[..]) else { continue };
        let unified = *kind == "cgroup2";
        if !(unified || *kind == "cgroup" && options.split(',').any(|option| option == "memory")) {
            continue;
        }
        // `4:memory:/path`, `0::/path`
        let path = own.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let ours = if unified {
                controllers.is_empty()
            } else {
                controllers.split(',').any(|name| name == "memory")
            };
            ours.then_some(path)
        });
        let Some(path) = path else { continue };
        // Outside of the mount, as seen from another namespace: its top is all that can be seen.
        let below = Path::new(path).strip_prefix(top).unwrap_or_else(|_| Path::new(""));
        let place = root.join(place.trim_start_matches('/'));
        for above in below.ancestors() {
            found.push(Group { directory: place.join(above), unified });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of 16 GiB.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let files =
            [("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")].iter().chain(files);
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    #[test]
    fn the_limit_is_that_of_the_tightest_group_on_the_way_up() {
        assert_eq!(limit_below(machine(&[]).path()), 16 << 30);
        let unified = machine(&[
            ("proc/self/cgroup", "0::/pod/engine\n"),
            ("proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw shared:1 - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/pod/engine/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/memory.max", "4294967296\n"),
        ]);
        assert_eq!(limit_below(unified.path()), 4 << 30);
        let legacy = machine(&[
            ("proc/self/cgroup", "5:cpu:/\n4:memory,hugetlb:/docker/abc\n0::/\n"),
            (
                "proc/self/mountinfo",
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2147483648\n"),
        ]);
        assert_eq!(limit_below(legacy.path()), 2 << 30);
        let free = machine(&[
            ("proc/self/cgroup", "4:memory:/\n"),
            ("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(limit_below(free.path()), 16 << 30);
    }

    #[test]
    fn what_is_left_is_what_the_tightest_group_leaves_without_a_reserve() {
        let (bytes, by) = available(machine(&[]).path());
        assert_eq!((bytes, by.as_str()), ((8 << 30) - (512 << 20), "the machine"));
        let root = machine(&[
            ("proc/self/cgroup", "0::/pod/engine\n"),
            ("proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/pod/engine/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/pod/memory.current", "3221225472\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 1073741824\nactive_file 536870912\n"),
        ]);
        let (bytes, by) = available(root.path());
        assert_eq!(bytes, (5 << 29) - (128 << 20));
        assert!(by.ends_with("sys/fs/cgroup/pod"), "{by}");
        let root = machine(&[
            ("proc/self/cgroup", "4:memory:/a\n"),
            ("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2147483648\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "2147483648\n"),
            ("sys/fs/cgroup/memory/a/memory.stat", "total_inactive_file 1073741824\n"),
        ]);
        assert_eq!(available(root.path()).0, (1 << 30) - (64 << 20));
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("1", 1), ("64MiB", 64 << 20), ("64m", 64 << 20), ("3 GB", 3 << 30), ("2t", 2 << 40)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "5x", "1.5G", "99999999T"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
