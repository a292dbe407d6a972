"""The section about the retrainings of a model: how new data drifted, and what was decided, date by date."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from convoy.pipelines.retrain_config import RetrainReport, StepResult
from convoy.report.blocks import (
    Block,
    Cell,
    Column,
    Figure,
    Notes,
    Row,
    Section,
    Table,
    text_table,
    values_table,
)
from convoy.report.svg import Chart, Scale
from convoy.report.words import count, number, points


def retrains_section(retrains: Sequence[RetrainReport]) -> Section:
    """How new data drifted, date by date, and what was decided."""
    blocks: list[Block] = []
    drifts = [one for one in retrains if one.data is not None]
    if drifts:
        blocks += [_drift_figure(drifts), _champion_figure(drifts)]
    blocks.append(_decision_table(retrains))
    latest = retrains[-1]
    steps = [step for step in latest.steps if step.evidence is not None]
    blocks += [_gate_table(number, step) for number, step in enumerate(steps)]
    notes = [
        *(latest.data.objections if latest.data else ()),
        *(latest.data.notes if latest.data else ()),
        *latest.notes,
    ]
    if notes:
        blocks.append(Notes(title=f"Found on {latest.date}", texts=notes))
    return Section(
        key="drift",
        title="Retrainings and drift",
        lead=f"{len(retrains)} dates; the last, {latest.date}: {latest.decision.value}. {latest.reason}",
        blocks=blocks,
    )


def _drift_figure(retrains: Sequence[RetrainReport]) -> Figure:
    data = []
    for one in retrains:
        assert one.data is not None
        shift = one.data.embedding_shift
        data.append(
            {
                "date": one.date,
                "class_shift": one.data.class_shift,
                "embedding_shift": None if shift is None else shift.shift,
                "by_chance": None if shift is None else shift.by_chance,
            }
        )
    lines = [
        ("embedding_shift", "embeddings"),
        ("by_chance", "embeddings, by chance alone"),
        ("class_shift", "classes"),
    ]
    return Figure(
        key="drift",
        title="How far new rows lie from old ones",
        picture=_over_dates(data, lines, "shift", "Shifts of embeddings and classes over the dates"),
        data=data,
        values=_by_date(data, lines),
        caption="Embeddings: Fréchet distance in spreads of old rows. Classes: total variation, from 0 to 1.",
    )


def _champion_figure(retrains: Sequence[RetrainReport]) -> Figure:
    data = []
    for one in retrains:
        evidence = one.steps[-1].evidence if one.steps else None
        assert one.data is not None
        data.append(
            {
                "date": one.date,
                "champion_on_new_rows": one.data.champion_top1,
                "candidate_on_holdout": None if evidence is None else evidence.holdout.top1[0],
                "champion_on_holdout": None if evidence is None else evidence.holdout.top1[1],
            }
        )
    lines = [
        ("champion_on_new_rows", "champion, new rows"),
        ("champion_on_holdout", "champion, holdout"),
        ("candidate_on_holdout", "candidate, holdout"),
    ]
    return Figure(
        key="champion",
        title="Top-1 over the dates",
        picture=_over_dates(data, lines, "top-1", "Top-1 of champion and candidate over the dates"),
        data=data,
        values=_by_date(data, lines),
    )


def _by_date(data: Sequence[Mapping[str, Any]], lines: Sequence[tuple[str, str]]) -> Table:
    return values_table(
        ["date*", *(name for _, name in lines)],
        [[one["date"], *(number(one[field]) for field, _ in lines)] for one in data],
    )


def _over_dates(
    data: Sequence[Mapping[str, Any]], lines: Sequence[tuple[str, str]], y_label: str, description: str
) -> Markup:
    known = [one[field] for one in data for field, _ in lines if one[field] is not None]
    step = max(1, math.ceil(len(data) / 6))
    chart = Chart(
        Scale(-0.5, len(data) - 0.5),
        Scale.around(known, floor=0.0),
        x_label="date",
        y_label=y_label,
        x_text=lambda place: str(data[int(place)]["date"]),
        x_ticks=[float(place) for place in range(0, len(data), step)],
    )
    for place, (field, name) in enumerate(lines):
        found = [
            (day, one[field], f"{one['date']}: {one[field]:.4f}")
            for day, one in enumerate(data)
            if one[field] is not None
        ]
        if found:
            chart.line([(day, value) for day, value, _ in found], place, name=name)
            chart.dots(found, place, radius=3.5)
    return chart.draw(description)


def _decision_table(retrains: Sequence[RetrainReport]) -> Table:
    rows = []
    for one in reversed(retrains):
        new = one.data
        rows.append(
            [
                one.date,
                one.decision.value,
                "-" if new is None else count(new.rows),
                "-" if new is None else f"{new.class_shift:.3f}",
                "-" if new is None or new.embedding_shift is None else f"{new.embedding_shift.shift:.3f}",
                count(one.recomputed),
                one.reason,
            ]
        )
    columns = ["date*", "decision*", "new rows", "class shift", "embedding shift", "recomputed", "why*"]
    data = [one.model_dump(mode="json") for one in retrains]
    return text_table(columns, rows, key="decisions", title="Decisions, the newest first", data=data)


def _gate_table(number: int, step: StepResult) -> Table:
    assert step.evidence is not None
    difference = step.evidence.holdout.difference
    return Table(
        key=f"gate-{number}",
        title=f"Gate of step {step.step}",
        columns=[
            Column("check", is_text=True),
            Column("found"),
            Column("limit"),
            Column("passed"),
            Column("in words", is_text=True),
        ],
        rows=[
            Row(
                (
                    Cell(check.name),
                    Cell(f"{check.found:+.4f}"),
                    Cell(f"{check.limit:+.4f}"),
                    Cell("yes" if check.passed else "no"),
                    Cell("" if check.passed else check.text),
                ),
                is_chosen=not check.passed,
            )
            for check in step.evidence.checks
        ],
        data=step.evidence.model_dump(mode="json"),
        caption=f"Candidate less champion on {step.evidence.holdout.rows:,} holdout rows: {points(difference.estimate)}"
        f" points ({points(difference.low)} to {points(difference.high)}).",
    )
