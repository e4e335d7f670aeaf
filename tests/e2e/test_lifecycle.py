"""What is left when processes are killed: nothing. With vLLM's default worker processes."""

from __future__ import annotations

import os
import signal

import pytest
from frontends import MODEL_FLAGS, complete, http_get
from harness import World
from models import Models
from processes import START_LIMIT, alive, free_port, wait_for

GRACE = 3


def gone(world: World, limit: float) -> None:
    wait_for(
        "no process is left",
        limit,
        lambda: not world.marked(),
        lambda: "\n".join(f"{pid}: {command}" for pid, command in world.marked().items()),
    )


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_sidecar_killed_leaves_nothing_after_the_grace(world, kind):
    models = Models.read(world.models, kind)
    sidecar = world.sidecar(
        "sidecar",
        ["--orphan-grace", str(GRACE)],
        [models.path(0), *MODEL_FLAGS],
        env=world.env(),
    )
    sidecar.wait_serving()
    engines = sidecar.engine_pids()
    assert len(world.marked()) > 3
    sidecar.kill()
    assert all(alive(pid) for pid in engines), "engines died with the sidecar"
    gone(world, GRACE + 45)
    # What a SIGKILL leaves in the state directory is no obstacle, and goes with the next run.
    flags = ["--data-parallel-rpc-port", str(free_port()), "--model-kind", kind]
    second = world.sidecar("second", flags, state_dir=sidecar.state_dir)
    second.wait_status("up", lambda status: status["sidecar"]["pid"] == second.pid)
    assert second.terminate() == 0


def test_a_keeper_killed_leaves_nothing_and_the_engines_come_back(world):
    models = Models.read(world.models, "dense")
    frontend = world.frontend("alpha", models.path(0))
    sidecar = world.sidecar(
        "sidecar",
        ["--orphan-grace", str(GRACE), f"--frontend={frontend.handshake}"],
        [models.path(0), *MODEL_FLAGS],
        env=world.env(),
    )
    sidecar.wait_serving()
    sidecar.wait_attached(frontend)
    frontend.wait_ready()
    prompt = models.prompts[0]
    assert frontend.ask(prompt).tokens == models.expected(0, prompt, 24)
    before = sidecar.status()
    pids = [engine["pid"] for engine in before["engines"]]
    keeper = before["sidecar"]["keeper_pid"]
    os.kill(keeper, signal.SIGKILL)
    wait_for("the old engines end", 60, lambda: not any(alive(pid) for pid in pids))
    sidecar.wait_status(
        "a new keeper", lambda s: s["sidecar"]["keeper_pid"] not in (None, keeper), 60
    )
    status = sidecar.wait_serving(START_LIMIT)
    assert not set(pids) & {engine["pid"] for engine in status["engines"]}
    # The relay process ends with its keeper, so the frontend is told that its engines are dead.
    wait_for("the frontend knows", 60, lambda: not frontend.healthy())
    frontend.terminate(limit=30)
    ports = {"http_port": frontend.http_port, "rpc_port": frontend.rpc_port}
    again = world.frontend("alpha-again", models.path(0), **ports)
    sidecar.wait_attached(again)
    again.wait_ready()
    assert again.ask(prompt).tokens == models.expected(0, prompt, 24)
    assert sidecar.terminate(limit=90) == 0


def test_serve_starts_and_supervises_a_frontend(world):
    models = Models.read(world.models, "dense")
    port = free_port()
    sidecar = world.sidecar(
        "sidecar", ["--serve", "--port", str(port)], [models.path(0), *MODEL_FLAGS]
    )
    sidecar.wait_serving()
    [entry] = sidecar.wait_status(
        "its frontend attached",
        lambda s: [f for f in s["frontends"] if f["attachment"]["state"] == "attached"],
        START_LIMIT,
    )["frontends"]
    assert entry["attachment"]["api_servers"] >= 1

    def healthy():
        try:
            return http_get(port, "/health", 5)[0] == 200
        except OSError:
            return False

    wait_for("its frontend answers", START_LIMIT, healthy, sidecar.engine_logs)
    prompt = models.prompts[0]
    answer = complete(port, models.path(0), prompt, 24, 60)
    assert answer.tokens == models.expected(0, prompt, 24), answer
    assert sidecar.terminate(limit=90) == 0
    gone(world, 10)
