"""Sample rows to train on, from folder to file: a model and prompts in, kept answers out.

The model is opened as it was trained, the prompts are read as `finetune` reads them, and
lora_core/objectives/sampling.py does the work: the same step that the objective `rft` begins with.
Whose answers they are is the only difference between the two uses: the policy's own, verified by a
reward, are rejection sampling; a teacher's are distillation (sequence-level, in Kim and Rush's
word: the student learns the teacher's texts and not its probabilities, so that any two tokenizers
go together).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

from lora_core.data import PromptRows, load_template, parse_columns, parse_sources
from lora_core.device import dtype_policy
from lora_core.objectives.answers import Sampler
from lora_core.objectives.candidates import Tally
from lora_core.objectives.rewards import TIMEOUT, Rewards
from lora_core.objectives.sampling import Selection, gather, origin
from lora_core.runs.opening import Opened, check_no_heads, check_writes_text, open_model

VERIFIED = 1.0  # the least reward of a verified answer, where nothing else is said


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What is asked of whom, and which answers are kept."""

    prompts: tuple[str, ...]
    """JSONL files of prompts, each optionally with :weight."""
    out: str
    """JSONL file that gets the rows."""
    model: str | None = None
    """Hugging Face folder; none: the adapter's base."""
    adapter: str | None = None
    """Adapter folder; none: the model as it is."""
    reward: tuple[str, ...] = ()
    """FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION or a reward adapter's folder, each optionally with
    :WEIGHT."""
    reward_timeout: float = TIMEOUT
    """Seconds that a reward function may take for one answer."""
    samples: int = 4
    """Answers to each prompt."""
    keep: Literal["all", "best", "verified"] = "all"
    """All answers, of each prompt the one with the highest reward, or those at the threshold."""
    threshold: float | None = None
    """Least reward of a kept answer; none: 1 for verified, any for all and best."""
    dedupe: float = 0.7
    """ROUGE-L from which on a row repeats a kept one; 0: exact duplicates alone."""
    keep_cut: bool = False
    """Keep answers that were cut at max_new_tokens."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 1.0
    """Logits are divided by it; 0: the likeliest token."""
    seed: int = 0
    """Of the sampling."""
    batch_size: int = 64
    """Answers at a time."""
    max_length: int = 2048
    """Longest prompt, in tokens."""
    columns: str | None = None
    """Names of the data's fields: prompt=question."""
    template: str | None = None
    """Chat template: a built-in name, a file, or Jinja text; none: the tokenizer's own."""
    quantize: str | None = None
    """4-bit code of the base; none: as the adapter was trained."""
    device: str | None = None
    """cpu, cuda …; none: the accelerator, else the CPU."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("no prompts: give --prompts FILE.jsonl")
        if self.keep not in ("all", "best", "verified"):
            raise ValueError(f"keep must be all, best or verified; got {self.keep!r}")
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or more; got {self.temperature}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("temperature 0 gives the same answer each time: set samples to 1")
        if self.selection.by_reward and not self.reward:
            asked = f"keep {self.keep}" if self.threshold is None else "a threshold"
            raise ValueError(f"{asked} goes by a reward: give --reward")

    @property
    def selection(self) -> Selection:
        """Which answers are kept."""
        least = self.threshold
        if self.keep == "verified" and least is None:
            least = VERIFIED
        return Selection(
            samples=self.samples,
            best=self.keep == "best",
            least=least,
            dedupe=self.dedupe,
            keep_cut=self.keep_cut,
        )


def sample(
    config: SampleConfig,
    say: Callable[[str], None] = print,
    progress: Callable[[Sequence[int]], Iterable[int]] | None = None,
) -> Tally:
    """Answer the prompts and keep what is good in `config.out`; go on where a call broke off.

    Args:
        config: model, prompts, what is kept.
        say: prints a line.
        progress: wraps the chunks of prompts that are left (a `tqdm`, for one).

    Returns:
        What became of the answers, those of earlier calls included.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: file:line of a bad row, rows of other settings in `config.out`, or a reward
            that fails for every answer.
    """
    check_no_heads(config.model, config.adapter)
    opened = open_model(
        config.model, config.adapter, quantize=config.quantize, device=config.device
    )
    check_writes_text(opened.model, opened.source)
    if config.template is not None:
        opened.tok.chat_template = load_template(config.template)
    for note in opened.notes:
        say(f"note: {note}")
    sources = parse_sources(config.prompts)
    prompts = PromptRows.from_jsonl(
        sources,
        opened.tok,
        max_length=config.max_length,
        columns=None if config.columns is None else parse_columns(config.columns),
        seed=config.seed,
    )
    say(f"prompts: {prompts.report}")
    _check_room(opened, prompts, config.max_new_tokens)
    adapter = None if config.adapter is None else Path(config.adapter)
    bound = origin(opened.source, adapter, sources, opened.tok) | {
        "quantize": opened.quantize,
        "columns": config.columns,
        "max_length": config.max_length,
    }
    return gather(
        prompts,
        _sampler(opened, config),
        config.selection,
        Path(config.out),
        rewards=_rewards(opened, config, say),
        bound=bound,
        progress=progress,
    )


def _sampler(opened: Opened, config: SampleConfig) -> Sampler:
    device = next(opened.model.parameters()).device
    return Sampler(
        opened.model,
        opened.tok,
        config.max_new_tokens,
        config.temperature,
        config.seed,
        dtype_policy("auto", device),
        config.batch_size,
    )


def _rewards(opened: Opened, config: SampleConfig, say: Callable[[str], None]) -> Rewards | None:
    if not config.reward:
        return None
    device = next(opened.model.parameters()).device
    base = (str(opened.source), opened.quantize)
    rewards = Rewards.open(
        config.reward, config.reward_timeout, opened.model, opened.tok, device, base
    )
    for line in rewards.notes():
        say(f"note: {line}")
    return rewards


def _check_room(opened: Opened, prompts: PromptRows, new: int) -> None:
    """Refuse prompts whose answers would run out of the model's positions, before any answer."""
    limit = getattr(opened.model.config, "max_position_embeddings", None)
    if limit is None:
        return
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    row = prompts[longest]
    if len(row.ids) + new > limit:
        raise ValueError(
            f"{row.where}: a prompt of {len(row.ids)} tokens + {new} new ones is more than the "
            f"model's {limit} positions: lower --max-new-tokens, or --max-length, which drops "
            "longer prompts"
        )
