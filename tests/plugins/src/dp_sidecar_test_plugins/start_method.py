"""Engine cores that are forked, on the CPU platform, too.

vLLM forks its processes where `VLLM_WORKER_MULTIPROC_METHOD` says so, but its CPU platform
(vllm/platforms/cpu.py, 0.22 to 0.33) overrides that with `spawn`. A forked engine core has what its
launcher imported, plugins included, and starts in half of the time.
"""

from __future__ import annotations

import os
from typing import Any

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def register() -> None:
    """Entry point of `vllm.general_plugins`: loaded before the platform sees the configuration."""
    from vllm.platforms import current_platform

    if os.environ.get(METHOD) != "fork" or not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(_cls: type, vllm_config: Any) -> None:
        original(vllm_config)
        os.environ[METHOD] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
