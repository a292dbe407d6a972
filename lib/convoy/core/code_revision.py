"""What computes results: the versions of libraries, and a digest over the package's own files.

The digest says what ran, with or without a repository.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from convoy.core.fingerprints import digest, digest_bytes
from convoy.core.version import VERSION

# Among the versions: the digest of the code that ran.
CODE = "convoy-code"
_RECORDED_LIBRARIES = ("ray", "torch", "torchvision", "timm", "pyarrow", "pillow", "numpy", "scipy")


def current_versions() -> dict[str, str]:
    """The versions of the code and of the libraries that compute results here."""
    return {
        "convoy-vision": VERSION,
        **{name: version(name) for name in _RECORDED_LIBRARIES},
        CODE: package_digest(),
    }


def package_digest(package: Path | None = None) -> str:
    """The digest of all files of a package by name and content; by default of the one that is running."""
    package = package or Path(__file__).parents[1]
    files = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest(
        [[path.relative_to(package).as_posix(), digest_bytes(path.read_bytes()).hex()] for path in files]
    )
