"""Advice as a terminal shows it, and what it has in words in common with its page."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from convoy.core.statistics import Interval
from convoy.pipelines.advise_data import Resolution
from convoy.pipelines.advise_report import AdviceReport, MoreData, Verification
from convoy.pipelines.advise_strategies import StrategyCost
from convoy.report.hidden_characters import with_codes
from convoy.report.words import count, duration, percent, span


def print_advice(report: AdviceReport, *, workspace: str | None) -> None:
    """Print what to do, all strategies in order, what to collect, and where the whole evidence is."""
    console = Console(markup=False, highlight=False)
    summary = Table(show_header=False, box=None, pad_edge=False)
    summary.add_column(style="bold")
    summary.add_column(overflow="fold")
    for name, words in _facts(report):
        summary.add_row(name, with_codes(words))
    console.print(summary)
    console.print(_strategies(report))
    where = "" if workspace is None else f" --workspace {workspace}"
    console.print(f"All of the evidence: convoy report {report.run}{where}", soft_wrap=True)


def cost_span(cost: StrategyCost) -> str:
    """From when to when a training is done, and its money where a price was given."""
    money = "" if cost.money is None else f", {cost.money:.2f} in money"
    return f"{time_span(cost)}{money}"


def time_span(cost: StrategyCost) -> str:
    """From when to when a training is done."""
    return f"{duration(cost.low_s)} to {duration(cost.high_s)}"


def resolution_words(found: Resolution | None) -> str:
    """Sizes of the images that were measured."""
    if found is None:
        return "no image could be measured"
    return (
        f"median {found.median_width_px:,.0f} x {found.median_height_px:,.0f} px, sides {found.smallest_side_px:,} to"
        f" {found.largest_side_px:,} px, of {count(found.images)} training images"
    )


def images_for_wanted(found: MoreData) -> tuple[str, str] | None:
    """What is wanted, and the images of the largest class that it needs; None where nothing is."""
    if found.wanted_top1 is None:
        return None
    if found.curve is None:
        needed = "not known"
    elif found.images_needed is None:
        needed = "no forecast reaches it"
    else:
        needed = f"{found.images_needed:,.0f} images of the largest class{_limits(found)}"
    return f"for {percent(found.wanted_top1)}", needed


def _limits(found: MoreData) -> str:
    """The limits of the images that are needed; nothing where a report tells none."""
    needed = found.needed
    if needed is None or needed.low is None:
        return ""
    return f", {needed.low:,.0f} " + ("or more" if needed.high is None else f"to {needed.high:,.0f}")


def verified(found: Verification) -> str:
    """What was best at the small budget, how sure that is, and that the advice is about another one."""
    return (
        f"At {found.images_per_class} images a class and {found.epochs} epochs the best of {len(found.runs)} was"
        f" {found.best.value}; the advice stayed {100 * found.regret:.2f} points behind it."
        f"{_against_others(found.difference)}{_not_run(found.left_out)}"
        " The advice answers another question, about all images and epochs: what it expects is no forecast of a top-1"
        " at this budget, and more images may change the order."
    )


def _facts(report: AdviceReport) -> Iterator[tuple[str, str]]:
    like, more = report.similarity, report.more_data
    yield "advised", report.advised
    yield "its config", report.strategies[0].config
    yield "rule of thumb", f"{report.rule.strategy.value}: {report.rule.says}"
    yield "pretraining data", f"{like.verdict.value}, dissimilarity {like.dissimilarity:.2f}"
    yield "more data", f"{more.advice.value}: {more.why}"
    for one in more.advised:
        yield f"  {one.factor:g} x the images", f"{percent(one.top1.estimate)}, {span(one.top1)}"
    if (wanted := images_for_wanted(more)) is not None:
        yield f"  {wanted[0]}", wanted[1]
    if report.verification is not None:
        yield "verified", verified(report.verification)
    yield "resolution", resolution_words(report.size.resolution)
    for warning in report.size.warnings:
        yield "mend first", warning
    for note in report.notes:
        yield "note", note
    yield "looked for", duration(report.seconds)


def _strategies(report: AdviceReport) -> Table:
    table = Table(title="Strategies, best first; their configs lie beside that one", title_justify="left")
    for column in ("rank", "strategy", "backbone", "top-1", "95 %", "training"):
        table.add_column(column, overflow="fold")
    for one in report.strategies:
        table.add_row(
            f"{one.rank}",
            one.strategy.value,
            with_codes(one.backbone),
            percent(one.expected_top1),
            span(one.interval),
            cost_span(one.cost),
        )
    return table


def _against_others(difference: Interval | None) -> str:
    if difference is None:
        return ""
    return (
        f" The best of the others less the advised one: {100 * difference.low:+.2f} to {100 * difference.high:+.2f}"
        " points, paired by row."
    )


def _not_run(options: int | None) -> str:
    return f" {options} further options of the advice were not run." if options else ""
