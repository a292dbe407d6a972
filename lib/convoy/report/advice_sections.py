"""Sections of advice: strategies, evidence of likeness, more data, what backbones cost, what augmentation does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from convoy.pipelines.advise_report import AdviceReport, MoreData, Similarity, Verification
from convoy.pipelines.advise_strategies import StrategyAdvice
from convoy.report.advice_text import cost_span, images_for_wanted, time_span, verified
from convoy.report.blocks import (
    Block,
    Facts,
    Figure,
    Notes,
    Section,
    Table,
    Tile,
    text_table,
    values_table,
)
from convoy.report.effect_sections import effect_section
from convoy.report.front_blocks import front_blocks
from convoy.report.html import breakable
from convoy.report.soundness_sections import soundness_section
from convoy.report.svg import Chart, Scale, number_text, percent_text
from convoy.report.words import duration, number, percent, span

_STEPS = 60


def advice_tiles(report: AdviceReport) -> list[Tile]:
    """What to do, what it is expected to be worth, and what it costs."""
    first = report.strategies[0]
    return [
        Tile(_name(first), f"is advised, on {first.backbone}"),
        Tile(percent(first.expected_top1), f"expected top-1, 95 %: {span(first.interval)}"),
        Tile(duration(first.cost.seconds), f"of training, {cost_span(first.cost)}"),
        Tile(report.more_data.advice.value, f"more data: {report.more_data.why}"),
    ]


def advice_sections(report: AdviceReport) -> Iterator[Section]:
    """The advice and what it rests on."""
    yield _strategies(report)
    yield _rule(report)
    yield _more_data(report.more_data)
    if report.cost_fronts:
        yield Section(
            key="backbones",
            title="Accuracy against cost",
            lead="Backbones on your own images and machine, in the form of Canziani, Paszke and Culurciello (2016): the"
            " larger the bubble, the more parameters. No cheaper one is as good as those on the line.",
            blocks=list(front_blocks(report.cost_fronts, report.costs, _candidates(report))),
        )
    if report.augmentation_effect is not None:
        yield effect_section(report.augmentation_effect)
    yield soundness_section(report.size)
    if report.verification is not None:
        yield _verification(report.verification)
    if report.notes:
        yield Section(key="advice-notes", title="Notes", blocks=[Notes(texts=report.notes)])


def _strategies(report: AdviceReport) -> Section:
    ranked = report.strategies
    chart = Chart(
        Scale.around([max(one.cost.seconds, 1e-3) for one in ranked], is_log=True),
        Scale.around([value for one in ranked for value in (one.interval.low, one.interval.high)]),
        x_label="seconds of training and computing features",
        y_label="expected top-1",
        y_text=percent_text,
    )
    names = list(dict.fromkeys(one.strategy.value for one in ranked))
    for place, name in enumerate(names):
        some = [one for one in ranked if one.strategy.value == name]
        chart.whiskers([(_cost(one), one.interval.low, one.interval.high) for one in some], place)
        chart.dots([(_cost(one), one.expected_top1, _title(one)) for one in some], place, name=name, radius=5)
    chart.ring(_cost(ranked[0]), ranked[0].expected_top1, radius=10)
    figure = Figure(
        key="strategies",
        title="Expected top-1 against cost",
        picture=chart.draw("Expected top-1 of each strategy against its training time"),
        data=[one.model_dump(mode="json") for one in ranked],
        caption="The ring is what is advised. Lines are 95 % intervals: wide where nothing but a prior is known.",
        is_wide=True,
    )
    return Section(
        key="advice",
        title="Strategies",
        lead=ranked[0].why,
        blocks=[figure, _strategy_table(ranked), _reasons_table(ranked)],
    )


def _strategy_table(ranked: Sequence[StrategyAdvice]) -> Table:
    has_price = any(one.cost.money is not None for one in ranked)
    columns = ["rank", "strategy*", "backbone*", "tap*", "expected", "95 %", "basis*", "time"]
    columns += ["money"] if has_price else []
    rows = [
        [
            f"{one.rank}",
            _name(one),
            breakable(one.backbone),
            one.tap or "",
            percent(one.expected_top1),
            span(one.interval),
            one.basis.value,
            time_span(one.cost),
            *([number(one.cost.money, 2)] if has_price else ()),
        ]
        for one in ranked
    ]
    return text_table(
        columns,
        rows,
        chosen=[0],
        key="strategy-table",
        title="All strategies, in order",
        data=[one.model_dump(mode="json") for one in ranked],
    )


def _reasons_table(ranked: Sequence[StrategyAdvice]) -> Table:
    rows = [[f"{one.rank}", _name(one), one.why, one.config.rpartition("/")[2]] for one in ranked]
    return text_table(
        ["rank", "strategy*", "why*", "config*"],
        rows,
        folded="Why, and by which config",
        caption="Configs lie in the folder configs of the run, ready for convoy train.",
    )


def _rule(report: AdviceReport) -> Section:
    rule, likeness = report.rule, report.similarity
    rows = [
        ("the rule of thumb says", f"{rule.strategy.value}: {rule.says}"),
        (
            "size",
            f"{rule.size.value}: {rule.images_per_class:.4g} images a class, small is below {rule.small_below:.4g}",
        ),
        (
            "likeness",
            f"{rule.likeness.value}: dissimilarity {rule.dissimilarity:.3f}, similar is below {rule.similar_below:.3f}",
        ),
        ("best depth", f"{likeness.peak_tap}, top-1 {percent(likeness.peak_top1.estimate)}"),
        ("top", f"top-1 {percent(likeness.top_top1.estimate)}"),
        ("best of random weights", f"top-1 {percent(likeness.untrained_top1.estimate)}"),
        ("nearest neighbours", f"top-1 {percent(likeness.knn_top1)}"),
    ]
    distance = likeness.domain_distance
    if distance is not None:
        rows.append(
            (
                "distance to the pretraining domain",
                f"{distance.relative:.3f} of its variance ({distance.reference})",
            )
        )
        if distance.relative_at_half is not None:
            rows.append(
                (
                    "the same to half of its images",
                    f"{distance.relative_at_half:.3f}; from the other half, which is of that domain,"
                    f" {distance.within_reference:.3f}",
                )
            )
    # Probes are the data of the figure below.
    measured = likeness.model_dump(mode="json", exclude={"probes", "untrained"})
    facts = Facts(
        key="rule",
        title="The four scenarios, measured",
        rows=rows,
        data={**rule.model_dump(mode="json"), "similarity": measured},
    )
    return Section(
        key="likeness",
        title="Likeness to the pretraining data",
        blocks=[facts, _depths(likeness), _probes(likeness)],
    )


def _depths(likeness: Similarity) -> Figure:
    """Where in the networks usefulness peaks."""
    shown = [*likeness.probes, likeness.untrained]
    values = [value for one in shown for tap in one.taps for value in (tap.top1.low, tap.top1.high)]
    chart = Chart(
        Scale(-0.03, 1.03),
        Scale.around(values),
        x_label="depth: 0 is the stem, 1 the logits",
        y_label="top-1 of a linear probe",
        y_text=percent_text,
        x_ticks=[0.0, 0.25, 0.5, 0.75, 1.0],
    )
    for place, one in enumerate(shown):
        name = one.backbone if one is not likeness.untrained else f"{one.backbone}, random weights"
        taps = sorted(one.taps, key=lambda tap: tap.depth)
        chart.whiskers([(tap.depth, tap.top1.low, tap.top1.high) for tap in taps], place)
        chart.line([(tap.depth, tap.top1.estimate) for tap in taps], place)
        marks = [(tap.depth, tap.top1.estimate, f"{tap.tap}: {percent(tap.top1.estimate)}") for tap in taps]
        chart.dots(marks, place, name=name)
    return Figure(
        key="depths",
        title="How useful each depth is",
        picture=chart.draw("Top-1 of linear probes by depth of the network"),
        data=[one.model_dump(mode="json") for one in shown],
        is_wide=True,
    )


def _probes(likeness: Similarity) -> Table:
    rows = [
        [
            one.backbone,
            tap.tap,
            f"{tap.depth:.2f}",
            percent(tap.top1.estimate),
            span(tap.top1),
            percent(tap.knn_top1),
            number(tap.logme, 3),
        ]
        for one in [*likeness.probes, likeness.untrained]
        for tap in one.taps
    ]
    columns = ["backbone*", "tap*", "depth", "probe top-1", "95 %", "neighbours top-1", "LogME"]
    return text_table(columns, rows, folded="All probes, with neighbours and LogME beside them")


def _more_data(found: MoreData) -> Section:
    facts = [("advice", found.advice.value), ("why", found.why)]
    if (wanted := images_for_wanted(found)) is not None:
        facts.append(wanted)
    blocks: list[Block] = []
    if found.curve is not None:
        blocks.append(_learning_curve(found))
    blocks.append(
        Facts(key="more-data", title="Collect more?", rows=facts, data=found.model_dump(mode="json"))
    )
    return Section(key="more", title="More data", blocks=blocks)


def _learning_curve(found: MoreData) -> Figure:
    """Measured points, the law through them, and the forecasts with their intervals."""
    curve = found.curve
    assert curve is not None
    forecast = curve.forecast
    sizes = [point.images_per_class for point in curve.points]
    sizes += [one.images_per_class for one in forecast] + [one.images_per_class for one in found.advised]
    tops = [point.top1 for point in curve.points]
    limits = [one.top1 for one in forecast] + [one.top1 for one in found.advised]
    chart = Chart(
        Scale.around(sizes, is_log=True, margin=0.04),
        Scale.around([*tops, *(value for one in limits for value in (one.low, one.high))]),
        x_label="images of the largest class",
        y_label="top-1",
        y_text=percent_text,
        x_text=lambda value: number_text(round(value, 1)),
    )
    if len(forecast) > 1:
        chart.band([(one.images_per_class, one.top1.low, one.top1.high) for one in forecast], 0)
    first, last = min(sizes), max(sizes)
    steps = [first * (last / first) ** (step / _STEPS) for step in range(_STEPS + 1)]
    chart.line([(n, curve.law.top1(n)) for n in steps], 0, name="best probe: the law, with 95 %")
    chart.dots(
        [
            (one.images_per_class, one.top1, f"{one.images_per_class:g} images: {percent(one.top1)}")
            for one in curve.points
        ],
        0,
    )
    advised = found.advised
    chart.whiskers([(one.images_per_class, one.top1.low, one.top1.high) for one in advised], 1)
    marks = [
        (
            one.images_per_class,
            one.top1.estimate,
            f"{one.factor:g} times the images: {percent(one.top1.estimate)}, {span(one.top1)}",
        )
        for one in advised
    ]
    chart.dots(marks, 1, name=f"{found.strategy.value}, expected")
    return Figure(
        key="learning-curve",
        title="What more images would bring",
        picture=chart.draw("Top-1 against images of the largest class: measured, fitted, and forecast"),
        data={
            "measured": [one.model_dump() for one in curve.points],
            "law": curve.law.model_dump(),
            "forecast": [one.model_dump() for one in forecast],
            "advised": [one.model_dump() for one in advised],
        },
        values=_curve_values(found),
        caption="error = floor + scale x images ^ -exponent, fitted to the measured points (Hestness et al. 2017).",
        is_wide=True,
    )


def _curve_values(found: MoreData) -> Table:
    curve = found.curve
    assert curve is not None
    measured = [[f"{one.images_per_class:g}", "measured", percent(one.top1), "-"] for one in curve.points]
    expected = [
        [f"{one.images_per_class:g}", source, percent(one.top1.estimate), span(one.top1)]
        for source, points in (
            ("the law", curve.forecast),
            (f"{found.strategy.value}, expected", found.advised),
        )
        for one in points
    ]
    return values_table(["images of the largest class", "source*", "top-1", "95 %"], [*measured, *expected])


def _verification(found: Verification) -> Section:
    rows = [
        [
            f"{one.rank}",
            one.strategy.value,
            one.backbone,
            percent(one.expected_top1),
            percent(one.top1.estimate),
            span(one.top1),
            duration(one.seconds),
        ]
        for one in found.runs
    ]
    columns = [
        "advised rank", "strategy*", "backbone*", "expected of all images", "top-1 at the budget", "95 %", "took",
    ]  # fmt: skip
    table = text_table(columns, rows, key="verification", title="Runs", data=found.model_dump(mode="json"))
    return Section(
        key="verification",
        title="Verified",
        lead=verified(found),
        blocks=[table],
    )


def _candidates(report: AdviceReport) -> list[str]:
    """The names of the backbones, in the order of the costs."""
    return [one.backbone for one in report.similarity.probes]


def _name(one: StrategyAdvice) -> str:
    return one.strategy.value.replace("_", " ")


def _cost(one: StrategyAdvice) -> float:
    return max(one.cost.seconds, 1e-3)


def _title(one: StrategyAdvice) -> str:
    return (
        f"{one.strategy.value} on {one.backbone}: {percent(one.expected_top1)}, {duration(one.cost.seconds)}"
    )
