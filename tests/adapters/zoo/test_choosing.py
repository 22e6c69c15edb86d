"""Which modules and rows an adapter is at, and names that could be mistaken for one another.

The scenarios of PEFT's test_tuners_utils, test_low_level_api and test_trainable_tokens: sites are
compared with lists written out, values bit for bit.
"""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    adapted_modules,
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
)
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter

Same = Callable[[Tensor, Tensor], bool]


class Block(nn.Module):
    """Attention and an MLP whose names end alike; experts are in a list of their own."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.qk = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(torch.tanh(self.qk(self.q(x))))
        return x + sum(expert(x) for expert in self.experts)


class Stack(nn.Module):
    """Twelve layers, so that 1 is the beginning of 10 and 11."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(experts=2 if i < 2 else 0) for i in range(12))
        self.q = nn.Linear(4, 4)
        self.score = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.score(self.q(x))


def at(layers: Any, *ends: str) -> list[str]:
    return [f"layers.{i}.{end}" for i in layers for end in ends]


EVERY = range(12)
ALL = [
    name
    for i in EVERY
    for name in at([i], "q", "qk", "mlp.0", "mlp.1", *(["experts.0", "experts.1"] if i < 2 else []))
] + ["q", "score"]
MATCHES: list[tuple[dict[str, Any], list[str]]] = [
    # a suffix is whole names; an exact name is one module
    ({"targets": ["q"]}, [*at(EVERY, "q"), "q"]),
    ({"targets": ["layers.1.q"]}, at([1], "q")),
    ({"targets": ["mlp.0", "layers.3.mlp.1"]}, [n for i in EVERY for n in (
        at([i], "mlp.0", "mlp.1") if i == 3 else at([i], "mlp.0"))]),
    # a regular expression is matched as a whole: 1 is not 10
    ({"targets": r"layers\.1\..*"}, at([1], "q", "qk", "mlp.0", "mlp.1", "experts.0", "experts.1")),
    ({"targets": r".*\.(0|2)\.q"}, at([0, 2], "q")),
    ({"targets": r".*q"}, [*at(EVERY, "q"), "q"]),
    # layers by index, never by the expert's
    ({"targets": r"layers\.1\.experts\.\d+"}, at([1], "experts.0", "experts.1")),
    ({"targets": r"layers\.\d+\.experts\.1"}, at([0, 1], "experts.1")),
    ({"targets": [f"layers.{i}.q" for i in (2, 11)]}, at([2, 11], "q")),
    # exclusions, in every form
    ({"targets": ["q"], "exclude": ["layers.1.q"]}, [*at([0, *range(2, 12)], "q"), "q"]),
    ({"targets": ["q"], "exclude": r"layers\..*"}, ["q"]),
    ({"targets": r".*mlp.*", "exclude": ["mlp.1"]}, at(EVERY, "mlp.0")),
    ({"targets": ["q"], "exclude": lambda name, module: name != "q"}, ["q"]),
    ({"targets": lambda name, module: name.endswith("qk")}, at(EVERY, "qk")),
    # all-linear: everything, where no output head is known
    ({"targets": "all-linear"}, ALL),
    ({"targets": "all-linear", "exclude": ["score"]}, ALL[:-1]),
    ({"targets": "all-linear", "modules_to_save": ["score"]}, ALL),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), MATCHES)
def test_targets(options: dict[str, Any], expected: list[str]) -> None:
    model = Stack()
    report = add_adapter(model, LoRAConfig(r=2, **options))
    assert list(report.sites) == expected
    assert [name for name, _ in adapted_modules(model)] == expected
    # a second adapter finds the same names, though hosts are in between now
    assert list(add_adapter(model, LoRAConfig(r=1, **options), "second").sites) == expected


@pytest.mark.parametrize(
    ("pattern", "where"),
    [
        ({"q": 1}, [*at(EVERY, "q"), "q"]),
        ({"layers.1.q": 1}, at([1], "q")),
        ({r"layers\.\d+\.q": 1}, at(EVERY, "q")),
        ({"^q": 1}, ["q"]),
        ({r"(1|11)\.q": 1}, at([1, 11], "q")),
        ({"mlp.0": 1, r"mlp\.\d": 2}, at(EVERY, "mlp.0")),  # the first that matches
    ],
)
def test_patterns(pattern: dict[str, int], where: list[str]) -> None:
    model, other = Stack(), Stack()
    options = {"r": 3, "alpha": 6, "targets": r".*(q|mlp\.0|mlp\.1)", "exclude": ["qk"]}
    add_adapter(model, LoRAConfig(**options, rank_pattern=pattern))
    ranks = {name: host.adapters["default"].r for name, host in adapted_modules(model)}
    assert [name for name, r in ranks.items() if r == 1] == where
    add_adapter(other, LoRAConfig(**options, alpha_pattern=pattern))
    scalings = {name: host.adapters["default"].scaling for name, host in adapted_modules(other)}
    assert [name for name, s in scalings.items() if s == pytest.approx(1 / 3)] == where
    for name, host in adapted_modules(model):
        assert host.adapters["default"].scaling == 6 / ranks[name]


