//! Connections of peers that have not said yet who they are: few at a time, and fewer of one address, so that nobody
//! keeps those out for whom a port is there.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::log_limit::LogLimit;

/// That connections are closed is logged once in this time.
const REPEAT: Duration = Duration::from_secs(60);

/// How many there may be at a port.
#[derive(Debug)]
pub(crate) struct Strangers {
    all: usize,
    each: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    open: BTreeMap<IpAddr, usize>,
    log: LogLimit<()>,
}

/// One of them, until it is dropped: the connection has ended, or its peer has said who it is.
#[derive(Debug)]
pub(crate) struct Stranger {
    among: Arc<Strangers>,
    address: IpAddr,
}

impl Strangers {
    /// At most `all` at a time, and `each` of one address.
    pub(crate) fn new(all: usize, each: usize) -> Arc<Self> {
        let state = State { open: BTreeMap::new(), log: LogLimit::new(REPEAT, 1) };
        Arc::new(Self { all, each, state: Mutex::new(state) })
    }

    /// Lets a connection in, or not, which is logged; `port` says where.
    pub(crate) fn admit(self: &Arc<Self>, port: SocketAddr, peer: SocketAddr) -> Option<Stranger> {
        let address = peer.ip().to_canonical();
        let mut state = self.state.lock();
        let (all, same) =
            (state.open.values().sum::<usize>(), state.open.get(&address).copied().unwrap_or(0));
        if all < self.all && same < self.each {
            state.open.insert(address, same + 1);
            return Some(Stranger { among: Arc::clone(self), address });
        }
        if let Some(suppressed) = state.log.admit(()) {
            let (each, limit) = (self.each, self.all);
            tracing::warn!(
                listen.addr = %port,
                %peer,
                suppressed,
                "connection closed: of those whose peers have not identified themselves, {same} are of its address (at \
                 most {each}) and {all} of all (at most {limit})"
            );
        }
        None
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let open = &mut self.among.state.lock().open;
        match open.get_mut(&self.address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(open.remove(&self.address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_keep_others_out_and_has_its_places_back_at_the_end() {
        let port: SocketAddr = "10.0.0.1:1".parse().unwrap();
        let strangers = Strangers::new(5, 2);
        let of = |address: &str| strangers.admit(port, address.parse().unwrap());
        let mut crowd = vec![of("10.0.0.2:1").unwrap(), of("[::ffff:10.0.0.2]:2").unwrap()];
        assert!(of("10.0.0.2:3").is_none(), "a third one of an address");
        crowd.extend([of("10.0.0.3:1").unwrap(), of("10.0.0.3:2").unwrap(), of("10.0.0.4:1").unwrap()]);
        assert!(of("10.0.0.4:2").is_none(), "a sixth one of all");
        crowd.remove(0);
        assert!(of("10.0.0.3:3").is_none());
        crowd.push(of("10.0.0.2:3").unwrap());
        drop(crowd);
        assert!(strangers.state.lock().open.is_empty());
    }
}
