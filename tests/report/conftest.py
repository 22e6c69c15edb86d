"""What the tests of reports share: hostile text, estimates, a finetune folder, a parsed page."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass(frozen=True)
class Figure:
    """An estimate that is not `lora_core.evaluate`'s: reports take anything of this shape."""

    value: float
    low: float = math.nan
    high: float = math.nan
    count: int = 64
    unit: str = "rows"


@pytest.fixture(scope="session")
def figure() -> Callable[..., Figure]:
    return Figure


@pytest.fixture(scope="session")
def hostile() -> str:
    """What a model might write: markup, controls, bidirectional marks, one endless word."""
    return (
        "<script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)>"
        "</blockquote></main><style>*{display:none}</style>&lt;\" onload='x' "
        "\u202egpj.exe\u202c\x00\x07\x1b[31mred\x7f\x85\u2028\ud800\ufffe "
        + "W" * 900
        + " 🙂👨‍👩‍👧 שלום مرحبا z"
        + "\u0301" * 40
    )


class Parsed(HTMLParser):
    """A page as a parser sees it; fails on a tag that is closed out of turn or not at all."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of turn in {self.open}"

    def handle_data(self, data: str) -> None:
        self.pieces.append((self.open[-1] if self.open else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self.pieces)


@pytest.fixture(scope="session")
def parse() -> Callable[[str], Parsed]:
    return Parsed


@pytest.fixture(scope="session")
def outside() -> Callable[[Parsed], list[str]]:
    """What a page would load or run from elsewhere; nothing may."""

    def find(page: Parsed) -> list[str]:
        found = []
        for tag, attrs in page.tags:
            for name, value in attrs.items():
                held = value or ""
                link = name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
                if link and not held.startswith(("#", "data:image/png;base64,", "data:,")):
                    found.append(f"{tag} {name}={held}")
                if name.startswith("on") or ("url(" in held and "url(#" not in held):
                    found.append(f"{tag} {name}={held}")
            if tag in ("script", "iframe", "object", "embed", "base", "form"):
                found.append(tag)
        styles = [piece for tag, piece in page.pieces if tag == "style"]
        return found + [s for s in styles if "@import" in s or "url(" in s]

    return find


@pytest.fixture
def adapted(shake: Callable[..., nn.Module]) -> nn.Module:
    """Two layers of two projections and an embedding, with a LoRA that changes something."""
    from lora_core.adapters import LoRAConfig, add_adapter

    torch.manual_seed(5)
    layers = [nn.ModuleDict({"q": nn.Linear(32, 32), "up": nn.Linear(32, 48)}) for _ in range(2)]
    model = nn.ModuleDict({"embed": nn.Embedding(11, 32), "layers": nn.ModuleList(layers)})
    add_adapter(model, LoRAConfig(r=2, targets=["q", "up", "embed"]))
    return shake(model)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finetune folder of three steps."""
    folder = tmp_path / "a <b>run"
    folder.mkdir()
    records: list[dict[str, Any]] = [{"step": i, "loss": 3.0 / i} for i in (1, 2, 3)]
    records[2]["eval_loss"] = 1.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = {
        "train": {"lr": 0.004, "batch_size": 8, "accumulate": 2, "seed": 0},
        "finetune": {"method": "qlora", "data": ["a.jsonl", "b.jsonl:0.5"]},
        "adapter": {"r": 16, "alpha": 32, "targets": "all-linear"},
        "base": {"model": "/models/<base>", "quantize": None},
        "versions": {"torch": "2"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder
