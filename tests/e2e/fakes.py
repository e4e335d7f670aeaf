"""Checkpoints for fake engines, and what those answer: tests/testkit, written a second time.

A fake engine's tokens are a function of the bytes that it loaded, so an answer tells the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import blake3

MASK = (1 << 64) - 1
VOCABULARY = 320


def _mix(value: int) -> int:
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def _key(parts: bytes) -> int:
    key = 0
    for part in parts:
        key = _mix(key ^ part)
    return key


def tokens(digest: str, prompt: str, count: int) -> list[int]:
    """What an engine with weights of this digest answers."""
    weights, asked = _key(digest.encode()), _key(prompt.encode())
    return [_mix(weights ^ _mix(asked ^ _mix(at))) % VOCABULARY for at in range(count)]


@dataclass
class FakeModels:
    """Checkpoints that differ in every byte, with the interface of `models.Models`."""

    kind: str
    folder: Path
    # Bytes of tensors; below 64 MiB a fake hashes all of them.
    size: int = 8 << 20
    tensors: int = 16
    prompts: list[str] = field(default_factory=lambda: [f"prompt {i}" for i in range(8)])
    digests: dict[int, str] = field(default_factory=dict)

    def path(self, seed: int) -> str:
        """The directory of a checkpoint, written when it is first asked for."""
        folder = self.folder / f"{self.kind}-{seed}"
        if seed not in self.digests:
            self.digests[seed] = self.write(folder, seed)
        return str(folder)

    def write(self, folder: Path, seed: int, same: range = range(0)) -> str:
        """Writes a checkpoint, and gives its digest. Tensors `same` are those of checkpoint 0."""
        folder.mkdir(parents=True, exist_ok=True)
        config: dict = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.kind == "moe":
            config = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}
        (folder / "config.json").write_text(json.dumps(config))
        length = self.size // self.tensors & ~1
        header, lines = {}, []
        blocks = []
        for index in range(self.tensors):
            name = f"model.layers.{index:03}.weight"
            content = self.block(0 if index in same else seed, index, length)
            blocks.append(content)
            begin = index * length
            shape = [length // 2]
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [begin, begin + length],
            }
            lines.append(f"{name}\0BF16\0{shape[0]}\0{blake3.blake3(content).hexdigest()}\n")
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for content in blocks:
                file.write(content)
        return blake3.blake3("".join(lines).encode()).hexdigest()

    @staticmethod
    def block(seed: int, index: int, length: int) -> bytes:
        """Bytes that nothing else has."""
        return blake3.blake3(f"{seed} {index}".encode()).digest(length=length)

    def expected(self, seed: int, prompt: str, count: int) -> list[int]:
        return tokens(self.digests[seed], prompt, count)

    def seed_of(self, prompt: str, given: list[int]) -> int | None:
        """Which checkpoint alone gives these tokens (or their beginning); None for a mixture."""
        for seed in self.digests:
            if given and given == self.expected(seed, prompt, len(given)):
                return seed
        return None
