"""The section of advice about the data itself: its size, its balance, its images, and what should be mended first."""

from __future__ import annotations

from convoy.pipelines.advise_data import DataFacts
from convoy.report.advice_text import resolution_words
from convoy.report.blocks import Block, Facts, Notes, Section
from convoy.report.duplicate_blocks import alike_groups, equal_groups
from convoy.report.words import count


def soundness_section(found: DataFacts) -> Section:
    """What was counted and measured of a dataset, and the groups of duplicates by name."""
    rows = [
        ("samples", ", ".join(f"{split} {count(rows)}" for split, rows in found.samples.items())),
        (
            "images a class to train on",
            f"{found.images_per_class_min:,} to {found.images_per_class_max:,},"
            f" median {found.images_per_class_median:,.0f}",
        ),
        ("largest to smallest class", _imbalance(found)),
        ("resolution", resolution_words(found.resolution)),
        ("looked at", _looked_at(found)),
        (
            "exact duplicates",
            f"{count(found.duplicates.samples)},"
            f" {count(found.duplicates.across_splits)} groups across splits,"
            f" {count(found.duplicates.label_conflicts)} whose labels differ",
        ),
        (
            "near duplicates",
            f"{count(found.near_duplicates.samples)},"
            f" {count(found.near_duplicates.across_splits)} groups across splits,"
            f" {count(found.near_duplicates.label_conflicts)} whose labels differ",
        ),
    ]
    blocks: list[Block] = [
        Facts(key="soundness", title="In numbers", rows=rows, data=found.model_dump(mode="json"))
    ]
    if found.warnings:
        blocks.append(Notes(title="To be mended first", texts=found.warnings))
    blocks += equal_groups(found.duplicates.examples, folded="Groups of exact duplicates, the worst first")
    blocks += alike_groups(found.near_duplicates, folded="Groups of near duplicates, the worst first")
    return Section(key="soundness", title="Size and soundness", blocks=blocks)


def _imbalance(found: DataFacts) -> str:
    if not found.images_per_class_min:
        return "a class has no row to train on"
    return f"{found.imbalance:.2f} to 1"


def _looked_at(found: DataFacts) -> str:
    total = sum(found.samples.values())
    words = f"{count(found.looked_at)} of {count(total)}, {count(found.rejects)} of them rejected"
    if found.looked_at < total:
        words += "; duplicates are those among these: of the pairs across splits only some were compared"
    return words
