"""Soft targets: what a teacher says of an image, and the loss of a student against it.

Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import kl_div

from convoy.vision.training_config import Distillation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftTargets:
    """A teacher's probabilities_BK (float32) at the temperature of the distillation, for the rows of a batch."""

    probabilities_BK: Tensor
    distillation: Distillation

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        moved = self.probabilities_BK.to(device, non_blocking=True)
        return type(self)(probabilities_BK=moved, distillation=self.distillation)

    def with_probabilities(self, probabilities_BK: Tensor) -> Self:
        """Other targets, such as mixtures of these."""
        return type(self)(probabilities_BK=probabilities_BK, distillation=self.distillation)


class Teacher:
    """What a teacher says of N rows: its logits_NK in float16, 2 bytes a row and class."""

    def __init__(self, logits_NK: NDArray[np.float16], distillation: Distillation) -> None:
        self._logits_NK = torch.from_numpy(logits_NK)
        self._distillation = distillation

    def targets(self, rows_B: NDArray[np.int64] | Sequence[int] | slice) -> SoftTargets:
        """The soft targets of some rows."""
        picked = rows_B if isinstance(rows_B, slice) else torch.as_tensor(rows_B)
        logits_BK = self._logits_NK[picked].float() / self._distillation.temperature
        return SoftTargets(probabilities_BK=torch.softmax(logits_BK, dim=1), distillation=self._distillation)

    def take(self, rows_N: NDArray[np.int64]) -> Teacher:
        """The same teacher for other rows, given by their numbers."""
        return Teacher(self._logits_NK[torch.as_tensor(rows_N)].numpy(), self._distillation)


def distilled_losses(label_losses_B: Tensor, logits_BK: Tensor, soft: SoftTargets) -> Tensor:
    """`weight` * T^2 * KL(teacher || student), both at temperature T, + (1 - `weight`) * the loss against the label.

    T^2 keeps the size of the gradients, which shrink with 1 / T^2, whatever the temperature.
    """
    temperature, weight = soft.distillation.temperature, soft.distillation.weight
    student_BK = torch.log_softmax(logits_BK / temperature, dim=1)
    soft_B = kl_div(student_BK, soft.probabilities_BK.to(student_BK.dtype), reduction="none").sum(dim=1)
    return weight * temperature**2 * soft_B + (1 - weight) * label_losses_B


def distilled_slopes(label_slopes_BK: Tensor, logits_BK: Tensor, soft: SoftTargets) -> Tensor:
    """The slope of `distilled_losses` by the logits, given that of the losses against the labels."""
    temperature, weight = soft.distillation.temperature, soft.distillation.weight
    student_BK = torch.softmax(logits_BK / temperature, dim=1)
    soft_BK = temperature * (student_BK - soft.probabilities_BK.to(student_BK.dtype))
    return weight * soft_BK + (1 - weight) * label_slopes_BK
