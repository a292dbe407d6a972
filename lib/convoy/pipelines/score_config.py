"""What `convoy score` is told."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from convoy.core.records import Split
from convoy.core.result_columns import PartitionBy, ScoreColumns
from convoy.core.splits import SplitOptions
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig
from convoy.pipelines.forecast import Prices
from convoy.pipelines.model_choice import LookSettings, ModelChoice
from convoy.storage.object_store import WriterMode
from convoy.storage.sources.rows import ReadingOptions


class ScoreConfig(LookSettings, ModelChoice):
    """Which images are scored, by what, and what is kept of each.

    Either a `dataset` of the workspace, or a `source` that is frozen first as the dataset `name`, or refreshed.
    An unfinished scoring of the same `name` (null: the dataset's) is gone on with. `splits` of null are all.
    `prices` turn the forecast of a dry run into money.
    """

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    name: str | None = None
    dataset: str | None = None
    source: str | None = None
    reading: ReadingOptions = ReadingOptions()
    split_options: SplitOptions = SplitOptions()
    splits: tuple[Split, ...] | None = None
    columns: ScoreColumns = ScoreColumns()
    partition_by: PartitionBy = PartitionBy.NONE
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.dataset is None) == (self.source is None):
            raise ValueError("give either dataset, or source and name")
        if self.source is not None and self.name is None:
            raise ValueError("a source needs a name: that of the dataset that it becomes")
        return self

    @property
    def dataset_name(self) -> str:
        """The dataset whose rows are scored."""
        return self.dataset or self.name or ""

    @property
    def run_name(self) -> str:
        """What an unfinished scoring is found by."""
        return self.name or self.dataset_name
