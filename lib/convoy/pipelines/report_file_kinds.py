"""The kinds of files that samples lie in, as names claim them."""

from __future__ import annotations

from pathlib import PurePosixPath

import pyarrow as pa

_MAX_CHARACTERS = 12


def file_kinds(rows: pa.Table | pa.RecordBatch) -> list[str]:
    """The suffix of the file of each row, or else of its sample's id; `none` where neither has one.

    Samples in a tar shard or a parquet file are of that kind: a manifest does not keep the suffix of a tar's member.
    """
    named = zip(rows["uri"].to_pylist(), rows["sample_id"].to_pylist(), strict=True)
    return [_suffix(uri) or _suffix(sample_id) or "none" for uri, sample_id in named]


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()[:_MAX_CHARACTERS]
