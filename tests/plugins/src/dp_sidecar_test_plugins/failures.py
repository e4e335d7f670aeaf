"""Makes weight loads fail, to test what happens then.

`DP_SIDECAR_TEST_FAIL_LOAD` holds the instruction, or the path of a file that holds it: then a
running engine can be told, and left alone again by removing the file. An instruction is

    rank=1;after=3;times=2

fail loads on DP rank 1 (default: all) after 3 consumed tensors (default: 0), the first 2 times
(default: each time) in a worker's life. `kill=1` ends the process instead of raising.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from typing import Any

VARIABLE = "DP_SIDECAR_TEST_FAIL_LOAD"

# Instruction -> how often it was carried out in this process.
_done: dict[str, int] = {}


class InjectedError(Exception):
    """Raised on purpose."""

    error_kind = "injected"


def register() -> None:
    """Entry point of `vllm.general_plugins`; does nothing unless the variable is set."""
    if not os.environ.get(VARIABLE):
        return
    from dp_sidecar_shim import reload

    if getattr(reload.reload_weights, "_fails_on_order", False):
        return
    original = reload.reload_weights

    @functools.wraps(original)
    def reload_weights(worker: Any, weights: Any) -> None:
        original(worker, _failing(worker, weights))

    reload_weights._fails_on_order = True  # type: ignore[attr-defined]
    reload.reload_weights = reload_weights


def instruction() -> str:
    """The instruction that holds now; empty for none."""
    value = os.environ.get(VARIABLE, "")
    if not value.startswith("/"):
        return value
    try:
        with open(value, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _failing(worker: Any, weights: Any) -> Iterator[tuple[str, Any]]:
    from dp_sidecar_shim.calls import ranks

    text = instruction()
    order = dict(item.split("=", 1) for item in text.split(";") if item)
    dp_rank = ranks(worker)["dp_rank"]
    fails = bool(order) and int(order.get("rank", dp_rank)) == dp_rank
    if fails and _done.get(text, 0) >= int(order.get("times", 1 << 30)):
        fails = False
    after = int(order.get("after", 0))
    for position, item in enumerate(weights):
        if fails and position >= after:
            _done[text] = _done.get(text, 0) + 1
            if order.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise InjectedError(f"told to fail on DP rank {dp_rank} after {after} tensors")
        yield item
    if fails:
        raise InjectedError(f"told to fail on DP rank {dp_rank}, at the end of the load")
