"""MoE with several DP ranks on the CPU platform.

vLLM's CPU communicator (vllm/distributed/device_communicators/cpu_communicator.py, 0.22 to 0.33)
has no `all_gatherv` and no `reduce_scatterv`, so the first batch of a MoE model with DP > 1 raises
NotImplementedError. These give both over torch.distributed: slow and simple.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for name, function in (("all_gatherv", all_gatherv), ("reduce_scatterv", reduce_scatterv)):
        # Only what is missing: a vLLM that has its own keeps it.
        if getattr(CpuCommunicator, name, None) is getattr(DeviceCommunicatorBase, name, None):
            setattr(CpuCommunicator, name, function)


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Concatenate every rank's rows; `sizes` says how many each has."""
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    import torch

    assert dim == 0, "rows only"
    if sizes is None:
        sizes = [input_.shape[0]] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in range(self.world_size)]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Sum over the ranks; each keeps its own rows."""
    import torch

    assert dim in (0, -input_.dim()), "rows only"
    if sizes is None:
        sizes = [input_.shape[0] // self.world_size] * self.world_size
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    begin = sum(sizes[: self.rank_in_group])
    return total[begin : begin + sizes[self.rank_in_group]].clone()
