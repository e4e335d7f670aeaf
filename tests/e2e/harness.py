"""Sidecars as processes, and the world a test needs to start things and to find what they left.

Speaks HTTP, command lines and files only: nothing here knows how the sidecar is made. Every wait
has a limit and, when it is over, an error that shows the last lines of what did not happen.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frontends import Frontend
from processes import MARK, START_LIMIT, STEP_LIMIT, Process, processes_with, wait_for

if TYPE_CHECKING:
    from cluster import Node


METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def start_method(kind: str) -> dict[str, str]:
    """For tests that run on both kinds of model: processes of the dense one are spawned, as those
    of `vllm serve` are where nothing else is asked for."""
    return {METHOD: "spawn" if kind == "dense" else "fork"}


class Sidecar(Process):
    """A running sidecar, asked through its own subcommands."""

    def __init__(
        self,
        name: str,
        binary: Path,
        env: dict[str, str],
        folder: Path,
        flags: list[str],
        vllm: list[str] | None = None,
        *,
        size: int = 2,
        rank: int = 0,
        local: int | None = None,
        state_dir: Path | None = None,
        node: Node | None = None,
    ) -> None:
        self.binary = binary
        self.env = env
        self.size = size
        # Ranks of this sidecar's node.
        self.ranks = range(rank, rank + (size if local is None else local))
        # Unix sockets have at most 107 bytes of path, and pytest's folders are long.
        self.state_dir = state_dir or Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp"))
        command = [
            *(str(binary), "--dp-rank", str(rank), "--data-parallel-size", str(size)),
            *(["--data-parallel-size-local", str(local)] if local is not None else []),
            *("--state-dir", str(self.state_dir)),
            *flags,
            *(["--", *vllm] if vllm else []),
        ]
        super().__init__(name, command, env, folder / f"{name}.log", node)

    def cli(self, *words: str, limit: float = STEP_LIMIT) -> subprocess.CompletedProcess[str]:
        """Run a subcommand against this sidecar."""
        command = [str(self.binary), *words, "--state-dir", str(self.state_dir)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=self.env, check=False
        )

    def ok(self, *words: str, limit: float = STEP_LIMIT) -> str:
        """Run a subcommand that must succeed; its stdout."""
        done = self.cli(*words, limit=limit)
        assert done.returncode == 0, (
            f"sidecar {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}\n"
            + self.tail()
        )
        return done.stdout

    def status(self) -> dict[str, Any]:
        return json.loads(self.ok("status", "--json"))

    def try_status(self) -> dict[str, Any] | None:
        done = self.cli("status", "--json")
        return json.loads(done.stdout) if done.returncode in (0, 6) else None

    def engines(self) -> list[dict[str, Any]]:
        return self.status()["engines"]

    def engine_pids(self) -> list[int]:
        return [engine["pid"] for engine in self.engines()]

    def wait_status(
        self, what: str, check: Callable[[dict[str, Any]], Any], limit: float = STEP_LIMIT
    ) -> dict[str, Any]:
        """Until a status satisfies `check`; fails at once when the sidecar ends."""
        last: dict[str, Any] = {}

        def look():
            nonlocal last
            if self.child.poll() is not None:
                raise AssertionError(
                    f"{what}: the sidecar ended ({self.child.returncode})\n{self.tail()}"
                )
            last = self.try_status() or last
            return last if last and check(last) else None

        def describe() -> str:
            return json.dumps(last, indent=1)[:6000] + "\n" + self.tail() + self.engine_logs()

        # Each look is a process, of which starting engines have enough.
        return wait_for(what, limit, look, describe, rarest=0.25)

    def engine_logs(self, lines: int = 15) -> str:
        """The ends of the logs of what it started."""
        parts = []
        for log in sorted((self.state_dir / "logs").glob("*.log")):
            text = log.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"\n--- end of {log.name} ---\n" + "\n".join(text))
        return "".join(parts)

    def wait_serving(self, limit: float = START_LIMIT) -> dict[str, Any]:
        """Until all engines are admitted."""
        return self.wait_status(
            "all engines admitted",
            lambda s: (
                len(s["engines"]) == self.size
                and all(e["state"] == "admitted" for e in s["engines"])
            ),
            limit,
        )

    def wait_attached(self, *frontends: Frontend, limit: float = START_LIMIT) -> dict[str, Any]:
        wanted = {frontend.handshake for frontend in frontends}

        def attached(status: dict[str, Any]) -> bool:
            states = [entry["attachment"] for entry in status["frontends"]]
            return wanted <= {s["address"] for s in states if s["state"] == "attached"}

        return self.wait_status(f"frontends attached: {sorted(wanted)}", attached, limit)

    def update(
        self, path: str, *flags: str, limit: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        return self.cli("update", "--path", path, *flags, limit=limit)

    def leftovers(self) -> list[str]:
        """Sockets that are still in the state directory."""
        if not self.state_dir.exists():
            return []
        return sorted(
            str(path.relative_to(self.state_dir))
            for path in self.state_dir.rglob("*")
            if path.is_socket()
        )


@dataclass
class World:
    """Everything a test needs to start things, and to find out what they left."""

    binary: Path
    python: Path
    vllm: str
    overlay: Path
    models: Path
    folder: Path
    mark: str
    processes: list[Process] = field(default_factory=list)

    def env(self, **more: str) -> dict[str, str]:
        """Environment of sidecars and frontends."""
        env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("VLLM_", "PYTEST_", "SIDECAR_", "DP_SIDECAR_"))
        }
        env.update(
            {
                "PATH": f"{self.python.parent}:{env.get('PATH', '')}",
                "PYTHONPATH": str(self.overlay),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                # Half of the time of a start; see `start_method`.
                METHOD: "fork",
                "PYTHONUNBUFFERED": "1",
                "RUST_BACKTRACE": "1",
                MARK: self.mark,
            }
        )
        env.update(more)
        return env

    def in_process(self, **more: str) -> dict[str, str]:
        """As `env`, with the worker inside the engine core: fewer processes, steadier."""
        return self.env(VLLM_ENABLE_V1_MULTIPROCESSING="0", **more)

    def frontend(self, name: str, model: str, **options: Any) -> Frontend:
        env = options.pop("env", None) or self.env()
        frontend = Frontend(name, self.vllm, model, env, self.folder, **options)
        self.processes.append(frontend)
        return frontend

    def sidecar(
        self, name: str, flags: list[str], vllm: list[str] | None = None, **options: Any
    ) -> Sidecar:
        env = options.pop("env", None) or self.in_process()
        flags = ["--vllm-bin", self.vllm, *flags] if vllm else flags
        sidecar = Sidecar(name, self.binary, env, self.folder, flags, vllm, **options)
        self.processes.append(sidecar)
        return sidecar

    def marked(self) -> dict[int, str]:
        return processes_with(self.mark)

    def wait_gone(self, limit: float) -> None:
        """Until no process is left."""

        def describe() -> str:
            return "\n".join(f"{pid}: {command}" for pid, command in self.marked().items())

        wait_for("no process is left", limit, lambda: not self.marked(), describe)

    def clear(self) -> list[str]:
        """Ends everything that is left; says what should not have been."""
        complaints = []
        for process in self.processes:
            if process.child.poll() is None:
                process.child.send_signal(signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.child.wait(STEP_LIMIT)
            if process.child.poll() is None:
                complaints.append(f"{process.name} ignored SIGTERM")
                process.kill_group()
        # Shared helper processes of Python end a moment after their parents.
        deadline = time.monotonic() + 10
        while (left := self.marked()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid, command in left.items():
            complaints.append(f"process {pid} is left: {command[:200]}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            if isinstance(process, Sidecar):
                complaints += [f"socket is left: {path}" for path in process.leftovers()]
                shutil.rmtree(process.state_dir, ignore_errors=True)
        self.processes.clear()
        return complaints
