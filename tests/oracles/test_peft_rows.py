"""PEFT's mixed batches and weighted combinations beside ours: the same weights in, the same out."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    adapted_modules,
    adapter_rows,
    add_adapter,
    combine_adapters,
    set_adapters,
)
from lora_core.checkpoint import save_adapter
from lora_core.models.generate import generate_ids

pytestmark = pytest.mark.oracle

ROWS = ["a", None, "c", "b", "a", None]
CONFIGS = {
    "a": LoRAConfig(r=4, alpha=8),
    "b": LoRAConfig(r=2, alpha=6, targets=["q_proj", "down_proj"]),
    "c": LoRAConfig(r=8, alpha=4, use_rslora=True),
}


@pytest.fixture(scope="module")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


@pytest.fixture(scope="module")
def base(small_peer: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return small_peer("llama", initializer_range=0.2, pad_token_id=0)


@pytest.fixture
def ours(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)
    for name, config in CONFIGS.items():
        add_adapter(model, config, name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for p in host.adapters.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture
def theirs(base: nn.Module, ours: nn.Module, peft: ModuleType, tmp_path: Path) -> Any:
    model: Any = None
    for name in CONFIGS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_adapter(ours, tmp_path / name, name)
        if model is None:
            start = copy.deepcopy(base)
            model = peft.PeftModel.from_pretrained(start, tmp_path / name, adapter_name=name)
        else:
            model.load_adapter(tmp_path / name, name)
    return model.eval()


def tell(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def bound(model: nn.Module, ids: Tensor, names: list[str | None]) -> tuple[Tensor, float]:
    """The truth, row by row in float64, and twice the error of float32, plus two roundings."""
    found = []
    for net in (model, copy.deepcopy(model).double()):
        rows = []
        for row, name in enumerate(names):
            set_adapters(net, [] if name is None else name)
            rows.append(tell(net, ids[row : row + 1]))
        found.append(torch.cat(rows).double())
    alone, truth = found
    eps = torch.finfo(torch.float32).eps
    error = (alone - truth).abs().max().item()
    return truth, 2 * error + 2 * eps * truth.abs().max().item()


def test_mixed_batches_agree(ours: nn.Module, theirs: Any) -> None:
    ids = torch.randint(1, 64, (6, 9))
    with adapter_rows(ours, ROWS):
        here = tell(ours, ids)
    there = tell(theirs, ids, adapter_names=[name or "__base__" for name in ROWS])
    truth, allowed = bound(ours, ids, ROWS)
    assert (here.double() - truth).abs().max().item() <= allowed
    assert (there.double() - truth).abs().max().item() <= allowed


def test_rows_of_a_transformers_model_generate_and_train(ours: nn.Module) -> None:
    ids = torch.randint(1, 64, (6, 5))
    with adapter_rows(ours, ROWS):
        together = generate_ids(ours, ids, max_new_tokens=6)
        own = ours.generate(ids, max_new_tokens=6, do_sample=False)[:, 5:]
    alone = []
    for row, name in enumerate(ROWS):
        set_adapters(ours, [] if name is None else name)
        alone += generate_ids(ours, ids[row : row + 1], max_new_tokens=6)
    assert together == alone == own.tolist()

    set_adapters(ours, list(CONFIGS), trainable=True)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = {}
    for kind in ("kept", "recomputed"):
        ours.train(kind == "recomputed")  # layers are recomputed in training alone
        with adapter_rows(ours, ROWS):
            ours(input_ids=ids, labels=ids).loss.backward()
        found[kind] = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
        ours.zero_grad()
    assert found["kept"].keys() == found["recomputed"].keys()
    assert {n.split(".")[-2] for n in found["kept"]} == {"a", "b", "c"}
    assert all(torch.equal(g, found["recomputed"][n]) for n, g in found["kept"].items())


def test_another_batch_size_is_told(ours: nn.Module) -> None:
    message = r"names adapters for 6 rows, but the input of 'model.layers.0.self_attn.q_proj' has"
    with pytest.raises(ValueError, match=message), adapter_rows(ours, ROWS):
        ours.generate(torch.ones(6, 2, dtype=torch.int64), num_beams=2, max_new_tokens=2)


def their_delta(model: Any, name: str, site: str) -> Tensor:
    module = model.get_submodule(f"base_model.model.{site}")
    return module.get_delta_weight(name).detach().double()


def our_delta(model: nn.Module, name: str, site: str) -> Tensor:
    return dict(adapted_modules(model))[site].adapter(name).delta_weight(torch.float64)


SITE = "model.layers.0.self_attn.q_proj"


def test_concatenation_and_svd_agree(ours: nn.Module, theirs: Any) -> None:
    """Without rsLoRA, and at sites that all adapters have, where PEFT's are right."""
    names, weights = ["a", "b"], [0.75, 1.5]
    for there, method, options in (
        ("cat", "exact", {}),
        ("svd", "svd", {"rank": 4}),
    ):
        theirs.add_weighted_adapter(
            names, weights, f"their_{there}", combination_type=there, svd_rank=4
        )
        report = combine_adapters(ours, names, weights, method, f"our_{method}", **options)
        here = our_delta(ours, f"our_{method}", SITE)
        peer = their_delta(theirs, f"their_{there}", SITE)
        size = sum(w * our_delta(ours, n, SITE).norm() for n, w in zip(names, weights, strict=True))
        assert (here - peer).norm() <= 1e-5 * size
        assert report.layers[0].rank == (6 if method == "exact" else 4)


def test_rslora_is_scaled_once(ours: nn.Module, theirs: Any) -> None:
    """PEFT's combination of an rsLoRA adapter is sqrt(r) too large; ours is the weighted sum."""
    wanted = our_delta(ours, "c", SITE)
    combine_adapters(ours, ["c"], [1.0])
    assert (our_delta(ours, "combined", SITE) - wanted).norm() <= 1e-6 * wanted.norm()
    combine_adapters(ours, ["c"], [1.0], "svd", "by_svd")
    assert (our_delta(ours, "by_svd", SITE) - wanted).norm() <= 1e-6 * wanted.norm()
    theirs.add_weighted_adapter(["c"], [1.0], "cat", combination_type="cat")
    ratio = their_delta(theirs, "cat", SITE).norm() / wanted.norm()
    assert ratio.item() == pytest.approx(8**0.5, rel=1e-4)  # their fault, while it is there


def test_their_linear_has_cross_terms(ours: nn.Module, theirs: Any) -> None:
    """Why no method here is called linear."""
    wanted = our_delta(ours, "a", SITE) + our_delta(ours, "a", SITE)
    # the same adapter twice, once with the signs of A and B turned: the sum is 2 ΔW
    turned = copy.deepcopy(theirs.peft_config["a"])
    theirs.add_adapter("turned", turned)
    for _, module in theirs.named_modules():
        if hasattr(module, "lora_A") and "a" in module.lora_A:
            for factors in (module.lora_A, module.lora_B):
                factors["turned"].weight.data = -factors["a"].weight.data
    theirs.add_weighted_adapter(["a", "turned"], [1.0, 1.0], "lin", combination_type="linear")
    assert their_delta(theirs, "lin", SITE).norm() < 1e-6 * wanted.norm()  # all of it is gone
