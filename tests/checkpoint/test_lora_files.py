"""Every kind of LoRA on disk, without a peer: what is written, rewritten, resumed and refused."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import LoRA, LoRAConfig, adapted_modules, add_adapter, merge_adapters
from lora_core.adapters.mixed_groups import MixedConvForm
from lora_core.checkpoint import load_adapter, read_adapter, save_adapter
from lora_core.checkpoint.lora_scaling import scaling_record
from lora_core.quant import NF4Linear, quantize_model
from lora_core.targets import pattern_value

Make = Callable[..., nn.Module]
CONFIG, WEIGHTS, RESUME = "adapter_config.json", "adapter_model.safetensors", "lora_core.json"
PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.fused = nn.Linear(8, 12)
        self.rising = nn.Linear(12, 16, bias=False)
        self.score = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(ids).mT)).mT
        return self.score(torch.relu(self.rising(torch.relu(self.fused(x)))))


IDS = torch.arange(9).view(1, 9)


@pytest.fixture
def base() -> nn.Module:
    return Net().eval()


@pytest.fixture
def other_program(tmp_path: Path) -> Callable[..., Path]:
    """Change an adapter's files as another program would; lora_core.json stays."""

    def change(folder: Path, tensors: Any = None, **config: Any) -> Path:
        from safetensors.torch import load_file, save_file

        if config:
            raw = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps({**raw, **config}))
        if tensors is not None:
            save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        return folder

    return change


