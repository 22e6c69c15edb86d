"""Adapters into models and out again: any module, all or nothing, everything by type."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    Adapter,
    LoRAConfig,
    LoRALinear,
    active_names,
    adapted_modules,
    adapter_names,
    adapter_report,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    parameter_counts,
    register_adapter,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.quant import quantize_model

Make = Callable[[], nn.Module]
Same = Callable[[Tensor, Tensor], bool]
Shake = Callable[..., None]
State = Callable[[nn.Module], dict[str, Any]]


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_adapter_changes_no_bit_and_alone_is_trained(
    four_bit: bool, dtype: torch.dtype, mlp: nn.Module, same_bits: Same
) -> None:
    mlp.to(dtype)
    if four_bit:
        quantize_model(mlp)
    x = torch.randn(4, 12, dtype=dtype)
    y = mlp(x)
    report = add_adapter(mlp, LoRAConfig(r=2, dropout=0.3))
    assert same_bits(mlp.train()(x), y)
    assert report.sites == ("inp", "mid.0")  # all-linear leaves out the head
    trained = {name for name, p in mlp.named_parameters() if p.requires_grad}
    assert trained == {f"{site}.adapters.default.{key}" for site in report.sites for key in "AB"}
    mlp(x).float().square().sum().backward()
    got = {name for name, p in mlp.named_parameters() if p.grad is not None}
    assert got == trained
    with disable_adapters(mlp):
        assert same_bits(mlp(x), y)


def test_the_report_counts_and_prints(mlp: nn.Module) -> None:
    before = sum(p.numel() for p in mlp.parameters())
    report = add_adapter(mlp, LoRAConfig(r=2))
    own = 2 * (12 + 24) + 2 * (24 + 24)
    assert (report.parameters, report.trainable, report.total) == (own, own, before + own)
    assert report.share == own / (before + own)
    assert str(report).splitlines() == [
        "adapter 'default' (LORA): 168 parameters at 2 modules (inp ×1, 0 ×1)",
        f"trainable: 168 of {before + own:,} parameters ({own / (before + own):.3%})",
    ]
    assert adapter_report(mlp) == report


def test_a_4bit_weight_counts_its_elements(make_mlp: Make) -> None:
    dense, four_bit = make_mlp(), make_mlp()
    quantize_model(four_bit)
    assert add_adapter(four_bit, LoRAConfig(r=2)).total == add_adapter(dense, LoRAConfig(r=2)).total
    assert parameter_counts(four_bit) == parameter_counts(dense)


def test_a_layer_made_by_hand_is_reported_by_its_class() -> None:
    model = nn.Sequential(LoRALinear(nn.Linear(3, 3), r=1))
    assert (adapter_report(model).kind, adapter_report(model).parameters) == ("LoRA", 6)


def test_canonical_names_are_those_of_the_original_model(mlp: nn.Module) -> None:
    add_adapter(mlp, LoRAConfig(r=2, targets=["inp", "0"]), "a")
    add_adapter(mlp, LoRAConfig(r=2, targets=r"mid\.0|head"), "b")
    hosts = dict(adapted_modules(mlp))
    assert list(hosts) == ["inp", "mid.0", "head"]
    assert list(hosts["mid.0"].adapters) == ["a", "b"]  # one host holds both
    assert all(type(host) is LoRALinear for host in hosts.values())
    assert not isinstance(hosts["mid.0"].base, Adapted)
    assert adapter_names(mlp) == ["a", "b"]


def test_the_new_adapter_is_active_alone_and_others_freeze(mlp: nn.Module, shake: Shake) -> None:
    add_adapter(mlp, LoRAConfig(r=2), "a")
    shake(mlp)
    x = torch.randn(3, 12)
    with disable_adapters(mlp):
        plain = mlp(x)
    assert not torch.equal(mlp(x), plain)
    add_adapter(mlp, LoRAConfig(r=2, targets=["inp"]), "b")
    assert active_names(mlp) == ["b"]
    assert torch.equal(mlp(x), plain)
    trained = {name for name, p in mlp.named_parameters() if p.requires_grad}
    assert trained == {"inp.adapters.b.A", "inp.adapters.b.B"}


def test_set_adapters_changes_gradients_only_when_asked(mlp: nn.Module) -> None:
    add_adapter(mlp, LoRAConfig(r=2), "a")
    add_adapter(mlp, LoRAConfig(r=2), "b")

    def trained() -> set[str]:
        return {
            name.split(".adapters.")[1][0] for name, p in mlp.named_parameters() if p.requires_grad
        }

    set_adapters(mlp, "a")
    assert (active_names(mlp), trained()) == (["a"], {"b"})
    set_adapters(mlp, ["b", "a"], trainable=True)
    assert (active_names(mlp), trained()) == (["b", "a"], {"a", "b"})
    set_adapters(mlp, "a", trainable=True)
    assert trained() == {"a"}
    set_adapters(mlp, "a", trainable=False)
    assert trained() == set()
    set_adapters(mlp, [])
    assert active_names(mlp) == []
    with pytest.raises(ValueError, match="no adapter 'c' in the model"):
        set_adapters(mlp, ["a", "c"])
    with pytest.raises(ValueError, match=r"adapters are named once each, got \['a', 'a'\]"):
        set_adapters(mlp, ["a", "a"])


def test_disabling_nests_and_survives_exceptions(
    mlp: nn.Module, shake: Shake, same_bits: Same
) -> None:
    x = torch.randn(3, 12)
    plain = mlp(x)
    with disable_adapters(mlp):  # no adapters: nothing to do
        assert same_bits(mlp(x), plain)
    add_adapter(mlp, LoRAConfig(r=2))
    shake(mlp)
    adapted = mlp(x)

    def fail() -> None:
        with disable_adapters(mlp), disable_adapters(mlp):
            assert same_bits(mlp(x), plain)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same_bits(mlp(x), adapted)
    with disable_adapters(mlp):
        with disable_adapters(mlp):
            pass
        assert same_bits(mlp(x), plain)
    assert same_bits(mlp(x), adapted)


def test_deleting_leaves_plain_modules(mlp: nn.Module, same_bits: Same, shake: Shake) -> None:
    x = torch.randn(3, 12)
    plain, modules = mlp(x), [(n, id(m)) for n, m in mlp.named_modules()]
    add_adapter(mlp, LoRAConfig(r=2), "a")
    add_adapter(mlp, LoRAConfig(r=2, targets=["head"]), "b")
    shake(mlp)
    with pytest.raises(ValueError, match="no adapter 'aa' in the model; nearest names: 'a'"):
        delete_adapter(mlp, "aa")
    delete_adapter(mlp, "b")
    assert type(mlp.head) is nn.Linear
    assert active_names(mlp) == []
    assert same_bits(mlp(x), plain)
    delete_adapter(mlp, "a")
    assert [(n, id(m)) for n, m in mlp.named_modules()] == modules


@dataclass(frozen=True)
class Odd:
    """A configuration that fails where it is told to."""

    at: str = ""
    what: object = None

    def build(self, name: str, module: nn.Module) -> Any:
        if name == self.at:
            if isinstance(self.what, Exception):
                raise self.what
            return self.what
        return LoRAConfig(r=2).build(name, module) if self.at else None


class NoParameters(Adapter):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y


@dataclass(frozen=True)
class BadHost(Odd):
    def host(self, module: nn.Module) -> nn.Module:
        return module


class Frozen(Odd):
    def build(self, name: str, module: nn.Module) -> Adapter | None:
        return NoParameters() if name == "head" else None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (LoRAConfig(targets=["inp", "hed"]), ValueError, "'hed' matches no module; .*'head'"),
        (Odd(), ValueError, "Odd found no module to attach to"),
        (Odd("head", OSError("broken")), OSError, "broken"),
        (Odd("head", 3), TypeError, r"Odd.build\('head', …\) must return an Adapter or None, got "),
        (Frozen("head"), ValueError, "Frozen built adapters without a trainable parameter"),
        (BadHost("x"), TypeError, "BadHost.host must return an Adapted, got Linear"),
        (object(), TypeError, r"object has no build\(name, module\) method"),
        (LoRAConfig(rank_pattern={"zzz": 3}), ValueError, "rank_pattern: 'zzz' matches no target"),
        (LoRAConfig(alpha_pattern={"hea": 3}), ValueError, "alpha_pattern: 'hea' matches no"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    config: Any, error: type[Exception], message: str, mlp: nn.Module, state_of: State
) -> None:
    before = state_of(mlp)
    with pytest.raises(error, match=message):
        add_adapter(mlp, config)
    assert state_of(mlp) == before


def test_names_are_new_and_usable(mlp: nn.Module, state_of: State) -> None:
    add_adapter(mlp, LoRAConfig(r=2))
    before = state_of(mlp)
    with pytest.raises(ValueError, match="the adapter name 'default' is taken"):
        add_adapter(mlp, LoRAConfig(r=2))
    for name in ("", "a.b", "keys", "train"):
        with pytest.raises(ValueError, match="cannot name an adapter"):
            add_adapter(mlp, LoRAConfig(r=2), name)
    assert state_of(mlp) == before
    with pytest.raises(ValueError, match="the adapter name 'default' is taken here"):
        mlp.inp.attach("default", LoRAConfig().build("inp", mlp.inp.base))


def test_a_module_in_two_places_is_adapted_in_both(shake: Shake) -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(2, 3)
    plain = model(x)
    report = add_adapter(model, LoRAConfig(r=2))
    assert report.sites == ("0",)
    assert model[0] is model[2]
    assert isinstance(model[0], LoRALinear)
    unload_adapters(model)
    assert model[0] is model[2] is shared
    assert torch.equal(model(x), plain)


def test_tied_weights_are_refused_or_untied(make_token_model: Callable[[bool], nn.Module]) -> None:
    model = make_token_model(True)
    with pytest.raises(
        ValueError, match=r"weight of 'head' is tied to that of 'embed': .* untie=True"
    ):
        add_adapter(model, LoRAConfig(r=2, targets=["head"]))
    assert model.head.weight is model.embed.weight
    ids = torch.arange(5)
    y = model(ids)
    add_adapter(model, LoRAConfig(r=2, targets=["head"], untie=True))
    assert model.head.base.weight is not model.embed.weight
    assert torch.equal(model(ids), y)
    assert model.config.tie_word_embeddings is False
    add_adapter(make_token_model(True), LoRAConfig(r=2))  # the head is left out


def test_modules_that_pytorch_bypasses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"'self_attn.out_proj' belongs to nn.MultiheadAttention"):
        add_adapter(layer, LoRAConfig(r=2))
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=r"'0.linear1' is in an nn.TransformerEncoderLayer"):
        add_adapter(model, LoRAConfig(r=2, targets=["linear1"]))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        add_adapter(model, LoRAConfig(r=2, targets=["linear1"]))
        model[0].linear1.B.data.normal_()
        model.eval()
        with torch.no_grad():
            x = torch.randn(1, 3, 8)
            adapted = model(x)
            with disable_adapters(model):
                assert not torch.equal(model(x), adapted)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_copies_pickles_and_state_dicts_of_an_adapted_model(
    mlp: nn.Module, make_mlp: Make, shake: Shake
) -> None:
    add_adapter(mlp, LoRAConfig(r=2))
    shake(mlp)
    x = torch.randn(3, 12)
    y = mlp(x)
    loaded = make_mlp()
    add_adapter(loaded, LoRAConfig(r=2))
    loaded.load_state_dict(pickle.loads(pickle.dumps(mlp.state_dict())))
    for twin in (copy.deepcopy(mlp), loaded):
        assert torch.equal(twin(x), y)


def test_a_whole_model_compiles(mlp: nn.Module, shake: Shake) -> None:
    add_adapter(mlp, LoRAConfig(r=2), "a")
    add_adapter(mlp, LoRAConfig(r=2), "b")
    shake(mlp)
    set_adapters(mlp, ["a", "b"])
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 12)
    assert torch.equal(compiled(x), mlp(x))
    with disable_adapters(mlp):
        assert torch.equal(compiled(x), mlp(x))
    merge_adapters(mlp)
    assert torch.equal(compiled(x), mlp(x))


# --- kinds of one's own ---


class Scale(Adapter):
    """IA3: y * l, one number per output."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(features))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y * self.l.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scaled = None if bias is None else bias * self.l.to(bias.dtype)
        return weight * self.l[:, None].to(weight.dtype), scaled


