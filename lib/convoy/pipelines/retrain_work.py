"""The work of a retraining with something new: data checks, candidates, the gate, and the move of the aliases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from convoy.core.errors import DataError
from convoy.core.progress import Progress
from convoy.pipelines.committees import CommitteeRecord, open_committee
from convoy.pipelines.feature_plan import holding_features
from convoy.pipelines.model_registry import ROLLED_BACK, record_decision
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.retrain_config import (
    Decision,
    NewData,
    RetrainConfig,
    RetrainMode,
    RetrainReport,
    StepResult,
)
from convoy.pipelines.retrain_data import examine_new_data
from convoy.pipelines.retrain_gate import ModelScores, judge, least_margin, pair, pair_if_enough, summary
from convoy.pipelines.retrain_rows import open_rows
from convoy.pipelines.retrain_scoring import CachedScorer, can_be_compared
from convoy.pipelines.retrain_steps import CandidateMaker
from convoy.storage.bundles import BundleRef
from convoy.storage.datasets import open_dataset
from convoy.storage.duplicates import content_digests
from convoy.storage.leases import RunLease
from convoy.storage.object_store import ObjectStore
from convoy.storage.registry import Alias, AliasMove, read_aliases
from convoy.storage.retrains import RetrainFolder, RetrainPlan

_HOW_TO_ANSWER = "this date stays held; with other data, settings or champion the next date decides anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What the evidence says, before the aliases are asked. `candidate` is a digest."""

    decision: Decision
    reason: str
    candidate: str | None = None


def take_until_settled(results: Iterable[StepResult]) -> list[StepResult]:
    """The results of steps that run as they are asked for, until one passes the gate or gives the champion again.

    The latter has nothing new to learn from, and a dearer step would not either.
    """
    taken: list[StepResult] = []
    for result in results:
        taken.append(result)
        if result.passed or result.is_champion:
            break
    return taken


