"""AdapterHub's places, against the layer written out, in models small enough to read."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    AdapterHubConfig,
    adapted_modules,
    adapter_rows,
    add_adapter,
    disable_adapters,
    set_adapters,
)
from lora_core.adapters.bottleneck import ACTIVATIONS
from lora_core.testing.bounds import exceeds, gamma


class Output(nn.Module):
    """BERT's: linear layer, dropout, and the norm of the sum."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, 8)
        self.dropout = nn.Dropout(0.3)
        self.LayerNorm = nn.LayerNorm(8)

    def forward(self, h: Tensor, r: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(h)) + r)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = nn.Linear(8, 8)
        self.output = Output(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.self(x), x)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.Linear(8, 12)
        self.output = Output(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.output(torch.relu(self.intermediate(x)), x)


class Tupled(nn.Linear):
    """An attention that returns its weights too."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


class Inner(nn.Module):
    """A feed-forward whose last linear layer has the name that Llama's has."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(x))


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Tupled(8, 8)
        self.self_attn.o_proj = nn.Identity()
        self.mlp = Inner()
        self.input_layernorm = nn.LayerNorm(8)
        self.post_attention_layernorm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(hidden_states=self.input_layernorm(x))[0]
        return x + self.mlp(self.post_attention_layernorm(x))


def stack(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(kind(), kind())
    model = nn.ModuleDict({"layer" if kind is PostNorm else "layers": layers})
    model.forward = layers.forward
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))


def f(adapter: nn.Module, u: Tensor) -> Tensor:
    """The bottleneck from its definition."""
    w = {name: p.detach().to(u.dtype) for name, p in adapter.named_parameters()}
    h = ACTIVATIONS[adapter.activation](u @ w["down.weight"].T + w["down.bias"])
    return (h @ w["up.weight"].T + w["up.bias"]) * w.get("gain", adapter.scaling)


def at(model: nn.Module, site: str, names: list[str]) -> list[nn.Module]:
    """The bottlenecks of some names at a site."""
    hosts = dict(adapted_modules(model))
    own = hosts[site].adapters if site in hosts else {}
    return [own[name] for name in names if name in own]


def post_norm(model: nn.Module, sees: str, names: list[str], x: Tensor) -> Tensor:
    """The model of the table's second column, written out."""
    end = "LayerNorm" if sees == "normed" else "dropout"
    for i, layer in enumerate(model["layer"]):
        plain = copy.deepcopy(layer).to(x.dtype)
        with disable_adapters(plain):
            for part, out in (
                ("attention.output", plain.attention.output),
                ("output", plain.output),
            ):
                r = x
                inner = (
                    plain.attention.self(x) if part != "output" else plain.intermediate(x).relu()
                )
                h, norm = out.dense(inner), out.LayerNorm
                found = at(model, f"layer.{i}.{part}.{end}", names)
                for adapter in found if sees != "normed" else []:
                    u = {"output": h, "sum": norm(h + r), "residual": r}[sees]
                    h = h + f(adapter, u)
                x = norm(h + r)
                for adapter in found if sees == "normed" else []:
                    x = x + f(adapter, x)
    return x


def pre_norm(model: nn.Module, sees: str, names: list[str], x: Tensor) -> Tensor:
    """The model of the table's third column, written out."""
    for i, layer in enumerate(model["layers"]):
        plain = copy.deepcopy(layer).to(x.dtype)
        with disable_adapters(plain):
            for part in ("self_attn", "mlp"):
                r = x
                if part == "mlp":
                    h = plain.mlp(plain.post_attention_layernorm(x))
                else:
                    h = plain.self_attn(plain.input_layernorm(x))[0]
                for adapter in at(model, f"layers.{i}.{part}", names):
                    h = h + f(adapter, {"output": h, "sum": h + r, "residual": r}[sees])
                x = h + r
    return x


KINDS = {
    **{(PostNorm, sees): post_norm for sees in ("output", "sum", "residual", "normed")},
    **{(PreNorm, sees): pre_norm for sees in ("output", "sum", "residual")},
}


@pytest.mark.parametrize(("kind", "sees"), KINDS)
@pytest.mark.parametrize("scaling", [1.5, "learned", "channel"])
def test_against_the_layer_written_out(kind, sees, scaling, shake) -> None:
    model = stack(kind)
    before = model(X)
    config = AdapterHubConfig(2, sees=sees, attention=True, scaling=scaling, activation="gelu")
    add_adapter(model, config, "a")
    report = add_adapter(model, AdapterHubConfig(4, sees=sees, leave_out=[1]), "b")
    assert {site.split(".")[1] for site in report.sites} == {"0"}
    assert torch.equal(model(X), before)  # `up` starts at zero
    shake(model)
    for names in (["a"], ["b"], ["a", "b"]):
        set_adapters(model, names)
        truth = KINDS[kind, sees](model, sees, names, X.double())
        by_hand = KINDS[kind, sees](model, sees, names, X)
        # PyTorch's own error in float32, doubled, and two roundings of the largest value
        bound = 2 * (by_hand - truth).abs().max() + 2 * 2.0**-24 * truth.abs().max()
        assert (fault := exceeds(model(X), truth, bound.expand_as(truth))) is None, fault
        assert (truth - before).abs().max() > 0.1
        with disable_adapters(model):
            assert torch.equal(model(X), before)


