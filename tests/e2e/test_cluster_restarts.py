"""Sidecars that are killed and started again, with fake engines on three hosts: nobody notices.

The tests of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import pytest
from conftest import fake_deployment

COUNT = 40


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"restarts-{request.param}")
    with fake_deployment(ingredients, fake_vllm, folder, request.param) as deployment:
        yield deployment
        deployment.stop()


@pytest.mark.parametrize("index", [1, 0])
def test_a_killed_sidecar_comes_back_and_no_request_is_lost(deployment, index):
    pids = deployment.engine_pids()
    with deployment.load(COUNT) as load:
        load.wait_answers(8)
        deployment.sidecar(index).kill()
        # Nobody is there, and all ranks go on answering.
        load.wait_answers(12)
        deployment.start_sidecar(index)
        deployment.wait_serving()
        deployment.leader.wait_attached(*deployment.frontends)
        load.wait_answers(12)
    assert not deployment.bad(load.answers, deployment.seed)
    assert deployment.engine_pids() == pids, "engines were started again"
    deployment.check_serving()
    # And it is in charge again.
    deployment.update(1 - deployment.seed)
    deployment.check_serving()


def test_all_sidecars_killed_at_once_come_back_and_no_request_is_lost(deployment):
    pids = deployment.engine_pids()
    with deployment.load(COUNT) as load:
        load.wait_answers(8)
        for index in range(len(deployment.hosts)):
            deployment.sidecar(index).kill()
        load.wait_answers(6)
        for index in range(len(deployment.hosts)):
            deployment.start_sidecar(index)
        deployment.wait_serving()
        load.wait_answers(12)
    assert not deployment.bad(load.answers, deployment.seed)
    assert deployment.engine_pids() == pids, "engines were started again"
    deployment.check_serving()
