"""Advice that was given already is read from its run, and notes say how far advice can be relied on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_jobs import write_digits
from convoy.core.config import as_override, load_config
from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.learning_curve import AS_MEASURED
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines import advise
from convoy.pipelines.advise_config import AdviseConfig, VerifySettings
from convoy.pipelines.advise_data import data_facts
from convoy.pipelines.advise_evidence import Gathered, Gatherer
from convoy.pipelines.advise_probes import Look, Prober
from convoy.pipelines.advise_report import AdviceReport, Verification
from convoy.pipelines.advise_strategies import Option
from convoy.pipelines.advise_taps import refuse_unknown_stages
from convoy.pipelines.advise_verify import Verifier
from convoy.pipelines.advise_work import AdviceWork, _fronts, _left_out, _notes
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.pipelines.judged_heads import JudgedHead
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.training_rows import RowLimit
from convoy.storage.commits import finish
from convoy.storage.datasets import freeze_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.runs import RunFolder
from convoy.vision.backbone_config import BackboneConfig
from made_advice import made_advice, made_cost, made_probes, made_strategy
from made_advice_rows import frozen_rows
from made_sources import write_files


def test_advice_that_is_known_is_judged_by_the_error_budget_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The made advice has one reject among 100 images."""
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (10, 10)}, ("good", "defect"))
    record = BackboneRecord.model_construct(weights_digest="a" * 32)
    monkeypatch.setattr("convoy.pipelines.dataset_choice.open_dataset", lambda *_: manifest)
    monkeypatch.setattr(advise, "fetch_backbone", lambda *_: record)
    base = ["dataset=parts", "candidates=[{backbone: {arch: lenet5}}]", f"workspace={tmp_path}"]
    configs = [
        load_config(AdviseConfig, None, [*base, f"error_budget={{rows: {rows}, rate: 0}}"]) for rows in (0, 1)
    ]
    store, identity = LocalStore(str(tmp_path)), advise._identity(manifest, configs[0], [record], None)
    finish(RunFolder(store, "r"), made_advice().model_dump(mode="json"))
    store.put(advise._pointer(identity, configs[0]), canonical_json({"run_id": "r"}))
    given = [ask(one) for one in configs]
    assert [one.within_error_budget for one in given] == [False, True]


def test_cut_off_advice_on_a_source_is_ended_before_newer_images_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = advice_on_digits(tmp_path, monkeypatch, num_images=12)
    looked_at: list[AdviceWork] = []

    def look(work: AdviceWork, _: list[BackboneRecord]) -> AdviceReport:
        looked_at.append(work)
        if len(looked_at) == 1:
            raise KeyboardInterrupt
        return made_advice()

    monkeypatch.setattr(AdviceWork, "advise", look)
    with pytest.raises(KeyboardInterrupt):
        ask(config)
    write_digits(tmp_path / "images", 2, start=12)
    ended, newest = ask(config), ask(config)
    begun, again, anew = looked_at
    assert again.folder.run_id == begun.folder.run_id != anew.folder.run_id
    assert [one.manifest.num_samples for one in looked_at] == [12, 12, 14]
    assert ["an unfinished run goes on" in str(one.notes) for one in (ended, newest)] == [True, False]


def test_advice_on_a_source_says_what_of_it_was_left_out_each_time_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = advice_on_digits(tmp_path, monkeypatch, num_images=12)
    write_files(tmp_path / "images", "beside.jpg")
    monkeypatch.setattr(AdviceWork, "advise", lambda *_: made_advice())
    for _ in range(2):
        report = ask(config)
        assert [note for note in report.notes if "beside.jpg" in note] == [
            "files outside the class folders were left out: 1 (beside.jpg)"
        ]


def test_a_killed_advice_goes_on_with_other_workers_at_another_price_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, looked_at = advice_on_digits(tmp_path, monkeypatch), []

    def look(work: AdviceWork, _: list[BackboneRecord]) -> AdviceReport:
        looked_at.append(work)
        if len(looked_at) == 1:
            raise KeyboardInterrupt
        return made_advice()

    monkeypatch.setattr(AdviceWork, "advise", look)
    with pytest.raises(KeyboardInterrupt):
        ask(config)
    changed = {
        "extraction": ExtractionConfig(num_workers=2),
        "price_per_hour": 2.0,
        "verify": VerifySettings(),
    }
    ask(config.model_copy(update=changed))
    assert looked_at[0].folder.run_id == looked_at[1].folder.run_id
    ask(config.model_copy(update=changed | {"price_per_hour": 3.0}))
    assert len(looked_at) == 3, "money was of another price"


