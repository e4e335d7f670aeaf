"""Loads through the shim in real vLLM engines: interrupted, cleaned up, repeated.

Needs the environment of scripts/vllm_env.py and its overlay on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from dp_sidecar_shim import PROTOCOL, worker
from dp_sidecar_shim.checkpoint import Checkpoint, Consumption, tensors

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def models() -> Path:
    script = REPO / "scripts" / "make_tiny_models.py"
    return Path(subprocess.check_output([sys.executable, script], text=True).strip())


def request_for(directory: Path, **changes) -> dict:
    account = Consumption("blake3")
    with Checkpoint(str(directory), ["model.safetensors"]) as checkpoint:
        for _ in tensors(checkpoint, account):
            pass
    request = {
        "protocol": PROTOCOL,
        "update_id": "test",
        "path": str(directory),
        "files": ["model.safetensors"],
        "tensors": account.tensors,
        "bytes": account.bytes,
        "digest": account.digest(),
        "digest_kind": "blake3",
    }
    return {**request, **changes}


class Engine:
    """An engine with the shim, and a file that tells it to fail."""

    def __init__(self, kind: str, models: Path, order: Path, **flags) -> None:
        from vllm import LLM, SamplingParams

        self.kind = kind
        self.models = models
        self.order = order
        prompts = json.loads((models / "prompts.json").read_text())[kind]
        self.prompts = prompts["prompts"][:4]
        self.expected = prompts["tokens"]
        self.sampling = SamplingParams(
            temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0
        )
        self.llm = LLM(
            str(models / f"{kind}-0"),
            max_model_len=256,
            enforce_eager=True,
            max_num_seqs=8,
            dtype="bfloat16",
            gpu_memory_utilization=0.1,
            **{
                "enable_prefix_caching": False,
                "distributed_executor_backend": "uni",
                **flags,
            },
        )

    def load(self, seed: int, **changes) -> dict:
        request = request_for(self.models / f"{self.kind}-{seed}", **changes)
        [answer] = self.llm.collective_rpc("dp_sidecar_load", kwargs={"request": request})
        return answer

    def probe(self):
        """Greedy tokens, and the log probabilities of the prompts: any wrong layer shows there."""
        outputs = self.llm.generate(self.prompts, self.sampling, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        values = [
            [next(iter(position.values())).logprob for position in output.prompt_logprobs[1:]]
            for output in outputs
        ]
        return tokens, values

    def fail(self, text: str) -> None:
        self.order.write_text(text)


def started(kind: str, models: Path, order: Path, **flags):
    """An engine until the caller is done with it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    patch.setenv("DP_SIDECAR_TEST_FAIL_LOAD", str(order))
    engine = Engine(kind, models, order, **flags)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()
    patch.undo()


@pytest.fixture(scope="module", params=["dense", "moe"])
def engine(request, models, tmp_path_factory):
    yield from started(request.param, models, tmp_path_factory.mktemp("order") / "fail")


@pytest.fixture(scope="module")
def references(engine):
    """What each seed answers after a clean load, checked against Hugging Face's tokens."""
    first = engine.probe()
    found = {}
    for seed in (1, 2, 0):
        assert engine.load(seed)["ok"]
        found[seed] = engine.probe()
    assert found[0] == first, "a load of the same weights changed the answers"
    for seed, (tokens, _) in found.items():
        expected = engine.expected[str(seed)]
        assert tokens == [path[:12] for path in expected[: len(tokens)]]
    assert len({tokens[0][0] for tokens, _ in found.values()}) == 3
    return found


def test_vllms_own_loader_names_the_files_that_count(engine, tmp_path):
    def files(*names: str, index: dict[str, str] | None = None) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        if index is not None:
            text = json.dumps({"weight_map": index})
            (folder / "model.safetensors.index.json").write_text(text)
        [found] = engine.llm.collective_rpc("dp_sidecar_info", kwargs={"path": str(folder)})
        return found["files"] if found["ok"] else [found["error"].split(":")[0]]

    both = ("consolidated.safetensors", "model-1.safetensors")
    assert files(*both) == ["consolidated.safetensors"]
    assert files("b.safetensors", "a.safetensors", "c.bin") == ["a.safetensors", "b.safetensors"]
    assert files("a.safetensors", "b.safetensors", index={"x": "a.safetensors"}) == [
        "a.safetensors"
    ]
    assert files("pytorch_model.bin", "training_args.bin") == ["pytorch_model.bin"]
    assert files("a.safetensors", index={"x": "b.safetensors"}) == ["FileNotFoundError"]
    assert files("README.md") == ["RuntimeError"]
    [gone] = engine.llm.collective_rpc("dp_sidecar_info", kwargs={"path": "/no/such"})
    assert (gone["ok"], gone["error"].split(":")[0]) == (False, "FileNotFoundError")


