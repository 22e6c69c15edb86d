"""Conversion to LoRA beside PEFT's: the same best approximation, and files that PEFT loads."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from lora_core import LoRAConfig, add_adapter, convert_to_lora, load_adapter, save_adapter
from lora_core.adapters import adapted_modules
from lora_core.checkpoint import read_spectrum

pytestmark = pytest.mark.oracle


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def peft(oracle):
    return oracle("peft")


@pytest.fixture
def theirs(peft, tmp_path):
    """PEFT's model with an adapter of rank 6 whose directions differ in size, and its folder."""
    model = peft.get_peft_model(
        Net(), peft.LoraConfig(r=6, lora_alpha=9, target_modules=["up", "down"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.data *= torch.logspace(0, -1.5, 6)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


@pytest.mark.parametrize("rank", [1, 3, 0.9, 0.99])
def test_the_same_factors_product_and_ranks(peft, theirs, rank) -> None:
    """Their threshold is a share of the energy, 1 - error² here."""
    model, folder = theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a LoRA already
        _, state = peft.convert_to_lora(model, rank)
    ours = Net()
    load_adapter(ours, folder)
    options = {"r": rank} if isinstance(rank, int) else {"error": math.sqrt(1 - rank)}
    report = convert_to_lora(ours, "default", **options)
    whole = {site: host.adapters["default"] for site, host in adapted_modules(ours)}
    for layer in report.layers:
        key = f"base_model.model.{layer.name}.lora_"
        down, up = state[f"{key}A.weight"].double(), state[f"{key}B.weight"].double()
        pair = dict(adapted_modules(ours))[layer.name].adapters["converted"]
        assert layer.rank == len(down)
        wanted = whole[layer.name].delta_weight(torch.float64).detach()
        error = float((up @ down - wanted).norm() / wanted.norm())
        # theirs is found in float32, so it may miss the best by its rounding
        assert layer.error <= error + 2.0**-24
        assert error <= layer.error + 64 * 2.0**-24
        gap = float((pair.delta_weight(torch.float64).detach() - up @ down).norm() / wanted.norm())
        assert gap <= 1e-4  # the space of the first directions turns by rounding over their gap


def test_peft_loads_what_was_converted(peft, tmp_path) -> None:
    """Ranks that differ by layer, each under a pattern that means its layer alone."""
    ours = nn.Sequential(Net(), Net()).eval()
    plain = copy.deepcopy(ours)
    add_adapter(ours, LoRAConfig(r=6, use_dora=True, rank_pattern={"0.up": 1}), "dora")
    for name, parameter in ours.named_parameters():
        if ".dora." in name:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    report = convert_to_lora(ours, "dora", error=0.3, new_name="plain")
    assert len({layer.rank for layer in report.layers}) > 1
    with pytest.warns(UserWarning, match="rank_pattern"):
        save_adapter(ours, tmp_path, "plain")
    x = torch.randn(5, 12)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        truth = ours(x)
        bound = 64 * 2.0**-24 * float(truth.abs().max())
        assert float((loaded(x) - truth).abs().max()) <= bound


def test_the_spectrum_of_a_file_of_theirs(theirs) -> None:
    model, folder = theirs
    for layer in read_spectrum(folder).layers:
        delta = model.base_model.model.get_submodule(layer.name).get_delta_weight("default")
        values = torch.linalg.svdvals(delta.detach().double())
        bound = 64 * 2.0**-24 * float(values[0])  # they multiply in float32
        assert layer.rank == 6
        got = torch.tensor(layer.singular_values, dtype=torch.float64)
        assert float((got - values[:6]).abs().max()) <= bound
