"""Gated evaluation: cheap looks at every image, the whole committee only where they are not sure.

Images that need more are collected, already cut, in further batches on the device, one a stage, each run when it
is full. So shapes stay fixed, nothing is decoded twice, and no pass is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convoy.core.crop_policies import Averaging
from convoy.core.errors import ConfigError
from convoy.vision.committee import Committee, as_logits
from convoy.vision.committee_options import GateOptions, GateStage, gate_passes, look_views
from convoy.vision.presets import CropGeometry


@dataclass(frozen=True, slots=True, eq=False)
class GatedRows:
    """Finished rows: their numbers, their float32 logits_BK on the device, and the stage that gave them."""

    rows: tuple[int, ...]
    logits_BK: Tensor
    stage: GateStage


@dataclass(frozen=True, slots=True)
class _Stage:
    """What a stage runs beyond earlier ones, and how its sums become averages.

    `added` names the views by member. The whole committee has no threshold: it is always believed.
    """

    name: GateStage
    added: Mapping[int, Sequence[int]]
    sum_of_weights: float
    threshold: float | None


@dataclass(slots=True, eq=False)
class _Waiting:
    """The images that wait for a stage, from the first place on, with the sums of earlier stages."""

    images: dict[CropGeometry, Tensor]
    rows: list[int] = field(default_factory=list)
    sums_BK: Tensor | None = None


class GatedCommittee:
    """A committee behind a gate; for one thread.

    A look is a small committee: some members with their weights relative to each other, at their temperatures,
    over some of the views. Its outputs are not divided by the committee's own temperature, which was fitted to
    the whole. Raises ConfigError where the looks do not fit the committee, or its members take turns on the device.
    """

    def __init__(self, committee: Committee, options: GateOptions) -> None:
        if len(committee.turns()) > 1:
            raise ConfigError(
                "a gate needs all members on the device together",
                where="max_resident_bytes",
                next_step="evaluate in mode exact, with fewer extraction.num_workers, or on a device with more memory",
            )
        self._committee = committee
        self._stages = _stages(committee, options)
        self._waiting = [self._new_waiting() for _ in self._stages[1:]]

    def warm_up(self) -> None:
        """Run every network once on zeros, so that compilation and allocation happen before the first image."""
        self._committee.warm_up()

    def forget(self) -> None:
        """Drop the rows that still wait: those of work that failed before its flush."""
        for waiting in self._waiting:
            waiting.rows = []

    @torch.no_grad()
    def run(self, batch: Mapping[CropGeometry, Tensor], row_numbers: Sequence[int | None]) -> list[GatedRows]:
        """What a filled batch finishes: rows that the first look is sure of, and those of any batch that got full.

        `row_numbers` says which row is in which place of the batch, None where there is no image; it may be
        shorter than the batch, which may be filled again at once.
        """
        images = self._committee.upload(batch, range(len(self._committee.weights)))
        return self._run_stage(0, images, None, row_numbers)

    @torch.no_grad()
    def flush(self) -> list[GatedRows]:
        """The outputs of all rows that still wait for a stage, run now; nothing where none wait."""
        return [rows for number in range(1, len(self._stages)) for rows in self._run_waiting(number)]

    def _run_stage(
        self,
        number: int,
        images: Mapping[CropGeometry, Tensor],
        sums_BK: Tensor | None,
        row_numbers: Sequence[int | None],
    ) -> list[GatedRows]:
        """Run a stage on a batch: what it is sure of is finished, the rest waits for the next stage."""
        stage = self._stages[number]
        for member, views in stage.added.items():
            share_BK = self._committee.sum_views(member, images, views) * self._committee.weights[member]
            sums_BK = share_BK if sums_BK is None else sums_BK + share_BK
        assert sums_BK is not None, "the first look has a view"
        means_BK = sums_BK / stage.sum_of_weights
        is_sure = self._is_sure(means_BK, stage)
        taken = [(place, row) for place, row in enumerate(row_numbers) if row is not None]
        sure = [(place, row) for place, row in taken if is_sure[place]]
        unsure = [(place, row) for place, row in taken if not is_sure[place]]
        finished = [self._finished(means_BK, stage, sure)] if sure else []
        while unsure:
            waiting = self._waiting[number]
            room = self._committee.options.batch_size - len(waiting.rows)
            _move(images, sums_BK, unsure[:room], waiting)
            unsure = unsure[room:]
            if len(waiting.rows) == self._committee.options.batch_size:
                finished.extend(self._run_waiting(number + 1))
        return finished

    def _run_waiting(self, number: int) -> list[GatedRows]:
        waiting = self._waiting[number - 1]
        if not waiting.rows:
            return []
        rows, waiting.rows = waiting.rows, []
        return self._run_stage(number, waiting.images, waiting.sums_BK, rows)

    def _is_sure(self, means_BK: Tensor, stage: _Stage) -> list[bool]:
        if stage.threshold is None:
            return [True] * len(means_BK)
        averages_probabilities = self._committee.options.averaging is Averaging.PROBABILITIES
        probabilities_BK = means_BK if averages_probabilities else means_BK.softmax(dim=1)
        # The one point of a stage at which the host waits for the device.
        sure: list[bool] = (probabilities_BK.amax(dim=1) >= stage.threshold).tolist()
        return sure

    def _finished(self, means_BK: Tensor, stage: _Stage, sure: Sequence[tuple[int, int]]) -> GatedRows:
        options = self._committee.options
        temperature = options.temperature if stage.name is GateStage.COMMITTEE else 1.0
        places = [place for place, _ in sure]
        logits_BK = as_logits(means_BK[places], options.averaging, temperature)
        return GatedRows(tuple(row for _, row in sure), logits_BK, stage.name)

    def _new_waiting(self) -> _Waiting:
        device = self._committee.device
        return _Waiting({key: images.to(device) for key, images in self._committee.new_batch().items()})


def _move(
    images: Mapping[CropGeometry, Tensor],
    sums_BK: Tensor,
    chosen: Sequence[tuple[int, int]],
    waiting: _Waiting,
) -> None:
    """Copy the chosen places of a batch to the end of the waiting ones."""
    if waiting.sums_BK is None:
        waiting.sums_BK = torch.zeros_like(sums_BK)
    room = slice(len(waiting.rows), len(waiting.rows) + len(chosen))
    places = [place for place, _ in chosen]
    for geometry, waiting_BSCHW in waiting.images.items():
        waiting_BSCHW[room] = images[geometry][places]
    waiting.sums_BK[room] = sums_BK[places]
    waiting.rows.extend(row for _, row in chosen)


def _stages(committee: Committee, options: GateOptions) -> list[_Stage]:
    """The looks and the whole committee; each adds what the stage before did not run."""
    num_members = len(committee.weights)
    names = gate_passes(options, committee.options.plan, num_members)
    looks = [
        (look.members, look_views(look, committee.options.plan, num_members), look.threshold)
        for look in options.looks
    ]
    every_view = tuple(range(len(committee.views)))
    stages: list[_Stage] = []
    done: dict[int, set[int]] = {member: set() for member in range(num_members)}
    for name, (members, views, threshold) in zip(
        names, [*looks, (tuple(range(num_members)), every_view, None)], strict=True
    ):
        added = {member: [view for view in views if view not in done[member]] for member in members}
        for member in members:
            done[member].update(views)
        weight = 1.0 if threshold is None else sum(committee.weights[member] for member in members)
        remaining = {member: chosen for member, chosen in added.items() if chosen}
        stages.append(_Stage(name, remaining, weight * len(views), threshold))
    return stages
