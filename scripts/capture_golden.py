#!/usr/bin/env python3
"""Write protocol/golden from the vLLM that is installed where this script runs.

Two commands:

  capture  encodes messages with vLLM's own classes and writes them, together with what vLLM decodes
           from them, to protocol/golden/vllm-VERSION/. Run it with any Python that has vLLM:
               PYTHON scripts/capture_golden.py capture
  fields   reads field names from the sources of other versions (unpacked wheels), without importing
           them, and writes protocol/golden/fields.json:
               PYTHON scripts/capture_golden.py fields 0.30.0=DIR 0.31.0=DIR ...

A .frames file is one msgpack array of messages; a message is an array of bin, one per ZMQ frame,
without the routing id. manifest.json names the messages in their order.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from goldenlib.capture import capture
from goldenlib.fields import write_fields

# Of the hashes of strings, and so of the order of sets, which are captured, too.
HASH_SEED = "1"
GOLDEN = Path(__file__).resolve().parent.parent / "protocol" / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    capture_args = commands.add_parser("capture", help="write captures of the installed vLLM")
    capture_args.add_argument(
        "--out",
        type=Path,
        default=GOLDEN,
        help="folder that gets vllm-VERSION (default: protocol/golden)",
    )
    fields_args = commands.add_parser("fields", help="write fields.json from unpacked sources")
    fields_args.add_argument(
        "source",
        nargs="+",
        help="VERSION=DIR, DIR holds the vllm package of that version",
    )
    fields_args.add_argument("--out", type=Path, default=GOLDEN / "fields.json")
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        # A second run writes the same bytes.
        environment = {**os.environ, "PYTHONHASHSEED": HASH_SEED}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    if args.command == "fields":
        return write_fields(args.source, args.out)
    return capture(args.out)


if __name__ == "__main__":
    sys.exit(main())
