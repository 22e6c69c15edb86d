"""`cpt`: continual pretraining, on plain text, without losing what the model knows.

The text of a field, a product or a language, in documents: each ends with the tokenizer's end
token. Laid end to end they are cut to windows of `max_length` tokens, so nothing is padded and no
document is too long; with `packing` they stay apart instead, whole ones packed into rows that
attention keeps to, and long ones cut. Documents are held out whole for evaluation.

Three things are done against forgetting, and it is measured. *Replay* shows general text again, a
share of the tokens (data/replay.py). *A rate of its own* for embedding and head, usually a fifth to
a tenth of the others': a row of them moves every context its word is in, and rare words are
overshot. *Forgetting* is the bits per byte on general text lost against the base
(evaluate/retention.py), on the same windows: the base's are taken before a step is made, for a full
fine-tune leaves no base to go back to.

Embedding and head are what the model says they are, `get_input_embeddings()` and
`get_output_embeddings()`, with whatever is trained inside them: their weights, whole copies, LoRA
pairs, added rows. Other trainers look for names, and miss a copy or a pair.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lora_core.adapters import disable_adapters
from lora_core.data import PlainText, Record, Rows, SFTDataset, TextWindows, parse_sources, split
from lora_core.data.replay import JoinedRows, Row, draw_replay
from lora_core.evaluate import forgetting, general_loss, general_text
from lora_core.evaluate.perplexity import Perplexity
from lora_core.files import atomic_write, sha256_file
from lora_core.objectives.objective import Objective, Work
from lora_core.objectives.setup import Setup
from lora_core.train import TrainResult, make_optimizer

FORGETTING_FILE = "forgetting.json"
_WHOLE = 1 << 30  # tokens; a document is cut later


@dataclass(frozen=True, kw_only=True)
class ContinualOptions:
    """What is shown again, what is measured, and how fast the vocabulary may move."""

    replay: str | None = None
    """General text to show again: JSONL files with "text", each optionally with :weight, separated
    by commas; none: no replay."""
    replay_share: float = 0.25
    """Share of all tokens that is replayed."""
    general_text: str | None = None
    """General text to measure forgetting on, a text file or JSONL with "text"; none: modules of
    Python's standard library, which the shipped base has not seen."""
    general_bytes: int = 65_536
    """About how much of it is measured on, in bytes."""
    embedding_lr: float | None = None
    """Learning rate of embedding and head, where they are trained; none: that of the others."""

    def __post_init__(self) -> None:
        if not 0 < self.replay_share < 1:
            raise ValueError(f"replay_share must be above 0 and below 1; got {self.replay_share}")
        if self.general_bytes < 1:
            raise ValueError(f"general_bytes must be 1 or more; got {self.general_bytes}")
        if self.embedding_lr is not None and not 0 < self.embedding_lr < float("inf"):
            raise ValueError(f"embedding_lr must be a number above 0; got {self.embedding_lr}")

    @property
    def replayed(self) -> list[tuple[str, float]]:
        """The files of `replay` with their weights."""
        words = [word.strip() for word in (self.replay or "").split(",")]
        return parse_sources([word for word in words if word])


