"""Where Ray Data's shared actors are started: by the driver, before the workers of a split ingest use them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from convoy.cluster import training
from convoy.cluster.training_spec import Ingest


@pytest.mark.parametrize(
    ("ingest", "expected"), [(Ingest.SPLIT, ["settled", "trained"]), (Ingest.FUSED, ["trained"])]
)
def test_the_driver_settles_ray_data_before_its_workers_use_it(
    monkeypatch: pytest.MonkeyPatch, ingest: Ingest, expected: list[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(training, "settle_ray_data", lambda: done.append("settled"))

    class Trainer:
        def fit(self) -> Any:
            done.append("trained")
            return SimpleNamespace(return_value={})

    ended: list[Any] = []
    training._fit(Trainer(), ingest, ended)
    assert (done, ended) == (expected, [{}])


def test_what_keeps_ray_data_from_settling_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("the node is lost")

    def lose() -> None:
        raise lost

    monkeypatch.setattr(training, "settle_ray_data", lose)
    ended: list[Any] = []
    training._fit(None, Ingest.SPLIT, ended)
    assert ended == [lost]
