"""A model judged by everything that `lora-core evaluate` was asked for, with its adapter and
without.

Both sides answer the same questions and read the same text, so their figures are compared pairwise
(lora_core/evaluate/figures.py). The base is the same object with its adapters switched off: nothing
is loaded twice.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.adapters import disable_adapters
from lora_core.checkpoint import load_model
from lora_core.cli.evaluate_flags import MAX_NEW_TOKENS
from lora_core.cli.evaluate_work import Work, bar, counter, fingerprint, graded_rows, with_bytes
from lora_core.data import Rows, load_template, load_tokenizer
from lora_core.evaluate.answering import answer_questions, encode_prompts
from lora_core.evaluate.answers import Answer
from lora_core.evaluate.choice import ChoiceResult, choice_accuracy
from lora_core.evaluate.estimate import Estimate
from lora_core.evaluate.figures import Figure, differences, of_perplexity, of_scores
from lora_core.evaluate.golden import read_golden, run_golden
from lora_core.evaluate.golden_diff import GoldenDiff, compare_golden
from lora_core.evaluate.golden_result import GoldenResult
from lora_core.evaluate.metrics import Encoder, metric_figures
from lora_core.evaluate.perplexity import Perplexity, perplexity
from lora_core.evaluate.questions import Prompt, Question
from lora_core.evaluate.retention import forgetting, general_loss
from lora_core.evaluate.sides import key_of
from lora_core.models import EncoderModel
from lora_core.runs import check_no_heads, check_writes_text, open_model
from lora_core.runs.opening import device_named


@dataclass
class Side:
    """What was found of the model, or of its base."""

    figures: dict[str, Figure] = field(default_factory=dict)
    """by name"""
    answers: list[Answer] = field(default_factory=list)
    """to the questions, in their order"""
    general: Perplexity | None = None
    """of the general text"""


@dataclass
class Findings:
    """Everything that was found."""

    facts: dict[str, Any]
    """what was judged: model, adapter, data"""
    notes: list[str] = field(default_factory=list)
    """what the reader should know"""
    side: Side = field(default_factory=Side)
    """the model with its adapter, or the model"""
    base: Side | None = None
    """the model without its adapter, where that was measured"""
    differences: dict[str, Estimate] = field(default_factory=dict)
    """side − base, paired, by figure"""
    forgetting: Estimate | None = None
    """bits per byte of general text that the adapter lost"""
    golden: GoldenResult | None = None
    """the golden set's rows"""
    diff: GoldenDiff | None = None
    """and what became of them since the earlier result"""

    @property
    def failed(self) -> bool:
        """Whether the golden set says that the exit code is 1."""
        if self.diff is not None:
            return self.diff.regressed
        return self.golden is not None and bool(self.golden.failures)


