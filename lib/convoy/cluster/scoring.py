"""The scoring operator: a slice of keys in, predictions of a committee out, one decode for all members and crops.

It shares its readers and decoders' way with the feature operator; nothing but result rows leaves the worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convoy.cluster.deadly_slices import ImageTrials
from convoy.cluster.kept_weights import open_network, open_readout
from convoy.cluster.prepared_batches import ImageBatch, ImagePreparer, SliceImages
from convoy.cluster.scored_parts import SliceLogits, write_parts
from convoy.cluster.scoring_spec import MemberSpec, ScoringSpec
from convoy.cluster.slices import SliceTask
from convoy.cluster.stall_watch import StallWatch
from convoy.core.crop_policies import MemberOutputs
from convoy.core.errors import DataError
from convoy.storage.commits import SliceRecord
from convoy.storage.local_cache import LocalImageCache
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.vision.committee import Committee, Member, TurnOutput, check_input_size
from convoy.vision.forward import casting_once
from convoy.vision.gating import GatedCommittee, GatedRows
from convoy.vision.multicrop import cut_slots
from convoy.vision.presets import CropGeometry
from convoy.vision.readout import LogitsNetwork

# Of an operator's GPU memory, what the weights of members may take; the rest is for activations.
_SHARE_FOR_WEIGHTS = 0.5


class Scorer:
    """A committee on a device, with its readers and decoders; a call turns one slice into parts."""

    def __init__(self, spec: ScoringSpec) -> None:
        self._spec = spec
        self._store = open_store(spec.workspace)
        self._folder = RunFolder(self._store, spec.run_id)
        self._watch = StallWatch(spec.stall_s)
        self._preparer: ImagePreparer[CropGeometry] = ImagePreparer(
            spec.decode_rule,
            num_fetch_threads=spec.num_fetch_threads,
            num_decode_threads=spec.num_decode_threads,
            fill=self._fill,
            watch=self._watch,
            cache=LocalImageCache.of(spec.local_cache),
        )
        options = spec.committee
        if options.max_resident_bytes is None and torch.cuda.is_available():
            budget_bytes = weights_budget_bytes(*torch.cuda.mem_get_info(), spec.gpu_share)
            options = options.model_copy(update={"max_resident_bytes": budget_bytes})
        tap = None if spec.table is None else spec.table.features_tap
        members = []
        # A workspace on a mount may hang as images do.
        with self._watch.watching():
            for told in spec.members:
                members.append(Member(_open_network(self._store, told, tap), told.options))
                self._watch.moved()
            if spec.is_dense:
                for member in members:
                    check_input_size(member.network, member.options.preset)
            self._committee = Committee(members, options)
            self._gated = None if spec.gate is None else GatedCommittee(self._committee, spec.gate)
            with self._watch.timing_first_batch():
                (self._gated or self._committee).warm_up()

    def __call__(self, task: SliceTask, trials: ImageTrials | None = None) -> SliceRecord:
        """Predict one slice, write its parts, its rejects, and the record that makes them count."""
        with self._watch.watching():
            return self._do(task, trials)

    def _do(self, task: SliceTask, trials: ImageTrials | None) -> SliceRecord:
        images = self._preparer.begin(self._folder.read_slice(task.slice), trials)
        logits = self._exact(images) if self._gated is None else self._behind_gate(images, self._gated)
        _reject_non_finite(task, logits, images)
        return images.commit(
            self._folder,
            task.slice,
            partial(write_parts, self._store, self._spec, task, images, logits),
            precision_effect={},
        )

    def _fill(self, pixels_CHW: Tensor, _content_id: bytes, places: Mapping[CropGeometry, Tensor]) -> None:
        for geometry, slots_SCHW in places.items():
            cut_slots(pixels_CHW, geometry, self._spec.committee.plan, slots_SCHW)

    def _batches(self, images: SliceImages) -> Iterator[ImageBatch[CropGeometry]]:
        return self._preparer.batches(images, self._committee.new_batch, self._spec.committee.batch_size)

    def _exact(self, images: SliceImages) -> SliceLogits:
        """Every member on every view. Members that take turns see the slice once a turn, decoded anew."""
        first, *others = self._committee.turns()
        turns = [self._run_turn(first, images)]
        for turn in others:
            again = images.again()
            turns.append(self._run_turn(turn, again))
            # An image that is lost between two turns has no joint output.
            images.reject_too(again)
            images.add_effort(again)
        output = self._committee.join(turns)
        kept = {
            MemberOutputs.NONE: None,
            MemberOutputs.MEMBERS: output.member_logits_MBK,
            MemberOutputs.VIEWS: output.view_logits_MVBK,
        }[self._spec.keep]
        if kept is not None:
            kept = kept.unsqueeze(1) if kept.ndim == 3 else kept
            return SliceLogits(output.logits_BK.numpy(), kept.transpose(1, 2).numpy())
        return SliceLogits(output.logits_BK.numpy(), features_ND=self._stored(output.features_BD))

    def _run_turn(self, turn: tuple[int, ...], images: SliceImages) -> TurnOutput:
        """The outputs of some members for all rows of a slice, on the host."""
        parts = []
        with casting_once(self._committee.device):
            for batch in self._batches(images):
                started_s = time.perf_counter()
                output = self._committee.run_turn(batch.images, turn, self._spec.keep)
                parts.append(_on_host(output, len(batch.rows)))
                images.through_network(started_s)
        return _joined_rows(parts)

    def _behind_gate(self, images: SliceImages, gated: GatedCommittee) -> SliceLogits:
        joint_NK = np.zeros((images.rows.num_rows, len(self._spec.classes)), np.float32)
        # A slice that failed half way left its rows behind the gate, under numbers that are other rows here.
        gated.forget()

        def take(finished: Sequence[GatedRows]) -> None:
            for rows in finished:
                joint_NK[list(rows.rows)] = rows.logits_BK.cpu().numpy()
                images.flags[rows.stage.value] += len(rows.rows)

        with casting_once(self._committee.device):
            for batch in self._batches(images):
                started_s = time.perf_counter()
                usable = [row if images.usable_N[row] else None for row in batch.rows]
                take(gated.run(batch.images, usable))
                images.through_network(started_s)
            take(gated.flush())
        return SliceLogits(joint_NK)

    def _stored(self, features_BD: Tensor | None) -> NDArray[np.floating] | None:
        table = self._spec.table
        if features_BD is None or table is None:
            return None
        # A value above the range of float16 becomes infinite, and its image a reject.
        with np.errstate(over="ignore"):
            stored_BD: NDArray[np.floating] = features_BD.numpy().astype(table.features_dtype)
        return stored_BD


def weights_budget_bytes(free_bytes: int, total_bytes: int, gpu_share: float) -> int:
    """What the weights of members may take on a GPU, of which operators that start together see the same bytes free."""
    return int(_SHARE_FOR_WEIGHTS * min(free_bytes, gpu_share * total_bytes))


def _open_network(store: ObjectStore, spec: MemberSpec, features_tap: str | None) -> LogitsNetwork:
    """A member's network with its readout, from the workspace."""
    network, axis = open_network(store, spec.backbone, spec.weights_key, spec.num_classes)
    return LogitsNetwork(
        network,
        axis,
        tap=spec.tap,
        readout=open_readout(store, spec.head, spec.head_key, spec.output_groups),
        class_order=spec.class_order,
        features_tap=features_tap,
    )


