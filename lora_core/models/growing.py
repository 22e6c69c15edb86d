"""Generation with models that this library did not build, or whose calls hooks rewrite.

Nothing is fixed here: the text grows, and with it mask, positions and cache. So any module that
returns `.logits` can be used: this library's decoder under a soft prompt (whose virtual tokens make
its cache longer than its text), transformers' models with their own cache, and anything else, which
is run on the whole text at every step: right, but quadratic.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.models.cache import KVCache
from lora_core.models.rope import Rotary
from lora_core.models.rows import Rows

_FIXED = {"cache", "position_ids", "attention_mask", "logits_to_keep"}


def can_be_fixed(model: nn.Module) -> bool:
    """Whether `DecodeStep` can run a model: it takes what that gives, and no hook comes between."""
    takes = inspect.signature(model.forward).parameters
    hooked = any(module._forward_pre_hooks for module in model.modules())
    return takes.keys() >= _FIXED and not hooked


class GrowingStep:
    """Runs any model on prompts, and then on what they have grown by; as `DecodeStep`.

    Args:
        model: any module that returns `.logits`.
        rows: the answers.

    Raises:
        ValueError: the prompts are padded, and the model takes no attention mask.
    """

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        self.model, self.rows = model, rows
        self.takes = inspect.signature(model.forward).parameters
        self.cache = KVCache() if "cache" in self.takes else None
        self.past: Any = None  # transformers' own cache
        # not the cache's length: a soft prompt's virtual tokens are in it too
        self.seen = 0
        turns = (part for part in model.modules() if isinstance(part, Rotary))
        self.rotary = next((part for part in turns if part.switches_after is not None), None)
        self.turned = 0  # tokens of the text as its positions count it, for such a model

    def start(self, ids: Tensor, mask: Tensor | None) -> None:
        """Run the prompts, and choose the first new tokens; as `DecodeStep.start`."""
        if mask is not None and "attention_mask" not in self.takes:
            raise ValueError(
                f"{type(self.model).__name__}.forward takes no attention_mask: give its prompts "
                "one by one, without padding"
            )
        self.ids, self.mask = ids, mask
        self.rows.take(self._logits())

    def step(self) -> None:
        """Run the last tokens, and choose the next ones."""
        self.ids = torch.cat((self.ids, self.rows.token), dim=1)  # (B, T + 1)
        if self.mask is not None:
            self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        self.rows.take(self._logits())

    def _logits(self) -> Tensor:
        """Of the last position, (B, V)."""
        if self.rotary is None or self.cache is None:
            return self._run()
        # where the keys begin to be turned otherwise, all are needed anew (decode_step.py); a soft
        # prompt moves the place, so positions are looked at on their way in
        before, after = self.turned, self.rotary.switches_after or 0
        handle = self.rotary.register_forward_pre_hook(self._note)
        try:
            logits = self._run()
            if 0 < before <= after < self.turned:
                self.cache, self.seen = KVCache(), 0
                logits = self._run()
        finally:
            handle.remove()
        return logits

    def _note(self, rotary: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.turned = int(args[0].max()) + 1

    def _run(self) -> Tensor:
        options: dict[str, Any] = {} if self.mask is None else {"attention_mask": self.mask}
        if self.cache is not None:
            options["cache"] = self.cache
        elif "past_key_values" in self.takes:
            options |= {"past_key_values": self.past, "use_cache": True}
            if self.mask is not None:
                positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
                options["position_ids"] = positions[:, self.seen :]
        if "logits_to_keep" in self.takes:
            options["logits_to_keep"] = 1
        output = self.model(self.ids[:, self.seen :], **options)
        self.past = getattr(output, "past_key_values", None)
        if self.cache is not None or self.past is not None:
            self.seen = self.ids.shape[1]
        return output.logits[:, -1]
