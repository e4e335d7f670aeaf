//! What an engine sends to its clients (channel O) and to the coordinator (channel K):
//! `EngineCoreOutputs` (`vllm/v1/engine/__init__.py`).
//!
//! Positions 0 to 7 are the same in 0.11.0 to 0.33.0; 0.32.0 appends `weight_version`. Large
//! tensors follow in frames of their own, which are passed on as they are.

use bytes::Bytes;

use crate::error::DecodeError;
use crate::frames::ENGINE_CORE_DEAD;
use crate::ids::{CallId, EngineIndex, Wave};
use crate::layout::{FINISH_REASON, Layout};
use crate::positional::{ScanError, Scanner};
use crate::stats::SchedulerStats;
use crate::utility::UtilityOutput;
use crate::write;

const NAME: &str = "EngineCoreOutputs";

/// Why a request ended (vLLM: `FinishReason`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop string or token.
    Stop,
    /// `max_tokens` or the model's limit.
    Length,
    /// Aborted.
    Abort,
    /// A retryable internal error, since 0.13.
    Error,
    /// The repetition detector, since 0.17.
    Repetition,
    /// One that this crate does not know.
    Other(i64),
}

impl From<i64> for FinishReason {
    fn from(value: i64) -> Self {
        match value {
            0 => Self::Stop,
            1 => Self::Length,
            2 => Self::Abort,
            3 => Self::Error,
            4 => Self::Repetition,
            other => Self::Other(other),
        }
    }
}

impl From<FinishReason> for i64 {
    fn from(value: FinishReason) -> Self {
        match value {
            FinishReason::Stop => 0,
            FinishReason::Length => 1,
            FinishReason::Abort => 2,
            FinishReason::Error => 3,
            FinishReason::Repetition => 4,
            FinishReason::Other(other) => other,
        }
    }
}

/// One message of an engine, as the first frame tells.
#[derive(Clone, Debug)]
pub enum EngineOutput<'a> {
    /// The engine died of an exception and says so on every output socket.
    Dead,
    Outputs(OutputsView<'a>),
}

impl<'a> EngineOutput<'a> {
    /// Reads the first frame of `frames`.
    pub fn parse(frames: &'a [Bytes]) -> Result<Self, DecodeError> {
        match frames {
            [only] if **only == *ENGINE_CORE_DEAD => Ok(Self::Dead),
            [first, ..] => OutputsView::parse(first).map(Self::Outputs),
            [] => Err(DecodeError::TooShort { message: NAME, unit: "frames", expected: 1, actual: 0 }),
        }
    }
}

/// Whether a report to the DP coordinator is one of load. Engines report load and wave edges in messages of their own
/// (`vllm/v1/engine/core.py` 0.32.0, `_maybe_publish_request_counts` and `run_busy_loop`), so whoever waits for wave
/// edges need not read the many counters of the others.
pub fn reports_load(frame: &[u8]) -> bool {
    let mut scanner = Scanner::new(frame);
    let mut stats = || {
        let fields = scanner.array()?;
        scanner.skip_many(fields.min(2))?;
        Ok::<_, ScanError>(fields > 2 && !scanner.nil()?)
    };
    stats().unwrap_or(false)
}

/// An `EngineCoreOutputs` in place: found, not decoded.
#[derive(Clone, Debug, Default)]
pub struct OutputsView<'a> {
    /// Global DP rank of the engine.
    pub engine_index: EngineIndex,
    outputs: &'a [u8],
    output_count: usize,
    /// `SchedulerStats` as they came; [`SchedulerStats::decode`] reads them.
    pub scheduler_stats: Option<&'a [u8]>,
    /// The engine's monotonic clock, seconds.
    pub timestamp: f64,
    utility_output: Option<(CallId, &'a [u8])>,
    finished_requests: Option<&'a [u8]>,
    /// The wave that ended; the group is idle.
    pub wave_complete: Option<Wave>,
    /// A wave that the others must join.
    pub start_wave: Option<Wave>,
    /// Version of the weights used in this step, since 0.32.0.
    pub weight_version: Option<&'a str>,
}

