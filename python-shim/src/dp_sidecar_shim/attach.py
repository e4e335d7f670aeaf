"""Sets the shim's methods on vLLM's worker base class, now or when that class comes to be.

The frontend's processes load the plugin, too, and never import the worker module: importing it
for them would cost each a second. So when it is not there yet, a finder waits for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

WORKER_MODULE = "vllm.v1.worker.worker_base"


def attach() -> None:
    """Attach to the worker class, or wait for its module. May be called any number of times."""
    module = sys.modules.get(WORKER_MODULE)
    if module is not None and hasattr(module, "WorkerBase"):
        _give_methods(module)
    elif not any(isinstance(finder, _WaitForWorker) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForWorker())


def _give_methods(module: ModuleType) -> None:
    # On the base class, so that every platform's worker has them, and beside, not instead of, a
    # --worker-extension-cls.
    module.WorkerBase.dp_sidecar_info = dp_sidecar_info
    module.WorkerBase.dp_sidecar_load = dp_sidecar_load


class _WaitForWorker(importlib.abc.MetaPathFinder):
    """Lets the ordinary finder find the worker module; gives it the methods when it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != WORKER_MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_attach(module: ModuleType) -> None:
            run_module(module)
            attach()

        spec.loader.exec_module = run_and_attach  # type: ignore[method-assign]
        return spec


def dp_sidecar_info(self: Any) -> dict[str, Any]:
    """`dp_sidecar_info` of protocol/docs/weight-update.md; never raises."""
    from dp_sidecar_shim import worker

    return worker.info(self)


def dp_sidecar_load(self: Any, request: Any = None) -> dict[str, Any]:
    """`dp_sidecar_load` of protocol/docs/weight-update.md; never raises."""
    from dp_sidecar_shim import worker

    return worker.load(self, request)
