"""The images of the benchmark: made ones, the same on every machine, and real ones where they are at hand."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from convoy.core.config import StrictModel

IMAGENET_TAR = "imagenet-250.tar"
_SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
_IMAGES_WORTH_A_PROCESS = 256
_SIZES_HW = ((375, 500), (500, 375), (333, 500))
_LARGE_HW = (3000, 4000)


class ImageSet(StrictModel):
    """Images in one flat folder."""

    folder: str
    num_images: int
    mean_bytes: float


def make_large_images(folder: Path, num_images: int, *, seed: int) -> ImageSet:
    """The same of 4000x3000 pixels, as cameras write them; takes seconds an image."""
    folder.mkdir()
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        _made_image(rng, (_LARGE_HW,)).save(folder / f"large_{index:06d}.jpg", quality=90)
    return _describe(folder)


def make_images(folder: Path, num_images: int, *, seed: int) -> ImageSet:
    """Write JPEGs of about 500x375 pixels and 55 KB (quality 90); equal seeds give equal pixels.

    Like photographs they have amplitudes that fall with a power of the frequency (Field 1987), so that they cost
    a decoder what photographs cost.
    """
    folder.mkdir()
    make = partial(_make_image, folder, seed)
    # A process takes seconds to start, an image some hundredths of one to make.
    workers = min(os.cpu_count() or 1, num_images // _IMAGES_WORTH_A_PROCESS)
    if workers < 2:
        for index in range(num_images):
            make(index)
        return _describe(folder)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(make, range(num_images), chunksize=16))
    return _describe(folder)


def _make_image(folder: Path, seed: int, index: int) -> None:
    rng = np.random.default_rng([seed, index])
    _made_image(rng, _SIZES_HW).save(folder / f"made_{index:06d}.jpg", quality=90)


def made_image(rng: np.random.Generator, side_px: int) -> Image.Image:
    """A square image of that kind."""
    return _made_image(rng, ((side_px, side_px),))


def link_imagenet(folder: Path, num_images: int, *, data: str | None) -> ImageSet | None:
    """The real images under `num_images` distinct names, repeated by hard links; None where there are none."""
    archive = imagenet_archive(data)
    if archive is None:
        return None
    originals = folder.with_name(f"{folder.name}-originals")
    with tarfile.open(archive) as tar:
        # Python before 3.11.4 has no filters.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(originals)
    sources = sorted(path for path in originals.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    _link(folder, num_images, sources)
    return _describe(folder)


def link_first(images: ImageSet, folder: Path, num_images: int) -> ImageSet:
    """The first images of a set as a set of their own."""
    sources = sorted(Path(images.folder).iterdir())
    _link(folder, min(num_images, len(sources)), sources)
    return _describe(folder)


def repeat_images(images: ImageSet, folder: Path, num_images: int) -> ImageSet:
    """The images of a set under so many distinct names."""
    _link(folder, num_images, sorted(Path(images.folder).iterdir()))
    return _describe(folder)


def imagenet_archive(data: str | None) -> Path | None:
    """Where the real images of ImageNet are, or None."""
    return real_data(IMAGENET_TAR, data)


def real_data(name: str, data: str | None) -> Path | None:
    """A file or folder in `data`, else in CONVOY_TEST_DATA, else beside the checkout; None where there is none."""
    path = Path(data or os.environ.get("CONVOY_TEST_DATA") or _SHARED_DATA) / name
    return path if path.exists() else None


def _link(folder: Path, num_images: int, sources: list[Path]) -> None:
    folder.mkdir()
    for index in range(num_images):
        source = sources[index % len(sources)]
        (folder / f"{index // len(sources)}_{source.name}").hardlink_to(source)


def _describe(folder: Path) -> ImageSet:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return ImageSet(folder=str(folder), num_images=len(sizes), mean_bytes=sum(sizes) / len(sizes))


def _made_image(rng: np.random.Generator, sizes_HW: Sequence[tuple[int, int]]) -> Image.Image:
    return Image.fromarray(np.stack(list(_planes_HW(rng, sizes_HW)), axis=-1), "YCbCr")


def _planes_HW(rng: np.random.Generator, sizes_HW: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Luminance and two smoother, weaker planes of colour; steepness and contrast differ between images."""
    size_HW = sizes_HW[rng.integers(len(sizes_HW))]
    slope, contrast = rng.uniform(1.2, 1.7), rng.uniform(30, 60)
    for plane_slope, plane_contrast in ((slope, contrast), (slope + 0.3, 15), (slope + 0.3, 15)):
        field_HW = _noise(rng, size_HW, plane_slope) * plane_contrast + 128
        yield np.clip(field_HW, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, size_HW: tuple[int, int], slope: float) -> np.ndarray:
    """A field of mean 0 and deviation 1 with random phases and amplitudes of frequency ** -slope."""
    height, width = size_HW
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    phase = np.exp(2j * np.pi * rng.random(frequency.shape))
    field_HW = np.fft.irfft2(phase * frequency**-slope, size_HW)
    return field_HW / field_HW.std()