def test_peft_s_layer_lists(tmp_path: Path, same_bits: Same) -> None:
    """layers_to_transform names layers, not experts; the file's keys say which modules it meant."""
    model, x = Stack(), torch.randn(2, 4)
    add_adapter(model, LoRAConfig(r=2, targets=r"layers\.1\.(q|experts\.\d)"))
    for _, host in adapted_modules(model):
        nn.init.normal_(host.adapters["default"].B)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    raw = json.loads(file.read_text())
    raw |= {"target_modules": ["q", "0", "1"], "layers_to_transform": [1], "layers_pattern": None}
    file.write_text(json.dumps(raw))
    load_adapter(model, tmp_path, "loaded")
    loaded = [name for name, host in adapted_modules(model) if "loaded" in host.adapters]
    assert loaded == at([1], "q", "experts.0", "experts.1")
    y = model(x)
    set_adapters(model, "default")
    with torch.no_grad():
        assert (model(x) - y).abs().max() == 0


# --- heads ---


@pytest.mark.oracle
def test_all_linear_and_heads(bases: Callable) -> None:
    """A language model's head stays; a classifier is trained whole where the user says so."""
    for name, head in (("llama", "lm_head"), ("gpt2", "lm_head"), ("t5", "lm_head")):
        model = copy.deepcopy(bases(name))
        sites = add_adapter(model, LoRAConfig(r=1)).sites
        assert head not in sites
        linear = [n for n, m in bases(name).named_modules() if "Linear" in type(m).__name__]
        turned = [n for n, m in bases(name).named_modules() if type(m).__name__ == "Conv1D"]
        assert set(sites) == {*linear, *turned} - {head}
    model = copy.deepcopy(bases("bert"))
    report = add_adapter(model, LoRAConfig(r=1, modules_to_save=["classifier"]))
    hosts = dict(adapted_modules(model))
    assert type(hosts["classifier"].adapters["default"]).__name__ == "FullCopy"
    assert len(report.sites) == len([m for m in bases("bert").modules() if type(m) is nn.Linear])
    with pytest.raises(ValueError, match=r"r = 16 is above the size of 'classifier', 6 × 16"):
        add_adapter(copy.deepcopy(bases("bert")), LoRAConfig())


def test_models_in_models(perceptron: nn.Module, same_bits: Same) -> None:
    """Adapters go into what a model wraps, by the names seen from where they are added."""
    x = torch.randn(2, 12)
    plain = perceptron(x)
    outer = nn.Sequential(perceptron)
    add_adapter(perceptron, LoRAConfig(r=2, targets=["inp"]), "inner")
    report = add_adapter(outer, LoRAConfig(r=2, targets=["0.fused"]), "outer")
    assert report.sites == ("0.fused",)
    assert adapter_names(outer) == ["inner", "outer"]
    assert adapter_names(perceptron) == ["inner", "outer"]
    with disable_adapters(perceptron):
        assert same_bits(outer(x), plain)
    unload_adapters(outer)
    assert type(perceptron.inp) is type(perceptron.fused) is nn.Linear


# --- names ---


