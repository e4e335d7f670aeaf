"""Sidecars that end and come back, with real vLLM: engines, frontend and requests stay."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS, Answer, Load, complete, http_get
from harness import Sidecar, World
from models import Models
from processes import LOOPBACK, REQUEST_LIMIT, START_LIMIT, alive, free_port, wait_for

COUNT = 48


class Served:
    """The frontend that a sidecar serves (`--serve`); it outlives the sidecar."""

    name = "served"
    # For `Load`: not a process of ours.
    child = SimpleNamespace(poll=lambda: None)

    def __init__(self, port: int, model: str) -> None:
        self.port = port
        self.model = model

    def ask(self, prompt: str, count: int = 24, limit: float = REQUEST_LIMIT) -> Answer:
        return complete(self.port, self.model, prompt, count, limit, self.name)

    def wait_ready(self, sidecar: Sidecar) -> None:
        def healthy() -> bool:
            try:
                return http_get(self.port, "/health", 5.0)[0] == 200
            except OSError:
                return False

        wait_for("the served frontend", START_LIMIT, healthy, sidecar.engine_logs)


def lives(sidecar: Sidecar) -> dict[int, tuple[int, int]]:
    return {e["rank"]: (e["pid"], e["incarnation"]) for e in sidecar.engines()}


@pytest.mark.parametrize("how", ["kill -9", "planned"])
def test_engines_and_requests_outlive_the_sidecar(world: World, how: str) -> None:
    models = Models.read(world.models, "dense")
    served = Served(free_port(), models.path(0))
    env = world.in_process()

    def start(name: str, **more) -> Sidecar:
        flags = [
            *("--serve", "--host", LOOPBACK, "--port", str(served.port)),
            *("--keep-engines", "--shutdown-timeout", "5s"),
        ]
        vllm = [models.path(0), *MODEL_FLAGS, *IN_PROCESS_WORKER]
        return world.sidecar(name, flags, vllm, env=env, **more)

    first = start("first")
    first.wait_serving()
    served.wait_ready(first)
    before = lives(first)
    # Something that only living engines hold.
    done = first.update(models.path(1), "--version", "v1")
    assert done.returncode == 0, done.stdout + done.stderr
    with Load([served], models.prompts, COUNT) as load:
        load.wait_answers(6)
        if how == "planned":
            assert first.terminate(limit=30) == 0, first.tail()
        else:
            first.kill()
            # Alone for a while.
            load.wait_answers(6)
        second = start("second", state_dir=first.state_dir)
        began = time.monotonic()
        second.wait_serving()
        took = time.monotonic() - began
        load.wait_answers(10)
    assert lives(second) == before
    assert all(alive(pid) for pid, _ in before.values())
    for answer in load.answers:
        assert answer.complete, f"lost: {answer}"
        assert models.seed_of(answer.prompt, answer.tokens) == 1, answer
    assert {e["weight_version"] for e in second.engines()} == {"v1"}
    # Well below the time that an engine takes to start.
    assert took < 15, took
    # And the successor can do what its predecessor could.
    done = second.update(models.path(2), "--version", "v2")
    assert done.returncode == 0, done.stdout + done.stderr + second.tail()
    answer = served.ask(models.prompts[0])
    assert models.seed_of(models.prompts[0], answer.tokens) == 2, answer
    second.ok("stop")
    assert second.wait_exit(60) == 0, second.tail()
