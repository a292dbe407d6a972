"""Which trial comes next: what an earlier call left unfinished, then new points, as Ray Tune asks for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from ray import tune
from ray.tune.search import Searcher

from convoy.cluster.search_plan import PastTrial, SearchJournal, SearchKind, SearchPlan, TrialPoint
from convoy.core.fingerprints import digest
from convoy.core.randomness import position_digest
from convoy.core.search_space import Domain, Range, Scale, SearchSpace, Values
from convoy.core.trial_events import TrialState

METRIC = "top1"
POINT = "point"
# An estimator that knows what is best may suggest it again; then it is told the known value and asked anew, so often.
_MAX_REPEATS = 50


class Drawer(Protocol):
    """Where new points come from."""

    def draw(self, trial_id: str) -> Values | None:
        """A new point, or None where there is none any more."""
        ...

    def tell(self, trial_id: str, point: TrialPoint, top1: float | None) -> None:
        """A trial ended, with its last accuracy if it had any."""
        ...


class TrialQueue(Searcher):  # type: ignore[misc] # Ray has no types
    """Hands out trials one by one, each remembered in the journal before it starts."""

    def __init__(self, plan: SearchPlan, journal: SearchJournal) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._journal = journal
        self._waiting = list(plan.waiting)
        self._points: dict[str, TrialPoint] = {}
        self._num_drawn = len(plan.past) + len(plan.waiting)
        self._max_trials = plan.max_trials
        known = [*(trial.point for trial in plan.past), *plan.waiting]
        self._drawer: Drawer = (
            _EstimatingDrawer(plan.space, plan.seed, plan.past, known)
            if plan.kind is SearchKind.OPTUNA
            else _RandomDrawer(plan.space, plan.seed, self._num_drawn)
        )

    def suggest(self, trial_id: str) -> dict[str, str] | str:
        """The next trial as a Tune config, or the word that there is none."""
        point = self._waiting.pop(0) if self._waiting else self._new_point(trial_id)
        if point is None:
            return str(Searcher.FINISHED)
        self._points[trial_id] = point
        return {POINT: point.model_dump_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial ended. One that recorded its own failure is no error to Tune, which has its last epoch."""
        point = self._points[trial_id]
        ended = None if error else self._journal.ended(point)
        has_failed = error or (ended is not None and ended.state is TrialState.FAILED)
        self._drawer.tell(trial_id, point, None if has_failed else (result or {}).get(METRIC))

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        # Tune pickles what it is given, for a restore that never happens: the journal is what is gone by.
        return object, ()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a resumed search goes by."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: Tune is never asked to restore."""

    def _new_point(self, trial_id: str) -> TrialPoint | None:
        if self._max_trials is not None and self._num_drawn >= self._max_trials:
            return None
        values = self._drawer.draw(trial_id)
        if values is None:
            return None
        point = self._journal.point(self._num_drawn, values)
        self._journal.drawn(point)
        self._num_drawn += 1
        return point


class _RandomDrawer:
    """The points of the space from a number on."""

    def __init__(self, space: SearchSpace, seed: int, start: int) -> None:
        self._points: Iterator[Values] = islice(space.points(seed), start, None)

    def draw(self, trial_id: str) -> Values | None:
        return next(self._points, None)

    def tell(self, trial_id: str, point: TrialPoint, top1: float | None) -> None:
        pass


class _EstimatingDrawer:
    """Optuna's sampler through Ray Tune. It knows positions in lists, not what is listed there.

    Where it suggests known points only, the next random one that is unknown is drawn.
    """

    def __init__(
        self, space: SearchSpace, seed: int, past: Sequence[PastTrial], known: Sequence[TrialPoint]
    ) -> None:
        from ray.tune.search.optuna import OptunaSearch  # noqa: PLC0415

        # It says on the terminal what it does; that is ours.
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._domains = space.domains
        # With the number of known trials: a resumed search must not draw its first points again.
        sampler_seed = int.from_bytes(position_digest(seed, "optuna", len(known))[:4], "big")
        self._search = OptunaSearch(
            OptunaSearch.convert_search_space(
                {key: _tune_domain(domain) for key, domain in space.domains.items()}
            ),
            metric=METRIC,
            mode="max",
            seed=sampler_seed,
        )
        self._top1_of: dict[str, float | None] = {digest(point.values): None for point in known}
        self._asked: dict[str, str] = {}
        self._unknown = (values for values in space.points(seed) if digest(values) not in self._top1_of)
        for trial in past:
            self._add(trial.point, None if trial.state is TrialState.FAILED else trial.top1)

    def draw(self, trial_id: str) -> Values | None:
        for number in range(_MAX_REPEATS):
            asked = f"{trial_id}-{number}"
            values = self._decoded(self._search.suggest(asked))
            name = digest(values)
            if name not in self._top1_of:
                self._top1_of[name] = None
                self._asked[trial_id] = asked
                return values
            self._complete(asked, self._top1_of[name])
        for values in self._unknown:
            self._top1_of[digest(values)] = None
            return values
        return None

    def tell(self, trial_id: str, point: TrialPoint, top1: float | None) -> None:
        if trial_id in self._asked:
            self._top1_of[digest(point.values)] = top1
            self._complete(self._asked[trial_id], top1)
        else:
            self._add(point, top1)

    def _complete(self, asked: str, top1: float | None) -> None:
        result = None if top1 is None else {METRIC: top1}
        self._search.on_trial_complete(asked, result, error=top1 is None)

    def _add(self, point: TrialPoint, top1: float | None) -> None:
        """Tell of a trial that this process did not ask for."""
        self._top1_of[digest(point.values)] = top1
        self._search.add_evaluated_point(
            {key: _encoded(self._domains[key], value) for key, value in point.values.items()},
            top1,
            error=top1 is None,
        )

    def _decoded(self, suggested: dict[str, Any]) -> Values:
        return {
            key: suggested[key] if isinstance(domain, Range) else domain.values[suggested[key]]
            for key, domain in self._domains.items()
        }


def _tune_domain(domain: Domain) -> Any:
    if not isinstance(domain, Range):
        return tune.choice(list(range(len(domain.values))))
    match domain.scale:
        case Scale.INT:
            return tune.randint(int(domain.low), int(domain.high) + 1)
        case Scale.UNIFORM:
            return tune.uniform(domain.low, domain.high)
        case Scale.LOG_UNIFORM:
            return tune.loguniform(domain.low, domain.high)


def _encoded(domain: Domain, value: Any) -> Any:
    if isinstance(domain, Range):
        return value
    return [digest(one) for one in domain.values].index(digest(value))