class Evaluation:
    """One call of the verb with a model.

    Args:
        work: what to measure.

    Attributes:
        opened: the model.
        findings: filled as `run` goes on.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.args = work, work.args
        args = self.args
        self.encoder = open_encoder(args)
        check_no_heads(args.model, args.adapter)
        self.opened = open_model(
            args.model, args.adapter, quantize=args.quantize, device=args.device
        )
        check_writes_text(self.opened.model, self.opened.source)
        if args.template is not None:
            self.opened.tok.chat_template = load_template(args.template)
        facts = {"model": str(self.opened.source), "adapter": args.adapter, "data": args.data}
        self.findings = Findings(facts, list(self.opened.notes))
        self.rows: Rows | None = None
        if args.data is not None and not args.no_loss:
            dataset = graded_rows(args, self.opened.tok)
            self.rows = dataset
            self.findings.notes.append(f"data: {dataset.report}")
        if work.general is not None:
            self.findings.notes.append(f"general text: {work.general.source}")
        self._check_prompts()
        self.bound = self._bound() if args.out or args.save or args.golden else {}

    def run(self) -> Findings:
        """Measure everything; the model with its adapter first."""
        found = self.findings
        found.side = self._side("")
        if self.args.adapter and (self.args.compare_base or self.work.general is not None):
            with disable_adapters(self.opened.model):
                found.base = self._side("-base", general_only=not self.args.compare_base)
            found.differences = differences(found.side.figures, found.base.figures)
        if found.base is not None and found.base.general and found.side.general:
            found.forgetting = forgetting(found.base.general, found.side.general)
            found.differences["general_bits_per_byte"] = found.forgetting
        if self.work.golden is not None:
            self._golden()
        return found

    def _side(self, suffix: str, *, general_only: bool = False) -> Side:
        """All figures of the model as its adapters are now."""
        side, work, model = Side(), self.work, self.opened.model
        if self.rows is not None and not general_only:
            rows = with_bytes(self.rows, self.opened.tok)
            batches = bar(f"loss{suffix}", "rows")(rows)
            side.figures |= of_perplexity(
                perplexity(model, batches, batch_size=self.args.batch_size)
            )
        if work.questions and not general_only:
            side.answers = self._answers(suffix)
            side.figures |= metric_figures(side.answers, work.metrics, self.encoder)
        if work.choices and not general_only:
            side.figures |= self._choices(suffix)
        if work.general is not None:
            side.general = general_loss(model, self.opened.tok, work.general)
            general = of_perplexity(side.general)
            side.figures["general_bits_per_byte"] = general["bits_per_byte"]
        return side

    @property
    def _options(self) -> dict[str, Any]:
        """How questions are put, the golden set's too."""
        limit = self.args.max_new_tokens or MAX_NEW_TOKENS
        return {"system": self.args.system, "max_new_tokens": limit}

    def _answers(self, suffix: str) -> list[Answer]:
        out = None if self.args.out is None else Path(self.args.out) / f"answers{suffix}.jsonl"
        found = answer_questions(
            self.opened.model,
            self.opened.tok,
            self.work.questions,
            shots=self.work.shots,
            batch_size=self.args.batch_size,
            out=out,
            bound=self.bound | ({"adapter": None} if suffix else {}),
            progress=bar(f"answers{suffix}"),
            **self._options,
        )
        self.findings.notes += notes_on(found, f"answers{suffix}")
        return found

    def _choices(self, suffix: str) -> dict[str, Figure]:
        result = choice_accuracy(
            self.opened.model,
            self.opened.tok,
            self.work.choices,
            batch_size=self.args.batch_size,
            progress=counter(f"choices{suffix}"),
        )
        if result.truncated:
            self.findings.notes.append(
                f"choices: {result.truncated} of {len(result.rows)} contexts are longer than the "
                "model's positions and were cut on the left"
            )
        return of_choices(result)

    def _golden(self) -> None:
        """Put the golden set to the model, and hold it against the earlier result."""
        found, golden = self.findings, self.work.golden
        assert golden is not None
        out = None if self.args.out is None else Path(self.args.out) / "golden.jsonl"
        try:
            found.golden = run_golden(
                golden,
                self._say,
                out=out,
                batch_size=self.args.batch_size,
                bound=self.bound | self._options,
                progress=bar("golden set"),
            )
        except RuntimeError as error:  # what was wrong is the user's: a row too long, for one
            raise ValueError(str(error)) from error
        if self.work.before is not None:
            found.diff = compare_golden(self.work.before, found.golden)
        if self.args.save is not None:
            found.golden.save(self.args.save)

    def _say(self, prompts: Sequence[Prompt], **limit: int) -> list[str]:
        """Answers to a golden set's prompts."""
        asked = [Question(str(i), prompt, (), "golden set") for i, prompt in enumerate(prompts)]
        options = {**self._options, **limit}
        found = answer_questions(
            self.opened.model, self.opened.tok, asked, batch_size=len(asked), **options
        )
        return [answer.text for answer in found]

    def _check_prompts(self) -> None:
        """Render and measure every prompt before anything is computed."""
        work, model, tok = self.work, self.opened.model, self.opened.tok
        if work.golden is not None and tok.chat_template is None:
            work.golden = read_golden(work.golden.path)
        options = self._options
        if work.questions:
            encode_prompts(model, tok, work.questions, shots=work.shots, **options)
        for row in work.golden.rows if work.golden is not None else ():
            question = Question(row.id, row.prompt, (), row.where)
            limit = {"max_new_tokens": row.max_new_tokens or options["max_new_tokens"]}
            encode_prompts(model, tok, [question], **(options | limit))

    def _bound(self) -> dict[str, Any]:
        """What answers depend on, beside the questions."""
        made = fingerprint(self.opened.source, self.args.adapter)
        template = None if self.args.template is None else key_of(self.opened.tok.chat_template)
        return {**made, "quantize": self.opened.quantize, "template": template}


def of_choices(result: ChoiceResult) -> dict[str, Figure]:
    """Figures of choices, by each way of ranking them."""
    found = {}
    ways = zip(("sum", "tokens", "bytes"), result.estimates().items(), strict=True)
    for by, (name, estimate) in ways:
        right = [float(row.pick(by) == row.answer) for row in result.rows]
        found[name] = of_scores(right, estimate)
    return found


def open_encoder(args: argparse.Namespace) -> Encoder | None:
    """The encoder that nearness is measured by.

    Raises:
        ValueError: the folder holds a decoder.
        FileNotFoundError: it holds no model.
    """
    if args.encoder is None:
        return None
    model = load_model(args.encoder, device=device_named(args.device))
    if not isinstance(model, EncoderModel):
        raise ValueError(
            f"--encoder {args.encoder} holds a decoder ({type(model).__name__}): bertscore and "
            "embedding need an encoder (BERT, RoBERTa, XLM-R, CamemBERT)"
        )
    return model.eval(), load_tokenizer(args.encoder)


def notes_on(answers: Sequence[Answer], what: str) -> list[str]:
    """Lines on answers that are empty or were cut off."""
    notes = []
    empty = [answer for answer in answers if not answer.text.strip()]
    cut = [answer for answer in answers if answer.cut]
    for found, how in ((empty, "are empty"), (cut, "ran into --max-new-tokens")):
        if found:
            notes.append(
                f"{what}: {len(found)} of {len(answers)} {how}; the first is {found[0].where}"
            )
    return notes