def test_a_model_by_its_hub_name_is_found_without_files_that_vllm_does_not_fetch(tmp_path):
    tree_cache = pytest.importorskip("huggingface_hub._tree_cache")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    there = ("config.json", "model.safetensors")
    for name in there:
        (snapshot / name).touch()
    entry = tree_cache.TreeCacheEntry(size=0, blob_id="e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    listing = dict.fromkeys((*there, "benchmark.png", "original/x.safetensors"), entry)
    tree_cache.write_tree_cache(str(repository), commit, listing)
    assert tree_cache.read_tree_cache(str(repository), commit) is not None
    model = types.SimpleNamespace(model="org/name", revision=None)
    load = types.SimpleNamespace(download_dir=str(tmp_path))
    assert worker.local_directory(model, load) == str(snapshot)


def test_info_says_who_the_worker_is(engine):
    [info] = engine.llm.collective_rpc("dp_sidecar_info")
    assert info["ok"], info
    assert (info["load_format"], info["files"]) == ("auto", ["model.safetensors"])
    assert info["model_path"] == os.path.realpath(engine.models / f"{engine.kind}-0")
    assert (info["dp_rank"], info["rank"]) == (0, 0)
    assert info["vllm_version"].startswith("0.")
    assert info["protocol"] == PROTOCOL
    assert info["ignored"] == []
    assert (info["draft"], info["kv_connectors"]) == (None, [])
    # Some modules of one model have two names.
    assert all(copy.split(".")[-2:] == of.split(".")[-2:] for copy, of in info["tied"])


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        ([], []),
        (["OffloadingConnector"], []),
        (["ExampleConnector"], ["ExampleConnector"]),
        (["OffloadingConnector", "ExampleConnector"], ["ExampleConnector"]),
    ],
)
def test_kv_connectors_that_cannot_drop_their_blocks_are_named(kinds, kept, monkeypatch):
    """vLLM's own classes; several are parts of a `MultiConnector`, which answers for all."""
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    def made(name: str):
        kind = KVConnectorFactory.get_connector_class_by_name(name)
        return object.__new__(kind)

    parts = [made(name) for name in kinds]
    connector = parts[0] if len(parts) == 1 else None
    if len(parts) > 1:
        connector = made("MultiConnector")
        connector._connectors = parts
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", connector)
    assert worker.connectors_that_keep() == kept


def test_a_load_takes_over_exactly_the_new_weights(engine, references):
    answer = engine.load(1)
    expected = request_for(engine.models / f"{engine.kind}-1")
    assert (answer["ok"], answer["state"], answer["error"]) == (True, "loaded", None)
    for key in ("tensors", "bytes", "digest", "digest_kind"):
        assert answer[key] == expected[key]
    assert engine.probe() == references[1]
    [info] = engine.llm.collective_rpc("dp_sidecar_info")
    assert info["model_path"].endswith(f"{engine.kind}-0"), "the configured model changed"


def test_loads_interrupted_anywhere_are_cleaned_up_and_repeatable(engine, references):
    total = request_for(engine.models / f"{engine.kind}-1")["tensors"]
    seed = 0
    for point in range(total + 1):
        engine.fail(f"after={point}")
        answer = engine.load(1 - seed)
        engine.order.unlink()
        assert (answer["ok"], answer["error_kind"]) == (False, "injected"), answer
        assert answer["state"] == "restored-meta", answer
        assert answer["tensors"] == point + (point < total)
        # Alternately onward and back, so that a layer that kept its old content shows.
        seed = 1 - seed if point % 2 else seed
        again = engine.load(seed)
        assert again["ok"], (point, again)
        if point % 5 == 0 or point == total:
            assert engine.probe() == references[seed], f"wrong answers after failure at {point}"


@pytest.mark.parametrize(
    ("changes", "state", "kind"),
    [
        ({"digest": "0" * 64}, "restored-meta", "mismatch"),
        ({"tensors": 1}, "unchanged", "mismatch"),
        ({"bytes": 1}, "unchanged", "mismatch"),
        ({"files": ["gone.safetensors"]}, "unchanged", "files"),
        ({"protocol": 99}, "unchanged", "protocol"),
    ],
)
def test_a_load_that_must_not_count_says_what_the_worker_holds(
    engine, references, changes, state, kind
):
    assert engine.load(0)["ok"]
    answer = engine.load(1, **changes)
    assert (answer["ok"], answer["state"], answer["error_kind"]) == (False, state, kind), answer
    if state == "unchanged":
        assert engine.probe() == references[0]
    assert engine.load(0)["ok"]
    assert engine.probe() == references[0]


def test_a_load_without_digest_counts_only(engine, references):
    answer = engine.load(2, digest=None, digest_kind="none")
    assert (answer["ok"], answer["digest"], answer["digest_kind"]) == (True, None, "none")
    assert engine.probe() == references[2]


