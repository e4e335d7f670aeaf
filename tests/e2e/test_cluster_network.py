"""The hosts that the cluster tests stand on: what they claim to do, they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import RUN, Cluster, sweep
from processes import Process, wait_for

# Prints a digest of everything that each connection sends.
SINK = """
import hashlib, socket, sys
listener = socket.create_server((sys.argv[1], 0))
print("port", listener.getsockname()[1], flush=True)
while True:
    stream, _ = listener.accept()
    digest, count = hashlib.sha256(), 0
    while data := stream.recv(1 << 20):
        digest.update(data)
        count += len(data)
    print("got", count, digest.hexdigest(), flush=True)
    stream.close()
"""
# Sends so many bytes, and prints their digest.
SOURCE = """
import hashlib, socket, sys
data = bytes(range(256)) * (int(sys.argv[3]) // 256)
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as stream:
    stream.sendall(data)
print("sent", len(data), hashlib.sha256(data).hexdigest(), flush=True)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(2, tmp_path_factory.mktemp("network"), shm="8m") as cluster:
        yield cluster


@pytest.fixture
def sink(cluster, tmp_path):
    node = cluster.nodes[1]
    command = [*node.prefix, sys.executable, "-c", SINK, node.address]
    process = Process("sink", command, dict(os.environ), tmp_path / "sink.log")
    process.port = process.wait_line("port").split()[1]
    yield process
    process.kill()


def send(cluster: Cluster, sink: Process, size: int) -> tuple[str, float]:
    """The line that tells what was sent from host 0 to the sink on host 1, and the seconds."""
    command = [sys.executable, "-c", SOURCE, cluster.nodes[1].address, sink.port, str(size)]
    began = time.monotonic()
    done = subprocess.run(
        [*cluster.nodes[0].prefix, *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), time.monotonic() - began


def test_hosts_reach_each_other_and_are_reached_from_here(cluster, sink):
    sent, _ = send(cluster, sink, 1 << 20)
    assert sink.wait_line("^got") == sent.replace("sent", "got")
    command = [sys.executable, "-c", SOURCE, cluster.nodes[1].address, sink.port, "512"]
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    sink.wait_line("^got 512 ")


def test_a_cut_cable_lets_nothing_through_and_a_healed_one_does(cluster, sink):
    probe = (
        "import socket, sys\nsocket.create_connection((sys.argv[1], int(sys.argv[2])), 0.5).close()"
    )
    command = [*cluster.nodes[0].prefix, sys.executable, "-c", probe]
    command += [cluster.nodes[1].address, sink.port]
    with cluster.nodes[1].unplugged():
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
        assert b"timed out" in done.stderr or b"No route" in done.stderr, done.stderr
    sent, _ = send(cluster, sink, 1 << 16)
    assert f"sent {1 << 16}" in sent


def test_a_slow_host_is_slow(cluster, sink):
    size = 1 << 20
    with cluster.nodes[0].slow("10mbit"):
        began = time.monotonic()
        send(cluster, sink, size)
        sink.wait_line(f"^got {size} ")
        slow = time.monotonic() - began
    # 1 MiB at 10 Mbit/s, less the bucket.
    assert slow > 0.6, slow
    _, fast = send(cluster, sink, size)
    assert fast < slow


def test_one_byte_is_flipped_on_the_way_and_then_no_more(cluster, sink, tmp_path):
    size = 4 << 20
    with cluster.nodes[0].flipping(after=3 << 20, log=tmp_path / "flip.log") as flip:
        small, _ = send(cluster, sink, 1 << 20)
        sink.wait_line(small.replace("sent", "got"))
        sent, _ = send(cluster, sink, size)
        line = sink.wait_line(f"^got {size} ")
        assert line != sent.replace("sent", "got")
        assert f"flipped byte {3 << 20}" in flip.log.read_text()
        again, _ = send(cluster, sink, size)
        sink.wait_line(again.replace("sent", "got"))
    send(cluster, sink, size)


def test_shared_memory_and_private_files_are_of_one_host(cluster):
    one, two = cluster.nodes
    one.run("sh", "-c", "echo mine > /dev/shm/segment")
    assert one.shared_memory() == ["segment"]
    assert two.shared_memory() == []
    assert not Path("/dev/shm/segment").exists()
    full = "dd if=/dev/zero of=/dev/shm/large bs=1M count=16"
    assert "No space left" in one.run("sh", "-c", f"{full} 2>&1", check=False)
    one.run("rm", "/dev/shm/segment", "/dev/shm/large")
    one.sees(cluster.private / "file").write_text("here")
    assert one.run("cat", str(cluster.private / "file")) == "here"
    assert "No such file" in two.run("sh", "-c", f"cat {cluster.private}/file 2>&1", check=False)


def test_what_a_killed_test_process_left_is_swept(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from cluster import Cluster\n"
        f"cluster = Cluster(1, Path({str(tmp_path)!r}))\n"
        "import subprocess\n"
        "child = subprocess.Popen([*cluster.nodes[0].prefix, 'sleep', '1000'])\n"
        "print(cluster.mark, child.pid, flush=True); time.sleep(1000)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert child.stdout is not None
    mark, sleeper = child.stdout.readline().split()
    assert (RUN / f"{mark}-0").exists()
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    child.stdout.close()
    # Another process that makes a cluster now may be faster.
    sweep()
    assert not list(RUN.glob(f"{mark}*"))
    wait_for("the process in it is gone", 5, lambda: not Path(f"/proc/{sleeper}").exists())
