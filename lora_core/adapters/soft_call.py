"""What soft prompts do to a call of the model: two hooks on the part that owns the embedding.

A longer input, shifted positions, a wider mask: what concerns a whole forward is done by one
forward pre-hook and one forward hook. They hold no prompt: at each call they ask the embedding's
host which are active. So switching, disabling, deep copies and pickles need no more than the host
has, and an exception in the middle of a forward leaves nothing behind.

    caller       ids (B, T)              mask (B, T)           labels (B, T)
    before   ->  [prompt; embed(ids)]    [1 … 1; mask]         [-100 …; labels]    P + T positions
    after    ->  logits and hidden states of the caller's T positions

PEFT wraps the model in one of six classes, one a task, whose `forward` and `generate` are written
anew; calls that go to the inner model miss the prompt. Here the model stays what it is, and its own
`generate` works: with a cache the prompt goes in with the first tokens, and its keys and values
stay there, so that the cache is P longer than the text. Positions are counted over real tokens, the
prompt before the first of them: a left-padded row gives what it gives alone. (PEFT counts columns,
so that padding lies between prompt and text.)

The trade-off: hooks are on the model, so a part of it that is called by itself (`model.model(…)`)
sees no prompt. Attentions on request keep their P + T columns.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.host import adapted_modules
from lora_core.adapters.soft import (
    Hook,
    SoftPrompt,
    active_prompts,
    language_model,
    parameter_names,
)
from lora_core.targets import unwrap

__all__ = ["CACHES", "hook", "unhook"]

CACHES = ("cache", "past_key_values")
STATES = ("cache_params", "state", "mems")  # of models without attention, or with another cache
BY_TOKEN = ("token_losses", "log_probs")  # outputs (B, T) of this library's decoder
IGNORED = -100  # a label that is not graded


class _Before(Hook):
    """Forward pre-hook: put the prompts into the call.

    Args:
        names: the forward's parameters, in order, for what the caller passes by position.
        table: rows of the model's table of positions, or None: it has none (rotary, ALiBi).
        first: position of a text's first token; RoBERTa's tables have rows for padding before it.
    """

    def __init__(self, names: tuple[str, ...], table: int | None, first: int = 0) -> None:
        self.names, self.table, self.first = names, table, first

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompts = active_prompts(model)
        if not prompts:
            return None
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
            return None  # the model itself says what is wrong
        front = [prompt.embeddings() for prompt in prompts if prompt.prepended]
        if front:
            _refuse_state(self.names, call)
            call = _prepended(model, call, torch.cat(front), self.first)
        shift = sum(prompt.tokens for prompt in prompts if not prompt.prepended)
        if shift:
            call["position_ids"] = _positions(call, self.first) + shift
        if "position_ids" not in self.names:  # a model without positions of its own (ALiBi)
            call.pop("position_ids", None)
        if self.table is not None:
            _check_length(call, shift + self.first, self.table)
        return (), call


class _After(Hook):
    """Forward hook: give back the caller's positions."""

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        extra = sum(prompt.tokens for prompt in active_prompts(model) if prompt.prepended)
        x = kwargs.get("inputs_embeds")
        # by now a cache holds this call's tokens; more of them, and the prompt came in earlier
        if not extra or x is None or _past(kwargs) > x.shape[1]:
            return None
        _refuse_pooled(model, output)
        return _trimmed(output, x.shape[1], extra)


def _trimmed(value: Any, total: int, extra: int) -> Any:
    """Drop the first `extra` of `total` positions of every (B, total, …) tensor in an output."""
    if isinstance(value, Tensor):
        return value[:, extra:] if value.dim() == 3 and value.shape[1] == total else value
    if isinstance(value, tuple | list):
        return type(value)(_trimmed(item, total, extra) for item in value)
    fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    for name in fields:
        if isinstance(part := getattr(value, name), Tensor | tuple):
            setattr(value, name, _trimmed(part, total, extra))
        if name in BY_TOKEN and isinstance(part, Tensor):  # (B, total)
            setattr(value, name, part[:, extra:])
    return value


