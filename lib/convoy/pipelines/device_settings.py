"""What settings that go by the device mean for a dataset: a precision of `auto`, and a batch of no told size.

Of a cluster a worker is asked, and its answer is kept beside the dataset. So a job that finds nothing to do need not
wait for Ray, and the features of a dataset stay of one precision when another kind of machine computes the next.
"""

from __future__ import annotations

from typing import NamedTuple

from convoy.cluster.growth import wanted_size
from convoy.cluster.network_device import find_device, known_device
from convoy.core.fingerprints import canonical_json
from convoy.pipelines.feature_plan import ExtractionConfig, PrecisionChoice
from convoy.storage.documents import read_model
from convoy.storage.object_store import ObjectStore
from convoy.vision.engine_options import NetworkDevice, device_here

# A worker holds three such batches, beside a GPU in memory that is pinned.
_MOST_BATCH_BYTES = 512 << 20


class SettledExtraction(NamedTuple):
    """Settings whose precision is told, and why it is that where it was `auto`."""

    extraction: ExtractionConfig
    notes: tuple[str, ...] = ()


def settle_precision(store: ObjectStore, dataset: str, extraction: ExtractionConfig) -> SettledExtraction:
    """The settings as all machines are told them: by the device of `settle_device` where they are `auto`."""
    if extraction.precision is not PrecisionChoice.AUTO:
        return SettledExtraction(extraction)
    device = settle_device(store, dataset)
    return _settled(extraction, device, device.precision_note)


def settle_batch_size(
    store: ObjectStore, dataset: str, extraction: ExtractionConfig, crop_px: int, *, num_crops: int = 1
) -> int:
    """How many images of `crop_px` a pass of a network takes; fewer where so many crops of each lie beside it."""
    if extraction.batch_size is not None:
        return extraction.batch_size
    fitting = max(_MOST_BATCH_BYTES // (num_crops * 3 * crop_px**2), 1)
    return min(settle_device(store, dataset).batch_size(crop_px), 1 << (fitting.bit_length() - 1))


def settle_device(store: ObjectStore, dataset: str) -> NetworkDevice:
    """What runs the networks for a dataset; a cluster is asked once, which takes Ray."""
    device = known_device() or _kept(store, dataset)
    if device is None:
        device = find_device()
        store.put(_key(dataset), canonical_json(device))
    return device


def foresee_precision(store: ObjectStore, dataset: str, extraction: ExtractionConfig) -> SettledExtraction:
    """The same without asking anybody, for a plan."""
    if extraction.precision is not PrecisionChoice.AUTO:
        return SettledExtraction(extraction)
    device = known_device() or _kept(store, dataset)
    if device is not None:
        return _settled(extraction, device, device.precision_note)
    here = device_here()
    note = f"precision {here.precision.value} for this plan: the job itself asks a worker of the cluster"
    return _settled(extraction, here, note)


def _settled(extraction: ExtractionConfig, device: NetworkDevice, note: str) -> SettledExtraction:
    precision = PrecisionChoice(device.precision.value)
    return SettledExtraction(extraction.model_copy(update={"precision": precision}), (note,))


def _kept(store: ObjectStore, dataset: str) -> NetworkDevice | None:
    return read_model(NetworkDevice, store, _key(dataset))


def _key(dataset: str) -> str:
    """What workers with GPUs say is nothing to those of a job that asks for none."""
    kind = "gpu" if wanted_size().gpus else "cpu"
    return f"datasets/{dataset}/device-{kind}.json"
