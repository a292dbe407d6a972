"""The revision of code: a digest over a package's files, which says what ran, with or without a repository."""

from __future__ import annotations

from pathlib import Path

from convoy.core.fingerprints import digest, digest_bytes


def package_digest(package: Path | None = None) -> str:
    """The digest of all files of a package by name and content; by default of the one that is running."""
    package = package or Path(__file__).parents[1]
    files = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest(
        [[path.relative_to(package).as_posix(), digest_bytes(path.read_bytes()).hex()] for path in files]
    )
