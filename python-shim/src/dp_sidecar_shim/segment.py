"""Gives the tensors of safetensors files that lie in a shared memory segment, without a copy.

The map is private and the file open for reading only. So a loader that changes a tensor in place
gets a page of its own: it neither writes to the segment nor ends the engine, as it would on a map
without the right to write.
"""

from __future__ import annotations

import gc
import mmap
import os
from typing import TYPE_CHECKING, Any

from dp_sidecar_shim.header import DTYPES, CheckpointError, Entry, entries

if TYPE_CHECKING:
    import torch


class ExtentError(Exception):
    """The extents make no sense, whatever the segment holds."""

    error_kind = "request"


class HeldError(Exception):
    """Somebody keeps tensors that lie in the map."""

    error_kind = "load"


class Segment:
    """A mapped segment, its files' headers checked. Must be closed."""

    def __init__(self, path: str, files: list[str], extents: list[tuple[int, int]]) -> None:
        self.entries: list[Entry] = []
        self._path = path
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        # Address of the map, and its length.
        self._start = self._size = 0
        _check(files, extents)
        try:
            size = self._open()
            view = self._view
            if view is None:
                raise CheckpointError(f"segment {path} is empty")
            for file, (offset, length) in zip(files, extents, strict=True):
                if offset + length > size:
                    raise CheckpointError(
                        f"{file} should end at byte {offset + length} of segment {path}, "
                        f"which has {size}"
                    )
                part = view[offset : offset + length]
                with part:
                    self.entries.extend(
                        entries(
                            file, length, lambda at, n, part=part: bytes(part[at : at + n]), offset
                        )
                    )
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        import torch

        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open segment {self._path}: {error.strerror}") from error
        try:
            size = os.fstat(descriptor).st_size
            if size > 0:
                self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
                self._view = memoryview(self._map)
                self._size = size
                self._start = torch.frombuffer(self._view, dtype=torch.uint8).data_ptr()
        except OSError as error:
            raise CheckpointError(f"cannot map segment {self._path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        return size

    @property
    def bytes(self) -> int:
        """Sum of the tensors' byte lengths."""
        return sum(entry.length for entry in self.entries)

    def read(self, entry: Entry) -> tuple[torch.Tensor, Any]:
        """One tensor, a view of the map, and its bytes."""
        import torch

        dtype = getattr(torch, DTYPES[entry.dtype])
        if self._view is None:
            raise CheckpointError(f"segment {self._path} is closed")
        part = self._view[entry.offset : entry.offset + entry.length]
        if not entry.length:
            return torch.empty(entry.shape, dtype=dtype, device="cpu"), part
        raw = torch.frombuffer(part, dtype=torch.uint8)
        if raw.data_ptr() % dtype.itemsize:
            # Kernels may count on aligned elements.
            raw = raw.clone()
        return raw.view(dtype).reshape(entry.shape), part

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor lies in the map."""
        return self._start <= tensor.data_ptr() < self._start + self._size

    def close(self) -> None:
        """Unmap. Raises `HeldError` while tensors are left that lie in the map."""
        if self._map is None:
            return
        for attempt in range(2):
            try:
                if self._view is not None:
                    self._view.release()
                    self._view = None
                self._map.close()
                self._map = None
                return
            except BufferError:
                if attempt == 0:
                    gc.collect()
        raise HeldError(f"tensors of segment {self._path} are still in use after the load")


def _check(files: list[str], extents: list[tuple[int, int]]) -> None:
    if len(files) != len(extents):
        raise ExtentError(f"{len(files)} files and {len(extents)} extents")
    if len(set(files)) != len(files):
        raise ExtentError("a file is listed twice")
    end = 0
    for (offset, length), file in sorted(zip(extents, files, strict=True)):
        if offset < end:
            raise ExtentError(f"the extent of {file} begins at byte {offset}, within another one")
        end = offset + length
