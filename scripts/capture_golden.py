#!/usr/bin/env python3
"""Write protocol/golden from the vLLM that is installed where this script runs.

Two commands:

  capture  encodes messages with vLLM's own classes and writes them, together with what vLLM decodes
           from them, to protocol/golden/vllm-VERSION/. Run it with any Python that has vLLM:
               PYTHON scripts/capture_golden.py capture
  fields   reads field names from the sources of other versions (unpacked wheels), without importing
           them, and writes protocol/golden/fields.json:
               PYTHON scripts/capture_golden.py fields 0.30.0=DIR 0.31.0=DIR ...

A .frames file is one msgpack array of messages; a message is an array of bin, one per ZMQ frame,
without the routing id. manifest.json names the messages in their order.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import json
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent.parent / "protocol" / "golden"

# Fixed, so that a second run writes the same bytes.
TIMESTAMP = 1234.5
ARRIVAL = 1700000000.25

Frames = list[bytes]
Message = tuple[str, Frames, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    capture_args = commands.add_parser("capture", help="write captures of the installed vLLM")
    capture_args.add_argument(
        "--out",
        type=Path,
        default=GOLDEN,
        help="folder that gets vllm-VERSION (default: protocol/golden)",
    )
    fields_args = commands.add_parser("fields", help="write fields.json from unpacked sources")
    fields_args.add_argument(
        "source",
        nargs="+",
        help="VERSION=DIR, DIR holds the vllm package of that version",
    )
    fields_args.add_argument("--out", type=Path, default=GOLDEN / "fields.json")
    args = parser.parse_args()
    if args.command == "fields":
        return write_fields(args.source, args.out)
    return capture(args.out)


# --- capture ---------------------------------------------------------------------------------


def capture(out: Path) -> int:
    import msgspec
    import vllm

    version = vllm.__version__.split("+")[0]
    folder = out / f"vllm-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, Callable[[], list[Message]]] = {
        "input": input_messages,
        "output": output_messages,
        "handshake": handshake_messages,
        "coordinator": coordinator_messages,
        "hostile": hostile_messages,
    }
    files = {}
    for name, collect in groups.items():
        messages = collect()
        data = msgspec.msgpack.encode([frames for _, frames, _ in messages])
        (folder / f"{name}.frames").write_bytes(data)
        files[f"{name}.frames"] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "messages": [{"name": label, "expect": expect} for label, _, expect in messages],
        }
        print(f"{name}: {len(messages)} messages, {len(data)} bytes", file=sys.stderr)
    manifest = {
        "vllm_version": version,
        "command": "scripts/capture_golden.py capture",
        "python": platform.python_version(),
        "msgspec": msgspec.__version__,
        "struct_fields": struct_fields(),
        "files": files,
    }
    (folder / "manifest.json").write_text(one_line_each(manifest))
    print(folder)
    return 0


def one_line_each(manifest: dict[str, Any]) -> str:
    """The manifest as JSON with one line per message."""
    head = {key: value for key, value in manifest.items() if key != "files"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    files = []
    for name, file in manifest["files"].items():
        messages = ",\n".join(f"   {json.dumps(m)}" for m in file["messages"])
        files.append(
            f"  {json.dumps(name)}: {{\n"
            f'   "sha256": "{file["sha256"]}",\n   "messages": [\n{messages}\n   ]\n  }}'
        )
    lines.append(' "files": {\n' + ",\n".join(files) + "\n }")
    return "{\n" + "\n".join(lines) + "\n}\n"


def struct_fields() -> dict[str, Any]:
    """Field names as the running classes have them, in wire order."""
    import vllm.v1.engine as engine

    fields: dict[str, Any] = {}
    for name in (
        "EngineCoreRequest",
        "EngineCoreOutput",
        "EngineCoreOutputs",
        "UtilityOutput",
    ):
        fields[name] = list(getattr(engine, name).__struct_fields__)
    ready = getattr(engine, "EngineCoreReadyResponse", None)
    fields["EngineCoreReadyResponse"] = (
        [field.name for field in dataclasses.fields(ready)] if ready else None
    )
    fields["FinishReason"] = {reason.name: reason.value for reason in engine.FinishReason}
    fields["EngineCoreRequestType"] = {
        kind.name: kind.value.hex() for kind in engine.EngineCoreRequestType
    }
    return fields


def encode(value: Any) -> Frames:
    from vllm.v1.serial_utils import MsgpackEncoder

    return [bytes(frame) for frame in MsgpackEncoder().encode(value)]


def request(**changes: Any) -> Any:
    """An EngineCoreRequest; fields that this version does not have are left out."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    values: dict[str, Any] = {
        "request_id": "cmpl-7a2f-0",
        "prompt_token_ids": [1, 200, 40000, 100000],
        "mm_features": None,
        "sampling_params": SamplingParams(temperature=0.0, max_tokens=16),
        "pooling_params": None,
        "eos_token_id": None,
        "arrival_time": ARRIVAL,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    values.update(changes)
    known = EngineCoreRequest.__struct_fields__
    return EngineCoreRequest(**{key: value for key, value in values.items() if key in known})


