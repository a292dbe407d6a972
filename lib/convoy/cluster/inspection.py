"""The inspecting operator: a piece in, a picture and its figures out. Pixels leave the worker as pictures only."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from convoy.cluster.deadly_slices import ImageTrials
from convoy.cluster.inspection_drawing import Picture, PieceDrawer
from convoy.cluster.inspection_spec import InspectionSpec, NetworkSpec, PictureData, Piece
from convoy.cluster.kept_weights import open_readout, read_kept_weights
from convoy.cluster.prepared_batches import ImagePreparer, SliceImages
from convoy.cluster.slices import SliceTask
from convoy.cluster.stall_watch import StallWatch
from convoy.core.fingerprints import digest_bytes
from convoy.storage.commits import PartFile, SliceRecord
from convoy.storage.manifests import MANIFEST_SCHEMA
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.vision.augmentation_policy import EVAL_VIEW
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.forward import open_device
from convoy.vision.inspection import InspectedNetwork
from convoy.vision.inspection_options import MaximisationOptions
from convoy.vision.views import prepare_view
from convoy.vision.weights import load_weights


class Inspector:
    """A network on a device, with its readers and decoders; a call makes the picture of one piece."""

    def __init__(self, spec: InspectionSpec) -> None:
        open_device(spec.num_threads)
        self._spec = spec
        self._store = open_store(spec.workspace)
        self._folder = RunFolder(self._store, spec.run_id)
        self._watch = StallWatch(spec.stall_s)
        self._preparer: ImagePreparer[int] = ImagePreparer(
            spec.decode_rule,
            num_fetch_threads=spec.num_fetch_threads,
            num_decode_threads=spec.num_threads,
            fill=self._fill,
            watch=self._watch,
        )
        self._drawer = _open_drawer(self._store, spec.network, spec.maximisation)

    def __call__(self, task: SliceTask, trials: ImageTrials | None = None) -> SliceRecord:
        """Make the picture of one piece, and write it with the record that makes it count."""
        piece = self._spec.pieces[task.slice]
        shows_images = bool(piece.looks or piece.lines)
        rows = self._folder.read_slice(task.slice) if shows_images else MANIFEST_SCHEMA.empty_table()
        with self._watch.watching():
            images = self._preparer.begin(rows, trials)
        pixels_BCHW = self._read(images) if shows_images else torch.empty(0)
        started_s = time.perf_counter()
        picture = self._drawer.draw(piece, images, pixels_BCHW)
        images.through_network(started_s)
        write = partial(self._write, piece, picture)
        return images.commit(self._folder, task.slice, write, precision_effect={})

    def _fill(self, pixels_CHW: Tensor, content_id: bytes, places: Mapping[int, Tensor]) -> None:
        for view, image_CHW in places.items():
            preset = self._spec.network.preset
            prepare_view(pixels_CHW, preset, image_CHW, view=view, policy=None, content_id=content_id)

    def _read(self, images: SliceImages) -> Tensor:
        """The images of a piece as the network sees them; white where one cannot be used."""
        num_rows, side_px = images.rows.num_rows, self._spec.network.preset.crop_px
        white_BCHW = torch.full((num_rows, 3, side_px, side_px), 255, dtype=torch.uint8)
        with self._watch.watching():
            (batch,) = self._preparer.batches(images, lambda: {EVAL_VIEW: white_BCHW.clone()}, num_rows)
        usable_B111 = torch.from_numpy(images.usable_N)[:, None, None, None]
        return torch.where(usable_B111, batch.images[EVAL_VIEW], white_BCHW)

    def _write(self, piece: Piece, picture: Picture, attempt: str) -> dict[str, PartFile]:
        described = PictureData(kind=piece.kind, title=piece.title, caption=piece.caption, data=picture.data)
        text = json.dumps(described.model_dump(mode="json"), indent=1)
        return {
            kind: _put(self._store, f"{self._spec.prefix}{piece.name}-{attempt}.{kind}", data)
            for kind, data in (("png", picture.png), ("json", text.encode()))
        }


def _open_drawer(store: ObjectStore, spec: NetworkSpec, options: MaximisationOptions) -> PieceDrawer:
    network = build_network(spec.backbone)
    axis = depth_axis(spec.backbone, network)
    load_weights(network, read_kept_weights(store, spec.weights_key))
    readout = open_readout(store, spec.head, spec.head_key, spec.output_groups)
    inspected = InspectedNetwork(
        network, axis, spec.preset, tap=spec.tap, readout=readout, stages=spec.stages
    )
    return PieceDrawer(network, axis, inspected, options)


def _put(store: ObjectStore, key: str, data: bytes) -> PartFile:
    checksum = digest_bytes(data).hex()
    return PartFile(
        key=key,
        size_bytes=len(data),
        etag=store.put(key, data),
        checksum=checksum,
        num_rows=1,
        rows_digest=checksum,
    )
