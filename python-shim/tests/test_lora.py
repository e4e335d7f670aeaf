"""Adapters by name in a stand-in for vLLM's LoRA manager: what is loaded, refused, taken back."""

from __future__ import annotations

import json
import os
import types
from collections import OrderedDict
from pathlib import Path

import pytest
from test_checkpoint import write

from dp_sidecar_shim import PROTOCOL, adapters, lora
from dp_sidecar_shim.adapters import SCHEME

torch = pytest.importorskip("torch")

TENSOR = "base_model.model.q.lora_A.weight"


def make(folder: Path, value: int, **config) -> Path:
    """An adapter whose only tensor holds `value`."""
    folder.mkdir(exist_ok=True)
    write(folder / "adapter_model.safetensors", [(TENSOR, "U8", [2], bytes([value, value]))])
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, **config}))
    return folder


class WorkerManager:
    """What the shim uses of vLLM's manager, with its least recently used cache."""

    capacity = 2

    def __init__(self):
        self.loaded: OrderedDict[int, types.SimpleNamespace] = OrderedDict()
        # Adds after which adding fails.
        self.fails_after = None

    def _load_adapter(self, request):
        from safetensors.torch import load_file

        folder = Path(request.lora_path)
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > 8:
            raise ValueError("LoRA rank is too high")
        tensor = load_file(folder / "adapter_model.safetensors")[TENSOR]
        return types.SimpleNamespace(id=request.lora_int_id, tensor=tensor)

    def add_adapter(self, request):
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise RuntimeError("no room")
        if request.lora_int_id in self.loaded:
            return False
        model = self._load_adapter(request)
        # vLLM's changes what it is given.
        model.tensor.add_(100)
        self.loaded[model.id] = model
        while len(self.loaded) > self.capacity:
            self.loaded.popitem(last=False)
        return True

    def remove_adapter(self, number):
        return self.loaded.pop(number, None) is not None

    def list_adapters(self):
        return set(self.loaded)

    def set_active_adapters(self, requests):
        for request in requests:
            self.add_adapter(request)


@pytest.fixture
def manager(monkeypatch):
    cls = type("Manager", (WorkerManager,), dict(WorkerManager.__dict__))
    for _ in range(2):
        adapters.wrap(types.SimpleNamespace(WorkerLoRAManager=cls))
    monkeypatch.setattr(lora, "lora_request", asked)
    return cls()


def asked(name: str, number: int, path: str):
    return types.SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(path))


def call(manager, what: str, folder: Path | None = None, **changes) -> dict:
    who = types.SimpleNamespace(
        rank=1,
        model_runner=types.SimpleNamespace(lora_manager=manager),
        vllm_config=types.SimpleNamespace(
            parallel_config=types.SimpleNamespace(data_parallel_index=2)
        ),
    )
    request = {"protocol": PROTOCOL, "update_id": "u1", "op": what, "name": "style", "id": 1 << 30}
    if folder is not None:
        request.update(path=str(folder), tensors=1, bytes=2, digest_kind="blake3")
        request.update(files=["adapter_model.safetensors"])
        if folder.is_dir():
            request.update(config=(folder / "adapter_config.json").read_text())
    request.update(changes)
    return lora.lora(who, request)


def values(manager) -> dict[int, int]:
    """Number -> what its adapter was made with."""
    return {number: int(model.tensor[0]) - 100 for number, model in manager.loaded.items()}


