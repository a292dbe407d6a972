from __future__ import annotations

import re

import pytest

from convoy.core.statistics import wilson_interval
from convoy.pipelines.report_data_card import ClassRows
from convoy.pipelines.report_page import CommitteeParts
from convoy.pipelines.report_subgroups import Subgroup
from convoy.pipelines.report_target import TargetKind
from convoy.report.page import draw_page
from convoy.report.quality_sections import quality_tiles
from convoy.report.words import count, percent
from made_pages import (
    HIDDEN,
    HOSTILE,
    IMAGE,
    LONG,
    QUOTES,
    SCRIPT,
    TURNED,
    PageParts,
    made_card,
    made_evaluation,
    made_page,
    made_predictions,
    made_retrains,
    made_run,
)

# Everything that a browser would fetch or follow.
_REFERENCES = ("src", "href", "xlink:href", "data", "action", "poster", "srcset", "background")
_ALLOWED_TAGS = frozenset(
    {
        *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "footer"),
        *(
            "h1",
            "h2",
            "h3",
            "p",
            "div",
            "span",
            "b",
            "bdi",
            "wbr",
            "a",
            "br",
            "pre",
            "ul",
            "ol",
            "li",
            "dl",
            "dt",
            "dd",
        ),
        *("figure", "figcaption", "details", "summary", "img", "svg", "g", "path", "rect", "circle", "text"),
        *("table", "caption", "thead", "tbody", "tr", "th", "td"),
    }
)


@pytest.fixture(scope="module")
def parts() -> PageParts:
    return PageParts(draw_page(made_page()))


def test_names_from_outside_make_no_elements_and_no_attributes(parts: PageParts) -> None:
    assert parts.tags() <= _ALLOWED_TAGS
    attributes = {name for _, found in parts.elements for name in found}
    assert not [name for name in attributes if name.startswith("on")]
    # Each is there as text: escaped, not dropped.
    for name in (SCRIPT, QUOTES, "{{ 7*7 }}", "</style></title>"):
        assert name in parts.text


def test_every_reference_is_inside_the_page(parts: PageParts) -> None:
    references = list(parts.values_of(*_REFERENCES))
    anchors = {attributes["id"] for _, attributes in parts.elements if "id" in attributes}
    inside = re.compile(r"data:(image/(jpeg|png)|application/json);base64,[A-Za-z0-9+/=]+")
    for reference in references:
        assert inside.fullmatch(reference) or reference.removeprefix("#") in anchors, reference[:80]
    assert sum(reference.startswith("data:image/jpeg") for reference in references) >= 15


def test_ids_and_the_names_of_data_are_unique(parts: PageParts) -> None:
    ids = list(parts.values_of("id"))
    assert len(set(ids)) == len(ids)
    keys = parts.json_keys()
    assert len(set(keys)) == len(keys)


