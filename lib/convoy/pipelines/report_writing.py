"""Writing pages to where a person looks at them: a local path."""

from __future__ import annotations

from pathlib import Path

from convoy.core.errors import ConfigError


def write_html(output: str, page: bytes) -> int:
    """Write a page to a local path; its bytes. ConfigError where it cannot be written."""
    try:
        return Path(output).write_bytes(page)
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error}", where=output, next_step="choose another path for it"
        ) from error
