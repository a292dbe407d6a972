"""`convoy dataset`: source → samples → manifest → current version → report."""

from __future__ import annotations

from collections.abc import Callable

from convoy.core.config import StrictModel
from convoy.core.progress import Progress, Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines.workspace import workspace_store
from convoy.storage.datasets import DatasetVersion, freeze_dataset
from convoy.storage.sources.rows import ReadingOptions, SourceKind


class DatasetConfig(StrictModel):
    """Which source becomes which dataset, and how it is read and split.

    What `splits` do not tell, a dataset keeps at a refresh.
    """

    workspace: str | None = None
    name: str
    source: str
    reading: ReadingOptions = ReadingOptions()
    splits: SplitOptions = SplitOptions()


class ClassCounts(StrictModel):
    """Samples of one class by split."""

    name: str
    train: int
    val: int
    test: int


class DatasetReport(StrictModel):
    """A dataset's current version, and what this call changed in it, in numbers of samples.

    `fingerprint` names the version; `splits` counts all samples, labelled or not; `skipped` counts by reason
    the objects that are no samples; of the changed samples `left_train` were in `train` before; `examples` are ids
    of samples that were added, changed, removed or moved.
    """

    name: str
    source: str
    kind: SourceKind
    fingerprint: str
    manifest: str
    samples: int
    splits: dict[Split, int]
    added: int
    changed: int
    removed: int
    moved: int
    left_train: int
    examples: dict[str, tuple[str, ...]]
    skipped: dict[str, int]
    warnings: tuple[str, ...]
    classes: tuple[ClassCounts, ...]


def freeze(
    config: DatasetConfig,
    *,
    progress: Progress | None = None,
    check: Callable[[DatasetVersion], None] | None = None,
) -> DatasetReport:
    """Freeze a source into a dataset of the workspace, or refresh the dataset. Check and errors as `freeze_dataset`."""
    (progress or Silent()).stage(f"looking at {config.source}")
    store = workspace_store(config.workspace)
    version = freeze_dataset(
        store, config.name, config.source, reading=config.reading, splits=config.splits, check=check
    )
    return _report(version)


def _report(version: DatasetVersion) -> DatasetReport:
    header = version.header
    by_class = {split: counts.by_class for split, counts in header.counts.items()}
    return DatasetReport(
        name=version.name,
        source=header.source,
        kind=version.kind,
        fingerprint=header.fingerprint,
        manifest=version.manifest_uri,
        samples=header.num_samples,
        splits={split: counts.num_samples for split, counts in header.counts.items()},
        **version.changes.model_dump(),
        skipped=version.skipped,
        warnings=version.warnings,
        classes=tuple(
            ClassCounts(
                name=name, **{split: by_class[split][index] if split in by_class else 0 for split in Split}
            )
            for index, name in enumerate(header.classes)
        ),
    )
