"""The task that all claims about training share, and what is trained on it, once.

The task is the quickstart's: read what `help()` prints about a function of the standard library and
answer with a JSON object of module, name and first sentence. The shipped base has seen the library
and no JSON answer. A seed is a draw of everything: which functions are held out, the adapter's
start, the order of the rows.

A `Variant` says what is trained and how. `trained` trains it or finds it under `settings.out`,
where runs lie by the hash of everything that went into them, so that several claims share a run and
a call that was stopped goes on. `score` judges a variant on held-out rows, and keeps the figures
beside it.
"""

import functools
import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.papers.claim import Settings
from lora_core.adapters import LoRAConfig, add_adapter, parameter_counts
from lora_core.checkpoint import load_adapter, load_model, save_adapter, save_model
from lora_core.data import (
    SFTDataset,
    Tokenizer,
    load_template,
    load_tokenizer,
)
from lora_core.data.stdlib import FunctionRow, function_conversations
from lora_core.evaluate import perplexity
from lora_core.evaluate.function_task import ANSWER_TOKENS, first_answers
from lora_core.evaluate.perplexity import Perplexity
from lora_core.evaluate.retention import (
    WINDOW,
    GeneralText,
    general_loss,
    general_text,
    windows,
)
from lora_core.files import atomic_write, sha256_file
from lora_core.train import TrainConfig, train

MAX_LENGTH = 512
DONE = "run.json"
SCORES = "scores.json"
GENERAL_BYTES, QUICK_BYTES = 1 << 16, 1 << 11
LORA = LoRAConfig(r=16, alpha=32)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is trained, on what, how long; equal variants are one run."""

    adapter: Any = LORA
    """adapter configuration; None: none is attached"""
    full: bool = False
    """train every weight instead of an adapter"""
    quantize: str | None = None
    """4-bit code of the base, with double quantization; None: dense"""
    lr: float = 4e-3
    """peak rate: twenty times the usual one, for a model of a thousandth of the usual size"""
    lora_plus: float = 1.0
    """rate of LoRA's B over that of A"""
    steps: int | None = None
    """optimizer steps; None: the settings'; 0: nothing is trained"""
    batch_size: int = 8
    """rows a step"""
    train_on: str = "assistant"
    """turns that are graded in training; "all": without the loss mask"""
    template: str | None = None
    """chat template of the training; None: the base's own"""
    rows: int | None = None
    """training rows; None: all"""
    wrong: float = 0.0
    """share of the training rows whose answers are exchanged among each other, in [0, 1]"""

    @property
    def is_base(self) -> bool:
        """Whether nothing is trained."""
        return self.steps == 0 or (self.adapter is None and not self.full)


BASE = Variant(adapter=None, steps=0)


@dataclass(frozen=True)
class Score:
    """What held-out rows say about a variant."""

    loss: float
    """nats a graded token of the held-out answers"""
    nll: list[float]
    """summed over the graded tokens of each row"""
    tokens: list[int]
    """graded tokens of each row"""
    exact: list[bool] | None
    """whether each generated answer is the reference, where that was asked for"""
    general: float | None
    """bits per byte of general text, where that was asked for"""
    facts: dict[str, Any]
    """of the training: steps, loss, trained parameters, seconds"""

    @property
    def exact_match(self) -> float:
        """Share of answers that are right to the letter; NaN where none was generated."""
        return sum(self.exact) / len(self.exact) if self.exact else math.nan


@functools.lru_cache(maxsize=1)
def _functions() -> tuple[FunctionRow, ...]:
    return tuple(function_conversations(0))


def function_task(seed: int, held_out: int) -> tuple[list[FunctionRow], list[FunctionRow]]:
    """The task's rows to train on and its held-out rows, drawn by the seed.

    Raises:
        ValueError: so many held out that fewer than as many are left.
    """
    rows = list(_functions())
    random.Random(seed).shuffle(rows)
    if len(rows) <= 2 * held_out:
        raise ValueError(f"{len(rows)} functions are too few to hold out {held_out} of them")
    return rows[held_out:], rows[:held_out]


