"""The committee engine: several networks and several crops of every image, one joint output.

A batch is uploaded once for each geometry. Members run one after another, view by view, always on as many images
as the batch has, so that compiled shapes and memory stay fixed; their outputs are added up on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convoy.core.crop_policies import Averaging, CropView, MemberOutputs, crop_views, num_slots
from convoy.core.errors import ConfigError
from convoy.vision.committee_options import CommitteeOptions, MemberOptions
from convoy.vision.forward import FittingForward, NormalisedNetwork, autocast, new_images, open_device, place
from convoy.vision.presets import CropGeometry, EvalPreset, geometry_of
from convoy.vision.readout import LogitsAndFeatures

_WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A network that turns normalised images_BCHW into logits_BK of the committee's classes, and its options.

    One that gives LogitsAndFeatures has its features kept too, if it is the only member.
    """

    network: nn.Module
    options: MemberOptions


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TurnOutput:
    """What some members add to the joint output: float64 `sums_BK`, which `Committee.join` adds up.

    The rest, where it was asked for, is as in `CommitteeOutput`, for these members.
    """

    sums_BK: Tensor
    member_logits_MBK: Tensor | None = None
    view_logits_MVBK: Tensor | None = None
    features_BD: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CommitteeOutput:
    """Float32 outputs on the committee's device.

    `logits_BK`: the joint ones; log-probabilities where probabilities are averaged. `member_logits_MBK`: the same
    for each member alone at its own temperature. `view_logits_MVBK`: as the networks gave them. `features_BD`: the
    mean over the views of what a single member gives beside its logits.
    """

    logits_BK: Tensor
    member_logits_MBK: Tensor | None = None
    view_logits_MVBK: Tensor | None = None
    features_BD: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Seat:
    """A member with its normalisation, and what runs it: the network itself, or its compiled form."""

    options: MemberOptions
    geometry: CropGeometry
    network: nn.Module
    forward: FittingForward


