"""Pictures of a search: they are drawn for every kind of trial and value, and differ with what they show."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image

from convoy.core.trial_events import TrialState
from convoy.pipelines.trial_journal import TrialRecord
from convoy.report.trial_plots import draw_parallel_coordinates, draw_trial_curves

Drawer = Callable[[Sequence[TrialRecord]], bytes]


def trial(index: int, top1: float | None, values: dict[str, Any], **fields: Any) -> TrialRecord:
    state = TrialState.FAILED if top1 is None else TrialState.FINISHED
    return TrialRecord(
        trial=f"{index:03}",
        index=index,
        values=values,
        config={},
        top1=top1,
        **{"state": state, "started_unix_s": 0.0, "finished_unix_s": 1.0, **fields},
    )


TRIALS = [
    trial(0, 0.5, {"lr": 0.001, "arch": {"arch": "a"}, "depth": 0}, epochs=((1, 0.3), (2, 0.45))),
    trial(1, 0.75, {"lr": 1.0, "arch": {"arch": "b"}, "depth": "body"}),
    trial(2, None, {"lr": 0.1, "arch": {"arch": "a"}, "depth": None}),
    trial(3, 0.25, {"lr": 0.2}, state=TrialState.STOPPED, epochs=((1, 0.25),)),
]


@pytest.mark.parametrize("draw", [draw_parallel_coordinates, draw_trial_curves])
@pytest.mark.parametrize("trials", [TRIALS, TRIALS[:1], TRIALS[2:3]])
def test_every_search_has_its_picture(draw: Drawer, trials: list[TrialRecord]) -> None:
    with Image.open(io.BytesIO(draw(trials))) as picture:
        assert (picture.format, picture.size) == ("PNG", (1200, 800))
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_values_of_the_same_name_have_places_of_their_own() -> None:
    def picture(*runs: str) -> bytes:
        weights = [f"s3://models/{run}/lenet5-digits/weights.pth" for run in runs]
        return draw_parallel_coordinates(
            [trial(place, 0.5, {"weights": one}) for place, one in enumerate(weights)]
        )

    assert picture("a", "b") != picture("a", "a")


@pytest.mark.parametrize("draw", [draw_parallel_coordinates, draw_trial_curves])
def test_a_picture_follows_the_accuracy(draw: Drawer) -> None:
    better = [TRIALS[0].model_copy(update={"top1": 0.9}), *TRIALS[1:]]
    assert draw(better) != draw(TRIALS) == draw(list(TRIALS))
