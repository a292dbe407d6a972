"""Which columns a table of results has beside the fixed ones, and by what it is partitioned. Free of torch."""

from __future__ import annotations

from enum import StrEnum

from convoy.core.config import StrictModel


class ClassOutputs(StrEnum):
    """What is kept of all classes of a sample, beside the best five."""

    NONE = "none"
    LOGITS = "logits"
    PROBABILITIES = "probabilities"


class ScoreColumns(StrictModel):
    """The optional columns of scores.

    `features` names a tap whose pooled activations come out of the same pass, averaged over the crops.
    """

    outputs: ClassOutputs = ClassOutputs.NONE
    features: str | int | None = None


class PartitionBy(StrEnum):
    """By what known column the files of results lie in folders, as Hive does: `split=test/`, `label_name=cat/`."""

    NONE = "none"
    SPLIT = "split"
    LABEL = "label"
