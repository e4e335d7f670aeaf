"""vLLM's own handshake server and DP coordinator, for `tests/transcripts.rs`.

    reference.py RANKS

Runs `wait_for_engine_startup` and `DPCoordinatorProc` of the installed vLLM for that many remote
headless mixture-of-experts engines. Prints one JSON object with the handshake address and the hash
that READY must carry, another one when startup is complete, and ends when stdin ends.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading

import zmq
from vllm.config import CacheConfig, ParallelConfig
from vllm.v1.engine.coordinator import DPCoordinatorProc
from vllm.v1.engine.utils import (
    CoreEngine,
    CoreEngineLaunch,
    EngineZmqAddresses,
    wait_for_engine_startup,
)


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def coordinator(ranks: int) -> tuple[str, str, str]:
    """Starts the DP coordinator in a thread; gives its front, output and input addresses."""
    here, there = multiprocessing.Pipe(duplex=False)
    any_port = "tcp://127.0.0.1:0"
    process = DPCoordinatorProc(engine_count=ranks, enable_wave_coordination=True)
    threading.Thread(
        target=process.process_input_socket,
        args=(any_port, any_port, any_port, there),
        daemon=True,
    ).start()
    return here.recv()


def main() -> None:
    ranks = int(sys.argv[1])
    config = ParallelConfig(
        data_parallel_size=ranks,
        data_parallel_size_local=0,
        data_parallel_master_ip="127.0.0.1",
    )
    front, back_output, back_publish = coordinator(ranks)
    context = zmq.Context()
    inputs, outputs = context.socket(zmq.ROUTER), context.socket(zmq.PULL)
    handshake = context.socket(zmq.ROUTER)
    for socket in (inputs, outputs, handshake):
        socket.bind("tcp://127.0.0.1:0")
    address = {
        socket: socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        for socket in (inputs, outputs, handshake)
    }
    say(handshake=address[handshake], hash=config.compute_hash())
    wait_for_engine_startup(
        handshake,
        [CoreEngine(index=rank, local=False) for rank in range(ranks)],
        config,
        True,
        CacheConfig(),
        CoreEngineLaunch(
            engine_manager=None,
            coordinator=None,
            addresses=EngineZmqAddresses(
                inputs=[address[inputs]],
                outputs=[address[outputs]],
                coordinator_input=back_publish,
                coordinator_output=back_output,
                frontend_stats_publish_address=front,
            ),
            tensor_queue=None,
        ),
    )
    say(started=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