def vocabulary_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What is trained of a model's embedding and head, whatever trains it.

    Args:
        model: with `get_input_embeddings()` and `get_output_embeddings()`.

    Returns:
        The parameters that require a gradient; empty where neither is trained.
    """
    parts: list[nn.Module | None] = [
        model.get_input_embeddings(),  # type: ignore[operator]
        model.get_output_embeddings(),  # type: ignore[operator]
    ]
    return {p for part in parts if part is not None for p in part.parameters() if p.requires_grad}


class Continual(Objective[ContinualOptions]):
    """The next token of documents, with replay, and with forgetting measured."""

    name = "cpt"
    help = "continual pretraining on plain text, with replay, and forgetting measured"
    options_class = ContinualOptions
    training: ClassVar[Mapping[str, Any]] = {"epochs": 1}

    def check(self, setup: Setup) -> None:
        """Files that are not there, and text that cannot measure what it is trained on."""
        general, replayed = self.options.general_text, self.options.replayed
        for path in [path for path, _ in replayed] + ([general] if general else []):
            if not Path(path).is_file():
                raise FileNotFoundError(f"no text file {path!r}")
        shown = {
            Path(path).resolve() for path, _ in [*parse_sources(setup.settings.data), *replayed]
        }
        if general is not None and Path(general).resolve() in shown:
            raise ValueError(
                f"general_text {general} is shown in training, so it cannot tell what is "
                "forgotten: give text that is held out"
            )

    def read(self, setup: Setup) -> None:
        """Documents to learn, documents to evaluate on, rows to replay, text to measure on."""
        settings, seed = setup.settings, setup.training.seed
        documents: Rows = self._documents(setup, parse_sources(settings.data), "data")
        held_out: Rows | None = None
        if settings.eval_data is not None:
            held_out = self._documents(setup, [(settings.eval_data, 1.0)], "evaluation data")
        elif settings.eval_fraction and len(documents) > 1:
            documents, held_out = split(documents, settings.eval_fraction, seed)
        else:
            setup.say("no evaluation: no documents are set aside")
        self.rows: Any = self._rows(setup, documents, "rows to train on")
        self.held_out: Any = None
        if held_out is not None:
            self.held_out = self._rows(setup, held_out, "rows to evaluate on")
        if self.options.replayed:
            self.rows = self._with_replay(setup, self.rows)
        self.general = general_text(
            self.options.general_text, limit_bytes=self.options.general_bytes
        )
        setup.say(f"forgetting is measured on {self.general.source}")

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """The rows and the optimizer; what the base makes of general text is taken here."""
        self.model, self.setup = model, setup
        training, rate = setup.training, self.options.embedding_lr
        if rate is not None and not vocabulary_parameters(model):
            raise ValueError(
                f"embedding_lr is {rate:g}, but neither embedding nor head is trained: train them "
                "(--method full, --modules-to-save, or LoRA --targets), or leave it out"
            )
        self._check_positions(model)
        with self._base():
            self.before = self._measured()
        setup.say(f"the base on general text: {self._bits(self.before)}")
        files = {path: sha256_file(path) for path, _ in self.options.replayed}
        work = Work(
            self.rows,
            self.held_out,
            facts={"replay": files, "general_text": self.general.sha256},
        )
        if rate is None:
            return work
        setup.say(f"learning rate of embedding and head: {rate:g}")

        def optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
            # found when it is made: sharding has put other parameters in their places by then
            factors = dict.fromkeys(vocabulary_parameters(model), rate / training.lr)
            return make_optimizer(model, named, training, factors)

        work.optimizer = optimizer
        return work

    def report(self, result: TrainResult) -> list[str]:
        """What was forgotten, with its interval."""
        self.after = self._measured()
        lost = forgetting(self.before, self.after)
        return [
            f"general text: {self._bits(self.before)} before, {self._bits(self.after)} now",
            f"forgetting: {lost} in bits per byte against the base (above 0: it has forgotten)",
        ]

    def save(self, setup: Setup, model: nn.Module) -> None:
        """Write forgetting.json."""
        facts = {
            "text": self.general.source,
            "sha256": self.general.sha256,
            "before": self.before.estimates()["bits_per_byte"].facts(),
            "after": self.after.estimates()["bits_per_byte"].facts(),
            "forgetting": forgetting(self.before, self.after).facts(),
        }
        atomic_write(setup.out / FORGETTING_FILE, json.dumps(facts, indent=2) + "\n")

    def save_model(self, setup: Setup, model: nn.Module) -> None:
        """The model, and forgetting.json beside it."""
        super().save_model(setup, model)
        self.save(setup, model)

    def _documents(self, setup: Setup, sources: list[tuple[str, float]], what: str) -> SFTDataset:
        """A row a document, or parts of one where packing needs rows of a limited length."""
        settings = setup.settings
        columns = None if what == "replay" else settings.column_names  # the data's own names

        def texts(records: Iterable[Record]) -> Iterable[Record]:
            for record in setup.bar(records, "records", "reading"):
                if not isinstance(record, PlainText):
                    raise ValueError(
                        f'{record.where}: continual pretraining takes plain text, {{"text": …}}; '
                        "for conversations and answers use --objective sft"
                    )
                yield record

        documents = SFTDataset.from_jsonl(
            sources,
            setup.tok,
            max_length=_WHOLE if setup.training.packing is None else settings.max_length,
            columns=columns,
            seed=setup.training.seed,
            control_text=settings.control_text,
            progress=texts,
        )
        setup.say(f"{what}: {documents.report}")
        return documents

    def _rows(self, setup: Setup, documents: Rows, what: str) -> Sequence[Row]:
        """Documents as they are trained on: for packing as they are, else windows."""
        if setup.training.packing is not None:
            return documents
        rows = TextWindows.from_rows(documents, setup.settings.max_length)
        setup.say(
            f"{len(rows)} {what}, of {rows.length} tokens each, from {len(documents)} documents "
            f"({rows.dropped} tokens at the end fill none)"
        )
        return rows

    def _with_replay(self, setup: Setup, rows: Any) -> JoinedRows:
        """The rows, and those of general text that are shown with them."""
        documents = self._documents(setup, self.options.replayed, "replay")
        general: Any = self._rows(setup, documents, "rows to replay")
        tokens, share = sum(rows.lengths), self.options.replay_share
        chosen = draw_replay(general.lengths, tokens, share, setup.training.seed)
        joined = JoinedRows([("text", rows, range(len(rows))), ("replay", general, chosen)])
        shown = sum(joined.lengths) - tokens
        setup.say(
            f"replay: {len(chosen)} rows an epoch, {shown / (shown + tokens):.1%} of the tokens; "
            f"{len(set(chosen))} of {len(general)} are shown"
        )
        return joined

    def _check_positions(self, model: nn.Module) -> None:
        """Refuse rows that the model's positions do not reach; windows are full, every one."""
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        length = max(self.rows.lengths)
        if positions is not None and length > positions:
            raise ValueError(
                f"rows of {length} tokens are longer than the {positions} positions of the "
                f"model: --max-length {positions}, or less"
            )

    def _base(self) -> contextlib.AbstractContextManager[None]:
        """The model as it was loaded; before a full fine-tune it is that."""
        full = self.setup.method == "full"
        return contextlib.nullcontext() if full else disable_adapters(self.model)

    def _measured(self) -> Perplexity:
        return general_loss(self.model, self.setup.tok, self.general)

    @staticmethod
    def _bits(found: Perplexity) -> str:
        return f"{found.estimates()['bits_per_byte']} bits per byte"
