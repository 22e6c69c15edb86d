"""Every mistake gets one line that says what is wrong and what to do, and changes nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    add_adapter,
    delete_adapter,
    merge_adapters,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.prefix import PrefixTuningConfig
from lora_core.adapters.prompt import PromptTuningConfig
from lora_core.adapters.ptuning import PTuningConfig
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter
from lora_core.quant import NF4Linear, quantize_model

Refuses = Callable[..., None]


@pytest.fixture
def refuses(whole_state: Callable) -> Refuses:
    """Check that a call raises one line with all of the words given, and leaves the model alone."""

    def check(model: nn.Module, act: Callable[[nn.Module], Any], *words: str) -> None:
        before = whole_state(model)
        with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
            act(model)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 400, message
        assert not message.endswith((" ", ":", ",")), message
        for word in words:
            assert re.search(word, message), f"{word!r} is not in {message!r}"
        assert whole_state(model) == before

    return check


# config, then what the message must say: the value, the fact, the advice
CONFIGS: dict[str, tuple[Any, list[str]]] = {
    "a name without a match": (
        LoRAConfig(r=2, targets=["inp", "fusd"]),
        ["'fusd'", "matches no module", "nearest names: 'fused'"],
    ),
    "a regex without a match": (
        LoRAConfig(r=2, targets=r"layers\.\d+"),
        [r"layers", "matches no module", "names here"],
    ),
    "half a name": (LoRAConfig(r=2, targets=["used"]), ["'used'", "nearest names: 'fused'"]),
    "no regex": (LoRAConfig(r=2, targets="in(p"), [r"'in\(p'", "no regular expression"]),
    "a module of another kind": (
        LoRAConfig(r=2, targets=["norm"]),
        ["'norm'", "another kind", "LayerNorm"],
    ),
    "no target at all": (LoRAConfig(r=2, targets=[]), ["empty", "all-linear"]),
    "an exclusion without a match": (
        LoRAConfig(r=2, exclude=["hed"]),
        ["exclude", "'hed'", "'head'"],
    ),
    "everything excluded": (
        LoRAConfig(r=2, targets=["inp"], exclude=["inp"]),
        ["nothing is selected", "every match is excluded"],
    ),
    "a rank without a match": (
        LoRAConfig(r=2, rank_pattern={"imp": 1}),
        ["rank_pattern", "'imp'", "nearest names: 'inp'"],
    ),
    "an alpha without a match": (
        LoRAConfig(r=2, alpha_pattern={"fuse": 1}),
        ["alpha_pattern", "'fuse'", "nearest names: 'fused'"],
    ),
    "parts without a match": (
        LoRAConfig(r=2, parts={"qkv": [1, 2]}),
        ["parts", "'qkv'", "matches no target"],
    ),
    "a full copy without a match": (
        LoRAConfig(r=2, modules_to_save=["score"]),
        ["modules_to_save", "'score'", "names here"],
    ),
    "rows without a match": (
        LoRAConfig(r=2, trainable_token_indices={"embed": [1]}),
        ["trainable_token_indices", "'embed'", "names here"],
    ),
    "rows without an embedding": (
        LoRAConfig(r=2, trainable_token_indices=[1]),
        ["get_input_embeddings", "name the module"],
    ),
    "rows beyond the weight": (
        LoRAConfig(r=2, targets=["inp"], trainable_token_indices={"head": [5]}),
        ["id 5", "5 rows of 'head'", "grow_vocabulary"],
    ),
    "a bottleneck without a match": (
        BottleneckConfig(2, feed_forward=["dwon"]),
        ["feed_forward", "'dwon'", "matches no module"],
    ),
    "an unknown family": (BottleneckConfig(2), ["no known family", r"feed_forward=\["]),
    "no unit in the middle": (
        BottleneckConfig(64, feed_forward=["fused"]),
        ["reduction = 64", "dim = 36", "lower it"],
    ),
    "a rank above a layer": (
        LoRAConfig(r=6, targets=["inp", "head"]),
        ["r = 6", "size of 'head', 5 × 18", "lower it with rank_pattern, or exclude"],
    ),
    "a rank above a layer, in a start": (
        LoRAConfig(r=6, targets=["head"], init="pissa"),
        ["r = 6", "size of 'head'", "5"],
    ),
    "parts that do not add up": (
        LoRAConfig(r=2, targets=["fused"], parts={"fused": [10, 10]}),
        [r"\[10, 10\]", "36 outputs"],
    ),
    "a target that is copied whole": (
        LoRAConfig(r=2, targets=["head"], modules_to_save=["head"]),
        ["'head'", "both a target and in modules_to_save", "exclude it"],
    ),
    "a prompt for what reads no text": (
        PromptTuningConfig(2),
        ["get_input_embeddings", "Perceptron"],
    ),
    "a prefix for what has no attention": (
        PrefixTuningConfig(2),
        ["language model", "Perceptron"],
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("others", [False, True], ids=["bare", "beside another"])
def test_configurations(case: str, others: bool, perceptron: nn.Module, refuses: Refuses) -> None:
    config, words = CONFIGS[case]
    if others:
        add_adapter(perceptron, LoRAConfig(r=2, bias="all"), "other")
    refuses(perceptron, lambda m: add_adapter(m, config), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, ["r must be", "at least 1", "0"]),
        ({"r": 2.5}, ["r must be a whole number", "2.5"]),
        ({"alpha": float("inf")}, ["alpha must be a finite", "inf"]),
        ({"dropout": 1.0}, ["dropout", r"\[0, 1\)", "1.0"]),
        ({"init": "eva"}, ["init must be one of", "'pissa'", "'eva'"]),
        ({"bias": "some"}, ["bias must be one of", "'lora_only'", "'some'"]),
        ({"loftq_steps": 0}, ["loftq_steps", "at least 1", "0"]),
        ({"rank_pattern": {"x": 0}}, ["r must be", "0"]),
        ({"alpha_pattern": {"(": 1}}, ["alpha_pattern", "no regular expression"]),
        ({"use_dora": True, "parts": {"x": [1]}}, ["use_dora and parts", "together"]),
    ],
)
def test_values(options: dict[str, Any], words: list[str], perceptron, refuses) -> None:
    refuses(perceptron, lambda m: add_adapter(m, LoRAConfig(**options)), *words)


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="use_dorra"):
        LoRAConfig(use_dorra=True)


def test_layers_of_other_kinds(convnet: nn.Module, refuses: Refuses) -> None:
    def add(**options: Any) -> Callable[[nn.Module], object]:
        return lambda m: add_adapter(m, LoRAConfig(**{"r": 4, "alpha": 8, **options}))

    refuses(convnet, add(targets=["grouped"], r=3), "multiple of the 4 groups", "3")
    refuses(convnet, add(targets=["grouped"], init="pissa"), "'grouped'", "in groups")
    refuses(convnet, add(targets=["pointwise"], parts={"pointwise": [6, 6]}), "linear layer")
    refuses(convnet, add(targets=["stem"], init="loftq"), "'stem'", "Conv2d", "linear")
    refuses(convnet, add(targets=["stem"], init="pissa", alpha=0), "alpha above 0", "'stem'")


def test_what_pytorch_does_not_call(unet: nn.Module, refuses: Refuses) -> None:
    """A weight that is read without its module being called, in other people's attention."""
    unet.attn.other = nn.MultiheadAttention(16, 2)
    words = ("out_proj", "MultiheadAttention", "would do nothing", "Exclude it")
    refuses(unet, lambda m: add_adapter(m, LoRAConfig(r=2, targets=["out_proj"])), *words)
    refuses(unet, lambda m: add_adapter(m, LoRAConfig(r=1)), *words)
    assert add_adapter(unet, LoRAConfig(r=1, exclude=["out_proj"])).sites
    delete_adapter(unet, "default")
    unet.attn.encoder = nn.TransformerEncoderLayer(16, 2, 20)
    add = LoRAConfig(r=1, targets=["linear1"])
    refuses(unet, lambda m: add_adapter(m, add), "linear1", "fast path", "set_fastpath_enabled")


