//! What differs between the vLLM versions that the fakes can play.

use std::fmt;
use std::str::FromStr;

/// A vLLM release, ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VllmVersion(pub u32, pub u32, pub u32);

/// The version that the tests play unless told otherwise.
impl Default for VllmVersion {
    fn default() -> Self {
        Self(0, 32, 0)
    }
}

impl fmt::Display for VllmVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl FromStr for VllmVersion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut numbers = text.split('.').map(str::parse);
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) => Ok(Self(major, minor, patch)),
            _ => Err(format!("`{text}` is not a version like 0.32.0")),
        }
    }
}

/// Positions in `EngineCoreRequest` that the fakes use (`v1/engine/__init__.py`).
#[derive(Clone, Copy, Debug)]
pub struct RequestPositions {
    /// Where `sampling_params` is.
    pub sampling_params: usize,
    /// Where `arrival_time` is: a number, never nil.
    pub arrival_time: usize,
    /// Where `client_index` is.
    pub client_index: usize,
    /// Where `current_wave` is.
    pub current_wave: usize,
    /// Where `priority` is: a number, never nil.
    pub priority: usize,
    /// Where `resumable` and `abort_immediately` are, if they exist: booleans, never nil.
    pub flags: &'static [usize],
    /// How many fields there are.
    pub len: usize,
}

impl VllmVersion {
    /// At least this version?
    pub fn at_least(self, minor: u32, patch: u32) -> bool {
        self >= Self(0, minor, patch)
    }

    /// Where the fields of a request are.
    pub fn request(self) -> RequestPositions {
        let (client_index, len) = if self.at_least(31, 0) {
            (11, 22)
        } else if self.at_least(28, 0) {
            (11, 21)
        } else if self.at_least(21, 0) {
            (11, 20)
        } else if self.at_least(20, 0) {
            (10, 18)
        } else if self.at_least(17, 0) {
            (10, 17)
        } else if self.at_least(16, 0) {
            (11, 18)
        } else if self.at_least(15, 0) {
            (11, 17)
        } else if self.at_least(14, 0) {
            (11, 16)
        } else {
            (11, 15)
        };
        let flags: &[usize] = if self.at_least(21, 0) {
            &[15, 19]
        } else if self.at_least(17, 0) {
            &[14]
        } else if self.at_least(15, 0) {
            &[15]
        } else {
            &[]
        };
        RequestPositions {
            sampling_params: 3,
            arrival_time: if self.at_least(17, 0) { 5 } else { 6 },
            client_index,
            current_wave: client_index + 1,
            priority: client_index + 2,
            flags,
            len,
        }
    }

    /// How many fields an `EngineCoreOutput` has.
    pub fn output_len(self) -> usize {
        if self.at_least(33, 0) {
            19
        } else if self.at_least(31, 0) {
            18
        } else if self.at_least(29, 0) {
            17
        } else if self.at_least(28, 0) {
            16
        } else if self.at_least(26, 0) {
            14
        } else if self.at_least(20, 0) {
            13
        } else if self.at_least(16, 0) {
            14
        } else if self.at_least(14, 0) {
            13
        } else if self.at_least(12, 0) {
            12
        } else {
            11
        }
    }

    /// Positions of an `EngineCoreOutput` that hold a number, never nil: `num_nans_in_logits`, and
    /// before 0.20 `num_cached_tokens` and `num_external_computed_tokens`.
    pub fn output_numbers(self) -> &'static [usize] {
        if self.at_least(26, 0) {
            &[13]
        } else if self.at_least(20, 0) {
            &[12]
        } else if self.at_least(16, 0) {
            &[10, 11, 13]
        } else if self.at_least(14, 0) {
            &[10, 12]
        } else if self.at_least(12, 0) {
            &[10, 11]
        } else {
            &[10]
        }
    }

    /// How many fields an `EngineCoreOutputs` has: the ninth is `weight_version`.
    pub fn outputs_len(self) -> usize {
        if self.stamps_weight_version() { 9 } else { 8 }
    }

    /// Step outputs name the weights they were computed with.
    pub fn stamps_weight_version(self) -> bool {
        self.at_least(32, 0)
    }

    /// The registration frame is a map (before: empty).
    pub fn registers_with_a_map(self) -> bool {
        self.at_least(20, 0)
    }

    /// READY carries `num_gpu_blocks` and `dp_stats_address`.
    pub fn ready_carries_blocks(self) -> bool {
        !self.registers_with_a_map()
    }

    /// READY of a lockstep engine carries `parallel_config_hash`.
    pub fn ready_carries_hash(self) -> bool {
        self.at_least(12, 0)
    }

    /// Dense ranks are independent of each other (before: every model steps in lockstep).
    pub fn dense_is_independent(self) -> bool {
        self.at_least(14, 0)
    }

    /// Dense engines report their load to the DP coordinator.
    pub fn dense_reports_load(self) -> bool {
        self.at_least(27, 0)
    }

    /// A second READY on the coordinator socket is ignored (before: it kills the input thread).
    pub fn tolerates_second_ready(self) -> bool {
        self.at_least(17, 0)
    }

    /// Lockstep engines pause by consensus.
    pub fn pauses_by_consensus(self) -> bool {
        self.at_least(21, 0)
    }

    /// Rank 0 reports the start of a wave.
    pub fn reports_wave_start(self) -> bool {
        self.at_least(29, 0)
    }

    /// Engines start waves by themselves; frontends send no FIRST_REQ.
    pub fn engines_start_waves(self) -> bool {
        self.at_least(33, 0)
    }

    /// Counts published by the DP coordinator have three elements (before: two).
    pub fn counts_carry_kv_use(self) -> bool {
        self.at_least(27, 0)
    }

    /// `set_weight_version` and `get_weight_version` exist.
    pub fn has_weight_version(self) -> bool {
        self.at_least(27, 0)
    }

    /// `pause_scheduler(mode, clear_cache)` exists.
    pub fn has_pause_modes(self) -> bool {
        self.at_least(17, 0)
    }

    /// `pause_generation` exists.
    pub fn has_pause_generation(self) -> bool {
        self.at_least(33, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number_not_by_text() {
        let old: VllmVersion = "0.9.2".parse().unwrap();
        assert!(old < VllmVersion::default());
        assert!("0.32".parse::<VllmVersion>().is_err());
    }

    #[test]
    fn the_client_index_moves_with_the_version() {
        assert_eq!(VllmVersion(0, 19, 1).request().client_index, 10);
        assert_eq!(VllmVersion(0, 32, 0).request().client_index, 11);
        assert_eq!(VllmVersion(0, 32, 0).request().len, 22);
    }
}
