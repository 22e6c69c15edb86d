"""Encoders against transformers' BERT and RoBERTa on the same random weights.

Both run in one dtype and are compared with transformers in float64: ours may be at most twice as
far off as theirs, plus two roundings of the largest value.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.models import EncoderConfig, EncoderModel, build_model

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
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
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
