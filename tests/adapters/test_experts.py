"""LoRA on experts: start, definition, targets, several at once, merging, files, messages."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import (
    BottleneckConfig,
    LoRAConfig,
    add_adapter,
    disable_adapters,
    load_adapter,
    merge_adapters,
    quantize_4bit,
    quantize_model,
    save_adapter,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters import adapted_modules
from lora_core.adapters.experts import ExpertLoRA
from lora_core.adapters.rows import adapter_rows
from lora_core.checkpoint.baking import baked
from lora_core.checkpoint.export import export_adapter
from lora_core.checkpoint.peft import read_adapter
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.experts import Experts, NF4Experts
from lora_core.train import TrainConfig, train

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "model_type": "qwen3_moe",
}
SITE = "model.layers.1.mlp.experts"
IDS = torch.tensor([[5, 9, 2, 44, 6, 7], [90, 1, 1, 3, 8, 12]])


@pytest.fixture
def model() -> CausalLM:
    made = CausalLM(ModelConfig(**SIZES))
    made.init_weights(0.2)
    return made.eval()


def experts_of(model: CausalLM, name: str = "default") -> ExpertLoRA:
    adapter = dict(adapted_modules(model))[SITE].adapter(name)
    assert isinstance(adapter, ExpertLoRA)
    return adapter


def shaken(model: CausalLM, config: LoRAConfig, name: str = "default", seed: int = 0) -> CausalLM:
    """The model with an adapter whose numbers matter."""
    add_adapter(model, config, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, host in adapted_modules(model):
            if name in host.adapters:
                for parameter in host.adapter(name).parameters():
                    parameter.normal_(0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_new_one_changes_no_bit_and_is_all_that_is_trained(
    model: CausalLM, four_bit: bool
) -> None:
    if four_bit:
        quantize_model(model)
    before = model(IDS).logits
    report = add_adapter(model, LoRAConfig(r=3, targets=["experts"]))
    assert report.sites == ("model.layers.0.mlp.experts", SITE)
    assert report.parameters == 2 * 4 * 3 * (32 + 48 + 24 + 32)
    assert torch.equal(model(IDS).logits, before)
    model(IDS, labels=IDS).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 2 * 2 * 2
    assert all(".adapters.default." in name for name in grads)


def test_all_linear_means_experts_and_router_too(model: CausalLM) -> None:
    sites = add_adapter(model, LoRAConfig(r=2)).sites
    assert {site.rsplit(".", 1)[-1] for site in sites} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate")
    }
    assert len(sites) == 12


@pytest.mark.parametrize("four_bit", [False, True])
def test_it_is_what_changed_weights_would_give(model: CausalLM, four_bit: bool) -> None:
    """Expert by expert, W + s·B A; for 4 bits, of what the codes stand for."""
    if four_bit:
        quantize_model(model)
    config = LoRAConfig(r=3, alpha=5, targets=["experts"], rank_pattern={"gate_up_proj": 2})
    plain = copy.deepcopy(model)
    shaken(model, config)
    for layer, site in enumerate(("model.layers.0.mlp.experts", SITE)):
        pairs = dict(adapted_modules(model))[site].adapter("default")
        assert isinstance(pairs, ExpertLoRA)
        base = plain.get_submodule(site)
        assert isinstance(base, Experts | NF4Experts)
        dense = base.dense_module()
        for name in ("gate_up_proj", "down_proj"):
            pair = pairs.pair(name)
            assert pair is not None
            assert pair.r == {"gate_up_proj": 2, "down_proj": 3}[name]
            weight = dense.get_parameter(name)
            for expert in range(4):
                weight.data[expert] += 5 / pair.r * pair.B[expert] @ pair.A[expert]
        plain.get_submodule(f"model.layers.{layer}.mlp").experts = dense
    wanted = plain(IDS).logits
    assert (model(IDS).logits - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    report = merge_adapters(model)
    assert (model(IDS).logits - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    assert all(layer.kept == pytest.approx(1) for layer in report.layers)


def test_one_parameter_alone_and_a_router_by_its_weight(model: CausalLM) -> None:
    config = LoRAConfig(
        r=2, targets=[], target_parameters=["1.mlp.experts.down_proj", "0.mlp.gate.weight"]
    )
    report = add_adapter(model, config)
    assert report.sites == ("model.layers.0.mlp.gate", SITE)
    assert experts_of(model).pair("gate_up_proj") is None
    assert set(experts_of(model).tensors()) == {"lora_A.weight", "lora_B.weight"}


@pytest.mark.parametrize("targets", [[], ["q_proj"]])
def test_exclude_holds_for_parameters_too(model: CausalLM, targets: list[str]) -> None:
    config = LoRAConfig(
        r=2, targets=targets, target_parameters=["experts.down_proj"], exclude=["0.mlp.experts"]
    )
    sites = add_adapter(model, config).sites
    assert [site for site in sites if site.endswith("experts")] == [SITE]


def test_several_add_up_and_merge_in_part(model: CausalLM) -> None:
    config = LoRAConfig(r=2, targets=["experts"])
    shaken(model, config, "a", 1)
    shaken(model, config, "b", 2)
    set_adapters(model, ["a", "b"])
    both = model(IDS).logits
    with disable_adapters(model):
        base = model(IDS).logits
    size = both.abs().max()
    assert (both - base).abs().max() > 0.01 * size
    merge_adapters(model, ["a"])
    assert (model(IDS).logits - both).abs().max() <= 3e-6 * size
    unmerge_adapters(model)
    assert torch.equal(model(IDS).logits, both)
    merge_adapters(model)
    assert (model(IDS).logits - both).abs().max() <= 3e-6 * size
    unload_adapters(model, merge=True)
    assert (model(IDS).logits - both).abs().max() <= 3e-6 * size
    assert type(model.get_submodule(SITE)) is Experts


def test_a_4_bit_base_comes_back_bit_for_bit(model: CausalLM) -> None:
    quantize_model(model)
    state = copy.deepcopy(model.state_dict())
    before = model(IDS).logits
    shaken(model, LoRAConfig(r=2, targets=["experts"]))
    merge_adapters(model)
    unmerge_adapters(model)
    unload_adapters(model)
    assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("double_quant", [False, True])
def test_requantized_experts_stay_4_bit(model: CausalLM, double_quant: bool) -> None:
    """Each matrix is what `quantize_4bit` makes of the sum; nothing becomes dense in silence."""
    quantize_model(model, code="int4", block_size=32, double_quant=double_quant)
    shaken(model, LoRAConfig(r=2, targets=["experts"]))
    before = model(IDS).logits
    wanted = copy.deepcopy(model)
    merge_adapters(wanted)
    report = merge_adapters(model, requantize=True)
    assert [(layer.requantized, layer.method) for layer in report.layers] == [(True, "plain")] * 2
    assert all(0.8 < layer.kept < 1.2 and 0 < layer.error < 0.5 for layer in report.layers)
    assert not torch.equal(model(IDS).logits, before)
    unmerged = copy.deepcopy(model)
    unmerge_adapters(unmerged)
    assert torch.equal(unmerged(IDS).logits, before)
    unload_adapters(model, merge=True)
    unload_adapters(wanted, merge=True)
    made, dense = model.get_submodule(SITE), wanted.get_submodule(SITE)
    assert isinstance(made, NF4Experts)
    assert isinstance(dense, Experts)
    up = quantize_4bit(dense.gate_up_proj[3, 24:], "int4", 32, double_quant)
    assert torch.equal(made.up_proj[3].packed, up.packed)
    assert torch.equal(made.up_proj[3].scales, up.scales)


def test_dropout_in_training_alone(model: CausalLM) -> None:
    shaken(model, LoRAConfig(r=2, targets=["experts"], dropout=0.5))
    calm = model(IDS).logits
    assert torch.equal(model(IDS).logits, calm)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_in_bfloat16_the_pairs_stay_float32(model: CausalLM) -> None:
    shaken(model, LoRAConfig(r=2, targets=["experts"]))
    exact = model(IDS).logits
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in experts_of(model).parameters())
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("targets", [["experts"], "all-linear"])
def test_saved_and_loaded(model: CausalLM, tmp_path: Path, targets: Any) -> None:
    plain = copy.deepcopy(model)
    config = LoRAConfig(r=2, targets=targets, rank_pattern={"down_proj": 3}, dropout=0.1)
    shaken(model, config)
    with pytest.warns(UserWarning, match="target_parameters") as caught:
        save_adapter(model, tmp_path)
    assert any("lora_dropout" in str(warning.message) for warning in caught)
    shapes = {
        key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    first = f"base_model.model.{SITE}"
    assert shapes[f"{first}.base_layer.lora_A.weight"] == (4 * 2, 32)
    assert shapes[f"{first}.base_layer.lora_B.weight"] == (48, 2 * 4)
    assert shapes[f"{first}.lora_A.weight"] == (4 * 3, 24)
    assert shapes[f"{first}.lora_B.weight"] == (32, 3 * 4)
    load_adapter(plain, tmp_path, trainable=True)
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(plain, tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert all(
        torch.equal(t, again[k])
        for k, t in load_file(tmp_path / "adapter_model.safetensors").items()
    )


def test_the_same_file_serves_a_4_bit_base(model: CausalLM, tmp_path: Path) -> None:
    four_bit = copy.deepcopy(model)
    quantize_model(four_bit)
    shaken(model, LoRAConfig(r=2))
    with pytest.warns(UserWarning, match="target_parameters"):
        save_adapter(model, tmp_path)
    load_adapter(four_bit, tmp_path)
    assert all(map(torch.equal, experts_of(model).parameters(), experts_of(four_bit).parameters()))


def test_files_of_single_experts_are_refused(model: CausalLM, tmp_path: Path) -> None:
    shaken(model, LoRAConfig(r=2, targets=["experts"]))
    with pytest.warns(UserWarning, match="target_parameters"):
        save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state[f"base_model.model.{SITE}.0.gate_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(state, path)
    unload_adapters(model)
    with pytest.raises(
        ValueError, match=r"a pair for each expert's matrix .*before transformers 5"
    ):
        load_adapter(model, tmp_path)


def test_plain_layers_that_peft_would_take_for_experts_are_written_as_parameters(
    tmp_path: Path,
) -> None:
    model = CausalLM(ModelConfig(**SIZES, mlp_only_layers=(0,)))
    shaken(model, LoRAConfig(r=2, targets=["up_proj", "q_proj"], dropout=0.1, use_dora=True))
    with pytest.warns(UserWarning, match="target_parameters") as caught:
        save_adapter(model, tmp_path)
    lines = [str(warning.message) for warning in caught]
    for part in ("takes for an expert's", "lora_dropout with target_p", "use_dora with target_p"):
        assert any(part in line for line in lines)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_parameters"] == ["model.layers.0.mlp.up_proj.weight"]
    assert raw["target_modules"] == ["q_proj"]
    fresh = copy.deepcopy(model)
    unload_adapters(fresh)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(IDS).logits, model.eval()(IDS).logits)


def test_no_baked_form(model: CausalLM, tmp_path: Path) -> None:
    shaken(model, LoRAConfig(r=2, targets=["experts"]))
    with pytest.warns(UserWarning, match="target_parameters"):
        save_adapter(model, tmp_path)
    line = "target_parameters: pairs of stacked experts, .* no exported or baked form"
    with pytest.raises(ValueError, match=line):
        baked(*read_adapter(tmp_path))
    for bake in (False, True):
        with pytest.raises(ValueError, match=line):
            export_adapter(tmp_path, tmp_path / "out", bake=bake)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"use_dora is not there for experts, of which 'model\.layers\.0\.mlp"),
        ({"init": "pissa"}, "init='pissa' is not there for experts"),
        ({"lora_bias": True}, "lora_bias is not there for experts"),
        ({"r": 25}, r"r = 25 is above the size of an expert's matrix in '.*\.down_proj', 24"),
        ({"rank_pattern": {"gate_upproj": 2}}, "rank_pattern: 'gate_upproj' matches no target"),
        (
            {"targets": [], "target_parameters": ["experts.up_proj"]},
            "target_parameters: 'experts.up_proj' matches no parameter; nearest names",
        ),
        ({"targets": []}, "the list is empty"),
    ],
)
def test_messages(model: CausalLM, options: dict[str, Any], message: str) -> None:
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_adapter(model, LoRAConfig(**{"targets": ["experts"], **options}))
    assert list(model.state_dict()) == before


def test_target_parameters_must_be_a_list(model: CausalLM) -> None:
    with pytest.raises(TypeError, match="target_parameters must be a list of names"):
        add_adapter(model, LoRAConfig(target_parameters="experts.down_proj"))  # type: ignore[arg-type]


def test_a_file_s_target_parameters_must_be_a_list(model: CausalLM, tmp_path: Path) -> None:
    shaken(model, LoRAConfig(r=2, targets=["experts"]))
    with pytest.warns(UserWarning, match="target_parameters"):
        save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text()) | {"target_parameters": {"a": 1}}
    path.write_text(json.dumps(raw))
    unload_adapters(model)
    with pytest.raises(ValueError, match="target_parameters must be a list of names"):
        load_adapter(model, tmp_path)


def test_a_bottleneck_behind_a_layer_of_experts(model: CausalLM) -> None:
    """It is as wide as the model, not as the router, the last layer inside."""
    before = model(IDS).logits
    report = add_adapter(model, BottleneckConfig(reduction=4, feed_forward=["mlp"]))
    assert report.sites == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert report.parameters == 2 * (2 * 8 * 32 + 8 + 32)
    assert torch.equal(model(IDS).logits, before)


def test_rows_cannot_name_them(model: CausalLM) -> None:
    shaken(model, LoRAConfig(r=2, targets=["experts"]), "a")
    with (
        pytest.raises(ValueError, match="rows of a batch cannot name 'a': it has a ExpertLoRA"),
        adapter_rows(model, ["a", None]),
    ):
        pass


def test_rows_name_pairs_at_attention_and_router(model: CausalLM) -> None:
    shaken(model, LoRAConfig(r=2, exclude=["experts"]), "a")
    with adapter_rows(model, ["a", None]):
        mixed = model(IDS).logits
    assert torch.allclose(mixed[0], model(IDS).logits[0], atol=1e-5)
    with disable_adapters(model):
        assert torch.allclose(mixed[1], model(IDS).logits[1], atol=1e-5)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    model: CausalLM, tmp_path: Path, four_bit: bool
) -> None:
    if four_bit:
        quantize_model(model)
    rows = [{"input_ids": IDS[n % 2].roll(n).tolist()} for n in range(8)]
    data = [{**row, "labels": row["input_ids"]} for row in rows]

    def run(out: str, **options: Any) -> CausalLM:
        torch.manual_seed(0)
        own = copy.deepcopy(model)
        add_adapter(own, LoRAConfig(r=2, dropout=0.1))
        config = TrainConfig(
            out=tmp_path / out, batch_size=2, lr=1e-2, save_every=1, progress=False
        )
        train(own, data, dataclasses.replace(config, resume="on_step" not in options), **options)
        return own

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    whole = run("whole", on_step=lambda record: None)
    half, parts = run("parts", on_step=stop), run("parts")
    wanted, got, early = (experts_of(each).tensors() for each in (whole, parts, half))
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())
    assert not any(torch.equal(tensor, early[name]) for name, tensor in wanted.items())
