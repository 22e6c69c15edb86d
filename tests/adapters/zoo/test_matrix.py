"""Every method on every model: start, gradients, formula, merging, disabling, copies.

The scenarios of PEFT's test_custom_models, with the truth computed densely in float64.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    LoRA,
    active_names,
    adapted_modules,
    adapter_names,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.full import FullCopy
from lora_core.targets import sites
from lora_core.testing.bounds import exceeds

Same = Callable[[Tensor, Tensor], bool]
Weights = Callable[[nn.Module], dict[str, Tensor]]
Check = Callable[[Tensor, list[Tensor], Tensor], None]
SIXTEEN = (torch.bfloat16, torch.float16)


def test_a_new_adapter_changes_no_bit(exact: Any, same_bits: Same) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, model = exact.fresh().to(dtype), copy.deepcopy(exact.model).to(dtype)
        assert same_bits(exact.call(model), exact.call(base))
    for model in (exact.base, exact.model):
        model.train()
    torch.manual_seed(1)
    wanted = exact.call(exact.fresh().train())
    torch.manual_seed(1)
    assert same_bits(exact.call(exact.model), wanted)
    exact.base.eval()


def test_a_start_that_moves_the_factors_leaves_the_output(moved: Any, check_output: Check) -> None:
    """PiSSA's and OLoRA's: the update is there and taken away again."""
    base = moved.fresh().double()
    check_output(moved.call(moved.model), moved.peers(base), moved.call(base))


def test_only_adapters_learn(subject: Any, weights_of: Weights, same_bits: Same) -> None:
    subject.fill(subject.model)
    before = weights_of(subject.model)
    model = subject.model
    own = {id(p) for _, host in adapted_modules(model) for p in host.adapters.parameters()}
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    subject.call(model, grad=True).square().mean().backward()
    for key, p in model.named_parameters():
        assert p.requires_grad == (id(p) in own), key
        assert (p.grad is not None) == (id(p) in own), key
        assert p.grad is None or bool(torch.isfinite(p.grad).all()), key
    optimizer.step()
    still = [k for k, p in model.named_parameters() if id(p) in own and torch.equal(p, start[k])]
    # a key's bias shifts all scores of a softmax alike, a bias before BatchNorm is taken out again
    assert all("k_proj" in k or "key" in k for k in still), still
    after = weights_of(model)
    assert before.keys() == after.keys()
    assert all(same_bits(after[k], before[k]) for k in before if after[k].is_floating_point())


def test_the_output_is_that_of_the_formula(mergeable: Any, check_output: Check) -> None:
    mergeable.fill(mergeable.model)
    dense = mergeable.dense(mergeable.model)
    truth, peers = mergeable.call(dense), mergeable.peers(dense)
    assert not torch.allclose(mergeable.call(mergeable.base).double(), truth, rtol=1e-3)
    check_output(mergeable.call(mergeable.model), peers, truth)
    merge_adapters(mergeable.model)
    check_output(mergeable.call(mergeable.model), peers, truth)
    unload_adapters(mergeable.model, merge=True)
    check_output(mergeable.call(mergeable.model), peers, truth)


def test_each_layer_is_its_formula(
    mergeable: Any, derived: Callable, layer_bound: Callable
) -> None:
    """Float32 within the bound that rounding allows of the dense float64 layer."""
    mergeable.fill(mergeable.model)
    seen: list[tuple[Adapted, Tensor, Tensor]] = []
    for _, host in adapted_modules(mergeable.model):
        host.register_forward_hook(lambda host, x, y: seen.append((host, x[0], y)))
    mergeable.call(mergeable.model)
    assert seen
    for host, x, y in seen:
        adapter, dense = host.adapter("default"), copy.deepcopy(host.base).double()
        if not isinstance(adapter, LoRA):
            continue
        bound = layer_bound(adapter, dense, x)
        weight, bias, *_ = derived(adapter, dense)
        dense.weight.data = weight
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        with torch.no_grad():
            exact = dense(x.double() if x.is_floating_point() else x)
        assert (wrong := exceeds(y, exact, bound)) is None, wrong


def test_merged_weights_are_the_exact_ones_rounded(
    mergeable: Any, derived: Callable, same_bits: Same
) -> None:
    """float32 within the derived bound of the exact weight; 16 bits: its correct rounding."""
    mergeable.fill(mergeable.model)
    for dtype in (torch.float32, *SIXTEEN):
        model = copy.deepcopy(mergeable.model).to(dtype)
        check_merged_weights(model, dtype, derived, same_bits)


def check_merged_weights(
    model: nn.Module, dtype: torch.dtype, derived: Callable, same_bits: Same
) -> None:
    hosts = dict(adapted_modules(model))
    bases = {site: copy.deepcopy(host.base).double() for site, host in hosts.items()}
    merge_adapters(model)
    for site, host in hosts.items():
        merged, adapter = host.merged.module, host.adapter("default")
        if isinstance(adapter, FullCopy):
            wanted = adapter.copy.state_dict()
            for key, value in merged.state_dict().items():
                assert same_bits(value, wanted[key].to(value.dtype)), (site, key)
            assert {p.dtype for p in merged.parameters()} == {dtype}
            continue
        weight, bias, weight_bound, bias_bound = derived(adapter, bases[site])
        for key, exact, bound in (("weight", weight, weight_bound), ("bias", bias, bias_bound)):
            got = getattr(merged, key, None)
            if exact is None:
                old = getattr(host.base, key, None)
                assert (got is None and old is None) or same_bits(got, old), (site, key)
                continue
            assert got.dtype == dtype
            # rounding is monotone: a float32 number within the bound rounds to between these two
            low, high = ((exact + sign * bound).to(dtype) for sign in (-1, 1))
            bad = ((got < low) | (got > high)).sum()
            assert bad == 0, f"{site}.{key}: {bad} of {got.numel()} beyond the bound"


def test_merging_and_back(mergeable: Any, weights_of: Weights, same_bits: Same) -> None:
    model = mergeable.model
    mergeable.fill(model)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    adapted = mergeable.call(model)
    merge_adapters(model)
    merged = mergeable.call(model)
    with pytest.raises(ValueError, match="merged already"):
        merge_adapters(model)
    assert same_bits(mergeable.call(model), merged)
    with disable_adapters(model):
        assert same_bits(mergeable.call(model), mergeable.call(mergeable.base))
    unmerge_adapters(model)
    assert same_bits(mergeable.call(model), adapted)
    with pytest.raises(ValueError, match="nothing is merged"):
        unmerge_adapters(model)
    merge_adapters(model)
    assert same_bits(mergeable.call(model), merged)
    assert all(same_bits(v, state[k]) for k, v in model.state_dict().items())
    unload_adapters(model)
    assert [(k, type(m)) for k, m in model.named_modules()] == [
        (k, type(m)) for k, m in mergeable.base.named_modules()
    ]
    plain = dict(mergeable.base.named_parameters())
    assert all(same_bits(p, plain[k]) for k, p in model.named_parameters())
    assert same_bits(mergeable.call(model), mergeable.call(mergeable.base))


def test_a_nan_is_found_before_anything_changes(mergeable: Any, state_of: Callable) -> None:
    mergeable.fill(mergeable.model)
    last = list(mergeable.model.state_dict(keep_vars=True).values())
    poisoned = [p for p in last if p.requires_grad and p.is_floating_point()][-1]
    kept = poisoned.detach().clone()
    with torch.no_grad():
        poisoned.view(-1)[0] = float("nan")
    hosts = {site: (host.merged, host.base) for site, host in adapted_modules(mergeable.model)}
    for attempt in (merge_adapters, lambda model: unload_adapters(model, merge=True)):
        with pytest.raises(ValueError, match="not finite"):
            attempt(mergeable.model)
    after = {site: (host.merged, host.base) for site, host in adapted_modules(mergeable.model)}
    assert after == hosts
    with torch.no_grad():
        poisoned.copy_(kept)
    before = state_of(mergeable.model)
    merge_adapters(mergeable.model)
    unmerge_adapters(mergeable.model)
    assert state_of(mergeable.model) == before


def test_what_is_no_weight_is_not_merged(unmergeable: Any, state_of: Callable) -> None:
    unmergeable.fill(unmergeable.model)
    before = state_of(unmergeable.model)
    for attempt in (merge_adapters, lambda model: unload_adapters(model, merge=True)):
        with pytest.raises(ValueError, match="cannot be merged"):
            attempt(unmergeable.model)
    assert state_of(unmergeable.model) == before


def test_disabling_gives_the_base(subject: Any, same_bits: Same) -> None:
    model, base = subject.model, subject.call(subject.base)
    subject.fill(model)
    adapted = subject.call(model)
    assert not torch.equal(adapted, base)
    with disable_adapters(model):
        assert same_bits(subject.call(model), base)
        with disable_adapters(model):
            assert same_bits(subject.call(model), base)
        assert same_bits(subject.call(model), base)
    assert same_bits(subject.call(model), adapted)
    with pytest.raises(ZeroDivisionError), disable_adapters(model), disable_adapters(model):
        raise ZeroDivisionError
    assert same_bits(subject.call(model), adapted)


def test_switching_and_deleting(subject: Any, same_bits: Same, state_of: Callable) -> None:
    model = subject.model
    subject.fill(model)
    first = subject.call(model)
    subject.add("other", seed=5)
    assert adapter_names(model) == ["default", "other"]
    assert active_names(model) == ["other"]
    other = subject.call(model)
    assert not torch.equal(other, first)
    # trainable, as it was: torch.matmul folds its batch or not by `requires_grad`
    set_adapters(model, "default", trainable=True)
    assert same_bits(subject.call(model), first)
    set_adapters(model, [])
    assert same_bits(subject.call(model), subject.call(subject.base))
    set_adapters(model, "other", trainable=True)
    delete_adapter(model, "default")  # inactive
    assert same_bits(subject.call(model), other)
    subject.add("third", seed=6)
    delete_adapter(model, "third")  # active: then none is
    assert same_bits(subject.call(model), subject.call(subject.base))
    set_adapters(model, "other", trainable=True)
    assert same_bits(subject.call(model), other)
    delete_adapter(model, "other")
    assert [type(m) for m in model.modules()] == [type(m) for m in subject.base.modules()]
    assert same_bits(subject.call(model), subject.call(subject.base))


def test_several_add_up(additive: Any, check_output: Check) -> None:
    """PEFT's multiple active adapters, against the sum of the dense updates."""
    model = additive.model
    additive.fill(model)
    additive.add("other", seed=5)
    set_adapters(model, ["default", "other"])
    dense = additive.dense(model)
    parts = [additive.dense(model, (name,)) for name in ("default", "other")]
    base = additive.fresh().double()
    with torch.no_grad():  # dense() puts one after the other: W + Δ1, then that + Δ2
        for site, host in adapted_modules(model):
            for key in ("weight", "bias"):
                terms = [getattr(dict(sites(m))[site], key, None) for m in (*parts, base)]
                if terms[0] is None or host is None:
                    continue
                zero = torch.zeros_like(terms[0])
                one, two, old = (zero if t is None else t for t in terms)
                getattr(dict(sites(dense))[site], key).data = one + two - old
    truth, plain = additive.call(dense), additive.peers(dense)
    check_output(additive.call(model), plain, truth)
    merge_adapters(model)
    check_output(additive.call(model), plain, truth)
    unmerge_adapters(model)
    merge_adapters(model, "other")
    check_output(additive.call(model), plain, truth)


