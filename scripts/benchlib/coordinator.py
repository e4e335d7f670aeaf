"""DP coordinator: ours and vLLM's DPCoordinatorProc, alternately, under the same load.

Size 256 is 256 engines on one node, 256/32 the same number on 32 nodes: 32 edge tasks, here in one
process, so the way over the network is not in the figures.

Measured: the time from FIRST_REQ until the last engine has START_DP_WAVE, CPU seconds per 100,000
stats messages, resident memory. `ratio` is ours divided by vLLM's.
"""

import argparse
import contextlib
import json
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from programs import build, vllm_python

START_LIMIT_S = 180
LOAD_LIMIT_S = 600
TARGETS = {"cpu": 0.5, "rss": 1 / 20, "wake_p50": 1.0, "wake_p99": 1.0}


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measure(command, load, directory, template, arguments):
    """Starts a DP coordinator, puts load on it, returns the figures."""
    log = Path(directory) / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    # Neither side waits for ever: the line comes, or the process is stopped and the read ends.
    signal.signal(signal.SIGALRM, lambda *_: process.kill())
    signal.alarm(START_LIMIT_S)
    try:
        line = process.stdout.readline()
        signal.alarm(0)
        if not line:
            raise SystemExit(f"{command[0]} did not start: {log.read_text()[-2000:]}")
        addresses = Path(directory) / "addresses.json"
        addresses.write_text(line)
        figures = subprocess.run(
            [
                load,
                f"--addresses={addresses}",
                f"--pid={process.pid}",
                f"--template={template}",
                f"--rounds={arguments.rounds}",
                f"--stats={arguments.stats}",
                f"--step-ms={arguments.step_ms}",
            ],
            stdout=subprocess.PIPE,
            text=True,
            timeout=LOAD_LIMIT_S,
            check=True,
        ).stdout
        # vLLM logs each; more than a few mean that the machine was too busy for the load.
        return json.loads(figures) | {"out_of_order": log.read_text().count("out-of-order")}
    finally:
        signal.alarm(0)
        stop(process)


def once(size, side, tools, shared, arguments):
    ours, load, python = tools
    engines, nodes = size
    with tempfile.TemporaryDirectory(prefix="dpbench") as directory:
        template = Path(shared) / "template"
        if side == "vllm":
            script = Path(__file__).with_name("vllm_coordinator.py")
            command = [python, script, directory, str(engines)]
            if not template.exists():
                template = Path(directory) / "template"
        else:
            command = [ours, directory, str(engines), str(nodes)]
        figures = measure([str(part) for part in command], load, directory, template, arguments)
        if side == "vllm":
            shutil.copy(Path(directory) / "template", Path(shared) / "template")
        return figures


def middle(results):
    """Of several runs: each figure's median."""
    return {
        "cpu_s_per_100k": statistics.median(r["cpu_s_per_100k"] for r in results),
        "rss_mb": statistics.median(r["rss_mb"] for r in results),
        "wake_us": {
            key: statistics.median(r["wake_us"][key] for r in results) for key in ("p50", "p99")
        },
    }


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench coordinator", description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--engines", default="64,256,256/32", help="sizes (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1000, help="wakes per run (%(default)s)")
    parser.add_argument("--stats", type=int, default=50_000, help="stats messages per run")
    parser.add_argument("--step-ms", type=int, default=10, help="all engines send one per step")
    parser.add_argument("--no-build", action="store_true", help="the programs are there")
    parser.add_argument("--python", help="interpreter that has vLLM")
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    say = (lambda *_: None) if arguments.json else print
    python = vllm_python(arguments.python)
    programs = build(skip=arguments.no_build)
    tools = (programs / "bench-coordinator", programs / "load-coordinator", python)
    runs = []
    for text in arguments.engines.split(","):
        engines, _, nodes = text.partition("/")
        engines, nodes = int(engines), int(nodes or 1)
        name = f"{engines} engines, {nodes} node{'s' if nodes > 1 else ''}"
        results = {"vllm": [], "ours": []}
        with tempfile.TemporaryDirectory(prefix="dpbench") as shared:
            for _ in range(arguments.repeat):
                # vLLM first: it also writes the stats message that both get.
                for side, figures in results.items():
                    figures.append(once((engines, nodes), side, tools, shared, arguments))
                    say(f"{name}, {side}: {json.dumps(rounded(figures[-1]))}")
        ours, vllm = middle(results["ours"]), middle(results["vllm"])
        ratio = {
            "cpu": ours["cpu_s_per_100k"] / vllm["cpu_s_per_100k"],
            "rss": ours["rss_mb"] / vllm["rss_mb"],
            "wake_p50": ours["wake_us"]["p50"] / vllm["wake_us"]["p50"],
            "wake_p99": ours["wake_us"]["p99"] / vllm["wake_us"]["p99"],
        }
        runs.append(
            {"engines": engines, "nodes": nodes, "ours": ours, "vllm": vllm, "ratio": ratio}
        )
        say(f"\n{name}\n{'':14}{'ours':>9} {'vllm':>9} {'ratio':>9}")
        rows = (
            ("cpu s / 100k", "cpu", ours["cpu_s_per_100k"], vllm["cpu_s_per_100k"]),
            ("rss MB", "rss", ours["rss_mb"], vllm["rss_mb"]),
            ("wake p50 us", "wake_p50", ours["wake_us"]["p50"], vllm["wake_us"]["p50"]),
            ("wake p99 us", "wake_p99", ours["wake_us"]["p99"], vllm["wake_us"]["p99"]),
        )
        for label, key, our, their in rows:
            verdict = "ok" if ratio[key] <= TARGETS[key] else f"MISSED (at most {TARGETS[key]:.3f})"
            say(f"{label:14}{our:9.2f} {their:9.2f} {ratio[key]:9.3f}  {verdict}")
        say()
    print(json.dumps({"bench": "coordinator", "runs": rounded(runs)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
