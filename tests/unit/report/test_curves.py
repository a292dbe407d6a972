"""Learning curves: a picture that shows what the history says."""

from __future__ import annotations

import io
import warnings

import matplotlib
import numpy as np
from PIL import Image

from convoy.core.training_events import EpochResult
from convoy.report.curves import draw_learning_curves
from made_events import epoch_result


def epoch(number: int, **values: object) -> EpochResult:
    curves = {"train_loss": 2.0 / number, "val_nll": 2.2 / number, "learning_rate": 0.1 / number}
    return epoch_result(epoch=number, phase="head" if number == 1 else "body", **(curves | values))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_curves_are_a_png_of_the_promised_size_with_lines_in_it() -> None:
    image = pixels(draw_learning_curves([epoch(1), epoch(2), epoch(3)]))
    assert image.shape == (800, 1200, 3)
    # Blue train lines and vermilion validation lines.
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (np.abs(image - np.array(colour)).sum(axis=2) < 30).sum() > 200


def test_another_history_is_another_picture_and_the_same_one_the_same() -> None:
    history = [epoch(1), epoch(2)]
    assert draw_learning_curves(history) == draw_learning_curves(history)
    assert draw_learning_curves(history) != draw_learning_curves([epoch(1), epoch(2, train_loss=1.9)])


def test_a_rate_of_zero_is_drawn_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(draw_learning_curves([epoch(1, learning_rate=0.0)])).shape == (800, 1200, 3)


def test_the_size_does_not_hang_on_the_matplotlibrc() -> None:
    with matplotlib.rc_context({"savefig.dpi": 50, "savefig.bbox": "tight"}):
        assert pixels(draw_learning_curves([epoch(1), epoch(2)])).shape == (800, 1200, 3)


def test_a_single_epoch_without_validation_can_be_drawn() -> None:
    image = pixels(draw_learning_curves([epoch(1, val_nll=None, val_top1=None)]))
    vermilion = np.abs(image - np.array((0xD5, 0x5E, 0))).sum(axis=2) < 30
    blue = np.abs(image - np.array((0, 0x72, 0xB2))).sum(axis=2) < 30
    assert blue.any()
    assert not vermilion.any()
