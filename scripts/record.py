#!/usr/bin/env python3
"""Keeps the figures of benchmarks, and writes the README's table of them.

record.py NAME COMMAND...   runs a benchmark. The last line that it prints is a JSON object, which
                            is appended to tests/results.jsonl with date, commit and machine
record.py --table           writes the table anew, from the newest line of each benchmark
record.py --check           fails if that would change it
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "tests" / "results.jsonl"
README = REPO / "README.md"
BEGIN, END = "<!-- figures: scripts/record.py -->\n", "<!-- end of figures -->\n"


def git(*words: str) -> str:
    return subprocess.check_output(["git", *words], cwd=REPO, text=True).strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def rows(newest: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What is measured, ours, and what it stands beside."""
    relay, update, soak = (newest[name]["figures"] for name in ("relay", "update", "soak"))
    found = []
    for run in newest["coordinator"]["figures"]["runs"]:
        nodes = f" on {run['nodes']} nodes" if run["nodes"] > 1 else ""
        wake = [
            "{p50:,.0f} us, {p99:,.0f} us".format(**run[side]["wake_us"])
            for side in ("ours", "vllm")
        ]
        what = f"waking {run['engines']} idle engines{nodes}, p50 and p99"
        found.append((what, wake[0], f"vLLM's DP coordinator: {wake[1]}"))
    ours, vllm = run["ours"], run["vllm"]
    found += [
        (
            "DP coordinator of the last: CPU for 100,000 load reports, memory",
            f"{ours['cpu_s_per_100k']:.1f} s, {ours['rss_mb']:.0f} MB",
            f"vLLM's: {vllm['cpu_s_per_100k']:.1f} s, {vllm['rss_mb']:.0f} MB",
        ),
        (
            "added to a round trip of 64 bytes, p50",
            f"{relay['added_us']['64']['p50']:.0f} us",
            f"a bare hop: {relay['bare_hop_us']['64']['p50']:.0f} us",
        ),
        (
            "outputs of 1 KiB in a second",
            f"{relay['messages_per_s']['1k']:,.0f}",
            f"without a relay: {relay['bare_messages_per_s']['1k']:,.0f}",
        ),
    ]
    # Two engines on each node: the shape that all recorded runs have.
    for run in (run for run in update["runs"] if run["engines_per_node"] == 2):
        found += [
            (
                f"{run['model_mb']:,} MB of new weights reach {run['nodes']} nodes",
                f"{run['stage_mb_s']:,} MB/s",
                f"a bare copy: {run['bare_mb_s']:,} MB/s",
            ),
            (
                f"pause of their {2 * run['nodes']} engines, without the load itself",
                f"{run['pause_over_apply_ms']:.0f} ms",
                f"the load is {1 / run['apply_ratio']:.1f} times a bare copy in memory",
            ),
        ]
    kills = ", ".join(f"{count} of {name}s" for name, count in soak["kills"].items())
    found.append(
        (
            f"{soak['minutes']} minutes of load on fakes, with {soak['updates_committed']} updates",
            f"{soak['requests_answered']:,} answered, {soak['requests_lost']} lost, "
            f"{soak['mixed']} mixed",
            f"kills: {kills}",
        )
    )
    return found


def table() -> str:
    """The README with the table of the newest figures."""
    newest = {}
    for line in RESULTS.read_text().splitlines():
        entry = json.loads(line)
        newest[entry["name"]] = entry
    lines = ["| measured | dp-sidecar | beside it |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(newest)]
    sources = [f"{name} {newest[name]['commit']}, {newest[name]['date']}" for name in newest]
    source = f"Measured on a virtual machine with two cores. Commits: {'; '.join(sources)}."
    lines += ["", textwrap.fill(source, 118)]
    before, _, rest = README.read_text().partition(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2]


def run(name: str, command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        return done.returncode
    line = {
        "name": name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "-s", "src") else ""),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "figures": json.loads(done.stdout.strip().splitlines()[-1]),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    README.write_text(table())
    return 0


def main() -> int:
    match sys.argv[1:]:
        case ["--table"]:
            README.write_text(table())
        case ["--check"]:
            if README.read_text() != table():
                print("README.md: other figures than in tests/results.jsonl; run record.py --table")
                return 1
        case [name, *command] if command and not name.startswith("-"):
            return run(name, command)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
