"""Which variants a comparison has: methods, sweeps, seeds; and what each attaches."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_core.adapters import add_adapter
from lora_core.compare import METHODS, CompareConfig, Variant
from lora_core.compare.variants import FIELDS, grid, read_rate, read_sweep

BASE = {"steps": 5, "batch_size": 2, "r": 2, "alpha": 4, "targets": "all-linear"}
BASE |= {"reduction": 4, "virtual_tokens": 3}
TRAINED = [name for name, method in METHODS.items() if method.trains]


def test_a_sweep_multiplies_the_methods_that_have_its_field() -> None:
    sweep = {"r": (2, 4), "lr": (1e-3, 1e-2, 1e-1)}
    found = grid(["zero-shot", "lora", "prompt"], BASE, {"prompt": 0.5}, sweep, [0, 1])
    by_method = {name: [v for v in found if v.method == name] for name in ("lora", "prompt")}
    assert len(by_method["lora"]) == 2 * 3 * 2
    assert len(by_method["prompt"]) == 3 * 2
    assert len(found) == 12 + 6 + 1  # no seed changes zero-shot
    assert {(v.settings["r"], v.settings["lr"]) for v in by_method["lora"]} == {
        (r, lr) for r in (2, 4) for lr in (1e-3, 1e-2, 1e-1)
    }
    assert len({(v.name, v.seed) for v in found}) == len(found)
    assert len({(v.label, v.seed) for v in found}) == len(found)


def test_rates_are_the_methods_own_unless_given() -> None:
    found = grid(["lora", "prompt"], BASE, {"prompt": 0.5}, {}, [0])
    assert [v.settings["lr"] for v in found] == [METHODS["lora"].lr, 0.5]
    assert [v.name for v in found] == ["lora", "prompt"]


@given(
    st.lists(st.sampled_from(list(METHODS)), min_size=1, unique=True),
    st.dictionaries(st.sampled_from(["r", "lr", "steps"]), st.just((1, 2)), max_size=2),
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
)
def test_every_variant_has_exactly_its_methods_fields(
    names: list[str], sweep: dict[str, tuple[int, int]], seeds: list[int]
) -> None:
    if any(all(f not in METHODS[n].fields for n in names) for f in sweep):
        with pytest.raises(ValueError, match="to sweep over"):
            grid(names, BASE, {}, sweep, seeds)
        return
    for variant in grid(names, BASE, {}, sweep, seeds):
        assert tuple(variant.settings) == METHODS[variant.method].fields
        assert variant.swept.keys() == sweep.keys() & set(variant.settings)
        assert Variant(**variant.facts()) == variant


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_attached_can_be_trained(
    name: str, small_decoder: Callable[..., nn.Module]
) -> None:
    (variant,) = grid([name], BASE, {}, {}, [0])
    adapter = variant.adapter()
    if name == "full":
        assert adapter is None
        return
    model = small_decoder()
    report = add_adapter(model, adapter)
    assert 0 < report.trainable < report.total
    sites = {site.rsplit(".", 1)[-1] for site in report.sites}
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    wanted = {
        "lora": layers,
        "qlora": layers,
        "dora": layers,
        "bottleneck-houlsby": {"o_proj", "down_proj"},
        "bottleneck-pfeiffer": {"down_proj"},
        "bottleneck-parallel": {"gate_proj", "down_proj"},
        "prefix": {"self_attn", "embed_tokens"},
    }.get(name, {"embed_tokens"})
    assert sites == wanted


@pytest.mark.parametrize(
    ("word", "sites"), [("attention", 4), ("query-value", 2), ("feed-forward", 3), ("q_proj", 1)]
)
def test_words_for_targets(word: str, sites: int, small_decoder: Callable[..., nn.Module]) -> None:
    (variant,) = grid(["lora"], BASE, {}, {"targets": (word,)}, [0])
    assert len(add_adapter(small_decoder(), variant.adapter()).sites) == sites


def test_sweeps_and_rates_are_read() -> None:
    assert read_sweep("r=4,8, 16") == ("r", (4, 8, 16))
    assert read_sweep("lr=1e-3,0.01") == ("lr", (0.001, 0.01))
    assert read_sweep("targets=attention,q_proj+v_proj") == (
        "targets",
        ("attention", "q_proj+v_proj"),
    )
    assert read_rate("lora=4e-3") == ("lora", 0.004)
    assert set(FIELDS) >= {"r", "alpha", "lr", "targets", "virtual_tokens", "reduction"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank=4", "no method has a field 'rank' to sweep over; fields: lr, steps"),
        ("r", "FIELD=VALUE,VALUE, such as r=4,8,16; got 'r'"),
        ("r=", "FIELD=VALUE,VALUE"),
        ("r=4,x", "r must be a whole number, 1 or more; got 'x'"),
        ("r=4,0", "r must be a whole number, 1 or more; got '0'"),
        ("r=4.5", "r must be a whole number"),
        ("lr=1e-3,nan", "lr must be a number above 0; got 'nan'"),
        ("lr=inf", "lr must be a number above 0"),
        ("targets=a,,b", "targets must be one of all-linear, attention"),
        ("r=4,4", "a value stands twice"),
    ],
)
def test_a_sweep_that_says_nothing(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_sweep(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4e-3", "METHOD=RATE, such as lora=4e-3; got '4e-3'"),
        ("lara=1", "no trained method 'lara'; nearest names: .*'lora'"),
        ("zero-shot=1", "no trained method 'zero-shot'"),
        ("lora=-1", "lr must be a number above 0; got '-1'"),
    ],
)
def test_a_rate_that_says_nothing(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_rate(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("lora", "lra")}, "no method 'lra'; nearest names: .*'lora'"),
        ({"methods": ("lora", "lora")}, "the method 'lora' is named twice"),
        ({"methods": ()}, "no methods to compare: name some of zero-shot"),
        ({"data": "a.jsonl"}, "--data and --eval-data belong together"),
        ({"metrics": ()}, "no metrics"),
        ({"seeds": (0, 0)}, "seeds must be different whole numbers"),
        ({"seeds": (-1,)}, "seeds must be different whole numbers"),
        ({"steps": 0}, "steps must be a whole number, 1 or more; got 0"),
        ({"shots": 0}, "shots must be a whole number, 1 or more; got 0"),
        ({"eval_rows": 1}, "eval_rows must be a whole number, 2 or more; got 1"),
        ({"latency_tokens": 1}, "latency_tokens must be a whole number, 2 or more"),
        (
            {"data": "a", "eval_data": "b", "methods": ("lora", "system-prompt")},
            "system-prompt needs --system TEXT on data of your own",
        ),
    ],
)
def test_settings_that_make_no_comparison(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CompareConfig(out="out", **options)


def test_on_data_of_ones_own_there_is_no_system_prompt_without_a_text() -> None:
    assert "system-prompt" not in CompareConfig(out="o", data="a", eval_data="b").methods
    own = CompareConfig(out="o", data="a", eval_data="b", system="Be brief.")
    assert "system-prompt" in own.methods
    assert own.system_text == "Be brief."
    assert "JSON" in CompareConfig(out="o").system_text
