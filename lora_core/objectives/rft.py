"""`rft`: training on what a reward finds good, in both senses of the word.

With `--reward` the data are prompts: the policy as it starts answers each several times, answers
whose reward reaches `reward_threshold` are kept, those that repeat others dropped, and the rest is
supervised fine-tuning on the very tokens that were sampled (rejection sampling). The kept answers
lie in the run's folder, so that a resumed run does not sample anew. The next round is another run,
with `--adapter` the last one's folder.

Without `--reward` the data are rows with a `reward`: each row's likelihood is weighted by it
(weighted.py).

Neither needs a reference or a second model; nothing is sampled while training.

Ref: Yuan et al. 2023, arXiv:2308.01825, section 3.3; Peters & Schaal 2007; Peng et al. 2019,
arXiv:1910.00177.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lora_core.adapters import disable_adapters
from lora_core.data import IGNORED, PromptRow, PromptRows, Rows, parse_sources
from lora_core.data.lines import read_rows
from lora_core.device import dtype_policy
from lora_core.files import sha256_file
from lora_core.objectives.answers import HeldOut, Sampler
from lora_core.objectives.candidates import Tally
from lora_core.objectives.objective import Objective, Work
from lora_core.objectives.policy_loss import evaluated
from lora_core.objectives.policy_options import PolicyOptions
from lora_core.objectives.preference_data import check_preference_data
from lora_core.objectives.prompts import read_prompts, refuse_processes
from lora_core.objectives.rewards import Rewards, Sample
from lora_core.objectives.sampling import Selection, gather, origin
from lora_core.objectives.setup import Setup
from lora_core.objectives.supervised import Supervised, SupervisedOptions
from lora_core.objectives.weighted import (
    WeightedLoss,
    WeightedRows,
    effective_rows,
    read_row_rewards,
    reward_weights,
    weighted_batch,
)
from lora_core.train.step import CausalLoss, LossResult

CANDIDATES = "candidates.jsonl"
SAMPLED = frozenset(
    {"reward", "reward_timeout", "group_size", "max_new_tokens", "temperature"}
    | {"reward_threshold", "best_only", "dedupe", "keep_cut"}
)
WEIGHTED = frozenset({"weights", "reward_beta"})


@dataclass(frozen=True, kw_only=True)
class RFTOptions(PolicyOptions):
    """How answers are sampled and accepted, or rows weighted."""

    reward_threshold: float = 1.0
    """rft: least reward of an answer that is trained on"""
    best_only: bool = False
    """rft: train on the best accepted answer to each prompt alone"""
    dedupe: float = 0.7
    """rft: ROUGE-L from which on an answer repeats a kept one; 0: exact duplicates alone"""
    keep_cut: bool = False
    """rft: train on answers that were cut at max-new-tokens too"""
    weights: Literal["exp", "reward"] = "exp"
    """rft on rows with rewards: weigh a row by exp(reward / reward-beta), or by the reward"""
    reward_beta: float = 1.0
    """rft on rows with rewards: the less, the more the best rows count; in the reward's unit"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in ("exp", "reward"):
            raise ValueError(f"weights must be exp or reward; got {self.weights!r}")
        if not 0 < self.reward_beta < float("inf"):
            raise ValueError(f"reward_beta must be a number above 0; got {self.reward_beta!r}")
        if not abs(self.reward_threshold) < float("inf"):
            raise ValueError(
                f"reward_threshold must be a finite number; got {self.reward_threshold!r}"
            )
        Selection(dedupe=self.dedupe)


@dataclass(frozen=True)
class AcceptedLoss:
    """Cross-entropy of accepted answers, and minus the reward of held-out ones."""

    trained: CausalLoss

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], normalizer: float
    ) -> tuple[Tensor, Tensor] | LossResult:
        """Sum over the batch / normalizer."""
        if "evaluation" in batch:
            return evaluated(batch, normalizer)
        return self.trained(model, batch, normalizer)

    def count(self, batch: Mapping[str, Any]) -> float:
        """Graded tokens, or rewarded answers."""
        if "evaluation" in batch:
            return int((~batch["rewards"].isnan()).sum())
        return self.trained.count(batch)


class BaseSampler(Sampler):
    """Answers of the base: a fresh adapter may begin elsewhere (a soft prompt, or PiSSA).

    The adapters are off while answers are sampled and no longer, since a reward adapter in the same
    model would be off with them.
    """

    def __call__(self, prompts: Sequence[PromptRow], each: int, first: int = 0) -> list[Sample]:
        """`each` answers to every prompt."""
        with disable_adapters(self.model):
            return super().__call__(prompts, each, first)


