"""Rotary angles against transformers', through its configuration classes, in every dialect."""

import copy
import json
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.models.rope import ROPE_TYPES, Rotary
from lora_core.models.rope_config import check_rope, read_rope, read_rope_by_type, rope_to_dict

pytestmark = pytest.mark.oracle

CONTEXT = "original_max_position_embeddings"
MAXIMUM = "max_position_embeddings"
HEADS = 2
PHI = {"su": "longrope", "yarn": "longrope"}
GEMMA = {"full_attention": 1e6, "sliding_attention": 1e4}


@pytest.fixture(scope="module")
def transformers(oracle: Any) -> ModuleType:
    return oracle("transformers")


class Peer:
    """transformers' configuration and rotary embedding for a config.json of one family."""

    def __init__(self, transformers: ModuleType, family: str, raw: dict[str, Any]) -> None:
        head_dim = raw["head_dim"]
        sizes = {"hidden_size": HEADS * head_dim, "num_attention_heads": HEADS}
        sizes |= {"num_hidden_layers": 6, "num_key_value_heads": HEADS}
        name = {"smollm3": "SmolLM3", "gemma3_text": "Gemma3Text"}.get(family, family.title())
        config = getattr(transformers, f"{name}Config")
        raw = json.loads(json.dumps(sizes | raw | {"pad_token_id": None}))  # as from a file
        if (raw.get("rope_scaling") or {}).get("type") == "su":
            raw["rope_scaling"]["type"] = "longrope"  # transformers 5.23 stops at its own old name
        self.config = config.from_dict(raw)
        name = "gemma3" if family == "gemma3_text" else family
        module = getattr(transformers.models, name)
        code = getattr(module, f"modeling_{name}")
        name = {"smollm3": "SmolLM3"}.get(name, name.title())
        self.rotary = getattr(code, f"{name}RotaryEmbedding")(self.config)

    def __call__(
        self, positions: Tensor, *layer_type: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        x = torch.zeros((), dtype=dtype)
        cos, sin = self.rotary(x, positions, *layer_type)
        return cos[:, None], sin[:, None]


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


numbers = st.floats(1.01, 100.0)
contexts = st.integers(8, 5000)


@st.composite
def ropes(draw: st.DrawFn, name: str, channels: int) -> dict[str, Any]:
    """`rope_parameters` of a type as files have them: keys left out, whole numbers, nulls."""
    rope: dict[str, Any] = {"rope_type": name}
    rope["rope_theta"] = draw(st.sampled_from([10000, 5e5]) | st.floats(10.0, 1e7))
    if name in ("linear", "dynamic", "llama3"):
        rope["factor"] = draw(st.integers(1, 64) | numbers)
    if name == "llama3":
        rope["low_freq_factor"] = draw(st.floats(0.5, 4.0))
        rope["high_freq_factor"] = rope["low_freq_factor"] + draw(st.floats(0.1, 8.0))
    if name == "yarn":
        rope["factor"] = draw(numbers | st.none())
        rope |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "attention_factor": st.floats(0.1, 2.0) | st.none(),
                    "mscale": st.floats(0.1, 2.0) | st.none(),
                    "mscale_all_dim": st.floats(0.1, 2.0) | st.just(0),
                    "beta_fast": st.floats(8.0, 64.0) | st.none(),
                    "beta_slow": st.floats(0.5, 8.0),
                    "truncate": st.booleans(),
                },
            )
        )
    if name == "longrope":
        factors = st.lists(st.floats(0.5, 64.0), min_size=channels // 2, max_size=channels // 2)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors)}
        rope |= draw(
            st.fixed_dictionaries(
                {}, optional={"factor": numbers, "attention_factor": st.floats(0.1, 2.0)}
            )
        )
    if name in ("llama3", "yarn", "longrope") and draw(st.booleans()):
        rope[CONTEXT] = draw(contexts)
    return rope


@st.composite
def files(draw: st.DrawFn, name: str, share: bool = True) -> dict[str, Any]:
    """config.json of a model with one rotation for all layers, in one of the dialects."""
    head_dim = 2 * draw(st.integers(4, 64))
    raw: dict[str, Any] = {"head_dim": head_dim, MAXIMUM: draw(contexts)}
    channels = head_dim
    if share and draw(st.booleans()):
        raw["partial_rotary_factor"] = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
        channels = int(head_dim * raw["partial_rotary_factor"])
        if channels % 2 or channels < 4:
            del raw["partial_rotary_factor"]
            channels = head_dim
    rope = draw(ropes(name, channels))
    if name in ("llama3", "yarn", "longrope") and draw(st.booleans()):
        raw[CONTEXT] = draw(contexts)
    dialect = draw(st.sampled_from(["new", "new inside", "old", "older"]))
    if dialect == "new inside" and "partial_rotary_factor" in raw:
        rope["partial_rotary_factor"] = raw.pop("partial_rotary_factor")
    if dialect.startswith("new"):
        return raw | {"rope_parameters": rope}
    raw["rope_theta"] = rope.pop("rope_theta")
    if dialect == "older":
        rope["type"] = rope.pop("rope_type")
    return raw | {"rope_scaling": rope}


@st.composite
def positions(draw: st.DrawFn, raw: dict[str, Any]) -> Tensor:
    """(B, T) whose largest one is short, long, or beside the contexts that decide."""
    edges = [raw[MAXIMUM], raw.get(CONTEXT, 1)]
    for key in ("rope_parameters", "rope_scaling"):
        edges.append((raw.get(key) or {}).get(CONTEXT) or 1)
    edges = [edge + by for edge in edges for by in (-2, -1, 0, 1)]
    last = max(0, draw(st.sampled_from([3, 131071, *edges])))
    others = draw(st.lists(st.integers(0, last), min_size=5, max_size=5))
    return torch.tensor([*others[:2], last, *others[2:]]).view(2, 3)


def ours_of(raw: dict[str, Any], **family: Any) -> dict[str, Any]:
    given = copy.deepcopy(raw)
    rope = check_rope(read_rope(raw, **family), raw["head_dim"])
    assert raw == given
    return rope


def dialects(rope: dict[str, Any], raw: dict[str, Any]) -> list[dict[str, Any]]:
    """What is written for a rotation: both dialects, the new one and the older one."""
    sizes = {key: raw[key] for key in ("head_dim", MAXIMUM)}
    both = json.loads(json.dumps(rope_to_dict(rope, raw[MAXIMUM]))) | sizes
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    apart = ("rope_scaling", "rope_theta", "partial_rotary_factor", "rope_local_base_freq")
    return [both, {key: value for key, value in both.items() if key not in apart}, old]


@pytest.mark.parametrize("name", ROPE_TYPES)
@given(data=st.data())
def test_frequencies_and_angles_are_transformers(
    transformers: ModuleType, name: str, data: st.DataObject
) -> None:
    # Llama's plain rotation turns whole heads whatever the file says
    raw = data.draw(files(name, share=name != "default"))
    rope = ours_of(raw)
    theirs, rotary = Peer(transformers, "llama", raw), Rotary(raw["head_dim"], rope)
    assert torch.equal(rotary.inv_freq, theirs.rotary.inv_freq)
    at = data.draw(positions(raw))
    angles = rotary(at)
    assert same(angles, theirs(at))
    for written in dialects(rope, raw):
        assert ours_of(written, theta=3.0) == rope
        assert same(angles, Peer(transformers, "llama", written)(at))


@given(data=st.data())
def test_bfloat16_is_rounded_by_transformers_alone(
    transformers: ModuleType, data: st.DataObject
) -> None:
    raw = data.draw(files("yarn"))
    at = data.draw(positions(raw))
    cos, sin = Rotary(raw["head_dim"], ours_of(raw)).bfloat16()(at)
    assert cos.dtype == torch.float32
    rounded = cos.bfloat16(), sin.bfloat16()
    assert same(rounded, Peer(transformers, "llama", raw)(at, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["default", "longrope"])
@given(data=st.data())
def test_phi3_in_all_its_spellings(
    transformers: ModuleType, name: str, data: st.DataObject
) -> None:
    raw = data.draw(files(name))
    raw.setdefault(CONTEXT, 4096)  # what the family's class has
    scaling = raw.get("rope_scaling")
    if scaling and "type" in scaling and name == "longrope":
        scaling["type"] = data.draw(st.sampled_from(["su", "yarn", "longrope"]))
    rope = ours_of(raw, aliases=PHI)
    theirs, rotary = Peer(transformers, "phi3", raw), Rotary(raw["head_dim"], rope)
    assert rope["rope_type"] == theirs.config.rope_parameters["rope_type"] == name
    assert torch.equal(rotary.inv_freq, theirs.rotary.inv_freq)
    at = data.draw(positions(raw))
    angles = rotary(at)
    assert same(angles, theirs(at))
    for written in dialects(rope, raw):
        assert same(angles, Peer(transformers, "phi3", written)(at))


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn"])
@given(data=st.data())
def test_gemma3_with_two_rotations(
    transformers: ModuleType, name: str, data: st.DataObject
) -> None:
    raw: dict[str, Any] = {"head_dim": 2 * data.draw(st.integers(2, 32)), MAXIMUM: 4096}
    full = data.draw(ropes(name, raw["head_dim"]))
    full.pop("truncate", None)  # of nested ones transformers reads it from the wrong place
    dialect = data.draw(st.sampled_from(["new", "half", "old", "bare"]))
    if dialect == "new":
        local = data.draw(ropes("default", 4))
        raw["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    elif dialect == "half":
        raw["rope_parameters"] = {"full_attention": full}
    else:
        raw["rope_scaling"] = full
        theta = full.pop("rope_theta")
        if dialect == "old":
            raw |= {"rope_theta": theta, "rope_local_base_freq": data.draw(numbers)}
    rope = check_rope(read_rope_by_type(raw, theta=GEMMA), raw["head_dim"])
    theirs = Peer(transformers, "gemma3_text", raw)
    at = torch.tensor([[0, 1, 4095], [7, 131071, 100]])
    for kind in GEMMA:
        rotary = Rotary(raw["head_dim"], rope[kind])
        assert torch.equal(rotary.inv_freq, getattr(theirs.rotary, f"{kind}_inv_freq"))
        assert same(rotary(at), theirs(at, kind))
        for written in dialects(rope, raw):
            assert same(rotary(at), Peer(transformers, "gemma3_text", written)(at, kind))


def test_thetas_of_the_families(transformers: ModuleType) -> None:
    raw = {"head_dim": 8, MAXIMUM: 64}
    at = torch.tensor([[3, 1000]])
    for family, theta in {"llama": 1e4, "phi3": 1e4, "smollm3": 2e6}.items():
        ours = Rotary(8, ours_of(raw, theta=theta))
        assert same(ours(at), Peer(transformers, family, raw)(at))
    scaling = {"rope_scaling": {"type": "yarn", "factor": 2.0}, CONTEXT: 32}
    ours = Rotary(8, ours_of(raw | scaling, theta=2e6))
    assert same(ours(at), Peer(transformers, "smollm3", raw | scaling)(at))


def factors(count: int, last: float) -> list[float]:
    return torch.linspace(1.0, last, count).tolist()


# the numbers of files in circulation, which have more keys than the formulas read
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1": (
        "llama",
        {
            "head_dim": 128,
            MAXIMUM: 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                CONTEXT: 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "Qwen 2.5, extended as its card says": (
        "qwen2",
        {
            "head_dim": 128,
            MAXIMUM: 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 4.0, CONTEXT: 32768, "type": "yarn"},
        },
    ),
    "DeepSeek's yarn": (
        "llama",
        {
            "head_dim": 64,
            MAXIMUM: 163840,
            "rope_theta": 10000,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 0.707,
                CONTEXT: 4096,
                "type": "yarn",
            },
        },
    ),
    "yarn whose ramp ends behind the last channel": (
        "llama",
        {
            "head_dim": 64,
            MAXIMUM: 20000,
            "rope_theta": 10.0,
            "rope_scaling": {"factor": 4.0, CONTEXT: 1000, "type": "yarn"},
        },
    ),
    "Phi-3 mini 128k": (
        "phi3",
        {
            "head_dim": 96,
            MAXIMUM: 131072,
            CONTEXT: 4096,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "long_factor": factors(48, 64.0),
                "short_factor": factors(48, 3.0),
                "type": "su",
            },
        },
    ),
    "Phi-4 mini": (
        "phi3",
        {
            "head_dim": 128,
            MAXIMUM: 131072,
            CONTEXT: 4096,
            "partial_rotary_factor": 0.75,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "long_factor": factors(48, 48.0),
                "short_factor": factors(48, 1.0),
                "type": "longrope",
            },
        },
    ),
}


