"""Sampled answers as rows: which are kept, what is written first, what a killed call leaves."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_core.data import PromptRow
from lora_core.objectives import candidates
from lora_core.objectives.rewards import Rewards, Sample
from lora_core.objectives.sampling import Selection, gather

PROMPTS: Any = [
    *(PromptRow((5, i), f"prompt {i}", {"number": i}, f"p.jsonl:{i + 1}") for i in range(4)),
    PromptRow(
        (7, 8),
        [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c?"},
        ],
        {},
        "p.jsonl:5",
        [{"name": "tool"}],
    ),
]
ANSWERS = ["one two three", "five words are a lot", "", "one  two three", "cut off", "bad"]


class Fake:
    """A sampler whose answers to each prompt are ANSWERS, in turn; "cut off" is cut."""

    seed, temperature, max_new_tokens = 3, 1.0, 9

    def __init__(self, batch_size: int = 12, stop: int = 99) -> None:
        self.batch_size, self.stop = batch_size, stop
        self.firsts: list[int] = []

    def __call__(self, prompts: Sequence[PromptRow], each: int, first: int = 0) -> list[Sample]:
        self.firsts.append(first)
        if len(self.firsts) > self.stop:
            raise KeyboardInterrupt
        asked = [prompt for prompt in prompts for _ in range(each)]
        return [self._sample(prompt, first + i) for i, prompt in enumerate(asked)]

    def seed_of(self, number: int) -> int:
        return 1000 + number

    def _sample(self, row: PromptRow, number: int) -> Sample:
        text = ANSWERS[number % len(ANSWERS)]
        ids = (number, 2)
        return Sample(row.where, row.prompt, text, row.fields, row.ids, ids, text != "cut off")


def words(completion: str) -> float:
    return {"bad": float("nan")}.get(completion, float(len(completion.split())))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"] if "messages" in row else row["completion"])


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], Any]]:
    """Gather into a file of tmp_path; its rows and what was counted."""

    def run(
        fake: Any = None, out: str = "rows.jsonl", reward: Any = None, **more: Any
    ) -> tuple[list[dict[str, Any]], Any]:
        selection = Selection(samples=6, **more)
        rewards = None if reward is None else Rewards.of(reward)
        path = tmp_path / out
        tally = gather(PROMPTS, fake or Fake(), selection, path, rewards=rewards)
        return rows_of(path), tally

    return run


Go = Callable[..., tuple[list[dict[str, Any]], Any]]


def test_what_is_kept_without_a_reward(go: Go) -> None:
    rows, tally = go()
    texts = [row["completion"] for row in rows if row["where"] == "p.jsonl:1"]
    assert texts == ["one two three", "five words are a lot", "bad"]
    assert tally.facts()["dropped"] == {
        "cut at max_new_tokens": 5,
        "empty": 5,
        "near duplicate of kept answers": 5,
    }
    assert tally.kept == len(rows) == 15
    assert tally.prompts == 5
    assert tally.sampled == 30


def test_rows_are_in_the_form_of_their_prompts(go: Go) -> None:
    rows, _ = go(dedupe=0)
    assert rows[0] == {
        "prompt": "prompt 0",
        "completion": "one two three",
        "where": "p.jsonl:1",
        "fields": {"number": 0},
        "seed": 1000,
    }
    last = rows[-1]
    assert last["tools"] == [{"name": "tool"}]
    turns = [(m["role"], m["content"], m.get("train")) for m in last["messages"]]
    assert turns == [
        ("user", "a?", None),
        ("assistant", "b", False),  # of the prompt: context
        ("user", "c?", None),
        ("assistant", "bad", None),
    ]
    assert "fields" not in last


def test_rewards_choose_and_failed_ones_are_named(go: Go, tmp_path: Path) -> None:
    rows, tally = go(reward=words, dedupe=0, least=3)
    assert {said(row) for row in rows} == {
        "one two three",
        "five words are a lot",
        "one  two three",
    }
    assert tally.dropped["without a reward"] == 5
    assert tally.first_failure == "p.jsonl:1: words: it returned nan"
    assert tally.reward.value == pytest.approx((3 + 5 + 0 + 3 + 2) / 5)
    best, _ = go(reward=words, best=True, out="best.jsonl", dedupe=0)
    assert [said(row) for row in best] == ["five words are a lot"] * 5
    cut, _ = go(reward=words, least=2, keep_cut=True, out="cut.jsonl", dedupe=0)
    assert sum(said(row) == "cut off" for row in cut) == 5
    none, tally = go(reward=words, least=99, out="none.jsonl")
    assert none == []
    assert tally.without == 5
    line = rows_of(tmp_path / "none.progress.jsonl")[1]
    assert line["answers"] == ANSWERS
    assert line["rewards"] == [3, 5, 0, 3, 2, None]


def test_ctrl_c_loses_nothing(go: Go, tmp_path: Path) -> None:
    whole, _ = go(out="whole.jsonl", reward=words)
    with pytest.raises(KeyboardInterrupt):
        go(Fake(stop=2), reward=words)
    kept = rows_of(tmp_path / "rows.jsonl")
    assert [row["where"] for row in kept if row["where"] == "p.jsonl:5"] == []
    assert whole[: len(kept)] == kept
    assert kept
    second = Fake()
    again, tally = go(second, reward=words)
    assert second.firsts == [24], "the last prompt alone is asked"
    assert again == whole
    assert tally.sampled == 30


def test_what_an_earlier_call_kept_is_not_said_again(go: Go) -> None:
    whole, _ = go(out="whole.jsonl", dedupe=0.5)  # the first four prompts are this much alike
    with pytest.raises(KeyboardInterrupt):
        go(Fake(batch_size=6, stop=1), dedupe=0.5)
    again, tally = go(Fake(batch_size=6), dedupe=0.5)
    assert again == whole
    assert {row["where"] for row in whole} == {"p.jsonl:1", "p.jsonl:5"}
    assert tally.without == 3


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_call_killed_while_it_writes_is_gone_on_with(
    cut: int, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, counted = go(out="whole.jsonl")
    real, writes = candidates.RowLog.append, []

    def append(log: Any, row: Any) -> None:
        writes.append(row)
        if len(writes) == cut:
            with log.path.open("ab") as stream:  # half a line, as a killed process leaves it
                stream.write(json.dumps(row).encode()[:9])
            raise KeyboardInterrupt
        real(log, row)

    monkeypatch.setattr(candidates.RowLog, "append", append)
    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.undo()
    again, tally = go()
    assert again == whole
    assert tally.facts() == counted.facts()


def test_only_a_reward_that_never_works_is_refused(go: Go) -> None:
    def late(prompt: Any) -> float:
        return 1.0 if prompt == "prompt 0" else float("nan")

    _, tally = go(Fake(batch_size=6), reward=late)
    assert tally.dropped["without a reward"] == 4 * 4, (
        "of four prompts the answers that say a thing"
    )
    with pytest.raises(
        ValueError, match=r"none of 12 answers could be rewarded; the first: p\.jsonl"
    ):
        go(reward=lambda completion: None, out="broken.jsonl")


def test_what_is_refused(go: Go, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kept by their reward, and there is none: give --reward"):
        go(best=True)
    with pytest.raises(ValueError, match="samples must be 1 or more; got 0"):
        Selection(samples=0)
    with pytest.raises(ValueError, match="least reward must be a finite number; got inf"):
        Selection(least=float("inf"))
    go()
    with pytest.raises(ValueError, match=r"dedupe was 0\.7, is 0\.5"):
        go(dedupe=0.5)
