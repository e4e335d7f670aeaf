"""Runs vLLM's in-place reload and repairs what it leaves behind."""

# Mirrors vllm/model_executor/model_loader/reload/layerwise.py of vLLM 0.32.0. A private name that
# is missing there makes the cleanup "not possible", never an exception.

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dp_sidecar_shim.names import tied

_logger = logging.getLogger("vllm.dp_sidecar")


def vllm_version() -> str:
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))


def _at_least(*version: int) -> bool:
    # 0.32.0+cpu -> (0, 32)
    numbers = re.findall(r"\d+", vllm_version())[:2]
    return tuple(map(int, numbers)) >= version


def model_of(worker: Any) -> Any:
    return (worker if hasattr(worker, "get_model") else worker.model_runner).get_model()


def _tensors_of(worker: Any) -> Iterator[Any]:
    model = model_of(worker)
    return itertools.chain(model.parameters(), model.buffers())


def files_in(worker: Any, path: str) -> list[str] | None:
    """Names of the files in a directory that vLLM's own loader reads. None: not the default one."""
    from vllm.model_executor.model_loader import get_model_loader

    loader, model = get_model_loader(worker.vllm_config.load_config), model_of(worker)
    if type(loader).__name__ != "DefaultModelLoader":
        return None
    # Else it would be taken for a name on a hub.
    os.listdir(path)
    fall_back = getattr(model, "fall_back_to_pt_during_load", True)
    patterns = getattr(model, "allow_patterns_overrides", None)
    # No revision, and in newer versions no subfolder.
    none = [None] * (len(inspect.signature(loader._prepare_weights).parameters) - 3)
    files = loader._prepare_weights(path, *none, fall_back, patterns)[1]
    return [os.path.relpath(file, path) for file in sorted(files)]


def reload_weights(worker: Any, weights: Iterable[tuple[str, Any]]) -> None:
    """Load `weights` over the worker's model. On an exception it is torn: call `clean_up`."""
    import torch
    from vllm.config import set_current_vllm_config

    # vLLM before 0.32 does not set its config for the loaders, before 0.25 not the device either.
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(worker.vllm_config))
        if not _at_least(0, 25):
            stack.enter_context(torch.device(worker.device))
        stack.enter_context(_packing(worker))
        worker.reload_weights(weights_iterator=weights)


# Pack weights on the CPU platform after the load, where vLLM has not. Watching whether vLLM calls
# the method keeps this right once vLLM does: packing experts twice gives a third layout and wrong
# answers.
@contextlib.contextmanager
def _packing(worker: Any) -> Iterator[None]:
    from vllm.platforms import current_platform

    model, watched, on_cpu = model_of(worker), [], current_platform.is_cpu()
    # Tied, they have a packed copy of their own, which a load of the other name leaves as it was.
    heads = [model.get_submodule(name.rpartition(".")[0]) for name, _ in tied(model) if on_cpu]
    with contextlib.ExitStack() as stack:
        for layer in model.modules() if on_cpu else ():
            owner = getattr(layer, "quant_method", None)
            # From 0.28 on vLLM packs at the first load only (unquantized MoE, `is_weight_update`).
            if hasattr(layer, "w13_weight") and _at_least(0, 28):
                owner = getattr(getattr(owner, "moe_kernel", None), "fused_experts", None)
            elif layer not in heads or not hasattr(layer, "cpu_linear"):
                continue
            if pack := getattr(owner, "process_weights_after_loading", None):
                called: list[Any] = []
                owner.process_weights_after_loading = functools.partial(_noted, called, pack)
                stack.callback(vars(owner).pop, "process_weights_after_loading", None)
                watched.append((layer, pack, called))
        yield
    for layer, pack, called in watched:
        if not called:
            pack(layer)


def _noted(called: list[Any], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    called.append(method)
    return method(*args, **kwargs)


def clean_up(worker: Any) -> bool:
    """After a failed load: put real tensors back, of undefined content. False: not all of them."""
    try:
        _restore_layers(worker)
        if hasattr(worker, "_weight_update_active"):
            worker._weight_update_active = False
        return not torn(worker)
    except Exception:
        _logger.exception("dp-sidecar: cleanup after a failed load did not succeed")
        return False


def _restore_layers(worker: Any) -> None:
    layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    infos, place = layerwise.LAYERWISE_INFO, layerwise._place_kernel_tensors
    model = model_of(worker)
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    for layer in model.modules():
        # Not get_layerwise_info: that would create entries.
        info = infos.get(layer)
        if info is not None:
            if info.can_load() and info.kernel_tensors is not None:
                place(layer, info)
            info.reset()
    getattr(layerwise, "LOADING_LAYERS", set()).clear()


def torn(worker: Any) -> bool:
    """Whether any parameter or buffer of the model lies on the meta device."""
    return any(getattr(tensor, "is_meta", False) for tensor in _tensors_of(worker))


def let_go(worker: Any, source: Any) -> None:
    """Close what was loaded from, once the device and the model no longer need it."""
    if hasattr(source, "holds"):
        import torch

        # The device may still be copying. Each device's own module: torch.accelerator raises on the
        # CPU, and is not in older versions.
        device = getattr(torch, getattr(getattr(worker, "device", None), "type", "cpu"), None)
        getattr(device, "synchronize", lambda: None)()
        # A loader may keep a tensor instead of copying it, where model and checkpoint are on the
        # CPU.
        for tensor in _tensors_of(worker):
            if tensor.device.type == "cpu" and source.holds(tensor):
                tensor.data = tensor.data.clone()
    source.close()
