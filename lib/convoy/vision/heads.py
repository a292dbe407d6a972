"""Heads: the last layer on top of a backbone's features, what they are fitted to, and their state.

`head_fitting.fit_head` makes one from cached features; `head_to_state` and `head_from_state` carry it through
a bundle as plain tensors and JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from convoy.core.errors import ConfigError, DataError
from convoy.vision.distillation import SoftTargets, Teacher
from convoy.vision.head_config import HEAD_PREFIX, HeadSpec
from convoy.vision.weights import read_state_dict, state_below


class Head(nn.Module):
    """Logits [B, K] from features [B, D]; of a linear SVM the margins, which are no log-probabilities."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.hidden_width is None:
            self.layers = nn.Sequential(nn.Linear(spec.num_features, spec.num_classes))
        else:
            self.layers = nn.Sequential(
                nn.Linear(spec.num_features, spec.hidden_width),
                nn.ReLU(),
                nn.Dropout(spec.dropout),
                nn.Linear(spec.hidden_width, spec.num_classes),
            )

    @property
    def input_layer(self) -> nn.Linear:
        """The layer that acts on the features, where their standardisation is folded in."""
        return cast(nn.Linear, self.layers[0])

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits [B, K], one column a class."""
        logits_BK: Tensor = self.layers(features_BD)
        return logits_BK


class OutputGroups(nn.Module):
    """Logits of classes that each have several outputs of a network: their probabilities are added.

    `groups` are the outputs of each class; those in no group are left out.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self._groups = [list(outputs) for outputs in groups]

    def forward(self, logits_BO: Tensor) -> Tensor:
        """Logits [B, K] from the network's logits [B, O]."""
        return torch.stack([logits_BO[:, outputs].logsumexp(1) for outputs in self._groups], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureBatch:
    """Some rows of a feature cache: float32 features, int64 labels, float32 weights >= 0; `soft` is a teacher's."""

    features_BD: Tensor
    labels_B: Tensor
    weights_B: Tensor
    soft: SoftTargets | None = None


class FeatureSource(Protocol):
    """Labelled features that can be read again and again, each time the same rows in the same order.

    The sizes of the batches are the source's own affair and do not change a fitted linear head.
    """

    @property
    def num_rows(self) -> int:
        """Rows in one pass; more views of a sample are more rows."""
        ...

    @property
    def num_features(self) -> int:
        """D, the width of a row."""
        ...

    def __iter__(self) -> Iterator[FeatureBatch]: ...


class TensorFeatures:
    """A feature source in memory. Weights are 1 unless given; a `teacher` speaks of the rows in their order.

    Small batches widened to float64 stay in a processor's cache: 512 rows of 512 features are fitted twice as
    fast as 4096.
    """

    def __init__(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        weights_N: Tensor | None = None,
        *,
        teacher: Teacher | None = None,
        batch_rows: int = 512,
    ) -> None:
        if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
            raise DataError(
                "features must be [N, D] and labels [N]",
                where=f"features {tuple(features_ND.shape)}, labels {tuple(labels_N.shape)}",
            )
        if batch_rows < 1:
            raise ConfigError("a batch needs at least one row", where=f"batch_rows={batch_rows}")
        self._features_ND = features_ND
        self._labels_N = labels_N
        self._weights_N = torch.ones(len(labels_N)) if weights_N is None else weights_N
        self._teacher = teacher
        self._batch_rows = batch_rows

    @property
    def num_rows(self) -> int:
        """Rows in one pass."""
        return len(self._labels_N)

    @property
    def num_features(self) -> int:
        """D, the width of a row."""
        return self._features_ND.shape[1]

    def __iter__(self) -> Iterator[FeatureBatch]:
        for start in range(0, self.num_rows, self._batch_rows):
            rows = slice(start, start + self._batch_rows)
            yield FeatureBatch(
                features_BD=self._features_ND[rows],
                labels_B=self._labels_N[rows],
                weights_B=self._weights_N[rows],
                soft=None if self._teacher is None else self._teacher.targets(rows),
            )


def empty_head(spec: HeadSpec) -> Head:
    """A head in eval mode whose tensors are still to be filled: no random numbers are drawn for them."""
    with torch.device("meta"):
        head = Head(spec)
    return head.to_empty(device="cpu").eval()


def head_to_state(head: Head) -> dict[str, Tensor]:
    """The head's tensors, on the CPU and contiguous, as safetensors wants them. `head.spec` is their JSON."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}


def readout_of(
    head: HeadSpec | None, tensors: bytes | None, output_groups: Sequence[Sequence[int]] | None
) -> nn.Module | None:
    """What makes logits of a network's features: a head, or groups of its outputs; None where they are the logits.

    `tensors` are a file that has those of the head below HEAD_PREFIX. Raises DataError where they do not fit it.
    """
    if head is None or tensors is None:
        return None if output_groups is None else OutputGroups(output_groups)
    return head_from_state(head, state_below(read_state_dict(tensors), HEAD_PREFIX))


def head_from_state(spec: HeadSpec, state: Mapping[str, Tensor]) -> Head:
    """The head in eval mode; DataError where tensors are missing, unknown or of another shape."""
    head = empty_head(spec)
    try:
        head.load_state_dict(dict(state))
    except RuntimeError as error:
        raise DataError(
            f"the tensors do not fit a {spec.kind} head: {error}",
            next_step="load the tensors together with the config.json they were saved with",
        ) from None
    return head
