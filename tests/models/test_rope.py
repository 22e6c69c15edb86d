"""Rotary embedding: a rotation, relative, in Hugging Face's half layout; the scalings in use."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.models.rope import (
    ROPE_TYPES,
    Rotary,
    inverse_frequencies,
    rotary_channels,
    rotate,
)
from lora_core.models.rope_config import check_rope, read_rope, read_rope_by_type, rope_to_dict

DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
CONTEXT = "original_max_position_embeddings"
LLAMA3 = DEFAULT | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    CONTEXT: 8192,
}
LINEAR = DEFAULT | {"rope_type": "linear", "factor": 4.0}
DYNAMIC = DEFAULT | {"rope_type": "dynamic", "factor": 2.0, CONTEXT: 64}
YARN = DEFAULT | {"rope_type": "yarn", "factor": 4.0, CONTEXT: 1024}
LONG = DEFAULT | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 16.0,
    CONTEXT: 64,
}
ALL = {rope["rope_type"]: rope for rope in (DEFAULT, LLAMA3, LINEAR, DYNAMIC, YARN, LONG)}
each = pytest.mark.parametrize("rope", ALL.values(), ids=ALL.keys())


def test_every_type_is_tested() -> None:
    assert ALL.keys() == ROPE_TYPES.keys()


def test_rotation_by_hand() -> None:
    """D = 4: channel 0 pairs with 2 and turns by p, channel 1 with 3 and turns by p / 100."""
    cos, sin = Rotary(4, DEFAULT)(torch.tensor([[3]]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    a, b = 3.0, 0.03
    expected = [
        math.cos(a) * 1 - math.sin(a) * 3,
        math.cos(b) * 2 - math.sin(b) * 4,
        math.cos(a) * 3 + math.sin(a) * 1,
        math.cos(b) * 4 + math.sin(b) * 2,
    ]
    torch.testing.assert_close(rotate(x, cos, sin).flatten(), torch.tensor(expected))


@given(half=st.integers(1, 16), i=st.integers(0, 50), j=st.integers(0, 50), by=st.integers(0, 50))
def test_products_depend_on_the_distance_alone(half: int, i: int, j: int, by: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 2 * half, dtype=torch.float64)
    rotary = Rotary(2 * half, DEFAULT)

    def product(at: int, other: int) -> torch.Tensor:
        (a, b), (c, d) = rotary(torch.tensor([[at]])), rotary(torch.tensor([[other]]))
        return (rotate(q, a, b) * rotate(k, c, d)).sum()

    # angles are float32: off by half a unit in the last place of a position up to 100
    bound = 4 * 100 * torch.finfo(torch.float32).eps * q.norm() * k.norm()
    assert (product(i, j) - product(i + by, j + by)).abs() <= bound


def test_lengths_are_kept() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    turned = rotate(x, *Rotary(8, DEFAULT)(torch.arange(5)[None]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends() -> None:
    plain, scaled = inverse_frequencies(128, DEFAULT), inverse_frequencies(128, LLAMA3)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_linear_divides_every_frequency() -> None:
    assert torch.equal(inverse_frequencies(8, LINEAR), inverse_frequencies(8, DEFAULT) / 4)
    cos, _ = Rotary(8, LINEAR)(torch.tensor([[20]]))
    torch.testing.assert_close(cos, Rotary(8, DEFAULT)(torch.tensor([[5]]))[0])


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_blends() -> None:
    plain, scaled = inverse_frequencies(128, DEFAULT), inverse_frequencies(128, YARN)
    turns = 1024 * plain / (2 * math.pi)  # within the original context
    fast, slow = turns > 1.2 * 32, turns < 0.8
    torch.testing.assert_close(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 4)
    ratio = scaled / plain
    assert (ratio.diff() <= 1e-6).all()
    assert ((ratio > 0.26) & (ratio < 0.99)).any()


def test_yarn_whole_and_fractional_bounds_differ() -> None:
    whole, exact = (inverse_frequencies(128, YARN | {"truncate": on}) for on in (True, False))
    assert torch.equal(whole, inverse_frequencies(128, YARN))
    assert not torch.equal(whole, exact)


def test_yarn_at_the_ends_of_its_ramp() -> None:
    # no pair turns once in 6 tokens: both bounds are pair 0, and the ramp is a step behind it
    plain, step = inverse_frequencies(128, DEFAULT), inverse_frequencies(128, YARN | {CONTEXT: 6})
    assert torch.equal(step[:1], plain[:1])
    torch.testing.assert_close(step[1:], plain[1:] / 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        (
            {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
    ],
)
def test_attention_factor_of_yarn(changes: dict[str, float], expected: float) -> None:
    positions = torch.arange(50)[None]
    cos, sin = Rotary(8, YARN | changes)(positions)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full((1, 1, 50, 8), expected))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, math.sqrt(1 + math.log(16) / math.log(64))),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.3}, 1.3),
    ],
)
def test_attention_factor_of_longrope(changes: dict[str, float], expected: float) -> None:
    cos, sin = Rotary(8, LONG | changes)(torch.arange(50)[None])
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full((1, 1, 50, 8), expected))


def test_longrope_takes_the_list_of_the_largest_position() -> None:
    plain = Rotary(8, DEFAULT).inv_freq
    rotary = Rotary(8, LONG | {"attention_factor": 1.0})
    for last, name in ((63, "short_factor"), (64, "long_factor"), (5, "short_factor")):
        positions = torch.tensor([[1, 2, 3], [0, last, 1]])
        angles = positions[:, None, :, None] * (plain / torch.tensor(LONG[name]))
        cos, sin = rotary(positions)
        torch.testing.assert_close(cos[..., :4], angles.cos())
        torch.testing.assert_close(sin[..., 4:], angles.sin())


def test_dynamic_grows_with_the_text_and_keeps_no_state() -> None:
    rotary, plain = Rotary(16, DYNAMIC), Rotary(16, DEFAULT)
    short = torch.arange(64)[None]
    assert all(map(torch.equal, rotary(short), plain(short)))
    for length in (65, 128, 1000):
        # theta' is such that the slowest pair is stretched as far as interpolation does
        stretch = 2.0 * length / 64 - 1
        theta = 10000.0 * stretch ** (16 / 14)
        expected = Rotary(16, DEFAULT | {"rope_theta": theta})
        slowest = plain.inv_freq[-1] / expected.inv_freq[-1]
        assert slowest == pytest.approx(stretch, rel=1e-5)
        positions = torch.tensor([[3, length - 1]])
        torch.testing.assert_close(rotary(positions), expected(positions), rtol=0, atol=2e-4)
    assert all(map(torch.equal, rotary(short), plain(short)))


@given(
    share=st.floats(0.01, 1.0),
    head_dim=st.integers(1, 64).map(lambda n: 2 * n),
)
def test_partial_rotation_leaves_the_last_channels(share: float, head_dim: int) -> None:
    rope = DEFAULT | {"partial_rotary_factor": share}
    channels = rotary_channels(head_dim, rope)
    assert channels == math.floor(head_dim * share)
    if channels < 2 or channels % 2:
        with pytest.raises(ValueError, match=f"turns {channels} channels; it must be an even"):
            check_rope(rope, head_dim)
        return
    cos, sin = Rotary(head_dim, rope)(torch.arange(3)[None])
    assert cos.shape == sin.shape == (1, 1, 3, channels)
    assert torch.equal(cos, Rotary(channels, DEFAULT)(torch.arange(3)[None])[0])
    x = torch.randn(1, 1, 3, head_dim)
    assert torch.equal(rotate(x, cos, sin)[..., channels:], x[..., channels:])


@each
def test_shapes_and_dtype(rope: dict[str, Any]) -> None:
    for positions in (torch.randint(0, 99, (3, 5)), torch.arange(5)[None], torch.tensor([[200]])):
        for angles in Rotary(8, rope)(positions):
            assert angles.dtype == torch.float32
            assert angles.shape == (positions.shape[0], 1, positions.shape[1], 8)
            assert torch.equal(angles[..., :4], angles[..., 4:])


@each
def test_casts_and_meta_construction_leave_the_angles_alone(rope: dict[str, Any]) -> None:
    positions = torch.tensor([[0, 7, 100]])
    expected = Rotary(8, rope)(positions)
    with torch.device("meta"):
        empty = Rotary(8, rope)
    narrow = Rotary(8, rope).bfloat16()
    torch.set_default_dtype(torch.float64)
    try:
        wide = Rotary(8, rope)
    finally:
        torch.set_default_dtype(torch.float32)
    made = (empty.to_empty(device="cpu"), narrow, narrow.double(), wide, copy.deepcopy(wide))
    for rotary in made:
        assert all(map(torch.equal, rotary(positions), expected))
        assert not rotary.state_dict()
    # a model on the meta device gives shapes alone, and is none the worse for it
    assert empty(positions.to("meta"))[0].device.type == "meta"
    assert all(map(torch.equal, empty(positions), expected))


@each
def test_one_graph(rope: dict[str, Any]) -> None:
    rotary = Rotary(8, rope)
    compiled = torch.compile(rotary, fullgraph=True, backend="eager")
    for last in (5, 500):
        positions = torch.tensor([[0, last]])
        assert all(map(torch.equal, compiled(positions), rotary(positions)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 64, 16).to(dtype)
    cos, sin = Rotary(16, DEFAULT)(torch.arange(64)[None])
    turned = rotate(x, cos, sin)
    assert turned.dtype == dtype
    assert torch.equal(turned, rotate(x.float(), cos, sin).to(dtype))


# reading


def test_an_empty_file_is_the_plain_rotation() -> None:
    assert read_rope({}) == DEFAULT
    assert read_rope({}, theta=5e5) == DEFAULT | {"rope_theta": 5e5}
    nulls = dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta"))
    assert read_rope({**nulls, "partial_rotary_factor": None}) == DEFAULT
    assert read_rope({"rope_parameters": {}, "rope_scaling": {}}) == DEFAULT


def test_both_dialects_are_one() -> None:
    scaling = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")}
    for name in ("type", "rope_type"):
        old = {"rope_theta": 7.0, "rope_scaling": scaling | {name: "yarn"}}
        assert read_rope(old) == YARN | {"rope_theta": 7.0}
    assert read_rope({"rope_parameters": YARN, "rope_theta": 7.0}) == YARN
    both = {"rope_parameters": YARN, "rope_scaling": scaling | {"type": "yarn"}}
    assert read_rope(both, theta=7.0) == YARN
    assert read_rope({"rope_scaling": scaling | {"type": "yarn", "rope_type": "yarn"}}) == YARN
    # null is an absent number, but neither yes nor no
    assert read_rope({"rope_parameters": YARN | {"mscale": None}}) == YARN
    assert read_rope({"rope_parameters": YARN | {"truncate": None}})["truncate"] is None


def test_partial_rotary_factor_stands_inside_or_outside() -> None:
    share = {"partial_rotary_factor": 0.5}
    assert read_rope(share) == DEFAULT | share
    assert read_rope({"rope_parameters": DEFAULT | share}) == DEFAULT | share
    inner = {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.25}}
    assert read_rope(inner | share) == DEFAULT | {"partial_rotary_factor": 0.25}
    for one in (1, 1.0):
        assert read_rope({"partial_rotary_factor": one}) == DEFAULT
        assert read_rope({"rope_parameters": DEFAULT | {"partial_rotary_factor": one}}) == DEFAULT


@pytest.mark.parametrize("name", ["llama3", "yarn", "longrope"])
def test_the_original_context_comes_from_outside_inside_or_the_maximum(name: str) -> None:
    rope = ALL[name] | {"factor": 3.0}
    raw = {"rope_parameters": rope, "max_position_embeddings": 640}
    assert read_rope(raw)[CONTEXT] == rope[CONTEXT]
    assert read_rope(raw | {CONTEXT: 320})[CONTEXT] == 320
    without = {key: value for key, value in rope.items() if key != CONTEXT}
    assert read_rope(raw | {"rope_parameters": without})[CONTEXT] == 640
    assert read_rope(raw | {"rope_parameters": without | {CONTEXT: None}})[CONTEXT] == 640
    assert read_rope(raw)["factor"] == 3.0


@pytest.mark.parametrize("name", ["yarn", "longrope"])
def test_an_absent_factor_is_the_ratio_of_the_contexts(name: str) -> None:
    rope = {key: value for key, value in ALL[name].items() if key != "factor"}
    for absent in ({}, {"factor": None}):
        raw = {"rope_parameters": rope | absent, "max_position_embeddings": 4096}
        assert read_rope(raw)["factor"] == 4096 / rope[CONTEXT]
    # neither number: nothing to work out, and the check says what is missing
    for size in (None, "4096", 0, True):
        assert "factor" not in read_rope({"rope_parameters": rope, "max_position_embeddings": size})


def test_the_context_of_dynamic_is_the_maximum() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, CONTEXT: 7}
    read = read_rope({"rope_scaling": rope, "max_position_embeddings": 64})
    assert read == DYNAMIC


def test_other_names_of_a_type() -> None:
    aliases = {"su": "longrope", "yarn": "longrope"}
    for names in ({"type": "su"}, {"type": "yarn"}, {"type": "su", "rope_type": "longrope"}):
        read = read_rope({"rope_scaling": names, CONTEXT: 64}, aliases=aliases)
        assert read["rope_type"] == "longrope"
        assert read[CONTEXT] == 64
        assert "type" not in read


GEMMA = {"full_attention": 1e6, "sliding_attention": 1e4}


def test_layer_types_in_both_dialects() -> None:
    plain = {kind: DEFAULT | {"rope_theta": theta} for kind, theta in GEMMA.items()}
    assert read_rope_by_type({}, theta=GEMMA) == plain
    old = {"rope_theta": 5.0, "rope_local_base_freq": 6.0, "rope_scaling": None}
    assert read_rope_by_type(old, theta=GEMMA) == {
        "full_attention": DEFAULT | {"rope_theta": 5.0},
        "sliding_attention": DEFAULT | {"rope_theta": 6.0},
    }
    scaled = {
        "full_attention": LINEAR | {"rope_theta": 5.0},
        "sliding_attention": DEFAULT | {"rope_theta": 6.0},
    }
    scaling = {"rope_type": "linear", "factor": 4.0}
    assert read_rope_by_type(old | {"rope_scaling": scaling}, theta=GEMMA) == scaled
    assert read_rope_by_type({"rope_parameters": scaled}, theta=GEMMA) == scaled
    both = old | {"rope_parameters": scaled, "rope_scaling": scaling}
    assert read_rope_by_type(both, theta=GEMMA) == scaled
    half = {"rope_parameters": {"full_attention": scaling, "sliding_attention": None}}
    assert read_rope_by_type(half, theta=GEMMA) == {
        "full_attention": LINEAR | {"rope_theta": 1e6},
        "sliding_attention": DEFAULT,
    }
    context = {"rope_parameters": {"full_attention": {**YARN, CONTEXT: None}}}
    read = read_rope_by_type(context | {"max_position_embeddings": 77, CONTEXT: 5}, theta=GEMMA)
    assert read["full_attention"][CONTEXT] == 77


UNREADABLE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rope_parameters": 5}, TypeError, "rope_parameters must be an object; got 5"),
    ({"rope_scaling": "yarn"}, TypeError, "rope_scaling must be an object; got 'yarn'"),
    ({"rope_scaling": []}, TypeError, r"rope_scaling must be an object; got \[\]"),
    (
        {"rope_parameters": {"full_attention": DEFAULT}},
        ValueError,
        "holds an object each for full_attention: this family takes one for all layers",
    ),
    (
        {"rope_parameters": DEFAULT, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        ValueError,
        "and rope_scaling contradict each other: rope_type 'default' and 'yarn'; leave one of them",
    ),
    (
        {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ValueError,
        "contradict each other: factor 4.0 and 2.0",
    ),
    (
        {"rope_parameters": LINEAR, "rope_theta": 9.0, "rope_scaling": {**LINEAR, "rope_theta": 9}},
        ValueError,
        "contradict each other: rope_theta 10000.0 and 9",
    ),
    (
        {"rope_scaling": {"factor": 2.0}},
        ValueError,
        "rope_scaling has factor and no rope_type; known: default, dynamic, linear",
    ),
    (
        {"rope_scaling": {"type": "yarn", "rope_type": "linear"}},
        ValueError,
        "rope_scaling says rope_type 'linear' and type 'yarn': leave one out",
    ),
]


@pytest.mark.parametrize(("raw", "kind", "message"), UNREADABLE)
def test_what_cannot_be_read(raw: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_rope(raw)
    assert "\n" not in str(caught.value)


UNREADABLE_BY_TYPE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rope_parameters": [1]}, TypeError, r"rope_parameters must be an object; got \[1\]"),
    (
        {"rope_parameters": {"full_attention": 3}},
        TypeError,
        r"rope_parameters\['full_attention'\] must be an object; got 3",
    ),
    (
        {"rope_parameters": DEFAULT},
        ValueError,
        "must hold an object each for full_attention, sliding_attention; got rope_theta",
    ),
    (
        {"rope_parameters": {"full_attention": DEFAULT}, "rope_scaling": LINEAR},
        ValueError,
        "contradict each other: rope_type 'default' and 'linear'",
    ),
    (
        {"rope_parameters": {"sliding_attention": {"factor": 2.0}}},
        ValueError,
        r"rope_parameters\['sliding_attention'\] has factor and no rope_type",
    ),
]


@pytest.mark.parametrize(("raw", "kind", "message"), UNREADABLE_BY_TYPE)
def test_what_cannot_be_read_by_type(
    raw: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_rope_by_type(raw, theta=GEMMA)
    assert "\n" not in str(caught.value)


# checking


@each
def test_good_parameters_pass_and_strange_keys_go(rope: dict[str, Any]) -> None:
    assert check_rope(rope, 8) == rope
    strange = {"finetuned": True, "mrope_section": None, "attention_factor_": 3.0}
    assert check_rope(rope | strange | {"partial_rotary_factor": 1}, 8) == rope
    half = rope | {"partial_rotary_factor": 0.5}
    assert check_rope(half, 16) == half


def test_absent_keys_and_whole_numbers_are_fine() -> None:
    assert check_rope({}, 8) == DEFAULT
    assert check_rope({"rope_theta": 10000}, 8) == DEFAULT
    for absent in ("attention_factor", "beta_fast", "mscale"):
        assert check_rope(YARN | {absent: None}, 8) == YARN
    options = {"beta_fast": 20, "beta_slow": 2, "mscale": 0.0, "truncate": False}
    assert check_rope(YARN | options, 8) == YARN | options
    lists = {key: tuple(LONG[key]) for key in ("short_factor", "long_factor")}
    assert check_rope(LONG | lists, 8) == LONG


def test_layer_types_are_checked_each() -> None:
    good = {"full_attention": LINEAR, "sliding_attention": DEFAULT}
    assert check_rope(good, 8) == good
    with pytest.raises(ValueError, match=r"rope_parameters\['full_attention'\]\['factor'\] must"):
        check_rope(good | {"full_attention": LINEAR | {"factor": -1}}, 8)
    for keys in ({"full_attention": DEFAULT}, good | {"factor": 2.0}, good | {"other": DEFAULT}):
        with pytest.raises(
            ValueError, match="an object each for full_attention, sliding_attention"
        ):
            check_rope(keys, 8)


NO_NUMBERS = (None, True, False, "8", -1.0, 0, math.nan, math.inf, -math.inf, [8], 10**400, 1e-300)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@each
def test_each_needed_key_is_a_positive_number(rope: dict[str, Any], value: object) -> None:
    for key in rope.keys() - {"rope_type", "short_factor", "long_factor"}:
        kind = rope["rope_type"]
        pattern = f"rope_parameters.'{key}'. must be a positive number for rope_type '{kind}'; got "
        with pytest.raises(ValueError, match=pattern) as caught:
            check_rope(rope | {key: value}, 8)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250
        assert repr(value)[:50] in str(caught.value)


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_type": "su"},
        "rope_type 'su' is not .*; known: default, dynamic, linear, llama3, longrope, yarn",
    ),
    ({"rope_type": ["yarn"]}, r"rope_type \['yarn'\] is not implemented"),
    ({"rope_type": None}, "rope_type None is not implemented"),
    (
        DEFAULT | {"mrope_section": [16, 24, 24]},
        r"'mrope_section'\] belongs to .* not implemented; got \[16, 24, 24\] with rope_type 'def",
    ),
    (DYNAMIC | {"alpha": 1000.0}, r"'alpha'\] belongs to a rotation that is not implemented"),
    (YARN | {"llama_4_scaling_beta": 0.1}, r"'llama_4_scaling_beta'\] belongs to a rotation"),
    (LONG | {"short_factor": 3.0}, "'short_factor'. must be a list of 4 positive.*; got 3.0"),
    (LONG | {"long_factor": [1.0] * 3}, "'long_factor'. must be a list of 4 .*; got 3 entries"),
    (LONG | {"long_factor": [1.0, 2.0, 0.0, 1]}, "list of 4 positive.*; got 0.0 among them"),
    (LONG | {"long_factor": [1.0, True, 1.0, 1]}, "list of 4 positive.*; got True among them"),
    (
        LONG | {"partial_rotary_factor": 0.5},
        "'short_factor'. must be a list of 2 .*; got 4 entries",
    ),
    (YARN | {"truncate": 1}, "'truncate'. must be true or false for rope_type 'yarn'; got 1"),
    (YARN | {"truncate": None}, "'truncate'. must be true or false for rope_type 'yarn'; got None"),
    (YARN | {"mscale": False}, "'mscale'. must be a positive number for rope_type 'yarn'; got Fal"),
    (YARN | {"mscale": -1.0}, "'mscale'. must be a positive number for rope_type 'yarn'; got -1"),
    (YARN | {"beta_slow": 0}, "'beta_slow'. must be a positive number for rope_type 'yarn'; got 0"),
    (YARN | {"beta_fast": 1, "beta_slow": 2}, "beta_fast must not be less than beta_slow 2.*got 1"),
    (YARN | {"rope_theta": 1.0}, r"rope_theta must be greater than 1 \(rope_type 'yarn'\); got 1"),
    (
        LONG | {CONTEXT: 1},
        r"original_max_pos.* must be greater than 1 \(rope_type 'longrope'\); got",
    ),
    (
        LLAMA3 | {"high_freq_factor": 1.0},
        r"high_freq_factor must be greater than low_freq_factor 1.0 .* 'llama3'\); got 1.0",
    ),
    (
        DYNAMIC | {"partial_rotary_factor": 0.25},
        "rope_type 'dynamic' needs 4 rotary channels or more; got 2",
    ),
    (
        {"partial_rotary_factor": 0.4},
        "partial_rotary_factor 0.4 of head_dim 8 turns 3 channels; it must be an even number",
    ),
    *[
        ({"partial_rotary_factor": value}, "partial_rotary_factor must be a number in .0, 1.; got")
        for value in (0, 1.5, -0.5, True, "0.5", math.nan, None, [1])
    ],
]


@pytest.mark.parametrize(("rope", "message"), BAD)
def test_what_is_wrong_is_named(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_rope(rope, 8)
    assert "\n" not in str(caught.value)


def test_a_family_of_whole_heads_refuses_a_part() -> None:
    assert check_rope(DEFAULT | {"partial_rotary_factor": 1.0}, 8, partial=False) == DEFAULT
    with pytest.raises(
        ValueError, match=r"partial_rotary_factor 0.5 is not implemented .* only 1.0"
    ):
        check_rope(DEFAULT | {"partial_rotary_factor": 0.5}, 8, partial=False)


# writing


@each
@pytest.mark.parametrize("more", [{}, {"partial_rotary_factor": 0.5}], ids=["whole", "half"])
@pytest.mark.parametrize("context", [64, 4096])
def test_what_is_written_reads_back_in_each_dialect(
    rope: dict[str, Any], more: dict[str, float], context: int
) -> None:
    if rope["rope_type"] == "dynamic":
        rope = rope | {CONTEXT: context}
    rope = rope | more
    raw = rope_to_dict(rope, context) | {"max_position_embeddings": context}
    assert read_rope(raw, theta=3.0) == rope
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    assert read_rope(old, theta=3.0) == rope
    new = {key: raw[key] for key in ("rope_parameters", "max_position_embeddings")}
    assert read_rope(new, theta=3.0) == rope
    assert ("rope_scaling" in raw) == (rope["rope_type"] != "default")


@pytest.mark.parametrize("kind", ROPE_TYPES)
@pytest.mark.parametrize("local", ["default", "linear"])
def test_layer_types_read_back_in_each_dialect(kind: str, local: str) -> None:
    full = ALL[kind] | ({CONTEXT: 4096} if kind == "dynamic" else {})
    rope = {"full_attention": full, "sliding_attention": ALL[local] | {"rope_theta": 3.0}}
    raw = rope_to_dict(rope, 4096) | {"max_position_embeddings": 4096}
    assert read_rope_by_type(raw, theta=GEMMA) == rope
    assert ("rope_local_base_freq" in raw) == (local == "default")
    if local == "default":
        del raw["rope_parameters"]
        assert read_rope_by_type(raw, theta=GEMMA) == rope
    half = rope | {"full_attention": full | {"partial_rotary_factor": 0.5}}
    raw = rope_to_dict(half, 4096) | {"max_position_embeddings": 4096}
    assert read_rope_by_type(raw, theta=GEMMA) == half
    assert "rope_theta" not in raw


def test_phi3_of_old_finds_its_three_keys() -> None:
    raw = rope_to_dict(LONG, 1024)
    assert raw["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert raw[CONTEXT] == 64
    assert rope_to_dict(LONG, 2048)["rope_scaling"]["factor"] == 16.0


def test_a_context_that_the_file_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"64 .rope_type 'dynamic'. is not max_position_emb.* 128"):
        rope_to_dict(DYNAMIC, 128)
