//! Checks of an ADD, `EngineCoreRequest` (`vllm/v1/engine/__init__.py`), field by field.

use bytes::Bytes;

use crate::ids::{ClientIndex, Wave};
use crate::layout::Layout;
use crate::positional::{Kind, Scanner};

use super::fields::{self, malformed};
use super::{Add, IndexAt, Refusal, RefusalKind, client, params, tensor};

/// Checks an ADD with everything in it.
pub(super) fn check<'a>(layout: &Layout, payload: &'a Bytes, frames: &[Bytes]) -> Result<Add<'a>, Refusal> {
    let mut scanner = Scanner::new(payload);
    let fields = scanner.array().map_err(malformed("top level"))?;
    let header = scanner.position();
    let required = layout.add.required();
    if fields < required {
        return Err(RefusalKind::FieldCount { message: "ADD", actual: fields, expected: required }.into());
    }
    let request_id = scanner.str().map_err(malformed("request_id"))?;
    let mut add = Add {
        request_id,
        client_index: ClientIndex(0),
        current_wave: Wave(0),
        data_parallel_rank: None,
        index_at: IndexAt::Beyond { header, elements: fields, position: layout.add.client_index },
    };
    check_fields(layout, &mut scanner, fields, frames, &mut add)
        .and_then(|()| scanner.finish().map_err(malformed("end")))
        .map_err(|kind| Refusal { request_id: Some(request_id.to_owned()), ..kind.into() })?;
    Ok(add)
}

/// What comes after the request id.
fn check_fields(
    layout: &Layout,
    scanner: &mut Scanner<'_>,
    count: usize,
    frames: &[Bytes],
    found: &mut Add<'_>,
) -> Result<(), RefusalKind> {
    let mut has_params = false;
    for position in 1..count {
        match position {
            1 => fields::nil_or(scanner, "prompt_token_ids", fields::ints)?,
            2 => tensor::features(scanner, layout.mm_form(), frames)?,
            3 => {
                has_params |=
                    fields::optional(scanner, "sampling_params", |s| params::sampling(s, layout, frames))?
                        .is_some();
            }
            4 => {
                has_params |=
                    fields::optional(scanner, "pooling_params", |s| params::pooling(s, layout))?.is_some();
            }
            _ => check_later_field(layout, scanner, position, frames, found)?,
        }
    }
    if has_params {
        Ok(())
    } else {
        Err(fields::wrong("sampling_params and pooling_params", Kind::Nil, "one of them"))
    }
}

fn check_later_field(
    layout: &Layout,
    scanner: &mut Scanner<'_>,
    position: usize,
    frames: &[Bytes],
    found: &mut Add<'_>,
) -> Result<(), RefusalKind> {
    const TEXT: &[Kind] = &[Kind::Nil, Kind::Str];
    let add = &layout.add;
    let here = Some(position);
    if position == add.client_index {
        let start = scanner.position();
        let index = scanner.int().map_err(malformed("client_index"))?;
        found.client_index = client(index, "ADD")?;
        found.index_at = IndexAt::Bytes(start..scanner.position());
    } else if position == add.current_wave {
        let wave = scanner.integer("wave of 0 or more");
        found.current_wave = Wave(wave.map_err(malformed("current_wave"))?);
    } else if position == add.data_parallel_rank {
        let rank = scanner.optional(|s| s.integer("int of 64 bits"));
        found.data_parallel_rank = rank.map_err(malformed("data_parallel_rank"))?;
    } else if position == add.arrival_time {
        fields::skip(scanner, "arrival_time", &[Kind::Float, Kind::Int])?;
    } else if position == add.lora_request {
        fields::nil_or(scanner, "lora_request", |s, _| params::lora(s, layout))?;
    } else if position == add.cache_salt {
        fields::skip(scanner, "cache_salt", TEXT)?;
    } else if position == add.prompt_embeds {
        fields::nil_or(scanner, "prompt_embeds", |s, field| tensor::tensor(s, field, frames))?;
    } else if position == add.priority {
        fields::skip(scanner, "priority", &[Kind::Int])?;
    } else if position == add.trace_headers {
        fields::nil_or(scanner, "trace_headers", |s, field| {
            fields::map(s, field, |s, _| fields::str(s, field).map(drop))
        })?;
    } else if here == add.eos_token_id {
        fields::skip(scanner, "eos_token_id", &[Kind::Nil, Kind::Int])?;
    } else if here == add.prompt_is_token_ids {
        fields::nil_or(scanner, "prompt_is_token_ids", |s, field| {
            for _ in 0..s.array().map_err(malformed(field))? {
                fields::bool(s, field)?;
            }
            Ok(())
        })?;
    } else if here == add.resumable {
        fields::bool(scanner, "resumable")?;
    } else if here == add.abort_immediately {
        fields::bool(scanner, "abort_immediately")?;
    } else if here == add.external_req_id {
        fields::skip(scanner, "external_req_id", TEXT)?;
    } else if here == add.session_id {
        fields::skip(scanner, "session_id", TEXT)?;
    } else if here == add.reasoning_ended {
        fields::skip(scanner, "reasoning_ended", &[Kind::Nil, Kind::Bool])?;
    } else if here == add.reasoning_parser_kwargs {
        fields::optional_map(scanner, "reasoning_parser_kwargs")?;
    } else if here == add.kv_hints {
        fields::optional(scanner, "kv_hints", check_kv_hints)?;
    } else {
        scanner.skip_checked().map_err(malformed("a later field"))?;
    }
    Ok(())
}

/// `KvHintsEnvelope` (`vllm/v1/kv_hints/protocol.py`, since 0.31).
fn check_kv_hints(scanner: &mut Scanner<'_>) -> Result<(), RefusalKind> {
    const FIELD: &str = "kv_hints";
    let mut keys = 0;
    fields::map(scanner, FIELD, |scanner, key| match key {
        "protocol_version" | "message_id" => {
            keys += 1;
            fields::str(scanner, FIELD).map(drop)
        }
        "actions" => {
            keys += 1;
            for _ in 0..scanner.array().map_err(malformed(FIELD))? {
                check_kv_action(scanner)?;
            }
            Ok(())
        }
        _ => scanner.skip_checked().map_err(malformed(FIELD)),
    })?;
    if keys < 3 {
        return Err(fields::wrong(FIELD, format!("{keys} known keys"), "3"));
    }
    Ok(())
}

fn check_kv_action(scanner: &mut Scanner<'_>) -> Result<(), RefusalKind> {
    const FIELD: &str = "kv_hints action";
    let mut keys = 0;
    fields::map(scanner, FIELD, |scanner, key| match key {
        "action_id" | "action_type" | "action_version" => {
            keys += 1;
            fields::str(scanner, FIELD).map(drop)
        }
        "payload" => {
            keys += 1;
            fields::map(scanner, FIELD, |s, _| s.skip_checked().map_err(malformed(FIELD)))
        }
        _ => scanner.skip_checked().map_err(malformed(FIELD)),
    })?;
    if keys < 4 {
        return Err(fields::wrong(FIELD, format!("{keys} known keys"), "4"));
    }
    Ok(())
}
