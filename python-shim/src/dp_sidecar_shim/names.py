"""What vLLM's loader does with the names in a checkpoint, found out without one byte of weights."""

# The loader is asked through a twin of the model: the same modules, whose tensors have the names
# and shapes that a checkpoint has, and no memory. Whatever a loader does to it, the engine that
# serves meanwhile does not notice.

from __future__ import annotations

from typing import Any

from dp_sidecar_shim.header import DTYPES

# How often the loader is asked. What it has not shown to pass over by then counts as needed.
ASKED = 64


def tied(model: Any) -> list[list[str]]:
    """Parameters that are one tensor: the name of each further one, and of the first."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    pairs = [[name, first.setdefault(id(tensor), name)] for name, tensor in named]
    return [pair for pair in pairs if pair[0] != pair[1]]


# Names that the loader passes over, among tensors of `[name, dtype, shape]`.
def ignored(worker: Any, model: Any, tensors: list[Any]) -> list[str]:
    from vllm.config import set_current_vllm_config

    found: list[Any] = []
    groups, left = [tensors], ASKED
    with set_current_vllm_config(worker.vllm_config):
        twin = _twin(model)
        while groups and left:
            group, left = groups.pop(), left - 1
            middle = len(group) // 2
            if _passes_over(twin, group):
                found += group
            elif middle:
                groups += [group[:middle], group[middle:]]
        # A loader may gather parts: alone each does nothing.
        return [name for name, *_ in found] if _passes_over(twin, found) else []


# Whether the loader takes all of these, and changes nothing.
def _passes_over(twin: Any, tensors: list[Any]) -> bool:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Untouched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func._schema.is_mutable:
                raise RuntimeError(f"{func} changes a tensor")
            return func(*args, **(kwargs or {}))

    try:
        offered = [
            (name, torch.empty(shape, dtype=getattr(torch, DTYPES[dtype]), device="meta"))
            for name, dtype, shape in tensors
        ]
        with torch.no_grad(), Untouched():
            # A loader that does not say what it has loaded may have loaded it.
            return twin.load_weights(iter(offered)) == set()
    except Exception:
        return False


# In place of the tensors' own loaders: those of an earlier reload take anything without a word.
def _needed(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the loader needs it")


# The module without memory, and with the tensors that it had before its first load.
def _twin(module: Any) -> Any:
    from vllm.model_executor.model_loader.reload import layerwise, meta

    twin = object.__new__(type(module))
    info = layerwise.LAYERWISE_INFO.get(module)
    before = info.restore_metadata if info else ({}, {})
    own = dict(vars(module), _do_torchao_reload=False)
    for kind, made in zip(("_parameters", "_buffers"), before, strict=True):
        tensors = {**own[kind], **made}
        own[kind] = {k: meta.to_meta_tensor(v) for k, v in tensors.items() if v is not None}
        for tensor in own[kind].values():
            tensor.weight_loader = _needed
    own["_modules"] = {name: child and _twin(child) for name, child in own["_modules"].items()}
    vars(twin).update(own)
    return twin
