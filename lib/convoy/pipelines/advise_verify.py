"""`convoy advise --verify`: run the advised strategy and the rejected ones at a small budget, and say the regret."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convoy.core.fingerprints import canonical_json
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import Interval
from convoy.pipelines.advise_config import AdviseConfig, VerifySettings
from convoy.pipelines.advise_report import Verification, VerifiedStrategy
from convoy.pipelines.advise_rows import has_judges
from convoy.pipelines.advise_strategies import Option, StrategyAdvice, fitting_batches, train_config
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.comparison import top1_difference
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.probe_judging import JUDGING_FOLD
from convoy.pipelines.train import run_train
from convoy.pipelines.train_config import NETWORKS
from convoy.pipelines.training_rows import RowLimit, read_split
from convoy.storage.documents import read_json
from convoy.storage.leases import WhenHeld
from convoy.storage.manifests import Manifest
from convoy.storage.runs import RunFolder
from convoy.vision.training_config import WeightAveraging


class Verifier:
    """Runs strategies of an advice, each once: a killed verification goes on with the one in which it was.

    With `new_run` unfinished trainings are left behind instead; those that this advice has verified stay.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: AdviseConfig,
        settings: VerifySettings,
        folder: RunFolder,
        *,
        progress: Progress,
        draw_curves: CurveDrawer,
        new_run: bool,
    ) -> None:
        self._manifest, self._config, self._settings = manifest, config, settings
        self._folder, self._progress, self._draw_curves = folder, progress, draw_curves
        self._new_run = new_run
        self._budget = f"{settings.images_per_class}_images_{settings.epochs}_epochs"
        # What the fold has to refuse is refused before anything is computed.
        self._num_learnt = read_split(manifest, Split.TRAIN, _limit_at_budget(config, settings)).num_rows

    def verify(
        self, strategies: Sequence[StrategyAdvice], found: Sequence[Option], *, check: Callable[[], None]
    ) -> Verification:
        """The strategies of `chosen_options`, measured on rows that chose nothing of them.

        Those are all rows of `val`, some of which judged the probes, or, where it cannot judge, a fold of the few rows
        of the budget; never the held-out split. `found` are the options behind the strategies, with their settings.
        """
        by_name = {(option.strategy, option.backbone): option for option in found}
        runs = []
        for strategy in chosen_options(strategies, self._settings.strategies):
            runs.append(self._run(strategy, by_name[strategy.strategy, strategy.backbone]))
            check()
        advised, *others = runs
        best = max(runs, key=lambda run: run.top1.estimate)
        best_other = max(others, key=lambda run: run.top1.estimate, default=None)
        return Verification(
            images_per_class=self._settings.images_per_class,
            epochs=self._settings.epochs,
            runs=runs,
            best=best.strategy,
            regret=best.top1.estimate - advised.top1.estimate,
            difference=None if best_other is None else self._difference(best_other, advised),
            left_out=len(strategies) - len(runs),
            seconds=sum(run.seconds for run in runs),
        )

    def _run(self, strategy: StrategyAdvice, option: Option) -> VerifiedStrategy:
        key = self._folder.key(f"verified/{self._budget}/{option.settings['name']}.json")
        known = read_json(self._folder.store, key)
        if known is not None:
            # Measured again are ranks and expectations, by a call that went on with the advice.
            now = {"rank": strategy.rank, "expected_top1": strategy.expected_top1}
            return VerifiedStrategy.model_validate(known | now)
        self._progress.stage(f"verifying {strategy.strategy.value} on {strategy.backbone}")
        started_s = time.monotonic()
        judges_on_val = has_judges(self._manifest, self._config.look)
        settings = at_budget(
            option,
            self._config,
            self._settings,
            num_rows=self._num_learnt,
            fold_judges=not judges_on_val,
        )
        training, _ = train_config(settings, where=key)
        report = run_train(
            training,
            progress=self._progress,
            draw_curves=self._draw_curves,
            new_run=self._new_run,
            when_held=WhenHeld.WAIT,
            evaluated=Split.VAL if judges_on_val else None,
            fingerprint=self._manifest.fingerprint,
        )
        verified = VerifiedStrategy(
            rank=strategy.rank,
            strategy=strategy.strategy,
            backbone=strategy.backbone,
            expected_top1=strategy.expected_top1,
            top1=report.intervals["top1_wilson"],
            seconds=time.monotonic() - started_s,
            bundle=report.bundle,
            run=report.run,
        )
        self._folder.store.put(key, canonical_json(verified))
        return verified

    def _difference(self, other: VerifiedStrategy, advised: VerifiedStrategy) -> Interval | None:
        if not (other.run and advised.run):
            return None
        return top1_difference(self._folder.store, other.run, advised.run)


def chosen_options(strategies: Sequence[StrategyAdvice], limit: int | None) -> list[StrategyAdvice]:
    """Every strategy on its best backbone in the order of the advice, then further backbones: `limit` in all."""
    by_strategy: dict[Strategy, StrategyAdvice] = {}
    for one in strategies:
        by_strategy.setdefault(one.strategy, one)
    firsts = list(by_strategy.values())
    if limit is None:
        return firsts
    return [*firsts, *(one for one in strategies if one not in firsts)][:limit]


def at_budget(
    option: Option, config: AdviseConfig, settings: VerifySettings, *, num_rows: int, fold_judges: bool
) -> dict[str, Any]:
    """The settings of an option's training at the budget, which leaves it `num_rows` to learn from.

    A fold of the training rows chooses the head's C and the epoch, so that `val` judges what it did not choose. Where
    the fold itself judges no epoch is chosen: a network ends with its last one.
    """
    changed = {
        **option.settings,
        "name": f"{option.settings['name']}-verify",
        "rows": _limit_at_budget(config, settings).model_dump(mode="json", exclude_none=True),
        "workspace": config.workspace,
    }
    if option.strategy in NETWORKS:
        changed["epochs"] = settings.epochs
        if fold_judges:
            changed["recipe"] = _choosing_no_epoch(changed.get("recipe", {}))
    return fitting_batches(changed, num_rows)


def _choosing_no_epoch(recipe: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in recipe.items() if name != "patience_epochs"}
    if kept.get("averaging") in (WeightAveraging.BEST, WeightAveraging.SOUP):
        kept["averaging"] = WeightAveraging.LAST.value
    return kept


def _limit_at_budget(config: AdviseConfig, settings: VerifySettings) -> RowLimit:
    budget = RowLimit(max_per_class=settings.images_per_class, fold=JUDGING_FOLD, seed=config.rows.seed)
    return budget.within(config.rows)
