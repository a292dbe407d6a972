"""Configs of jobs by path or by URI: `convoy advise` leaves its configs in the workspace, which may be in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convoy.core.config import read_settings
from convoy.core.errors import ObjectNotFound


def read_job_settings(path: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What a config (a path, an s3:// or a file:// URI, or None) and its overrides say, unchecked.

    Raises ConfigError as `read_settings`, and StorageError for a store that cannot be read.
    """
    return read_settings(path, overrides, read=_read)


def _read(path: str) -> bytes:
    # A path may be a pipe, which is no object of a store.
    if "://" not in path:
        return Path(path).read_bytes()
    # Imports the client of S3, which other jobs on local files never need.
    from convoy.storage.stores import UriReader  # noqa: PLC0415

    try:
        return UriReader().get(path).data
    except ObjectNotFound:
        raise FileNotFoundError from None
