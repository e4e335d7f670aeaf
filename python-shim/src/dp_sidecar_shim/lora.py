"""`dp_sidecar_lora`: LoRA adapters come and go. See protocol/docs/weight-update.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dp_sidecar_shim import PROTOCOL, adapters, fit
from dp_sidecar_shim.adapters import Adapter, Adapters, WayBack
from dp_sidecar_shim.checkpoint import Consumption
from dp_sidecar_shim.header import CheckpointError, entries
from dp_sidecar_shim.worker import (
    MIXED,
    UNCHANGED,
    RequestError,
    check_protocol,
    fail,
    forget_frames,
    local_directory,
    one_at_a_time,
    ranks,
    take_extents,
    take_field,
    update_id,
)

_logger = logging.getLogger("vllm.dp_sidecar")

APPLIED = "applied"
LOADS = ("check", "add", "replace")
OPS = (*LOADS, "remove", "undo", "list")
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_CONFIG = 1 << 20
MAX_NUMBER = (1 << 31) - 1


@dataclass(frozen=True)
class Request:
    """A checked request. What is to be read is empty unless the op loads."""

    update_id: str
    op: str
    name: str
    number: int
    path: str = ""
    file: str = ""
    extent: tuple[int, int] | None = None
    tensors: int = 0
    bytes: int = 0
    digest: str | None = None
    digest_kind: str = "none"
    config: str | None = None


def parse(raw: Any) -> Request:
    """Check a request map, or raise `RequestError`."""
    if not isinstance(raw, dict):
        raise RequestError("request", f"the request is a {type(raw).__name__}, expected a map")
    if check_protocol(raw) < 2:
        raise RequestError("protocol", "adapters came with protocol 2")
    op = take_field(raw, "op", str)
    if op not in OPS:
        raise RequestError("request", f"op {op!r} is not known")
    name = take_field(raw, "name", str, "")
    number = take_field(raw, "id", int, 0)
    if op != "list" and (not name or not 1 <= number <= MAX_NUMBER):
        raise RequestError(
            "request", f"name {name!r} with id {number}, expected a name and 1 to 2^31"
        )
    who = update_id(raw)
    if op not in LOADS:
        return Request(who, op, name, number)
    path = take_field(raw, "path", str)
    if not os.path.isabs(path):
        raise RequestError("request", f"path {path!r} is not absolute")
    files = take_field(raw, "files", list, [TENSORS])
    extents = take_extents(raw)
    config = take_field(raw, "config", str, None)
    if len(files) != 1 or not isinstance(files[0], str) or os.path.basename(files[0]) != files[0]:
        raise RequestError("request", f"files is {files!r}, expected one file name")
    if extents is not None and (len(extents) != 1 or config is None):
        raise RequestError("request", "a segment needs one extent, and the config in the request")
    kind = take_field(raw, "digest_kind", str)
    if kind not in ("blake3", "none"):
        raise RequestError("request", f"digest_kind {kind!r} is not known")
    return Request(
        update_id=who,
        op=op,
        name=name,
        number=number,
        path=path,
        file=files[0],
        extent=None if extents is None else extents[0],
        tensors=take_field(raw, "tensors", int),
        bytes=take_field(raw, "bytes", int),
        digest=take_field(raw, "digest", str, None),
        digest_kind=kind,
        config=config,
    )


def lora(worker: Any, raw: Any) -> dict[str, Any]:
    """Carry out a request; says what the worker holds afterwards."""
    started = time.monotonic()
    asked = raw if isinstance(raw, dict) else {}
    answer: dict[str, Any] = {
        "ok": False,
        "protocol": PROTOCOL,
        "update_id": update_id(raw),
        "op": str(asked.get("op") or ""),
        "name": str(asked.get("name") or ""),
        "state": UNCHANGED,
        "ids": [],
        "undo": False,
        "tensors": 0,
        "bytes": 0,
        "digest": None,
        "digest_kind": "none",
        "adapters": [],
        "error": None,
        "error_kind": None,
    }
    try:
        answer.update(ranks(worker))
        request = parse(raw)
        with one_at_a_time():
            _run(worker, request, answer)
            answer["ok"] = True
            answer["state"] = APPLIED
    except Exception as error:
        if not isinstance(error, RequestError):
            _logger.error("dp-sidecar: adapter %s failed", answer["name"], exc_info=error)
        forget_frames(error)
        fail(answer, error, "load")
    answer["ms"] = round((time.monotonic() - started) * 1000, 3)
    return answer


def _run(worker: Any, request: Request, answer: dict[str, Any]) -> None:
    manager = getattr(getattr(worker, "model_runner", None), "lora_manager", None)
    if manager is None:
        raise RequestError("disabled", "the engine was started without --enable-lora")
    if adapters.reader_of(manager) is None:
        raise RequestError("unsupported", "this vLLM's LoRA manager is not one the shim knows")
    table = adapters.of(manager)
    if request.op == "list":
        answer["adapters"] = [_describe(manager, table, one) for one in table.managed.values()]
        return
    try:
        _change(worker, manager, table, request, answer)
    finally:
        answer["ids"] = table.numbers(manager, request.name)
        way = table.ways_back.get(request.name)
        answer["undo"] = way is not None and way.update_id == request.update_id


def _change(
    worker: Any, manager: Any, table: Adapters, request: Request, answer: dict[str, Any]
) -> None:
    name = request.name
    before = table.managed.get(name)
    way = table.ways_back.get(name)
    if way is not None and way.update_id != request.update_id:
        way = None
    if request.op == "undo":
        if way is not None:
            _put(manager, table, request, way.before, answer)
            del table.ways_back[name]
        return
    adapter = None
    if request.op in LOADS:
        adapter = _read(worker, manager, request, answer)
        if request.op == "check":
            return
        known = before is not None and way is None
        if request.op == "add" and known and before.fingerprint != adapter.fingerprint:
            raise RequestError("exists", f"update {before.update_id} brought an adapter {name}")
    _put(manager, table, request, adapter, answer)
    table.ways_back[name] = way or WayBack(request.update_id, before)


def _put(
    manager: Any, table: Adapters, request: Request, adapter: Adapter | None, answer: dict[str, Any]
) -> None:
    """Make this the adapter of the name under all numbers, or leave all as it was."""
    name = request.name
    before = table.managed.get(name)
    loaded = table.numbers(manager, name)

    def load(numbers: list[int], what: Adapter | None) -> None:
        for number in numbers:
            manager.remove_adapter(number)
            if what is not None:
                manager.add_adapter(lora_request(name, number, what.path))

    removed = table.removed.get(name)
    table.keep(name, adapter, remember=request.op == "remove")
    try:
        load(loaded or [request.number], adapter)
    except Exception:
        answer["state"] = MIXED
        table.keep(name, before)
        if removed is not None:
            table.removed[name] = removed
        load(loaded, before)
        if not loaded:
            manager.remove_adapter(request.number)
        answer["state"] = UNCHANGED
        raise


def lora_request(name: str, number: int, path: str) -> Any:
    """vLLM's request for an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def _describe(manager: Any, table: Adapters, adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "update_id": adapter.update_id,
        "path": adapter.path,
        "tensors": adapter.tensors,
        "bytes": adapter.bytes,
        "digest": adapter.digest,
        "ids": table.numbers(manager, adapter.name),
    }


