"""What is found out about a sample before anything is drawn: outputs, neighbours, near duplicates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from convoy.core.embedding import Neighbours, nearest_neighbours
from convoy.core.progress import Progress
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.embedding_maps import neighbour_agreement
from convoy.pipelines.inspect_config import InspectConfig, Section
from convoy.pipelines.inspect_sample import InspectedSample, SampleReading
from convoy.pipelines.near_duplicates import (
    NearDuplicateReport,
    joined_taps,
    near_duplicate_taps,
    report_near_duplicates,
)
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore


@dataclass(slots=True, kw_only=True)
class Findings:
    """A sample, and what is known of it. `embedding_ND` are its features at `embedding_tap`.

    What is None was not asked for. Near duplicates were looked for among the `duplicate_rows`; `notes` say what cannot
    be shown.
    """

    sample: InspectedSample
    embedding_tap: str
    embedding_ND: NDArray[Any] | None
    neighbours: Neighbours | None
    neighbour_agreement: float | None
    duplicates: NearDuplicateReport | None
    duplicate_rows: pa.Table | None
    notes: list[str] = field(default_factory=list)


def look_at_sample(
    store: ObjectStore,
    manifest: Manifest,
    classifier: Classifier,
    config: InspectConfig,
    progress: Progress,
) -> Findings:
    """Features of the sample, in one pass for all taps that lack some, and what follows from them."""
    reading = SampleReading(store, manifest, classifier, config)
    rows = reading.rows()
    embedding_tap = _embedding_tap(classifier, config)
    wants_near = not {Section.EMBEDDING, Section.NEIGHBOURS}.isdisjoint(config.sections)
    wants_duplicates = Section.NEAR_DUPLICATES in config.sections
    duplicate_taps = _duplicate_taps(classifier, config) if wants_duplicates else ()
    duplicate_rows = reading.duplicate_rows(rows) if wants_duplicates else None
    taps = [classifier.tap, *([embedding_tap] if wants_near else [])]
    features, found_N = reading.features(
        rows, [*taps, *(duplicate_taps if duplicate_rows is rows else ())], progress=progress
    )
    sample = reading.sample(rows, features[classifier.tap], found_N)
    notes = reading.notes(rows, found_N)
    embedding_ND = features[embedding_tap] if wants_near else None
    duplicates = None
    if duplicate_rows is not None:
        if duplicate_rows is rows:
            duplicate_rows = sample.rows
        else:
            features, found_N = reading.features(duplicate_rows, duplicate_taps, progress=progress)
            duplicate_rows = duplicate_rows.filter(pa.array(found_N))
        progress.stage("looking for near duplicates")
        joined_ND = joined_taps([features[tap] for tap in duplicate_taps])
        threshold = config.near_duplicates.threshold
        duplicates = report_near_duplicates(joined_ND, duplicate_rows, manifest.classes, threshold)
    return Findings(
        sample=sample,
        embedding_tap=embedding_tap,
        embedding_ND=embedding_ND,
        neighbours=_neighbours(embedding_ND, config),
        neighbour_agreement=None
        if embedding_ND is None
        else neighbour_agreement(embedding_ND, sample.labels_N),
        duplicates=duplicates,
        duplicate_rows=duplicate_rows,
        notes=notes,
    )


def _embedding_tap(classifier: Classifier, config: InspectConfig) -> str:
    """Where the head reads, unless the config names another tap."""
    axis = classifier.backbone.axis
    if config.embedding.tap is not None:
        return classifier.backbone.resolve_tap(config.embedding.tap)
    return axis[len(axis) - 2].name if classifier.head is None else classifier.tap


def _duplicate_taps(classifier: Classifier, config: InspectConfig) -> tuple[str, ...]:
    taps = config.near_duplicates.taps
    if taps is None:
        return near_duplicate_taps(classifier.backbone.axis)
    return tuple(dict.fromkeys(classifier.backbone.resolve_tap(tap) for tap in taps))


def _neighbours(embedding_ND: NDArray[Any] | None, config: InspectConfig) -> Neighbours | None:
    if embedding_ND is None or Section.NEIGHBOURS not in config.sections:
        return None
    return nearest_neighbours(embedding_ND, min(config.embedding.num_neighbours, len(embedding_ND) - 1))