def test_an_added_adapter_is_there_under_its_own_number_and_any_frontends(manager, tmp_path):
    answer = call(manager, "replace", make(tmp_path / "a", 7))
    assert (answer["ok"], answer["state"], answer["error"]) == (True, "applied", None), answer
    assert (answer["tensors"], answer["bytes"], answer["digest_kind"]) == (1, 2, "blake3")
    assert (answer["ids"], answer["undo"]) == ([1 << 30], True)
    assert (answer["dp_rank"], answer["rank"]) == (2, 1)
    assert values(manager) == {1 << 30: 7}
    # Whatever the frontend believes about the path, and whether or not the files are still there.
    (tmp_path / "a" / "adapter_config.json").unlink()
    for number, path in ((1, SCHEME + "style"), (5, "/not/there")):
        manager.set_active_adapters([asked("style", number, path)])
        assert values(manager)[number] == 7
    [listed] = call(manager, "list")["adapters"]
    assert (listed["name"], listed["update_id"], listed["ids"]) == ("style", "u1", [1, 5])


def test_a_replaced_adapter_is_replaced_under_every_number_and_can_be_taken_back(manager, tmp_path):
    old, new = make(tmp_path / "old", 1), make(tmp_path / "new", 2)
    assert call(manager, "replace", old)["ok"]
    manager.add_adapter(asked("style", 3, "/whatever"))
    answer = call(manager, "replace", new, update_id="u2")
    assert answer["ids"] == [3, 1 << 30]
    assert values(manager) == {3: 2, 1 << 30: 2}
    # Sent again, it keeps the way back to what was there before the first time.
    assert call(manager, "replace", new, update_id="u2")["ok"]
    answer = call(manager, "undo", update_id="u2")
    assert (answer["ok"], answer["undo"]) == (True, False)
    assert values(manager) == {3: 1, 1 << 30: 1}
    assert call(manager, "undo", update_id="u2")["ok"]
    assert values(manager) == {3: 1, 1 << 30: 1}


def test_only_the_update_that_touched_a_name_last_can_take_it_back(manager, tmp_path):
    assert call(manager, "replace", make(tmp_path / "a", 1))["ok"]
    assert call(manager, "replace", make(tmp_path / "b", 2), update_id="u2")["ok"]
    for other in ("u1", "u3"):
        assert call(manager, "undo", update_id=other)["state"] == "applied"
        assert values(manager) == {1 << 30: 2}


def test_an_add_that_is_taken_back_leaves_nothing(manager, tmp_path):
    assert call(manager, "replace", make(tmp_path / "a", 1))["ok"]
    assert call(manager, "undo")["ids"] == []
    assert values(manager) == {}
    with pytest.raises(Exception, match="style"):
        manager.set_active_adapters([asked("style", 1, SCHEME + "style")])


def test_an_adapter_that_a_frontend_brought_is_taken_over_and_given_back(manager, tmp_path):
    own = make(tmp_path / "own", 9)
    manager.add_adapter(asked("style", 1, own))
    assert call(manager, "replace", make(tmp_path / "new", 2))["ids"] == [1]
    assert values(manager) == {1: 2}
    assert call(manager, "undo")["ok"]
    manager.set_active_adapters([asked("style", 1, own)])
    assert values(manager) == {1: 9}


def test_a_removed_adapter_is_unloaded_and_late_requests_do_not_end_the_engine(manager, tmp_path):
    assert call(manager, "replace", make(tmp_path / "a", 4))["ok"]
    answer = call(manager, "remove", update_id="u2")
    assert (answer["ok"], answer["ids"], answer["undo"]) == (True, [], True)
    assert values(manager) == {}
    with pytest.raises(Exception, match="style"):
        manager.add_adapter(asked("style", 1, SCHEME + "style"))
    manager.set_active_adapters([asked("style", 1, SCHEME + "style")])
    assert values(manager) == {1: 4}
    own = make(tmp_path / "own", 9)
    manager.remove_adapter(1)
    manager.set_active_adapters([asked("style", 1, own)])
    assert values(manager) == {1: 9}
    assert call(manager, "undo", update_id="u2")["ok"]
    assert values(manager) == {1: 4}
    assert call(manager, "remove", name="never seen")["ok"]


