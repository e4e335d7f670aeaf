"""Gives the tensors of safetensors files that lie in a shared memory segment, without a copy."""

# The map is private: a loader that changes a tensor in place gets a page of its own. It neither
# writes to the segment nor ends the engine, as it would on a map that is only for reading.

from __future__ import annotations

import gc
import mmap
import os
from typing import TYPE_CHECKING, Any

from dp_sidecar_shim.calls import ShimError, files_of, is_count
from dp_sidecar_shim.header import Entry, entries

if TYPE_CHECKING:
    import torch


class Segment:
    """A mapped segment, its files' headers checked. Must be closed."""

    def __init__(self, path: str, files: list[str], extents: list[Any]) -> None:
        import torch

        self.entries: list[Entry] = []
        self._path = path
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")
        # Address of the map.
        self._start = 0
        check_extents(files, extents)
        try:
            with files_of(f"segment {path}"), open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
                self._view = memoryview(self._map)
                self._start = torch.frombuffer(self._view, dtype=torch.uint8).data_ptr()
            for file_name, (offset, length) in zip(files, extents, strict=True):
                with files_of(f"{file_name} in segment {path}"):
                    if offset + length > size:
                        raise ValueError(f"should end at byte {offset + length} of {size}")
                    self.entries += entries(file_name, self._bytes, offset, length)
        except BaseException:
            self.close()
            raise

    def _bytes(self, offset: int, length: int) -> bytes:
        return bytes(self._view[offset : offset + length])

    # The bytes of one tensor, a view of the map.
    def read(self, entry: Entry) -> torch.Tensor:
        import torch

        if not entry.length:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        part = self._view[entry.offset : entry.offset + entry.length]
        return torch.frombuffer(part, dtype=torch.uint8)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor lies in the map."""
        return self._start <= tensor.data_ptr() < self._start + len(self._view)

    def close(self) -> None:
        """Unmap. Raises while tensors are left that lie in the map."""
        for _ in range(2):
            try:
                self._view.release()
                if self._map is not None:
                    self._map.close()
                return
            except BufferError:
                gc.collect()
        raise ShimError("load", f"tensors of segment {self._path} are still in use after the load")


def check_extents(files: list[str], extents: list[Any]) -> None:
    """Raise unless these are the places of the files, each its own, whatever the segment holds."""
    for pair in extents:
        if type(pair) not in (list, tuple) or len(pair) != 2 or not all(map(is_count, pair)):
            raise ShimError("request", f"an extent is {pair!r}, expected offset and length")
    if len(files) != len(extents) or len(set(files)) != len(files):
        raise ShimError("request", f"{len(set(files))} files and {len(extents)} extents")
    end = 0
    for offset, length in sorted(map(tuple, extents)):
        if offset < end:
            raise ShimError("request", f"an extent begins at byte {offset}, within another one")
        end = offset + length