def _prepended(
    model: nn.Module, call: dict[str, Any], prompt: Tensor, first: int
) -> dict[str, Any]:
    """The call with virtual tokens (P, C) in front, or, after the first tokens, wider by P."""
    ids, x, mask = (call.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    count, past = len(prompt), _past(call)
    given: Tensor = ids if x is None else x  # type: ignore[assignment]  # the caller checked
    _refuse(call, mask, past)
    _check_cache(call, past, given.shape[1], count, first)
    changed = dict(call)
    if isinstance(mask, Tensor):
        mask = changed["attention_mask"] = _wider(mask, count, 1)
    changed["position_ids"] = _moved(call.get("position_ids"), mask, past, count, first)
    if past:  # the prompt came in with the first tokens
        return changed
    if x is None:
        x = model.get_input_embeddings()(ids)  # type: ignore[operator]  # active_prompts asked
    front = prompt.to(x.device, x.dtype).expand(len(x), -1, -1)  # (B, P, C)
    changed |= {"input_ids": None, "inputs_embeds": torch.cat([front, x], 1)}  # (B, P + T, C)
    if isinstance(labels := call.get("labels"), Tensor):
        if labels.shape != given.shape[:2]:
            raise ValueError(_pooled(model))
        changed["labels"] = _wider(labels, count, IGNORED)
    for end in ("start_positions", "end_positions"):  # a span's labels count tokens
        if isinstance(position := call.get(end), Tensor):
            changed[end] = position.clamp(min=0) + count
    keep = call.get("logits_to_keep")
    if isinstance(keep, Tensor):
        changed["logits_to_keep"] = torch.where(keep < 0, keep, keep + count)
    elif keep is not None:
        changed["logits_to_keep"] = min(keep, given.shape[1])
    return changed


def _moved(
    positions: Tensor | None, mask: Tensor | None, past: int, count: int, first: int
) -> Tensor | None:
    """Positions behind a prompt, its own before them in the first call; None: the model's own.

    Args:
        positions: the caller's, (B or 1, T), or None.
        mask: widened already, (B, P + S), or None.
        past: tokens in the cache.
        count: P.
        first: position of a text's first token.
    """
    if positions is None:
        return None if mask is None else _counted(mask)[:, past:] + first
    if past:
        return positions + count
    own = torch.arange(first, first + count, device=positions.device)
    return torch.cat([own.expand(len(positions), -1), positions + count], 1)  # (B or 1, P + T)


def _refuse(call: Mapping[str, Any], mask: object, past: int) -> None:
    """What cannot go with virtual tokens in front of the text."""
    positions = call.get("position_ids")
    # transformers' way of packing: positions that begin again, and no mask
    packed = mask is None and not past and not torch.compiler.is_compiling()
    if packed and isinstance(positions, Tensor) and bool((positions.diff(dim=1) != 1).any()):
        raise ValueError(
            "position_ids that begin again (packed rows) do not go with a prompt: only a row's "
            "first document would see it; leave rows unpacked, or use PrefixTuningConfig"
        )
    if call.get("document_ids") is not None:
        raise ValueError(
            "document_ids (packed rows) do not go with a prompt: only a row's first document would "
            "see it; leave the rows unpacked, or use PrefixTuningConfig, which every document sees"
        )
    if call.get("token_type_ids") is not None:
        raise ValueError("token_type_ids do not go with a prompt: virtual tokens have no type")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a prompt needs an attention_mask (B, past + T), got {shape}; a static cache makes "
            "others: use the model's default cache, or PrefixTuningConfig"
        )


def _check_cache(call: Mapping[str, Any], past: int, tokens: int, count: int, first: int) -> None:
    """Refuse a cache that does not hold the prompt, as far as the mask or positions tell."""
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    text = past - count if past else 0  # of the cache
    fits = text >= 0
    if isinstance(mask, Tensor):
        fits &= mask.shape[1] == text + tokens
    elif past and isinstance(positions, Tensor) and not torch.compiler.is_compiling():
        fits &= text <= int(positions[0, 0]) <= text + first
    if not fits:
        # transformers' generate() takes all that a cache holds for text, and cuts too much
        raise ValueError(
            f"{tokens} new tokens do not follow a cache of {past} positions, {count} of them the "
            "prompt's: fill a cache with the prompt active, and give generate() no old cache"
        )


def _refuse_state(names: tuple[str, ...], call: Mapping[str, Any]) -> None:
    """Refuse a cache in which this module could not see whether the prompt is there already."""
    if any(name in names for name in CACHES):
        return
    if call.get("use_cache") or any(call.get(name) is not None for name in STATES):
        raise ValueError(
            "a prompt needs a cache with a length (past_key_values), which this model has not: "
            "use_cache=False runs it on the whole text at each step"
        )


