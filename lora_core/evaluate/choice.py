r"""Choice accuracy: is the right one of several continuations the likeliest?

    log P(choice | context) = Σ log p(token | all before), over the choice's tokens

The model picks the choice with the largest sum; with the largest sum per token; per UTF-8 byte.
Sums favour short choices, means long and predictable ones, so all three are given. A tie goes to
the first of the tied choices and is counted.

lm-evaluation-harness measures so too (`acc`, and `acc_norm`, which divides by characters). As
there, context and choice are tokenised together, and what the context has in front of the boundary
is not judged. They part where a token straddles the boundary: there the context is tokenised once
more alone and its number of tokens is cut off, so that a choice that merges with the context's last
letters loses its first token, or all of them, and pays nothing. Here all choices of a question are
judged from the same character on: the start of the first token that, in any choice, reaches over
the boundary. Each pays for the same text. (A context that ends in a blank is the common case:
" Paris" is one token. There both give the same numbers.)

A context that is text is taken as it stands, and nothing is put between it and a choice: the blank
belongs to one of them. A question or messages go through the chat template; an assistant's message
at the end is continued. Choices share their context by standing in one padded batch; it is computed
anew for each, which costs time and keeps this file short.

Ref: Gao et al. 2024, "A framework for few-shot language model evaluation" (lm-evaluation-harness).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lora_core.data import IGNORED, Tokenizer
from lora_core.evaluate.choices import Choice
from lora_core.evaluate.encoding import check_decoder
from lora_core.evaluate.estimate import Estimate, proportion
from lora_core.evaluate.perplexity import perplexity

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class ChoiceRow:
    """What a model makes of one question's choices."""

    where: str
    """file:line"""
    answer: int
    """number of the right choice"""
    log_likelihoods: tuple[float, ...]
    """of each choice, nats"""
    tokens: tuple[int, ...]
    """how many tokens that sums"""
    bytes: tuple[int, ...]
    """UTF-8 bytes of each choice"""
    cut: int
    """tokens cut off the context, which was too long"""

    def scores(self, by: str = "sum") -> list[float]:
        """What the choices are ranked by: "sum", "tokens" (a token) or "bytes" (a byte)."""
        over = {"sum": (1,) * len(self.tokens), "tokens": self.tokens, "bytes": self.bytes}[by]
        return [x / n for x, n in zip(self.log_likelihoods, over, strict=True)]

    def pick(self, by: str = "sum") -> int:
        """The choice the model takes, the first of those that tie."""
        scores = self.scores(by)
        return scores.index(max(scores))

    @property
    def tied(self) -> bool:
        """Whether the largest sum is that of several choices."""
        return self.log_likelihoods.count(max(self.log_likelihoods)) > 1


@dataclass(frozen=True)
class ChoiceResult:
    """Shares of questions answered right, and each question's scores."""

    accuracy: Estimate
    """by the choices' log-likelihoods"""
    accuracy_by_tokens: Estimate
    """by log-likelihood per token"""
    accuracy_by_bytes: Estimate
    """by log-likelihood per UTF-8 byte of the choice"""
    rows: tuple[ChoiceRow, ...]
    """a question each, in order"""
    ties: int
    """questions whose largest log-likelihood is that of several choices"""
    truncated: int
    """questions whose context was cut on the left"""

    def estimates(self) -> dict[str, Estimate]:
        """The three figures by name."""
        return {
            "choice_accuracy": self.accuracy,
            "choice_accuracy_by_tokens": self.accuracy_by_tokens,
            "choice_accuracy_by_bytes": self.accuracy_by_bytes,
        }


