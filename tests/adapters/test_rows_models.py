"""Rows that name their adapters in whole models: generation, compilation, copies."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    PromptTuningConfig,
    adapted_modules,
    adapter_rows,
    add_adapter,
    disable_adapters,
    set_adapters,
)
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.generate import generate_ids
from lora_core.quant import quantize_model

Shake = Callable[..., None]
ROWS = ["a", None, "b", "a"]
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture(params=["dense", "4-bit"])
def model(request: pytest.FixtureRequest, shake: Shake) -> nn.Module:
    """A decoder with the adapters "a" and "b"."""
    torch.manual_seed(0)
    made = CausalLM(ModelConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    made.init_weights(0.2)
    if request.param == "4-bit":
        quantize_model(made)
    add_adapter(made, LoRAConfig(r=4), "a")
    add_adapter(made, LoRAConfig(r=2, targets=["q_proj", "down_proj", "embed_tokens"]), "b")
    shake(made, 0.1)
    return made.eval()


def test_generation_of_a_mixed_batch_is_that_of_its_rows(model: nn.Module) -> None:
    ids = torch.randint(1, 61, (4, 6))
    mask = torch.ones_like(ids)
    mask[2, :3] = 0  # a shorter prompt, padded on the left
    with adapter_rows(model, ROWS):
        together = generate_ids(model, ids, mask, max_new_tokens=8)
    alone = []
    for row, name in enumerate(ROWS):
        set_adapters(model, [] if name is None else name)
        one = slice(row, row + 1)
        alone += generate_ids(model, ids[one][mask[one] > 0][None], max_new_tokens=8)
    assert together == alone
    with disable_adapters(model):
        assert together[0] != generate_ids(model, ids[:1], max_new_tokens=8)[0]


def test_a_compiled_model_does_not_depend_on_the_names(mlp: nn.Module, shake: Shake) -> None:
    names = "cdefgi"
    for r, name in enumerate(names, start=1):
        add_adapter(mlp, LoRAConfig(r=r), name)
    shake(mlp)
    mlp.eval()
    x = torch.randn(6, 12)
    torch.compiler.reset()
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    first: list[str | None] = ["c", "d", None, "i", "f", "g"]
    with torch.no_grad():
        with adapter_rows(mlp, first):
            compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for rows in (
                ["i", "d", "c", "f", None, "g"],
                [None, "i", "g", "f", "d", "c"],
                ["e", "d", None, "i", "f", "g"],
            ):
                with adapter_rows(mlp, rows):
                    assert torch.equal(compiled(x), mlp(x))

    set_adapters(mlp, list(names), trainable=True)
    parameters = [p for p in mlp.parameters() if p.requires_grad]

    def gradients(run: Callable[[Tensor], Tensor], rows: list[str | None]) -> list[Tensor | None]:
        with adapter_rows(mlp, rows):
            return list(torch.autograd.grad(run(x).sum(), parameters, allow_unused=True))

    gradients(compiled, first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (["i", "d", "c", "f", None, "g"], [None, "i", "g", "f", "d", "c"]):
            for got, wanted in zip(gradients(compiled, rows), gradients(mlp, rows), strict=True):
                assert (got is None) == (wanted is None)
                assert got is None or wanted is None or torch.equal(got, wanted)


def test_copies_and_pickles_of_a_model_that_was_mixed(model: nn.Module) -> None:
    ids = torch.randint(1, 61, (4, 5))
    with torch.no_grad(), adapter_rows(model, ROWS):
        y = model(ids).logits
        twin = copy.deepcopy(model)  # with the context's rows in it
        assert torch.equal(twin(ids).logits, y)
    again = pickle.loads(pickle.dumps(model))
    assert all(host.mixture is None for _, host in adapted_modules(again))
    with torch.no_grad(), adapter_rows(again, ROWS):
        assert torch.equal(again(ids).logits, y)


def test_soft_prompts_are_refused_in_rows_and_rest_beside_them(model: nn.Module) -> None:
    ids = torch.randint(1, 61, (4, 5))
    with torch.no_grad(), adapter_rows(model, ROWS):
        y = model(ids).logits
    add_adapter(model, PromptTuningConfig(num_virtual_tokens=3), "soft")
    with torch.no_grad(), adapter_rows(model, ROWS):  # active, but no row names it
        assert torch.equal(model(ids).logits, y)
    with (
        pytest.raises(ValueError, match="rows of a batch cannot name 'soft': it has a Prompt"),
        adapter_rows(model, ["soft", "a"]),
    ):
        pass
