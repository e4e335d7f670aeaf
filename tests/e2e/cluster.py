"""Hosts of a cluster as network namespaces on one machine.

A cluster has a hub namespace with a bridge, and one namespace per host, each with one interface
`eth0` on that bridge. The test process has a leg in it, too, so that it can ask frontends. Every
host has a mount namespace of its own with its own /dev/shm, and a folder that only it sees. Root
is needed.

    dps<pid>x<k>-0  10.77.N.1  ---+
    dps<pid>x<k>-1  10.77.N.2  ---+--- bridge in dps<pid>x<k>-hub ---  10.77.N.254, this process

Nothing outlives the test process for long: `sweep` removes what a crashed one has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from processes import Process, alive

PREFIX = "dps"
NAME = re.compile(rf"{PREFIX}(\d+)x\d+-\w+")
RUN = Path("/run/netns")
# Only one process at a time looks for a free subnet.
LOCK = Path("/tmp/dps-network.lock")
DEVICE = "eth0"

_serial = itertools.count()


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def missing() -> str | None:
    """Why this machine cannot have clusters, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc", "nft", "nsenter", "unshare"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"program `{program}` is missing: apt-get install iproute2 nftables util-linux"
    return None


def sweep() -> list[str]:
    """Removes the namespaces, and ends the processes in them, of test processes that are gone."""
    removed = []
    for path in sorted(RUN.glob(f"{PREFIX}*")) if RUN.is_dir() else []:
        match = NAME.fullmatch(path.name)
        if match and not alive(int(match[1])):
            remove_namespace(path.name)
            removed.append(path.name)
    return removed


def remove_namespace(name: str) -> None:
    """Ends everything in a namespace and deletes it."""
    deadline = time.monotonic() + 10
    while pids := run("ip", "netns", "pids", name, check=False).split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise AssertionError(f"processes {pids} in namespace {name} cannot be killed")
        time.sleep(0.02)
    run("ip", "netns", "del", name, check=False)


@dataclass
class Node:
    """One host."""

    name: str
    address: str
    # The bridge's end of its cable, in the hub.
    cable: str
    hub: str
    # Only this host sees what is in it; the same path on all.
    private: Path
    holder: subprocess.Popen[bytes] = field(repr=False)

    @property
    def prefix(self) -> list[str]:
        """In front of a command that is to run on this host. The process keeps its pid."""
        return [
            "nsenter",
            f"--net={RUN / self.name}",
            f"--mount=/proc/{self.holder.pid}/ns/mnt",
            "--",
        ]

    def env(self) -> dict[str, str]:
        """What vLLM must know about its host."""
        return {"VLLM_HOST_IP": self.address, "GLOO_SOCKET_IFNAME": DEVICE}

    def sees(self, path: Path | str) -> Path:
        """The path under which this process finds a file of the host."""
        return Path(f"/proc/{self.holder.pid}/root") / str(path).lstrip("/")

    def shared_memory(self) -> list[str]:
        """What is in its /dev/shm."""
        return sorted(path.name for path in self.sees("/dev/shm").iterdir())

    def run(self, *command: str, check: bool = True) -> str:
        return run(*self.prefix, *command, check=check)

    def cut(self) -> None:
        """Pull the cable. Connections stay, nothing comes through."""
        run("ip", "-n", self.hub, "link", "set", self.cable, "down")

    def heal(self) -> None:
        run("ip", "-n", self.hub, "link", "set", self.cable, "up")

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        self.cut()
        try:
            yield
        finally:
            self.heal()

    @contextlib.contextmanager
    def slow(self, rate: str) -> Iterator[None]:
        """Both directions of the cable at this rate (`20mbit`), with a queue of 100 ms."""
        legs = [(self.name, DEVICE), (self.hub, self.cable)]
        shape = ["root", "tbf", "rate", rate, "burst", "128kb", "latency", "100ms"]
        for space, device in legs:
            run("tc", "-n", space, "qdisc", "replace", "dev", device, *shape)
        try:
            yield
        finally:
            for space, device in legs:
                run("tc", "-n", space, "qdisc", "del", "dev", device, "root")

    @contextlib.contextmanager
    def redirected(self, program: str, word: str, match: str, log: Path) -> Iterator[Process]:
        """New connections that leave this host, and match, run through a proxy."""
        script = str(Path(__file__).with_name(f"{program}.py"))
        command = [*self.prefix, sys.executable, script, word]
        process = Process(f"{program}-{self.name}", command, dict(os.environ), log)
        port = process.wait_line("listening on").rpartition(" ")[2]
        rules = (
            f"table ip {program} {{ chain output {{ type nat hook output priority -100; "
            f"oifname {DEVICE} tcp flags & (syn|ack) == syn meta mark != 7 {match} "
            f"redirect to :{port}; }}; }}"
        )
        self.run("nft", rules)
        try:
            yield process
        finally:
            self.run("nft", f"delete table ip {program}")
            process.kill()

    @contextlib.contextmanager
    def flipping(self, after: int, log: Path) -> Iterator[Process]:
        """One byte of what this host sends is flipped: the one `after` so many, of the first
        connection that sends as many. Holds for connections made meanwhile."""
        with self.redirected("flip", str(after), "", log) as process:
            yield process

    @contextlib.contextmanager
    def late(self, port: int, folder: Path) -> Iterator[Late]:
        """What comes from this port of other hosts can be made to come late. Holds for connections
        made meanwhile. (`tc` could do it, but not every kernel has its netem.)"""
        order = folder / f"late-{self.name}"
        match = f"tcp dport {port}"
        with self.redirected("late", str(order), match, folder / f"{order.name}.log"):
            yield Late(order)


