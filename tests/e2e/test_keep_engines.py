"""A frontend that the sidecar serves (`--serve`), and sidecars that end and come back: engines,
frontend and requests stay (`--keep-engines`).

The tests share a deployment and come in this order; each but the last leaves it serving.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from conftest import new_world
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS, Answer, Load, complete, http_get
from harness import Sidecar, World
from models import Models
from processes import LOOPBACK, REQUEST_LIMIT, START_LIMIT, alive, free_port, wait_for

COUNT = 48


class Served:
    """The frontend that a sidecar serves; it outlives the sidecar."""

    name = "served"
    # For `Load`: not a process of ours.
    child = SimpleNamespace(poll=lambda: None)

    def __init__(self, port: int, model: str) -> None:
        self.port = port
        self.model = model

    def ask(self, prompt: str, count: int = 24, limit: float = REQUEST_LIMIT) -> Answer:
        return complete(self.port, self.model, prompt, count, limit, self.name)

    def healthy(self) -> bool:
        try:
            return http_get(self.port, "/health", 5.0)[0] == 200
        except OSError:
            return False


class Deployment:
    """Two engines, the served frontend, and the sidecar of the moment."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.models = Models.read(world.models, "dense")
        self.served = Served(free_port(), self.models.path(0))
        self.lives = 0
        self.seed = 0
        self.sidecar = self.start("--keep-engines")

    def start(self, *flags: str) -> Sidecar:
        """The sidecar, for the first time or after it ended."""
        self.lives += 1
        self.sidecar = self.world.sidecar(
            f"sidecar-{self.lives}",
            [
                *("--serve", "--host", LOOPBACK, "--port", str(self.served.port)),
                *("--shutdown-timeout", "5s", *flags),
            ],
            [self.models.path(0), *MODEL_FLAGS, *IN_PROCESS_WORKER],
            state_dir=self.sidecar.state_dir if self.lives > 1 else None,
        )
        return self.sidecar

    def update(self, seed: int) -> None:
        done = self.sidecar.update(self.models.path(seed), "--version", f"v{seed}")
        assert done.returncode == 0, done.stdout + done.stderr + self.sidecar.tail()
        self.seed = seed

    def check_serving(self) -> None:
        prompt = self.models.prompts[0]
        answer = self.served.ask(prompt)
        assert answer.tokens == self.models.expected(self.seed, prompt, 24), answer

    def engines(self) -> dict[int, tuple[int, int]]:
        return {e["rank"]: (e["pid"], e["incarnation"]) for e in self.sidecar.engines()}


@pytest.fixture(scope="module")
def deployment(ingredients, tmp_path_factory):
    with new_world(ingredients, tmp_path_factory.mktemp("keep")) as world:
        yield Deployment(world)


def test_serve_starts_and_supervises_a_frontend(deployment):
    sidecar = deployment.sidecar
    sidecar.wait_serving()
    [entry] = sidecar.wait_status(
        "its frontend attached",
        lambda s: [f for f in s["frontends"] if f["attachment"]["state"] == "attached"],
        START_LIMIT,
    )["frontends"]
    assert entry["attachment"]["api_servers"] >= 1
    wait_for("its frontend answers", START_LIMIT, deployment.served.healthy, sidecar.engine_logs)
    deployment.check_serving()


@pytest.mark.parametrize("how", ["kill -9", "planned"])
def test_engines_and_requests_outlive_the_sidecar(deployment, how: str) -> None:
    before = deployment.engines()
    # Something that only living engines hold.
    old = (deployment.seed + 1) % 3
    deployment.update(old)
    with Load([deployment.served], deployment.models.prompts, COUNT) as load:
        load.wait_answers(6)
        if how == "planned":
            assert deployment.sidecar.terminate(limit=30) == 0, deployment.sidecar.tail()
        else:
            deployment.sidecar.kill()
            # Alone for a while.
            load.wait_answers(6)
        successor = deployment.start("--keep-engines")
        began = time.monotonic()
        successor.wait_serving()
        took = time.monotonic() - began
        load.wait_answers(10)
    assert deployment.engines() == before
    assert all(alive(pid) for pid, _ in before.values())
    for answer in load.answers:
        assert answer.complete, f"lost: {answer}"
        assert deployment.models.seed_of(answer.prompt, answer.tokens) == old, answer
    assert {e["weight_version"] for e in successor.engines()} == {f"v{old}"}
    # Well below the time that an engine takes to start.
    assert took < 15, took
    # And the successor can do what its predecessor could.
    deployment.update((old + 1) % 3)
    deployment.check_serving()


def test_a_successor_that_keeps_nothing_ends_all_of_it(deployment):
    """The last test: it ends the deployment."""
    before = deployment.engines()
    assert deployment.sidecar.terminate(limit=30) == 0, deployment.sidecar.tail()
    successor = deployment.start()
    successor.wait_serving()
    assert deployment.engines() == before
    assert successor.terminate(limit=90) == 0, successor.tail()
    deployment.world.wait_gone(10)
