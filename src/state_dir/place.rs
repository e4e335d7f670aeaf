//! Whether a place is fit for a state directory: whoever can put another directory, or a link, into its path commands
//! what runs there, and several hosts must not take it for their own.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use nix::unistd::{Gid, Group, Uid, User};

/// Bits of a mode: written by the group, by all others; entries belong to who made them.
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;
/// As many links the kernel follows in a path.
const LINKS: u32 = 40;
/// Owner of what belongs to a user that a user namespace does not know.
const UNKNOWN_USER: u32 = 65_534;

/// File systems that several hosts see, by what `statfs` says. Locks, sockets and pids mean nothing on the other ones.
const NETWORKED: [(u32, &str); 9] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x5346_414f, "AFS"),
    (0x00c3_6400, "CephFS"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
];

/// Why a place is not taken.
#[derive(Debug)]
pub(super) enum Unfit {
    /// Another user can redirect the path at this component, for this reason.
    Exposed { component: PathBuf, why: String },
    /// Its file system is one of several hosts.
    Networked(&'static str),
    /// It cannot be looked at.
    Io { path: PathBuf, error: io::Error },
}

impl Unfit {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { path, error }
    }
}

/// Follows an absolute path from the root, through links, and checks each directory and link on the way. Gives where it
/// leads; what does not exist yet is taken as it is named.
pub(super) fn check_way(path: &Path) -> Result<PathBuf, Unfit> {
    let mut current = PathBuf::from("/");
    let mut open: VecDeque<OsString> = components(path).collect();
    let mut links = 0;
    check_component(
        &current,
        &fs::symlink_metadata(&current).map_err(Unfit::io(&current))?,
        open.is_empty(),
    )?;
    while let Some(name) = open.pop_front() {
        if name == ".." {
            current.pop();
            continue;
        }
        let next = current.join(&name);
        let found = match fs::symlink_metadata(&next) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(open.iter().fold(next, |path, name| path.join(name)));
            }
            Err(error) => return Err(Unfit::io(&next)(error)),
        };
        check_component(&next, &found, open.is_empty())?;
        if !found.is_symlink() {
            current = next;
            continue;
        }
        links += 1;
        if links > LINKS {
            return Err(Unfit::io(&next)(io::Error::other("too many links")));
        }
        let target = fs::read_link(&next).map_err(Unfit::io(&next))?;
        if target.is_absolute() {
            current = PathBuf::from("/");
        }
        for name in components(&target).rev() {
            open.push_front(name);
        }
    }
    Ok(current)
}

fn components(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir))
        .map(|component| component.as_os_str().to_owned())
}

/// The last component is the state directory itself, which is made private once it is known to be ours.
fn check_component(path: &Path, found: &Metadata, last: bool) -> Result<(), Unfit> {
    let exposed = |why: String| Err(Unfit::Exposed { component: path.to_owned(), why });
    let (owner, mode) = (found.uid(), found.mode());
    if !is_trusted(owner) {
        return exposed(format!("it belongs to uid {owner}, expected {} or 0", Uid::effective()));
    }
    if found.is_symlink() || (last && found.is_dir()) {
        return Ok(());
    }
    if !found.is_dir() {
        return Err(Unfit::io(path)(ErrorKind::NotADirectory.into()));
    }
    // Where only owners may replace entries, the entry that follows is checked for its owner.
    let by_group = mode & GROUP_WRITES != 0 && !is_private_group(owner, found.gid());
    if (by_group || mode & OTHERS_WRITE != 0) && mode & STICKY == 0 {
        return exposed(format!("others may write there (mode {:04o})", mode & 0o7777));
    }
    Ok(())
}

fn is_trusted(owner: u32) -> bool {
    // In a user namespace root of the host is nobody: there, nothing could be used otherwise.
    let own = Uid::effective().as_raw();
    owner == 0 || owner == own || (owner == UNKNOWN_USER && !knows_all_users())
}

fn knows_all_users() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

