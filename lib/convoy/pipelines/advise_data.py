"""What a dataset is before any network says anything: its size, its balance, its images, its mistakes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.core.records import SampleRejected, Split
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_probes import Look, Prober
from convoy.pipelines.advise_rows import images_by_class, missing_classes
from convoy.pipelines.feature_source import count_rejects
from convoy.pipelines.near_duplicates import NearDuplicateReport
from convoy.pipelines.stratified_sample import stratified_rows
from convoy.pipelines.training_rows import UNBALANCED_FROM
from convoy.storage.duplicates import DuplicateReport, find_duplicates
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.samples import SampleReader
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image


class Resolution(StrictModel):
    """Sizes of a sample of the training images, in pixels."""

    images: int
    median_width_px: float
    median_height_px: float
    smallest_side_px: int
    largest_side_px: int


class DataFacts(StrictModel):
    """Size and soundness of a dataset.

    `samples` counts all rows of each split, `images_per_class` what a training has of the smallest, median and largest
    class. Rejects and duplicates are those among the `looked_at` images: `duplicates` have the same bytes,
    `near_duplicates` show the same picture, and those that lie across splits are leaks. Of `unjudged_classes` no image
    judged the probes. `warnings` say in words what should be mended first.
    """

    samples: dict[str, int]
    classes: int
    images_per_class_min: int
    images_per_class_median: float
    images_per_class_max: int
    imbalance: float
    unlabelled: int
    resolution: Resolution | None
    looked_at: int
    rejects: int
    reject_codes: dict[str, int]
    duplicates: DuplicateReport
    near_duplicates: NearDuplicateReport
    unjudged_classes: list[str] = Field(default_factory=list)
    warnings: list[str]


def data_facts(
    store: ObjectStore, manifest: Manifest, config: AdviseConfig, prober: Prober, look: Look
) -> DataFacts:
    """The facts of a dataset whose rows a backbone was looked through."""
    counts = images_by_class(manifest, config.rows)
    summary, decode = look.summary, config.extraction.decode
    labelled = sum(sum(split.by_class) for split in manifest.counts.values())
    wanted = config.look.resolution_images
    sample = stratified_rows(manifest, wanted, splits=[Split.TRAIN], purpose="contact sheet")
    resolution, unmeasured = measure_resolution(sample, decode)
    facts = DataFacts(
        samples={split.value: split_counts.num_samples for split, split_counts in manifest.counts.items()},
        classes=len(manifest.classes),
        images_per_class_min=min(counts),
        images_per_class_median=float(statistics.median(counts)),
        images_per_class_max=max(counts),
        imbalance=max(counts) / max(min(counts), 1),
        unlabelled=manifest.num_samples - labelled,
        resolution=resolution,
        looked_at=summary.samples,
        rejects=summary.rejects,
        reject_codes=count_rejects(FeatureCache(store), summary.sets.values(), prober.rows.all)
        if summary.rejects
        else {},
        duplicates=find_duplicates(store, manifest, next(iter(summary.sets.values())), prober.rows.by_use),
        near_duplicates=prober.near_duplicates(look),
        unjudged_classes=missing_classes(prober.rows.judged, manifest.classes),
        warnings=[],
    )
    return facts.model_copy(update={"warnings": [*find_warnings(facts), *unmeasured]})


def measure_resolution(rows: pa.Table, decode: DecodeRule) -> tuple[Resolution | None, list[str]]:
    """The sizes of some images, None where none of them can be read, and what kept the others from being read.

    That is never fatal: no advice rests on sizes.
    """
    sizes, problems = [], []
    try:
        for _, data in SampleReader().read(rows):
            with suppress(SampleRejected):
                sizes.append(_size(data, decode))
    except ConvoyError as error:
        problems.append(f"sizes are known of {len(sizes)} of {rows.num_rows} images only: {error.what}")
    return _resolution(sizes) if sizes else None, problems


def _size(data: bytes | SampleRejected, decode: DecodeRule) -> tuple[int, int]:
    """Height and width; SampleRejected where the image cannot be used."""
    if isinstance(data, SampleRejected):
        raise data
    _, height, width = decode_image(data, decode).pixels_CHW.shape
    return height, width


def _resolution(sizes: Sequence[tuple[int, int]]) -> Resolution:
    sizes_N2 = np.array(sizes)
    return Resolution(
        images=len(sizes),
        median_width_px=float(np.median(sizes_N2[:, 1])),
        median_height_px=float(np.median(sizes_N2[:, 0])),
        smallest_side_px=int(sizes_N2.min()),
        largest_side_px=int(sizes_N2.max()),
    )


def find_warnings(facts: DataFacts) -> list[str]:
    """What should be looked at before any training, the worst first."""
    warnings = []
    num_samples = sum(facts.samples.values())
    among = "" if facts.looked_at == num_samples else f" (of {facts.looked_at:,} of {num_samples:,} images)"
    for found, kind in ((facts.duplicates, "equal"), (facts.near_duplicates, "nearly equal")):
        if found.across_splits:
            warnings.append(
                f"{found.across_splits} groups of {kind} images{among} lie in several splits: held-out accuracy is too"
                " good"
            )
        if found.label_conflicts:
            warnings.append(f"{found.label_conflicts} groups of {kind} images{among} have different labels")
    if facts.unjudged_classes:
        warnings.append(
            f"no image of {len(facts.unjudged_classes)} of {facts.classes} classes judges"
            f" ({', '.join(facts.unjudged_classes[:5])}): no top-1 says how well they are recognised"
        )
    if facts.imbalance >= UNBALANCED_FROM:
        warnings.append(
            f"the largest class has {facts.imbalance:.1f} times the images of the smallest: configs that train a"
            " network weigh classes, unless network.recipe.balance says otherwise; heads on cached features do not"
        )
    if facts.rejects:
        warnings.append(f"{facts.rejects} of {facts.looked_at} images cannot be used: {facts.reject_codes}")
    if facts.unlabelled:
        warnings.append(f"{facts.unlabelled} samples have no label")
    return warnings