def add_message(label: str, value: Any) -> Message:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    payload = encode(value)
    decoded = MsgpackDecoder(EngineCoreRequest).decode(payload)
    expect = {
        "type": "ADD",
        "request_id": decoded.request_id,
        "client_index": decoded.client_index,
        "current_wave": decoded.current_wave,
        "data_parallel_rank": decoded.data_parallel_rank,
        "frames": len(payload) + 1,
    }
    return label, [b"\x00", *payload], expect


def multimodal_features() -> list[Any]:
    """One image feature with a large tensor (own frame) and small ones (inline)."""
    import torch
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalFlatField,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    def elem(key: str, data: Any, field: Any) -> Any:
        names = {f.name for f in dataclasses.fields(MultiModalFieldElem)}
        extra = {"modality": "image", "key": key}
        return MultiModalFieldElem(
            data=data, field=field, **{k: v for k, v in extra.items() if k in names}
        )

    elems = {
        "pixel_values": elem(
            "pixel_values",
            torch.arange(512, dtype=torch.float32).reshape(2, 256),
            MultiModalFlatField(slices=[slice(0, 2)]),
        ),
        "image_grid_thw": elem(
            "image_grid_thw",
            torch.tensor([1, 2, 2], dtype=torch.int64),
            MultiModalBatchedField(),
        ),
    }
    if hasattr(MultiModalKwargsItem, "from_elems"):
        item = MultiModalKwargsItem.from_elems(list(elems.values()))
    else:
        item = MultiModalKwargsItem(elems)
    return [
        MultiModalFeatureSpec(
            data=item,
            modality="image",
            identifier="a" * 64,
            mm_position=PlaceholderRange(
                offset=1, length=4, is_embed=torch.tensor([True, True, False, True])
            ),
        )
    ]


