r"""`check_adapter`: the properties of any adapted linear layer, with bounds that are derived.

For y = x W^T + b + s (x A^T) B^T, merged into W' = fl(W + s B A), both ways of computing y are sums
of products, so each errs by a multiple of what the same sum gives with every term positive:

    M = |x| |W|^T + |b| + |s| |x| |A|^T |B|^T

In float32, unit roundoff u = eps / 2, count the roundings that one term goes through
(`gamma(n) = n u / (1 - n u)`; `bounds.py`):

* unmerged: K for x A^T, r for the product with B^T, one for s, one for the final sum with the
  base's output (the base's own term: K + 1 with its bias, and that sum): gamma(K + r + 2) M;
* merged: r for B A, one for s, one for the sum with W, which is the rounding of W', K + 1 for the
  product with the bias: gamma(K + r + 3) M.

Together |y - y'| <= 2 gamma(n) M with n = K + r + 3, which is c eps M with c = n / (1 - n u).

In 16 bits sums are kept in float32 (the same gammas with float32's u) and numbers on the way are
rounded to 16 bits, u' each: unmerged at most 6 per term (A or an expanded W, x A^T, s or the bias,
B, its product, the final sum), merged at most 3 (W', its product, the bias). The two stand at most
gamma'(6) + gamma'(3) apart, of which one is the rounding of W'.

A kind without factors A and B (a scaling of rows or columns) has W' - W in place of s B A, r = 0.
What is read off a layer, and what DoRA's quotient adds to M, is in adapter_terms.py.
Tolerances in common use are fixed numbers (PEFT: 1e-4, and none at all in fp16); a fixed number is
loose where values are small and wrong where they are large.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from lora_core.adapters.layers import dense_weight
from lora_core.adapters.merge import merge_adapters, unmerge_adapters
from lora_core.testing.adapter_terms import Terms
from lora_core.testing.bounds import allowance, exceeds
from lora_core.testing.runner import load_hypothesis, run_property
from lora_core.testing.strategies import FLOATS, dtypes, scales, seeds, shapes

UNMERGED, MERGED, BACKWARD = 6, 3, 8  # roundings to 16 bits on the way, at most
Layer: TypeAlias = Any  # an nn.Module with LoRALinear's interface
Make: TypeAlias = Callable[[nn.Module], Layer]


@dataclass(frozen=True)
class AdapterCase:
    """One input and one setting of the adapter's parameters, both normal numbers times a scale."""

    lead: tuple[int, ...]
    dtype: torch.dtype
    input_scale: float
    adapter_scale: float
    seed: int


def check_adapter(
    make: Make,
    base: nn.Module,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    mergeable: bool = True,
    exact_start: bool = True,
    examples: int = 25,
) -> None:
    """Check an adapted linear layer; see the module's docstring for the bounds.

    A new layer gives the base's output; the output is that of x (W + dW)^T + b, in eval without
    dropout; merged gives the same within the bound, merged in train mode and merged twice too;
    unmerging and disabling restore base and output bit for bit; gradients reach every parameter of
    the adapter and the input, with the right values, and none of the base; what `state_dict` saves,
    a new layer loads.

    The layer has LoRALinear's interface: `base`, `enabled`, `merge()`, `unmerge()`, and
    `delta_weight()` (float32, (N, K)), for a low-rank kind also `A` (r, K), `B` (N, r), `scaling`.
    A host that `add_adapter` made has it, whatever the kind of adapter: what it lacks is taken from
    its adapters' `merged`.

    Args:
        make: returns a new layer around the module it is given.
        base: a linear-like module (`weight` or `dense_weight()`, `bias` or None), on the device to
            run on; copied, so that it stays as it is.
        dtypes: dtypes to run in, base and input both.
        mergeable: False for a kind that refuses to merge: the refusal is checked instead, and
            outputs and gradients are not compared with a dense weight.
        exact_start: False for a kind whose start is the base's output but for rounding (PiSSA).
        examples: number of cases.

    Raises:
        AssertionError: a property fails; shows the smallest failing case.
    """

    def check(case: AdapterCase) -> None:
        torch.manual_seed(case.seed)
        wrapped = copy.deepcopy(base).to(case.dtype)
        x = _normal((*case.lead, _width(wrapped)), case.seed, case.input_scale)
        x = x.to(dense_weight(wrapped).device, case.dtype)
        plain = wrapped(x).detach()
        layer = make(wrapped)
        wrapped = layer.base
        start = None if exact_start else Terms.read(layer, wrapped, case.dtype)
        _check_identity(layer, x, plain, start)
        _fill(layer, wrapped, case)
        before = _snapshot(wrapped)
        terms = Terms.read(layer, wrapped, case.dtype) if mergeable else None
        y = _check_output(layer, x, terms)
        _check_disabled(layer, wrapped, x, y)
        if terms is not None:
            _check_merging(layer, wrapped, x, y, terms)
        else:
            _check_refusal(layer, x, y)
        _check_gradients(layer, wrapped, x, terms)
        _check_saving(make, base, case, layer, x)
        _same_state(before, _snapshot(wrapped), "the base's weights changed")

    run_property(check, _cases(dtypes), examples)