def test_four_bits(perceptron: nn.Module, refuses: Refuses) -> None:
    perceptron.fused = nn.Linear(24, 36)
    quantize_model(perceptron, skip=["inp"])
    assert isinstance(perceptron.fused, NF4Linear)
    copies = LoRAConfig(r=2, targets=["inp"], modules_to_save=["fused"])
    refuses(perceptron, lambda m: add_adapter(m, copies), "NF4Linear", "floating-point")
    start = LoRAConfig(r=2, targets=["fused"], init="loftq")
    refuses(perceptron, lambda m: add_adapter(m, start), "'fused'", "quantize=")
    rows = LoRAConfig(r=2, targets=["inp"], trainable_token_indices={"fused": [1]})
    refuses(perceptron, lambda m: add_adapter(m, rows), "'fused'", "floating-point")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "type", "training", 3, None])
def test_names_that_cannot_be_used(name: Any, perceptron: nn.Module, refuses: Refuses) -> None:
    words = (re.escape(repr(name)), "cannot name an adapter", "without dots")
    refuses(perceptron, lambda m: add_adapter(m, LoRAConfig(r=1), name), *words)


def test_names_taken_and_unknown(perceptron: nn.Module, refuses: Refuses, tmp_path: Path) -> None:
    add_adapter(perceptron, LoRAConfig(r=2), "first")
    save_adapter(perceptron, tmp_path, "first")
    taken = ("'first' is taken", "delete_adapter", "choose another")
    refuses(perceptron, lambda m: add_adapter(m, LoRAConfig(r=2), "first"), *taken)
    refuses(perceptron, lambda m: load_adapter(m, tmp_path, "first"), "'first'", "taken")
    unknown = ("no adapter 'frist'", "nearest names: 'first'")
    for act in (
        lambda m: set_adapters(m, "frist"),
        lambda m: set_adapters(m, ["first", "frist"]),
        lambda m: delete_adapter(m, "frist"),
        lambda m: merge_adapters(m, "frist"),
        lambda m: adapter_state_dict(m, "frist"),
        lambda m: save_adapter(m, tmp_path / "no", "frist"),
    ):
        refuses(perceptron, act, *unknown)
    assert not (tmp_path / "no").exists()
    refuses(perceptron, lambda m: set_adapters(m, ["first", "first"]), "named once each", "first")


