//! A frontend: its view of wave and state, and, when it is attached to the sidecar, a DP coordinator
//! of its own. That one is our machine with vLLM's rules, which the differential test compares with
//! vLLM's class.

use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::machine::coordinator::{Action, Config, Coordinator, Event};
use dp_sidecar_protocol::{EngineIndex, FrontendId, GroupKind, Incarnation, Time};

use super::engine_model::{RequestId, Version};

pub(crate) struct Frontend {
    pub(crate) id: FrontendId,
    /// `current_wave` and `engines_running` of vLLM's `DPAsyncMPClient`.
    pub(crate) wave: u64,
    pub(crate) running: bool,
    pub(crate) requests: Vec<RequestId>,
    pub(crate) coordinator: Option<Coordinator>,
    pub(crate) timer_set: bool,
    /// The life of the sidecar it is attached to.
    pub(crate) joined: u64,
}

impl Frontend {
    pub(crate) fn direct(id: FrontendId) -> Self {
        Self {
            id,
            wave: 0,
            running: false,
            requests: Vec::new(),
            coordinator: None,
            timer_set: false,
            joined: 0,
        }
    }

    pub(crate) fn attached(id: FrontendId, version: Version, size: u16, now: Time) -> Self {
        let config = Config::upstream(GroupKind::Lockstep, size, layout(version));
        let mut coordinator = Coordinator::new(config);
        for rank in 0..size {
            let event = Event::Subscribed { rank: EngineIndex(rank), incarnation: Incarnation(1) };
            coordinator.handle_event(now, event);
        }
        while let Some(action) = coordinator.poll_action() {
            assert!(matches!(action, Action::SendReady { .. }));
        }
        Self { coordinator: Some(coordinator), ..Self::direct(id) }
    }
}

pub(crate) fn layout(version: Version) -> Layout {
    let minor = match version {
        Version::V28 => 28,
        Version::V32 => 32,
        Version::V33 => 33,
    };
    Layout::closest(VllmVersion::new(0, minor, 0))
}
