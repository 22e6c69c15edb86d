"""PEFT as the judge of every kind of LoRA: files both ways, equal outputs and gradients."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import Adapter, LoRAConfig, adapted_modules, add_adapter
from lora_core.checkpoint import load_adapter, read_adapter, save_adapter
from lora_core.checkpoint.conv_groups import as_written

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*Merging is not supported"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.*has no bias"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding"),
    pytest.mark.filterwarnings("ignore:.*misread by"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),  # PEFT takes B's bias for a shard
]

IDS = torch.tensor([[5, 1, 3, 3, 0, 9], [7, 9, 4, 8, 2, 0]])


class Everything(nn.Module):
    """One layer of every kind that a pair acts in, and norms, in a row."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.c1 = nn.Conv1d(8, 8, 3, padding=1)
        self.c1g = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.c2 = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), bias=False)
        self.c3 = nn.Conv3d(2, 6, (2, 1, 2))
        self.norm = nn.LayerNorm(6)
        self.turned = linear(12, 6)
        self.fused = nn.Linear(12, 10)
        self.lm_head = nn.Linear(10, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.c1g(torch.relu(self.c1(self.emb(ids).mT)))  # (B, 12, T)
        x = torch.relu(self.c2(x.unflatten(1, (3, 4))))  # (B, 4, 1, T - 1)
        x = self.c3(x.unflatten(1, (2, 2)))  # (B, 6, 1, 1, T - 2)
        x = self.turned(self.norm(torch.tanh(x.flatten(2).mT)))  # (B, T - 2, 12)
        return self.lm_head(torch.tanh(self.fused(x)))

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


ALL = ["emb", "c1", "c2", "c3", "turned", "fused"]
KINDS: dict[str, tuple[LoRAConfig, dict[str, Any]]] = {
    # ours, PEFT's options
    "every layer": (LoRAConfig(r=4, alpha=6, targets=ALL), {"target_modules": ALL}),
    "groups": (LoRAConfig(r=2, targets=["c1g"]), {"target_modules": ["c1g"]}),
    "dora": (
        LoRAConfig(r=3, alpha=5, use_dora=True, targets=ALL),
        {"target_modules": ALL, "use_dora": True},
    ),
    "dora, rslora": (
        LoRAConfig(r=4, use_dora=True, use_rslora=True, targets=["fused"], bias="lora_only"),
        {
            "target_modules": ["fused"],
            "use_dora": True,
            "use_rslora": True,
            "bias": "lora_only",
        },
    ),
    "bias of B": (
        LoRAConfig(r=2, alpha=7, lora_bias=True, targets=["c1", "c2", "turned", "fused"]),
        {"target_modules": ["c1", "c2", "turned", "fused"], "lora_bias": True},
    ),
    "their biases": (
        LoRAConfig(r=2, bias="lora_only", targets=ALL),
        {"target_modules": ALL, "bias": "lora_only"},
    ),
    "all biases": (
        LoRAConfig(r=2, bias="all", targets=["c2", "fused"]),
        {"target_modules": ["c2", "fused"], "bias": "all"},
    ),
    "whole modules": (
        LoRAConfig(r=2, targets=["c1"], modules_to_save=["lm_head", "norm"]),
        {"target_modules": ["c1"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "whole modules and all biases": (
        LoRAConfig(r=2, targets=["c1"], modules_to_save=["lm_head"], bias="all", lora_bias=True),
        {
            "target_modules": ["c1"],
            "modules_to_save": ["lm_head"],
            "bias": "all",
            "lora_bias": True,
        },
    ),
    "patterns": (
        LoRAConfig(
            r=4,
            alpha=5,
            targets=ALL,
            rank_pattern={"c[12]": 2, "emb": 3},
            alpha_pattern={"turned": 2.5},
        ),
        {
            "target_modules": ALL,
            "r": 4,
            "lora_alpha": 5,
            "rank_pattern": {"c[12]": 2, "emb": 3},
            "alpha_pattern": {"turned": 2.5},
        },
    ),
    "tokens": (
        LoRAConfig(r=2, targets=["fused"], trainable_token_indices=[1, 9]),
        {"target_modules": ["fused"], "trainable_token_indices": [1, 9]},
    ),
}
# starts and parts: written as plain pairs of a higher rank
DERIVED = {
    "pissa": LoRAConfig(r=2, alpha=6, init="pissa", targets=["turned", "fused", "c2"]),
    "olora, rslora": LoRAConfig(
        r=2, init="olora", use_rslora=True, targets=["fused", "c3"], rank_pattern={"c3": 1}
    ),
    "parts": LoRAConfig(r=2, targets=["fused", "c1"], parts={"fused": [4, 6]}, alpha=3),
    "pissa in parts": LoRAConfig(
        r=2, init="pissa", targets=["fused", "turned"], parts={"fused": [4, 6]}
    ),
    "dora, pissa": LoRAConfig(r=2, init="pissa", use_dora=True, targets=["fused", "c1"]),
}


@pytest.fixture(scope="module")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


@pytest.fixture
def base(oracle: Callable[[str], ModuleType]) -> nn.Module:
    oracle("transformers")
    from transformers.pytorch_utils import Conv1D

    return Everything(Conv1D).eval()


def shake(parameters: Any, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


def shaken(model: nn.Module) -> nn.Module:
    for _, host in adapted_modules(model):
        shake([p for p in host.adapters.parameters() if p.requires_grad])
    return model


def gradients(model: nn.Module, cotangent: Tensor) -> Tensor:
    """The output, after one backward of <output, cotangent>."""
    model.zero_grad()
    y = model(IDS)
    y.backward(cotangent.to(y.dtype))
    return y.detach()


def own_gradients(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Gradients by key on disk: an adapter whose parameters are their gradients, written out."""
    found = {}
    for site, host in adapted_modules(model):
        if name not in host.adapters:
            continue
        stand_in: Adapter = copy.deepcopy(host.adapter(name))
        for own, p in zip(stand_in.parameters(), host.adapter(name).parameters(), strict=True):
            own.data = torch.zeros_like(own) if p.grad is None else p.grad.clone()
        for key, tensor in as_written(stand_in).items():
            found[f"base_model.model.{site}.{key}"] = tensor.detach()
    return found


def their_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a PeftModel by key on disk."""
    found = {}
    for key, p in model.named_parameters():
        if p.requires_grad and p.grad is not None:
            plain = key.replace(".modules_to_save.default", "").replace(".default", "")
            found[plain.replace("vector.weight", "vector")] = p.grad
    return found


def error(got: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """The largest difference, as a share of the largest value, or of `floor` if that is larger."""
    with torch.no_grad():
        return float((got.double() - truth).abs().max() / truth.abs().max().clamp(min=floor))


def close(got: Tensor, peer: Tensor, truth: Tensor) -> bool:
    """Within twice the peer's own error, and four roundings of the largest value."""
    return error(got, truth) <= 2 * error(peer, truth) + 4 * torch.finfo(torch.float32).eps


def compare(ours: nn.Module, theirs: nn.Module, halves: int = 1) -> None:
    """Outputs and gradients of two models of the same function."""
    cotangent = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(3))
    y = gradients(ours, cotangent)
    peer = gradients(theirs, cotangent)
    judge = copy.deepcopy(theirs).double()
    truth = gradients(judge, cotangent)
    assert close(y, peer, truth)
    mine, yours, wide = own_gradients(ours), their_gradients(theirs), their_gradients(judge)
    assert mine.keys() == yours.keys()
    triples = {key: _trained_part(key, (mine[key], yours[key], wide[key]), halves) for key in mine}
    # a gradient that cancels has no size of its own; the peer's error is that of its worst tensor,
    # since in one tensor it may be small by chance
    floor = 1e-3 * max(c.abs().max().item() for _, _, c in triples.values())
    allowed = 2 * max(error(b, c, floor) for _, b, c in triples.values())
    allowed += 4 * torch.finfo(torch.float32).eps
    assert allowed < 1e-4
    for key, (a, _, c) in triples.items():
        assert error(a, c, floor) <= allowed, key


def _trained_part(key: str, gradients: tuple[Tensor, ...], halves: int) -> tuple[Tensor, ...]:
    """Gradients of what is trained on both sides."""
    if halves == 2 and "lora_" in key and "magnitude" not in key:  # the first pair is trained
        gradients = tuple(t.chunk(2, 0 if "_A" in key else 1)[0] for t in gradients)
    if "c1g.lora_A" in key and (gradients[0] == 0).any():  # a grouped A has none elsewhere
        gradients = tuple(t * (gradients[0] != 0) for t in gradients)
    return gradients


def saved(model: nn.Module, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, directory)
    return directory


def in_peft(peft: ModuleType, base: nn.Module, directory: Path) -> nn.Module:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory, is_trainable=True)
    return model.eval()


@pytest.mark.parametrize("name", list(KINDS))
def test_peft_reads_what_is_written_here(
    name: str, base: nn.Module, peft: ModuleType, tmp_path: Path
) -> None:
    ours = copy.deepcopy(base)
    add_adapter(ours, KINDS[name][0])
    shaken(ours)
    assert (ours(IDS) - base(IDS)).abs().max() > 1e-3
    compare(ours, in_peft(peft, base, saved(ours, tmp_path)))


@pytest.mark.parametrize("name", list(KINDS))
def test_what_peft_wrote_is_read_here(
    name: str, base: nn.Module, peft: ModuleType, tmp_path: Path
) -> None:
    options = {"r": 2, "lora_alpha": 3, **KINDS[name][1]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path, trainable=True)
    assert (ours(IDS) - base(IDS)).abs().max() > 1e-3
    compare(ours, theirs)
    # and back again, through this library's files
    compare(ours, in_peft(peft, base, saved(ours, tmp_path / "again")))


@pytest.mark.parametrize("name", list(DERIVED))
def test_what_is_trained_in_another_form_is_a_plain_lora_to_peft(
    name: str, base: nn.Module, peft: ModuleType, tmp_path: Path
) -> None:
    config = DERIVED[name]
    ours = copy.deepcopy(base)
    add_adapter(ours, config)
    shaken(ours)
    saved(ours, tmp_path)
    theirs = in_peft(peft, base, tmp_path)
    if "parts" in name:  # the zeros off the blocks are trained by PEFT, so only outputs compare
        truth = copy.deepcopy(theirs).double()(IDS)
        assert close(ours(IDS), theirs(IDS), truth)
    else:
        compare(ours, theirs, halves=2)
    # here it loads as what it was, and trains on in the same way
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path, trainable=True)
    assert torch.equal(again(IDS), ours(IDS))
    cotangent = torch.ones(2, 4, 11)
    for model in (ours, again):
        gradients(model, cotangent)
    mine, second = own_gradients(ours), own_gradients(again)
    assert all(torch.equal(mine[key], second[key]) for key in mine)
    pair = next(host for _, host in adapted_modules(again)).adapter("default")
    written = next(host for _, host in adapted_modules(ours)).adapter("default")
    assert dataclasses.replace(pair.config, targets=config.targets) == config
    assert pair.trained_on == written.trained_on == "float32"


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_start_that_peft_took_from_the_base_is_taken_here(
    start: str, dora: bool, base: nn.Module, peft: ModuleType, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["fused", "turned"][: 1 + (start == "pissa")],  # PEFT: no OLoRA on Conv1D
        init_lora_weights=start,
        use_dora=dora,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    assert read_adapter(tmp_path)[0]["init_lora_weights"] == start
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path, trainable=True)
    y, wanted = ours(IDS), theirs(IDS)
    assert (wanted - base(IDS)).abs().max() > 1e-3
    # PEFT rounds W - s·B0 A0 once more
    size = wanted.abs().max().item()
    assert (y - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * size
    saved(ours, tmp_path / "again")
    back = in_peft(peft, base, tmp_path / "again")(IDS)
    assert (back - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * size


def test_whole_modules_of_a_16_bit_model(base: nn.Module, peft: ModuleType, tmp_path: Path) -> None:
    """PEFT keeps their copies in the base's dtype; here they are widened, and cast when called."""
    narrow = base.bfloat16()
    config = peft.LoraConfig(r=2, target_modules=["fused"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(copy.deepcopy(narrow), config).eval()
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    key = "base_model.model.lm_head.weight"
    assert read_adapter(tmp_path)[1][key].dtype == torch.bfloat16
    ours = copy.deepcopy(narrow)
    load_adapter(ours, tmp_path, trainable=True)
    kept = dict(adapted_modules(ours))["lm_head"].adapter("default").tensors()["weight"]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, read_adapter(tmp_path)[1][key].float())
    y, wanted = ours(IDS), theirs(IDS)
    assert y.dtype == torch.bfloat16
    truth = copy.deepcopy(theirs).double()(IDS)
    error = (wanted.double() - truth).abs().max()
    allowed = 2 * error + 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (y.double() - truth).abs().max() <= allowed
