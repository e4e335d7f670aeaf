#!/usr/bin/env python3
"""Write tiny random checkpoints, dense and MoE, three seeds each, and two adapters for dense-0.

Run with the interpreter of the vLLM environment (see ``vllm_env.py``). The checkpoints of one
kind have the same shapes and other weights, so that one can be loaded over the other; their greedy
tokens differ at every step, so each token of a response shows which weights produced it.
``prompts.json`` lists prompts whose greedy path is far from ties, for all seeds of a kind, together
with the tokens that Hugging Face's implementation gives.

Under ``lora`` it lists prompts that dense-0, and dense-0 with each of the adapters, answer with
different tokens from the first one on.

Prints the folder: ``<cache>/models-<hash of this script>``, with ``dense-0`` .. ``moe-2`` and
``lora-1``, ``lora-2``.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
VOCABULARY = 320
STEPS = 48
RANGE = 0.08
LETTERS = "abcdef"
# Mostly the last token decides how an answer goes on: different endings, different answers.
ENDINGS = ("red", "sky", "sun", "oak", "fox", "map")
PROMPTS = 12
ADAPTERS = (1, 2)
LORA_RANK = 4
LORA_ALPHA = 8
LORA_STEPS = 12
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"
)


def say(text: str) -> None:
    print(f"tiny-models: {text}", file=sys.stderr, flush=True)


def target() -> Path:
    root = Path(os.environ.get("DP_SIDECAR_CACHE") or Path.home() / ".cache" / "dp-sidecar")
    return root / f"models-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"


def tokenizer():
    """Byte-level BPE without merges: one token per byte, and names for the rest of the ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    for index in range(len(vocabulary), VOCABULARY):
        vocabulary[f"<{index}>"] = index
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    last = VOCABULARY - 1
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=f"<{last}>", pad_token=f"<{last - 1}>"
    )
    outer.chat_template = CHAT_TEMPLATE
    return outer


def configuration(kind: str):
    from transformers import LlamaConfig, Qwen3MoeConfig

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": RANGE,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 2,
    }
    if kind == "dense":
        return LlamaConfig(**common)
    return Qwen3MoeConfig(
        **common,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        head_dim=32,
        norm_topk_prob=True,
    )


