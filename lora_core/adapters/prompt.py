r"""Prompt tuning: P trained vectors in front of the embedded text, and nothing else.

    x' = [p_1; …; p_P; e(x_1); …; e(x_T)]        p (P, C)

Trained are P · C numbers. The start decides much where the model is small: the embeddings of P
tokens drawn from the commonest ("vocabulary"), uniform numbers in ±0.5 ("random"), or a text's
embeddings ("text": cut at P tokens, or repeated up to P). Lester et al. draw from the 5,000
commonest tokens; ids are in order of frequency in most vocabularies, so the first 5,000 are taken.

PEFT starts at random by default, from N(0, 1), about fifty times as long as a decoder's embeddings;
its vocabulary start draws from all rows, with repeats. The files are PEFT's
(checkpoint/soft_prompts).

Ref: Lester et al. 2021, arXiv:2104.08691, section 2 (the method), 3.2 (the starts).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.config import register_adapter
from lora_core.adapters.soft import SoftPrompt, check_tokens, embedding_size
from lora_core.adapters.soft_call import hook, unhook
from lora_core.targets import sites, unwrap

__all__ = ["Prompt", "PromptTuningConfig"]

STARTS = ("vocabulary", "random", "text")
RANGE = 0.5  # of the random start; Lester et al., section 3.2


class Prompt(SoftPrompt):
    """Virtual tokens as they are: the flat form of every prompt.

    Args:
        start: (P, C), copied.

    Attributes:
        prompt: the virtual tokens, (P, C) float32.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__(len(start))
        self.prompt = nn.Parameter(start.detach().float().clone())

    def embeddings(self) -> Tensor:
        """The virtual tokens, (P, C)."""
        return self.prompt


@register_adapter("PROMPT_TUNING")
@dataclass(frozen=True)
class PromptTuningConfig:
    """Virtual tokens in front of the embedded text of a language model.

    Args:
        tokenizer: encodes `text`: anything with `encode(text) -> ids`; not kept.

    Raises:
        ValueError: a value out of range, or a start that lacks what it starts from.
    """

    num_virtual_tokens: int = 20
    """P, vectors in front of the text."""
    init: str = "vocabulary"
    """Start: "vocabulary" (rows of common tokens), "random" (uniform in ±0.5) or "text"."""
    text: str | None = None
    """What init="text" starts from; needs a tokenizer."""
    token_ids: tuple[int, ...] | None = None
    """The same as token ids, in place of a text."""
    vocabulary: int = 5000
    """init="vocabulary" draws from the first so many token ids, commonly the most frequent ones."""
    tokenizer: dataclasses.InitVar[Any] = None

    def __post_init__(self, tokenizer: Any) -> None:
        check_tokens(self.num_virtual_tokens)
        if self.init not in STARTS:
            raise ValueError(
                f"init must be one of {', '.join(map(repr, STARTS))}, got {self.init!r}"
            )
        if type(self.vocabulary) is not int or self.vocabulary < 1:
            raise ValueError(
                f"vocabulary must be a whole number, 1 or more; got {self.vocabulary!r}"
            )
        given = [key for key in ("text", "token_ids") if getattr(self, key) is not None]
        if given and self.init != "text":
            raise ValueError(f'{given[0]} belongs to init="text"; this is {self.init!r}')
        if self.init == "text" and not given:
            raise ValueError('init="text" needs the text, or its token_ids')
        ids = self.token_ids
        if ids is None and self.text is not None and tokenizer is not None:
            ids = tokenizer.encode(self.text)
        if ids is not None and len(ids) == 0:
            raise ValueError(f'init="text" needs a text with tokens; {self.text!r} has none')
        object.__setattr__(self, "token_ids", None if ids is None else tuple(map(int, ids)))

    def build(self, name: str, module: nn.Module) -> Adapter:
        """Return the prompt for an embedding.

        Args:
            name: the embedding's name, for messages.
            module: one with a weight (V, C).

        Returns:
            The adapter.

        Raises:
            ValueError: a vocabulary that is too small, or token ids beyond it.
        """
        return Prompt(self._start(name, module))

    def build_all(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the one site, the model's input embedding; see `add_adapter`."""
        name, _ = embedding_size(model)
        return {name: self.build(name, unwrap(dict(sites(model))[name]))}

    def installed(self, model: nn.Module) -> None:
        """Hook the model; `add_adapter` calls this last."""
        hook(model)

    def removed(self, model: nn.Module) -> None:
        """Take the hooks away with the last soft prompt."""
        unhook(model)

    def _start(self, name: str, module: nn.Module) -> Tensor:
        """What the virtual tokens start as, (P, C) float32 on the CPU."""
        weight: Tensor = module.weight  # type: ignore[assignment]  # build_all checked
        count, (rows, size) = self.num_virtual_tokens, weight.shape
        if self.init == "random":
            return torch.empty(count, size, device="cpu").uniform_(-RANGE, RANGE)
        if self.init == "vocabulary":
            among = min(self.vocabulary, rows)
            if among < count:
                raise ValueError(
                    f'init="vocabulary" draws {count} different tokens, but there are {among}: '
                    f"lower num_virtual_tokens, or raise vocabulary ({name!r} has {rows} rows)"
                )
            ids = torch.randperm(among, device="cpu")[:count]
        else:
            if self.token_ids is None:
                raise ValueError(
                    'init="text" has a text and no tokenizer: PromptTuningConfig(…, tokenizer=tok)'
                )
            if wrong := [i for i in self.token_ids if not 0 <= i < rows]:
                raise ValueError(f"token_ids: {wrong[0]} is not in the {rows} rows of {name!r}")
            every = torch.tensor(self.token_ids, dtype=torch.int64, device="cpu")
            ids = every.repeat(-(-count // len(every)))[:count]
        with torch.no_grad():  # called, not read: Gemma's embedding multiplies rows by √C
            found: Tensor = module(ids.to(weight.device))
        return found.float().cpu()
