"""What `convoy score` is told."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from convoy.core.crop_policies import EvaluationMode
from convoy.core.result_columns import PartitionBy, ScoreColumns
from convoy.core.splits import ChosenSplits
from convoy.pipelines.dataset_choice import DatasetChoice
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig
from convoy.pipelines.forecast import Prices
from convoy.pipelines.model_choice import ModelChoice, ViewSettings


class ScoreConfig(ViewSettings, ModelChoice, DatasetChoice):
    """Which images are scored, by what, and what is kept of each.

    An unfinished scoring of the same `name` (null: the dataset's) is gone on with. `splits` of null are all.
    `prices` turn the forecast of a dry run into money.
    """

    splits: ChosenSplits | None = None
    columns: ScoreColumns = ScoreColumns()
    partition_by: PartitionBy = PartitionBy.NONE
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _crops_are_looked_at(self) -> Self:
        if self.mode is EvaluationMode.DENSE and self.crops is not None:
            raise ValueError(
                "mode dense looks at the whole central square and its mirror image: leave crops out, or choose mode"
                " exact"
            )
        return self

    @property
    def run_name(self) -> str:
        """What an unfinished scoring is found by."""
        return self.name or self.dataset_name
