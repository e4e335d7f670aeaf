"""Reads safetensors files tensor by tensor and hashes exactly the bytes it hands out.

The tensors are copies of the file's bytes, not views of a mapping: what was hashed is what gets
loaded even if somebody rewrites the file meanwhile, and a truncated file is an error, not SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from dp_sidecar_shim.header import DTYPES, CheckpointError, Entry, entries

if TYPE_CHECKING:
    import torch


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
            size = os.fstat(descriptor).st_size
            self.entries.extend(entries(file, size, lambda at, n: _read(descriptor, at, n)))
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


def _read(descriptor: int, offset: int, length: int) -> bytes:
    parts = []
    while length > 0:
        part = os.pread(descriptor, length, offset)
        if not part:
            break
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


class Source(Protocol):
    """Checked files that give their tensors one by one: a `Checkpoint` or a `Segment`."""

    entries: list[Entry]

    @property
    def bytes(self) -> int:
        """Sum of the tensors' byte lengths."""
        ...

    def read(self, entry: Entry) -> tuple[torch.Tensor, Any]:
        """One tensor, on the CPU, and its bytes as they lie in the file (a buffer)."""
        ...

    def close(self) -> None:
        """Give up files and maps."""
        ...


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


def tensors(checkpoint: Source, account: Consumption) -> Iterator[tuple[str, torch.Tensor]]:
    """What vLLM's `reload_weights(weights_iterator=...)` wants, accounted for."""
    for entry in checkpoint.entries:
        tensor, buffer = checkpoint.read(entry)
        account.take(entry, buffer)
        yield entry.name, tensor
