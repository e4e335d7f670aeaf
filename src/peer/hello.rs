//! What a node says about itself before anything is started, and how two nodes are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use serde::{Deserialize, Serialize};

/// How long a peer has to read the last word that it is told.
pub(super) const LAST_WORD: Duration = Duration::from_secs(2);
/// Longest text of a value in an error message.
const SHOWN: usize = 200;

/// A node's first frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeHello {
    /// First DP rank of the node.
    pub start_rank: u16,
    /// DP ranks of the node.
    pub size_local: u16,
    /// Names the state directory: stays the same when the sidecar is started again.
    pub run_id: String,
    /// Of the newest leader that the node has followed; of a leader its own. See [`Epoch`](super::epoch::Epoch).
    #[serde(default)]
    pub epoch: u64,
    /// For people.
    pub host: String,
    /// For people.
    pub pid: u32,
    /// Address that the other nodes reach, if the user named one.
    pub address: Option<IpAddr>,
    /// What must be the same on all nodes, by name. A name that another node has and this one has not counts as
    /// a difference.
    pub values: BTreeMap<String, String>,
    /// Names of values that this node cannot tell: they are not compared.
    pub unknown: BTreeSet<String>,
}

/// A value in an error message.
fn shown(value: Option<&String>) -> String {
    let Some(value) = value else { return "(not given)".to_owned() };
    match value.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &value[..end]),
        None if value.is_empty() => "(given)".to_owned(),
        None => value.clone(),
    }
}

impl NodeHello {
    /// One behind the node's last rank.
    pub fn end_rank(&self) -> u16 {
        self.start_rank.saturating_add(self.size_local)
    }

    pub fn ranks(&self) -> Vec<EngineIndex> {
        (self.start_rank..self.end_rank()).map(EngineIndex).collect()
    }

    /// Its ranks and where it runs, for people.
    pub fn name(&self) -> String {
        format!("node {} ({})", self.host, ranks_text(self.start_rank, self.size_local))
    }

    /// All values in which `other` differs from this node, the leader, for people.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let names: BTreeSet<&String> = self.values.keys().chain(other.values.keys()).collect();
        names
            .into_iter()
            .filter(|name| !self.unknown.contains(*name) && !other.unknown.contains(*name))
            .filter_map(|name| {
                let (expected, actual) = (self.values.get(name), other.values.get(name));
                (expected != actual)
                    .then(|| format!("{name}: expected {}, found {}", shown(expected), shown(actual)))
            })
            .collect()
    }
}

/// `rank 3`, or `ranks 2 to 3`.
pub fn ranks_text(start: u16, count: u16) -> String {
    match count {
        0 | 1 => format!("rank {start}"),
        _ => format!("ranks {start} to {}", start.saturating_add(count) - 1),
    }
}

/// What the leader answers to a node's hello, more than once while others are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaderAnswer {
    /// Other nodes are still missing: first rank and number of ranks that nobody has. Said again and again.
    Waiting { missing: Vec<(u16, u16)> },
    /// The deployment is complete: the link begins, with the leader of this epoch.
    Welcome { epoch: u64 },
    /// This node is not let in: who, stage, expected, actual. `retry`: it may be let in later (its ranks are held by
    /// a node that may be gone).
    Refused { reason: String, retry: bool },
    /// The deployment does not come up, or ends: all nodes do, with this exit code.
    Over { code: u8, reason: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn with(values: &[(&str, &str)]) -> NodeHello {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        NodeHello { start_rank: 2, size_local: 2, host: "b".into(), values, ..NodeHello::default() }
    }

    #[test]
    fn all_differing_values_are_told_at_once() {
        let leader = with(&[("size", "4"), ("vLLM", "0.32.0"), ("--a", "1"), ("--eager", "")]);
        let follower = with(&[("size", "4"), ("vLLM", "0.31.0"), ("--b", "2")]);
        let texts: Vec<String> = leader.differences(&follower).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "--a: expected 1, found (not given)",
                "--b: expected (not given), found 2",
                "--eager: expected (given), found (not given)",
                "vLLM: expected 0.32.0, found 0.31.0",
            ]
        );
    }

    #[test]
    fn what_a_node_cannot_tell_is_no_difference() {
        let leader = with(&[("vLLM", "0.32.0")]);
        let mut follower = with(&[]);
        assert_eq!(leader.differences(&follower).len(), 1);
        follower.unknown.insert("vLLM".into());
        assert!(leader.differences(&follower).is_empty());
        assert!(follower.differences(&leader).is_empty());
    }
}
