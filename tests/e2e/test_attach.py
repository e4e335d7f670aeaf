"""Engines that somebody else starts: the sidecar only waits for them (no `-- MODEL`)."""

from __future__ import annotations

import pytest
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS
from harness import World
from models import Models
from processes import START_LIMIT, Process, free_port


def start_engine(world: World, model: str, rank: int, port: int, life: int) -> Process:
    """A headless engine of one rank, as a launcher other than the sidecar would start it."""
    command = [
        *(world.vllm, "serve", model, "--headless"),
        *("--data-parallel-size", "2", "--data-parallel-size-local", "1"),
        *("--data-parallel-start-rank", str(rank)),
        *("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(port)),
        *MODEL_FLAGS,
        *IN_PROCESS_WORKER,
    ]
    name = f"engine-{rank}-{life}"
    process = Process(name, command, world.in_process(), world.folder / f"{name}.log")
    world.processes.append(process)
    return process


@pytest.mark.full
def test_engines_of_somebody_else_come_in_any_order_and_come_back(world: World):
    models = Models.read(world.models, "moe")
    model = models.path(0)
    port = free_port()
    # One engine before the sidecar, one after it, a frontend before both.
    frontend = world.frontend("alpha", model)
    first = [start_engine(world, model, 1, port, 1)]
    flags = ["--data-parallel-rpc-port", str(port), "--model-kind", "moe"]
    sidecar = world.sidecar("sidecar", [*flags, f"--frontend={frontend.handshake}"])
    first.append(start_engine(world, model, 0, port, 1))
    sidecar.wait_serving()
    sidecar.wait_attached(frontend)
    frontend.wait_ready()
    prompt = models.prompts[0]
    assert frontend.ask(prompt).tokens == models.expected(0, prompt, 24)
    updated = sidecar.update(models.path(1), "--version", "two")
    assert updated.returncode == 0, updated.stdout + updated.stderr
    assert frontend.ask(prompt).tokens == models.expected(1, prompt, 24)

    # The group dies; the sidecar and the frontend stay, and wait for whoever starts it again.
    for engine in first:
        engine.kill_group()
    down = lambda s: all(e["state"] != "admitted" for e in s["engines"])  # noqa: E731
    sidecar.wait_status("both engines are down", down)
    for rank in (0, 1):
        start_engine(world, model, rank, port, 2)
    status = sidecar.wait_serving(START_LIMIT)
    assert [e["weight_version"] for e in status["engines"]] == ["two", "two"]
    assert frontend.ask(prompt).tokens == models.expected(1, prompt, 24)
    assert sidecar.terminate(limit=60) == 0
