"""Reads and checks the headers of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

# Spelling in a safetensors header -> name in torch. Packed sub-byte types are not here: no vLLM
# checkpoint has them as such (they are stored as U8 or I32).
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
# The format's own limit on the header.
MAX_HEADER = 100_000_000


class CheckpointError(Exception):
    """A file is missing, unreadable or not what its header says."""

    error_kind = "files"


@dataclass(frozen=True)
class Entry:
    """One tensor: `length` bytes from `offset` on of what holds `file` (itself, or a segment)."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def entries(file: str, size: int, read: Callable[[int, int], bytes], base: int = 0) -> list[Entry]:
    """Tensors of a file of `size` bytes by start offset, checked against its size and each other.

    `read(offset, length)` gives bytes of the file, fewer at its end; `base` is added to the
    tensors' offsets.
    """
    import torch

    prefix = read(0, 8)
    if len(prefix) != 8:
        raise CheckpointError(f"{file} is no safetensors file: it has {size} bytes")
    header_length = int.from_bytes(prefix, "little")
    if header_length > min(MAX_HEADER, size - 8):
        raise CheckpointError(
            f"{file} is no complete safetensors file: "
            f"its header should have {header_length} bytes, the file has {size}"
        )
    start = 8 + header_length
    try:
        found = []
        for name, item in json.loads(read(8, header_length)).items():
            if name == "__metadata__":
                continue
            begin, end = (_whole(number) for number in item["data_offsets"])
            shape = tuple(_whole(dimension) for dimension in item["shape"])
            dtype = str(item["dtype"])
            found.append(Entry(file, name, dtype, shape, start + begin, end - begin))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a malformed header: {error!r}") from error
    for entry in found:
        torch_dtype = getattr(torch, DTYPES.get(entry.dtype, ""), None)
        if torch_dtype is None:
            raise CheckpointError(f"{file}: tensor {entry.name} has unknown dtype {entry.dtype}")
        elements = 1
        for dimension in entry.shape:
            elements *= dimension
        expected = elements * torch_dtype.itemsize
        if entry.length != expected:
            raise CheckpointError(
                f"{file}: tensor {entry.name} should have {expected} bytes, has {entry.length}"
            )
        if entry.offset + entry.length > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {entry.name} ends at byte "
                f"{entry.offset + entry.length}, the file at {size}"
            )
    # By start; an empty tensor goes before what starts at the same byte, then by name.
    found.sort(key=lambda entry: (entry.offset, entry.length, entry.name))
    end = start
    for entry in found:
        if entry.offset < end:
            raise CheckpointError(f"{file}: tensor {entry.name} overlaps the one before it")
        end = entry.offset + entry.length
    if base:
        found = [
            Entry(
                entry.file, entry.name, entry.dtype, entry.shape, base + entry.offset, entry.length
            )
            for entry in found
        ]
    return found


def _whole(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{number!r} is no count")
    return number
