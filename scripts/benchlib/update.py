"""A weight update over nodes: what it takes beside what the machine can do, in one run.

Nodes are network namespaces joined by veth (root, iproute2 and nftables are needed), engines are
fakes that copy every byte of a 1 GiB checkpoint with as many tensors as an 8B model has.

stage_ratio           staging rate over the rate of a bare TCP copy down the same chain of nodes
first_stage_ratio     the same for the first update (the sidecars run with --prefault)
bytes_per_node_ratio  bytes that came over the network to a follower, in checkpoints
unchanged_ratio       the same for an update of which all but one chunk is in memory already
pause_over_apply_ms   pause of the engines, less the longest load
apply_ratio           memcpy of a checkpoint by as many threads as there are engines, over that load
peak_mb               most memory that a node's sidecar, its relay and its segments took
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from cluster import Cluster, Node, missing  # noqa: E402
from deployment import Deployment  # noqa: E402
from harness import World  # noqa: E402
from processes import Process, processes_with  # noqa: E402
from programs import build, fail  # noqa: E402

MIB = 1 << 20
TENSORS = 291
PROMPT = "benchmark"


# --- checkpoints ---


def shapes(size: int) -> list[tuple[str, int]]:
    """Names and bytes of tensors, `size` bytes in all, with the proportions of an 8B model."""
    layer = {
        "self_attn.q_proj": 4096 * 4096,
        "self_attn.k_proj": 1024 * 4096,
        "self_attn.v_proj": 1024 * 4096,
        "self_attn.o_proj": 4096 * 4096,
        "mlp.gate_proj": 14336 * 4096,
        "mlp.up_proj": 14336 * 4096,
        "mlp.down_proj": 14336 * 4096,
        "input_layernorm": 4096,
        "post_attention_layernorm": 4096,
    }
    named = [("model.embed_tokens.weight", 128256 * 4096)]
    named += [
        (f"model.layers.{index}.{name}.weight", count)
        for index in range(32)
        for name, count in layer.items()
    ]
    named += [("model.norm.weight", 4096), ("lm_head.weight", 128256 * 4096)]
    whole = sum(count for _, count in named)
    scaled = [(name, max(2, size * count // whole & ~1)) for name, count in named]
    # What rounding took goes to the last one.
    name, length = scaled[-1]
    scaled[-1] = (name, length + size - sum(length for _, length in scaled))
    assert len(scaled) == TENSORS
    return scaled


def write_checkpoint(folder: Path, seed: int, size: int) -> None:
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, length in shapes(size):
        header[name] = {
            "dtype": "BF16",
            "shape": [length // 2],
            "data_offsets": [at, at + length],
        }
        at += length
    text = json.dumps(header).encode()
    bytes_of = random.Random(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, size, 16 * MIB):
            file.write(bytes_of.randbytes(min(16 * MIB, size - start)))


def change_last_tensor(source: Path, folder: Path) -> None:
    """A copy of a checkpoint that differs in its last bytes."""
    shutil.copytree(source, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


# --- what the machine can do ---


def bare_copy(program: Path, nodes: list[Node], size: int, folder: Path) -> float:
    """Seconds for `size` bytes from the first node through all others."""
    receivers: list[Process] = []
    following: list[str] = []
    try:
        for node in reversed(nodes[1:]):
            command = [str(program), "receive", "--listen", node.address, "--bytes", str(size)]
            name = f"bare-{node.name}"
            log = folder / f"{name}-{time.monotonic_ns()}.log"
            receiver = Process(name, command + following, dict(os.environ), log, node)
            receivers.append(receiver)
            receiver.wait_line("^ready", 60)
            following = ["--next", receiver.wait_line("^listening").split()[1]]
        send = [*nodes[0].prefix, str(program), "send", "--to", following[1], "--bytes", str(size)]
        output = subprocess.run(send, stdout=subprocess.PIPE, text=True, timeout=150, check=True)
        for receiver in receivers:
            assert receiver.wait_exit(20) == 0, receiver.tail()
    finally:
        for receiver in receivers:
            receiver.kill_group()
    return float(output.stdout.split()[1])


def memcpy(program: Path, size: int, threads: int) -> float:
    """Seconds for `threads` copies of `size` bytes at the same time."""
    command = [str(program), "memcpy", "--bytes", str(size), "--threads", str(threads)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=150, check=True)
    return float(output.stdout.split()[1])


class Memory(threading.Thread):
    """Watches what the sidecars take: their own memory, and the segments of each node."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(daemon=True)
        self.deployment = deployment
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        nodes = []
        for sidecar in self.deployment.sidecars:
            state = str(sidecar.state_dir)
            pids = [sidecar.pid]
            pids += [
                pid
                for pid, command in processes_with(self.deployment.world.mark).items()
                if f"--state-dir {state}" in command and " relay " in command
            ]
            nodes.append((sidecar.node.sees("/dev/shm"), pids))
        while not self.stopped.wait(0.02):
            for segments, pids in nodes:
                disk = os.statvfs(segments)
                shared = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
                self.peak = max(self.peak, shared + sum(map(private_bytes, pids)))

    def end(self) -> float:
        """MiB at the worst moment of the worst node."""
        self.stopped.set()
        self.join()
        return self.peak / MIB


