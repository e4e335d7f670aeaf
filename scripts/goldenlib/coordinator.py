"""coordinator.frames: what the real coordinator says to engines and a frontend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from .common import Frames, Message, encode, stats, version_at_least


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
