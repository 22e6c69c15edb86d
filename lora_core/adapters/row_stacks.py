"""LoRA pairs of one site, stacked, so that each row of a batch is multiplied by its own.

    update of row i = s·B[slot i] (A[slot i] dropout(x_i)),      A (L, R, K), s·B (L, N, R/g)

Pairs of smaller rank are padded with zeros, which add nothing. Every kind of layer has its product
in `Form.apply_rows`, two batched products for a linear layer, whatever the number of adapters.

Where autograd has to reach A and B, the stacks are made in each forward, differentiably: the
gradients of the rows are summed by adapter and split again. Else they are made once and kept until
a tensor they came from is replaced or changed in place (its version counter moves), a scaling is
set, or another dtype is wanted. Kept stacks are expanded to one entry a row where that at most
doubles them; with more rows an adapter, every forward gathers, so that memory grows with the
adapters and not with the batch.

An operator of its own would save the gathered copies between forward and backward; of T tokens a
row they are R / T of x, which is saved in any case, so plain PyTorch does.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.base import Adapter, compute_dtype
from lora_core.adapters.forms import EmbeddingForm
from lora_core.adapters.lora import LoRA

__all__ = ["PairStacks", "is_grouped"]


class Stacks(NamedTuple):
    """What the rows are multiplied by; E is the number of adapters, or of rows."""

    down: Tensor  # A, (E, R, K)
    up: Tensor  # s·B, (E, N, R / g)
    bias: Tensor | None  # what trained biases add, (E, N)


def is_grouped(adapter: Adapter) -> bool:
    """Whether an adapter's output is what `LoRA` computes from `factors` and `bias_change`."""
    kind = type(adapter)
    return (
        isinstance(adapter, LoRA)
        and adapter.mixes == "grouped"
        and all(
            getattr(kind, own) is getattr(LoRA, own) for own in ("forward", "update", "product")
        )
    )


