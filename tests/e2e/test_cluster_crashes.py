"""Processes that are killed in the middle of updates, phase by phase; fake engines on three hosts.

The tests of one kind share a deployment. Each begins and ends with all engines admitted at one
version.
"""

from __future__ import annotations

import random
import time

import pytest
from conftest import fake_deployment
from deployment import Deployment, unpaused_at_the_end

COUNT = 200
SIZE = 32 << 20
FOLLOWER = 1
# What shows in the output of `sidecar update` when the phase has begun.
PHASES = ["staging", "pausing", "loading", "committing"]


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"crashes-{request.param}")
    with fake_deployment(
        ingredients,
        fake_vllm,
        folder,
        request.param,
        size=SIZE,
        env={"FAKE_VLLM_LOAD_MS": "700"},
        flags=["--pause-deadline", "5"],
    ) as deployment:
        yield deployment
        deployment.stop()


class Crash:
    """Kills somebody, and starts again what does not come back by itself."""

    def __init__(self, deployment: Deployment, victim: str) -> None:
        self.deployment = deployment
        self.victim = victim
        self.index = {"leader": 0, "follower": FOLLOWER}.get(victim)

    def kill(self) -> None:
        if self.index is not None:
            self.deployment.sidecar(self.index).kill()
        else:
            self.deployment.kill_engine(FOLLOWER * self.deployment.per_node)

    def restart(self) -> None:
        if self.index is not None:
            self.deployment.start_sidecar(self.index)

    def check(self, answers, old: int, new: int) -> None:
        """No request is lost that was not the killed process's own; none mixes versions."""
        if self.index is not None:
            assert not self.deployment.bad(answers, old, new)
        for answer in answers:
            assert answer.status is not None, f"hung or cut: {answer}"
            if answer.tokens:
                given = self.deployment.models.seed_of(answer.prompt, answer.tokens)
                assert given in (old, new), f"mixed or wrong: {answer}"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", ["follower", "engine", "leader"])
def test_a_crash_in_an_update_leaves_one_version_and_loses_nothing(deployment, victim, phase):
    old, new = deployment.seed, deployment.seed + 1
    crash = Crash(deployment, victim)
    path = deployment.private_copy(new)
    with (
        deployment.load(COUNT) as load,
        unpaused_at_the_end(deployment),
        deployment.hosts[FOLLOWER].slow("100mbit" if phase == "staging" else "10gbit"),
    ):
        load.wait_answers(4)
        update = deployment.begin_update(new, path=path)
        update.wait_line(f"^{phase}")
        crash.kill()
        crash.restart()
        update.wait_exit(60)
        deployment.settled(old, new)
        load.wait_answers(4)
    crash.check(load.answers, old, new)
    # All of it works again.
    deployment.update(new, "--id", f"{victim}-{phase}", path=path)
    deployment.check_serving(new)


@pytest.mark.parametrize("round_", range(4))
def test_a_crash_at_a_random_moment_leaves_one_version(deployment, round_):
    dice = random.Random(f"{deployment.models.kind} {round_}")
    old, new = deployment.seed, deployment.seed + 1
    crash = Crash(deployment, dice.choice(["follower", "leader", "engine"]))
    path = deployment.private_copy(new)
    with deployment.load(COUNT) as load, unpaused_at_the_end(deployment):
        load.wait_answers(4)
        update = deployment.begin_update(new, path=path)
        # Any moment of it is as good as another.
        time.sleep(dice.uniform(0.05, 2.0))
        crash.kill()
        crash.restart()
        update.wait_exit(60)
        deployment.settled(old, new)
        load.wait_answers(4)
    crash.check(load.answers, old, new)
