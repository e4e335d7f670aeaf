"""Reads and checks the headers of safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import NamedTuple

from dp_sidecar_shim.calls import is_count

# Spelling in a safetensors header -> name in torch. Packed sub-byte types are not here: no vLLM
# checkpoint has them as such (they are stored as U8 or I32).
_DTYPES = """
BOOL=bool U8=uint8 I8=int8 U16=uint16 I16=int16 U32=uint32 I32=int32 U64=uint64 I64=int64
F16=float16 BF16=bfloat16 F32=float32 F64=float64 C64=complex64 F8_E4M3=float8_e4m3fn
F8_E4M3FNUZ=float8_e4m3fnuz F8_E5M2=float8_e5m2 F8_E5M2FNUZ=float8_e5m2fnuz F8_E8M0=float8_e8m0fnu
"""
DTYPES = dict(pair.split("=") for pair in _DTYPES.split())
# The format's own limit on the header.
MAX_HEADER = 100_000_000


class Entry(NamedTuple):
    """One tensor: `length` bytes from `offset` on of what holds `file` (itself, or a segment)."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def entries(file: str, read: Callable[[int, int], bytes], start: int, size: int) -> list[Entry]:
    """Tensors of a file by offset, checked against its size and each other."""
    # The file lies at `start` of what `read(offset, length)` reads. This raises many kinds of
    # exceptions: see `files_of`.
    import torch

    header = int.from_bytes(read(start, 8), "little") if size >= 8 else size
    if header > min(MAX_HEADER, size - 8):
        raise ValueError(f"no complete safetensors file: it has {size} bytes")
    found = []
    at, end = start + 8 + header, start + size
    for name, item in json.loads(read(start + 8, header)).items():
        if name == "__metadata__":
            continue
        (begin, stop), shape = item["data_offsets"], tuple(item["shape"])
        if not all(map(is_count, (begin, stop, *shape))):
            raise ValueError(f"malformed header: tensor {name} is {item!r}")
        dtype = getattr(torch, DTYPES.get(item["dtype"], ""), None)
        if dtype is None:
            raise ValueError(f"tensor {name} has unknown dtype {item['dtype']}")
        expected = math.prod(shape) * dtype.itemsize
        if stop - begin != expected:
            raise ValueError(f"tensor {name} should have {expected} bytes, has {stop - begin}")
        found.append(Entry(file, name, item["dtype"], shape, at + begin, expected))
    # By start; an empty tensor goes before what starts at the same byte, then by name.
    found.sort(key=lambda entry: (entry.offset, entry.length, entry.name))
    for entry in found:
        if entry.offset < at:
            raise ValueError(f"tensor {entry.name} overlaps the one before it")
        at = entry.offset + entry.length
        if at > end:
            raise ValueError(f"truncated: tensor {entry.name} ends {at - end} bytes after the file")
    return found
