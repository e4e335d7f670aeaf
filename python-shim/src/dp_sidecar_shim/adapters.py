"""Keeps LoRA adapters by name inside vLLM's LoRA manager."""

# Frontends number adapters themselves, and vLLM's manager knows numbers only. The wrapped method
# (`_load_adapter` of vllm/lora/worker_manager.py, 0.11.0 to 0.33.0) gives the sidecar's weights,
# from memory, for a name that the sidecar brought, under any number; else it does what it did.

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_logger = logging.getLogger("vllm.dp_sidecar")

# Path of an adapter that only the sidecar has, followed by the name.
SCHEME = "dp-sidecar:"
ATTRIBUTE = "_dp_sidecar_adapters"
# How many removed adapters are kept for requests that come too late.
REMEMBERED = 8


@dataclass(frozen=True)
class Adapter:
    """An adapter that the sidecar brought, complete in CPU memory."""

    # What `list` answers: name, update_id, path, tensors, bytes, digest.
    facts: dict[str, Any]
    model: Any

    def numbered(self, number: int) -> Any:
        """A copy for vLLM's manager, which changes what it is given."""
        model = copy.deepcopy(self.model)
        model.id = number
        return model


@dataclass
class Adapters:
    """The sidecar's adapters of one worker, beside vLLM's manager of all its adapters."""

    manager: Any
    managed: dict[str, Adapter] = field(default_factory=dict)
    # The update that touched a name last, and what it found.
    ways_back: dict[str, tuple[str, Adapter | None]] = field(default_factory=dict)
    removed: OrderedDict[str, Adapter] = field(default_factory=OrderedDict)
    # Number -> the name that was last loaded under it, by whomever.
    names: dict[int, str] = field(default_factory=dict)
    # vLLM is preparing a step: what fails now ends the engine.
    stepping: bool = False

    def numbers(self, name: str) -> list[int]:
        """Numbers under which the manager holds the name now."""
        return sorted(n for n in self.manager.list_adapters() if self.names.get(n) == name)

    def keep(self, name: str, adapter: Adapter | None, remember: bool = False) -> None:
        """Make this the sidecar's adapter of the name, or forget the name."""
        # `remember`: its last weights stay for requests that come too late.
        before = self.managed.pop(name, None)
        if adapter is not None:
            self.managed[name] = adapter
            self.removed.pop(name, None)
        elif before is not None and remember:
            self.removed[name] = before
            while len(self.removed) > REMEMBERED:
                self.removed.popitem(last=False)

    def load(self, request: Any, read: Callable[[], Any]) -> Any:
        """What vLLM gets for a request: ours, or what `read` gives."""
        name, number = request.lora_name, request.lora_int_id
        adapter = self.managed.get(name)
        if adapter is None:
            try:
                if str(request.lora_path).startswith(SCHEME):
                    raise _not_found(request)
                model = read()
            except Exception as error:
                adapter = self.removed.get(name) if self.stepping else None
                if adapter is None:
                    raise
                text = "dp-sidecar: adapter %s was removed, serving a late request with it (%s)"
                _logger.warning(text, name, error)
        if adapter is not None:
            model = adapter.numbered(number)
        self.names[number] = name
        return model


def _not_found(request: Any) -> Exception:
    with contextlib.suppress(ImportError):
        from vllm.exceptions import LoRAAdapterNotFoundError

        return LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    return FileNotFoundError(f"adapter {request.lora_name} is not loaded in this engine")


def of(manager: Any) -> Adapters:
    """The adapters of a worker's LoRA manager."""
    if not hasattr(manager, ATTRIBUTE):
        setattr(manager, ATTRIBUTE, Adapters(manager))
    return getattr(manager, ATTRIBUTE)


def wrap(module: Any) -> None:
    """Wrap the methods of the module's manager, once. Without the methods nothing is done."""
    manager_class = module.WorkerLoRAManager
    original = manager_class.__dict__.get("_load_adapter")
    if original is None or hasattr(original, ATTRIBUTE):
        return

    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        return of(self).load(lora_request, lambda: original(self, lora_request))

    setattr(_load_adapter, ATTRIBUTE, original)
    manager_class._load_adapter = _load_adapter
    step = manager_class.__dict__.get("set_active_adapters")
    if step is None:
        return

    @functools.wraps(step)
    def set_active_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
        table = of(self)
        table.stepping = True
        try:
            return step(self, *args, **kwargs)
        finally:
            table.stepping = False

    manager_class.set_active_adapters = set_active_adapters


def reader_of(manager: Any) -> Callable[[Any], Any] | None:
    """vLLM's own way to read an adapter, or none when the manager is not wrapped."""
    original = getattr(getattr(type(manager), "_load_adapter", None), ATTRIBUTE, None)
    return None if original is None else functools.partial(original, manager)