def training_messages(variant: Variant, seed: int, held_out: int) -> list[list[Any]]:
    """The conversations a variant is trained on: fewer rows, exchanged answers."""
    rows = function_task(seed, held_out)[0][: variant.rows]
    chats = [list(row["messages"]) for row in rows]
    draw = random.Random(seed + 1)
    chosen = draw.sample(range(len(chats)), round(variant.wrong * len(chats)))
    answers = [chats[i][1] for i in chosen]
    # each gets the answer of the next: all of them are then wrong, and all are good JSON
    for i, answer in zip(chosen, [*answers[1:], *answers[:1]], strict=True):
        chats[i][1] = answer
    return chats


def dataset(
    chats: Sequence[Sequence[Any]], tok: Tokenizer, template: str | None, train_on: str
) -> SFTDataset:
    """Conversations as graded rows."""
    records = [{"messages": chat} for chat in chats]
    return SFTDataset(records, tok, template, max_length=MAX_LENGTH, train_on=train_on)


def run_folder(settings: Settings, variant: Variant, seed: int) -> Path:
    """Where a run lies: named by everything that it follows from."""
    adapter = variant.adapter
    shape = {} if adapter is None else {"kind": type(adapter).__name__, **asdict(adapter)}
    what = {
        **{name: getattr(variant, name) for name in variant.__dataclass_fields__},
        "adapter": shape,
        "steps": settings.steps if variant.steps is None else variant.steps,
        "seed": seed,
        "held_out": settings.held_out,
        "base": _hash(settings.model),
    }
    text = json.dumps(what, sort_keys=True, default=repr)
    return settings.out / "runs" / hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _hash(model: Path) -> dict[str, str]:
    files = sorted(model.glob("*.safetensors"))
    return {file.name: sha256_file(file) for file in files}


def trained(settings: Settings, variant: Variant, seed: int) -> nn.Module:
    """A variant's model: trained now, or loaded from where an earlier call left it.

    Args:
        settings: base, scratch folder, steps, rows held out.
        variant: what to train.
        seed: of split, start and order.

    Returns:
        The model in eval mode, its adapter active and unmerged.
    """
    folder = run_folder(settings, variant, seed)
    if (folder / DONE).is_file() and not variant.is_base:
        return _found(settings, variant, folder)
    model = _base(settings, variant)
    if variant.is_base:
        return model.eval()
    tok = load_tokenizer(settings.model)
    chats = training_messages(variant, seed, settings.held_out)
    rows = dataset(chats, tok, variant.template, variant.train_on)
    torch.manual_seed(seed)  # the adapter's start
    if variant.full:
        model.requires_grad_(True)
    else:
        add_adapter(model, variant.adapter)
    config = TrainConfig(
        lr=variant.lr,
        lora_plus=variant.lora_plus,
        steps=settings.steps if variant.steps is None else variant.steps,
        batch_size=variant.batch_size,
        accumulate=1,
        seed=seed,
        progress=False,
    )
    result = train(model, rows, config)
    folder.mkdir(parents=True, exist_ok=True)
    if variant.full:
        save_model(model, folder / "model", source=settings.model, dtype=None)
    else:
        save_adapter(model, folder / "adapter", base_model=str(settings.model))
    facts = {
        "variant": repr(variant),
        "seed": seed,
        "steps": result.steps,
        "tokens": result.tokens,
        "loss": [record["loss"] for record in result.history],
        "grad_norm": [record["grad_norm"] for record in result.history],
        "trained": parameter_counts(model)[0],
        "tokens_per_second": result.tokens_per_second,
    }
    atomic_write(folder / DONE, json.dumps(facts) + "\n")
    return model.eval()


def _base(settings: Settings, variant: Variant) -> nn.Module:
    return load_model(settings.model, quantize=variant.quantize, dtype=torch.float32)


