"""Names in files and names in a model: every rule, both ways."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.checkpoint.names import naming, pieces

SIZE = st.integers(1, 4)


@given(st.sampled_from(["gate_up_proj", "down_proj"]), SIZE, SIZE, SIZE)
def test_pieces_cover_a_stacked_parameter_exactly_once(last: str, e: int, n: int, k: int) -> None:
    shape = (e, 2 * n, k)
    parts = pieces(f"a.experts.{last}", shape)
    assert len({part.name for part in parts}) == len(parts)
    counted, numbered = torch.zeros(shape), torch.arange(e * 2 * n * k).view(shape)
    again = torch.full(shape, -1)
    for part in parts:
        assert counted[part.where].shape == part.shape
        counted[part.where] += 1
        again[part.where] = numbered[part.where].clone()
    assert (counted == 1).all()
    assert torch.equal(again, numbered)


def test_experts_have_the_names_that_they_have_on_disk() -> None:
    parts = pieces("l.mlp.experts.gate_up_proj", (2, 6, 5))
    assert [part.name for part in parts] == [
        "l.mlp.experts.0.gate_proj.weight",
        "l.mlp.experts.0.up_proj.weight",
        "l.mlp.experts.1.gate_proj.weight",
        "l.mlp.experts.1.up_proj.weight",
    ]
    assert parts[1].shape == (3, 5)
    assert parts[1].where == (0, slice(3, 6))  # gate's rows over up's
    down = pieces("l.mlp.experts.down_proj", (2, 5, 3))
    assert [(part.layer, part.shape) for part in down] == [
        ("l.mlp.experts.0.down_proj", (5, 3)),
        ("l.mlp.experts.1.down_proj", (5, 3)),
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("l.mlp.gate_up_proj.weight", (6, 5)), ("l.mlp.down_proj.weight", (5, 3)), ("norm", (3,))],
)
def test_other_parameters_are_themselves(name: str, shape: tuple[int, ...]) -> None:
    (part,) = pieces(name, shape)
    assert (part.name, part.shape, part.where) == (name, shape, ())


TEXT = ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight"]
VISION = ["vision_tower.encoder.weight", "multi_modal_projector.linear.weight"]


@pytest.mark.parametrize(
    ("text", "head", "vision"),
    [
        ("language_model.model.", "language_model.lm_head.weight", ""),
        ("model.language_model.", "lm_head.weight", "model."),
    ],
    ids=["older", "newer"],
)
def test_the_text_part_of_a_multimodal_model(text: str, head: str, vision: str) -> None:
    names = [text + name for name in TEXT] + [head] + [vision + name for name in VISION]
    found = naming(names, {"text_config": {}}, object())
    assert list(found.files) == [f"model.{name}" for name in TEXT] + ["lm_head.weight"]
    assert list(found.files.values()) == names[:4]
    assert found.left_out == tuple(names[4:])


def test_without_a_text_config_nothing_is_left_out() -> None:
    names = ["model.norm.weight", "vision_tower.encoder.weight"]
    found = naming(names, {}, object())
    assert list(found.files) == names
    assert found.left_out == ()


def test_a_bare_trunk_gets_its_prefix() -> None:
    assert list(naming(TEXT, {}, object()).files) == [f"model.{name}" for name in TEXT]


def test_what_follows_from_the_configuration_is_let_pass() -> None:
    found = naming(["model.layers.0.self_attn.rotary_emb.inv_freq"], {}, object())
    assert (found.files, found.left_out) == ({}, ())


def test_a_model_adds_rules_of_its_own() -> None:
    model = SimpleNamespace(
        names_in_files=((r"\.gamma$", ".weight"), (r"^(?=encoder\.)", "bert.")),
        unread_in_files=(r".*\.position_ids",),
        left_out_in_files=(r"bert\.pooler\..*", r"cls\..*"),
    )
    names = ["encoder.norm.gamma", "encoder.position_ids", "cls.a", "bert.pooler.b", "clsx.c"]
    found = naming(names, {}, model)
    assert found.files == {"bert.encoder.norm.weight": "encoder.norm.gamma", "clsx.c": "clsx.c"}
    assert found.left_out == ("cls.a", "bert.pooler.b")


def test_two_tensors_that_would_be_one_are_refused() -> None:
    names = ["language_model.model.norm.weight", "model.language_model.norm.weight"]
    raw: dict[str, Any] = {"text_config": {}}
    with pytest.raises(ValueError, match=re.escape(f"{names[0]} and {names[1]} are both")):
        naming(names, raw, object())
