//! How durations are written: by people in options, and in messages.

use std::time::Duration;

/// Reads `90`, `90s`, `1.5m`, `500ms`, `2h`; seconds without a unit.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("unit {other:?}, expected ms, s, m or h")),
    };
    let number: f64 =
        number.parse().map_err(|_| "expected a number with or without a unit, like 30s".to_owned())?;
    Duration::try_from_secs_f64(number * factor).map_err(|error| error.to_string())
}

/// Whole milliseconds, for messages.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, expected) in [
            ("60", Duration::from_secs(60)),
            ("60s", Duration::from_secs(60)),
            ("1.5m", Duration::from_secs(90)),
            ("250ms", Duration::from_millis(250)),
            ("0", Duration::ZERO),
            ("2h", Duration::from_secs(7200)),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
        for text in ["", "s", "-1", "5x", "1e9999h", "."] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
