"""The page of an ensemble: who is in it, what each brings, what it costs, and whether its confidence can be trusted."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from convoy.core.metrics import ReliabilityBin
from convoy.pipelines.ensemble_building import EnsembleReport
from convoy.pipelines.ensemble_choice import FrontPoint

# Okabe and Ito's colours, which people with colour blindness tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_GREY = "#8a9196"
_SIZE_INCHES, _DPI = (10.0, 4.2), 110


def draw_ensemble_report(report: EnsembleReport) -> bytes:
    """One HTML file that needs nothing else, for light and dark screens."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=PackageLoader("convoy.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = _short_names(report.candidates)
    environment.filters["percent"] = lambda rate: f"{100 * rate:.2f} %"
    environment.filters["points"] = lambda rate: f"{100 * rate:+.2f}"
    environment.filters["candidate_name"] = lambda place: names[place]
    page = environment.get_template("ensemble.html.j2").render(
        report=report,
        members=_member_rows(report, names),
        shown=[point for point in report.front if point.is_best or point == report.chosen],
        has_money=any(point.usd_per_million is not None for point in report.front),
        pictures={
            "front": _picture(lambda axes: _draw_front(axes, report)),
            "sizes": _picture(lambda axes: _draw_sizes(axes, report.front)),
            "overlap": _picture(lambda axes: _draw_overlap(axes, report.overlap, names)),
            "reliability": _picture(lambda left, right: _draw_reliabilities(left, right, report), num_axes=2),
        },
    )
    return page.encode()


def _member_rows(report: EnsembleReport, names: Sequence[str]) -> list[dict[str, Any]]:
    if not report.members:
        return [
            {"name": names[place], "weight": weight, "temperature": "-"}
            for place, weight in zip(report.chosen.members, report.chosen.weights, strict=True)
        ]
    return [
        {
            "name": member.name,
            "weight": member.weight,
            "temperature": f"{member.temperature:.2f}",
            "top1": member.top1,
            "low": member.top1_interval.low,
            "high": member.top1_interval.high,
            "nll": "-" if member.nll is None else f"{member.nll:.4f}",
        }
        for member in report.members
    ]


def _draw_front(axes: Any, report: EnsembleReport) -> None:
    """Milliseconds an image against validation top-1; points that no cheaper one equals are joined."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    for colour, policy in zip(_COLOURS, dict.fromkeys(point.crops for point in report.front), strict=False):
        points = [point for point in report.front if point.crops is policy]
        axes.plot(
            [1000 / point.images_per_s for point in points],
            [100 * point.top1 for point in points],
            marker="o",
            linestyle="none",
            markersize=5,
            color=colour,
            label=policy.value,
        )
    best = [point for point in report.front if point.is_best]
    axes.plot(
        [1000 / point.images_per_s for point in best],
        [100 * point.top1 for point in best],
        color=_GREY,
        linewidth=1,
        zorder=0,
        drawstyle="steps-post",
    )
    chosen = report.chosen
    axes.plot(
        [1000 / chosen.images_per_s],
        [100 * chosen.top1],
        marker="o",
        markersize=12,
        fillstyle="none",
        color="black",
        linestyle="none",
        label="chosen",
    )
    axes.set_xscale("log")
    # Plain numbers, and enough of them where all points lie within one power of ten.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("milliseconds of network an image")
    axes.set_ylabel("validation top-1, %")
    axes.legend(frameon=False, ncols=2)


def _draw_sizes(axes: Any, front: Sequence[FrontPoint]) -> None:
    """The best validation top-1 of each number of members, by crop policy."""
    for colour, policy in zip(_COLOURS, dict.fromkeys(point.crops for point in front), strict=False):
        best: dict[int, float] = {}
        for point in front:
            if point.crops is policy:
                best[len(point.members)] = max(best.get(len(point.members), 0.0), 100 * point.top1)
        sizes = sorted(best)
        axes.plot(sizes, [best[size] for size in sizes], marker="o", color=colour, label=policy.value)
    axes.set_xticks(sorted({len(point.members) for point in front}))
    axes.set_xlabel("members")
    axes.set_ylabel("validation top-1, %")
    axes.legend(frameon=False)


def _draw_overlap(axes: Any, overlap: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    axes.imshow(overlap, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, values in enumerate(overlap):
        for column, value in enumerate(values):
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=20, ha="right", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.grid(visible=False)


def _draw_reliabilities(left: Any, right: Any, report: EnsembleReport) -> None:
    for axes, title, bins in (
        (left, "before", report.reliability_before),
        (right, "after", report.reliability_after),
    ):
        _draw_reliability(axes, bins)
        axes.set_title(title, fontsize=11)
    left.set_ylabel("accuracy, and share of rows")


def _draw_reliability(axes: Any, bins: Sequence[ReliabilityBin]) -> None:
    """Accuracy against confidence, with the share of rows of each bin as bars behind it (Guo et al. 2017, figure 4)."""
    total = sum(one.num_rows for one in bins) or 1
    known = [one for one in bins if one.accuracy is not None and one.mean_confidence is not None]
    axes.bar(
        [(one.low + one.high) / 2 for one in bins],
        [one.num_rows / total for one in bins],
        width=0.9 / len(bins),
        color="#d7e3ec",
        label="share of rows",
        zorder=0,
    )
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    axes.plot(
        [one.mean_confidence for one in known],
        [one.accuracy for one in known],
        marker="o",
        color=_COLOURS[0],
        label="accuracy",
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.legend(frameon=False, loc="upper left")


def _picture(draw: Callable[..., None], *, num_axes: int = 1) -> str:
    """A PNG as a data URI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, num_axes, place + 1) for place in range(num_axes)]
    for one in axes:
        one.grid(alpha=0.3)
    draw(*axes)
    buffer = io.BytesIO()
    # Not savefig: the size must not hang on the reader's matplotlibrc.
    canvas.print_png(buffer)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _short_names(candidates: Sequence[str]) -> list[str]:
    """Bundles without their digests, where that keeps them apart."""
    short = [name.partition("@")[0] for name in candidates]
    return short if len(set(short)) == len(short) else list(candidates)
