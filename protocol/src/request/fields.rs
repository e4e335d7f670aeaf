//! Checks of single fields of an ADD, as strict as msgspec's typed decoder: an int where a float is
//! declared is taken, everything else must be what is declared.

use std::ops::RangeInclusive;

use crate::positional::{Kind, ScanError, Scanner};

use super::RefusalKind;

pub(super) fn malformed(field: &'static str) -> impl Fn(ScanError) -> RefusalKind + Copy {
    move |error| RefusalKind::Malformed { message: "ADD", at: field, error }
}

pub(super) fn wrong(field: &'static str, actual: impl ToString, expected: impl Into<String>) -> RefusalKind {
    super::value("ADD", field, actual, expected)
}

/// The next value must be of one of `kinds`; returns which.
pub(super) fn one_of(
    scanner: &Scanner<'_>,
    field: &'static str,
    kinds: &[Kind],
) -> Result<Kind, RefusalKind> {
    let actual = scanner.kind().map_err(malformed(field))?;
    if kinds.contains(&actual) {
        return Ok(actual);
    }
    let names: Vec<String> = kinds.iter().map(Kind::to_string).collect();
    Err(wrong(field, actual, names.join(" or ")))
}

/// Skips a value that must be of one of `kinds`.
pub(super) fn skip(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    kinds: &[Kind],
) -> Result<(), RefusalKind> {
    one_of(scanner, field, kinds)?;
    scanner.skip_checked().map_err(malformed(field))
}

/// nil or what `read` takes.
pub(super) fn optional<'a, T>(
    scanner: &mut Scanner<'a>,
    field: &'static str,
    read: impl FnOnce(&mut Scanner<'a>) -> Result<T, RefusalKind>,
) -> Result<Option<T>, RefusalKind> {
    if scanner.nil().map_err(malformed(field))? { Ok(None) } else { read(scanner).map(Some) }
}

/// nil or what `read` takes, when only that matters.
pub(super) fn nil_or<'a, T>(
    scanner: &mut Scanner<'a>,
    field: &'static str,
    read: impl FnOnce(&mut Scanner<'a>, &'static str) -> Result<T, RefusalKind>,
) -> Result<(), RefusalKind> {
    optional(scanner, field, |s| read(s, field)).map(drop)
}

pub(super) fn str<'a>(scanner: &mut Scanner<'a>, field: &'static str) -> Result<&'a str, RefusalKind> {
    scanner.str().map_err(malformed(field))
}

pub(super) fn bool(scanner: &mut Scanner<'_>, field: &'static str) -> Result<bool, RefusalKind> {
    scanner.bool().map_err(malformed(field))
}

pub(super) fn int(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    at_least: i128,
) -> Result<i128, RefusalKind> {
    let value = scanner.int().map_err(malformed(field))?;
    if value >= at_least { Ok(value) } else { Err(wrong(field, value, format!("{at_least} or more"))) }
}

/// A finite float within `range`.
pub(super) fn float(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    range: RangeInclusive<f64>,
) -> Result<f64, RefusalKind> {
    let value = scanner.float().map_err(malformed(field))?;
    if value.is_finite() && range.contains(&value) {
        Ok(value)
    } else {
        let (low, high) = range.into_inner();
        let expected =
            if high < f64::MAX { format!("{low} to {high}") } else { format!("finite, {low} or more") };
        Err(wrong(field, value, expected))
    }
}

pub(super) fn ints(scanner: &mut Scanner<'_>, field: &'static str) -> Result<(), RefusalKind> {
    let count = scanner.array().map_err(malformed(field))?;
    scanner.skip_ints(count).map_err(malformed(field))
}

/// Strings; empty ones only if `empty`. Returns how many.
pub(super) fn strs(
    scanner: &mut Scanner<'_>,
    field: &'static str,
    empty: bool,
) -> Result<usize, RefusalKind> {
    let count = scanner.array().map_err(malformed(field))?;
    for _ in 0..count {
        if str(scanner, field)?.is_empty() && !empty {
            return Err(wrong(field, "an empty string", "no empty string"));
        }
    }
    Ok(count)
}

/// A map with str keys; `value` takes each value.
pub(super) fn map<'a>(
    scanner: &mut Scanner<'a>,
    field: &'static str,
    mut value: impl FnMut(&mut Scanner<'a>, &'a str) -> Result<(), RefusalKind>,
) -> Result<(), RefusalKind> {
    let pairs = scanner.map().map_err(malformed(field))?;
    for _ in 0..pairs {
        let key = str(scanner, field)?;
        value(scanner, key)?;
    }
    Ok(())
}

/// nil or a map with str keys and any values.
pub(super) fn optional_map(scanner: &mut Scanner<'_>, field: &'static str) -> Result<(), RefusalKind> {
    nil_or(scanner, field, |s, field| map(s, field, |s, _| s.skip_checked().map_err(malformed(field))))
}
