"""Random acts on a deployment of three hosts with fake engines, under load: whatever was done, what
is reported of the weights is what the tokens say.

`RANDOM_ACTS=N` runs N sequences of each kind, `RANDOM_ACTS_FROM=K` begins with number K: a number
gives the same acts again. The tests of one kind share a deployment; each leaves it serving.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import fake_deployment
from deployment import Deployment, unpaused_at_the_end
from frontends import Answer, Frontend, http_post
from processes import wait_for

SEQUENCES = int(os.environ.get("RANDOM_ACTS", "3"))
FIRST = int(os.environ.get("RANDOM_ACTS_FROM", "0"))
ACTS = 5
COUNT = 12
# Checkpoints that an answer may still be of.
REMEMBERED = 12
UNKNOWN = "unknown"


@pytest.fixture(scope="module", params=["dense", "moe"])
def acts(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"acts-{request.param}")
    with fake_deployment(
        ingredients,
        fake_vllm,
        folder,
        request.param,
        size=1 << 20,
        env={"FAKE_VLLM_LOAD_MS": "100"},
        flags=["--pause-deadline", "5", "--max-restarts", "100000"],
    ) as deployment:
        acts = Acts(deployment)
        yield acts
        deployment.stop()


class Acts:
    """What may be done to a deployment, and what must be true of it all along. Versions are numbers
    that only grow, so that of two versions one is older."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.dice = random.Random()
        self.newest = 0
        # When an update returned, and what it committed.
        self.committed: list[tuple[float, int]] = [(0.0, 0)]
        # When something was killed that may cost requests, and until when it was not back.
        self.outages: list[tuple[float, float]] = []
        # A trainer has loaded weights that no update knows of.
        self.external = False
        self.done: list[str] = []

    # --- the acts ---

    def all(self) -> dict[str, Callable[[], None]]:
        return {
            "an update": self.update,
            "an update of the leader's own directory": self.update_private,
            "an update that one rank cannot load": self.update_failing,
            "an update that does not fit": self.update_refused,
            "an update and a killed engine": lambda: self.update_with(self.kill_engine),
            "an update and a killed sidecar": lambda: self.update_with(self.kill_sidecar),
            "an update and a killed frontend": lambda: self.update_with(self.kill_frontend),
            "an update and a process that hangs": lambda: self.update_with(self.freeze),
            "an update and a cable cut": lambda: self.update_with(self.cut),
            "an update whose asker is killed": self.update_abandoned,
            "a killed engine": self.kill_engine,
            "a killed sidecar": self.kill_sidecar,
            "all sidecars killed": self.kill_sidecars,
            "a killed frontend": self.kill_frontend,
            "a leader that starts again with an empty disk": self.lose_leader,
            "weights loaded by a frontend": self.load_by_frontend,
            "a pause": self.pause,
            "a process that hangs": self.freeze,
            "a cable cut": self.cut,
        }

    def next(self) -> int:
        """A checkpoint that is newer than all others."""
        self.newest += 1
        digests = self.deployment.models.digests
        for old in [seed for seed in digests if 0 < seed < self.newest - REMEMBERED]:
            del digests[old]
        self.deployment.models.path(self.newest)
        return self.newest

    def update(self, path: str | None = None, *flags: str) -> None:
        seed = self.newest if path else self.next()
        self.deployment.update(seed, *flags, path=path)
        self.has_committed(seed)

    def has_committed(self, seed: int) -> None:
        self.committed.append((time.monotonic(), seed))
        self.external = False

    def update_private(self) -> None:
        self.update(self.deployment.private_copy(self.next()))

    def update_failing(self) -> None:
        rank = self.dice.randrange(self.deployment.size)
        fault = self.dice.choice(["load-fails", "load-fails:partial", "load-wrong-digest"])
        self.deployment.order(rank, f"{fault},load-times:1")
        update = self.deployment.begin_update(self.next())
        # A rank that was lost is loaded by its successor, which has no such fault.
        if update.wait_exit(120) == 0:
            self.has_committed(self.newest)
        self.deployment.order(rank, "")

    def update_refused(self) -> None:
        folder = Path(self.deployment.models.path(self.next()))
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        update = self.deployment.begin_update(self.newest)
        assert update.wait_exit(120) != 0, update.tail()

    def update_with(self, fault: Callable[[], None]) -> None:
        update = self.deployment.begin_update(self.next())
        update.wait_line("^staging|^prepared|^pausing|^loading")
        time.sleep(self.dice.uniform(0, 0.6))
        fault()
        if update.wait_exit(120) == 0:
            self.has_committed(self.newest)

    def update_abandoned(self) -> None:
        update = self.deployment.begin_update(self.next())
        update.wait_line("^staging|^prepared|^pausing|^loading")
        update.kill()

    def kill_engine(self) -> None:
        rank = self.dice.randrange(self.deployment.size)
        began = time.monotonic()
        pids = self.deployment.engine_pids()
        self.deployment.kill_engine(rank)
        wait_for(
            f"rank {rank} has another process",
            60,
            lambda: self.deployment.engine_pids()[rank] not in (pids[rank], [None]),
            self.deployment.logs,
        )
        self.deployment.wait_serving()
        self.outages.append((began, time.monotonic()))

    def kill_sidecar(self) -> None:
        index = self.dice.randrange(len(self.deployment.hosts))
        self.deployment.sidecar(index).kill()
        self.deployment.start_sidecar(index)

    def kill_sidecars(self) -> None:
        for sidecar in self.deployment.sidecars:
            assert sidecar is not None
            sidecar.kill()
        order = list(range(len(self.deployment.hosts)))
        self.dice.shuffle(order)
        for index in order:
            self.deployment.start_sidecar(index)

    def kill_frontend(self) -> None:
        alpha = self.deployment.frontends[0]
        began = time.monotonic()
        os.killpg(alpha.pid, signal.SIGKILL)
        self.start_again(alpha)
        self.outages.append((began, time.monotonic()))

    def start_again(self, *ended: Frontend) -> None:
        """Frontends that have ended, or are about to."""
        deployment = self.deployment
        for before in ended:
            before.wait_exit(30)
            deployment.frontends.remove(before)
            ports = {"http_port": before.http_port, "rpc_port": before.rpc_port}
            deployment.start_frontend(before.name, **ports)
        deployment.frontends.sort(key=lambda frontend: frontend.name)
        deployment.wait_serving()
        deployment.leader.wait_attached(*deployment.frontends)
        for frontend in deployment.frontends:
            frontend.wait_ready()

    def lose_leader(self) -> None:
        """Its host is installed anew: what it knew of updates and of frontends is gone, and the
        engines of the other hosts live on. Frontends must be told, since nobody can rejoin them."""
        leader = self.deployment.leader
        own = leader.status()["sidecar"]
        engines = self.deployment.engine_pids()
        began = time.monotonic()
        self.committed.append((began, 0))
        leader.kill()
        lost = [own["keeper_pid"], own["relay_pid"]]
        for pid in [*lost, *(pid for rank in self.deployment.ranks_of(0) for pid in engines[rank])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(leader.state_dir)
        self.deployment.start_sidecar(0)
        self.start_again(*self.deployment.frontends)
        self.outages.append((began, time.monotonic()))

    def load_by_frontend(self) -> None:
        """As a trainer does that knows of no sidecar: it pauses, loads and resumes by itself."""
        path = self.deployment.models.path(self.next())
        self.external = True
        self.call("pause_scheduler", "wait")
        self.call("collective_rpc", "reload_weights", None, [], {"weights_path": path})
        self.call("resume_scheduler")

    def call(self, method: str, *args: object) -> None:
        frontend = self.dice.choice(self.deployment.frontends)
        body = {"method": method, "args": args}
        status, text = http_post(frontend.http_port, "/utility", body, 90, frontend.host)
        assert status == 200, text
        assert '"error"' not in text, text

    def pause(self) -> None:
        self.deployment.leader.ok("pause")
        time.sleep(self.dice.uniform(0, 0.3))
        self.deployment.leader.ok("resume")

    def cut(self) -> None:
        host = self.dice.choice(self.deployment.hosts)
        with host.unplugged():
            time.sleep(self.dice.uniform(0.2, 2))

    def freeze(self) -> None:
        """A process stands still for a while, as one that swaps does."""
        index = self.dice.randrange(len(self.deployment.hosts))
        sidecar = self.deployment.sidecar(index)
        rank = self.dice.choice(self.deployment.ranks_of(index))
        engine = self.deployment.engine_pids()[rank][0]
        own = sidecar.status()["sidecar"]
        pid = self.dice.choice([sidecar.pid, own["keeper_pid"], own["relay_pid"], engine])
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self.dice.uniform(0.2, 3))
        finally:
            os.kill(pid, signal.SIGCONT)

    # --- what is true all along ---

    def settle(self) -> None:
        """All ranks serve, and each of them the weights that are reported of it."""
        deployment = self.deployment
        with unpaused_at_the_end(deployment):
            deployment.wait_serving()
        deployment.leader.wait_attached(*deployment.frontends)
        wait_for("no update runs", 60, lambda: not self.updating())
        deployment.wait_serving()
        engines = deployment.leader.engines()
        for rank, frontend in itertools.product(range(deployment.size), deployment.frontends):
            answer = frontend.ask(deployment.models.prompts[0], COUNT, rank=rank)
            assert answer.complete, f"{self}: {answer}{deployment.logs()}"
            given = deployment.models.seed_of(answer.prompt, answer.tokens)
            reported = engines[rank]["weight_version"]
            held = "default" if given == 0 else f"v{given}"
            wrong = f"{self}: rank {rank} is said to hold {reported}, and answers with {held}"
            assert reported in (held, UNKNOWN), wrong + deployment.logs()
            assert self.external or reported != UNKNOWN, wrong + deployment.logs()
        if not self.external:
            assert len(deployment.weight_versions()) == 1, f"{self}: {engines}"

    def updating(self) -> bool:
        return self.deployment.leader.status()["controller"]["holder"] is not None

    def check(self, answers: list[Answer]) -> None:
        """The order that clients see: what was asked after an update had returned is answered by
        its version or a later one. Nothing is lost that nobody killed."""
        for answer in answers:
            assert answer.status is not None or self.excused(answer), f"{self}: lost: {answer}"
            assert answer.complete or self.excused(answer), f"{self}: lost: {answer}"
            if not answer.tokens:
                continue
            given = self.deployment.models.seed_of(answer.prompt, answer.tokens)
            assert given is not None, f"{self}: mixed: {answer}"
            oldest = [seed for returned, seed in self.committed if returned <= answer.began][-1]
            assert oldest <= given, f"{self}: v{oldest} was committed before: {answer}"

    def excused(self, answer: Answer) -> bool:
        """Something that was killed may have had it."""
        return any(answer.began < end and begin < answer.ended for begin, end in self.outages)

    def __str__(self) -> str:
        return "; ".join(self.done)

    def run(self, number: int) -> None:
        self.dice = random.Random(f"{self.deployment.models.kind} {number}")
        self.done = [f"sequence {number}"]
        self.outages.clear()
        with self.deployment.load(COUNT, clients=2) as load:
            load.pause = 0.05
            for _ in range(ACTS):
                name, act = self.dice.choice(sorted(self.all().items()))
                self.done.append(name)
                act()
                self.settle()
        self.check(load.answers)


@pytest.mark.parametrize("number", range(FIRST, FIRST + SEQUENCES))
def test_what_is_reported_is_what_the_tokens_say_whatever_was_done(acts, number):
    acts.run(number)
