"""Models by their name in the hub, with an empty cache."""

from __future__ import annotations

import subprocess

import pytest
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS
from harness import World
from hub import hub_of
from models import Models

NAME = "somebody/tiny"


@pytest.mark.parametrize(
    ("kind", "says"), [("dense", "dense (independent ranks)"), ("moe", "moe (lockstep ranks)")]
)
def test_the_kind_of_a_model_is_known_before_vllm_is_started(world: World, kind: str, says: str):
    models = Models.read(world.models, kind)
    with hub_of(NAME, models.folder / f"{kind}-0") as hub:
        env = world.env(
            HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(world.folder / "hf")
        )
        command = [
            world.binary,
            "--dp-rank",
            "0",
            "-dp",
            "2",
            "--vllm-bin",
            world.vllm,
            "--dry-run",
        ]
        plan = subprocess.run(
            [*command, "--", NAME], env=env, capture_output=True, text=True, check=False
        )
        assert plan.returncode == 0, plan.stderr
        assert says in plan.stdout
        assert hub.given == ["config.json"]
        other = subprocess.run(
            [*command, "--", "somebody/else"], env=env, capture_output=True, text=True, check=False
        )
    assert other.returncode == 2
    for part in ("somebody/else", "404", "HF_TOKEN", "--model-kind"):
        assert part in other.stderr, other.stderr


@pytest.mark.full
def test_a_model_that_is_not_in_the_cache_is_fetched_served_and_updated(world: World):
    models = Models.read(world.models, "dense")
    prompt = models.prompts[0]
    with hub_of(NAME, models.folder / "dense-0") as hub:
        more = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(world.folder / "hf"),
        }
        frontend = world.frontend("alpha", NAME, env=world.env(**more))
        sidecar = world.sidecar(
            "sidecar",
            [f"--frontend={frontend.handshake}"],
            [NAME, *MODEL_FLAGS, *IN_PROCESS_WORKER],
            env=world.in_process(**more),
        )
        sidecar.wait_serving()
        sidecar.wait_attached(frontend)
        frontend.wait_ready()
        assert "model.safetensors" in hub.given
    for seed in (0, 1):
        if seed:
            done = sidecar.update(models.path(seed), "--version", "one")
            assert done.returncode == 0, done.stdout + done.stderr + sidecar.tail()
        for rank in range(2):
            answer = frontend.ask(prompt, 24, rank=rank)
            assert answer.tokens == models.expected(seed, prompt, 24), answer
    # Back to what came from the hub, which is not there any more.
    snapshot = next((world.folder / "hf").glob("hub/models--somebody--tiny/snapshots/*"))
    done = sidecar.update(str(snapshot), "--version", "zero")
    assert done.returncode == 0, done.stdout + done.stderr + sidecar.tail()
    assert frontend.ask(prompt).tokens == models.expected(0, prompt, 24)
    assert sidecar.terminate(limit=60) == 0
