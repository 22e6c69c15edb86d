"""Rollouts: batches that the policy makes itself, as the loop asks for them.

    some prompts  ->  answers  ->  rewards  ->  advantages  ->  batches of the next steps
                      sampler      Rewards      `weigh`

The loop asks for a step's batches just before the step, so that each rollout is sampled from the
weights as they then are. A rollout is gone over `passes` times in batches of so many answers; with
one pass and one step the answers come from the very policy that is trained (on-policy).

The log-probabilities under the sampling policy are computed by the scoring pass that the loss
uses, on the loss's own batches, and not taken from the sampler: a cached token-by-token pass
rounds otherwise, and ratios of a policy to itself have to be 1.

Every answer goes to `rollouts.jsonl` as it is rewarded. Rewards that fail are left out of their
group; if all of a rollout fail the run stops, and what was trained so far is kept. What a rollout
in progress consists of is part of a checkpoint, so that a run may be stopped in the middle of one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.data import PromptRow
from lora_core.data.branches import Branched, branch_batch
from lora_core.objectives.answers import Sampler
from lora_core.objectives.rewards import Rewards, Sample, Scored, refuse_none
from lora_core.objectives.rollout_log import LOG, write_answers
from lora_core.train.sources import SourceError, generator_of, shuffled

Weigh = Callable[["Rollout"], None]


@dataclass
class Rollout:
    """N answers, a prompt's G after one another, and what their loss needs; all on the CPU."""

    number: int
    """from 0 in the run"""
    group_size: int
    prompts: list[tuple[int, ...]]
    """of each answer"""
    completions: list[tuple[int, ...]]
    """of each answer"""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """(N,) or (N, L) each, what `weigh` put in: advantages, old_log_probs …"""
    chunks: list[list[int]] = field(default_factory=list)
    """the answers of each batch of one pass"""

    def batch(self, chosen: Sequence[int], shared: bool, pad_id: int) -> dict[str, Any]:
        """The batch of some answers; those of one prompt share it where they may."""
        rows = [
            Branched(prompt, tuple(self.completions[i] for i in some))
            for prompt, some in self._by_prompt(chosen)
        ]
        batch: dict[str, Any] = dict(branch_batch(rows, shared=shared, pad_id=pad_id))
        width = batch["completions"].shape[1]
        for name, values in self.tensors.items():
            picked = values[list(chosen)]
            batch[name] = picked[:, :width] if picked.dim() == 2 else picked
        return batch

    def _by_prompt(self, chosen: Sequence[int]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Runs of answers to one prompt."""
        for group, some in groupby(chosen, lambda i: i // self.group_size):
            yield self.prompts[group * self.group_size], list(some)


class Rollouts:
    """A source of batches (train/sources.py) that samples them.

    Args:
        prompts: to be answered, in an order that the seed and the epoch determine.
        sampler: of answers.
        rewards: of answers.
        weigh: fills a rollout's `tensors`, given `rewards` (N,), NaN where one failed.
        group_size: answers to a prompt.
        at_once: prompts of a rollout.
        batch_size: answers of a batch.
        passes: how often a rollout is gone over.
        shared: whether answers to a prompt share its computation.
        log: file that gets every answer; None: none.
        step: answers of an optimizer step; an epoch's short last rollout is left out where it does
            not fill whole ones, as a step would mix its passes.
        controller: what else changes from rollout to rollout, if something does: an object with
            `state_dict` and `load_state_dict`.
        say: prints a line.
    """

    def __init__(  # noqa: PLR0913  # the parts of a rollout
        self,
        prompts: Sequence[PromptRow],
        sampler: Sampler,
        rewards: Rewards,
        weigh: Weigh,
        *,
        group_size: int,
        at_once: int,
        batch_size: int,
        passes: int = 1,
        shared: bool = True,
        log: Path | None = None,
        step: int = 1,
        controller: Any = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.prompts, self.sampler, self.rewards, self.weigh = prompts, sampler, rewards, weigh
        self.group_size, self.at_once = group_size, at_once
        self.batch_size, self.passes = batch_size, passes
        self.shared, self.log, self.controller = shared, log, controller
        self.step, self.say, self._said = step, say, False
        self.current: Rollout | None = None

    # --- the loop's side ---

    def per_epoch(self) -> int:
        """Batches in an epoch, over all its rollouts."""
        return sum(self._batches(len(some)) for some in self._plan(0))

    def epoch(self, number: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of one epoch from the `start`-th on."""
        plan = self._plan(number)
        first, done = number * len(plan), 0
        for at, some in enumerate(plan):
            size = self._batches(len(some))
            if start < done + size:
                yield from self._rollout(first + at, some, number, max(start - done, 0))
            done += size

    def note(self) -> str:
        """What a rollout is."""
        return (
            f"rollouts of {self.at_once} prompts x {self.group_size} answers, "
            f"gone over {self.passes} time{'s' if self.passes > 1 else ''} in batches of "
            f"{self.batch_size}"
        )

    def largest(self) -> None:
        """Not known before it is sampled."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The rollout in progress and the controller."""
        plain: dict[str, Any] = {}
        if self.controller is not None:
            plain["controller"] = self.controller.state_dict()
        if self.current is None:
            return {}, plain
        now = self.current
        plain["rollout"] = {
            "number": now.number,
            "group_size": now.group_size,
            "prompts": now.prompts,
            "completions": now.completions,
            "chunks": now.chunks,
        }
        return now.tensors, plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if self.controller is not None:
            self.controller.load_state_dict(plain["controller"])
        self.current = None
        if (now := plain.get("rollout")) is not None:
            lists = {key: [tuple(ids) for ids in now[key]] for key in ("prompts", "completions")}
            self.current = Rollout(
                now["number"], now["group_size"], **lists, tensors=dict(tensors),
                chunks=now["chunks"],
            )  # fmt: skip

    # --- one rollout ---

    def _plan(self, epoch: int) -> list[list[int]]:
        """The prompts' numbers of each rollout of an epoch."""
        order = shuffled(range(len(self.prompts)), generator_of(self.sampler.seed, epoch))
        plan = [order[i : i + self.at_once] for i in range(0, len(order), self.at_once)]
        if len(plan) > 1 and len(plan[-1]) * self.group_size % self.step:
            plan.pop()  # its prompts are others in the next epoch
        return plan

    def _batches(self, prompts: int) -> int:
        return self.passes * -(-prompts * self.group_size // self.batch_size)

    def _rollout(
        self, number: int, some: list[int], epoch: int, start: int
    ) -> Iterator[dict[str, Any]]:
        """The batches of a rollout from the `start`-th on; it is sampled unless it is at hand."""
        if start == 0 or self.current is None or self.current.number != number:
            if start:
                raise SourceError(
                    f"rollout {number} was in progress and is not in the checkpoint: resume one "
                    "that this version wrote"
                )
            self.current = self.sample([self.prompts[i] for i in some], number)
        now = self.current
        for at in range(start, self.passes * len(now.chunks)):
            turn, place = divmod(at, len(now.chunks))
            # each pass in an order of its own
            order = generator_of(self.sampler.seed + 1, number * self.passes + turn)
            chosen = shuffled(now.chunks, order if turn else None)[place]
            yield now.batch(chosen, self.shared, self.sampler.tok.pad_id)

    def sample(self, prompts: Sequence[PromptRow], number: int) -> Rollout:
        """Answer prompts, reward the answers and weigh them.

        Raises:
            SourceError: no answer could be rewarded.
        """
        first = number * self.at_once * self.group_size
        samples = self.sampler(prompts, self.group_size, first)
        scored = self.rewards.score(samples)
        try:
            refuse_none(scored)
        except ValueError as error:
            self._write(number, samples, scored)
            raise SourceError(f"rollout {number}: {error}") from None
        count = len(samples)
        rollout = Rollout(
            number,
            self.group_size,
            [sample.prompt_ids for sample in samples],
            [sample.completion_ids for sample in samples],
            chunks=[
                list(range(i, min(i + self.batch_size, count)))
                for i in range(0, count, self.batch_size)
            ],
        )
        values = [math.nan if one.value is None else one.value for one in scored]
        rollout.tensors["rewards"] = torch.tensor(values, dtype=torch.float64)
        rollout.tensors["ended"] = torch.tensor([sample.ended for sample in samples])
        if len(self.rewards.parts) > 1:
            for part in self.rewards.parts:
                found = [one.parts.get(part.name, math.nan) for one in scored]
                rollout.tensors[f"reward/{part.name}"] = torch.tensor(found, dtype=torch.float64)
        self.weigh(rollout)
        self._write(number, samples, scored, rollout)
        return rollout

    def _write(
        self,
        number: int,
        samples: Sequence[Sample],
        scored: Sequence[Scored],
        weighed: Rollout | None = None,
    ) -> None:
        """Write the answers to the log, and say the first time that a reward fails."""
        failed = [one for one in scored if one.value is None]
        if failed and not self._said:
            self._said = True
            self.say(
                f"rollout {number}: {len(failed)} of {len(scored)} answers have no reward and are "
                f"left out; the first: {failed[0].why} (said once; {LOG} names them all)"
            )
        if self.log is not None:
            advantages = None if weighed is None else _by_answer(weighed)
            write_answers(self.log, number, samples, scored, advantages)


def _by_answer(rollout: Rollout) -> list[float]:
    """Each answer's advantage; of tokens' the mean."""
    gains = rollout.tensors["advantages"]
    if gains.dim() == 1:
        return gains.tolist()
    counts = torch.tensor([len(ids) for ids in rollout.completions])
    return (gains.sum(1) / counts).tolist()
