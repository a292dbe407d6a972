"""The configs that we ship are what their jobs take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from convoy.core.config import load_config
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.cache import CacheConfig
from convoy.pipelines.evaluate import EvaluateConfig
from convoy.pipelines.inspect_config import InspectConfig
from convoy.pipelines.network_plan import plan_network, trained_backbone_config
from convoy.pipelines.retrain_config import RetrainConfig
from convoy.pipelines.score_config import ScoreConfig
from convoy.pipelines.train_config import NETWORKS, Strategy, TrainConfig
from convoy.pipelines.tune_config import TuneConfig
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.stages import resolve_tap

JOBS = Path(__file__).parents[3] / "jobs"
CONFIG_OF: dict[str, type[BaseModel]] = {
    "advise": AdviseConfig,
    "cache": CacheConfig,
    "evaluate": EvaluateConfig,
    "inspect": InspectConfig,
    "retrain": RetrainConfig,
    "score": ScoreConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
}
SHIPPED = sorted((JOBS / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_a_shipped_config_is_what_its_job_takes(path: Path) -> None:
    verb = path.name.partition(".")[0]
    config = load_config(CONFIG_OF[verb], str(path))
    assert config.model_fields_set
    # A script named inspect.py would hide Python's own module from everything beside it.
    script = "inspection" if verb == "inspect" else verb
    assert (JOBS / f"{script}.py").is_file()


def test_trials_of_shipped_searches_are_trainings() -> None:
    searches = [load_config(TuneConfig, str(path)) for path in SHIPPED if path.name.startswith("tune.")]
    assert searches
    for search in searches:
        assert all(isinstance(example, TrainConfig) for example in search.examples())


def shipped_trainings() -> Iterator[TrainConfig]:
    for path in SHIPPED:
        if path.name.startswith("train."):
            yield load_config(TrainConfig, str(path))
        elif path.name.startswith("tune."):
            yield from load_config(TuneConfig, str(path)).examples()


def test_shipped_trainings_and_trials_name_depths_that_their_networks_have() -> None:
    for training in shipped_trainings():
        if training.strategy in NETWORKS:
            backbone = trained_backbone_config(training, 10)
            network = build_network(backbone)
            axis = depth_axis(backbone, network)
            plan_network(
                training, network, axis, [200] * 10, num_workers=1, on_gpus=False, device=None, has_val=True
            )
        else:
            resolve_tap(depth_axis(training.backbone, build_network(training.backbone)), training.wanted_tap)


def shipped_taps() -> Iterator[tuple[BackboneConfig, str | int]]:
    for path in SHIPPED:
        match load_config(CONFIG_OF[path.name.partition(".")[0]], str(path)):
            case CacheConfig() as cache:
                yield from ((cache.backbone, tap) for tap in cache.taps)
            case RetrainConfig() as retraining:
                yield retraining.backbone, retraining.tap
            case AdviseConfig() as advising:
                yield from ((one.backbone, tap) for one in advising.candidates for tap in one.taps or ())


def test_shipped_configs_name_taps_that_their_networks_have() -> None:
    assert {tap for _, tap in shipped_taps()} >= {"layer1", "pooled"}
    for backbone, tap in shipped_taps():
        resolve_tap(depth_axis(backbone, build_network(backbone)), tap)


@pytest.mark.parametrize("strategy", [one for one in Strategy if one is not Strategy.AS_IS])
@pytest.mark.parametrize("data", ["cifar", "sign_digits"])
def test_every_strategy_that_trains_is_shipped_under_its_name(data: str, strategy: Strategy) -> None:
    config = load_config(TrainConfig, str(JOBS / "configs" / f"train.{data}_{strategy}.yaml"))
    assert config.strategy is strategy
