"""Reads safetensors files tensor by tensor and hashes exactly the bytes it hands out."""

# The tensors are copies of the file's bytes, not views of a mapping: what was hashed is what gets
# loaded even if the file is rewritten meanwhile, and a truncated file is an error, not SIGBUS.

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from dp_sidecar_shim.calls import ShimError, files_of
from dp_sidecar_shim.header import DTYPES, Entry, entries

if TYPE_CHECKING:
    import torch

    from dp_sidecar_shim.segment import Segment


class Checkpoint(contextlib.AbstractContextManager):
    """Open files of a checkpoint directory, in loading order. Use as a context manager."""

    def __init__(self, path: str, files: list[str]) -> None:
        self.entries: list[Entry] = []
        self._descriptors: dict[str, int] = {}
        try:
            for file in files:
                with files_of(f"{file} in {path}"):
                    if os.path.basename(file) != file or file in ("", ".", ".."):
                        raise ValueError("not a file name")
                    if file in self._descriptors:
                        raise ValueError("listed twice")
                    descriptor = os.open(os.path.join(path, file), os.O_RDONLY | os.O_CLOEXEC)
                    self._descriptors[file] = descriptor
                    size = os.fstat(descriptor).st_size
                    self.entries += entries(file, partial(_read, descriptor), 0, size)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    # The bytes of one tensor, in CPU memory.
    def read(self, entry: Entry) -> torch.Tensor:
        import torch

        raw = torch.empty(entry.length, dtype=torch.uint8, device="cpu")
        with files_of(entry.file):
            got = _fill(self._descriptors[entry.file], memoryview(raw.numpy()), entry.offset)
            if got < entry.length:
                raise ValueError(f"ends inside tensor {entry.name}: {got} of {entry.length} bytes")
        return raw


# Read until the buffer is full or the file ends; gives the number of bytes.
def _fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    done = 0
    while done < len(buffer) and (got := os.preadv(descriptor, [buffer[done:]], offset + done)):
        done += got
    return done


def _read(descriptor: int, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: _fill(descriptor, memoryview(buffer), offset)])


class Consumption:
    """Counts and hashes the tensors that a loader takes."""

    def __init__(self, kind: str) -> None:
        self.tensors = self.bytes = 0
        self._lines: list[tuple[str, bytes]] = []
        self._blake3: Any = None
        if kind == "blake3":
            with contextlib.suppress(ImportError):
                from blake3 import blake3

                self._blake3 = blake3
        self.kind = "blake3" if self._blake3 else "none"

    def take(self, entry: Entry, buffer: Any) -> None:
        self.tensors += 1
        self.bytes += entry.length
        if self._blake3 is not None:
            digest = self._blake3(buffer).hexdigest()
            shape = ",".join(str(dimension) for dimension in entry.shape)
            line = f"{entry.name}\0{entry.dtype}\0{shape}\0{digest}\n"
            self._lines.append((entry.name, line.encode()))

    # Whole digest of what was taken, or none if nothing is hashed.
    def digest(self) -> str | None:
        if self._blake3 is None:
            return None
        whole = self._blake3()
        for _, line in sorted(self._lines):
            whole.update(line)
        return whole.hexdigest()

    def compare(self, answer: dict[str, Any], request: dict[str, Any]) -> None:
        """Write down what was taken. Raises unless it is what the request says."""
        answer.update(tensors=self.tensors, bytes=self.bytes, digest=self.digest())
        compare_counts(self.tensors, self.bytes, request)
        if self._blake3 is not None and request.get("digest") not in (None, answer["digest"]):
            expected = request["digest"]
            raise ShimError("mismatch", f"digest is {answer['digest']}, expected {expected}")


def compare_counts(tensors: int, size: int, request: dict[str, Any]) -> None:
    """Raise unless the request is for so many tensors and bytes."""
    if (tensors, size) != (request["tensors"], request["bytes"]):
        expected = f"expected {request['tensors']} of {request['bytes']}"
        raise ShimError("mismatch", f"{tensors} tensors of {size} bytes, {expected}")


# The name with the first prefix that matches replaced.
def renamed(name: str, prefixes: Any) -> str:
    found = (new + name[len(old) :] for old, new in prefixes if name.startswith(old))
    return next(found, name)


def tensors(
    source: Checkpoint | Segment, account: Consumption, prefixes: Any = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """What vLLM's `reload_weights(weights_iterator=...)` wants, accounted for."""
    import torch

    for entry in source.entries:
        raw = source.read(entry)
        account.take(entry, memoryview(raw.numpy()))
        dtype = getattr(torch, DTYPES[entry.dtype])
        if raw.data_ptr() % dtype.itemsize:
            # Kernels may count on aligned elements.
            raw = raw.clone()
        yield renamed(entry.name, prefixes), raw.view(dtype).reshape(entry.shape)
