"""The losses of linear heads over a whole feature source: value and gradient in float64, batch by batch.

Summing in float64 makes the result independent of the batches, so a streamed fit equals one in memory.
Features stay as they are: standardisation acts on the weights, which spares a pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from convoy.core.errors import DataError
from convoy.vision.distillation import distilled_losses, distilled_slopes
from convoy.vision.head_config import Standardisation
from convoy.vision.heads import FeatureBatch, FeatureSource

# A float32 feature that varies at all has a spread far above this fraction of its mean; rounding stays below.
_CONSTANT_RELATIVE_STD = 1e-12

RowLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureScale:
    """What one pass over the train rows tells: their number, weight, and (x - mean) / std of each feature.

    Weighted, so a row of weight 2 counts as two rows. `std_D` is 1 where a feature is constant.
    """

    num_rows: int
    total_weight: float
    mean_D: Tensor
    std_D: Tensor


def measure_features(
    source: FeatureSource, *, num_classes: int, standardisation: Standardisation
) -> FeatureScale:
    """Check every row of the source and measure it, in one pass with float64 accumulators.

    Means and squares are merged batch by batch (Chan, Golub and LeVeque 1983), which is stable for features
    whose mean is large. Raises DataError for what cannot be fitted, and for classes without weight: their
    intercept, which nothing penalises, would run away.
    """
    num_rows, total_weight = 0, 0.0
    mean_D = torch.zeros(source.num_features, dtype=torch.float64)
    squares_D = torch.zeros_like(mean_D)
    class_weights_K = torch.zeros(num_classes, dtype=torch.float64)
    for batch in checked_batches(source, num_classes=num_classes):
        features_BD, weights_B = batch.features_BD.double(), batch.weights_B.double()
        num_rows += len(features_BD)
        class_weights_K.index_add_(0, batch.labels_B, weights_B)
        batch_weight = float(weights_B.sum())
        if batch_weight == 0.0:
            continue
        batch_mean_D = weights_B @ features_BD / batch_weight
        shift_D = batch_mean_D - mean_D
        merged_weight = total_weight + batch_weight
        mean_D += shift_D * (batch_weight / merged_weight)
        squares_D += weights_B @ (features_BD - batch_mean_D).square()
        squares_D += shift_D.square() * (total_weight * batch_weight / merged_weight)
        total_weight = merged_weight
    _check_complete(source, num_rows, class_weights_K)
    if standardisation is Standardisation.NONE:
        mean_D, std_D = torch.zeros_like(mean_D), torch.ones_like(mean_D)
    else:
        std_D = (squares_D / total_weight).sqrt()
        std_D[std_D <= _CONSTANT_RELATIVE_STD * mean_D.abs()] = 1.0
    return FeatureScale(num_rows=num_rows, total_weight=total_weight, mean_D=mean_D, std_D=std_D)


class LinearObjective:
    """A linear head's objective over all rows, divided by C and the total weight to be well scaled.

    Parameters are the weights [K, D] in standardised units, then the intercepts [K], flattened.
    """

    def __init__(
        self,
        source: FeatureSource,
        scale: FeatureScale,
        row_loss: RowLoss,
        *,
        num_classes: int,
    ) -> None:
        self._source = source
        self._scale = scale
        self._row_loss = row_loss
        self._num_classes = num_classes

    @property
    def num_parameters(self) -> int:
        """K * (D + 1)."""
        return self._num_classes * (len(self._scale.mean_D) + 1)

    def value_and_gradient(
        self, parameters: NDArray[np.float64], c: float
    ) -> tuple[float, NDArray[np.float64]]:
        """The mean weighted loss + ||weights||^2 / (2 * c * total weight), and its gradient."""
        scale = self._scale
        weights_KD, intercepts_K = self._unflatten(parameters)
        raw_KD, raw_K = unstandardise(weights_KD, intercepts_K, scale)
        loss_sum = torch.zeros((), dtype=torch.float64)
        raw_gradient_KD, gradient_K = torch.zeros_like(raw_KD), torch.zeros_like(raw_K)
        for batch in self._source:
            features_BD = batch.features_BD.double()
            logits_BK = torch.addmm(raw_K, features_BD, raw_KD.T)
            loss_B, slope_BK = self._row_loss(logits_BK, batch.labels_B)
            if batch.soft is not None:
                loss_B = distilled_losses(loss_B, logits_BK, batch.soft)
                slope_BK = distilled_slopes(slope_BK, logits_BK, batch.soft)
            row_weights_B = batch.weights_B.double()
            loss_sum += row_weights_B @ loss_B
            slope_BK *= row_weights_B[:, None]
            raw_gradient_KD.addmm_(slope_BK.T, features_BD)
            gradient_K += slope_BK.sum(dim=0)
        gradient_KD = (raw_gradient_KD - gradient_K[:, None] * scale.mean_D) / scale.std_D
        penalty = 1.0 / (c * scale.total_weight)
        value = loss_sum / scale.total_weight + 0.5 * penalty * weights_KD.square().sum()
        gradient_KD = gradient_KD / scale.total_weight + penalty * weights_KD
        flat = torch.cat([gradient_KD.flatten(), gradient_K / scale.total_weight])
        return float(value), flat.numpy()

    def raw_layer(self, parameters: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Weights [K, D] and intercepts [K] that act on features as they are, in float64."""
        return unstandardise(*self._unflatten(parameters), self._scale)

    def _unflatten(self, parameters: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        flat = torch.from_numpy(parameters)
        return flat[: -self._num_classes].view(self._num_classes, -1), flat[-self._num_classes :]


def unstandardise(weights_KD: Tensor, bias_K: Tensor, scale: FeatureScale) -> tuple[Tensor, Tensor]:
    """The layer on raw features that equals the given one on standardised features; float64."""
    raw_KD = weights_KD.double() / scale.std_D
    return raw_KD, bias_K.double() - raw_KD @ scale.mean_D


def softmax_loss(logits_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy in nats [B], and its slope by the logits [B, K]."""
    log_probabilities_BK = torch.log_softmax(logits_BK, dim=1)
    loss_B = -log_probabilities_BK.gather(1, labels_B[:, None]).squeeze(1)
    slope_BK = log_probabilities_BK.exp_()
    slope_BK[torch.arange(len(labels_B)), labels_B] -= 1.0
    return loss_B, slope_BK


def squared_hinge_loss(margins_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's squared hinge summed over the one-against-the-rest problems [B], and its slope [B, K]."""
    signs_BK = 2.0 * one_hot(labels_B, margins_BK.shape[1]).to(margins_BK.dtype) - 1.0
    shortfall_BK = (1.0 - signs_BK * margins_BK).clamp_(min=0.0)
    return shortfall_BK.square().sum(dim=1), -2.0 * signs_BK * shortfall_BK


def checked_batches(source: FeatureSource, *, num_classes: int) -> Iterator[FeatureBatch]:
    """The batches of a source; DataError for shapes, labels, weights or features out of range."""
    for batch in source:
        features_BD, labels_B, weights_B = batch.features_BD, batch.labels_B, batch.weights_B
        if features_BD.shape != (len(labels_B), source.num_features) or weights_B.shape != labels_B.shape:
            raise DataError(
                f"features {tuple(features_BD.shape)}, labels {tuple(labels_B.shape)} and weights "
                f"{tuple(weights_B.shape)} do not fit {source.num_features} features a row"
            )
        if bool(((labels_B < 0) | (labels_B >= num_classes)).any()):
            raise DataError(
                f"labels must be 0..{num_classes - 1}",
                where=f"labels {int(labels_B.min())}..{int(labels_B.max())}",
                next_step="fit on labelled rows only",
            )
        if not bool((torch.isfinite(weights_B) & (weights_B >= 0.0)).all()):
            raise DataError("row weights must be finite and not negative")
        if not bool(torch.isfinite(features_BD).all()):
            raise DataError("features must be finite", next_step="look for the cached part that holds NaN")
        yield batch


def _check_complete(source: FeatureSource, num_rows: int, class_weights_K: Tensor) -> None:
    if num_rows != source.num_rows:
        raise DataError(f"the source promised {source.num_rows} rows and gave {num_rows}")
    empty = torch.nonzero(class_weights_K == 0.0).flatten().tolist()
    if empty:
        raise DataError(
            f"{len(empty)} of {len(class_weights_K)} classes have no train rows",
            where=f"classes {empty[:20]}",
            next_step="add rows of these classes, or leave the classes out of the dataset",
        )