/// A group that has the name of its only member, as many systems make one for each user: no others.
fn is_private_group(owner: u32, group: u32) -> bool {
    let user = User::from_uid(Uid::from_raw(owner)).ok().flatten();
    let group = Group::from_gid(Gid::from_raw(group)).ok().flatten();
    let (Some(user), Some(group)) = (user, group) else {
        return false;
    };
    group.name == user.name && group.mem.iter().all(|member| *member == user.name)
}

/// Refuses file systems of several hosts.
pub(super) fn check_file_system(path: &Path) -> Result<(), Unfit> {
    let found = rustix::fs::statfs(path).map_err(|error| Unfit::io(path)(error.into()))?;
    // The kernel's numbers have 32 bits, in a field that has a sign on some architectures.
    let kind = u32::try_from(found.f_type & 0xffff_ffff).unwrap_or_default();
    networked(kind).map_or(Ok(()), |name| Err(Unfit::Networked(name)))
}

fn networked(kind: u32) -> Option<&'static str> {
    NETWORKED.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name)
}

/// What others have put into a directory while they could.
pub(super) fn check_entries(path: &Path, own: u32) -> Result<(), Unfit> {
    for entry in fs::read_dir(path).map_err(Unfit::io(path))? {
        let entry = entry.map_err(Unfit::io(path))?;
        let owner = match entry.metadata() {
            Ok(found) => found.uid(),
            // Removed meanwhile, by a keeper that ends.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(Unfit::io(&entry.path())(error)),
        };
        if owner != own {
            let why = format!("it belongs to uid {owner}, expected {own}");
            return Err(Unfit::Exposed { component: entry.path(), why });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn why(path: &Path) -> String {
        match check_way(path) {
            Err(Unfit::Exposed { component, why }) => format!("{}: {why}", component.display()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_path_that_others_can_redirect_is_refused_wherever_they_can() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        let (open, link) = (base.join("open"), base.join("link"));
        fs::create_dir(&open).unwrap();
        symlink(&open, &link).unwrap();
        let mode = |mode| fs::set_permissions(&open, Permissions::from_mode(mode)).unwrap();
        assert_eq!(check_way(&open.join("a/b")).unwrap(), open.join("a/b"));
        assert_eq!(check_way(&link.join("../link/a")).unwrap(), open.join("a"));
        mode(0o777);
        assert!(why(&open.join("a")).ends_with("/open: others may write there (mode 0777)"));
        assert!(why(&link.join("a/b")).ends_with("/open: others may write there (mode 0777)"));
        // It may be the state directory itself, which is made private.
        assert_eq!(check_way(&link).unwrap(), open);
        // As /tmp is: entries of others cannot be replaced.
        mode(0o1777);
        check_way(&open.join("a")).unwrap();
        if Uid::effective().is_root() {
            chown(&open, Some(65_533), None).unwrap();
            mode(0o700);
            assert!(why(&open.join("a")).contains("/open: it belongs to uid 65533, expected 0"));
            chown(&open, Some(0), Some(65_533)).unwrap();
            mode(0o770);
            assert!(why(&open.join("a")).ends_with("/open: others may write there (mode 0770)"));
            std::os::unix::fs::lchown(&link, Some(65_533), None).unwrap();
            assert!(why(&link.join("a")).contains("/link: it belongs to uid 65533"));
        }
    }

    #[test]
    fn links_that_never_end_and_files_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let (circle, file) = (base.path().join("circle"), base.path().join("file"));
        symlink(&circle, &circle).unwrap();
        fs::write(&file, "").unwrap();
        assert!(matches!(check_way(&circle.join("a")), Err(Unfit::Io { .. })));
        assert!(matches!(check_way(&file), Err(Unfit::Io { .. })));
    }

    #[test]
    fn file_systems_of_several_hosts_are_known() {
        assert_eq!((networked(0x6969), networked(0xef53)), (Some("NFS"), None));
        check_file_system(Path::new("/proc")).unwrap();
    }

    #[test]
    fn entries_of_others_are_found() {
        let base = tempfile::tempdir().unwrap();
        let own = Uid::effective().as_raw();
        fs::write(base.path().join("a"), "").unwrap();
        check_entries(base.path(), own).unwrap();
        assert!(matches!(check_entries(base.path(), own + 1), Err(Unfit::Exposed { .. })));
    }
}
