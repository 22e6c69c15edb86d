"""Text from a model: greedy or sampled, one prompt or a batch of them.

Prompts of a batch are padded on the left, so that the next token of every row stands in the last
column; the attention mask hides the padding and positions are counted over real tokens, which is
why a batch gives the tokens that its rows give one by one. Each new token costs one position:
earlier keys and values come from a cache. The work is in three parts that know little of each
other:

    sampling.py, rows.py          which token comes next: tensors on the device, no loop over rows
    decode_step.py, growing.py    the model's part of a step: on fixed memory, as a CUDA graph where
                                  there are such; or any module whatever, as far as it can
    stopping.py                   text from tokens, whole characters only, up to a stop string

The loop here reads one flag a step, whether all rows have ended; where somebody looks on, the
step's tokens. transformers' `generate` has the same options and some sixty more, and beam search.

Adapters need nothing: `adapter_rows(model, names)` around a call lets each row of its batch name
its adapter. Rows that have ended stay in the batch, so that such names go on fitting.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.models.decode_step import DecodeStep
from lora_core.models.growing import GrowingStep, can_be_fixed
from lora_core.models.rows import Rows
from lora_core.models.sampling import Sampling
from lora_core.models.session import Session
from lora_core.models.stopping import Answers, stop_strings

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages
OnTokens = Callable[[list[int | None]], Iterable[int] | None]


def generate(  # noqa: PLR0913  # the contract's arguments, then options by name
    model: nn.Module,
    tok: Any,
    prompt_or_messages: Prompt,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    *,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
    session: Session | None = None,
) -> str:
    """Continue a prompt, or answer a conversation.

    Args:
        model: any module that returns `.logits`.
        tok: what `load_tokenizer` returns, or anything with `.encode(text)`, `.decode(ids)`,
            `.eos_ids` and `.render(messages, add_generation_prompt=True)`.
        prompt_or_messages: text, or messages to render with the tokenizer's template.
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token, 1 samples from the model's own distribution.
        top_p: sample only from the likeliest tokens that together reach this probability.
        seed: makes sampling repeatable; None draws one from torch's global generator.
        top_k: sample only from the so many likeliest tokens; None: from all.
        min_p: sample only from tokens at least this share as probable as the likeliest.
        repetition_penalty: above 1 makes tokens of the text so far less likely; 1 is off.
        stop: strings that end the text; it is returned without them.
        on_text: called with each piece of text as soon as it is certain; whole characters.
        session: of a conversation whose next turn this is.

    Returns:
        The new text, without the token or the stop string that ended it.

    Raises:
        ValueError: an empty prompt, or an option out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    (text,) = _texts(
        model,
        tok,
        [prompt_or_messages],
        max_new_tokens,
        sampling,
        seed,
        stop,
        None if on_text is None else lambda _, piece: on_text(piece),
        session,
    )
    return text


def generate_batch(  # noqa: PLR0913
    model: nn.Module,
    tok: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    *,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    on_text: Callable[[int, str], object] | None = None,
) -> list[str]:
    """Continue several prompts, of any lengths, together; arguments as `generate`'s, and:

    Args:
        model: any module that returns `.logits` and takes an attention mask. Inside
            `adapter_rows(model, names)` each prompt is answered under the adapter of its name.
        tok: the tokenizer.
        prompts: texts, conversations, or both.
        max_new_tokens: at most so many tokens each.
        temperature: of the sampling.
        top_p: likewise.
        seed: one for the batch, or one a prompt: which then draws what it would draw alone.
        top_k: of the sampling.
        min_p: likewise.
        repetition_penalty: likewise.
        stop: strings that end a text.
        on_text: called with the number of a prompt and a piece of its answer.

    Returns:
        The new texts, in the order of the prompts.

    Raises:
        TypeError: one text in place of a list.
        ValueError: no prompts, an empty one, or an option out of range.
    """
    if isinstance(prompts, str):  # each letter would be a prompt
        raise TypeError("generate_batch takes a list of prompts; got one text: use generate")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return _texts(model, tok, prompts, max_new_tokens, sampling, seed, stop, on_text)


def _texts(
    model: nn.Module,
    tok: Any,
    prompts: Sequence[Prompt],
    limit: int,
    sampling: Sampling,
    seed: int | Sequence[int] | None,
    stop: str | Sequence[str],
    on_text: Callable[[int, str], object] | None,
    session: Session | None = None,
) -> list[str]:
    """The answers as text; tokens are only looked at on the way if somebody asks."""
    ends, stops = frozenset(tok.eos_ids), stop_strings(stop)
    ids, mask = left_pad([_prompt_ids(tok, prompt) for prompt in prompts])
    _check(ids, mask, limit)
    answers = Answers(tok, len(ids), ends, stops, on_text or (lambda row, piece: None))
    watched = on_text is not None or bool(stops)
    found = _generate(
        model,
        ids,
        mask,
        limit,
        sampling,
        seed,
        ends,
        on_tokens=answers.take if watched else None,
        session=session,
    )
    if watched:
        return answers.finish()
    return [tok.decode(row[:-1] if row[-1] in ends else row) for row in found]


