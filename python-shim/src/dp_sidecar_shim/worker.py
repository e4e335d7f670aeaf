"""The two worker methods. See protocol/docs/weight-update.md for the maps they take and give."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from dp_sidecar_shim import PROTOCOL, __version__, checkpoint, reload

_logger = logging.getLogger("vllm.dp_sidecar")

LOADED = "loaded"
UNCHANGED = "unchanged"
RESTORED = "restored-meta"
MIXED = "mixed"

# One load at a time. A worker's calls come one after the other; this catches a second way in.
_loading = threading.Lock()


class RequestError(Exception):
    """The request cannot be carried out as it is."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.error_kind = kind


@dataclass(frozen=True)
class Request:
    """A checked request."""

    update_id: str
    path: str
    files: list[str]
    tensors: int
    bytes: int
    digest: str | None
    digest_kind: str


def parse(request: Any) -> Request:
    """Check a request map, or raise `RequestError`."""
    if not isinstance(request, dict):
        raise RequestError("request", f"the request is a {type(request).__name__}, expected a map")
    protocol = request.get("protocol")
    if protocol != PROTOCOL:
        raise RequestError(
            "protocol", f"this shim speaks protocol {PROTOCOL}, the sidecar {protocol!r}"
        )

    def field(name: str, kind: type, default: Any = ...) -> Any:
        value = request.get(name)
        if value is None and default is not ...:
            return default
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
            raise RequestError("request", f"{name} is {value!r}, expected {kind.__name__}")
        return value

    files = field("files", list)
    if not all(isinstance(name, str) for name in files):
        raise RequestError("request", "files holds something other than names")
    path = field("path", str)
    if not os.path.isabs(path):
        raise RequestError("request", f"path {path!r} is not absolute")
    kind = field("digest_kind", str)
    if kind not in ("blake3", "none"):
        raise RequestError("request", f"digest_kind {kind!r} is not known")
    return Request(
        update_id=field("update_id", str, ""),
        path=path,
        files=files,
        tensors=field("tensors", int),
        bytes=field("bytes", int),
        digest=field("digest", str, None),
        digest_kind=kind,
    )


def load(worker: Any, raw: Any) -> dict[str, Any]:
    """Load a checkpoint over the running model; says what the worker holds afterwards."""
    started = time.monotonic()
    answer: dict[str, Any] = {
        "ok": False,
        "protocol": PROTOCOL,
        "update_id": str(raw.get("update_id") or "") if isinstance(raw, dict) else "",
        "tensors": 0,
        "bytes": 0,
        "digest": None,
        "digest_kind": "none",
        "state": UNCHANGED,
        "error": None,
        "error_kind": None,
    }
    try:
        answer.update(_ranks(worker))
        if not _loading.acquire(blocking=False):
            raise RequestError("busy", "another load is running in this worker")
        try:
            _load(worker, parse(raw), answer)
        finally:
            _loading.release()
    except Exception as error:
        # Only what has not touched the model comes here.
        _fail(answer, error, "internal")
    answer["ms"] = round((time.monotonic() - started) * 1000, 3)
    return answer


def _load(worker: Any, request: Request, answer: dict[str, Any]) -> None:
    account = checkpoint.Consumption(request.digest_kind)
    answer["digest_kind"] = account.kind
    with checkpoint.Checkpoint(request.path, request.files) as files:
        _compare("in the files", len(files.entries), files.bytes, request)
        failure: Exception | None = None
        try:
            reload.reload_weights(worker, checkpoint.tensors(files, account))
            answer["state"] = LOADED
        except Exception as error:
            failure = error
    # The traceback's frames hold the half-loaded layers' tensors: log it, then let go of it
    # before the cleanup.
    if failure is not None:
        _logger.error("dp-sidecar: load of %s failed", request.path, exc_info=failure)
        _fail(answer, failure.with_traceback(None), "load")
    answer["tensors"] = account.tensors
    answer["bytes"] = account.bytes
    if failure is None:
        try:
            answer["digest"] = account.digest()
            _compare("consumed", account.tensors, account.bytes, request)
            if account.kind == "blake3" and request.digest not in (None, answer["digest"]):
                raise RequestError(
                    "mismatch",
                    f"digest of what was consumed is {answer['digest']}, expected {request.digest}",
                )
            if reload.torn(worker):
                raise RequestError(
                    "load", "the model has tensors on the meta device after the load"
                )
            answer["ok"] = True
            return
        except Exception as error:
            _fail(answer, error, "internal")
    answer["state"] = RESTORED if reload.clean_up(worker) else MIXED


def _compare(where: str, tensors: int, size: int, request: Request) -> None:
    if (tensors, size) != (request.tensors, request.bytes):
        raise RequestError(
            "mismatch",
            f"{tensors} tensors of {size} bytes {where}, "
            f"expected {request.tensors} of {request.bytes}",
        )


def _fail(answer: dict[str, Any], error: Exception, kind: str) -> None:
    answer["ok"] = False
    answer["error"] = f"{type(error).__name__}: {error}"
    own = getattr(error, "error_kind", None)
    answer["error_kind"] = own if isinstance(own, str) else kind


def _ranks(worker: Any) -> dict[str, int]:
    parallel = worker.vllm_config.parallel_config
    # A dense engine is told that it is alone: data_parallel_rank is 0 there, the index is kept.
    dp_rank = getattr(parallel, "data_parallel_index", None)
    if dp_rank is None:
        dp_rank = getattr(parallel, "data_parallel_rank", 0)
    return {"dp_rank": int(dp_rank), "rank": int(getattr(worker, "rank", 0))}


def info(worker: Any) -> dict[str, Any]:
    """Who this worker is."""
    answer: dict[str, Any] = {
        "ok": False,
        "protocol": PROTOCOL,
        "shim_version": __version__,
        "model_path": "",
        "vllm_version": "",
        "is_moe": False,
        "dp_rank": 0,
        "rank": 0,
        "world_size": 1,
        "error": None,
        "error_kind": None,
    }
    try:
        answer.update(_ranks(worker))
        model = worker.vllm_config.model_config
        answer["vllm_version"] = reload.vllm_version()
        answer["world_size"] = int(getattr(worker.vllm_config.parallel_config, "world_size", 1))
        answer["is_moe"] = _is_moe(model)
        answer["model_path"] = _local_directory(model)
        answer["ok"] = True
    except Exception as error:
        _fail(answer, error, "internal")
    return answer


def _is_moe(model: Any) -> bool:
    # A property since 0.12; before, the question is how many experts there are.
    is_moe = getattr(model, "is_moe", None)
    if is_moe is None:
        return int(model.get_num_experts()) > 0
    return bool(is_moe)


def _local_directory(model: Any) -> str:
    """Directory of the checkpoint of the command line; the snapshot for a name on a hub."""
    path = str(model.model)
    if os.path.isdir(path):
        return os.path.realpath(path)
    from huggingface_hub import snapshot_download

    return str(
        snapshot_download(path, revision=getattr(model, "revision", None), local_files_only=True)
    )
