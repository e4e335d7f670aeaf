"""Processes that are killed in the middle of updates, phase by phase; fake engines on three hosts.

The tests of one kind share a deployment. Each begins and ends with all engines admitted at one
version.
"""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest
from conftest import fake_deployment
from deployment import Deployment, kill_all, unpaused_at_the_end
from processes import wait_for

COUNT = 200
SIZE = 32 << 20
FOLLOWER = 1
# What shows in the output of `sidecar update` when the phase has begun.
PHASES = ["staging", "pausing", "loading", "committing", "resuming"]


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
        # Engines are killed more often here than a sidecar would stand otherwise.
        flags=["--pause-deadline", "5", "--max-restarts", "50"],
        late=FOLLOWER,
    ) as deployment:
        yield deployment
        deployment.stop()


class Crash:
    """Kills somebody, and starts again what does not come back by itself."""

    def __init__(self, deployment: Deployment, victim: str) -> None:
        self.deployment = deployment
        self.victim = victim
        self.index = {"leader": 0, "follower": FOLLOWER}.get(victim)
        self.pids = deployment.engine_pids()[FOLLOWER * deployment.per_node]

    def kill(self) -> None:
        if self.index is not None:
            self.deployment.sidecar(self.index).kill()
        else:
            kill_all(self.pids)

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


# The leader after the engine: its successor has forgotten how often that was started again, so
# that no test waits for the delay which grows with each start.
@pytest.mark.parametrize("victim", ["follower", "engine", "leader"])
@pytest.mark.parametrize("phase", PHASES)
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
        with deployment.in_phase(update, phase):
            crash.kill()
        crash.restart()
        update.wait_exit(60)
        # Those two come after the commit point.
        committed = phase in ("committing", "resuming")
        deployment.settled(*((new,) if committed else (old, new)))
        load.wait_answers(4)
    crash.check(load.answers, old, new)
    # All of it works again.
    deployment.update(new, "--id", f"{victim}-{phase}", path=path)
    deployment.check_serving(new)


def test_an_answer_to_a_pause_that_dies_with_its_follower_costs_no_engine(deployment):
    old, new = deployment.seed, deployment.seed + 1
    before = deployment.engine_pids()
    follower, ranks = deployment.sidecar(FOLLOWER), deployment.ranks_of(FOLLOWER)
    asking = [
        threading.Thread(
            target=deployment.frontends[0].ask, args=("long", COUNT), kwargs={"rank": r}
        )
        for r in ranks
    ]
    logs = [follower.state_dir / "logs" / f"engine-{rank}.log" for rank in ranks]

    def pauses() -> list[int]:
        return [log.read_text().count("pause_scheduler") for log in logs]

    def running() -> bool:
        return all(deployment.leader.engines()[rank]["in_flight"] for rank in ranks)

    for rank in ranks:
        deployment.order(rank, "slow:200")
    for thread in asking:
        thread.start()
    wait_for("requests run on the follower's engines", 20, running)
    asked = pauses()
    update = deployment.begin_update(
        new, "--pause-deadline", "15s", path=deployment.private_copy(new)
    )
    with unpaused_at_the_end(deployment):
        # Its engines wait for their requests' ends, and what they answer then is heard by nobody.
        wait_for("the call is there", 30, lambda: all(map(int.__lt__, asked, pauses())))
        follower.child.send_signal(signal.SIGSTOP)
        for rank in ranks:
            deployment.order(rank, "")
        update.wait_line("^pausing: .*\\(4 of 6\\)")
        follower.kill()
        deployment.start_sidecar(FOLLOWER)
        for thread in asking:
            thread.join(60)
        code = update.wait_exit(120)
        deployment.settled(old, new)
    assert code == 0, update.tail()
    assert deployment.seed == new
    assert deployment.engine_pids() == before, "engines were started again"


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