@register_adapter("TEST_SCALE")
@dataclass(frozen=True)
class ScaleConfig:
    skip: str = "head"

    def build(self, name: str, module: nn.Module) -> Adapter | None:
        fits = isinstance(module, nn.Linear) and name != self.skip
        return Scale(module.out_features) if fits else None


def test_a_kind_of_ones_own_does_everything(mlp: nn.Module, shake: Shake, same_bits: Same) -> None:
    mlp.bfloat16()
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    plain = mlp(x)
    report = add_adapter(mlp, ScaleConfig(), "mine")
    assert (report.kind, report.sites) == ("TEST_SCALE", ("inp", "mid.0"))
    assert type(mlp.inp) is Adapted
    assert same_bits(mlp(x), plain)
    frozen = [n for n, p in mlp.named_parameters() if "frozen" in n and p.requires_grad]
    assert not frozen  # what was built frozen stays so
    set_adapters(mlp, "mine", trainable=True)
    assert not mlp.inp.adapter("mine").frozen.requires_grad
    shake(mlp)
    mlp.float()
    x = x.float()
    y = mlp(x)
    merge_adapters(mlp)
    u = torch.finfo(torch.float32).eps / 2
    assert (mlp(x) - y).abs().max() <= 200 * u * y.abs().max().clamp(min=1)
    unmerge_adapters(mlp)
    assert same_bits(mlp(x), y)
    add_adapter(mlp, LoRAConfig(r=2), "lora")  # joins the same hosts
    set_adapters(mlp, ["mine", "lora"])
    assert list(mlp.inp.adapters) == ["mine", "lora"]
    assert same_bits(mlp(x), y)
    delete_adapter(mlp, "lora")
    delete_adapter(mlp, "mine")
    assert type(mlp.inp) is nn.Linear