@pytest.fixture
def segment(engine, tmp_path):
    """Both seeds of a model in one segment, and where each lies."""
    content, extents = b"\xff" * 4096, []
    for seed in (1, 2):
        raw = (engine.models / f"{engine.kind}-{seed}" / "model.safetensors").read_bytes()
        extents.append([len(content), len(raw)])
        content += raw + b"\xff" * (-len(raw) % 4096)
    path = tmp_path / "segment"
    path.write_bytes(content)
    return path, extents


def from_segment(engine, segment, seed: int, **changes) -> dict:
    path, extents = segment
    here = {"path": str(path), "extents": [extents[seed - 1]], "digest_kind": "none"}
    return engine.load(seed, **{**here, **changes})


def mapped(path: Path) -> bool:
    """Whether any process has the file mapped; the engine may be one of its own."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(path) in maps.read_text():
                return True
        except OSError:
            continue
    return False


def test_a_load_from_a_segment_gives_the_same_answers_and_leaves_no_map(
    engine, references, segment
):
    path, _ = segment
    before = path.read_bytes()
    for seed, changes in ((1, {}), (2, {"digest_kind": "blake3"}), (1, {})):
        answer = from_segment(engine, segment, seed, **changes)
        assert (answer["ok"], answer["state"]) == (True, "loaded"), answer
        assert not mapped(path)
        assert engine.probe() == references[seed]
    # The model owns what it computes with: the segment is filled anew while it serves.
    path.write_bytes(b"\0" * len(before))
    assert engine.probe() == references[1]


def test_loads_from_a_segment_that_are_interrupted_leave_no_map(engine, references, segment):
    path, _ = segment
    for point in (0, 1, 5, 13):
        engine.fail(f"after={point}")
        answer = from_segment(engine, segment, 1)
        engine.order.unlink()
        assert (answer["state"], answer["error_kind"]) == ("restored-meta", "injected"), answer
        assert not mapped(path)
        assert from_segment(engine, segment, 2)["ok"]
        assert engine.probe() == references[2]


def test_a_checkpoint_in_another_float_type_is_cast(engine, references, tmp_path):
    from safetensors.torch import load_file, save_file

    content = load_file(engine.models / f"{engine.kind}-1" / "model.safetensors")
    content = {name: tensor.float() for name, tensor in content.items()}
    save_file(content, tmp_path / "model.safetensors")
    request = request_for(tmp_path)
    [answer] = engine.llm.collective_rpc("dp_sidecar_load", kwargs={"request": request})
    assert (answer["ok"], answer["bytes"]) == (True, request["bytes"]), answer
    assert engine.probe() == references[1]


def test_tensors_are_loaded_under_other_names(engine, references, tmp_path):
    from safetensors.torch import load_file, save_file

    content = load_file(engine.models / f"{engine.kind}-1" / "model.safetensors")
    content = {name.replace("model.", "policy.body.", 1): content[name] for name in content}
    save_file(content, tmp_path / "model.safetensors")
    request = request_for(tmp_path, rename=[["policy.body.", "model."]])
    [answer] = engine.llm.collective_rpc("dp_sidecar_load", kwargs={"request": request})
    assert (answer["ok"], answer["digest"]) == (True, request["digest"]), answer
    assert engine.probe() == references[1]
    both = [["policy.body.norm.", "same."], ["policy.body.layers.0.input_layernorm.", "same."]]
    request = request_for(tmp_path, rename=both)
    [answer] = engine.llm.collective_rpc("dp_sidecar_load", kwargs={"request": request})
    assert (answer["state"], answer["error_kind"]) == ("unchanged", "files"), answer


def test_vllms_loader_says_which_names_it_passes_over_and_the_engine_does_not_notice(
    engine, references
):
    from safetensors.torch import load_file

    def ignored(*tensors: list) -> list[str]:
        [info] = engine.llm.collective_rpc("dp_sidecar_info", kwargs={"tensors": list(tensors)})
        assert info["ok"], info
        return info["ignored"]

    assert engine.load(1)["ok"]
    content = load_file(engine.models / f"{engine.kind}-1" / "model.safetensors")
    rotary = ["model.layers.0.self_attn.rotary_emb.inv_freq", "F32", [16]]
    assert ignored(rotary) == [rotary[0]]
    for name, tensor in content.items():
        assert ignored(rotary, [name, "BF16", list(tensor.shape)]) == [rotary[0]], name
    assert ignored(["mtp.fc.weight", "BF16", [4]]) == [], "this model has no such layers"
    assert ignored([rotary[0], "no type", [16]]) == []
    assert ignored() == []
    assert engine.probe() == references[1]
    assert engine.load(2)["ok"]
    assert engine.probe() == references[2]


def test_a_checkpoint_of_wrong_shapes_fails_and_leaves_a_loadable_model(
    engine, references, tmp_path
):
    import torch
    from safetensors.torch import load_file, save_file

    content = load_file(engine.models / f"{engine.kind}-1" / "model.safetensors")
    name = "model.layers.1.post_attention_layernorm.weight"
    content[name] = torch.ones(64, dtype=torch.bfloat16)
    save_file(content, tmp_path / "model.safetensors")
    request = request_for(tmp_path)
    [answer] = engine.llm.collective_rpc("dp_sidecar_load", kwargs={"request": request})
    assert (answer["ok"], answer["state"]) == (False, "restored-meta"), answer
    assert engine.load(1)["ok"]
    assert engine.probe() == references[1]


def write_tied(models: Path, where: Path, seed: int, copy: bool) -> None:
    """A model whose head is its embedding."""
    from safetensors.torch import load_file, save_file

    source = models / f"dense-{seed}"
    shutil.copytree(source, where)
    content = load_file(source / "model.safetensors")
    content["model.embed_tokens.weight"] = content["lm_head.weight"].clone()
    if not copy:
        del content["lm_head.weight"]
    save_file(content, where / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


class Packs:
    """A quantization method that packs; the layers that it packed."""

    def __init__(self) -> None:
        self.packed: list[object] = []

    def process_weights_after_loading(self, layer: object) -> None:
        self.packed.append(layer)


def test_a_tied_head_is_packed_once_in_a_load_whatever_the_processor():
    """Which processors have packed copies is vLLM's choice; the test with an engine needs one."""
    import torch

    from dp_sidecar_shim import reload

    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 2), "free": torch.nn.Linear(2, 4)})
    model["head"] = torch.nn.Linear(2, 4, bias=False)
    model["head"].weight = model["embed"].weight
    for layer in model.values():
        layer.quant_method, layer.cpu_linear = Packs(), object()
    worker, method = types.SimpleNamespace(get_model=lambda: model), model["head"].quant_method
    with reload._packing(worker):
        pass
    assert method.packed == [model["head"]]
    with reload._packing(worker):
        method.process_weights_after_loading(model["head"])
    assert method.packed == [model["head"]] * 2, "vLLM has done it"
    with pytest.raises(ZeroDivisionError), reload._packing(worker):
        raise ZeroDivisionError
    assert len(method.packed) == 2
    assert vars(method).keys() == {"packed"}, "it is watched no more"
    assert model["free"].quant_method.packed == [], "what is not tied is vLLM's"