@dataclass(frozen=True)
class Late:
    """How late it comes; at first, and in the end, it does not."""

    order: Path

    @contextlib.contextmanager
    def by(self, seconds: float) -> Iterator[None]:
        partial = self.order.with_suffix(".new")
        partial.write_text(str(seconds))
        partial.rename(self.order)
        try:
            yield
        finally:
            self.order.unlink(missing_ok=True)


class Cluster:
    """Hosts on one bridge; a context manager."""

    def __init__(self, nodes: int, folder: Path, shm: str = "2g") -> None:
        reason = missing()
        assert reason is None, reason
        sweep()
        self.mark = f"{PREFIX}{os.getpid()}x{next(_serial)}"
        self.hub = f"{self.mark}-hub"
        self.uplink = self.mark
        self.private = folder / "private"
        self.private.mkdir(parents=True, exist_ok=True)
        self.nodes: list[Node] = []
        self._spaces: list[str] = []
        try:
            self._build(nodes, shm)
        except BaseException:
            self.close()
            raise

    def _build(self, nodes: int, shm: str) -> None:
        self._space(self.hub)
        run("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        run("ip", "-n", self.hub, "link", "set", "bridge", "up")
        self._plug(self.uplink, None, self.uplink)
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            taken = set(re.findall(r"10\.77\.(\d+)\.", run("ip", "-o", "-4", "addr")))
            free = [number for number in range(1, 255) if str(number) not in taken]
            self.subnet = f"10.77.{random.choice(free)}"
            run("ip", "addr", "add", f"{self.subnet}.254/24", "dev", self.uplink)
        run("ip", "link", "set", self.uplink, "up")
        for index in range(nodes):
            self._add(index, shm)

    def _space(self, name: str) -> None:
        self._spaces.append(name)
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def _plug(self, cable: str, space: str | None, device: str) -> None:
        """A cable from the bridge to a device of a namespace (of this process: None)."""
        run(
            "ip", "-n", self.hub, "link", "add", f"{cable}h", "type", "veth", "peer", "name", device
        )
        run("ip", "-n", self.hub, "link", "set", device, "netns", space or str(os.getpid()))
        run("ip", "-n", self.hub, "link", "set", f"{cable}h", "master", "bridge")
        run("ip", "-n", self.hub, "link", "set", f"{cable}h", "up")

    def _add(self, index: int, shm: str) -> None:
        name = f"{self.mark}-{index}"
        self._space(name)
        address = f"{self.subnet}.{index + 1}"
        self._plug(f"n{index}", name, DEVICE)
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
        run("ip", "-n", name, "link", "set", DEVICE, "up")
        # Holds the mount namespace, as long as this process has the other end of the pipe.
        mounts = (
            f"mount -t tmpfs -o size={shm} tmpfs /dev/shm && "
            f"mount -t tmpfs -o size=1g tmpfs '{self.private}' && echo ready && exec cat"
        )
        holder = subprocess.Popen(
            [
                *(
                    "nsenter",
                    f"--net={RUN / name}",
                    "unshare",
                    "--mount",
                    "--propagation",
                    "private",
                ),
                *("sh", "-c", mounts),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        node = Node(name, address, f"n{index}h", self.hub, self.private, holder)
        self.nodes.append(node)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n", f"mounts of {name} failed"

    def close(self) -> None:
        """Ends everything that runs on the hosts, and removes them."""
        for name in reversed(self._spaces):
            remove_namespace(name)
        for node in self.nodes:
            node.holder.kill()
            node.holder.wait(10)
            for pipe in (node.holder.stdin, node.holder.stdout):
                if pipe is not None:
                    pipe.close()
        run("ip", "link", "del", self.uplink, check=False)
        self._spaces.clear()
        self.nodes.clear()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
