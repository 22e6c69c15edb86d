r"""A model's answers to questions: in batches, kept as they come, continued where they broke off.

    questions ──prompt──▶ ids ──sort by length──▶ batches ──generate──▶ answers, in the file's order

Before the first token is generated every prompt is rendered, encoded and measured. A prompt that
leaves no room for `max_new_tokens` in the model's context is an error that names its row and says
how many there are, at once and not after an hour: leaving rows out in silence, or cutting them,
would make a figure of another test set.

Rows of a batch are of similar length, so that little is padding. Which rows share a batch depends
on the questions alone. A continued run forms the same batches and gives the same answers to the bit
as an uninterrupted one, even where rounding differs from batch to batch. With a temperature every
question draws from a seed of its own.

A system text replaces the question's own. Examples (k-shot) stand before the question as
conversations: system text, then user and assistant turns of each, then the question. Questions that
are raw text take raw examples before them, a blank line between.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.adapters.soft import active_prompts
from lora_core.evaluate.answers import Answer, AnswerFile, digest_of
from lora_core.evaluate.perplexity import modes_kept
from lora_core.evaluate.questions import Message, Prompt, Question
from lora_core.models import Sampling, generate_ids, left_pad

__all__ = ["Answer", "answer_questions", "encode_prompts", "prompt_of"]

Batch = list[int]  # places of questions
Progress = Callable[[Sequence[Batch]], Iterable[Batch]]


def prompt_of(
    question: Question, system: str | None = None, shots: Sequence[Prompt] = ()
) -> Prompt:
    """What the model is shown: a system text, examples and the question.

    Args:
        question: what is asked.
        system: takes the place of the question's own system turn; None: that stays.
        shots: conversations (or raw texts) with their answers, as `Question.answered` gives them;
            their own system turns are left out.

    Returns:
        Turns, or raw text where the question is raw text.

    Raises:
        ValueError: a system text or turns before raw text, or raw text before turns.
    """
    if isinstance(question.messages, str):
        return _raw_prompt(question, system, shots)
    own, turns = _system_apart(question.messages)
    if system is not None:
        own = ({"role": "system", "content": system},)
    before: list[Message] = []
    for shot in shots:
        if isinstance(shot, str):
            raise ValueError(f"{question.where}: turns take examples of turns; got raw text")
        before += _system_apart(shot)[1]
    return (*own, *before, *turns)


def answer_questions(  # noqa: PLR0913  # options by name
    model: nn.Module,
    tok: Any,
    questions: Sequence[Question],
    *,
    system: str | None = None,
    shots: Sequence[Prompt] = (),
    max_new_tokens: int = 128,
    batch_size: int = 16,
    out: str | Path | None = None,
    sampling: Sampling | None = None,
    seed: int | None = None,
    bound: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Ask a model questions.

    Args:
        model: any that returns `.logits`, its adapters as they are; in eval mode for the time.
        tok: its tokenizer.
        questions: what is asked, each under an id of its own.
        system: system text in place of the questions' own.
        shots: examples to put before each question; see `prompt_of`.
        max_new_tokens: longest answer.
        batch_size: questions at a time.
        out: JSON Lines file that gets each batch when it is there. Answers that it holds are not
            asked for again; it is bound to the settings (see answers.py).
        sampling: how tokens are chosen; None: greedy.
        seed: of the sampling; None: 0.
        bound: further settings that the file is bound to: hashes of model and adapter, for one.
        progress: wraps the batches that are left (a `tqdm`, for one).

    Returns:
        One answer a question, in their order.

    Raises:
        FileNotFoundError: no folder for `out`.
        ValueError: an option out of range, an id twice, a question that the template refuses or
            that leaves no room for an answer (with its file:line), or `out` of other settings.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
    sampling = sampling or Sampling()
    prompts = encode_prompts(
        model, tok, questions, system=system, shots=shots, max_new_tokens=max_new_tokens
    )
    settings = {
        **(bound or {}),
        "questions": digest_of([q.messages, q.references, q.tools, q.id] for q in questions),
        "system": system,
        "shots": digest_of(shots),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed or 0,
        **asdict(sampling),
    }
    file = None if out is None else AnswerFile(out, settings)
    kept = {} if file is None else dict(file.kept)
    left = [
        batch
        for batch in _batches(prompts, batch_size)
        if any(questions[place].id not in kept for place in batch)
    ]
    generator = _Generator(model, tok, max_new_tokens, sampling, seed or 0)
    with modes_kept(model):
        model.eval()
        for batch in progress(left) if progress is not None else left:
            new = generator([questions[i] for i in batch], [prompts[i] for i in batch])
            new = [answer for answer in new if answer.id not in kept]
            if file is not None:
                file.append(new)
            kept |= {answer.id: answer for answer in new}
    return [kept[question.id] for question in questions]


def encode_prompts(
    model: nn.Module,
    tok: Any,
    questions: Sequence[Question],
    *,
    system: str | None = None,
    shots: Sequence[Prompt] = (),
    max_new_tokens: int = 128,
) -> list[list[int]]:
    """What the model will be given, checked before anything is generated.

    Args:
        model: whose positions have to suffice, where its configuration says how many there are.
        tok: its tokenizer.
        questions: what is asked.
        system: as for `answer_questions`.
        shots: likewise.
        max_new_tokens: likewise.

    Returns:
        Token ids of each prompt.

    Raises:
        ValueError: no questions, an id twice, or a question that the template refuses or that
            leaves no room for an answer, with its file:line.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more; got {max_new_tokens}")
    _check_ids(questions)
    prompts = [_encoded(tok, question, system, shots) for question in questions]
    _check_room(model, questions, prompts, max_new_tokens)
    return prompts


