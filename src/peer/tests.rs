//! Leader and followers over real connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::epoch::Epoch;
use super::follower::{FindError, Finder, Found, LeaderView};
use super::hello::NodeHello;
use super::leader::{GatherError, Leader, RemoteNode};
use crate::config::Nodes;
use crate::exit_code;
use crate::link::LinkStream;
use crate::link::client::Link;
use crate::link::codec::LinkIo;
use crate::token::Token;

const LIMIT: Duration = Duration::from_secs(20);

fn token(secret: &str) -> Token {
    Token::new(secret.as_bytes()).unwrap()
}

fn node(start_rank: u16, size_local: u16, kind: &str) -> NodeHello {
    NodeHello {
        start_rank,
        size_local,
        run_id: format!("run-{start_rank}"),
        host: format!("host-{start_rank}"),
        pid: 1,
        values: [("model kind".to_owned(), kind.to_owned())].into(),
        ..NodeHello::default()
    }
}

struct Setup {
    address: SocketAddr,
    /// Where the epochs of its nodes are.
    dir: TempDir,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Setup {
    async fn new() -> Self {
        // Followers may come first, so the port must be known before there is a leader.
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            dir: tempfile::tempdir().unwrap(),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    async fn leader(&self, size: u16) -> Leader {
        self.leader_of(size, 0).await
    }

    async fn leader_of(&self, size: u16, epoch: u64) -> Leader {
        let nodes = Nodes {
            leader: self.address.to_string(),
            token: token("the secret of all"),
            address: None,
            leader_timeout: LIMIT,
        };
        let (tracker, stop) = (&self.tracker, self.stop.clone());
        let own = NodeHello { epoch, ..node(0, 2, "dense") };
        Leader::start(&nodes, own, size, LIMIT, tracker, stop).await.unwrap()
    }

    fn finder(&self, hello: NodeHello) -> Finder {
        Finder {
            leader: self.address.to_string(),
            token: token("the secret of all"),
            hello,
            epoch: Arc::new(Epoch::read(self.dir.path()).unwrap()),
            strict: true,
            view: watch::Sender::new(LeaderView::default()),
        }
    }

    /// Gathers, and welcomes at once.
    async fn gather(leader: &Leader) -> Result<Vec<RemoteNode>, GatherError> {
        let gathered = leader.gather(LIMIT).await;
        if gathered.is_ok() {
            leader.welcome();
        }
        gathered
    }

    async fn find(&self, hello: NodeHello) -> Result<Found, FindError> {
        self.finder(hello).find(LIMIT).await
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(LIMIT, self.tracker.wait()).await.expect("all tasks end");
    }
}

/// The next connection of a node.
async fn next(node: &mut RemoteNode) -> LinkStream {
    match node.connections.recv().await {
        Some(Link::Stream(stream)) => stream,
        other => panic!("{other:?}"),
    }
}

/// Both ends of a link are the same connection.
async fn check_link(one: &mut impl LinkIo, other: &mut impl LinkIo) {
    one.write_all(b"ask").await.unwrap();
    let mut asked = [0; 3];
    tokio::time::timeout(LIMIT, other.read_exact(&mut asked)).await.unwrap().unwrap();
    assert_eq!(&asked, b"ask");
}

#[tokio::test]
async fn nodes_find_their_leader_in_any_start_order() {
    let setup = Setup::new().await;
    let early = setup.finder(node(4, 2, "dense"));
    let early = tokio::spawn(async move { early.find(LIMIT).await });
    let leader = setup.leader(6).await;
    let (nodes, late) = tokio::join!(Setup::gather(&leader), setup.find(node(2, 2, "dense")));
    let mut nodes = nodes.unwrap();
    let mut found = [late.unwrap(), early.await.unwrap().unwrap()];
    let starts: Vec<u16> = nodes.iter().map(|node| node.hello.start_rank).collect();
    assert_eq!(starts, [2, 4]);
    for (node, found) in nodes.iter_mut().zip(&mut found) {
        let mut stream = next(node).await;
        check_link(stream.io(), &mut found.stream).await;
        assert!(leader.claims().iter().any(|claim| claim.alive));
    }
    drop((nodes, found));
    let down = async {
        while leader.claims().iter().any(|claim| claim.alive) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LIMIT, down).await.expect("dropped links are down");
    setup.end().await;
}

#[tokio::test]
async fn a_node_that_differs_ends_the_gathering_on_all_nodes_with_all_values() {
    let setup = Setup::new().await;
    let leader = setup.leader(6).await;
    let (gathered, right, wrong) =
        tokio::join!(Setup::gather(&leader), setup.find(node(2, 2, "dense")), setup.find(node(4, 2, "moe")));
    let expected = "model kind: expected dense, found moe";
    let Err(GatherError::Mismatch(reports)) = gathered else { panic!("{gathered:?}") };
    assert!(reports.len() == 1 && reports[0].contains(expected), "{reports:?}");
    let right = right.unwrap_err();
    assert!(matches!(right, FindError::Over { code: exit_code::MISMATCH, .. }), "{right}");
    assert!(right.to_string().contains("node host-4 (ranks 4 to 5)"), "{right}");
    let wrong = wrong.unwrap_err();
    assert_eq!(wrong.exit_code(), exit_code::MISMATCH);
    assert!(wrong.to_string().contains(expected), "{wrong}");
    setup.end().await;
}

#[tokio::test]
async fn a_node_that_comes_again_gets_its_place_and_a_stranger_does_not() {
    let setup = Setup::new().await;
    let leader = setup.leader(4).await;
    let (nodes, first) = tokio::join!(Setup::gather(&leader), setup.find(node(2, 2, "dense")));
    let mut nodes = nodes.unwrap();
    let held = next(&mut nodes[0]).await;
    let other = NodeHello { run_id: "another".into(), ..node(2, 2, "dense") };
    let refused = setup.find(other.clone()).await.unwrap_err();
    assert!(refused.to_string().contains("held by node host-2 (ranks 2 to 3)"), "{refused}");
    assert_eq!(refused.exit_code(), exit_code::MISMATCH);
    let mut again = setup.find(node(2, 2, "dense")).await.unwrap();
    let mut stream = next(&mut nodes[0]).await;
    drop((first, held));
    check_link(&mut again.stream, stream.io()).await;
    // Its successor on another machine, when it is gone.
    drop((again, stream));
    let mut successor = setup.find(other).await.unwrap();
    let mut stream = next(&mut nodes[0]).await;
    check_link(&mut successor.stream, stream.io()).await;
    setup.end().await;
}

#[tokio::test]
async fn a_leader_that_was_replaced_gets_no_node_back_from_its_successor() {
    let (old, new, third) = (Setup::new().await, Setup::new().await, Setup::new().await);
    let leaders = [old.leader_of(4, 7).await, new.leader_of(4, 8).await, third.leader_of(4, 9).await];
    let at = |setup: &Setup| Finder { leader: setup.address.to_string(), ..new.finder(node(2, 2, "dense")) };
    let finders = [&old, &new, &third].map(at);
    let (followed, nodes) = tokio::join!(finders[1].find(LIMIT), Setup::gather(&leaders[1]));
    drop((followed.unwrap(), nodes.unwrap()));
    // The older one waits for its ranks: it has none of them.
    let refused = at(&old).find(LIMIT).await.unwrap_err().to_string();
    assert!(refused.contains("has followed a newer leader (epoch 8, this one has 7)"), "{refused}");
    assert_eq!(leaders[0].missing(), "ranks 2 to 3");
    let (followed, nodes) = tokio::join!(finders[2].find(LIMIT), Setup::gather(&leaders[2]));
    drop((followed.unwrap(), nodes.unwrap()));
    assert_eq!(Epoch::read(new.dir.path()).unwrap().newest(), 9);
    for setup in [old, new, third] {
        setup.end().await;
    }
}

#[tokio::test]
async fn a_node_that_goes_while_others_gather_is_missing_again() {
    let setup = Setup::new().await;
    let leader = setup.leader(6).await;
    let finder = setup.finder(node(2, 2, "dense"));
    let mut view = finder.view.subscribe();
    let search = tokio::spawn(async move { finder.find(LIMIT).await });
    view.wait_for(|view| view.state.contains("waits for ranks 4 to 5")).await.unwrap();
    search.abort();
    assert!(search.await.is_err());
    let error = leader.gather(Duration::from_millis(500)).await.unwrap_err();
    assert!(error.to_string().contains("no node with ranks 2 to 5 connected"), "{error}");
    let late = setup.find(node(2, 2, "dense")).await.unwrap_err();
    assert_eq!(late.exit_code(), exit_code::TIMEOUT, "{late}");
    setup.end().await;
}

#[tokio::test]
async fn a_leader_that_cannot_start_tells_those_that_have_come() {
    let setup = Setup::new().await;
    let leader = setup.leader(4).await;
    let trouble = async {
        leader.gather(LIMIT).await.unwrap();
        leader.end(exit_code::IN_USE, "a port is taken").await;
    };
    let (found, ()) = tokio::join!(setup.find(node(2, 2, "dense")), trouble);
    let error = found.unwrap_err();
    assert_eq!(error.exit_code(), exit_code::IN_USE);
    assert!(error.to_string().contains("a port is taken"), "{error}");
    setup.end().await;
}

#[tokio::test]
async fn strangers_do_not_disturb_the_gathering() {
    let setup = Setup::new().await;
    let leader = setup.leader(4).await;
    let mut idle = Vec::new();
    for at in 0..20 {
        let mut stream = TcpStream::connect(setup.address).await.unwrap();
        if at % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            // Reset or closed, but never answered.
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.is_empty());
        } else {
            idle.push(stream);
        }
    }
    let wrong = Finder { token: token("another secret!!!"), ..setup.finder(node(2, 2, "dense")) };
    let refused = wrong.find(LIMIT).await.unwrap_err();
    assert_eq!(refused.exit_code(), exit_code::MISMATCH);
    assert!(refused.to_string().contains("--auth-token-file"), "{refused}");
    let (nodes, found) = tokio::join!(Setup::gather(&leader), setup.find(node(2, 2, "dense")));
    assert_eq!(nodes.unwrap().len(), 1);
    found.unwrap();
    drop(idle);
    setup.end().await;
}

#[tokio::test]
async fn strangers_of_one_address_do_not_shut_a_follower_of_another_out() {
    let setup = Setup::new().await;
    let leader = setup.leader(4).await;
    let mut idle = Vec::new();
    for _ in 0..40 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        idle.push(socket.connect(setup.address).await.unwrap());
    }
    // Silent ones may stay for 5 s.
    let soon = Duration::from_secs(3);
    let finder = setup.finder(node(2, 2, "dense"));
    let (nodes, found) = tokio::join!(Setup::gather(&leader), finder.find(soon));
    found.unwrap();
    assert_eq!(nodes.unwrap().len(), 1);
    drop(idle);
    setup.end().await;
}

#[tokio::test]
async fn a_missing_leader_is_waited_for_and_then_named() {
    let setup = Setup::new().await;
    let error = setup.finder(node(2, 2, "dense")).find(Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(error.exit_code(), exit_code::TIMEOUT);
    let text = error.to_string();
    assert!(text.contains(&setup.address.to_string()) && text.contains("refused"), "{text}");
}
