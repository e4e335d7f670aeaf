//! Checks of tensors and multimodal features in an ADD (`vllm/v1/serial_utils.py`,
//! `vllm/multimodal/inputs.py`).
//!
//! A tensor is `[dtype, shape, data]`, data being bytes or the number of a frame. The decoder
//! believes all three, and what does not fit raises in the engine's input thread.

use bytes::Bytes;

use crate::layout::MmForm;
use crate::positional::{Kind, Scanner};

use super::RefusalKind;
use super::fields::{self, malformed, one_of, wrong};

/// Nested lists of tensors deeper than this are refused.
const MAX_NESTING: usize = 16;

/// A torch tensor.
pub(super) fn tensor(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    frames: &[Bytes],
) -> Result<(), RefusalKind> {
    array(scanner, field, frames, torch_size)
}

/// A numpy array.
pub(super) fn ndarray(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    frames: &[Bytes],
) -> Result<(), RefusalKind> {
    array(scanner, field, frames, numpy_size)
}

fn array(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    frames: &[Bytes],
    element_size: fn(&str) -> Option<u64>,
) -> Result<(), RefusalKind> {
    let refuse = |reason| Err(RefusalKind::Tensor { field, reason });
    let fail = malformed(field);
    if scanner.array().map_err(fail)? != 3 {
        return refuse("not [dtype, shape, data]");
    }
    let Some(size) = element_size(scanner.str().map_err(fail)?) else {
        return refuse("unknown dtype");
    };
    let mut bytes = Some(size);
    for _ in 0..scanner.array().map_err(fail)? {
        let Ok(dimension) = scanner.integer::<u64>("dimension") else {
            return refuse("shape is not of integers of 0 or more");
        };
        bytes = bytes.and_then(|bytes| bytes.checked_mul(dimension));
    }
    let actual = match scanner.kind().map_err(fail)? {
        Kind::Int => {
            // Frame 0 of the decoder is the payload itself; `frames` starts with the type.
            let index: usize = scanner.integer("frame number").map_err(fail)?;
            match frames.get(index.saturating_add(1)) {
                Some(frame) if index > 0 => frame.len(),
                _ => return refuse("refers to a frame that is not there"),
            }
        }
        Kind::Bin => scanner.bin().map_err(fail)?.len(),
        Kind::Ext => scanner.raw_view().map_err(fail)?.len(),
        Kind::Map => return refuse("is in shared memory of the sender"),
        _ => return refuse("data is neither bytes nor a frame number"),
    };
    if bytes == u64::try_from(actual).ok() {
        Ok(())
    } else {
        refuse("size of data differs from dtype and shape")
    }
}

fn torch_size(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "bool" | "uint8" | "int8" => 1,
        "float8_e4m3fn" | "float8_e4m3fnuz" | "float8_e5m2" | "float8_e5m2fnuz" | "float8_e8m0fnu" => 1,
        "float16" | "bfloat16" | "int16" | "uint16" => 2,
        "float32" | "int32" | "uint32" => 4,
        "float64" | "int64" | "uint64" | "complex64" => 8,
        "complex128" => 16,
        _ => return None,
    })
}

fn numpy_size(dtype: &str) -> Option<u64> {
    let plain = dtype.trim_start_matches(['<', '>', '|', '=']);
    Some(match plain {
        "b1" | "i1" | "u1" => 1,
        "i2" | "u2" | "f2" => 2,
        "i4" | "u4" | "f4" => 4,
        "i8" | "u8" | "f8" | "c8" => 8,
        "c16" => 16,
        _ => return None,
    })
}

/// `mm_features`: nil, or an array of `MultiModalFeatureSpec`.
pub(super) fn features(scanner: &mut Scanner<'_>, form: MmForm, frames: &[Bytes]) -> Result<(), RefusalKind> {
    const FIELD: &str = "mm_features";
    if scanner.nil().map_err(malformed(FIELD))? {
        return Ok(());
    }
    for _ in 0..scanner.array().map_err(malformed(FIELD))? {
        let mut missing = ["data", "modality", "identifier", "mm_position"].to_vec();
        fields::map(scanner, FIELD, |scanner, key| {
            missing.retain(|name| *name != key);
            match key {
                "data" => fields::nil_or(scanner, FIELD, |s, _| item(s, form, frames)),
                "modality" | "identifier" => fields::str(scanner, FIELD).map(|_| ()),
                "mm_hash" => fields::skip(scanner, "mm_hash", &[Kind::Nil, Kind::Str]),
                "mm_position" => position(scanner, frames),
                _ => scanner.skip_checked().map_err(malformed(FIELD)),
            }
        })?;
        none_missing(FIELD, &missing)?;
    }
    Ok(())
}

fn none_missing(field: &'static str, missing: &[&str]) -> Result<(), RefusalKind> {
    match missing {
        [] => Ok(()),
        [first, ..] => Err(wrong(field, format!("without {first}"), "all its keys")),
    }
}

fn position(scanner: &mut Scanner<'_>, frames: &[Bytes]) -> Result<(), RefusalKind> {
    const FIELD: &str = "mm_position";
    let mut missing = ["offset", "length"].to_vec();
    fields::map(scanner, FIELD, |scanner, key| {
        missing.retain(|name| *name != key);
        match key {
            "offset" | "length" => fields::int(scanner, FIELD, 0).map(|_| ()),
            "is_embed" => fields::nil_or(scanner, FIELD, |s, field| tensor(s, field, frames)),
            _ => scanner.skip_checked().map_err(malformed(FIELD)),
        }
    })?;
    none_missing(FIELD, &missing)
}