def test_the_policy_allows_the_page_itself_and_nothing_else(parts: PageParts) -> None:
    (policy,) = [
        attributes["content"]
        for tag, attributes in parts.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    assert len(rules["style-src"]) == 1
    assert rules["style-src"][0].startswith("'sha256-")
    # No style attribute, which that policy would refuse.
    assert not list(parts.values_of("style"))


@pytest.mark.parametrize("key", ["curve-loss", "curve-top1", "reliability", "sizes", "slices"])
def test_what_a_pointer_finds_in_a_drawing_is_in_a_table_below_it(parts: PageParts, key: str) -> None:
    rows = parts.values_below(key)
    assert len(rows) == len(parts.json_of(key)) > 0
    # Nothing is left out: what is not known is a dash.
    assert all(all(cells) for cells in rows)


def test_the_values_of_a_drawing_are_those_of_its_json(parts: PageParts) -> None:
    bins = parts.json_of("reliability")
    assert [cells[2:] for cells in parts.values_below("reliability")] == [
        [count(one["num_rows"]), percent(one["mean_confidence"]), percent(one["accuracy"])] for one in bins
    ]
    assert [cells[2:] for cells in parts.values_below("sizes")] == [
        [count(one["images"])] for one in parts.json_of("sizes")
    ]
    matrix = parts.json_of("confusion-matrix")
    names, counts = matrix["classes"], matrix["rows_true_columns_predicted"]
    assert [cells[2:] for cells in parts.values_below("confusion-matrix")] == [
        [count(rows), percent(rows / total)]
        for values, total in zip(counts, matrix["row_totals"], strict=True)
        for rows in values
        if rows
    ]
    assert len(names) > 2
    slices = [(one["slice"], count(one["rows"]), count(one["rejects"])) for one in parts.json_of("slices")]
    assert [(cells[0], *cells[3:5]) for cells in parts.values_below("slices")] == slices
    losses = [(one["epoch"], one["phase"], one["train_loss"]) for one in parts.json_of("curve-loss")]
    shown = [(int(cells[0]), cells[1], float(cells[2])) for cells in parts.values_below("curve-loss")]
    assert shown == [(epoch, phase, pytest.approx(loss, rel=1e-3)) for epoch, phase, loss in losses]


def test_the_json_beside_a_figure_is_what_it_draws(parts: PageParts) -> None:
    evaluation = made_evaluation()
    assert parts.json_of("confusion-matrix") == {
        "classes": list(HOSTILE),
        "rows_true_columns_predicted": evaluation.confusion,
        "row_totals": [sum(row) for row in evaluation.confusion],
    }
    assert evaluation.reliability is not None
    assert parts.json_of("reliability") == [one.model_dump() for one in evaluation.reliability]
    by_name = {row["name"]: row for row in parts.json_of("per-class")}
    for one in evaluation.per_class:
        assert by_name[one.name]["recall"] == one.recall
        low, high = by_name[one.name]["recall_interval"]
        assert low <= one.recall <= high
    assert [row["sample_id"] for row in parts.json_of("worst-errors")] == [
        f"{number}/{name}" for number, name in enumerate(HOSTILE[:6])
    ]


def test_a_fold_that_was_measured_is_named_beside_the_quality() -> None:
    fold = made_evaluation().model_copy(update={"splits": ["train"], "rows": "train (fold 1 of 5)"})
    assert quality_tiles(fold)[-1].text == "labelled rows of train (fold 1 of 5)"
    assert quality_tiles(made_evaluation())[-1].text == "labelled rows of test"


def test_every_figure_has_its_json(parts: PageParts) -> None:
    figures = [
        attributes["id"].removeprefix("figure-") for tag, attributes in parts.elements if tag == "figure"
    ]
    assert figures
    assert set(figures) <= set(parts.json_keys())
    for tag, attributes in parts.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


def test_the_lineage_has_its_json() -> None:
    page = made_page()
    assert page.lineage
    shown = PageParts(draw_page(page)).json_of("lineage")
    assert shown == [link.model_dump() for link in page.lineage]


def test_what_turns_the_reading_direction_is_shown_by_its_code(parts: PageParts) -> None:
    assert "\u202e" not in parts.text
    assert TURNED.replace("\u202e", "\\u202e") in parts.text
    assert "\x00" not in parts.text
    assert "\x1b" not in parts.text
    assert (
        HIDDEN.replace("\u200b", "\\u200b").replace("\x00", "\\u0000").replace("\x1b", "\\u001b")
        in parts.text
    )


def test_a_very_long_name_is_cut(parts: PageParts) -> None:
    assert LONG not in parts.text
    assert LONG[:300] in parts.text


def test_the_title_of_a_run_leaves_names_as_they_are() -> None:
    run = made_run("advise").model_copy(update={"dataset": "PETS-V2", "config": {}})
    assert "<h1><bdi>Advise PETS-V2</bdi></h1>" in draw_page(made_page(run=run)).decode()


def test_rejects_that_can_be_drawn_are_shown_with_their_reason(parts: PageParts) -> None:
    (drawn,) = parts.json_of("reject-pictures")
    assert drawn == {"code": "too_small", "sample_id": TURNED, "width_px": 16, "height_px": 16}
    assert "16 x 16 px" in parts.text


def test_a_missing_image_is_said(parts: PageParts) -> None:
    assert "gone: no such object" in parts.text


def test_what_could_not_be_read_is_said(parts: PageParts) -> None:
    assert f"the sheet: {SCRIPT}" in parts.text


def test_a_page_of_a_thousand_classes_stays_small() -> None:
    classes = tuple(f"class {number}" for number in range(1000))
    evaluation = made_evaluation(classes, num_rows=3000)
    page = draw_page(made_page(evaluation=evaluation, predictions=None))
    assert len(page) < 2_000_000
    matrix = PageParts(page).json_of("confusion-matrix")
    assert len(matrix["classes"]) == 30
    labels = [classes.index(name) for name in matrix["classes"]]
    assert matrix["row_totals"] == [sum(evaluation.confusion[label]) for label in labels]


def test_a_page_shows_the_same_confusions_whether_the_matrix_or_its_entries_are_stored() -> None:
    classes = tuple(f"class {number}" for number in range(1001))
    entries = made_evaluation(classes, num_rows=3000)
    assert entries.confusion is None
    matrix = [[0] * len(classes) for _ in classes]
    for label, pred, num_rows in entries.confusion_entries or ():
        matrix[label][pred] = num_rows
    whole = entries.model_copy(update={"confusion": matrix, "confusion_entries": None})
    pages = [PageParts(draw_page(made_page(evaluation=one, predictions=None))) for one in (entries, whole)]
    for key in ("confusion-matrix", "confused-pairs"):
        assert pages[0].json_of(key) == pages[1].json_of(key)
    assert sum(pages[0].json_of("confusion-matrix")["row_totals"]) > 30


def test_a_page_tells_rows_apart_whose_label_the_model_does_not_know() -> None:
    known = made_predictions().model_copy(update={"labelled": 4, "wrong": [], "top1": wilson_interval(4, 4)})
    texts = [
        PageParts(draw_page(made_page(evaluation=None, predictions=one))).text
        for one in (known, known.model_copy(update={"unknown": 6}))
    ]
    assert "top-1 of 4 labelled rows" in texts[0]
    assert "does not know" not in texts[0]
    assert "top-1 of 4 rows with a label that the model knows" in texts[1]
    assert "None of 4 rows with a label that the model knows is wrong. 6 more have one" in texts[1]


def test_a_target_without_results_has_a_page() -> None:
    page = made_page(
        kind=TargetKind.MODEL, run=None, report={}, data_card=None, rejects=None, history=[], evaluation=None,
        predictions=None, slices=None, lineage=[], missing=[],
    )  # fmt: skip
    assert b"<h1>" in draw_page(page)


def test_a_mode_without_members_shows_cost_and_effect_only() -> None:
    text = PageParts(draw_page(made_page(committee=CommitteeParts(crops="flip", mode="gated")))).text
    assert "Members and crops" not in text


def test_retrainings_show_drift_and_the_gate() -> None:
    retrains = made_retrains()
    parts = PageParts(draw_page(made_page(retrains=retrains)))
    assert parts.values_below("drift")[0] == ["2026-01-01", "0.5000", "0.2000", "0.2500"]
    assert parts.values_below("champion")[0][:2] == ["2026-01-01", "0.7000"]
    drift = parts.json_of("drift")
    assert [one["date"] for one in drift] == ["2026-01-01", "2026-01-03"]
    assert drift[0]["embedding_shift"] == 0.5
    assert [one["decision"] for one in parts.json_of("decisions")] == ["promoted", "nothing_new", "held"]
    assert parts.json_of("gate-1")["holdout"]["rows"] == 200
    assert parts.tags() <= _ALLOWED_TAGS
    assert f"class {SCRIPT} loses" in parts.text


def test_groups_that_are_worse_than_the_whole_stand_out() -> None:
    groups = [
        Subgroup(axis="split", value=SCRIPT, rows=100, top1=wilson_interval(20, 100)),
        Subgroup(axis="split", value="test", rows=300, top1=wilson_interval(280, 300)),
    ]
    page = draw_page(made_page(subgroups=groups))
    parts = PageParts(page)
    assert [one["rows"] for one in parts.json_of("subgroups")] == [100, 300]
    (table,) = re.findall(rb'<section id="subgroups".*?</section>', page, re.DOTALL)
    assert table.count(b'<tr class="chosen">') == 1


def test_the_first_text_of_a_row_is_its_header() -> None:
    """By which a screen reader says what a number is about."""
    page = draw_page(made_page())
    headers = re.findall(rb'<th scope="row"[^>]*>', page)
    assert len(headers) > 10
    for table in re.findall(rb"<tbody>.*?</tbody>", page, re.DOTALL):
        for row in re.findall(rb"<tr.*?</tr>", table, re.DOTALL):
            assert row.count(b"<th") <= 1
            assert row.count(b"<t") == row.count(b"</t")


def test_of_very_many_outputs_some_are_named() -> None:
    """A scoring that is partitioned by labels has one for each."""
    outputs = {f"label={number:04}": f"/w/{number:04}" for number in range(300)}
    text = PageParts(draw_page(made_page(run=made_run().model_copy(update={"outputs": outputs})))).text
    assert "output label=0019" in text
    assert "output label=0020" not in text
    assert "further outputs" in text


def test_the_trials_of_a_search_are_ranked() -> None:
    interval = {"estimate": 0.5, "low": 0.4, "high": 0.6, "confidence": 0.95}
    shared = {"state": "finished", "nll": 1.0, "num_epochs": 2, "seconds": 3.0, "reason": None}
    trials = [
        {**shared, "trial": "000", "values": {"name": SCRIPT}, "top1": 0.5, "top1_interval": interval},
        {**shared, "trial": "001", "values": {"name": 2}, "top1": 0.75, "top1_interval": None},
        {
            **shared,
            "trial": "002",
            "values": {},
            "top1": None,
            "top1_interval": None,
            "state": "failed",
            "reason": IMAGE,
        },
    ]
    parts = PageParts(draw_page(made_page(trials=trials)))
    assert [one["trial"] for one in parts.json_of("trials")] == ["001", "000"]
    assert "The best 2 of 3 trials; 1 of all have no top-1." in parts.text
    assert parts.tags() <= _ALLOWED_TAGS


def test_of_very_many_trials_the_best_are_shown_and_the_page_says_so() -> None:
    shared = {"state": "finished", "nll": 1.0, "num_epochs": 2, "seconds": 3.0, "values": {}, "reason": None}
    trials = [{**shared, "trial": f"{number:03}", "top1": number / 300} for number in range(250)]
    failed = [{**shared, "trial": f"{number:03}", "top1": None} for number in range(250, 255)]
    parts = PageParts(draw_page(made_page(trials=[*trials, *failed])))
    for key in ("trials", "trial-table"):
        assert [one["trial"] for one in parts.json_of(key)] == [
            f"{number:03}" for number in range(249, 49, -1)
        ]
    assert parts.text.count("The best 200 of 255 trials; 5 of all have no top-1.") == 2


def test_of_very_many_classes_the_curve_has_all_in_its_data_and_the_table_the_first() -> None:
    sizes = [(7 * number) % 2100 for number in range(2100)]
    classes = [
        ClassRows(name=f"class {number}", by_split={"train": size}, total=size)
        for number, size in enumerate(sizes)
    ]
    card = made_card().model_copy(update={"classes": classes, "splits": {"train": sum(sizes)}})
    parts = PageParts(draw_page(made_page(data_card=card)))
    assert parts.json_of("classes") == {"train": sorted(sizes, reverse=True)}
    table = parts.json_of("class-table")
    assert [(row["name"], row["train"]) for row in table] == [
        (f"class {number}", size) for number, size in enumerate(sizes[:2000])
    ]
    assert "The first 2,000 of 2,100 classes in a table" in parts.text
