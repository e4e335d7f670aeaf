"""LoRA adapters over two hosts with real vLLM: one dense DP rank each, a frontend on a third host.

The adapters lie in a directory that only the leader's host sees. The tests share a deployment and
come in this order.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import new_world
from deployment import Deployment
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS, Answer, complete
from models import Models
from processes import START_LIMIT, STEP_LIMIT

FLAGS = ["--enable-lora", "--max-lora-rank", "8"]
NAME = "style"
COUNT = 12
RANKS = (0, 1)


class Adapters:
    """The adapters of the tiny models, and how engines answer with them."""

    def __init__(self, deployment: Deployment, models: Path) -> None:
        self.deployment = deployment
        self.models = models
        told = json.loads((models / "prompts.json").read_text())["lora"]
        self.prompts: list[str] = told["prompts"]
        self.tokens: dict[str, list[list[int]]] = told["tokens"]

    def on_leader(self, name: str) -> str:
        """A copy that only the leader's host sees."""
        path = self.deployment.cluster.private / name
        outside = self.deployment.hosts[0].sees(path)
        if not outside.exists():
            shutil.copytree(self.models / name, outside)
        return str(path)

    def forget(self, name: str) -> None:
        shutil.rmtree(self.deployment.hosts[0].sees(self.deployment.cluster.private / name))

    def ask(self, prompt: str, rank: int, model: str = NAME) -> Answer:
        frontend = self.deployment.frontends[0]
        header = {"X-data-parallel-rank": str(rank)}
        where = {"name": frontend.name, "host": frontend.host, "headers": header}
        return complete(frontend.http_port, model, prompt, COUNT, STEP_LIMIT, **where)

    def check(self, expected: str) -> None:
        """Both ranks answer with this adapter; without one, as the base model does."""
        model = NAME if expected else self.deployment.frontends[0].model
        for prompt, tokens in list(zip(self.prompts, self.tokens[expected], strict=True))[:3]:
            for rank in RANKS:
                answer = self.ask(prompt, rank, model)
                assert answer.tokens == tokens, f"rank {rank}, not {expected or 'base'}: {answer}"

    def update(self, *flags: str) -> dict:
        done = self.deployment.leader.cli("update", "--json", *flags, limit=120)
        assert done.returncode == 0, done.stdout + done.stderr + self.deployment.logs()
        return json.loads(done.stdout)

    def stores(self) -> list[set[str]]:
        """What each node keeps."""
        folders = [sidecar.state_dir / "adapters" for sidecar in self.deployment.sidecars]
        return [set(os.listdir(folder)) if folder.exists() else set() for folder in folders]


@pytest.fixture(scope="module")
def adapters(ingredients, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora-hosts")
    models = Models.read(ingredients["models"], "dense")
    with Cluster(len(RANKS) + 1, folder) as cluster, new_world(ingredients, folder) as world:
        deployment = Deployment(
            world,
            cluster,
            models,
            per_node=1,
            flags=["--pause-deadline", "20"],
            vllm_flags=[*MODEL_FLAGS, *FLAGS, *IN_PROCESS_WORKER],
        )
        for index in reversed(RANKS):
            deployment.start_sidecar(index)
        # It starts while the engines do. Its command line names the adapter, which must be there
        # when it is attached.
        flags = [*MODEL_FLAGS, *FLAGS, "--lora-modules", f"{NAME}=dp-sidecar:{NAME}"]
        frontend = deployment.start_frontend("python", flags=flags)
        deployment.wait_serving()
        adapters = Adapters(deployment, ingredients["models"])
        adapters.update("--lora", f"{NAME}={adapters.on_leader('lora-1')}")
        deployment.leader.ok("frontend", "add", frontend.handshake)
        deployment.leader.wait_attached(frontend)
        frontend.wait_ready()
        yield adapters
        deployment.stop()


def test_an_adapter_of_the_leader_alone_reaches_the_other_host(adapters):
    adapters.check("lora-1")
    adapters.check("")
    first, second = adapters.stores()
    assert first == second
    assert len(first) == 1, first


def test_it_is_replaced_under_load_and_no_response_mixes_two(adapters):
    answers: list[Answer] = []
    stop = threading.Event()

    def ask(rank: int) -> None:
        turn = 0
        while not stop.is_set():
            answers.append(adapters.ask(adapters.prompts[turn % 3], rank))
            turn += 1

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in RANKS for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        report = adapters.update("--lora", f"{NAME}={adapters.on_leader('lora-2')}")
    finally:
        stop.set()
        for thread in threads:
            thread.join(STEP_LIMIT)
    assert report["status"] == "committed"
    adapters.check("lora-2")
    for answer in answers:
        assert answer.complete, answer
        at = adapters.prompts.index(answer.prompt)
        known = [adapters.tokens[name][at] for name in ("lora-1", "lora-2")]
        assert answer.tokens in known, f"mixed or wrong: {answer}"
    # The one before is not kept.
    assert [len(store) for store in adapters.stores()] == [1, 1]


def test_an_engine_that_starts_again_has_it_although_its_directory_is_gone(adapters):
    deployment = adapters.deployment
    adapters.forget("lora-2")
    before = deployment.engine_pids()[1]
    deployment.kill_engine(1)
    deployment.leader.wait_status(
        "rank 1 has another process",
        lambda status: status["engines"][1]["pid"] not in (before[0], None),
        START_LIMIT,
    )
    deployment.wait_serving()
    adapters.check("lora-2")


def test_one_that_does_not_fit_touches_nothing(adapters, tmp_path):
    deployment = adapters.deployment
    before = adapters.stores()
    bad = deployment.cluster.private / "bad"
    shutil.copytree(adapters.models / "lora-1", deployment.hosts[0].sees(bad))
    config = deployment.hosts[0].sees(bad) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 64}))
    done = deployment.leader.cli("update", "--lora", f"{NAME}={bad}", limit=60)
    assert done.returncode == 10, done.stdout + done.stderr
    assert "rank" in done.stdout + done.stderr
    adapters.check("lora-2")
    assert before[0] <= adapters.stores()[0]


def test_killed_sidecars_find_the_adapters_again(adapters):
    deployment = adapters.deployment
    pids = deployment.engine_pids()
    for index in RANKS:
        deployment.sidecar(index).kill()
        deployment.start_sidecar(index)
    deployment.wait_serving()
    assert deployment.engine_pids() == pids
    deployment.leader.wait_attached(*deployment.frontends)
    adapters.check("lora-2")
    adapters.update("--lora", f"{NAME}={adapters.on_leader('lora-1')}")
    adapters.check("lora-1")


def test_it_outlives_new_weights_and_is_removed_by_name(adapters):
    for seed in (1, 0):
        adapters.deployment.update(seed)
    adapters.check("lora-1")
    adapters.check("")
    adapters.update("--remove-lora", NAME)
    assert adapters.stores() == [set(), set()]
    adapters.check("")
    assert all(e["weight_version"] == "v0" for e in adapters.deployment.leader.engines())
