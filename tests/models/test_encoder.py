"""Encoders: what a folder says, what is refused, positions, padding, losses, fresh heads."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.models import (
    CausalLM,
    Encoder,
    EncoderConfig,
    EncoderModel,
    EncoderOutput,
    MaskedLM,
    ModelConfig,
    SequenceClassifier,
    SpanFinder,
    TokenClassifier,
    build_model,
    read_config,
)
from lora_core.models.encoder_layers import padding_mask
from lora_core.models.encoder_losses import class_loss, sequence_loss, span_loss

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert"]
CLASSES = {
    "none": Encoder,
    "masked": MaskedLM,
    "sequence": SequenceClassifier,
    "token": TokenClassifier,
    "span": SpanFinder,
}


def make(family: str = "bert", head: str = "sequence", **changes: Any) -> EncoderModel:
    """A model with weights of deviation 0.2, in evaluation mode."""
    torch.manual_seed(5)
    model = build_model(EncoderConfig(**{**SIZES, **changes}, model_type=family, head=head))
    assert isinstance(model, EncoderModel)
    model.init_weights(0.2)
    return model.eval()


def ids_of(rows: int = 3, tokens: int = 9) -> Tensor:
    return torch.randint(2, SIZES["vocab_size"], (rows, tokens))


def write(folder: Path, **raw: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# --- what a folder says ---


@pytest.mark.parametrize("head", list(CLASSES))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_comes_back(family: str, head: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "classifier_dropout": 0.3}
    if head in ("sequence", "token"):
        options |= {"num_labels": 3, "labels": ("no", "maybe", "yes")}
    config = EncoderConfig(**SIZES, **options, model_type=family, head=head)
    read = read_config(write(tmp_path, **config.to_dict()))
    assert read == dataclasses.replace(config, labels=read.labels)
    assert read.label_names == config.label_names
    assert type(build_model(read)) is CLASSES[head]


def test_decoders_come_in_by_the_same_way(tmp_path: Path) -> None:
    sizes = {key: SIZES[key] for key in list(SIZES)[:5]}
    config = read_config(write(tmp_path, **sizes, model_type="llama"))
    assert isinstance(config, ModelConfig)
    assert isinstance(build_model(config), CausalLM)


def test_absent_keys_have_the_familys_defaults() -> None:
    five = {key: SIZES[key] for key in list(SIZES)[:5]}
    bert = EncoderConfig.from_dict(five | {"model_type": "bert"})
    assert (bert.pad_token_id, bert.head, bert.layer_norm_eps) == (0, None, 1e-12)
    assert type(build_model(bert)) is Encoder
    roberta = EncoderConfig.from_dict(five | {"architectures": ["RobertaForTokenClassification"]})
    assert (roberta.pad_token_id, roberta.head, roberta.first_position) == (1, "token", 2)
    old = EncoderConfig.from_dict(five | {"architectures": ["BertForPreTraining"]})
    assert old.head == "masked"
    named = {"1": "b", "0": "a", "2": "c"}
    labelled = EncoderConfig.from_dict(five | {"model_type": "bert", "id2label": named})
    assert (labelled.num_labels, labelled.label_names) == (3, ("a", "b", "c"))
    null = EncoderConfig.from_dict(five | {"model_type": "bert", "pad_token_id": None})
    assert null.pad_token_id is None
    assert build_model(null).get_input_embeddings().padding_idx is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "distilbert"}, "model_type 'distilbert' is not implemented; known: bert,"),
        ({"model_type": "distilbert"}, "llama, .*xlm-roberta"),
        ({"model_type": None, "architectures": ["T5Model"]}, "'T5Model' is not .*BertModel.*Llama"),
        ({"model_type": None}, "the key model_type is missing"),
        ({"model_type": ["bert"]}, r"model_type must be a name; got \['bert'\]"),
        ({"architectures": [{}]}, "architectures must be a name; got {}"),
        (
            {"architectures": ["BertForMultipleChoice"]},
            "'BertForMultipleChoice' is not implemented",
        ),
        ({"architectures": ["RobertaModel"]}, "RobertaModel, which is 'roberta', and model_type"),
        ({"hidden_size": None}, "the key hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be of type int; got '32'"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1; got 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
        ({"vocab_size": 2**31}, "vocab_size must be at most 2147483647"),
        ({"type_vocab_size": 0}, "type_vocab_size must be at least 1"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not implemented; known: gelu,"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must lie in \[0, 1\); got 1.0"),
        ({"classifier_dropout": -0.1}, "classifier_dropout must lie in"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must lie in"),
        ({"initializer_range": -1.0}, "initializer_range must be finite and 0 or more"),
        ({"is_decoder": True}, "is_decoder True is not implemented"),
        ({"add_cross_attention": True}, "add_cross_attention True is not implemented"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads .* is not implemented"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not implemented"),
        ({"pad_token_id": 61}, "pad_token_id must lie in 0 … 60 .*; got 61"),
        ({"model_type": "roberta", "pad_token_id": 39}, "pad_token_id must lie in 0 … 38"),
        ({"model_type": "roberta", "pad_token_id": None}, "roberta counts positions from"),
        ({"dtype": "int8"}, "dtype 'int8' is not implemented; known: bfloat16"),
        ({"id2label": ["a"]}, "id2label must map numbers to names; got"),
        ({"id2label": {"x": "a"}}, "id2label must map numbers to names; got"),
        ({"id2label": {"0": 1}}, "labels must hold str alone"),
        ({"id2label": {"0": "a"}, "num_labels": 2}, "num_labels is 2, and id2label has 1"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is not implemented"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "num_labels above 1"),
        ({"architectures": ["BertForQuestionAnswering"], "num_labels": 3}, "span head has 2"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool; got 1"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw = {**SIZES, "model_type": "bert", **changes}
    raw = {key: value for key, value in raw.items() if value is not None or key == "pad_token_id"}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        read_config(write(tmp_path, **raw))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "config.json"))


def test_names_have_to_be_as_many_as_labels() -> None:
    with pytest.raises(ValueError, match="3 labels need as many names"):
        EncoderConfig(**SIZES, num_labels=3, labels=("a",))


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "JSON object")])
def test_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


# --- another head ---


def test_a_head_is_asked_for() -> None:
    config = EncoderConfig(**SIZES, head="token", num_labels=5, problem_type="regression")
    model = build_model(config, head="sequence", num_labels=3)
    assert isinstance(model, SequenceClassifier)
    assert (model.config.head, model.config.num_labels, model.config.problem_type) == (
        "sequence",
        3,
        None,
    )
    assert build_model(config, head="span").config.num_labels == 2
    assert build_model(config, head="token").config == config
    assert type(build_model(config, head="none")) is Encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "ranking"}, "head must be one of none, masked, .*; got 'ranking'"),
        ({"num_labels": 3}, "num_labels is for the heads sequence, token, span; this one is none"),
        ({"head": "masked", "num_labels": 3}, "this one is masked"),
        ({"head": "span", "num_labels": 3}, "a span head has 2 outputs"),
        ({"head": "token", "num_labels": 0}, "num_labels must be at least 1; got 0"),
    ],
)
def test_heads_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(EncoderConfig(**SIZES), **options)


def test_a_decoder_has_no_such_head() -> None:
    config = ModelConfig(**{key: SIZES[key] for key in list(SIZES)[:5]})
    with pytest.raises(ValueError, match=r"are for encoders \(bert, .*\); llama is a decoder"):
        build_model(config, head="sequence")


def test_a_class_builds_its_own_head_alone() -> None:
    with pytest.raises(ValueError, match="TokenClassifier has the head 'token'; got span"):
        TokenClassifier(EncoderConfig(**SIZES, head="span"))


# --- positions and padding ---


@pytest.mark.parametrize("head", ["none", "masked", "token"])
def test_a_left_padded_row_gives_what_it_gives_alone(head: str) -> None:
    """In RoBERTa, whose positions are counted over tokens."""
    model = make("roberta", head)
    ids, pad = ids_of(1, 6), SIZES["pad_token_id"]
    padded = torch.cat([torch.full((1, 3), pad), ids], 1)
    outs = model(ids), model(padded, padded != pad)
    alone, found = (o.last_hidden_state if head == "none" else o.logits for o in outs)
    torch.testing.assert_close(found[:, 3:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_on_the_right_changes_nothing(family: str) -> None:
    model = make(family)
    ids, pad = ids_of(1, 6), SIZES["pad_token_id"]
    padded = torch.cat([ids, torch.full((1, 3), pad)], 1)
    found = model(padded, (padded != pad).long()).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(padded).logits, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_row_of_padding_has_numbers_and_gradients(family: str) -> None:
    model = make(family)
    mask = torch.ones(3, 9)
    mask[1] = 0
    out = model(ids_of(), mask, labels=torch.tensor([0, 1, 1]))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_where_queries_may_look() -> None:
    """Also where a kernel would divide 0 by 0: a row of padding sees all of itself."""
    assert padding_mask(None) is None
    assert padding_mask(torch.ones(2, 3)) is None
    seen = padding_mask(torch.tensor([[1, 1, 0], [0, 0, 0], [0.0, 0.5, 1.0]]))
    assert seen.shape == (3, 1, 3, 3)
    assert seen[:, 0].tolist() == [
        [[True, True, False]] * 3,
        [[True, True, True]] * 3,
        [[False, True, True]] * 3,
    ]


@pytest.mark.parametrize(("family", "room"), [("bert", 40), ("roberta", 38)])
def test_a_text_beyond_the_table_is_refused(family: str, room: int) -> None:
    model = make(family)
    model(ids_of(1, room))
    message = f"the text has {room + 1} tokens; the model has {room} positions"
    with pytest.raises(ValueError, match=message):
        model(ids_of(1, room + 1))
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=torch.randn(1, room + 1, 32))
    if family == "roberta":  # columns are more, but its tokens have positions
        ids = ids_of(1, room + 4)
        ids[:, :4] = SIZES["pad_token_id"]
        model(ids, ids != SIZES["pad_token_id"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": ids_of(), "inputs_embeds": torch.randn(3, 9, 32)}, "give either input_ids"),
        (
            {"input_ids": ids_of(), "attention_mask": torch.ones(3, 8)},
            r"attention_mask must have shape \(3, 9\); got \(3, 8\)",
        ),
        (
            {"input_ids": ids_of(), "token_type_ids": torch.zeros(1, 9, dtype=torch.long)},
            r"token_type_ids must have shape \(3, 9\); got \(1, 9\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(call: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(**call)


# --- names in files ---


def apply(model: EncoderModel, name: str) -> str:
    """What becomes of a tensor of the files: its name in the model, or why it is not read."""
    for pattern, replacement in model.names_in_files:
        name = re.sub(pattern, replacement, name)
    if any(re.fullmatch(pattern, name) for pattern in model.unread_in_files):
        return "unread"
    if any(re.fullmatch(pattern, name) for pattern in model.left_out_in_files):
        return "left out"
    return name if name in dict(model.named_parameters()) else f"unknown: {name}"


QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize("head", list(CLASSES))
@pytest.mark.parametrize("family", FAMILIES)
def test_names_in_files(family: str, head: str) -> None:
    model = make(family, head)
    prefix = "bert" if family == "bert" else "roberta"
    own = QUERY if head == "none" else f"{prefix}.{QUERY}"
    assert apply(model, QUERY) == apply(model, f"{prefix}.{QUERY}") == own
    norm = own.replace("self.query", "output.LayerNorm")
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        name = f"{prefix}.{QUERY}".replace("self.query.weight", f"output.LayerNorm.{old}")
        assert apply(model, name) == norm.replace("weight", new)
    for name in ("embeddings.position_ids", f"{prefix}.embeddings.position_ids"):
        assert apply(model, name) == "unread"
    for name in ("cls.seq_relationship.weight", "vocab_transform.weight", "encoder.layer.2.x"):
        assert apply(model, name).startswith("left" if name[:3] == "cls" else "unknown")
    pooled = head == "none" or (head == "sequence" and family == "bert")
    assert (apply(model, f"{prefix}.pooler.dense.weight") == "left out") is not pooled
    for name, _ in model.named_parameters():  # what is written here is read here
        assert apply(model, name) == name
    heads = {"masked": "cls.predictions.bias" if family == "bert" else "lm_head.bias"}
    heads |= {"span": "qa_outputs.bias", "token": "classifier.bias"}
    for kind, name in heads.items():
        shared = kind == "token" and head == "sequence"
        assert shared or apply(model, name) == (name if kind == head else "left out")


@pytest.mark.parametrize(
    ("had", "wanted", "out", "made"),
    [
        ({"head": None}, {"head": "sequence"}, False, True),  # not said: read if it is there
        ({"head": "masked"}, {"head": "sequence"}, True, True),
        ({"head": "sequence"}, {"head": "sequence"}, False, False),
        ({"head": "sequence"}, {"num_labels": 3}, True, True),
        ({"head": "token"}, {"head": "sequence"}, True, True),
        ({"head": "sequence"}, {}, False, False),
    ],
)
def test_a_head_that_was_asked_for_is_made(
    had: dict[str, Any], wanted: dict[str, Any], out: bool, made: bool
) -> None:
    model = build_model(EncoderConfig(**SIZES, **had), **wanted)
    fresh = [name for name, _ in model.named_parameters() if matched(model, name)]
    head = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert fresh == ([*head, "classifier.weight", "classifier.bias"] if made else [])
    assert (apply(model, "classifier.weight") == "left out") is out


def matched(model: EncoderModel, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in model.fresh_if_absent)


def test_the_pooler_alone_may_be_absent_below_no_head() -> None:
    model = make(head="none")
    fresh = [name for name, _ in model.named_parameters() if matched(model, name)]
    assert fresh == ["pooler.dense.weight", "pooler.dense.bias"]


# --- training ---


OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


@pytest.mark.parametrize("head", list(CLASSES))
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_dropout_is_for_training(family: str, head: str) -> None:
    """Each rate by itself changes what comes out, in training alone."""
    ids = ids_of()
    for name in OFF:
        model = make(family, head, **OFF | {name: 0.5})

        def tell(model: EncoderModel = model) -> Tensor:
            out = model(ids)
            return out.last_hidden_state if head == "none" else out.logits

        assert torch.equal(tell(), tell())
        model.train()
        drops = name != "classifier_dropout" or head in ("sequence", "token")
        assert torch.equal(tell(), tell()) is not drops


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_dropout_stands_where_it_was_in_pretraining(family: str) -> None:
    """A dropout of everything leaves the rest: of a layer, the residual stream."""
    model = make(family, "none")
    layer, x = model.trunk.encoder.layer[0], torch.randn(2, 5, 32)
    for part, width in ((layer.attention.output, 32), (layer.output, 48)):
        part.train().dropout.p = 1.0
        found = part(torch.randn(2, 5, width), x)
        assert torch.equal(found, part.LayerNorm(x))
    embeddings = model.trunk.embeddings.train()
    embeddings.dropout.p = 1.0
    assert not embeddings(ids_of(), None, None, None).any()


def test_dropout_stands_before_each_layer_of_the_head() -> None:
    out = torch.randn(2, 5, 32)
    plain = make("bert", "token").train()
    plain.dropout.p = 1.0
    assert torch.equal(
        plain.score(EncoderOutput(last_hidden_state=out)),
        plain.classifier.bias.expand(2, 5, -1),
    )
    head = make("roberta").classifier.train()
    for layer in (head.dense, head.out_proj):
        nn.init.ones_(layer.bias)
    seen: list[Tensor] = []
    head.dropout.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    head(out)
    assert torch.equal(seen[0], out[:, 0])
    assert seen[1].shape == (2, 32)
    head.dropout.p = 1.0
    assert torch.equal(head(out), torch.ones(2, 2))


def test_each_dropout_has_its_rate() -> None:
    rates = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.22}
    for family, where in (("bert", "dropout"), ("roberta", "classifier.dropout")):
        model = make(family, **rates, classifier_dropout=0.33)
        assert model.get_submodule(where).p == 0.33
        plain = make(family, **rates)
        assert plain.get_submodule(where).p == 0.11
        assert {m.p for m in plain.modules() if isinstance(m, nn.Dropout)} == {0.11}
        assert {m.rate for m in plain.modules() if hasattr(m, "rate")} == {0.22}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    found = []
    for on in (False, True):
        model = make(family)
        model.gradient_checkpointing = on
        assert model.gradient_checkpointing is on
        model(ids_of(2, 5) * 0 + 7, labels=torch.tensor([0, 1])).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 30
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_hidden_states_are_kept_on_request_alone() -> None:
    model, ids = make(head="none"), ids_of()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert model(ids).hidden_states is None


# --- losses ---


def test_nothing_graded_is_a_loss_of_zero() -> None:
    logits = torch.randn(2, 5, 3, requires_grad=True)
    loss = class_loss(logits, torch.full((2, 5), -100))
    loss = loss + span_loss(logits[..., 0], torch.tensor([5, 99]))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 3).to(dtype)
    for labels in (torch.tensor([0, 1, 2, 1]), torch.rand(4, 3).round()):
        found = sequence_loss(logits, labels, None)
        assert found.dtype == torch.float32
        assert found == sequence_loss(logits.float(), labels, None)


@pytest.mark.parametrize(
    ("labels", "problem", "error", "message"),
    [
        (torch.tensor([0, 1, 3]), None, ValueError, "labels must be -100 or in 0 … 2; got 3"),
        (torch.tensor([0, -1, 1]), None, ValueError, "labels must be -100 or in 0 … 2; got -1"),
        (torch.tensor([0, 1]), None, ValueError, r"labels must be \(3,\) for logits \(3, 3\); got"),
        (torch.rand(3), "single_label_classification", TypeError, "labels must be integers"),
        (
            torch.rand(3),
            None,
            ValueError,
            r"labels for multi_label_classification must be \(3, 3\)",
        ),
        (torch.rand(3), "regression", ValueError, r"labels for regression must be \(3, 3\)"),
    ],
)
def test_labels_that_do_not_fit(
    labels: Tensor, problem: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sequence_loss(torch.randn(3, 3), labels, problem)


def test_a_column_of_labels_is_as_good_as_a_row() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    assert sequence_loss(logits, labels, None) == sequence_loss(logits, labels[:, None], None)
    one, numbers = torch.randn(4, 1), torch.randn(4)
    assert sequence_loss(one, numbers, None) == sequence_loss(one, numbers[:, None], None)


def test_spans_need_both_ends() -> None:
    model = make(head="span")
    with pytest.raises(ValueError, match="give both start_positions and end_positions"):
        model(ids_of(), start_positions=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"must be \(3,\); got \(2,\)"):
        model(ids_of(), start_positions=torch.tensor([0, 1]), end_positions=torch.tensor([0, 1]))
    column = torch.tensor([[1], [2], [3]])
    ids = ids_of()
    row = model(ids, start_positions=column[:, 0], end_positions=column[:, 0])
    assert model(ids, start_positions=column, end_positions=column).loss == row.loss


# --- weights ---


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_fresh_weights(family: str) -> None:
    model = make(family, "masked", hidden_size=64, vocab_size=500)
    model.init_weights(0.5)
    words = model.get_input_embeddings().weight
    assert not words[1].any()  # padding
    assert (model.trunk.embeddings.position_embeddings.weight[1].any()) == (family == "bert")
    assert 0.48 < words[2:].std() < 0.52
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name.lower():
            assert (parameter == 1).all(), name
    model.init_weights()
    assert 0.019 < words[2:].std() < 0.021
    before = words.detach().clone()
    names = [name for name, _ in model.named_parameters() if name.startswith(("cls", "lm_head"))]
    first = {name: model.get_parameter(name).detach().clone() for name in names}
    model.init_fresh(names, generator=torch.Generator().manual_seed(9))
    assert torch.equal(before, words)
    changed = [name for name in names if not torch.equal(first[name], model.get_parameter(name))]
    assert [name.rsplit(".", 1)[-1] for name in changed] == ["weight"]  # the dense layer's


def test_the_masked_head_is_tied() -> None:
    for family in ("bert", "roberta"):
        model = make(family, "masked")
        words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
        assert decoder.weight is words.weight
        assert decoder.bias is model.predictions.bias
        words.weight = nn.Parameter(words.weight.detach().clone())  # as a loader does
        model.tie_weights()
        assert decoder.weight is words.weight
        loose = make(family, "masked", tie_word_embeddings=False)
        assert loose.get_output_embeddings().weight is not loose.get_input_embeddings().weight


@pytest.mark.parametrize("head", list(CLASSES))
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_on_the_meta_device_weights_alone_are_missing(family: str, head: str) -> None:
    whole = make(family, head)
    with torch.device("meta"):
        empty = build_model(whole.config)
    assert not list(empty.buffers())
    empty.load_state_dict(whole.state_dict(), assign=True)
    empty.tie_weights()
    ids = ids_of()
    for one, other in zip(vars(whole(ids)).values(), vars(empty.eval()(ids)).values(), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
