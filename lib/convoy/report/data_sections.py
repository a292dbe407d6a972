"""Sections about data: the data card, the augmentation sheet, and the rows that could not be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from convoy.core.config import write_settings
from convoy.core.records import Split
from convoy.pipelines.report_data_card import ClassRows, DataCard, FoundDuplicates
from convoy.pipelines.report_rejects import RejectSummary
from convoy.pipelines.report_sheet import AugmentationSheet
from convoy.report.blocks import (
    Block,
    Code,
    Facts,
    Figure,
    Gallery,
    Notes,
    Section,
    Sheet,
    Table,
    text_table,
    values_table,
)
from convoy.report.duplicate_blocks import equal_groups
from convoy.report.figures import bars_by_name
from convoy.report.svg import Chart, Scale
from convoy.report.words import count, picture, size

_MAX_BARS = 40
_MAX_CLASS_ROWS = 2000


def data_card_section(card: DataCard) -> Section:
    """Classes, splits, sizes, duplicates and examples of a version of a dataset."""
    version = "the current version" if card.is_current else "no longer the current version"
    return Section(
        key="data",
        title="Data card",
        lead=f"Dataset {card.name}, {version}.",
        blocks=[_facts(card), *_class_blocks(card), *_size_figure(card), *_findings(card), *_examples(card)],
    )


def sheet_section(sheet: AugmentationSheet) -> Section:
    """Images as evaluation and as the policy shows them."""
    shown = Sheet(
        key="augmentation",
        title="Augmentation sheet",
        columns=sheet.columns,
        rows=[(line.label, [picture(image) for image in line.images]) for line in sheet.lines],
        data={
            "policy": sheet.policy,
            "columns": sheet.columns,
            "rows": [{"label": line.label, "sample_id": line.images[0].sample_id} for line in sheet.lines],
        },
        caption="The first column is what evaluation sees; draw k is view k of the feature cache, one draw of it.",
    )
    return Section(
        key="augmentation",
        title="Augmentation",
        lead="Is the class still plain to see in every draw? If not, the policy is too strong for this data.",
        blocks=[shown, Code(title="The policy", text=write_settings(sheet.policy))],
    )


def rejects_section(rejects: RejectSummary) -> Section:
    """Which rows could not be used, and why."""
    if not rejects.rows and not rejects.shown:
        return Section(key="rejects", title="Rejects", lead="No row was rejected.", blocks=[])
    codes = list(rejects.by_code.items())
    figure = Figure(
        key="reject-codes",
        title="Rejects by reason",
        picture=bars_by_name([(code, [rows]) for code, rows in codes], ["rows"], "Rejected rows by reason"),
        data=rejects.by_code,
        caption=f"{count(rejects.rows)} rows could not be used.",
    )
    table = text_table(
        ["sample*", "reason*", "stage*", "in words*", "where*"],
        [[row.sample_id, row.code, row.stage, row.reason, row.uri] for row in rejects.shown],
        key="rejects",
        title="Rejected rows",
        data=[row.model_dump() for row in rejects.shown],
        caption=f"{len(rejects.shown)} of {count(rejects.rows)}, at most 20 of each reason.",
    )
    return Section(key="rejects", title="Rejects", blocks=[figure, *_reject_pictures(rejects), table])


def _reject_pictures(rejects: RejectSummary) -> Iterator[Gallery]:
    if rejects.drawn:
        yield Gallery(
            key="reject-pictures",
            title="Rejects that can be looked at",
            pictures=[
                picture(
                    one.image,
                    one.code,
                    f"{one.image.width_px} x {one.image.height_px} px · {one.image.sample_id}",
                )
                for one in rejects.drawn
            ],
            data=[
                {"code": one.code, **one.image.model_dump(exclude={"jpeg", "missing"})}
                for one in rejects.drawn
            ],
            caption="Some of each reason that decode within the usual limits; why any was rejected is in the table.",
        )


def _facts(card: DataCard) -> Facts:
    unlabelled = f", {count(card.unlabelled)} of them without a label" if card.unlabelled else ""
    imbalance = "a class has no row to train on" if card.imbalance is None else f"{card.imbalance:.2f} to 1"
    rows = [
        ("source", card.source),
        ("version", card.fingerprint),
        ("samples", count(card.samples) + unlabelled),
        ("splits", ", ".join(f"{split} {count(rows)}" for split, rows in card.splits.items())),
        ("classes", count(len(card.classes))),
        ("largest to smallest class", imbalance if card.classes else "no classes"),
        ("kinds of files", ", ".join(f"{name} {count(rows)}" for name, rows in card.suffixes.items())),
        ("bytes", _bytes(card)),
    ]
    if card.skipped:
        rows.append(
            ("no samples", ", ".join(f"{reason} {count(rows)}" for reason, rows in card.skipped.items()))
        )
    data = card.model_dump(mode="json", exclude={"examples", "classes", "sizes"})
    return Facts(key="data-card", title="In numbers", rows=rows, data=data)


def _bytes(card: DataCard) -> str:
    if not card.total_bytes:
        return "not known without reading the files"
    each = f"{size(card.smallest_bytes)} to {size(card.largest_bytes)} each"
    unknown = f"; {count(card.unknown_sizes)} images of unknown size" if card.unknown_sizes else ""
    return f"{size(card.total_bytes)}, {each}{unknown}"


def _class_blocks(card: DataCard) -> Iterator[Block]:
    if not card.classes:
        return
    splits = [split.value for split in Split if split.value in card.splits]
    yield (_class_bars if len(card.classes) <= _MAX_BARS else _rank_curve)(card.classes, splits)
    yield _class_table(card.classes, splits)


def _class_bars(classes: Sequence[ClassRows], splits: Sequence[str]) -> Figure:
    rows = [(row.name, [row.by_split.get(split, 0) for split in splits]) for row in classes]
    return Figure(
        key="classes",
        title="Samples by class",
        picture=bars_by_name(rows, splits, "Samples of each class, by split"),
        data=_counts_by_name(classes),
    )


def _rank_curve(classes: Sequence[ClassRows], splits: Sequence[str]) -> Figure:
    """Of very many classes: how many samples the largest has, the second largest, and so on."""
    ranked = {
        split: sorted((row.by_split.get(split, 0) for row in classes), reverse=True) for split in splits
    }
    chart = Chart(
        Scale(1, len(classes)),
        Scale.around([max(value, 0.5) for values in ranked.values() for value in values], is_log=True),
        x_label="classes, the largest first",
        y_label="samples",
    )
    for place, (split, values) in enumerate(ranked.items()):
        chart.line(enumerate((max(value, 0.5) for value in values), start=1), place, name=split)
    return Figure(
        key="classes",
        title="Samples by class",
        picture=chart.draw("Samples of classes from the largest to the smallest, by split"),
        data=ranked,
        caption=f"{len(classes):,} classes, ranked in each split. A class without a sample is drawn at one half.",
    )


def _class_table(classes: Sequence[ClassRows], splits: Sequence[str]) -> Table:
    shown = classes[:_MAX_CLASS_ROWS]
    which = "All" if len(shown) == len(classes) else f"The first {len(shown):,} of"
    return text_table(
        ["class*", *splits, "all"],
        [
            [row.name, *(count(row.by_split.get(split, 0)) for split in splits), count(row.total)]
            for row in shown
        ],
        key="class-table",
        title="Samples of each class",
        data=_counts_by_name(shown),
        folded=f"{which} {len(classes):,} classes in a table",
    )


def _counts_by_name(classes: Sequence[ClassRows]) -> list[dict[str, Any]]:
    return [{"name": row.name, **row.by_split} for row in classes]


def _size_figure(card: DataCard) -> Iterator[Figure]:
    if not card.sizes:
        return
    highest = max(one.images for one in card.sizes)
    chart = Chart(
        Scale(card.sizes[0].low_bytes, card.sizes[-1].high_bytes, is_log=True),
        Scale(0, highest * 1.05),
        x_label="bytes of an image",
        y_label="images",
        x_text=size,
        x_ticks=[one.low_bytes for one in card.sizes][:: max(1, len(card.sizes) // 6)],
    )
    chart.bars(
        (
            one.low_bytes,
            one.high_bytes,
            one.images,
            f"{size(one.low_bytes)} to {size(one.high_bytes)}: {one.images:,}",
        )
        for one in card.sizes
    )
    yield Figure(
        key="sizes",
        title="Sizes of files",
        picture=chart.draw("Images by size in bytes"),
        data=[one.model_dump() for one in card.sizes],
        values=values_table(
            ["from", "to", "images"],
            [[size(one.low_bytes), size(one.high_bytes), count(one.images)] for one in card.sizes],
        ),
    )


def _findings(card: DataCard) -> Iterator[Block]:
    found = card.duplicates
    if found is None:
        text = "Exact duplicates are not known: no cache job has read a whole split of this version."
        yield Notes(title="Duplicates", texts=[text])
    else:
        rows = [
            ("splits that were read", ", ".join(found.splits)),
            ("groups of equal images", count(found.groups)),
            ("images in them", count(found.samples)),
            ("groups that cross splits", _groups_across(found)),
            ("groups whose labels differ", count(found.label_conflicts)),
        ]
        yield Facts(key="duplicates", title="Exact duplicates", rows=rows, data=found.model_dump())
        yield from equal_groups(found.examples)
    if card.warnings:
        yield Notes(title="Warnings", texts=card.warnings)


def _groups_across(found: FoundDuplicates) -> str:
    known = "not known" if found.across_splits is None else count(found.across_splits)
    if not found.unread_splits:
        return known
    least = f"at least {known}" if found.across_splits else known
    return f"{least}: no cache job has also read {', '.join(found.unread_splits)}"


def _examples(card: DataCard) -> Iterator[Gallery]:
    if card.examples:
        pictures = [
            picture(one.image, one.label_name, f"{one.split} · {one.image.sample_id}")
            for one in card.examples
        ]
        data = [{"sample_id": one.image.sample_id, "label": one.label_name} for one in card.examples]
        yield Gallery(key="examples", title="Examples", pictures=pictures, data=data)
