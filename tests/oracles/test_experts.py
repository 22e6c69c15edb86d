"""Mixtures of experts against transformers' Qwen3MoeForCausalLM on the same random weights."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lora_core.checkpoint import load_model, save_model
from lora_core.models import KVCache, generate_ids

pytestmark = pytest.mark.oracle

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalized": {"norm_topk_prob": True, "head_dim": 16},
    "every-second-layer": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "some-layers-dense": {"mlp_only_layers": [0, 2], "tie_word_embeddings": True},
    "one-expert-a-token": {"num_experts_per_tok": 1},
    "all-experts": {"num_experts_per_tok": 8, "hidden_act": "gelu"},
    "window": {"use_sliding_window": True, "sliding_window": 5},
    "biases": {"attention_bias": True},
}


class Triple(NamedTuple):
    """Ours, theirs, theirs in float64, and the folder of theirs."""

    ours: Any
    theirs: Any
    truth: Any
    folder: Path


@pytest.fixture(scope="module")
def transformers(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("transformers")


@pytest.fixture
def make(transformers: ModuleType, tmp_path: Path) -> Callable[..., Triple]:
    def build(**changes: Any) -> Triple:
        torch.manual_seed(3)
        config = transformers.Qwen3MoeConfig(**(SIZES | changes))
        theirs = transformers.Qwen3MoeForCausalLM(config).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.2)
        theirs.save_pretrained(tmp_path / "theirs")
        truth = transformers.Qwen3MoeForCausalLM(config).eval()
        for model in (theirs, truth):
            model.set_experts_implementation("eager")  # the others have no float64
        truth.load_state_dict(theirs.state_dict())
        ours = load_model(tmp_path / "theirs").requires_grad_(True)
        return Triple(ours, theirs, truth.double(), tmp_path / "theirs")

    return build


def left_padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """A mask that pads the first row, and positions over real tokens."""
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_losses_and_gradients(
    within: Callable[..., None],
    make: Callable[..., Triple],
    variant: str,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The balance loss too, which is asked for in every second variant."""
    monkeypatch.setenv("LORA_KERNELS", "reference")  # C rounds elsewhere
    models = make(**VARIANTS[variant])
    ids = torch.randint(97, (3, 17))
    mask, positions = left_padded(ids) if padded else (None, None)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    if mask is not None:
        labels[0, : ids.shape[1] // 3 + 1] = -100
    asked = list(VARIANTS).index(variant) % 2 == 0
    options = {"attention_mask": mask, "position_ids": positions, "labels": labels}
    outs = [m(ids, **options, output_router_logits=asked) for m in models[:3]]
    for out in outs:
        out.loss.backward()
    real = torch.ones_like(ids) if mask is None else mask
    within(*(out.logits[real.bool()] for out in outs))
    within(*(out.loss for out in outs))
    if asked:
        within(*(out.aux_loss for out in outs))
    else:
        assert outs[0].aux_loss is None
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in models[:3]]
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        within(*(g[name] for g in gradients), "rms")


def test_the_balance_loss_is_on_where_config_json_says_so(
    within: Callable[..., None], make: Callable[..., Triple]
) -> None:
    plain = make(router_aux_loss_coef=0.5)
    ids = torch.randint(97, (2, 9))
    without = plain.ours(ids, labels=ids)
    models = make(router_aux_loss_coef=0.5, output_router_logits=True)
    outs = [m(ids, labels=ids) for m in models[:3]]
    within(*(out.loss for out in outs))
    assert outs[0].loss > without.loss + 0.5


def test_in_bfloat16_no_further_off_than_transformers(make: Callable[..., Triple]) -> None:
    """Root of the mean square: of largest errors, some are larger and some smaller."""
    models = make(norm_topk_prob=True)
    rounded = [m.to(torch.bfloat16) for m in models[:2]]
    models.truth.load_state_dict(models.theirs.state_dict())
    ids = torch.randint(97, (8, 33))
    with torch.no_grad():
        truth = models.truth(ids).logits
        ours, theirs = (m(ids).logits.double() for m in rounded)
    error, baseline = ((x - truth).square().mean().sqrt() for x in (ours, theirs))
    assert error <= 1.2 * baseline


def test_cached_and_greedy(within: Callable[..., None], make: Callable[..., Triple]) -> None:
    ours, theirs, truth, _ = make(norm_topk_prob=True)
    ids = torch.randint(97, (2, 15))
    cache, past = KVCache(capacity=4), None
    found, peer = [], []
    with torch.no_grad():
        for start, stop in [(0, 9), (9, 10), (10, 14), (14, 15)]:
            found.append(ours(ids[:, start:stop], cache=cache).logits)
            out = theirs(ids[:, start:stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            peer.append(out.logits)
        within(torch.cat(found, 1), torch.cat(peer, 1), truth(ids).logits)
    new = generate_ids(ours, ids, max_new_tokens=8)
    whole = theirs.generate(ids, max_new_tokens=8, do_sample=False)
    assert new == whole[:, 15:].tolist()


def test_saved_for_transformers(
    make: Callable[..., Triple], transformers: ModuleType, tmp_path: Path
) -> None:
    ours, theirs, _, folder = make(mlp_only_layers=[1], norm_topk_prob=True)
    save_model(ours, tmp_path / "again", source=folder)
    again = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "again")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers"):
        assert getattr(again.config, key) == getattr(theirs.config, key)


def test_defaults_of_absent_keys(transformers: ModuleType) -> None:
    from lora_core.models import ModelConfig

    theirs = transformers.Qwen3MoeConfig()
    raw = {key: getattr(theirs, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 32, "model_type": "qwen3_moe"}
    ours = ModelConfig.from_dict(raw)
    for key in (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "router_aux_loss_coef",
        "output_router_logits",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "sliding_window",
        "bos_token_id",
        "eos_token_id",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.mlp_only_layers == tuple(theirs.mlp_only_layers)
    assert ours.heads[2] == 2048 // 32
