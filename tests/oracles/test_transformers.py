"""The decoder against transformers' LlamaForCausalLM on the same random weights.

Both run in float32 and are compared with transformers in float64: ours may be at most twice as far
off as theirs, plus two roundings of the largest value.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.checkpoint import load_model, save_model
from lora_core.models import CausalLM, KVCache, ModelConfig, generate_ids, left_pad

pytestmark = pytest.mark.oracle

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-heads": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 16},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "long-rope-base": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "gelu": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5},
}


@pytest.fixture(scope="module")
def transformers(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("transformers")


def triple(transformers: ModuleType, changes: dict[str, Any]) -> tuple[CausalLM, Any, Any]:
    """Our model, theirs and theirs in float64, with the same weights of deviation 0.1."""
    sizes = SIZES | changes
    torch.manual_seed(3)
    ours = CausalLM(ModelConfig(**sizes))
    ours.init_weights(0.1)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    models = [ours.eval()]
    for dtype in (torch.float32, torch.float64):
        config = transformers.LlamaConfig(**sizes)
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.load_state_dict(ours.state_dict())  # strict: the names are the same
        models.append(theirs.to(dtype))
    return models[0], models[1], models[2]


def padding(kind: str, batch: int, tokens: int) -> Tensor | None:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if kind == "left":
        mask[0, : tokens // 3] = 0
    if kind == "right":
        mask[0, -(tokens // 3) :] = 0
    return None if kind == "none" else mask


def graded(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


# the definition rounds where transformers does, so even its largest errors are alike. C rounds
# elsewhere: of hundreds of largest errors some are three times as large and some a third, so it is
# the root of the mean square that is compared
@pytest.mark.parametrize(("backend", "size"), [("reference", "largest"), ("auto", "rms")])
@pytest.mark.parametrize("pad", ["none", "all-ones", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients(
    within: Callable[..., None],
    transformers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    pad: str,
    backend: str,
    size: str,
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    ours, *theirs = triple(transformers, VARIANTS[variant])
    ids = torch.randint(97, (3, 21))
    mask = padding(pad, *ids.shape)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    if mask is not None:
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        # a first token after padding is predicted by a padded position: not graded
        labels = labels.masked_fill((mask == 0) | (before == 0), -100)
    # positions over real tokens on both sides: transformers' forward counts padding as well
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    out = ours(ids, mask, labels=labels)
    out.loss.backward()
    peers = [m(ids, mask, position_ids=positions, labels=labels) for m in theirs]
    for peer in peers:
        peer.loss.backward()
    within(graded(out.logits, mask), *(graded(peer.logits, mask) for peer in peers), size)
    within(out.loss, *(peer.loss for peer in peers), size)
    gradients = [dict(m.named_parameters()) for m in (ours, *theirs)]
    assert list(gradients[0]) == list(gradients[1])
    for name in gradients[0]:
        within(*(g[name].grad for g in gradients), size)


@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("variant", ["grouped", "all-heads", "llama3-rope"])
def test_cached_logits(
    within: Callable[..., None], transformers: ModuleType, variant: str, pad: str
) -> None:
    """Prompt, then chunks of 1, 4 and 1 tokens, against transformers' cache and float64."""
    ours, theirs, truth = triple(transformers, VARIANTS[variant])
    ids = torch.randint(97, (2, 15))
    mask = padding(pad, *ids.shape)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    cache, past = KVCache(capacity=4), None
    found, peer = [], []
    with torch.no_grad():
        for start, stop in [(0, 9), (9, 10), (10, 14), (14, 15)]:
            part = None if mask is None else mask[:, :stop]
            found.append(ours(ids[:, start:stop], part, cache=cache).logits)
            where = None if positions is None else positions[:, start:stop]
            out = theirs(ids[:, start:stop], part, where, past, use_cache=True)
            past = out.past_key_values
            peer.append(out.logits)
        whole = truth(ids, mask, position_ids=positions).logits
    within(*(graded(t, mask) for t in (torch.cat(found, 1), torch.cat(peer, 1), whole)))


