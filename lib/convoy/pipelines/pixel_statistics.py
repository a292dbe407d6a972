"""The principal colours of a dataset: measured once on its train split, kept beside it, filled into policies."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from convoy.cluster.pixel_statistics import measure_slices
from convoy.cluster.session import ray_session
from convoy.cluster.slices import plan_pool
from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.randomness import unit_interval
from convoy.core.records import Split
from convoy.storage.documents import read_model
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.augmentation_policy import AugmentationPolicy, PcaBasis
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.pixel_statistics import MeasuredImages

_MAX_IMAGES = 10_000
_SLICE_ROWS = 256
# Raised when the same dataset, rule and number of images would give other statistics.
_VERSION = 1


class PixelStatistics(StrictModel):
    """What was measured on the train split; `mean` and `basis` are of RGB pixels scaled to 0..1."""

    measured: MeasuredImages
    mean: tuple[float, float, float]
    basis: PcaBasis


def resolve_augmentation(
    store: ObjectStore,
    manifest: Manifest,
    dataset: str,
    policy: AugmentationPolicy,
    decode_rule: DecodeRule,
    progress: Progress,
) -> AugmentationPolicy:
    """The policy, its `pca_colour` on the principal colours of the dataset's train split.

    A policy that lacks nothing comes back as it is, without a look at the dataset. The statistics are computed
    by Ray once for a dataset's fingerprint and decode rule. Raises DataError where the train
    split has no readable image.
    """
    if not policy.lacks_basis:
        return policy
    key = _key(manifest, dataset, decode_rule)
    known = read_model(PixelStatistics, store, key)
    if known is not None:
        return policy.with_basis(known.basis)
    statistics = measure_dataset(manifest, decode_rule, progress)
    store.put(key, canonical_json(statistics))
    return policy.with_basis(statistics.basis)


def known_augmentation(
    store: ObjectStore,
    manifest: Manifest,
    dataset: str,
    policy: AugmentationPolicy,
    decode_rule: DecodeRule,
) -> AugmentationPolicy | None:
    """What `resolve_augmentation` would return, or None where it would have to measure first."""
    if not policy.lacks_basis:
        return policy
    known = read_model(PixelStatistics, store, _key(manifest, dataset, decode_rule))
    return None if known is None else policy.with_basis(known.basis)


def measure_dataset(manifest: Manifest, decode_rule: DecodeRule, progress: Progress) -> PixelStatistics:
    """Measure the pixels of at most 10,000 images of the train split, by Ray. Raises DataError if none is readable."""
    progress.stage("measuring the colours of the train split")
    rows = choose_rows(manifest, _MAX_IMAGES)
    slices = [rows.slice(start, _SLICE_ROWS) for start in range(0, rows.num_rows, _SLICE_ROWS)]
    total = MeasuredImages()
    if slices:
        with ray_session():
            pool = plan_pool(None)
            progress.start(rows.num_rows, 0)
            for part in measure_slices(slices, decode_rule, pool):
                total = total.plus(part)
                progress.advance(part.num_images, part.num_rejects)
    if not total.num_images:
        raise DataError(
            f"none of {rows.num_rows} images of the train split could be read, so there are no colours to measure",
            where=manifest.uri,
            next_step="look at why with `convoy cache`, or write pca_colour.basis into the config",
        )
    red, green, blue = total.moments.mean().tolist()
    return PixelStatistics(measured=total, mean=(red, green, blue), basis=total.moments.basis())


def choose_rows(manifest: Manifest, max_rows: int) -> pa.Table:
    """The rows of the train split whose ids have the lowest hashes, in the manifest's order, all columns."""
    chosen, hashes_N = MANIFEST_SCHEMA.empty_table(), np.empty(0)
    for batch in manifest.iter_batches(splits=[Split.TRAIN]):
        chosen = pa.concat_tables([chosen, pa.Table.from_batches([batch]).cast(MANIFEST_SCHEMA)])
        new = [unit_interval(0, "pixel statistics", name) for name in batch["sample_id"].to_pylist()]
        hashes_N = np.concatenate([hashes_N, new])
        if len(hashes_N) > max_rows:
            kept = np.sort(np.argsort(hashes_N, kind="stable")[:max_rows])
            chosen, hashes_N = chosen.take(pa.array(kept)), hashes_N[kept]
    return chosen.combine_chunks()


def _key(manifest: Manifest, dataset: str, decode_rule: DecodeRule) -> str:
    measured = digest([_VERSION, manifest.fingerprint, decode_rule, _MAX_IMAGES])
    return f"datasets/{dataset}/pixel_statistics-{measured}.json"
