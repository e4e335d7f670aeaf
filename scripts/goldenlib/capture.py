"""Writes the captures of the installed vLLM, and their manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import Message
from .coordinator import coordinator_messages
from .handshake import handshake_messages
from .hostile import hostile_messages
from .inputs import input_messages
from .outputs import output_messages


def capture(out: Path) -> int:
    """Writes the folder of the installed version below `out`."""
    import msgspec
    import vllm

    version = vllm.__version__.split("+")[0]
    folder = out / f"vllm-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, Callable[[], list[Message]]] = {
        "input": input_messages,
        "output": output_messages,
        "handshake": handshake_messages,
        "coordinator": coordinator_messages,
        "hostile": hostile_messages,
    }
    files = {}
    for name, collect in groups.items():
        messages = collect()
        data = msgspec.msgpack.encode([frames for _, frames, _ in messages])
        (folder / f"{name}.frames").write_bytes(data)
        files[f"{name}.frames"] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "messages": [{"name": label, "expect": expect} for label, _, expect in messages],
        }
        print(f"{name}: {len(messages)} messages, {len(data)} bytes", file=sys.stderr)
    manifest = {
        "vllm_version": version,
        "command": "scripts/capture_golden.py capture",
        "python": platform.python_version(),
        "msgspec": msgspec.__version__,
        "struct_fields": struct_fields(),
        "files": files,
    }
    (folder / "manifest.json").write_text(one_line_each(manifest))
    print(folder)
    return 0


def one_line_each(manifest: dict[str, Any]) -> str:
    """The manifest as JSON with one line per message."""
    head = {key: value for key, value in manifest.items() if key != "files"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    files = []
    for name, file in manifest["files"].items():
        messages = ",\n".join(f"   {json.dumps(m)}" for m in file["messages"])
        files.append(
            f"  {json.dumps(name)}: {{\n"
            f'   "sha256": "{file["sha256"]}",\n   "messages": [\n{messages}\n   ]\n  }}'
        )
    lines.append(' "files": {\n' + ",\n".join(files) + "\n }")
    return "{\n" + "\n".join(lines) + "\n}\n"


def struct_fields() -> dict[str, Any]:
    """Field names as the running classes have them, in wire order."""
    import vllm.v1.engine as engine

    fields: dict[str, Any] = {}
    for name in (
        "EngineCoreRequest",
        "EngineCoreOutput",
        "EngineCoreOutputs",
        "UtilityOutput",
    ):
        fields[name] = list(getattr(engine, name).__struct_fields__)
    ready = getattr(engine, "EngineCoreReadyResponse", None)
    fields["EngineCoreReadyResponse"] = (
        [field.name for field in dataclasses.fields(ready)] if ready else None
    )
    fields["FinishReason"] = {reason.name: reason.value for reason in engine.FinishReason}
    fields["EngineCoreRequestType"] = {
        kind.name: kind.value.hex() for kind in engine.EngineCoreRequestType
    }
    return fields