impl<'a> OutputsView<'a> {
    /// Finds the fields. Shorter arrays have their defaults, longer ones are cut.
    pub fn parse(frame: &'a [u8]) -> Result<Self, DecodeError> {
        let mut scanner = Scanner::new(frame);
        let fields = scanner.array().map_err(|e| e.within(NAME, "top level"))?;
        let mut view = Self::default();
        for position in 0..fields {
            view.field(&mut scanner, position).map_err(|e| e.within(NAME, format!("position {position}")))?;
        }
        scanner.finish().map_err(|e| e.within(NAME, "end"))?;
        Ok(view)
    }

    fn field(&mut self, scanner: &mut Scanner<'a>, position: usize) -> Result<(), ScanError> {
        match position {
            0 => self.engine_index = EngineIndex(scanner.integer("engine index")?),
            1 => {
                self.output_count = scanner.clone().array()?;
                self.outputs = scanner.raw()?;
            }
            2 => self.scheduler_stats = scanner.optional(Scanner::raw)?,
            3 => self.timestamp = scanner.float()?,
            4 => {
                self.utility_output = scanner.optional(|s| {
                    let mut inside = s.clone();
                    inside.array()?;
                    let call_id = CallId(inside.int()?);
                    Ok((call_id, s.raw()?))
                })?;
            }
            5 => self.finished_requests = scanner.optional(Scanner::raw)?,
            6 => self.wave_complete = scanner.optional(|s| s.integer("wave").map(Wave))?,
            7 => self.start_wave = scanner.optional(|s| s.integer("wave").map(Wave))?,
            8 => self.weight_version = scanner.optional(Scanner::str)?,
            _ => scanner.skip()?,
        }
        Ok(())
    }

    /// What the message says about waves: the engine's newest wave, and whether it runs. Nothing if no wave begins or
    /// ends with it.
    pub fn wave_edge(&self) -> Option<(Wave, bool)> {
        let ended = self.wave_complete.map(|wave| (Wave(wave.0.saturating_add(1)), false));
        ended.or_else(|| self.start_wave.map(|wave| (wave, true)))
    }

    /// Number of outputs of requests.
    pub const fn output_count(&self) -> usize {
        self.output_count
    }

    /// The outputs of requests.
    pub fn outputs(&self) -> Outputs<'a> {
        let mut scanner = Scanner::new(self.outputs);
        let left = scanner.array().unwrap_or(0);
        Outputs { scanner, left }
    }

    /// The call this answers, if it answers one.
    pub fn utility_call_id(&self) -> Option<CallId> {
        self.utility_output.map(|(call_id, _)| call_id)
    }

    /// The answer to a utility call, decoded.
    pub fn utility_output(&self) -> Option<Result<UtilityOutput, DecodeError>> {
        self.utility_output.map(|(_, raw)| UtilityOutput::decode(raw))
    }

    /// Ids of requests that ended in this step, whether or not they have an output here.
    pub fn finished_requests(&self) -> Result<Vec<&'a str>, DecodeError> {
        let Some(raw) = self.finished_requests else {
            return Ok(Vec::new());
        };
        let fail = |e: ScanError| e.within(NAME, "finished_requests");
        let mut scanner = Scanner::new(raw);
        let count = scanner.array().map_err(fail)?;
        (0..count).map(|_| scanner.str().map_err(fail)).collect()
    }

    /// The scheduler stats, decoded.
    pub fn stats(&self) -> Option<Result<SchedulerStats, DecodeError>> {
        self.scheduler_stats.map(SchedulerStats::decode)
    }

    /// Whether this belongs to no request: neither outputs nor finished requests nor an answer.
    pub const fn is_stats_only(&self) -> bool {
        self.scheduler_stats.is_some()
            && self.output_count == 0
            && self.utility_output.is_none()
            && self.finished_requests.is_none()
            && self.wave_complete.is_none()
            && self.start_wave.is_none()
    }
}

