//! Which node has which ranks. No IO: the leader's listener asks, under a lock.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tokio::time::Instant;

use super::hello::{NodeHello, ranks_text};

/// A node that has been let in.
#[derive(Clone, Debug)]
pub struct Claim {
    /// What it said about itself.
    pub hello: NodeHello,
    /// Where its connection comes from.
    pub peer: SocketAddr,
    /// Its latest connection.
    pub connection: u64,
    /// That connection is alive, as far as is known.
    pub alive: bool,
    /// Since when that is so.
    pub since: Instant,
}

/// Why a node is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is configured differently. While nodes gather, that ends the deployment.
    Mismatch(String),
    /// Another node has its ranks, or it has followed a newer leader.
    Taken(String),
}

/// The nodes of a deployment.
#[derive(Clone, Debug)]
pub struct Registry {
    own: NodeHello,
    size: u16,
    /// By first rank, without the leader.
    claims: BTreeMap<u16, Claim>,
    /// All ranks were there once: which node has which does not change any more.
    settled: bool,
}

impl Registry {
    /// The leader alone, of a deployment with `size` ranks.
    pub fn new(own: NodeHello, size: u16) -> Self {
        Self { own, size, claims: BTreeMap::new(), settled: false }
    }

    /// Lets a node in, or says why not. A node that comes again (same state directory) replaces its dead
    /// connection.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn claim(&mut self, hello: NodeHello, peer: SocketAddr, connection: u64) -> Result<(), Refusal> {
        let who = format!("{} at {}", hello.name(), peer.ip());
        if hello.epoch > self.own.epoch {
            return Err(Refusal::Taken(format!(
                "{who} has followed a newer leader (epoch {}, this one has {}): end the sidecar that was replaced, or \
                 start this one again if it is to lead",
                hello.epoch, self.own.epoch
            )));
        }
        let mut faults = self.own.differences(&hello);
        if hello.size_local == 0
            || u32::from(hello.start_rank) + u32::from(hello.size_local) > u32::from(self.size)
        {
            faults.push(format!(
                "ranks: expected some of 0 to {}, found {}",
                self.size - 1,
                ranks_text(hello.start_rank, hello.size_local)
            ));
        }
        if !faults.is_empty() {
            return Err(Refusal::Mismatch(format!(
                "{who} is configured differently from {}:\n  {}",
                self.own.name(),
                faults.join("\n  ")
            )));
        }
        let overlaps =
            |other: &NodeHello| other.start_rank < hello.end_rank() && hello.start_rank < other.end_rank();
        let taken = |holder: &NodeHello, at: String| {
            Refusal::Taken(format!("{who}: held by {} at {at}, pid {}", holder.name(), holder.pid))
        };
        if overlaps(&self.own) {
            return Err(taken(&self.own, "the leader".to_owned()));
        }
        let same_place =
            |other: &NodeHello| other.start_rank == hello.start_rank && other.size_local == hello.size_local;
        for claim in self.claims.values().filter(|claim| overlaps(&claim.hello)) {
            let holder = &claim.hello;
            let returned = same_place(holder) && holder.run_id == hello.run_id;
            let replaced = same_place(holder) && !claim.alive;
            if !returned && !replaced {
                return Err(taken(holder, claim.peer.to_string()));
            }
        }
        let claim = Claim { hello, peer, connection, alive: true, since: Instant::now() };
        self.claims.insert(claim.hello.start_rank, claim);
        if self.missing().is_empty() {
            self.settled = true;
        }
        Ok(())
    }

    /// A connection has ended. Before the deployment is complete the node's ranks are free again; true if they are.
    pub fn left(&mut self, start_rank: u16, connection: u64) -> bool {
        let Some(claim) = self.claims.get_mut(&start_rank).filter(|claim| claim.connection == connection)
        else {
            return false;
        };
        claim.alive = false;
        claim.since = Instant::now();
        !self.settled && self.claims.remove(&start_rank).is_some()
    }

    /// First rank and number of ranks that no node has.
    pub fn missing(&self) -> Vec<(u16, u16)> {
        let mut missing = Vec::new();
        let mut next = self.own.end_rank();
        for claim in self.claims.values() {
            let start = claim.hello.start_rank;
            if start > next {
                missing.push((next, start - next));
            }
            next = claim.hello.end_rank();
        }
        if next < self.size {
            missing.push((next, self.size - next));
        }
        missing
    }

    /// All ranks were there once.
    pub fn settled(&self) -> bool {
        self.settled
    }

    /// All nodes but the leader, by first rank.
    pub fn claims(&self) -> impl Iterator<Item = &Claim> {
        self.claims.values()
    }
}

