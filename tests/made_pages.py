"""Made data of pages, with names that nobody should trust."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

from convoy.core.drift import EmbeddingShift
from convoy.core.metrics import EvaluationCounts
from convoy.core.records import Split
from convoy.core.statistics import bootstrap_difference, bootstrap_mean, mcnemar_test, wilson_interval
from convoy.pipelines.evaluation import Evaluation, NamedClass, confusion_fields
from convoy.pipelines.report_data_card import ClassRows, DataCard, FoundDuplicates, LabelledImage, SizeBin
from convoy.pipelines.report_images import ShownImage
from convoy.pipelines.report_lineage import LineageLink
from convoy.pipelines.report_page import PageData
from convoy.pipelines.report_predictions import ConfusedPair, PredictionSummary, ShownRow
from convoy.pipelines.report_rejects import DrawnReject, RejectSummary, ShownReject
from convoy.pipelines.report_slices import SlicePoint, SliceSummary
from convoy.pipelines.report_target import TargetKind
from convoy.pipelines.retrain_config import Decision, NewData, RetrainReport, StepResult
from convoy.pipelines.retrain_gate import GateCheck, GateEvidence, PairedScores
from convoy.pipelines.runs_show import RunDescription
from convoy.pipelines.runs_state import RunState
from made_events import epoch_result

SCRIPT = "<script>window.hacked=1</script>"
IMAGE = "<img src=x onerror=window.hacked=1>"
QUOTES = "\"'><svg/onload=window.hacked=1>"
TURNED = "abc\u202egpj.exe"
HIDDEN = "a\u200bb\x00c\x1b[31m"
LONG = "long" * 300
ARABIC = "\u0642\u0637\u0629 cat"
HOSTILE = (SCRIPT, IMAGE, QUOTES, TURNED, HIDDEN, LONG, ARABIC, "{{ 7*7 }}", "</style></title>", "plain")


def jpeg(seed: int = 0, side_px: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side_px, side_px, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def shown(sample_id: str, *, missing: str = "") -> ShownImage:
    if missing:
        return ShownImage(sample_id=sample_id, missing=missing)
    return ShownImage(sample_id=sample_id, jpeg=jpeg(), width_px=16, height_px=16)


def made_evaluation(
    classes: tuple[str, ...] = HOSTILE, *, num_rows: int = 400, run: str = "r1"
) -> Evaluation:
    """An evaluation of random logits that point at the label more often than not."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, len(classes), num_rows)
    logits_NK = rng.normal(0, 1, (num_rows, len(classes))) + 2.5 * np.eye(len(classes))[labels_N]
    counts = EvaluationCounts(len(classes))
    counts.add(logits_NK, labels_N)
    metrics, rows = counts.summary(), counts.row_outcomes()
    top1 = bootstrap_mean(rows.correct1_N)
    wilson = wilson_interval(int(rows.correct1_N.sum()), num_rows)
    return Evaluation(
        run=run,
        cache_run=None,
        splits=["test"],
        model_digest="0" * 32,
        samples=num_rows,
        results=num_rows,
        rejects=0,
        labelled=num_rows,
        top1=metrics.top1,
        top5=metrics.top5,
        nll=metrics.nll,
        brier=metrics.brier,
        ece=metrics.ece,
        intervals={"top1": top1, "top1_wilson": wilson, "top5": bootstrap_mean(rows.correct5_N)},
        per_class=[
            NamedClass(name=name, **one.model_dump())
            for name, one in zip(classes, metrics.per_class, strict=True)
        ],
        reliability=list(metrics.reliability),
        classes=list(classes),
        **confusion_fields(counts.confusion_KK),
    )


def made_row(number: int, *, missing: str = "") -> ShownRow:
    name = HOSTILE[number % len(HOSTILE)]
    return ShownRow(
        sample_id=f"{number}/{name}",
        uri=f"s3://bucket/{name}",
        label_name=HOSTILE[(number + 1) % len(HOSTILE)],
        pred_name=name,
        score=0.9 - number / 100,
        true_score=0.05,
        image=shown(f"{number}/{name}", missing=missing),
    )


