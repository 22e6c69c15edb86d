"""One merged layer: the weight with its adapters in it, in a module that stands for the base.

    W' = round(W + s·B A)        added in float32 (float64 for a float64 base), rounded once

An adapter that is a whole module (a full copy) is taken as it is; adapters after it go on top. A
4-bit weight that is to stay 4-bit is requantized: entry by entry ("plain"), or, with second moments
of the layer's inputs, so that its outputs come out right (lora_core.quant.compensate).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.host import Adapted, spelt
from lora_core.adapters.layers import compute_dtype, dense_weight, is_linear, precision_of
from lora_core.adapters.merge_report import LayerMerge, compared
from lora_core.adapters.merge_samples import Moments
from lora_core.quant import NF4Linear, NF4Tensor, quantize_4bit
from lora_core.quant.compensate import output_cost, requantize_4bit
from lora_core.quant.dense import Packable, made_4bit, made_dense

__all__ = ["DenseLinear", "MergedLayer", "check_mergeable", "merged_layer"]

DAMPING = (0.01, 0.1, 1.0)  # tried in this order while the held-out rows gain by it


@dataclass(frozen=True)
class MergedLayer:
    """A module that stands for a host's base and its merged adapters, and what it kept."""

    module: nn.Module
    report: LayerMerge


def check_mergeable(site: str, host: Adapted, names: Sequence[str]) -> None:
    """Refuse what cannot be merged before any work is done; ValueError says what and why."""
    for name in names:
        if (reason := host.adapter(name).unmergeable) is not None:
            raise ValueError(f"the adapter {name!r} at {site!r} cannot be merged: {reason}")
    copies = [name for name in host.active if host.adapter(name).replaces]
    copies = [name for name in copies if host.adapter(name).alone]
    if len(copies) > 1:
        raise ValueError(
            f"{copies} each stand in the place of {spelt(site)}: only one of them can be merged; "
            "call set_adapters first"
        )
    if copies and copies[0] not in names:
        raise ValueError(
            f"{copies[0]!r} stands in the place of {spelt(site)}, under the adapters to merge: "
            "merge it with them"
        )


def merged_layer(
    site: str,
    host: Adapted,
    names: Sequence[str],
    dtype: torch.dtype,
    method: str = "dense",
    moments: Moments | None = None,
) -> MergedLayer:
    """Make the module that gives the host's output by itself.

    Args:
        site: the layer's name.
        host: its host, which is left alone.
        names: adapters to merge, in order.
        dtype: of a dense weight.
        method: "dense", "plain" or "compensated"; a base that is not 4-bit is merged dense.
        moments: of the layer's inputs, needed by "compensated" (without them it is "plain").

    Returns:
        The module and what it kept.

    Raises:
        ValueError: an adapter that does not fit the weight, or numbers that are not finite.
    """
    start, rest = _start(site, host, names)
    facts = LayerMerge(
        *(site, 1.0, 0.0, False),
        trained_on=host.adapter(names[0]).trained_on,
        merged_onto=precision_of(host.base),
    )
    if not rest:
        return _whole_module(start, dtype, host.base, facts, method)
    old = dense_weight(start)
    weight, bias = _added(site, host, rest, start, old)
    if start is not host.base:
        return _whole_module(_module(start, weight, bias), dtype, host.base, facts, method)
    if isinstance(host.base, NF4Linear) and method != "dense":
        return _four_bit(host.base, weight, bias, dtype, facts, method, moments)
    stored = weight.to(dtype)
    _check_finite(site, stored, bias, dtype)
    module = _module(start, stored, None if bias is None else bias.to(dtype))
    facts = _with_weight(facts, dense_weight(module), weight, old, start, bias, module)
    if moments is None:
        return MergedLayer(module, facts)
    error, plain = _output_error(stored, weight, old, moments.held_out), None
    if isinstance(host.base, NF4Linear):
        rounded = _requantized(host.base, weight).dequantize()
        plain = _output_error(rounded, weight, old, moments.held_out)
    return MergedLayer(module, replace(facts, output_error=error, plain_output_error=plain))


