"""LoRA on every family: from here to PEFT and from PEFT to here, into the weight and out of it.

What an update should do is computed from A and B alone, on the dense weights in float64, so that
neither library is the judge of itself.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    adapted_modules,
    add_adapter,
    disable_adapters,
    merge_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.experts import ExpertLoRA
from lora_core.checkpoint import load_adapter, save_adapter, save_model
from lora_core.models.experts import AnyExperts, NF4Experts
from lora_core.models.routing import Router
from lora_core.quant import NF4Linear

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*vision_tower"),
]

SCALE = 6 / 3


def randomised(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """All that is trained, moved."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


def is_wrapped(theirs: Any) -> bool:
    """Whether it is a multimodal model, whose text part is ours."""
    return hasattr(theirs.config, "text_config")


def tell(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def pairs_of(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(parameter, A, B) of a model of ours; of experts, stacks of A and B."""
    for site, host in adapted_modules(model):
        adapter = host.adapter("default")
        parts = adapter.pairs.items() if isinstance(adapter, ExpertLoRA) else [("weight", adapter)]
        for name, pair in parts:
            yield f"{site}.{name}", pair.A.detach(), pair.B.detach()


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that are products: all matrices but embedding and head."""
    named = {name for name, p in model.named_parameters() if p.dim() > 1}
    return {name for name in named if "embed_tokens" not in name and "lm_head" not in name}


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, AnyExperts) for module in model.modules())


@torch.no_grad()
def updated(truth: Any, pairs: Any, named: Callable[..., dict[str, nn.Parameter]]) -> Any:
    """The exact model with s·B A in its weights."""
    weights = named(truth)
    for name, down, up in pairs:
        weights[name] += SCALE * up.double() @ down.double()
    return truth


@pytest.fixture(scope="session")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


@pytest.fixture
def text_model(transformers: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """transformers' model that our adapters are for: a multimodal one's text part by itself."""

    def make(ours: nn.Module, theirs: Any) -> Any:
        if not is_wrapped(theirs):
            return theirs
        save_model(ours, tmp_path / "text")
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()

    return make


@pytest.mark.column("adapter")
def test_peft_reads_ours(
    family: str,
    make_pair: Callable[..., Any],
    parameters_of: Callable[..., dict[str, nn.Parameter]],
    text_model: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    peft: ModuleType,
    transformers: ModuleType,
    tmp_path: Path,
) -> None:
    """New: the base's very logits. Trained: PEFT's, and those of the merged folder."""
    ours, theirs, truth, _ = make_pair(family)
    theirs = text_model(ours, theirs)
    ids = draw()
    plain = tell(ours, ids)
    wanted = matrices(ours)
    add_adapter(ours, LoRAConfig(r=3, alpha=6))
    assert {name for name, *_ in pairs_of(ours)} == wanted
    assert torch.equal(tell(ours, ids), plain)
    found = tell(randomised(ours), ids)
    assert (found - plain).abs().max() > 0.05
    with disable_adapters(ours):
        assert torch.equal(tell(ours, ids), plain)
    exact = tell(updated(truth, pairs_of(ours), parameters_of), ids)
    said = pytest.warns(UserWarning, match="target_parameters")
    with said if has_experts(ours) else contextlib.nullcontext():
        notes = save_adapter(ours, tmp_path / "adapter")
    assert bool(notes) == has_experts(ours)
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    got = tell(read, ids)
    within(found, got, exact, "rms")
    merge_adapters(ours)
    merged = tell(ours, ids)
    unmerge_adapters(ours)
    assert torch.equal(tell(ours, ids), found)
    unload_adapters(ours, merge=True)
    assert torch.equal(tell(ours, ids), merged)
    save_model(ours, tmp_path / "merged")
    kind = transformers.AutoModelForCausalLM
    whole = kind.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    within(merged, tell(whole, ids), exact, "rms")


@pytest.mark.column("adapter")
def test_pefts_is_read_here(
    family: str,
    make_pair: Callable[..., Any],
    parameters_of: Callable[..., dict[str, nn.Parameter]],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    peft: ModuleType,
    tmp_path: Path,
) -> None:
    ours, theirs, truth, _ = make_pair(family)
    ids = draw()
    plain = tell(ours, ids)
    before = [p.clone() for p in ours.parameters()]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    with warnings.catch_warnings():  # PEFT holds patterns of experts against modules
        warnings.filterwarnings("ignore", ".*did not match any targeted module")
        there = randomised(peft.get_peft_model(theirs, config)).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*save_embedding_layers|.*tie_word_embeddings")
        there.save_pretrained(tmp_path)
    told = pytest.warns(
        UserWarning, match=r"(18|20) tensors \(.*\) left out: of parts beside the text"
    )
    with told if is_wrapped(theirs) else contextlib.nullcontext():
        load_adapter(ours, tmp_path)
    found = tell(ours, ids)
    assert (found - plain).abs().max() > 0.05
    exact = tell(updated(truth, pairs_of(ours), parameters_of), ids)
    within(found, tell(there, ids), exact, "rms")
    unload_adapters(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))


@pytest.mark.column("adapter")
def test_on_a_4_bit_base(
    family: str,
    make_pair: Callable[..., Any],
    load: Callable[..., nn.Module],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
) -> None:
    """Gradients are those on the dense dequantized weights; merging leaves the codes."""
    dense, *_, folder = make_pair(family)
    ours = load(folder, quantize="nf4")
    with torch.no_grad():
        for name, module in ours.named_modules():
            if isinstance(module, NF4Linear):
                dense.get_submodule(name).weight.copy_(module.dense_weight())
            if isinstance(module, NF4Experts):
                expanded = module.dense_module().state_dict()
                dense.get_submodule(name).load_state_dict(expanded)
    ids = draw()
    models, found = (ours, dense, copy.deepcopy(dense).double()), []
    for model in models:
        torch.manual_seed(0)
        add_adapter(model, LoRAConfig(r=3, alpha=6))
        randomised(model)
        model.train()(ids, labels=ids).loss.backward()
        model.eval()
        found.append([p.grad for _, h in adapted_modules(model) for p in h.adapters.parameters()])
    for one, two, exact in zip(*found, strict=True):
        assert one.abs().max() > 0
        within(one, two, exact, "rms")
    codes = {n: t.clone() for n, t in ours.state_dict().items() if n.endswith(".codes")}
    before = tell(ours, ids)
    merge_adapters(ours)
    assert all(h.merged is not None for _, h in adapted_modules(ours))
    within(*(tell(model, ids) for model in models), "rms")
    unmerge_adapters(ours)
    assert torch.equal(tell(ours, ids), before)
    assert codes
    assert all(torch.equal(ours.state_dict()[name], code) for name, code in codes.items())
    for _, host in adapted_modules(ours):
        assert isinstance(host.base, NF4Linear | NF4Experts | Router)
