"""The real test images of CIFAR-10 as JPEG files, for tests that have them at hand."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("CONVOY_TEST_DATA", ROOT.parent / "shared/data"))
ARCHIVE = DATA / "cifar10-jpeg.tar.gz"
WEIGHTS = DATA / "cifar10-resnets" / "resnet20-12fca82f.th"


def unpack_test_split(folder: Path) -> Path:
    """The test split as class folders below `folder`; the test is skipped where images or weights are missing."""
    for path in (ARCHIVE, WEIGHTS):
        if not path.exists():
            pytest.skip(f"no {path}; set CONVOY_TEST_DATA to the folder that has it")
    unpack(folder, "test/")
    return folder


def unpack(folder: Path, prefix: str = "", *, archive: Path = ARCHIVE) -> None:
    """The files of an archive whose names begin so, below `folder`."""
    with tarfile.open(archive) as tar:
        # Python before 3.11.4 has no filters.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder, (member for member in tar if member.name.startswith(prefix)))
