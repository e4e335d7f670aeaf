"""A deployment over hosts of a cluster, with fake engines and fake frontends: quick, so that faults
can be many.

The tests of one kind share a deployment and come in this order; each leaves it serving.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time

import pytest
from conftest import fake_deployment
from processes import wait_for

COUNT = 40


@pytest.fixture(scope="module", params=["dense", "moe"])
def deployment(request, ingredients, fake_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"fakes-{request.param}")
    with fake_deployment(ingredients, fake_vllm, folder, request.param) as deployment:
        yield deployment
        deployment.stop()


def test_all_ranks_serve_through_every_frontend(deployment):
    deployment.check_serving(0)


def test_an_update_reaches_all_nodes_and_mixes_nothing(deployment):
    old, new = deployment.seed, 1 - deployment.seed
    with deployment.load(COUNT) as load:
        load.wait_answers(12)
        deployment.update(new)
        load.wait_answers(12)
    assert not deployment.bad(load.answers, old, new)
    seen = {deployment.models.seed_of(a.prompt, a.tokens) for a in load.answers}
    assert seen == {old, new}
    deployment.check_serving(new)


def test_the_sequence_of_colocated_training_over_all_hosts_answers_nothing_with_garbage(deployment):
    old, new = deployment.seed, 1 - deployment.seed
    leader, pids = deployment.leader, deployment.engine_pids()
    with deployment.load(COUNT) as load:
        load.wait_answers(12)
        slept = json.loads(leader.ok("sleep", "--level", "2", "--json"))
        assert [engine["rank"] for engine in slept["engines"]] == list(range(deployment.size))
        assert all(engine["without_weights"] for engine in slept["engines"])
        assert slept["version"] == leader.status()["weights"]["version"] == "unknown"
        # Not even a sidecar that starts again lets a request through.
        leader.kill()
        deployment.start_sidecar(0)
        deployment.wait_serving()
        leader = deployment.leader
        assert leader.status()["weights"]["version"] == "unknown"
        refused = leader.cli("wake")
        assert refused.returncode == 15
        assert "discarded by a sleep of level 2" in refused.stderr
        leader.ok("wake", "--tag", "weights")
        assert deployment.update(new)["asleep"] is True
        awake = json.loads(leader.ok("wake", "--tag", "kv_cache", "--json"))
        assert awake["paused"] is False
        assert awake["version"] == f"v{new}"
        load.wait_answers(12)
    assert not deployment.bad(load.answers, old, new)
    assert deployment.engine_pids() == pids
    deployment.check_serving(new)


def test_strangers_at_the_leaders_port_are_refused_and_cost_nobody(deployment, tmp_path):
    leader, host = deployment.leader, deployment.hosts[1]
    pids = deployment.engine_pids()
    wrong = tmp_path / "wrong-token"
    wrong.write_text(secrets.token_hex(16))
    flags = ["--leader", deployment.leader_address, "--auth-token-file"]
    with deployment.load(COUNT, clients=1) as load:
        load.wait_answers(2)
        # Says nothing, says garbage, says much.
        address = (deployment.hosts[0].address, int(deployment.leader_address.rpartition(":")[2]))
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1 << 20), b"\xff" * 64):
            with socket.create_connection(address, 5) as stranger:
                stranger.settimeout(20)
                try:
                    stranger.sendall(words)
                    stranger.shutdown(socket.SHUT_WR)
                    while stranger.recv(1 << 16):
                        pass
                except TimeoutError:
                    raise
                except OSError:
                    # The leader was faster.
                    pass
        # Knows another secret; claims ranks that somebody has.
        for name, token in (("wrong-token", wrong), ("second-claim", deployment.token)):
            stranger = deployment.world.sidecar(
                name,
                [*flags, str(token), "--startup-timeout", "3s"],
                [deployment.models.path(0)],
                size=deployment.size,
                rank=deployment.per_node,
                local=deployment.per_node,
                node=host,
            )
            assert stranger.wait_exit(30) != 0
        load.wait_answers(2)
    assert not deployment.bad(load.answers, deployment.seed)
    assert deployment.engine_pids() == pids
    assert leader.status()["sidecar"]["state"] == "serving"
    deployment.check_serving()


@pytest.mark.parametrize("host", [1, 0])
def test_a_cable_cut_for_three_seconds_costs_nothing(deployment, host):
    pids = deployment.engine_pids()
    with deployment.load(COUNT) as load:
        load.wait_answers(4)
        with deployment.hosts[host].unplugged():
            # The time is what is tested.
            time.sleep(3)
        load.wait_answers(12)
        deployment.wait_serving()
    assert not deployment.bad(load.answers, deployment.seed)
    assert deployment.engine_pids() == pids
    deployment.check_serving()


def test_an_engine_killed_on_a_follower_comes_back_at_the_committed_weights(deployment):
    deployment.update(1 - deployment.seed)
    rank = deployment.per_node + 1
    before = deployment.engine_pids()
    with deployment.load(COUNT) as load:
        load.wait_answers(6)
        deployment.kill_engine(rank)
        wait_for(
            f"rank {rank} has another process",
            30,
            lambda: deployment.engine_pids()[rank] not in (before[rank], [None]),
            deployment.logs,
        )
        deployment.wait_serving()
        load.wait_answers(6)
    for answer in load.answers:
        assert answer.status is not None, f"hung or cut: {answer}"
        if answer.tokens:
            given = deployment.models.seed_of(answer.prompt, answer.tokens)
            assert given == deployment.seed, answer
    after = deployment.engine_pids()
    if deployment.models.kind == "dense":
        del before[rank], after[rank]
        assert after == before
    deployment.check_serving()


def test_a_killed_frontend_costs_only_its_own_requests(deployment):
    alpha, beta = deployment.frontends
    with deployment.load(COUNT) as load:
        load.wait_answers(4, of=alpha)
        load.wait_answers(4, of=beta)
        load.leave(alpha)
        os.killpg(alpha.pid, signal.SIGKILL)
        alpha.child.wait(10)
        load.wait_answers(12, of=beta)
    assert not deployment.bad(load.of(beta), deployment.seed)
    deployment.frontends.remove(alpha)
    again = deployment.start_frontend("alpha", http_port=alpha.http_port, rpc_port=alpha.rpc_port)
    deployment.frontends.sort(key=lambda frontend: frontend.name)
    deployment.leader.wait_attached(again)
    again.wait_ready()
    deployment.check_serving()
