"""The untrained network that a backbone is compared with is the same network but for its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from convoy.core.config import load_config
from convoy.core.fingerprints import canonical_json
from convoy.core.learning_curve import AS_MEASURED, CurveSample
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines.advise_config import AdviseConfig, CandidateBackbone
from convoy.pipelines.advise_evidence import Gathered, Gatherer
from convoy.pipelines.advise_probes import Look, Prober
from convoy.pipelines.advise_rule import JudgedProbe, expected_probe
from convoy.pipelines.advise_work import AdviceWork
from convoy.pipelines.feature_plan import FeatureRequest, holding_features
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.judged_heads import JudgedHead
from convoy.pipelines.models import fetch_backbone
from convoy.storage.commits import SetCommit, feature_prefix, part_key
from convoy.storage.local_store import LocalStore
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.runs import RunFolder
from made_advice import made_probes
from made_advice_rows import frozen_rows

LENET = "arch: lenet5, weights: random, seed: 3, num_classes: 7, preset: {resize_px: null, crop_px: 32}"
NEW_LAYERS = "new_layers: {after: c1, convs: [{width: 8}], hidden_widths: [16]}"


@pytest.mark.parametrize(
    ("settings", "taps"),
    [(LENET, ("c1", "pooled")), (f"{LENET}, {NEW_LAYERS}", ("body.c1", "convs.0"))],
    ids=["classes", "new layers"],
)
def test_the_untrained_network_has_the_layers_and_the_classes_of_the_candidate(
    tmp_path: Path, settings: str, taps: tuple[str, ...]
) -> None:
    config = load_config(AdviseConfig, None, [f"candidates=[{{backbone: {{{settings}}}}}]", "dataset=parts"])
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (60, 60)}, ("good", "defect"))
    store, (candidate,) = LocalStore(str(tmp_path)), config.candidates
    record = fetch_backbone(store, candidate.backbone)
    probe = made_probes("lenet5", 0.0).top
    probed = [probe.model_copy(update={"tap": record.resolve_tap(tap)}) for tap in taps]
    probes = made_probes("lenet5", 0.0).model_copy(update={"taps": probed})
    best = Look(record, FeatureSummary.model_construct(), probes, np.ones(0, np.bool_), None)
    trained = candidate.backbone.model_copy(update={"weights": "some.pth", "weights_digest": "a" * 32})
    gatherer = Gatherer(store, manifest, config, Prober(store, manifest, config, Silent()))
    untrained, its_record = gatherer._untrained(CandidateBackbone(backbone=trained), best)
    assert [its_record.resolve_tap(tap) for tap in untrained.taps or ()] == [one.tap for one in probed]
    assert its_record.num_classes == 7
    assert its_record.axis == record.axis


@pytest.mark.parametrize(("weights", "dtype"), [("random", "float32"), ("DEFAULT", "float16")])
def test_activations_of_random_weights_are_kept_where_float16_would_make_them_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, dtype: str
) -> None:
    """EfficientNet-B0 has some of 1e-13."""
    config = load_config(AdviseConfig, None, [f"candidates=[{{backbone: {{{LENET}}}}}]", "dataset=parts"])
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (60, 60)}, ("good", "defect"))
    store, (candidate,) = LocalStore(str(tmp_path)), config.candidates
    record = fetch_backbone(store, candidate.backbone)
    record = record.model_copy(update={"config": candidate.backbone.model_copy(update={"weights": weights})})
    stored = []

    def ensure(job: FeatureJob, **_: object) -> None:
        stored.extend(spec.dtype for spec in job.sets)
        raise LookupError

    monkeypatch.setattr(FeatureJob, "ensure", ensure)
    with pytest.raises(LookupError):
        Prober(store, manifest, config, Silent()).look(candidate, record)
    assert set(stored) == {dtype}


def test_the_curve_tells_how_many_images_the_wanted_accuracy_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = f"candidates=[{{backbone: {{{LENET}}}}}]"
    config = load_config(AdviseConfig, None, [backbone, "dataset=parts", "wanted_top1=0.9"])
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (60, 60)}, ("good", "defect"))
    samples = [
        CurveSample(float(size), np.arange(200)[None, :] < 200 * (1 - size**-0.5)) for size in (10, 20, 40)
    ]
    monkeypatch.setattr(Prober, "features", lambda *_: None)
    monkeypatch.setattr(Prober, "curve", lambda *_: samples)
    store = LocalStore(str(tmp_path))
    gatherer = Gatherer(store, manifest, config, Prober(store, manifest, config, Silent()))
    probes = made_probes("lenet5", 0.0)
    summary = FeatureSummary.model_construct(sets={f"{probes.best.tap}/0": "s"})
    head = JudgedHead(np.ones(200, np.bool_), np.ones(200), np.arange(200), C=1.0, seconds=0.0)
    curve = gatherer._curve(
        Look(fetch_backbone(store, config.candidates[0].backbone), summary, probes, head, None)
    )
    assert curve is not None
    assert curve.needed is not None
    assert (curve.needed.low or 0) <= 100 <= (curve.needed.high or np.inf)


def cache_rows(store: LocalStore, set_id: str, rows: pa.Table) -> None:
    """One number a row, which tells the classes apart, as a finished run leaves it."""
    contents = rows["content_id"].to_pylist()
    part = FeatureRows(
        sample_ids=rows["sample_id"].to_pylist(),
        content_ids=contents,
        content_digests=contents,
        view=0,
        features_BD=rows["label"].to_numpy()[:, None].astype(np.float32),
    )
    written = write_features(store, part_key(feature_prefix(set_id, "r"), "0-000000", "a0"), part, {})
    commit = SetCommit(run_id="r", committed_unix_s=0.0, parts=(written,), rejects=())
    store.put(f"features/{set_id}/commits/r.json", canonical_json(commit))


def test_what_a_tap_gets_right_is_of_the_rows_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that has changed since the first pass is rejected for the taps alone that are computed anew."""
    gatherer, candidate, made = looked_at(tmp_path, None)
    store, rows = LocalStore(str(tmp_path)), gatherer._prober.rows
    early, top = (one.tap for one in made.probes.taps)
    lost_N = np.isin(rows.all["sample_id"].to_pylist(), rows.judged["sample_id"].to_pylist()[:30])
    cache_rows(store, made.summary.sets[f"{early}/0"], rows.all.filter(pa.array(~lost_N)))
    monkeypatch.setattr(FeatureJob, "ensure", lambda *_, **__: made.summary)
    look = gatherer._prober.look(candidate.model_copy(update={"taps": (early, top)}), made.record)
    assert [look.probes.judged(one).num_rows for one in look.probes.taps] == [90, 120]
    assert look.probes.peak == JudgedProbe(tap=top, num_correct=90, num_rows=90)
    evidence = gatherer._evidence(candidate, look, look, is_best=True, shrink=AS_MEASURED)
    assert evidence.evidence.top == JudgedProbe(tap=top, num_correct=120, num_rows=120)
    assert expected_probe(evidence.evidence.top).estimate > 0.99


