"""SVG made fit for a page; without matplotlib."""

from collections.abc import Callable
from typing import Any

import pytest

from lora_core.report.inline_svg import inline_svg

Make = Callable[..., Any]
FILE = """<?xml version="1.0"?><!DOCTYPE svg>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="10pt" height="5pt" viewBox="0 0 10 5">
 <metadata><a href="http://elsewhere"/></metadata>
 <defs><style type="text/css">*{stroke: #ffffff}</style></defs>
 <g id="figure_1"><path id="p1.a" d="M 1.23456 -2.5
L 3.00049 4" style="fill: #0072b2; stroke: none"/></g>
 <use xlink:href="#p1.a" clip-path="url(#c1)"/><clipPath id="c1"/>
 <text style="font-size: 9px; font-family: 'A B', sans-serif; fill: #1c2126"
 transform="rotate(-0 1.5 2)">: #0072b2 id="p1.a" 1.23456  x</text>
</svg>
"""


def test_what_becomes_of_a_file(parse: Make, outside: Make) -> None:
    text = inline_svg(FILE, 'a "b" <c>', "wide")
    parsed = parse(text)
    assert outside(parsed) == []
    opening, *_ = parsed.named("svg")
    assert (opening["class"], opening["role"]) == ("wide", "img")
    assert opening["aria-label"] == 'a "b" <c>'
    assert [tag for tag, _ in parsed.tags] == ["svg", "g", "path", "use", "clippath", "text"]
    (path,) = parsed.named("path")
    assert path["style"] == "fill: var(--s0); stroke: none"
    assert path["d"] == "M 1.23 -2.5 L 3.00 4"
    (use,) = parsed.named("use")
    assert use["xlink:href"] == f"#{path['id']}"
    assert use["clip-path"] == f"url(#{parsed.named('clippath')[0]['id']})"
    assert parsed.named("g") == [{}]
    (words,) = parsed.named("text")
    assert words == {"style": "font-size: 9px; fill: var(--ink)"}
    assert parsed.text.strip() == ': #0072b2 id="p1.a" 1.23456  x'  # text is nobody's business


def test_ids_of_two_figures_do_not_meet(parse: Make) -> None:
    def ids(text: str) -> set[str]:
        return {str(attrs["id"]) for _, attrs in parse(text).tags if "id" in attrs}

    narrow, wide = (ids(inline_svg(FILE, "x", kind)) for kind in ("narrow", "wide"))
    other = ids(inline_svg(FILE.replace("4", "5"), "x", "wide"))
    assert len(narrow | wide | other) == 6


def test_what_is_no_svg() -> None:
    with pytest.raises(ValueError, match="this is no SVG file: it begins '<html>'"):
        inline_svg("<html>", "x", "wide")