def test_company_that_cannot_be(perceptron: nn.Module, refuses: Refuses) -> None:
    add_adapter(perceptron, LoRAConfig(r=2), "plain")
    add_adapter(perceptron, LoRAConfig(r=2, use_dora=True), "dora")
    both = ("'plain', 'dora'", "cannot be active together", "'inp'")
    refuses(perceptron, lambda m: set_adapters(m, ["plain", "dora"]), *both)


def test_merges_that_cannot_be(perceptron: nn.Module, refuses: Refuses) -> None:
    refuses(perceptron, merge_adapters, "nothing to merge")
    refuses(perceptron, unmerge_adapters, "nothing is merged")
    add_adapter(perceptron, BottleneckConfig(4, feed_forward=["fused"]), "bent")
    refuses(perceptron, merge_adapters, "'bent' at 'fused'", "cannot be merged", "non-linearity")
    add_adapter(perceptron, LoRAConfig(r=2), "straight")
    perceptron.fused.adapters["straight"].B.data.fill_(1e6)
    not_active = ("'bent'", "not active", "set_adapters first")
    refuses(perceptron, lambda m: merge_adapters(m, ["straight", "bent"]), *not_active)
    narrow = ("'fused'", "not finite in torch.float16", "too narrow")
    refuses(perceptron, lambda m: merge_adapters(m, dtype=torch.float16), *narrow)
    no_float = ("floating-point dtype", "torch.int8")
    refuses(perceptron, lambda m: merge_adapters(m, dtype=torch.int8), *no_float)
    four = ("requantize=True", "none of the layers", "4-bit")
    refuses(perceptron, lambda m: merge_adapters(m, requantize=True), *four)
    set_adapters(perceptron, ["straight", "bent"])
    refuses(perceptron, merge_adapters, "'bent'", "cannot be merged")
    set_adapters(perceptron, [])
    refuses(perceptron, merge_adapters, "no adapter is active")
    set_adapters(perceptron, "straight")
    merge_adapters(perceptron)
    first = ("merged", "unmerge_adapters")
    refuses(perceptron, merge_adapters, "merged already", *first)
    refuses(perceptron, lambda m: set_adapters(m, "bent"), *first)
    refuses(perceptron, lambda m: delete_adapter(m, "bent"), *first)
    refuses(perceptron, lambda m: add_adapter(m, LoRAConfig(r=2)), *first)
    refuses(perceptron.fused, unload_adapters, "itself a host", r"\.base")


