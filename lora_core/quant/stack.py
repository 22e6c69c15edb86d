"""NF4Stack: as many 4-bit matrices of one shape as there are experts, in one set of tensors.

Each matrix is quantized by itself, as it lies on disk, and has the bytes that `quantize_4bit` gives
it alone; side by side they are one operand of the operator over all experts
(lora_kernels/grouped.py), which expands only those that rows are sent to.

The habits are NF4Linear's: the state is tensors only (`codes`, `scales`, `scale_absmax`,
`scale_offset`, each with the matrices as its first size), it loads strictly, and no move or change
of dtype touches it. A layer of 128 experts is twelve tensors instead of 1536.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_core.quant.linear import NF4Linear
from lora_core.quant.nf4 import NF4Tensor
from lora_core.quant.packed import Packed

__all__ = ["NF4Stack"]


class NF4Stack(Packed):
    """E frozen 4-bit matrices (N, K).

    Args:
        weights: one 4-bit tensor a matrix, all of one shape and format; copied.

    Attributes:
        codes: uint8 (E, N, K / 2) where rows are whole blocks, else (E, ceil(N K / 2)).
        scales: (E, blocks), float32, or uint8 with `scale_absmax` (E, groups) and `scale_offset`
            (E,).

    Raises:
        ValueError: no matrix, or matrices of different shapes or formats.
    """

    def __init__(self, weights: Sequence[NF4Tensor]) -> None:
        super().__init__()
        kinds = {(w.shape, w.code, w.block_size, w.double_quant) for w in weights}
        if len(kinds) != 1:
            raise ValueError(f"a stack needs matrices of one shape and format; got {len(kinds)}")
        (shape, self.codebook, self.block_size, _) = kinds.pop()
        self.out_features, self.in_features = shape
        codes = torch.stack([w.packed for w in weights])
        if self.in_features % self.block_size == 0:
            codes = codes.view(len(weights), self.out_features, -1)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", torch.stack([w.scales for w in weights]))
        for name in ("scale_absmax", "scale_offset"):
            parts = [getattr(w, name) for w in weights]
            self.register_buffer(name, None if parts[0] is None else torch.stack(parts))
        self._place_tables()

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, number: int) -> NF4Tensor:
        """One matrix, (N, K) float32 when expanded; it shares the stack's memory."""
        absmax, offset = self.scale_absmax, self.scale_offset
        return NF4Tensor(
            self.codes.detach()[number].view(-1),
            self.scales[number],
            torch.Size((self.out_features, self.in_features)),
            torch.float32,
            self.codebook,
            self.block_size,
            None if absmax is None else absmax[number],
            None if offset is None else offset[number],
        )

    def layer(self, number: int) -> NF4Linear:
        """One matrix as a layer, which shares the stack's memory and is no part of any model."""
        return NF4Linear.from_tensor(self[number])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Expand all: (E, N, K), each number rounded to `dtype` once."""
        return torch.stack([self[number].dequantize(dtype) for number in range(len(self))])

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{len(self)} x ({self.out_features}, {self.in_features}), {self.precision}"
