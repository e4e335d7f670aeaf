//! Checks of `SamplingParams`, `PoolingParams` and `LoRARequest` in an ADD.
//!
//! Their constructors run while the engine's input thread decodes, and what they refuse raises
//! there. The rules are those of `vllm/sampling_params.py` (`_verify_args`), `vllm/pooling_params.py`
//! and `vllm/lora/request.py`; keys that are not named here are ignored by vLLM or newer than 0.33.

use bytes::Bytes;

use crate::layout::Layout;
use crate::positional::{Kind, Scanner};

use super::RefusalKind;
use super::fields::{
    bool, float, int, ints, malformed, map, nil_or, one_of, optional, optional_map, skip, str, strs, wrong,
};
use super::tensor;

const ANY: i128 = i128::MIN;

/// `sampling_params`, a map that leaves out defaults.
pub(super) fn sampling(
    scanner: &mut Scanner<'_>,
    layout: &Layout,
    frames: &[Bytes],
) -> Result<(), RefusalKind> {
    let mut seen =
        Seen { n: 1, temperature: 1.0, max_tokens: Some(16), min_tokens: 0, stops: false, detokenize: true };
    map(scanner, "sampling_params", |scanner, key| sampling_field(scanner, key, layout, frames, &mut seen))?;
    seen.check()
}

/// Values that depend on each other.
struct Seen {
    n: i128,
    temperature: f64,
    max_tokens: Option<i128>,
    min_tokens: i128,
    stops: bool,
    detokenize: bool,
}

impl Seen {
    fn check(&self) -> Result<(), RefusalKind> {
        if let Some(max) = self.max_tokens.filter(|max| self.min_tokens > *max) {
            return Err(wrong("min_tokens", self.min_tokens, format!("at most max_tokens, {max}")));
        }
        if self.stops && !self.detokenize {
            return Err(wrong("detokenize", false, "true, because of stop"));
        }
        // A positive temperature is raised to 0.01.
        if self.n > 1 && self.temperature == 0.0 {
            return Err(wrong("n", self.n, "1, because temperature is 0"));
        }
        Ok(())
    }
}

