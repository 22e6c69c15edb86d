"""The step that generation repeats: one token a row through the model, on fixed memory.

A step of a small or a quantized model is a few hundred kernels of some microseconds each, and on a
GPU the host that launches them is the slower of the two. A CUDA graph launches all of them at once,
if nothing changes from step to step but numbers on the device:

    the token (B, 1), its position in the text (B, 1) and in the cache (), the mask (B, room)
    the cache's buffers, of a fixed room                             (`KVCache.fix`)
    the answers so far, the noise, which rows have ended             (`Rows`)

When the room is used up the cache gets longer buffers and the graph is made anew: some ten times
for a text that grows by a factor of ten, since rooms grow by a quarter. The first step in each room
runs as it is, which makes the workspaces that capturing may not; the second is captured.

Where there are no graphs (`device.recorded`) the same code runs each time, so that what the tests
see on a CPU is what a GPU captures. The price there is that attention reads the unused columns too,
a fifth at most.

transformers reaches the same by a StaticCache of the longest text's size and torch.compile. Here
the model stays what it is, so that adapters, also those that rows of a batch name, can be changed
between two calls.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_core.device import recorded
from lora_core.models.cache import KVCache
from lora_core.models.rows import Rows


class DecodeStep:
    """Runs a model with a `cache` argument on prompts, and then a token at a time.

    Args:
        model: takes `input_ids`, `attention_mask`, `position_ids`, `cache` and `logits_to_keep`.
        rows: the answers, which every step takes further.
        cache: with earlier tokens or without; None: a new one. It is fixed while steps run.
    """

    def __init__(self, model: nn.Module, rows: Rows, cache: KVCache | None = None) -> None:
        self.model, self.rows = model, rows
        self.cache = KVCache() if cache is None else cache
        self.mask = torch.empty(0)
        self.positions = torch.empty(0)
        self._run: Callable[[], None] | None = None
        # the host's count of the longest row, for models whose keys are good up to a length alone
        self.switches_after: int | None = getattr(model, "switches_after", None)
        self._longest = 0

    def start(self, ids: Tensor, mask: Tensor | None) -> None:
        """Run the prompts, and choose the first new tokens.

        Args:
            ids: (B, T) tokens; those that the cache holds are not run again.
            mask: (B, T), nonzero for real tokens, if any row is padded.
        """
        past = self.cache.length
        logits = self.model(
            ids[:, past:], attention_mask=mask, cache=self.cache, logits_to_keep=1
        ).logits
        self.rows.take(logits[:, -1])
        real = torch.ones_like(ids) if mask is None else (mask != 0).long()
        self.positions = real.sum(dim=1, keepdim=True)  # (B, 1), of the next token
        self.mask = real  # (B, T)
        if self.switches_after is not None:
            self._longest = int(self.positions.max())

    def step(self) -> None:
        """Run the last tokens, and choose the next ones."""
        self._longest += 1
        if self._longest - 1 == self.switches_after:
            self._start_again()
            return
        fixed = self.cache.fixed
        if fixed is None or self.cache.length == fixed[1]:
            self._make_room()
        assert self._run is not None
        self._run()
        self.cache.advance()

    def _start_again(self) -> None:
        """Run all tokens anew: the step from which on all keys are turned otherwise.

        It costs what a prompt of that length does, once in a text.
        """
        held = self.cache.length
        self._run = None
        self.cache.crop(0)
        ids = self.rows.text()
        self.start(ids, torch.cat((self.mask[:, :held], torch.ones_like(self.rows.token)), dim=1))

    def _make_room(self) -> None:
        """Fix the cache with more room, and begin a new recording on the new buffers."""
        self._run = None  # the old graph's memory goes before the new one's comes
        held = self.cache.length
        self.cache.fix()
        mask = torch.zeros(
            len(self.mask), self.cache.room, dtype=torch.int64, device=self.mask.device
        )
        mask[:, :held] = self.mask[:, :held]
        self.mask = mask
        self._run = recorded(self.once, self.mask.device)

    def once(self) -> None:
        """The step itself: operations on fixed memory alone."""
        fixed = self.cache.fixed
        assert fixed is not None
        position = fixed[0]
        self.mask.index_fill_(1, position.view(1), 1)  # the new token sees itself
        logits = self.model(
            self.rows.token,
            attention_mask=self.mask,
            position_ids=self.positions,
            cache=self.cache,
            logits_to_keep=1,
        ).logits
        self.rows.take(logits[:, -1])
        position += 1
        self.positions += 1
