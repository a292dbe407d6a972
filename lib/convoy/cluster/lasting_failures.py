"""Errors of a training that another attempt would meet again."""

from __future__ import annotations

import torch

from convoy.core.errors import TrainingError


def lasting_failure(error: Exception, run_id: str) -> TrainingError | None:
    """What a worker's error means where restarting its group cannot help; None where it may."""
    where = f"runs/{run_id}"
    if isinstance(error, torch.OutOfMemoryError):
        # Without torch's advice on its allocator.
        words = ". ".join(str(error).split(". ")[:3])
        return TrainingError(
            f"a GPU has not enough memory for what a worker trains on at once: {words}",
            where=where,
            next_step="raise recipe.accumulate, lower recipe.batch_size or the resolution_px of a phase, or take"
            " recipe.precision=bf16, and add --new-run",
        )
    # Of their own kind alone: errors of files and formats inherit from ValueError.
    if type(error) in {ValueError, TypeError}:
        return TrainingError(
            f"the network cannot be trained like this: {error}",
            where=where,
            next_step="change the config (such as a larger recipe.batch_size, or a smaller recipe.accumulate, where"
            " BatchNorm had a single value a channel), and add --new-run",
        )
    return None