def _start(site: str, host: Adapted, names: Sequence[str]) -> tuple[nn.Module, list[str]]:
    """What adapters are added to, the base or a full copy of it, and which are left to add."""
    rest = [name for name in names if not host.adapter(name).replaces]
    if len(rest) == len(names):
        return host.base, rest
    start = host.base
    for name in names:
        if (whole := host.adapter(name)).replaces:
            own = whole.merged_module(start, torch.float32)
            if own is None:
                raise ValueError(
                    f"{type(whole).__name__} at {spelt(site)} makes no module: it cannot be merged"
                )
            start = own
    return start, rest


def _added(
    site: str, host: Adapted, names: Sequence[str], base: nn.Module, old: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias with adapters in them, in old's dtype."""
    old_bias = getattr(base, "bias", None)
    weight = old
    bias = old_bias.detach().to(old.dtype) if isinstance(old_bias, Tensor) else None
    with torch.autocast(old.device.type, enabled=False):
        for name in names:
            weight, bias = host.adapter(name).merged(weight, bias)
    if weight.shape != old.shape:
        raise ValueError(
            f"merging at {site!r} made a weight of shape {tuple(weight.shape)} out of one of shape "
            f"{tuple(old.shape)}"
        )
    return weight.detach(), None if bias is None else bias.detach()


def _check_finite(site: str, stored: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    for what, tensor in (("weight", stored), ("bias", None if bias is None else bias.to(dtype))):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"the merged {what} of {site!r} is not finite in {tensor.dtype}: the adapter holds "
                "NaN or infinity, or the dtype is too narrow"
            )


def _with_weight(
    facts: LayerMerge,
    stored: Tensor,
    weight: Tensor,
    old: Tensor,
    base: nn.Module,
    bias: Tensor | None,
    module: nn.Module,
) -> LayerMerge:
    """What the stored weight kept of the update; of the bias, where the weight did not change."""
    if torch.equal(weight, old) and bias is not None:
        before = getattr(base, "bias", None)
        start = torch.zeros_like(bias) if before is None else before.detach()
        now = module._parameters["bias"]
        assert now is not None
        kept, error = compared([now - start], [bias - start])
    else:
        kept, error = compared([stored - old], [weight - old])
    return replace(facts, kept=kept, error=error)


def _whole_module(
    wanted: nn.Module, dtype: torch.dtype, base: nn.Module, facts: LayerMerge, method: str
) -> MergedLayer:
    """A module in the base's place, from what it should be in float32; experts may be 4-bit."""
    exact = {name: p.detach().clone() for name, p in wanted.named_parameters()}
    expanded = getattr(base, "dense_module", None)  # 4-bit experts are compared as what they mean
    before = dict((expanded(torch.float32) if callable(expanded) else base).named_parameters())
    made = wanted.to(dtype).requires_grad_(False).train(base.training)
    for name, parameter in made.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"the merged {name} of {facts.name!r} is not finite in {parameter.dtype}: the "
                "adapter holds NaN or infinity, or the dtype is too narrow"
            )
    form = getattr(base, "format_4bit", None)
    if method != "dense" and form is not None and isinstance(made, Packable):
        for name, value in exact.items():  # quantized as they should be, not as rounded to dtype
            setattr(made, name, nn.Parameter(value, requires_grad=False))
        made = made_4bit(made, form).train(base.training)
        facts = replace(facts, requantized=True, method="plain")
    changed = [n for n, p in exact.items() if n in before and before[n].shape == p.shape]
    now = dict((made_dense(made, torch.float32) if facts.requantized else made).named_parameters())
    kept, error = compared(
        [now[n].double() - before[n].detach().double() for n in changed],
        [exact[n].double() - before[n].detach().double() for n in changed],
    )
    return MergedLayer(made, replace(facts, kept=kept, error=error))


def _requantized(base: NF4Linear, weight: Tensor) -> NF4Tensor:
    """A weight in a layer's own 4-bit format, rounded entry by entry."""
    return quantize_4bit(weight, base.codebook, base.block_size, base.double_quant)


