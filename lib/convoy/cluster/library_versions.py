"""Workers compute with the driver's libraries or not at all: results of a mixture nobody could repeat.

Ray refuses other versions of Python and of itself; these are the other libraries that determine numbers.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from importlib.metadata import version

from convoy.core.errors import VersionMismatch

_LIBRARIES = ("torch", "torchvision", "timm", "pillow")


def library_versions() -> dict[str, str]:
    """Their versions here, without what names a build: a node without a GPU may well have another one."""
    return {name: version(name).partition("+")[0] for name in _LIBRARIES}


def require_versions(wanted: Mapping[str, str]) -> None:
    """Raise VersionMismatch where this process has others than the driver, whose versions are wanted."""
    if (mismatch := version_mismatch(wanted)) is not None:
        raise mismatch


def version_mismatch(wanted: Mapping[str, str]) -> VersionMismatch | None:
    """What is wrong where this process has others than the driver, for who has to tell it otherwise than by raising."""
    found = library_versions()
    others = [
        f"{name} {found.get(name)} instead of {wanted[name]}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    if not others:
        return None
    return VersionMismatch(
        f"a worker has other libraries than the driver: {', '.join(others)}",
        where=socket.gethostname(),
        next_step="start all nodes from one image or one requirements.lock, the driver's too",
    )
