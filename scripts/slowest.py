#!/usr/bin/env python3
"""The slowest tests of JUnit files: `slowest.py COUNT FILE...`; missing files are left out."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main() -> None:
    count, files = int(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    cases = [
        (float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}")
        for file in files
        if file.exists()
        for case in ElementTree.parse(file).iter("testcase")
    ]
    total = sum(seconds for seconds, _ in cases)
    print(f"the slowest {count} of {len(cases)} tests, which took {total:.0f} s together:")
    for seconds, name in sorted(cases, reverse=True)[:count]:
        print(f"{seconds:8.1f} s  {name}")


if __name__ == "__main__":
    main()
