"""A deployment over several hosts: a sidecar on each, frontends on a host of their own."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster import Cluster, Late, Node
from frontends import Answer, Frontend, Load
from harness import Sidecar, World
from processes import START_LIMIT, STEP_LIMIT, Process, alive, descendants, free_port, wait_for

# What the staging area puts into /dev/shm.
SEGMENTS = "dp-sidecar-"
# How much later a host hears what the leader says, while something is done to an update; before
# that, while the update comes to the phase. A follower gives up a leader that is silent for longer.
LATE = 6.0
LATE_ON_THE_WAY = 2.0


class Deployment:
    """Sidecars on all hosts of a cluster but the last, the first leading; frontends on the last."""

    def __init__(
        self,
        world: World,
        cluster: Cluster,
        models: Any,
        *,
        per_node: int = 2,
        flags: list[str] | None = None,
        vllm_flags: list[str] | None = None,
        env: dict[str, str] | None = None,
        http: bool = False,
        start_limit: float = START_LIMIT,
    ) -> None:
        self.start_limit = start_limit
        self.world = world
        self.cluster = cluster
        self.models = models
        self.hosts = cluster.nodes[:-1]
        self.client: Node = cluster.nodes[-1]
        self.per_node = per_node
        self.size = per_node * len(self.hosts)
        self.flags = flags or []
        self.vllm_flags = vllm_flags or []
        self.more = env or {}
        self.token = world.folder / "token"
        self.token.write_text(secrets.token_hex(16))
        self.token.chmod(0o600)
        self.leader_address = f"{self.hosts[0].address}:{free_port()}"
        # Where the leader takes uploads and updates.
        self.http = f"{self.hosts[0].address}:{free_port()}" if http else None
        self.http_token = world.folder / "http-token"
        self.http_token.write_text(secrets.token_hex(16))
        self.http_token.chmod(0o600)
        # What the leader says to one of the hosts, if that was asked for (`fake_deployment`).
        self.late: Late | None = None
        self.sidecars: list[Sidecar | None] = [None] * len(self.hosts)
        self.lives = [0] * len(self.hosts)
        self.frontends: list[Frontend] = []
        self.seed = 0

    # --- what runs ---

    @property
    def http_flags(self) -> list[str]:
        token = ["--http-token-file", str(self.http_token)]
        return ["--http", self.http, *token] if self.http else []

    @property
    def leader(self) -> Sidecar:
        return self.sidecar(0)

    def sidecar(self, index: int) -> Sidecar:
        sidecar = self.sidecars[index]
        assert sidecar is not None, f"no sidecar on host {index}"
        return sidecar

    def start_sidecar(self, index: int, *more: str, **options: Any) -> Sidecar:
        """The sidecar of a host, for the first time or again after it ended."""
        before = self.sidecars[index]
        self.lives[index] += 1
        flags = []
        if len(self.hosts) > 1:
            flags = ["--leader", self.leader_address, "--auth-token-file", str(self.token)]
        if index == 0:
            flags += [f"--frontend={frontend.handshake}" for frontend in self.frontends]
            flags += self.http_flags
        node = self.hosts[index]
        sidecar = self.world.sidecar(
            f"sidecar-{index}-{self.lives[index]}",
            [*flags, *self.flags, *more],
            [self.models.path(0), *self.vllm_flags],
            size=self.size,
            rank=index * self.per_node,
            local=self.per_node,
            node=node,
            env=self.world.in_process(**node.env(), **self.more),
            state_dir=before.state_dir if before else None,
            **options,
        )
        self.sidecars[index] = sidecar
        return sidecar

    def start_frontend(self, name: str, **options: Any) -> Frontend:
        """A frontend on its own host. The leader gets to know it at its start, or by command."""
        env = self.world.env(**self.client.env(), **self.more, **options.pop("env", {}))
        frontend = self.world.frontend(
            name, self.models.path(0), size=self.size, node=self.client, env=env, **options
        )
        self.frontends.append(frontend)
        return frontend

    def start(self, *order: int) -> None:
        """All sidecars, in this order of hosts (default: the leader last), until they serve."""
        for index in order or reversed(range(len(self.hosts))):
            self.start_sidecar(index)
        self.wait_serving()
        self.leader.wait_attached(*self.frontends, limit=self.start_limit)
        for frontend in self.frontends:
            frontend.wait_ready(self.start_limit)

    def wait_serving(self) -> dict[str, Any]:
        """Until all engines are admitted and all hosts are connected with the leader."""
        return self.leader.wait_status(
            "all engines admitted, all hosts connected",
            lambda s: (
                len(s["engines"]) == self.size
                and all(e["state"] == "admitted" for e in s["engines"])
                and all(node["link"] != "down" for node in s["nodes"])
            ),
            self.start_limit,
        )

    def node_of(self, rank: int) -> int:
        return rank // self.per_node

    def ranks_of(self, index: int) -> range:
        return range(index * self.per_node, (index + 1) * self.per_node)

    def engine_pids(self) -> dict[int, list[int]]:
        """Every process of each rank's engine."""
        return {e["rank"]: [e["pid"], *descendants(e["pid"])] for e in self.leader.engines()}

    def kill_engine(self, rank: int) -> None:
        kill_all(self.engine_pids()[rank])

    def order(self, rank: int, faults: str) -> None:
        """Tells a running fake engine what is wrong with it from now on."""
        (self.models.folder / f"rank-{rank}").write_text(faults)

    def logs(self) -> str:
        return "\n".join(
            sidecar.tail(25) + sidecar.engine_logs(8) for sidecar in self.sidecars if sidecar
        )

    # --- what it answers ---

    def wrong_answers(self, seed: int, count: int = 12) -> list[str]:
        """Every frontend, every rank, two prompts: what is not an answer of checkpoint `seed`."""
        asked = itertools.product(self.frontends, range(self.size), self.models.prompts[:2])

        def wrong(one: tuple[Frontend, int, str]) -> str | None:
            frontend, rank, prompt = one
            answer = frontend.ask(prompt, count, rank=rank)
            if answer.tokens == self.models.expected(seed, prompt, count):
                return None
            given = self.models.seed_of(prompt, answer.tokens)
            return f"rank {rank}, weights of {given}: {answer}"

        with ThreadPoolExecutor(self.size) as pool:
            return [line for line in pool.map(wrong, asked) if line]

    def check_serving(self, seed: int | None = None) -> None:
        """All ranks answer with the same weights, through every frontend."""
        wrong = self.wrong_answers(self.seed if seed is None else seed)
        assert not wrong, "\n".join(wrong) + self.logs()
        assert len(self.weight_versions()) == 1, self.weight_versions()

    def weight_versions(self) -> set[str]:
        return {engine["weight_version"] for engine in self.leader.engines()}

    def settled(self, *seeds: int) -> int:
        """After a fault: which one of `seeds` all ranks serve, once all are admitted again."""
        self.wait_serving()
        frontend, prompt = self.frontends[0], self.models.prompts[0]
        answer = frontend.ask(prompt, 12, rank=0)
        seed = self.models.seed_of(prompt, answer.tokens)
        assert seed in seeds, f"weights of {seed}, expected one of {seeds}: {answer}{self.logs()}"
        self.check_serving(seed)
        self.seed = seed
        return seed

    def load(self, count: int = 40, clients: int = 3) -> Load:
        return Load(self.frontends, self.models.prompts, count, clients)

    def bad(self, answers: list[Answer], *seeds: int) -> list[Answer]:
        """Those that are lost, cut short, mixed, or of other weights than `seeds`."""
        return [
            answer
            for answer in answers
            if not answer.complete or self.models.seed_of(answer.prompt, answer.tokens) not in seeds
        ]

    # --- updates ---

    def update(self, seed: int, *flags: str, path: str | None = None) -> dict[str, Any]:
        """An update that must succeed; its report."""
        words = ["--path", path or self.models.path(seed), "--version", f"v{seed}", "--json"]
        done = self.leader.cli("update", *words, *flags, limit=180)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        self.seed = seed
        return json.loads(done.stdout)

    def begin_update(self, seed: int, *flags: str, path: str | None = None) -> Process:
        """An update that runs; its progress is in its log, a line per phase."""
        words = ["--path", path or self.models.path(seed), "--version", f"v{seed}", *flags]
        return self._updating(*words)

    def follow_update(self, id_: str) -> Process:
        """Somebody who watches an update; as `begin_update`."""
        return self._updating("--follow", id_)

    def _updating(self, *words: str) -> Process:
        name = f"update-{len(self.world.processes)}"
        command = [str(self.leader.binary), "update", *words]
        command += ["--state-dir", str(self.leader.state_dir)]
        process = Process(name, command, self.leader.env, self.world.folder / f"{name}.log")
        self.world.processes.append(process)
        return process

    @contextmanager
    def in_phase(self, update: Process, phase: str) -> Iterator[None]:
        """The block runs while an update that `begin_update` began is in this phase, past its
        commit point if it has one. What a host hears comes late meanwhile: the update does not end
        under the block's hands."""
        if phase == "staging":
            update.wait_line("^staging")
            yield
            return
        assert self.late is not None, "a host must be late"
        line = f"^{phase}"
        with ExitStack() as stack:
            if phase in ("committing", "resuming"):
                # Fakes pass those within milliseconds.
                update.wait_line("^loading")
                stack.enter_context(self.late.by(LATE_ON_THE_WAY))
                # The first rank is stamped when the record is written.
                line += r".*\([1-9] of" if phase == "committing" else ""
            update.wait_line(line)
            stack.enter_context(self.late.by(LATE))
            began = time.monotonic()
            yield
            took = time.monotonic() - began
            assert took < LATE, f"{took:.1f} s: {phase} may have been over"

    def history(self, id_: str) -> list[dict[str, Any]]:
        """What is on record of an update."""
        reports = json.loads(self.leader.ok("update", "--history", "1000", "--json"))
        return [report for report in reports if report["id"] == id_]

    def private_copy(self, seed: int, index: int = 0) -> str:
        """A checkpoint in a directory that only one host sees; its path there."""
        source = Path(self.models.path(seed))
        target = self.cluster.private / source.name
        outside = self.hosts[index].sees(target)
        if not outside.exists():
            outside.mkdir()
            for file in source.iterdir():
                (outside / file.name).write_bytes(file.read_bytes())
        return str(target)

    # --- the end ---

    def segments(self) -> dict[str, list[str]]:
        """What staging has in the shared memory of each host."""
        found = {
            node.name: [name for name in node.shared_memory() if name.startswith(SEGMENTS)]
            for node in self.hosts
        }
        return {name: left for name, left in found.items() if left}

    def stop(self, limit: float = 90.0, *, by_command: bool = False) -> None:
        """SIGTERM to the leader, or `sidecar stop`, ends the deployment; nothing is left of it."""
        if by_command:
            self.leader.ok("stop", limit=limit)
        else:
            self.leader.child.send_signal(signal.SIGTERM)
        codes = {s.name: s.wait_exit(limit) for s in self.sidecars if s is not None}
        assert set(codes.values()) == {0}, f"{codes}{self.logs()}"
        own = {pid for f in self.frontends for pid in (f.pid, *descendants(f.pid))}
        left = {pid: command for pid, command in self.world.marked().items() if pid not in own}
        assert not left, f"the sidecars left {left}"
        assert not self.segments(), f"left in shared memory: {self.segments()}"


def kill_all(pids: list[int]) -> None:
    """SIGKILL to an engine's processes, the furthest below first."""
    for pid in reversed(pids):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def unpaused_at_the_end(deployment: Deployment) -> Iterator[None]:
    """Whatever happens in the block, no engine may stay paused for ever."""
    yield
    wait_for(
        "nobody holds a pause",
        STEP_LIMIT,
        lambda: not deployment.leader.status()["controller"]["paused"],
    )
