"""Soft prompts on disk: both files, the network beside them, training that goes on, bad folders."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.adapters import (
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    adapted_modules,
    add_adapter,
    delete_adapter,
    set_adapters,
)
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter
from lora_core.models import CausalLM, ModelConfig

P = 3
KINDS = {
    "prompt": PromptTuningConfig(P),
    "mlp": PTuningConfig(P, hidden=5),
    "lstm": PTuningConfig(P, "lstm", hidden=5, dropout=0.2),
    "prefix": PrefixTuningConfig(P, projection=False, std=1.0),
    "network": PrefixTuningConfig(P, hidden=5),
}
ENCODED = ["mlp", "lstm", "network"]
FILES = {"adapter_config.json", "adapter_model.safetensors"}
FURTHER = "reparametrization.safetensors"


def decoder(**changes: Any) -> CausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{"vocab_size": 97, **sizes, **heads, **ends, **changes}))
    model.init_weights(0.1)
    return model.eval()


IDS = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, times: int) -> None:
    """Plain gradient descent, dropout drawn from the step's number."""
    model.train()
    for number in range(times):
        torch.manual_seed(number)
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for p in trained(model).values():
                p.sub_(p.grad, alpha=0.1)
                p.grad = None
    model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    straight = decoder()
    add_adapter(straight, KINDS[kind])
    step(straight, 2)
    save_adapter(straight, tmp_path)
    assert straight.training is False
    resumed = decoder()
    report = load_adapter(resumed, tmp_path, "again", trainable=True)
    assert (
        report.parameters == report.trainable == sum(p.numel() for p in trained(straight).values())
    )
    step(straight, 2)
    step(resumed, 2)
    a, b = trained(straight), trained(resumed)
    assert [k.replace("default", "again") for k in a] == list(b)
    assert all(torch.equal(p, q) for p, q in zip(a.values(), b.values(), strict=True))
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            adapter_state_dict(straight).values(),
            adapter_state_dict(resumed, "again").values(),
            strict=True,
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_loaded_for_use_is_flat(kind: str, tmp_path: Path) -> None:
    model = decoder()
    add_adapter(model, KINDS[kind])
    save_adapter(model, tmp_path, base_model="somewhere")
    further = {FURTHER} if kind in ENCODED else set()
    assert {f.name for f in tmp_path.iterdir()} == FILES | further
    flat = load_file(tmp_path / "adapter_model.safetensors")
    assert list(flat) == ["prompt_embeddings"]
    width = 2 * 2 * 2 * 8 if kind in ("prefix", "network") else 32
    assert flat["prompt_embeddings"].shape == (P, width)
    held = adapter_state_dict(model)["prompt_embeddings"]
    assert torch.equal(flat["prompt_embeddings"], held)
    loaded = decoder()
    report = load_adapter(loaded, tmp_path)
    assert (report.parameters, report.trainable) == (P * width, 0)
    assert torch.equal(adapter_state_dict(loaded)["prompt_embeddings"], held)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    # written again it is flat, and an old network is taken away
    save_adapter(loaded, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == FILES
    again = decoder()
    load_adapter(again, tmp_path, trainable=True)
    assert sum(p.numel() for p in trained(again).values()) == P * width
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (
            PromptTuningConfig(P, "random"),
            {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": 32},
        ),
        (PromptTuningConfig(P), {"prompt_tuning_init": "SAMPLE_VOCAB"}),
        (
            PromptTuningConfig(P, "text", "some text", token_ids=(4,)),
            {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "some text",
                "tokenizer_name_or_path": "the/base",
            },
        ),
        (
            PTuningConfig(P, "lstm", 5, 2, 0.25),
            {
                "peft_type": "P_TUNING",
                "encoder_reparameterization_type": "LSTM",
                "encoder_hidden_size": 5,
                "encoder_num_layers": 2,
                "encoder_dropout": 0.25,
                "num_attention_heads": 4,
            },
        ),
        (
            PrefixTuningConfig(P, init="zeros"),
            {
                "peft_type": "PREFIX_TUNING",
                "prefix_projection": True,
                "encoder_hidden_size": 512,
                "init_weights": "zero",
                "token_dim": 16,
                "num_attention_heads": 2,
                "num_layers": 2,
            },
        ),
        (
            PrefixTuningConfig(P, projection=False),
            {"prefix_projection": False, "encoder_hidden_size": None, "init_weights": None},
        ),
    ],
)
def test_the_configuration_is_pefts_and_comes_back(
    config: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = decoder()
    add_adapter(model, config)
    save_adapter(model, tmp_path, base_model="the/base")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    common = {
        "base_model_name_or_path": "the/base",
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": P,
        "task_type": "CAUSAL_LM",
    }
    assert common | fields == {k: written[k] for k in common | fields}
    loaded = decoder()
    load_adapter(loaded, tmp_path)
    back = next(iter(adapted_modules(loaded)))[1].adapter("default").config
    wanted = config
    if isinstance(config, PrefixTuningConfig) and config.projection:
        wanted = PrefixTuningConfig(P, hidden=512, init=config.init)
    if isinstance(config, PromptTuningConfig) and config.text is not None:
        wanted = PromptTuningConfig(P, "text", config.text)
    assert back == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_saving_in_the_middle_of_training(kind: str, tmp_path: Path) -> None:
    """What is written is what evaluation uses, dropout off, and training goes on."""
    model = decoder()
    add_adapter(model, KINDS[kind])
    quiet = adapter_state_dict(model)["prompt_embeddings"].clone()
    model.train()
    assert torch.equal(adapter_state_dict(model)["prompt_embeddings"], quiet)
    save_adapter(model, tmp_path)
    assert all(module.training for module in model.modules())


def test_several_at_once(tmp_path: Path) -> None:
    model = decoder()
    for kind, config in KINDS.items():
        add_adapter(model, config, kind)
        save_adapter(model, tmp_path / kind, kind)
    loaded = decoder()
    for kind in KINDS:
        load_adapter(loaded, tmp_path / kind, kind)
    with torch.no_grad():
        for names in (["prompt", "network"], ["lstm"], list(KINDS)):
            set_adapters(model, names)
            set_adapters(loaded, names)
            assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    for kind in KINDS:
        delete_adapter(loaded, kind)
    assert not loaded._forward_pre_hooks


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reshape(folder: Path, name: str, **tensors: Tensor | None) -> None:
    """Change, add or (None) take away tensors of a file."""
    held = load_file(folder / name)
    held |= {k.replace("__", "."): v for k, v in tensors.items() if v is not None}
    save_file({k: v for k, v in held.items() if tensors.get(k, v) is not None}, folder / name)


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("mlp", lambda d: edit(d, num_virtual_tokens=4), "must hold 4 rows of floating-point num"),
        ("mlp", lambda d: edit(d, num_virtual_tokens=None), "num_virtual_tokens must be a whole"),
        ("mlp", lambda d: edit(d, num_transformer_submodules=2), "encoder-decoder models are not"),
        ("mlp", lambda d: edit(d, modules_to_save=["lm_head"]), r"here: modules_to_save=\['lm_hea"),
        ("mlp", lambda d: edit(d, encoder_reparameterization_type="GRU"), "encoder must be one of"),
        ("mlp", lambda d: edit(d, encoder_hidden_size=6), FURTHER + r": .* has shape"),
        ("lstm", lambda d: edit(d, encoder_num_layers=3), FURTHER + r": the key .* is missing"),
        ("mlp", lambda d: edit(d, peft_type="CPT"), "peft_type 'CPT' is not supported"),
        (
            "mlp",
            lambda d: reshape(d, "adapter_model.safetensors", more=torch.zeros(2)),
            r"the one key 'prompt_embeddings'; it and the file differ by \['more'\]",
        ),
        (
            "network",
            lambda d: reshape(d, "adapter_model.safetensors", prompt_embeddings=torch.zeros(3, 9)),
            r"has shape \(3, 9\)|does not give the prompt",
        ),
        (
            "prefix",
            lambda d: reshape(d, "adapter_model.safetensors", prompt_embeddings=torch.zeros(3, 9)),
            r"has shape \(3, 9\), the model needs \(3, 64\): the adapter belongs to another base",
        ),
        (
            "mlp",
            lambda d: reshape(d, "adapter_model.safetensors", prompt_embeddings=torch.ones(3, 32)),
            FURTHER + " does not give the prompt in adapter_model.safetensors, which another prog",
        ),
        (
            "mlp",
            lambda d: reshape(d, FURTHER, inputs=torch.zeros(3, 32)),
            FURTHER + " does not give the prompt in adapter_model.safetensors",
        ),
        (
            "mlp",
            lambda d: reshape(d, FURTHER, inputs=torch.full((3, 32), torch.nan)),
            FURTHER + " does not give the prompt in adapter_model.safetensors",
        ),
        ("mlp", lambda d: reshape(d, FURTHER, inputs=None), FURTHER + ": the key 'inputs' is miss"),
    ],
)
def test_folders_that_do_not_fit(
    kind: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    model = decoder()
    add_adapter(model, KINDS[kind])
    save_adapter(model, tmp_path)
    spoil(tmp_path)
    target = decoder()
    before = [(n, id(m)) for n, m in target.named_modules()]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(target, tmp_path, trainable=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert [(n, id(m)) for n, m in target.named_modules()] == before
    assert not target._forward_pre_hooks
    assert all(p.requires_grad for p in target.parameters())


def test_a_prompt_for_another_model_is_refused(tmp_path: Path) -> None:
    model = decoder()
    add_adapter(model, KINDS["network"])
    save_adapter(model, tmp_path)
    for changes in ({"num_hidden_layers": 3}, {"num_key_value_heads": 4}):
        for trainable in (False, True):
            with pytest.raises(ValueError, match="has shape"):
                load_adapter(decoder(**changes), tmp_path, trainable=trainable)


def test_the_network_on_disk_is_named_by_its_formula(tmp_path: Path) -> None:
    model = decoder()
    add_adapter(model, KINDS["network"])
    save_adapter(model, tmp_path)
    held = load_file(tmp_path / FURTHER)
    assert {k: tuple(v.shape) for k, v in held.items()} == {
        "inputs": (P, 32),
        "hidden.weight": (5, 32),
        "hidden.bias": (5,),
        "up.weight": (2 * 2 * 16, 5),
        "up.bias": (2 * 2 * 16,),
    }
    # one network in PEFT's layout gives the whole prompt
    h = torch.tanh(held["inputs"] @ held["hidden.weight"].T + held["hidden.bias"])
    flat = h @ held["up.weight"].T + held["up.bias"]
    wanted = adapter_state_dict(model)["prompt_embeddings"]
    assert torch.allclose(flat, wanted, atol=1e-6 * wanted.abs().max().item(), rtol=0)
    twin = copy.deepcopy(model)
    assert torch.equal(adapter_state_dict(twin)["prompt_embeddings"], wanted)
