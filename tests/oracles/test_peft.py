"""PEFT as the judge: what is saved here PEFT reads with equal outputs, and the other way round."""

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    adapted_modules,
    add_adapter,
    dense_weight,
    grow_vocabulary,
    merge_adapters,
    set_adapters,
)
from lora_core.checkpoint import load_adapter, load_model, save_adapter
from lora_core.quant import quantize_model

pytestmark = pytest.mark.oracle

IDS = torch.tensor([[5, 17, 3, 3, 250, 399, 8, 1], [9, 9, 4, 100, 2, 0, 31, 7]])
HERE = {
    "plain": LoRAConfig(r=4, alpha=8),
    "attention alone": LoRAConfig(r=3, targets=["q_proj", "v_proj"]),
    "one layer by regex": LoRAConfig(r=2, targets=r"model\.layers\.1\..*", init="gaussian"),
    "excluding": LoRAConfig(r=2, exclude=["down_proj", "model.layers.0.self_attn.q_proj"]),
    "rslora": LoRAConfig(r=4, alpha=6, use_rslora=True),
    "patterns": LoRAConfig(
        r=4,
        alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.2\.mlp\.up_proj": 7},
        alpha_pattern={"k_proj": 3, r"model\.layers\.1\..*": 20},
    ),
    "head": LoRAConfig(r=2, targets=["lm_head", "o_proj"]),
    "embedding": LoRAConfig(r=2, targets=["embed_tokens", "q_proj"]),
    "dora": LoRAConfig(r=4, use_dora=True, targets=["embed_tokens", "o_proj", "up_proj"]),
    "pissa": LoRAConfig(r=3, init="pissa", use_rslora=True, targets=["v_proj", "down_proj"]),
    "modules": LoRAConfig(
        r=2, targets=["q_proj"], modules_to_save=["norm", "model.layers.1.self_attn.k_proj"]
    ),
    "tokens": LoRAConfig(r=2, trainable_token_indices=[3, 9, 399]),
    "tokens of the head": LoRAConfig(
        r=2, targets=["q_proj"], trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [4]}
    ),
}
THERE: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "defaults": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
    "excluding": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["layers.0.mlp.up_proj"],
    },
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "rslora": {"r": 5, "use_rslora": True, "target_modules": ["k_proj", "lm_head"]},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp.up_proj": 5},
    },
    "embedding": {"target_modules": ["embed_tokens", "k_proj"], "r": 3},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "dora": {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "use_dora": True},
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "k_proj"]},
    "pissa": {"target_modules": ["up_proj"], "init_lora_weights": "pissa", "lora_alpha": 4},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


@pytest.fixture(scope="module")
def tied_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `llama_folder`, the head tied to the embedding."""
    import transformers

    tied = tmp_path_factory.mktemp("tied")
    config = transformers.LlamaConfig.from_pretrained(llama_folder, tie_word_embeddings=True)
    torch.manual_seed(2)
    transformers.LlamaForCausalLM(config).save_pretrained(tied)
    return tied


@pytest.fixture(params=["lora_core, untied", "transformers, tied"])
def case(
    request: pytest.FixtureRequest, llama_folder: Path, tied_folder: Path
) -> tuple[Path, Callable[[Path], nn.Module], bool]:
    """(folder, how a model to adapt is loaded, whether its head is tied)."""
    if request.param == "lora_core, untied":
        return llama_folder, lambda folder: load_model(folder).eval(), False
    return tied_folder, theirs, True


def theirs(folder: Path) -> nn.Module:
    """The folder as transformers' model."""
    return copy.deepcopy(_theirs(folder))


@functools.cache
def _theirs(folder: Path) -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def shaken(model: nn.Module, scale: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for p in host.adapters.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=scale)
    return model