def give_direction(model, seed: int) -> None:
    """Let each token call for one certain next token, another one with each seed.

    The greedy path of a purely random model is full of near ties, which batching may break either
    way. Here every step says which weights made it, while the layers, all random, still show in
    the log probabilities: a layer with wrong weights is found there.
    """
    import torch

    order = torch.randperm(VOCABULARY - 2, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words.normal_(0.0, 1.0)
        head = model.get_output_embeddings().weight
        head[order.roll(-1)] += RANGE * words[order]


def greedy(model, prompts, steps=STEPS):
    """Greedy tokens and the smallest distance between the best two logits on the way."""
    import torch

    smallest = torch.full((len(prompts),), float("inf"))
    path, new, past = [], torch.tensor(prompts), None
    with torch.inference_mode():
        for _ in range(steps):
            out = model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            logits = out.logits[:, -1].float()
            best = logits.topk(2, dim=-1)
            spread = logits.std(dim=-1)
            smallest = torch.minimum(smallest, (best.values[:, 0] - best.values[:, 1]) / spread)
            new = best.indices[:, :1]
            path.append(new)
    return torch.cat(path, dim=1).tolist(), smallest.tolist()


def adapter(number: int, head):
    """Low-rank changes of some modules: name -> (A, B).

    The last one pulls towards four tokens of the adapter's own; the others are small, so that each
    module's place shows in the log probabilities and no step comes close to a tie.
    """
    import torch

    randoms = torch.Generator().manual_seed(number)
    changes = {}
    for layer in range(2):
        for module, width, height in (
            ("self_attn.q_proj", 128, 128),
            ("self_attn.v_proj", 128, 128),
            ("self_attn.o_proj", 128, 128),
            ("mlp.down_proj", 256, 128),
            ("mlp.up_proj", 128, 256),
        ):
            down = torch.randn(LORA_RANK, width, generator=randoms) / width**0.5
            up = torch.randn(height, LORA_RANK, generator=randoms) * 0.05
            if (layer, module) == (1, "mlp.down_proj"):
                up = head[torch.randperm(VOCABULARY - 2, generator=randoms)[:LORA_RANK]].T * 20
            changes[f"model.layers.{layer}.{module}"] = (down, up)
    return changes


def write_adapters(folder: Path, tokens) -> dict:
    """Adapters in PEFT's layout, and what dense-0 answers with and without them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    words = [f"{a} {b} {c}" for a in LETTERS for b in LETTERS for c in ENDINGS]
    encoded = [tokens.encode(word) for word in words]

    def base():
        return AutoModelForCausalLM.from_pretrained(folder / "dense-0", dtype=torch.float32).eval()

    answers = {"": greedy(base(), encoded, LORA_STEPS)}
    for number in ADAPTERS:
        model = base()
        changes = adapter(number, model.get_output_embeddings().weight.detach())
        where = folder / f"lora-{number}"
        where.mkdir()
        content = {}
        for name, (down, up) in changes.items():
            content[f"base_model.model.{name}.lora_A.weight"] = down.bfloat16().contiguous()
            content[f"base_model.model.{name}.lora_B.weight"] = up.bfloat16().contiguous()
            with torch.no_grad():
                scaled = LORA_ALPHA / LORA_RANK * (up.bfloat16().float() @ down.bfloat16().float())
                model.get_submodule(name).weight += scaled
        save_file(content, where / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(folder / "dense-0"),
            "r": LORA_RANK,
            "lora_alpha": LORA_ALPHA,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rsplit(".", 1)[1] for name in changes}),
        }
        (where / "adapter_config.json").write_text(json.dumps(config, indent=1))
        answers[where.name] = greedy(model, encoded, LORA_STEPS)
        say(f"{where.name} written")
    margins = [min(margin[i] for _, margin in answers.values()) for i in range(len(words))]
    good = [
        i
        for i in sorted(range(len(words)), key=lambda i: -margins[i])
        if len({path[i][0] for path, _ in answers.values()}) == len(answers)
    ][:PROMPTS]
    if len(good) < PROMPTS or margins[good[-1]] < 0.1:
        raise SystemExit("tiny-models: too few prompts tell the adapters apart")
    return {
        "prompts": [words[i] for i in good],
        "margins": [margins[i] for i in good],
        "tokens": {name: [path[i] for i in good] for name, (path, _) in answers.items()},
    }


def write_kind(kind: str, folder: Path, tokens) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    words = [f"{a} {b} {c}" for a in LETTERS for b in LETTERS for c in ENDINGS]
    encoded = [tokens.encode(word) for word in words]
    paths, margins = [], []
    for seed in SEEDS:
        torch.manual_seed(1000 + seed)
        model = AutoModelForCausalLM.from_config(configuration(kind), dtype=torch.float32).eval()
        give_direction(model, 1000 + seed)
        model = model.to(torch.bfloat16)
        where = folder / f"{kind}-{seed}"
        model.save_pretrained(where, safe_serialization=True)
        tokens.save_pretrained(where)
        path, margin = greedy(model, encoded)
        paths.append(path)
        margins.append(margin)
        say(f"{where.name} written")
    told_apart = [i for i in range(len(words)) if len({path[i][0] for path in paths}) == len(SEEDS)]
    told_apart.sort(key=lambda i: -min(margin[i] for margin in margins))
    # The best of each ending, then the second best: an ending may have none.
    by_ending = [[i for i in told_apart if words[i].endswith(ending)] for ending in ENDINGS]
    order = [i for turn in itertools.zip_longest(*by_ending) for i in turn if i is not None]
    order = order[:PROMPTS]
    if len(order) < PROMPTS or len({words[i][-3:] for i in order}) < 3:
        raise SystemExit(f"tiny-models: too few {kind} prompts tell the seeds apart")
    smallest = min(margin[i] for margin in margins for i in order)
    if smallest < 0.1:
        raise SystemExit(f"tiny-models: {kind} prompts come within {smallest} of a tie")
    return {
        "prompts": [words[i] for i in order],
        "margins": [min(margin[i] for margin in margins) for i in order],
        "tokens": {str(seed): [paths[seed][i] for i in order] for seed in SEEDS},
    }


def main() -> None:
    where = target()
    if not (where / ".complete").exists():
        where.parent.mkdir(parents=True, exist_ok=True)
        with (where.parent / ".models.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (where / ".complete").exists():
                shutil.rmtree(where, ignore_errors=True)
                where.mkdir()
                names = tokenizer()
                prompts = {kind: write_kind(kind, where, names) for kind in ("dense", "moe")}
                prompts["lora"] = write_adapters(where, names)
                (where / "prompts.json").write_text(json.dumps(prompts, indent=1))
                (where / ".complete").touch()
    print(where)


if __name__ == "__main__":
    main()