def made_predictions() -> PredictionSummary:
    return PredictionSummary(
        rows=400,
        labelled=400,
        top1=wilson_interval(300, 400),
        predicted=dict.fromkeys(HOSTILE, 40),
        scores=[0] * 5 + [40] * 10,
        reliability=None,
        confused=[ConfusedPair(label=SCRIPT, pred=IMAGE, rows=7)],
        wrong=[
            made_row(number, missing="gone: no such object" if number == 1 else "") for number in range(6)
        ],
        unsure=[made_row(number) for number in range(3)],
    )


def made_card() -> DataCard:
    return DataCard(
        name="digits",
        fingerprint="f" * 32,
        is_current=True,
        source=f"/data/{SCRIPT}",
        samples=300,
        unlabelled=3,
        splits={"train": 200, "test": 100},
        classes=[ClassRows(name=name, by_split={"train": 20, "test": 10}, total=30) for name in HOSTILE],
        imbalance=1.0,
        sizes=[
            SizeBin(low_bytes=512, high_bytes=1024, images=100),
            SizeBin(low_bytes=1024, high_bytes=2048, images=200),
        ],
        total_bytes=300_000,
        smallest_bytes=600,
        largest_bytes=2000,
        unknown_sizes=0,
        suffixes={".jpg": 299, IMAGE[:12]: 1},
        duplicates=FoundDuplicates(
            splits=[Split.TRAIN, Split.TEST],
            unread_splits=[],
            groups=1,
            samples=2,
            across_splits=1,
            label_conflicts=0,
            examples=[[QUOTES, TURNED]],
        ),
        skipped={"not an image": 2},
        warnings=[f"class {SCRIPT} is small"],
        changes={},
        examples=[LabelledImage(label_name=name, split="train", image=shown(name)) for name in HOSTILE],
    )


def made_rejects() -> RejectSummary:
    reject = ShownReject(
        sample_id=QUOTES, uri=f"s3://b/{IMAGE}", stage="decode", code="corrupt", reason=SCRIPT
    )
    drawn = DrawnReject(code="too_small", image=shown(TURNED))
    return RejectSummary(rows=5, by_code={"corrupt": 4, "too_small": 1}, shown=[reject], drawn=[drawn])


def made_slices() -> SliceSummary:
    points = [
        SlicePoint(
            slice=f"0-{number:06d}", slices=1, started_s=2.0 * number, seconds=2.0, rows=64, rejects=number % 2,
            images_per_s=32.0 + number,
        )
        for number in range(6)
    ]  # fmt: skip
    return SliceSummary(
        slices=6, rows=384, rejects=3, bytes_read=4_000_000, under_way_s=12.0, seconds={"decode": 3.0, "forward": 8.0},
        points=points, slowest=points[:2],
    )  # fmt: skip


def made_run(verb: str = "evaluate") -> RunDescription:
    return RunDescription(
        run="20260101-000000-abcdef01",
        verb=verb,
        dataset="digits",
        state=RunState.FINISHED,
        held_by=None,
        done=400,
        inputs=400,
        age="2 days",
        opened_utc="2026-01-01T00:00:00+00:00",
        uri=f"/w/{QUOTES}",
        slices=6,
        slices_done=6,
        results=397,
        rejects=3,
        reject_codes={"corrupt": 3},
        flags={},
        images_per_s=32.0,
        left_s=None,
        seconds={"decode": 3.0},
        outputs={"predictions": f"/w/{SCRIPT}"},
        identity={"dataset": SCRIPT},
        config={"name": IMAGE, "nested": {"text": SCRIPT}},
        settings={"notes": [QUOTES]},
        versions={"torch": "2.15"},
        forecast={
            "images": 400,
            "images_per_s": 30.0,
            "hours": 0.01,
            "sampled_images": 64,
            "cost": {"total": 0.5},
        },
        actual={"images": 400, "images_per_s": 33.0, "hours": 0.009, "cost": {"total": 0.4}},
    )


