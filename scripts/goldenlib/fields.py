"""Writes fields.json: field names as the sources of each version have them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

CLASSES = {
    "EngineCoreRequest": "v1/engine/__init__.py",
    "EngineCoreOutput": "v1/engine/__init__.py",
    "EngineCoreOutputs": "v1/engine/__init__.py",
    "UtilityOutput": "v1/engine/__init__.py",
    "EngineCoreReadyResponse": "v1/engine/__init__.py",
    "SamplingParams": "sampling_params.py",
    "LoRARequest": "lora/request.py",
    "SchedulerStats": "v1/metrics/stats.py",
}


def write_fields(sources: list[str], out: Path) -> int:
    """Puts these versions into `out`, and keeps those that it has already."""
    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for source in sources:
        version, _, folder = source.partition("=")
        entry: dict[str, Any] = {}
        for name, file in CLASSES.items():
            entry[name] = class_fields(Path(folder) / "vllm" / file, name)
        entry["FinishReason"] = enum_values(
            Path(folder) / "vllm" / "v1/engine/__init__.py", "FinishReason"
        )
        table[version] = entry
    ordered = dict(sorted(table.items(), key=lambda kv: [int(p) for p in kv[0].split(".")[:3]]))
    lines = []
    for version, entry in ordered.items():
        rows = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entry.items()
        )
        lines.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{out}: {len(ordered)} versions")
    return 0


def find_class(file: Path, name: str) -> ast.ClassDef | None:
    """The class as the source has it."""
    if not file.exists():
        return None
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


def class_fields(file: Path, name: str) -> list[str] | None:
    """Annotated fields in order. msgspec keeps required and defaulted fields in one order."""
    node = find_class(file, name)
    if node is None:
        return None
    return [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and "ClassVar" not in ast.unparse(item.annotation)
    ]


def enum_values(file: Path, name: str) -> dict[str, int]:
    """Names and numbers of an enum."""
    node = find_class(file, name)
    return {
        item.targets[0].id: item.value.value
        for item in (node.body if node else [])
        if isinstance(item, ast.Assign)
        and isinstance(item.targets[0], ast.Name)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, int)
    }
