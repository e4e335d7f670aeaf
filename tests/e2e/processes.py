"""Processes with their output in files, and waits that end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster import Node

REPO = Path(__file__).resolve().parents[2]
# Where a program of the checkout is that was built before.
GIVEN = {"sidecar": "SIDECAR_BIN", "fake-vllm": "FAKE_VLLM_BIN"}
LOOPBACK = "127.0.0.1"
# In the environment of every process of a test run, handed down to all it starts.
MARK = "E2E_RUN_MARK"

# Two cores that three lanes share: an engine takes 12 to 40 s to start, several at once longer.
START_LIMIT = 360.0
STEP_LIMIT = 60.0
REQUEST_LIMIT = 120.0


def wait_for(
    what: str, limit: float, check: Callable[[], Any], describe=lambda: "", rarest: float = 0.05
) -> Any:
    """Poll `check` until it gives something true, at most `limit` seconds. The longer it takes, the
    rarer it is asked, down to once in `rarest` seconds."""
    began = time.monotonic()
    while True:
        found = check()
        if found:
            return found
        waited = time.monotonic() - began
        if waited > limit:
            raise AssertionError(f"{what}: not within {limit:.0f} s\n{describe()}")
        time.sleep(min(max(0.05, waited / 20), rarest))


def built(program: str) -> Path:
    """A program of this checkout, as the Rust tests build it: features differ in other builds."""
    given = os.environ.get(GIVEN[program])
    if given:
        return Path(given).resolve()
    command = ["cargo", "test", "--workspace", "--no-run", "--message-format=json"]
    output = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in output.splitlines():
        message = json.loads(line)
        target = message.get("target", {})
        if (target.get("name"), target.get("kind")) != (program, ["bin"]):
            continue
        if message.get("executable") and not message["profile"]["test"]:
            return Path(message["executable"])
    raise AssertionError(f"cargo built no program `{program}`")


_given: set[int] = set()


def port_range(worker: str | None) -> tuple[int, int]:
    """Each process of a test run (`gw0`, `gw1`, ... of pytest-xdist) has ports of its own, so that
    none takes one which another has found free."""
    first, last, count = 20000, 31999, 4
    index = int(worker.removeprefix("gw")) if worker else 0
    assert index < count, f"ports for {count} processes, this is {worker}"
    share = (last + 1 - first) // count
    return first + index * share, first + (index + 1) * share - 1


def free_port() -> int:
    """A TCP port that is free now, below the ephemeral range, and not yet given to anybody."""
    while True:
        port = random.randint(*port_range(os.environ.get("PYTEST_XDIST_WORKER")))
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        _given.add(port)
        return port


def processes_with(mark: str) -> dict[int, str]:
    """Pid and command line of every process that has `mark` in its environment."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(entry.name)] = command.strip()
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, nearest first."""
    found, queue = [], [pid]
    while queue:
        parent = queue.pop(0)
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(child) for child in task.read_text().split()]
                found += children
                queue += children
    return found


def start_time(pid: int) -> str:
    """When a process started, in clock ticks: tells a process from a later one of the same pid."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class Process:
    """A process in a session of its own, with its output in a file; here or on a host."""

    def __init__(
        self,
        name: str,
        command: list[str],
        env: dict[str, str],
        log: Path,
        node: Node | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.node = node
        self.command = [*(node.prefix if node else []), *command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.child.pid

    def tail(self, lines: int = 40) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return f"--- end of the output of {self.name} ---\n" + "\n".join(text)

    def wait_line(self, pattern: str, limit: float = STEP_LIMIT) -> str:
        """The first output line that matches."""

        def look():
            for line in self.log.read_text(errors="replace").splitlines():
                if re.search(pattern, line):
                    return line
            if self.child.poll() is not None:
                raise AssertionError(
                    f"{self.name} ended ({self.child.returncode}) without a line "
                    f"{pattern!r}\n{self.tail()}"
                )
            return None

        return wait_for(f"line {pattern!r} of {self.name}", limit, look, self.tail)

    def wait_exit(self, limit: float = STEP_LIMIT) -> int:
        try:
            return self.child.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} did not end within {limit:.0f} s\n{self.tail()}"
            ) from None

    def terminate(self, limit: float = STEP_LIMIT) -> int:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        return self.wait_exit(limit)

    def kill(self) -> None:
        """SIGKILL, this process alone."""
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait(STEP_LIMIT)

    def kill_group(self) -> None:
        """SIGKILL, the whole session's group, as a container's end does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.child.wait(STEP_LIMIT)