class RFT(Objective[RFTOptions]):
    """Rejection sampling, or reward-weighted likelihood."""

    name = "rft"
    help = (
        "with --reward: the policy's own best answers to prompts (rejection sampling); without: "
        "rows weighted by their reward"
    )
    options_class = RFTOptions
    group_size: ClassVar[int] = 4

    @property
    def samples(self) -> bool:
        """Whether answers are sampled, or rows weighted."""
        return bool(self.options.rewards)

    def check(self, setup: Setup) -> None:
        """Options of the other sense, and of other objectives."""
        self.options.check_used(
            f"{self.name} {'with' if self.samples else 'without'} --reward",
            SAMPLED if self.samples else WEIGHTED,
        )
        if self.samples:
            refuse_processes(self.name)
            Rewards.check(self.options.rewards)
        else:
            check_preference_data(setup, self.name)
            if setup.training.label_smoothing:
                raise ValueError("label_smoothing is no part of a weighted likelihood: set it to 0")

    def read(self, setup: Setup) -> None:
        """Prompts, or rows with their rewards."""
        self.prompts: PromptRows
        self.held_out: Any = None
        if self.samples:
            self.prompts, self.held_out = read_prompts(setup, self.name)
        else:
            self._read_weighted(setup)

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """What was sampled and accepted, or the weighted rows."""
        if not self.samples:
            pad = setup.tok.pad_id
            return Work(
                self.rows,
                self.held_out,
                WeightedLoss(),
                lambda rows: weighted_batch(rows, pad),
            )
        options, seed = self.options, setup.training.seed
        # a base that is trained is not the reward model's any more
        base = None if setup.method == "full" else (setup.settings.model, setup.quantize)
        rewards = Rewards.open(
            options.rewards, options.reward_timeout, model, setup.tok, setup.device, base
        )
        for line in rewards.notes():
            setup.say(f"note: {line}")
        policy = dtype_policy(setup.training.dtype, setup.device)
        sampler = Sampler(
            model, setup.tok, options.max_new_tokens, options.temperature, seed, policy
        )
        self.tally = self._sample(setup, sampler, rewards)
        path = setup.out / CANDIDATES
        for line in self.tally.lines():
            setup.say(line)
        if not self.tally.kept:
            raise ValueError(
                f"no answer was accepted of {self.tally.sampled} to {self.tally.prompts} prompts "
                f"({_reasons(self.tally)}): lower --reward-threshold, raise --group-size, or look "
                f"at the reward; {path.with_suffix('.progress.jsonl')} has every answer"
            )
        facts = {
            "rewards": rewards.facts(),
            "candidates": {"sha256": sha256_file(path), **self.tally.facts()},
        }
        rows, smoothing = _rows_of(path), setup.training.label_smoothing
        if self.held_out is None:
            return Work(rows, facts=facts)
        held_out = HeldOut(self.held_out, sampler, rewards)
        return Work(rows, held_out, AcceptedLoss(CausalLoss(smoothing)), facts=facts)

    def report(self, result: Any) -> list[str]:
        """How much the training was of."""
        if not self.samples:
            return []
        return [f"trained on {self.tally.kept} accepted answers, which are in {CANDIDATES}"]

    def _sample(self, setup: Setup, sampler: Sampler, rewards: Rewards) -> Tally:
        """Answers of the policy as it starts: the base, or the adapter that is gone on with."""
        options, settings = self.options, setup.settings
        selection = Selection(
            samples=self.group_size if options.group_size is None else options.group_size,
            best=options.best_only,
            least=options.reward_threshold,
            dedupe=options.dedupe,
            keep_cut=options.keep_cut,
        )
        bound = origin(
            Path(settings.model), setup.continued, parse_sources(settings.data), setup.tok
        )
        setup.out.mkdir(parents=True, exist_ok=True)
        return gather(
            self.prompts,
            sampler if setup.continued is not None else BaseSampler(**vars(sampler)),
            selection,
            setup.out / CANDIDATES,
            rewards=rewards,
            bound=bound | {"quantize": setup.quantize},
            with_ids=True,
            progress=lambda starts: setup.bar(starts, "chunks", "sampling"),
        )

    def _read_weighted(self, setup: Setup) -> None:
        settings = setup.settings
        sources = [path for path, _ in parse_sources(settings.data)]
        sources += [settings.eval_data] if settings.eval_data is not None else []
        found: dict[str, float] = {}
        for path in sources:
            found |= read_row_rewards(path, settings.column_names)
        supervised = Supervised(SupervisedOptions())
        supervised.read(setup)
        rows: Rows = supervised.rows
        options = self.options
        weights = reward_weights(
            [found[where] for where in rows.where], options.weights, options.reward_beta
        )
        self.rows = WeightedRows(rows, weights)
        setup.say(
            f"weights by {options.weights}: {min(weights):.3g} to {max(weights):.3g} at a mean of "
            f"1; {len(rows)} rows weigh as much as {effective_rows(weights):.1f} equal ones"
        )
        if supervised.held_out is not None:
            held_out: Rows = supervised.held_out
            # of the same scale as each other; their loss is compared with its own past alone
            again = reward_weights(
                [found[where] for where in held_out.where], options.weights, options.reward_beta
            )
            self.held_out = WeightedRows(held_out, again)


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """Accepted answers as rows: the tokens that were sampled, the prompt's not graded."""
    rows = []
    for _, row in read_rows(path):
        prompt, answer = row["prompt_ids"], row["completion_ids"]
        labels = [*[IGNORED] * len(prompt), *answer]
        rows.append({"input_ids": [*prompt, *answer], "labels": labels})
    return rows


def _reasons(tally: Tally) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common())