fn sampling_field(
    scanner: &mut Scanner<'_>,
    key: &str,
    layout: &Layout,
    frames: &[Bytes],
    seen: &mut Seen,
) -> Result<(), RefusalKind> {
    const OPTIONAL_BOOL: &[Kind] = &[Kind::Nil, Kind::Bool];
    match key {
        "n" => seen.n = int(scanner, "n", 1)?,
        "presence_penalty" => float(scanner, "presence_penalty", -2.0..=2.0).map(drop)?,
        "frequency_penalty" => float(scanner, "frequency_penalty", -2.0..=2.0).map(drop)?,
        "repetition_penalty" => positive(scanner, "repetition_penalty", f64::MAX)?,
        "temperature" => {
            let most = layout.max_temperature();
            seen.temperature = float(scanner, "temperature", 0.0..=most)?;
        }
        "top_p" => positive(scanner, "top_p", 1.0)?,
        "top_k" => int(scanner, "top_k", -1).map(drop)?,
        "min_p" => float(scanner, "min_p", 0.0..=1.0).map(drop)?,
        "seed" => nil_or(scanner, "seed", |s, field| int(s, field, ANY))?,
        "stop" => {
            seen.stops = if one_of(scanner, "stop", &[Kind::Nil, Kind::Str, Kind::Array])? == Kind::Str {
                if str(scanner, "stop")?.is_empty() {
                    return Err(wrong("stop", "an empty string", "no empty string"));
                }
                true
            } else {
                optional(scanner, "stop", |s| strs(s, "stop", false))?.is_some_and(|n| n > 0)
            };
        }
        "bad_words" => {
            nil_or(scanner, "bad_words", |s, field| strs(s, field, layout.bad_words_may_be_empty()))?;
        }
        "stop_token_ids" | "allowed_token_ids" | "logprob_token_ids" | "trace_decode_token_ids" => {
            nil_or(scanner, "token ids", ints)?;
        }
        "_all_stop_token_ids" => ints(scanner, "_all_stop_token_ids")?,
        "_bad_words_token_ids" => nil_or(scanner, "_bad_words_token_ids", int_lists)?,
        "prompt_logprob_token_ids" => {
            // A list of int in 0.31, since 0.32 a numpy array.
            let ndarray = layout.prompt_logprob_ids_are_ndarray();
            nil_or(scanner, "prompt_logprob_token_ids", |s, field| {
                if ndarray { tensor::ndarray(s, field, frames) } else { ints(s, field) }
            })?;
        }
        "ignore_eos"
        | "detokenize"
        | "skip_special_tokens"
        | "spaces_between_special_tokens"
        | "include_stop_str_in_output"
        | "flat_logprobs"
        | "skip_clone"
        | "_watermarking_skipped" => {
            let value = bool(scanner, "a flag of sampling_params")?;
            if key == "detokenize" {
                seen.detokenize = value;
            }
        }
        // nil since 0.12 and 0.32.
        "skip_reading_prefix_cache" | "watermarking" => skip(scanner, "a flag", OPTIONAL_BOOL)?,
        "max_tokens" => {
            seen.max_tokens = optional(scanner, "max_tokens", |s| int(s, "max_tokens", 1))?;
        }
        "min_tokens" => seen.min_tokens = int(scanner, "min_tokens", 0)?,
        "logprobs" => nil_or(scanner, "logprobs", |s, field| int(s, field, -1))?,
        "prompt_logprobs" => nil_or(scanner, "prompt_logprobs", |s, field| int(s, field, -1))?,
        "truncate_prompt_tokens" => nil_or(scanner, "truncate_prompt_tokens", |s, field| int(s, field, -1))?,
        "thinking_token_budget" => nil_or(scanner, "thinking_token_budget", |s, field| int(s, field, -1))?,
        "stream_interval" => nil_or(scanner, "stream_interval", |s, field| int(s, field, 1))?,
        "_eos_token_id" | "prompt_logprob_start" | "best_of" | "_real_n" => {
            nil_or(scanner, "a number of sampling_params", |s, field| int(s, field, ANY))?;
        }
        "output_text_buffer_length" | "routed_experts_prompt_start" => {
            int(scanner, "a number of sampling_params", ANY).map(drop)?;
        }
        "output_kind" => output_kind(scanner)?,
        "logit_bias" => nil_or(scanner, "logit_bias", logit_bias)?,
        "extra_args" => optional_map(scanner, "extra_args")?,
        "structured_outputs" => {
            nil_or(scanner, "structured_outputs", |s, field| structured_outputs(s, field, layout))?;
        }
        "repetition_detection" => nil_or(scanner, "repetition_detection", repetition_detection)?,
        "guided_decoding" => skip(scanner, "guided_decoding", &[Kind::Nil, Kind::Map])?,
        _ => scanner.skip_checked().map_err(malformed("sampling_params"))?,
    }
    Ok(())
}

fn positive(scanner: &mut Scanner<'_>, field: &'static str, most: f64) -> Result<(), RefusalKind> {
    let value = float(scanner, field, 0.0..=most)?;
    if value > 0.0 { Ok(()) } else { Err(wrong(field, value, "more than 0")) }
}

fn output_kind(scanner: &mut Scanner<'_>) -> Result<(), RefusalKind> {
    match int(scanner, "output_kind", 0)? {
        0..=2 => Ok(()),
        other => Err(wrong("output_kind", other, "0, 1 or 2")),
    }
}

fn int_lists(scanner: &mut Scanner<'_>, field: &'static str) -> Result<(), RefusalKind> {
    for _ in 0..scanner.array().map_err(malformed(field))? {
        ints(scanner, field)?;
    }
    Ok(())
}

