"""What the benchmarks run: built once for all of them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Two commands: the sidecar is built as it is released, without what only tests and benchmarks need.
BUILDS = (
    (["-p", "dp-sidecar", "--bins"], "sidecar"),
    (
        ["-p", "dp-sidecar-testkit", "-p", "dp-sidecar-bench", "--bins"],
        "load generators, fakes, and parts of the sidecar for the benchmarks",
    ),
)


def fail(what: str) -> SystemExit:
    """Ends a benchmark with one line and exit code 2."""
    print(f"scripts/bench: {what}", file=sys.stderr)
    return SystemExit(2)


def build(*, skip: bool = False) -> Path:
    """Builds everything that any benchmark runs; the folder it is in."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    if skip:
        if not (target / "bench-coordinator").exists():
            raise fail(f"--no-build, but {target} lacks the programs")
        return target
    if shutil.which("cargo") is None:
        raise fail("cargo is not in PATH, see README.md")
    for what, title in BUILDS:
        command = ["cargo", "build", "--release", "--locked", *what]
        print(f"building {title}: {' '.join(command)}", file=sys.stderr, flush=True)
        began = time.monotonic()
        # Cargo says on stderr what it compiles; nothing, if nothing has changed.
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise fail("the build failed, see above")
        print(f"built in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return target


def vllm_python(given: str | None = None) -> str:
    """The interpreter that has vLLM."""
    if given:
        return given
    command = [sys.executable, ROOT / "scripts" / "vllm_env.py", "--shell"]
    print("preparing the vLLM environment (minutes, the first time)", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise fail("scripts/vllm_env.py failed, see above; --python names an interpreter with vLLM")
    for line in done.stdout.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name == "DP_SIDECAR_PYTHON":
            return value.strip("'\"")
    raise fail("scripts/vllm_env.py names no interpreter; --python names one with vLLM")
