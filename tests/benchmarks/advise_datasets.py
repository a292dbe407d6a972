"""Small datasets for the benchmark of advice: class folders of JPEG files, made or unpacked from archives."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from images import real_data
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from convoy.core.errors import ConfigError
from convoy.core.randomness import generator

_SIDE_PX = 32
_SHAPES_A_CLASS = 240
_SHAPES = ("circle", "square", "triangle", "cross", "ring", "bars")


class Archive(NamedTuple):
    """An archive of real images, the folder in it that has the class folders, and how many of each are used."""

    name: str
    folder: str
    most_per_class: int | None


# Of CIFAR-10 the images that the networks were not trained on.
ARCHIVES = {
    "sign-digits": Archive("sign-digits-jpeg.tar.gz", "Dataset", None),
    "cifar10": Archive("cifar10-jpeg.tar.gz", "test", 300),
}


def why_missing(name: str, data: str | None) -> str | None:
    """Why a dataset cannot be made on this machine, None where it can; `data` is the folder of the archives."""
    if name in MADE:
        return None
    if name not in ARCHIVES:
        return f"it is neither in the workspace nor one of {', '.join([*MADE, *ARCHIVES])}"
    if real_data(ARCHIVES[name].name, data) is None:
        return f"there is no {ARCHIVES[name].name}: name its folder by data=FOLDER or CONVOY_TEST_DATA"
    return None


def make_dataset(name: str, folder: Path, data: str | None = None) -> None:
    """Write the images of a dataset into class folders; ConfigError for one that this machine cannot make."""
    if (why := why_missing(name, data)) is not None:
        raise ConfigError(f"there is no dataset '{name}'", next_step=why)
    if name in ARCHIVES:
        _unpack(ARCHIVES[name], folder, data)
        return
    for label, index, pixels in MADE[name]():
        path = folder / label / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(path, quality=92)


def _unpack(archive: Archive, folder: Path, data: str | None) -> None:
    path = real_data(archive.name, data)
    assert path is not None
    taken: Counter[str] = Counter()
    with tarfile.open(path) as tar:
        for member in tar:
            *_, above, label, name = ("", "", *PurePosixPath(member.name).parts)
            is_wanted = archive.most_per_class is None or taken[label] < archive.most_per_class
            if not member.isfile() or above != archive.folder or not is_wanted:
                continue
            file = tar.extractfile(member)
            assert file is not None
            taken[label] += 1
            (folder / label).mkdir(parents=True, exist_ok=True)
            (folder / label / name).write_bytes(file.read())


def _digits() -> list[tuple[str, int, np.ndarray]]:
    """1,797 handwritten digits of 8 pixels, enlarged."""
    digits = load_digits()
    found = []
    for index, (target, image) in enumerate(zip(digits.target, digits.images, strict=True)):
        grey = Image.fromarray((image * 15).astype(np.uint8))
        large = grey.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC)
        found.append((str(target), index, np.asarray(large)))
    return found


def _shapes() -> list[tuple[str, int, np.ndarray]]:
    """Six kinds of outlines of any size, place, colour and turn, on noise: easy for eyes, new to photo networks."""
    found = []
    for label in _SHAPES:
        for index in range(_SHAPES_A_CLASS):
            random = generator(0, "shapes", label, index)
            found.append((label, index, _draw(label, random)))
    return found


def _draw(label: str, random: np.random.Generator) -> np.ndarray:
    noise = random.integers(60, 196, (_SIDE_PX, _SIDE_PX, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    colour = tuple(int(value) for value in random.choice([20, 235], 3))
    reach = float(random.uniform(6, 12))
    x, y = random.uniform(reach + 1, _SIDE_PX - reach - 1, 2)
    turn = float(random.uniform(0, 2 * np.pi))
    draw = ImageDraw.Draw(image)

    def corner(angle: float, radius: float = 1.0) -> tuple[float, float]:
        return x + radius * reach * np.cos(turn + angle), y + radius * reach * np.sin(turn + angle)

    box = (x - reach, y - reach, x + reach, y + reach)
    if label == "circle":
        draw.ellipse(box, fill=colour)
    elif label == "ring":
        draw.ellipse(box, outline=colour, width=3)
    elif label in ("square", "triangle"):
        sides = 4 if label == "square" else 3
        draw.polygon([corner(2 * np.pi * side / sides) for side in range(sides)], fill=colour)
    elif label == "cross":
        for angle in (0.0, np.pi / 2):
            draw.line([corner(angle), corner(angle + np.pi)], fill=colour, width=4)
    else:
        for side in (-0.35, 0.35):
            draw.line([corner(side), corner(np.pi - side)], fill=colour, width=3)
    return np.asarray(image)


MADE: dict[str, Callable[[], list[tuple[str, int, np.ndarray]]]] = {"digits": _digits, "shapes": _shapes}
