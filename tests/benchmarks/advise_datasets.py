"""Small datasets for the benchmark of advice, made from what every machine has: class folders of JPEG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from convoy.core.errors import ConfigError
from convoy.core.randomness import generator

_SIDE_PX = 32
_SHAPES_A_CLASS = 240
_SHAPES = ("circle", "square", "triangle", "cross", "ring", "bars")


def make_dataset(name: str, folder: Path) -> None:
    """Write the images of a made dataset into class folders; ConfigError for a name that none has."""
    if name not in MADE:
        raise ConfigError(f"there is no made dataset '{name}'", next_step=f"choose of {', '.join(MADE)}")
    for label, index, pixels in MADE[name]():
        path = folder / label / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(path, quality=92)


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
