#!/usr/bin/env python3
"""vLLM's own startup code of a frontend without local engines, for one run.

``launch_core_engines`` and ``wait_for_engine_startup`` of the installed vLLM (and, for ``--size``
above 1, the real DP coordinator process) serve the handshake on 127.0.0.1; input and output sockets
are bound as ``MPClient`` does. What happens is one JSON object per line on stdout. Ends when stdin
does, or when an output socket says ENGINE_CORE_DEAD. `tests/attachment.rs` attaches to it.

Run it with an interpreter that has vLLM (`scripts/vllm_env.py` prepares one).
"""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace

import msgspec
import zmq
from vllm.config.parallel import ParallelConfig
from vllm.v1.engine.utils import EngineZmqAddresses, launch_core_engines

PATIENCE_MS = 60_000


def report(event: str, **fields) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def bind(context: zmq.Context, kind: int) -> tuple[zmq.Socket, str]:
    socket = context.socket(kind)
    socket.bind("tcp://127.0.0.1:*")
    return socket, socket.getsockopt(zmq.LAST_ENDPOINT).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="of the handshake socket")
    parser.add_argument("--size", type=int, default=2, help="--data-parallel-size")
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--moe", action="store_true", help="lockstep engines")
    options = parser.parse_args()

    parallel_config = ParallelConfig(
        data_parallel_size=options.size,
        data_parallel_size_local=0,
        data_parallel_master_ip="127.0.0.1",
        data_parallel_rpc_port=options.port,
    )
    config = SimpleNamespace(
        parallel_config=parallel_config,
        model_config=SimpleNamespace(multimodal_config=None, is_moe=options.moe),
        needs_dp_coordinator=options.size > 1,
        logging_config=None,
        cache_config=None,
    )
    context = zmq.Context()
    inputs = [bind(context, zmq.ROUTER) for _ in range(options.api_servers)]
    outputs = [bind(context, zmq.PULL) for _ in range(options.api_servers)]
    addresses = EngineZmqAddresses(
        inputs=[address for _, address in inputs], outputs=[address for _, address in outputs]
    )
    report("hash", value=parallel_config.compute_hash())
    try:
        with launch_core_engines(config, None, True, addresses) as launch:
            coordinator = launch.coordinator
            report("listening", stats=addresses.frontend_stats_publish_address)
    except RuntimeError as error:
        report("failed", error=str(error))
        return
    report("ready")
    for socket, _ in inputs:
        identities = {rank.to_bytes(2, "little") for rank in range(options.size)}
        while identities:
            if not socket.poll(PATIENCE_MS):
                report("failed", error=f"no registration of {identities}")
                return
            identity, payload = socket.recv_multipart()
            identities.remove(identity)
            response = msgspec.msgpack.decode(payload)
            report(
                "registered",
                rank=int.from_bytes(identity, "little"),
                stats=response["dp_stats_address"],
            )
    report("started")
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    for socket, _ in outputs:
        poller.register(socket, zmq.POLLIN)
    while True:
        for source, _ in poller.poll():
            if source == sys.stdin.fileno():
                return
            frames = source.recv_multipart()
            report("output", text=frames[0].decode(errors="replace"), frames=len(frames))
            if frames == [b"ENGINE_CORE_DEAD"]:
                if coordinator is not None:
                    coordinator.shutdown()
                return


if __name__ == "__main__":
    main()