def input_messages() -> list[Message]:
    """What a frontend sends to an engine."""
    import torch
    from vllm.lora.request import LoRARequest
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequestType as Kind

    structured = structured_params()
    rich = SamplingParams(
        n=1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        seed=42,
        stop=["\n\n", "END"],
        stop_token_ids=[2, 32000],
        bad_words=["bad"],
        ignore_eos=True,
        max_tokens=64,
        min_tokens=1,
        logprobs=5,
        prompt_logprobs=2,
        logit_bias={17: -1.5},
        allowed_token_ids=None,
        extra_args={"nested": {"list": [1, 2.5, None, True, "x"]}},
        **structured,
    )
    messages = [
        add_message("add_text", request()),
        add_message("add_client_300", request(client_index=300, current_wave=70000)),
        add_message(
            "add_rich",
            request(
                sampling_params=rich,
                lora_request=LoRARequest("adapter", 7, "/adapters/seven"),
                cache_salt="salt",
                data_parallel_rank=1,
                client_index=3,
                current_wave=12,
                priority=-2,
                trace_headers={"traceparent": "00-abc-def-01"},
                external_req_id="cmpl-7a2f",
                reasoning_ended=False,
                reasoning_parser_kwargs={"enable": True},
                session_id="session",
                eos_token_id=2,
            ),
        ),
        add_message(
            "add_long_prompt",
            request(prompt_token_ids=[(i * 7919) % 152064 for i in range(2000)]),
        ),
        add_message(
            "add_embeds",
            request(
                prompt_token_ids=None,
                prompt_embeds=torch.zeros((4, 64), dtype=torch.bfloat16),
                client_index=1,
            ),
        ),
        add_message(
            "add_pooling",
            request(sampling_params=None, pooling_params=PoolingParams(task="embed")),
        ),
        add_message("add_image", request(mm_features=multimodal_features())),
    ]
    ids = ["cmpl-7a2f-0", "chatcmpl-9c1d-0"]
    messages.append(
        (
            "abort",
            [Kind.ABORT.value, *encode(ids)],
            {"type": "ABORT", "request_ids": ids},
        )
    )
    calls: list[tuple[str, int, int, str, tuple[Any, ...]]] = [
        ("call_supported_tasks", 0, 5, "get_supported_tasks", ()),
        ("call_pause", 2, 2**64 - 1, "pause_scheduler", ("wait", True)),
        ("call_set_weight_version", 130, 70000, "set_weight_version", ("step-12",)),
        (
            "call_reload_weights",
            0,
            12345,
            "collective_rpc",
            ("reload_weights", None, (), {"weights_path": "/models/next"}),
        ),
        (
            "call_rich_arguments",
            70000,
            300,
            "collective_rpc",
            ("method", 1.5, [1, -7, 2**40], {"blob": b"\x00\x01", "x": None}),
        ),
        ("call_add_lora", 1, 9, "add_lora", (LoRARequest("adapter", 7, "/a/7"),)),
    ]
    for label, client, call, method, args in calls:
        messages.append(
            (
                label,
                [Kind.UTILITY.value, *encode((client, call, method, args))],
                {
                    "type": "UTILITY",
                    "client_index": client,
                    "call_id": call,
                    "method": method,
                    "args": plain(args),
                },
            )
        )
    return messages


def plain(value: Any) -> Any:
    """As JSON; bytes as {"bytes": hex}."""
    import msgspec

    decoded = msgspec.msgpack.decode(b"".join(encode(value)[:1]))

    def walk(item: Any) -> Any:
        if isinstance(item, bytes):
            return {"bytes": item.hex()}
        if isinstance(item, list):
            return [walk(i) for i in item]
        if isinstance(item, dict):
            return {str(k): walk(v) for k, v in item.items()}
        return item

    return walk(decoded)


def structured_params() -> dict[str, Any]:
    import vllm.sampling_params as params

    if hasattr(params, "StructuredOutputsParams"):
        return {
            "structured_outputs": params.StructuredOutputsParams(
                json={"type": "object", "properties": {"a": {"type": "integer"}}}
            )
        }
    return {}


def stats(**changes: Any) -> Any:
    from vllm.v1.metrics.stats import SchedulerStats

    return SchedulerStats(**changes)


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


class Recorder:
    """Stands in for the handshake socket of an engine."""

    def __init__(self, answer: bytes) -> None:
        self.sent: Frames = []
        self.answer = answer

    def send(self, data: bytes, *_: Any, **__: Any) -> None:
        self.sent.append(bytes(data))

    def poll(self, timeout: int = 0) -> int:
        return 1

    def recv(self) -> bytes:
        return self.answer