def private_bytes(pid: int) -> int:
    """Resident memory of a process without what it shares or maps from files."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


# --- updates ---


class Checkpoints:
    """Directories that all nodes see, and what the deployment harness wants to know of models."""

    prompts = (PROMPT,)

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        for seed in range(3):
            write_checkpoint(folder / str(seed), seed, size)
        change_last_tensor(folder / "2", folder / "3")

    def path(self, seed: int) -> str:
        return str(self.folder / str(seed))


def deploy(cluster: Cluster, programs: dict[str, Path], checkpoints: Checkpoints, engines: int):
    world = World(
        binary=programs["sidecar"],
        python=Path(sys.executable),
        vllm=str(programs["fake-vllm"]),
        overlay=Path(),
        models=checkpoints.folder,
        folder=Path(tempfile.mkdtemp(prefix="deployment-", dir=checkpoints.folder.parent)),
        mark=os.urandom(8).hex(),
    )
    env = {"FAKE_VLLM_FORK": "0", "FAKE_VLLM_STEP_MS": "20"}
    flags = ["--prefault"]
    return Deployment(
        world, cluster, checkpoints, per_node=engines, env=env, flags=flags, start_limit=90
    )


def record(deployment: Deployment) -> dict:
    """What the last update left behind."""
    lines = (deployment.leader.state_dir / "updates.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def run(cluster, programs, checkpoints, engines: int, rounds: int, say) -> dict:
    """Some updates of one deployment, each beside what the machine can do."""
    nodes = cluster.nodes[:-1]
    size = checkpoints.size
    deployment = deploy(cluster, programs, checkpoints, engines)
    memory = None
    rows = []
    try:
        deployment.start_frontend("frontend")
        deployment.start()
        for sidecar in deployment.sidecars:
            sidecar.wait_line("shared memory for updates is taken", 60)
        memory = Memory(deployment)
        memory.start()
        for number in range(rounds):
            bare = bare_copy(programs["bare_copy"], nodes, size, deployment.world.folder)
            copied = memcpy(programs["bare_copy"], size, len(nodes) * engines)
            # One of three, so that neither of the two segments holds its bytes.
            seed = (1, 2, 0)[number % 3]
            path = alone(deployment, seed)
            deployment.update(seed, "--id", f"round-{number}", path=path)
            done = record(deployment)
            ranks = done["record"]["ranks"].values()
            rows.append(
                {
                    "stage_s": done["record"]["phases"]["staging"] / 1000,
                    "bare_s": bare,
                    "bytes_per_node": received(deployment) / size,
                    "paused_ms": done["record"]["paused_ms"],
                    "apply_ms": max(rank["load_ms"] for rank in ranks),
                    "memcpy_s": copied,
                }
            )
            say("    " + "  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()))
        # What differs in one chunk from the version that is there.
        if seed != 2:
            deployment.update(2, path=alone(deployment, 2))
        deployment.update(3, path=alone(deployment, 3))
        unchanged = received(deployment) / size
        peak = memory.end()
        deployment.stop()
    finally:
        if memory is not None:
            memory.stopped.set()
        deployment.world.clear()
        shutil.rmtree(deployment.world.folder, ignore_errors=True)
    best = lambda key: min(row[key] for row in rows)  # noqa: E731
    return {
        "nodes": len(nodes),
        "engines_per_node": engines,
        "stage_ratio": round(best("bare_s") / best("stage_s"), 3),
        "first_stage_ratio": round(rows[0]["bare_s"] / rows[0]["stage_s"], 3),
        "stage_mb_s": round(size / 1e6 / best("stage_s")),
        "bare_mb_s": round(size / 1e6 / best("bare_s")),
        "bytes_per_node_ratio": round(max(row["bytes_per_node"] for row in rows), 5),
        "unchanged_ratio": round(unchanged, 5),
        "pause_over_apply_ms": round(
            statistics.median(row["paused_ms"] - row["apply_ms"] for row in rows), 1
        ),
        "apply_ratio": round(best("memcpy_s") * 1000 / best("apply_ms"), 3),
        "peak_mb": round(peak),
        "model_mb": size // MIB,
    }


def alone(deployment: Deployment, seed: int) -> str:
    """The path under which the leader's node alone sees a checkpoint."""
    target = deployment.cluster.private / str(seed)
    node = deployment.hosts[0]
    if not node.sees(target).exists():
        node.run("mkdir", str(target))
        node.run("mount", "--bind", deployment.models.path(seed), str(target))
    return str(target)