def test_advice_that_was_given_is_verified_later_from_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under each budget anew, as often as it is asked for once."""
    config, looked_at, verified = advice_on_digits(tmp_path, monkeypatch), [], []
    advice, scratch = made_advice(), {"strategy": "from_scratch", "backbone": {"arch": "lenet5"}}

    def look(work: AdviceWork, _: list[BackboneRecord]) -> AdviceReport:
        looked_at.append(work)
        made = made_strategy(1, Strategy.FROM_SCRATCH, 0.5, 1.0)
        option = Option(
            **made.model_dump(include={"strategy", "backbone", "tap", "cost", "basis", "why"}),
            top1=made.interval,
            settings={"name": "probe", "dataset": "digits", **scratch},
        )
        strategy = made.model_copy(update={"config": work._write(option)})
        return advice.model_copy(
            update={"run": work.folder.run_id, "strategies": [strategy], "verification": None}
        )

    def verify(verifier: Verifier, _: object, found: list[Option], **__: object) -> Verification | None:
        verified.append((verifier._settings.epochs, found[0].settings["name"]))
        return advice.verification

    monkeypatch.setattr(AdviceWork, "advise", look)
    monkeypatch.setattr(Verifier, "verify", verify)
    monkeypatch.setattr("convoy.pipelines.advise_work.ray_session", nullcontext)
    first = ask(config)
    for epochs in (2, 2, 3):
        later = ask(config.model_copy(update={"verify": VerifySettings(epochs=epochs)}))
        assert later.verification == advice.verification
        assert Path(later.strategies[0].config).parts[-3] == later.run != first.run
    assert verified == [(2, "probe"), (3, "probe")]
    assert len(looked_at) == 1


def advice_on_digits(folder: Path, monkeypatch: pytest.MonkeyPatch, *, num_images: int = 40) -> AdviseConfig:
    """Advice on some digits, by a backbone that need not be fetched."""
    write_digits(folder / "images", num_images)
    monkeypatch.setattr(
        advise, "fetch_backbone", lambda *_: BackboneRecord.model_construct(weights_digest="a" * 32)
    )
    base = ["name=digits", f"source={folder}/images", "candidates=[{backbone: {arch: lenet5}}]"]
    return load_config(AdviseConfig, None, [*base, f"workspace={folder}/W"])


def ask(config: AdviseConfig) -> AdviceReport:
    return advise.run_advise(config, progress=Silent(), draw_curves=lambda *_: b"")


def with_reference(folder: Path, name: str) -> AdviseConfig:
    """Advice on ten digits, by whose side another dataset stands for the pretraining domain."""
    write_digits(folder / "images", 10)
    base = ["name=digits", f"source={folder}/images", "candidates=[{backbone: {arch: lenet5}}]"]
    return load_config(AdviseConfig, None, [*base, f"workspace={folder}/W", f"reference={name}"])


def test_advice_beside_a_reference_that_was_refreshed_is_given_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        advise, "fetch_backbone", lambda *_: BackboneRecord.model_construct(weights_digest="a" * 32)
    )
    config, store = with_reference(tmp_path, "photos"), LocalStore(str(tmp_path / "W"))
    looked_at: list[AdviceWork] = []

    def look(work: AdviceWork, _: list[BackboneRecord]) -> AdviceReport:
        looked_at.append(work)
        return made_advice()

    monkeypatch.setattr(AdviceWork, "advise", look)
    for start, num_images in ((0, 8), (8, 0), (8, 1)):
        write_digits(tmp_path / "photos", num_images, start=start)
        freeze_dataset(store, "photos", str(tmp_path / "photos"))
        ask(config)
    assert [work.reference and work.reference.num_samples for work in looked_at] == [8, 9]


def test_a_reference_that_is_not_there_is_refused_before_any_backbone_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object) -> BackboneRecord:
        raise AssertionError

    monkeypatch.setattr(advise, "fetch_backbone", fetch)
    with pytest.raises(DataError, match="fotos"):
        ask(with_reference(tmp_path, "fotos"))


SMALL = {
    "arch": "lenet5",
    "weights": "random",
    "num_classes": 2,
    "preset": {"resize_px": None, "crop_px": 32},
}


def work_on(store: LocalStore, manifest: Manifest, config: AdviseConfig) -> AdviceWork:
    """The work of an advice that nobody watches."""
    return AdviceWork(
        store=store,
        manifest=manifest,
        config=config,
        folder=RunFolder(store, "r"),
        progress=Silent(),
        draw_curves=lambda *_: b"",
        check=lambda: None,
        new_run=False,
    )


def test_advice_for_fewer_images_knows_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what augmentation does, nor the sizes of the classes: 90 and 30 images become 20 of each."""
    settings = [
        "rows={max_per_class: 20, seed: 3}",
        "augmentation_effect={}",
        "look={judged_per_class: 25, least_judged: 40}",
    ]
    config = load_config(
        AdviseConfig, None, ["dataset=parts", "candidates=[{backbone: {arch: lenet5}}]", *settings]
    )
    counts = {Split.TRAIN: (90, 30), Split.VAL: (60, 60)}
    store, manifest = LocalStore(str(tmp_path)), frozen_rows(tmp_path, counts, ("good", "defect"))
    prober, asked = Prober(store, manifest, config, Silent()), []
    monkeypatch.setattr(
        "convoy.pipelines.advise_work.measure_augmentation", lambda *given, **_: asked.append(given[4])
    )
    work = work_on(store, manifest, config)
    look = replace(made_look(), record=fetch_backbone(store, BackboneConfig.model_validate(SMALL)))
    work._augmentation(Gathered(looks=(look,), best=look, untrained=look, curve=None, evidence=()), prober)
    assert (asked[0].rows, asked[0].max_judged) == (RowLimit(max_per_class=20, seed=3), 50)
    assert asked[0].least_judged == 40
    monkeypatch.setattr(
        "convoy.pipelines.advise_data.find_duplicates", lambda *_: made_advice().size.duplicates
    )
    monkeypatch.setattr(Prober, "near_duplicates", lambda *_: made_advice().size.near_duplicates)
    facts = data_facts(store, manifest, config, prober, look)
    assert (facts.images_per_class_min, facts.images_per_class_max, facts.imbalance) == (20, 20, 1)


