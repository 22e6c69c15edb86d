"""Encoders against transformers' BERT and RoBERTa on the same random weights.

Both run in one dtype and are compared with transformers in float64: ours may be at most twice as
far off as theirs, plus two roundings of the largest value.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.checkpoint import load_adapter, load_model, save_adapter, save_model
from lora_core.models import EncoderConfig, EncoderModel, build_model
from lora_core.quant import NF4Linear

pytestmark = pytest.mark.oracle

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
}
ENDINGS = {
    "none": "Model",
    "masked": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
HEADS = list(ENDINGS)


@pytest.fixture(scope="module")
def transformers(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("transformers")


def theirs_of(transformers: ModuleType, config: EncoderConfig, dtype: torch.dtype) -> Any:
    """Their model, uninitialised by us."""
    name = FAMILIES[config.model_type]
    raw = config.to_dict()
    made = getattr(transformers, f"{name}Config")(**{k: raw[k] for k in raw if k != "dtype"})
    kind = getattr(transformers, name + ENDINGS[config.head or "none"])
    return kind(made).eval().to(dtype)


def triple(
    transformers: ModuleType,
    family: str,
    head: str,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[EncoderModel, Any, Any]:
    """Our model, theirs and theirs in float64, with the same weights of deviation 0.2."""
    torch.manual_seed(3)
    ours = build_model(EncoderConfig(**SIZES | changes, model_type=family, head=head))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    ours = ours.to(dtype).eval()
    peers = []
    for kind in (dtype, torch.float64):
        peer = theirs_of(transformers, ours.config, kind)
        peer.load_state_dict(ours.state_dict())  # strict: the names are the same
        peers.append(peer)
    return ours, peers[0], peers[1]


def within(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    error = (ours.double() - truth).abs().max()
    allowed = 2 * (theirs.double() - truth).abs().max() + 2 * eps * truth.abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def batch_of(pad: str, batch: int = 3, tokens: int = 17) -> dict[str, Tensor]:
    """Ids with padding where the mask says so, and token types."""
    ids = torch.randint(2, SIZES["vocab_size"], (batch, tokens))
    mask = torch.ones_like(ids)
    if pad in ("left", "holes"):
        mask[0, : tokens // 3] = 0
    if pad in ("right", "holes"):
        mask[-1, -(tokens // 3) :] = 0
    ids = ids.masked_fill(mask == 0, SIZES["pad_token_id"])
    if pad == "holes":  # padding inside a text, and ids of padding that the mask does not cover
        mask[1, 5] = 0
        ids[1, 8] = SIZES["pad_token_id"]
    call = {"input_ids": ids, "token_type_ids": torch.randint(2, ids.shape)}
    return call if pad == "none" else call | {"attention_mask": mask}


def labels_of(head: str, ids: Tensor, kind: str = "single", count: int = 3) -> dict[str, Tensor]:
    rows, tokens = ids.shape
    if head == "span":
        start = torch.randint(tokens, (rows,))
        end = torch.randint(tokens, (rows,))
        start[0], end[1] = tokens + 3, -1  # cut off; no answer
        return {"start_positions": start, "end_positions": end}
    if head == "sequence":
        several = {"multi": torch.rand(rows, count).round(), "numbers": torch.randn(rows, count)}
        return {"labels": several.get(kind, torch.randint(count, (rows,)))}
    most = SIZES["vocab_size"] if head == "masked" else count
    labels = torch.randint(most, ids.shape)
    return {"labels": labels.masked_fill(torch.rand(ids.shape) < 0.4, -100)}


def outputs(out: Any, head: str) -> list[Tensor]:
    names = {"span": ["start_logits", "end_logits"], "none": ["last_hidden_state", "pooler_output"]}
    return [getattr(out, name) for name in names.get(head, ["logits"])]


def compare(models: tuple[Any, Any, Any], call: dict[str, Tensor], head: str) -> None:
    """Outputs, loss and gradients of the three models."""
    found, graded = [], head != "none"
    for model in models:
        out = model(**call)
        loss = out.loss if graded else sum(part.square().sum() for part in outputs(out, head))
        loss.backward()
        found.append((outputs(out, head), loss, dict(model.named_parameters())))
    for parts in zip(*(parts for parts, _, _ in found), strict=True):
        within(*parts)
    if graded:
        within(*(loss for _, loss, _ in found))
    gradients = [parameters for _, _, parameters in found]
    assert sorted(gradients[0]) == sorted(gradients[1])
    for name in gradients[0]:
        grads = [g[name].grad for g in gradients]
        assert (grads[0] is None) == (grads[1] is None), name
        if grads[0] is not None:
            within(*grads)


@pytest.mark.parametrize("pad", ["none", "ones", "left", "right", "holes"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_logits_loss_and_gradients(
    transformers: ModuleType, family: str, head: str, pad: str
) -> None:
    more = {"num_labels": 3} if head in ("sequence", "token") else {}
    models = triple(transformers, family, head, **more)
    call = batch_of(pad)
    compare(models, call | (labels_of(head, call["input_ids"]) if head != "none" else {}), head)


def spread(errors: Tensor) -> Tensor:
    return errors.square().mean().sqrt()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_bfloat16(transformers: ModuleType, family: str, head: str) -> None:
    ours, theirs, truth = triple(transformers, family, head, torch.bfloat16)
    call = batch_of("right", 4, 23)
    with torch.no_grad():
        found = [outputs(model(**call), head) for model in (ours, theirs, truth)]
    for mine, peer, true in zip(*found, strict=True):
        assert mine.dtype == peer.dtype == torch.bfloat16
        assert spread(mine.double() - true) <= 2 * spread(peer.double() - true)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("single", {"num_labels": 3}),
        ("multi", {"num_labels": 3}),
        ("numbers", {"num_labels": 1}),
        ("numbers", {"num_labels": 3, "problem_type": "regression"}),
        ("multi", {"num_labels": 3, "problem_type": "multi_label_classification"}),
        ("single", {"num_labels": 3, "problem_type": "single_label_classification"}),
    ],
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_kinds_of_labels(
    transformers: ModuleType, family: str, kind: str, options: dict[str, Any]
) -> None:
    models = triple(transformers, family, "sequence", **options)
    call = batch_of("left")
    labels = labels_of("sequence", call["input_ids"], kind, options["num_labels"])
    if kind == "numbers" and options["num_labels"] == 1:
        labels = {"labels": labels["labels"][:, 0]}
    compare(models, call | labels, "sequence")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_left_out_of_a_call(transformers: ModuleType, family: str) -> None:
    """No token types, embeddings in place of ids, positions of one's own; hidden states."""
    models = triple(transformers, family, "token")
    ids = batch_of("holes")["input_ids"]
    x = torch.randn(3, 17, 32)
    where = torch.randint(2, 40, (3, 17))
    for call in (
        {"input_ids": ids},
        {"inputs_embeds": x},
        {"input_ids": ids, "position_ids": where},
    ):
        outs = []
        for model in models:
            kind = next(model.parameters()).dtype
            cast = {k: v.to(kind) if v.is_floating_point() else v for k, v in call.items()}
            with torch.no_grad():
                outs.append(model(**cast, output_hidden_states=True))
        within(*(out.logits for out in outs))
        assert len(outs[0].hidden_states) == len(outs[1].hidden_states) == 3
        for states in zip(*(out.hidden_states for out in outs), strict=True):
            within(*states)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_tied_or_not(transformers: ModuleType, family: str, tie: bool) -> None:
    models = triple(transformers, family, "masked", tie_word_embeddings=tie)
    decoder = models[0].get_output_embeddings()
    assert (decoder.weight is models[0].get_input_embeddings().weight) is tie
    call = batch_of("right")
    compare(models, call | labels_of("masked", call["input_ids"]), "masked")


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(5, 60)),
        "hidden_size": heads * draw(st.integers(1, 12)),
        "intermediate_size": draw(st.integers(1, 50)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "max_position_embeddings": draw(st.integers(33, 50)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5])),
        "pad_token_id": draw(st.integers(0, 3)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
    }


