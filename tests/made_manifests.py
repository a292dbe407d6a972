"""Manifests of made samples, without the images."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from convoy.storage.manifests import (
    Manifest,
    ManifestHeader,
    count_samples,
    fingerprint_samples,
    write_manifest,
)
from convoy.storage.object_store import ObjectStore


def write_samples(
    store: ObjectStore,
    samples: pa.Table,
    classes: Sequence[str],
    *,
    key: str = "manifest.parquet",
    fingerprint: str | None = None,
) -> Manifest:
    """The manifest of rows of MANIFEST_SCHEMA; its own fingerprint stands in it unless another is given."""
    header = ManifestHeader(
        fingerprint=fingerprint or fingerprint_samples(samples, classes),
        num_samples=samples.num_rows,
        classes=tuple(classes),
        counts=count_samples(samples, len(classes)),
        source="/data",
    )
    write_manifest(store, key, samples, header)
    return Manifest.open(store, key)
