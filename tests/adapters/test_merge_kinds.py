"""Merging what is no linear layer's low-rank update: layouts, lengths, biases, copies, ties."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    Adapter,
    LoRA,
    LoRAConfig,
    adapted_modules,
    add_adapter,
    dense_weight,
    merge_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.forms import form_of
from lora_core.adapters.full import FullCopy
from lora_core.checkpoint import load_model, save_model
from lora_core.quant import NF4Linear

Delta = Callable[[LoRA], Tensor]
Same = Callable[[Tensor, Tensor], bool]
Shake = Callable[..., None]
U = torch.finfo(torch.float32).eps / 2


class Conv1D(nn.Module):
    """A linear layer with its weight as (K, N), as in transformers' GPT-2, known by its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(3, 12)),
    "Conv1D": (lambda: Conv1D(8, 12), lambda: torch.randn(3, 12)),
    "embedding": (lambda: nn.Embedding(12, 8), lambda: torch.tensor([[0, 5], [11, 5]])),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), lambda: torch.randn(2, 6, 9)),
    "conv2d": (
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding_mode="circular", padding=1),
        lambda: torch.randn(2, 6, 7, 7),
    ),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False), lambda: torch.randn(2, 6, 7, 7)),
}


def adapted(kind: str, dtype: torch.dtype, shake: Shake, **options: object) -> nn.Sequential:
    """One layer of a kind with a LoRA on it, numbers that matter in it."""
    model = nn.Sequential(LAYERS[kind][0]()).to(dtype)
    add_adapter(model, LoRAConfig(r=4, targets=["0"], **options))  # type: ignore[arg-type]
    shake(model)
    return model


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_is_the_float32_sum_rounded_once(
    delta: Delta, kind: str, dtype: torch.dtype, shake: Shake, same_bits: Same
) -> None:
    model = adapted(kind, dtype, shake)
    host = model[0]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    merge_adapters(model)
    made = host.merged.module
    assert type(made) is type(host.base)
    # the correctly rounded result: of the float32 sum, which is right to its own roundings
    total = dense_weight(host.base) + host.adapter("default").delta_weight()
    assert same_bits(made.weight, total.to(dtype))
    pair, form = host.adapter("default"), form_of(host.base)
    exact = form.matrix(dense_weight(host.base).double()) + delta(pair)
    down, up = (t.detach().double().abs() for t in pair.factors())
    size = form.matrix(dense_weight(host.base).double().abs()) + pair.scaling * (
        torch.cat(
            [u @ d for u, d in zip(up.chunk(form.groups), down.chunk(form.groups), strict=True)]
        )
    )
    assert ((form.matrix(total).double() - exact).abs() <= (pair.r + 3) * U * size).all()
    for _ in range(3):
        unmerge_adapters(model)
        assert all(same_bits(t, before[key]) for key, t in model.state_dict().items())
        merge_adapters(model)
        assert same_bits(host.merged.module.weight, made.weight)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_layer_gives_the_adapted_output(kind: str, use_dora: bool, shake: Shake) -> None:
    model = adapted(kind, torch.float64, shake, use_dora=use_dora)
    x = LAYERS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    y = model(x)
    merge_adapters(model)
    # adapters are float32 numbers, all else is float64; DoRA's lengths are computed in float32
    tolerance = 1e-5 if use_dora else 1e-12
    assert (model(x) - y).abs().max() <= tolerance * y.abs().max()
    unload_adapters(model, merge=True)
    assert type(model[0]) is type(LAYERS[kind][0]())


@pytest.mark.parametrize("four_bit", [False, True])
def test_dora_merges_to_rows_of_the_trained_lengths(
    delta: Delta, four_bit: bool, shake: Shake
) -> None:
    linear = nn.Linear(64, 9)
    model = nn.Sequential(NF4Linear.from_linear(linear) if four_bit else linear)
    add_adapter(model, LoRAConfig(r=4, targets=["0"], use_dora=True))
    shake(model)
    pair = model[0].adapter("default")
    whole = dense_weight(model[0].base).double() + delta(pair)
    expected = pair.magnitude.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
    merge_adapters(model)
    error = (model[0].merged.module.weight.double() - expected).abs()
    # rank + 3 roundings of the sum, log-many of the norm, two of the quotient and product
    assert (error <= 20 * U * expected.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"bias": "all"}, {"lora_bias": True}, {"bias": "lora_only"}])
