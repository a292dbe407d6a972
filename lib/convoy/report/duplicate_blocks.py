"""Which samples are duplicates of each other, by group, closed at first: what a reader is told to mend, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from convoy.pipelines.near_duplicates import NearDuplicateReport
from convoy.report.blocks import Table, text_table
from convoy.report.html import listed
from convoy.report.words import count

_FOLDED = "Some groups, the worst first"


def equal_groups(examples: Sequence[Sequence[str]], *, folded: str = _FOLDED) -> Iterator[Table]:
    """Samples with the very same bytes; nothing where there are none."""
    if examples:
        groups = [[listed(group)] for group in examples]
        yield text_table(["first samples of one group*"], groups, folded=folded)


def alike_groups(found: NearDuplicateReport, *, folded: str = _FOLDED) -> Iterator[Table]:
    """Samples that show one picture, with their splits and labels; nothing where there are none."""
    groups = [
        [
            f"{group.score:.3f}",
            listed(f"{one.sample_id} ({one.split}, {one.label})" for one in group.samples)
            + (f" and {count(group.num_unnamed)} more" if group.num_unnamed else ""),
        ]
        for group in found.examples
    ]
    if groups:
        yield text_table(["similarity", "samples*"], groups, folded=folded)
