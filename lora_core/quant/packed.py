"""What every module of 4-bit weights is: codes, scales and the tables that decode them.

Nothing that a module goes through changes its weights. Moves carry codes and scales along, changes
of dtype leave them, and a state of other dtypes is refused instead of converted. The two tables are
no state: they are shared by all weights of a code on a device, and looked up again after a move.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_core.quant.codebook import Codebook
from lora_core.quant.double_quant import shared_map
from lora_core.quant.nf4 import shared_table
from lora_kernels import Weight4

__all__ = ["Packed"]

STATE = ("codes", "scales", "scale_absmax", "scale_offset")


class Packed(nn.Module):
    """Frozen 4-bit weights (N, K), one or several; `NF4Linear` and `NF4Stack` are made of it.

    Attributes:
        codes: uint8, two a byte.
        scales: float32, or uint8 with `scale_absmax` and `scale_offset`.
    """

    codes: Tensor
    scales: Tensor
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    codebook: Codebook
    in_features: int
    out_features: int
    block_size: int
    _arranged: Tensor | None

    @property
    def code(self) -> str:
        """Name of the code table."""
        return self.codebook.name

    @property
    def double_quant(self) -> bool:
        """Whether the scales are kept in 8 bits."""
        return self.scale_absmax is not None

    @property
    def precision(self) -> str:
        """The format in words: "nf4, block 64, double quantization"."""
        nested = ", double quantization" if self.double_quant else ""
        return f"{self.code}, block {self.block_size}{nested}"

    @property
    def weight4(self) -> Weight4:
        """The weights as the operators take them."""
        if self._table.device != self.codes.device:  # moved by hand, as FSDP does: `.data = …`
            self._place_tables()
        return Weight4(
            self.codes,
            self.scales,
            self._table,
            self.out_features,
            self.in_features,
            self.block_size,
            self.scale_absmax,
            self.scale_offset,
            self._scale_table,
            self._arranged,
        )

    def _place_tables(self) -> None:
        """Make the two tables where the codes are; on the meta device they stay on the CPU."""
        device = torch.device("cpu") if self.codes.is_meta else self.codes.device
        self._table = shared_table(self.codebook, device)
        self._scale_table = shared_map(device) if self.double_quant else None
        self._arranged = None  # of codes that may have changed or moved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let `fn` move everything and cast the rest, but cast neither codes nor scales."""

        frozen = [getattr(self, name) for name in STATE]

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype == t.dtype or not any(t is own for own in frozen):
                return moved
            return t.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._place_tables()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse codes and scales of another dtype, which `copy_` would convert in silence."""
        for name in STATE:
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and given is not None and own.dtype != given.dtype:
                error_msgs.append(
                    f"{prefix}{name} must be {own.dtype}; the state has {given.dtype}"
                )
                return
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._place_tables()
