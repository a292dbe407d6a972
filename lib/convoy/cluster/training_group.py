"""The group of training workers as one worker sees it: who it is, and what it does together with the others."""

from __future__ import annotations

import socket
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist

from convoy.core.errors import ConfigError


class TrainingGroup:
    """This worker's rank among `num_workers`, its device, and the group's collectives."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.num_workers: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "Ray gave a training worker a GPU that PyTorch cannot use",
                where=socket.gethostname(),
                next_step="give that node the NVIDIA driver and a CUDA build of PyTorch, or start it with --num-gpus 0",
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that writes and reports."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the group; alone, the network itself.

        Made anew for each phase: DistributedDataParallel learns at its making which parameters are trained.
        """
        wrapped: nn.Module = ray.train.torch.prepare_model(network, move_to_device=False)
        return wrapped

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the group, on every worker."""
        result = values.clone()
        if self.num_workers > 1:
            dist.all_reduce(result)
        return result

    def total_rows(self, num_rows: int) -> int | Tensor:
        """The sum of a number of rows over the group, on its device, so that nobody waits for it; alone, the number."""
        if self.num_workers == 1:
            return num_rows
        # A tensor that is made of a number would wait for all that runs on a GPU, and one that is filled does not.
        return self.total(torch.full((), num_rows, dtype=torch.float32, device=self.device))

    def number_of_first(self, number: float) -> float:
        """A number of the first worker, on every worker; faster than `from_first`, which asks Ray's controller."""
        number = number if self.is_first else 0.0
        return float(self.total(torch.tensor(number, dtype=torch.float64, device=self.device)))

    def share_buffers(self, network: nn.Module) -> None:
        """Take the first worker's buffers, such as BatchNorm statistics."""
        if self.num_workers > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def average_buffers(self, network: nn.Module) -> None:
        """Give every worker the mean of the group's floating-point buffers."""
        if self.num_workers > 1:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer.div_(self.num_workers)

    def from_first(self, value: Any) -> Any:
        """A small value of the first worker, on every worker."""
        return ray.train.collective.broadcast_from_rank_zero(value)

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all workers, those of the first worker first, on every worker."""
        if self.num_workers == 1:
            return list(items)
        gathered: list[Any] = [None] * self.num_workers
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]