@pytest.fixture
def saved(shake: Make) -> Make:
    """Save an adapter of an adapted copy of the base to a folder; gives the copy."""

    def make(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
        model = copy.deepcopy(base)
        add_adapter(model, LoRAConfig(**{"r": 2, "alpha": 4, **options}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_adapter(shake(model), folder)
        return model

    return make


def test_keys_and_shapes_of_every_kind(saved: Make, base: nn.Module, tmp_path: Path) -> None:
    saved(
        base,
        tmp_path,
        targets=["embed", "conv", "fused"],
        use_dora=True,
        bias="all",
        modules_to_save=["norm"],
    )
    record, tensors = read_adapter(tmp_path)
    assert {key.removeprefix(PREFIX): tuple(t.shape) for key, t in tensors.items()} == {
        "embed.lora_embedding_A": (2, 9),
        "embed.lora_embedding_B": (8, 2),
        "embed.lora_magnitude_vector": (8,),
        "conv.lora_A.weight": (2, 8, 3),
        "conv.lora_B.weight": (8, 1, 1),
        "conv.lora_magnitude_vector": (1, 8, 1),
        "conv.base_layer.bias": (8,),
        "fused.lora_A.weight": (2, 8),
        "fused.lora_B.weight": (12, 2),
        "fused.lora_magnitude_vector": (12,),
        "fused.base_layer.bias": (12,),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "norm.running_mean": (8,),
        "norm.running_var": (8,),
        "norm.num_batches_tracked": (),
        "score.bias": (3,),
    }
    down = tensors[f"{PREFIX}conv.lora_A.weight"]
    assert torch.equal(down[0, 4:], torch.zeros(4, 3))  # the channels of the other group
    assert torch.equal(down[1, :4], torch.zeros(4, 3))
    assert (record["use_dora"], record["bias"]) == (True, "all")
    assert record["modules_to_save"] == ["norm"]
    assert tensors[f"{PREFIX}norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["embed", "conv", "fused"], "use_dora": True, "bias": "all"},
        {"targets": ["conv", "rising"], "lora_bias": True, "modules_to_save": ["score", "norm"]},
        {"targets": ["fused", "rising"], "init": "pissa", "use_rslora": True},
        {"targets": ["fused", "rising"], "init": "olora", "rank_pattern": {"rising": 3}},
        {"targets": ["fused", "embed"], "parts": {"fused": [4, 8]}, "alpha_pattern": {"embed": 1}},
        {"targets": ["fused", "rising"], "init": "loftq", "loftq_steps": 2},
    ],
    ids=["dora", "biases", "pissa", "olora", "parts", "loftq"],
)
def test_every_kind_comes_back_bit_for_bit(
    saved: Make, options: dict[str, Any], base: nn.Module, tmp_path: Path
) -> None:
    model = saved(base, tmp_path / "a", **options)
    load_adapter(base, tmp_path / "a", trainable=True)
    assert torch.equal(base(IDS), model(IDS))
    first = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in base.named_parameters()} == first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(base, tmp_path / "b")
    for file in (CONFIG, WEIGHTS, RESUME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# --- rank and scaling ---


def test_a_subtracted_start_is_written_as_a_plain_pair(
    saved: Make, base: nn.Module, tmp_path: Path
) -> None:
    options = {"targets": ["fused", "rising"], "init": "pissa", "use_rslora": True}
    model = saved(base, tmp_path, **options, rank_pattern={"rising": 3})
    record, tensors = read_adapter(tmp_path)
    # s = 4 / sqrt(2) at rank 2 and 4 / sqrt(3) at rank 3; on disk ranks 4 and 6
    assert (record["r"], record["use_rslora"], record["init_lora_weights"]) == (4, False, True)
    assert record["rank_pattern"] == {"rising": 6}
    assert record["lora_alpha"] == pytest.approx(4 * 4 / 2**0.5, rel=1e-15)
    assert record["alpha_pattern"]["rising"] == pytest.approx(6 * 4 / 3**0.5, rel=1e-15)
    assert tensors[f"{PREFIX}rising.lora_A.weight"].shape == (6, 12)
    # without lora_core.json it is that plain LoRA, of the same outputs
    (tmp_path / RESUME).unlink()
    load_adapter(base, tmp_path)
    y = model(IDS)
    assert (base(IDS) - y).abs().max() <= 64 * torch.finfo(torch.float32).eps * y.abs().max()
    assert dict(adapted_modules(base))["rising"].adapter("default").config.init == "kaiming"


@given(
    values=st.dictionaries(
        st.text("ab.", min_size=1, max_size=6).filter(
            lambda name: not name.startswith(".") and not name.endswith(".") and ".." not in name
        ),
        st.tuples(st.integers(1, 3), st.booleans(), st.sampled_from([1.0, 0.5, 8 / 3])),
        min_size=1,
        max_size=6,
    )
)
def test_rewritten_patterns_mean_each_pair(
    values: dict[str, tuple[int, bool, float]],
) -> None:
    pairs = {}
    for site, (r, started, scaling) in values.items():
        pairs[site] = pair = LoRA(4, 5, r=r)
        pair.scaling = scaling
        if started:
            pair.start_at(torch.ones(r, 4), torch.ones(5, r))
    record = scaling_record(LoRAConfig(r=1, alpha=16), pairs)
    for site, (r, started, scaling) in values.items():
        rank = pattern_value(record["rank_pattern"], site, record["r"])
        alpha = pattern_value(record["alpha_pattern"], site, record["lora_alpha"])
        assert rank == (2 * r if started else r)
        assert alpha / rank == pytest.approx(scaling, rel=1e-15)


def test_the_order_of_patterns_is_kept(saved: Make, base: nn.Module, tmp_path: Path) -> None:
    """The first that matches wins, and PEFT sorts them."""
    patterns = {"rising": 3, "(fused|rising)": 2}
    model = saved(base, tmp_path, targets=["fused", "rising"], r=4, rank_pattern=patterns)
    assert list(read_adapter(tmp_path)[0]["rank_pattern"]) == ["rising", "(fused|rising)"]
    load_adapter(base, tmp_path)
    assert torch.equal(base(IDS), model(IDS))


# --- lora_core.json ---


def test_the_precision_of_the_base_comes_back(base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    quantize_model(model, skip=["rising", "score"])
    add_adapter(model, LoRAConfig(r=2, targets=["fused", "rising"]))
    save_adapter(model, tmp_path)
    nested = "nf4, block 64, double quantization"
    said = json.loads((tmp_path / RESUME).read_text())
    assert said == {"trained_on": {nested: ["fused"], "float32": ["rising"]}}
    load_adapter(base, tmp_path)
    hosts = dict(adapted_modules(base))
    assert hosts["fused"].adapter("default").trained_on == nested
    assert hosts["rising"].adapter("default").trained_on == "float32"
    (line,) = merge_adapters(base).warnings
    assert nested in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trained_on": 3}, "lora_core.json is malformed"),
        ({"loftq_base": {"site": "x"}}, "lora_core.json is malformed: KeyError"),
        (
            {"loftq_base": {"site": "x", "checksum": 1}},
            "names the module 'x', at which the adapter",
        ),
        ({"training": {"rank": 3}}, "LoRAConfig has no option 'rank'; nearest names: "),
        ({"training": {"init": "pisa"}}, "init must be one of"),
        ({"training": {}, "written": {"r": 3}}, r"is of another adapter \(r = 3\) than"),
    ],
)
def test_what_is_wrong_with_the_further_file(
    saved: Make,
    content: dict[str, Any],
    message: str,
    base: nn.Module,
    tmp_path: Path,
) -> None:
    saved(base, tmp_path, targets=["fused"])
    (tmp_path / RESUME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(base, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(adapted_modules(base))


def test_another_program_has_rewritten_the_adapter(
    saved: Make,
    base: nn.Module,
    tmp_path: Path,
    other_program: Callable[..., Path],
) -> None:
    model = saved(base, tmp_path, targets=["fused"], init="pissa")
    # the same form with other numbers: those numbers
    other_program(tmp_path, lambda tensors: {k: 2 * t for k, t in tensors.items()})
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    own = [dict(adapted_modules(m))["fused"].adapter("default") for m in (model, loaded)]
    assert torch.equal(own[1].A, 2 * own[0].A)
    assert torch.equal(own[1].A0, 2 * own[0].A0)
    # another form: what the further file says is not about it
    other_program(tmp_path, r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=r"of another adapter \(r = 4\) .* remove lora_core.json"):
        load_adapter(base, tmp_path)


def test_numbers_between_independent_parts_are_refused(
    saved: Make,
    base: nn.Module,
    tmp_path: Path,
    other_program: Callable[..., Path],
) -> None:
    saved(base, tmp_path, targets=["fused"], parts={"fused": [4, 8]})
    up = f"{PREFIX}fused.lora_B.weight"
    assert read_adapter(tmp_path)[1][up].shape == (12, 4)
    other_program(tmp_path, lambda tensors: {**tensors, up: torch.ones(12, 4)})
    with pytest.raises(ValueError, match="has numbers outside the blocks of its parts"):
        load_adapter(base, tmp_path)
    assert not list(adapted_modules(base))
    (tmp_path / RESUME).unlink()
    load_adapter(base, tmp_path)


# --- LoftQ ---


def test_loftq_is_for_the_base_it_made(shake: Make, base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    config = LoRAConfig(r=2, targets=["fused", "rising"], init="loftq", loftq_steps=3)
    add_adapter(model, config)
    with pytest.warns(UserWarning, match="init='loftq' made the 4-bit base .* quantized=True"):
        (note,) = save_adapter(shake(model), tmp_path)
    assert "save_model(model, directory, quantized=True)" in note
    # on the 16-bit model the base is made again, on the 4-bit one it is compared
    load_adapter(copy.deepcopy(base), tmp_path)
    made = copy.deepcopy(base)
    for name, host in adapted_modules(model):
        setattr(made, name, copy.deepcopy(host.base))
    load_adapter(made, tmp_path)
    assert torch.equal(made(IDS), model(IDS))
    assert isinstance(dict(adapted_modules(made))["fused"].base, NF4Linear)
    for changed in (Net().eval(), copy.deepcopy(base)):
        if changed.fused.weight.equal(base.fused.weight):
            quantize_model(changed)  # the plain quantization, not the one of three rounds
        with pytest.raises(ValueError, match=r"belongs to the 4-bit base .* 'fused' is another"):
            load_adapter(changed, tmp_path)
        assert not list(adapted_modules(changed))


# --- what PEFT writes ---


def test_a_of_all_channels_is_run_and_not_merged(
    saved: Make,
    base: nn.Module,
    tmp_path: Path,
    other_program: Callable[..., Path],
) -> None:
    saved(base, tmp_path, targets=["conv"], bias="lora_only")
    key = f"{PREFIX}conv.lora_A.weight"
    other_program(tmp_path, lambda tensors: {**tensors, key: torch.randn(2, 8, 3)})
    load_adapter(base, tmp_path)
    pair = dict(adapted_modules(base))["conv"].adapter("default")
    assert isinstance(pair.form, MixedConvForm)
    # the update is an ordinary convolution, whose weight is B A group by group
    x = base.embed(IDS).mT
    weight = pair.delta_weight(torch.float64).float()
    assert weight.shape == (8, 8, 3)
    host = dict(adapted_modules(base))["conv"]
    change = (pair.bias - pair.bias0)[:, None]
    wanted = host.base(x) + torch.conv1d(x, weight, padding=1) + change
    assert (host(x) - wanted).abs().max() <= 64 * torch.finfo(
        torch.float32
    ).eps * wanted.abs().max()
    with pytest.raises(ValueError, match="cannot be merged: its A sees the channels of all groups"):
        merge_adapters(base)
    matrix = pair.form.matrix(base.conv.base.weight)
    assert torch.equal(matrix.view(8, 8, 3)[:4, :4], base.conv.base.weight[:4])
    assert not matrix.view(8, 8, 3)[:4, 4:].any()
    save_adapter(base, tmp_path / "again")
    assert read_adapter(tmp_path / "again")[1][key].equal(read_adapter(tmp_path)[1][key])
    saved(Net().eval(), tmp_path / "dora", targets=["conv"], use_dora=True)
    other_program(tmp_path / "dora", lambda tensors: {**tensors, key: torch.randn(2, 8, 3)})
    with pytest.raises(ValueError, match="DoRA cannot have an A that sees all groups' channels"):
        load_adapter(Net(), tmp_path / "dora")


def test_pefts_leniences_about_whole_modules(
    saved: Make,
    base: nn.Module,
    tmp_path: Path,
    other_program: Callable[..., Path],
) -> None:
    """PEFT matches ends of names, dot or no dot, and adds heads' names that match nothing."""
    model = saved(base, tmp_path, targets=["fused"], modules_to_save=["score", "norm"])
    other_program(tmp_path, modules_to_save=["core", "norm", "classifier"])
    load_adapter(base, tmp_path)
    assert torch.equal(base(IDS), model(IDS))


class Doubled(nn.Module):
    """Modules whose whole names are ends of others': 'head' of 'part.head' and of 'overhead'."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, 9)
        self.overhead = nn.Linear(9, 9)
        self.part = nn.Sequential()
        for name in ("head", "overhead"):
            self.part.add_module(name, nn.Linear(9, 9))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.head, self.overhead, self.part):
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "head", "bias": "all"},
        {"targets": ["head", "overhead"], "exclude": ["part.head", "part.overhead"]},
        {"targets": "head", "init": "pissa"},
        {"targets": ["overhead"], "modules_to_save": ["part.head"]},
        {"targets": lambda name, _: name in ("head", "part.overhead")},
    ],
    ids=["regex", "excluding", "pissa", "copy", "callable"],
)
def test_names_that_are_ends_of_others(
    saved: Make, options: dict[str, Any], tmp_path: Path
) -> None:
    base, x = Doubled(), torch.randn(2, 9)
    model = saved(base, tmp_path / "a", **options)
    load_adapter(base, tmp_path / "a", trainable=True)
    assert torch.equal(base(x), model(x))
    save_adapter(base, tmp_path / "b")
    for file in (CONFIG, WEIGHTS, RESUME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_target_that_ends_as_a_copy(shake: Make, tmp_path: Path) -> None:
    """PEFT takes 'overhead' for another 'head', and fails at it: said; read here as it is meant."""
    base, x = Doubled(), torch.randn(2, 9)
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=2, targets=["overhead"], modules_to_save=["head"]))
    with pytest.warns(UserWarning, match="modules_to_save='head': PEFT takes 'overhead', which"):
        save_adapter(shake(model), tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(x), model(x))


def test_a_target_inside_a_copy_is_none(
    saved: Make, tmp_path: Path, other_program: Callable[..., Path]
) -> None:
    """PEFT copies the module and passes over what is in it."""
    base, x = Doubled(), torch.randn(2, 9)
    model = saved(base, tmp_path, targets=["overhead"], exclude=["part.overhead"])
    copied = {f"{PREFIX}part.{key}": t.clone() for key, t in base.part.state_dict().items()}
    bias = copied[f"{PREFIX}part.head.bias"]
    more = {f"{PREFIX}part.original_module.head.bias": bias.clone()}
    bias += 1
    more[f"{PREFIX}part.modules_to_save.default.head.bias"] = bias.clone()
    other_program(
        tmp_path,
        lambda tensors: {**tensors, **copied, **more},
        target_modules=["overhead"],
        modules_to_save=["part"],
    )
    with torch.no_grad():
        model.part.head.bias += 1
    load_adapter(base, tmp_path)
    assert torch.equal(base(x), model(x))


@pytest.mark.parametrize("wide", ["file", "model"])
def test_a_copy_of_the_base_in_another_precision(
    saved: Make,
    wide: str,
    base: nn.Module,
    tmp_path: Path,
    other_program: Callable[..., Path],
) -> None:
    """Trained on the base in 16 bits and loaded in 32, or the other way round."""
    saved(base, tmp_path, targets=["embed"])
    own = base.embed.weight.detach().clone()
    if wide == "file":
        base.to(torch.bfloat16)
    else:
        own = own.bfloat16()
    key = f"{PREFIX}embed.base_layer.weight"
    other_program(tmp_path, lambda tensors: {**tensors, key: own + 1})
    with pytest.raises(ValueError, match="another base"):
        load_adapter(base, tmp_path)
    other_program(tmp_path, lambda tensors: {**tensors, key: own})
    load_adapter(base, tmp_path)


def test_doubles_and_copies_of_base_weights_are_left_out(
    saved: Make,
    base: nn.Module,
    tmp_path: Path,
    other_program: Callable[..., Path],
) -> None:
    model = saved(base, tmp_path, targets=["embed"], modules_to_save=["score"], bias="all")
    more = {
        f"{PREFIX}embed.base_layer.weight": base.embed.weight.detach().clone(),
        f"{PREFIX}score.original_module.bias": base.score.bias.detach().clone(),
        f"{PREFIX}score.modules_to_save.bias": model.score.adapters["default"].copy.bias.detach(),
        f"{PREFIX}rising.weight": base.rising.weight.detach().clone(),
    }
    other_program(tmp_path, lambda tensors: {**tensors, **more})
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    for key in more:
        other_program(tmp_path, lambda tensors, key=key: {**tensors, **more, key: more[key] + 1})
        message = "is unexpected" if "modules_to_save" in key else "is not the (weight|bias) that"
        with pytest.raises(ValueError, match=message):
            load_adapter(base, tmp_path)
        assert not list(adapted_modules(base))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_of_pefts_needs_the_16_bit_weights(
    saved: Make,
    start: str,
    base: nn.Module,
    tmp_path: Path,
    other_program: Callable[..., Path],
) -> None:
    saved(base, tmp_path, targets=["fused", "embed"])
    (tmp_path / RESUME).unlink()
    other_program(tmp_path, init_lora_weights=start)
    quantized = copy.deepcopy(base)
    quantize_model(quantized)
    with pytest.raises(
        ValueError, match=f"'{start}' starts from the 16-bit .* 'fused' is in 4 bit"
    ):
        load_adapter(quantized, tmp_path)
    load_adapter(base, tmp_path)
    hosts = dict(adapted_modules(base))
    assert hosts["fused"].adapter("default").A0 is not None
    assert hosts["embed"].adapter("default").A0 is None


def test_an_adapter_for_another_model(saved: Make, base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path, targets=["fused", "rising"])
    other = nn.ModuleDict(
        {"fuse": nn.Linear(8, 12), "deep": nn.ModuleDict({"fused": nn.Linear(3, 3)})}
    )
    with pytest.raises(
        ValueError, match="for another model: it has pairs for 2 modules, 'fused' "
    ) as caught:
        load_adapter(other, tmp_path)
    assert "none of these is in this one; nearest names: 'fused'" in str(caught.value)
    sizes = nn.ModuleDict({"fused": nn.Linear(8, 10), "rising": nn.Linear(10, 16)})
    with pytest.raises(ValueError, match=r"has shape .* the model needs .*: another base"):
        load_adapter(sizes, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True, "use_dora": True, "targets": ["fused"]}, "lora_bias with use_dora: P"),
        ({"use_dora": True, "targets": ["conv"]}, "use_dora at 'conv', a convolution in groups"),
    ],
)
def test_what_peft_does_not_load_is_said(
    options: dict[str, Any], message: str, base: nn.Module, tmp_path: Path
) -> None:
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=2, **options))
    with pytest.warns(UserWarning, match=message):
        assert len(save_adapter(model, tmp_path)) == 1
    load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"padding_mode": "circular", "padding": 1},
            "PEFT pads A's input with zeros, where .*'circ",
        ),
        ({"dilation": 2}, "PEFT leaves the layer's dilation out of A"),
    ],
)
def test_convolutions_that_peft_computes_otherwise(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, **options)})
    fresh = copy.deepcopy(model)
    add_adapter(model, LoRAConfig(r=2, targets=["conv"]))
    with pytest.warns(UserWarning, match=message):
        save_adapter(model, tmp_path)
    load_adapter(copy.deepcopy(fresh), tmp_path)
    (tmp_path / RESUME).unlink()  # as PEFT writes it
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh, tmp_path)
