"""Experts: one matrix each on disk, one stacked parameter in memory, 4-bit layers of their own."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.checkpoint import folder, load_model, save_model, saving
from lora_core.quant import NF4Linear, NF4Tensor

E, I, C = 3, 6, 64  # experts, rows of gate, width
EXPERTS = "block.mlp.experts"
MATRICES = {"gate_proj": (I, C), "up_proj": (I, C), "down_proj": (C, I)}


@dataclass(frozen=True)
class Config:
    """What load and save ask of a configuration."""

    num_experts: int = E
    num_hidden_layers: int = 1
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * I, C))
        self.down_proj = nn.Parameter(torch.randn(count, C, I))

    def with_4bit(self, parts: dict[str, NF4Tensor]) -> nn.Module:
        """A module per expert, of linear layers named as on disk."""
        made = nn.ModuleDict()
        for name, weight in parts.items():
            expert, _, matrix = name.partition(".")
            if expert not in made:
                made[expert] = nn.ModuleDict()
            holder = made[expert]
            assert isinstance(holder, nn.ModuleDict)
            holder[matrix] = NF4Linear.from_tensor(weight)
        return made


class Toy(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(8, C)
        self.block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts(config.num_experts)})})

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> None:
        return None

    def tie_weights(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load and save the toy instead of the library's models."""

    def build(config: Config, **options: Any) -> Toy:
        return Toy(config)

    monkeypatch.setattr(folder, "read_config", lambda directory: Config())
    monkeypatch.setattr(folder, "build_model", build)
    monkeypatch.setattr(saving, "build_model", build)


@pytest.fixture
def toy() -> Toy:
    return Toy(Config())


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def fuse(directory: Path) -> None:
    """Rewrite the folder with the experts stacked, as they are in memory."""
    path = directory / "model.safetensors"
    state = load_file(path)
    stacks: dict[str, list[Tensor]] = {
        matrix: [state.pop(f"{EXPERTS}.{e}.{matrix}.weight") for e in range(E)]
        for matrix in MATRICES
    }
    gate, up, down = (torch.stack(stacks[matrix]) for matrix in MATRICES)
    state[f"{EXPERTS}.gate_up_proj"] = torch.cat([gate, up], dim=1)
    state[f"{EXPERTS}.down_proj"] = down
    save_file(state, path)


