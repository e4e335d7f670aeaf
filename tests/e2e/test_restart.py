"""A sidecar that is killed and started again in front of real engines and unmodified frontends."""

from __future__ import annotations

import subprocess
import sys

import pytest
from frontends import MODEL_FLAGS, Load
from harness import Sidecar, World
from models import Models
from processes import REPO, START_LIMIT

COUNT = 24


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_frontends_do_not_notice_that_the_sidecar_is_killed(world: World, kind: str):
    models = Models.read(world.models, kind)
    python = world.frontend("python", models.path(0))
    program = subprocess.check_output(
        [REPO / "scripts" / "vllm_env.py", "--python", sys.executable, "--rust-frontend"],
        text=True,
    ).strip()
    env = world.env(VLLM_USE_RUST_FRONTEND="1", VLLM_RUST_FRONTEND_PATH=program)
    rust = world.frontend("rust", models.path(0), env=env)
    frontends = [python, rust]
    flags = ["--orphan-grace", "120", *(f"--frontend={f.handshake}" for f in frontends)]

    def start(life: int, state_dir=None) -> Sidecar:
        return world.sidecar(
            f"sidecar-{life}",
            flags,
            [models.path(0), *MODEL_FLAGS],
            env=world.env(),
            state_dir=state_dir,
        )

    sidecar = start(1)
    sidecar.wait_serving()
    sidecar.wait_attached(*frontends, limit=START_LIMIT)
    for frontend in frontends:
        frontend.wait_ready()
    before = sidecar.status()

    # Under load, with nobody there for a while.
    with Load(frontends, models.prompts, COUNT, clients=2) as load:
        load.wait_answers(8)
        sidecar.kill()
        if kind == "dense":
            load.wait_answers(8)
        sidecar = start(2, sidecar.state_dir)
        sidecar.wait_serving()
        sidecar.wait_attached(*frontends)
        for frontend in frontends:
            load.wait_answers(4, of=frontend)
    bad = [a for a in load.answers if a.tokens != models.expected(0, a.prompt, COUNT)]
    assert not bad, "\n".join(map(str, bad))
    check(before, sidecar.status())

    # Idle: nobody is there to wake the other engine of a lockstep group.
    sidecar.kill()
    with Load(frontends, models.prompts, COUNT, clients=1) as load:
        sidecar = start(3, sidecar.state_dir)
        for frontend in frontends:
            load.wait_answers(2, of=frontend)
    bad = [a for a in load.answers if a.tokens != models.expected(0, a.prompt, COUNT)]
    assert not bad, "\n".join(map(str, bad))
    sidecar.wait_attached(*frontends)
    check(before, sidecar.wait_serving())

    # It is in charge: an update reaches all, and every frontend serves it.
    done = sidecar.update(models.path(1), "--version", "v1")
    assert done.returncode == 0, done.stdout + done.stderr
    for frontend in frontends:
        for rank in range(2):
            answer = frontend.ask(models.prompts[0], COUNT, rank=rank)
            assert answer.tokens == models.expected(1, models.prompts[0], COUNT), answer
    assert sidecar.terminate(limit=90) == 0


def check(before: dict, after: dict) -> None:
    """Nothing was started again, and nobody attached again."""
    assert [e["pid"] for e in after["engines"]] == [e["pid"] for e in before["engines"]]

    def ids(status: dict) -> dict:
        all_of_them = [entry["attachment"] for entry in status["frontends"]]
        return {one["address"]: one["id"] for one in all_of_them}

    assert ids(after) == ids(before)
    assert after["coordinator"]["wave"] >= before["coordinator"]["wave"]