def test_parameters_of_ones_own_kind_are_float32_from_the_start(mlp: nn.Module) -> None:
    class Half(ScaleConfig):
        def build(self, name: str, module: nn.Module) -> Adapter | None:
            adapter = super().build(name, module)
            if adapter is not None:
                for p in adapter.parameters():
                    p.data = p.data.half()
            return adapter

    assert add_adapter(mlp, Half()).kind == "Half"
    assert mlp.inp.adapter("default").l.dtype == torch.float32


def test_registering_checks_its_arguments() -> None:
    for kind in ("", "ia3", "A-B", 3):
        with pytest.raises(ValueError, match="an adapter kind is named in capitals"):
            register_adapter(kind)
    with pytest.raises(TypeError, match="Scale must be a dataclass"):
        register_adapter("TEST_PLAIN")(Scale)
    with pytest.raises(ValueError, match="the adapter kind 'TEST_SCALE' is taken by ScaleConfig"):
        register_adapter("TEST_SCALE")(Odd)
    register_adapter("TEST_SCALE")(ScaleConfig)  # a notebook's cell run again


def test_the_unfinished_adapter_says_what_it_lacks(mlp: nn.Module) -> None:
    class Bare(Adapter):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

    mlp.inp = Adapted(mlp.inp)
    mlp.inp.attach("bare", Bare())
    mlp.inp.active = ["bare"]
    with pytest.raises(NotImplementedError, match=r"Bare has no forward\(x, y, base\)"):
        mlp(torch.randn(1, 12))
    with pytest.raises(NotImplementedError, match=r"Bare has no merged\(weight, bias\)"):
        merge_adapters(mlp)


def test_a_module_called_by_keyword_and_returning_a_tuple() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, *, hidden: Tensor, flag: bool) -> tuple[Tensor, bool]:
            return self.lin(hidden), flag

    class First(Scale):
        def forward(self, x: Tensor, y: Any, base: nn.Module) -> Any:
            return (super().forward(x, y[0], base) + x, *y[1:])

    model = nn.ModuleDict({"pair": Pair()})
    host = Adapted(model["pair"])
    host.attach("a", First(3))
    host.active = ["a"]
    x = torch.randn(2, 3)
    y, flag = host(hidden=x, flag=True)
    assert flag
    assert torch.equal(y, host.base.lin(x) + x)
