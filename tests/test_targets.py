"""Which modules a pattern means, and what is said when it means none."""

import pytest
from torch import nn

from lora_core.targets import (
    nearest,
    output_head_name,
    pattern_value,
    select_modules,
    sites,
    targets_for,
    unwrap,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(4, 8)
        self.gate_up_proj = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(4, 10)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Wrap(nn.Module):
    """What a host of an adapter looks like to the matcher."""

    wraps = "base"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.extra = nn.Linear(1, 1)


def linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


UPS = ["layers.0.up_proj", "layers.1.up_proj"]
ALL = [
    "layers.0.up_proj",
    "layers.0.gate_up_proj",
    "layers.1.up_proj",
    "layers.1.gate_up_proj",
]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL),
        (["up_proj"], UPS),
        (["0.up_proj"], UPS[:1]),
        (["layers.1.up_proj", "up_proj"], UPS),
        (("lm_head",), ["lm_head"]),
        (r".*\.1\.(gate_)?up_proj", ALL[2:]),
        (lambda name, module: module.out_features == 10, ["lm_head"]),
    ],
)
def test_every_form_selects_in_module_order(targets: object, expected: list[str]) -> None:
    assert select_modules(Net(), targets, kind=linear) == expected


def test_a_suffix_is_dotted_and_a_regex_matches_whole_names() -> None:
    with pytest.raises(ValueError, match=r"targets: 'proj' matches no module; nearest names"):
        select_modules(Net(), ["proj"], kind=linear)
    with pytest.raises(ValueError, match="matches no module"):
        select_modules(Net(), r"up_proj", kind=linear)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0", "1.0"], ["0"]),
        (["1.0"], ["1.0"]),
        (["0"], "0"),  # as a name it is the end of '1.0', as an expression it is not
        (["1.a+b", "0"], r"0|1\.a\+b"),
        (["1.a+b", "1.0"], ["1.0", "1.a+b"]),
        (["a+b", "1.a+b"], ["a+b"]),
    ],
)
def test_an_option_is_found_for_modules(names: list[str], expected: object) -> None:
    part = nn.Sequential(nn.Linear(1, 1))
    part.add_module("a+b", nn.Linear(1, 1))
    model = nn.Sequential(nn.Linear(1, 1), part)
    model.add_module("a+b", nn.Linear(1, 1))
    found = targets_for(model, names)
    assert found == expected
    assert set(select_modules(model, found, kind=linear)) == set(names)


def test_exclude_takes_the_same_forms() -> None:
    assert select_modules(Net(), "all-linear", kind=linear, exclude=["gate_up_proj"]) == UPS
    assert select_modules(Net(), "all-linear", kind=linear, exclude=r"layers\.0\..*") == ALL[2:]
    assert select_modules(Net(), "all-linear", kind=linear, exclude=lambda n, _: "gate" in n) == UPS
    assert select_modules(Net(), "all-linear", kind=linear, exclude=[]) == ALL


@pytest.mark.parametrize(
    ("targets", "exclude", "error", "message"),
    [
        (["up_porj"], None, ValueError, r"'up_porj' matches no module; nearest names: 'up_proj'"),
        (["zzz"], None, ValueError, r"'zzz' matches no module; names here: 'gate_up_proj', 'lm_h"),
        (["norm"], None, ValueError, r"'norm' matches only modules of another kind, such as"),
        (["up_proj", "nope"], None, ValueError, r"targets: 'nope' matches no module"),
        (["up_proj"], ["down"], ValueError, r"exclude of targets: 'down' matches no module"),
        (["up_proj"], "all-linear", ValueError, "nothing is selected out of 5 .* is excluded"),
        (lambda n, m: False, None, ValueError, "nothing is selected .* predicate took none"),
        ([], None, ValueError, "the list is empty"),
        ("(", None, ValueError, "no regular expression"),
        ([3], None, TypeError, "may hold only names, got 3"),
        ([""], None, TypeError, "may hold only names, got ''"),
        (3, None, TypeError, "needs a list of names, a string or a callable"),
    ],
)
def test_errors_name_the_pattern(
    targets: object, exclude: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        select_modules(Net(), targets, kind=linear, exclude=exclude)


def test_a_model_without_candidates_is_an_error_under_the_options_name() -> None:
    with pytest.raises(ValueError, match="skip: the model has no module of the wanted kind"):
        select_modules(nn.Sequential(nn.ReLU()), "all-linear", kind=linear, option="skip")


def test_the_head_is_found_by_asking_also_inside_a_wrapper() -> None:
    assert output_head_name(Net()) == "lm_head"
    assert output_head_name(nn.Sequential(Net())) == "0.lm_head"
    assert output_head_name(nn.Sequential(nn.Linear(2, 2))) is None
    assert select_modules(nn.Sequential(nn.Linear(2, 2)), "all-linear", kind=linear) == ["0"]


def test_a_shared_module_is_selected_once_and_found_under_both_names() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net.add_module("again", net[0])
    assert select_modules(net, ["0"], kind=linear) == ["0"]
    assert select_modules(net, ["again"], kind=linear) == ["0"]
    assert select_modules(net, "all-linear", kind=linear) == ["0"]


def test_hosts_stand_under_the_name_of_what_they_wrap() -> None:
    net = Net()
    before = [name for name, _ in sites(net)]
    assert before == [name for name, _ in net.named_modules()]
    net.layers[0].up_proj = Wrap(Wrap(net.layers[0].up_proj))
    net.lm_head = Wrap(net.lm_head)
    assert [name for name, _ in sites(net)] == before
    assert select_modules(net, "all-linear", kind=linear) == ALL
    assert output_head_name(net) == "lm_head"
    assert unwrap(net.lm_head) is net.lm_head.base


def test_pattern_value_matches_as_pefts_does() -> None:
    patterns = {"q": 4, r"layers\.1\.v": 2, "v": 1}
    assert pattern_value(patterns, "model.layers.0.q", 8) == 4
    assert pattern_value(patterns, "model.layers.1.v", 8) == 2
    assert pattern_value(patterns, "v", 8) == 1
    assert pattern_value(patterns, "model.layers.0.kv", 8) == 8


def test_nearest_of_nothing() -> None:
    assert nearest("x", []) == "no names here"