def test_a_stage_that_some_backbones_lack_leaves_them_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that none of them has is refused before any pass."""
    other = {**SMALL, "arch": "cifar_resnet20"}
    candidates = as_override("candidates", [{"backbone": SMALL}, {"backbone": other}])
    settings = ["dataset=parts", candidates, "network.reuse={after: c1}", "augmentation_effect={tap: c1}"]
    config = load_config(AdviseConfig, None, settings)
    store = LocalStore(str(tmp_path))
    lenet, resnet = (fetch_backbone(store, one.backbone) for one in config.candidates)
    refuse_unknown_stages(config, [resnet, lenet])
    with pytest.raises(ConfigError, match="no stage 'c1'") as caught:
        refuse_unknown_stages(config, [resnet])
    assert caught.value.where == "network.reuse.after"

    manifest = frozen_rows(tmp_path, {Split.TRAIN: (60, 60)}, ("good", "defect"))
    work, prober = work_on(store, manifest, config), Prober(store, manifest, config, Silent())
    look = replace(made_look(), record=resnet)
    gatherer = Gatherer(store, manifest, config, prober)
    monkeypatch.setattr(Gatherer, "_svm", lambda *_: None)
    monkeypatch.setattr(Gatherer, "_missing", lambda *_: 0)
    evidence = gatherer._evidence(config.candidates[1], look, look, is_best=True, shrink=AS_MEASURED)
    assert evidence.reused is None
    gathered = Gathered(looks=(look,), best=look, untrained=look, curve=None, evidence=(evidence,))
    assert work._augmentation(gathered, prober) is None
    assert [note.partition(":")[0] for note in _left_out(config, gathered)] == [
        "no partial_reuse of resnet20",
        "no augmentation_effect",
    ]


@pytest.mark.parametrize(("own", "price"), [("", 3.6), ("price_per_hour: 1.5", 1.5)])
def test_costs_without_a_price_have_that_of_the_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, price: float
) -> None:
    config = load_config(
        AdviseConfig,
        None,
        [
            "dataset=parts",
            "candidates=[{backbone: {arch: lenet5}}]",
            "price_per_hour=3.6",
            f"costs={{{own}}}",
            "extraction.precision=fp32",
        ],
    )
    priced: list[float | None] = []
    monkeypatch.setattr(
        "convoy.pipelines.advise_work.measure_costs",
        lambda *given, **_: priced.append(given[3].price_per_hour),
    )
    store = LocalStore(str(tmp_path))
    work = work_on(store, frozen_rows(tmp_path, {Split.TRAIN: (10, 10)}, ("good", "defect")), config)
    work._costs([])
    assert priced == [price]


def made_look() -> Look:
    summary = FeatureSummary.model_construct(
        run="r1", recomputed=1, samples=1, rejects=0, reject_codes={}, sets={"pooled/0": "0" * 32}
    )
    head = JudgedHead(np.ones(0, np.bool_), np.ones(0), np.arange(0), C=1.0, seconds=0.0)
    return Look(BackboneRecord.model_construct(), summary, made_probes("resnet20", 0.0), head, None)


def test_cost_fronts_compare_the_rows_that_all_backbones_could_read() -> None:
    """Each of the two lacks another row, so that they judged equally many."""
    right_N = np.arange(100) % 2 == 0
    looks = []
    for name, lost in (("small", 3), ("large", 60)):
        places_M = np.delete(np.arange(100), lost)
        head = JudgedHead(right_N[places_M], np.ones(99), places_M, C=1.0, seconds=0.0)
        looks.append(replace(made_look(), probes=made_probes(name, 0.0), head=head))
    gathered = Gathered(looks=tuple(looks), best=looks[0], untrained=looks[0], curve=None, evidence=())
    fronts, notes = _fronts([made_cost("small", 100.0, 1000), made_cost("large", 50.0, 9000)], gathered)
    assert {front.num_rows for front in fronts} == {98}
    cheapest, dearest = fronts[0].choices
    assert cheapest.top1 == dearest.top1, "both are right about the same images"
    assert dearest.dominated_by is not None
    assert dearest.dominated_by.top1_difference.estimate == 0
    # Half of the rows would differ: the limits would lie ten points and more from zero.
    assert dearest.dominated_by.top1_difference.high < 0.03, "no row is compared with another"
    assert "cost fronts compare 98 rows, of 99 that judge" in notes[0]


@pytest.mark.parametrize(("timed_images", "is_rough"), [(299, True), (300, False)])
def test_costs_that_follow_from_a_small_pass_are_said_to_be_rough(timed_images: int, is_rough: bool) -> None:
    probes = made_probes("resnet20", 0.0).model_copy(update={"timed_images": timed_images})
    look = replace(made_look(), probes=probes)
    gathered = Gathered(looks=(look,), best=look, untrained=look, curve=None, evidence=())
    notes = _notes(gathered, made_advice().strategies[0], Strategy.FINE_TUNE.value)
    assert any("are rough" in note for note in notes) is is_rough


@pytest.mark.parametrize(
    ("recomputed", "timed_run", "is_told"), [(0, "r1", True), (9, "r0", True), (9, "r1", False)]
)
def test_costs_that_follow_from_an_earlier_pass_name_its_run(
    recomputed: int, timed_run: str, is_told: bool
) -> None:
    probes = made_probes("resnet20", 0.0).model_copy(update={"timed_images": 500, "timed_run": timed_run})
    summary = made_look().summary.model_copy(update={"run": "r1", "recomputed": recomputed})
    look = replace(made_look(), probes=probes, summary=summary)
    gathered = Gathered(looks=(look,), best=look, untrained=look, curve=None, evidence=())
    notes = _notes(gathered, made_advice().strategies[0], Strategy.FINE_TUNE.value)
    assert any(f"earlier passes ran on: resnet20 in {timed_run}" in note for note in notes) is is_told
