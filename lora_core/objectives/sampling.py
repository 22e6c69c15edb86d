"""Rows to train on, sampled from a model: prompts in, kept answers out.

Each prompt is answered K times. An answer is kept if it says something, ended by itself, has a
reward that is high enough (where rewards are given), and repeats nothing that was kept before. Two
methods are this one step and then supervised fine-tuning:

    rejection sampling     the policy's own answers, those that a reward verifies
    distillation           a teacher's answers, all or the best

An answer that was cut at `max_new_tokens` is dropped: as a row it would teach to stop there. It can
be kept where only its beginning counts. What an answer draws depends on the seed and its number and
not on the batch; which answers repeat others depends on the prompts' order, which is the file's.

Ref: Yuan et al. 2023, arXiv:2308.01825, section 3.3 (rejection sampling); Wang et al. 2022,
arXiv:2212.10560, section 2.2 (near duplicates).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from lora_core.data import PromptRow, PromptRows, Tokenizer
from lora_core.data.messages import ungraded
from lora_core.evaluate.near_duplicates import NearDuplicates
from lora_core.files import sha256_file
from lora_core.objectives.answers import Sampler
from lora_core.objectives.candidates import CandidateFile, Tally
from lora_core.objectives.rewards import Rewards, Sample, Scored, refuse_none

Progress = Callable[[Sequence[int]], Iterable[int]]
Drawn = tuple[int, Sample, Scored | None]
"""number of the answer in the run, the answer, its reward"""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How many answers are sampled, and which are kept."""

    samples: int = 4
    """answers to each prompt"""
    best: bool = False
    """of each prompt's answers only the one with the highest reward (of equals the first)"""
    least: float | None = None
    """only rewards of at least this"""
    dedupe: float = 0.7
    """ROUGE-L from which on an answer repeats another; 0: exact duplicates alone"""
    keep_cut: bool = False
    """whether answers that were cut at max_new_tokens are kept"""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more; got {self.samples}")
        if self.least is not None and not isfinite(self.least):
            raise ValueError(f"the least reward must be a finite number; got {self.least}")
        NearDuplicates(self.dedupe)

    @property
    def by_reward(self) -> bool:
        """Whether it needs rewards."""
        return self.best or self.least is not None

    def why_not(self, sample: Sample, scored: Scored | None) -> str | None:
        """Why an answer is dropped, whatever the others say; None: it is not."""
        if not sample.completion.strip():
            return "empty"
        if not sample.ended and not self.keep_cut:
            return "cut at max_new_tokens"
        if scored is None:
            return None
        if scored.value is None:
            return "without a reward"
        low = self.least is not None and scored.value < self.least
        return "with too low a reward" if low else None


