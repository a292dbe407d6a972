"""The fenced blocks of a Markdown page, by the heading that they stand under."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path


def fenced_blocks(page: Path, language: str) -> dict[str, list[str]]:
    """The texts of the page's blocks in a language, by heading."""
    blocks = defaultdict[str, list[str]](list)
    heading = ""
    for part in re.findall(r"^#+ [^\n]*$|^```\w*\n.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if part.startswith("#"):
            heading = part.lstrip("#").strip()
            continue
        opening, _, text = part.partition("\n")
        if opening == f"```{language}":
            blocks[heading].append(text.removesuffix("```"))
    return dict(blocks)
