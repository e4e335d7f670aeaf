"""What the worker methods have in common: checked requests, and answers instead of exceptions."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from dp_sidecar_shim import PROTOCOL

_logger = logging.getLogger("vllm.dp_sidecar")

UNCHANGED = "unchanged"
MIXED = "mixed"


class ShimError(Exception):
    """What the shim itself finds wrong, with the contract's word for it."""

    def __init__(self, error_kind: str, text: str) -> None:
        super().__init__(text)
        self.error_kind = error_kind


@contextlib.contextmanager
def files_of(what: str) -> Iterator[None]:
    """Makes what goes wrong in reading a file or its header an error of kind `files`."""
    try:
        yield
    except OSError as error:
        raise ShimError("files", f"{what}: {error.strerror}") from error
    except ValueError as error:
        raise ShimError("files", f"{what}: {error}") from error
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShimError("files", f"{what}: malformed: {error!r}") from error


def is_count(value: object) -> bool:
    """Whether this is a whole number that is not negative. True and False are none."""
    return type(value) is int and value >= 0


def answer(worker: Any, act: Callable[[dict[str, Any]], None], **fields: Any) -> dict[str, Any]:
    """What `act` writes into an answer with these fields, and how it ended. Never raises."""
    started = time.monotonic()
    found = {"ok": False, "protocol": PROTOCOL, "dp_rank": 0, "rank": 0, **fields}
    found.update(error=None, error_kind=None)
    try:
        found.update(ranks(worker))
        act(found)
        found["ok"] = found["error"] is None
    except Exception as error:
        fail(found, error)
    found["ms"] = round((time.monotonic() - started) * 1000, 3)
    return found


def change(
    worker: Any, request: Any, act: Callable[[dict[str, Any]], None], **fields: Any
) -> dict[str, Any]:
    """The answer of a method that changes weights; `act` also checks the request."""
    asked = request if isinstance(request, dict) else {}

    def alone(found: dict[str, Any]) -> None:
        if not isinstance(request, dict):
            raise ShimError("request", f"the request is a {type(request).__name__}, not a map")
        protocol = request.get("protocol")
        if protocol != PROTOCOL:
            raise ShimError("protocol", f"this shim speaks protocol {PROTOCOL}, not {protocol!r}")
        act(found)

    counted = {"tensors": 0, "bytes": 0, "digest": None, "digest_kind": "none"}
    told = {"update_id": str(asked.get("update_id") or ""), "state": UNCHANGED, **counted}
    return answer(worker, alone, **told, **fields)


def check(request: dict[str, Any], fields: dict[str, tuple[type, ...]]) -> None:
    """Raise `ShimError` unless the fields of a request are of these types; numbers are counts."""
    for name, kinds in fields.items():
        value = request.get(name)
        if type(value) not in kinds or (type(value) is int and value < 0):
            raise ShimError("request", f"{name} is {value!r}, expected {kinds[0].__name__}")


def fail(found: dict[str, Any], error: BaseException, kind: str = "internal") -> None:
    """Write an error into an answer, `kind` unless it says its own, and let go of its frames."""
    own = getattr(error, "error_kind", None)
    text = str(error)
    if not isinstance(error, ShimError):
        text = f"{type(error).__name__}: {error}"
        _logger.error("dp-sidecar: update %s failed", found.get("update_id"), exc_info=error)
    # JSON can name a tensor by half a character, which msgpack refuses to send.
    text = text.encode(errors="replace").decode()
    found.update(ok=False, error=text, error_kind=own if isinstance(own, str) else kind)
    # They hold the tensors of half-loaded layers, and views of a segment.
    behind: BaseException | None = error
    while behind is not None:
        traceback.clear_frames(behind.__traceback__)
        behind.__traceback__ = None
        behind = behind.__cause__ or behind.__context__


def ranks(worker: Any) -> dict[str, int]:
    """DP rank of the engine, and rank of the worker in it."""
    parallel = worker.vllm_config.parallel_config
    # A dense engine is told that it is alone: data_parallel_rank is 0 there, the index is kept.
    dp_rank = getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0))
    return {"dp_rank": int(dp_rank), "rank": int(getattr(worker, "rank", 0))}