def test_hidden_states(within: Callable[..., None], transformers: ModuleType) -> None:
    ours, *theirs = triple(transformers, {})
    ids = torch.randint(97, (2, 9))
    states = ours(ids, output_hidden_states=True).hidden_states
    peers = [m(ids, output_hidden_states=True).hidden_states for m in theirs]
    assert len(states) == len(peers[0]) == 3
    for state in zip(states, *peers, strict=True):
        within(*state)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, head_dim = kv_heads * groups, 2 * draw(st.integers(1, 8))
    return {
        "vocab_size": draw(st.integers(5, 60)),
        "hidden_size": heads * draw(st.integers(1, 12)),
        "intermediate_size": draw(st.integers(1, 50)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu", "gelu_pytorch_tanh"])),
        "rope_parameters": draw(
            st.sampled_from([LLAMA3, {"rope_theta": 1e4, "rope_type": "default"}])
        ),
    }


@given(changes=configurations(), batch=st.integers(1, 3), data=st.data())
def test_any_small_configuration(
    within: Callable[..., None],
    transformers: ModuleType,
    changes: dict[str, Any],
    batch: int,
    data: st.DataObject,
) -> None:
    ours, *theirs = triple(transformers, changes)
    tokens = data.draw(st.integers(1, 40))
    ids = torch.randint(changes["vocab_size"], (batch, tokens))
    mask = torch.ones_like(ids)
    for row in range(batch):  # padding on both sides at once
        left = data.draw(st.integers(0, tokens - 1))
        right = data.draw(st.integers(left + 1, tokens))
        mask[row, :left] = 0
        mask[row, right:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = ours(ids, mask).logits
        peers = [m(ids, mask, position_ids=positions).logits for m in theirs]
    within(*(t[mask.bool()] for t in (found, *peers)))


def test_llama3_frequencies_are_bit_equal(transformers: ModuleType) -> None:
    ours, theirs, _ = triple(transformers, {"rope_parameters": LLAMA3, "head_dim": 128})
    assert torch.equal(ours.model.rotary.inv_freq, theirs.model.rotary_emb.inv_freq)


def test_greedy_tokens_one_by_one_and_in_a_batch(transformers: ModuleType) -> None:
    ours, theirs, _ = triple(transformers, {"num_key_value_heads": 2})
    prompts = [torch.randint(1, 97, (n,)).tolist() for n in (3, 11, 1, 7)]
    alone = [generate_ids(ours, torch.tensor([p]), max_new_tokens=20)[0] for p in prompts]
    for prompt, tokens in zip(prompts, alone, strict=True):
        peer = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        assert peer[0, len(prompt) :].tolist() == tokens
    assert generate_ids(ours, *left_pad(prompts), max_new_tokens=20) == alone
    # the same function drives transformers' model through its own cache
    assert generate_ids(theirs, *left_pad(prompts), max_new_tokens=20) == alone


def test_their_folder_loads_here(
    within: Callable[..., None], transformers: ModuleType, llama_folder: Path
) -> None:
    assert len(list(llama_folder.glob("*.safetensors"))) > 1
    ours = load_model(llama_folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    truth = transformers.LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float64)
    ids = torch.randint(400, (2, 33))
    with torch.no_grad():
        within(ours(ids).logits, theirs(ids).logits, truth(ids).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_folder_loads_there(
    within: Callable[..., None], transformers: ModuleType, variant: str, tmp_path: Path
) -> None:
    ours, _, _ = triple(transformers, VARIANTS[variant])
    save_model(ours, tmp_path / "saved", max_shard_size=20_000)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(theirs.model.rotary_emb.inv_freq, ours.model.rotary.inv_freq)
    assert theirs.config.tie_word_embeddings == ours.config.tie_word_embeddings
    ids = torch.randint(97, (2, 9))
    truth = theirs.__class__.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    within(ours(ids).logits, theirs(ids).logits, truth(ids).logits)


@pytest.mark.parametrize("rope", [None, LLAMA3])
def test_old_dialect_means_the_same(
    transformers: ModuleType, tmp_path: Path, rope: dict[str, Any] | None
) -> None:
    raw = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    raw |= {"rope_theta": 123.0, "torch_dtype": "bfloat16", "eos_token_id": [3, 5]}
    if rope is not None:
        scaling = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
        raw["rope_scaling"] = scaling | {"type": "llama3"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = ModelConfig.from_folder(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for key, value in ours.rope_parameters.items():
        assert theirs.rope_parameters[key] == value
    assert str(theirs.dtype) == f"torch.{ours.dtype}"
    assert theirs.eos_token_id == list(ours.eos_token_ids)
