"""Lets a frontend accept every model name that the engines know as an adapter of the sidecar."""

from __future__ import annotations

import os
from typing import Any

from dp_sidecar_shim.adapters import SCHEME

NAME = "dp-sidecar"


def register(module: Any) -> None:
    """Register with vLLM's module of resolvers, which it asks about names that it does not know."""
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() not in ("1", "true"):
        return
    registry = module.LoRAResolverRegistry
    if NAME in registry.get_supported_resolvers():
        return

    class Resolver(module.LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            from vllm.lora.request import LoRARequest

            # Only a place to look at: the frontend's next step is to have the engines load it, and
            # they decide. The number is replaced by the caller.
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=SCHEME + lora_name)

    registry.register_resolver(NAME, Resolver())
