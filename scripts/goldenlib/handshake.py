"""handshake.frames: HELLO, INIT, READY and the ready response."""

from __future__ import annotations

import dataclasses
from typing import Any

from .common import Frames, Message, installed_version, version_at_least


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
