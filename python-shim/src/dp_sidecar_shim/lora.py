"""`dp_sidecar_lora`: LoRA adapters come and go. See protocol/docs/weight-update.md."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dp_sidecar_shim import adapters
from dp_sidecar_shim.adapters import Adapter, Adapters
from dp_sidecar_shim.calls import MIXED, UNCHANGED, ShimError, change, check, fail, files_of
from dp_sidecar_shim.checkpoint import Checkpoint, Consumption, tensors
from dp_sidecar_shim.worker import check_files

APPLIED = "applied"
LOADS = ("check", "replace")
OPS = (*LOADS, "remove", "undo", "list")
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_NUMBER = (1 << 31) - 1


def lora(worker: Any, request: Any) -> dict[str, Any]:
    """Carry out a request; says what the worker holds afterwards."""

    def act(found: dict[str, Any]) -> None:
        try:
            check_request(request)
            _run(worker, request, found)
            found["state"] = APPLIED
        except Exception as error:
            fail(found, error, "load")

    asked = request if isinstance(request, dict) else {}
    named = {key: str(asked.get(key) or "") for key in ("op", "name")}
    return change(worker, request, act, ids=[], undo=False, adapters=[], **named)


def check_request(request: dict[str, Any]) -> None:
    """Raise `ShimError` unless the request makes sense by itself."""
    op = request.get("op")
    if op not in OPS:
        raise ShimError("request", f"op {op!r} is not known")
    if op != "list":
        check(request, {"name": (str,), "id": (int,)})
        if not request["name"] or not 1 <= request["id"] <= MAX_NUMBER:
            raise ShimError("request", f"id {request['id']}, expected a name and 1 to 2^31 - 1")
    if op in LOADS:
        check_files(request)
        check(request, {"config": (str,)})
        files = request["files"]
        if len(files) != 1 or os.path.basename(files[0]) != files[0]:
            raise ShimError("request", f"files is {files!r}, expected one file name")


def _run(worker: Any, request: dict[str, Any], found: dict[str, Any]) -> None:
    manager = getattr(getattr(worker, "model_runner", None), "lora_manager", None)
    if manager is None:
        raise ShimError("disabled", "the engine was started without --enable-lora")
    if adapters.reader_of(manager) is None:
        raise ShimError("unsupported", "this vLLM's LoRA manager is not one the shim knows")
    table = adapters.of(manager)
    if request["op"] == "list":
        for name, adapter in table.managed.items():
            found["adapters"].append({**adapter.facts, "ids": table.numbers(name)})
        return
    try:
        _change(table, request, found)
    finally:
        found["ids"] = table.numbers(request["name"])
        by, _ = table.ways_back.get(request["name"], (None, None))
        found["undo"] = by == found["update_id"]


def _change(table: Adapters, request: dict[str, Any], found: dict[str, Any]) -> None:
    op, name, update_id = request["op"], request["name"], found["update_id"]
    before = table.managed.get(name)
    by, back = table.ways_back.get(name, (None, None))
    own = by == update_id
    if op == "undo":
        if own:
            _put(table, request, back, found)
            del table.ways_back[name]
        return
    adapter = None
    if op in LOADS:
        adapter = _read(table.manager, request, found)
        if op == "check":
            return
    _put(table, request, adapter, found)
    table.ways_back[name] = (update_id, back if own else before)


# Make this the adapter of the name under all numbers, or leave all as it was.
def _put(
    table: Adapters, request: dict[str, Any], adapter: Adapter | None, found: dict[str, Any]
) -> None:
    name, number, manager = request["name"], request["id"], table.manager
    before, removed = table.managed.get(name), table.removed.get(name)
    loaded = table.numbers(name)

    def load(numbers: list[int], what: Adapter | None) -> None:
        for each in numbers:
            manager.remove_adapter(each)
            if what is not None:
                manager.add_adapter(lora_request(name, each, what.facts["path"]))

    table.keep(name, adapter, remember=request["op"] == "remove")
    try:
        load(loaded or [number], adapter)
    except Exception:
        found["state"] = MIXED
        table.keep(name, before)
        if removed is not None:
            table.removed[name] = removed
        load(loaded, before)
        if not loaded:
            manager.remove_adapter(number)
        found["state"] = UNCHANGED
        raise


def lora_request(name: str, number: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


# The adapter as vLLM reads it. Its bytes are taken once: what is checked is what is used.
def _read(manager: Any, request: dict[str, Any], found: dict[str, Any]) -> Adapter:
    account = Consumption(request["digest_kind"])
    found["digest_kind"] = account.kind
    # vLLM reads a directory. This one holds the copy: its file is in memory and has no name.
    with (
        tempfile.TemporaryDirectory(prefix="dp-sidecar-lora-") as folder,
        _copied(request) as descriptor,
    ):
        Path(folder, CONFIG).write_bytes(request["config"].encode())
        os.symlink(f"/proc/self/fd/{descriptor}", Path(folder, TENSORS))
        with Checkpoint(folder, [TENSORS]) as copy:
            for _ in tensors(copy, account):
                pass
        account.compare(found, request)
        read = adapters.reader_of(manager)
        model = read(lora_request(request["name"], request["id"], folder))
    facts = {key: found[key] for key in ("name", "update_id", "tensors", "bytes", "digest")}
    return Adapter({**facts, "path": request["path"]}, model)


# A copy of the tensors' file in anonymous memory, as a descriptor.
@contextlib.contextmanager
def _copied(request: dict[str, Any]) -> Iterator[int]:
    path = os.path.join(request["path"], request["files"][0])
    with open(os.memfd_create("dp-sidecar-lora"), "wb") as copy:
        with files_of(path), open(path, "rb") as origin:
            while part := origin.read(1 << 24):
                copy.write(part)
            copy.flush()
        yield copy.fileno()
