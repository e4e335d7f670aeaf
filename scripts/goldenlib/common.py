"""What the modules of several .frames files need: vLLM's encoding, and its version."""

from __future__ import annotations

from typing import Any

Frames = list[bytes]
Message = tuple[str, Frames, dict[str, Any]]


def encode(value: Any) -> Frames:
    """The frames that vLLM's encoder makes of a value."""
    from vllm.v1.serial_utils import MsgpackEncoder

    return [bytes(frame) for frame in MsgpackEncoder().encode(value)]


def plain(value: Any) -> Any:
    """As JSON; bytes as {"bytes": hex}."""
    import msgspec

    decoded = msgspec.msgpack.decode(b"".join(encode(value)[:1]))

    def walk(item: Any) -> Any:
        if isinstance(item, bytes):
            return {"bytes": item.hex()}
        if isinstance(item, list):
            return [walk(i) for i in item]
        if isinstance(item, dict):
            return {str(k): walk(v) for k, v in item.items()}
        return item

    return walk(decoded)


def stats(**changes: Any) -> Any:
    """SchedulerStats, zero but for the changes."""
    from vllm.v1.metrics.stats import SchedulerStats

    return SchedulerStats(**changes)


def installed_version() -> str:
    """Of vLLM, without what a build appends to it."""
    import vllm

    return vllm.__version__.split("+")[0]


def version_at_least(minor: int) -> bool:
    """The installed vLLM is 0.`minor` or later."""
    return int(installed_version().split(".")[1]) >= minor
