"""Updates whose bytes travel down the chain of hosts, and what may befall them; fake engines.

The tests of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import time

import pytest
from conftest import fake_deployment

COUNT = 40
# Large enough to be caught on its way, small enough that fakes hash all of it.
SIZE = 32 << 20


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"updates-{request.param}")
    with fake_deployment(
        ingredients,
        fake_vllm,
        folder,
        request.param,
        size=SIZE,
        flags=["--pause-deadline", "5", "--load-timeout", "6s"],
    ) as deployment:
        yield deployment
        deployment.stop()


def test_full_shared_memory_refuses_the_update_before_any_engine_is_touched(deployment):
    """The first of all: later ones find memory that was taken before."""
    host = deployment.hosts[2]
    pids = deployment.engine_pids()
    # Leaves less than a checkpoint.
    free = int(host.run("sh", "-c", "df --output=avail -k /dev/shm | tail -1"))
    host.run("fallocate", "-l", f"{free - (SIZE // 2 >> 10)}K", "/dev/shm/ballast")
    path = deployment.private_copy(1)
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        done = deployment.leader.cli("update", "--path", path, "--version", "full", limit=60)
        host.run("rm", "/dev/shm/ballast")
        load.wait_answers(4)
    assert done.returncode == 10, done.stdout + done.stderr
    assert "shm" in done.stdout + done.stderr, done.stdout + done.stderr
    assert not deployment.bad(load.answers, 0)
    assert deployment.engine_pids() == pids
    deployment.check_serving(0)


def test_a_directory_of_the_leader_alone_reaches_all_hosts(deployment):
    path = deployment.private_copy(1)
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        deployment.update(1, path=path)
        load.wait_answers(4)
    assert not deployment.bad(load.answers, 0, 1)
    deployment.check_serving(1)


def test_a_slow_host_makes_the_staging_long_and_the_pause_no_longer(deployment):
    new = deployment.seed + 1
    with deployment.load(COUNT) as load, deployment.hosts[1].slow("100mbit"):
        load.wait_answers(4)
        report = deployment.update(new, path=deployment.private_copy(new))
        load.wait_answers(4)
    assert not deployment.bad(load.answers, new - 1, new)
    assert report["total_s"] > 2, report
    assert report["paused_s"] < 2, report
    deployment.check_serving(new)


def test_a_byte_flipped_on_the_way_is_found_by_its_hash(deployment):
    old, new = deployment.seed, deployment.seed + 1
    host = deployment.hosts[1]
    log = deployment.world.folder / "flip.log"
    with deployment.load(COUNT) as load, host.flipping(SIZE // 2, log) as flip:
        done = deployment.leader.cli(
            "update", "--path", deployment.private_copy(new), "--version", f"v{new}", limit=60
        )
        assert "flipped byte" in flip.log.read_text(), deployment.logs()
        load.wait_answers(4)
    assert not deployment.bad(load.answers, old, new)
    # Sent again, or refused: both are fine, other bytes are not.
    if done.returncode != 0:
        assert done.returncode == 10, done.stdout + done.stderr
        assert "hash" in done.stdout + done.stderr, done.stdout + done.stderr
        deployment.check_serving(old)
        deployment.update(new, path=deployment.private_copy(new))
    deployment.check_serving(new)
    deployment.seed = new


def test_a_load_that_fails_on_one_rank_of_a_follower_takes_all_back(deployment):
    old, new = deployment.seed, deployment.seed + 1
    rank = deployment.size - 1
    deployment.order(rank, "load-fails,load-times:1000")
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        done = deployment.leader.cli(
            "update", "--path", deployment.private_copy(new), "--version", f"v{new}", limit=60
        )
        deployment.order(rank, "")
        load.wait_answers(4)
    assert done.returncode in (11, 12), done.stdout + done.stderr
    assert f"rank {rank}" in done.stdout + done.stderr
    lost = deployment.bad(load.answers, old)
    assert not lost or done.returncode == 12, lost
    assert deployment.settled(old) == old


def test_no_update_passes_a_host_by_that_is_cut_off_but_serves(deployment):
    old, new = deployment.seed, deployment.seed + 1
    host = deployment.hosts[1]
    path = deployment.private_copy(new)
    with host.unplugged():
        done = deployment.leader.cli("update", "--path", path, "--version", f"v{new}", limit=40)
        assert done.returncode != 0, done.stdout + done.stderr
    deployment.settled(old)
    deployment.update(new, path=path)
    deployment.check_serving(new)


def test_a_cable_cut_for_a_moment_while_bytes_travel_ends_well(deployment):
    old, new = deployment.seed, deployment.seed + 1
    host = deployment.hosts[1]
    with deployment.load(COUNT) as load, host.slow("100mbit"):
        load.wait_answers(4)
        update = deployment.begin_update(new, path=deployment.private_copy(new))
        update.wait_line("^staging")
        with host.unplugged():
            time.sleep(2)
        update.wait_exit(60)
        deployment.settled(old, new)
        load.wait_answers(4)
    assert not deployment.bad(load.answers, old, new)


def test_two_updates_at_once_a_wrong_base_and_a_repetition_have_answers(deployment):
    old, new = deployment.seed, deployment.seed + 1
    path, leader = deployment.private_copy(new), deployment.leader
    wrong = leader.cli("update", "--path", path, "--version", "x", "--from-version", "nothing")
    assert wrong.returncode == 10, wrong.stdout + wrong.stderr
    with deployment.hosts[1].slow("100mbit"):
        update = deployment.begin_update(new, "--id", "first", path=path)
        update.wait_line("^staging")
        second = leader.cli("update", "--path", path, "--version", "y", "--id", "second")
        assert second.returncode == 13, second.stdout + second.stderr
        assert update.wait_exit(60) == 0, update.tail()
    deployment.seed = new
    deployment.check_serving(new)
    pids = deployment.engine_pids()
    # The same again is answered, not done again.
    again = deployment.update(new, "--id", "first", path=path)
    assert again["status"] == "committed"
    assert again["version"] == f"v{new}"
    assert deployment.engine_pids() == pids
    assert old != new


def test_a_load_that_hangs_on_one_rank_is_ended_by_its_deadline(deployment):
    old, new = deployment.seed, deployment.seed + 1
    rank = deployment.size - 1
    before = deployment.engine_pids()[rank]
    deployment.order(rank, "load-hangs")
    update = deployment.begin_update(new, path=deployment.private_copy(new))
    update.wait_exit(60)
    deployment.order(rank, "")
    deployment.settled(old, new)
    assert deployment.engine_pids()[rank] != before
