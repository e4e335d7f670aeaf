//! A sidecar that was killed in front of attached frontends, and its successor.

use std::time::{Duration, Instant};

use dp_sidecar::driver::handles::{
    AttachmentCommand, CloseRoutes, ForFrontendCoordinator, GroupKind, Origin,
};
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::output::wave_complete_message;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Wave};
use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendOptions};

use super::fixture::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_goes_on_with_the_frontends_of_its_predecessor() {
    let mut fixture = fixture(2, GroupKind::Lockstep, 2);
    let moe = frontend(FrontendOptions { moe: true, api_servers: 2, ..options(2) });
    let address = moe.host_port().to_owned();
    fixture.add(&address).await;
    let (mut moe, started) = start(moe).await;
    started.unwrap();
    let before = fixture.until(&address, "attached", &[]).await;
    let id = FrontendId(before.id.unwrap());

    fixture.restart().await;
    let after = fixture.until(&address, "attached", &[]).await;
    assert_eq!((after.id, after.api_servers, after.detail), (before.id, 2, None));
    assert_eq!(fixture.seen.lock().opened.len(), 4, "a route was opened again");
    assert_eq!(fixture.seen.lock().closed, [], "a route was closed");

    // Both ways to its DP coordinator. It hears a subscription some time after it was sent.
    let patience = Instant::now() + PATIENCE;
    while fixture.seen.lock().waves.is_empty() {
        assert!(Instant::now() < patience, "START_DP_WAVE did not come");
        moe = tokio::task::spawn_blocking(move || {
            moe.server().first_request(0).unwrap();
            moe
        })
        .await
        .unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let sink = fixture.seen.lock().sinks[&id].clone();
    sink.send(wave_complete(1, 0)).await.unwrap();
    let coordinator = moe.coordinator.as_ref().unwrap();
    wait_for("the next wave", || coordinator.state().wave == 1).await;
    assert_eq!(coordinator.state().died, None);

    // A new frontend gets another number, and the slots that are left.
    let second = frontend(FrontendOptions { moe: true, ..options(2) });
    let full = second.host_port().to_owned();
    fixture.add(&full).await;
    let second = tokio::task::spawn_blocking(move || {
        let mut second = second;
        second.startup(Duration::from_secs(3)).is_ok()
    });
    fixture.until(&full, "refused", &["0 slots are free"]).await;
    fixture.remove(&full).await.unwrap();

    // It is noticed that the frontend goes.
    drop(moe);
    fixture.until(&address, "waiting", &[]).await;
    wait_for("the routes to be closed", || fixture.seen.lock().closed.len() >= 2).await;
    assert!(fixture.seen.lock().closed.contains(&(0, id)));
    assert!(!second.await.unwrap(), "it was served without a slot");
    fixture.shut_down().await;
}

/// Another frontend at the same address is attached, under a number that was not given before.
async fn is_attached_anew(fixture: Fixture, address: &str, zmq: String, before: FrontendId) {
    let (second, started) = start(frontend(FrontendOptions { address: zmq, ..options(2) })).await;
    started.unwrap();
    let again = fixture.until(address, "attached", &[]).await;
    assert!(again.id > Some(before.0), "{again:?}");
    drop(second);
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_that_lost_a_route_meanwhile_is_told_and_attached_anew() {
    let mut fixture = fixture(2, GroupKind::Independent, 2);
    let (first, address, id) = attached(&fixture).await;
    let zmq = first.address().to_owned();
    let closed = fixture.handles[1].ask_within(PATIENCE, CloseRoutes { frontend: id, orphaned: false });
    closed.await.unwrap();

    fixture.restart().await;
    assert!(hears_of_death(first).await, "the frontend was not told");
    wait_for("the rest to be closed", || fixture.seen.lock().closed.contains(&(0, id))).await;
    is_attached_anew(fixture, &address, zmq, id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_whose_attachment_was_not_complete_is_told_and_attached_anew() {
    let mut fixture = fixture(2, GroupKind::Independent, 2);
    let (first, _, id) = attached(&fixture).await;
    let file = fixture.state_dir.path().join("frontends.json");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("\"complete\": true"), "{text}");
    std::fs::write(&file, text.replace("\"complete\": true", "\"complete\": false")).unwrap();
    fixture.restart().await;
    assert!(hears_of_death(first).await, "the frontend was not told");
    wait_for("the routes to be closed", || fixture.seen.lock().closed.contains(&(1, id))).await;
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_that_nobody_knows_are_closed_and_frontends_nobody_wants_are_told() {
    let mut fixture = fixture(2, GroupKind::Independent, 2);
    let (kept, address, id) = attached(&fixture).await;
    // Wanted by a flag that the successor does not have.
    let dropped = frontend(options(2));
    let flagged = dropped.host_port().to_owned();
    let add = |reply| AttachmentCommand::Add { address: flagged.clone(), origin: Origin::Flag, reply };
    fixture.ask(add).await.unwrap();
    let (dropped, started) = start(dropped).await;
    started.unwrap();
    let other = FrontendId(fixture.until(&flagged, "attached", &[]).await.id.unwrap());

    fixture.restart().await;
    assert!(hears_of_death(dropped).await, "the frontend that nobody wants was not told");
    wait_for("its routes to be closed", || fixture.seen.lock().closed.contains(&(0, other))).await;
    fixture.until(&address, "attached", &[]).await;
    let stranger = FrontendId(other.0 + 5);
    let rank = EngineIndex(1);
    let routes = vec![(id, 0), (stranger, 0), (stranger, 1)];
    fixture.handle.routes(rank, routes).await.unwrap();
    wait_for("the stranger's routes to be closed", || fixture.seen.lock().closed.contains(&(1, stranger)))
        .await;
    assert!(!fixture.seen.lock().closed.iter().any(|(_, closed)| *closed == id));
    assert!(fixture.remove(&flagged).await.is_err(), "it is wanted still");
    assert!(fixture.seen.lock().orphaned.contains(&(1, stranger)), "nobody tells its frontend");
    drop(kept);
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_records_a_successor_closes_every_route_and_gives_no_number_again() {
    let mut fixture = fixture(2, GroupKind::Independent, 2);
    let (first, address, id) = attached(&fixture).await;
    std::fs::remove_file(fixture.state_dir.path().join("frontends.json")).unwrap();
    fixture.restart().await;
    let rank = EngineIndex(1);
    fixture.handle.routes(rank, vec![(id, 0)]).await.unwrap();
    wait_for("its routes to be closed", || fixture.seen.lock().orphaned.contains(&(1, id))).await;
    let zmq = first.address().to_owned();
    drop(first);
    fixture.add(&address).await;
    is_attached_anew(fixture, &address, zmq, id).await;
}

/// A frontend with one API server, attached.
async fn attached(fixture: &Fixture) -> (FakeFrontend, String, FrontendId) {
    let frontend = frontend(options(2));
    let address = frontend.host_port().to_owned();
    fixture.add(&address).await;
    let (frontend, started) = start(frontend).await;
    started.unwrap();
    let id = fixture.until(&address, "attached", &[]).await.id.unwrap();
    (frontend, address, FrontendId(id))
}

/// Of a rank, as its engine says it.
fn wave_complete(rank: u16, wave: u64) -> ForFrontendCoordinator {
    let frame = wave_complete_message(&Layout::newest(), EngineIndex(rank), Wave(wave), 1.0);
    ForFrontendCoordinator { rank: EngineIndex(rank), frame }
}
