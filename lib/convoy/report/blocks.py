"""What pages are made of: titles, figures, tables, pictures. Data only; `html` turns it into a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing, and as `data` the very values that it shows, as JSON. `key` is unique on the page.

    `values` are what a pointer finds in the drawing, for keyboards, screen readers and those who copy numbers; None
    where the drawing prints most of them itself, or a table beside it does.
    """

    kind: ClassVar[str] = "figure"
    key: str
    title: str
    picture: Markup
    data: Any
    values: Table | None = None
    caption: str = ""
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading; texts stand left, numbers right."""

    name: str
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: a text, perhaps with a link, or a small drawing."""

    text: str = ""
    href: str = ""
    picture: Markup | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Cells in the order of the columns; a chosen row stands out."""

    cells: tuple[Cell, ...]
    is_chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table, and its values as JSON. With `folded`, the words to click on, it is closed at first.

    One that `is_beside` stands beside figures where there is room.
    """

    kind: ClassVar[str] = "table"
    key: str = ""
    title: str = ""
    columns: Sequence[Column]
    rows: Sequence[Row]
    data: Any = None
    caption: str = ""
    folded: str = ""
    is_beside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]
    key: str = ""
    title: str = ""
    data: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """Short texts, one below the other."""

    kind: ClassVar[str] = "notes"
    texts: Sequence[str]
    key: str = ""
    title: str = ""
    data: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A long text in a fixed font, closed at first."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link of a chain. `gap` says why it is not known."""

    title: str
    name: str
    facts: Sequence[tuple[str, str]] = ()
    gap: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What came of what, the result first."""

    kind: ClassVar[str] = "chain"
    links: Sequence[Link]
    key: str = ""
    title: str = ""
    data: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image as a data URI, or why it is missing. A coarse one has so few pixels that they are shown as squares."""

    href: str
    alt: str
    missing: str = ""
    is_coarse: bool = False
    lines: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Pictures with a few lines below each."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]
    key: str = ""
    title: str = ""
    data: Any = None
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """Rows of pictures with a name in front and titles above."""

    kind: ClassVar[str] = "sheet"
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Picture]]]
    key: str = ""
    title: str = ""
    data: Any = None
    caption: str = ""


Block = Figure | Table | Facts | Notes | Code | Chain | Gallery | Sheet


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page with a heading; `key` is its anchor."""

    key: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""

    @property
    def runs(self) -> list[list[Block]]:
        """The blocks in groups of neighbours: those that stand side by side, and others."""
        groups: list[list[Block]] = []
        for block in self.blocks:
            if groups and _is_beside(groups[-1][0]) == _is_beside(block):
                groups[-1].append(block)
            else:
                groups.append([block])
        return groups


@dataclass(frozen=True, slots=True)
class Tile:
    """A number that matters, and what it is."""

    value: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page. `target` is what it is about and `workspace` where that lies, by which an index finds it.

    `version` says as of when: an index draws a page anew whose target has another one.
    """

    target: str
    workspace: str = ""
    version: str = ""
    title: str
    lead: str
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""


def _is_beside(block: Block) -> bool:
    return isinstance(block, Figure) or (isinstance(block, Table) and block.is_beside)


def text_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, chosen: Collection[int] = (), **fields: Any
) -> Table:
    """A table of texts. Columns whose name ends in '*' are left-aligned words, the others numbers.

    The rows at the places `chosen` stand out.
    """
    return Table(
        columns=[Column(name.rstrip("*"), is_text=name.endswith("*")) for name in columns],
        rows=[
            Row(tuple(Cell(text) for text in row), is_chosen=place in chosen)
            for place, row in enumerate(rows)
        ],
        **fields,
    )


def values_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The values of a figure, whose title it gets, closed at first; columns as `text_table` has them."""
    return text_table(columns, rows, folded="Values")
