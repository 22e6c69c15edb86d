"""The page: one well-formed file, nothing from outside, everything escaped."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.report import Page

Make = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(13) + struct.pack(">I", 0)


def full(hostile: str, figure: Make) -> Page:
    """Every kind of piece, with hostile text wherever text goes."""
    page = Page(hostile, hostile)
    for level in (2, 3, 2, 2):
        page.heading(hostile, level)
    page.text(f"{hostile}\n\n{hostile}")
    page.facts({hostile: hostile, "estimate": figure(0.5, 0.4, 0.6), "list": [hostile, 1]})
    rows = [[hostile, hostile, 1], [None, figure(1, 0, 2, 5, hostile), 2.5]]
    page.table([hostile, "b", "c"], rows, hostile, notes=[hostile])
    page.figure(PNG, alt=f"{hostile}.", caption=hostile)
    page.quote(hostile, hostile)
    page.code(hostile)
    with page.details(hostile):
        page.quote(hostile)
    return page


def test_hostile_text_is_shown_and_does_nothing(
    hostile: str, figure: Make, parse: Make, outside: Make
) -> None:
    page = parse(full(hostile, figure).html())
    assert outside(page) == []
    assert page.text.count("<script>document.title='owned'</script>") == 27  # wherever text goes
    assert "‹U+202E›gpj.exe‹U+202C›‹U+0000›" in page.text
    assert [tag for tag, _ in page.tags if tag == "style"] == ["style"]
    assert page.named("img")[0]["alt"].startswith("<script>")
    assert page.named("div")[0]["aria-label"].startswith("<script>")


@given(st.text(st.characters(codec=None), max_size=80))
def test_any_text_comes_out_as_it_went_in(parse: Make, figure: Make, text: str) -> None:
    from lora_core.report import visible

    page = parse(full(text, figure).html())
    said = [piece for tag, piece in page.pieces if tag == "code"]
    assert "".join(said) == visible(text)
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "link", "title", "style", "body", "main", "header", "nav"),
        *("ul", "li", "a", "h1", "h2", "h3", "p", "dl", "dt", "dd", "div", "table", "caption"),
        *("thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption", "blockquote", "pre"),
        *("code", "details", "summary", "span"),
    }


def test_the_head_and_what_a_reader_needs(parse: Make) -> None:
    page = Page("Title", lang="de")
    page.table(["method", "score"], [["LoRA", 1], ["DoRA", 2.5]], "Two methods")
    parsed = parse(page.html())
    assert page.html().startswith("<!doctype html>")
    assert parsed.named("html") == [{"lang": "de"}]
    metas = parsed.named("meta")
    assert {"charset": "utf-8"} in metas
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "script" not in policy
    scopes = [attrs["scope"] for attrs in parsed.named("th")]
    assert scopes == ["col", "col", "row", "row"]
    assert parsed.named("div")[0] == {
        "class": "scroll",
        "role": "region",
        "tabindex": "0",
        "aria-label": "Two methods",
    }


def test_columns_of_figures_are_aligned(figure: Make, parse: Make) -> None:
    def aligned(rows: list[list[object]], **options: Any) -> list[bool]:
        page = Page("t")
        page.table(["a", "b", "c"], rows, **options)
        return [attrs.get("class") == "num" for attrs in parse(page.html()).named("th")[:3]]

    assert aligned([["x", 1, "1 %"], ["y", None, "2 %"]]) == [False, True, False]
    assert aligned([["x", figure(1), 2.0], ["y", 3, "z"]]) == [False, True, False]
    assert aligned([["x", 1, "1 %"]], numeric=["c"]) == [False, False, True]
    assert aligned([]) == [False, False, False]


def test_a_count_that_all_share_is_said_once(figure: Make, parse: Make) -> None:
    page = Page("t")
    alike = [["a", figure(0.5, 0.4, 0.6), figure(1, count=3)], ["b", figure(0.6, 0.5, 0.7), 2]]
    page.table(["m", "shared", "lone"], alike)
    assert page.html().count("64 rows") == 1
    assert parse(page.html()).text.index("64 rows") < parse(page.html()).text.index("0.50")
    assert page.html().count("3 rows") == 1
    page = Page("t")
    page.table(["m", "s"], [["a", figure(0.5, count=3)], ["b", figure(0.6, count=4)]])
    assert [page.html().count(f"{n} rows") for n in (3, 4)] == [1, 1]


def test_cells(figure: Make, parse: Make) -> None:
    page = Page("t")
    page.facts({"yes": True, "no": False, "none": None, "empty": [], "list": ["a", "b"], "n": 1e6})
    said = [piece for tag, piece in parse(page.html()).pieces if tag == "dd"]
    assert said == ["yes", "no", "–", "–", "a, b", "1,000,000"]


def test_contents_are_listed_from_three_headings_on(parse: Make) -> None:
    page = Page("t")
    page.heading("one")
    page.heading("a part", 3)
    page.heading("two")
    assert parse(page.html()).named("nav") == []
    page.heading("three")
    parsed = parse(page.html())
    ids = [attrs["id"] for attrs in parsed.named("h2")]
    assert [attrs["href"] for attrs in parsed.named("a")] == [f"#{i}" for i in ids]
    assert len(set(ids)) == 3


def test_details_fold_what_is_added_within(parse: Make) -> None:
    page = Page("t")
    page.text("before")
    with page.details("more", opened=True) as same:
        same.text("inside")
    page.text("after")
    html = page.html()
    body = html[html.index("<body>") :]
    assert body.index("<details open>") < body.index("inside") < body.index("</details>")
    assert body.index("</details>") < body.index("after")
    parse(html)


def test_an_empty_answer_is_told_from_none(parse: Make) -> None:
    page = Page("t")
    page.quote("")
    assert "(empty)" in parse(page.html()).text


def test_writing(tmp_path: Path) -> None:
    page = Page("t")
    path = page.write(tmp_path / "r.html")
    assert path.read_text(encoding="utf-8") == page.html()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        page.write(tmp_path / "none" / "r.html")


def test_a_png_is_inside(parse: Make) -> None:
    page = Page("t")
    page.figure(PNG + zlib.compress(b"x"), alt="a picture")
    (image,) = parse(page.html()).named("img")
    assert image["alt"] == "a picture"
    assert str(image["src"]).startswith("data:image/png;base64,iVBORw0KGgo")


def test_refusals(figure: Make) -> None:
    page = Page("t")
    with pytest.raises(ValueError, match=r"level must be 2, or 3 .* got 4"):
        page.heading("x", 4)
    with pytest.raises(ValueError, match="row 2 has 1 cells; the table has 2 columns"):
        page.table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="no column 'z' in the table: a, b"):
        page.table(["a", "b"], [[1, 2]], numeric=["z"])
    with pytest.raises(ValueError, match="a figure needs alt="):
        page.figure(PNG, alt=" ")
    with pytest.raises(ValueError, match="must be a PNG; they begin b'GIF89a'"):
        page.figure(b"GIF89a", alt="x")
    with pytest.raises(TypeError, match="must be matplotlib's or the bytes of a PNG; got str"):
        page.figure("x.png", alt="x")
