"""Which parameters of a model are LoRA's B: those that LoRA+ trains at a rate of their own.

LoRA+ gives B a learning rate lambda times A's. Its reason is what a factor sums over: a step of A
(r, K) moves each of x Aᵀ by a sum of K terms, so the rate it bears falls as the layer grows wider;
B (N, r) sums over the r rank-space numbers only and bears the same rate at any width. One rate for
both, small enough for A, leaves B all but still.

So B is the factor on the output's side, whichever of the two starts at zero. Of an embedding A
starts at zero and B as normals (forms.py), and B is still the one that sums over r numbers. (Its A
is looked up, one column a token, so by the same reason it would bear B's rate too; that is not part
of LoRA+ and A stays at the base rate. PEFT gives both of an embedding a third rate, 1e-6 unless
told.) DoRA's B is LoRA's; its lengths, biases and whatever else is trained stay at the base rate.

Found by type, so that no name of a parameter has a meaning.

Ref: Hayou et al. 2024, LoRA+, arXiv:2402.12354, section 3 (widths) and 4 (lambda about 16).
"""

from torch import nn

from lora_core.adapters.host import adapted_modules
from lora_core.adapters.lora import LoRA

__all__ = ["second_factors"]


def second_factors(model: nn.Module) -> set[nn.Parameter]:
    """B of every LoRA pair in a model: of linear layers, convolutions, embeddings, of DoRA.

    Args:
        model: any module.

    Returns:
        The parameters, of all adapters, trained or not; empty without LoRA.
    """
    return {
        adapter.B
        for _, host in adapted_modules(model)
        for adapter in host.adapters.values()
        if isinstance(adapter, LoRA)
    }