/// `ranks 2 to 3, rank 7`.
pub fn missing_text(missing: &[(u16, u16)]) -> String {
    let parts: Vec<String> = missing.iter().map(|&(start, count)| ranks_text(start, count)).collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(start_rank: u16, size_local: u16, run_id: &str) -> NodeHello {
        NodeHello {
            start_rank,
            size_local,
            run_id: run_id.to_owned(),
            host: format!("host-{run_id}"),
            values: [("kind".to_owned(), "dense".to_owned())].into(),
            ..NodeHello::default()
        }
    }

    fn from(last: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, last], 5000))
    }

    fn registry() -> Registry {
        Registry::new(node(0, 2, "l"), 8)
    }

    #[test]
    fn ranks_tile_in_any_order_and_what_is_missing_is_told() {
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut registry = registry();
            let nodes = [node(2, 2, "a"), node(4, 1, "b"), node(5, 3, "c")];
            for (count, &at) in order.iter().enumerate() {
                assert!(!registry.settled(), "{order:?} after {count}");
                registry.claim(nodes[at].clone(), from(2), count as u64).unwrap();
            }
            assert!(registry.missing().is_empty() && registry.settled());
        }
        let mut registry = registry();
        registry.claim(node(4, 1, "b"), from(2), 1).unwrap();
        assert_eq!(missing_text(&registry.missing()), "ranks 2 to 3, ranks 5 to 7");
        registry.left(4, 1);
        assert_eq!(missing_text(&registry.missing()), "ranks 2 to 7");
    }

    #[test]
    fn a_rank_claimed_twice_is_refused_and_its_holder_named() {
        let mut registry = registry();
        registry.claim(node(2, 2, "a"), from(2), 1).unwrap();
        for (second, holder) in [
            (node(2, 2, "b"), "held by node host-a (ranks 2 to 3) at 127.0.0.2:5000"),
            (node(3, 2, "b"), "held by node host-a"),
            (node(1, 1, "b"), "held by node host-l (ranks 0 to 1) at the leader"),
            (node(3, 1, "a"), "held by node host-a"),
        ] {
            match registry.claim(second, from(3), 2) {
                Err(Refusal::Taken(text)) => assert!(text.contains(holder), "{text}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_node_that_comes_again_replaces_its_connection_and_the_old_one_ends_nothing() {
        let mut registry = registry();
        registry.claim(node(2, 6, "a"), from(2), 1).unwrap();
        assert!(registry.settled());
        registry.claim(node(2, 6, "a"), from(2), 2).unwrap();
        registry.left(2, 1);
        assert!(registry.claims().all(|claim| claim.alive && claim.connection == 2));
        // Another machine for the same ranks, when the first is gone.
        assert!(matches!(registry.claim(node(2, 6, "x"), from(3), 3), Err(Refusal::Taken(_))));
        registry.left(2, 2);
        assert!(registry.settled(), "a settled deployment keeps its places");
        registry.claim(node(2, 6, "x"), from(3), 3).unwrap();
        // But not for a part of them.
        registry.left(2, 3);
        assert!(matches!(registry.claim(node(2, 5, "y"), from(4), 4), Err(Refusal::Taken(_))));
    }

    #[test]
    fn a_node_that_differs_or_has_impossible_ranks_is_refused_with_all_values() {
        let mut registry = registry();
        let mut other = node(7, 2, "a");
        other.values.insert("kind".into(), "moe".into());
        match registry.claim(other, from(2), 1) {
            Err(Refusal::Mismatch(text)) => {
                assert!(text.contains("node host-a (ranks 7 to 8) at 127.0.0.2"), "{text}");
                assert!(text.contains("kind: expected dense, found moe"), "{text}");
                assert!(text.contains("expected some of 0 to 7, found ranks 7 to 8"), "{text}");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(registry.claim(node(7, 0, "a"), from(2), 1), Err(Refusal::Mismatch(_))));
        assert!(matches!(registry.claim(node(u16::MAX, 9, "a"), from(2), 1), Err(Refusal::Mismatch(_))));
    }
}
