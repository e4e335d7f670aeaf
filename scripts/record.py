#!/usr/bin/env python3
"""Runs a benchmark and keeps its figures: `record.py NAME COMMAND...`.

The last line that it prints is a JSON object. It is appended to tests/results.jsonl, with the date,
the commit and the machine, one line per run; the README's figures are of these lines.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "tests" / "results.jsonl"


def git(*words: str) -> str:
    return subprocess.check_output(["git", *words], cwd=REPO, text=True).strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def main() -> int:
    name, command = sys.argv[1], sys.argv[2:]
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
