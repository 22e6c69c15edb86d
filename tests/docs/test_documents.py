"""Every ```python block of README.md and docs/ runs: a page's blocks in order, in one process.

Each page runs in a fresh process and a fresh folder, offline, as a reader would run it.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    return BLOCK.findall(text)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text())], ids=lambda p: p.stem)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(page.read_text())))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:lora_core", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_broken_block_would_be_seen() -> None:
    assert blocks("a\n```python\nraise SystemExit(1)\n```\n") == ["raise SystemExit(1)\n"]
    assert blocks("```console\n$ ls\n```\n") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
