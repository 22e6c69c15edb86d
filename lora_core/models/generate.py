"""Text from a model: greedy or sampled, one prompt or a batch of them.

Prompts of a batch are padded on the left, so that the next token of every row stands in the last
column; the attention mask hides the padding and positions are counted over real tokens, which is
why a batch gives the tokens that its rows give one by one. Each new token costs one position:
earlier keys and values come from the model's `cache` (this library's models) or `past_key_values`
(transformers'). Any other module that returns `.logits` is run on the whole text again at every
step: right, but quadratic.

Sampling is by nucleus: of the tokens sorted by probability the shortest head that reaches `top_p`
is kept. Ref: Holtzman et al., arXiv:1904.09751, section 3.1.
"""

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.models.cache import KVCache

Messages = Sequence[Mapping[str, Any]]


def generate(
    model: nn.Module,
    tok: Any,
    prompt_or_messages: str | Messages,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
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
        seed: makes sampling repeatable; None draws from torch's global generator.

    Returns:
        The new text, without the token that ended it.

    Raises:
        ValueError: an empty prompt, or an option out of range.
    """
    input_ids, mask = left_pad([_prompt_ids(tok, prompt_or_messages)])
    stop = frozenset(tok.eos_ids)
    (ids,) = generate_ids(
        model,
        input_ids,
        mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_ids=stop,
    )
    return tok.decode(ids[:-1] if ids[-1] in stop else ids)


def _prompt_ids(tok: Any, prompt: str | Messages) -> list[int]:
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


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_ids: Collection[int] = (),
    pad_id: int = 0,
) -> list[list[int]]:
    """Continue a batch of prompts, in evaluation mode and without gradients.

    Args:
        model: any module that returns `.logits`; see this module's docstring for its cache.
        input_ids: (B, T) prompts, padded on the left.
        attention_mask: (B, T), nonzero for real tokens; None: nothing is padded.
        max_new_tokens: at most so many tokens a row.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: share of the probability that is kept, in (0, 1].
        seed: makes sampling repeatable; None draws from torch's global generator.
        eos_ids: tokens that end a row.
        pad_id: what is fed to a row that has ended while others go on.

    Returns:
        The new tokens of each row, the one that ended it included.

    Raises:
        ValueError: an option out of range, padding on the right, or padding given to a model that
            takes no attention mask.
    """
    _check(input_ids, attention_mask, max_new_tokens, temperature, top_p)
    device = next(model.parameters()).device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    padded = attention_mask is not None and not attention_mask.all()
    mask = attention_mask.to(device) if attention_mask is not None and padded else None
    steps = _Steps(model, padded=mask is not None)
    ids = input_ids.to(device)  # (B, T)
    rows: list[list[int]] = [[] for _ in range(len(ids))]
    open_rows = set(range(len(ids)))
    with _evaluating(model):
        for _ in range(max_new_tokens):
            logits = steps(ids, mask)  # (B, V)
            new = _choose(logits.float(), temperature, top_p, generator)  # (B,)
            for row, token in enumerate(new.tolist()):
                if row in open_rows:
                    rows[row].append(token)
                    if token in eos_ids:
                        open_rows.discard(row)
                else:
                    new[row] = pad_id
            if not open_rows:
                break
            ids = torch.cat((ids, new[:, None]), dim=1)  # (B, T + 1)
            if mask is not None:
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return rows


class _Steps:
    """Logits of the last position of a growing text, by whichever cache the model has."""

    def __init__(self, model: nn.Module, *, padded: bool) -> None:
        self.model = model
        self.takes = inspect.signature(model.forward).parameters
        self.cache = KVCache() if "cache" in self.takes else None
        self.past: Any = None  # transformers' own cache
        # not the cache's length: a soft prompt's virtual tokens are in it too
        self.seen = 0
        if padded and "attention_mask" not in self.takes:
            raise ValueError(
                f"{type(model).__name__}.forward takes no attention_mask: give its prompts one by "
                "one, without padding"
            )

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        options: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if self.cache is not None:
            options["cache"] = self.cache
        elif "past_key_values" in self.takes:
            options |= {"past_key_values": self.past, "use_cache": True}
            if mask is not None:
                options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, self.seen :]
        if "logits_to_keep" in self.takes:
            options["logits_to_keep"] = 1
        output = self.model(ids[:, self.seen :], **options)
        self.past = getattr(output, "past_key_values", None)
        if self.cache is not None or self.past is not None:
            self.seen = ids.shape[1]
        return output.logits[:, -1]  # (B, V)


def _choose(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token id a row, (B,), from float32 logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # from the largest down, and no smaller divisor: the quotients may not overflow upwards
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probability.cumsum(dim=-1) - probability  # probability of all likelier tokens
    kept = probability.masked_fill(before >= top_p, 0.0)  # the first is always kept
    drawn = torch.multinomial(kept, 1, generator=generator)  # (B, 1)
    return order.gather(-1, drawn)[:, 0]


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


def _check(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and not negative; got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