def _reject_non_finite(task: SliceTask, logits: SliceLogits, images: SliceImages) -> None:
    error = DataError(
        "the committee gives outputs that are no finite numbers",
        where=f"slice {task.slice}",
        next_step="evaluate its members one by one to see which of them, and check its weights",
    )
    images.reject_non_finite(logits.joint_NK, error)
    if logits.features_ND is not None:
        error = DataError(
            f"the network gives features that {logits.features_ND.dtype} cannot hold",
            where=f"slice {task.slice}",
            next_step="store them with --set extraction.dtype=float32; if that fails too, check the weights",
        )
        images.reject_non_finite(logits.features_ND, error)


def _on_host(output: TurnOutput, num_rows: int) -> TurnOutput:
    """The rows of a batch that have an image place, off the device."""

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[..., :num_rows, :].cpu()

    return TurnOutput(
        sums_BK=output.sums_BK[:num_rows].cpu(),
        member_logits_MBK=rows(output.member_logits_MBK),
        view_logits_MVBK=rows(output.view_logits_MVBK),
        features_BD=rows(output.features_BD),
    )


def _joined_rows(parts: list[TurnOutput]) -> TurnOutput:
    """The outputs of consecutive batches as those of one."""

    def joined(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present, dim=-2) if present else None

    return TurnOutput(
        sums_BK=torch.cat([part.sums_BK for part in parts]),
        member_logits_MBK=joined([part.member_logits_MBK for part in parts]),
        view_logits_MVBK=joined([part.view_logits_MVBK for part in parts]),
        features_BD=joined([part.features_BD for part in parts]),
    )
