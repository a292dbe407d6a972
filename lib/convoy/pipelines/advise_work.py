"""The work of an advice: gather evidence, judge by the rule, write the configs, and verify where that is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

import numpy as np

from convoy.cluster.session import ray_session
from convoy.core.config import read_settings
from convoy.core.errors import DataError
from convoy.core.progress import Progress
from convoy.core.transferability import DomainDistance
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_data import data_facts
from convoy.pipelines.advise_evidence import Gathered, Gatherer
from convoy.pipelines.advise_more_data import more_data
from convoy.pipelines.advise_probes import Look, Prober
from convoy.pipelines.advise_report import AdviceReport, Similarity
from convoy.pipelines.advise_rule import dissimilarity, four_scenarios
from convoy.pipelines.advise_strategies import (
    Basis,
    Option,
    StrategyAdvice,
    advice,
    options,
    train_config,
)
from convoy.pipelines.advise_taps import known_stage, probed_stage
from convoy.pipelines.advise_verify import Verifier
from convoy.pipelines.augmentation_effect import AugmentationEffect, measure_augmentation
from convoy.pipelines.backbone_costs import BackboneCost, measure_costs
from convoy.pipelines.backbone_evidence import BackboneEvidence
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.cost_front import CostFront, cost_fronts
from convoy.pipelines.device_settings import settle_precision
from convoy.pipelines.network_training import CurveDrawer
from convoy.storage.bundles import check_bundle_name
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder

# Below it a pass is start more than work.
_LEAST_TIMED = 300


@dataclass(frozen=True, slots=True, eq=False)
class AdviceWork:
    """One advice in its run folder; `check` raises where another driver has taken the run.

    `reference` is the version of the config's reference, None without one.
    """

    store: ObjectStore
    manifest: Manifest
    config: AdviseConfig
    folder: RunFolder
    progress: Progress
    draw_curves: CurveDrawer
    check: Callable[[], None]
    new_run: bool
    reference: Manifest | None = None

    def advise(self, records: Sequence[BackboneRecord]) -> AdviceReport:
        """The whole advice by the backbones of the candidates."""
        started_s = time.monotonic()
        config = self.config
        verifier = self._verifier()
        prober = Prober(self.store, self.manifest, config, self.progress, new_run=self.new_run)
        gatherer = Gatherer(self.store, self.manifest, config, prober)
        # One Ray for all passes and trainings, as each of them alone would start its own; none where all is cached.
        lacks = any(
            prober.lacks_features(candidate, record)
            for candidate, record in zip(config.candidates, records, strict=True)
        )
        with ray_session() if lacks or config.verify is not None else nullcontext():
            gathered = gatherer.gather(records, check=self.check)
            found = options(config, gathered.evidence)
            strategies = advice(found, tie=config.tie, paths=[self._write(option) for option in found])
            first = strategies[0]
            advised = next(one for one in gathered.evidence if one.probes.backbone == first.backbone)
            distance, distance_notes = self._domain_distance(gatherer, gathered, advised)
            similarity = self._similarity(gathered, advised, distance)
            facts = data_facts(self.store, self.manifest, config, prober, gathered.best)
            verification = None if verifier is None else verifier.verify(strategies, found, check=self.check)
            costs = self._costs(records)
            fronts, front_notes = _fronts(costs, gathered)
            augmentation = self._augmentation(gathered, prober)
        scenario = four_scenarios(advised.evidence, config.prior)
        return AdviceReport(
            run=self.folder.run_id,
            dataset=config.dataset_name,
            fingerprint=self.manifest.fingerprint,
            advised=f"{first.strategy.value} on {first.backbone}: {first.why}",
            rule=scenario,
            strategies=strategies,
            more_data=more_data(config, advised, first, gathered.curve),
            similarity=similarity,
            size=facts,
            verification=verification,
            costs=costs,
            cost_fronts=fronts,
            augmentation_effect=augmentation,
            prior=config.prior,
            seconds=time.monotonic() - started_s,
            notes=[
                *_notes(gathered, first, scenario.strategy.value),
                *front_notes,
                *_left_out(config, gathered),
                *distance_notes,
            ],
            within_error_budget=config.error_budget.allows(facts.rejects, facts.looked_at),
        )

    def verify(self, given: AdviceReport) -> AdviceReport:
        """Advice that is there already, with the verification of the config: nothing else is measured again."""
        started_s = time.monotonic()
        verifier = self._verifier()
        if verifier is None:
            return given
        found = [self._option(one, RunFolder(self.store, given.run)) for one in given.strategies]
        strategies = [
            one.model_copy(update={"config": self._write(option)})
            for one, option in zip(given.strategies, found, strict=True)
        ]
        with ray_session():
            verification = verifier.verify(strategies, found, check=self.check)
        changed = {
            "run": self.folder.run_id,
            "strategies": strategies,
            "verification": verification,
            "seconds": given.seconds + time.monotonic() - started_s,
        }
        return given.model_copy(update=changed)

    def _option(self, strategy: StrategyAdvice, folder: RunFolder) -> Option:
        """The option behind a strategy, with the settings of its config in the run that advised it."""
        key = folder.key(f"configs/{strategy.config.rpartition('/')[2]}")
        return Option(
            strategy=strategy.strategy,
            backbone=strategy.backbone,
            tap=strategy.tap,
            top1=strategy.interval,
            cost=strategy.cost,
            basis=strategy.basis,
            settings=read_settings(key, [], read=lambda key: self.store.get(key).data),
            why=strategy.why,
        )

    def _write(self, option: Option) -> str:
        """The URI of an option's config, written into the run folder after it was checked as `convoy train` would."""
        key = self.folder.key(f"configs/train.{option.settings['name']}.yaml")
        _, text = train_config(option.settings, where=key)
        check_bundle_name(option.settings["name"])
        self.store.put(key, text.encode())
        return self.store.uri(key)

    def _domain_distance(
        self, gatherer: Gatherer, gathered: Gathered, advised: BackboneEvidence
    ) -> tuple[DomainDistance | None, list[str]]:
        """How far the reference is, None without one that can be used, and why not: no advice rests on it."""
        if self.reference is None:
            return None, []
        look = next(look for look in gathered.looks if look.probes.backbone == advised.probes.backbone)
        try:
            return gatherer.domain_distance(look, self.reference), []
        except DataError as error:
            return None, [f"no distance to {self.config.reference}: {error.what}"]

    def _similarity(
        self, gathered: Gathered, advised: BackboneEvidence, distance: DomainDistance | None
    ) -> Similarity:
        config, probes = self.config, advised.probes
        peak, top = probes.best, probes.top
        return Similarity(
            verdict=four_scenarios(advised.evidence, config.prior).likeness,
            dissimilarity=dissimilarity(advised.evidence),
            backbone=probes.backbone,
            peak_tap=peak.tap,
            peak_depth=peak.depth,
            peak_top1=probes.peak.top1,
            top_top1=top.top1,
            untrained_top1=gathered.untrained.probes.peak.top1,
            knn_top1=top.knn_top1,
            domain_distance=distance,
            probes=[look.probes for look in gathered.looks],
            untrained=gathered.untrained.probes,
        )

    def _verifier(self) -> Verifier | None:
        settings = self.config.verify
        if settings is None:
            return None
        return Verifier(
            self.manifest,
            self.config,
            settings,
            self.folder,
            progress=self.progress,
            draw_curves=self.draw_curves,
            new_run=self.new_run,
        )

    def _costs(self, records: Sequence[BackboneRecord]) -> list[BackboneCost]:
        config, costs = self.config, self.config.costs
        if costs is None:
            return []
        if costs.price_per_hour is None:
            costs = costs.model_copy(update={"price_per_hour": config.price_per_hour})
        extraction, _ = settle_precision(self.store, config.dataset_name, config.extraction)
        return measure_costs(self.store, self.manifest, records, costs, extraction, progress=self.progress)

    def _augmentation(self, gathered: Gathered, prober: Prober) -> AugmentationEffect | None:
        config, effect = self.config, self.config.augmentation_effect
        if effect is None or _lacks_probed_stage(config, gathered.best):
            return None
        limits = {
            "rows": effect.rows.within(config.rows),
            "least_judged": config.look.least_judged,
            "max_judged": effect.max_judged or prober.rows.judged.num_rows,
        }
        return measure_augmentation(
            self.store,
            self.manifest,
            config.dataset_name,
            gathered.best.record,
            effect.model_copy(update=limits),
            config.extraction,
            progress=self.progress,
            draw_curves=self.draw_curves,
        )


