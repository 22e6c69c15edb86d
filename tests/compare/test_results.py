"""Records on disk: what is missing is known, what is torn cut off, what is another's refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lora_core.compare import Results, Variant
from lora_core.compare.results import (
    BASE_FILE,
    RESULTS,
    TASK,
    WORK,
    estimate,
    fingerprint,
    over_seeds,
)
from lora_core.evaluate.estimate import Estimate

VARIANT = Variant("lora", {"r": 4, "lr": 0.1}, {"r": 4}, 0)
IDENTITY = {"model": {"w": "1"}, "data": "2"}


def record(mark: str, status: str = "done", **more: object) -> dict[str, object]:
    return {"fingerprint": mark, "status": status, **more}


def test_a_fingerprint_follows_from_all_that_figures_depend_on() -> None:
    mark = fingerprint(VARIANT, IDENTITY, {"shots": []})
    # the same settings, swept or not, are the same variant
    assert fingerprint(replace(VARIANT, swept={}), IDENTITY, {"shots": []}) == mark
    others = [
        fingerprint(replace(VARIANT, seed=1), IDENTITY, {"shots": []}),
        fingerprint(replace(VARIANT, method="dora"), IDENTITY, {"shots": []}),
        fingerprint(replace(VARIANT, settings={"r": 5, "lr": 0.1}), IDENTITY, {"shots": []}),
        fingerprint(VARIANT, {**IDENTITY, "data": "3"}, {"shots": []}),
        fingerprint(VARIANT, IDENTITY, {"shots": ["a"]}),
    ]
    assert len({mark, *others}) == 6


def test_records_outlive_the_process(tmp_path: Path) -> None:
    results = Results(tmp_path, IDENTITY)
    results.add(record("a"))
    results.add(record("b", "failed", failed="why"))
    again = Results(tmp_path, IDENTITY)
    assert again.done("a")
    assert not again.done("b")
    assert not again.done("c")
    again.add(record("b"))
    assert Results(tmp_path, IDENTITY).done("b")  # the last record counts


def test_a_torn_last_line_is_run_again(tmp_path: Path) -> None:
    results = Results(tmp_path, IDENTITY)
    results.add(record("a"))
    whole = (tmp_path / RESULTS).read_bytes()
    for cut in range(1, len(whole)):
        (tmp_path / RESULTS).write_bytes(whole + whole[:cut])
        again = Results(tmp_path, IDENTITY)
        assert list(again.records) == ["a"]
        again.add(record("b"))
        lines = (tmp_path / RESULTS).read_text().splitlines()
        assert [json.loads(line)["fingerprint"] for line in lines] == ["a", "b"]


def test_any_other_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    Results(tmp_path, IDENTITY).add(record("a"))
    for bad in ("{", "[]", '{"status": "done"}'):
        with (tmp_path / RESULTS).open("w") as stream:
            stream.write(json.dumps(record("a")) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=rf"{RESULTS}:2: not a record of a comparison"):
            Results(tmp_path, IDENTITY)


def test_a_folder_without_a_record_is_bound_anew(tmp_path: Path) -> None:
    """A device that is not there, say, is found when the base is to be measured."""
    Results(tmp_path, {**IDENTITY, "data": "9"})
    (tmp_path / BASE_FILE).write_text("{}")
    Results(tmp_path, IDENTITY)
    assert not (tmp_path / BASE_FILE).exists()
    assert json.loads((tmp_path / TASK).read_text()) == IDENTITY


def test_a_folder_holds_one_task(tmp_path: Path) -> None:
    Results(tmp_path, IDENTITY).add(record("a"))
    with pytest.raises(ValueError, match='another comparison: data was "2", is "9"; choose anot'):
        Results(tmp_path, {**IDENTITY, "data": "9"})
    Results(tmp_path, dict(reversed(IDENTITY.items())))  # the order says nothing
    (tmp_path / TASK).write_text("[]")
    with pytest.raises(ValueError, match=f"{TASK} cannot be read: it should hold a JSON object"):
        Results(tmp_path, IDENTITY)
    (tmp_path / TASK).unlink()
    (tmp_path / RESULTS).write_text("")
    with pytest.raises(ValueError, match=r"is there and task\.json, which says of what, is not"):
        Results(tmp_path, IDENTITY)


def test_a_folder_of_other_runs_is_left_alone(tmp_path: Path) -> None:
    """runs/base and the like would be removed and made anew."""
    (tmp_path / WORK).mkdir()
    with pytest.raises(
        ValueError, match=r"runs is there and task\.json, which says of what, is not"
    ):
        Results(tmp_path, IDENTITY)
    assert not (tmp_path / TASK).exists()


def test_seeds_become_a_mean_and_its_spread() -> None:
    one = Estimate(0.5, 10, 0.4, 0.6)
    assert over_seeds([one]) is one
    assert over_seeds([3.0]) == 3.0
    both = over_seeds([one, Estimate(0.7, 10, 0.1, 0.9)])
    assert isinstance(both, Estimate)
    assert (both.value, both.low, both.high, both.count) == (0.6, 0.5, 0.7, 2)
    assert (both.unit, both.method) == ("seeds", "min–max")


def test_estimates_come_back_from_json() -> None:
    bare = Estimate(1.0, 1, math.nan, math.nan)
    back = estimate(json.loads(json.dumps(bare.facts())))
    assert math.isnan(back.low)
    assert back.value == 1.0
    full = Estimate(0.5, 10, 0.4, 0.6, "rows", 0.95, "wilson")
    assert estimate(full.facts()) == full
