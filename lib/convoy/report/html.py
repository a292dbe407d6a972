"""From a page to one HTML file that needs nothing else: no script, no request, nothing that a name could smuggle in.

Everything printed is escaped, and characters that are invisible or turn the reading direction around are shown by
their codes. The content security policy forbids whatever the page does not hold itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from convoy.core.json_values import finite_or_null
from convoy.report.blocks import Block, Page, Picture
from convoy.report.hidden_characters import with_codes

_MAX_CHARACTERS = 400


def render_page(page: Page) -> bytes:
    """The HTML file of a page, in UTF-8."""
    environment = _environment(finalize=clean)
    style = environment.loader.get_source(environment, "style.css")[0] if environment.loader else ""
    blocks = environment.get_template("blocks.html.j2")
    picture = environment.get_template("picture.html.j2")
    unshortened = _environment(finalize=_clean_long).get_template("blocks.html.j2")

    def draw_picture(shown: Picture) -> Markup:
        return Markup(picture.render(shown=shown))

    def draw(block: Block) -> Markup:
        template = unshortened if block.kind == "code" else blocks
        return Markup(template.render(block=block, picture=draw_picture))

    text = environment.get_template("page.html.j2").render(
        page=page, style=Markup(style), policy=_policy(style), draw=draw
    )
    return text.encode()


def clean(value: Any, max_characters: int = _MAX_CHARACTERS) -> Any:
    """A text as it may be shown: what is invisible or turns directions as its code, what is very long cut."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    if len(value) > max_characters:
        value = f"{value[: max_characters - 1]}…"
    return with_codes(value)


def listed(texts: Iterable[str]) -> Markup:
    """Texts one after the other, of which each alone is shown as `clean` has it: many of them are not cut for that."""
    return Markup(", ").join(clean(text) for text in texts)


def breakable(text: str) -> Markup:
    """A path as `clean` has it, whose lines break behind a slash rather than within a name."""
    return Markup("/<wbr>").join(clean(text).split("/"))


def shorten(text: str, max_characters: int) -> str:
    """The text, with its middle left out where it is too long."""
    if len(text) <= max_characters:
        return text
    head = (max_characters - 1) * 2 // 3
    tail = max_characters - 1 - head
    return f"{text[:head]}…{text[len(text) - tail :]}"


def image_link(data: bytes, media_type: str = "image/jpeg") -> str:
    """Bytes of an image as a data URI."""
    return Markup(f"data:{media_type};base64,{base64.b64encode(data).decode()}")


def json_text(value: Any) -> str:
    """A value as JSON in ASCII; what is not finite is null."""
    return json.dumps(finite_or_null(value), separators=(",", ":"), allow_nan=False)


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("convoy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        **options,
    )
    environment.filters |= {"breakable": breakable, "data_link": _data_link}
    return environment


_clean_long = partial(clean, max_characters=1 << 20)


def _data_link(value: Any) -> Markup:
    encoded = base64.b64encode(json_text(value).encode()).decode()
    return Markup(f"data:application/json;base64,{encoded}")


def _policy(style: str) -> str:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    parts = ("default-src 'none'", f"style-src 'sha256-{digest}'", "img-src data:", "base-uri 'none'")
    return "; ".join([*parts, "form-action 'none'"])
