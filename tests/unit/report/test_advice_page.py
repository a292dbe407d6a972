"""Pages of advice and of looks inside: what is drawn, and that no name gets out of its place."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy.core.learning_curve import ImagesNeeded
from convoy.core.transferability import DomainDistance
from convoy.pipelines.advise_data import Resolution
from convoy.pipelines.advise_report import AdviceReport
from convoy.pipelines.near_duplicates import NearDuplicateGroup, NearDuplicateSample
from convoy.pipelines.report_inspection import read_pictures
from convoy.report.inspection_sections import inspection_sections
from convoy.report.page import draw_page
from convoy.storage.duplicates import DuplicateReport
from convoy.storage.local_store import LocalStore
from convoy.vision.engine_options import Precision
from made_advice import NAMES, made_advice, made_inspection, made_near_duplicates
from made_pages import SCRIPT, PageParts, made_page

NOTHING = {"evaluation": None, "predictions": None, "history": [], "data_card": None}


def test_advice_shows_strategies_the_curve_and_the_fronts() -> None:
    report = made_advice()
    page = draw_page(made_page(advice=report, **NOTHING))
    parts = PageParts(page)
    assert "script" not in parts.tags()
    assert not [name for _, attributes in parts.elements for name in attributes if name.startswith("on")]
    assert [one["rank"] for one in parts.json_of("strategies")] == [1, 2]
    curve = report.more_data.curve
    assert curve is not None
    drawn = parts.json_of("learning-curve")
    assert drawn["measured"] == [one.model_dump() for one in curve.points]
    assert drawn["forecast"] == [one.model_dump() for one in curve.forecast]
    assert len(parts.values_below("learning-curve")) == sum(
        len(drawn[part]) for part in ("measured", "forecast", "advised")
    )
    for front in report.cost_fronts:
        assert parts.json_of(f"front-{front.axis.value}") == front.model_dump(mode="json")
    assert [
        f"Cost: {front.unit}; the whole network counts" in parts.text for front in report.cost_fronts
    ] == [True] * len(report.cost_fronts)
    assert parts.json_of("augmentation-effects")[0]["verdict"] == "loss"
    assert SCRIPT in parts.text
    assert "less the advised one: -7.00 to +3.00 points" in parts.text
    assert "3 further options of the advice were not run" in parts.text


def unsound_advice() -> AdviceReport:
    """Copies across splits, of which some have several labels, and one class much larger than another."""
    resolution = Resolution(
        images=64, median_width_px=500, median_height_px=375, smallest_side_px=32, largest_side_px=4000
    )
    equal = DuplicateReport(
        groups=4, samples=9, across_splits=3, label_conflicts=2, examples=[["train/a.jpg", "test/b.jpg"]]
    )
    near = [
        NearDuplicateSample(sample_id=f"{split}/c.jpg", split=split, label=None) for split in ("train", "val")
    ]
    alike = made_near_duplicates().model_copy(
        update={"examples": [NearDuplicateGroup(score=0.97, samples=near)]}
    )
    advice = made_advice()
    size = advice.size.model_copy(
        update={"resolution": resolution, "duplicates": equal, "near_duplicates": alike, "imbalance": 12.5}
    )
    return advice.model_copy(update={"size": size})


def test_what_is_to_be_mended_is_counted_and_named() -> None:
    text = PageParts(draw_page(made_page(advice=unsound_advice(), **NOTHING))).text
    for words in (
        "median 500 x 375 px, sides 32 to 4,000 px, of 64 training images",
        "12.50 to 1",
        "9, 3 groups across splits, 2 whose labels differ",
        "train/a.jpg, test/b.jpg",
        "train/c.jpg (train, None), val/c.jpg (val, None)",
    ):
        assert words in text


def test_a_class_without_rows_has_no_ratio() -> None:
    advice = made_advice()
    size = advice.size.model_copy(update={"images_per_class_min": 0})
    text = PageParts(draw_page(made_page(advice=advice.model_copy(update={"size": size}), **NOTHING))).text
    assert "a class has no row to train on" in text


def test_a_strategy_has_the_limits_of_its_cost_and_money_where_there_is_a_price() -> None:
    advice = made_advice()
    text = PageParts(draw_page(made_page(advice=advice, **NOTHING))).text
    assert "30 s to 2 min" in text
    assert "money" not in text
    priced = [
        one.model_copy(update={"cost": one.cost.model_copy(update={"money": 12.25})})
        for one in advice.strategies
    ]
    page = draw_page(made_page(advice=advice.model_copy(update={"strategies": priced}), **NOTHING))
    assert b"money</th>" in page
    assert page.count(b"<bdi>12.25</bdi></td>") == len(priced)


def test_what_is_expected_is_told_apart_from_what_was_verified_at_a_budget() -> None:
    page = draw_page(made_page(advice=made_advice(), **NOTHING)).decode()
    section = page[page.index('id="verification"') :]
    assert ">expected of all images</th>" in section
    assert ">top-1 at the budget</th>" in section
    assert "answers another question, about all images and epochs" in section


def test_the_distance_of_domains_stands_beside_that_of_no_difference() -> None:
    distance = DomainDistance(
        reference="photos",
        tap="pooled",
        frechet=1.0,
        relative=0.0613,
        within_reference=0.0471,
        relative_at_half=0.0845,
    )
    advised = made_advice()
    likeness = advised.similarity.model_copy(update={"domain_distance": distance})
    advice = advised.model_copy(update={"similarity": likeness})
    text = PageParts(draw_page(made_page(advice=advice, **NOTHING))).text
    for value in ("0.061 of its variance (photos)", "0.085;", " 0.047"):
        assert value in text


def test_the_data_of_the_rule_has_what_is_shown_beside_it() -> None:
    advice = made_advice()
    data = PageParts(draw_page(made_page(advice=advice, **NOTHING))).json_of("rule")
    assert data["dissimilarity"] == advice.rule.dissimilarity
    for name in ("peak_tap", "peak_top1", "top_top1", "untrained_top1", "knn_top1", "domain_distance"):
        assert data["similarity"][name] == advice.similarity.model_dump(mode="json")[name]


def test_without_a_curve_no_forecast_is_said_to_miss_what_is_wanted() -> None:
    for curve, said in ((made_advice().more_data.curve, "no forecast reaches it"), (None, "not known")):
        more = made_advice().more_data.model_copy(update={"curve": curve, "advised": []})
        report = made_advice().model_copy(update={"more_data": more})
        shown = PageParts(draw_page(made_page(advice=report, **NOTHING))).text
        assert {one for one in ("no forecast reaches it", "not known") if one in shown} == {said}


@pytest.mark.parametrize(
    ("high", "said"),
    [
        (3000.0, "1,200 images of the largest class, 800 to 3,000"),
        (None, "1,200 images of the largest class, 800 or more"),
    ],
)
def test_images_that_are_needed_come_with_their_limits(high: float | None, said: str) -> None:
    needed = ImagesNeeded(top1=0.95, images_per_class=1200, low=800, high=high)
    more = made_advice().more_data.model_copy(update={"images_needed": 1200, "needed": needed})
    report = made_advice().model_copy(update={"more_data": more})
    assert said in PageParts(draw_page(made_page(advice=report, **NOTHING))).text


def test_what_was_measured_is_named_as_the_fronts_name_it_with_what_differs() -> None:
    advice = made_advice()
    parts = PageParts(draw_page(made_page(advice=advice, **NOTHING)))
    assert [one["backbone"] for one in parts.json_of("costs")] == list(NAMES)
    machine = advice.costs[0].machine.cpu
    assert f"Measured on {machine}, batches of 32, fp32. Images/s are those of all workers" in parts.text
    assert "from the store to features; those of the network alone" in parts.text
    first, *others = advice.costs
    on_gpu = first.machine.model_copy(update={"gpu": "H200"})
    mixed = [first.model_copy(update={"machine": on_gpu, "precision": Precision.BF16}), *others]
    page = draw_page(made_page(advice=advice.model_copy(update={"costs": mixed}), **NOTHING))
    text = PageParts(page).text
    assert "Measured, batches of 32. Images/s" in text
    assert page.count(b'<td class="text"><bdi>H200</bdi></td>') == 1
    assert page.count(b'<td class="text"><bdi>bf16</bdi></td>') == 1


def test_bubbles_grow_with_the_root_of_the_parameters() -> None:
    page = draw_page(made_page(advice=made_advice(), **NOTHING)).decode()
    figure = page[page.index('id="figure-front-throughput"') :]
    radii = re.findall(
        r'class="bubble"[^>]* r="([\d.]+)"><title>(\w+|&lt;script)', figure[: figure.index("</figure>")]
    )
    by_name = {name: float(radius) for radius, name in radii}
    assert by_name["&lt;script"] == 22.0
    # 90,000 and 10,000 of 4,000,000 parameters would be too small to see.
    assert by_name["bad"] == by_name["small"] == 5.0


def test_pictures_of_an_inspection_are_inside_the_page(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    store.put("a.png", buffer.getvalue())
    store.put("a.json", json.dumps({"kind": "filters", "data": {"name": SCRIPT}}).encode())
    report = made_inspection("a", "lost")
    pictures = read_pictures(store, report)
    assert pictures[0].image == buffer.getvalue()
    assert pictures[1].missing
    parts = PageParts(draw_page(made_page(inspection=report, pictures=pictures, **NOTHING)))
    assert "script" not in parts.tags()
    assert parts.json_of("inspection-a") == {"kind": "filters", "data": {"name": SCRIPT}}
    assert any(value.startswith("data:image/png;base64,") for value in parts.values_of("src"))
    assert pictures[1].missing in parts.text
    assert parts.json_of("near-duplicates")["groups"] == 1


def test_pictures_that_are_too_large_together_are_named_and_left_out(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for name in ("a", "b"):
        store.put(f"{name}.png", bytes(5 << 20))
        store.put(f"{name}.json", b"{}")
    first, second = read_pictures(store, made_inspection("a", "b"))
    assert first.image
    assert "too large" in second.missing


def test_sheets_of_large_photos_fit_into_the_page_and_maps_stay_as_drawn(tmp_path: Path) -> None:
    """Three sheets of 6 x 7 photos of 224 pixels, as networks of ImageNet have them by default."""
    rng = np.random.default_rng(0)
    smooth_HW3 = rng.integers(40, 200, (12, 14, 3)).astype(np.uint8)
    sheet = np.asarray(Image.fromarray(smooth_HW3).resize((7 * 224, 6 * 224), Image.Resampling.BICUBIC))
    grained = np.clip(sheet + rng.normal(0, 12, sheet.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grained).save(buffer, "PNG")
    names = ("cams", "neighbours-00", "neighbours-01")
    store = LocalStore(str(tmp_path))
    for name in (*names, "filters", "damaged"):
        store.put(f"{name}.png", bytes(1 << 20) if name == "damaged" else buffer.getvalue())
        store.put(f"{name}.json", b"{}")
    report = made_inspection(*names, "filters", "damaged")
    figures = [
        one if one.name == "filters" else one.model_copy(update={"kind": "neighbours"})
        for one in report.figures
    ]
    *photos, drawn, damaged = read_pictures(store, report.model_copy(update={"figures": figures}))
    assert 3 * len(buffer.getvalue()) > 8 << 20
    assert not any(one.missing for one in photos)
    assert [one.media_type for one in (*photos, drawn)] == ["image/jpeg"] * 3 + ["image/png"]
    with Image.open(io.BytesIO(photos[0].image)) as image:
        assert image.size == (7 * 224, 6 * 224)
    assert drawn.image == buffer.getvalue()
    assert "no picture" in damaged.missing
    section = next(inspection_sections(report, photos))
    assert 'src="data:image/jpeg;base64,' in str(section.blocks[0])


def test_a_group_of_many_near_duplicates_names_them_all_and_one_split_has_none_across() -> None:
    names = [f"{'folder/' * 20}{number:03d}.jpg" for number in range(20)]
    samples = [NearDuplicateSample(sample_id=name, split="test", label="cat") for name in names]
    group = NearDuplicateGroup(score=0.99, size=50, samples=samples)
    found = made_near_duplicates().model_copy(
        update={"examples": [group], "across_splits": 0, "splits": ["test"]}
    )
    report = made_inspection().model_copy(update={"near_duplicates": found})
    text = PageParts(draw_page(made_page(inspection=report, **NOTHING))).text
    assert all(f"{name} (test, cat)" in text for name in names)
    assert "and 30 more" in text
    assert "not looked for among images of test alone" in text
