"""Tensors of a shared memory segment: as from files, without copies, and nothing is left."""

from __future__ import annotations

import gc
import os
import struct
from pathlib import Path

import pytest
from test_checkpoint import WHOLE, A, B, write

from dp_sidecar_shim import PROTOCOL, reload, worker
from dp_sidecar_shim.calls import ShimError
from dp_sidecar_shim.checkpoint import Checkpoint, Consumption, tensors
from dp_sidecar_shim.segment import Segment

torch = pytest.importorskip("torch")


def pack(directory: Path, files: list[str], segment: Path, gap: int = 4096):
    """Lay the files into a segment, the first one not at its start; gives their extents."""
    content, extents = b"\xff" * gap, []
    for file in files:
        raw = (directory / file).read_bytes()
        extents.append((len(content), len(raw)))
        content += raw
        content += b"\xff" * (-len(content) % gap)
    segment.write_bytes(content)
    return extents


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.fixture
def two_files(tmp_path):
    write(tmp_path / "1.safetensors", [B])
    write(tmp_path / "2.safetensors", [A])
    files = ["1.safetensors", "2.safetensors"]
    segment = tmp_path / "segment"
    return segment, files, pack(tmp_path, files, segment)


def test_the_digest_is_the_documented_one_and_the_map_is_closed(two_files):
    segment, files, extents = two_files
    account = Consumption("blake3")
    source = Segment(str(segment), files, extents)
    assert mapped(segment)
    values = {name: tensor.tolist() for name, tensor in tensors(source, account)}
    source.close()
    assert account.digest() == WHOLE
    assert values == {"a.bias": [1.0, 2.0], "b": 1.0}
    assert not mapped(segment)


def test_what_comes_from_a_segment_is_what_comes_from_the_files(tmp_path):
    from safetensors.torch import save_file

    content = {
        "half": torch.randn(3, 5).half(),
        "bf16": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "f8": torch.randn(8).to(torch.float8_e4m3fn),
        "f8b": torch.randn(8).to(torch.float8_e5m2),
        "flag": torch.tensor([True, False]),
        "long": torch.arange(7),
    }
    save_file(content, tmp_path / "m.safetensors")
    # A gap of 1 puts every tensor at an odd address.
    for gap in (1, 4096):
        extents = pack(tmp_path, ["m.safetensors"], tmp_path / "segment", gap)
        source = Segment(str(tmp_path / "segment"), ["m.safetensors"], extents)
        with Checkpoint(str(tmp_path), ["m.safetensors"]) as files:
            expected = list(tensors(files, Consumption("none")))
            found = list(tensors(source, Consumption("none")))
            assert [name for name, _ in found] == [name for name, _ in expected]
            for (name, one), (_, other) in zip(found, expected, strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape), name
                raw = [bytes(t.reshape(-1).view(torch.uint8).numpy()) for t in (one, other)]
                assert raw[0] == raw[1], name
                assert one.data_ptr() % one.dtype.itemsize == 0
                in_place = one.numel() > 0 and (gap == 4096 or one.dtype.itemsize == 1)
                assert source.holds(one) == in_place, name
        del found, one, raw
        source.close()


def test_a_loader_that_writes_into_a_tensor_does_not_write_into_the_segment(two_files):
    segment, files, extents = two_files
    before = segment.read_bytes()
    source = Segment(str(segment), files, extents)
    for _, tensor in tensors(source, Consumption("none")):
        tensor.mul_(0)
    del tensor
    source.close()
    assert segment.read_bytes() == before


def test_a_tensor_that_is_kept_keeps_the_map_and_is_reported(two_files):
    segment, files, extents = two_files
    source = Segment(str(segment), files, extents)
    kept = [tensor for _, tensor in tensors(source, Consumption("none"))]
    with pytest.raises(ShimError, match="still in use"):
        source.close()
    kept.clear()
    source.close()
    source.close()
    assert not mapped(segment)


@pytest.mark.parametrize(
    ("extents", "kind", "says"),
    [
        ([(0, 10)], "request", "2 files and 1 extents"),
        ([(0, 200), (199, 200)], "request", "within another"),
        ([(4096, 1 << 40), (0, 100)], "files", "should end at byte"),
        ([(4096, 20), (0, 100)], "files", "no complete safetensors file"),
        ([(4096, 4), (0, 100)], "files", "no complete safetensors file"),
    ],
)
def test_extents_that_make_no_sense_are_refused(two_files, extents, kind, says):
    segment, files, _ = two_files
    with pytest.raises(ShimError, match=says) as refused:
        Segment(str(segment), files, extents)
    assert refused.value.error_kind == kind
    assert not mapped(segment)


def test_a_tensor_must_not_reach_beyond_its_files_extent(two_files):
    segment, files, extents = two_files
    (first, (offset, length)) = extents
    with pytest.raises(ShimError, match="truncated"):
        Segment(str(segment), files, [first, (offset, length - 1)])
    assert not mapped(segment)


