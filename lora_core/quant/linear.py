"""NF4Linear: a linear layer whose weight stays in 4 bits.

The layer holds codes and scales and expands the weight inside `lora_kernels.matmul4`, once in
forward and once in backward; autograd saves neither x nor a dense weight. Nothing that a layer goes
through changes its weight: `.to(dtype)` and `.half()` cast the bias and leave codes and scales. The
copy of the codes that `arrange()` makes for a GPU lies beside them and is no state.

bitsandbytes' Linear4bit quantizes when it is moved to a device, keeps what decodes the codes in a
side object that a plain `load_state_dict` does not fill, and repacks weights in the first
evaluation on some CPUs. Here the layer is quantized when it is made, and its state is the tensors
`codes`, `scales`, `scale_absmax`, `scale_offset` and `bias`, which load strictly. The code table is
no state: it is an argument, as the block size is.

`codes` has the shape (N, K / 2) when rows are whole blocks, so that it can be cut into rows, and is
flat otherwise.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equation 5.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_core.quant.codebook import Codebook, codebook
from lora_core.quant.nf4 import NF4Tensor, quantize_4bit
from lora_core.quant.packed import Packed
from lora_kernels import matmul4
from lora_kernels.blockwise4 import SCALE_GROUP, check_block_size
from lora_kernels.lora_linear import lora_linear4, row_dtypes
from lora_kernels.matmul4 import arrange

__all__ = ["NF4Linear"]


class NF4Linear(Packed):
    """`y = x Wᵀ + bias` with W in 4 bits, frozen.

    The constructor makes a layer of zeros for `load_state_dict` to fill; `from_linear` and
    `from_tensor` make one from a weight.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; it is frozen too.
        code: "nf4", "fp4", "fp4_e3m0", "int4", or 16 ascending numbers as a float tensor.
        block_size: elements that share a scale, a power of two from 32 to 4096.
        double_quant: whether the scales are kept in 8 bits.
        device: where; "meta" allocates nothing, for loading with `assign=True`.
        dtype: of the bias.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        code: str | Tensor | Codebook = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_block_size(block_size)
        self.in_features, self.out_features = in_features, out_features
        self.codebook = codebook(code)
        self.block_size = block_size

        def zeros(*shape: int, dtype: torch.dtype | None = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        numel = in_features * out_features
        blocks = -(-numel // block_size)
        by_rows = in_features % block_size == 0
        shape = (out_features, in_features // 2) if by_rows else ((numel + 1) // 2,)
        self.codes = nn.Parameter(zeros(*shape, dtype=torch.uint8), requires_grad=False)
        scale_dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer("scales", zeros(blocks, dtype=scale_dtype))
        absmax = zeros(-(-blocks // SCALE_GROUP)) if double_quant else None
        self.register_buffer("scale_absmax", absmax)
        self.register_buffer("scale_offset", zeros() if double_quant else None)
        frozen = nn.Parameter(zeros(out_features, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", frozen if bias else None)
        self._place_tables()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        code: str | Tensor | Codebook = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
    ) -> "NF4Linear":
        """Quantize a linear layer; the layer itself is left as it is.

        Args:
            linear: any `nn.Linear`.
            code: as the constructor's.
            block_size: as the constructor's.
            double_quant: as the constructor's.

        Returns:
            The 4-bit layer, on the weight's device.

        Raises:
            ValueError: NaN or infinity in the weight, or a bad option.
        """
        options: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant}
        layer = cls.from_tensor(linear.weight, linear.bias, code=code, **options)
        return layer.train(linear.training)

    @classmethod
    def from_tensor(
        cls,
        weight: Tensor | NF4Tensor,
        bias: Tensor | None = None,
        *,
        code: str | Tensor | Codebook = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        name: str = "weight",
    ) -> "NF4Linear":
        """Make a layer of a weight, dense or already in 4 bits.

        Args:
            weight: (N, K) dense, which is quantized, or 4-bit, whose tensors are used as they are.
            bias: (N,) or None; copied.
            code: as the constructor's; like the next two, for a dense weight only.
            block_size: as the constructor's.
            double_quant: as the constructor's.
            name: what a dense weight is called in messages.

        Returns:
            The 4-bit layer, on the weight's device.

        Raises:
            ValueError: a weight that is no matrix, or has NaN or infinity; a bias of another size.
        """
        if len(weight.shape) != 2:
            raise ValueError(f"{name} must be a matrix (N, K); got {tuple(weight.shape)}")
        n, k = weight.shape
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias must be ({n},) for {name} ({n}, {k}); got {tuple(bias.shape)}")
        if isinstance(weight, Tensor):
            weight = quantize_4bit(weight, code, block_size, double_quant, name=name)
        layer = cls(
            k,
            n,
            bias is not None,
            code=weight.code,
            block_size=weight.block_size,
            double_quant=weight.double_quant,
            device="meta",
            dtype=None if bias is None else bias.dtype,
        )
        packed = weight.packed.view(layer.codes.shape)
        layer.codes = nn.Parameter(packed, requires_grad=False)
        layer.scales = weight.scales
        layer.scale_absmax, layer.scale_offset = weight.scale_absmax, weight.scale_offset
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer._place_tables()
        return layer

    @property
    def quantized(self) -> NF4Tensor:
        """The weight as a 4-bit tensor that shares this layer's memory; dtype float32."""
        return NF4Tensor(
            self.codes.detach().view(-1),
            self.scales,
            torch.Size((self.out_features, self.in_features)),
            torch.float32,
            self.codebook,
            self.block_size,
            self.scale_absmax,
            self.scale_offset,
        )

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Expand the weight.

        Args:
            dtype: of the result, to which the float32 product is rounded once.

        Returns:
            (N, K).
        """
        return self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: (..., K), floating-point.

        Returns:
            (..., N) in the dtype of x (autocast's when active), differentiable in x.
        """
        return matmul4(x, self.weight4, self.bias)

    def linear_with_update(
        self,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scaling: float | Tensor,
        rows: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Multiply and add a low-rank update in one operator: `forward(x) + s (D(x) Aᵀ) Bᵀ`.

        Args:
            x: (..., K), floating-point.
            down: A, (r, K) float32; (L, r, K) with rows.
            up: B, (N, r) float32; (L, N, r) with rows.
            scaling: s, a number or (1,); (L,) with rows.
            rows: which of L pairs each row of x takes, as `lora_linear4` does, or None.
            dropout: probability of dropping an element of the update's x; the seed is drawn here.

        Returns:
            (..., N) in the dtype of x (autocast's when active), differentiable in x, down and up.
        """
        return lora_linear4(x, self.weight4, self.bias, down, up, scaling, rows, dropout)

    def row_dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of x in which `linear_with_update` takes rows in one kernel."""
        return row_dtypes(self.codes.device)

    def arrange(self, on: bool = True) -> bool:
        """Keep a copy of the codes in the order in which tensor cores read them, for few rows of x.

        It costs as many bytes again as the codes, is no part of `state_dict()`, and is dropped when
        the layer is moved or loaded.

        Args:
            on: False drops it.

        Returns:
            Whether there is one now; there is none where no kernel would read it.
        """
        self._arranged = arrange(self.weight4._replace(arranged=None)) if on else None
        return self._arranged is not None

    def shardable(self) -> None:
        """Hold the scales as frozen parameters, so that what splits parameters splits them too.

        The names in `state_dict()` stay. `scale_offset` stays a buffer: one number cannot be split.
        """
        for name in ("scales", "scale_absmax"):
            held = self._buffers.get(name)
            if held is not None:  # without double quantization one is None, and stays
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(held, requires_grad=False))

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, code={self.code}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}"
        )