def received(deployment: Deployment) -> int:
    """Bytes of the last update that came over the network, to the follower that got most."""
    most = 0
    for sidecar in deployment.sidecars[1:]:
        said = [
            line for line in sidecar.log.read_text().splitlines() if "weights are staged" in line
        ]
        found = re.search(r"received: (\d+)", said[-1])
        most = max(most, int(found[1]))
    return most


def missed(figures: dict) -> list[str]:
    """Names of the targets that these figures miss."""
    limit = 2 * figures["model_mb"] + 64
    targets = {
        "stage_ratio, at least 0.7": figures["stage_ratio"] >= 0.7,
        "bytes_per_node_ratio, 1": abs(figures["bytes_per_node_ratio"] - 1) <= 0.001,
        "unchanged_ratio, near 0": figures["unchanged_ratio"] <= 0.01,
        "pause_over_apply_ms, at most 50": figures["pause_over_apply_ms"] <= 50,
        f"peak_mb, at most {limit}": figures["peak_mb"] <= limit,
    }
    return [name for name, reached in targets.items() if not reached]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench update", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--nodes", default="2,4", help="numbers of nodes (default: 2,4)")
    parser.add_argument("--engines", default="1,2,4", help="engines per node (default: 1,2,4)")
    parser.add_argument("--mib", type=int, default=1024, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="updates of each deployment")
    parser.add_argument("--no-vllm", action="store_true", help="leave out the part with real vLLM")
    parser.add_argument("--no-build", action="store_true", help="programs are there already")
    args = parser.parse_args()
    say = (lambda text: None) if args.json else print

    if reason := missing():
        raise fail(reason)
    target = build(skip=args.no_build)
    programs = {name: target / name for name in ("sidecar", "fake-vllm")}
    programs["bare_copy"] = target / "bench-bare-copy"
    result: dict = {"bench": "update", "runs": []}
    with tempfile.TemporaryDirectory(prefix="dpsu", dir="/var/tmp") as base:
        say(f"writing checkpoints of {args.mib} MiB and {TENSORS} tensors")
        checkpoints = Checkpoints(Path(base) / "checkpoints", args.mib * MIB)
        for count in map(int, args.nodes.split(",")):
            for engines in map(int, args.engines.split(",")):
                say(f"{count} nodes, {engines} engines each")
                with Cluster(count + 1, Path(base), shm=f"{3 * args.mib}m") as cluster:
                    figures = run(cluster, programs, checkpoints, engines, args.rounds, say)
                result["runs"].append(figures)
                for name in missed(figures):
                    print(f"missed ({count} nodes, {engines} engines): {name}", file=sys.stderr)
    if not args.no_vllm:
        from update_vllm import compare

        result["vllm"] = compare(programs["sidecar"], say)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
