//! Requests, and an engine whose weights were discarded.

use dp_sidecar_protocol::request::{FrontendMessage, check_frontend_message};
use rmpv::Value;

use super::*;

impl Bed {
    /// A call of the sidecar's own, and the engine's answer to it.
    fn own(
        &mut self,
        id: i128,
        method: &str,
        args: Vec<Value>,
        result: Result<Value, String>,
    ) -> Vec<Action> {
        let token = u64::try_from(id).unwrap();
        let timeout = Duration::from_secs(60);
        let sent = self.event(Event::Call { token, method: method.to_owned(), args, timeout });
        let [(0, frames)] = to_engine(&sent)[..] else { panic!("{sent:?}") };
        let layout = Layout::newest();
        let Ok(FrontendMessage::Utility(call)) = check_frontend_message(&layout, frames) else {
            panic!("{frames:?}");
        };
        let utility_output = Some(UtilityOutput { call_id: call.call_id, result });
        self.engine(Slot::CONTROL, NewOutputs { utility_output, ..NewOutputs::default() })
    }

    /// A call of a frontend that is let through, and the engine's answer to it.
    fn held(&mut self, slot: Slot, id: i128, method: &str, args: Vec<Value>, result: Value) -> Vec<Action> {
        let held = self.call(slot, id, method, args);
        let [Action::HeldCall(call)] = &held[..] else { panic!("{held:?}") };
        self.machine.release(call.ticket, Verdict::Forward);
        self.actions();
        let utility_output = Some(UtilityOutput { call_id: CallId(id), result: Ok(result) });
        self.engine(slot, NewOutputs { utility_output, ..NewOutputs::default() })
    }
}

fn load(ok: bool) -> (Vec<Value>, Result<Value, String>) {
    let report = vec![("ok".into(), ok.into()), ("state".into(), if ok { "loaded" } else { "mixed" }.into())];
    (vec![Value::from("dp_sidecar_load")], Ok(Value::Array(vec![Value::Map(report)])))
}

/// Requests that reach the engine.
fn adds(actions: &[Action], slot: Slot) -> usize {
    to_engine(actions).into_iter().filter(|(to, frames)| *to == slot.0 && frames[0][..] == [0]).count()
}

#[test]
fn no_request_reaches_an_engine_whose_weights_were_discarded_until_others_are_loaded() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    let held = bed.call(slot, 1, "sleep", vec![Value::from(2)]);
    assert!(matches!(&held[..], [Action::HeldCall(_)]), "{held:?}");
    assert_eq!(adds(&bed.add(slot, "before"), slot), 1, "nothing was decided yet");
    bed.machine.release(0, Verdict::Forward);
    assert_eq!(to_engine(&bed.actions()).len(), 1);
    assert_eq!(adds(&bed.add(slot, "asleep"), slot), 0);
    bed.answer(slot, 1, "");
    // Whoever opens the gate does not know.
    assert_eq!(adds(&bed.event(Event::Gate { open: true }), slot), 0);
    let tags = |tag: &str| vec![Value::Array(vec![tag.into()])];
    bed.held(slot, 2, "wake_up", tags("weights"), Value::from(false));
    let woken = bed.held(slot, 3, "wake_up", tags("kv_cache"), Value::from(true));
    assert_eq!(adds(&woken, slot) + adds(&bed.add(slot, "awake"), slot), 0);
    let (args, failed) = load(false);
    assert_eq!(adds(&bed.own(100, "collective_rpc", args, failed), slot), 0);
    let (args, loaded) = load(true);
    assert_eq!(adds(&bed.own(101, "collective_rpc", args, loaded), slot), 2, "those that were held");
    assert_eq!(adds(&bed.add(slot, "after"), slot), 1);
}

#[test]
fn a_request_that_waits_for_weights_too_long_is_told_why() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.held(slot, 1, "sleep", vec![Value::from(2)], Value::Nil);
    bed.add(slot, "r");
    bed.wait(3600);
    let said = bed.machine.snapshot().last_refusal.unwrap();
    assert!(said.contains("discarded by a sleep of level 2") && said.contains("sidecar update"), "{said}");
}

#[test]
fn a_new_life_of_an_engine_has_the_weights_that_it_was_started_with() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.held(slot, 1, "sleep", vec![Value::from(2)], Value::Nil);
    bed.down("killed");
    assert_eq!(bed.machine.memory(), Memory::default());
    bed.admit();
    assert_eq!(adds(&bed.add(slot, "r"), slot), 1);
}

#[test]
fn a_sleep_of_the_sidecar_counts_as_that_of_a_frontend() {
    let mut bed = Bed::admitted();
    let slot = bed.open(1, 0);
    bed.own(1, "sleep", vec![Value::from(1)], Ok(Value::Nil));
    assert!(bed.machine.memory().sleeps());
    assert_eq!(adds(&bed.add(slot, "kept"), slot), 1, "it waits in the engine, as in vLLM");
    bed.own(2, "wake_up", vec![Value::Nil], Ok(Value::from(true)));
    assert_eq!(bed.machine.memory(), Memory::default());
    bed.own(3, "sleep", vec![Value::from(2)], Err("out of memory".to_owned()));
    assert_eq!(adds(&bed.add(slot, "held"), slot), 0, "nobody knows what is left");
}