class Committee:
    """Members and a crop plan on one device; the joint output is that of the options' averaging rule.

    With weights w_m that sum to 1, temperatures T_m and T, and logits z_mv of V views, the joint logits are
    log(sum_m w_m mean_v softmax(z_mv / T_m)) / T for `probabilities`, sum_m w_m mean_v z_mv / (T_m T) for `logits`.
    Raises ConfigError where there are no members or their weights do not sum to 1.
    """

    def __init__(self, members: Sequence[Member], options: CommitteeOptions) -> None:
        _check_weights([member.options.weight for member in members])
        self.options = options
        self.device = open_device(options.num_threads)
        self.views: tuple[CropView, ...] = crop_views(options.plan)
        self._seats = [self._seat(member) for member in members]
        self.geometries: tuple[CropGeometry, ...] = tuple(
            dict.fromkeys(seat.geometry for seat in self._seats)
        )
        self._turns = _share_out(
            [_num_bytes(seat.network) for seat in self._seats], options.max_resident_bytes
        )
        self._resident: frozenset[int] = frozenset()

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each member, in order."""
        return tuple(seat.options.weight for seat in self._seats)

    def new_batch(self) -> dict[CropGeometry, Tensor]:
        """Reusable uint8 buffers images_BSCHW, one a geometry, pinned where the device is a GPU.

        `buffer[row]` is what `cut_slots` fills; in memory the images of a slot lie together, channels last.
        """
        batch_size, slots = self.options.batch_size, num_slots(self.options.plan)
        buffers = {}
        for geometry in self.geometries:
            shape = (slots * batch_size, 3, geometry.crop_px, geometry.crop_px)
            buffer = new_images(shape, self.device)
            buffers[geometry] = buffer.view(slots, batch_size, *shape[1:]).transpose(0, 1)
        return buffers

    def warm_up(self) -> None:
        """Run once on zeros, so that compilation and allocation happen before the first image."""
        self.run(self.new_batch())

    def turns(self) -> tuple[tuple[int, ...], ...]:
        """Which members are on the device together: groups of consecutive members, mostly a single one."""
        return self._turns

    def run(
        self, batch: Mapping[CropGeometry, Tensor], keep: MemberOutputs = MemberOutputs.NONE
    ) -> CommitteeOutput:
        """The outputs for a filled batch; rows that were not filled give rows that mean nothing.

        On a GPU the batch may be filled again once an output has been read.
        Where members take turns, each batch moves all their weights: then better run all batches of a turn with
        `run_turn`, and `join` what comes out.
        """
        return self.join([self.run_turn(batch, turn, keep) for turn in self._turns])

    @torch.no_grad()
    def run_turn(
        self,
        batch: Mapping[CropGeometry, Tensor],
        turn: Sequence[int],
        keep: MemberOutputs = MemberOutputs.NONE,
    ) -> TurnOutput:
        """What the members of a turn add to the joint output."""
        images = self.upload(batch, turn)
        every_view = range(len(self.views))
        sums_BK: Tensor | None = None
        member_logits, view_logits = [], []
        features: list[Tensor] = []
        for index in turn:
            kept: list[Tensor] | None = [] if keep is MemberOutputs.VIEWS else None
            means_BK = self.sum_views(index, images, every_view, kept, features) / len(self.views)
            share_BK = means_BK * self._seats[index].options.weight
            sums_BK = share_BK if sums_BK is None else sums_BK.add_(share_BK)
            if keep is not MemberOutputs.NONE:
                member_logits.append(as_logits(means_BK, self.options.averaging))
            if kept is not None:
                view_logits.append(torch.stack(kept))
        assert sums_BK is not None, "a turn has members"
        return TurnOutput(
            sums_BK=sums_BK,
            member_logits_MBK=torch.stack(member_logits) if member_logits else None,
            view_logits_MVBK=torch.stack(view_logits) if view_logits else None,
            features_BD=torch.stack(features).mean(dim=0) if features else None,
        )

    def join(self, outputs: Sequence[TurnOutput]) -> CommitteeOutput:
        """The joint output from those of all turns, in order, for the same rows; on whatever device they are."""
        sums_BK = torch.stack([output.sums_BK for output in outputs]).sum(dim=0)
        return CommitteeOutput(
            logits_BK=as_logits(sums_BK, self.options.averaging, self.options.temperature),
            member_logits_MBK=_concatenate([output.member_logits_MBK for output in outputs]),
            view_logits_MVBK=_concatenate([output.view_logits_MVBK for output in outputs]),
            features_BD=outputs[0].features_BD if len(self._seats) == 1 else None,
        )

    def upload(
        self, batch: Mapping[CropGeometry, Tensor], members: Sequence[int]
    ) -> dict[CropGeometry, Tensor]:
        """Bring these members to the device, in place of all others, and the images that they see."""
        self._place(frozenset(members))
        needed = dict.fromkeys(self._seats[index].geometry for index in members)
        return {geometry: batch[geometry].to(self.device, non_blocking=True) for geometry in needed}

    @torch.no_grad()
    def sum_views(
        self,
        member: int,
        images: Mapping[CropGeometry, Tensor],
        views: Sequence[int],
        kept: list[Tensor] | None = None,
        kept_features: list[Tensor] | None = None,
    ) -> Tensor:
        """The sum over some views of a member's softmax or logits at its temperature: float64 sums_BK.

        `images` are those of `upload`. The float32 logits_BK of each view are added to `kept`, the features that
        the network gives beside them, if it does, to `kept_features`.
        """
        seat = self._seats[member]
        sums_BK: Tensor | None = None
        # One context for all views: the weights are cast once.
        with autocast(self.device, seat.options.precision):
            for view in views:
                output = seat.forward(_view_images(images[seat.geometry], self.views[view]))
                if isinstance(output, LogitsAndFeatures):
                    output, features_BD = output
                    if kept_features is not None:
                        kept_features.append(features_BD)
                logits_BK = output.float()
                if kept is not None:
                    kept.append(logits_BK)
                values_BK = logits_BK.double() / seat.options.temperature
                if self.options.averaging is Averaging.PROBABILITIES:
                    values_BK = values_BK.softmax(dim=1)
                sums_BK = values_BK if sums_BK is None else sums_BK.add_(values_BK)
        assert sums_BK is not None, "there is a view"
        return sums_BK

    def _seat(self, member: Member) -> _Seat:
        host = torch.device("cpu")
        network = place(NormalisedNetwork(member.network, member.options.preset), host)
        forward = FittingForward.of(network, self.device, compiled=self.options.compiled)
        return _Seat(member.options, geometry_of(member.options.preset), network, forward)

    def _place(self, members: frozenset[int]) -> None:
        """Weights of others go first, so that there is room."""
        if members <= self._resident:
            return
        for index in self._resident - members:
            self._seats[index].network.to("cpu")
        for index in sorted(members - self._resident):
            self._seats[index].network.to(self.device)
        self._resident = members


def as_logits(sums_BK: Tensor, averaging: Averaging, temperature: float = 1.0) -> Tensor:
    """Float32 logits of float64 averages, which are the logarithms where probabilities were averaged."""
    if averaging is Averaging.PROBABILITIES:
        sums_BK = sums_BK.clamp_min(torch.finfo(torch.float64).tiny).log()
    return (sums_BK / temperature).float()


@torch.no_grad()
def check_input_size(network: nn.Module, preset: EvalPreset) -> None:
    """Make sure that a network takes crops of the preset's size, as for dense evaluation it must.

    Raises ConfigError with the network's own reason.
    """
    images_BCHW = torch.zeros(1, 3, preset.crop_px, preset.crop_px)
    try:
        logits = network.eval()(images_BCHW)
    except Exception as error:
        # Networks that are made for one size fail in ways of their own.
        reason = f"{type(error).__name__}: {error}"
    else:
        if logits.ndim == 2:
            return
        reason = f"it gives outputs of shape {tuple(logits.shape)}"
    raise ConfigError(
        f"the network does not take images of {preset.crop_px} pixels: {reason}",
        where="mode dense",
        next_step="evaluate it in mode exact, with a crop policy",
    )


def _view_images(images_BSCHW: Tensor, view: CropView) -> Tensor:
    images_BCHW = images_BSCHW[:, view.slot]
    return images_BCHW.flip(-1) if view.mirrored else images_BCHW


def _check_weights(weights: Sequence[float]) -> None:
    if not weights:
        raise ConfigError("a committee needs a member", where="members", next_step="name one or more")
    if abs(sum(weights) - 1) > _WEIGHT_TOLERANCE:
        raise ConfigError(
            f"the weights of the members sum to {sum(weights):g}",
            where="members",
            next_step="divide each by their sum",
        )


def _share_out(sizes_bytes: Sequence[int], max_bytes: int | None) -> tuple[tuple[int, ...], ...]:
    """Consecutive members in groups within the bound; one that is larger than it is alone."""
    turns: list[list[int]] = []
    free_bytes = 0
    for index, size_bytes in enumerate(sizes_bytes):
        if not turns or (max_bytes is not None and size_bytes > free_bytes):
            turns.append([])
            free_bytes = max_bytes or 0
        turns[-1].append(index)
        free_bytes -= size_bytes
    return tuple(tuple(turn) for turn in turns)


def _num_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _concatenate(outputs: Sequence[Tensor | None]) -> Tensor | None:
    present = [output for output in outputs if output is not None]
    return torch.cat(present) if present else None