@pytest.mark.parametrize(("num_rows", "is_known"), [(3, False), (8, True)])
def test_a_reference_of_too_few_images_is_noted_and_ends_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, is_known: bool
) -> None:
    gatherer, candidate, look = looked_at(tmp_path, None)
    evidence = gatherer._evidence(candidate, look, look, is_best=True, shrink=AS_MEASURED)
    store = LocalStore(str(tmp_path))
    work = AdviceWork(
        store=store,
        manifest=gatherer._manifest,
        config=gatherer._config.model_copy(update={"reference": "scenes"}),
        folder=RunFolder(store, "r"),
        progress=Silent(),
        draw_curves=lambda *_: b"",
        check=lambda: None,
        new_run=False,
        reference=frozen_rows(tmp_path / "reference", {Split.TRAIN: (num_rows,)}, ("scene",)),
    )
    monkeypatch.setattr(FeatureJob, "ensure", lambda *_, **__: look.summary)
    gathered = Gathered(looks=(look,), best=look, untrained=look, curve=None, evidence=(evidence,))
    distance, notes = work._domain_distance(gatherer, gathered, evidence)
    assert (distance is not None) is is_known
    why = "no distance to scenes: a distance between domains needs four rows of each, not 100 and 3"
    assert notes == ([] if is_known else [why])


@pytest.mark.parametrize(("limit", "missing"), [(None, 300), (50, 0), (80, 60)])
def test_probes_cost_a_pass_over_those_training_images_alone_that_the_cache_lacks_at_their_tap(
    tmp_path: Path, limit: int | None, missing: int
) -> None:
    """Everything is cached at `pooled`, as `convoy cache` does by default, and at `c1` what was looked at."""
    gatherer, candidate, look = looked_at(tmp_path, limit)
    evidence = gatherer._evidence(candidate, look, look, is_best=True, shrink=AS_MEASURED)
    assert evidence.missing_images == 0
    assert evidence.svm is not None
    assert evidence.svm.missing_images == missing


def test_a_tap_that_was_chosen_by_the_rows_that_judge_flatters_its_svm_no_more_than_its_own_head(
    tmp_path: Path,
) -> None:
    gatherer, _, look = looked_at(tmp_path, None)
    as_chosen = gatherer._svm(look)
    assert as_chosen is not None
    fair = look.probes.model_copy(update={"earlier_flattery": 4.0 / as_chosen.judged.num_rows})
    judged = gatherer._svm(replace(look, probes=fair))
    assert judged is not None
    assert judged.judged.num_correct == pytest.approx(as_chosen.judged.num_correct - 4.0)


def looked_at(folder: Path, limit: int | None) -> tuple[Gatherer, CandidateBackbone, Look]:
    settings = [
        f"candidates=[{{backbone: {{{LENET}}}}}]", "dataset=parts", "look.images_per_class=50",
        "extraction.precision=fp32", *([] if limit is None else [f"rows.max_per_class={limit}"]),
    ]  # fmt: skip
    config = load_config(AdviseConfig, None, settings)
    counts = {Split.TRAIN: (200, 200), Split.VAL: (60, 60)}
    manifest = frozen_rows(folder, counts, ("good", "defect"))
    store, (candidate,) = LocalStore(str(folder)), config.candidates
    record = fetch_backbone(store, candidate.backbone)
    c1, pooled = record.resolve_tap("c1"), record.resolve_tap("pooled")
    prober = Prober(store, manifest, config, Silent())
    request = FeatureRequest(dataset="parts", backbone=record.config, taps=(c1, pooled))
    job = FeatureJob(store, manifest, record, request, holding_features(config.extraction, record))
    cache_rows(store, job.set_id(c1), prober.rows.all)
    cache_rows(store, job.set_id(pooled), manifest.read_table())
    made = made_probes("lenet5", 0.0)
    early, top = made.taps[0].model_copy(update={"tap": c1}), made.top.model_copy(update={"tap": pooled})
    summary = FeatureSummary.model_construct(sets={f"{tap}/0": job.set_id(tap) for tap in (c1, pooled)})
    head = JudgedHead(np.ones(0, np.bool_), np.ones(0), np.arange(0), C=1.0, seconds=0.0)
    look = Look(record, summary, made.model_copy(update={"taps": [early, top]}), head, None)
    return Gatherer(store, manifest, config, prober), candidate, look
