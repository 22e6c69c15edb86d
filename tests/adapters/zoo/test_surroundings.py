"""Adapted models in what PyTorch puts around a model: autocast, compilers, transforms, checkpoints.

Nothing here is about one method; a few pairs that differ in kind stand for all.
"""

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from lora_core.adapters import (
    LoRAConfig,
    adapted_modules,
    add_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)

FULL = os.environ.get("LORA_TEST_FULL") == "1"
Same = Callable[[Tensor, Tensor], bool]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {k: g for k, g in zip(trained, found, strict=True) if g is not None}


def close(ours: Tensor, peers: Tensor, truth: Tensor) -> bool:
    """Twice the error of the other way in the same dtype, and two roundings of the largest."""
    error, baseline = ((t.double() - truth).abs().max() for t in (ours, peers))
    return bool(error <= 2 * baseline + 2 * torch.finfo(ours.dtype).eps * truth.abs().max())


def test_autocast(chosen: Any, same_bits: Same) -> None:
    """The dtype is autocast's, a new adapter changes no bit, the gradients are float32."""
    base, model = chosen.base, chosen.model
    with torch.autocast("cpu", torch.bfloat16):
        plain, new = chosen.call(base), chosen.call(model)
        if chosen.method.exact_start:
            assert same_bits(new, plain)
        chosen.fill(model)
        out = chosen.call(model, grad=True)
        assert out.dtype == plain.dtype
        found = gradients(model, out.float().square().mean())
        with disable_adapters(model):
            assert same_bits(chosen.call(model), plain)
    assert found
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in found.values())
    truth = chosen.call(model)
    away = (truth - chosen.call(base)).abs().max() if plain.shape == truth.shape else None
    assert away is None or (out - truth).abs().max() < away  # nearer than the base is


@pytest.mark.parametrize("key", ["dora-biases", "full", *(["parts", "pissa"] if FULL else [])])
def test_compiled_into_one_graph(key: str, adopt: Callable, same_bits: Same) -> None:
    subject = adopt("perceptron", key)
    subject.add("other", seed=2)
    model = subject.model
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for names in ("default", "other", []):
        set_adapters(model, names, trainable=True)
        assert same_bits(subject.call(compiled), subject.call(model)), names
    set_adapters(model, "other", trainable=True)
    with disable_adapters(model):
        assert same_bits(subject.call(compiled), subject.call(subject.base))
    assert same_bits(subject.call(compiled), subject.call(model))
    if subject.method.merges:
        merge_adapters(model)
        assert same_bits(subject.call(compiled), subject.call(model))


WHOLE = [
    ("unet", "lora", "aot_eager"),
    pytest.param("llama", "lora", "eager", marks=pytest.mark.oracle),
]
if FULL:
    WHOLE += [
        ("convnet", "convolutions-dora", "eager"),
        ("convnet", "convolutions", "aot_eager"),
        pytest.param("llama", "lora", "aot_eager", marks=pytest.mark.oracle),
        pytest.param("llama", "rows", "eager", marks=pytest.mark.oracle),
        pytest.param("gpt2", "dora-biases", "eager", marks=pytest.mark.oracle),
        pytest.param("bert", "bottleneck", "eager", marks=pytest.mark.oracle),
    ]


@pytest.mark.parametrize(("name", "key", "backend"), WHOLE)
def test_whole_models_compiled(name: str, key: str, backend: str, adopt: Callable) -> None:
    """One graph, forward and backward; outputs and gradients as accurate as eager mode's."""
    subject = adopt(name, key)
    subject.fill(subject.model)
    torch._dynamo.reset()
    compiled = torch.compile(subject.model, backend=backend, fullgraph=True)
    double = copy.deepcopy(subject.model).double()
    ours, theirs, truth = (subject.call(m, grad=True) for m in (compiled, subject.model, double))
    assert close(ours, theirs, truth)
    ours, theirs, truth = (
        gradients(m, y.square().mean())
        for m, y in ((subject.model, ours), (subject.model, theirs), (double, truth))
    )
    assert ours.keys() == theirs.keys() == truth.keys()
    assert all(close(ours[k], theirs[k], truth[k]) for k in ours)


