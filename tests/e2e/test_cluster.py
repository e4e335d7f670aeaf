"""Real vLLM over two hosts with two DP ranks each, dense and MoE.

A Python frontend and the Rust frontend on a third host, both attached through the leader. The tests
of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import new_world
from deployment import Deployment, unpaused_at_the_end
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS
from models import Models
from processes import REPO
from trainer import Client

HOSTS = 2
PER_NODE = 2
COUNT = 40


@pytest.fixture(scope="module", params=[pytest.param("dense", marks=pytest.mark.full), "moe"])
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
            flags=["--pause-deadline", "20", "--prefault"],
            vllm_flags=[*MODEL_FLAGS, *IN_PROCESS_WORKER],
            env={"DP_SIDECAR_TEST_FAIL_LOAD": str(folder / "fail")},
            http=True,
        )
        deployment.start_frontend("python", flags=MODEL_FLAGS)
        rust = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": program}
        deployment.start_frontend("rust", flags=MODEL_FLAGS, env=rust)
        deployment.start()
        yield deployment
        # Both ways to end real engines: by signal, and by command.
        deployment.stop(by_command=request.param == "moe")


def test_all_ranks_of_both_hosts_answer_alike(deployment):
    deployment.check_serving(0)
    assert "Launching Rust frontend" in deployment.frontends[1].log.read_text()


def test_memory_for_updates_is_taken_at_the_start(deployment):
    """The first of those that update."""
    size = (Path(deployment.models.path(0)) / "model.safetensors").stat().st_size
    for sidecar in deployment.sidecars:
        sidecar.wait_line("shared memory for updates is taken", 20)
        files = sidecar.node.sees("/dev/shm").glob("dp-sidecar-*")
        # Not what the keeper locks to say that there is a use for them.
        sizes = [file.stat().st_size for file in files if not file.name.endswith("-lock")]
        assert len(sizes) == 2, sizes
        assert min(sizes) >= size, sizes


def test_an_update_under_load_reaches_both_hosts_and_mixes_nothing(deployment):
    with deployment.load(COUNT) as load:
        load.wait_answers(8)
        deployment.update(1)
        load.wait_answers(8)
    assert not deployment.bad(load.answers, 0, 1)
    assert {deployment.models.seed_of(a.prompt, a.tokens) for a in load.answers} == {0, 1}
    deployment.check_serving(1)


def test_bytes_of_the_leader_alone_reach_the_other_host(deployment):
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        deployment.update(2, path=deployment.private_copy(2))
        load.wait_answers(4)
    assert not deployment.bad(load.answers, 1, 2)
    deployment.check_serving(2)


def test_what_a_trainer_uploads_reaches_both_hosts(deployment):
    old, new = deployment.seed, (deployment.seed + 1) % 3
    file = Path(deployment.models.path(new)) / "model.safetensors"
    data = file.read_bytes()
    half = len(data) // 2
    client = Client(deployment.http, deployment.http_token)
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        files = [{"name": file.name, "size": len(data)}]
        client.ok("POST", "uploads", {"id": "step", "files": files})
        client.put(f"uploads/step/{file.name}", data[:half], 0, len(data), None)
        # The trainer comes back and sends the rest.
        (there,) = client.ok("GET", "uploads/step")["files"]
        assert there["ranges"] == [[0, half]], there
        client.put(f"uploads/step/{file.name}", data[half:], half, len(data), None)
        wanted = {"upload": "step", "version": f"v{new}", "from_version": f"v{old}"}
        report = client.ok("POST", "updates", wanted)
        deployment.seed = new
        load.wait_answers(4)
    assert report["status"] == "committed", report
    assert not deployment.bad(load.answers, old, new)
    deployment.check_serving(new)
    assert deployment.weight_versions() == {f"v{new}"}


@pytest.mark.parametrize("index", [1, 0])
def test_a_killed_sidecar_comes_back_and_no_request_is_lost(deployment, index):
    pids = deployment.engine_pids()
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        deployment.sidecar(index).kill()
        load.wait_answers(6)
        deployment.start_sidecar(index)
        deployment.wait_serving()
        deployment.leader.wait_attached(*deployment.frontends)
        load.wait_answers(6)
    assert not deployment.bad(load.answers, deployment.seed)
    assert deployment.engine_pids() == pids, "engines were started again"
    deployment.update((deployment.seed + 1) % 3)
    deployment.check_serving()


def test_a_cable_cut_for_three_seconds_costs_nothing(deployment):
    pids = deployment.engine_pids()
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        with deployment.hosts[1].unplugged():
            # The time is what is tested.
            time.sleep(3)
        load.wait_answers(8)
        deployment.wait_serving()
    assert not deployment.bad(load.answers, deployment.seed)
    assert deployment.engine_pids() == pids
    deployment.check_serving()


def test_a_load_that_fails_on_one_rank_of_the_follower_takes_all_back(deployment):
    old = deployment.seed
    pids = deployment.engine_pids()
    order = deployment.world.folder / "fail"
    order.write_text("rank=3;after=5;times=1")
    with deployment.load(COUNT, clients=2) as load:
        load.wait_answers(4)
        path = deployment.models.path((old + 1) % 3)
        done = deployment.leader.cli("update", "--path", path, "--version", "bad", limit=120)
        load.wait_answers(4)
    order.unlink()
    assert done.returncode == 11, done.stdout + done.stderr
    assert "rank 3" in done.stdout + done.stderr
    assert not deployment.bad(load.answers, old)
    assert deployment.engine_pids() == pids
    deployment.check_serving(old)


def test_the_leader_killed_while_engines_load_leaves_one_version(deployment):
    old, new = deployment.seed, (deployment.seed + 1) % 3
    with deployment.load(COUNT, clients=2) as load, unpaused_at_the_end(deployment):
        load.wait_answers(4)
        update = deployment.begin_update(new)
        update.wait_line("^(pausing|loading)")
        deployment.leader.kill()
        deployment.start_sidecar(0)
        update.wait_exit(60)
        deployment.settled(old, new)
        load.wait_answers(4)
    assert not deployment.bad(load.answers, old, new)
