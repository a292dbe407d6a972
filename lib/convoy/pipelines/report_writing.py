"""Writing pages to where a person looks at them: a local path."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from convoy.core.errors import ConfigError


def write_html(output: str, page: bytes) -> int:
    """Write a page to a local path, whole or not at all; its bytes. ConfigError where it cannot be written.

    What is there and is no file, such as /dev/stdout, is written to as it is.
    """
    try:
        path = Path(output).resolve()
        if path.exists() and not path.is_file():
            return path.write_bytes(page)
        _replace(path, page)
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error}", where=output, next_step="choose another path for it"
        ) from error
    return len(page)


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
