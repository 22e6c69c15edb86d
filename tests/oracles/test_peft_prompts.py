"""PEFT as the judge of soft prompts: same numbers in, same outputs and gradients, both ways."""

import copy
import functools
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
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    adapted_modules,
    add_adapter,
    disable_adapters,
    set_adapters,
)
from lora_core.checkpoint import load_adapter, load_model, save_adapter
from lora_core.models.generate import generate_ids, left_pad
from lora_core.testing.bounds import exceeds, gamma

pytestmark = pytest.mark.oracle

P = 3
IDS = torch.tensor([[5, 17, 3, 3, 50, 99, 8, 1], [9, 9, 4, 100, 2, 6, 31, 7]])
RIGHT = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
OURS = {
    "prompt": PromptTuningConfig(P),
    "prompt from ids": PromptTuningConfig(P, "text", "a text", token_ids=(7, 8)),
    "mlp": PTuningConfig(P, hidden=10),
    "lstm": PTuningConfig(P, "lstm", hidden=10),
    "prefix": PrefixTuningConfig(P, projection=False, std=1.0),
    "network": PrefixTuningConfig(P, projection=True, hidden=16),
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "sampled": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 10}),
    "lstm": (
        "PromptEncoderConfig",
        {
            "encoder_hidden_size": 10,
            "encoder_reparameterization_type": "LSTM",
            "encoder_dropout": 0.1,
        },
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "zero prefix": ("PrefixTuningConfig", {"init_weights": "zero"}),
    "network": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}
MODELS = ["llama", "gpt2"]
IN_CALLS = ["prompt", "mlp", "prefix", "network"]  # after its embeddings a prompt is a prompt


@pytest.fixture(scope="module")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


@functools.cache
def _made(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(1)
    ends = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 120}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            **ends,
        )
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.1, **ends
    )
    return transformers.GPT2LMHeadModel(config).eval()


def made(kind: str) -> nn.Module:
    return copy.deepcopy(_made(kind))


def there(peft: ModuleType, model: str, kind: str) -> nn.Module:
    name, options = THEIRS[kind]
    torch.manual_seed(2)
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    return peft.get_peft_model(made(model), config).eval()


def flat(theirs: nn.Module) -> Tensor:
    """PEFT's prompt, made a leaf, so that its gradient can be asked for."""
    return theirs.get_prompt_embedding_to_save("default").clone()


