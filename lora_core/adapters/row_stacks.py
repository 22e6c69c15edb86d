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

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.forms import EmbeddingForm
from lora_core.adapters.layers import compute_dtype
from lora_core.adapters.lora import LoRA

__all__ = ["PairStacks", "is_grouped"]


class Stacks(NamedTuple):
    """What the rows are multiplied by; E is the number of adapters, or of rows."""

    down: Tensor  # A, (E, R, K)
    up: Tensor  # s·B, (E, N, R / g)
    bias: Tensor | None  # what trained biases add, (E, N)


def is_grouped(kind: type) -> bool:
    """Whether adapters of a class compute as `LoRA` does from `factors` and `bias_change`."""
    own = ("forward", "update", "product")
    return issubclass(kind, LoRA) and all(getattr(kind, k) is getattr(LoRA, k) for k in own)


class PairStacks:
    """The pairs of one site and the rows that take them.

    Args:
        pairs: the L pairs.
        slots: (H,) int64, which pair each of the H rows takes.
        per_row: whether stacks have an entry a row, not one a pair.
        in_order: whether row i takes pair i, so that an entry a pair is an entry a row.

    Attributes:
        single: whether there is one pair, which needs no batched product.
        dropout: the largest probability of dropping an element among the pairs.
    """

    def __init__(self, pairs: list[LoRA], slots: Tensor, per_row: bool, in_order: bool) -> None:
        self.pairs, self.slots, self.in_order = pairs, slots, in_order
        self.form = pairs[0].form
        self.single = len(pairs) == 1
        # of an embedding's A, (R, V), a row of the batch needs a few columns
        self.looks_up = isinstance(self.form, EmbeddingForm)
        self.per_row = per_row and not self.single and not self.looks_up
        self._plain = all(_is_plain(pair) for pair in pairs)
        self._own, self._vars = [pair._parameters for pair in pairs], [*map(vars, pairs)]
        # where the tensors are that the stacks are made of
        self._dicts, self._keys = _places(pairs, self._plain)
        self.frozen = not self._trains()
        self.kept: Stacks | None = None
        self._from: list[Any] = []
        self._versions: object = None
        self._scaled: list[float] = []
        self._dtype: torch.dtype | None = None
        rates = [pair.dropout for pair in pairs]
        self.dropout, self._alike = max(rates), min(rates) == max(rates)
        if not self._alike:
            kept_share = torch.tensor([1 - rate for rate in rates], device=slots.device)
            self._keep = kept_share.index_select(0, slots)  # (H,)

    def keep(self, dtype: torch.dtype = torch.float32) -> None:
        """Make the stacks that are used without gradients now, for a compiled model to find."""
        with torch.inference_mode(False), torch.no_grad():
            self.kept = self._made(dtype)
        self._dtype, self._from = dtype, [*map(dict.get, self._dicts, self._keys)]
        self._versions, self._scaled = _versions(self._from), self._scalings()

    def stacks(self, dtype: torch.dtype) -> Stacks:
        """Return the stacks in the dtype of the computation."""
        if torch.compiler.is_compiling():
            if self.kept is None or (torch.is_grad_enabled() and not self.frozen):
                return self._made(dtype)
            return self._cast(self.kept, dtype)
        if torch.is_grad_enabled() and self._trains():
            return self._made(dtype)
        if self.kept is None or dtype != self._dtype or self._changed():
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
        pairs = self.pairs
        if self._plain and not torch.compiler.is_compiling():  # past nn.Module's slow look-up
            factors: list[Any] = [(own["A"], own["B"]) for own in self._own]
        else:
            factors = [pair.factors() for pair in pairs]
        up = self._wide([up for _, up in factors])  # (L, N, R/g)
        if torch.compiler.is_compiling() or len(scalings := {*self._scalings()}) > 1:
            up = up * torch.cat([pair.scale() for pair in pairs])[:, None, None]
        else:
            up = up * scalings.pop()
        down = self._long([down for down, _ in factors])  # (L, R, K)
        made = self._cast(Stacks(down, up, self._biases(up)), dtype)
        if not self.per_row or self.in_order:
            return made
        return Stacks(*(None if t is None else t.index_select(0, self.slots) for t in made))  # type: ignore[arg-type]

    def _wide(self, ups: list[Any]) -> Tensor:
        """Stack B, with columns of zeros up to the largest rank."""
        widths = [up.shape[1] for up in ups]
        if min(widths) < max(widths):
            ups = [F.pad(up, (0, max(widths) - up.shape[1])) for up in ups]
        return _stacked(ups)

    def _long(self, downs: list[Any]) -> Tensor:
        """Stack A, with rows of zeros, in each group, up to the largest rank."""
        ranks, g = [down.shape[0] for down in downs], self.form.groups
        if min(ranks) < max(ranks):
            blocks = [down.view(g, -1, down.shape[1]) for down in downs]  # (g, r/g, K)
            most = max(ranks) // g
            padded = [F.pad(block, (0, 0, 0, most - block.shape[1])) for block in blocks]
            downs = [block.flatten(0, 1) for block in padded]
        return _stacked(downs)

    def _biases(self, up: Tensor) -> Tensor | None:
        """What trained biases add, (L, N), or None."""
        if self._plain:
            return None
        changes = [pair.bias_change() for pair in self.pairs]
        if all(change is None for change in changes):
            return None
        zero = torch.zeros(up.shape[1], dtype=up.dtype, device=up.device)
        return torch.stack([zero if change is None else change for change in changes])

    def _cast(self, made: Stacks, dtype: torch.dtype) -> Stacks:
        """In the dtype of the computation; an embedding casts the columns that it looks up."""
        down = made.down if self.looks_up else made.down.to(dtype)
        return Stacks(down, made.up.to(dtype), None if made.bias is None else made.bias.to(dtype))

    def _trains(self) -> bool:
        tensors = map(dict.get, self._dicts, self._keys)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def _changed(self) -> bool:
        """Whether a tensor that the kept stacks came from is another one, or was written to."""
        if self._versions is None or self._scalings() != self._scaled:
            return True
        now = [*map(dict.get, self._dicts, self._keys)]
        return not all(map(operator.is_, now, self._from)) or _versions(now) != self._versions

    def _scalings(self) -> list[float]:
        return [own["_scaling"] for own in self._vars]

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout with each row's own probability."""
        if self._alike:
            return F.dropout(x, self.dropout)
        keep = self._keep.view(-1, *(1,) * (x.dim() - 1))  # (H, 1, …)
        return x * (torch.bernoulli(keep.expand(x.shape)) / keep).to(x.dtype)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """A stack; of one tensor a view, which costs nothing and is never out of date."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _is_plain(pair: LoRA) -> bool:
    """Whether what is applied is s·B A of the pair's own A and B, and nothing more."""
    if pair._buffers["A0"] is not None or pair.parts:
        return False
    return pair.is_pair


def _places(pairs: list[LoRA], plain: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Dictionaries and keys under which modules hold the tensors that the stacks are made of."""
    dicts: list[dict[str, Any]] = []
    keys: list[str] = []
    for pair in pairs:
        own, buffers = pair._parameters, pair._buffers
        names = ("A", "B") if plain else (*own, *buffers)
        dicts += [own if key in own else buffers for key in names]
        keys += names
    return dicts, keys


def _versions(tensors: list[Any]) -> int | None:
    """How often tensors were written to, together; None where that is not counted."""
    try:
        return sum([tensor._version for tensor in tensors if tensor is not None])
    except RuntimeError:  # made in inference mode
        return None