class Awkward(nn.Module):
    """Modules that are called as the parts of adapters are."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.adapters = nn.ModuleDict({"default": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
        self.lora_A = nn.Linear(4, 4)
        self.default = nn.Sequential(nn.Linear(4, 4))
        self.active = nn.Linear(4, 4)
        self.merged = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.base, *self.adapters.values(), self.lora_A, self.default, self.active):
            x = torch.tanh(part(x))
        return self.merged(x)


NAMES = ["default", "base", "lora_A", "a", "aa", "default2", "weight", "adapters", "lora_B", "0"]


def filled(model: nn.Module, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, host in adapted_modules(model):
        if name in host.adapters:
            for p in host.adapter(name).parameters():
                p.data.copy_(torch.randn(p.shape, generator=generator))


def test_names_that_collide(tmp_path: Path, same_bits: Same) -> None:
    """Adapters called like modules, like parts of keys, and like the beginning of one another."""
    torch.manual_seed(3)
    model, x = Awkward(), torch.randn(2, 4)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    base = model(x)
    wanted = {}
    for i, name in enumerate(NAMES):
        add_adapter(model, LoRAConfig(r=2, modules_to_save=["merged"]), name)
        filled(model, name, i)
        set_adapters(model, name, trainable=False)
        wanted[name] = model(x)
        save_adapter(model, tmp_path / name, name)
        keys = adapter_state_dict(model, name)
        assert len(keys) == 6 * 2 + 2, sorted(keys)
    assert len({tuple(y.flatten().tolist()) for y in wanted.values()}) == len(NAMES)
    again = Awkward()
    again.load_state_dict(plain)
    for name in reversed(NAMES):
        load_adapter(again, tmp_path / name, name)
    for name in NAMES:
        for one in (model, again):
            set_adapters(one, name)
            assert same_bits(one(x), wanted[name]), name
    twin = pickle.loads(pickle.dumps(model))
    for name in NAMES[:-1]:
        delete_adapter(twin, name)
    set_adapters(twin, NAMES[-1])
    assert same_bits(twin(x), wanted[NAMES[-1]])
    merge_adapters(model)
    unload_adapters(model)
    assert same_bits(model(x), base)
    assert all(same_bits(v, plain[k]) for k, v in model.state_dict().items())


def test_keys_of_another_name_are_no_help(perceptron: nn.Module, tmp_path: Path) -> None:
    """A file whose keys hold an adapter's name, as old ones do, is refused, not half read."""
    add_adapter(perceptron, LoRAConfig(r=2), "a")
    save_adapter(perceptron, tmp_path, "a")
    file = tmp_path / "adapter_model.safetensors"
    odd = {k.replace(".lora_A.", ".lora_A.default."): v for k, v in load_file(file).items()}
    save_file(odd, file)
    with pytest.raises(ValueError, match=r"lora_A"):
        load_adapter(perceptron, tmp_path, "b")
    assert adapter_names(perceptron) == ["a"]


# --- rows ---


def test_rows_of_several_adapters(make_token_model: Callable, same_bits: Same) -> None:
    """Each adapter has rows of its own, the tie kept; those of one do not leak into another."""
    for tied in (True, False):
        model, ids = make_token_model(tied), torch.arange(11)[None]
        plain = model(ids)
        for i, rows in enumerate(([1, 2], [2, 3], [9])):
            add_adapter(
                model,
                LoRAConfig(r=2, targets=["mix"], trainable_token_indices={"embed": rows}),
                f"r{i}",
            )
            filled(model, f"r{i}", i)
        for name in ("r0", "r1", "r2", "r0"):
            set_adapters(model, name)
            rows = model.embed.adapters[name].rows.detach()
            index = model.embed.adapters[name].index
            embedded = model.embed(ids)[0]
            assert same_bits(embedded[index], rows)
            others = [i for i in range(11) if i not in index.tolist()]
            assert same_bits(embedded[others], model.embed.base.weight[others])
        set_adapters(model, ["r0", "r1"])  # 2 is in both: the later has it
        assert same_bits(model.embed(torch.tensor([2]))[0], model.embed.adapters["r1"].rows[0])
        assert same_bits(model.embed(torch.tensor([1]))[0], model.embed.adapters["r0"].rows[0])
        with torch.no_grad():
            both = model(ids)
            merge_adapters(model)
            assert (model(ids) - both).abs().max() <= 64 * 2**-24 * both.abs().max().clamp(min=8)
        unload_adapters(model)
        assert same_bits(model(ids), plain)


def test_rows_that_are_not_there_are_not_read(make_token_model: Callable) -> None:
    """PEFT's check of ids out of range: here when the adapter is made."""
    for rows, message in (([11], "id 11 is not in the 11 rows"), ([-1], "id -1"), ([1, 1], "dist")):
        with pytest.raises(ValueError, match=message):
            add_adapter(
                make_token_model(True),
                LoRAConfig(r=2, targets=["mix"], trainable_token_indices=rows),
            )


def test_saved_rows_are_small(make_token_model: Callable, tmp_path: Path) -> None:
    model = make_token_model(True)
    config = LoRAConfig(r=2, targets=["mix"], trainable_token_indices=[1, 4, 5])
    add_adapter(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tuple(t.shape) for t in saved.values()) == [(2, 6), (3, 6), (6, 2)]