class RetrainJob:
    """One logical date of a model, by a plan that is frozen."""

    def __init__(
        self,
        store: ObjectStore,
        folder: RetrainFolder,
        config: RetrainConfig,
        plan: RetrainPlan,
        *,
        progress: Progress,
        draw_curves: CurveDrawer,
    ) -> None:
        self._store = store
        self._folder = folder
        self._config = config
        self._plan = plan
        self._progress = progress
        manifest = open_dataset(store, config.dataset, plan.fingerprint)
        before = plan.previous_fingerprint
        previous = None if before is None else open_dataset(store, config.dataset, before)
        held = {date: open_dataset(store, config.dataset, version) for date, version in plan.held.items()}
        self._champion = None if plan.champion is None else self._open(plan.champion)
        self._rows = open_rows(
            manifest,
            previous,
            folder,
            held,
            date=plan.date,
            champion_classes=() if self._champion is None else self._champion.classes,
            min_class_rows=config.gate.min_class_rows,
        )
        self._scorer = CachedScorer(
            store,
            manifest,
            config.dataset,
            config.extraction,
            note_missing=lambda set_id, missing: folder.note_missing(plan.date, set_id, missing),
            progress=progress,
        )
        self._draw_curves = draw_curves

    @cached_property
    def _maker(self) -> CandidateMaker:
        return CandidateMaker(
            self._folder,
            self._config,
            self._rows,
            self._scorer,
            plan=self._plan,
            progress=self._progress,
            draw_curves=self._draw_curves,
        )

    def run(self, lease: RunLease) -> RetrainReport:
        """Decide the date, and move the aliases by the decision."""
        set_id = self._ensure_set()
        # Before anything is measured or fitted: only now the bytes of all rows are known.
        self._rows = self._rows.known_by_bytes(*content_digests(self._scorer.cache, set_id))
        on_champion = None if self._champion is None else self._scores(self._champion)
        self._progress.stage("examining the new data")
        data = examine_new_data(
            self._rows,
            self._scorer,
            self._config.checks,
            set_id=set_id,
            champion=self._champion,
            on_holdout=None if on_champion is None else on_champion[0],
        )
        steps: list[StepResult] = []
        objections = data.objections or self._maker.objections(self._champion)
        if objections:
            outcome = _Outcome(decision=Decision.HELD, reason="; ".join(objections))
        else:
            steps = take_until_settled(self._results(lease, on_champion))
            outcome = self._decide(steps[-1], on_champion)
        lease.confirm()
        outcome = self._move_aliases(outcome, steps)
        return self._report(outcome, data, steps)

    def _ensure_set(self) -> str:
        """The id of the feature set by which the rows are looked at."""
        if self._champion is not None:
            return self._scorer.ensure_features(self._champion.members[0].classifier)
        backbone = fetch_backbone(self._store, self._config.backbone)
        tap = backbone.resolve_tap(self._config.tap)
        return self._scorer.ensure_set(backbone, tap, holding_features(self._config.extraction, backbone))

    def _results(
        self, lease: RunLease, on_champion: tuple[ModelScores, ModelScores] | None
    ) -> Iterator[StepResult]:
        """One step after the other, each judged."""
        for name, step in self._maker.steps(self._champion).items():
            made = step()
            lease.check()
            if made is not None:
                yield self._judge(name, made.ref, made.train_rows, on_champion)

    def _judge(
        self,
        step: str,
        ref: BundleRef,
        train_rows: int,
        on_champion: tuple[ModelScores, ModelScores] | None,
    ) -> StepResult:
        result = StepResult(step=step, candidate=str(ref), train_rows=train_rows, evidence=None, reason="")
        if on_champion is None:
            return result.model_copy(update={"reason": "there was no champion to compare with"})
        if ref.digest == self._plan.champion:
            reason = "the candidate is the champion, bit for bit"
            return result.model_copy(update={"is_champion": True, "reason": reason})
        self._progress.stage(f"comparing {step} with the champion")
        on_candidate = self._scores(self._open(ref.digest))
        evidence = judge(on_candidate, on_champion, self._rows.shared_classes, self._config.gate)
        return result.model_copy(update={"evidence": evidence, "reason": evidence.reason})

    def _decide(self, last: StepResult, on_champion: tuple[ModelScores, ModelScores] | None) -> _Outcome:
        candidate = last.candidate.partition("@")[2]
        reason = f"{last.step}: {last.reason}"
        if self._config.mode is RetrainMode.SHADOW:
            return _Outcome(decision=Decision.SHADOW, reason=reason, candidate=candidate)
        if on_champion is None:
            return _Outcome(decision=Decision.PROMOTED, reason=reason, candidate=candidate)
        if last.passed:
            answer = self._answer_of_a_person()
            decision = Decision.PROMOTED if answer is None else Decision.HELD
            return _Outcome(
                decision=decision,
                reason=reason + ("" if answer is None else f"; but {answer}"),
                candidate=candidate,
            )
        harm = self._champion_is_worse_than_before(on_champion)
        if harm is not None:
            return _Outcome(
                decision=Decision.ROLLED_BACK, reason=f"{harm}; and {reason}", candidate=candidate
            )
        if last.is_champion:
            return _Outcome(decision=Decision.NOTHING_NEW, reason=f"nothing new to learn from: {reason}")
        return _Outcome(decision=Decision.HELD, reason=reason, candidate=candidate)

    def _answer_of_a_person(self) -> str | None:
        """Why only a person may promote, or None: one of them took the last champion back."""
        last = read_aliases(self._store, self._config.name).last_champion_move()
        if last is None or last.run or last.action != ROLLED_BACK:
            return None
        return f"a person took the champion back ({last.reason}): if this one is good, promote it by hand"

    def _champion_is_worse_than_before(self, on_champion: tuple[ModelScores, ModelScores]) -> str | None:
        """Why the previous champion should come back, or None: it is better on the newest rows, and no worse else."""
        previous = self._former_champion()
        if previous is None:
            return None
        on_previous = self._scores(previous)
        newest = pair_if_enough(on_champion[1], on_previous[1], self._config.gate.min_newest_rows)
        if newest is None or not newest.first_is_worse:
            return None
        if pair(on_champion[0], on_previous[0]).difference.estimate > 0:
            return None
        return (
            f"the champion is worse than the one before it on the {newest.rows} newest rows"
            f" ({newest.top1[0]:.4f} against {newest.top1[1]:.4f}) and no better on the holdout"
        )

    def _former_champion(self) -> CommitteeRecord | None:
        """The previous champion, if it may come back: nobody took it back, it is whole, and it can be compared."""
        record = read_aliases(self._store, self._config.name)
        digest, last = record.aliases.get(Alias.PREVIOUS), record.last_champion_move()
        if digest is None or record.aliases.get(Alias.CHAMPION) != self._plan.champion:
            return None
        if last is None or last.action == ROLLED_BACK:
            return None
        try:
            previous = self._open(digest)
        except DataError:
            return None
        return previous if can_be_compared(previous) else None

    def _move_aliases(self, outcome: _Outcome, steps: list[StepResult]) -> _Outcome:
        """The outcome as the registry has it: the champion may have been changed, or an earlier attempt have moved."""
        config, plan = self._config, self._plan
        run = f"retrains/{config.name}/{plan.date}"
        moved = read_aliases(self._store, config.name).move_by(run)
        if outcome.decision is Decision.NOTHING_NEW and moved is None:
            return outcome
        entry = record_decision(
            self._store,
            config.name,
            AliasMove(
                action=outcome.decision.value,
                moves=self._moves(outcome),
                run=run,
                reason=outcome.reason,
                evidence={
                    "dataset_fingerprint": plan.fingerprint,
                    **summary(steps[-1].evidence if steps else None),
                },
            ),
            expected_champion=plan.champion,
            writers=config.writers,
        )
        candidate = entry.moves.get(Alias.CANDIDATE)
        return _Outcome(decision=Decision(entry.action), reason=entry.reason, candidate=candidate)

    def _moves(self, outcome: _Outcome) -> dict[Alias, str | None]:
        moves: dict[Alias, str | None] = {}
        if outcome.candidate is not None:
            moves[Alias.CANDIDATE] = outcome.candidate
        if outcome.decision is Decision.PROMOTED:
            moves[Alias.CHAMPION] = outcome.candidate
        if outcome.decision is Decision.ROLLED_BACK:
            moves[Alias.CHAMPION] = read_aliases(self._store, self._config.name).aliases[Alias.PREVIOUS]
        if Alias.CHAMPION in moves and self._plan.champion is not None:
            moves[Alias.PREVIOUS] = self._plan.champion
        return moves

    def _report(self, outcome: _Outcome, data: NewData, steps: list[StepResult]) -> RetrainReport:
        config, plan = self._config, self._plan
        aliases = read_aliases(self._store, config.name).aliases
        is_held = outcome.decision is Decision.HELD
        return RetrainReport(
            decision=outcome.decision,
            reason=f"{outcome.reason}; {_HOW_TO_ANSWER}" if is_held else outcome.reason,
            recomputed=sum(self._folder.work(plan.date).missing.values()),
            date=plan.date,
            model=config.name,
            dataset_fingerprint=plan.fingerprint,
            candidate=self._named(outcome.candidate),
            champion=self._named(aliases.get(Alias.CHAMPION)),
            previous=self._named(aliases.get(Alias.PREVIOUS)),
            holdout_rows=len(self._rows.holdout),
            data=data,
            steps=steps,
            notes=[*data.notes, *self._version_notes(), *self._holdout_notes(), *self._maker.notes],
        )

    def _version_notes(self) -> list[str]:
        """What a person should know of the version that what is new is told from."""
        if self._plan.is_champions_version:
            return []
        compared = "all rows count as new"
        if self._plan.previous_fingerprint is not None:
            compared = "the new data is what came since the last date that was not held"
        return [f"nothing says which version of the dataset the champion was made from: {compared}"]

    def _holdout_notes(self) -> list[str]:
        """What a person should know of the rows that judge: what joined them, and whether they are too few."""
        rows, margin = len(self._rows.holdout), self._config.gate.margin
        notes = [
            f"{count} test rows of {name} joined the holdout" for name, count in self._rows.joined.items()
        ]
        if self._plan.champion is None and least_margin(rows) > margin:
            notes.append(
                f"the holdout that is now frozen has {rows} rows: even of two equal models it cannot exclude a loss of"
                f" {least_margin(rows):.4f}, and gate.margin is {margin}, so only a clear gain will be promoted"
            )
        return notes

    def _named(self, digest: str | None) -> str | None:
        return None if digest is None else f"{self._config.name}@{digest}"

    def _open(self, digest: str) -> CommitteeRecord:
        return open_committee(self._store, f"{self._config.name}@{digest}")

    def _scores(self, committee: CommitteeRecord) -> tuple[ModelScores, ModelScores]:
        """A model on the holdout and on the newest rows."""
        shared = self._rows.shared_classes
        return (
            self._scorer.scores(committee, self._rows.holdout, shared),
            self._scorer.scores(committee, self._rows.newest, shared),
        )
