"""Reading and hashing of checkpoints, against the vectors of protocol/docs/weight-update.md."""

from __future__ import annotations

import json
import struct
import sys

import pytest

from dp_sidecar_shim.calls import ShimError
from dp_sidecar_shim.checkpoint import Checkpoint, Consumption, tensors

torch = pytest.importorskip("torch")

WHOLE = "1be5773b02fdc5720476d39d52ead12cd6337b2ec6c46c2fa30c1605fe645988"


def write(path, items, header_changes=None, cut=0):
    """A safetensors file of (name, dtype, shape, bytes), in this order."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, dtype, shape, raw in items:
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    header.update(header_changes or {})
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded + data
    path.write_bytes(content[: len(content) - cut])


A = ("a.bias", "F32", [2], struct.pack("<2f", 1.0, 2.0))
B = ("b", "BF16", [], b"\x80\x3f")


def consume(path, files, kind="blake3"):
    account = Consumption(kind)
    with Checkpoint(str(path), files) as checkpoint:
        found = dict(tensors(checkpoint, account))
    return found, account


@pytest.mark.parametrize("split", [False, True])
def test_the_digest_is_the_documented_one_however_files_are_cut(tmp_path, split):
    if split:
        write(tmp_path / "1.safetensors", [B])
        write(tmp_path / "2.safetensors", [A])
        found, account = consume(tmp_path, ["1.safetensors", "2.safetensors"])
    else:
        write(tmp_path / "model.safetensors", [B, A])
        found, account = consume(tmp_path, ["model.safetensors"])
    assert account.digest() == WHOLE
    assert (account.tensors, account.bytes, account.kind) == (2, 10, "blake3")
    assert torch.equal(found["a.bias"], torch.tensor([1.0, 2.0]))
    assert found["b"].dtype == torch.bfloat16
    assert found["b"].shape == ()
    assert found["b"].item() == 1.0


def test_tensors_come_in_the_order_of_their_start(tmp_path):
    write(tmp_path / "m.safetensors", [("z", "U8", [1], b"1"), ("a", "U8", [1], b"2")])
    assert list(consume(tmp_path, ["m.safetensors"])[0]) == ["z", "a"]


def test_what_safetensors_writes_is_read_alike(tmp_path):
    from safetensors.torch import load_file, save_file

    content = {
        "half": torch.randn(3, 5).half(),
        "empty": torch.empty(0, 4),
        "f8": torch.randn(8).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "long": torch.arange(7),
    }
    save_file(content, tmp_path / "m.safetensors")
    found, account = consume(tmp_path, ["m.safetensors"])
    expected = load_file(tmp_path / "m.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes(found[name].reshape(-1).view(torch.uint8).numpy()) == bytes(
            tensor.reshape(-1).view(torch.uint8).numpy()
        )
    assert account.tensors == 5


def test_without_blake3_it_counts_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blake3", None)
    write(tmp_path / "m.safetensors", [A, B])
    _, account = consume(tmp_path, ["m.safetensors"])
    assert (account.kind, account.digest(), account.tensors) == ("none", None, 2)


@pytest.mark.parametrize(
    ("changes", "cut", "says"),
    [
        ({}, 1, "truncated"),
        ({"a.bias": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, 0, "dtype F99"),
        ({"a.bias": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 0, "should have 12"),
        ({"a.bias": {"dtype": "F32", "shape": [2], "data_offsets": [-9, -1]}}, 0, "malformed"),
        ({"a.bias": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 0, "malformed"),
        ({"a.bias": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, 0, "should have 4"),
        ({"c": {"dtype": "U8", "shape": [2], "data_offsets": [7, 9]}}, 0, "overlaps"),
        ({"a.bias": {"dtype": "F32", "shape": [2]}}, 0, "malformed"),
        ({"a.bias": 5}, 0, "malformed"),
    ],
)
def test_a_file_that_is_not_what_its_header_says_is_refused(tmp_path, changes, cut, says):
    write(tmp_path / "m.safetensors", [A, B], changes, cut)
    with pytest.raises(ShimError, match=says):
        Checkpoint(str(tmp_path), ["m.safetensors"])


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, struct.pack("<Q", 4) + b"[1]x"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ShimError):
        Checkpoint(str(tmp_path), ["m.safetensors"])


def test_a_file_cut_while_it_is_read_is_an_error_and_not_a_signal(tmp_path):
    write(tmp_path / "m.safetensors", [A, B])
    with Checkpoint(str(tmp_path), ["m.safetensors"]) as checkpoint:
        size = (tmp_path / "m.safetensors").stat().st_size
        with (tmp_path / "m.safetensors").open("r+b") as file:
            file.truncate(size - 1)
        with pytest.raises(ShimError, match="ends inside tensor b"):
            list(tensors(checkpoint, Consumption("none")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ShimError, match=r"gone\.safetensors"):
        Checkpoint(str(tmp_path), ["gone.safetensors"])