def handshake_messages() -> list[Message]:
    """HELLO, INIT, READY and the ready response."""
    import msgspec
    import vllm.v1.engine as engine
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.utils import EngineHandshakeMetadata, EngineZmqAddresses

    messages: list[Message] = []
    addresses = EngineZmqAddresses(
        inputs=["ipc:///run/s/in0", "tcp://10.0.0.1:5555"],
        outputs=["ipc:///run/s/out0", "tcp://10.0.0.1:5556"],
        coordinator_input="ipc:///run/s/ci",
        coordinator_output="ipc:///run/s/co",
        frontend_stats_publish_address="tcp://10.0.0.1:5557",
    )
    bare = EngineZmqAddresses(inputs=["tcp://h:1"], outputs=["tcp://h:2"])
    group: dict[str, Any] = {
        "data_parallel_master_ip": "127.0.0.1",
        "data_parallel_master_port": 29500,
        "_data_parallel_master_port_list": [29501, 29502, 29503],
    }
    if version_at_least(32):
        group["_coord_store_port"] = 0
    group["data_parallel_size"] = 4
    inits = [
        ("init_independent", bare, {}),
        ("init_lockstep", addresses, group),
    ]
    for label, where, config in inits:
        data = msgspec.msgpack.encode(
            EngineHandshakeMetadata(addresses=where, parallel_config=config)
        )
        expect = {
            "addresses": {
                "inputs": where.inputs,
                "outputs": where.outputs,
                "coordinator_input": where.coordinator_input,
                "coordinator_output": where.coordinator_output,
                "frontend_stats_publish_address": where.frontend_stats_publish_address,
            },
            "parallel_config": config,
        }
        messages.append((label, [data], expect))
    for label, local, headless in (
        ("hello_headless", False, True),
        ("hello_local", True, False),
    ):
        socket = Recorder(messages[0][1][0])
        EngineCoreProc.startup_handshake(socket, local, headless, None)
        messages.append((label, socket.sent, {"local": local, "headless": headless}))
    # READY is a dict literal in vLLM; this is the same dict.
    ready: dict[str, Any] = {"status": "READY", "local": False, "headless": True}
    if not version_at_least(20):
        ready |= {"num_gpu_blocks": 512, "dp_stats_address": "tcp://h:3"}
    messages.append(("ready", [msgspec.msgpack.encode(ready)], ready))
    if version_at_least(12):
        ready = ready | {"parallel_config_hash": "0f" * 16}
        messages.append(("ready_hash", [msgspec.msgpack.encode(ready)], ready))
    response = getattr(engine, "EngineCoreReadyResponse", None)
    if response is None:
        messages.append(("ready_response", [b""], {}))
    else:
        values = {
            "max_model_len": 256,
            "num_gpu_blocks": 512,
            "block_size": 16,
            "dp_stats_address": "tcp://10.0.0.1:5557",
            "dtype": "bfloat16",
            "vllm_version": installed_version(),
            "world_size": 1,
            "data_parallel_size": 2,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "data_parallel_rank": 1,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 2048,
            "instance_id": "abcde",
            "supports_lora": False,
            "max_loras": 0,
            "kv_cache_size_tokens": 8192,
            "kv_cache_max_concurrency": 32.0,
            "kv_events_config": None,
            "weight_transfer_backend": None,
            "enable_sleep_mode": False,
            "supports_draft_weight_updates": False,
            "mamba_block_size": None,
            "effective_attention_block_size": 16,
            "coord_store_port": 0,
            "coordinator_input_address": None,
            "coordinator_output_address": None,
        }
        names = [field.name for field in dataclasses.fields(response)]
        values = {name: values[name] for name in names}
        data = msgspec.msgpack.encode(response(**values))
        messages.append(("ready_response", [data], values))
    return messages


def installed_version() -> str:
    import vllm

    return vllm.__version__.split("+")[0]


def version_at_least(minor: int) -> bool:
    return int(installed_version().split(".")[1]) >= minor