def _cases(among: Sequence[torch.dtype]) -> Any:
    st = load_hypothesis("hypothesis.strategies")
    lead = st.one_of(st.just(()), shapes(dims=2, largest=17))
    return st.builds(AdapterCase, lead, dtypes(among), scales(-3, 3), scales(-3, 2), seeds())


def _normal(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _width(base: nn.Module) -> int:
    return cast(int, getattr(base, "in_features", None) or dense_weight(base).shape[1])


def _own(layer: Layer, base: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters: all that are not the base's."""
    theirs = {id(p) for p in base.parameters()}
    return {name: p for name, p in layer.named_parameters() if id(p) not in theirs}


def _fill(layer: Layer, base: nn.Module, case: AdapterCase) -> None:
    """Give every parameter of the adapter numbers that matter beside the base's."""
    with torch.no_grad():
        for i, parameter in enumerate(_own(layer, base).values()):
            shape = tuple(parameter.shape)
            fan_in = shape[-1] if len(shape) > 1 else 1
            scale = case.adapter_scale / max(fan_in, 1) ** 0.5
            parameter.copy_(_normal(shape, case.seed + i + 1, scale))


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def _same_state(before: dict[str, Tensor], after: dict[str, Tensor], fact: str) -> None:
    changed = [k for k in before if k not in after or not torch.equal(before[k], after[k])]
    changed += [k for k in after if k not in before]
    assert not changed, f"{fact}: {', '.join(changed)}"


def _check_identity(layer: Layer, x: Tensor, plain: Tensor, start: Terms | None) -> None:
    for mode in (True, False):
        y = layer.train(mode)(x)
        assert y.dtype == plain.dtype, f"the output is {y.dtype}, the base's is {plain.dtype}"
        if start is None:
            assert torch.equal(y, plain), "a new adapter changes the base's output"
            continue
        allowed = allowance(start.operations, x.dtype, UNMERGED + start.extra)
        fault = exceeds(y, plain.double(), 2 * allowed * start.magnitude(x.double()))
        assert fault is None, f"the output of a new adapter {fault}, the base's"


def _check_output(layer: Layer, x: Tensor, terms: Terms | None) -> Tensor:
    """The output in eval, held to the dense mathematics."""
    layer.eval()
    y: Tensor = layer(x).detach()
    assert torch.equal(layer(x), y), (
        "two calls in eval differ: dropout is on, or the output is not a function of the input"
    )
    if terms is not None:
        bound = allowance(terms.operations, x.dtype, UNMERGED + terms.extra) * terms.magnitude(
            x.double()
        )
        fault = exceeds(y, terms.output(x.double()), bound)
        assert fault is None, f"the output in eval {fault}; it should be x (W + dW)^T + b"
    return y


def _check_disabled(layer: Layer, base: nn.Module, x: Tensor, y: Tensor) -> None:
    assert hasattr(layer, "enabled"), f"{type(layer).__name__} has no attribute `enabled`"
    layer.enabled = False
    got = layer(x)
    layer.enabled = True
    assert torch.equal(got, base(x)), "the disabled layer's output is not the base's"
    assert torch.equal(layer(x), y), "disabling and enabling changes the output"


def _merge(layer: Any) -> None:
    layer.merge() if hasattr(layer, "merge") else merge_adapters(layer)


def _unmerge(layer: Any) -> None:
    layer.unmerge() if hasattr(layer, "unmerge") else unmerge_adapters(layer)


def _check_merging(layer: Layer, base: nn.Module, x: Tensor, y: Tensor, terms: Terms) -> None:
    before, saved, plain = _snapshot(base), _snapshot(layer), base(x)
    _merge(layer)
    merged = layer(x).detach()
    magnitude = terms.magnitude(x.double())
    allowed = allowance(terms.operations, x.dtype, MERGED)
    fault = exceeds(merged, terms.output(x.double()), allowed * magnitude)
    assert fault is None, f"the merged output {fault}; it should be x (W + dW)^T + b"
    allowed += allowance(terms.operations, x.dtype, UNMERGED + terms.extra)
    fault = exceeds(merged, y, allowed * magnitude)
    assert fault is None, f"the merged output {fault}, which is the unmerged one"
    assert torch.equal(layer.train()(x), merged), "the merged layer depends on train or eval"
    layer.eval()
    _same_state(saved, _snapshot(layer), "merging changes the state_dict")
    with suppress(ValueError, RuntimeError):  # a refusal is as good as doing nothing
        _merge(layer)
    assert torch.equal(layer(x), merged), "merging twice adds the update twice"
    layer.enabled = False
    disabled = layer(x)
    layer.enabled = True
    assert torch.equal(disabled, plain), (
        "the disabled layer, merged, does not give the base's output"
    )
    _unmerge(layer)
    _same_state(before, _snapshot(base), "unmerging does not restore the base bit for bit")
    assert torch.equal(layer(x), y), "unmerging does not restore the output bit for bit"


def _check_refusal(layer: Layer, x: Tensor, y: Tensor) -> None:
    try:
        _merge(layer)
    except (ValueError, TypeError):
        assert torch.equal(layer(x), y), "the refused merge changes the output"
    else:
        raise AssertionError("merge() does not refuse, though the kind cannot be merged")


def _check_gradients(layer: Layer, base: nn.Module, x: Tensor, terms: Terms | None) -> None:
    """Every parameter of the adapter gets a gradient, the base none, the input the right one."""
    own = {name: p for name, p in _own(layer, base).items() if p.requires_grad}
    assert own, "the adapter has no trainable parameter"
    trainable = [name for name, p in base.named_parameters() if p.requires_grad]
    assert not trainable, f"parameters of the base are trainable: {', '.join(trainable)}"
    dy = _normal(tuple(layer(x).shape), 7, 1.0).to(x)
    for mode in (True, False):
        layer.train(mode)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        missing = [name for name, p in own.items() if p.grad is None]
        assert not missing, f"no gradient reaches {', '.join(missing)}"
        assert leaf.grad is not None, "no gradient reaches the input"
        reached = [name for name, p in base.named_parameters() if p.grad is not None]
        assert not reached, f"a gradient reaches the base: {', '.join(reached)}"
    if x.numel():
        zero = [
            name for name, p in own.items() if p.numel() and not bool(cast(Tensor, p.grad).any())
        ]
        assert not zero, f"the gradient is zero everywhere for {', '.join(zero)}"
    if terms is not None:
        _check_gradient_values(layer, x, dy, cast(Tensor, leaf.grad), terms)


def _check_gradient_values(layer: Layer, x: Tensor, dy: Tensor, dx: Tensor, terms: Terms) -> None:
    """dx = dy (W + s B A); dA = s B^T dy^T x; dB = s dy^T x A^T, each to its own bound."""
    X, D = x.double().reshape(-1, x.shape[-1]), dy.double().reshape(-1, dy.shape[-1])
    t, checks = terms.tiny, list[tuple[str, Tensor, Tensor, Tensor]]()
    if hasattr(layer, "A") and hasattr(layer, "B") and terms.factors is not None:
        A, B = terms.factors
        up, down = B.abs() + t, A.abs() + t
        through, h = D @ B, X @ A.T  # (rows, r)
        size_a = (D.abs() @ up + t).T @ X.abs() + t
        size_b = abs(layer.scaling) * ((D.abs() + t).T @ (X.abs() @ down.T + t)) + t
        checks.append(("A", layer.A.grad, through.T @ X, size_a))
        checks.append(("B", layer.B.grad, layer.scaling * (D.T @ h), size_b))
    wanted = D @ (terms.weight + terms.delta)
    checks.append(("the input", dx.reshape(X.shape), wanted, terms.pull(D)))
    allowed = allowance(terms.operations + X.shape[0], x.dtype, BACKWARD + terms.extra)
    for name, got, wanted, magnitude in checks:
        fault = exceeds(got, wanted, allowed * magnitude)
        assert fault is None, f"the gradient of {name} {fault}"


def _check_saving(make: Make, base: nn.Module, case: AdapterCase, layer: Layer, x: Tensor) -> None:
    other = make(copy.deepcopy(base).to(case.dtype))
    other.load_state_dict(_snapshot(layer))
    layer.eval()
    other.eval()
    assert torch.equal(other(x), layer(x)), "a new layer that loads the state_dict differs"
