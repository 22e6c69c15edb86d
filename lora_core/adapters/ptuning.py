r"""P-tuning: virtual tokens that come out of a small encoder, so that they depend on each other.

    "mlp"    p = W_3 relu(W_2 relu(W_1 e + b_1) + b_2) + b_3            for each row of e (P, C)
    "lstm"   p = W_2 relu(W_1 [→h; ←h] + b_1) + b_2,  (→h, ←h) = biLSTM(e)

Trained are e (P · C numbers) and the encoder: 2hC + h² + 2h + C for the MLP; for an LSTM of l
layers 8h(C + h + 2) + (l - 1) · 8h(3h + 2), and 4h² + 2h + 2hC + C for its head. The model sees
only p, (P, C), so afterwards the encoder can be dropped: PEFT's file holds p alone (the flat form)
and cannot be trained on as it was. Here encoder and e go to a file of their own beside it, and
`load_adapter(trainable=True)` takes training up where it was; loaded for use, it is flat and costs
nothing more than prompt tuning. The encoder runs in float32, outside autocast: what is trained is
what is saved. PEFT's encoders are the same.

Ref: Liu et al. 2021, arXiv:2103.10385, section 2.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.config import register_adapter
from lora_core.adapters.soft import SoftPrompt, check_tokens, embedding_size
from lora_core.adapters.soft_call import hook, unhook

__all__ = ["EncodedPrompt", "PTuningConfig", "check_width"]

ENCODERS = ("mlp", "lstm")


def check_width(hidden: object) -> None:
    """Refuse a hidden size that is neither None nor a number above 0; ValueError says why."""
    if hidden is not None and (type(hidden) is not int or hidden < 1):
        raise ValueError(f"hidden must be a whole number, 1 or more, or None; got {hidden!r}")


class EncodedPrompt(SoftPrompt):
    """Virtual tokens through an encoder.

    Args:
        tokens: P.
        size: C, the model's embedding size.
        encoder: "mlp" or "lstm".
        hidden: h, the encoder's width.
        layers: LSTM layers.
        dropout: between LSTM layers, in training.

    Attributes:
        inputs: e, (P, C), N(0, 1).
        lstm: the biLSTM, or None.
        mlp: what makes p.
    """

    def __init__(
        self, tokens: int, size: int, encoder: str, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__(tokens)
        self.inputs = nn.Parameter(torch.randn(tokens, size, device="cpu"))
        self.lstm = None
        widths = [size, hidden, hidden, size]
        if encoder == "lstm":
            self.lstm = nn.LSTM(
                size, hidden, layers, batch_first=True, dropout=dropout, bidirectional=True,
                device="cpu", dtype=torch.float32,
            )  # fmt: skip
            widths = [2 * hidden, 2 * hidden, size]
        parts: list[nn.Module] = []
        for n, m in pairwise(widths):
            parts += [nn.Linear(n, m, device="cpu", dtype=torch.float32), nn.ReLU()]
        self.mlp = nn.Sequential(*parts[:-1])

    def embeddings(self) -> Tensor:
        """The virtual tokens, (P, C) float32."""
        with torch.autocast(self.inputs.device.type, enabled=False):
            h = self.inputs[None]  # (1, P, C)
            if self.lstm is not None:
                h, _ = self.lstm(h)  # (1, P, 2 h)
            encoded: Tensor = self.mlp(h)[0]  # (P, C)
            return encoded


@register_adapter("P_TUNING")
@dataclass(frozen=True)
class PTuningConfig:
    """Virtual tokens through an encoder, in front of the embedded text of a language model.

    Raises:
        ValueError: a value out of range.
    """

    num_virtual_tokens: int = 20
    """P, vectors in front of the text."""
    encoder: str = "mlp"
    """What makes them: "mlp" (two hidden layers), or "lstm" (bidirectional, and an MLP on it)."""
    hidden: int | None = None
    """The encoder's width h; None: the model's embedding size C."""
    layers: int = 2
    """Layers of the LSTM."""
    dropout: float = 0.0
    """Probability of dropping an element between LSTM layers, in training."""

    def __post_init__(self) -> None:
        check_tokens(self.num_virtual_tokens)
        check_width(self.hidden)
        if self.encoder not in ENCODERS:
            raise ValueError(
                f"encoder must be one of {', '.join(map(repr, ENCODERS))}, got {self.encoder!r}"
            )
        if type(self.layers) is not int or self.layers < 1:
            raise ValueError(f"layers must be a whole number, 1 or more; got {self.layers!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.dropout and (self.encoder != "lstm" or self.layers < 2):
            raise ValueError("dropout is between LSTM layers: it needs two of them")

    def build(self, name: str, module: nn.Module) -> Adapter:
        """Return the prompt for an embedding, whose weight is (V, C)."""
        weight: Tensor = module.weight  # type: ignore[assignment]  # an embedding's
        return self._encoder(weight.shape[1])

    def build_all(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the one site, the model's input embedding; see `add_adapter`."""
        name, weight = embedding_size(model)
        return {name: self._encoder(weight.shape[1])}

    def _encoder(self, size: int) -> EncodedPrompt:
        width = self.hidden or size
        return EncodedPrompt(
            self.num_virtual_tokens, size, self.encoder, width, self.layers, self.dropout
        )

    def installed(self, model: nn.Module) -> None:
        """Hook the model; `add_adapter` calls this last."""
        hook(model)

    def removed(self, model: nn.Module) -> None:
        """Take the hooks away with the last soft prompt."""
        unhook(model)