def coordinator_messages() -> list[Message]:
    """What the real coordinator sends when two engines and a frontend talk to it."""
    import inspect
    import tempfile

    import msgspec
    import zmq
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    messages: list[Message] = []
    first_req = (b"\x01\x00", 0)
    messages.append(
        (
            "first_req",
            [msgspec.msgpack.encode(first_req)],
            {"target": 1, "wave": 0},
        )
    )
    accepted = inspect.signature(DPCoordinatorProc.__init__).parameters
    process = DPCoordinatorProc(
        **{
            key: value
            for key, value in {
                "engine_count": 2,
                "min_stats_update_interval_ms": 100,
                "enable_wave_coordination": True,
            }.items()
            if key in accepted
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        front, back_out, back_pub = (f"ipc://{folder}/{name}" for name in ("front", "out", "pub"))
        threading.Thread(
            target=process.process_input_socket,
            args=(front, back_out, back_pub),
            daemon=True,
        ).start()
        context = zmq.Context()
        sockets = {
            "front": context.socket(zmq.XSUB),
            "engine0": context.socket(zmq.XSUB),
            "engine1": context.socket(zmq.XSUB),
            "output": context.socket(zmq.PUSH),
        }
        for name, socket in sockets.items():
            socket.setsockopt(zmq.LINGER, 0)
            target = {"front": front, "output": back_out}.get(name, back_pub)
            socket.connect(target)

        def receive(name: str, wanted: Callable[[Frames], bool]) -> Frames:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                if sockets[name].poll(200):
                    frames = sockets[name].recv_multipart()
                    if wanted(frames):
                        return frames
            raise TimeoutError(f"no such message on {name}")

        def engine_says(**values: Any) -> None:
            from vllm.v1.engine import EngineCoreOutputs

            sockets["output"].send_multipart(encode(EngineCoreOutputs(**values)))

        def publication(label: str, wanted: Callable[[Any], bool]) -> None:
            frames = receive("front", lambda f: wanted(msgspec.msgpack.decode(f[0])))
            counts, wave, running = msgspec.msgpack.decode(frames[0])
            messages.append((label, frames, {"counts": counts, "wave": wave, "running": running}))

        sockets["front"].send(b"\x01")
        for name in ("engine0", "engine1"):
            sockets[name].send(b"\x01")
        messages.append(("ready", receive("engine0", lambda _: True), {}))
        publication("publication_idle", lambda p: p[0] is not None)
        engine_says(
            engine_index=1,
            scheduler_stats=stats(
                num_running_reqs=4,
                num_waiting_reqs=300,
                step_counter=1,
                kv_cache_usage=0.5,
            ),
        )
        publication("publication_loaded", lambda p: p[0] and p[0][1][1] == 4)
        if not version_at_least(33):
            sockets["front"].send(msgspec.msgpack.encode(first_req))
            frames = receive("engine0", lambda f: f[0] == b"\x02")
            messages.append(
                (
                    "start_by_first_req",
                    frames,
                    {"wave": 0, "exclude": None},
                )
            )
            if not version_at_least(29):
                publication("publication_running", lambda p: p[0] is None)
        engine_says(engine_index=0, wave_complete=69)
        publication("publication_wave", lambda p: p[1] == 70)
        engine_says(engine_index=1, start_wave=70)
        frames = receive("engine0", lambda f: f[0] == b"\x02" and b"\x46" in f[1])
        messages.append(("start_by_engine", frames, {"wave": 70, "exclude": 1}))
        for socket in sockets.values():
            socket.close()
    return messages


# --- hostile ---------------------------------------------------------------------------------


def engine_verdict(frames: Frames) -> str | None:
    """What decoding does to the engine's input thread: None, or the exception that ends it."""
    from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
    from vllm.v1.serial_utils import MsgpackDecoder

    try:
        kind, *data = frames
        request_type = EngineCoreRequestType(kind)
        if request_type == EngineCoreRequestType.ADD:
            MsgpackDecoder(EngineCoreRequest).decode(data)
        else:
            decoded = MsgpackDecoder().decode(data)
            if request_type == EngineCoreRequestType.UTILITY:
                _, _, _method, _args = decoded
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"
    return None


def hostile_messages() -> list[Message]:
    """Messages a frontend should not send, each with what vLLM's decoder does with it."""
    import msgspec
    from vllm.pooling_params import PoolingParams

    pack = msgspec.msgpack.encode
    found: list[Message] = []

    def put(label: str, frames: Frames, **more: Any) -> None:
        verdict = engine_verdict(frames)
        found.append((label, frames, {"decoder": verdict, **more}))

    text = encode(request())[0]
    fields: list[Any] = msgspec.msgpack.decode(text)
    names = list(type(request()).__struct_fields__)

    def changed(name: str, value: Any) -> Frames:
        copy = list(fields)
        copy[names.index(name)] = value
        return [b"\x00", pack(copy)]

    put("no_payload", [b"\x00"], must_refuse=True)
    put("empty_payload", [b"\x00", b""])
    put("unknown_type", [b"\x07", pack([])])
    put("type_of_two_bytes", [b"\x00\x00", text])
    put("ready_on_input", [b"READY"])
    put("executor_failed", [b"\x04", pack([])], must_refuse=True)
    put("wakeup", [b"\x05", pack([])], must_refuse=True)
    put("start_dp_wave", [b"\x02", pack([1, None])], must_refuse=True)
    put("reserved_byte", [b"\x01", b"\xc1"])
    put("trailing_bytes", [b"\x00", text + b"\xc0"])
    put("add_as_map", [b"\x00", pack({"request_id": "x"})])
    put("add_too_short", [b"\x00", pack(fields[:3])])
    put("add_required_only", [b"\x00", pack(fields[: names.index("prompt_embeds")])])
    put("add_one_more", [b"\x00", pack([*fields, "later"])])
    put("add_five_more", [b"\x00", pack([*fields, 1, None, {}, [1], b"x"])])
    put("abort_of_map", [b"\x01", pack({"a": 1})], must_refuse=True)
    put("abort_of_ints", [b"\x01", pack([1, 2])], must_refuse=True)
    put("abort_invalid_utf8", [b"\x01", b"\x91\xa2\xff\xfe"])
    put("utility_three_fields", [b"\x03", pack([0, 1, "m"])], must_refuse=True)
    put("utility_five_fields", [b"\x03", pack([0, 1, "m", [], 5])], must_refuse=True)
    put("utility_map", [b"\x03", pack({"a": 1})], must_refuse=True)
    for code in (1, 2, 4, -1):
        ext = msgspec.msgpack.Ext(code, b"\x80\x04N.")
        put(
            f"utility_ext_{code}",
            [b"\x03", pack([0, 1, "collective_rpc", ["m", None, [ext], {}]])],
            must_refuse=code in (1, 2),
        )
    put(
        "utility_unhashable_key",
        [b"\x03", b"\x94\x00\x01\xa1m\x91\x81\x91\x81\x01\x02\x03"],
    )
    put("utility_map_key", [b"\x03", b"\x94\x00\x01\xa1m\x91\x81\x80\x03"])
    put("utility_array_key", [b"\x03", b"\x94\x00\x01\xa1m\x91\x81\x91\x01\x03"])
    put("utility_deep", [b"\x03", b"\x94\x00\x01\xa1m" + b"\x91" * 5000 + b"\x90"])
    put("utility_negative_call", [b"\x03", pack([0, -1, "m", []])], must_refuse=True)
    put("utility_negative_client", [b"\x03", pack([-1, 1, "m", []])], must_refuse=True)
    put(
        "utility_fault_tolerance",
        [b"\x03", pack([0, 1, "handle_fault_tolerance", [{}]])],
        must_refuse=True,
    )
    put(
        "utility_method_as_bytes",
        [b"\x03", pack([0, 1, "collective_rpc", [b"\x80\x04N.", None, [], {}]])],
        must_refuse=True,
    )
    wrong: dict[str, list[Any]] = {
        "request_id": [None, 5, b"x"],
        "prompt_token_ids": ["x", [1, "2"], [1, None], [1.5], [1.0], [[1]], [True]],
        "mm_features": [{}, [1], ["x"], [{}], [{"data": None}]],
        "sampling_params": [[], 5, "x"],
        "pooling_params": [{}, 5],
        "arrival_time": [None, "x", 5, True],
        "lora_request": [{}, ["n"], [1, 2], ["n", 0], ["n", "x"], "x"],
        "cache_salt": [5, b"x"],
        "data_parallel_rank": ["x", 1.5, True],
        "prompt_embeds": [
            5,
            ["bfloat16", [2, 2], 7],
            ["bfloat16", [2, 2], 1],
            ["bfloat16", [2, 2], -1],
            ["bfloat16", [2, 2]],
            ["nonsense", [2, 2], b"\x00" * 8],
            ["bfloat16", [2, 2], b"\x00" * 8],
            ["bfloat16", [2, 2], b"\x00" * 7],
            ["bfloat16", [2, 3], b"\x00" * 8],
            ["bfloat16", [2, 2], {"handle": 1}],
            ["bfloat16", "x", b"\x00" * 8],
            ["bfloat16", [0], b""],
            ["bfloat16", [1], b""],
        ],
        "client_index": [None, "x", 1.5, True],
        "current_wave": [None, "x"],
        "priority": [None, "x", 1.5],
        "trace_headers": [[], {1: "x"}, {"x": 1}, {"a": "b"}],
        "resumable": [None, 1],
        "external_req_id": [5],
        "reasoning_ended": [5, "x"],
        "reasoning_parser_kwargs": [[], {1: 2}],
        "abort_immediately": [None, 1],
        "session_id": [5],
        "kv_hints": [5, [], {"protocol_version": 1}],
        "prompt_is_token_ids": [5, [1], [True, False]],
        "eos_token_id": ["x", 1.5],
    }
    for name, values in wrong.items():
        for number, value in enumerate(values):
            if name in names:
                put(f"add_{name}_{number}", changed(name, value))
    params = fields[names.index("sampling_params")]
    odd: dict[str, list[Any]] = {
        "n": [0, -1, "x", 1.5, None, True],
        "temperature": [-1.0, "x", None, 0, 3.0, float("nan"), float("inf")],
        "top_p": [0.0, 1.5, "x", 1],
        "top_k": [-2, 1.5, "x"],
        "min_p": [-0.5, 2.0],
        "presence_penalty": [3.0, "x"],
        "frequency_penalty": [-3.0],
        "repetition_penalty": [0.0, -1.0],
        "max_tokens": [0, -5, "x", 1.5],
        "min_tokens": [-1, "x", 17],
        "logprobs": [-2, "x", 1.5],
        "prompt_logprobs": [-2, "x"],
        "seed": ["x", 1.5],
        "stop": [5, [5], [""], "x", ["x"]],
        "stop_token_ids": [5, ["x"], [1.5]],
        "bad_words": [5, [5], [""]],
        "ignore_eos": [5, None],
        "detokenize": ["x"],
        "skip_special_tokens": [1],
        "logit_bias": [[], {"x": 1.0}, {1: "x"}, {1: 2}],
        "allowed_token_ids": [5, ["x"]],
        "extra_args": [[], {1: 2}],
        "output_kind": [7, "x", -1],
        "structured_outputs": [{}, {"regex": 5}, {"regex": "a", "json": "b"}, []],
        "_all_stop_token_ids": [5, ["x"]],
        "_eos_token_id": ["x"],
        "unknown_key": [5, {"a": [1]}],
    }
    for name, values in odd.items():
        for number, value in enumerate(values):
            put(
                f"params_{name}_{number}",
                changed("sampling_params", {**params, name: value}),
            )
    put("params_int_key", changed("sampling_params", {**params, 5: 1}))
    for number, value in enumerate([{"detokenize": False, "stop": ["x"]}, {"n": 2}]):
        put(f"params_pair_{number}", changed("sampling_params", {**params, **value}))
    pooling: list[Any] = [
        [5],
        [None, "x"],
        [None, None, None, ["x"]],
        [None, None, None, None, 5],
        [None, None, None, None, "no-such-task"],
        [],
    ]
    for number, value in enumerate(pooling):
        copy = list(fields)
        copy[names.index("sampling_params")] = None
        copy[names.index("pooling_params")] = value
        put(f"pooling_{number}", [b"\x00", pack(copy)])
    pooling_names = list(PoolingParams.__struct_fields__)
    ends = [[None] * len(pooling_names) for _ in range(4)]
    for number, (name, value) in enumerate(
        [
            ("output_kind", 0),
            ("output_kind", 2),
            ("truncate_prompt_tokens", -2),
            ("extra_kwargs", {1: 2}),
        ]
    ):
        if name in pooling_names:
            ends[number][pooling_names.index("output_kind")] = 2
            ends[number][pooling_names.index("requires_token_ids")] = False
            ends[number][pooling_names.index(name)] = value
            copy = list(fields)
            copy[names.index("sampling_params")] = None
            copy[names.index("pooling_params")] = ends[number]
            put(f"pooling_full_{number}", [b"\x00", pack(copy)])
            copy[names.index("pooling_params")] = [*ends[number], "later"]
            put(f"pooling_longer_{number}", [b"\x00", pack(copy)])
    put(
        "no_params",
        changed("sampling_params", None),
    )
    image_kind, image, *aux = add_message("x", request(mm_features=multimodal_features()))[1]
    put("image_complete", [image_kind, image, *aux])
    put("image_without_tensor_frames", [image_kind, image])
    put("image_short_tensor_frame", [image_kind, image, *[a[:-1] for a in aux]])
    put("image_longer_tensor_frame", [image_kind, image, *[a + b"0000" for a in aux]])
    put("image_extra_frame", [image_kind, image, *aux, b"more"])
    features = msgspec.msgpack.decode(image)[names.index("mm_features")]
    plain_elem = {"data": None, "field": ["batched"]}
    edits: list[tuple[str, Any]] = [
        ("modality", 5),
        ("identifier", None),
        ("mm_position", 5),
        ("mm_position", {"offset": "x", "length": 1}),
        ("mm_position", {"offset": 1}),
        ("data", 5),
        ("data", None),
        ("data", {"k": 5}),
        ("data", {"k": {"data": None}}),
        ("data", {"k": {"data": None, "field": ["nonsense", {}]}}),
        ("data", {"k": {"data": ["float32", [1], 9], "field": ["batched", {}]}}),
        ("data", {"k": {"data": "x", "field": ["batched", {}]}}),
        ("data", {"k": {"data": [5, 2.5], "field": ["batched", {}]}}),
        ("data", {"k": {"data": None, "field": ["batched", {"bad": 1}]}}),
        ("mm_hash", 5),
        ("data", []),
        ("data", {}),
        ("data", [{"modality": m, "key": k, **plain_elem} for m, k in (("a", "k"), ("b", "l"))]),
        ("data", [{"modality": m, "key": k, **plain_elem} for m, k in (("a", "k"), ("a", "l"))]),
    ]
    for number, (key, value) in enumerate(edits):
        feature = {**features[0], key: value}
        frames = changed("mm_features", [feature])
        put(f"image_edit_{number}", [*frames, *aux])
    return found


# --- fields ----------------------------------------------------------------------------------

CLASSES = {
    "EngineCoreRequest": "v1/engine/__init__.py",
    "EngineCoreOutput": "v1/engine/__init__.py",
    "EngineCoreOutputs": "v1/engine/__init__.py",
    "UtilityOutput": "v1/engine/__init__.py",
    "EngineCoreReadyResponse": "v1/engine/__init__.py",
    "SamplingParams": "sampling_params.py",
    "LoRARequest": "lora/request.py",
    "SchedulerStats": "v1/metrics/stats.py",
}


def write_fields(sources: list[str], out: Path) -> int:
    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for source in sources:
        version, _, folder = source.partition("=")
        entry: dict[str, Any] = {}
        for name, file in CLASSES.items():
            entry[name] = class_fields(Path(folder) / "vllm" / file, name)
        entry["FinishReason"] = enum_values(
            Path(folder) / "vllm" / "v1/engine/__init__.py", "FinishReason"
        )
        table[version] = entry
    ordered = dict(sorted(table.items(), key=lambda kv: [int(p) for p in kv[0].split(".")[:3]]))
    lines = []
    for version, entry in ordered.items():
        rows = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entry.items()
        )
        lines.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{out}: {len(ordered)} versions")
    return 0


def find_class(file: Path, name: str) -> ast.ClassDef | None:
    if not file.exists():
        return None
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


def class_fields(file: Path, name: str) -> list[str] | None:
    """Annotated fields in order. msgspec keeps required and defaulted fields in one order."""
    node = find_class(file, name)
    if node is None:
        return None
    return [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and "ClassVar" not in ast.unparse(item.annotation)
    ]


def enum_values(file: Path, name: str) -> dict[str, int]:
    node = find_class(file, name)
    return {
        item.targets[0].id: item.value.value
        for item in (node.body if node else [])
        if isinstance(item, ast.Assign)
        and isinstance(item.targets[0], ast.Name)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, int)
    }


if __name__ == "__main__":
    sys.exit(main())