@pytest.mark.parametrize("after", [0, 1])
def test_a_change_that_fails_half_way_is_taken_back_under_every_number(manager, tmp_path, after):
    assert call(manager, "replace", make(tmp_path / "a", 1))["ok"]
    manager.add_adapter(asked("style", 3, ""))
    original = manager.add_adapter
    calls = iter(range(100))

    def add(request):
        if next(calls) == after:
            raise RuntimeError("no room")
        return original(request)

    manager.add_adapter = add
    answer = call(manager, "replace", make(tmp_path / "b", 2), update_id="u2")
    assert (answer["ok"], answer["state"], answer["error_kind"]) == (False, "unchanged", "load")
    assert "no room" in answer["error"]
    assert values(manager) == {3: 1, 1 << 30: 1}
    assert answer["undo"] is False


def test_a_way_back_that_fails_is_called_mixed(manager, tmp_path):
    assert call(manager, "replace", make(tmp_path / "a", 1))["ok"]
    manager.fails_after = 0
    answer = call(manager, "replace", make(tmp_path / "b", 2), update_id="u2")
    assert (answer["ok"], answer["state"]) == (False, "mixed")
    manager.fails_after = None
    # The engine gets the old one with the next request, and the name can be replaced again.
    manager.set_active_adapters([asked("style", 3, "")])
    assert values(manager) == {3: 1}
    assert call(manager, "replace", make(tmp_path / "b", 2), update_id="u3")["ok"]
    assert values(manager) == {3: 2}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"protocol": 1}, "protocol"),
        ({"protocol": 2}, "protocol"),
        ({"protocol": PROTOCOL + 1}, "protocol"),
        ({"op": "explode"}, "request"),
        ({"op": "add"}, "request"),
        ({"name": ""}, "request"),
        ({"id": 0}, "request"),
        ({"id": 1 << 31}, "request"),
        ({"path": "relative"}, "request"),
        ({"files": ["a", "b"]}, "request"),
        ({"files": ["../adapter_model.safetensors"]}, "request"),
        ({"files": ["gone.safetensors"]}, "files"),
        ({"config": None}, "request"),
        ({"config": "no json"}, "load"),
        ({"config": '{"r": 4000}'}, "load"),
        ({"tensors": 2}, "mismatch"),
        ({"bytes": 3}, "mismatch"),
        ({"digest": "0" * 64}, "mismatch"),
        ({"digest_kind": "md5"}, "request"),
    ],
)
def test_what_cannot_be_loaded_touches_nothing(manager, tmp_path, changes, kind):
    assert call(manager, "replace", make(tmp_path / "a", 1))["ok"]
    new = make(tmp_path / "b", 2)
    for op in ("replace", "check"):
        answer = call(manager, op, new, **{"update_id": "u2", **changes})
        assert (answer["ok"], answer["state"], answer["error_kind"]) == (False, "unchanged", kind)
    assert values(manager) == {1 << 30: 1}


def test_a_check_changes_nothing_and_finds_what_vllm_would_refuse(manager, tmp_path):
    answer = call(manager, "check", make(tmp_path / "a", 1))
    assert (answer["ok"], answer["tensors"], answer["ids"], answer["undo"]) == (True, 1, [], False)
    assert values(manager) == {}
    answer = call(manager, "check", make(tmp_path / "b", 1, r=16))
    assert "rank is too high" in answer["error"]


def test_nothing_is_left_of_reading_an_adapter(manager, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = make(tmp_path / "a", 1)
    before = len(os.listdir("/proc/self/fd"))
    assert call(manager, "replace", folder)["ok"]
    assert not call(manager, "replace", make(tmp_path / "b", 1, r=16), update_id="u2")["ok"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_engines_without_lora_and_unknown_managers_say_so(tmp_path):
    folder = make(tmp_path / "a", 1)
    assert call(None, "replace", folder)["error_kind"] == "disabled"
    assert call(WorkerManager(), "replace", folder)["error_kind"] == "unsupported"
    assert lora.lora(object(), None)["ok"] is False
