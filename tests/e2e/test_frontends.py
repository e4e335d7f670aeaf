"""Frontends of all sorts on one deployment: several API servers, the Rust frontend, wrong ones.

vLLM's default worker processes. Frontends come and go by command here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from frontends import MODEL_FLAGS, Load
from harness import Sidecar, World
from models import Models
from processes import REPO


@pytest.fixture(scope="module")
def models(tiny_models) -> Models:
    return Models.read(tiny_models, "moe")


@pytest.fixture(scope="module")
def sidecar(shared_world: World, models: Models) -> Sidecar:
    sidecar = shared_world.sidecar(
        "sidecar", [], [models.path(0), *MODEL_FLAGS], env=shared_world.env()
    )
    sidecar.wait_serving()
    return sidecar


def attachment(sidecar: Sidecar, frontend) -> dict:
    for entry in sidecar.status()["frontends"]:
        if entry["attachment"]["address"] == frontend.handshake:
            return entry["attachment"]
    raise AssertionError(f"{frontend.handshake} is not wanted: {sidecar.status()['frontends']}")


@pytest.fixture
def attach(shared_world: World, sidecar: Sidecar):
    """Starts a frontend, adds it by command, and removes it at the end of the test."""
    started = []

    def start(name: str, model: str, **options):
        frontend = shared_world.frontend(name, model, **options)
        started.append(frontend)
        sidecar.ok("frontend", "add", frontend.handshake)
        return frontend

    yield start
    for frontend in started:
        sidecar.ok("frontend", "remove", frontend.handshake)
        frontend.kill_group()
    wanted = sidecar.status()["frontends"]
    assert not wanted, f"still wanted: {wanted}"


def test_a_frontend_with_two_api_servers_takes_two_slots(sidecar, models, attach):
    frontend = attach("double", models.path(0), api_servers=2)
    sidecar.wait_attached(frontend)
    frontend.wait_ready()
    assert attachment(sidecar, frontend)["api_servers"] == 2
    with Load([frontend], models.prompts, 24, clients=6) as load:
        load.wait_answers(24)
    for answer in load.answers:
        assert answer.complete, answer
        assert answer.tokens == models.expected(0, answer.prompt, 24)


def test_the_rust_frontend_serves(sidecar, models, attach, shared_world):
    program = subprocess.check_output(
        [REPO / "scripts" / "vllm_env.py", "--python", sys.executable, "--rust-frontend"],
        text=True,
    ).strip()
    assert Path(program).exists()
    env = shared_world.env(VLLM_USE_RUST_FRONTEND="1", VLLM_RUST_FRONTEND_PATH=program)
    frontend = attach("rust", models.path(0), env=env)
    sidecar.wait_attached(frontend)
    frontend.wait_ready()
    assert "Launching Rust frontend" in frontend.log.read_text()
    done = sidecar.update(models.path(1), "--version", "v1")
    assert done.returncode == 0, done.stdout + done.stderr
    with Load([frontend], models.prompts, 24, clients=4) as load:
        load.wait_answers(12)
    for answer in load.answers:
        assert answer.complete, answer
        assert answer.tokens == models.expected(1, answer.prompt, 24)
    done = sidecar.update(models.path(0), "--version", "v0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_frontends_that_do_not_fit_are_refused_and_cost_nobody(sidecar, models, attach):
    good = attach("good", models.path(0))
    wrong = {
        "data-parallel-size": attach("wrong-size", models.path(0), size=3),
        "hash": attach(
            "wrong-flags", models.path(0), flags=[*MODEL_FLAGS, "--enable-expert-parallel"]
        ),
    }
    sidecar.wait_attached(good)
    good.wait_ready()
    for says, frontend in wrong.items():

        def refused(status, says=says, frontend=frontend):
            states = [entry["attachment"] for entry in status["frontends"]]
            return any(
                state["address"] == frontend.handshake
                and state["state"] != "attached"
                and says in (state["detail"] or "")
                for state in states
            )

        sidecar.wait_status(f"a refusal of {frontend.name} that says {says!r}", refused, 120)
    prompt = models.prompts[0]
    assert good.ask(prompt).tokens == models.expected(0, prompt, 24)
    assert sidecar.status()["sidecar"]["state"] == "serving"
