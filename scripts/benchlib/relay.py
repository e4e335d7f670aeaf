"""The data path: a fake engine and a fake frontend connected directly, then through rank tasks.

Measured: the round trip that the sidecar adds (64 B and 4 KiB requests), output messages per second
and CPU per message (1 KiB and 16 KiB), resident memory with 256 engines and 4 frontends.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from programs import build, fail

LIMIT_S = 600
# 256 engines have 9 slots of two sockets each, and a connection each, on both sides.
FILES_NEEDED = 14_000


def missed(figures):
    """Names of the targets that these figures miss."""
    targets = {
        "added_us p50, 64 B, at most 150": figures["added_us"]["64"]["p50"] <= 150,
        "added_us p50, 4 KiB, at most 150": figures["added_us"]["4k"]["p50"] <= 150,
        "1 KiB outputs, at least 100000 /s": figures["messages_per_s"]["1k"] >= 100_000,
        "rss_mb, under 128": figures["rss_mb"] < 128,
    }
    return [name for name, reached in targets.items() if not reached]


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench relay", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--quick", action="store_true", help="a tenth of the messages, 32 engines")
    parser.add_argument("--no-build", action="store_true", help="the programs are there")
    args = parser.parse_args()

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not args.quick and hard != resource.RLIM_INFINITY and hard < FILES_NEEDED:
        raise fail(f"{FILES_NEEDED} open files are needed, the hard limit is {hard}")
    programs = build(skip=args.no_build)
    relay, load = programs / "bench-relay", programs / "load-relay"
    with tempfile.TemporaryDirectory(prefix="dpsb") as base:
        command = [load, "--relay", relay, "--dir", Path(base) / "z"]
        command += [flag for flag in ("--json", "--quick") if getattr(args, flag[2:])]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
        )
    *lines, last = done.stdout.strip().splitlines()
    figures = json.loads(last)
    for line in lines:
        print(line)
    for name in missed(figures):
        print(f"missed: {name}", file=sys.stderr)
    print(last)


if __name__ == "__main__":
    main()