def leaves(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def as_peft(model: nn.Module) -> Tensor:
    """Gradients of our flat prompt, laid out as PEFT's."""
    sites = [h.adapter("default") for _, h in adapted_modules(model)]
    if hasattr(sites[0], "prompt"):
        return sites[0].prompt.grad
    return torch.cat(
        [s.grad.flatten(1) for layer in sites[1:] for s in (layer.key, layer.value)], 1
    )


def real(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Of PEFT's P + T positions, or ours, the text's real ones."""
    logits = logits[:, -IDS.shape[1] :]
    return logits if mask is None else logits[mask.bool()]


def same(a: Tensor, b: Tensor, truth: Tensor) -> None:
    """No further from the float64 result than PEFT is, twice, and two roundings."""
    eps = torch.finfo(torch.float32).eps
    error, theirs = ((t.double() - truth).abs().max() for t in (a, b))
    assert error <= 2 * theirs + 2 * eps * truth.abs().max()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", THEIRS)
def test_peft_folders_load_with_equal_outputs_and_gradients(
    model: str, kind: str, peft: ModuleType, tmp_path: Path
) -> None:
    theirs = there(peft, model, kind)
    theirs.save_pretrained(tmp_path)
    ours = made(model)
    report = load_adapter(ours, tmp_path, trainable=True)
    prompt = flat(theirs)
    assert report.parameters == prompt.numel()  # the flat form is all that is there
    # PEFT's own flat form with a gradient: its inference copy, unfrozen
    back = peft.PeftModel.from_pretrained(made(model), str(tmp_path)).eval()
    embedding = back.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    exact = copy.deepcopy(ours).double()
    for mask in (None, RIGHT):
        call = {"attention_mask": mask, "labels": IDS if mask is None else IDS * mask}
        y, wanted, truth = (
            real(m(input_ids=IDS, **call).logits, mask) for m in (ours, theirs, exact)
        )
        same(y, wanted, truth)
        (got,) = (m(input_ids=IDS, **call).loss for m in (ours,))
        assert torch.allclose(got, back(input_ids=IDS, **call).loss, rtol=1e-5) or mask is not None
    for m in (ours, back, exact):
        m.zero_grad()
        m(input_ids=IDS, labels=IDS).loss.backward()
    assert embedding.grad.abs().max() > 0
    same(as_peft(ours), embedding.grad, as_peft(exact).double())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", OURS)
def test_peft_reads_what_is_written_here(
    model: str, kind: str, peft: ModuleType, tmp_path: Path
) -> None:
    ours = made(model)
    add_adapter(ours, OURS[kind])
    save_adapter(ours, tmp_path, base_model="base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Uu]nexpected.*")
        theirs = peft.PeftModel.from_pretrained(made(model), str(tmp_path)).eval()
    exact = copy.deepcopy(ours).double()
    with torch.no_grad():
        y, wanted, truth = (real(m(input_ids=IDS).logits, None) for m in (ours, theirs, exact))
        same(y, wanted, truth)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT counts anew
        text = theirs.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text[:, -4:].tolist() == generate_ids(ours, IDS, max_new_tokens=4)


FAMILIES = {
    "Qwen3": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16},
    "Phi": {"num_key_value_heads": 4},
    "Mistral": {"sliding_window": 32},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_other_families(family: str, kind: str, peft: ModuleType, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, family + "Config")(**sizes | heads | ends | FAMILIES[family])
    torch.manual_seed(1)
    bare = getattr(transformers, family.removesuffix("Text") + "ForCausalLM")(config).eval()
    name, options = THEIRS[kind]
    wanted = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    theirs = peft.get_peft_model(copy.deepcopy(bare), wanted).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(bare)
    load_adapter(ours, tmp_path)
    exact = copy.deepcopy(ours).double()
    with torch.no_grad():
        same(*(real(m(input_ids=IDS).logits, None) for m in (ours, theirs, exact)))
    x, mask = left_pad([[5, 6, 7, 8], [9, 10]])
    text = ours.generate(x, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text[:, 4:].tolist() == generate_ids(ours, x, mask, max_new_tokens=4)


def test_attention_of_another_make_is_refused() -> None:
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has none") as caught:
        add_adapter(model, OURS["prefix"])
    assert "\n" not in str(caught.value)
    assert not list(adapted_modules(model))
    add_adapter(model, OURS["prompt"])


def test_attention_to_another_text_gets_no_prefix() -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    report = add_adapter(model, OURS["prefix"])
    assert report.sites[1:] == ("transformer.h.0.attn", "transformer.h.1.attn")


@pytest.mark.parametrize("kind", THEIRS)
def test_our_decoder_gives_what_peft_gives_on_transformers(
    kind: str, llama_folder: Path, peft: ModuleType, tmp_path: Path
) -> None:
    import transformers

    name, options = THEIRS[kind]
    base = transformers.LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(llama_folder).eval()
    load_adapter(ours, tmp_path)
    exact = copy.deepcopy(ours).double()
    with torch.no_grad():
        y, wanted, truth = (real(m(input_ids=IDS).logits, None) for m in (ours, theirs, exact))
    same(y, wanted, truth)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", IN_CALLS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_own_generate(model: str, kind: str, attention: str) -> None:
    ours = made(model)
    ours.set_attn_implementation(attention)
    base = ours.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    add_adapter(ours, OURS[kind])
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    x, mask = left_pad(rows)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = ours.generate(x, attention_mask=mask, **options)[:, 4:].tolist()
    for row, new in zip(rows, found, strict=True):
        text = list(row)
        for _ in range(5):
            text.append(int(ours(torch.tensor([text])).logits[0, -1].argmax()))
        assert text[len(row) :] == new
    assert (
        ours.generate(x, attention_mask=mask, use_cache=False, **options)[:, 4:].tolist() == found
    )
    assert generate_ids(ours, x, mask, max_new_tokens=5) == found
    beams = ours.generate(x, attention_mask=mask, num_beams=2, **options)
    assert beams.shape == (3, 9)
    with disable_adapters(ours):
        assert torch.equal(ours.generate(IDS, **options), base)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", OURS)
def test_padded_rows_are_their_own_without_positions(model: str, kind: str) -> None:
    """Positions are counted over real tokens; PEFT and the models themselves count columns."""
    ours = made(model)
    add_adapter(ours, OURS[kind])
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    x, mask = left_pad(rows)
    with torch.no_grad():
        first = ours(x, attention_mask=mask, use_cache=True)
        new = torch.full((3, 1), 12)
        longer = torch.cat([mask, torch.ones_like(new)], 1)
        second = ours(new, attention_mask=longer, past_key_values=first.past_key_values)
        for i, row in enumerate(rows):
            alone = ours(torch.tensor([[*row, 12]])).logits[0]
            got = torch.cat([first.logits[i, -len(row) :], second.logits[i]])
            bound = torch.full_like(alone, gamma(2000) * alone.abs().max().item())
            assert exceeds(got, alone, bound) is None


@pytest.mark.parametrize("model", MODELS)
def test_a_static_cache(model: str) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    static = {"cache_implementation": "static", "disable_compile": True}
    prefix, prompt = made(model), made(model)
    add_adapter(prefix, OURS["prefix"])
    x, mask = left_pad([[5, 6, 7, 8], [9, 10]])
    wanted = prefix.generate(x, attention_mask=mask, **options)
    assert torch.equal(prefix.generate(x, attention_mask=mask, **options, **static), wanted)
    # several tokens and no mask: the cache's unused part is not looked at
    from transformers import StaticCache

    with torch.no_grad():
        first = StaticCache(config=prefix.config, max_cache_len=12)
        got = prefix(IDS, past_key_values=first).logits
        assert torch.equal(got, prefix(IDS).logits)
    add_adapter(prompt, OURS["prompt"])
    with pytest.raises(ValueError, match=r"a prompt needs an attention_mask \(B, past \+ T\)"):
        prompt.generate(x, attention_mask=mask, **options, **static)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", IN_CALLS)
@pytest.mark.parametrize(
    ("attention", "reentrant"), [("sdpa", False), ("eager", False), ("sdpa", True)]
)
def test_their_gradient_checkpointing(
    model: str, kind: str, attention: str, reentrant: bool
) -> None:
    """PEFT refuses it for prefixes."""
    ours = made(model).train()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours.set_attn_implementation(attention)
    add_adapter(ours, OURS[kind])

    def gradients() -> list[Tensor]:
        ours.zero_grad()
        ours(input_ids=IDS, attention_mask=RIGHT, labels=IDS).loss.backward()
        return [p.grad.clone() for p in leaves(ours)]

    plain = gradients()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    for again, first in zip(gradients(), plain, strict=True):
        # to the bit, but for GPT-2's eager attention, whose gradients differ without a prompt too:
        # forward and backward are some 32 sums of 32 numbers one after the other
        if model == "gpt2" and attention == "eager":
            bound = torch.full_like(first, gamma(2 * 32 * 32) * first.abs().max().item())
            assert exceeds(again, first, bound) is None
        else:
            assert torch.equal(again, first)
        assert first.abs().max() > 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", OURS)
def test_outputs_of_every_form(model: str, kind: str) -> None:
    ours = made(model)
    ours.set_attn_implementation("eager")
    add_adapter(ours, OURS[kind])
    call = {"input_ids": IDS, "output_hidden_states": True, "output_attentions": True}
    y = ours(**call, labels=IDS)
    assert y.logits.shape == (2, 8, 120)
    assert {h.shape for h in y.hidden_states} == {(2, 8, 32)}
    assert y.attentions[0].shape[-1] == 8 + P  # the virtual tokens are looked at
    assert torch.equal(ours(IDS).logits, y.logits)
    loss, logits, *_ = ours(**call, labels=IDS, return_dict=False)
    assert torch.equal(logits, y.logits)
    assert torch.equal(loss, y.loss)
    assert ours(IDS, logits_to_keep=1).logits.shape == (2, 1, 120)
    places = torch.tensor([0, 3, -1])
    wanted = y.logits[:, places]
    bound = torch.full_like(wanted, gamma(2000) * wanted.abs().max().item())
    assert exceeds(ours(IDS, logits_to_keep=places).logits, wanted, bound) is None


@pytest.mark.parametrize("model", MODELS)
def test_a_lora_beside_a_prefix(model: str) -> None:
    ours = made(model)
    add_adapter(ours, LoRAConfig(r=2, targets=["q_proj"] if model == "llama" else ["c_attn"]), "l")
    add_adapter(ours, OURS["prefix"], "p")
    alone = ours(IDS).logits
    set_adapters(ours, ["l", "p"], trainable=True)
    assert torch.equal(ours(IDS).logits, alone)  # a new LoRA adds nothing
    ours(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in leaves(ours))


@pytest.mark.parametrize("kind", IN_CALLS)
def test_a_text_beyond_the_table_of_positions(kind: str) -> None:
    ours = made("gpt2")
    add_adapter(ours, OURS[kind])
    x = torch.full((1, 64 - P), 5)
    assert ours(x).logits.shape == (1, 64 - P, 120)
    longer = torch.full((1, 65 - P), 5)
    with pytest.raises(ValueError, match="need 65 positions, the model has 64: shorten") as caught:
        ours(longer)
    assert "\n" not in str(caught.value)
    cache = ours(x[:, 2:], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="need 65 positions, the model has 64: shorten"):
        ours(x[:, :3], past_key_values=cache)
    mask = torch.ones_like(longer)
    mask[0, 0] = 0  # one column more, no position more
    assert ours(longer, attention_mask=mask).logits.shape == (1, 65 - P, 120)
    rotary = made("llama")
    add_adapter(rotary, OURS[kind])
    assert rotary(torch.full((1, 70), 5)).logits.shape == (1, 70, 120)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_table_with_rows_in_front(kind: str) -> None:
    """OPT's table has two rows more than positions."""
    import transformers

    torch.manual_seed(1)
    config = transformers.OPTConfig(
        vocab_size=120, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    add_adapter(model, OURS[kind])
    assert model(torch.full((1, 64 - P), 5)).logits.shape == (1, 64 - P, 120)
    with pytest.raises(ValueError, match="need 65 positions, the model has 64: shorten"):
        model(torch.full((1, 65 - P), 5))


def test_flash_attention_is_refused_with_the_way_out() -> None:
    ours = made("llama")
    add_adapter(ours, OURS["prefix"])
    ours.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ValueError, match=r"not 'flex_attention': call model\.set_attn_impl"
    ) as caught:
        ours.model.layers[0].self_attn(torch.zeros(1, 2, 32), None, None)
    assert "\n" not in str(caught.value)
