"""vLLM's default worker processes: the sidecar is killed and comes back, frontends of all sorts
come and go by command, the keeper is killed; in the end, nothing is left.

The tests of one kind share a deployment and come in this order; each but the last leaves it
serving.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import new_world
from frontends import MODEL_FLAGS, Frontend, Load
from harness import Sidecar, World, start_method
from models import Models
from processes import REPO, START_LIMIT, alive, free_port, wait_for

COUNT = 24
# Seconds for which the engines outlive the last of the sidecars.
GRACE = 3


class Deployment:
    """A sidecar with two engines, a Python frontend and the Rust frontend."""

    def __init__(self, world: World, kind: str) -> None:
        self.world = world
        self.kind = kind
        self.models = Models.read(world.models, kind)
        self.seed = 0
        program = subprocess.check_output(
            [REPO / "scripts" / "vllm_env.py", "--python", sys.executable, "--rust-frontend"],
            text=True,
        ).strip()
        assert Path(program).exists()
        self.python = world.frontend("python", self.models.path(0))
        env = world.env(VLLM_USE_RUST_FRONTEND="1", VLLM_RUST_FRONTEND_PATH=program)
        self.rust = world.frontend("rust", self.models.path(0), env=env)
        self.frontends = [self.python, self.rust]
        # Long enough for a successor on a busy machine.
        self.sidecar = self.start_sidecar(1, 120, [self.python])
        self.sidecar.wait_status("up", lambda status: True)
        self.sidecar.ok("frontend", "add", self.rust.handshake)
        self.sidecar.wait_serving()
        self.sidecar.wait_attached(*self.frontends)
        for frontend in self.frontends:
            frontend.wait_ready()

    def start_sidecar(self, life: int, grace: int, frontends: list[Frontend]) -> Sidecar:
        """The sidecar, for the first time or after it was killed."""
        self.sidecar = self.world.sidecar(
            f"sidecar-{life}",
            ["--orphan-grace", str(grace), *(f"--frontend={f.handshake}" for f in frontends)],
            [self.models.path(0), *MODEL_FLAGS],
            env=self.world.env(**start_method(self.models.kind)),
            state_dir=self.sidecar.state_dir if life > 1 else None,
        )
        return self.sidecar

    def expected(self, prompt: str, count: int = COUNT) -> list[int]:
        return self.models.expected(self.seed, prompt, count)

    def check(self, load: Load) -> None:
        """No answer is lost, cut short, or of other weights."""
        answers = load.answers
        bad = [a for a in answers if not a.complete or a.tokens != self.expected(a.prompt)]
        assert not bad, "\n".join(map(str, bad))

    def update(self, seed: int) -> None:
        done = self.sidecar.update(self.models.path(seed), "--version", f"v{seed}")
        assert done.returncode == 0, done.stdout + done.stderr
        self.seed = seed

    def attachment(self, frontend: Frontend) -> dict:
        for entry in self.sidecar.status()["frontends"]:
            if entry["attachment"]["address"] == frontend.handshake:
                return entry["attachment"]
        wanted = self.sidecar.status()["frontends"]
        raise AssertionError(f"{frontend.handshake} is not wanted: {wanted}")


@pytest.fixture(scope="module", params=["moe", pytest.param("dense", marks=pytest.mark.full)])
def deployment(request, ingredients, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"workers-{request.param}")
    with new_world(ingredients, folder) as world:
        yield Deployment(world, request.param)


# The first value of the fixture alone: pytest groups tests by the place in that list.
only_moe = pytest.mark.parametrize("deployment", ["moe"], indirect=True)


@pytest.fixture
def attach(deployment):
    """Starts a frontend, adds it by command, and removes it at the end of the test."""
    sidecar = deployment.sidecar
    started = []

    def start(name: str, **options):
        frontend = deployment.world.frontend(name, deployment.models.path(0), **options)
        started.append(frontend)
        sidecar.ok("frontend", "add", frontend.handshake)
        return frontend

    yield start
    for frontend in started:
        sidecar.ok("frontend", "remove", frontend.handshake)
        frontend.kill_group()
    wanted = {entry["attachment"]["address"] for entry in sidecar.status()["frontends"]}
    assert wanted == {frontend.handshake for frontend in deployment.frontends}


def test_engines_are_started_by_the_method_that_was_asked_for(deployment):
    """Each process that imports vLLM says this once; forked ones have what their launcher has."""
    says = "Triton is installed, but doesn't include CPU backend"
    for rank in (0, 1):
        log = (deployment.sidecar.state_dir / "logs" / f"engine-{rank}.log").read_text()
        # Launcher, engine core, worker.
        assert log.count(says) == (3 if deployment.kind == "dense" else 1), log


def test_frontends_do_not_notice_that_the_sidecar_is_killed(deployment):
    frontends, prompts = deployment.frontends, deployment.models.prompts
    before = deployment.sidecar.status()

    # Under load, with nobody there for a while.
    with Load(frontends, prompts, COUNT, clients=2) as load:
        load.wait_answers(8)
        deployment.sidecar.kill()
        if deployment.kind == "dense":
            load.wait_answers(8)
        sidecar = deployment.start_sidecar(2, 120, frontends)
        sidecar.wait_serving()
        sidecar.wait_attached(*frontends)
        for frontend in frontends:
            load.wait_answers(4, of=frontend)
    deployment.check(load)
    nothing_new(before, sidecar.status())

    # Idle: nobody is there to wake the other engine of a lockstep group.
    sidecar.kill()
    with Load(frontends, prompts, COUNT, clients=1) as load:
        sidecar = deployment.start_sidecar(3, GRACE, frontends)
        for frontend in frontends:
            load.wait_answers(2, of=frontend)
    deployment.check(load)
    sidecar.wait_attached(*frontends)
    nothing_new(before, sidecar.wait_serving())

    # It is in charge: an update reaches all, and every frontend serves it.
    deployment.update(1)
    for frontend in frontends:
        for rank in range(2):
            answer = frontend.ask(prompts[0], COUNT, rank=rank)
            assert answer.tokens == deployment.expected(prompts[0]), answer


def nothing_new(before: dict, after: dict) -> None:
    """Nothing was started again, and nobody attached again."""
    assert [e["pid"] for e in after["engines"]] == [e["pid"] for e in before["engines"]]

    def ids(status: dict) -> dict:
        all_of_them = [entry["attachment"] for entry in status["frontends"]]
        return {one["address"]: one["id"] for one in all_of_them}

    assert ids(after) == ids(before)
    assert after["coordinator"]["wave"] >= before["coordinator"]["wave"]


@only_moe
def test_the_rust_frontend_serves(deployment):
    assert "Launching Rust frontend" in deployment.rust.log.read_text()
    deployment.update(0)
    with Load([deployment.rust], deployment.models.prompts, COUNT, clients=4) as load:
        load.wait_answers(12)
    deployment.check(load)
    deployment.update(1)


@only_moe
def test_a_frontend_with_two_api_servers_takes_two_slots(deployment, attach):
    frontend = attach("double", api_servers=2)
    deployment.sidecar.wait_attached(frontend)
    frontend.wait_ready()
    assert deployment.attachment(frontend)["api_servers"] == 2
    with Load([frontend], deployment.models.prompts, COUNT, clients=6) as load:
        load.wait_answers(24)
    deployment.check(load)


@only_moe
def test_frontends_that_do_not_fit_are_refused_and_cost_nobody(deployment, attach):
    wrong = {
        "data-parallel-size": attach("wrong-size", size=3),
        "hash": attach("wrong-flags", flags=[*MODEL_FLAGS, "--enable-expert-parallel"]),
    }
    for says, frontend in wrong.items():

        def refused(status, says=says, frontend=frontend):
            states = [entry["attachment"] for entry in status["frontends"]]
            return any(
                state["address"] == frontend.handshake
                and state["state"] != "attached"
                and says in (state["detail"] or "")
                for state in states
            )

        what = f"a refusal of {frontend.name} that says {says!r}"
        deployment.sidecar.wait_status(what, refused, 120)
    prompt = deployment.models.prompts[0]
    assert deployment.python.ask(prompt).tokens == deployment.expected(prompt)
    assert deployment.sidecar.status()["sidecar"]["state"] == "serving"


@only_moe
def test_a_keeper_killed_leaves_nothing_and_the_engines_come_back(deployment):
    sidecar, frontend = deployment.sidecar, deployment.python
    prompt = deployment.models.prompts[0]
    assert frontend.ask(prompt).tokens == deployment.expected(prompt)
    before = sidecar.status()
    pids = [engine["pid"] for engine in before["engines"]]
    keeper = before["sidecar"]["keeper_pid"]
    os.kill(keeper, signal.SIGKILL)
    wait_for("the old engines end", 60, lambda: not any(alive(pid) for pid in pids))
    sidecar.wait_status(
        "a new keeper", lambda s: s["sidecar"]["keeper_pid"] not in (None, keeper), 60
    )
    # The relay process ends with its keeper, so the frontend is told that its engines are dead.
    wait_for("the frontend knows", 60, lambda: not frontend.healthy())
    for old in deployment.frontends:
        old.terminate(limit=30)
    # It starts while the engines do.
    ports = {"http_port": frontend.http_port, "rpc_port": frontend.rpc_port}
    again = deployment.world.frontend("python-again", deployment.models.path(0), **ports)
    deployment.frontends = [again]
    status = sidecar.wait_serving(START_LIMIT)
    assert not set(pids) & {engine["pid"] for engine in status["engines"]}
    sidecar.wait_attached(again)
    again.wait_ready()
    assert again.ask(prompt).tokens == deployment.expected(prompt)


def test_a_sidecar_killed_leaves_nothing_after_the_grace(deployment):
    """The last test: it ends the deployment."""
    world, sidecar = deployment.world, deployment.sidecar
    for frontend in deployment.frontends:
        frontend.terminate(limit=30)
    engines = sidecar.engine_pids()
    assert len(world.marked()) > 3
    sidecar.kill()
    assert all(alive(pid) for pid in engines), "engines died with the sidecar"
    world.wait_gone(GRACE + 45)
    # What a SIGKILL leaves in the state directory is no obstacle, and goes with the next run.
    flags = ["--data-parallel-rpc-port", str(free_port()), "--model-kind", deployment.kind]
    second = world.sidecar("second", flags, state_dir=sidecar.state_dir)
    second.wait_status("up", lambda status: status["sidecar"]["pid"] == second.pid)
    assert second.terminate() == 0
