"""Worker methods of dp-sidecar. Importing this imports neither torch nor vLLM."""

from __future__ import annotations

import logging

__all__ = ["PROTOCOL", "__version__", "register"]

__version__ = "0.1.0"

# Version of the contract with the sidecar, protocol/docs/weight-update.md. Both sides speak one:
# a sidecar loads nothing through a shim of another.
PROTOCOL = 6

_logger = logging.getLogger("vllm.dp_sidecar")


def register() -> None:
    """Entry point of `vllm.general_plugins`: give vLLM's workers the shim's methods."""
    # vLLM calls it in every process it starts, possibly more than once. It never raises: a fault
    # here must cost the sidecar its updates, not the engine its life.
    try:
        from dp_sidecar_shim import attach

        attach.attach()
    except Exception:
        _logger.exception("dp-sidecar shim could not register")
