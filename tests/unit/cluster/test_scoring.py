"""The scoring operator without Ray: a call is a slice, whatever calls it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_jobs import write_digits
from convoy.cluster.prepared_batches import SliceImages
from convoy.cluster.scoring import Scorer, weights_budget_bytes
from convoy.cluster.scoring_spec import MemberSpec, ScoreTable, ScoringSpec
from convoy.cluster.slices import SliceTask
from convoy.core.crop_policies import CropPlan, CropPolicy, MemberOutputs
from convoy.core.errors import DataError, StoreUnavailable
from convoy.core.records import Reject, RejectCode, SampleRejected, Split, Stage
from convoy.core.result_columns import ClassOutputs, PartitionBy
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.storage.commits import SliceRecord
from convoy.storage.datasets import open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.member_predictions import member_output
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.request_counts import REQUESTS
from convoy.storage.run_input import freeze_input
from convoy.storage.runs import FIRST_SLICE, RunFolder, RunRecord
from convoy.storage.samples import SampleReader
from convoy.vision.committee import Committee, CommitteeOutput, TurnOutput
from convoy.vision.committee_options import CommitteeOptions, GateOptions, MemberOptions
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.engine_options import Precision
from made_bundles import DIGITS, made_classifier
from made_runs import made_manifest

NUM_IMAGES = 11


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A workspace with the frozen input of a run: one slice of digits, and a file that is no image."""
    write_digits(tmp_path / "images", NUM_IMAGES)
    (tmp_path / "images" / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    store = LocalStore(str(tmp_path / "workspace"))
    freeze(DatasetConfig(workspace=store.root_uri, name="digits", source=str(tmp_path / "images")))
    batches = open_dataset(store, "digits").iter_batches(splits=[Split.TRAIN])
    rows = (((PREDICTIONS,), pa.Table.from_batches([batch])) for batch in batches)
    folder = RunFolder(store, "r1")
    groups = freeze_input(folder, rows, slice_rows=64)
    folder.write_record(RunRecord.new("r1", verb="score", identity={}, config={}, outputs={}, groups=groups))
    return store


def made_spec(
    store: LocalStore,
    *,
    keep: MemberOutputs = MemberOutputs.NONE,
    gate: GateOptions | None = None,
    max_resident_bytes: int | None = None,
) -> ScoringSpec:
    """Two networks of unequal weights over two crops, in batches that do not divide the slice."""
    members = []
    for seed, weight in ((0, 0.75), (1, 0.25)):
        classifier = made_classifier(store, seed)
        preset = classifier.backbone.preset
        members.append(
            MemberSpec(
                digest=str(seed),
                backbone=classifier.backbone.config,
                num_classes=classifier.backbone.num_classes,
                weights_key=classifier.backbone.weights_key,
                tap=classifier.tap,
                head=None,
                head_key=None,
                output_groups=None,
                class_order=None,
                options=MemberOptions(preset=preset, precision=Precision.FP32, weight=weight),
            )
        )
    outputs = [PREDICTIONS, *([member_output(0), member_output(1)] if keep is not MemberOutputs.NONE else [])]
    return ScoringSpec(
        workspace=store.root_uri,
        run_id="r1",
        members=tuple(members),
        classes=DIGITS,
        class_of_label=tuple(range(10)),
        gives_probabilities=True,
        model_digest="m",
        committee=CommitteeOptions(
            batch_size=4,
            compiled=False,
            num_threads=1,
            plan=CropPlan(policy=CropPolicy.FLIP),
            max_resident_bytes=max_resident_bytes,
        ),
        gate=gate,
        is_dense=False,
        keep=keep,
        decode_rule=DecodeRule(),
        outputs={output: f"runs/r1/{output}/" for output in outputs},
        metadata={},
        num_decode_threads=2,
        num_fetch_threads=2,
        stall_s=600,
    )


def score(spec: ScoringSpec) -> SliceRecord:
    return Scorer(spec)(SliceTask(slice=FIRST_SLICE, outputs=tuple(spec.outputs)))


def joint_logits(store: LocalStore, record: SliceRecord) -> np.ndarray:
    return np.array(pq.read_table(store.uri(record.parts[PREDICTIONS].key))["logits"].to_pylist())


def test_a_slice_becomes_one_row_an_image_and_one_reject(store: LocalStore) -> None:
    record = score(made_spec(store, keep=MemberOutputs.VIEWS))
    assert (record.num_results, record.num_rejects) == (NUM_IMAGES, 1)
    assert sorted(record.parts) == [member_output(0), member_output(1), PREDICTIONS]
    assert {part.num_rows for part in record.parts.values()} == {NUM_IMAGES}
    logits_NVK = np.array(
        pq.read_table(store.uri(record.parts[member_output(1)].key))["logits"].to_pylist(), np.float32
    )
    assert logits_NVK.shape == (NUM_IMAGES, 2, 10)
    assert record.rejects is not None
    told = pq.read_schema(store.uri(record.rejects.key)).metadata
    assert (told[b"convoy.schema_version"], told[b"convoy.run_id"]) == (b"1", b"r1")


@pytest.mark.parametrize("table", [None, "alone", "with_features"])
def test_a_slice_without_a_usable_image_is_all_rejects(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, table: str | None
) -> None:
    spec = made_spec(store)
    if table is not None:
        columns = ScoreTable(
            outputs=ClassOutputs.PROBABILITIES,
            partition_by=PartitionBy.NONE,
            label_names=DIGITS,
            features_tap="pooled" if table == "with_features" else None,
            features_dtype="float16",
        )
        options = spec.members[0].options.model_copy(update={"weight": 1.0})
        alone = spec.members[0].model_copy(update={"options": options})
        spec = spec.model_copy(update={"members": (alone,), "table": columns})
    gone = SampleRejected(RejectCode.GONE, Stage.FETCH, "made")
    monkeypatch.setattr(SampleReader, "read", lambda _, rows: ((row, gone) for row in range(rows.num_rows)))
    record = score(spec)
    assert (record.num_results, record.num_rejects) == (0, NUM_IMAGES + 1)
    assert pq.read_table(store.uri(record.parts[PREDICTIONS].key)).num_rows == 0


@pytest.mark.parametrize("keep", MemberOutputs)
def test_members_that_take_turns_say_the_same(store: LocalStore, keep: MemberOutputs) -> None:
    together = score(made_spec(store, keep=keep))
    in_turns = score(made_spec(store, keep=keep, max_resident_bytes=1))
    assert in_turns.num_results == together.num_results
    assert {output: part.rows_digest for output, part in in_turns.parts.items()} == {
        output: part.rows_digest for output, part in together.parts.items()
    }


def test_seconds_bytes_and_retries_of_every_turn_are_counted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries, read = [0], SampleReader.read

    def read_with_a_retry(
        reader: SampleReader, rows: pa.Table
    ) -> Iterator[tuple[int, bytes | SampleRejected]]:
        retries[0] += 1
        yield from read(reader, rows)

    def a_second_in_the_network(images: SliceImages, _: float) -> None:
        images.seconds["forward"] += 1

    monkeypatch.setattr(SampleReader, "read", read_with_a_retry)
    monkeypatch.setattr(SampleReader, "num_retries", property(lambda _: retries[0]))
    monkeypatch.setattr(SliceImages, "through_network", a_second_in_the_network)
    together, in_turns = score(made_spec(store)), score(made_spec(store, max_resident_bytes=1))
    assert (together.num_retries, in_turns.num_retries) == (1, 2)
    assert in_turns.seconds["forward"] == 2 * together.seconds["forward"]
    # The images are the same, and were read twice.
    assert (in_turns.bytes_read, in_turns.flags) == (2 * together.bytes_read, together.flags)


def test_requests_since_the_slice_before_are_recorded(store: LocalStore) -> None:
    spec = made_spec(store)
    REQUESTS.take()
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        REQUESTS.count(method)
    records = [score(spec), score(spec)]
    assert [(one.get_requests, one.put_requests) for one in records] == [(2, 1), (0, 0)]


def test_operators_that_share_a_gpu_share_the_room_for_weights() -> None:
    total_bytes = 80 << 30
    alone = weights_budget_bytes(total_bytes, total_bytes, 1.0)
    assert 4 * weights_budget_bytes(total_bytes, total_bytes, 0.25) == alone < total_bytes
    assert weights_budget_bytes(total_bytes // 8, total_bytes, 0.25) == alone // 8


def test_an_image_that_is_lost_between_two_turns_is_a_reject() -> None:
    rows = made_manifest(["a", "b", "c"])

    def reject(name: str, code: RejectCode) -> Reject:
        row = rows.filter(pa.array([one == name for one in rows["sample_id"].to_pylist()])).to_pylist()[0]
        key = {field: row[field] for field in ("sample_id", "uri", "etag", "content_id")}
        return Reject(**key, stage=Stage.FETCH, code=code, reason="made")

    first, later = SliceImages(rows, time.time()), SliceImages(rows, time.time())
    first.usable_N[:] = [True, False, True]
    first.rejects = [reject("b", RejectCode.CORRUPT)]
    later.rejects = [reject("b", RejectCode.GONE), reject("c", RejectCode.GONE)]
    first.reject_too(later)
    assert first.usable_N.tolist() == [True, False, False]
    assert [(one.sample_id, one.code) for one in first.rejects] == [
        ("b", RejectCode.CORRUPT),
        ("c", RejectCode.GONE),
    ]


def test_every_image_passes_one_stage_of_the_gate(store: LocalStore) -> None:
    gate = GateOptions(members=(0,), policy=CropPolicy.CENTER, threshold=1.1)
    exact, gated = score(made_spec(store)), score(made_spec(store, gate=gate))
    assert gated.flags == {"grey_expanded": NUM_IMAGES, "committee": NUM_IMAGES}
    np.testing.assert_allclose(joint_logits(store, gated), joint_logits(store, exact), atol=1e-6)
    easy = score(made_spec(store, gate=gate.model_copy(update={"threshold": 0.0})))
    assert easy.flags == {"grey_expanded": NUM_IMAGES, "first_look": NUM_IMAGES}
    assert np.abs(joint_logits(store, easy) - joint_logits(store, exact)).max() > 1e-4


def test_rows_of_a_slice_that_failed_half_way_do_not_come_into_the_next(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = GateOptions(members=(0,), policy=CropPolicy.CENTER, threshold=1.1)
    spec = made_spec(store, gate=gate)
    # One batch has come to the gate, and two of its rows wait there, when the store fails.
    spec = spec.model_copy(update={"committee": spec.committee.model_copy(update={"batch_size": 3})})
    untouched = score(spec)
    scorer, task = Scorer(spec), SliceTask(slice=FIRST_SLICE, outputs=tuple(spec.outputs))

    def other_images_until_the_store_fails(
        reader: SampleReader, rows: pa.Table
    ) -> Iterator[tuple[int, bytes | SampleRejected]]:
        images = [data for _, data in read(reader, rows)][::-1]
        yield 0, SampleRejected(RejectCode.GONE, Stage.FETCH, "made")
        yield from list(enumerate(images))[1:10]
        raise StoreUnavailable("the store went away")

    read = SampleReader.read
    with monkeypatch.context() as patched:
        patched.setattr(SampleReader, "read", other_images_until_the_store_fails)
        with pytest.raises(StoreUnavailable):
            scorer(task)
    record = scorer(task)
    assert record.flags == untouched.flags
    np.testing.assert_array_equal(joint_logits(store, record), joint_logits(store, untouched))


def test_an_image_without_finite_outputs_is_a_reject_and_no_other(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = score(made_spec(store))
    join = Committee.join

    def join_with_a_hole(committee: Committee, turns: Sequence[TurnOutput]) -> CommitteeOutput:
        output = join(committee, turns)
        output.logits_BK[1, 5] = float("inf")
        return output

    monkeypatch.setattr(Committee, "join", join_with_a_hole)
    record = score(made_spec(store))
    assert record.num_results == sound.num_results - 1
    assert record.reject_codes == {**sound.reject_codes, RejectCode.NOT_FINITE: 1}
    np.testing.assert_array_equal(
        joint_logits(store, record), np.delete(joint_logits(store, sound), 1, axis=0)
    )


def test_outputs_that_are_no_numbers_stop_the_run(store: LocalStore) -> None:
    spec = made_spec(store)
    hot = spec.members[0].options.model_copy(update={"temperature": 1e-320})
    broken = spec.members[0].model_copy(update={"options": hot})
    with pytest.raises(DataError, match="no finite numbers"):
        score(spec.model_copy(update={"members": (broken, spec.members[1])}))
