"""output.frames: what an engine sends to its clients and to the coordinator."""

from __future__ import annotations

from typing import Any

from .common import Message, encode, plain, stats

# Fixed, so that a second run writes the same bytes.
TIMESTAMP = 1234.5


def output_messages() -> list[Message]:
    """What an engine sends to its clients and to the coordinator."""
    import numpy as np
    from vllm.v1.engine import (
        EngineCoreOutput,
        EngineCoreOutputs,
        FinishReason,
        UtilityOutput,
    )
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.serial_utils import MsgpackDecoder, UtilityResult

    messages: list[Message] = []

    def add(label: str, value: Any, **more: Any) -> None:
        frames = encode(value)
        decoded = MsgpackDecoder(EngineCoreOutputs).decode(frames)
        utility = decoded.utility_output
        if utility is not None and utility.failure_message is not None:
            answer = {"failure": utility.failure_message}
        elif utility is not None:
            answer = {"result": plain(utility.result.result)}
        else:
            answer = None
        counts = decoded.scheduler_stats
        expect = {
            "engine_index": decoded.engine_index,
            "outputs": [
                [
                    output.request_id,
                    None if output.finish_reason is None else int(output.finish_reason),
                ]
                for output in decoded.outputs
            ],
            "stats": None
            if counts is None
            else {
                "num_running_reqs": counts.num_running_reqs,
                "num_waiting_reqs": counts.num_waiting_reqs,
                "step_counter": counts.step_counter,
                "current_wave": counts.current_wave,
                "kv_cache_usage": counts.kv_cache_usage,
            },
            "timestamp": decoded.timestamp,
            "call_id": None if utility is None else utility.call_id,
            "answer": answer,
            "finished_requests": None
            if decoded.finished_requests is None
            else sorted(decoded.finished_requests),
            "wave_complete": decoded.wave_complete,
            "start_wave": decoded.start_wave,
            "weight_version": getattr(decoded, "weight_version", None),
            "frames": len(frames),
        }
        expect.update(more)
        messages.append((label, frames, expect))

    def outputs(**values: Any) -> Any:
        known = EngineCoreOutputs.__struct_fields__
        values.setdefault("timestamp", TIMESTAMP)
        return EngineCoreOutputs(**{k: v for k, v in values.items() if k in known})

    add("empty", outputs())
    add(
        "step",
        outputs(
            engine_index=1,
            outputs=[
                EngineCoreOutput("req-a", [17]),
                EngineCoreOutput("req-b", [2], finish_reason=FinishReason.STOP, stop_reason="END"),
                EngineCoreOutput("req-c", [5, 70000], finish_reason=FinishReason.LENGTH),
            ],
            scheduler_stats=stats(
                num_running_reqs=3,
                num_waiting_reqs=1,
                kv_cache_usage=0.25,
                step_counter=9,
                current_wave=4,
            ),
            finished_requests={"req-b", "req-c"},
            weight_version="step-12",
        ),
    )
    ids: Any = np.arange(80, dtype=np.int32).reshape(1, 80)
    values: Any = np.zeros((1, 80), dtype=np.float32)
    ranks: Any = np.zeros((1,), dtype=np.int32)
    if "list" in str(LogprobsLists.__annotations__["logprob_token_ids"]):
        ids, values, ranks = ids.tolist(), values.tolist(), ranks.tolist()
    logprobs = LogprobsLists(ids, values, ranks)
    add(
        "step_with_tensors",
        outputs(outputs=[EngineCoreOutput("req-a", [17], new_logprobs=logprobs)]),
    )
    add(
        "abort_finish",
        outputs(
            outputs=[
                EngineCoreOutput("req-a", [], finish_reason=FinishReason.ABORT),
            ],
            finished_requests=["req-a"],
        ),
    )
    if hasattr(FinishReason, "ERROR"):
        add(
            "error_finish",
            outputs(
                engine_index=3,
                outputs=[
                    EngineCoreOutput("req-a", [], finish_reason=FinishReason.ERROR),
                    EngineCoreOutput("req-b", [], finish_reason=FinishReason.ERROR),
                ],
                finished_requests=["req-a", "req-b"],
            ),
        )

    def answered(call: int, value: Any) -> Any:
        utility = UtilityOutput(call)
        utility.result = UtilityResult(value)
        return outputs(utility_output=utility)

    add("answer_none", answered(123, None))
    add("answer_true", answered(2**64 - 1, True))
    add("answer_list", answered(7, ["generate", "embed"]))
    add("answer_nested", answered(8, [{"a": [1, -2.5, b"\x01"], "b": None}]))
    failure = UtilityOutput(9, failure_message="Call to x method failed: boom")
    add("answer_failure", outputs(utility_output=failure))
    add("stats_only", outputs(scheduler_stats=stats(num_running_reqs=2)))
    add("wave_complete", outputs(wave_complete=7))
    add("start_wave", outputs(engine_index=2, start_wave=0))
    return messages
