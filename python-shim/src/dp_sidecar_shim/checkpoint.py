"""Reads safetensors files tensor by tensor and hashes exactly the bytes it hands out.

The tensors are copies of the file's bytes, not views of a mapping: what was hashed is what gets
loaded even if somebody rewrites the file meanwhile, and a truncated file is an error, not SIGBUS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
    """One tensor of one file."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class Checkpoint:
    """Open files of a checkpoint directory, in loading order. Use as a context manager."""

    def __init__(self, path: str, files: list[str]) -> None:
        self.entries: list[Entry] = []
        self._descriptors: dict[str, int] = {}
        try:
            for file in files:
                if os.path.basename(file) != file or file in ("", ".", ".."):
                    raise CheckpointError(f"{file!r} is not a file name")
                if file in self._descriptors:
                    raise CheckpointError(f"{file} is listed twice")
                self._open(path, file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    @property
    def bytes(self) -> int:
        """Sum of the tensors' byte lengths."""
        return sum(entry.length for entry in self.entries)

    def _open(self, path: str, file: str) -> None:
        try:
            descriptor = os.open(os.path.join(path, file), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {file} in {path}: {error.strerror}") from error
        self._descriptors[file] = descriptor
        try:
            self.entries.extend(_entries(file, descriptor))
        except OSError as error:
            raise CheckpointError(f"cannot read {file} in {path}: {error.strerror}") from error

    def read(self, entry: Entry) -> tuple[torch.Tensor, Any]:
        """One tensor, on the CPU, and its bytes as they lie in the file (a buffer)."""
        import torch

        raw = torch.empty(entry.length, dtype=torch.uint8, device="cpu")
        buffer = memoryview(raw.numpy())
        done = 0
        while done < entry.length:
            try:
                got = os.preadv(self._descriptors[entry.file], [buffer[done:]], entry.offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {entry.file}: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(
                    f"{entry.file} ends inside tensor {entry.name}: "
                    f"expected {entry.length} bytes, got {done}"
                )
            done += got
        dtype = getattr(torch, DTYPES[entry.dtype])
        return raw.view(dtype).reshape(entry.shape), buffer


def _entries(file: str, descriptor: int) -> list[Entry]:
    """Tensors of one file by start offset, checked against the file's size."""
    import torch

    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) != 8:
        raise CheckpointError(f"{file} is no safetensors file: it has {size} bytes")
    header_length = int.from_bytes(prefix, "little")
    if header_length > min(MAX_HEADER, size - 8):
        raise CheckpointError(
            f"{file} is no complete safetensors file: "
            f"its header should have {header_length} bytes, the file has {size}"
        )
    try:
        header = json.loads(_read_exactly(descriptor, header_length, 8))
        found = []
        for name, item in header.items():
            if name == "__metadata__":
                continue
            begin, end = item["data_offsets"]
            shape = tuple(int(dimension) for dimension in item["shape"])
            dtype = str(item["dtype"])
            found.append(Entry(file, name, dtype, shape, 8 + header_length + begin, end - begin))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a malformed header: {error!r}") from error
    for entry in found:
        torch_dtype = getattr(torch, DTYPES.get(entry.dtype, ""), None)
        if torch_dtype is None:
            raise CheckpointError(f"{file}: tensor {entry.name} has unknown dtype {entry.dtype}")
        elements = 1
        for dimension in entry.shape:
            elements *= dimension
        expected = elements * torch_dtype.itemsize
        if entry.length != expected or entry.offset < 8 + header_length:
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
    return found


def _read_exactly(descriptor: int, length: int, offset: int) -> bytes:
    parts = []
    while length > 0:
        part = os.pread(descriptor, length, offset)
        if not part:
            raise CheckpointError("the file ends inside its header")
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


class Consumption:
    """Counts and hashes the tensors that a loader takes."""

    def __init__(self, kind: str) -> None:
        self.tensors = 0
        self.bytes = 0
        self.kind = "none"
        self._lines: list[tuple[str, bytes]] = []
        self._blake3: Any = None
        if kind == "blake3":
            try:
                from blake3 import blake3
            except ImportError:
                pass
            else:
                self._blake3 = blake3
                self.kind = "blake3"

    def take(self, entry: Entry, buffer: Any) -> None:
        """Account for one tensor."""
        self.tensors += 1
        self.bytes += entry.length
        if self._blake3 is not None:
            digest = self._blake3(buffer).hexdigest()
            shape = ",".join(str(dimension) for dimension in entry.shape)
            line = f"{entry.name}\0{entry.dtype}\0{shape}\0{digest}\n"
            self._lines.append((entry.name, line.encode()))

    def digest(self) -> str | None:
        """Whole digest of what was taken, or none if nothing is hashed."""
        if self._blake3 is None:
            return None
        whole = self._blake3()
        for _, line in sorted(self._lines):
            whole.update(line)
        return whole.hexdigest()


def tensors(checkpoint: Checkpoint, account: Consumption) -> Iterator[tuple[str, torch.Tensor]]:
    """What vLLM's `reload_weights(weights_iterator=...)` wants, accounted for."""
    for entry in checkpoint.entries:
        tensor, buffer = checkpoint.read(entry)
        account.take(entry, buffer)
        yield entry.name, tensor
