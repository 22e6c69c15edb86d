"""Trainable rows of embedding and head, and a vocabulary that grows."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    adapted_modules,
    add_adapter,
    disable_adapters,
    grow_vocabulary,
    merge_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.checkpoint import adapter_state_dict, load_adapter, read_adapter, save_adapter
from lora_core.models import CausalLM, ModelConfig

Make = Callable[[bool], nn.Module]
Same = Callable[[Tensor, Tensor], bool]
Shake = Callable[..., None]
U = torch.finfo(torch.float32).eps / 2
LORA = {"r": 2, "targets": ["mix"]}


def by_hand(model: nn.Module, adapted: nn.Module, ids: list[int]) -> nn.Module:
    """A copy of the plain model with the rows written into its weights, and LoRA merged."""
    dense = copy.deepcopy(model)
    rows = adapted.embed.adapter("default").rows.detach()
    pair = adapted.mix.adapter("default")
    with torch.no_grad():
        dense.embed.weight[ids] = rows.to(dense.embed.weight.dtype)
        dense.mix.weight += pair.delta_weight()
    return dense


@pytest.mark.parametrize("tied", [False, True])
def test_rows_replace_the_frozen_ones(
    tied: bool, make_token_model: Make, shake: Shake, same_bits: Same
) -> None:
    base = make_token_model(tied)
    model, everything = copy.deepcopy(base), torch.arange(11)
    report = add_adapter(model, LoRAConfig(**LORA, trainable_token_indices=[9, 2]))
    assert set(report.sites) == ({"mix", "embed", "head"} if tied else {"mix", "embed"})
    assert report.parameters == 2 * (6 + 6) + 2 * 6
    shake(model)
    expected = by_hand(base, model, [9, 2])(everything)
    assert (model(everything) - expected).abs().max() <= 40 * U * expected.abs().max().clamp(min=1)
    with disable_adapters(model):
        assert same_bits(model(everything), base(everything))


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_named_rows_learn(tied: bool, make_token_model: Make) -> None:
    model = make_token_model(tied)
    add_adapter(model, LoRAConfig(**LORA, trainable_token_indices=[1, 3]))
    model(torch.tensor([1, 5, 5])).square().sum().backward()
    rows = model.embed.adapter("default").rows
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "embed.adapters.default.rows",
        "mix.adapters.default.A",
        "mix.adapters.default.B",
    }
    assert rows.grad[0].any()
    assert rows.grad[1].any() == tied  # id 3 is not in the input, but the head predicts it
    if tied:
        assert model.head.adapter("default").rows is rows


@pytest.mark.parametrize("tied", [False, True])
def test_merging_writes_the_rows_and_keeps_the_tie(
    tied: bool, make_token_model: Make, shake: Shake, same_bits: Same
) -> None:
    model, ids = make_token_model(tied), torch.arange(11)
    add_adapter(model, LoRAConfig(**LORA, trainable_token_indices=[0, 7]))
    shake(model)
    y = model(ids)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = model.embed.adapter("default").rows
    merge_adapters(model)
    assert (model(ids) - y).abs().max() <= 40 * U * y.abs().max().clamp(min=1)
    assert same_bits(model.embed.merged.module.weight[[0, 7]], rows)
    unmerge_adapters(model)
    assert same_bits(model(ids), y)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    unload_adapters(model, merge=True)
    assert (model.head.weight is model.embed.weight) == tied
    assert type(model.embed) is nn.Embedding
    assert (model(ids) - y).abs().max() <= 40 * U * y.abs().max().clamp(min=1)


def test_untied_head_rows_and_bias(make_token_model: Make, shake: Shake) -> None:
    base, ids = make_token_model(False), torch.arange(11)
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(**LORA, trainable_token_indices={"embed": [1], "head": [4, 2]}))
    shake(model)
    dense = by_hand(base, model, [1])
    dense.head.weight.data[[4, 2]] = model.head.adapter("default").rows.detach()
    expected = dense(ids)
    assert (model(ids) - expected).abs().max() <= 40 * U * expected.abs().max().clamp(min=1)
    assert [len(h.adapter("default").tensors()) for _, h in adapted_modules(model)] == [1, 2, 1]


def test_scaled_embeddings_and_low_precision(shake: Shake, same_bits: Same) -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    model = nn.Sequential(Scaled(7, 4), nn.Linear(4, 4)).bfloat16()
    ids = torch.arange(7)
    start = model[0](ids)
    config = LoRAConfig(r=2, targets=["1"], trainable_token_indices={"0": [3]})
    add_adapter(model, config)
    assert same_bits(model[0](ids), start)
    assert model[0].adapter("default").rows.dtype == torch.float32
    shake(model)
    y = model[0](ids)
    merge_adapters(model)
    assert (model[0](ids) - y).abs().max() <= torch.finfo(torch.bfloat16).eps * y.abs().max()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([11], r"id 11 is not in the 11 rows of 'embed'; call grow_vocabulary\(model, 12\) first"),
        ([-1], "id -1 is not in the 11 rows"),
        ([1, 1], r"ids must be distinct and some, got \[1, 1\]"),
        ([], "ids must be distinct and some"),
        (
            {"embd": [1]},
            "trainable_token_indices: 'embd' matches no module; nearest names: 'embed'",
        ),
        ({"embed": [1], "head": [2]}, "is tied to another module named there"),
    ],
)
def test_wrong_ids_are_named(indices: object, message: str, make_token_model: Make) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapter(make_token_model(True), LoRAConfig(**LORA, trainable_token_indices=indices))


def test_other_refusals(make_token_model: Make, mlp: nn.Module) -> None:
    both = LoRAConfig(r=2, targets=["head"], trainable_token_indices={"head": [1]})
    with pytest.raises(ValueError, match="'head' is both a target and tied to"):
        add_adapter(make_token_model(False), both)
    with pytest.raises(ValueError, match=r"no get_input_embeddings\(\); name the module"):
        add_adapter(mlp, LoRAConfig(trainable_token_indices=[1]))
    twice = LoRAConfig(targets=["inp"], trainable_token_indices={r"0": [1], "inp": [2]})
    with pytest.raises(ValueError, match="'inp' is both a target"):
        add_adapter(mlp, twice)
    same_end = nn.ModuleDict({"a": nn.ModuleDict({"e": nn.Embedding(3, 2), "l": nn.Linear(2, 2)})})
    same_end["b"] = nn.ModuleDict({"e": nn.Embedding(3, 2)})
    with pytest.raises(ValueError, match=r"'e' matches \['a.e', 'b.e'\]; name one module"):
        add_adapter(same_end, LoRAConfig(trainable_token_indices={"e": [1]}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_grows_by_mean_rows(
    tied: bool, dtype: torch.dtype, make_token_model: Make, same_bits: Same
) -> None:
    model = make_token_model(tied).to(dtype)
    model.embed.weight.requires_grad_(False)
    old, ids = copy.deepcopy(model), torch.arange(11)
    y = model.mix(model.embed(ids))
    grow_vocabulary(model, 11)
    assert model.embed.weight.shape == (11, 6)
    grow_vocabulary(model, 14)
    assert (model.head.weight is model.embed.weight) == tied
    assert model.config.vocab_size == model.vocab_size == 14
    assert (model.embed.num_embeddings, model.head.out_features) == (14, 14)
    assert same_bits(model.mix(model.embed(ids)), y)
    for part, before in ((model.embed, old.embed), (model.head, old.head)):
        mean = before.weight.float().mean(0).to(dtype)
        assert same_bits(part.weight[:11], before.weight)
        assert all(same_bits(row, mean) for row in part.weight[11:])
    assert not model.embed.weight.requires_grad
    if not tied:
        assert same_bits(model.head.bias[13], old.head.bias.float().mean(0).to(dtype))
    assert model(torch.tensor([13])).shape == (1, 14)


def test_growing_refuses_what_it_cannot_do(make_token_model: Make, mlp: nn.Module) -> None:
    model = make_token_model(True)
    with pytest.raises(
        ValueError, match=r"the model has 11 rows .* it can only grow, and not to 3"
    ):
        grow_vocabulary(model, 3)
    with pytest.raises(ValueError, match=r"the model has no get_input_embeddings\(\)"):
        grow_vocabulary(mlp, 30)
    add_adapter(model, LoRAConfig(**LORA, trainable_token_indices=[1]))
    with pytest.raises(ValueError, match="grow before adding adapters or quantizing the head"):
        grow_vocabulary(model, 30)


@pytest.mark.parametrize("tied", [False, True])
def test_the_librarys_decoder_grows_and_trains_its_new_rows(tied: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = ModelConfig(vocab_size=20, num_attention_heads=2, tie_word_embeddings=tied, **sizes)
    model = CausalLM(config)
    model.init_weights()
    ids = torch.arange(20)[None]
    y = model(ids, output_hidden_states=True).hidden_states[-1]
    grow_vocabulary(model, 23)
    assert model.config.vocab_size == 23
    out = model(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], y)
    assert out.logits.shape == (1, 20, 23)
    indices = [20, 21, 22] if tied else {"embed_tokens": [20, 21], "lm_head": [20, 21]}
    add_adapter(model, LoRAConfig(r=2, trainable_token_indices=indices))
    new = torch.tensor([[20, 3, 21, 5]])
    model(new, labels=new).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_a_tied_head_shares_are_saved_once(tied: bool, make_token_model: Make) -> None:
    model = make_token_model(tied)
    sites = ["embed"] if tied else ["embed", "head"]
    add_adapter(model, LoRAConfig(r=1, trainable_token_indices={site: [3, 5] for site in sites}))
    rows = [key for key in adapter_state_dict(model) if key.endswith("trainable_tokens_delta")]
    assert rows == [
        f"base_model.model.{site}.token_adapter.trainable_tokens_delta" for site in sites
    ]


@pytest.mark.parametrize("named", ["head", "embed"])
def test_rows_of_a_tied_head_are_the_embeddings(
    named: str, make_token_model: Make, shake: Shake, same_bits: Same, tmp_path: Path
) -> None:
    """PEFT takes an embedding's rows for the head's too, not the other way round."""
    base = make_token_model(True)
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(**LORA, trainable_token_indices={named: [3, 5]}))
    shake(model)
    save_adapter(model, tmp_path)
    record, tensors = read_adapter(tmp_path)
    assert record["trainable_token_indices"] == {"embed": [3, 5]}
    again, ids = copy.deepcopy(base), torch.arange(11)
    load_adapter(again, tmp_path)
    assert same_bits(again(ids), model(ids))
    # a file of PEFT's that trains the head's rows alone
    key = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    tensors[key.format("head")] = tensors.pop(key.format("embed"))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="token rows of 'head' alone, whose weight is the embedd"):
        load_adapter(base, tmp_path)
    assert not list(adapted_modules(base))
