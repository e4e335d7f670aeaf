"""The tiny checkpoints and what they answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Models:
    """The tiny checkpoints of one kind, and what they answer."""

    kind: str
    folder: Path
    prompts: list[str]
    tokens: dict[int, list[list[int]]]

    @classmethod
    def read(cls, folder: Path, kind: str) -> Models:
        content = json.loads((folder / "prompts.json").read_text())[kind]
        tokens = {int(seed): paths for seed, paths in content["tokens"].items()}
        return cls(kind, folder, content["prompts"], tokens)

    def path(self, seed: int) -> str:
        return str(self.folder / f"{self.kind}-{seed}")

    def expected(self, seed: int, prompt: str, count: int) -> list[int]:
        path = self.tokens[seed][self.prompts.index(prompt)]
        assert count <= len(path), f"only {len(path)} tokens are known"
        return path[:count]

    def seed_of(self, prompt: str, tokens: list[int]) -> int | None:
        """Which checkpoint alone gives these tokens (or their beginning); None for a mixture."""
        for seed in self.tokens:
            if tokens and tokens == self.expected(seed, prompt, len(tokens)):
                return seed
        return None

    def variant(self, seed: int, to: Path, change: Callable[[dict[str, Any]], None]) -> str:
        """A copy of a checkpoint with its tensors changed."""
        from safetensors.torch import load_file, save_file

        shutil.copytree(self.path(seed), to)
        tensors = load_file(to / "model.safetensors")
        change(tensors)
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
        return str(to)