fn logit_bias(scanner: &mut Scanner<'_>, field: &'static str) -> Result<(), RefusalKind> {
    for _ in 0..scanner.map().map_err(malformed(field))? {
        int(scanner, field, ANY)?;
        scanner.float().map_err(malformed(field))?;
    }
    Ok(())
}

fn structured_outputs(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    layout: &Layout,
) -> Result<(), RefusalKind> {
    let mut constraints = 0;
    map(scanner, field, |scanner, key| {
        let kinds: &[Kind] = match key {
            "json" => &[Kind::Nil, Kind::Str, Kind::Map],
            "regex" | "grammar" | "structural_tag" => &[Kind::Nil, Kind::Str],
            "choice" => &[Kind::Nil, Kind::Array],
            "json_object" => &[Kind::Nil, Kind::Bool],
            "whitespace_pattern" | "_backend" => {
                return skip(scanner, field, &[Kind::Nil, Kind::Str]);
            }
            "disable_any_whitespace"
            | "disable_additional_properties"
            | "disable_fallback"
            | "_backend_was_auto" => return bool(scanner, field).map(drop),
            _ => return scanner.skip_checked().map_err(malformed(field)),
        };
        if one_of(scanner, field, kinds)? != Kind::Nil {
            constraints += 1;
        }
        if key == "choice" {
            nil_or(scanner, field, |s, field| strs(s, field, true))
        } else {
            scanner.skip_checked().map_err(malformed(field))
        }
    })?;
    if constraints > 1 || (constraints == 0 && layout.structured_outputs_need_one()) {
        return Err(wrong(field, format!("of {constraints} constraints"), "one constraint"));
    }
    Ok(())
}

fn repetition_detection(scanner: &mut Scanner<'_>, field: &'static str) -> Result<(), RefusalKind> {
    let (mut max, mut min, mut count) = (0, 0, 0);
    map(scanner, field, |scanner, key| {
        match key {
            "max_pattern_size" => max = int(scanner, field, 0)?,
            "min_pattern_size" => min = int(scanner, field, 0)?,
            "min_count" => count = int(scanner, field, ANY)?,
            _ => scanner.skip_checked().map_err(malformed(field))?,
        }
        Ok(())
    })?;
    if min > max || (max > 0 && count < 2) {
        return Err(wrong(
            field,
            format!("min {min}, max {max}, count {count}"),
            "min at most max, count at least 2",
        ));
    }
    Ok(())
}

/// What an element of `PoolingParams` or `LoRARequest` is.
#[derive(Clone, Copy)]
enum Item {
    OptionalInt,
    Truncation,
    OptionalBool,
    OptionalInts,
    OptionalStr,
    OptionalMap,
    Bool,
    Task,
    OutputKind,
    LateInteraction,
    LateChunking,
}

impl Item {
    fn check(self, scanner: &mut Scanner<'_>, field: &'static str) -> Result<(), RefusalKind> {
        match self {
            Self::OptionalInt => nil_or(scanner, field, |s, field| int(s, field, ANY)),
            Self::OptionalBool => skip(scanner, field, &[Kind::Nil, Kind::Bool]),
            Self::OptionalInts => nil_or(scanner, field, ints),
            Self::OptionalStr => skip(scanner, field, &[Kind::Nil, Kind::Str]),
            Self::OptionalMap => optional_map(scanner, field),
            Self::Bool => bool(scanner, field).map(drop),
            Self::Truncation => nil_or(scanner, field, |s, field| int(s, field, -1)),
            // FINAL_ONLY.
            Self::OutputKind => match int(scanner, "output_kind", 2)? {
                2 => Ok(()),
                other => Err(wrong("output_kind", other, "2")),
            },
            Self::Task => nil_or(scanner, field, |s, field| {
                let task = str(s, field)?;
                if TASKS.contains(&task) {
                    Ok(())
                } else {
                    let task: String = task.chars().take(40).collect();
                    Err(wrong("task", format!("{task:?}"), TASKS.join(", ")))
                }
            }),
            Self::LateChunking => nil_or(scanner, field, |s, field| {
                let count = s.array().map_err(malformed(field))?;
                if count == 0 || int(s, field, 1)? > i128::from(i64::MAX) {
                    return Err(wrong(field, "without chunk size", "a chunk size of 1 or more"));
                }
                s.skip_many(count - 1).map_err(malformed(field))
            }),
            Self::LateInteraction => nil_or(scanner, field, |s, field| {
                let count = s.array().map_err(malformed(field))?;
                if count < 2 {
                    return Err(wrong(field, "too short", "mode and key"));
                }
                str(s, field)?;
                str(s, field)?;
                if count > 2 {
                    nil_or(s, field, |s, field| int(s, field, ANY))?;
                }
                s.skip_many(count.saturating_sub(3)).map_err(malformed(field))
            }),
        }
    }
}

