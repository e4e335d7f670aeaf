"""Hosted engines behind two frontends: dense and MoE, two DP ranks, real vLLM.

The tests of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS, Frontend, Load, http_post
from harness import Sidecar, World, start_method
from models import Models
from processes import LOOPBACK, START_LIMIT, alive, descendants, free_port, wait_for

COUNT = 40


@dataclass
class Deployment:
    """A sidecar with two engines and two frontends."""

    kind: str
    world: World
    models: Models
    sidecar: Sidecar
    frontends: list[Frontend]
    order: Path
    http: str
    seed: int = 0

    def start_frontend(self, name: str, **ports: int) -> Frontend:
        env = self.world.env(VLLM_SERVER_DEV_MODE="1")
        return self.world.frontend(name, self.models.path(0), env=env, **ports)

    def check_serving(self, seed: int | None = None) -> None:
        """Every frontend answers with the weights of `seed`, on both ranks."""
        seed = self.seed if seed is None else seed
        for frontend in self.frontends:
            for prompt in self.models.prompts[:4]:
                answer = frontend.ask(prompt)
                assert answer.complete, (answer, self.sidecar.engine_logs())
                assert answer.tokens == self.models.expected(seed, prompt, 24), (
                    f"not the tokens of checkpoint {seed}, but of "
                    f"{self.models.seed_of(prompt, answer.tokens)}: {answer}"
                )

    def engine_core_pids(self) -> dict[int, list[int]]:
        """Every process below each engine's launcher."""
        return {e["rank"]: [e["pid"], *descendants(e["pid"])] for e in self.sidecar.engines()}

    def restarts(self) -> int:
        return sum(engine["restarts"] for engine in self.sidecar.engines())

    def update(self, seed: int, *flags: str) -> None:
        """An update that must succeed."""
        done = self.sidecar.update(self.models.path(seed), "--version", f"v{seed}", *flags)
        assert done.returncode == 0, done.stdout + done.stderr + self.sidecar.engine_logs()
        self.seed = seed

    def weight_versions(self) -> set[str]:
        return {engine["weight_version"] for engine in self.sidecar.engines()}


@pytest.fixture(scope="module", params=["dense", pytest.param("moe", marks=pytest.mark.full)])
def deployment(request, ingredients, tmp_path_factory):
    from conftest import make_world

    maker = make_world(ingredients, tmp_path_factory.mktemp(request.param))
    world = next(maker)
    models = Models.read(world.models, request.param)
    order = world.folder / "fail"
    sidecar = None
    try:
        # Frontends and engines start at the same time: either may be there first.
        # Development mode adds /pause and /resume.
        env = world.env(VLLM_SERVER_DEV_MODE="1")
        frontends = [world.frontend(name, models.path(0), env=env) for name in ("alpha", "beta")]
        flags = [f"--frontend={frontend.handshake}" for frontend in frontends]
        http = f"{LOOPBACK}:{free_port()}"
        sidecar = world.sidecar(
            "sidecar",
            [*flags, "--pause-deadline", "20", "--http", http],
            [models.path(0), *MODEL_FLAGS, *IN_PROCESS_WORKER],
            env=world.in_process(
                DP_SIDECAR_TEST_FAIL_LOAD=str(order), **start_method(request.param)
            ),
        )
        sidecar.wait_serving()
        sidecar.wait_attached(*frontends)
        for frontend in frontends:
            frontend.wait_ready()
        yielded = Deployment(request.param, world, models, sidecar, list(frontends), order, http)
        yield yielded
        code = sidecar.terminate(limit=90)
        assert code == 0, f"exit code {code} after SIGTERM\n{sidecar.tail()}"
        own = {pid for f in frontends + yielded.frontends for pid in (f.pid, *descendants(f.pid))}
        left = {pid: command for pid, command in world.marked().items() if pid not in own}
        assert not left, f"the sidecar left {left}"
    finally:
        complaints = list(_finish(maker))
    assert not complaints, complaints


def _finish(maker):
    try:
        next(maker)
    except StopIteration:
        return
    except AssertionError as error:
        yield str(error)


