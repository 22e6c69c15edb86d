"""Answers that a policy samples to prompts, with their rewards: what rollouts are made of.

What an answer draws is a function of the run's seed and the answer's number, and of nothing else
in its batch, so that a run that is resumed samples what the uninterrupted one would have. It is
sampled from the model's whole distribution at a temperature (no top-p, no top-k): log-probabilities
of that same distribution are what is trained, and a cut one would be another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core.data import PromptRow, PromptRows, Tokenizer
from lora_core.device import DtypePolicy
from lora_core.models import generate_ids, left_pad
from lora_core.objectives.rewards import Rewards, Sample, Scored, refuse_none
from lora_core.train.sources import SourceError


@dataclass(frozen=True)
class Sampler:
    """How a policy answers."""

    model: nn.Module
    """with the policy's adapters active"""
    tok: Tokenizer
    max_new_tokens: int
    temperature: float
    seed: int
    policy: DtypePolicy
    """dtype of the products"""
    batch_size: int = 64
    """answers that are sampled together"""

    def __call__(self, prompts: Sequence[PromptRow], each: int, first: int = 0) -> list[Sample]:
        """`each` answers to every prompt, one prompt's after the other's.

        Args:
            prompts: the prompts.
            each: answers to each.
            first: number of the first answer in the run, which its seed comes from.
        """
        asked = [prompt for prompt in prompts for _ in range(each)]
        samples: list[Sample] = []
        for start in range(0, len(asked), self.batch_size):
            samples += self._some(asked[start : start + self.batch_size], first + start)
        return samples

    def seed_of(self, number: int) -> int:
        """The seed that an answer draws by."""
        return (self.seed * 1_000_003 + number) % 2**31

    def _some(self, asked: Sequence[PromptRow], first: int) -> list[Sample]:
        ids, mask = left_pad([prompt.ids for prompt in asked], self.tok.pad_id)
        seeds = [self.seed_of(first + i) for i in range(len(asked))]
        with torch.no_grad(), self.policy.autocast():
            found = generate_ids(
                self.model,
                ids,
                mask,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=seeds,
                eos_ids=self.tok.eos_ids,
                pad_id=self.tok.pad_id,
            )
        return [self._sample(row, new) for row, new in zip(asked, found, strict=True)]

    def _sample(self, row: PromptRow, new: list[int]) -> Sample:
        ended = new[-1] in self.tok.eos_ids
        return Sample(
            row.where,
            row.prompt,
            self.tok.decode(new[:-1] if ended else new, skip_special_tokens=True),
            row.fields,
            row.ids,
            tuple(new),
            ended,
        )


class HeldOut:
    """Held-out prompts, answered anew at each evaluation with the same seeds."""

    def __init__(self, prompts: PromptRows, sampler: Sampler, rewards: Rewards) -> None:
        self.prompts, self.sampler, self.rewards = prompts, sampler, rewards
        self.size = sampler.batch_size

    def per_epoch(self) -> int:
        """Batches of an evaluation."""
        return -(-len(self.prompts) // self.size)

    def epoch(self, number: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an evaluation."""
        every: list[Scored] = []
        for at in range(start, self.per_epoch()):
            some = [
                self.prompts[i] for i in range(len(self.prompts))[at * self.size :][: self.size]
            ]
            # numbers that no rollout has
            samples = self.sampler(some, 1, 2**30 + at * self.size)
            scored = self.rewards.score(samples)
            every += scored
            if at == self.per_epoch() - 1:  # of all batches: the last may be a single answer
                try:
                    refuse_none(every)
                except ValueError as error:
                    raise SourceError(f"held-out prompts: {error}") from None
            values = [torch.nan if one.value is None else one.value for one in scored]
            yield {
                "evaluation": torch.tensor(True),
                "rewards": torch.tensor(values, dtype=torch.float64),
                "ended": torch.tensor([sample.ended for sample in samples]),
            }

    def note(self) -> None:
        """Nothing."""

    def largest(self) -> None:
        """Not known."""