class PairStacks:
    """The pairs of one site and the rows that take them.

    Args:
        pairs: the L pairs.
        slots: (H,) int64, which pair each of the H rows takes.
        per_row: whether stacks have an entry a row, not one a pair.

    Attributes:
        single: whether there is one pair, which needs no batched product.
        dropout: the largest probability of dropping an element among the pairs.
    """

    def __init__(self, pairs: list[LoRA], slots: Tensor, per_row: bool) -> None:
        self.pairs, self.slots = pairs, slots
        self.form = pairs[0].form
        self.single = len(pairs) == 1
        # of an embedding's A, (R, V), a row of the batch needs a few columns
        self.looks_up = isinstance(self.form, EmbeddingForm)
        self.per_row = per_row and not self.single and not self.looks_up
        rates = [pair.dropout for pair in pairs]
        self.dropout, self._alike = max(rates), min(rates) == max(rates)
        self.kept: Stacks | None = None
        self._stamp: object = None
        self._places = [
            (own, key)
            for pair in pairs
            for own in (pair._parameters, pair._buffers)
            for key, tensor in own.items()
            if tensor is not None
        ]
        self.frozen = not self._trains()
        kept_share = torch.tensor([1 - rate for rate in rates], device=slots.device)
        self._keep = kept_share.index_select(0, slots)  # (H,)

    def keep(self, dtype: torch.dtype = torch.float32) -> None:
        """Make the stacks that are used without gradients now, for a compiled model to find."""
        with torch.inference_mode(False), torch.no_grad():
            self.kept = self._made(dtype)
        self._stamp = self._state(dtype)

    def stacks(self, dtype: torch.dtype) -> Stacks:
        """Return the stacks in the dtype of the computation."""
        if torch.compiler.is_compiling():
            if self.kept is None or (torch.is_grad_enabled() and not self.frozen):
                return self._made(dtype)
            return self._cast(self.kept, dtype)
        if torch.is_grad_enabled() and self._trains():
            return self._made(dtype)
        state = self._state(dtype)
        if self.kept is None or state is None or state != self._stamp:
            self.keep(dtype)
        assert self.kept is not None
        return self.kept

    def update(self, x: Tensor, y: Tensor, base: nn.Module, training: bool) -> Tensor:
        """Return the update of H rows.

        Args:
            x: (H, …), the base's input.
            y: (H, …), its output, whose dtype is computed in where x is token ids.
            base: the layer.
            training: whether dropout is on.

        Returns:
            What is added to y, in the dtype of the computation.
        """
        dtype = compute_dtype(x) if x.is_floating_point() else y.dtype
        made = self.stacks(dtype)
        if x.is_floating_point():
            x = x.to(dtype)
            x = self._dropped(x) if self.dropout and training else x
        if self.single:
            update = self.form.apply(x, made.down[0], made.up[0], base)
        else:
            slots = None if self.per_row else self.slots
            update = self.form.apply_rows(x, made.down, made.up, base, slots)
        return update if made.bias is None else update + self._along(made.bias, update)

    def _along(self, bias: Tensor, update: Tensor) -> Tensor:
        """The biases, of (H, N) or one for all rows, so that they broadcast with the update."""
        if not self.single and not self.per_row:
            bias = bias.index_select(0, self.slots)
        along = self.form.along_output(bias[0]).shape  # (N,) or (N, 1, …)
        return bias.view(len(bias), *(1,) * (update.dim() - 1 - len(along)), *along)

    def _made(self, dtype: torch.dtype) -> Stacks:
        """Stack the pairs."""
        factors = [pair.factors() for pair in self.pairs]
        g, rank = self.form.groups, max(len(down) for down, _ in factors)
        down = _stacked([_padded_down(down, rank, g) for down, _ in factors])  # (L, R, K)
        up = _stacked([F.pad(up, (0, rank // g - up.shape[1])) for _, up in factors])
        scale = torch.cat([pair.scale() for pair in self.pairs])  # (L,)
        up = up * scale[:, None, None]  # (L, N, R/g)
        changes = [pair.bias_change() for pair in self.pairs]
        bias = None
        if any(change is not None for change in changes):
            zero = torch.zeros(len(up[0]), dtype=up.dtype, device=up.device)
            bias = torch.stack([zero if c is None else c for c in changes])  # (L, N)
        made = self._cast(Stacks(down, up, bias), dtype)
        if not self.per_row:
            return made
        return Stacks(*(None if t is None else t.index_select(0, self.slots) for t in made))  # type: ignore[arg-type]

    def _cast(self, made: Stacks, dtype: torch.dtype) -> Stacks:
        """In the dtype of the computation; an embedding casts the columns that it looks up."""
        down = made.down if self.looks_up else made.down.to(dtype)
        return Stacks(down, made.up.to(dtype), None if made.bias is None else made.bias.to(dtype))

    def _trains(self) -> bool:
        tensors = (own[key] for own, key in self._places)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def _state(self, dtype: torch.dtype) -> object:
        """What the kept stacks depend on, to compare; None where that cannot be told."""
        tensors = [own.get(key) for own, key in self._places]
        try:
            versions = [0 if tensor is None else tensor._version for tensor in tensors]
        except RuntimeError:  # made in inference mode: no version is counted
            return None
        return dtype, [*map(id, tensors)], versions, [pair.scaling for pair in self.pairs]

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout with each row's own probability."""
        if self._alike:
            return F.dropout(x, self.dropout)
        keep = self._keep.view(-1, *(1,) * (x.dim() - 1))  # (H, 1, …)
        return x * (torch.bernoulli(keep.expand(x.shape)) / keep).to(x.dtype)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """A stack; of one tensor a view, which costs nothing and is never out of date."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _padded_down(down: Tensor, rank: int, groups: int) -> Tensor:
    """A (r, K) with rows of zeros, in each group, up to the rank."""
    more = (rank - len(down)) // groups
    if not more:
        return down
    blocks = down.view(groups, -1, down.shape[1])  # (g, r/g, K)
    return F.pad(blocks, (0, 0, 0, more)).view(rank, -1)