/// Output of one request in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestOutput<'a> {
    pub request_id: &'a str,
    /// Set on the last output of the request.
    pub finished: Option<FinishReason>,
    /// The `EngineCoreOutput` as it came.
    pub raw: &'a [u8],
}

/// Iterates over the outputs of a message.
#[derive(Clone, Debug)]
pub struct Outputs<'a> {
    scanner: Scanner<'a>,
    left: usize,
}

impl<'a> Outputs<'a> {
    fn read(scanner: &mut Scanner<'a>) -> Result<RequestOutput<'a>, ScanError> {
        let mut inside = scanner.clone();
        let fields = inside.array()?;
        if fields == 0 {
            // What follows belongs to the next output.
            return Err(ScanError::Truncated(inside.position()));
        }
        let request_id = inside.str()?;
        let mut finished = None;
        let mut left = fields.saturating_sub(1);
        if fields > FINISH_REASON {
            inside.skip_many(FINISH_REASON - 1)?;
            finished = inside.optional(|s| s.integer::<i64>("finish reason"))?.map(FinishReason::from);
            left -= FINISH_REASON;
        }
        inside.skip_many(left)?;
        Ok(RequestOutput { request_id, finished, raw: scanner.take_until(&inside) })
    }
}

impl<'a> Iterator for Outputs<'a> {
    type Item = Result<RequestOutput<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let output = Self::read(&mut self.scanner).map_err(|e| {
            // What follows cannot be found any more.
            self.left = 0;
            e.within("EngineCoreOutput", "outputs")
        });
        Some(output)
    }
}

/// Output of one request, to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewOutput {
    pub request_id: String,
    /// Tokens of this step.
    pub new_token_ids: Vec<u32>,
    /// Set on the last output.
    pub finish_reason: Option<FinishReason>,
}

/// An `EngineCoreOutputs` to be written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewOutputs {
    /// Global DP rank.
    pub engine_index: EngineIndex,
    /// Outputs of requests.
    pub outputs: Vec<NewOutput>,
    /// An encoded `SchedulerStats` map.
    pub scheduler_stats: Option<Vec<u8>>,
    /// The engine's monotonic clock, seconds; not 0, which vLLM replaces.
    pub timestamp: f64,
    /// Answer to a call.
    pub utility_output: Option<UtilityOutput>,
    /// Requests that ended.
    pub finished_requests: Option<Vec<String>>,
    /// A wave that ended.
    pub wave_complete: Option<Wave>,
    pub start_wave: Option<Wave>,
    /// Version of the weights; written if the layout has it.
    pub weight_version: Option<String>,
}

impl NewOutputs {
    /// The message, with every field of the layout.
    pub fn encode(&self, layout: &Layout) -> Bytes {
        let mut out = Vec::with_capacity(64 + self.outputs.len() * 64);
        write::array(&mut out, layout.output.outputs_fields);
        write::uint(&mut out, u64::from(self.engine_index.0));
        write::array(&mut out, self.outputs.len());
        for output in &self.outputs {
            output.write(layout, &mut out);
        }
        write::optional(&mut out, self.scheduler_stats.as_deref(), Vec::extend_from_slice);
        write::float(&mut out, self.timestamp);
        write::optional(&mut out, self.utility_output.as_ref(), |out, utility| utility.write(out));
        write::optional(&mut out, self.finished_requests.as_ref(), |out, ids| {
            write::strs(out, ids.iter().map(String::as_str));
        });
        for wave in [self.wave_complete, self.start_wave] {
            write::optional(&mut out, wave, |out, wave| write::uint(out, wave.0));
        }
        if layout.output.weight_version.is_some() {
            write::optional(&mut out, self.weight_version.as_deref(), write::str);
        }
        out.into()
    }
}

