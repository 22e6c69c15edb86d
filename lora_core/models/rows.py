"""What a batch of answers in the making consists of, as tensors on the device.

A step of generation ends in a few operations on (B, V) and (B,) tensors: choose a token for every
row, put the pad token where a row has ended, see which rows end now, write the tokens down. All of
it is done in place, in memory that stays where it is, by operations that read no number back to
the host and do not loop over rows. So `take` can be part of a CUDA graph, and a step costs the same
host time for 1 row and for 256. The host reads one flag a step: whether all rows have ended.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lora_core.models.sampling import Sampling, uniforms


class Rows:
    """The answers of a batch.

    Args:
        ids: (B, T) the prompts' tokens.
        mask: (B, T), nonzero for real tokens; None: all are.
        limit: N, new tokens a row at most.
        sampling: how tokens are chosen.
        seed: of the drawing; one, or one a row. None: drawn from torch's global generator.
        eos_ids: tokens that end a row.
        pad_id: what stands for the tokens of a row that has ended.

    Attributes:
        token: (B, 1) int64, the tokens of the last step.
        ended: (B,) bool.
        tokens: (B, N) int64, all new tokens.
        lengths: (B,) int64, how many of them are the row's own.
    """

    def __init__(  # what a batch needs to know
        self,
        ids: Tensor,
        mask: Tensor | None,
        limit: int,
        sampling: Sampling,
        seed: int | Sequence[int] | None = None,
        eos_ids: Collection[int] = (),
        pad_id: int = 0,
    ) -> None:
        rows, device = len(ids), ids.device
        self.sampling, self.prompt = sampling, (ids, mask)
        if seed is None and sampling.temperature:
            seed = int(torch.randint(2**63 - 1, ()))
        noise = uniforms(0 if seed is None else seed, rows, limit if sampling.temperature else 1)
        self.noise = noise.to(device)  # (B, N)
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)  # (E,)
        self.pad = torch.tensor(pad_id, dtype=torch.int64, device=device)
        self.tokens = self.pad.repeat(rows, limit)
        self.token = self.pad.repeat(rows, 1)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.seen: Tensor | None = None  # (B, V) bool

    def take(self, logits: Tensor) -> None:
        """Choose the next token of every row.

        Args:
            logits: (B, V), any floating dtype.
        """
        if self.sampling.penalises and self.seen is None:
            self.seen = self._prompts_tokens(logits.shape[-1])
        noise = self.noise[:, 0]
        if self.sampling.temperature:
            noise = self.noise.index_select(1, self.step)[:, 0]
        new = self.sampling.choose(logits.float(), self.seen, noise)  # (B,)
        new = torch.where(self.ended, self.pad, new)
        self.lengths += ~self.ended
        self.ended |= (new[:, None] == self.eos).any(dim=1)
        self.token.copy_(new[:, None])
        self.tokens.index_copy_(1, self.step, self.token)
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, self.token, True)

    def end(self, rows: Sequence[int]) -> None:
        """End some rows, for a reason that is not in their tokens."""
        self.ended[torch.tensor(rows, dtype=torch.int64, device=self.ended.device)] = True

    def all_ended(self) -> bool:
        """Whether no row goes on: the one number that the host reads each step."""
        return bool(self.ended.all())

    def last(self) -> tuple[list[int], list[bool]]:
        """The tokens of the last step, and which rows have ended, in one reading."""
        token, ended = torch.stack((self.token[:, 0], self.ended.long())).tolist()
        return token, [flag == 1 for flag in ended]

    def text(self) -> Tensor:
        """Prompts and answers so far, (B, T), with pad tokens where rows have ended."""
        return torch.cat((self.prompt[0], self.tokens[:, : int(self.step)]), dim=1)

    def answers(self) -> list[list[int]]:
        """The new tokens of each row, the one that ended it included."""
        lengths = self.lengths.tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)]

    def _prompts_tokens(self, vocabulary: int) -> Tensor:
        """Which tokens are in the prompts, padding left out: (B, V) bool."""
        ids, mask = self.prompt
        real = torch.ones_like(ids) if mask is None else (mask != 0).long()
        counts = torch.zeros(len(ids), vocabulary, dtype=torch.int64, device=ids.device)
        return counts.scatter_add_(1, ids, real) > 0
