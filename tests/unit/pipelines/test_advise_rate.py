"""The rate of a backbone is that of whole passes, each of which took an image once through the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.core.fingerprints import canonical_json
from convoy.pipelines.advise_rate import pass_rate
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_plan import forward_s
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.storage.commits import PartFile, RunManifest, commit_set
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder, RunRecord, SliceGroup, slice_name
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.presets import EvalPreset
from made_runs import slice_record

TAPS = ("layer1.2", "layer2.2", "layer3.2", "pooled")
SETS = {f"{tap}/0": f"{place:032x}" for place, tap in enumerate(TAPS)}
FIRST, SECOND, LAST_MAP, POOLED = SETS.values()
FURTHER_VIEW = "f" * 32
MACS = 41_000_000
LOOK = FeatureSummary.model_construct(sets=SETS)


@pytest.fixture(scope="module")
def backbone() -> BackboneRecord:
    config = BackboneConfig(
        arch="cifar_resnet20", weights="random", preset=EvalPreset(resize_px=32, crop_px=32)
    )
    axis = depth_axis(config, build_network(config))
    return BackboneRecord.model_construct(config=config, axis=axis, macs=MACS)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def add_run(store: LocalStore, run_id: str, *groups: tuple[int, tuple[str, ...]]) -> None:
    """A finished run that was two seconds at so many images for each group of sets."""
    folder = RunFolder(store, run_id)
    outputs = {set_id: f"features/{set_id}/run={run_id}/" for _, sets in groups for set_id in sets}
    made = [SliceGroup(outputs=sets, num_rows=num_images, num_slices=1) for num_images, sets in groups]
    folder.write_record(
        RunRecord.new(run_id, verb="cache", identity={}, config={}, outputs=outputs, groups=tuple(made))
    )
    slices = []
    for place, (num_images, sets) in enumerate(groups):
        parts = {
            set_id: PartFile(
                key=f"{outputs[set_id]}part.parquet",
                size_bytes=1,
                etag="1",
                checksum="1",
                num_rows=num_images,
                rows_digest="1",
            )
            for set_id in sets
        }
        slices.append(slice_record(slice_name(place, 0), parts, num_results=num_images, run_id=run_id))
    manifest = RunManifest(run_id=run_id, slices=tuple(slices))
    store.put(folder.key("manifest.json"), canonical_json(manifest))
    for set_id in outputs:
        commit_set(store, set_id, manifest)


def test_the_rate_is_that_of_the_largest_pass_and_not_of_the_last(
    store: LocalStore, backbone: BackboneRecord
) -> None:
    add_run(store, "r1", (37, tuple(SETS.values())))
    add_run(store, "r2", (3, tuple(SETS.values())))
    assert pass_rate(store, backbone, LOOK) == (37, 37 / 2, "r1")


@pytest.mark.parametrize(
    "sets",
    [
        pytest.param((POOLED, FURTHER_VIEW), id="goes through the network once more for a further view"),
        pytest.param((FIRST, SECOND), id="ends before the last map"),
    ],
)
def test_a_larger_run_that_is_no_single_pass_through_the_network_does_not_count(
    store: LocalStore, backbone: BackboneRecord, sets: tuple[str, ...]
) -> None:
    add_run(store, "r1", (5000, sets))
    assert pass_rate(store, backbone, LOOK) == (0, 1 / forward_s(MACS), "")
    add_run(store, "r2", (37, tuple(SETS.values())))
    assert pass_rate(store, backbone, LOOK) == (37, 37 / 2, "r2")


def test_a_run_that_ended_early_for_some_of_its_images_does_not_count(
    store: LocalStore, backbone: BackboneRecord
) -> None:
    add_run(store, "r1", (37, tuple(SETS.values())), (5000, (FIRST,)))
    assert pass_rate(store, backbone, LOOK) == (0, 1 / forward_s(MACS), "")


@pytest.mark.parametrize("sets", [(POOLED,), (FIRST, LAST_MAP)])
def test_a_pass_to_the_last_map_or_behind_it_counts_whatever_else_the_cache_had(
    store: LocalStore, backbone: BackboneRecord, sets: tuple[str, ...]
) -> None:
    add_run(store, "r1", (37, sets))
    assert pass_rate(store, backbone, LOOK) == (37, 37 / 2, "r1")
