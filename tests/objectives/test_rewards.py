"""Rewards of one's own: what they are given, how they add up, and what they may do wrong."""

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.objectives.rewards import Rewards, Sample


def sample(completion: str = "ab", line: int = 1, **fields: Any) -> Sample:
    return Sample(f"rows.jsonl:{line}", "how?", completion, fields)


def file_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_a_function_is_given_what_it_names(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        "def length(completion): return len(completion)\n"
        "def both(prompt, completion, answer, unused=3): return prompt + completion == answer\n"
        "def every(**all): return len(all)\n",
    )
    rewards = Rewards.open([f"{path}:length", f"{path}:both:10", f"{path}:every:-0.5"])
    (found,) = rewards([sample("x", answer="how?x", more=1)])
    assert found.parts == {"length": 1.0, "both": 1.0, "every": 4.0}
    assert found.value == 1 + 10 - 2
    facts = rewards.facts()
    assert facts["both"]["weight"] == 10
    assert len(facts["both"]["sha256"]) == 64


def test_a_function_may_be_called_as_a_number_is(tmp_path: Path) -> None:
    path = file_of(tmp_path, "def nan(completion): return 2.0\ndef inf(completion): return 3.0\n")
    (found,) = Rewards.open([f"{path}:nan", f"{path}:inf:2"])([sample()])
    assert found.value == 8.0


def test_a_module_is_imported() -> None:
    rewards = Rewards.open(["lora_core.evaluate.function_task:parse_answer"])
    assert rewards.parts[0].name == "parse_answer"


def raises(completion: str) -> float:
    if completion == "bad":
        raise RuntimeError("broken\nmore")
    return {"nan": math.nan, "inf": -math.inf, "text": "7", "none": None}.get(completion, 1.0)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("bad", "RuntimeError: broken"),
        ("nan", "it returned nan"),
        ("inf", "it returned -inf"),
        ("text", "it returned '7', not a number"),
        ("none", "it returned None, not a number"),
    ],
)
def test_what_fails_is_named_and_the_rest_is_scored(completion: str, said: str) -> None:
    samples = [sample("good", 1), sample(completion, 2), sample("fine", 3)]
    found = Rewards.of(raises)(samples)
    assert [one.value for one in found] == [1.0, None, 1.0]
    assert found[1].why == f"rows.jsonl:2: raises: {said}"


def test_what_never_returns_is_stopped() -> None:
    def slow(completion: str) -> float:
        if completion == "slow":
            try:
                time.sleep(30)
            except Exception:  # noqa: BLE001  # as careless code does
                return 2.0
        return 1.0

    began = time.monotonic()
    found = Rewards.of(slow, timeout=0.05)([sample("slow", 4), sample("x")])
    assert time.monotonic() - began < 20
    assert [one.value for one in found] == [None, 1.0]
    assert found[0].why == "rows.jsonl:4: slow: no reward after 0.05 seconds"


def test_elsewhere_than_in_the_main_thread_the_limit_is_said() -> None:
    seen: list[Any] = []

    def work() -> None:
        rewards = Rewards.of(lambda completion: 1.0)
        seen.extend([rewards([sample()])[0].value, rewards.notes()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] == 1.0
    assert "not limited here" in seen[1][0]
    assert Rewards.of(len).notes() == []


def test_ctrl_c_passes_and_exit_does_not() -> None:
    def interrupted(completion: str) -> float:
        raise KeyboardInterrupt

    def leaves(completion: str) -> float:
        if completion == "out":
            raise SystemExit(3)
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        Rewards.of(interrupted)([sample()])
    assert Rewards.of(leaves)([sample("out"), sample()])[0].why == (
        "rows.jsonl:1: leaves: it called exit(3)"
    )


def test_a_reward_that_fails_everywhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 2 answers could be rewarded; the first: rows"):
        Rewards.of(raises)([sample("nan"), sample("bad")])
    assert Rewards.of(raises)([]) == []


def test_a_missing_field_is_named() -> None:
    def exact(completion: str, answer: str) -> bool:
        return completion == answer

    found = Rewards.of(exact)([sample(answer="ab"), sample(line=9)])
    assert [one.value for one in found] == [1.0, None]
    assert "rows.jsonl:9: exact: it needs 'answer', and the row has" in str(found[1].why)


def test_tensors_and_truths_are_numbers() -> None:
    assert Rewards.of(lambda completion: torch.tensor(0.5))([sample()])[0].value == 0.5
    assert Rewards.of(lambda completion: True)([sample()])[0].value == 1.0


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([], "no reward: give --reward"),
        (["nothing"], "is no folder and names no function"),
        (["gone.py:f"], "no file gone.py"),
        (["no.such.module:f"], "No module named 'no'"),
        (["{file}:lenght"], "no function 'lenght' there; .*length"),
        (["{file}:length", "{file}:length:2"], "these repeat"),
        (["{file}:length:0"], "a weight is a number other than 0; got 0"),
        (["{broken}:f"], "the file does not run: ZeroDivisionError"),
    ],
)
def test_a_spec_that_names_nothing(specs: list[str], said: str, tmp_path: Path) -> None:
    names = {
        "file": file_of(tmp_path, "def length(completion): return len(completion)\n"),
        "broken": tmp_path / "broken.py",
    }
    names["broken"].write_text("1 / 0\n")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        Rewards.open([spec.format(**names) for spec in specs])
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Rewards.open([f"{names['file']}:length"], timeout=0)


def test_a_file_is_run_once_for_the_check_and_the_run(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        "from pathlib import Path\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        "log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n"
        "def length(completion): return len(completion)\n",
    )
    Rewards.check([f"{path}:length:2"])
    (found,) = Rewards.open([f"{path}:length:2"])([sample()])
    assert found.value == 4.0
    assert (tmp_path / "log").read_text() == "x"
    Rewards.open([f"{path}:length"])  # another run is another state
    assert (tmp_path / "log").read_text() == "xx"
    with pytest.raises(ValueError, match="no function 'lenght'"):
        Rewards.check([f"{path}:lenght"])
    with pytest.raises(ValueError, match="no reward: give --reward"):
        Rewards.check([])
    with pytest.raises(ValueError, match="is no reward model: its folder has no adapter"):
        Rewards.check([str(tmp_path)])
