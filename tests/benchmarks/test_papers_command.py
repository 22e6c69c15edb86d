"""The papers' command, its results file and its page; no claim is run for real."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_core.evaluate.estimate import Estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def claim(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("papers.claim")


@pytest.fixture(scope="module")
def page(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("papers.page")


@pytest.fixture(scope="module")
def command(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("papers.__main__")


class Ran:
    """Three claims: one that agrees, one that fails, one that is undecided; counts its runs."""

    def __init__(self, claim: ModuleType) -> None:
        self.runs: list[str] = []
        self.claims = {n: claim.Claim(n, "A", "s", self.of(claim, n), "sc") for n in "abc"}

    def of(self, claim: ModuleType, name: str) -> Callable[[Any], Any]:
        def run(settings: Any) -> Any:
            self.runs.append(name)
            if name == "b":
                raise ValueError("b has no figures")
            figure = Estimate(-1.0, 3, -2.0, -0.5 if name == "a" else 0.5, "seeds")
            checks = [claim.Check("d", figure, "below")]
            also = {"bits_of_4": 3.8765432, "picture": "papers.md", "table": {"not": "shown"}}
            return claim.Finding([{"loss": figure, "n": 3}], checks, also)

        return run


@pytest.fixture
def ran(
    claim: ModuleType, command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Ran:
    made = Ran(claim)
    monkeypatch.setattr(command, "claims", lambda: made.claims)
    monkeypatch.setattr(command, "FILE", tmp_path / "results" / "papers.jsonl")
    return made


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_fails_stops_no_other_and_what_is_known_is_not_run_again(
    ran: Ran, command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert command.main(out) == 1
    assert ran.runs == ["a", "b", "c"]
    found = lines(tmp_path / "results" / "papers.jsonl")
    assert [(row["name"], row["verdict"]) for row in found] == [("a", "agrees"), ("c", "undecided")]
    assert "failed: b" in capsys.readouterr().out
    # again: only what failed; other seeds: all
    assert command.main(out) == 1
    assert ran.runs[3:] == ["b"]
    assert command.main([*out, "a", "--seeds", "4", "5"]) == 0
    assert command.main([*out, "c", "--again"]) == 0
    assert ran.runs[4:] == ["a", "c"]
    last = command.read_results(tmp_path / "results" / "papers.jsonl")["a"]
    assert last["command"] == "python -m benchmarks.papers a --seeds 4 5"
    assert last["rows"] == [{"loss": Estimate(-1.0, 3, -2.0, -0.5, "seeds").facts(), "n": 3}]
    assert last["reasons"] == ["d = -1 [-2, -0.5] (3 seeds), expected below 0: agrees"]


@pytest.mark.parametrize(
    "flags", [["--quick"], ["--model", "m"], ["--text", "t"], ["--steps", "3"], ["--held-out", "5"]]
)
def test_results_of_ones_own_never_reach_the_page(
    ran: Ran, command: ModuleType, tmp_path: Path, flags: list[str]
) -> None:
    assert command.main(["a", "--out", str(tmp_path / "out"), *flags]) == 0
    assert not (tmp_path / "results").exists()
    (row,) = lines(tmp_path / "out" / "papers.jsonl")
    assert row["command"].endswith(" ".join(flags))


def test_bad_names_seeds_and_files(
    ran: Ran, command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["z", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "no claim 'z'; there are a, b, c" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["a", "--seeds", "1", "1", "--out", str(tmp_path)])
    assert "different numbers: (1, 1)" in capsys.readouterr().err
    (tmp_path / "broken.jsonl").write_text('{"name": "a"}\n{"name"\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl:2 is no JSON"):
        command.read_results(tmp_path / "broken.jsonl")
    assert ran.runs == []


def test_every_module_with_a_claim_is_found(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        path.stem
        for path in (ROOT / "benchmarks" / "papers").glob("*.py")
        if re.search(r"^CLAIM = ", path.read_text(), re.MULTILINE)
    }
    found = command.claims()
    assert set(found) == files
    assert {"qlora_table2", "equal_bins", "wrong_template"} <= files
    assert all(claim.name == name for name, claim in found.items())
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_papers_are_listed_among_the_references(command: ModuleType) -> None:
    listed = (ROOT / "docs" / "references.md").read_text()
    for path in (ROOT / "benchmarks" / "papers").glob("*.py"):
        for number in re.findall(r"arXiv:(\d{4}\.\d{5})", path.read_text()):
            assert number in listed, f"{path.name} cites {number}"


# --- the page -----------------------------------------------------------------------------------


def test_the_page_is_what_the_results_say(command: ModuleType, page: ModuleType) -> None:
    made = page.generated(command.claims(), command.read_results(command.FILE))
    text = page.PAGE.read_text()
    assert text.split(page.MARK[0] + "\n")[1].split("\n" + page.MARK[1])[0] == made, (
        "docs/papers.md is behind the results: python -m benchmarks.papers --write"
    )


def test_verdicts_on_record_are_those_of_their_figures(
    claim: ModuleType, command: ModuleType
) -> None:
    for row in command.read_results(command.FILE).values():
        checks = []
        for known in row["checks"]:
            facts = {k: math.nan if v is None else v for k, v in known["difference"].items()}
            figure = Estimate(**facts)
            checks.append(claim.Check(known["says"], figure, known["expects"], known["margin"]))
            assert checks[-1].verdict == known["verdict"]
        found = claim.Finding([], checks)
        assert (found.verdict, found.reasons) == (row["verdict"], row["reasons"])


def test_a_page_of_made_up_results(
    ran: Ran, command: ModuleType, page: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "papers.md"
    file.write_text(f"before\n{page.MARK[0]}\nold\n{page.MARK[1]}\nafter\n")
    monkeypatch.setattr(page, "PAGE", file)
    command.main(["a", "--out", str(tmp_path)])
    assert command.main(["--write"]) == 0
    text = file.read_text()
    assert text.startswith(f"before\n{page.MARK[0]}\n| claim |")
    assert text.endswith(f"{page.MARK[1]}\nafter\n")
    assert "old" not in text
    assert "|---|---|---|\n| [s](#a) | A | **agrees** |\n\n### a\n\ns (A)\n" in text
    assert "(#b)" not in text
    assert "$ python -m benchmarks.papers a\n```\n\n| loss | n |\n|---|---|\n" in text
    assert "| -1 [-2, -0.5] | 3 |\n\n**agrees.**\n\n- d = -1 [-2, -0.5] (3 seeds)" in text
    assert "- On another scale: sc\n- Also: bits of 4 3.8765\n\n![figure of a](papers.md)\n" in text
    command.main(["--write"])
    assert file.read_text() == text


def test_cells(page: ModuleType) -> None:
    assert page.cell(0.123456) == "0.1235"
    assert page.cell(7) == "7"
    assert page.cell("x") == "x"
    assert page.cell(Estimate(1.0, 1, math.nan, math.nan).facts()) == "1"
    assert page.table([]) == []