def _lacks_probed_stage(config: AdviseConfig, best: Look) -> bool:
    """Whether augmentation is to be judged at a stage that the best backbone does not have."""
    tap = probed_stage(config.augmentation_effect)
    return tap is not None and known_stage(best.record, tap) is None


def _left_out(config: AdviseConfig, gathered: Gathered) -> list[str]:
    """What was asked for and is not there, as a backbone has no such stage."""
    notes = []
    without = [one.probes.backbone for one in gathered.evidence if one.reused is None]
    if config.network.reuse is not None and without:
        notes.append(
            f"no partial_reuse of {', '.join(without)}: no stage '{config.network.reuse.after}' to put layers behind"
        )
    if _lacks_probed_stage(config, gathered.best):
        notes.append(
            f"no augmentation_effect: {gathered.best.probes.backbone} has no stage"
            f" '{probed_stage(config.augmentation_effect)}'"
        )
    return notes


def _fronts(costs: Sequence[BackboneCost], gathered: Gathered) -> tuple[list[CostFront], list[str]]:
    """The best probe of each backbone against its cost, on the judged rows that all of them could read, and notes."""
    if not costs:
        return [], []
    heads = [look.head for look in gathered.looks]
    shared = reduce(np.intersect1d, [head.places_M for head in heads])
    most = max(len(head.places_M) for head in heads)
    notes = []
    if len(shared) < most:
        notes.append(
            f"cost fronts compare {len(shared)} rows, of {most} that judge: not all backbones could read the others"
        )
    if not len(shared):
        return [], notes
    names = [look.probes.backbone for look in gathered.looks]
    correct_MN = np.stack([head.correct_M[np.isin(head.places_M, shared)] for head in heads])
    best = gathered.best.head
    return cost_fronts(costs, names, correct_MN, best.weights_M[np.isin(best.places_M, shared)]), notes


def _notes(gathered: Gathered, first: StrategyAdvice, by_rule: str) -> list[str]:
    """What a reader should know who acts on the advice."""
    notes = []
    if first.strategy.value != by_rule:
        who = (
            "the measured probes and the prior speak"
            if first.basis is Basis.PRIOR
            else "what was measured speaks"
        )
        notes.append(f"the rule of thumb names {by_rule}; {who} for {first.strategy.value}")
    others = {one.probes.backbone for one in gathered.evidence if one.untrained_rate is None}
    if others:
        notes.append(
            f"the untrained network of {gathered.best.probes.backbone} stands for those of {', '.join(sorted(others))}"
        )
    looks = (*gathered.looks, gathered.untrained)
    rough = [look.probes.backbone for look in looks if (look.probes.timed_images or 0) < _LEAST_TIMED]
    if rough:
        notes.append(
            f"no pass of {_LEAST_TIMED} images was timed of {', '.join(rough)}: their seconds and money are rough"
        )
    earlier = dict.fromkeys(f"{look.probes.backbone} in {run}" for look in looks if (run := look.earlier_run))
    if earlier:
        notes.append(
            f"seconds and money are those of the machine that earlier passes ran on: {', '.join(earlier)}"
        )
    notes.append(
        "expectations of networks follow from probes and a prior, see `prior`: --verify runs them at a small budget"
    )
    return notes
