"""LoRA adapters in real engines behind unmodified frontends: two dense DP ranks.

The engines are told through a frontend's `/collective_rpc`, which reaches all ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import new_world
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS, Frontend, complete, http_post
from models import Models
from processes import STEP_LIMIT

FLAGS = ["--enable-lora", "--max-lora-rank", "8"]
FILE = "adapter_model.safetensors"
COUNT = 12


def told(frontend: Frontend, op: str, folder: Path | None = None, **changes) -> None:
    """Send a request to the workers of all engines. vLLM hands back the first engine's answers."""
    request = {"protocol": 6, "update_id": op, "op": op, "name": "style", "id": 1 << 30}
    if folder is not None:
        raw = (folder / FILE).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        lengths = [
            item["data_offsets"][1] - item["data_offsets"][0]
            for name, item in header.items()
            if name != "__metadata__"
        ]
        request.update(path=str(folder), tensors=len(lengths), bytes=sum(lengths))
        config = (folder / "adapter_config.json").read_text()
        request.update(files=[FILE], digest_kind="none", config=config)
    body = {"method": "dp_sidecar_lora", "kwargs": {"request": {**request, **changes}}}
    status, text = http_post(frontend.http_port, "/collective_rpc", body, STEP_LIMIT)
    assert status == 200, text
    [answer] = json.loads(text)["results"]
    assert answer["ok"], answer


def cut_short(source: Path, target: Path) -> Path:
    """A copy of an adapter in which one matrix has half of its rows."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    content = load_file(target / FILE)
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
    content[name] = content[name][: len(content[name]) // 2].clone()
    save_file(content, target / FILE)
    return target


@pytest.fixture(scope="module")
def adapters(tiny_models):
    return json.loads((tiny_models / "prompts.json").read_text())["lora"]


def check(frontend: Frontend, adapters: dict, name: str, expected: str) -> None:
    """The frontend answers with this adapter's tokens, on both ranks."""
    model = name or frontend.model
    pairs = list(zip(adapters["prompts"], adapters["tokens"][expected], strict=True))
    for prompt, tokens in pairs[:3]:
        for rank in ("0", "1"):
            header = {"X-data-parallel-rank": rank}
            port = frontend.http_port
            answer = complete(port, model, prompt, COUNT, STEP_LIMIT, headers=header)
            assert answer.complete, answer
            assert answer.tokens == tokens, f"rank {rank}, not {expected or 'the base'}: {answer}"


def test_adapters_reach_every_rank_and_every_frontend_by_name(
    ingredients, tmp_path_factory, adapters
):
    with new_world(ingredients, tmp_path_factory.mktemp("lora")) as world:
        models = Models.read(world.models, "dense")
        flags = [*MODEL_FLAGS, *FLAGS]
        runtime = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        # The shim is in its environment, so it may ask for any name.
        alpha = world.frontend("alpha", models.path(0), env=world.env(**runtime), flags=flags)
        sidecar = world.sidecar(
            "sidecar",
            [f"--frontend={alpha.handshake}"],
            [models.path(0), *flags, *IN_PROCESS_WORKER],
        )
        # Two frontends without the shim, which know the names from their command lines alone. They
        # start while the engines do, and are attached later.
        plain = world.env(VLLM_PLUGINS="")
        modules = ["--lora-modules", "other=dp-sidecar:other", "style=dp-sidecar:style"]
        beta = world.frontend("beta", models.path(0), env=plain, flags=[*flags, *modules])
        modules = ["--lora-modules", "style=dp-sidecar:style"]
        late = world.frontend("gamma", models.path(0), env=plain, flags=[*flags, *modules])
        sidecar.wait_serving()
        sidecar.wait_attached(alpha)
        alpha.wait_ready()
        check(alpha, adapters, "", "")
        unknown = complete(alpha.http_port, "style", "a a red", COUNT, STEP_LIMIT)
        assert unknown.status in (400, 404), unknown

        told(alpha, "replace", world.models / "lora-1", update_id="first")
        check(alpha, adapters, "style", "lora-1")
        check(alpha, adapters, "", "")

        # Under another number.
        told(
            alpha, "replace", world.models / "lora-2", name="other", update_id="o", id=(1 << 30) + 1
        )
        sidecar.ok("frontend", "add", beta.handshake)
        sidecar.wait_attached(beta)
        beta.wait_ready()
        check(beta, adapters, "style", "lora-1")
        check(beta, adapters, "other", "lora-2")

        # The engines would take half a matrix without an error. The sidecar does not.
        bad = cut_short(world.models / "lora-2", tmp_path_factory.mktemp("bad") / "adapter")
        refused = sidecar.cli("update", "--lora", f"style={bad}")
        assert refused.returncode != 0
        said = refused.stdout + refused.stderr
        assert "128 x 128 in the model, 64 x 128 in the adapter" in said, said
        check(alpha, adapters, "style", "lora-1")

        told(alpha, "replace", world.models / "lora-2")
        for frontend in (alpha, beta):
            check(frontend, adapters, "style", "lora-2")

        # New base weights, and the old ones again: the adapters are still there.
        for seed in (1, 0):
            done = sidecar.update(models.path(seed), "--version", f"v{seed}")
            assert done.returncode == 0, done.stdout + done.stderr
        for frontend in (alpha, beta):
            check(frontend, adapters, "style", "lora-2")
            check(frontend, adapters, "", "")

        told(alpha, "undo", update_id="replace")
        for frontend in (alpha, beta):
            check(frontend, adapters, "style", "lora-1")
        told(alpha, "remove")
        # The frontends are not told, and the engines live on.
        for frontend in (alpha, beta):
            check(frontend, adapters, "style", "lora-1")
        assert late.child.poll() is None, late.tail()
        sidecar.ok("frontend", "add", late.handshake)
        assert late.child.wait(STEP_LIMIT * 3) != 0, "it started with a removed adapter"
        check(alpha, adapters, "", "")
        assert all(engine["restarts"] == 0 for engine in sidecar.engines())