@pytest.mark.parametrize(("family", "raw"), FILES.values(), ids=FILES.keys())
def test_files_in_circulation(transformers: ModuleType, family: str, raw: dict[str, Any]) -> None:
    rope = ours_of(raw, aliases=PHI if family == "phi3" else {})
    rotary = Rotary(raw["head_dim"], rope)
    for last in (0, 4095, 4096, 8191, 32768, 131071):
        at = torch.arange(max(0, last - 20), last + 1)[None]
        assert same(rotary(at), Peer(transformers, family, raw)(at))


def test_dynamic_is_transformers_while_texts_grow_and_has_no_memory(
    transformers: ModuleType,
) -> None:
    raw = {
        "head_dim": 16,
        MAXIMUM: 64,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "dynamic", "factor": 1.3},  # rounds at the context itself
    }
    ours, theirs = Rotary(16, ours_of(raw)), Peer(transformers, "llama", raw)
    for last in (10, 63, 64, 65, 200):
        at = torch.tensor([[0, last]])
        assert same(ours(at), theirs(at))
    back = torch.tensor([[0, 100]])  # shorter than what transformers saw, beyond the context
    assert not same(ours(back), theirs(back))
    assert same(ours(back), Peer(transformers, "llama", raw)(back))
    assert same(ours(torch.tensor([[5]])), theirs(torch.tensor([[5]])))
