"""Runs vLLM's own DPCoordinatorProc in this process, for scripts/bench coordinator.

vllm_coordinator.py DIR ENGINES     writes DIR/template and one JSON line with the addresses
"""

import json
import signal
import sys
import threading
import time
from pathlib import Path

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.coordinator import DPCoordinatorProc
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackEncoder

directory, engines = Path(sys.argv[1]), int(sys.argv[2])


def stop(*_):
    raise KeyboardInterrupt


signal.signal(signal.SIGTERM, stop)
stats = SchedulerStats(num_running_reqs=1, num_waiting_reqs=1, kv_cache_usage=0.25)
(directory / "template").write_bytes(
    bytes(MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))[0])
)
front, output, publish = (f"ipc://{directory}/{name}" for name in ("front", "output", "publish"))


def announce():
    """Once the sockets are bound, which happens in the main thread."""
    while not all((directory / name).exists() for name in ("front", "output", "publish")):
        time.sleep(0.01)
    print(json.dumps({"front": front, "engines": [[publish, output]] * engines}), flush=True)


threading.Thread(target=announce, daemon=True).start()
DPCoordinatorProc.run_coordinator(engines, front, output, publish)
