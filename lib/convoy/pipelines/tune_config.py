"""The config of `convoy tune`, and what must hold of it before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from convoy.cluster.search_plan import SchedulerConfig, SearchKind
from convoy.core.config import StrictModel, parse_config
from convoy.core.crop_policies import CropPlan, CropPolicy
from convoy.core.errors import ConfigError
from convoy.core.search_space import Grid, SearchSpace, Values, parse_space, with_values
from convoy.pipelines.ensemble_choice import EnsembleSettings
from convoy.pipelines.train_config import TrainConfig
from convoy.storage.bundles import check_bundle_name
from convoy.storage.object_store import WriterMode

# Keys of a training that a search gives to all its trials, and so are no keys of `base` or `space`.
_OF_THE_SEARCH = frozenset({"workspace", "writers", "name", "dataset"})
# Beyond so many combinations of listed values and ends, each value is tried by itself.
_MAX_COMBINATIONS = 512
_MAX_CHECKED_DRAWS = 256
# As long as the longest that a search gives out.
_A_TRIAL = "0000-000000-fold00"


class SearchBudget(StrictModel):
    """When a search ends: after so many `trials`, `hours`, or dollars; the first that is reached.

    Hours and dollars count this call and those that it resumes, but not the ensemble that is built from the trials.
    Dollars need `price_per_hour`, that of all machines of the cluster together.
    """

    trials: PositiveInt | None = None
    hours: PositiveFloat | None = None
    cost_usd: PositiveFloat | None = None
    price_per_hour: PositiveFloat | None = None

    @model_validator(mode="after")
    def _money_has_a_price(self) -> Self:
        if self.cost_usd is not None and self.price_per_hour is None:
            raise ValueError("cost_usd needs price_per_hour: what the whole cluster costs an hour")
        return self

    @property
    def seconds(self) -> float | None:
        """The time that hours and dollars allow together, or None without a limit."""
        hours = [] if self.hours is None else [self.hours]
        if self.cost_usd is not None and self.price_per_hour is not None:
            hours.append(self.cost_usd / self.price_per_hour)
        return 3600 * min(hours) if hours else None


class TuneConfig(StrictModel):
    """A search over trainings of one dataset, and the ensemble that is built of them.

    `base` holds the keys of `convoy train` that all trials share. `space` gives dotted keys of it a domain:
    `{choice: [...]}`, `{grid: [...]}` (every value with every other grid's), `{uniform: [a, b]}`,
    `{log_uniform: [a, b]}`, or `{int: [a, b]}`; the key `config` stands for several keys at once, dotted as well. A
    value that is a section replaces the whole section of `base`. `crops` is what the trials' validation predictions
    keep, by default `ten`, or `flip` where the preset does not resize. `seed` is that of the draws; a training's own is
    `recipe.seed`. `ensemble` says how members are chosen among the trials.

    With `folds` a trial trains so many models, each without one part of the training rows, which it then predicts: so
    all training rows choose, and a split `val` is not needed.
    """

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    name: str
    dataset: str
    base: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Any]
    search: SearchKind = SearchKind.RANDOM
    seed: NonNegativeInt = 0
    scheduler: SchedulerConfig = SchedulerConfig()
    budget: SearchBudget = SearchBudget()
    max_concurrent: PositiveInt | Literal["auto"] = "auto"
    crops: CropPolicy | None = None
    folds: Annotated[int, Field(ge=2)] | None = None
    ensemble: EnsembleSettings = EnsembleSettings()

    @field_validator("scheduler", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`scheduler: asha` is short for `scheduler: {kind: asha}`."""
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _every_trial_is_a_training(self) -> Self:
        check_bundle_name(f"{self.name}-{_A_TRIAL}")
        if self.folds is not None and self.ensemble.gate is not None:
            raise ConfigError(
                "a gate cannot be calibrated on folds: no row was predicted by all models",
                where="ensemble.gate",
                next_step="leave out ensemble.gate, or folds",
            )
        if self.crops is not None:
            self.ensemble.policies(CropPlan(policy=self.crops))
        self._check_keys()
        space = self.search_space
        if self.search is SearchKind.OPTUNA and any(isinstance(one, Grid) for one in space.domains.values()):
            raise ConfigError(
                "optuna chooses by itself and goes through no grid",
                where="space",
                next_step="write `choice` instead of `grid`, or search: random",
            )
        if self.budget.trials is None and self.budget.seconds is None and not space.is_grid:
            raise ConfigError(
                "a search that draws its points needs a budget",
                where="budget",
                next_step="give budget.trials, budget.hours, or budget.cost_usd with price_per_hour",
            )
        for training in self.examples():
            if self.folds is not None and training.rows.fold is not None:
                raise ConfigError(
                    "a trial with folds leaves out each of them in turn, and rows.fold names one",
                    where="rows.fold",
                    next_step="leave out rows.fold in `base` and `space`, or folds",
                )
        return self

    @property
    def search_space(self) -> SearchSpace:
        """The space as values."""
        return parse_space(self.space)

    @property
    def max_trials(self) -> int | None:
        """How many trials there are at most; None where only time or the space's own size is a limit."""
        return self.budget.trials

    def trial_config(self, values: Values, *, name: str) -> TrainConfig:
        """The training of a point; ConfigError with the point where it is none."""
        settings = {
            **with_values(self.base, values),
            "workspace": self.workspace,
            "writers": self.writers,
            "name": name,
            "dataset": self.dataset,
        }
        return parse_config(TrainConfig, settings, where=f"base with {values} of the space")

    def examples(self) -> Iterator[TrainConfig]:
        """Trainings that hold every listed value and the ends of every range, and the first that will be drawn."""
        for values in self._points_to_check(self.search_space):
            yield self.trial_config(values, name=f"{self.name}-{_A_TRIAL}")

    def _points_to_check(self, space: SearchSpace) -> Iterator[Values]:
        yield from space.spot_checks(_MAX_COMBINATIONS)
        if self.search is SearchKind.RANDOM:
            # These are the very trials.
            yield from islice(space.points(self.seed), min(self.max_trials or 0, _MAX_CHECKED_DRAWS))

    def _check_keys(self) -> None:
        for section, keys in (("base", self.base), ("space", self.search_space.keys)):
            for key in keys:
                first = key.partition(".")[0]
                if first in _OF_THE_SEARCH:
                    raise ConfigError(
                        f"'{first}' is the same for all trials and stands at the top of the config",
                        where=f"{section}.{key}",
                        next_step=f"move it out of `{section}`",
                    )
                if first == "tracking":
                    raise ConfigError(
                        "trials are tracked in the run folder of the search only",
                        where=f"{section}.{key}",
                        next_step="leave `tracking` out, and train the chosen config with `convoy train`",
                    )