def _refuse_pooled(model: nn.Module, output: Any) -> None:
    """Refuse an output without positions: the model finds its place in input_ids, which went."""
    if any(getattr(output, name, None) is not None for name in BY_TOKEN):  # not pooled
        return
    fields = vars(output).values() if dataclasses.is_dataclass(output) else output
    parts = [output] if isinstance(output, Tensor) else list(fields)
    sizes = {part.dim() for part in parts if isinstance(part, Tensor)}
    if 2 in sizes and 3 not in sizes:
        raise ValueError(_pooled(model))


def _pooled(model: nn.Module) -> str:
    return (
        f"a prompt needs logits and labels for every token; {type(model).__name__} has others, "
        "taken from a place in the text: use PrefixTuningConfig or LoRAConfig"
    )


def _check_length(call: Mapping[str, Any], shift: int, table: int) -> None:
    """Refuse a text that virtual tokens push beyond a table of positions."""
    x, positions = call.get("inputs_embeds"), call.get("position_ids")
    given: Tensor = call["input_ids"] if x is None else x
    end = shift + _past(call) + given.shape[1]
    # columns are a bound; positions are looked at only where it is passed, as reading them waits
    if end > table and (positions is None or int(positions.max()) >= table):
        raise ValueError(
            f"text and virtual tokens need {end} positions, the model has {table}: shorten the text"
        )


def _past(call: Mapping[str, Any]) -> int:
    """Tokens in the call's cache, 0 without one."""
    cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
    if cache is None:
        return 0
    length = getattr(cache, "length", None)
    return length if isinstance(length, int) else int(cache.get_seq_length())


def _wider(rows: Tensor, count: int, value: int) -> Tensor:
    """Rows (B, T) with `count` columns of a value in front."""
    return torch.cat([rows.new_full((len(rows), count), value), rows], 1)  # (B, P + T)


def _counted(mask: Tensor) -> Tensor:
    """Positions counted over real tokens, (B, S) from a mask (B, S)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _positions(call: Mapping[str, Any], first: int) -> Tensor:
    """The positions that the text has without a prefix, (B or 1, T)."""
    if call.get("position_ids") is not None:
        return call["position_ids"]
    ids, mask, documents = (call.get(k) for k in ("input_ids", "attention_mask", "document_ids"))
    given: Tensor = call["inputs_embeds"] if ids is None else ids
    past, tokens, device = _past(call), given.shape[1], given.device
    index = torch.arange(past, past + tokens, device=device)[None]  # (1, T)
    if isinstance(documents, Tensor):
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return index - torch.where(starts, index, 0).cummax(1).values
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return _counted(mask)[:, past:] + first
    return index + first


def _table(part: nn.Module) -> tuple[int | None, int]:
    """Rows of a model's table of positions, told by its size, and the first that a token has."""
    rows = getattr(getattr(part, "config", None), "max_position_embeddings", None)
    words = part.get_input_embeddings()  # type: ignore[operator]  # language_model asked
    for table in part.modules():
        if not isinstance(table, nn.Embedding) or table is unwrap(words):
            continue
        # OPT's has rows in front, which it adds to positions itself
        if table.num_embeddings - getattr(table, "offset", 0) == rows:
            return rows, 0 if table.padding_idx is None else table.padding_idx + 1
    return None, 0


def hook(model: nn.Module) -> None:
    """Make a model ask for its soft prompts at each call; once is enough.

    Args:
        model: as of `language_model`.
    """
    part, _ = language_model(model)
    if not any(isinstance(known, Hook) for known in part._forward_pre_hooks.values()):
        part.register_forward_pre_hook(
            _Before(parameter_names(part), *_table(part)), with_kwargs=True
        )
        part.register_forward_hook(_After(), with_kwargs=True)


def unhook(model: nn.Module) -> None:
    """Take the hooks away if no soft prompt is left.

    Args:
        model: any module.
    """
    left = (a for _, host in adapted_modules(model) for a in host.adapters.values())
    if any(isinstance(adapter, SoftPrompt) for adapter in left):
        return
    for module in model.modules():
        for hooks, extra in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, known in hooks.items() if isinstance(known, Hook)]:
                del hooks[key]
                extra.pop(key, None)
