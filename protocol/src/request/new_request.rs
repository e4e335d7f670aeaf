//! What a frontend sends, for fakes and tests.

use crate::frames::{Frames, RequestType};
use crate::ids::{ClientIndex, Wave};
use crate::layout::Layout;
use crate::write;

/// A plain text request.
#[derive(Clone, Debug, PartialEq)]
pub struct NewRequest {
    /// Internal request id.
    pub request_id: String,
    pub prompt_token_ids: Vec<u32>,
    /// Tokens to generate.
    pub max_tokens: u32,
    /// The sender's own index.
    pub client_index: ClientIndex,
    /// The wave the sender believes to be current.
    pub current_wave: Wave,
    /// Seconds since 1970.
    pub arrival_time: f64,
}

impl NewRequest {
    /// The message, with every field of the layout.
    pub fn encode(&self, layout: &Layout) -> Frames {
        let add = &layout.add;
        let mut out = Vec::with_capacity(64 + self.prompt_token_ids.len() * 5);
        write::array(&mut out, add.fields);
        write::str(&mut out, &self.request_id);
        write::array(&mut out, self.prompt_token_ids.len());
        for token in &self.prompt_token_ids {
            write::uint(&mut out, u64::from(*token));
        }
        write::nil(&mut out);
        write::map(&mut out, 2);
        write::str(&mut out, "temperature");
        write::float(&mut out, 0.0);
        write::str(&mut out, "max_tokens");
        write::uint(&mut out, u64::from(self.max_tokens));
        for position in 4..add.fields {
            let here = Some(position);
            if position == add.arrival_time {
                write::float(&mut out, self.arrival_time);
            } else if position == add.client_index {
                write::uint(&mut out, u64::from(self.client_index.0));
            } else if position == add.current_wave {
                write::uint(&mut out, self.current_wave.0);
            } else if position == add.priority {
                write::uint(&mut out, 0);
            } else if here == add.resumable || here == add.abort_immediately {
                write::bool(&mut out, false);
            } else {
                write::nil(&mut out);
            }
        }
        vec![RequestType::Add.to_frame(), out.into()]
    }
}
