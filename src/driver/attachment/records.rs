//! What a restarted sidecar must know about frontends: `frontends.json` in the state directory, replaced as a whole.
//!
//! The data path to a frontend lives in other processes and goes on without the sidecar. A record is written before the
//! first route of an attempt is opened and removed after the last is closed, so every route has one.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use dp_sidecar_protocol::FrontendId;
use dp_sidecar_protocol::handshake::Addresses;
use dp_sidecar_protocol::machine::attachment::Engines;
use serde::{Deserialize, Serialize};

use crate::driver::handles::Origin;
use crate::files;

/// Name in the state directory.
const FILE: &str = "frontends.json";
const FORMAT: u32 = 1;
/// Numbers of attachments are set aside in blocks, so that not every attempt writes the file.
const BLOCK: u64 = 16;

/// How a frontend is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attached {
    /// Number of the attachment.
    pub(super) id: FrontendId,
    /// The handshake is over and all routes were open.
    pub(super) complete: bool,
    /// The engines as the frontend was told of them.
    #[serde(flatten)]
    pub(super) engines: Engines,
    /// The frontend's sockets.
    #[serde(flatten)]
    pub(super) addresses: Addresses,
}

impl Attached {
    pub(super) fn api_servers(&self) -> u32 {
        u32::try_from(self.addresses.inputs.len()).unwrap_or(u32::MAX)
    }
}

/// A wanted frontend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) origin: Origin,
    pub(super) attached: Option<Attached>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    format: u32,
    /// No attachment has had this number or a higher one.
    next: u64,
    frontends: BTreeMap<String, Record>,
}

/// The file, and what is in it.
#[derive(Debug)]
pub(super) struct Records {
    /// None: nothing is kept.
    dir: Option<PathBuf>,
    content: Content,
    next: u64,
}

impl Records {
    /// Reads what an earlier sidecar of this state directory left. What cannot be read is said and then gone: routes that
    /// nobody knows are closed.
    pub(super) fn load(state_dir: Option<&Path>) -> Self {
        let content = state_dir.and_then(|dir| match read(dir) {
            Ok(content) => content,
            Err(error) => {
                tracing::error!(dir = %dir.display(), %error, "the previous sidecar's frontends are unknown");
                None
            }
        });
        let content = content.unwrap_or(Content { format: FORMAT, next: 1, frontends: BTreeMap::new() });
        Self { dir: state_dir.map(Path::to_owned), next: content.next, content }
    }

    pub(super) fn all(&self) -> &BTreeMap<String, Record> {
        &self.content.frontends
    }

    /// Number for a new attachment: never used before in this state directory.
    pub(super) fn next_id(&mut self) -> FrontendId {
        if self.next == self.content.next {
            self.content.next += BLOCK;
            self.save();
        }
        self.next += 1;
        FrontendId(self.next - 1)
    }

    /// A rank has routes of an attachment with this number, which may not be on record.
    pub(super) fn used(&mut self, frontend: FrontendId) {
        if frontend.0 >= self.next {
            self.next = frontend.0.saturating_add(1);
            self.content.next = self.next;
        }
    }

    pub(super) fn want(&mut self, address: &str, origin: Origin) {
        self.change(|frontends| {
            frontends.entry(address.to_owned()).or_insert(Record { origin, attached: None }).origin = origin;
        });
    }

    /// None: it is not attached any more.
    pub(super) fn attached(&mut self, address: &str, attached: Option<Attached>) {
        self.change(|frontends| {
            if let Some(record) = frontends.get_mut(address) {
                record.attached = attached;
            }
        });
    }

    pub(super) fn complete(&mut self, address: &str) {
        self.change(|frontends| {
            if let Some(Record { attached: Some(attached), .. }) = frontends.get_mut(address) {
                attached.complete = true;
            }
        });
    }

    pub(super) fn remove(&mut self, address: &str) {
        self.change(|frontends| drop(frontends.remove(address)));
    }