@given(
    family=st.sampled_from(list(FAMILIES)),
    head=st.sampled_from(HEADS),
    changes=configurations(),
    data=st.data(),
)
def test_any_small_configuration(
    transformers: ModuleType,
    family: str,
    head: str,
    changes: dict[str, Any],
    data: st.DataObject,
) -> None:
    models = triple(transformers, family, head, **changes)
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 28))
    ids = torch.randint(changes["vocab_size"], (batch, tokens))
    mask = torch.ones_like(ids)
    for row in range(batch):  # padding on both sides at once
        left = data.draw(st.integers(0, tokens - 1))
        right = data.draw(st.integers(left + 1, tokens))
        mask[row, :left] = 0
        mask[row, right:] = 0
    types = torch.randint(changes["type_vocab_size"], ids.shape)
    with torch.no_grad():
        outs = [
            outputs(m(input_ids=ids, attention_mask=mask, token_type_ids=types), head)
            for m in models
        ]
    for parts in zip(*outs, strict=True):
        within(*parts)


# --- folders ---


def tell(model: Any, head: str = "sequence") -> list[Tensor]:
    ids = torch.arange(2, 20).view(2, 9)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad():
        return [t.to(dtype) for t in outputs(model(input_ids=ids), head)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_folders_go_both_ways(
    transformers: ModuleType, family: str, head: str, tmp_path: Path
) -> None:
    more = {"num_labels": 3} if head in ("sequence", "token") else {}
    ours, theirs, truth = triple(transformers, family, head, **more)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    read = load_model(tmp_path / "theirs")
    assert type(read) is type(ours)
    assert read.config.num_labels == ours.config.num_labels
    for one, other in zip(ours.named_parameters(), read.named_parameters(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    save_model(ours, tmp_path / "ours", max_shard_size=20_000)
    kind = getattr(transformers, FAMILIES[family] + ENDINGS[head])
    back, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for parts in zip(tell(ours, head), tell(back, head), tell(truth, head), strict=True):
        within(*parts)
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert back.config.num_labels == ours.config.num_labels
    assert raw["architectures"] == back.config.architectures


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_pretrained_folder_gets_another_head(
    transformers: ModuleType, family: str, tmp_path: Path
) -> None:
    ours, theirs, _ = triple(transformers, family, "masked")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="left out|made anew") as told:
        read = load_model(tmp_path, head="sequence", num_labels=4)
    said = [str(warning.message) for warning in told]
    assert "left out (cls)" in said[0] or "left out (lm_head)" in said[0]
    assert "made anew, to be trained before use" in said[1]
    assert read.config.num_labels == 4
    trunk = dict(ours.trunk.named_parameters())
    fresh = []
    for name, parameter in read.named_parameters():
        known = trunk.get(name.partition(".")[2])
        if known is None:
            fresh.append(name)
            assert parameter.isfinite().all()
            assert parameter.abs().max() < 0.2
        else:
            assert torch.equal(parameter, known)
    pooled = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"]
    dense = ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight"]
    assert fresh[:3] == (pooled if family == "bert" else dense)


def test_a_folder_that_says_it_has_a_head_must_have_it(
    transformers: ModuleType, tmp_path: Path
) -> None:
    _, theirs, _ = triple(transformers, "bert", "none")
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=r"lacks 2 tensors \(classifier\.weight, classifier\.bias\)"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("head", ["none", "sequence"])
def test_old_files(transformers: ModuleType, tmp_path: Path, prefixed: bool, head: str) -> None:
    """gamma and beta, buffers among the weights, the trunk with or without its prefix."""
    from safetensors.torch import save_file

    ours, theirs, _ = triple(transformers, "bert", head)
    theirs.save_pretrained(tmp_path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        old = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        old = re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", old).removeprefix("bert.")
        outer = name.startswith("classifier")
        tensors[old if outer or not prefixed else f"bert.{old}"] = tensor
    where = "bert." if prefixed else ""
    tensors[f"{where}embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    read = load_model(tmp_path)
    for one, other in zip(tell(ours, head), tell(read, head), strict=True):
        assert torch.equal(one, other)
    kind = getattr(transformers, "Bert" + ENDINGS[head])
    for one, other in zip(
        tell(kind.from_pretrained(tmp_path), head), tell(read, head), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_quantized_on_load(transformers: ModuleType, family: str, tmp_path: Path) -> None:
    """Against transformers holding the dequantized weights; the head stays dense."""
    _, theirs, truth = triple(transformers, family, "sequence")
    theirs.save_pretrained(tmp_path / "dense")
    ours = load_model(tmp_path / "dense", quantize="nf4")
    layers = {name: m for name, m in ours.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 12 + (family == "bert")  # the pooler
    assert not any(name.startswith("classifier") for name in layers)
    for model in (theirs, truth):
        weights = {f"{name}.weight": layer.dense_weight() for name, layer in layers.items()}
        _, extra = model.load_state_dict(weights, strict=False)
        assert not extra
    for parts in zip(tell(ours), tell(theirs), tell(truth), strict=True):
        within(*parts)
    save_model(ours, tmp_path / "packed", quantized=True)
    again = load_model(tmp_path / "packed")
    assert torch.equal(tell(again)[0], tell(ours)[0])


# --- adapters ---


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_peft_reads_the_adapter(
    transformers: ModuleType,
    oracle: Callable[[str], ModuleType],
    family: str,
    targets: Any,
    tmp_path: Path,
    shake: Callable[..., Any],
) -> None:
    peft = oracle("peft")
    ours, theirs, truth = triple(transformers, family, "sequence")
    before = tell(ours)[0]
    add_adapter(ours, LoRAConfig(r=2, targets=targets, modules_to_save=["classifier"]))
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    wrapped = [peft.PeftModel.from_pretrained(m, tmp_path / "ours").eval() for m in (theirs, truth)]
    keys = [name for name, _ in wrapped[0].named_parameters() if "lora_A" in name]
    prefix = ours.config.family.prefix
    assert keys[0].startswith(f"base_model.model.{prefix}.encoder.layer.0.attention.self.query")
    within(tell(ours)[0], *(tell(model)[0] for model in wrapped))
    assert not torch.allclose(tell(ours)[0], before, atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pefts_adapter_is_read(
    transformers: ModuleType,
    oracle: Callable[[str], ModuleType],
    family: str,
    tmp_path: Path,
) -> None:
    peft = oracle("peft")
    ours, theirs, truth = triple(transformers, family, "sequence")
    options = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(theirs, options).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    wrapped.save_pretrained(tmp_path)
    exact = peft.PeftModel.from_pretrained(truth, tmp_path).eval()
    before = tell(ours)[0]
    load_adapter(ours, tmp_path)
    within(tell(ours)[0], tell(wrapped)[0], tell(exact)[0])
    assert not torch.allclose(tell(ours)[0], before, atol=1e-2)
