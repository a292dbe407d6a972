"""The config of `convoy advise`, and what must hold of it before anything is read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from convoy.core.config import StrictModel
from convoy.core.learning_curve import MIN_SIZES
from convoy.pipelines.advise_rule import TransferPrior
from convoy.pipelines.augmentation_effect import AugmentationEffectConfig
from convoy.pipelines.backbone_costs import CostsConfig
from convoy.pipelines.dataset_choice import DatasetChoice
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig
from convoy.pipelines.probe_judging import LEAST_JUDGED
from convoy.pipelines.training_rows import RowLimit
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig, NewLayers
from convoy.vision.head_config import HeadConfig, HeadKind
from convoy.vision.training_config import Recipe, RecipeChanges

_SPREAD_TAPS = 5
# Coarser than that of a training, as one is fitted at every tap and for every point of the curve.
_PROBE = HeadConfig(C=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), gradient_tolerance=1e-4)


def plain_name(text: str) -> str:
    """A text in the letters that names of bundles may have, all others being dashes."""
    return re.sub("[^a-z0-9]", "-", text.lower())


class CandidateBackbone(StrictModel):
    """A backbone to look through; `taps` of null are `num_taps` stages spread over its depth, the last is `pooled`.

    `as_is` is judged too where the network has the dataset's classes: by the names that its weights give, or by
    `classes` and `class_map`, as in a config of `convoy train`.
    """

    backbone: BackboneConfig
    taps: tuple[str | int, ...] | None = Field(default=None, min_length=1)
    num_taps: PositiveInt = _SPREAD_TAPS
    classes: tuple[str, ...] | None = None
    class_map: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """Architecture and weights, in a word; `AdviseConfig.name_of` tells those of like names apart."""
        weights = self.backbone.weights.rpartition("/")[2].rpartition(".")[0] or self.backbone.weights
        return f"{self.backbone.arch}/{weights}"


# One family, the larger of twice the depth and cost: whoever names no candidates learns what size buys.
_CANDIDATES = tuple(
    CandidateBackbone(backbone=BackboneConfig(arch=arch))
    for arch in ("torchvision:resnet18", "torchvision:resnet50")
)


class LookSettings(StrictModel):
    """How much of the dataset is looked at: images a class on average to learn from and to judge by.

    Each class has its share of them, or else a few that count less: expected is the top-1 on images as they come.
    `judged_per_class` are of the split `val`; where it has fewer than `least_judged` rows, or rows of one class only,
    of a fifth of `train`. As many images of the held-out split are looked at as well, for duplicates and leaks only.
    All of them together are `max_rows` at most, which the splits share.
    """

    images_per_class: Annotated[int, Field(ge=4)] = 200
    judged_per_class: PositiveInt = 100
    least_judged: PositiveInt = LEAST_JUDGED
    max_rows: PositiveInt = 40_000
    resolution_images: PositiveInt = 64
    seed: int = 0


class CurveSettings(StrictModel):
    """The subsets of the learning curve, as shares of the images that are looked at, each drawn `repeats` times.

    All of these are its last point, also without 1 among `fractions`; two smaller ones at least make a curve.
    `factors` are the multiples of the dataset's images at which accuracy is forecast.
    """

    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    repeats: PositiveInt = 3
    factors: tuple[Annotated[float, Field(ge=1)], ...] = (1.0, 2.0, 4.0)

    @model_validator(mode="after")
    def _make_a_curve(self) -> Self:
        if len({1.0, *self.fractions}) < MIN_SIZES:
            raise ValueError("a learning curve goes through three sizes: name two fractions below 1, or more")
        return self


class NetworkSettings(StrictModel):
    """What the configs of the strategies that train a network have in common.

    `reuse` of null makes no config of `partial_reuse`, nor does a backbone without its stage. `epochs` and `recipe`
    also decide what the trainings cost. `learning_rate` of null is that of each strategy; from scratch it is the
    paper's always.
    """

    epochs: PositiveInt = 30
    recipe: RecipeChanges = Recipe(batch_size=32)
    augmentation: AugmentationPolicy = AugmentationPolicy()
    learning_rate: PositiveFloat | None = None
    reuse: NewLayers | None = None


class VerifySettings(StrictModel):
    """The budget at which the advised strategy and the rejected ones are run: images a class, and epochs.

    A fifth of the images is not learnt from: it chooses the head's C and, where `val` cannot, judges. `strategies` is
    how many options are run, the advised one first, then every other strategy on its best backbone, then further
    backbones; null: every strategy once.
    """

    images_per_class: Annotated[int, Field(ge=2)] = 20
    epochs: PositiveInt = 10
    strategies: Annotated[int, Field(ge=2)] | None = None


class AdviseConfig(DatasetChoice):
    """On which data, by which backbones (by default torchvision's ResNet-18 and ResNet-50), and how closely.

    `rows` are those that a training would have, by default all; advice for fewer is as if `train` had no others, but
    costs and resolution are those of any of its images. `wanted_top1` asks how many images reach it. `reference` is a
    dataset of the domain that the backbones were trained on. `price_per_hour` is what the whole cluster costs an hour,
    in any currency, and the price of `costs` that name none. Strategies within `tie` of the best are as good as the
    best: the cheapest of them is advised, and of those that may cost the same the surest.
    `verify`, `costs` and `augmentation_effect` are measured where they are given, `{}` for their defaults.
    """

    candidates: tuple[CandidateBackbone, ...] = Field(default=_CANDIDATES, min_length=1)
    rows: RowLimit = RowLimit()
    look: LookSettings = LookSettings()
    head: HeadConfig = _PROBE
    num_neighbours: PositiveInt = 5
    curve: CurveSettings = CurveSettings()
    wanted_top1: Annotated[float, Field(gt=0, lt=1)] | None = None
    reference: str | None = None
    network: NetworkSettings = NetworkSettings()
    prior: TransferPrior = TransferPrior()
    tie: Annotated[float, Field(ge=0, lt=1)] = 0.005
    price_per_hour: NonNegativeFloat | None = None
    verify: VerifySettings | None = None
    costs: CostsConfig | None = None
    augmentation_effect: AugmentationEffectConfig | None = None
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if self.rows.fold is not None:
            raise ValueError("advice needs the rows of all folds: leave rows.fold out")
        if self.head.kind is not HeadKind.SOFTMAX:
            raise ValueError("advice fits softmax heads, and a linear SVM below the top: leave head.kind out")
        networks = {(one.backbone.arch, one.backbone.weights) for one in self.candidates}
        if len(networks) < len(self.candidates):
            raise ValueError("every candidate is another backbone: name each architecture and weights once")
        return self

    @property
    def head_changes(self) -> dict[str, Any]:
        """What the head of the probes has unlike that of a training by default: configs say the same."""
        return self.head.model_dump(mode="json", exclude_defaults=True)

    def name_of(self, candidate: CandidateBackbone, weights_digest: str) -> str:
        """The candidate's name, with a digest of its weights where that of another is alike, or becomes so in files."""
        alike = [one for one in self.candidates if plain_name(one.name) == plain_name(candidate.name)]
        return candidate.name if len(alike) < 2 else f"{candidate.name} {weights_digest[:8]}"