class _Generator:
    """Answers a batch of encoded questions."""

    def __init__(
        self, model: nn.Module, tok: Any, limit: int, sampling: Sampling, seed: int
    ) -> None:
        self.model, self.tok, self.limit, self.seed = model, tok, limit, seed
        self.ends = frozenset(tok.eos_ids)
        self.sampling = asdict(sampling)

    def __call__(
        self, questions: Sequence[Question], prompts: Sequence[Sequence[int]]
    ) -> list[Answer]:
        ids, mask = left_pad(prompts)
        seeds = [_seed(self.seed, question.id) for question in questions]
        found = generate_ids(
            self.model,
            ids,
            mask,
            max_new_tokens=self.limit,
            eos_ids=self.ends,
            seed=seeds,
            **self.sampling,
        )
        return [
            self._answer(question, len(prompt), row)
            for question, prompt, row in zip(questions, prompts, found, strict=True)
        ]

    def _answer(self, question: Question, prompt_tokens: int, row: list[int]) -> Answer:
        ended = row[-1] in self.ends
        return Answer(
            question.id,
            question.messages,
            self.tok.decode(row[:-1] if ended else row),
            question.references,
            question.where,
            prompt_tokens,
            len(row),
            cut=not ended,
        )


def _check_ids(questions: Sequence[Question]) -> None:
    if not questions:
        raise ValueError("there are no questions to answer")
    seen: dict[str, Question] = {}
    for question in questions:
        if question.id in seen:
            raise ValueError(
                f"{question.where}: id {question.id!r} is that of {seen[question.id].where} too"
            )
        seen[question.id] = question


def _encoded(
    tok: Any, question: Question, system: str | None, shots: Sequence[Prompt]
) -> list[int]:
    prompt = prompt_of(question, system, shots)
    try:
        if question.tools and not isinstance(prompt, str):
            tools = list(question.tools)
            return list(tok.encode(tok.render(prompt, add_generation_prompt=True, tools=tools)))
        return list(tok.encode_prompt(prompt))
    except ValueError as error:
        raise ValueError(f"{question.where}: {error}") from None


def _check_room(
    model: nn.Module,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    """Refuse prompts whose answers would run out of the model's positions."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is None:
        return
    virtual = _virtual_tokens(model)
    wide = [i for i, ids in enumerate(prompts) if len(ids) + virtual + max_new_tokens > limit]
    if wide:
        first = wide[0]
        soft = f" + {virtual} of the soft prompt" if virtual else ""
        raise ValueError(
            f"{questions[first].where}: a prompt of {len(prompts[first])} tokens{soft} + "
            f"{max_new_tokens} new ones is more than the model's {limit} positions ({len(wide)} of "
            f"{len(prompts)} rows are too long): lower max_new_tokens, give fewer examples, or "
            "take the rows out"
        )


def _virtual_tokens(model: nn.Module) -> int:
    """Positions that active soft prompts take up."""
    if not hasattr(model, "get_input_embeddings"):
        return 0
    return sum(prompt.tokens for prompt in active_prompts(model))


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[Batch]:
    """Places of questions, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _seed(seed: int, name: str) -> int:
    """A seed for one question, whatever stands around it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def _system_apart(
    messages: Sequence[Message],
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system turn that begins a conversation, and the rest."""
    count = 1 if messages and messages[0]["role"] in ("system", "developer") else 0
    return tuple(messages[:count]), tuple(messages[count:])


def _raw_prompt(question: Question, system: str | None, shots: Sequence[Prompt]) -> str:
    if system is not None:
        raise ValueError(
            f"{question.where}: raw text (prompt/completion) has no turns, so no place for a "
            "system text; write the rows as messages"
        )
    texts = [shot for shot in shots if isinstance(shot, str)]
    if len(texts) < len(shots):
        raise ValueError(f"{question.where}: raw text takes raw examples; got turns")
    return "\n\n".join([*texts, str(question.messages)])