def _four_bit(
    base: NF4Linear,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    facts: LayerMerge,
    method: str,
    moments: Moments | None,
) -> MergedLayer:
    """A layer in the base's 4-bit format."""
    # before quantizing, which would refuse with a message about weights
    _check_finite(facts.name, weight, bias, dtype)
    old, plain = base.dense_weight(), _requantized(base, weight)
    chosen, method = plain, "plain" if moments is None else method
    if moments is not None:
        errors = {"plain": _output_error(plain.dequantize(), weight, old, moments.held_out)}
        if method == "compensated":
            chosen, method, errors[""] = _compensated(base.quantized, weight, old, moments)
        facts = replace(
            facts, output_error=errors.get("", errors["plain"]), plain_output_error=errors["plain"]
        )
    made = NF4Linear.from_tensor(chosen, None if bias is None else bias.to(dtype))
    kept, error = compared([made.dense_weight() - old], [weight - old])
    facts = replace(facts, kept=kept, error=error, requantized=True, method=method)
    return MergedLayer(made.train(base.training), facts)


def _compensated(
    start: NF4Tensor, weight: Tensor, old: Tensor, moments: Moments
) -> tuple[NF4Tensor, str, float]:
    """The best 4-bit weight by the held-out rows: the weight, how it was made, its error.

    The base's own codes are the first candidate, so that the result is never worse than without
    the update. Stronger damping is tried as long as it helps the rows that were not chosen on, as
    it does when there are few rows for the number of columns.
    """
    best, method = start, "unchanged"
    least = _output_error(old, weight, old, moments.held_out)
    for damping in DAMPING:
        made = requantize_4bit(start, weight, moments.chosen_on, damping=damping)
        value = made.dequantize()
        error = _output_error(value, weight, old, moments.held_out)
        if error < least:
            best, method, least = made, "compensated", error
        elif method == "compensated":
            break
        if error <= 1.1 * _output_error(value, weight, old, moments.chosen_on):
            break  # it does as well on rows that it has not seen
    return best, method, least


def _output_error(stored: Tensor, weight: Tensor, old: Tensor, moment: Tensor) -> float:
    """|X (stored - W')ᵀ| / |X (W' - W)ᵀ| from Xᵀ X; 0 where the update does nothing."""
    wide = weight.to(moment.dtype)
    size = float(output_cost(wide - old, moment).sum())
    miss = float(output_cost(stored.to(moment.dtype) - wide, moment).sum())
    return (miss / size) ** 0.5 if size else 0.0


def _module(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module like the base, with another weight and bias."""
    own = base._parameters.get("weight")
    if own is None and not is_linear(base):
        return _plain(base, weight, bias)
    if own is None or (is_linear(base) and own.dtype != weight.dtype):
        return DenseLinear(weight, bias).train(base.training)
    # the same class with the same settings, hooks and submodules; only the parameters differ
    twin = base.__class__.__new__(base.__class__)
    twin.__dict__.update(base.__dict__)
    twin._parameters = dict(base._parameters)
    twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None or "bias" in base._parameters:
        twin._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return twin


def _plain(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain layer in the place of one that computes its weight (weight norm, spectral norm)."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    kind = next((kind for kind in kinds if isinstance(base, kind)), None)
    if kind is None:
        raise ValueError(
            f"{type(base).__name__} computes its weight at each use, and cannot be merged: "
            "remove its parametrization first (torch.nn.utils.parametrize)"
        )
    twin = kind.__new__(kind)
    twin.__dict__.update({k: v for k, v in base.__dict__.items() if k not in ("weight", "bias")})
    twin._modules, twin._buffers, twin._forward_pre_hooks = {}, {}, OrderedDict()
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    if not isinstance(base, nn.Embedding):
        twin._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return twin


class DenseLinear(nn.Linear):
    """An nn.Linear that computes in x's dtype (autocast's when active), as NF4Linear does.

    Args:
        weight: (N, K).
        bias: (N,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, (…, N) in x's dtype."""
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)