def test_saved_one_by_one_and_loaded_into_the_stack(toy: Toy, tmp_path: Path) -> None:
    save_model(toy, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {name.removeprefix(f"{EXPERTS}.") for name in state} == {"embed.weight"} | {
        f"{e}.{matrix}.weight" for e in range(E) for matrix in MATRICES
    }
    stack = toy.get_parameter(f"{EXPERTS}.gate_up_proj")
    assert torch.equal(state[f"{EXPERTS}.1.gate_proj.weight"], stack[1, :I])
    assert torch.equal(state[f"{EXPERTS}.1.up_proj.weight"], stack[1, I:])
    assert same(load_model(tmp_path), toy)
    fuse(tmp_path)
    assert same(load_model(tmp_path), toy)
    wide = load_model(tmp_path, dtype="bfloat16")
    assert same(wide, toy.to(torch.bfloat16))


@pytest.mark.parametrize("stacked", [False, True])
def test_quantized_on_load_each_on_its_own(toy: Toy, tmp_path: Path, stacked: bool) -> None:
    save_model(toy, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if stacked:
        fuse(tmp_path)
    model = load_model(tmp_path, quantize="nf4")
    for e in range(E):
        for matrix, shape in MATRICES.items():
            layer = model.get_submodule(f"{EXPERTS}.{e}.{matrix}")
            weight = state[f"{EXPERTS}.{e}.{matrix}.weight"]
            assert isinstance(layer, NF4Linear)
            assert weight.shape == shape
            assert same(layer, NF4Linear.from_tensor(weight))


def test_4_bit_experts_are_written_and_read_bit_for_bit(toy: Toy, tmp_path: Path) -> None:
    save_model(toy, tmp_path / "a")
    model = load_model(tmp_path / "a", quantize="nf4")
    save_model(model, tmp_path / "b", source=tmp_path / "a", quantized=True)
    names = load_file(tmp_path / "b/model.safetensors")
    assert f"{EXPERTS}.2.up_proj.weight.quant_state.bitsandbytes__nf4" in names
    assert same(load_model(tmp_path / "b"), model)
    save_model(model, tmp_path / "c", dtype="float32")
    dense = load_model(tmp_path / "c").get_parameter(f"{EXPERTS}.gate_up_proj")
    layer = model.get_submodule(f"{EXPERTS}.2.up_proj")
    assert isinstance(layer, NF4Linear)
    assert torch.equal(dense[2, I:], layer.dense_weight())


UP = f"{EXPERTS}.1.up_proj.weight"


def spoil(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_an_expert_that_is_missing_too_many_or_mis_shaped(toy: Toy, tmp_path: Path) -> None:
    save_model(toy, tmp_path)
    spoil(tmp_path, lambda s: s.update({UP: torch.zeros(I + 1, C)}))
    with pytest.raises(ValueError, match=rf"{UP} has shape \(7, 64\); .* calls for \(6, 64\)"):
        load_model(tmp_path)
    spoil(tmp_path, lambda s: s.pop(UP))
    with pytest.raises(ValueError, match=rf"lacks tensor {UP}, which"):
        load_model(tmp_path)
    save_model(toy, tmp_path)
    spoil(tmp_path, lambda s: s.update({UP.replace(".1.", ".3."): torch.zeros(I, C)}))
    with pytest.raises(ValueError, match=r"holds tensor .*experts\.3\.up_proj\.weight, which"):
        load_model(tmp_path)


@pytest.mark.parametrize("stacked", [False, True])
def test_an_expert_that_is_not_finite_is_named(toy: Toy, tmp_path: Path, stacked: bool) -> None:
    with torch.no_grad():
        toy.get_parameter(f"{EXPERTS}.gate_up_proj")[1, I + 2, 5] = float("nan")
    save_model(toy, tmp_path)
    if stacked:
        fuse(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot quantize .*experts\.1\.up_proj: weight\[2, 5\] is nan"
    ):
        load_model(tmp_path, quantize="nf4")


def test_experts_of_which_only_some_are_in_4_bits_are_refused(toy: Toy, tmp_path: Path) -> None:
    save_model(toy, tmp_path / "a")
    dense = load_file(tmp_path / "a/model.safetensors")[UP]
    save_model(load_model(tmp_path / "a", quantize="nf4"), tmp_path / "b", quantized=True)

    def mix(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.startswith(UP)]:
            del state[name]
        state[UP] = dense

    spoil(tmp_path / "b", mix)
    with pytest.raises(ValueError, match=r"experts of .* in 4 bits, but .*1\.up_proj is not"):
        load_model(tmp_path / "b")


def test_without_a_4_bit_form_nothing_becomes_4_bit(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(toy, tmp_path / "a")
    save_model(load_model(tmp_path / "a", quantize="nf4"), tmp_path / "b", quantized=True)
    monkeypatch.delattr(Experts, "with_4bit")
    assert same(load_model(tmp_path / "a"), toy)
    with pytest.raises(ValueError, match=r"in 4 bits, but the model has no 4-bit form of them"):
        load_model(tmp_path / "b")
    with pytest.raises(ValueError, match=r"cannot quantize block\.mlp\.experts: .* no 4-bit form"):
        load_model(tmp_path / "a", quantize="nf4")


def test_an_absurd_number_of_experts_is_one_line(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(toy, tmp_path)
    for count, message in ((10**12, "num_experts is 10+, more than"), (1000, "lacks 2 tensors")):
        monkeypatch.setattr(folder, "read_config", lambda _, n=count: Config(num_experts=n))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
