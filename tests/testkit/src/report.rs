//! What a fake saw and did, one JSON object per line.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

#[derive(Clone, Debug)]
enum Sink {
    Stdout,
    Nowhere,
    Memory(Arc<Mutex<Vec<Value>>>),
}

/// Takes reports. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reporter {
    sink: Sink,
    start: Instant,
}

impl Reporter {
    /// Writes JSON lines to stdout.
    pub fn stdout() -> Self {
        Self { sink: Sink::Stdout, start: Instant::now() }
    }

    /// Drops everything.
    pub fn quiet() -> Self {
        Self { sink: Sink::Nowhere, start: Instant::now() }
    }

    /// Keeps reports for [`Reporter::events`].
    pub fn memory() -> Self {
        Self { sink: Sink::Memory(Arc::default()), start: Instant::now() }
    }

    /// Reports `event` with the entries of the JSON object `fields`.
    pub fn report(&self, event: &str, fields: Value) {
        if matches!(self.sink, Sink::Nowhere) {
            return;
        }
        let mut line = json!({
            "event": event,
            "ms": u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        if let (Some(line), Value::Object(fields)) = (line.as_object_mut(), fields) {
            line.extend(fields);
        }
        match &self.sink {
            Sink::Stdout => {
                // A reader that went away must not end the fake.
                let _ = writeln!(std::io::stdout().lock(), "{line}");
            }
            Sink::Nowhere => {}
            Sink::Memory(events) => events.lock().unwrap_or_else(PoisonError::into_inner).push(line),
        }
    }

    /// Everything reported so far (in memory).
    pub fn events(&self) -> Vec<Value> {
        match &self.sink {
            Sink::Stdout | Sink::Nowhere => Vec::new(),
            Sink::Memory(events) => events.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// How often `event` was reported (in memory).
    pub fn count(&self, event: &str) -> usize {
        self.events().iter().filter(|line| line["event"] == event).count()
    }
}
