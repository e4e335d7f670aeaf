"""Sets the shim's methods on vLLM's classes, now or when those classes come to be."""

# The frontend's processes load the plugin, too, and never import the worker module: importing it
# for them would cost each a second. So a finder waits for the modules that are not there yet.

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from types import ModuleType
from typing import Any

from dp_sidecar_shim import adapters, resolver

_logger = logging.getLogger("vllm.dp_sidecar")

WORKER_MODULE = "vllm.v1.worker.worker_base"
MANAGER_MODULE = "vllm.lora.worker_manager"
RESOLVER_MODULE = "vllm.lora.resolver"


def attach() -> None:
    """Attach to what there is, and wait for the rest. May be called any number of times."""
    missing = {name for name in _attachments() if not _attach_to(name)}
    waiting = [finder for finder in sys.meta_path if isinstance(finder, _WaitForModules)]
    if waiting:
        waiting[0].names = missing
    elif missing:
        sys.meta_path.insert(0, _WaitForModules(missing))


def _attachments() -> dict[str, tuple[str, Any]]:
    # Module -> a name that is in it once it has run, and what to do with it then.
    return {
        WORKER_MODULE: ("WorkerBase", _give_methods),
        MANAGER_MODULE: ("LRUCacheWorkerLoRAManager", adapters.wrap),
        RESOLVER_MODULE: ("LoRAResolverRegistry", resolver.register),
    }


def _attach_to(name: str) -> bool:
    last, action = _attachments()[name]
    module = sys.modules.get(name)
    if module is None or not hasattr(module, last):
        return False
    action(module)
    return True


def _give_methods(module: ModuleType) -> None:
    # On the base class, so that every platform's worker has them, and beside, not instead of, a
    # --worker-extension-cls.
    for method in (dp_sidecar_info, dp_sidecar_load, dp_sidecar_lora):
        setattr(module.WorkerBase, method.__name__, method)


# Lets the ordinary finder find the modules; attaches to each when it has run.
class _WaitForModules(importlib.abc.MetaPathFinder):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in self.names:
            return None
        self.names = self.names - {fullname}
        if not self.names and self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_attach(module: ModuleType) -> None:
            run_module(module)
            # The shim's faults must not keep vLLM from importing its module.
            try:
                _attach_to(fullname)
            except Exception:
                _logger.exception("dp-sidecar shim could not attach to %s", fullname)

        spec.loader.exec_module = run_and_attach  # type: ignore[method-assign]
        return spec


# The methods, see protocol/docs/weight-update.md. None of them raises.


def dp_sidecar_info(self: Any, path: str | None = None, tensors: Any = ()) -> dict[str, Any]:
    from dp_sidecar_shim import worker

    return worker.info(self, path, tensors)


def dp_sidecar_load(self: Any, request: Any = None) -> dict[str, Any]:
    from dp_sidecar_shim import worker

    return worker.load(self, request)


def dp_sidecar_lora(self: Any, request: Any = None) -> dict[str, Any]:
    from dp_sidecar_shim import lora

    return lora.lora(self, request)
