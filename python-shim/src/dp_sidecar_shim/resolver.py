"""Lets a frontend accept every model name that the engines know as an adapter of the sidecar.

vLLM asks resolvers about a name it does not know when VLLM_ALLOW_RUNTIME_LORA_UPDATING is set
(vllm/entrypoints/openai/models/serving.py, 0.32.0). The answer is only a place to look at: the
engines decide, since the frontend's next step is to have them load it.
"""

from __future__ import annotations

import os
from typing import Any

from dp_sidecar_shim.adapters import SCHEME

NAME = "dp-sidecar"


def register(module: Any) -> None:
    """Register with vLLM's module of resolvers."""
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() not in ("1", "true"):
        return
    registry = module.LoRAResolverRegistry
    if NAME in registry.get_supported_resolvers():
        return

    class Resolver(module.LoRAResolver):  # type: ignore[misc]
        """Answers with the name itself."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            from vllm.lora.request import LoRARequest

            # The number is replaced by the caller.
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=SCHEME + lora_name)

    registry.register_resolver(NAME, Resolver())
