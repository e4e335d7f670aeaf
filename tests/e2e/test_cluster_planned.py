"""Planned work on a running deployment, and a host that is away for longer than a link lives; fake
engines on three hosts, sidecars with `--keep-engines`.

The tests of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from conftest import fake_deployment
from deployment import Deployment
from frontends import Answer, Frontend, Load
from processes import REQUEST_LIMIT

COUNT = 100
# Clients of `Deployment.load`: so many per frontend.
CLIENTS = 4
# For so long some connections are idle when the cable is pulled. A kernel asks after half a minute
# whether the other side is there, and gives it up a minute later.
IDLE = 7.0
CUT = 40.0


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"planned-{request.param}")
    with fake_deployment(
        ingredients, fake_vllm, folder, request.param, flags=["--keep-engines"]
    ) as deployment:
        yield deployment
        # SIGTERM would leave all of it running.
        deployment.stop(by_command=True)


class Pinned:
    """One rank, asked through one frontend."""

    def __init__(self, frontend: Frontend, rank: int) -> None:
        self.frontend = frontend
        self.rank = rank
        self.name = f"{frontend.name}, rank {rank}"
        self.child = frontend.child
        self.tail = frontend.tail

    def ask(self, prompt: str, count: int = 24, limit: float = REQUEST_LIMIT) -> Answer:
        answer = self.frontend.ask(prompt, count, limit, self.rank)
        answer.frontend = self.name
        return answer


def lives(deployment: Deployment) -> dict[int, tuple[int, int, int]]:
    return {
        e["rank"]: (e["pid"], e["incarnation"], e["restarts"]) for e in deployment.leader.engines()
    }


def update(deployment: Deployment) -> None:
    """All nodes can be updated."""
    deployment.update(1 - deployment.seed)
    deployment.check_serving()


def total(status: dict[str, Any], what: str) -> int:
    return sum(engine[what] for engine in status["engines"])


def test_drain_holds_what_is_new_and_resume_loses_none_of_it(deployment):
    before = lives(deployment)
    leader = deployment.leader
    waiting = CLIENTS * len(deployment.frontends)
    with deployment.load(COUNT, CLIENTS) as load:
        load.wait_answers(8)
        leader.ok("drain", "--limit", "30s")
        status = leader.wait_status(
            "each client's request is held", lambda s: total(s, "held") == waiting
        )
        assert total(status, "in_flight") == 0, status["engines"]
        answered = len(load.answers)
        # Nothing else may touch the engines meanwhile.
        busy = leader.update(deployment.models.path(1), "--version", "v1")
        assert busy.returncode == 13, busy.stdout + busy.stderr
        assert len(load.answers) == answered, "held requests were answered"
        assert total(leader.status(), "held") == waiting
        leader.ok("resume")
        load.wait_answers(2 * waiting)
    assert not deployment.bad(load.answers, deployment.seed)
    assert lives(deployment) == before
    update(deployment)


@pytest.mark.parametrize("index", [1, 0], ids=["follower", "leader"])
def test_a_planned_restart_keeps_engines_and_loses_no_request(deployment, index):
    before = lives(deployment)
    with deployment.load(COUNT, CLIENTS) as load:
        load.wait_answers(8)
        assert deployment.sidecar(index).terminate(limit=40) == 0, deployment.logs()
        deployment.start_sidecar(index)
        deployment.wait_serving()
        deployment.leader.wait_attached(*deployment.frontends, limit=deployment.start_limit)
        load.wait_answers(16)
    assert not deployment.bad(load.answers, deployment.seed)
    assert lives(deployment) == before, "engines were started again"
    update(deployment)


def test_all_sidecars_restarted_one_after_the_other_lose_no_request(deployment):
    before = lives(deployment)
    with deployment.load(COUNT, CLIENTS) as load:
        load.wait_answers(8)
        for index in reversed(range(len(deployment.hosts))):
            assert deployment.sidecar(index).terminate(limit=40) == 0, deployment.logs()
            deployment.start_sidecar(index)
            deployment.wait_serving()
            deployment.leader.wait_attached(*deployment.frontends, limit=deployment.start_limit)
            load.wait_answers(8)
    assert not deployment.bad(load.answers, deployment.seed)
    assert lives(deployment) == before, "engines were started again"
    update(deployment)


# The last test: when it fails, a frontend may have ended.
def test_a_host_without_its_cable_costs_no_engine_and_no_request_of_others(deployment):
    before = lives(deployment)
    away = 1
    alpha, beta = deployment.frontends
    through = [Pinned(alpha, rank) for rank in deployment.ranks_of(away)]
    others = [
        Pinned(frontend, rank)
        for frontend in (alpha, beta)
        for rank in range(deployment.size)
        if deployment.node_of(rank) != away
    ]
    every = [*through, *others]
    with Load(every, deployment.models.prompts, COUNT, clients=1) as load:
        load.wait_each(every, 2)
        for rank in deployment.ranks_of(away):
            assert beta.ask(deployment.models.prompts[0], 12, rank=rank).complete
        # From here on beta has connections with that host on which nothing is said.
        time.sleep(IDLE)
        with deployment.hosts[away].unplugged():
            began = time.monotonic()
            if deployment.models.kind == "dense":
                load.wait_each(others, 2)
            # The time is what is tested.
            time.sleep(max(0.0, CUT - (time.monotonic() - began)))
        deployment.wait_serving()
        load.wait_each(every, 2)
    assert lives(deployment) == before, f"engines were started again{deployment.logs()}"
    lost = [
        answer for client in others for answer in deployment.bad(load.of(client), deployment.seed)
    ]
    assert not lost, lost
    for client in through:
        for answer in deployment.bad(load.of(client), deployment.seed):
            # It may fail, but neither hangs nor mixes.
            assert answer.status is not None, answer
            assert not answer.tokens, answer
    deployment.check_serving()
    update(deployment)
