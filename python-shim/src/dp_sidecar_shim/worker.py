"""`dp_sidecar_info` and `dp_sidecar_load`. Their maps: protocol/docs/weight-update.md."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dp_sidecar_shim import OLDEST_PROTOCOL, PROTOCOL, __version__, checkpoint, reload, segment

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
    extents: list[tuple[int, int]] | None
    tensors: int
    bytes: int
    digest: str | None
    digest_kind: str


def check_protocol(request: dict[str, Any]) -> int:
    """The contract's version that a request is written in, or `RequestError`."""
    protocol = request.get("protocol")
    if isinstance(protocol, bool) or not isinstance(protocol, int):
        raise RequestError(
            "protocol", f"the request's protocol is {protocol!r}, expected {PROTOCOL}"
        )
    if not OLDEST_PROTOCOL <= protocol <= PROTOCOL:
        raise RequestError(
            "protocol", f"this shim speaks protocol {PROTOCOL}, the sidecar {protocol!r}"
        )
    return protocol


def take_field(request: dict[str, Any], name: str, kind: type, default: Any = ...) -> Any:
    """A value of a request, of the expected type, or `RequestError`; numbers are not negative."""
    value = request.get(name)
    if value is None and default is not ...:
        return default
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
        raise RequestError("request", f"{name} is {value!r}, expected {kind.__name__}")
    return value


def take_extents(request: dict[str, Any]) -> list[tuple[int, int]] | None:
    """The extents of a request, or none; `RequestError` if they are no pairs of numbers."""
    raw = request.get("extents")
    if raw is None:
        return None
    extents = []
    for pair in raw if isinstance(raw, (list, tuple)) else [raw]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RequestError("request", f"an extent is {pair!r}, expected [offset, length]")
        for number in pair:
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise RequestError("request", f"an extent is {pair!r}, expected two counts")
        extents.append((pair[0], pair[1]))
    return extents


def parse(request: Any) -> Request:
    """Check a request map, or raise `RequestError`."""
    if not isinstance(request, dict):
        raise RequestError("request", f"the request is a {type(request).__name__}, expected a map")
    check_protocol(request)

    def field(name: str, kind: type, default: Any = ...) -> Any:
        return take_field(request, name, kind, default)

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
        extents=take_extents(request),
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
        "update_id": update_id(raw),
        "tensors": 0,
        "bytes": 0,
        "digest": None,
        "digest_kind": "none",
        "state": UNCHANGED,
        "error": None,
        "error_kind": None,
    }
    try:
        answer.update(ranks(worker))
        request = parse(raw)
        answer["protocol"] = raw["protocol"]
        with one_at_a_time():
            _load(worker, request, answer)
    except Exception as error:
        # Only what has not touched the model comes here.
        fail(answer, error, "internal")
    answer["ms"] = round((time.monotonic() - started) * 1000, 3)
    return answer


def update_id(raw: Any) -> str:
    """What the answer repeats of the request."""
    return str(raw.get("update_id") or "") if isinstance(raw, dict) else ""


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Refuses what comes while something else changes this worker's weights."""
    if not _loading.acquire(blocking=False):
        raise RequestError("busy", "another load is running in this worker")
    try:
        yield
    finally:
        _loading.release()


def _load(worker: Any, request: Request, answer: dict[str, Any]) -> None:
    account = checkpoint.Consumption(request.digest_kind)
    answer["digest_kind"] = account.kind
    source = _open(request)
    try:
        _compare("in the files", len(source.entries), source.bytes, request)
        if len({entry.name for entry in source.entries}) != len(source.entries):
            raise checkpoint.CheckpointError("a tensor occurs twice in the files")
    except Exception:
        source.close()
        raise
    # From here on nothing is raised: what the worker holds depends on how far it came.
    failure = _fill(worker, request, source, account)
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
        except Exception as error:
            failure = error
    if failure is None:
        answer["ok"] = True
        answer["state"] = LOADED
    else:
        fail(answer, failure, "load")
        answer["state"] = RESTORED if reload.clean_up(worker) else MIXED
    try:
        reload.let_go(worker, source)
    except Exception as error:
        _logger.error("dp-sidecar: %s could not be closed: %s", request.path, str(error))
        fail(answer, error, "internal")
        answer["state"] = MIXED


def _open(request: Request) -> checkpoint.Source:
    if request.extents is None:
        return checkpoint.Checkpoint(request.path, request.files)
    return segment.Segment(request.path, request.files, request.extents)


def _fill(
    worker: Any, request: Request, source: checkpoint.Source, account: checkpoint.Consumption
) -> Exception | None:
    try:
        reload.reload_weights(worker, checkpoint.tensors(source, account))
    except Exception as error:
        # The traceback's frames hold the half-loaded layers' tensors, and views of a segment: log
        # it, then let go of it before the cleanup.
        _logger.error("dp-sidecar: load of %s failed", request.path, exc_info=error)
        forget_frames(error)
        return error
    return None


def forget_frames(error: BaseException | None) -> None:
    """Let go of all that an exception and those behind it keep alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _compare(where: str, tensors: int, size: int, request: Request) -> None:
    if (tensors, size) != (request.tensors, request.bytes):
        raise RequestError(
            "mismatch",
            f"{tensors} tensors of {size} bytes {where}, "
            f"expected {request.tensors} of {request.bytes}",
        )


def fail(answer: dict[str, Any], error: Exception, kind: str) -> None:
    """Write an error into an answer; `kind` is for errors that don't say their own."""
    answer["ok"] = False
    answer["error"] = f"{type(error).__name__}: {error}"
    own = getattr(error, "error_kind", None)
    answer["error_kind"] = own if isinstance(own, str) else kind


def ranks(worker: Any) -> dict[str, int]:
    """DP rank of the engine, and rank of the worker in it."""
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
        "max_lora_rank": None,
        "dp_rank": 0,
        "rank": 0,
        "world_size": 1,
        "error": None,
        "error_kind": None,
    }
    try:
        answer.update(ranks(worker))
        model = worker.vllm_config.model_config
        answer["vllm_version"] = reload.vllm_version()
        answer["world_size"] = int(getattr(worker.vllm_config.parallel_config, "world_size", 1))
        answer["is_moe"] = _is_moe(model)
        lora = getattr(worker.vllm_config, "lora_config", None)
        answer["max_lora_rank"] = None if lora is None else int(lora.max_lora_rank)
        answer["model_path"] = local_directory(model)
        answer["ok"] = True
    except Exception as error:
        fail(answer, error, "internal")
    return answer


def _is_moe(model: Any) -> bool:
    # A property since 0.12; before, the question is how many experts there are.
    is_moe = getattr(model, "is_moe", None)
    if is_moe is None:
        return int(model.get_num_experts()) > 0
    return bool(is_moe)


def local_directory(model: Any) -> str:
    """Directory of the checkpoint of the command line; the snapshot for a name on a hub."""
    path = str(model.model)
    if os.path.isdir(path):
        return os.path.realpath(path)
    from huggingface_hub import snapshot_download

    return str(
        snapshot_download(path, revision=getattr(model, "revision", None), local_files_only=True)
    )