def test_functional_call_grad_and_vmap(adopt: Callable, same_bits: Same) -> None:
    """Adapters as arguments: gradients as functions, and an ensemble of adapters in one call."""
    for key in ("lora", "dora", "parts", "pissa", "full"):
        subject = adopt("perceptron", key)
        model = subject.model
        subject.fill(model)
        trained = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
        x = torch.randn(3, 12)

        def run(adapters: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Tensor:
            return functional_call(model, adapters, (x,))

        assert same_bits(run(trained, x), model(x))
        wanted = gradients(model, model(x).square().sum())
        got = grad(lambda adapters: run(adapters, x).square().sum())(trained)  # noqa: B023
        assert got.keys() == wanted.keys()
        assert all(same_bits(got[k], wanted[k]) for k in got), key
        # the gradient of each row, as differential privacy wants it, adds up to that of all
        each = vmap(grad(lambda a, row: run(a, row).square().sum()), (None, 0))(trained, x)
        exact = double_gradients(model, x)
        for k in wanted:
            assert close(each[k].sum(0), wanted[k], exact[k]), (key, k)
        others = {k: torch.stack([p, -p, 0.5 * p]) for k, p in trained.items()}
        together = vmap(run, (0, None))(others, x)
        for i in range(3):
            one = {k: p[i] for k, p in others.items()}
            double = {k: p.double() for k, p in one.items()}
            truth = functional_call(copy.deepcopy(model).double(), double, (x.double(),))
            assert close(together[i], run(one, x), truth), key


def double_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the model run in float64; adapters' are float32, rounded once."""
    model = copy.deepcopy(model).double()
    return gradients(model, model(x.double()).square().sum())


@pytest.mark.oracle
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "key", ["lora", "dora", "full", "rows", "bottleneck", "prompt", "ptuning", "prefix-projected"]
)
def test_gradient_checkpointing(
    key: str, reentrant: bool, adopt: Callable, same_bits: Same
) -> None:
    """The same gradients, to the bit, at the same parameters."""
    subject = adopt("llama", key)
    model = subject.model.train()
    subject.fill(model)
    wanted = gradients(model, subject.call(model, grad=True).square().mean())
    assert wanted
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = leaf_gradients(model, subject.call(model, grad=True).square().mean())
    assert got.keys() == wanted.keys()
    assert all(same_bits(got[k], wanted[k]) for k in wanted)


