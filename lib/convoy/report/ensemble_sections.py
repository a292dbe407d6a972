"""Sections about an ensemble: who is in it, what each brings, what it costs, whether its confidence can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from convoy.core.statistics import Interval
from convoy.pipelines.ensemble_building import EnsembleReport
from convoy.pipelines.ensemble_choice import FrontPoint
from convoy.pipelines.ensemble_gate import GateReport
from convoy.report.blocks import (
    Block,
    Figure,
    Section,
    Table,
    Tile,
    text_table,
    values_table,
)
from convoy.report.figures import overlap_matrix
from convoy.report.quality_sections import member_table, reliability_figure
from convoy.report.svg import Chart, Scale, percent_text
from convoy.report.words import number, percent, points, short_bundle_names, span


def ensemble_tiles(report: EnsembleReport) -> list[Tile]:
    """Top-1, gain and cost."""
    gain, chosen = report.gain_interval, report.chosen
    return [
        Tile(percent(report.measured.top1), "top-1 of the ensemble"),
        Tile(percent(report.measured.best_single_top1), "top-1 of the best single member, same crops"),
        Tile(points(report.gain), f"points gained, 95 %: {points(gain.low)} to {points(gain.high)}"),
        Tile(f"{chosen.passes_per_image}", f"network passes an image, {chosen.images_per_s:.1f} images/s"),
    ]


def ensemble_lead(report: EnsembleReport) -> str:
    """What was chosen on which rows."""
    rows = f"{report.measured.num_rows} rows that chose nothing ({report.measured.rows})"
    if report.is_cross_fitted:
        rows = (
            f"{report.measured.num_rows} rows ({report.measured.rows}), each by an ensemble that was chosen without it;"
            " single models may have been chosen by it"
        )
    return (
        f"{len(report.chosen.members)} of {len(report.candidates)} candidates, crops {report.crops.value}."
        f" Members, weights and crops were chosen on validation rows; its figures are of {rows}."
    )


def ensemble_sections(report: EnsembleReport) -> Iterator[Section]:
    """All that is known of an ensemble."""
    names = short_bundle_names(report.candidates)
    test = report.measured.mcnemar
    yield Section(
        key="members",
        title="Members",
        lead=f"McNemar, mid-p {test.mid_p:.2g}: {test.only_first_correct} rows only the ensemble gets right,"
        f" {test.only_second_correct} only the single member.",
        blocks=[_member_table(report, names)],
    )
    yield Section(
        key="gains",
        title="What crops and members give",
        lead=""
        if report.by_size
        else "Without a test split no figures by crops and by number of members are of untouched rows: each part of the"
        " validation rows was predicted by an ensemble of its own.",
        blocks=list(_gains(report)),
    )
    yield Section(
        key="front",
        title="Accuracy against cost",
        lead="Every set of candidates that was compared on validation rows, at every crop policy. The table has those"
        " that no cheaper one equals, and the chosen one: that with the best objective within the budget. Images/s and"
        " money are estimates for the whole cluster: each trial was timed on its share of it.",
        blocks=[_front_figure(report, names), _front_table(report, names)],
    )
    yield Section(
        key="overlap",
        title="Do they err together?",
        lead="Of the rows that either of two candidates gets wrong, the share that both get wrong: the smaller, the"
        " more they help each other.",
        blocks=[_overlap_figure(report, names)],
    )
    yield _calibration(report)
    if report.gate is not None:
        yield _gate(report.gate, report.measured.rows)


def _measured_rate(report: EnsembleReport) -> str:
    """How fast the chosen ensemble was on the test rows, which had the cluster to themselves."""
    estimated, measured = (
        report.chosen.images_per_s,
        report.evaluation and report.evaluation.cost.images_per_s,
    )
    return (
        f"The chosen one is estimated at {estimated:.1f} images/s; on test it ran at {measured:.1f}."
        if measured
        else ""
    )


def _member_table(report: EnsembleReport, names: Sequence[str]) -> Table:
    if report.members:
        return member_table(report.members, key="ensemble-members", title="Members alone")
    alone = {
        point.members[0]: point
        for point in report.front
        if len(point.members) == 1 and point.crops is report.crops
    }
    pairs = list(zip(report.chosen.members, report.chosen.weights, strict=True))
    rows = [
        [
            names[place],
            f"{weight:.3f}",
            percent(alone[place].top1),
            span(alone[place].top1_interval),
            number(alone[place].nll),
        ]
        for place, weight in pairs
    ]
    return text_table(
        ["member*", "weight", "val top-1 alone", "95 %", "val NLL"],
        rows,
        key="ensemble-members",
        title="Members alone",
        data=[
            {"name": names[place], "weight": weight, "alone": alone[place].model_dump(mode="json")}
            for place, weight in pairs
        ],
        caption="On validation rows, which chose the members, so the figures flatter.",
    )


def _gains(report: EnsembleReport) -> Iterator[Block]:
    yield _size_figure(report)
    if report.by_crops:
        yield text_table(
            [
                "crops*",
                "passes an image",
                "images/s",
                "ensemble",
                "95 %",
                "best single",
                "gain, points",
                "95 %",
            ],
            [
                [
                    row.crops.value,
                    f"{row.passes_per_image}",
                    "" if row.images_per_s is None else f"{row.images_per_s:.1f}",
                    percent(row.top1),
                    _span(row.top1_interval),
                    percent(row.best_single_top1),
                    points(row.top1 - row.best_single_top1),
                    _points_span(row.gain),
                ]
                for row in report.by_crops
            ],
            chosen=[place for place, row in enumerate(report.by_crops) if row.crops is report.crops],
            key="by-crops",
            title="What the crops give and cost",
            data=[row.model_dump(mode="json") for row in report.by_crops],
        )
    if report.by_size:
        single = report.measured.best_single_top1
        rows = [
            [
                f"{row.num_members}",
                f"{row.passes_per_image}",
                percent(row.top1),
                _span(row.top1_interval),
                points(row.top1 - single),
                _points_span(row.gain),
            ]
            for row in report.by_size
        ]
        yield text_table(
            [
                "members with the largest weights",
                "passes an image",
                "top-1",
                "95 %",
                "against the best single, points",
                "95 %",
            ],
            rows,
            chosen=[len(rows) - 1],
            key="by-size",
            title="Gain by number of members",
            data=[row.model_dump(mode="json") for row in report.by_size],
            caption=f"On rows of {report.measured.rows}.",
        )


def _front_figure(report: EnsembleReport, names: Sequence[str]) -> Figure:
    """Milliseconds an image against validation top-1; points that no cheaper one equals are joined."""
    front = report.front
    chart = Chart(
        Scale.around([_ms(point) for point in front], is_log=True),
        Scale.around([point.top1 for point in front]),
        x_label="milliseconds an image",
        y_label="validation top-1",
        y_text=percent_text,
    )
    best = sorted((_ms(point), point.top1) for point in front if point.is_best)
    if best:
        chart.line(best, 0, steps=True, name="no cheaper one is as good")
    for number_, policy in enumerate(dict.fromkeys(point.crops for point in front)):
        marks = [
            (_ms(point), point.top1, f"{_members(point, names)}, {percent(point.top1)}, {_ms(point):.3g} ms")
            for point in front
            if point.crops is policy
        ]
        chart.dots(marks, number_, name=policy.value)
    chart.ring(_ms(report.chosen), report.chosen.top1)
    return Figure(
        key="cost-front",
        title="Cost front",
        picture=chart.draw("Validation top-1 against the cost of an image of all compared ensembles"),
        data=[point.model_dump(mode="json") for point in front],
        caption="The ring is the chosen one.",
        is_wide=True,
        values=values_table(
            ["members*", "crops*", "milliseconds an image", "val top-1"],
            [
                [_members(point, names), point.crops.value, f"{_ms(point):.3g}", percent(point.top1)]
                for point in sorted(front, key=_ms)
            ],
        ),
    )


def _front_table(report: EnsembleReport, names: Sequence[str]) -> Table:
    shown = [point for point in report.front if point.is_best or point == report.chosen]
    has_money = any(point.usd_per_million is not None for point in report.front)
    rows = [
        [
            _members(point, names),
            point.crops.value,
            percent(point.top1),
            span(point.top1_interval),
            number(point.nll),
            f"{point.passes_per_image}",
            f"{point.images_per_s:.1f}",
            *([f"{point.usd_per_million:.2f}"] if point.usd_per_million is not None else ()),
        ]
        for point in shown
    ]
    money = ["USD a million"] if has_money else []
    columns = ["members*", "crops*", "val top-1", "95 %", "val NLL", "passes", "images/s", *money]
    return text_table(
        columns,
        rows,
        chosen=[place for place, point in enumerate(shown) if point == report.chosen],
        key="front-table",
        title="Points of the front",
        data=[point.model_dump(mode="json") for point in shown],
        caption=_measured_rate(report),
    )


def _size_figure(report: EnsembleReport) -> Figure:
    """The best validation top-1 of each number of members, by crop policy."""
    best: dict[str, dict[int, float]] = {}
    for point in report.front:
        sizes = best.setdefault(point.crops.value, {})
        sizes[len(point.members)] = max(sizes.get(len(point.members), 0.0), point.top1)
    known = sorted({members for sizes in best.values() for members in sizes})
    chart = Chart(
        Scale(known[0] - 0.5, known[-1] + 0.5),
        Scale.around([top1 for sizes in best.values() for top1 in sizes.values()]),
        x_label="members",
        y_label="validation top-1",
        y_text=percent_text,
        x_ticks=[float(members) for members in known],
    )
    for number_, (policy, sizes) in enumerate(best.items()):
        chart.line(sorted(sizes.items()), number_, name=policy)
        chart.dots(
            [(size, top1, f"{size} members, {policy}: {percent(top1)}") for size, top1 in sizes.items()],
            number_,
        )
    return Figure(
        key="sizes-front",
        title="The best of each number of members, on validation rows",
        picture=chart.draw("Validation top-1 by number of members, a line for each crop policy"),
        data=best,
        caption="These rows chose the members, so the figures flatter.",
        values=values_table(
            ["crops*", "members", "val top-1"],
            [
                [policy, f"{size}", percent(top1)]
                for policy, sizes in best.items()
                for size, top1 in sorted(sizes.items())
            ],
        ),
    )


def _overlap_figure(report: EnsembleReport, names: Sequence[str]) -> Figure:
    return Figure(
        key="overlap",
        title="Error overlap",
        picture=overlap_matrix(
            [f"{place + 1} {name}" for place, name in enumerate(names)], report.overlap, "Error overlaps"
        ),
        data={"candidates": report.candidates, "overlap": report.overlap},
        is_wide=True,
    )


def _calibration(report: EnsembleReport) -> Section:
    whole = f", {report.temperature:.3f}," if report.members else ""
    return Section(
        key="ensemble-calibration",
        title="Calibration of the ensemble",
        lead=f"Before and after the temperature of the whole{whole} on rows that did not fit it"
        f" ({report.measured.rows}).",
        blocks=[
            reliability_figure("reliability-before", "Before", report.reliability_before),
            reliability_figure("reliability-after", "After", report.reliability_after),
        ],
    )


def _gate(gate: GateReport, rows_name: str) -> Section:
    rows = []
    for row in gate.curve:
        cells = [percent(row.target_agreement), percent(row.val_agreement), f"{row.val_passes_per_image:.2f}"]
        if (outcome := row.untouched) is not None:
            cells += [
                percent(outcome.agreement),
                f"{outcome.passes_per_image:.2f}",
                f"{outcome.speedup:.1f} times",
                points(outcome.top1_change),
            ]
        rows.append(cells)
    columns = ["wanted agreement", "on val", "passes"]
    is_measured = gate.untouched is not None
    columns += [f"on {rows_name}", "passes", "fewer passes", "top-1, points"] if is_measured else []
    beside = f"; beside it stands what they held on {rows_name}" if is_measured else ""
    return Section(
        key="gate",
        title="Gated mode",
        lead="A cheap look at the image comes first, and the whole ensemble where that is not sure. Thresholds hold"
        f" an agreement with the whole ensemble on validation rows that did not choose the looks{beside}.",
        blocks=[
            text_table(
                columns,
                rows,
                chosen=[
                    place
                    for place, row in enumerate(gate.curve)
                    if row.target_agreement == gate.target_agreement
                ],
                key="gate",
                title="Agreements",
                data=gate.model_dump(mode="json"),
            )
        ],
    )


def _span(interval: Interval | None) -> str:
    return "-" if interval is None else span(interval)


def _points_span(interval: Interval | None) -> str:
    return "-" if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def _ms(point: FrontPoint) -> float:
    return 1000 / point.images_per_s


def _members(point: FrontPoint, names: Sequence[str]) -> str:
    return ", ".join(names[place] for place in point.members)
