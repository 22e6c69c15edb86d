"""Merging back into 4 bits by samples: what the report says is so, and nothing else changes."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    LoRAConfig,
    LoRALinear,
    MergeReport,
    adapted_modules,
    add_adapter,
    dense_weight,
    merge_adapters,
    merge_samples,
    set_adapters,
    unmerge_adapters,
)
from lora_core.adapters.merge_layer import merged_layer
from lora_core.quant import NF4Linear, quantize_4bit, quantize_model

Shake = Callable[..., None]
StateOf = Callable[[nn.Module], object]


class Net(nn.Module):
    """Correlated inputs, dropout, a norm with statistics, a layer that may not be reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(64)
        self.second = nn.Linear(64, 32, bias=False)
        self.idle = nn.Linear(64, 32)

    def forward(self, x: Tensor, idle: bool = False) -> Tensor:
        h = self.norm(self.drop(torch.tanh(self.first(x))))
        return self.idle(h) if idle else self.second(h)


def inputs(rows: int, seed: int) -> Tensor:
    """Rows (rows, 64) whose variances fall quickly."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    return torch.randn(rows, 64, generator=g) * torch.arange(1, 65) ** -1.0 @ rotation


def make(shake: Shake, size: float = 0.02, double_quant: bool = True) -> Net:
    """The net in 4 bits with an update of that share of each weight."""
    torch.manual_seed(0)
    net = Net()
    quantize_model(net, skip=["idle"] if size < 0 else None, double_quant=double_quant)
    add_adapter(net, LoRAConfig(r=4, targets=["first", "second", "idle"]))
    shake(net)
    for _, host in adapted_modules(net):
        assert isinstance(host, LoRALinear)
        share = host.delta_weight().detach().norm() / dense_weight(host.base).norm()
        host.B.data.mul_(abs(size) / float(share))
    return net


SAMPLES = [inputs(400, seed) for seed in range(4)]


def direct_error(net: Net, name: str, stored: Tensor, samples: list[Tensor]) -> float:
    """|X (stored - W')ᵀ| / |X Dᵀ| on the last quarter of the rows of each batch, in float64."""
    host = getattr(net, name)
    seen: list[Tensor] = []
    hook = host.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mode = net.training
    net.eval()
    with torch.no_grad():
        for batch in samples:
            net(batch)
    net.train(mode)
    hook.remove()
    x = torch.cat([rows[len(rows) * 3 // 4 :] for rows in seen]).double()
    wanted = (host.base.dense_weight() + host.delta_weight().detach()).double()
    update = wanted - host.base.dense_weight()
    return float((x @ (stored.double() - wanted).t()).norm() / (x @ update.t()).norm())


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_reported_errors_are_those_computed_directly(double_quant: bool, shake: Shake) -> None:
    net = make(shake, double_quant=double_quant)
    report = merge_adapters(net, requantize=True, samples=SAMPLES)
    unmerge = {n: h.merged.module.dense_weight() for n, h in adapted_modules(net)}
    unmerge_adapters(net)
    by_name = {layer.name: layer for layer in report.layers}
    for name in ("first", "second"):
        layer, host = by_name[name], getattr(net, name)
        assert layer.method == "compensated"
        # X is float32 and its moment float64: some 1e-6 of each norm
        assert layer.output_error == pytest.approx(
            direct_error(net, name, unmerge[name], SAMPLES), rel=1e-4
        )
        wanted = host.base.dense_weight() + host.delta_weight().detach()
        plain = quantize_4bit(wanted, double_quant=double_quant).dequantize()
        assert layer.plain_output_error == pytest.approx(
            direct_error(net, name, plain, SAMPLES), rel=1e-4
        )
        assert layer.output_error < 0.75 < 0.9 < layer.plain_output_error
        delta, stored = wanted - host.base.dense_weight(), unmerge[name] - host.base.dense_weight()
        assert layer.kept == pytest.approx(
            float((stored * delta).sum() / delta.square().sum()), rel=1e-4, abs=1e-5
        )
        assert layer.error == pytest.approx(float((stored - delta).norm() / delta.norm()), rel=1e-4)
    idle = by_name["idle"]  # no sample reached it
    assert (idle.method, idle.output_error, idle.plain_output_error) == ("plain", None, None)


def test_bits_a_weight_are_unchanged_and_the_base_comes_back_bit_for_bit(shake: Shake) -> None:
    net = make(shake)
    before = {key: t.clone() for key, t in net.state_dict().items()}
    y = net.eval()(SAMPLES[0])
    for _ in range(2):
        merge_adapters(net, requantize=True, samples=SAMPLES)
        for _, host in adapted_modules(net):
            made, base = host.merged.module, host.base
            assert isinstance(made, NF4Linear)
            assert made.precision == base.precision == "nf4, block 64, double quantization"
            assert made.quantized.nbytes == base.quantized.nbytes
        unmerge_adapters(net)
        assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
        assert torch.equal(net(SAMPLES[0]), y)


def test_merging_again_gives_the_same_bits(shake: Shake) -> None:
    net = make(shake)
    reports, codes = [], []
    for _ in range(3):
        reports.append(merge_adapters(net, requantize=True, samples=SAMPLES))
        codes.append(net.first.merged.module.state_dict())
        unmerge_adapters(net)
    assert reports[0] == reports[1] == reports[2]
    for other in codes[1:]:
        assert all(torch.equal(t, other[key]) for key, t in codes[0].items())


def test_running_the_samples_leaves_modes_statistics_and_hooks_alone(shake: Shake) -> None:
    net = make(shake)
    net.train()
    net.drop.eval()
    modes = [module.training for module in net.modules()]
    buffers = {name: t.clone() for name, t in net.named_buffers()}
    random = torch.get_rng_state()
    merge_adapters(net, samples=SAMPLES)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(t, buffers[name]) for name, t in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(not p.requires_grad for p in net.first.merged.module.parameters())


def test_a_dense_merge_with_samples_is_measured_beside_plain(shake: Shake) -> None:
    net = make(shake, size=-0.02)  # `idle` stays dense
    report = merge_adapters(net, samples=[*SAMPLES, (SAMPLES[0], True)])
    for layer in report.layers:
        assert layer.method == "dense"
        assert layer.output_error is not None
        assert layer.output_error < 1e-4
        assert (layer.plain_output_error is None) == (layer.name == "idle")
    assert report.output_error is not None
    assert report.output_error < 1e-3
    assert report.warnings == ()


@pytest.mark.parametrize("method", ["plain", "compensated"])
def test_the_models_own_error_is_that_of_its_outputs(method: str, shake: Shake) -> None:
    net = make(shake).eval()
    with torch.no_grad():
        adapted = [net(batch)[300:] for batch in SAMPLES]
        set_adapters(net, [])
        before = [net(batch)[300:] for batch in SAMPLES]
        set_adapters(net, "default")
        report = merge_adapters(net, requantize=True, samples=SAMPLES, method=method)
        merged = [net(batch)[300:] for batch in SAMPLES]
    miss = (torch.cat(merged) - torch.cat(adapted)).norm()
    assert report.output_error == pytest.approx(
        float(miss / (torch.cat(adapted) - torch.cat(before)).norm()), rel=1e-5
    )
    assert {layer.method for layer in report.layers} == {method, "plain"}


class Wrapped(nn.Module):
    """Sequences in, an object with logits out; shows what it was called with."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.net.norm = nn.Identity()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> object:
        return type("Output", (), {"logits": self.net(x)})()


def test_padding_is_left_out_and_batches_may_be_dicts(shake: Shake) -> None:
    model = Wrapped(make(shake))
    x = inputs(96, 1).view(4, 24, 64)
    short = x.clone()
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[:, 16:] = 0
    short[:, 16:] = 1e3  # what stands in the padding
    one = merge_adapters(model, requantize=True, samples=[{"x": short, "attention_mask": mask}])
    unmerge_adapters(model)
    two = merge_adapters(model, requantize=True, samples=[{"x": x[:, :16]}])
    assert one.output_error == pytest.approx(two.output_error, rel=1e-3)
    for a, b in zip(one.layers[:2], two.layers[:2], strict=True):
        assert a.output_error == pytest.approx(b.output_error, rel=1e-3)


def test_layers_are_taken_in_groups_that_fit_into_the_budget(
    shake: Shake, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make(shake)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    net.register_forward_hook(count)
    whole = merge_adapters(copy.deepcopy(net), requantize=True, samples=SAMPLES)
    once, calls = calls, 0
    monkeypatch.setattr(merge_samples, "BUDGET", 3 * 8 * 64 * 64)  # one layer and a half
    assert merge_adapters(net, requantize=True, samples=iter(SAMPLES)) == whole
    assert calls == once + 2 * len(SAMPLES)


def test_an_update_that_cannot_be_had_is_not_made_worse(shake: Shake) -> None:
    """Uncorrelated inputs, a tiny update: the base's own codes are as good as any."""
    net = make(shake, size=1e-4)
    samples = [torch.randn(500, 64, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    report = merge_adapters(net, requantize=True, samples=samples)
    first = report.layers[0]
    assert first.output_error is not None
    assert first.output_error <= 1.0
    assert first.output_error < first.plain_output_error
    assert any("more than half of the update's effect is missing" in w for w in report.warnings)


def test_codes_that_do_worse_on_the_held_out_rows_are_not_taken(shake: Shake) -> None:
    """Chosen on one direction, judged on all: the base's own codes are nearer."""
    net = make(shake)
    one = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).double()
    moments = merge_samples.Moments(one.t() @ one, torch.eye(64).double(), rows=64)
    made = merged_layer("first", net.first, ["default"], torch.float32, "compensated", moments)
    assert made.report.method == "unchanged"
    assert made.report.output_error == 1.0
    assert made.report.kept == 0.0
    base = net.first.base.state_dict()
    assert all(torch.equal(t, base[key]) for key, t in made.module.state_dict().items())
    report = MergeReport((made.report,), ("the update is lost there",))
    assert "unchanged" in str(report)


def test_a_lost_update_is_told(shake: Shake) -> None:
    net = make(shake)
    line = torch.randn(300, 1) @ torch.randn(1, 64)  # chosen on one direction
    samples = [torch.cat((line, torch.randn(100, 64)))]  # judged on all
    report = merge_adapters(net, requantize=True, samples=samples)
    assert report.layers[0].method == "unchanged"
    lost = sum(layer.method == "unchanged" for layer in report.layers)
    assert any(
        f"at {lost} layers nothing was nearer to the update than the base's own codes" in warning
        for warning in report.warnings
    )


def test_the_report_as_data_and_as_a_table(shake: Shake) -> None:
    net = make(shake)
    report = merge_adapters(net, requantize=True, samples=SAMPLES)
    data = json.loads(json.dumps(report.as_dict()))
    assert [layer["name"] for layer in data["layers"]] == ["first", "second", "idle"]
    assert data["layers"][0]["output_error"] == report.layers[0].output_error
    assert data["layers"][0]["trained_on"] == "nf4, block 64, double quantization"
    assert data["output_error"] == report.output_error
    lines = str(report).splitlines()
    assert lines[0] == "merged 3 layers, 3 of them requantized to 4 bits"
    header = next(line for line in lines if line.startswith("layer"))
    assert header.split() == [
        *("layer", "stored", "kept", "weight", "error", "output", "error", "plain's")
    ]
    row = lines[lines.index(header) + 1]
    first = report.layers[0]
    assert row.split() == [
        "first",
        "compensated",
        *(f"{v:.1%}" for v in (first.kept, first.error, first.output_error)),
        f"{first.plain_output_error:.1%}",
    ]
    assert lines[-1].split()[-2:] == ["-", "-"]  # idle: not measured
    assert "unchanged" not in str(MergeReport(report.layers))


def test_another_precision_than_in_training_is_told(shake: Shake) -> None:
    net = Net()
    add_adapter(net, LoRAConfig(r=2, targets=["first", "second"]))
    shake(net)
    assert merge_adapters(net).warnings == ()
    unmerge_adapters(net)
    quantize_model(net)
    report = merge_adapters(net)
    assert [(x.trained_on, x.merged_onto) for x in report.layers] == [
        ("float32", "nf4, block 64, double quantization")
    ] * 2
    (line,) = report.warnings
    assert line.startswith(
        "'default' was trained on a base in float32 and is merged onto one in nf4, block 64, "
        "double quantization at 2 layers: "
    )
    assert f"warning: {line}" in str(report)


def test_one_host_can_be_merged_by_samples_too(shake: Shake) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 32)), r=4)
    shake(layer, 0.01)
    report = merge_adapters(layer, requantize=True, samples=SAMPLES)
    assert report.layers[0].method == "compensated"
    assert isinstance(layer, Adapted)
    assert str(report).splitlines()[-1].startswith("this layer")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"method": "gptq", "requantize": True}, ValueError, "method must be one of compensated, "),
        ({"method": "plain"}, ValueError, "it needs requantize=True"),
        ({"method": "compensated", "requantize": True}, ValueError, "it needs samples"),
        ({"samples": []}, ValueError, "samples is empty"),
        ({"samples": torch.zeros(2, 64)}, TypeError, "samples must be a list of batches.*Tensor"),
        ({"samples": 3}, TypeError, "samples must be a list of batches.*int"),
        ({"samples": [torch.zeros(1, 64)]}, ValueError, "too few rows at 'first' to hold some out"),
        ({"samples": [torch.zeros(2, 63)]}, ValueError, "x must end in in_features = 64"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(
    options: dict[str, object],
    kind: type[Exception],
    message: str,
    shake: Shake,
    state_of: StateOf,
) -> None:
    net = make(shake)
    net.train()
    before, modes = str(state_of(net)), [module.training for module in net.modules()]
    with pytest.raises(kind, match=message):
        merge_adapters(net, **options)  # type: ignore[arg-type]
    assert str(state_of(net)) == before
    assert [module.training for module in net.modules()] == modes
    assert not any(m._forward_pre_hooks for m in net.modules())
