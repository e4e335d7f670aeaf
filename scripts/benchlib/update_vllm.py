"""Real vLLM: how long it is paused for new weights, through the sidecar and by its own frontend.

Two DP ranks of the tiny models on this machine. Through the frontend: `POST /pause`, `POST
/collective_rpc` with `reload_weights`, `POST /resume`, as a trainer calls them one after the other.
"""

import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from frontends import IN_PROCESS_WORKER, MODEL_FLAGS, http_get, http_post
from harness import World
from processes import Process, free_port, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
ROUNDS = 6


def environment() -> dict[str, str]:
    """What scripts/vllm_env.py exports."""
    text = subprocess.run(
        [ROOT / "scripts" / "vllm_env.py", "--shell"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    ).stdout
    words = [shlex.split(line)[-1].partition("=") for line in text.splitlines() if "=" in line]
    return {name: value for name, _, value in words}


def ours(world: World, model: Path, other: Path) -> list[float]:
    """Milliseconds from pause to resume of each update."""
    flags = [*MODEL_FLAGS, *IN_PROCESS_WORKER]
    sidecar = world.sidecar("sidecar", [], [str(model), *flags])
    sidecar.wait_serving()
    paused = []
    for number in range(ROUNDS):
        path = other if number % 2 == 0 else model
        done = sidecar.update(str(path), "--version", f"v{number}")
        assert done.returncode == 0, done.stderr + sidecar.engine_logs()
        paused.append(sidecar.status()["weights"]["last_update"]["paused_s"] * 1000)
    assert sidecar.terminate() == 0
    return paused


def theirs(world: World, model: Path, other: Path) -> list[float]:
    """The same of vLLM with its own engines."""
    port = free_port()
    command = [world.vllm, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--data-parallel-size", "2", "--api-server-count", "1"]
    env = world.in_process(VLLM_SERVER_DEV_MODE="1")
    command += [*MODEL_FLAGS, *IN_PROCESS_WORKER]
    server = Process("vllm", command, env, world.folder / "vllm.log")
    world.processes.append(server)

    def healthy() -> bool:
        if server.child.poll() is not None:
            raise AssertionError(server.tail())
        try:
            return http_get(port, "/health", 5)[0] == 200
        except OSError:
            return False

    wait_for("vLLM answers", 300, healthy, server.tail)
    paused = []
    for number in range(ROUNDS):
        path = other if number % 2 == 0 else model
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        began = time.monotonic()
        for route, body in (
            ("/pause?mode=wait&clear_cache=true", {}),
            ("/collective_rpc", reload),
            ("/resume", {}),
        ):
            status, text = http_post(port, route, body, 60)
            assert status == 200, f"{route}: {status} {text}\n{server.tail()}"
        paused.append((time.monotonic() - began) * 1000)
    server.terminate()
    return paused


def compare(binary: Path, say) -> dict:
    """Medians in milliseconds by kind of model. The first update of each is left out."""
    env = environment()
    python = Path(env["DP_SIDECAR_PYTHON"])
    models = subprocess.check_output([python, ROOT / "scripts" / "make_tiny_models.py"], text=True)
    found = {}
    for kind in ("dense", "moe"):
        model, other = (Path(models.strip()) / f"{kind}-{seed}" for seed in (0, 1))
        figures = {}
        for name, measure in (("sidecar", ours), ("vllm", theirs)):
            with tempfile.TemporaryDirectory(prefix="dpsv") as folder:
                world = World(
                    binary=binary,
                    python=python,
                    vllm=str(python.parent / "vllm"),
                    overlay=Path(env["PYTHONPATH"].split(":")[0]),
                    models=model.parent,
                    folder=Path(folder),
                    mark=f"bench-{time.monotonic_ns()}",
                )
                try:
                    figures[name] = round(statistics.median(measure(world, model, other)[1:]), 1)
                finally:
                    for complaint in world.clear():
                        print(complaint, file=sys.stderr)
        figures["ratio"] = round(figures["sidecar"] / figures["vllm"], 2)
        say(f"{kind}, real vLLM, pause to resume: {figures}")
        found[kind] = figures
    return found
