"""Gated evaluation: a cheap first look at every image, the whole committee only where that is not sure.

Images that need the committee are collected, already cut, in a second batch on the device and run when it is full.
So shapes stay fixed and nothing is decoded twice; passes of the first look are not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from convoy.core.crop_policies import Averaging, view_indices
from convoy.core.errors import ConfigError
from convoy.vision.committee import Committee, as_logits
from convoy.vision.committee_options import GateOptions
from convoy.vision.presets import CropGeometry


class GateStage(StrEnum):
    """Which stage gave the output of an image."""

    FIRST_LOOK = "first_look"
    COMMITTEE = "committee"


@dataclass(frozen=True, slots=True, eq=False)
class GatedRows:
    """Finished rows: their numbers, their float32 logits_BK on the device, and the stage that gave them."""

    rows: tuple[int, ...]
    logits_BK: Tensor
    stage: GateStage


class GatedCommittee:
    """A committee behind a gate; for one thread.

    The first look is a small committee: some members with their weights relative to each other, at their
    temperatures, over some of the views. Its outputs are not divided by the committee's own temperature. Raises
    ConfigError where the members or crops are not the committee's, or its members take turns on the device.
    """

    def __init__(self, committee: Committee, options: GateOptions) -> None:
        self._committee = committee
        self._options = options
        self._first_views = _first_views(committee, options)
        weights = committee.weights
        self._first_weight = sum(weights[member] for member in options.members)
        every_view = range(len(committee.views))
        others = [view for view in every_view if view not in self._first_views]
        self._remaining: dict[int, Sequence[int]] = {
            member: others if member in options.members else every_view for member in range(len(weights))
        }
        self._waiting_rows: list[int] = []
        self._waiting_images = {
            geometry: images.to(committee.device) for geometry, images in committee.new_batch().items()
        }
        self._waiting_sums_BK: Tensor | None = None

    @property
    def first_look_passes(self) -> int:
        """How often the first look runs a network on an image."""
        return len(self._options.members) * len(self._first_views)

    @property
    def committee_passes(self) -> int:
        """How often networks run on an image, in addition, if the first look is not sure."""
        return sum(len(views) for views in self._remaining.values())

    def new_batch(self) -> dict[CropGeometry, Tensor]:
        """The committee's buffers for a batch."""
        return self._committee.new_batch()

    def warm_up(self) -> None:
        """Run every network once on zeros, so that compilation and allocation happen before the first image."""
        self._committee.warm_up()

    @torch.no_grad()
    def run(self, batch: Mapping[CropGeometry, Tensor], row_numbers: Sequence[int | None]) -> list[GatedRows]:
        """What a filled batch finishes: its sure rows, and earlier or own ones that made the second batch full.

        `row_numbers` says which row is in which place of the batch, None where there is no image; it may be
        shorter than the batch.
        """
        images = self._committee.upload(batch, range(len(self._remaining)))
        first_BK = self._first_look(images)
        is_sure = self._is_sure(first_BK)
        taken = [(place, row) for place, row in enumerate(row_numbers) if row is not None]
        sure = [(place, row) for place, row in taken if is_sure[place]]
        unsure = [(place, row) for place, row in taken if not is_sure[place]]
        finished = []
        if sure:
            places = [place for place, _ in sure]
            logits_BK = as_logits(first_BK[places], self._committee.options.averaging)
            finished.append(GatedRows(tuple(row for _, row in sure), logits_BK, GateStage.FIRST_LOOK))
        while unsure:
            room = self._committee.options.batch_size - len(self._waiting_rows)
            self._defer(images, first_BK, unsure[:room])
            unsure = unsure[room:]
            if len(self._waiting_rows) == self._committee.options.batch_size:
                finished.extend(self.flush())
        return finished

    @torch.no_grad()
    def flush(self) -> list[GatedRows]:
        """The outputs of the rows that wait for the committee, run now; nothing where none wait."""
        if not self._waiting_rows or self._waiting_sums_BK is None:
            return []
        sums_BK = self._waiting_sums_BK.clone()
        for member, views in self._remaining.items():
            if views:
                share = self._committee.weights[member] / len(self._committee.views)
                sums_BK += self._committee.sum_views(member, self._waiting_images, views) * share
        rows, self._waiting_rows = tuple(self._waiting_rows), []
        options = self._committee.options
        logits_BK = as_logits(sums_BK[: len(rows)], options.averaging, options.temperature)
        return [GatedRows(rows, logits_BK, GateStage.COMMITTEE)]

    def _first_look(self, images: Mapping[CropGeometry, Tensor]) -> Tensor:
        """The averages over the first look's members and views: float64 of shape (B, K)."""
        shares = [
            self._committee.sum_views(member, images, self._first_views) * self._committee.weights[member]
            for member in self._options.members
        ]
        return torch.stack(shares).sum(dim=0) / (self._first_weight * len(self._first_views))

    def _is_sure(self, first_BK: Tensor) -> list[bool]:
        averages_probabilities = self._committee.options.averaging is Averaging.PROBABILITIES
        probabilities_BK = first_BK if averages_probabilities else first_BK.softmax(dim=1)
        # The one point of a batch at which the host waits for the device.
        sure: list[bool] = (probabilities_BK.amax(dim=1) >= self._options.threshold).tolist()
        return sure

    def _defer(
        self, images: Mapping[CropGeometry, Tensor], first_BK: Tensor, unsure: Sequence[tuple[int, int]]
    ) -> None:
        """Copy images into the second batch, with what the first look adds to their joint output."""
        if self._waiting_sums_BK is None:
            self._waiting_sums_BK = torch.zeros_like(first_BK)
        start = len(self._waiting_rows)
        room = slice(start, start + len(unsure))
        places = [place for place, _ in unsure]
        for geometry, waiting_BSCHW in self._waiting_images.items():
            waiting_BSCHW[room] = images[geometry][places]
        share = self._first_weight * len(self._first_views) / len(self._committee.views)
        self._waiting_sums_BK[room] = first_BK[places] * share
        self._waiting_rows.extend(row for _, row in unsure)


def _first_views(committee: Committee, options: GateOptions) -> tuple[int, ...]:
    """The places of the first look's views among the committee's."""
    plan = committee.options.plan
    views = view_indices(options.policy, plan)
    if views is None:
        raise ConfigError(
            f"the crops of '{options.policy}' are not among those of '{plan.policy}'",
            where="gate.policy",
            next_step="choose center, or the committee's own policy",
        )
    if len(set(options.members)) < len(options.members) or max(options.members) >= len(committee.weights):
        raise ConfigError(
            f"the committee has no such members: {', '.join(map(str, options.members))}",
            where="gate.members",
            next_step=f"choose different ones from 0 to {len(committee.weights) - 1}",
        )
    if len(committee.turns()) > 1:
        raise ConfigError(
            "a gate needs all members on the device together",
            where="max_resident_bytes",
            next_step="evaluate in mode exact, or on a device with more memory",
        )
    return views
