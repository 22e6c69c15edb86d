"""The page in a real browser: no sideways scrolling, nothing loaded, nothing run.

The page is not changed: it is shown in frames as wide as a phone, a tablet and a screen, whose
owner measures them and writes what it finds into its own document, which Chromium prints.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest

from lora_core.report import Page, bars

Make = Callable[..., Any]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = (360, 768, 1280)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--log-level=0"),
)
MEASURE = """
onload = () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    const shown = [...page.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width);
    const scale = e => e.ownerSVGElement.getBoundingClientRect().width
      / e.ownerSVGElement.viewBox.baseVal.width;
    const size = e => parseFloat(view.getComputedStyle(e).fontSize);
    const figures = shown.flatMap(e => [...e.querySelectorAll('text')]);
    return {
      width: view.innerWidth, needed: root.scrollWidth, title: page.title,
      loaded: view.performance.getEntriesByType('resource').map(e => e.name),
      shown: shown.map(e => e.getAttribute('class')),
      letters: Math.min(...[...page.querySelectorAll('p,td,th,dd,dt,li,code')].map(size)),
      figures: Math.min(...figures.map(e => size(e) * scale(e))),
    };
  });
  document.querySelector('#found').textContent = JSON.stringify(found);
};
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH to look at the page with")
def test_a_hostile_page_on_three_screens(tmp_path: Path, hostile: str, figure: Make) -> None:
    pytest.importorskip("matplotlib")
    page = Page("Title", hostile)
    page.heading(hostile)
    page.text(hostile)
    page.facts({hostile: hostile, "n": 1})
    cells = [hostile, *range(1000000, 1000012)]
    page.table([hostile, *"bcdefghijklm"], [cells, ["x", *[figure(0.5, 0.4, 0.6)] * 12]], hostile)
    page.figure(bars({hostile: figure(0.5, 0.4, 0.6), "b": 1.0}), alt="bars")
    page.quote(hostile, hostile)
    page.code(hostile)
    with page.details(hostile, opened=True):
        page.table(["a", "b"], [[hostile, hostile]])
    frames = "".join(
        f'<iframe width="{w}" height="700" style="border:0" srcdoc="{escape(page.html())}">'
        "</iframe>"
        for w in WIDTHS
    )
    outer = tmp_path / "outer.html"
    outer.write_text(
        '<!doctype html><meta charset="utf-8"><pre id="found"></pre>'
        f"<script>{MEASURE}</script>{frames}"
    )
    words = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*words, outer.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    told = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert told == []  # neither an error nor anything that the page's policy had to forbid
    found = json.loads(done.stdout.split('<pre id="found">')[1].split("</pre>")[0])
    for width, seen in zip(WIDTHS, found, strict=True):
        assert seen["width"] == width
        assert seen["needed"] <= width, "the page scrolls sideways"
        assert seen["title"] == "Title"
        assert seen["loaded"] == []
        assert seen["shown"] == ["narrow" if width == 360 else "wide"]
        assert seen["letters"] >= 15
        assert seen["figures"] >= 11
