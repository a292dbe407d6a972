"""Sections about how good a model is: classes, confusions, calibration, and the rows that are worth a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from convoy.core.metrics import ReliabilityBin
from convoy.core.statistics import Interval, wilson_interval
from convoy.pipelines.committee_evaluation import MemberEvaluation
from convoy.pipelines.evaluation import Evaluation, NamedClass
from convoy.pipelines.report_page import CommitteeParts
from convoy.pipelines.report_predictions import ConfusedPair, PredictionSummary, ShownRow
from convoy.report.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Figure,
    Gallery,
    Row,
    Section,
    Table,
    Tile,
    text_table,
    values_table,
)
from convoy.report.figures import bars_by_name, confusion_matrix, reliability_diagram, span_floor, span_glyph
from convoy.report.svg import Chart, Scale
from convoy.report.words import count, number, percent, picture, points, span

_MAX_MATRIX = 30
_MAX_CLASSES = 2000
_OPEN_CLASSES = 40
_MAX_PAIRS = 12


def quality_tiles(evaluation: Evaluation) -> list[Tile]:
    """The numbers that everybody asks for."""
    tiles = [Tile(percent(evaluation.top1), f"top-1, 95 %: {span(evaluation.intervals['top1_wilson'])}")]
    if len(evaluation.classes) > 5:
        tiles.append(Tile(percent(evaluation.top5), "top-5"))
    if evaluation.nll is not None:
        tiles.append(Tile(number(evaluation.nll), "NLL, nats"))
    if evaluation.ece is not None:
        tiles.append(Tile(percent(evaluation.ece), "ECE, expected calibration error"))
    return [*tiles, Tile(count(evaluation.labelled), f"labelled rows of {evaluation.measured_on}")]


def quality_sections(evaluation: Evaluation, predictions: PredictionSummary | None) -> Iterator[Section]:
    """What an evaluation measured, with the confidences of its rows where these could be read."""
    yield Section(key="classes-quality", title="Classes", blocks=[_per_class(evaluation)])
    yield Section(key="confusion", title="Confusion", blocks=list(_confusion(evaluation)))
    if evaluation.reliability is not None:
        blocks = [reliability_figure("reliability", "Reliability", evaluation.reliability, evaluation.ece)]
        if predictions is not None and predictions.scores is not None:
            blocks.append(_score_histogram(predictions.scores, predictions.rows))
        yield Section(key="calibration", title="Calibration", blocks=blocks)


def prediction_sections(predictions: PredictionSummary, evaluation: Evaluation | None) -> Iterator[Section]:
    """What the rows of predictions show; what the evaluation says already is left out."""
    if evaluation is None:
        yield Section(key="predictions", title="Predictions", blocks=list(_prediction_blocks(predictions)))
    if predictions.labelled:
        yield _worst(predictions)
    if predictions.unsure:
        lead = "The rows whose best class has the lowest score: where a person's label would teach most."
        gallery = _gallery("unsure", f"{len(predictions.unsure)} rows", predictions.unsure)
        yield Section(key="least-sure", title="Least sure", lead=lead, blocks=[gallery])


def judged_rows(predictions: PredictionSummary) -> str:
    """What those rows are whose predictions can be compared with their labels."""
    return "rows with a label that the model knows" if predictions.unknown else "labelled rows"


def committee_section(parts: CommitteeParts) -> Section:
    """The members alone, what an image costs, and what a cheaper mode changes."""
    blocks: list[Block] = []
    if parts.members:
        title = "Members alone, over the same crops and rows"
        blocks.append(member_table(parts.members, key="members", title=title))
    if parts.cost is not None:
        cost = parts.cost
        rows = [
            ("network passes an image", f"{cost.passes_per_image:g}"),
            ("multiply-adds an image", count(cost.macs_per_image)),
            ("parameters", count(cost.num_parameters)),
            ("images/s of the run", "-" if cost.images_per_s is None else f"{cost.images_per_s:.1f}"),
        ]
        blocks.append(Facts(key="cost", title="Cost", rows=rows, data=cost.model_dump()))
    if parts.effect is not None:
        effect = parts.effect
        rows = [
            ("rows with the same class", percent(effect.agreement)),
            ("top-1 against the exact mode, points", points(effect.top1_change)),
            ("fewer network passes", f"{effect.speedup:.2f} times"),
            *(
                [("fewer multiply-adds", f"{effect.macs_ratio:.2f} times")]
                if effect.macs_ratio is not None
                else ()
            ),
            ("exact run", effect.exact_run),
        ]
        blocks.append(Facts(key="effect", title=f"Mode {parts.mode}", rows=rows, data=effect.model_dump()))
    averaging = f", averaged as {parts.averaging}" if parts.averaging else ""
    return Section(
        key="committee",
        title="Members and crops",
        lead=f"Crops {parts.crops}{averaging}, mode {parts.mode}.",
        blocks=blocks,
    )


def reliability_figure(
    key: str, title: str, bins: Sequence[ReliabilityBin], ece: float | None = None
) -> Figure:
    """Accuracy against confidence; with the expected calibration error where it is known."""
    known = "" if ece is None else f"ECE {percent(ece)} over {len(bins)} bins. "
    return Figure(
        key=key,
        title=title,
        picture=reliability_diagram(bins, f"{title}: accuracy against confidence"),
        data=[one.model_dump() for one in bins],
        values=values_table(
            ["confidence from", "to", "rows", "mean confidence", "accuracy"],
            [
                [
                    f"{one.low:.2f}",
                    f"{one.high:.2f}",
                    count(one.num_rows),
                    percent(one.mean_confidence),
                    percent(one.accuracy),
                ]
                for one in bins
            ],
        ),
        caption=f"{known}On the dashed line confidence is accuracy; below it the model is too sure.",
    )


def _per_class(evaluation: Evaluation) -> Table:
    ranked = sorted(evaluation.per_class, key=lambda row: (row.f1 is None, row.f1 or 0.0, row.name))
    shown = ranked[:_MAX_CLASSES]
    floor = span_floor([recall for row in shown if (recall := _recall(row)) is not None])
    columns = ["class*", "rows", "recall", "95 %", "*", "precision", "95 %", "F1", "predicted"]
    return Table(
        key="per-class",
        columns=[Column(name.rstrip("*"), is_text=name == "class*") for name in columns],
        rows=[_class_row(row, floor) for row in shown],
        data=[
            {
                **row.model_dump(),
                "recall_interval": _bounds(_recall(row)),
                "precision_interval": _bounds(_precision(row)),
            }
            for row in shown
        ],
        title="Per class",
        caption=f"{len(shown):,} of {len(ranked):,} classes, the lowest F1 first. Intervals are Wilson's;"
        f" drawings are of recall from {100 * floor:.0f} to 100 %.",
        folded=f"All {len(shown):,} classes" if len(shown) > _OPEN_CLASSES else "",
    )


def _class_row(row: NamedClass, floor: float) -> Row:
    recall, precision = _recall(row), _precision(row)
    glyph = None if recall is None else span_glyph(recall, floor)
    texts = [
        row.name,
        count(row.support),
        percent(row.recall),
        "-" if recall is None else span(recall),
        "",
        percent(row.precision),
        "-" if precision is None else span(precision),
        number(row.f1, 3),
        count(row.num_predicted),
    ]
    return Row(tuple(Cell(text, picture=glyph if place == 4 else None) for place, text in enumerate(texts)))


def _recall(row: NamedClass) -> Interval | None:
    return None if row.recall is None else wilson_interval(round(row.recall * row.support), row.support)


def _precision(row: NamedClass) -> Interval | None:
    if row.precision is None:
        return None
    return wilson_interval(round(row.precision * row.num_predicted), row.num_predicted)


def _bounds(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _confusion(evaluation: Evaluation) -> Iterator[Block]:
    counts = {(label, pred): num_rows for label, pred, num_rows in evaluation.confused()}
    totals, errors = Counter[int](), Counter[int]()
    for (label, pred), num_rows in counts.items():
        totals[label] += num_rows
        errors[label] += num_rows if label != pred else 0
    names = evaluation.classes
    chosen = list(range(len(names)))
    caption = (
        "Rows are true classes. Blue is right, orange wrong: the deeper, the larger the share of the row."
    )
    if len(names) > _MAX_MATRIX:
        chosen = sorted(sorted(chosen, key=lambda label: -errors[label])[:_MAX_MATRIX])
        caption += f" The {_MAX_MATRIX} of {len(names):,} classes with the most errors;"
        caption += " totals and shares count the others too."
    shown = [[counts.get((row, column), 0) for column in chosen] for row in chosen]
    shown_totals = [totals[row] for row in chosen]
    shown_names = [names[label] for label in chosen]
    yield Figure(
        key="confusion-matrix",
        title="Confusion matrix",
        picture=confusion_matrix(
            shown_names, shown, shown_totals, "Counts of true against predicted classes"
        ),
        data={"classes": shown_names, "rows_true_columns_predicted": shown, "row_totals": shown_totals},
        caption=caption,
        values=values_table(
            ["true*", "taken for*", "rows", "of the true class"],
            [
                [names[label], names[pred], count(counts[label, pred]), percent(counts[label, pred] / total)]
                for label, total in zip(chosen, shown_totals, strict=True)
                for pred in chosen
                if counts.get((label, pred))
            ],
        ),
        is_wide=len(chosen) > 14,
    )
    pairs = [(-num_rows, label, pred) for (label, pred), num_rows in counts.items() if label != pred]
    yield _pair_table(
        [
            ConfusedPair(label=names[label], pred=names[pred], rows=-negative)
            for negative, label, pred in sorted(pairs)[:_MAX_PAIRS]
        ]
    )


def _pair_table(pairs: Sequence[ConfusedPair]) -> Table:
    return text_table(
        ["true*", "taken for*", "rows"],
        [[pair.label, pair.pred, count(pair.rows)] for pair in pairs],
        key="confused-pairs",
        title="Most confused",
        data=[pair.model_dump() for pair in pairs],
        is_beside=True,
    )


def _prediction_blocks(predictions: PredictionSummary) -> Iterator[Block]:
    if predictions.scores is not None:
        yield _score_histogram(predictions.scores, predictions.rows)
    yield _predicted_counts(predictions)
    if predictions.reliability is not None:
        yield reliability_figure(
            "reliability", f"Reliability of {judged_rows(predictions)}", predictions.reliability
        )
    if predictions.confused:
        yield _pair_table(predictions.confused)


def _predicted_counts(predictions: PredictionSummary) -> Figure:
    ranked = list(predictions.predicted.items())
    shown = ranked[:_MAX_MATRIX]
    left = f"The {len(shown)} most frequent of {len(ranked):,} classes." if len(shown) < len(ranked) else ""
    return Figure(
        key="predicted",
        title="Predicted classes",
        picture=bars_by_name([(name, [rows]) for name, rows in shown], ["rows"], "Rows by predicted class"),
        data=dict(shown),
        caption=left,
    )


def _score_histogram(scores: Sequence[int], rows: int) -> Figure:
    shares = [value / max(rows, 1) for value in scores]
    chart = Chart(
        Scale(0.0, 1.0),
        Scale(0.0, max(shares, default=1.0) * 1.05),
        x_label="confidence in the predicted class",
        y_label="share of rows",
    )
    chart.bars(
        (place / len(scores), (place + 1) / len(scores), share, f"{scores[place]:,} rows, {percent(share)}")
        for place, share in enumerate(shares)
    )
    return Figure(
        key="scores",
        title="How sure the model is",
        picture=chart.draw("Histogram of the confidence in the predicted class"),
        data={"bins": len(scores), "rows": list(scores)},
        values=values_table(
            ["confidence from", "to", "rows", "share"],
            [
                [
                    f"{place / len(scores):.2f}",
                    f"{(place + 1) / len(scores):.2f}",
                    count(scores[place]),
                    percent(share),
                ]
                for place, share in enumerate(shares)
            ],
        ),
        caption=f"All {rows:,} rows, labelled or not.",
    )


def _worst(predictions: PredictionSummary) -> Section:
    rows = predictions.wrong
    lead = (
        "Wrong with the highest score. Look for wrong labels, for images of two things, and for what the model cannot"
        " have seen."
        if rows
        else f"None of {count(predictions.labelled)} {judged_rows(predictions)} is wrong."
    )
    if predictions.unknown:
        lead += f" {count(predictions.unknown)} more have one that it does not know, for which no answer is right."
    blocks = [_gallery("worst-errors", f"{len(rows)} rows", rows)] if rows else []
    return Section(key="worst", title="Worst errors", lead=lead, blocks=blocks)


def _gallery(key: str, title: str, rows: Sequence[ShownRow]) -> Gallery:
    return Gallery(
        key=key,
        title=title,
        pictures=[picture(row.image, *_lines(row)) for row in rows],
        data=[row.model_dump(exclude={"image"}) for row in rows],
    )


def _lines(row: ShownRow) -> list[str]:
    said = f"{row.pred_name} {row.score:.3f}"
    if row.label_name is None:
        return [said, row.sample_id]
    true_score = "" if row.true_score is None else f" {row.true_score:.3f}"
    return [f"said {said}", f"true {row.label_name}{true_score}", row.sample_id]


def member_table(members: Sequence[MemberEvaluation], *, key: str, title: str) -> Table:
    """What each member of a committee is worth alone."""
    rows = [
        [
            member.name,
            f"{member.weight:.3f}",
            f"{member.temperature:.2f}",
            percent(member.top1),
            span(member.top1_interval),
            number(member.nll),
        ]
        for member in members
    ]
    return text_table(
        ["member*", "weight", "temperature", "top-1 alone", "95 %", "NLL"],
        rows,
        key=key,
        title=title,
        data=[member.model_dump() for member in members],
    )