@pytest.mark.parametrize("content", [None, b""])
def test_a_segment_that_is_missing_or_empty_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "segment").write_bytes(content)
    with pytest.raises(ShimError, match="segment"):
        Segment(str(tmp_path / "segment"), ["a"], [(0, 8)])


class FakeWorker:
    """Enough of a worker for a load; `reload_weights` is what the test says."""

    def __init__(self, take):
        self.model = torch.nn.Module()
        self.model.a = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        self.take = take
        self.rank = 0
        self.vllm_config = type("Config", (), {"parallel_config": object()})()

    def get_model(self):
        return self.model


@pytest.fixture
def load(monkeypatch, two_files):
    segment, files, extents = two_files
    monkeypatch.setattr(reload, "reload_weights", lambda who, weights: who.take(who, weights))
    monkeypatch.setattr(reload, "clean_up", lambda who: True)

    def call(take, **changes):
        who = FakeWorker(take)
        request = {
            "protocol": PROTOCOL,
            "path": str(segment),
            "files": files,
            "extents": [list(extent) for extent in extents],
            "tensors": 2,
            "bytes": 10,
            "digest_kind": "none",
        }
        answer = worker.load(who, {**request, **changes})
        gc.collect()
        return who, answer, segment

    return call


def test_a_load_counts_what_it_takes_and_closes_the_map(load):
    def copy(who, weights):
        for name, tensor in weights:
            if name == "a.bias":
                who.model.a.copy_(tensor)

    who, answer, segment = load(copy)
    assert (answer["ok"], answer["state"], answer["digest_kind"]) == (True, "loaded", "none")
    assert (answer["tensors"], answer["bytes"], answer["digest"]) == (2, 10, None)
    assert who.model.a.tolist() == [1.0, 2.0]
    assert not mapped(segment)
    _, answer, _ = load(copy, digest=WHOLE, digest_kind="blake3")
    assert (answer["ok"], answer["digest"]) == (True, WHOLE)


def test_a_model_that_kept_a_view_gets_memory_of_its_own(load):
    def keep(who, weights):
        for name, tensor in weights:
            if name == "a.bias":
                who.model.a.data = tensor

    who, answer, segment = load(keep)
    assert answer["ok"], answer
    assert not mapped(segment)
    segment.write_bytes(b"\0" * segment.stat().st_size)
    assert who.model.a.tolist() == [1.0, 2.0]


def test_a_failed_load_leaves_no_map_whatever_its_frames_held(load):
    def fail(who, weights):
        held = list(weights)
        try:
            raise KeyError(len(held))
        except KeyError:
            raise ValueError("boom")  # noqa: B904

    _, answer, segment = load(fail)
    assert (answer["ok"], answer["state"]) == (False, "restored-meta"), answer
    assert answer["error"] == "ValueError: boom"
    assert not mapped(segment)


def test_a_view_that_cannot_be_taken_back_makes_the_load_a_failure(load):
    kept = []
    _, answer, segment = load(lambda who, weights: kept.extend(weights))
    assert (answer["ok"], answer["state"], answer["error_kind"]) == (False, "mixed", "load")
    assert "still in use" in answer["error"]
    kept.clear()
    gc.collect()
    assert not mapped(segment)


def test_a_refused_load_leaves_no_map(load):
    for changes, kind in (
        ({"tensors": 3}, "mismatch"),
        ({"extents": [[0, 8], [8, 8]]}, "files"),
        ({"extents": [[0, 8]]}, "request"),
    ):
        _, answer, segment = load(None, **changes)
        assert (answer["state"], answer["error_kind"]) == ("unchanged", kind), answer
        assert not mapped(segment)


def test_a_tensor_that_occurs_twice_is_refused(load, tmp_path):
    write(tmp_path / "1.safetensors", [A])
    extents = pack(tmp_path, ["1.safetensors", "2.safetensors"], tmp_path / "segment")
    changes = {"extents": [list(extent) for extent in extents], "bytes": 16}
    _, answer, _ = load(None, **changes)
    assert (answer["state"], answer["error_kind"]) == ("unchanged", "files"), answer


def test_a_segment_in_shared_memory_works_alike(two_files):
    segment, files, extents = two_files
    path = Path("/dev/shm") / f"dp-sidecar-test-{os.getpid()}"
    path.write_bytes(segment.read_bytes())
    try:
        source = Segment(str(path), files, extents)
        account = Consumption("blake3")
        for item in tensors(source, account):
            del item
        source.close()
        assert account.digest() == WHOLE
    finally:
        path.unlink()


def test_a_header_is_not_believed(tmp_path):
    for raw in (struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 2) + b"[]"):
        (tmp_path / "segment").write_bytes(raw)
        with pytest.raises(ShimError):
            Segment(str(tmp_path / "segment"), ["a"], [(0, len(raw))])