def choice_accuracy(
    model: nn.Module,
    tok: Tokenizer,
    choices: Sequence[Choice],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ChoiceResult:
    """Let a model choose, and count how often it is right.

    Args:
        model: a decoder, or any module that returns `.logits`.
        tok: its tokenizer, with a chat template where contexts are messages.
        choices: at least one question.
        batch_size: choices in one forward pass.
        max_length: longest row in tokens; longer contexts lose their beginning, a leading prefix
            (BOS) aside, all choices of a question the same tokens; None: the model's positions.
        progress: called with questions done and questions in all.

    Returns:
        Shares with Wilson's intervals, and the rows.

    Raises:
        ValueError: no question, an encoder, a context that cannot be rendered, a choice that does
            not fit, a NaN, or an option out of range.
    """
    check_decoder(model, "choosing by likelihood")
    if not choices:
        raise ValueError("no question to choose in")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
    longest = _longest(model) if max_length is None else max_length
    if longest is not None and longest < 2:
        raise ValueError(f"max_length must be 2 or more; got {longest}")
    rows: list[ChoiceRow] = []
    # some questions at a time: their choices fill batches, and progress is told
    step = max(1, batch_size // len(choices[0].choices))
    for start in range(0, len(choices), step):
        asked = choices[start : start + step]
        rows += _judge(model, [_prepare(tok, choice, longest) for choice in asked], batch_size)
        if progress is not None:
            progress(len(rows), len(choices))
    return ChoiceResult(
        accuracy=_share(rows, "sum"),
        accuracy_by_tokens=_share(rows, "tokens"),
        accuracy_by_bytes=_share(rows, "bytes"),
        rows=tuple(rows),
        ties=sum(row.tied for row in rows),
        truncated=sum(row.cut > 0 for row in rows),
    )


def _share(rows: Sequence[ChoiceRow], by: str) -> Estimate:
    right = sum(row.pick(by) == row.answer for row in rows)
    return proportion(right, len(rows), unit="questions")


def _longest(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class _Prepared:
    """A question as rows to grade."""

    choice: Choice
    rows: list[dict[str, list[int]]]
    cut: int


def _judge(model: nn.Module, prepared: Sequence[_Prepared], batch_size: int) -> list[ChoiceRow]:
    # equal rows are computed once, so that equal choices tie to the bit
    keys = [(tuple(row["input_ids"]), tuple(row["labels"])) for p in prepared for row in p.rows]
    distinct = list(dict.fromkeys(sorted(keys, key=lambda key: len(key[0]))))
    graded = [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in distinct]
    try:
        found = perplexity(model, graded, batch_size=batch_size)
    except ValueError as error:
        raise ValueError(f"{prepared[0].choice.where} or after: {error}") from None
    sums = dict(zip(distinct, zip(found.row_nll, found.row_tokens, strict=True), strict=True))
    scores, rows = iter([sums[key] for key in keys]), []
    for p in prepared:
        of_choices = [next(scores) for _ in p.rows]
        rows.append(
            ChoiceRow(
                p.choice.where,
                p.choice.answer,
                tuple(-nll for nll, _ in of_choices),
                tuple(tokens for _, tokens in of_choices),
                tuple(len(text.encode()) for text in p.choice.choices),
                p.cut,
            )
        )
    return rows


def _prepare(tok: Tokenizer, choice: Choice, longest: int | None) -> _Prepared:
    """The choices of a question as ids with labels from the common character on."""
    context = _text(tok, choice)
    encoded = [tok.encode_with_offsets(context + text) for text in choice.choices]
    start = common_start([offsets for _, offsets in encoded], len(context))
    # what is before the text: of raw text what the tokenizer puts there, as in training
    prefix = tok.prefix_ids if isinstance(choice.context, str) else []
    rows = []
    for ids, offsets in encoded:
        first = next((i for i, (_, end) in enumerate(offsets) if end > start), len(ids))
        if first == len(ids):
            raise ValueError(f"{choice.where}: a choice gives no token: give it other text")
        before = [] if ids[: len(prefix)] == prefix else prefix
        rows.append(([*before, *ids], len(before) + first))
    if not all(first for _, first in rows):  # nothing to be judged from
        rows = [([_start_id(tok, choice.where), *ids], first + 1) for ids, first in rows]
    cut = 0 if longest is None else max(0, max(len(ids) for ids, _ in rows) - longest)
    kept = len(prefix) if cut else 0
    if cut and min(first for _, first in rows) - kept - cut < (0 if kept else 1):
        raise ValueError(
            f"{choice.where}: a choice alone is longer than {longest} tokens allow: shorten it"
        )
    shortened = [(ids[:kept] + ids[kept + cut :], first - cut) for ids, first in rows]
    labelled = [
        {"input_ids": ids, "labels": [IGNORED] * first + ids[first:]} for ids, first in shortened
    ]
    return _Prepared(choice, labelled, cut)


def common_start(offsets: Sequence[Offsets], boundary: int) -> int:
    """The character from which every choice can be judged.

    Args:
        offsets: of each choice's tokens, (start, end) in characters.
        boundary: where the context ends.

    Returns:
        The boundary, or where the first token begins that reaches over it in any choice: none of
        the choices has a token that reaches over the character returned.
    """
    start = boundary
    while True:
        reaching = [s for row in offsets for s, end in row if s < start < end]
        if not reaching:
            return start
        start = min(reaching)


def _text(tok: Tokenizer, choice: Choice) -> str:
    """The context as text."""
    context = choice.context
    if isinstance(context, str):
        return context
    continued = bool(context) and context[-1].get("role") == "assistant"
    try:
        return tok.render(
            context, add_generation_prompt=not continued, continue_final_message=continued
        )
    except ValueError as error:
        raise ValueError(f"{choice.where}: {error}") from None


def _start_id(tok: Tokenizer, where: str) -> int:
    """What stands before a text that has nothing before it: BOS, else the end of another text."""
    found = tok.bos_id if tok.bos_id is not None else tok.eos_id
    if found is None:
        raise ValueError(
            f"{where}: the context is empty and the tokenizer names neither a bos_token nor an "
            "eos_token to begin with: give a context"
        )
    return found
