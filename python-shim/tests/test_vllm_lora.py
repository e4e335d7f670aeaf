"""Adapters through the shim in a real vLLM engine, against Hugging Face's tokens.

Needs the environment of scripts/vllm_env.py and its overlay on PYTHONPATH.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from test_vllm import models, request_for, started

from dp_sidecar_shim import PROTOCOL
from dp_sidecar_shim.adapters import SCHEME
from dp_sidecar_shim.checkpoint import Checkpoint, Consumption, tensors

__all__ = ["models"]

NUMBER = 1 << 30
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    # Room for one adapter only, so that each one throws the other out.
    flags = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_cpu_loras": 1}
    order = tmp_path_factory.mktemp("order") / "fail"
    yield from started("dense", models, order, **flags, enable_prefix_caching=True)


class Adapters:
    """Adapters of the engine, and what it answers with them."""

    def __init__(self, engine, models: Path) -> None:
        self.engine = engine
        self.models = models
        expected = json.loads((models / "prompts.json").read_text())["lora"]
        self.prompts = expected["prompts"][:4]
        self.expected = {name: paths[:4] for name, paths in expected["tokens"].items()}

    def call(self, op: str, directory: str | Path = "", **changes) -> dict:
        request = {"protocol": PROTOCOL, "update_id": "u1", "op": op}
        request.update(name="style", id=NUMBER)
        if directory:
            path = self.models / directory
            account = Consumption("blake3")
            with Checkpoint(str(path), [FILE]) as checkpoint:
                for _ in tensors(checkpoint, account):
                    pass
            request.update(
                path=str(path),
                files=[FILE],
                tensors=account.tensors,
                bytes=account.bytes,
                digest=account.digest(),
                digest_kind="blake3",
                config=(path / "adapter_config.json").read_text(),
            )
        request.update(changes)
        [answer] = self.engine.llm.collective_rpc("dp_sidecar_lora", kwargs={"request": request})
        return answer

    def tokens(self, name: str = "", number: int = 1, path: str = "") -> list[list[int]]:
        """Greedy tokens, as a frontend would ask that knows the name under a number of its own."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self.engine.llm.reset_prefix_cache()
        asked = LoRARequest(name, number, path or SCHEME + name) if name else None
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = self.engine.llm.generate(
            self.prompts, sampling, use_tqdm=False, lora_request=asked
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def answers(self, directory: str, *args) -> bool:
        return self.tokens(*args) == self.expected[directory]


@pytest.fixture
def adapters(engine, models):
    found = Adapters(engine, models)
    assert engine.load(0)["ok"]
    yield found
    for adapter in found.call("list")["adapters"]:
        assert found.call("remove", name=adapter["name"], update_id="end")["ok"]


def test_info_tells_the_rank_that_an_engine_takes(engine):
    [info] = engine.llm.collective_rpc("dp_sidecar_info")
    assert info["max_lora_rank"] == 8


def test_an_added_adapter_answers_under_any_number_and_the_base_is_untouched(adapters):
    assert adapters.answers("")
    answer = adapters.call("replace", "lora-1")
    assert (answer["ok"], answer["state"], answer["ids"]) == (True, "applied", [NUMBER]), answer
    assert answer["digest"]
    # Under the number of the sidecar, under those of two frontends, back and forth through a
    # cache with room for one.
    for number in (NUMBER, 1, 7, 1):
        assert adapters.answers("lora-1", "style", number)
        assert adapters.answers("")


def test_a_replaced_adapter_answers_at_once_and_can_be_taken_back(adapters):
    assert adapters.call("replace", "lora-1")["ok"]
    assert adapters.answers("lora-1", "style", 3)
    answer = adapters.call("replace", "lora-2", update_id="u2")
    assert answer["ok"], answer
    assert adapters.answers("lora-2", "style", 3)
    assert adapters.call("undo", update_id="u2")["ok"]
    assert adapters.answers("lora-1", "style", 3)


def test_an_adapter_that_a_frontend_loaded_itself_is_taken_over(adapters, models):
    own = str(models / "lora-1")
    assert adapters.answers("lora-1", "style", 1, own)
    assert adapters.call("replace", "lora-2")["ids"] == [1]
    assert adapters.answers("lora-2", "style", 1, own)
    assert adapters.call("remove", update_id="u2")["ids"] == []
    assert adapters.answers("lora-1", "style", 1, own)


def test_adapters_of_two_names_do_not_mix(adapters):
    assert adapters.call("replace", "lora-1")["ok"]
    assert adapters.call("replace", "lora-2", name="other", id=NUMBER + 1)["ok"]
    for name, directory in (("style", "lora-1"), ("other", "lora-2")) * 2:
        assert adapters.answers(directory, name, {"style": 1, "other": 2}[name])
    names = [adapter["name"] for adapter in adapters.call("list")["adapters"]]
    assert names == ["style", "other"]


def test_a_request_for_a_removed_adapter_does_not_end_the_engine(adapters):
    assert adapters.call("replace", "lora-1")["ok"]
    assert adapters.call("remove", update_id="u2")["ok"]
    assert adapters.answers("lora-1", "style", 4)
    assert adapters.answers("")


def test_adapters_survive_new_base_weights_and_the_loss_of_their_files(
    adapters, engine, models, tmp_path
):
    shutil.copytree(models / "lora-1", tmp_path / "adapter")
    assert adapters.call("replace", tmp_path / "adapter")["ok"]
    shutil.rmtree(tmp_path / "adapter")
    assert engine.load(1)["ok"]
    with_new_base = adapters.tokens("style", 2)
    assert with_new_base != adapters.tokens()
    # The same as vLLM gives when it reads the adapter itself.
    assert with_new_base == adapters.tokens("own", 9, str(models / "lora-1"))
    assert engine.load(0)["ok"]
    assert adapters.answers("lora-1", "style", 2)


@pytest.mark.parametrize("kind", ["rank", "module", "digest"])
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes(
    adapters, models, tmp_path, kind
):
    from safetensors.torch import load_file, save_file

    assert adapters.call("replace", "lora-1")["ok"]
    bad = tmp_path / "bad"
    shutil.copytree(models / "lora-2", bad)
    content = load_file(bad / FILE)
    changes = {"update_id": "u2"}
    if kind == "rank":
        config = json.loads((bad / "adapter_config.json").read_text())
        changes["config"] = json.dumps({**config, "r": 64})
    elif kind == "module":
        for half in "AB":
            name = f"base_model.model.model.layers.0.mlp.%s.lora_{half}.weight"
            content[name % "nonsense"] = content[name % "up_proj"].clone()
    else:
        changes["digest"] = "0" * 64
    save_file(content, bad / FILE)
    answer = adapters.call("replace", bad, **changes)
    assert (answer["ok"], answer["state"]) == (False, "unchanged"), answer
    assert answer["error_kind"] == ("mismatch" if kind == "digest" else "load"), answer
    assert adapters.answers("lora-1", "style", 1)
    assert adapters.answers("")


def test_an_engine_without_lora_says_so(models, tmp_path):
    for engine in started("dense", models, tmp_path / "fail"):
        answer = Adapters(engine, models).call("check", "lora-1")
        assert (answer["state"], answer["error_kind"]) == ("unchanged", "disabled")
        [info] = engine.llm.collective_rpc("dp_sidecar_info")
        assert info["max_lora_rank"] is None
        assert request_for(models / "dense-0")["tensors"] > 0
