"""Compares an adapter's shapes with the weights that it changes.

vLLM 0.32.0 does not: it copies what there is into a zeroed or an older slot, so that a tensor that
is too small changes a part of the layer and nobody is told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from dp_sidecar_shim.header import CheckpointError, Entry, entries

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
# Of other types the shape may be that of a packed form.
_PLAIN = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")

Shape = tuple[int, ...]


def shapes_of(directory: str) -> dict[str, Shape]:
    """Shapes of the plain matrices of a checkpoint directory; nothing of what cannot be read."""
    found: dict[str, Shape] = {}
    try:
        files = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
    except OSError:
        return found
    for file in files:
        try:
            with open(os.path.join(directory, file), "rb", buffering=0) as opened:
                descriptor = opened.fileno()
                size = os.fstat(descriptor).st_size
                for entry in entries(file, size, lambda at, n, d=descriptor: os.pread(d, n, at)):
                    if entry.dtype in _PLAIN and len(entry.shape) == 2:
                        found[entry.name] = entry.shape
        except (OSError, CheckpointError):
            continue
    return found


def check(adapter: Iterable[Entry], base: dict[str, Shape]) -> None:
    """Raise `CheckpointError` when an adapter does not fit to itself or to the base weights.

    Modules that the base does not have under that name are left to vLLM.
    """
    halves: dict[str, dict[str, Shape]] = {}
    for entry in adapter:
        match = _NAME.fullmatch(entry.name)
        if match and len(entry.shape) == 2:
            halves.setdefault(match["module"], {})[match["half"]] = entry.shape
    for module, pair in halves.items():
        if len(pair) != 2:
            [missing] = {"A", "B"} - pair.keys()
            raise CheckpointError(f"{module} has no lora_{missing}")
        down, up = pair["A"], pair["B"]
        if down[0] != up[1]:
            raise CheckpointError(f"{module}: lora_A has rank {down[0]}, lora_B has {up[1]}")
        weight = base.get(f"{module}.weight")
        if weight is not None and (up[0], down[1]) != weight:
            raise CheckpointError(
                f"{module} is {weight[0]} x {weight[1]} in the model, "
                f"{up[0]} x {down[1]} in the adapter"
            )