@pytest.mark.parametrize("copy", [False, True])
def test_a_tied_head_is_loaded_whether_the_checkpoint_has_a_copy_or_not(models, tmp_path, copy):
    for name, seed, with_copy in (("0", 0, copy), ("1", 1, False), ("2", 1, True)):
        write_tied(models, tmp_path / f"dense-{name}", seed, with_copy)
    shutil.copy(models / "prompts.json", tmp_path)
    for engine in started("dense", tmp_path, tmp_path / "fail"):
        [info] = engine.llm.collective_rpc("dp_sidecar_info")
        assert info["tied"] == [["lm_head.weight", "model.embed_tokens.weight"]]
        at_start = engine.probe()
        assert engine.load(1)["ok"]
        without_copy = engine.probe()
        assert without_copy != at_start
        assert engine.load(2)["ok"]
        assert engine.probe() == without_copy
        assert engine.load(0)["ok"]
        assert engine.probe() == at_start


@pytest.fixture
def two_workers(models, tmp_path):
    yield from started(
        "dense",
        models,
        tmp_path / "fail",
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )


def test_every_worker_of_an_engine_answers_for_itself(two_workers):
    engine = two_workers
    infos = engine.llm.collective_rpc("dp_sidecar_info")
    assert [info["rank"] for info in infos] == [0, 1]
    tokens = {seed: paths[:4] for seed, paths in engine.expected.items()}

    def load(seed: int) -> list[dict]:
        request = request_for(engine.models / f"dense-{seed}")
        return engine.llm.collective_rpc("dp_sidecar_load", kwargs={"request": request})

    for seed in (1, 0):
        answers = load(seed)
        assert [answer["rank"] for answer in answers] == [0, 1]
        assert all(answer["ok"] for answer in answers), answers
        assert len({answer["digest"] for answer in answers}) == 1
        assert engine.probe()[0] == [path[:12] for path in tokens[str(seed)]]
    engine.fail("after=7")
    assert {answer["state"] for answer in load(1)} == {"restored-meta"}
    engine.order.unlink()
    assert all(answer["ok"] for answer in load(2))
    assert engine.probe()[0] == [path[:12] for path in tokens["2"]]
