//! What calls of frontends do to what is known of the weights.

use super::*;

#[test]
fn weights_that_a_frontend_loads_make_the_current_version_unknown() {
    let mut control = control(1, false);
    let reload = HeldCall {
        rank: EngineIndex(0),
        ticket: 1,
        frontend: FrontendId(1),
        api_server: 0,
        method: "collective_rpc".to_owned(),
        args: vec![Value::from("reload_weights"), Value::Nil, Value::Array(Vec::new())],
    };
    control.handle_event(at(0), Event::Held(reload));
    assert!(control.snapshot().external_weights);
    control.handle_event(at(0), answered(0, 1));
    control.handle_event(at(1), acquire(1, "update u1", 0));
    let granted = actions(&mut control);
    assert!(matches!(
        granted.last(),
        Some(Action::Granted { grant: Grant { external_weights: true, .. }, .. })
    ));
    control.handle_event(at(2), Event::WeightsKnown { owner: OwnerId(1) });
    assert!(!control.snapshot().external_weights);
}

#[test]
fn only_worker_methods_known_to_keep_the_weights_leave_the_version_known() {
    for (name, external) in [
        ("check_health", false),
        ("init_weight_transfer_engine", false),
        ("update_weights_from_ipc", true),
        ("skyrl_start_weight_update", true),
        ("load_lora_from_tensors", true),
        ("a_method_that_nobody_knows", true),
    ] {
        let mut control = control(1, false);
        let call = HeldCall {
            rank: EngineIndex(0),
            ticket: 1,
            frontend: FrontendId(1),
            api_server: 0,
            method: "collective_rpc".to_owned(),
            args: vec![Value::from(name)],
        };
        control.handle_event(at(0), Event::Held(call));
        assert_eq!(control.snapshot().external_weights, external, "{name}");
    }
}

#[test]
fn weights_that_a_sleep_discards_are_unknown_until_a_load_and_those_it_keeps_are_not() {
    for (args, unknown) in [
        (vec![], false),
        (vec![Value::from(0)], false),
        (vec![Value::from(1), Value::from("abort")], false),
        (vec![Value::from(2)], true),
        (vec![Value::from("2")], true),
    ] {
        let mut control = control(1, false);
        let call = |ticket, method: &str, args: &[Value]| HeldCall {
            rank: EngineIndex(0),
            ticket,
            frontend: FrontendId(1),
            api_server: 0,
            method: method.to_owned(),
            args: args.to_vec(),
        };
        control.handle_event(at(0), Event::Held(call(1, "sleep", &args)));
        control.handle_event(at(0), answered(0, 1));
        assert_eq!(control.snapshot().external_weights, unknown, "{args:?}");
        control.handle_event(at(2), acquire(1, "update u1", 0));
        control.handle_event(at(3), Event::WeightsKnown { owner: OwnerId(1) });
        assert!(!control.snapshot().external_weights, "{args:?}");
    }
}
