"""Tuning makes what a model writes less varied, and LoRA less so than full fine-tuning.

The paper counts how many different answers a model samples to one question and finds most for the
base, fewest after full fine-tuning, and LoRA between (section 4). Here the base and both methods at
their best rates continue prefixes of held-out general text, by plain sampling: temperature 1, a
fixed number of tokens, several samples a prefix. distinct-2 is the share of different word pairs in
the samples of one prefix; all texts are equally long, which it depends on. The prefixes are nothing
like the task: what is measured is how far tuning narrows what it was not about.

Repetition (the share of a text's 4-grams that it has already said) stands beside it, since a model
that breaks down repeats itself, and babble is varied: distinct alone would praise both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from torch import nn

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.forgetting_lr import variants
from benchmarks.papers.full_vs_lora import RATES
from benchmarks.papers.rates import at_best
from benchmarks.papers.task import BASE, Variant, general_windows, run_folder, trained
from lora_core.data import Tokenizer, load_tokenizer
from lora_core.evaluate.diversity import distinct, repetition
from lora_core.files import atomic_write
from lora_core.models import generate_ids, left_pad

PREFIXES, SAMPLES = 12, 6
PREFIX_TOKENS, NEW_TOKENS = 32, 48
KEPT = "samples.json"


@dataclass(frozen=True)
class Texts:
    """What a model wrote: of each prefix its samples."""

    samples: list[list[str]]

    @property
    def distinct(self) -> float:
        """distinct-2 of the samples of one prefix, the mean over prefixes."""
        return fmean(distinct(texts, 2).value for texts in self.samples)

    @property
    def repetition(self) -> float:
        """Share of repeated 4-grams of a text, the mean over texts."""
        return repetition([text for texts in self.samples for text in texts]).value


def run(settings: Settings) -> Finding:
    """Sampled texts of the base, LoRA and full fine-tuning."""
    written = {"base": [samples(settings, BASE, seed) for seed in settings.seeds]}
    for name, variant in variants(settings).items():
        best = at_best(settings, variant, RATES[name], general=True)
        tuned = replace(variant, lr=best.lr)
        written[name] = [samples(settings, tuned, seed) for seed in settings.seeds]
    return judge(written)


def samples(settings: Settings, variant: Variant, seed: int) -> Texts:
    """A variant's texts; a second call reads what the first one wrote."""
    # the base is the same for all seeds, what it draws is not
    file = run_folder(settings, variant, seed) / KEPT
    if not file.is_file():
        model, tok = trained(settings, variant, seed), load_tokenizer(settings.model)
        found = written_by(model, tok, prefixes(settings), seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(found) + "\n")
    return Texts(json.loads(file.read_text()))


def prefixes(settings: Settings) -> list[list[int]]:
    """The beginnings of evenly spaced windows of the general text."""
    rows = general_windows(settings)[0]
    chosen = rows[:: max(1, len(rows) // PREFIXES)][:PREFIXES]
    return [row["input_ids"][:PREFIX_TOKENS] for row in chosen]


def written_by(
    model: nn.Module, tok: Tokenizer, starts: Sequence[list[int]], seed: int
) -> list[list[str]]:
    """`SAMPLES` continuations of each prefix, none of which an end token ends."""
    rows = [start for start in starts for _ in range(SAMPLES)]
    ids, mask = left_pad(rows, tok.pad_id)
    found = generate_ids(
        model, ids, mask, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=seed, eos_ids=()
    )
    texts = [tok.decode(new) for new in found]
    return [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]


def judge(written: Mapping[str, Sequence[Texts]]) -> Finding:
    """The table and the checks: both methods below the base, LoRA above full.

    Args:
        written: "base", "LoRA" and "full" -> the texts of each seed.
    """
    shares = {name: [one.distinct for one in texts] for name, texts in written.items()}
    rows = [
        {
            "model": name,
            "distinct-2 of a prefix's samples": over_seeds(shares[name]),
            "less the base's": over_seeds(shares[name], shares["base"]),
            "repeated 4-grams": over_seeds([one.repetition for one in texts]),
        }
        for name, texts in written.items()
    ]
    pairs: list[tuple[str, str, Literal["below", "above"]]]
    pairs = [("LoRA", "base", "below"), ("full", "base", "below"), ("LoRA", "full", "above")]
    checks = [
        Check(f"distinct-2, {one} - {other}", over_seeds(shares[one], shares[other]), expects)
        for one, other, expects in pairs
    ]
    return Finding(rows, checks)


CLAIM = Claim(
    name="diversity",
    paper="Biderman et al. 2024, arXiv:2405.09673, section 4",
    says="Tuning makes what is written less varied, LoRA less so than full fine-tuning",
    run=run,
    scale="word pairs of continued text instead of whole answers to HumanEval; the base writes "
    "varied text that is seldom right, so variety is not worth much to it",
)