    fn change(&mut self, change: impl FnOnce(&mut BTreeMap<String, Record>)) {
        let before = self.content.frontends.clone();
        change(&mut self.content.frontends);
        if self.content.frontends != before {
            self.save();
        }
    }

    fn save(&self) {
        let Some(dir) = &self.dir else { return };
        // Not synced: it is for a process that follows another one on a running host. Routes do not survive a host.
        let bytes = serde_json::to_vec_pretty(&self.content).map_err(io::Error::from);
        if let Err(error) = bytes.and_then(|bytes| files::replace(dir, FILE, &bytes)) {
            tracing::error!(dir = %dir.display(), %error, "a restarted sidecar will not find its frontends");
        }
    }
}

/// The supervised frontend of the previous sidecar, if it was wanted until its end.
pub(crate) fn supervised(state_dir: &Path) -> Option<String> {
    let content = read(state_dir).ok().flatten()?;
    let mut all = content.frontends.into_iter();
    all.find(|(_, record)| record.origin == Origin::Supervised).map(|(address, _)| address)
}

fn read(dir: &Path) -> io::Result<Option<Content>> {
    let Some(bytes) = files::read(&dir.join(FILE))? else {
        return Ok(None);
    };
    let content: Content = serde_json::from_slice(&bytes)?;
    if content.format != FORMAT {
        return Err(io::Error::other(format!("format {}, expected {FORMAT}", content.format)));
    }
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn attached(id: u64) -> Attached {
        let engines = Engines { size: 2, lockstep: true, parallel_config_hash: Some("h".to_owned()) };
        let addresses = Addresses {
            inputs: vec!["tcp://i".to_owned()],
            outputs: vec!["tcp://o".to_owned()],
            coordinator_input: Some("tcp://b".to_owned()),
            coordinator_output: Some("tcp://k".to_owned()),
            frontend_stats_publish_address: None,
        };
        Attached { id: FrontendId(id), complete: false, engines, addresses }
    }

    #[test]
    fn a_successor_finds_what_was_attached_and_gives_no_number_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::load(Some(dir.path()));
        assert!(records.all().is_empty());
        records.want("a:1", Origin::Command);
        records.want("b:1", Origin::Supervised);
        let ids: Vec<u64> = (0..40).map(|_| records.next_id().0).collect();
        assert_eq!(ids, (1..=40).collect::<Vec<u64>>());
        records.attached("a:1", Some(attached(7)));
        records.attached("b:1", Some(attached(8)));
        records.complete("a:1");
        records.attached("nobody:1", Some(attached(9)));

        let mut successor = Records::load(Some(dir.path()));
        assert_eq!(successor.all(), records.all());
        assert_eq!(successor.all().len(), 2);
        let a = successor.all()["a:1"].attached.clone().unwrap();
        assert!(a.complete && a.id == FrontendId(7));
        assert!(!successor.all()["b:1"].attached.as_ref().unwrap().complete);
        assert!(successor.next_id() > FrontendId(40));
        assert_eq!(supervised(dir.path()).as_deref(), Some("b:1"));

        successor.attached("a:1", None);
        successor.remove("b:1");
        assert_eq!(supervised(dir.path()), None);
        let mut third = Records::load(Some(dir.path()));
        assert_eq!(third.all()["a:1"], Record { origin: Origin::Command, attached: None });
        assert!(third.next_id() > FrontendId(56));
    }

    #[test]
    fn numbers_that_are_in_use_though_nobody_wrote_them_down_are_not_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::load(Some(dir.path()));
        records.used(FrontendId(70));
        records.used(FrontendId(3));
        assert_eq!(records.next_id(), FrontendId(71));
        let mut successor = Records::load(Some(dir.path()));
        assert!(successor.next_id() > FrontendId(71));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_as_none() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in ["", "[]", "{\"format\":2,\"next\":1,\"frontends\":{}}"] {
            fs::write(dir.path().join(FILE), bytes).unwrap();
            assert!(Records::load(Some(dir.path())).all().is_empty());
        }
        assert!(Records::load(None).all().is_empty());
    }
}