def leaf_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By `backward`: reentrant checkpoints know no other way."""
    model.zero_grad()
    loss.backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_dropout(
    reentrant: bool, perceptron: nn.Module, same_bits: Same
) -> None:
    config = LoRAConfig(r=4, dropout=0.5, targets=["inp", "fused"], bias="all")
    add_adapter(perceptron.train(), config)
    perceptron.inp.B.data.normal_()
    perceptron.fused.B.data.normal_()
    x = torch.randn(4, 12, requires_grad=True)
    torch.manual_seed(5)
    wanted = leaf_gradients(perceptron, perceptron(x).square().sum())
    wanted = {k: g.clone() for k, g in wanted.items()}
    torch.manual_seed(5)
    y = checkpoint(perceptron, x, use_reentrant=reentrant)
    got = leaf_gradients(perceptron, y.square().sum())
    assert got.keys() == wanted.keys()
    assert all(same_bits(got[k], wanted[k]) for k in wanted)


def test_channels_last(adopt: Callable, check_output: Callable) -> None:
    for key in ("convolutions", "convolutions-dora", "full"):
        subject = adopt("convnet", key)
        subject.fill(subject.model)
        dense = subject.dense(subject.model)
        peers, truth = subject.peers(dense), subject.call(dense)
        model = subject.model
        for m in (model.stem, model.pointwise):
            m.to(memory_format=torch.channels_last)
        check_output(subject.call(model), peers, truth)
        merge_adapters(model)
        check_output(subject.call(model), peers, truth)


@pytest.mark.parametrize("key", ["lora", "dora", "pissa", "biases", "full", "parts", "all-linear"])
def test_built_on_meta_and_loaded(
    key: str, adopt: Callable, bases: Callable, same_bits: Same
) -> None:
    """A model without storage, adapted, given storage and then weights, as large models are."""
    subject = adopt("perceptron", key)
    subject.fill(subject.model)
    with torch.device("meta"):
        model = type(subject.base)().eval()
    if key not in ("lora", "full", "parts", "all-linear"):  # computed from weights
        with pytest.raises(ValueError, match=r"'inp' is on the meta device.*load them first"):
            add_adapter(model, subject.config)
        return
    add_adapter(model, subject.config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(subject.model.state_dict())
    assert same_bits(subject.call(model), subject.call(subject.model))
    merge_adapters(model)
    merge_adapters(subject.model)
    assert same_bits(subject.call(model), subject.call(subject.model))


def test_made_under_another_default_device_or_dtype(adopt: Callable) -> None:
    subject = adopt("perceptron", "dora-biases")
    for context in (torch.device("meta"), torch.inference_mode()):
        model = subject.fresh()
        with context:
            add_adapter(model, subject.config)
        tensors = [t for _, h in adapted_modules(model) for t in h.adapters.parameters()]
        assert {t.device.type for t in tensors} == {"cpu"}
        assert {t.dtype for t in tensors} == {torch.float32}
        assert subject.call(model).isfinite().all()
    torch.set_default_dtype(torch.float64)
    try:
        model = subject.fresh()
        add_adapter(model, subject.config)
        tensors = [t for _, h in adapted_modules(model) for t in h.adapters.parameters()]
        assert {t.dtype for t in tensors} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_evaluated_before_training(chosen: Any) -> None:
    """What inference mode computed must not be in the way of training."""
    chosen.fill(chosen.model)
    with torch.inference_mode():
        wanted = chosen.animal.call(chosen.model)
    out = chosen.call(chosen.model, grad=True)
    assert torch.equal(out, wanted)
    assert gradients(chosen.model, out.square().mean())


def test_an_average_of_weights(adopt: Callable) -> None:
    """EMA and SWA copy the model and average its parameters."""
    subject = adopt("perceptron", "lora")
    subject.fill(subject.model)
    average = torch.optim.swa_utils.AveragedModel(subject.model)
    average.update_parameters(subject.model)
    first = subject.model.inp.A.detach().clone()
    subject.fill(subject.model, seed=9)
    average.update_parameters(subject.model)
    assert torch.equal(average.module.inp.A, first + (subject.model.inp.A - first) / 2)
    assert torch.equal(average.module.inp.base.weight, subject.base.inp.weight)


def test_hooks_on_the_base_fire(adopt: Callable) -> None:
    subject, seen = adopt("unet", "lora"), []
    subject.model.attn.to_q.base.register_forward_hook(lambda m, x, y: seen.append(y))
    subject.model.attn.to_q.base.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    subject.call(subject.model)
    assert len(seen) == 2


# --- weights that are computed ---


def computed(kind: str) -> tuple[nn.Module, str]:
    """A small net whose layer computes its weight at each use."""
    conv = "conv" in kind
    layer = nn.Conv1d(6, 8, 3, padding=1) if conv else nn.Linear(6, 8)
    torch.manual_seed(1)
    if "spectral" in kind:
        parametrizations.spectral_norm(layer)
    elif "old" in kind:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(layer)
    else:
        parametrizations.weight_norm(layer)
    return nn.Sequential(layer, nn.Tanh()).eval(), "0"


@pytest.mark.parametrize("kind", ["weight", "spectral", "old", "conv weight", "conv old"])
@pytest.mark.parametrize("dora", [False, True])
def test_parametrized_layers(kind: str, dora: bool, same_bits: Same) -> None:
    """Weight and spectral norm: trained beside, merged into the weight that they compute."""
    model, site = computed(kind)
    x = torch.randn(3, 6, 5) if "conv" in kind else torch.randn(3, 6)
    with torch.no_grad():
        plain = model(x)
    add_adapter(model, LoRAConfig(r=4, targets=[site], use_dora=dora))
    with torch.no_grad():
        assert same_bits(model(x), plain)
        model[0].adapters["default"].B.normal_()
        adapted = model(x)
        merge_adapters(model)
        merged = model(x)
        exact = copy.deepcopy(model)
        unload_adapters(exact, merge=True)
        assert close(exact(x), adapted, exact.double()(x.double()))
        assert close(merged, adapted, exact(x.double()))
        assert not torch.allclose(merged, plain, rtol=1e-2)
        unmerge_adapters(model)
        assert same_bits(model(x), adapted)
        unload_adapters(model)
        assert same_bits(model(x), plain)
    if kind.split()[-1] != "old":
        assert parametrize.is_parametrized(model[0])