def test_gradients_are_chosen(subject: Any) -> None:
    """set_adapters changes `requires_grad` by `trainable` alone, of adapters alone."""
    model = subject.model
    subject.add("other", seed=5)

    def trained() -> set[str]:
        return {
            name
            for _, host in adapted_modules(model)
            for name in host.adapters
            if any(p.requires_grad for p in host.adapters[name].parameters())
        }

    def base_is_frozen() -> bool:
        own = {id(p) for _, host in adapted_modules(model) for p in host.adapters.parameters()}
        return not any(p.requires_grad for p in model.parameters() if id(p) not in own)

    assert trained() == {"other"}
    set_adapters(model, "default")
    assert trained() == {"other"}
    set_adapters(model, "default", trainable=True)
    assert trained() == {"default"}
    set_adapters(model, "other", trainable=False)
    assert trained() == {"default"}
    set_adapters(model, "default", trainable=False)
    assert trained() == set()
    with disable_adapters(model):
        assert trained() == set()
    set_adapters(model, "other", trainable=True)
    assert trained() == {"other"}
    assert base_is_frozen()
    delete_adapter(model, "other")
    assert trained() == set()


def test_copies_are_whole_and_apart(subject: Any, same_bits: Same) -> None:
    subject.fill(subject.model)
    wanted = subject.call(subject.model)
    twin = copy.deepcopy(subject.model)
    back = pickle.loads(pickle.dumps(subject.model))
    file = io.BytesIO()
    torch.save(subject.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, back, loaded):
        assert same_bits(subject.call(other), wanted)
        subject.fill(other)
        assert not torch.equal(subject.call(other), wanted)
        with disable_adapters(other):
            assert same_bits(subject.call(other), subject.call(subject.base))
            assert same_bits(subject.call(subject.model), wanted)
        delete_adapter(other, "default")
        assert same_bits(subject.call(other), subject.call(subject.base))
    assert same_bits(subject.call(subject.model), wanted)


def test_a_state_dict_is_the_whole_state(subject: Any, adopt: Callable, same_bits: Same) -> None:
    subject.fill(subject.model)
    state = {k: v.clone() for k, v in subject.model.state_dict().items()}
    torch.manual_seed(9)
    other = type(subject)(subject.base, subject.animal, subject.method).model
    assert not torch.equal(subject.call(other), subject.call(subject.model))
    other.load_state_dict(state)
    assert same_bits(subject.call(other), subject.call(subject.model))


def test_adapters_stay_float32(subject: Any, same_bits: Same) -> None:
    subject.fill(subject.model)
    for dtype in SIXTEEN:
        model = copy.deepcopy(subject.model)
        getattr(model, "half" if dtype is torch.float16 else "bfloat16")()
        for _, host in adapted_modules(model):
            floats = [p for p in host.adapters.parameters() if p.is_floating_point()]
            assert all(p.dtype == torch.float32 for p in floats)
        before, after = (
            [p for _, host in adapted_modules(m) for p in host.adapters.parameters()]
            for m in (subject.model, model)
        )
        assert all(same_bits(p, q) for p, q in zip(before, after, strict=True))
        assert subject.call(model).dtype == dtype
