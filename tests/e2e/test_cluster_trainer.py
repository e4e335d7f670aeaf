"""Trainers that are killed: while they upload, together with the leader, or while they watch an
update; fake engines on three hosts.

The tests of one kind share a deployment. Each begins and ends with all engines admitted at one
version.
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest
from conftest import fake_deployment
from deployment import Deployment, unpaused_at_the_end
from frontends import Load
from processes import Process, wait_for
from trainer import Client

COUNT = 60
SIZE = 32 << 20
# Of the segment; what is in an unfinished one does not outlive the leader.
CHUNK = 4 << 20
FOLLOWER = 1
FILE = "model.safetensors"
PHASES = ["staging", "pausing", "loading", "committing", "resuming"]
# When the update is begun: than the bytes come.
BEGIN = ["before", "after"]


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"trainer-{request.param}")
    with fake_deployment(
        ingredients,
        fake_vllm,
        folder,
        request.param,
        size=SIZE,
        env={"FAKE_VLLM_LOAD_MS": "300"},
        flags=["--pause-deadline", "5"],
        http=True,
        late=FOLLOWER,
    ) as deployment:
        yield deployment
        deployment.stop()


class Trainer(Process):
    """trainer.py on the clients' host; it sees nothing of the leader's but its port."""

    def __init__(self, deployment: Deployment, seed: int, name: str, *words: str) -> None:
        world = deployment.world
        file = Path(deployment.models.path(seed)) / FILE
        self.size = file.stat().st_size
        command = [
            *(sys.executable, str(Path(__file__).with_name("trainer.py"))),
            *("--leader", deployment.http, "--token", str(deployment.http_token)),
            *("--file", str(file), "--version", f"v{seed}", "--update", f"update-{name}", *words),
        ]
        log = f"trainer-{len(world.processes)}"
        super().__init__(log, command, world.env(), world.folder / f"{log}.log", deployment.client)
        world.processes.append(self)

    def number(self, word: str) -> int:
        return int(self.wait_line(f"^{word} ").split()[1])

    def finish(self) -> int:
        """Its update is committed; so many bytes it sent."""
        assert self.wait_exit(90) == 0, self.tail()
        return self.number("sent")


def killed_trainer(
    deployment: Deployment,
    load: Load,
    seed: int,
    name: str,
    begin: str,
    dice: random.Random,
    in_order: bool = False,
) -> int:
    """A trainer that is killed after so many bytes, in the middle of a part. All engines go on with
    the weights before."""
    old = deployment.seed
    size = (Path(deployment.models.path(seed)) / FILE).stat().st_size
    stop_at = dice.randrange(2 * CHUNK if in_order else 1, size)
    words = ["--begin", begin, "--stop-at", str(stop_at)]
    if not in_order and dice.random() < 0.5:
        words += ["--shuffle", name]
    trainer = Trainer(deployment, seed, name, "--upload", name, *words)
    trainer.wait_line("^stopped")
    if begin == "before":
        trainer.wait_line("^phase staging")
    load.wait_answers(2)
    trainer.kill()
    deployment.check_serving(old)
    assert not deployment.history(f"update-{name}")
    return stop_at


def received(deployment: Deployment, upload: str) -> int:
    client = Client(deployment.http, deployment.http_token)
    return client.ok("GET", f"uploads/{upload}")["received"]


def check(deployment: Deployment, load: Load, old: int, new: int) -> None:
    """Nothing was lost, nothing mixed; all engines have the new weights."""
    assert not deployment.bad(load.answers, old, new)
    seen = {deployment.models.seed_of(a.prompt, a.tokens) for a in load.answers}
    assert seen == {old, new}
    deployment.check_serving(new)
    assert deployment.weight_versions() == {f"v{new}"}


@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize("round_", range(3))
def test_after_a_killed_trainer_the_next_one_sends_only_the_rest(deployment, round_, begin):
    dice = random.Random(f"{deployment.models.kind} {begin} {round_}")
    old, new = deployment.seed, deployment.seed + 1
    name = f"{begin}-{round_}"
    with deployment.load(COUNT) as load, unpaused_at_the_end(deployment):
        load.wait_answers(4)
        there = killed_trainer(deployment, load, new, name, begin, dice)
        # Also what came of the part in which it was killed.
        wait_for("all it sent is there", 10, lambda: received(deployment, name) == there)
        again = Trainer(deployment, new, name, "--upload", name, "--begin", begin)
        sent = again.finish()
        deployment.seed = new
        load.wait_answers(8)
    assert sent == again.size - there
    assert 0 < sent < again.size
    assert again.number("offset") <= there
    check(deployment, load, old, new)
    # Of the update that was begun before the kill there was one, not two.
    assert [report["status"] for report in deployment.history(f"update-{name}")] == ["committed"]


def test_who_comes_to_a_running_update_is_told_where_it_stands(deployment):
    """By command, and over HTTP."""
    new, name = deployment.seed + 1, "watched"
    with deployment.load(COUNT) as load:
        killed_trainer(deployment, load, new, name, "before", random.Random(name))
        watcher = deployment.follow_update(f"update-{name}")
        again = Trainer(deployment, new, name, "--upload", name, "--begin", "before", "--hold")
        again.wait_line("^holding")
        try:
            watcher.wait_line("^staging", 15)
            again.wait_line("^phase staging", 15)
        finally:
            again.child.send_signal(signal.SIGUSR1)
            again.finish()
            deployment.seed = new
    assert watcher.wait_exit(30) == 0, watcher.tail()


@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize("upload", ["same", "other"])
def test_after_trainer_and_leader_were_killed_the_upload_goes_on(deployment, upload, begin):
    """By its name, or the next one has another name and begins anew."""
    dice = random.Random(f"{deployment.models.kind} {begin} {upload}")
    old, new = deployment.seed, deployment.seed + 1
    name = f"leader-{begin}-{upload}"
    with deployment.load(COUNT) as load, unpaused_at_the_end(deployment):
        load.wait_answers(4)
        there = killed_trainer(deployment, load, new, name, begin, dice, in_order=True)
        wait_for("all it sent is there", 10, lambda: received(deployment, name) == there)
        deployment.leader.kill()
        load.wait_answers(4)
        deployment.start_sidecar(0)
        deployment.settled(old)
        kept = received(deployment, name)
        assert kept == there // CHUNK * CHUNK
        if upload == "other":
            name, kept = f"{name}-2", 0
        again = Trainer(deployment, new, name, "--upload", name, "--begin", begin)
        sent = again.finish()
        deployment.seed = new
        load.wait_answers(8)
    assert sent == again.size - kept
    check(deployment, load, old, new)


@pytest.mark.parametrize("phase", PHASES)
def test_an_update_goes_on_without_the_one_who_asked_for_it(deployment, phase):
    old, new = deployment.seed, deployment.seed + 1
    id_ = f"nobody-{phase}"
    path = deployment.private_copy(new)
    with (
        deployment.load(200) as load,
        unpaused_at_the_end(deployment),
        deployment.hosts[FOLLOWER].slow("100mbit" if phase == "staging" else "10gbit"),
    ):
        load.wait_answers(4)
        update = deployment.begin_update(new, "--id", id_, path=path)
        with deployment.in_phase(update, phase):
            update.kill()
            assert not deployment.history(id_), "it was over before"
        followed = deployment.leader.cli("update", "--follow", id_, limit=90)
        assert followed.returncode == 0, followed.stdout + followed.stderr + deployment.logs()
        deployment.seed = new
        load.wait_answers(8)
    assert [report["status"] for report in deployment.history(id_)] == ["committed"]
    check(deployment, load, old, new)
