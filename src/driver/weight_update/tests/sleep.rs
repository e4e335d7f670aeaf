//! Updates of engines that sleep.

use rmpv::Value;

use super::*;

impl World {
    /// A control call of frontend 1 at all ranks.
    async fn call(&self, ticket: u64, method: &str, args: &[Value]) {
        for rank in [0, 1] {
            let call = HeldCall { args: args.to_vec(), ..held(rank, ticket, method) };
            self.calls.send(call).await.unwrap();
        }
        for rank in &self.ranks {
            rank.logged(&format!("forward {ticket}")).await;
        }
    }
}

fn tags(tag: &str) -> Vec<Value> {
    vec![Value::Array(vec![tag.into()])]
}

#[tokio::test(start_paused = true)]
async fn an_update_is_refused_while_the_weights_sleep_and_says_how_to_go_on() {
    let world = world(GroupKind::Independent).await;
    world.call(7, "sleep", &[Value::from(2)]).await;
    let mut control = world.control.snapshot.clone();
    control.wait_for(|state| state.asleep && state.holder.is_none()).await.unwrap();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    let says = "the weights of rank 0, 1 sleep: wake them up first (`sidecar wake --tag weights`";
    assert!(record.message.contains(says), "{}", record.message);
    assert_eq!(record.version, WeightVersion::unknown(), "nobody knows what they hold");
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), ["forward 7"]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_between_two_partial_wakes_loads_and_resumes_nothing() {
    let world = world(GroupKind::Lockstep).await;
    world.call(7, "sleep", &[Value::from(2)]).await;
    world.call(8, "wake_up", &tags("weights")).await;
    let mut control = world.control.snapshot.clone();
    control.wait_for(|state| state.holder.is_none()).await.unwrap();
    // Adapters alone bring no model.
    let mut adapters = world.request("u1");
    adapters.path = None;
    adapters.adapters = vec![crate::api::AdapterChange { name: "a".to_owned(), path: None }];
    let refused = world.update(adapters).await;
    assert_eq!(*refused.outcome(), Outcome::RefusedInvalid);
    assert!(refused.message.contains("load weights first"), "{}", refused.message);
    let record = world.update(world.request("u2")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert!(record.record.left_asleep && record.record.left_paused);
    assert!(
        record.message.ends_with("they still sleep: wake up the rest (`sidecar wake`)"),
        "{}",
        record.message
    );
    for (at, rank) in world.ranks.iter().enumerate() {
        assert_eq!(world.engine(at).weights, world.path("new"));
        let log = rank.take_log();
        assert!(!log.contains(&"resume".to_owned()), "{log:?}");
    }
    let state = world.control.snapshot.borrow().clone();
    assert!(state.asleep && !state.without_weights && !state.external_weights, "{state:?}");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_that_touches_nothing_does_not_say_that_discarded_weights_are_known() {
    let world = world(GroupKind::Independent).await;
    world.call(7, "sleep", &[Value::from(2)]).await;
    world.call(8, "wake_up", &tags("weights")).await;
    for at in [0, 1] {
        world.engine(at).loads.push_back(LoadScript::Fails("unchanged", "files"));
    }
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RolledBack);
    assert_eq!(record.version, WeightVersion::unknown(), "{}", record.message);
    assert!(world.control.snapshot.borrow().without_weights);
    world.end().await;
}