def test_a_bias_merges_with_its_scaling_and_one_rounding(
    options: dict[str, object],
    dtype: torch.dtype,
    make_mlp: Callable[[], nn.Module],
    shake: Shake,
    same_bits: Same,
) -> None:
    model = make_mlp().to(dtype)
    add_adapter(model, LoRAConfig(r=2, alpha=6, targets=["inp", "mid.0"], **options))
    shake(model)
    hosts = dict(adapted_modules(model))
    report = merge_adapters(model)
    norm = options == {"bias": "all"}
    assert ("mid.2" in hosts) == norm
    for host in hosts.values():
        pair, base_bias = host.adapter("default"), getattr(host.base, "bias", None)
        bias = host.merged.module.bias
        if options == {"lora_bias": True}:
            change = 3.0 * pair.up_bias
        elif base_bias is None:
            assert bias is None
            continue
        else:
            change = pair.bias.detach() - base_bias.float()
        start = 0.0 if base_bias is None else base_bias.float()
        assert same_bits(bias, (start + change).to(dtype))
    if norm:
        layer = next(x for x in report.layers if x.name == "mid.2")
        # only the bias changed: that is what was kept
        assert layer.kept == pytest.approx(1.0, abs=0.01)
        assert 0 <= layer.error < 0.01
    unmerge_adapters(model)
    x = torch.randn(5, 12, dtype=dtype)
    y = model(x)
    merge_adapters(model, dtype=torch.float32)
    if dtype == torch.float32:
        assert (model(x) - y).abs().max() <= 200 * U * y.abs().max()


def test_a_bias_that_overflows_is_refused(
    mlp: nn.Module, shake: Shake, state_of: Callable[[nn.Module], object]
) -> None:
    add_adapter(mlp.half(), LoRAConfig(r=2, targets=["inp"], lora_bias=True))
    mlp.inp.adapter("default").up_bias.data.fill_(1e5)
    before = str(state_of(mlp))
    with pytest.raises(ValueError, match=r"merged bias of 'inp' is not finite in torch\.float16"):
        merge_adapters(mlp)
    assert str(state_of(mlp)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_copy_takes_the_modules_place(
    dtype: torch.dtype, make_mlp: Callable[[], nn.Module], shake: Shake, same_bits: Same
) -> None:
    model = make_mlp().to(dtype).eval()
    add_adapter(model, LoRAConfig(r=2, targets=["inp"], modules_to_save=["mid.2", "head"]))
    shake(model)
    x = torch.randn(3, 12, dtype=dtype)
    y = model(x)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    report = merge_adapters(model)
    assert [layer.name for layer in report.layers] == ["inp", "mid.2", "head"]
    copy_of = model.head.adapter("default").copy
    assert same_bits(model.head.merged.module.weight, copy_of.weight.to(dtype))
    assert not any(p.requires_grad for p in model.head.merged.module.parameters())
    head = report.layers[2]
    assert head.kept == pytest.approx(1.0, abs=0.02)
    assert (head.error == 0.0) == (dtype == torch.float32)
    if dtype == torch.float32:  # the copies' outputs are the same bits, the LoRA's to rounding
        assert (model(x) - y).abs().max() <= 300 * U * y.abs().max()
    unmerge_adapters(model)
    assert all(same_bits(t, before[key]) for key, t in model.state_dict().items())
    assert torch.equal(model(x), y)
    copied = copy_of.weight.detach().clone()
    unload_adapters(model, merge=True)
    assert type(model.head) is nn.Linear
    assert same_bits(model.head.weight, copied.to(dtype))
    copy_of.weight.data.zero_()  # the merged module has its own memory
    assert same_bits(model.head.weight, copied.to(dtype))


def host_of(linear: nn.Module, *adapters: Adapter) -> Adapted:
    host = Adapted(linear)
    for i, adapter in enumerate(adapters):
        host.attach(f"a{i}", adapter)
    host.active = list(host.adapters)
    return host


def test_a_pair_on_top_of_a_full_copy_is_added_to_the_copy(same_bits: Same) -> None:
    pair = LoRA(6, 4, r=2)
    pair.B.data.normal_()
    whole = FullCopy(nn.Linear(6, 4))
    for adapters in ((whole, pair), (pair, whole)):  # the copy comes first in either order
        host = host_of(nn.Linear(6, 4), *(copy.deepcopy(a) for a in adapters))
        x = torch.randn(3, 6)
        y = host(x)
        report = merge_adapters(host)
        merged = host.merged.module
        assert same_bits(merged.weight, whole.copy.weight + pair.delta_weight())
        assert same_bits(merged.bias, whole.copy.bias)
        assert (host(x) - y).abs().max() <= 100 * U * y.abs().max()
        assert report.layers[0].kept == pytest.approx(1.0)


def test_copies_that_cannot_be_ordered_are_refused(
    state_of: Callable[[nn.Module], object],
) -> None:
    host = host_of(nn.Linear(6, 4), FullCopy(nn.Linear(6, 4)), FullCopy(nn.Linear(6, 4)))
    before = str(state_of(host))
    with pytest.raises(ValueError, match=r"\['a0', 'a1'\] each stand in the place of this layer"):
        merge_adapters(host)
    assert str(state_of(host)) == before
    host = host_of(nn.Linear(6, 4), LoRA(6, 4, r=2), FullCopy(nn.Linear(6, 4)))
    with pytest.raises(ValueError, match="'a1' stands in the place of this layer, under the adap"):
        merge_adapters(host, "a0")
    assert host.merged is None


class Stand(Adapter):
    """Stands in the base's place, and has no module to show for it."""

    replaces = True

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def replace(self, base: nn.Module, args: tuple[Tensor, ...], kwargs: object) -> Tensor:
        return base(*args) * self.factor


def test_a_kind_that_replaces_the_base_needs_a_module_to_merge() -> None:
    host = host_of(nn.Linear(6, 4), Stand())
    with pytest.raises(
        ValueError, match="Stand at this layer makes no module: it cannot be merged"
    ):
        merge_adapters(host)
    assert host.merged is None


def test_a_copy_that_overflows_is_refused(mlp: nn.Module) -> None:
    add_adapter(mlp.half(), LoRAConfig(r=2, targets=["inp"], modules_to_save=["head"]))
    mlp.head.adapter("default").copy.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"merged weight of 'head' is not finite in torch\.float1"):
        merge_adapters(mlp)
    assert mlp.inp.merged is None


