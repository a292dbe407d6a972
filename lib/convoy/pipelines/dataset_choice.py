"""Which dataset a job is about: one of the workspace, or a source that becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.progress import Progress
from convoy.core.splits import SplitOptions
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.storage.datasets import (
    DatasetVersion,
    notes_of_version,
    open_dataset,
    reading_notes,
    refuse_made_otherwise,
)
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore, WriterMode
from convoy.storage.runs import OpenRun
from convoy.storage.sources.folders import NO_CLASS
from convoy.storage.sources.rows import ReadingOptions

_WHICH = {"name", "dataset", "source", "reading", "split_options"}


class DatasetChoice(StrictModel):
    """Either a `dataset` of the workspace, or a `source` that is frozen first as the dataset `name`, or refreshed.

    A refresh keeps what `split_options` do not tell.
    """

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

    def open_for(
        self,
        store: ObjectStore,
        open_run: OpenRun,
        *,
        progress: Progress,
        new_run: bool = False,
        every_file: bool = False,
    ) -> tuple[Manifest, list[str]]:
        """The dataset's manifest, and notes: what of a source is not in it, and where it may not be the newest.

        An unfinished run that the same choice began is ended on the version that it has: a source that has one more
        image could not be frozen so again, and a dataset may have been refreshed. Else, and with `new_run`, a source
        is frozen now, and of a dataset the current version taken. ConfigError where that would replace a dataset of
        another source, or one that was read or split otherwise. With `every_file`, files of a source beside its class
        folders are a DataError, and not left out.
        """
        anew = open_run.begins_anew(new_run)
        begun = None if anew else _begun_version(open_run, self.model_dump(mode="json", include=_WHICH))
        if begun is None:
            notes = self._freeze_source(progress, every_file=every_file)
            return open_dataset(store, self.dataset_name), notes
        manifest = open_dataset(store, self.dataset_name, begun)
        if self.source is None and open_dataset(store, self.dataset_name).fingerprint == begun:
            return manifest, []
        left_out = [] if self.source is None else notes_of_version(store, self.dataset_name, begun)
        return manifest, [_note(self.dataset_name, begun), *left_out]

    def _freeze_source(self, progress: Progress, *, every_file: bool) -> list[str]:
        if self.source is None:
            return []
        source = DatasetConfig(
            workspace=self.workspace,
            name=self.dataset_name,
            source=self.source,
            reading=self.reading,
            splits=self.split_options,
        )

        def check(version: DatasetVersion) -> None:
            refuse_made_otherwise(version)
            if every_file and NO_CLASS in version.skipped:
                raise DataError(
                    "; ".join(version.warnings),
                    where=version.header.source,
                    next_step="read all files, without labels, by --set reading.labels=none, or move those away",
                )

        report = freeze(source, progress=progress, check=check)
        return list(reading_notes(report.skipped, report.warnings))


def open_as_begun(
    store: ObjectStore, open_run: OpenRun, dataset: str, *, new_run: bool = False
) -> tuple[Manifest, list[str]]:
    """A dataset in the version that an unfinished run on it began with, and a note where that is not the newest.

    Without such a run, and with `new_run`, the newest.
    """
    newest = open_dataset(store, dataset)
    begun = None if open_run.begins_anew(new_run) else _begun_version(open_run, {"dataset": dataset})
    if begun is None or begun == newest.fingerprint:
        return newest, []
    return open_dataset(store, dataset, begun), [_note(dataset, begun)]


def _begun_version(open_run: OpenRun, which: Mapping[str, Any]) -> str | None:
    """The version of its dataset that an unfinished run has, unless it began with another choice."""
    record = open_run.begun_with(which)
    return None if record is None else str(record.identity["dataset_fingerprint"])


def _note(dataset: str, begun: str) -> str:
    return (
        f"an unfinished run goes on, with version {begun} of {dataset}; once it has ended, the same command takes the"
        " newest images"
    )
