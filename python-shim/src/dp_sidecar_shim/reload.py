"""Runs vLLM's in-place reload and repairs what it leaves behind.

Mirrors vllm/model_executor/model_loader/reload/layerwise.py of vLLM 0.32.0. Everything private
there is looked up defensively: a name that is missing makes the cleanup "not possible", never an
exception.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_logger = logging.getLogger("vllm.dp_sidecar")

# The CPU platform packs expert weights on first load only from here on (unquantized MoE method,
# `is_weight_update`). Below, it needs no help.
FIRST_WITH_CPU_PACKING = (0, 28)


def vllm_version() -> str:
    """Version of the installed vLLM."""
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))


def version_tuple(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: 0.32.0+cpu -> (0, 32, 0)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit()) if part[:1].isdigit() else ""
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def model_of(worker: Any) -> Any:
    """The worker's model."""
    get_model = getattr(worker, "get_model", None)
    return get_model() if get_model is not None else worker.model_runner.get_model()


def reload_weights(worker: Any, weights: Iterable[tuple[str, Any]]) -> None:
    """Load `weights` (checkpoint format) over the worker's model.

    On an exception the model is torn: call `clean_up`.
    """
    with _context(worker), _packing(worker):
        worker.reload_weights(weights_iterator=weights)


@contextlib.contextmanager
def _context(worker: Any) -> Iterator[None]:
    # vLLM before 0.32 does not set its config for the loaders, before 0.25 not the device either.
    import torch
    from vllm.config import set_current_vllm_config

    with contextlib.ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(worker.vllm_config))
        if version_tuple(vllm_version()) < (0, 25):
            stack.enter_context(torch.device(worker.device))
        yield


@contextlib.contextmanager
def _packing(worker: Any) -> Iterator[None]:
    """Pack the expert weights on the CPU platform after the load, where vLLM has not.

    Watching whether vLLM calls the method keeps this right once vLLM does: packing twice gives a
    third layout and wrong answers.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or version_tuple(vllm_version()) < FIRST_WITH_CPU_PACKING:
        yield
        return
    watched: list[tuple[Any, Any, Any, list[bool]]] = []
    for layer in model_of(worker).modules():
        if not hasattr(layer, "w13_weight"):
            continue
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        pack = getattr(experts, "process_weights_after_loading", None)
        if pack is None:
            continue
        called: list[bool] = []

        def watch(
            *args: Any, _pack: Any = pack, _called: list[bool] = called, **kwargs: Any
        ) -> Any:
            _called.append(True)
            return _pack(*args, **kwargs)

        experts.process_weights_after_loading = watch
        watched.append((layer, experts, pack, called))
    try:
        yield
    finally:
        for _, experts, _, _ in watched:
            with contextlib.suppress(AttributeError):
                del experts.process_weights_after_loading
    for layer, _, pack, called in watched:
        if not called:
            pack(layer)


def clean_up(worker: Any) -> bool:
    """After a failed load: put real tensors back and end vLLM's sessions.

    True when every parameter and buffer is a real tensor again, so that the model can be loaded
    anew. Their content is undefined.
    """
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
    infos = layerwise.LAYERWISE_INFO
    place = layerwise._place_kernel_tensors
    model = model_of(worker)
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    for layer in model.modules():
        # Not get_layerwise_info: that would create entries.
        info = infos.get(layer)
        if info is None:
            continue
        if info.can_load() and info.kernel_tensors is not None:
            place(layer, info)
        info.reset()
    loading = getattr(layerwise, "LOADING_LAYERS", None)
    if loading is not None:
        loading.clear()


def let_go(worker: Any, source: Any) -> None:
    """Close what was loaded from, once the device and the model no longer need it.

    Raises when something else keeps tensors that lie in a segment.
    """
    holds = getattr(source, "holds", None)
    if holds is not None:
        _synchronize(worker)
        _own(worker, holds)
    source.close()


def _synchronize(worker: Any) -> None:
    """Wait until the device has read what it was told to copy."""
    import torch

    kind = getattr(getattr(worker, "device", None), "type", "cpu")
    # Each device's own module: torch.accelerator raises on the CPU, and is not in older versions.
    synchronize = getattr(getattr(torch, kind, None), "synchronize", None)
    if synchronize is not None:
        synchronize()


def _own(worker: Any, holds: Callable[[Any], bool]) -> None:
    # A loader may keep a tensor instead of copying it, where model and checkpoint are on the CPU.
    model = model_of(worker)
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            if tensor.device.type == "cpu" and holds(tensor):
                tensor.data = tensor.data.clone()


def torn(worker: Any) -> bool:
    """Whether any parameter or buffer of the model lies on the meta device."""
    model = model_of(worker)
    return any(
        getattr(tensor, "is_meta", False)
        for tensors in (model.parameters(), model.buffers())
        for tensor in tensors
    )