def gather(  # what it is made of, by name
    prompts: PromptRows,
    sampler: Sampler,
    selection: Selection,
    out: Path,
    *,
    rewards: Rewards | None = None,
    bound: Mapping[str, Any] | None = None,
    with_ids: bool = False,
    progress: Progress | None = None,
) -> Tally:
    """Answer prompts and keep what is good, row by row on disk; go on where a call broke off.

    Args:
        prompts: what is asked.
        sampler: the model with how it answers.
        selection: what is kept.
        out: JSON Lines file of rows to train on (see candidates.py).
        rewards: of the answers; None: they have none.
        bound: further settings that the file is bound to: hashes of model and prompts, for one.
        with_ids: whether rows also hold the token ids that were sampled.
        progress: wraps the chunks of prompts that are left (a `tqdm`, for one).

    Raises:
        FileNotFoundError: no folder for `out`.
        ValueError: `out` of other settings, a selection by reward without rewards, or answers none
            of which could be rewarded, while no other was before.
    """
    if selection.by_reward and rewards is None:
        raise ValueError("answers are to be kept by their reward, and there is none: give --reward")
    settings = {
        **(bound or {}),
        **asdict(selection),
        "rewards": None if rewards is None else rewards.facts(),
        "seed": sampler.seed,
        "temperature": sampler.temperature,
        "max_new_tokens": sampler.max_new_tokens,
    }
    file = CandidateFile(out, settings)
    kept = NearDuplicates(selection.dedupe)
    for row in file.kept:
        kept.keep(*_texts(row))
    size = max(1, sampler.batch_size // selection.samples)
    # the same chunks as of an uninterrupted call: rounding may differ between batches
    starts = [
        start
        for start in range(0, len(prompts), size)
        if not file.done.issuperset(range(start, min(start + size, len(prompts))))
    ]
    for start in progress(starts) if progress is not None else starts:
        numbers = range(start, min(start + size, len(prompts)))
        every = _drawn(prompts, numbers, sampler, rewards, selection.samples)
        if rewards is not None and not file.tally.rewards:  # a broken reward, and not bad answers
            refuse_none([scored for _, drawn in every for _, _, scored in drawn if scored])
        for number, drawn in every:
            if number in file.done:
                continue
            rows, dropped = _chosen(prompts[number], drawn, selection, kept, sampler, with_ids)
            file.add(number, rows, _line(prompts[number], drawn, dropped))
    return file.tally


def origin(
    model: Path, adapter: Path | None, prompts: Sequence[tuple[str, float]], tok: Tokenizer
) -> dict[str, Any]:
    """What answers come from, as hashes: a file of rows is bound to it.

    Args:
        model: the base's folder.
        adapter: the adapter's, or None.
        prompts: (file, weight) pairs.
        tok: the tokenizer, with the template that prompts are rendered in.
    """
    return {
        "model": _hashes(model),
        "adapter": None if adapter is None else _hashes(adapter),
        "prompts": [[sha256_file(path), weight] for path, weight in prompts],
        "template": tok.chat_template,
    }


def _hashes(folder: Path) -> dict[str, str]:
    """Hashes of a folder's weights, and of an adapter's settings, by name."""
    files = [*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")]
    return {file.name: sha256_file(file) for file in sorted(files)}


def _drawn(
    prompts: PromptRows,
    numbers: Sequence[int],
    sampler: Sampler,
    rewards: Rewards | None,
    each: int,
) -> list[tuple[int, list[Drawn]]]:
    """Each prompt's number and its answers with their rewards."""
    first = numbers[0] * each
    samples = sampler([prompts[i] for i in numbers], each, first)
    scored = [None] * len(samples) if rewards is None else rewards.score(samples)
    every = list(zip(range(first, first + len(samples)), samples, scored, strict=True))
    return [
        (number, every[place * each : (place + 1) * each]) for place, number in enumerate(numbers)
    ]


def _chosen(
    prompt: PromptRow,
    drawn: Sequence[Drawn],
    selection: Selection,
    kept: NearDuplicates,
    sampler: Sampler,
    with_ids: bool,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of a prompt's answers that are kept, and how many were dropped for what."""
    dropped: Counter[str] = Counter()
    left: list[Drawn] = []
    for one in drawn:
        why = selection.why_not(one[1], one[2])
        if why is None:
            left.append(one)
        else:
            dropped[why] += 1
    if selection.best and left:
        dropped["not the best of their prompt"] += len(left) - 1
        left = [max(left, key=_value)]
    rows = []
    for number, sample, scored in left:
        row = _row(prompt, sample, scored) | {"seed": sampler.seed_of(number)}
        texts = _texts(row)
        if (why := kept.found(*texts)) is not None:
            dropped[f"{why} of kept answers"] += 1
            continue
        kept.keep(*texts)
        if with_ids:
            row |= {"prompt_ids": prompt.ids, "completion_ids": sample.completion_ids}
        rows.append(row)
    return rows, +dropped


def _value(one: Drawn) -> float:
    scored = one[2]
    assert scored is not None  # a selection of the best has rewards
    assert scored.value is not None  # the others are dropped before
    return scored.value


def _row(prompt: PromptRow, sample: Sample, scored: Scored | None) -> dict[str, Any]:
    """A row to train on, in the prompt's own form; further fields lie apart from the row's keys."""
    row: dict[str, Any]
    if isinstance(prompt.prompt, str):
        row = {"prompt": prompt.prompt, "completion": sample.completion}
    else:
        said = {"role": "assistant", "content": sample.completion}
        row = {"messages": [*ungraded(prompt.prompt), said]}
        if prompt.tools:
            row["tools"] = prompt.tools
    if scored is not None:
        row |= {"reward": scored.value, "parts": scored.parts}
    row["where"] = prompt.where
    return row | ({"fields": prompt.fields} if prompt.fields else {})


def _texts(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's prompt and answer as they are compared."""
    if "messages" not in row:
        return row["prompt"], row["completion"]
    *before, last = row["messages"]
    return "\n".join(f"{m['role']}: {m.get('content')}" for m in before), last["content"]


def _line(prompt: PromptRow, drawn: Sequence[Drawn], dropped: Counter[str]) -> dict[str, Any]:
    """What the progress file says of a prompt."""
    scored = [one[2] for one in drawn if one[2] is not None]
    whys = [one.why for one in scored if one.why is not None]
    return {
        "where": prompt.where,
        "sampled": len(drawn),
        "dropped": dict(dropped),
        "answers": [sample.completion for _, sample, _ in drawn],
        "rewards": [one.value for one in scored],
        **({"why": whys[0]} if whys else {}),
    }