def test_two_frontends_give_the_same_greedy_tokens(deployment):
    deployment.check_serving(0)
    answers: dict[tuple[str, str], list[int]] = {}

    def ask(frontend: Frontend, prompt: str) -> None:
        answers[frontend.name, prompt] = frontend.ask(prompt, COUNT).tokens

    threads = [
        threading.Thread(target=ask, args=(frontend, prompt))
        for frontend in deployment.frontends
        for prompt in deployment.models.prompts[:6]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in deployment.models.prompts[:6]:
        expected = deployment.models.expected(0, prompt, COUNT)
        assert answers["alpha", prompt] == expected
        assert answers["beta", prompt] == expected


def test_both_ranks_take_part(deployment):
    with Load(deployment.frontends, deployment.models.prompts, COUNT) as load:
        deployment.sidecar.wait_status(
            "requests in flight on both ranks",
            lambda status: all(engine["in_flight"] > 0 for engine in status["engines"]),
        )
    assert all(answer.complete for answer in load.answers), load.answers


def test_status_shows_engines_frontends_and_weights(deployment):
    status = deployment.sidecar.status()
    assert [engine["rank"] for engine in status["engines"]] == [0, 1]
    assert all(engine["vllm_version"].startswith("0.32") for engine in status["engines"])
    assert all(alive(engine["pid"]) for engine in status["engines"])
    assert status["deployment"]["kind"] == (
        "lockstep" if deployment.kind == "moe" else "independent"
    )
    attachments = [frontend["attachment"] for frontend in status["frontends"]]
    assert {a["address"] for a in attachments} == {f.handshake for f in deployment.frontends}
    assert all(a["state"] == "attached" for a in attachments)
    assert "engine" in deployment.sidecar.ok("status").lower()
    assert "0.32" in deployment.sidecar.ok("version")
    for frontend in deployment.frontends:
        assert frontend.handshake in deployment.sidecar.ok("frontend", "list")


def test_frontends_see_the_load_of_idle_engines(deployment):
    """vLLM tells idle scheduler stats to client 0 only; that is the sidecar."""
    for frontend in deployment.frontends:

        def idle(frontend=frontend):
            samples = frontend.metric("vllm:num_requests_running")
            return len(samples) == 2 and not any(samples.values())

        wait_for(f"{frontend.name} counts no running request", 30, idle)


def test_a_killed_frontend_costs_only_its_own_requests_and_comes_back(deployment):
    alpha, beta = deployment.frontends
    before = deployment.engine_core_pids()
    with Load([alpha, beta], deployment.models.prompts, COUNT) as load:
        load.wait_answers(4, of=alpha)
        load.wait_answers(4, of=beta)
        load.leave(alpha)
        alpha.kill_group()
        load.wait_answers(12, of=beta)
    lost = [answer for answer in load.of(beta) if not answer.complete]
    assert not lost, f"the other frontend lost requests: {lost}"
    deployment.sidecar.wait_status(
        "its requests are aborted on the engines",
        lambda status: all(engine["in_flight"] == 0 for engine in status["engines"]),
    )
    again = deployment.start_frontend("alpha", http_port=alpha.http_port, rpc_port=alpha.rpc_port)
    deployment.frontends[0] = again
    again.wait_ready()
    deployment.sidecar.wait_attached(again)
    deployment.check_serving()
    assert deployment.engine_core_pids() == before, "engines were started again"


@pytest.mark.parametrize(("mode", "seed"), [("wait", 1), ("abort", 0)])
def test_an_update_under_load_mixes_nothing_and_loses_nothing(deployment, mode, seed):
    old = deployment.seed
    with Load(deployment.frontends, deployment.models.prompts, COUNT) as load:
        load.wait_answers(6)
        deployment.update(seed, "--mode", mode)
        done_at = time.monotonic()
        load.wait_answers(12)
    refused = [answer for answer in load.answers if answer.status != 200]
    assert not refused, f"lost: {refused}"
    reasons = {answer.finish_reason for answer in load.answers}
    assert reasons <= ({"length"} if mode == "wait" else {"length", "abort"}), reasons
    for answer in load.answers:
        if not answer.tokens:
            assert answer.finish_reason == "abort"
            continue
        seen = deployment.models.seed_of(answer.prompt, answer.tokens)
        assert seen in (old, seed), f"mixed or wrong: {answer}"
        if answer.began > done_at:
            assert seen == seed, f"old weights after the update: {answer}"
    seeds = {deployment.models.seed_of(a.prompt, a.tokens) for a in load.answers if a.tokens}
    assert seeds == {old, seed}
    assert deployment.weight_versions() == {f"v{seed}"}
    deployment.check_serving(seed)


def test_what_a_trainer_uploads_in_parts_is_committed_and_served(deployment):
    old, new = deployment.seed, 1 - deployment.seed
    file = Path(deployment.models.path(new)) / "model.safetensors"
    data = file.read_bytes()
    half = len(data) // 2
    uploads = f"http://{deployment.http}/v1/weights/uploads"

    token = (deployment.sidecar.state_dir / "http-token").read_text()

    def call(method: str, url: str, body: bytes, **headers: str) -> dict:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        names["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(url, body or None, names, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    json_type = {"Content_Type": "application/json"}
    name = f"step-{new}"
    sizes = {"id": name, "files": [{"name": file.name, "size": len(data)}]}
    call("POST", uploads, json.dumps(sizes).encode(), **json_type)
    with Load(deployment.frontends, deployment.models.prompts, COUNT) as load:
        load.wait_answers(4)
        first = {"Content_Range": f"bytes 0-{half - 1}/{len(data)}"}
        call("PUT", f"{uploads}/{name}/{file.name}", data[:half], **first)
        # The trainer comes back and asks what is there.
        there = call("GET", f"{uploads}/{name}", b"")
        assert there["files"][0]["ranges"] == [[0, half]], there
        assert not there["complete"], there
        rest = {"Content_Range": f"bytes {half}-{len(data) - 1}/{len(data)}"}
        call("PUT", f"{uploads}/{name}/{file.name}", data[half:], **rest)
        (current,) = deployment.weight_versions()
        wanted = {"upload": name, "version": f"v{new}", "from_version": current}
        updates = f"http://{deployment.http}/v1/weights/updates"
        report = call("POST", updates, json.dumps(wanted).encode(), **json_type)
        deployment.seed = new
        load.wait_answers(8)
    assert report["status"] == "committed", report
    for answer in load.answers:
        assert answer.complete, answer
        seen = deployment.models.seed_of(answer.prompt, answer.tokens)
        assert seen in (old, new), f"mixed or wrong: {answer}"
    assert deployment.weight_versions() == {f"v{new}"}
    deployment.check_serving(new)
    deployment.update(old)


def missing_tensor(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def missing_expert(tensors):
    del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]


def wrong_shape(tensors):
    import torch

    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)


def wrong_dtype(tensors):
    # Of floats, those of another width are cast.
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()


def test_a_bad_checkpoint_is_refused_and_touches_nothing(deployment, tmp_path):
    models, sidecar = deployment.models, deployment.sidecar
    before = deployment.engine_core_pids()
    version = deployment.weight_versions()
    missing = missing_tensor if deployment.kind == "dense" else missing_expert
    cases = {
        "missing": (models.variant(1, tmp_path / "missing", missing), "down_proj"),
        "shape": (models.variant(1, tmp_path / "shape", wrong_shape), "model.norm.weight"),
        "dtype": (models.variant(1, tmp_path / "dtype", wrong_dtype), "model.norm.weight"),
        "truncated": (models.variant(1, tmp_path / "cut", lambda tensors: None), ""),
        "nothing": (str(tmp_path / "nothing"), str(tmp_path / "nothing")),
    }
    whole = Path(cases["truncated"][0]) / "model.safetensors"
    os.truncate(whole, whole.stat().st_size - 100)
    with Load(deployment.frontends, models.prompts, COUNT, clients=1) as load:
        load.wait_answers(2)
        for name, (path, says) in cases.items():
            done = sidecar.update(path, "--version", "bad")
            assert done.returncode == 10, (name, done.returncode, done.stdout, done.stderr)
            assert says in done.stdout + done.stderr, (name, done.stdout, done.stderr)
        load.wait_answers(2)
    assert all(answer.complete for answer in load.answers), load.answers
    assert deployment.weight_versions() == version
    assert deployment.engine_core_pids() == before
    deployment.check_serving()


def test_a_load_that_fails_on_rank_1_ends_with_both_ranks_on_the_old_weights(deployment):
    old = deployment.seed
    before = deployment.engine_core_pids()
    deployment.order.write_text("rank=1;after=5;times=1")
    with Load(deployment.frontends, deployment.models.prompts, COUNT, clients=2) as load:
        load.wait_answers(4)
        done = deployment.sidecar.update(deployment.models.path(2), "--version", "v2")
        load.wait_answers(6)
    deployment.order.unlink()
    said = done.stdout + done.stderr
    assert done.returncode == 11, (done.returncode, said, deployment.sidecar.tail())
    assert "rank 1" in said, said
    for answer in load.answers:
        assert answer.complete, answer
        assert deployment.models.seed_of(answer.prompt, answer.tokens) == old, answer
    deployment.check_serving(old)
    assert deployment.engine_core_pids() == before
    assert "v2" not in deployment.weight_versions()
    # And the same update, left alone, succeeds.
    deployment.update(2)
    deployment.check_serving(2)


def test_pause_holds_requests_and_resume_lets_them_go(deployment):
    deployment.sidecar.ok("pause", "--mode", "wait")
    assert deployment.sidecar.status()["controller"]["paused"] is True
    frontend, prompt = deployment.frontends[0], deployment.models.prompts[0]
    answers = []
    asking = threading.Thread(target=lambda: answers.append(frontend.ask(prompt)))
    asking.start()
    deployment.sidecar.wait_status(
        "the request waits",
        lambda s: any(e["held"] + e["waiting"] + e["in_flight"] > 0 for e in s["engines"]),
    )
    busy = deployment.sidecar.update(deployment.models.path(0), "--version", "v0")
    assert busy.returncode in (0, 13), (busy.stdout, busy.stderr)
    if busy.returncode == 0:
        deployment.seed = 0
    assert not answers
    deployment.sidecar.ok("resume")
    asking.join(60)
    assert answers
    assert answers[0].complete, answers
    deployment.check_serving()


def test_a_frontends_pause_holds_for_all_until_it_resumes(deployment):
    alpha, beta = deployment.frontends
    prompt = deployment.models.prompts[0]
    answers = []
    asking = threading.Thread(target=lambda: answers.append(beta.ask(prompt)))
    path = "/pause?mode=wait&clear_cache=false"
    status, text = http_post(alpha.http_port, path, {}, 60)
    assert status == 200, text
    try:
        assert deployment.sidecar.status()["controller"]["paused"] is True
        # An update is possible meanwhile, and does not end the pause.
        deployment.update(1)
        assert deployment.sidecar.status()["controller"]["paused"] is True
        asking.start()
        deployment.sidecar.wait_status(
            "the other frontend's request waits",
            lambda s: any(e["held"] + e["waiting"] + e["in_flight"] > 0 for e in s["engines"]),
        )
        assert not answers
    finally:
        status, text = http_post(alpha.http_port, "/resume", {}, 60)
    assert status == 200, text
    asking.join(60)
    assert answers
    assert answers[0].tokens == deployment.models.expected(1, prompt, 24), answers
    deployment.check_serving(1)


def test_an_update_comes_between_the_two_wakes_of_a_frontend(deployment):
    """vLLM's engine cores and executors. Its workers for CPUs keep the memory (`cpu_worker.py`)."""
    alpha, beta = deployment.frontends
    prompt, new = deployment.models.prompts[0], 1 - deployment.seed
    answers = []
    asking = threading.Thread(target=lambda: answers.append(beta.ask(prompt)))

    def post(path: str) -> tuple[int, str]:
        return http_post(alpha.http_port, path, {}, 60)

    status, text = post("/sleep?level=2")
    assert status == 200, text
    asking.start()
    held = deployment.sidecar.wait_status(
        "the request is held", lambda s: any(engine["held"] for engine in s["engines"])
    )
    assert held["weights"]["version"] == "unknown"
    refused = deployment.sidecar.update(deployment.models.path(new))
    assert refused.returncode == 10
    assert "sleep: wake them up first" in refused.stdout + refused.stderr
    assert post("/wake_up")[0] != 200
    assert post("/resume")[0] != 200
    status, text = post("/wake_up?tags=weights")
    assert status == 200, text
    assert json.loads(text)["status"] == "sleeping"
    deployment.update(new)
    assert not answers
    status, text = post("/wake_up?tags=kv_cache")
    assert status == 200, text
    assert json.loads(text)["status"] == "awake"
    asking.join(60)
    assert answers
    assert answers[0].tokens == deployment.models.expected(new, prompt, 24), answers
    deployment.check_serving(new)


def test_a_frontend_cannot_undo_the_operators_pause(deployment):
    _, beta = deployment.frontends
    deployment.sidecar.ok("pause", "--mode", "wait")
    try:
        status, text = http_post(beta.http_port, "/resume", {}, 60)
        assert status != 200, text
        assert deployment.sidecar.status()["controller"]["paused"] is True
    finally:
        deployment.sidecar.ok("resume")
    deployment.check_serving()


def test_an_engine_killed_under_load_is_reported_and_comes_back_at_the_current_weights(deployment):
    deployment.update(1)
    before = deployment.sidecar.engines()
    victim = deployment.engine_core_pids()[1]
    restarts = deployment.restarts()
    with Load(deployment.frontends, deployment.models.prompts, COUNT) as load:
        load.wait_answers(6)
        for pid in reversed(victim):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        deployment.sidecar.wait_status(
            "the death is reported",
            lambda status: status["engines"][1]["state"] != "admitted",
            limit=10,
        )
        if deployment.kind == "dense":
            # The other rank goes on meanwhile.
            load.wait_answers(10)
            assert deployment.sidecar.engines()[0]["pid"] == before[0]["pid"]
        deployment.sidecar.wait_serving(START_LIMIT)
        load.wait_answers(10)
    for answer in load.answers:
        # Answered, one way or the other, and never with anything mixed.
        assert answer.status is not None, f"hung or cut: {answer}"
        if answer.tokens:
            assert deployment.models.seed_of(answer.prompt, answer.tokens) == 1, answer
    assert all(frontend.healthy() for frontend in deployment.frontends)
    after = deployment.sidecar.engines()
    assert after[1]["pid"] != before[1]["pid"]
    if deployment.kind == "dense":
        assert after[0]["pid"] == before[0]["pid"]
    else:
        assert after[0]["pid"] != before[0]["pid"], "a lockstep group lives and dies together"
    assert deployment.restarts() > restarts
    assert deployment.weight_versions() == {"v1"}
    deployment.check_serving(1)