@pytest.mark.parametrize(("kind", "sees"), KINDS)
def test_gradients(kind, sees, shake) -> None:
    model = stack(kind)
    add_adapter(model, AdapterHubConfig(2, sees=sees, attention=True, scaling="learned"))
    shake(model)
    x, model = X.double().requires_grad_(), model.double()
    for _, host in adapted_modules(model):  # adapters stay float32 through .double()
        for adapter in host.adapters.values():
            for parameter in adapter.parameters():
                parameter.data = parameter.data.double()
    torch.autograd.gradcheck(model, (x,), fast_mode=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4 * 5
    with torch.no_grad():
        step = [torch.randn_like(p) for p in trained]
    (model(x) ** 2).sum().backward()
    slope = sum((p.grad * s).sum() for p, s in zip(trained, step, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, s in zip(trained, step, strict=True):
                p.add_(s, alpha=sign * 1e-6)
            values.append((model(x) ** 2).sum())
            for p, s in zip(trained, step, strict=True):
                p.sub_(s, alpha=sign * 1e-6)
    # a central difference errs by its step squared times the third derivative
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-6, atol=0)


def test_the_models_dropout_comes_before_the_adapter() -> None:
    """As in AdapterHub: what was dropped does not reach the adapter."""
    model = stack(PostNorm)
    add_adapter(model, AdapterHubConfig(1, sees="output", activation="relu"))
    adapter = at(model, "layer.0.output.dropout", ["default"])[0]
    seen = []
    adapter.change = lambda x: seen.append(x) or x * 0
    model.train()(X)
    assert 0.2 < (seen[0] == 0).float().mean() < 0.4


def test_its_own_dropout() -> None:
    model = stack(PreNorm)
    add_adapter(model, AdapterHubConfig(1, dropout=0.5))
    adapter = at(model, "layers.1.mlp", ["default"])[0]
    nn.init.ones_(adapter.up.bias)
    kept = adapter.train().change(X)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(adapter.eval().change(X), torch.ones_like(X))


def test_reductions_by_layer_and_the_least_width() -> None:
    model = stack(PreNorm)
    config = AdapterHubConfig({"0": 3, "default": 100}, attention=True)
    add_adapter(model, config)
    widths = {
        site: host.adapters["default"].down.out_features
        for site, host in adapted_modules(model)
        if hasattr(host.adapters["default"], "down")
    }
    assert widths["layers.0.mlp"] == widths["layers.0.self_attn"] == 2
    assert widths["layers.1.mlp"] == widths["layers.1.self_attn"] == 1


@pytest.mark.parametrize("kind", [PostNorm, PreNorm])
def test_copies_stand_alone(kind, shake) -> None:
    model = stack(kind)
    add_adapter(model, AdapterHubConfig(2))
    shake(model)
    wanted = model(X)
    twin = copy.deepcopy(model)
    twin.forward = next(iter(twin.children())).forward
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(X), wanted)
    layers = pickle.loads(pickle.dumps(next(iter(twin.children()))))
    assert torch.equal(layers(X), wanted)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sees": "all"}, "sees must be one of 'output', 'sum', 'residual', 'normed', got 'all'"),
        ({"scaling": "two"}, "scaling must be a number, 'learned' or 'channel', got 'two'"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
        ({"feed_forward": False}, "attention and feed_forward are both False"),
        ({"sees": "normed"}, "is for models with the norm after the sum"),
        ({"leave_out": [2]}, "leave_out: the model has no layer 2, only 0 … 1"),
        ({"reduction": {"0": 2}}, "reduction says nothing of layer 1: add a 'default'"),
        ({"activation": "mish"}, "activation must be one of"),
        ({"reduction": 0}, "reduction must be a number above 0"),
    ],
)
def test_refusals(options, told, state_of) -> None:
    model = stack(PreNorm)
    before = state_of(model)
    with pytest.raises(ValueError, match=told):
        add_adapter(model, AdapterHubConfig(**options))
    assert state_of(model) == before


def test_models_wired_otherwise_are_refused(mlp) -> None:
    with pytest.raises(ValueError, match=r"wired like none of BERT, Llama, GPT-2.*feed_forward="):
        add_adapter(mlp, AdapterHubConfig())
    model = stack(PreNorm)
    model["layers"][0].pre_feedforward_layernorm = nn.Identity()
    model["layers"][1].pre_feedforward_layernorm = nn.Identity()
    with pytest.raises(ValueError, match="wired like none of"):
        add_adapter(model, AdapterHubConfig())
    with pytest.raises(TypeError, match="needs the whole model"):
        AdapterHubConfig().build("mlp", nn.Linear(2, 2))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "sees"), KINDS)
def test_rows_that_name_their_adapters(kind, sees, shake) -> None:
    model = stack(kind)
    for name in ("a", "b"):
        add_adapter(model, AdapterHubConfig(2, sees=sees, attention=True), name)
    shake(model)
    wanted = []
    for row, name in zip(X.split(1), ("a", [], "b"), strict=True):
        set_adapters(model, name)
        wanted.append(model(row))
    with adapter_rows(model, ["a", None, "b"]):
        got = model(X)
    truth = torch.cat(wanted)
    # the same operations on other numbers of rows: products of 12 terms, 14 of them in a row
    bound = gamma(14 * 12) * truth.abs().max()
    assert (fault := exceeds(got, truth, bound.expand_as(truth))) is None, fault
