"""Headers, extents and requests that are damaged at random: refused in words, never by a surprise.

Seeded and bounded; `SHIM_FUZZ_SEEDS=100000` in the environment makes it run for longer.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from pathlib import Path

import pytest
from test_package import a_request, a_worker

from dp_sidecar_shim import lora, reload, worker
from dp_sidecar_shim.calls import ShimError
from dp_sidecar_shim.checkpoint import Checkpoint, Consumption, tensors
from dp_sidecar_shim.segment import Segment

pytest.importorskip("torch")
msgspec = pytest.importorskip("msgspec")

SEEDS = int(os.environ.get("SHIM_FUZZ_SEEDS", "400"))
NAMES = ["a", "a.bias", "", "__metadata__", "\0", "ü" * 40]
NUMBERS = [0, 1, 2, 8, 9, 16, 255, 1 << 31, 1 << 63, 1 << 70, -1, -8, 1.5, 1e300, True, None, "8"]
DTYPES = ["F32", "BF16", "U8", "F99", "", "f32", None, 7, ["F32"], {}]


def value(random: random.Random, depth: int = 0) -> object:
    """Anything that JSON or msgpack can say."""
    kind = random.randrange(6 if depth < 3 else 4)
    if kind == 4:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 5:
        return {random.choice(NAMES): value(random, depth + 1) for _ in range(random.randrange(3))}
    return random.choice([NUMBERS, NUMBERS, NAMES, DTYPES][kind])


def content(random: random.Random) -> bytes:
    """What could be taken for a safetensors file: a good one, with some damage."""
    header: dict[str, object] = {}
    end = 0
    # JSON can say half a character, msgpack cannot.
    for name in random.sample([*NAMES, "\ud800"], random.randrange(4)):
        dtype, size = random.choice([("F32", 4), ("BF16", 2), ("U8", 1)])
        shape = [random.randrange(4) for _ in range(random.randrange(3))]
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    for item in list(header.values()):
        if random.random() < 0.2:
            item[random.choice([*item, "more"])] = value(random)
    text = json.dumps(header if random.random() < 0.9 else value(random)).encode()
    length = len(text) if random.random() < 0.9 else random.choice([0, 1, 7, 1 << 20, 1 << 63])
    raw = bytearray(struct.pack("<Q", length) + text + bytes(end))
    for _ in range(random.choice([0, 0, 0, 0, 1, 3])):
        raw[random.randrange(len(raw))] = random.randrange(256)
    return bytes(raw[: random.randrange(len(raw))] if random.random() < 0.1 else raw)


def take(source) -> int:
    """Everything that a source says it has; how much that was."""
    account = Consumption("none")
    try:
        for _, one in tensors(source, account):
            assert one.numel() * one.element_size() <= 255
            del one
    finally:
        source.close()
    return account.tensors


def test_a_damaged_file_is_refused_or_gives_what_its_header_says(tmp_path: Path):
    taken = refused = 0
    for seed in range(SEEDS):
        chance = random.Random(seed)
        raw = content(chance)
        (tmp_path / "f").write_bytes(raw)
        (tmp_path / "segment").write_bytes(b"\xff" * 3 + raw + b"\xff" * 99)
        try:
            count = take(Checkpoint(str(tmp_path), ["f"]))
        except ShimError:
            refused += 1
            with pytest.raises(ShimError):
                take(Segment(str(tmp_path / "segment"), ["f"], [[3, len(raw)]]))
        else:
            taken += count
            assert take(Segment(str(tmp_path / "segment"), ["f"], [[3, len(raw)]])) == count, seed
    # It is worth something only if both happen.
    assert min(taken, refused) > SEEDS // 5
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("method", [worker.load, lora.lora])
def test_a_damaged_request_is_answered_with_values_that_msgpack_knows(
    tmp_path: Path, method, monkeypatch
):
    # By chance a request may be in order.
    monkeypatch.setattr(reload, "reload_weights", lambda _, weights: [None for _ in weights])
    monkeypatch.setattr(reload, "torn", lambda _: False)
    monkeypatch.setattr(reload, "let_go", lambda _, source: source.close())
    for seed in range(SEEDS):
        chance = random.Random(seed)
        (tmp_path / "f").write_bytes(content(chance))
        request = a_request(path=str(tmp_path / "f"), files=["f"], extents=[[0, 40]], config="{}")
        request.update(op="check", name="n", id=1, digest_kind="none")
        if chance.random() < 0.5:
            request.update(path=str(tmp_path), extents=None)
        for _ in range(chance.randrange(3)):
            request[chance.choice(list(request))] = value(chance)
        answer = method(a_worker(), request if chance.random() < 0.95 else value(chance))
        kinds = ("request", "protocol", "files", "mismatch", "disabled")
        if answer["ok"]:
            assert (answer["state"], answer["error"]) == ("loaded", None), (seed, answer)
        else:
            assert answer["state"] == "unchanged", (seed, answer)
            assert answer["error_kind"] in kinds, (seed, answer)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer)) == answer
