"""What a user or a stranger can get wrong, and what it gets. Few of these start an engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time

import pytest
from frontends import IN_PROCESS_WORKER, MODEL_FLAGS
from harness import World
from models import Models
from processes import LOOPBACK, START_LIMIT, free_port


@pytest.fixture
def models(tiny_models) -> Models:
    return Models.read(tiny_models, "dense")


def waiting(port: int) -> list[str]:
    """Flags of a sidecar that waits for engines of somebody else."""
    return ["--data-parallel-rpc-port", str(port), "--model-kind", "dense"]


def test_a_model_that_is_not_there_is_refused_by_name(world):
    sidecar = world.sidecar("sidecar", [], [str(world.folder / "no-such-model"), *MODEL_FLAGS])
    assert sidecar.wait_exit() == 2, sidecar.tail()
    assert "no-such-model" in sidecar.log.read_text()


def test_engines_that_end_while_they_start_fail_at_once_with_their_last_words(world, models):
    broken = world.folder / "broken"
    shutil.copytree(models.path(0), broken)
    (broken / "model.safetensors").write_bytes(b"nothing of the kind")
    began = time.monotonic()
    sidecar = world.sidecar(
        "sidecar", ["--max-restarts", "0"], [str(broken), *MODEL_FLAGS, *IN_PROCESS_WORKER]
    )
    assert sidecar.wait_exit(START_LIMIT) == 6, sidecar.tail()
    text = sidecar.log.read_text()
    assert "safetensors" in text.lower() or "SafetensorError" in text, sidecar.tail()
    assert "rank 0" in text or "rank 1" in text or "engine-" in text, sidecar.tail()
    assert time.monotonic() - began < 150, "a start limit was waited out"


def test_a_flag_that_vllm_does_not_know_fails_at_once_and_is_named(world, models):
    sidecar = world.sidecar(
        "sidecar", ["--max-restarts", "0"], [models.path(0), "--no-such-flag-of-vllm"]
    )
    assert sidecar.wait_exit(START_LIMIT) in (2, 6)
    assert "no-such-flag-of-vllm" in sidecar.log.read_text()


def test_a_state_directory_in_use_is_refused_by_name(world):
    port, other = free_port(), free_port()
    first = world.sidecar("first", waiting(port))
    first.wait_status("up", lambda status: status["sidecar"]["pid"] == first.pid)
    second = world.sidecar("second", waiting(other), state_dir=first.state_dir)
    assert second.wait_exit() == 8, second.tail()
    assert str(first.state_dir) in second.log.read_text()
    assert str(first.pid) in second.log.read_text()
    assert first.status()["sidecar"]["pid"] == first.pid
    assert first.terminate() == 0


def test_a_taken_handshake_port_is_refused_by_name(world):
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        sidecar = world.sidecar("sidecar", waiting(port))
        assert sidecar.wait_exit() == 8, sidecar.tail()
        assert str(port) in sidecar.log.read_text()


def test_commands_without_a_sidecar_say_so(world):
    port = free_port()
    sidecar = world.sidecar("sidecar", waiting(port))
    sidecar.wait_status("up", lambda status: True)
    assert sidecar.terminate() == 0
    for words in (("status",), ("pause",), ("update", "--path", "/tmp"), ("frontend", "list")):
        done = sidecar.cli(*words)
        assert done.returncode == 14, (words, done)
        assert str(sidecar.state_dir) in done.stderr


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x00" * 200,
    os.urandom(4096),
    # A proper greeting, then a frame that claims 2^62 bytes.
    b"\xff" + b"\x00" * 8 + b"\x7f\x03\x00NULL" + b"\x00" * 16 + b"\x00" + b"\x00" * 31
    + b"\x02\x40" + b"\x00" * 7,
]  # fmt: skip


def test_garbage_on_the_handshake_port_costs_the_stranger_its_connection_only(world):
    port = free_port()
    sidecar = world.sidecar("sidecar", waiting(port))
    sidecar.wait_status("up", lambda status: True)
    for garbage in GARBAGE:
        stranger = socket.create_connection((LOOPBACK, port), timeout=10)
        with stranger as connection, contextlib.suppress(OSError):
            connection.sendall(garbage)
            connection.settimeout(20)
            while connection.recv(4096):
                pass
    assert sidecar.status()["sidecar"]["pid"] == sidecar.pid
    assert sidecar.terminate() == 0


def hello(context, port: int, rank: int, payload: bytes | None = None):
    """An engine's first words, by libzmq."""
    import zmq

    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.IDENTITY, rank.to_bytes(2, "little"))
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(f"tcp://{LOOPBACK}:{port}")
    peer.send(payload or hello_message())
    return peer


def hello_message() -> bytes:
    import msgspec

    return msgspec.msgpack.encode({"status": "HELLO", "local": True, "headless": True})


def test_engines_that_break_the_handshake_are_named_and_others_go_on(world):
    import zmq

    port = free_port()
    sidecar = world.sidecar("sidecar", waiting(port))
    sidecar.wait_status("up", lambda status: True)
    context = zmq.Context()
    try:
        stranger = hello(context, port, 7)
        sidecar.wait_line(r"(?i)(unknown|unexpected|not.*expected|identity|rank).*\b7\b")
        nonsense = hello(context, port, 1, b"\xc1\xc1")
        first = hello(context, port, 0)
        assert first.poll(10_000), sidecar.tail()
        assert first.recv(), "no INIT"
        first.send(hello_message())
        sidecar.wait_line(r"(?i)second hello.*rank 0")
        assert sidecar.status()["sidecar"]["pid"] == sidecar.pid
        for peer in (stranger, nonsense, first):
            peer.close()
    finally:
        context.destroy(0)
    assert sidecar.terminate() == 0


def test_updates_of_engines_without_the_shim_are_refused_in_plain_words(
    world: World, models: Models
):
    """The shim missing shows when the engine starts, and again where it matters: at an update."""
    bare = world.folder / "bare"
    bare.mkdir()
    for item in world.overlay.iterdir():
        if item.name.startswith("dp_sidecar_test_plugins"):
            shutil.copytree(item, bare / item.name)
    sidecar = world.sidecar(
        "sidecar",
        ["--max-restarts", "0"],
        [models.path(0), *MODEL_FLAGS, *IN_PROCESS_WORKER],
        env=world.in_process(PYTHONPATH=str(bare)),
        size=1,
    )
    sidecar.wait_line(r"(?i)shim", START_LIMIT)
    sidecar.wait_serving()
    done = sidecar.update(models.path(1))
    assert done.returncode == 10, done
    assert "shim" in done.stdout + done.stderr
    assert sidecar.engines()[0]["state"] == "admitted"
