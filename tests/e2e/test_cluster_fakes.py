"""A deployment over hosts of a cluster, with fake engines and fake frontends: quick, so that faults
can be many.

The tests of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import pytest
from cluster import Cluster
from conftest import new_world
from deployment import Deployment
from fakes import FakeModels, build

HOSTS = 3
PER_NODE = 2
COUNT = 40


@pytest.fixture(scope="session")
def fake_vllm():
    return build()


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"fakes-{request.param}")
    models = FakeModels(request.param, folder)
    env = {"FAKE_VLLM_FORK": "0", "FAKE_VLLM_STEP_MS": "3", "FAKE_VLLM_CONTROL": str(folder)}
    with (
        Cluster(HOSTS + 1, folder, shm="256m") as cluster,
        new_world(ingredients, folder, fake_vllm) as world,
    ):
        deployment = Deployment(world, cluster, models, per_node=PER_NODE, env=env, start_limit=40)
        deployment.start_frontend("alpha")
        deployment.start_frontend("beta", api_servers=2)
        deployment.start()
        yield deployment
        deployment.stop()


def test_all_ranks_serve_through_every_frontend(deployment):
    deployment.check_serving(0)


def test_an_update_reaches_all_nodes_and_mixes_nothing(deployment):
    old, new = deployment.seed, 1 - deployment.seed
    with deployment.load(COUNT) as load:
        load.wait_answers(12)
        deployment.update(new)
        load.wait_answers(12)
    assert not deployment.bad(load.answers, old, new)
    seen = {deployment.models.seed_of(a.prompt, a.tokens) for a in load.answers}
    assert seen == {old, new}
    deployment.check_serving(new)