def _found(settings: Settings, variant: Variant, folder: Path) -> nn.Module:
    if variant.full:
        return load_model(folder / "model", dtype=torch.float32).eval()
    model = _base(settings, variant)
    load_adapter(model, folder / "adapter")
    return model.eval()


def score(
    settings: Settings,
    variant: Variant,
    seed: int,
    *,
    exact: bool = False,
    general: bool = False,
    template: str | None = None,
) -> Score:
    """Judge a variant on the seed's held-out rows; a second call reads what the first one found.

    Args:
        settings: base, scratch folder, counts.
        variant: what is judged; trained if need be.
        seed: of the training and of the rows held out.
        exact: also let the model answer, and compare (slower).
        general: also bits per byte of general text, so that forgetting is a number.
        template: chat template of the questions; None: the one of the training.

    Returns:
        The score.
    """
    asked = variant.template if template is None else template
    folder = run_folder(settings, variant, seed)
    file = folder / SCORES
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    keys = [f"loss {asked}", *([f"exact {asked}"] * exact)]
    keys += [f"general {text_of(settings).sha256}"] * general
    missing = [key for key in keys if key not in known]
    if missing:
        model = trained(settings, variant, seed)
        tok = load_tokenizer(settings.model)
        chats = [row["messages"] for row in function_task(seed, settings.held_out)[1]]
        for key in missing:
            if key.startswith("general"):
                known[key] = general_losses(model, settings).bits_per_byte
            elif key.startswith("exact"):
                known[key] = right_answers(model, tok, chats, asked)
            else:
                known[key] = row_losses(model, dataset(chats, tok, asked, "assistant"))
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(known) + "\n")
    nll, tokens = known[keys[0]]
    facts = json.loads((folder / DONE).read_text()) if (folder / DONE).is_file() else {}
    return Score(
        loss=sum(nll) / sum(tokens),
        nll=nll,
        tokens=tokens,
        exact=known.get(f"exact {asked}") if exact else None,
        general=known[keys[-1]] if general else None,
        facts=facts,
    )


def row_losses(model: nn.Module, rows: Sequence[Any]) -> tuple[list[float], list[int]]:
    """Summed nats and graded tokens of each row."""
    found = perplexity(model, rows, batch_size=16)
    return list(found.row_nll), list(found.row_tokens)


def answers(model: nn.Module, tok: Tokenizer, chats: Sequence[Sequence[Any]]) -> list[str]:
    """What the model writes to the first turn of each conversation, greedily."""
    return first_answers(model, tok, chats, ANSWER_TOKENS)


def right_answers(
    model: nn.Module, tok: Tokenizer, chats: Sequence[Sequence[Any]], template: str | None
) -> list[bool]:
    """Whether the model's answer to each question is the reference to the letter.

    The tokenizer's template is set to the one asked for, if one is.
    """
    if template is not None:
        tok.chat_template = load_template(template)
    written = answers(model, tok, chats)
    pairs = zip(written, chats, strict=True)
    return [text.strip() == chat[1]["content"] for text, chat in pairs]


@functools.lru_cache(maxsize=2)
def text_of(settings: Settings) -> GeneralText:
    """Text that no training here has seen: the user's, or the library's held-out modules."""
    return general_text(settings.text, limit_bytes=QUICK_BYTES if settings.quick else GENERAL_BYTES)


def general_losses(model: nn.Module, settings: Settings) -> Perplexity:
    """What a model makes of the general text, window by window."""
    return general_loss(model, load_tokenizer(settings.model), text_of(settings))


def general_windows(settings: Settings) -> tuple[list[dict[str, Any]], list[int]]:
    """The general text as rows that judge each token once, and each row's bytes."""
    tok = load_tokenizer(settings.model)
    rows = [row for text in text_of(settings).texts for row in windows(tok, text, WINDOW)]
    return rows, [row["graded_bytes"] for row in rows]