# --- files ---


def edited(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_for_another_model(
    perceptron: nn.Module, unet: nn.Module, refuses: Refuses, tmp_path: Path
) -> None:
    for i, config in enumerate(
        (
            LoRAConfig(r=2, targets=["inp"]),
            LoRAConfig(r=2, targets=["inp"], use_dora=True, modules_to_save=["head"]),
            BottleneckConfig(2, feed_forward=["inp"]),
        )
    ):
        add_adapter(perceptron, config, "other")
        save_adapter(perceptron, tmp_path / str(i), "other")
        delete_adapter(perceptron, "other")
        refuses(unet, lambda m, i=i: load_adapter(m, tmp_path / str(i)), "'inp'")
    perceptron.inp = nn.Linear(12, 25)  # the name fits, the shape does not
    words = ("inp", r"\(24, 2\)", r"\(25, 2\)")
    refuses(perceptron, lambda m: load_adapter(m, tmp_path / "0"), *words)


def test_files_that_are_not_whole(perceptron: nn.Module, refuses: Refuses, tmp_path: Path) -> None:
    add_adapter(perceptron, LoRAConfig(r=2, alpha=4), "other")
    save_adapter(perceptron, tmp_path, "other")
    delete_adapter(perceptron, "other")
    whole = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.fused.lora_B.weight"

    def load(m: nn.Module) -> object:
        return load_adapter(m, tmp_path)

    def write(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, tmp_path / "adapter_model.safetensors")

    write({k: v for k, v in whole.items() if k != key})
    refuses(perceptron, load, "fused", "lora_B")
    write({**whole, key.replace("fused", "fusion"): whole[key].clone()})
    refuses(perceptron, load, "fusion")
    write({**whole, key: whole[key][1:].contiguous()})
    refuses(perceptron, load, "fused", r"\(35, 2\)", r"\(36, 2\)")
    write(whole)
    edited(tmp_path, r=3)
    refuses(perceptron, load, "rank 3", "fused", "2 rows")
    edited(tmp_path, r=2, peft_type="LOHA")
    refuses(perceptron, load, "LOHA")
    edited(tmp_path, peft_type="LORA", lora_alhpa=3)
    refuses(perceptron, load, "lora_alhpa", "lora_alpha")
    edited(tmp_path, rank_pattern={"imp": 2})
    refuses(perceptron, load)
    (tmp_path / "adapter_config.json").write_text("{")
    refuses(perceptron, load, "adapter_config.json")
    refuses(perceptron, lambda m: load_adapter(m, tmp_path / "nowhere"), "nowhere")


@pytest.mark.oracle
def test_soft_prompts_where_they_cannot_be(bases: Callable, refuses: Refuses) -> None:
    def add(config: Any) -> Callable[[nn.Module], object]:
        return lambda m: add_adapter(m, config)

    for config in (PromptTuningConfig(2), PTuningConfig(2), PrefixTuningConfig(2)):
        refuses(bases("t5"), add(config), "T5ForConditionalGeneration", "decoder", "LoRAConfig")
        refuses(bases("vit"), add(config), "ViTForImageClassification", "inputs_embeds")
    refuses(bases("bert"), add(PrefixTuningConfig(2)), "BertForSequenceClassification", "cache")


@pytest.mark.oracle
def test_experts_that_are_no_modules(bases: Callable, refuses: Refuses) -> None:
    """transformers keeps a layer's experts as two tensors: nothing there can be called."""
    for target in ("gate_up_proj", "experts", r".*experts\.down_proj"):
        config = LoRAConfig(r=2, targets=target if "*" in target else [target])
        words = ("experts|gate_up_proj", "matches (no module|only modules of another kind)")
        refuses(bases("mixtral"), lambda m, c=config: add_adapter(m, c), *words)
