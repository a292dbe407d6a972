from __future__ import annotations

from typing import Any

import pytest

from convoy.pipelines.network_plan import plan_network, trained_backbone_config
from convoy.pipelines.train_config import TrainConfig
from convoy.vision.backbones import build_network, depth_axis

COUNTS = (40, 40)


def learning_rate(num_workers: int, rate: float | None = None, **recipe: Any) -> float:
    """Of the only phase of a training from scratch."""
    config = TrainConfig.model_validate(
        {
            "dataset": "d",
            "name": "n",
            "strategy": "from_scratch",
            "backbone": {"arch": "cifar_resnet20"},
            "learning_rate": rate,
            "recipe": {"batch_size": 8, **recipe},
        }
    )
    backbone = trained_backbone_config(config, len(COUNTS))
    plan = plan_network(
        config, depth_axis(backbone, build_network(backbone)), COUNTS, num_workers=num_workers
    )
    (phase,) = plan.phases
    return phase.learning_rate


@pytest.mark.parametrize("rate", [None, 0.05])
@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_from_scratch_follows_the_scaling_of_rates(rate: float | None, scaling: str, factor: float) -> None:
    alone, four = (
        learning_rate(num_workers, rate, batch_unit="worker", rate_scaling=scaling) for num_workers in (1, 4)
    )
    assert four == pytest.approx(factor * alone)


def test_where_the_batch_is_the_groups_so_is_the_rate() -> None:
    assert learning_rate(4) == learning_rate(1)