impl NewOutput {
    fn write(&self, layout: &Layout, out: &mut Vec<u8>) {
        let positions = &layout.output;
        write::array(out, positions.output_fields);
        write::str(out, &self.request_id);
        write::array(out, self.new_token_ids.len());
        for token in &self.new_token_ids {
            write::uint(out, u64::from(*token));
        }
        for position in 2..positions.output_fields {
            let here = Some(position);
            if position == FINISH_REASON
                && let Some(reason) = self.finish_reason
            {
                write::int(out, reason.into());
            } else if here == positions.num_cached_tokens
                || here == positions.num_external_computed_tokens
                || here == positions.num_nans_in_logits
            {
                // Declared as plain int: nil would not decode.
                write::uint(out, 0);
            } else {
                write::nil(out);
            }
        }
    }
}

/// The reason with which a request is ended when its engine is lost: error, or abort where error
/// does not exist yet.
pub const fn error_reason(layout: &Layout) -> FinishReason {
    if layout.error_finish_known() { FinishReason::Error } else { FinishReason::Abort }
}

/// Ends requests with an error. `timestamp` in seconds.
pub fn error_finish<'a>(
    layout: &Layout,
    engine_index: EngineIndex,
    request_ids: impl IntoIterator<Item = &'a str>,
    timestamp: f64,
) -> Bytes {
    finish(layout, engine_index, request_ids, error_reason(layout), timestamp)
}

/// Ends requests. `timestamp` in seconds.
pub fn finish<'a>(
    layout: &Layout,
    engine_index: EngineIndex,
    request_ids: impl IntoIterator<Item = &'a str>,
    reason: FinishReason,
    timestamp: f64,
) -> Bytes {
    let outputs: Vec<NewOutput> = request_ids
        .into_iter()
        .map(|id| NewOutput {
            request_id: id.to_owned(),
            new_token_ids: Vec::new(),
            finish_reason: Some(reason),
        })
        .collect();
    NewOutputs {
        engine_index,
        finished_requests: Some(outputs.iter().map(|o| o.request_id.clone()).collect()),
        outputs,
        timestamp,
        ..NewOutputs::default()
    }
    .encode(layout)
}

/// Answers a utility call.
pub fn utility_answer(
    layout: &Layout,
    engine_index: EngineIndex,
    call_id: CallId,
    result: Result<rmpv::Value, String>,
    timestamp: f64,
) -> Bytes {
    NewOutputs {
        engine_index,
        utility_output: Some(UtilityOutput { call_id, result }),
        timestamp,
        ..NewOutputs::default()
    }
    .encode(layout)
}

/// Reports load. `stats` is an encoded `SchedulerStats` map.
pub fn stats_message(layout: &Layout, engine_index: EngineIndex, stats: Vec<u8>, timestamp: f64) -> Bytes {
    NewOutputs { engine_index, scheduler_stats: Some(stats), timestamp, ..NewOutputs::default() }
        .encode(layout)
}

/// Tells the coordinator that a wave ended.
pub fn wave_complete_message(
    layout: &Layout,
    engine_index: EngineIndex,
    wave: Wave,
    timestamp: f64,
) -> Bytes {
    NewOutputs { engine_index, wave_complete: Some(wave), timestamp, ..NewOutputs::default() }.encode(layout)
}

/// Tells the coordinator that a wave must start.
pub fn start_wave_message(layout: &Layout, engine_index: EngineIndex, wave: Wave, timestamp: f64) -> Bytes {
    NewOutputs { engine_index, start_wave: Some(wave), timestamp, ..NewOutputs::default() }.encode(layout)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::stats::SchedulerStats;

    #[test]
    fn reports_of_load_are_told_from_wave_edges_without_reading_them() {
        let (layout, rank) = (Layout::newest(), EngineIndex(300));
        assert!(reports_load(&stats_message(&layout, rank, SchedulerStats::default().encode(), 1.0)));
        assert!(!reports_load(&wave_complete_message(&layout, rank, Wave(7), 1.0)));
        assert!(!reports_load(&start_wave_message(&layout, rank, Wave(7), 1.0)));
        for damaged in [&b""[..], b"\x93", b"\x92\x00\x90", b"\xc0"] {
            assert!(!reports_load(damaged), "{damaged:?}");
        }
    }
}
