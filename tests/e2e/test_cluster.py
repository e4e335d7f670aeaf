"""Real vLLM over two hosts with two DP ranks each, dense and MoE.

A Python frontend and the Rust frontend on a third host, both attached through the leader. The tests
of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import new_world
from deployment import Deployment
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS
from models import Models
from processes import REPO

HOSTS = 2
PER_NODE = 2
COUNT = 40


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"hosts-{request.param}")
    models = Models.read(ingredients["models"], request.param)
    program = subprocess.check_output(
        [REPO / "scripts" / "vllm_env.py", "--python", sys.executable, "--rust-frontend"],
        text=True,
    ).strip()
    assert Path(program).exists()
    with Cluster(HOSTS + 1, folder) as cluster, new_world(ingredients, folder) as world:
        deployment = Deployment(
            world,
            cluster,
            models,
            per_node=PER_NODE,
            flags=["--pause-deadline", "20"],
            vllm_flags=[*MODEL_FLAGS, *IN_PROCESS_WORKER],
            env={"DP_SIDECAR_TEST_FAIL_LOAD": str(folder / "fail")},
        )
        deployment.start_frontend("python", flags=MODEL_FLAGS)
        rust = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": program}
        deployment.start_frontend("rust", flags=MODEL_FLAGS, env=rust)
        deployment.start()
        yield deployment
        deployment.stop()


def test_all_ranks_of_both_hosts_answer_alike(deployment):
    deployment.check_serving(0)
    assert "Launching Rust frontend" in deployment.frontends[1].log.read_text()


def test_an_update_under_load_reaches_both_hosts_and_mixes_nothing(deployment):
    with deployment.load(COUNT) as load:
        load.wait_answers(8)
        deployment.update(1)
        load.wait_answers(8)
    assert not deployment.bad(load.answers, 0, 1)
    assert {deployment.models.seed_of(a.prompt, a.tokens) for a in load.answers} == {0, 1}
    deployment.check_serving(1)