def _prompt_ids(tok: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt; this library's tokenizer also puts its BOS before them where it has one."""
    if hasattr(tok, "encode_prompt"):
        return tok.encode_prompt(prompt)
    if isinstance(prompt, str):
        return tok.encode(prompt)
    return tok.encode(tok.render(prompt, add_generation_prompt=True))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Stack prompts of different lengths for `generate_ids`.

    Args:
        prompts: token ids of each row.
        pad_id: what stands before the shorter ones.

    Returns:
        Token ids (B, T) and attention mask (B, T), int64: `[[0, 0, 5], [7, 8, 9]]` and
        `[[0, 0, 1], [1, 1, 1]]`.

    Raises:
        ValueError: no prompts, or an empty one.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens: there is nothing to continue")
    if not prompts:
        raise ValueError("there are no prompts")
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def generate_ids(  # noqa: PLR0913
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    eos_ids: Collection[int] = (),
    pad_id: int = 0,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    on_tokens: OnTokens | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts, in evaluation mode and without gradients.

    Args:
        model: any module that returns `.logits`; see growing.py for its cache.
        input_ids: (B, T) prompts, padded on the left.
        attention_mask: (B, T), nonzero for real tokens; None: nothing is padded.
        max_new_tokens: at most so many tokens a row.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: share of the probability that is kept, in (0, 1].
        seed: makes sampling repeatable: one number, of which rows draw by their places, or one a
            row, which then draws what it would draw alone. None draws one from torch's global
            generator. What a row draws does not depend on the other rows.
        eos_ids: tokens that end a row.
        pad_id: what is fed to a row that has ended while others go on.
        top_k: the so many likeliest tokens are kept; None: all.
        min_p: tokens less than this share as probable as the likeliest are left out, in [0, 1].
        repetition_penalty: logits of tokens in prompt or answer are divided by it where they are
            positive, multiplied where they are negative; 1 is off.
        on_tokens: called after each step with every row's new token, None for rows that had ended;
            rows whose numbers it returns end there.

    Returns:
        The new tokens of each row, the one that ended it included.

    Raises:
        ValueError: an option out of range, padding on the right, or for a model without a mask.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check(input_ids, attention_mask, max_new_tokens)
    return _generate(
        model, input_ids, attention_mask, max_new_tokens, sampling, seed, eos_ids, pad_id, on_tokens
    )


@torch.no_grad()
def _generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    limit: int,
    sampling: Sampling,
    seed: int | Sequence[int] | None,
    eos_ids: Collection[int],
    pad_id: int = 0,
    on_tokens: OnTokens | None = None,
    session: Session | None = None,
) -> list[list[int]]:
    """As `generate_ids`, whose arguments are checked."""
    device = next(model.parameters()).device
    padded = attention_mask is not None and not attention_mask.all()
    mask = attention_mask.to(device) if attention_mask is not None and padded else None
    ids = input_ids.to(device, torch.int64)  # (B, T)
    rows = Rows(ids, mask, limit, sampling, seed, eos_ids, pad_id)
    steps: DecodeStep | GrowingStep
    with _evaluating(model), _kept(session, ids, rows, model, fixed := can_be_fixed(model)):
        if fixed:
            steps = DecodeStep(model, rows, None if session is None else session.cache)
        else:
            steps = GrowingStep(model, rows)
        steps.start(ids, mask)
        going = _goes_on(rows, on_tokens, [True] * len(ids))
        for _ in range(limit - 1):
            if not any(going):
                break
            steps.step()
            going = _goes_on(rows, on_tokens, going)
    return rows.answers()


def _goes_on(rows: Rows, on_tokens: OnTokens | None, before: list[bool]) -> list[bool]:
    """Which rows go on after a step: one number if nobody looks on, else one a row."""
    if on_tokens is None:
        return [not rows.all_ended()]
    tokens, ended = rows.last()
    shown = [token if going else None for token, going in zip(tokens, before, strict=True)]
    stopped = list(on_tokens(shown) or ())
    if stopped:
        rows.end(stopped)
    return [not flag and row not in stopped for row, flag in enumerate(ended)]


@contextmanager
def _kept(
    session: Session | None, ids: Tensor, rows: Rows, model: nn.Module, fixed: bool
) -> Iterator[None]:
    """Let a session begin with what it holds of a prompt, and keep what is computed inside."""
    if session is None:
        yield
        return
    prompt = ids[0].tolist()
    session.begin(prompt if fixed else (), getattr(model, "switches_after", None))
    try:
        yield
    finally:  # an interrupted answer is kept as far as it came
        session.end([*prompt, *rows.answers()[0]])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must have shape (B, T) with T at least 1; got {tuple(input_ids.shape)}"
        )
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}; "
                f"got {tuple(attention_mask.shape)}"
            )
        if not attention_mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: a row ends in padding")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens!r}")