def test_ties_that_merging_would_break_are_refused(
    make_token_model: Callable[[bool], nn.Module], state_of: Callable[[nn.Module], object]
) -> None:
    model = make_token_model(True)
    host = host_of(model.head, LoRA(6, 11, r=2))
    host.adapter("a0").B.data.normal_()
    model.head = host
    before = str(state_of(model))
    message = "weights of 'embed' and 'head' are tied, and merging would change them differently"
    for change in (merge_adapters, lambda m: unload_adapters(m, merge=True)):
        with pytest.raises(ValueError, match=message):
            change(model)
        assert str(state_of(model)) == before
    unload_adapters(model)  # without merging nothing is torn
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("options", [{"modules_to_save": ["head"]}, {"targets": ["head", "mix"]}])
@pytest.mark.parametrize("merge", [False, True])
def test_an_untied_head_stays_untied_and_the_configuration_says_so(
    options: dict[str, object],
    merge: bool,
    make_token_model: Callable[[bool], nn.Module],
    shake: Shake,
) -> None:
    model = make_token_model(True)
    with pytest.raises(ValueError, match="is tied to that of 'embed'"):
        add_adapter(model, LoRAConfig(**({"r": 2, "targets": ["mix"]} | options)))
    assert model.config.tie_word_embeddings
    add_adapter(model, LoRAConfig(**({"r": 2, "targets": ["mix"], "untie": True} | options)))
    shake(model)
    start = model.embed.weight.detach().clone()
    unload_adapters(model, merge=merge)
    assert not model.config.tie_word_embeddings
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model.embed.weight, start)
    assert torch.equal(model.head.weight, start) == (not merge)


@given(tied=st.booleans(), whole=st.booleans())
def test_a_saved_merge_of_a_head_is_read_back(
    tied: bool,
    whole: bool,
    small_decoder: Callable[..., nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = small_decoder(tie_word_embeddings=tied).eval()
    model.init_weights()
    options = {"modules_to_save": ["lm_head"]} if whole else {"targets": ["lm_head"]}
    add_adapter(model, LoRAConfig(**({"r": 2, "untie": True} | options)))
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape), alpha=0.1)
        ids = torch.tensor([[1, 2, 3]])
        unload_adapters(model, merge=True)
        logits = model(ids).logits
        folder = tmp_path_factory.mktemp("merged") / "model"
        save_model(model, folder)
        again = load_model(folder)
        assert torch.equal(again(ids).logits, logits)
    assert again.config.tie_word_embeddings is False
