"""Small sources of real images, made for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def jpeg_bytes(seed: int) -> bytes:
    """A 4x4 JPEG; other seeds (below 2^24) give other bytes."""
    colour = (seed & 255, seed >> 8 & 255, seed >> 16 & 255)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def write_files(root: Path, *keys: str) -> None:
    """A JPEG at each key, different from the others."""
    for seed, key in enumerate(keys):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(seed * 1009 + len(key)))


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    """A tar shard with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def shard_bytes(labels: Mapping[str, str]) -> bytes:
    """A WebDataset shard with a JPEG and a `.cls` for each sample's key."""
    members: dict[str, bytes] = {}
    for seed, (key, label) in enumerate(labels.items()):
        members[f"{key}.jpg"] = jpeg_bytes(seed)
        members[f"{key}.cls"] = label.encode()
    return tar_bytes(members)