def tell(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def own_error(model: nn.Module, y: Tensor) -> float:
    """Twice the error of a model's float32 logits y, and two roundings of the largest value."""
    truth = tell(copy.deepcopy(model).double())
    eps = torch.finfo(torch.float32).eps
    return 2 * (y.double() - truth).abs().max().item() + 2 * eps * truth.abs().max().item()


def saved(model: nn.Module, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rank_pattern|use_rslora")
        save_adapter(model, directory, base_model=str(directory))
    return directory


@pytest.mark.parametrize("name", list(HERE))
def test_peft_reads_what_is_written_here(
    name: str,
    case: tuple[Path, Callable[[Path], nn.Module], bool],
    peft: ModuleType,
    tmp_path: Path,
) -> None:
    folder, open_model, tied = case
    ours = open_model(folder)
    plain = tell(ours)
    if tied and name in ("head", "tokens of the head", "embedding", "dora"):
        with pytest.raises(ValueError, match="tied"):
            add_adapter(ours, HERE[name])
        return
    add_adapter(ours, HERE[name])
    y = tell(shaken(ours))
    assert (y - plain).abs().max() > 0.01  # the adapter matters
    read = peft.PeftModel.from_pretrained(theirs(folder), saved(ours, tmp_path / "a")).eval()
    got = tell(read)
    assert (got - y).abs().max() <= own_error(read, got)


@pytest.mark.parametrize("name", list(THERE))
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Model has `tie_word")
def test_what_peft_wrote_is_read_here(
    name: str,
    case: tuple[Path, Callable[[Path], nn.Module], bool],
    peft: ModuleType,
    tmp_path: Path,
) -> None:
    folder, open_model, tied = case
    model = peft.get_peft_model(theirs(folder), peft.LoraConfig(**THERE[name])).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(tmp_path / "b")
    y = tell(model)
    ours = open_model(folder)
    plain = tell(ours)
    if tied and {"lm_head", "embed_tokens"} & set(THERE[name]["target_modules"]):
        with pytest.raises(ValueError, match="tied"):
            load_adapter(ours, tmp_path / "b")
    load_adapter(ours, tmp_path / "b", untie=True)
    assert (y - plain).abs().max() > 0.01
    assert (tell(ours) - y).abs().max() <= own_error(model, y)


@pytest.mark.parametrize("double_quant", [False, True])
def test_qlora_on_dequantized_weights(
    double_quant: bool, llama_folder: Path, peft: ModuleType, tmp_path: Path
) -> None:
    """PEFT, on a transformers model with this library's dequantized weights, gives our output."""
    ours = load_model(llama_folder).eval()
    plain = tell(ours)
    quantize_model(ours, double_quant=double_quant)
    add_adapter(ours, LoRAConfig(r=8, alpha=16))
    y = tell(shaken(ours))
    dense = theirs(llama_folder)
    for name, host in adapted_modules(ours):
        dense.get_submodule(name).weight.data.copy_(dense_weight(host.base))
    read = peft.PeftModel.from_pretrained(dense, saved(ours, tmp_path / "a")).eval()
    got = tell(read)
    assert (got - y).abs().max() <= own_error(read, got)
    # the same as merged: a dense model
    merge_adapters(ours)
    assert (tell(ours) - got).abs().max() <= 2 * own_error(read, got)
    assert (plain - y).abs().max() > 0.01


def test_merging_agrees_with_pefts(llama_folder: Path, peft: ModuleType, tmp_path: Path) -> None:
    ours = theirs(llama_folder)
    add_adapter(ours, LoRAConfig(r=4))
    shaken(ours)
    read = peft.PeftModel.from_pretrained(theirs(llama_folder), saved(ours, tmp_path / "a"))
    merged = read.merge_and_unload()
    merge_adapters(ours)
    eps = torch.finfo(torch.float32).eps
    for name, host in adapted_modules(ours):
        w, expected = host.merged.module.weight, merged.get_submodule(name).weight
        pair = host.adapter("default")
        size = host.base.weight.abs() + pair.scaling * pair.B.abs() @ pair.A.abs()
        assert ((w - expected).abs() <= 2 * (4 + 2) * eps / 2 * size).all()


def test_added_tokens_reach_peft(
    case: tuple[Path, Callable[[Path], nn.Module], bool], peft: ModuleType, tmp_path: Path
) -> None:
    folder, open_model, tied = case
    ours = open_model(folder)
    grow_vocabulary(ours, 403)
    ids = torch.tensor([[400, 5, 402, 401]])
    new = [400, 401, 402]
    indices: Any = new if tied else {"embed_tokens": new, "lm_head": new}
    add_adapter(ours, LoRAConfig(r=2, trainable_token_indices=indices))
    y = tell(shaken(ours), ids)
    dense = theirs(folder)
    dense.resize_token_embeddings(403, mean_resizing=False)
    if tied:
        assert dense.lm_head.weight is dense.model.embed_tokens.weight
    read = peft.PeftModel.from_pretrained(dense, saved(ours, tmp_path / "a")).eval()
    got = tell(read, ids)
    eps = torch.finfo(torch.float32).eps
    assert (got - y).abs().max() <= 64 * eps * got.abs().max()


def test_several_adapters_add_up_as_in_peft(
    llama_folder: Path, peft: ModuleType, tmp_path: Path
) -> None:
    ours = theirs(llama_folder)
    add_adapter(ours, LoRAConfig(r=2, targets=["q_proj", "up_proj"]), "a")
    add_adapter(ours, LoRAConfig(r=3, targets=["q_proj", "v_proj"]), "b")
    shaken(ours)
    for name in "ab":
        save_adapter(ours, tmp_path / name, name)
    set_adapters(ours, ["a", "b"])
    y = tell(ours)
    read = peft.PeftModel.from_pretrained(theirs(llama_folder), tmp_path / "a", adapter_name="a")
    read.load_adapter(tmp_path / "b", adapter_name="b")
    read.base_model.set_adapter(["a", "b"])
    got = tell(read.eval())
    assert (got - y).abs().max() <= own_error(read, got)


@given(
    k=st.integers(1, 33),
    n=st.integers(1, 33),
    r=st.integers(1, 8),
    alpha=st.sampled_from([1, 7, 32]),
    rslora=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_one_layer_in_any_shape(
    k: int,
    n: int,
    r: int,
    alpha: int,
    rslora: bool,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
    peft: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    torch.manual_seed(seed)
    r = min(r, k, n)
    model = nn.Sequential(nn.Linear(k, n, bias=bias)).to(dtype)
    base = copy.deepcopy(model)
    add_adapter(model, LoRAConfig(r=r, alpha=alpha, use_rslora=rslora, targets=["0"]))
    shaken(model, 0.5)
    directory = saved(model, tmp_path_factory.mktemp("one"))
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()
    x = torch.randn(4, k, dtype=dtype)
    pair = model[0].adapter("default")
    W, A, B = (t.detach().double() for t in (base[0].weight, pair.A, pair.B))
    size = x.double().abs() @ W.abs().T + abs(pair.scaling) * (x.double().abs() @ A.abs().T) @ (
        B.abs().T
    )
    size = size + (base[0].bias.double().abs() if bias else 0)
    # roundings a term goes through: K + r + 3 in float32, and six to 16 bits, on either side
    wide, narrow = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    bound = (k + r + 3) * wide + (0 if dtype == torch.float32 else 6 * narrow)
    assert ((read(x).double() - model(x).double()).abs() <= 1.05 * bound * size).all()


@pytest.mark.parametrize("use_dora", [False, True])
def test_gpt2_whose_layers_are_transposed(use_dora: bool, peft: ModuleType, tmp_path: Path) -> None:
    """Conv1D in both directions; `fan_in_fan_out` is written, and passed over when it is read."""
    import transformers

    sizes = {"vocab_size": 90, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ids = IDS % 90
    config = LoRAConfig(r=2, targets=["c_attn", "mlp.c_proj"], use_dora=use_dora, bias="lora_only")
    ours = copy.deepcopy(base)
    add_adapter(ours, config)
    y = tell(shaken(ours), ids)
    assert (y - tell(base, ids)).abs().max() > 0.01
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), saved(ours, tmp_path / "a")).eval()
    assert read.peft_config["default"].fan_in_fan_out
    got = tell(read, ids)
    truth = tell(copy.deepcopy(read).double(), ids)
    bound = 2 * (got - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (y - truth).abs().max() <= bound
    read.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "b")
    assert (tell(again, ids) - truth).abs().max() <= bound


@pytest.mark.parametrize("kind", ["dora", "loftq"])
def test_on_a_4_bit_base(kind: str, llama_folder: Path, peft: ModuleType, tmp_path: Path) -> None:
    """PEFT, on the dequantized weights, gives the output of an adapter on the 4-bit ones."""
    ours = load_model(llama_folder).eval()
    options = {"init": "loftq", "loftq_steps": 2} if kind == "loftq" else {"use_dora": True}
    if kind == "dora":
        quantize_model(ours)
    add_adapter(ours, LoRAConfig(r=4, alpha=6, **options))  # type: ignore[arg-type]
    y = tell(shaken(ours))
    dense = theirs(llama_folder)
    with torch.no_grad():
        for name, host in adapted_modules(ours):
            dense.get_submodule(name).weight.copy_(dense_weight(host.base))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "init='loftq'")
        folder = saved(ours, tmp_path / "a")
    read = peft.PeftModel.from_pretrained(dense, folder).eval()
    got = tell(read)
    assert (got - y).abs().max() <= own_error(read, got)
    if kind == "loftq":  # its base is made again from the 16-bit one
        again = load_model(llama_folder).eval()
        load_adapter(again, folder)
        assert torch.equal(tell(again), y)