def made_page(**parts: Any) -> PageData:
    """A page with every part that an evaluation can have; all names are hostile."""
    values: dict[str, Any] = {
        "target": "run:20260101-000000-abcdef01",
        "kind": TargetKind.RUN,
        "name": "20260101-000000-abcdef01",
        "workspace": f"/w/{SCRIPT}",
        "run": made_run(),
        "report": {"notes": [SCRIPT]},
        "data_card": made_card(),
        "rejects": made_rejects(),
        "history": [
            epoch_result(epoch=epoch, phase=SCRIPT if epoch > 2 else "head") for epoch in range(1, 5)
        ],
        "evaluation": made_evaluation(),
        "predictions": made_predictions(),
        "slices": made_slices(),
        "lineage": [
            LineageLink(title="model", name=IMAGE, facts={"members": QUOTES}),
            LineageLink(title="training", name="unknown", facts={}, gap=f"no run says so: {SCRIPT}"),
        ],
        "missing": [f"the sheet: {SCRIPT}"],
    }
    return PageData(**{**values, **parts})


class PageParts(HTMLParser):
    """The elements of a page, with their attributes, and all text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._figures: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] | None = None
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag == "figure":
            self._rows = self._figures.setdefault(attributes["id"], [])
        elif self._rows is not None and tag == "tr":
            self._rows.append([])
        elif self._rows and tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._rows = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.strip()

    def values_below(self, key: str) -> list[list[str]]:
        """The cells of each row of the table in a figure, without the heading."""
        return self._figures[f"figure-{key}"][1:]

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def values_of(self, *names: str) -> Iterator[str]:
        for _, attributes in self.elements:
            yield from (attributes[name] for name in names if name in attributes)

    def json_of(self, key: str) -> Any:
        """What the link below a figure or table holds."""
        (link,) = [
            attributes["href"]
            for _, attributes in self.elements
            if attributes.get("download") == f"{key}.json"
        ]
        prefix, _, encoded = link.partition(",")
        assert prefix == "data:application/json;base64"
        return json.loads(base64.b64decode(encoded))

    def json_keys(self) -> list[str]:
        names = [attributes["download"] for _, attributes in self.elements if "download" in attributes]
        return [re.sub(r"\.json$", "", name) for name in names]


def made_retrains() -> list[RetrainReport]:
    """Three dates: promoted, nothing new, and held because of a class."""
    rng = np.random.default_rng(0)
    ours_N, theirs_N = rng.random(200) < 0.8, rng.random(200) < 0.8
    holdout = PairedScores(
        rows=200,
        top1=(float(ours_N.mean()), float(theirs_N.mean())),
        difference=bootstrap_difference(ours_N, theirs_N),
        mcnemar=mcnemar_test(ours_N, theirs_N),
    )
    checks = [
        GateCheck(name="gain", passed=True, found=0.01, limit=0.0, text="it gains"),
        GateCheck(name="class_floor", passed=False, found=0.3, limit=0.1, text=f"class {SCRIPT} loses"),
    ]
    evidence = GateEvidence(holdout=holdout, newest=None, ece=(0.1, None), checks=checks)
    step = StepResult(step="new_head", candidate="digits@1", train_rows=90, evidence=evidence, reason=SCRIPT)
    new = NewData(
        rows=50, removed=1, usable=49, by_class={SCRIPT: 50}, new_classes=[QUOTES], class_shift=0.25,
        embedding_shift=EmbeddingShift(shift=0.5, by_chance=0.2), champion_top1=0.7, notes=[IMAGE], objections=[TURNED],
    )  # fmt: skip
    shared: dict[str, Any] = {"recomputed": 50, "model": "digits", "dataset_fingerprint": "f" * 32}
    return [
        RetrainReport(
            decision=Decision.PROMOTED, reason="better", date="2026-01-01", data=new, steps=[step], **shared
        ),
        RetrainReport(decision=Decision.NOTHING_NEW, reason="the same", date="2026-01-02", **shared),
        RetrainReport(
            decision=Decision.HELD, reason=SCRIPT, date="2026-01-03", data=new, steps=[step, step], **shared
        ),
    ]