def _read(worker: Any, manager: Any, request: Request, answer: dict[str, Any]) -> Adapter:
    """The adapter as vLLM reads it. Its bytes are taken once: what is checked is what is used."""
    account = Consumption(request.digest_kind)
    answer["digest_kind"] = account.kind
    config = _config(request)
    with _copied(request) as (descriptor, content):
        size = len(content)
        found = entries(request.file, size, lambda at, n: bytes(content[at : at + n]))
        for entry in found:
            with content[entry.offset : entry.offset + entry.length] as part:
                account.take(entry, part)
        answer.update(tensors=account.tensors, bytes=account.bytes, digest=account.digest())
        if (account.tensors, account.bytes) != (request.tensors, request.bytes):
            raise RequestError(
                "mismatch",
                f"{request.file} has {account.tensors} tensors of {account.bytes} bytes, "
                f"expected {request.tensors} of {request.bytes}",
            )
        if account.kind == "blake3" and request.digest not in (None, answer["digest"]):
            raise RequestError(
                "mismatch", f"digest is {answer['digest']}, expected {request.digest}"
            )
        fit.check(found, _base_shapes(worker))
        fingerprint = hashlib.sha256(content)
        fingerprint.update(config)
        # vLLM reads a directory. This one holds the copy: its file is in memory and has no name.
        folder = tempfile.mkdtemp(prefix="dp-sidecar-lora-")
        try:
            with open(os.path.join(folder, CONFIG), "wb") as file:
                file.write(config)
            os.symlink(f"/proc/self/fd/{descriptor}", os.path.join(folder, TENSORS))
            read = adapters.reader_of(manager)
            model = read(lora_request(request.name, request.number, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return Adapter(
        name=request.name,
        update_id=request.update_id,
        path=request.path,
        tensors=account.tensors,
        bytes=account.bytes,
        digest=answer["digest"],
        fingerprint=fingerprint.hexdigest(),
        model=model,
    )


def _base_shapes(worker: Any) -> dict[str, fit.Shape]:
    # Every checkpoint of the model has the shapes of the one that it was started from.
    try:
        return fit.shapes_of(local_directory(worker.vllm_config.model_config))
    except Exception as error:
        _logger.warning("dp-sidecar: shapes of adapters cannot be checked: %s", error)
        return {}


def _config(request: Request) -> bytes:
    raw = None if request.config is None else request.config.encode()
    if raw is None:
        path = os.path.join(request.path, CONFIG)
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_CONFIG + 1)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_CONFIG:
        raise CheckpointError(f"{CONFIG} has more than {MAX_CONFIG} bytes")
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is no JSON: {error}") from error
    if not isinstance(parsed, dict) or parsed.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{CONFIG} describes no LoRA adapter")
    return raw


@contextlib.contextmanager
def _copied(request: Request) -> Iterator[tuple[int, memoryview]]:
    """A copy of the tensors' file in anonymous memory: its descriptor, and its content."""
    source = request.path
    if request.extent is None:
        source = os.path.join(request.path, request.file)
    with contextlib.ExitStack() as stack:
        try:
            origin = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, origin)
            total = os.fstat(origin).st_size
            offset, length = request.extent or (0, total)
            if offset + length > total:
                raise CheckpointError(
                    f"{request.file} should end at byte {offset + length} of {source}, "
                    f"which has {total}"
                )
            if length < 8:
                raise CheckpointError(f"{source} is no safetensors file: it has {length} bytes")
            copy = os.memfd_create("dp-sidecar-lora")
            stack.callback(os.close, copy)
            os.truncate(copy, length)
            area = stack.enter_context(mmap.mmap(copy, length))
            content = stack.enter_context(memoryview(area))
            done = 0
            while done < length:
                with content[done:] as rest:
                    got = os.preadv(origin, [rest], offset + done)
                if got == 0:
                    raise CheckpointError(f"{source} ends at byte {done} of {length}")
                done += got
        except OSError as error:
            raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
        yield copy, content