/// `MultiModalKwargsItem`: a map from key to element since 0.16, before an array of elements.
fn item(scanner: &mut Scanner<'_>, form: MmForm, frames: &[Bytes]) -> Result<(), RefusalKind> {
    const FIELD: &str = "mm_features data";
    if form == MmForm::Keyed {
        return fields::map(scanner, FIELD, |scanner, _| element(scanner, form, frames).map(drop));
    }
    let mut modality = None;
    for _ in 0..scanner.array().map_err(malformed(FIELD))? {
        let here = element(scanner, form, frames)?;
        if *modality.get_or_insert(here) != here {
            return Err(wrong(FIELD, "of several modalities", "one modality"));
        }
    }
    if modality.is_none() {
        return Err(wrong(FIELD, "empty", "elements"));
    }
    Ok(())
}

/// Returns the modality, if the element names one.
fn element<'a>(
    scanner: &mut Scanner<'a>,
    form: MmForm,
    frames: &[Bytes],
) -> Result<Option<&'a str>, RefusalKind> {
    const FIELD: &str = "mm_features element";
    let mut missing = vec!["data", "field"];
    let mut modality = None;
    if form != MmForm::Keyed {
        missing.extend(["modality", "key"]);
    }
    fields::map(scanner, FIELD, |scanner, key| {
        // The decoder passes the map on as keyword arguments: one more would raise.
        if !missing.contains(&key) {
            let key: String = key.chars().take(40).collect();
            return Err(wrong(FIELD, format!("with key {key:?}"), "its keys once"));
        }
        missing.retain(|name| *name != key);
        match key {
            "data" => fields::nil_or(scanner, FIELD, |s, _| nested(s, frames, 0)),
            "field" if form == MmForm::Positional => positional_factory(scanner),
            "field" => factory(scanner),
            _ => {
                let text = fields::str(scanner, FIELD)?;
                if key == "modality" {
                    modality = Some(text);
                }
                Ok(())
            }
        }
    })?;
    none_missing(FIELD, &missing)?;
    Ok(modality)
}

/// Numbers, tensors, and lists of these.
fn nested(scanner: &mut Scanner<'_>, frames: &[Bytes], depth: usize) -> Result<(), RefusalKind> {
    const FIELD: &str = "mm_features tensors";
    if one_of(scanner, FIELD, &[Kind::Array, Kind::Int, Kind::Float, Kind::Bool])? != Kind::Array {
        return scanner.skip().map_err(malformed(FIELD));
    }
    let mut inside = scanner.clone();
    let count = inside.array().map_err(malformed(FIELD))?;
    if count > 0 && inside.kind() == Ok(Kind::Str) {
        return tensor(scanner, FIELD, frames);
    }
    if depth == MAX_NESTING {
        return Err(wrong(FIELD, "nested too deep", "a few levels"));
    }
    for _ in 0..count {
        nested(&mut inside, frames, depth + 1)?;
    }
    *scanner = inside;
    Ok(())
}

/// `[name, keyword arguments]` of a method of `MultiModalFieldConfig`.
fn factory(scanner: &mut Scanner<'_>) -> Result<(), RefusalKind> {
    const FIELD: &str = "mm_features field";
    let fail = malformed(FIELD);
    if scanner.array().map_err(fail)? != 2 {
        return Err(wrong(FIELD, "of another length", "[name, arguments]"));
    }
    let name = scanner.str().map_err(fail)?;
    let (allowed, mut missing): (&[&str], Vec<&str>) = match name {
        "batched" => (&["keep_on_cpu"], vec![]),
        "shared" => (&["keep_on_cpu", "batch_size"], vec!["batch_size"]),
        "flat" => (&["keep_on_cpu", "slices", "dim"], vec!["slices"]),
        _ => return Err(wrong(FIELD, "unknown", "batched, flat or shared")),
    };
    fields::map(scanner, FIELD, |scanner, key| {
        missing.retain(|name| *name != key);
        match key {
            _ if !allowed.contains(&key) => Err(wrong(FIELD, "with other arguments", name)),
            "keep_on_cpu" => fields::bool(scanner, FIELD).map(|_| ()),
            "slices" => slices(scanner, 0),
            _ => fields::int(scanner, FIELD, i128::MIN).map(|_| ()),
        }
    })?;
    none_missing(FIELD, &missing)
}

/// `[name, arguments ...]`, up to 0.12.
fn positional_factory(scanner: &mut Scanner<'_>) -> Result<(), RefusalKind> {
    const FIELD: &str = "mm_features field";
    let fail = malformed(FIELD);
    let count = scanner.array().map_err(fail)?;
    if count == 0 {
        return Err(wrong(FIELD, "empty", "[name, arguments ...]"));
    }
    match (scanner.str().map_err(fail)?, count) {
        ("batched", 1) => Ok(()),
        ("shared", 2) => fields::int(scanner, FIELD, i128::MIN).map(drop),
        ("flat", 2 | 3) => {
            slices(scanner, 0)?;
            scanner.skip_ints(count - 2).map_err(fail)
        }
        _ => Err(wrong(FIELD, "unknown", "batched, flat or shared")),
    }
}

/// A slice is `[start, stop, step]`, each int or nil; lists of slices may be nested.
fn slices(scanner: &mut Scanner<'_>, depth: usize) -> Result<(), RefusalKind> {
    const FIELD: &str = "mm_features slices";
    let count = scanner.array().map_err(malformed(FIELD))?;
    if count == 0 {
        return Ok(());
    }
    let is_list = scanner.kind() == Ok(Kind::Array);
    if depth == MAX_NESTING || (!is_list && count > 3) {
        return Err(wrong(FIELD, "of another form", "lists of slices"));
    }
    for _ in 0..count {
        if is_list {
            slices(scanner, depth + 1)?;
        } else {
            fields::skip(scanner, FIELD, &[Kind::Nil, Kind::Int])?;
        }
    }
    Ok(())
}
