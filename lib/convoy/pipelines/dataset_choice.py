"""Which dataset a job is about: one of the workspace, or a source that becomes one."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from convoy.core.config import StrictModel
from convoy.core.progress import Progress
from convoy.core.splits import SplitOptions
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.storage.object_store import WriterMode
from convoy.storage.sources.rows import ReadingOptions


class DatasetChoice(StrictModel):
    """Either a `dataset` of the workspace, or a `source` that is frozen first as the dataset `name`, or refreshed."""

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    name: str | None = None
    dataset: str | None = None
    source: str | None = None
    reading: ReadingOptions = ReadingOptions()
    split_options: SplitOptions = SplitOptions()

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.dataset is None) == (self.source is None):
            raise ValueError("give either dataset, or source and name")
        if self.source is not None and self.name is None:
            raise ValueError("a source needs a name: that of the dataset that it becomes")
        return self

    @property
    def dataset_name(self) -> str:
        """The dataset that the job is about."""
        return self.dataset or self.name or ""

    def freeze_source(self, progress: Progress) -> None:
        """Freeze the source, if there is one, as the dataset of that name."""
        if self.source is not None:
            source = DatasetConfig(
                workspace=self.workspace,
                name=self.dataset_name,
                source=self.source,
                reading=self.reading,
                splits=self.split_options,
            )
            freeze(source, progress=progress)