/// Tasks of `PoolingParams` in any version (`vllm/tasks.py`).
const TASKS: [&str; 8] = [
    "encode",
    "embed",
    "classify",
    "score",
    "token_embed",
    "token_classify",
    "plugin",
    "embed&token_classify",
];

/// Fields of `PoolingParams` in their order, each with the first and the last form that has it, see
/// [`Layout::pooling_form`].
const POOLING: [(Item, usize, usize); 16] = [
    (Item::Truncation, 0, 2),
    (Item::OptionalInt, 0, 1),
    // normalize, activation and softmax
    (Item::OptionalBool, 0, 1),
    (Item::OptionalBool, 0, 1),
    (Item::OptionalBool, 0, 1),
    // use_activation
    (Item::OptionalBool, 1, 5),
    (Item::OptionalInt, 2, 5),
    // step_tag_id
    (Item::OptionalInt, 0, 5),
    (Item::OptionalInts, 0, 5),
    (Item::Task, 0, 5),
    (Item::Bool, 0, 5),
    // skip_reading_prefix_cache
    (Item::OptionalBool, 1, 5),
    (Item::LateInteraction, 4, 5),
    (Item::OptionalMap, 0, 5),
    (Item::OutputKind, 0, 5),
    (Item::LateChunking, 5, 5),
];

/// `pooling_params`, a positional struct with defaults for all fields.
pub(super) fn pooling(scanner: &mut Scanner<'_>, layout: &Layout) -> Result<(), RefusalKind> {
    let form = layout.pooling_form();
    let fields = POOLING.iter().filter(|(_, first, last)| (*first..=*last).contains(&form));
    let items: Vec<Item> = fields.map(|(item, ..)| *item).collect();
    let count = scanner.array().map_err(malformed("pooling_params"))?;
    positional(scanner, "pooling_params", count, &items)
}

fn positional(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    count: usize,
    items: &[Item],
) -> Result<(), RefusalKind> {
    for position in 0..count {
        match items.get(position) {
            Some(item) => item.check(scanner, field)?,
            None => scanner.skip_checked().map_err(malformed(field))?,
        }
    }
    Ok(())
}

/// `lora_request`, a positional struct: name, id, path, then what changes between versions.
pub(super) fn lora(scanner: &mut Scanner<'_>, layout: &Layout) -> Result<(), RefusalKind> {
    use Item::{Bool, OptionalInt, OptionalMap, OptionalStr};
    const FIELD: &str = "lora_request";
    let rest: &[Item] = match layout.lora_form() {
        0 => &[OptionalStr, OptionalInt, OptionalStr, OptionalMap],
        1 => &[OptionalStr, OptionalMap, Bool, Bool],
        _ => &[OptionalStr, Bool, Bool],
    };
    let count = scanner.array().map_err(malformed(FIELD))?;
    if count < 3 {
        return Err(wrong(FIELD, format!("of {count}"), "name, id and path"));
    }
    str(scanner, FIELD)?;
    int(scanner, "lora_int_id", 1)?;
    if str(scanner, FIELD)?.is_empty() && layout.lora_form() > 0 {
        return Err(wrong("lora_path", "empty", "a path"));
    }
    positional(scanner, FIELD, count - 3, rest)
}
