"""What importing and registering does, without vLLM."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from dp_sidecar_shim import PROTOCOL, attach, register, worker


def test_importing_and_registering_imports_neither_torch_nor_vllm():
    code = (
        "import sys, dp_sidecar_shim; dp_sidecar_shim.register(); "
        "found = {'torch', 'vllm', 'blake3', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_runs_inside_vllm_stays_small():
    """Every line counts that is neither blank nor a comment, docstrings too."""
    sources = Path(__file__).parents[1].glob("src/**/*.py")
    lines = [line.strip() for source in sources for line in source.read_text().splitlines()]
    count = sum(1 for line in lines if line and not line.startswith("#"))
    assert 500 < count <= 900


def test_vllm_finds_the_entry_point():
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "dp_sidecar"]
    assert [e.value for e in found] == ["dp_sidecar_shim:register"]


@pytest.fixture
def worker_module(monkeypatch, tmp_path):
    """A stand-in for vLLM's worker module, importable and not yet imported."""
    for package in ("fakevllm", "fakevllm/v1"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "fakevllm/v1/worker_base.py").write_text("class WorkerBase: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(attach, "WORKER_MODULE", "fakevllm.v1.worker_base")
    others = [f for f in sys.meta_path if not isinstance(f, attach._WaitForModules)]
    monkeypatch.setattr(sys, "meta_path", others)
    yield "fakevllm.v1.worker_base"
    for name in [name for name in sys.modules if name.startswith("fakevllm")]:
        del sys.modules[name]


def waited_for() -> set[str]:
    waiting = [f for f in sys.meta_path if isinstance(f, attach._WaitForModules)]
    assert len(waiting) <= 1
    return waiting[0].names if waiting else set()


def test_a_worker_class_that_is_imported_later_gets_the_methods(worker_module):
    register()
    register()
    assert worker_module in waited_for()
    assert worker_module not in sys.modules
    module = __import__(worker_module, fromlist=["WorkerBase"])
    assert module.WorkerBase.dp_sidecar_load is attach.dp_sidecar_load
    assert module.WorkerBase.dp_sidecar_info is attach.dp_sidecar_info
    assert module.WorkerBase.dp_sidecar_lora is attach.dp_sidecar_lora
    assert worker_module not in waited_for()


def test_a_worker_class_that_is_there_gets_the_methods_at_once(worker_module):
    module = __import__(worker_module, fromlist=["WorkerBase"])
    register()
    register()
    assert module.WorkerBase.dp_sidecar_load is attach.dp_sidecar_load
    assert worker_module not in waited_for()


def test_a_fault_in_attaching_does_not_keep_vllm_from_importing(worker_module, monkeypatch):
    register()
    monkeypatch.setattr(attach, "_give_methods", lambda module: 1 / 0)
    assert __import__(worker_module, fromlist=["WorkerBase"]).WorkerBase


def test_waiting_ends_when_everything_was_imported(worker_module, monkeypatch):
    monkeypatch.setattr(attach, "_attachments", lambda: {worker_module: ("WorkerBase", id)})
    register()
    assert waited_for() == {worker_module}
    __import__(worker_module)
    assert waited_for() == set()


def test_registering_never_raises(monkeypatch):
    monkeypatch.setattr(attach, "attach", lambda: 1 / 0)
    register()


def a_worker():
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(data_parallel_index=3, world_size=2)
    )
    return types.SimpleNamespace(vllm_config=config, rank=1)


def a_request(**changes):
    request = {
        "protocol": PROTOCOL,
        "update_id": "u1",
        "path": "/nowhere",
        "files": ["model.safetensors"],
        "tensors": 1,
        "bytes": 2,
        "digest": None,
        "digest_kind": "blake3",
    }
    request.update(changes)
    return {key: value for key, value in request.items() if value is not ...}


@pytest.mark.parametrize(
    ("request_map", "kind"),
    [
        (None, "request"),
        ("text", "request"),
        (a_request(protocol=PROTOCOL + 1), "protocol"),
        (a_request(protocol=0), "protocol"),
        (a_request(protocol=True), "protocol"),
        (a_request(protocol=PROTOCOL - 1), "protocol"),
        (a_request(extents=[]), "request"),
        (a_request(extents=7), "request"),
        (a_request(extents=[[0]]), "request"),
        (a_request(extents=[[0, -1]]), "request"),
        (a_request(extents=[[0, True]]), "request"),
        (a_request(extents=[[0, 8], [8, 8]]), "request"),
        (a_request(extents=[[0, 8]]), "files"),
        (a_request(protocol=...), "protocol"),
        (a_request(path="relative"), "request"),
        (a_request(path=7), "request"),
        (a_request(files="model.safetensors"), "request"),
        (a_request(files=[1]), "request"),
        (a_request(tensors=-1), "request"),
        (a_request(bytes=True), "request"),
        (a_request(digest_kind="md5"), "request"),
        (a_request(files=["../model.safetensors"]), "files"),
        (a_request(), "files"),
    ],
)
def test_a_bad_request_is_refused_and_touches_nothing(request_map, kind):
    answer = worker.load(a_worker(), request_map)
    assert answer["ok"] is False
    assert answer["state"] == "unchanged"
    assert answer["error_kind"] == kind, answer
    assert answer["protocol"] == PROTOCOL
    assert (answer["dp_rank"], answer["rank"]) == (3, 1)


def test_info_about_a_worker_that_has_nothing_answers_instead_of_raising():
    answer = worker.info(object())
    assert answer["ok"] is False
    assert answer["error_kind"] == "internal"
