"""Hot swap: what is computed afterwards is the new adapter, in the old one's tensors."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    active_names,
    adapted_modules,
    add_adapter,
    merge_adapters,
    set_adapters,
)
from lora_core.adapters.rows import adapter_rows
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter
from lora_core.checkpoint.swap import swap_adapter
from lora_core.quant import quantize_model

Make = Callable[[], nn.Module]
State = Callable[[nn.Module], dict[str, Any]]
Shake = Callable[..., None]

ROOM = LoRAConfig(r=6, alpha=6)
NEW = {
    "of the same rank": LoRAConfig(r=6, alpha=12),
    "of a smaller rank": LoRAConfig(r=2, alpha=3),
    "rslora": LoRAConfig(r=4, alpha=6, use_rslora=True),
    "with patterns": LoRAConfig(r=4, rank_pattern={"inp": 1}, alpha_pattern={"0": 5}),
    "at fewer layers": LoRAConfig(r=3, targets=["inp"]),
}


@pytest.fixture
def swapped(make_mlp: Make, shake: Shake, tmp_path: Path) -> Callable[..., tuple[nn.Module, ...]]:
    """(model with the adapter in the old one's tensors, model that just loaded it)."""

    def make(room: Any, new: Any, change: Callable[[nn.Module], object] | None = None) -> Any:
        torch.manual_seed(0)
        model = make_mlp()
        if change is not None:
            change(model)
        other, loaded = copy.deepcopy(model), copy.deepcopy(model)
        add_adapter(other, new)
        shake(other, 0.2)
        save_adapter(other, tmp_path / "new")
        load_adapter(loaded, tmp_path / "new")
        add_adapter(model, room)
        shake(model)
        swap_adapter(model, tmp_path / "new")
        return model, loaded

    return make


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of sums that zeros were added to."""
    return bool((a - b).abs().max() <= 64 * 2**-24 * b.abs().max())


@pytest.mark.filterwarnings("ignore:.*misread by")
@pytest.mark.parametrize("new", NEW)
def test_a_swapped_adapter_does_what_a_loaded_one_does(
    new: str, swapped: Callable[..., Any], tmp_path: Path
) -> None:
    model, loaded = swapped(ROOM, NEW[new])
    x = torch.randn(5, 12)
    assert close(model(x), loaded(x))
    assert not close(model(x), loaded(x) + loaded(x).abs().max() * 1e-4)
    save_adapter(model, tmp_path / "again")  # with the scaling that it has now
    for name, host in adapted_modules(model):
        assert host.adapter("default").r == 6, name
    set_adapters(loaded, [])
    load_adapter(loaded, tmp_path / "again", "again")
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("room", "new"),
    [
        (
            LoRAConfig(r=4, targets=["inp"], parts={"inp": [8, 16]}),
            LoRAConfig(r=2, alpha=9, targets=["inp"], parts={"inp": [8, 16]}),
        ),
        (LoRAConfig(r=4, init="pissa"), LoRAConfig(r=3, init="olora")),
        (LoRAConfig(r=4, init="pissa"), LoRAConfig(r=3)),
        (LoRAConfig(r=4, bias="all", lora_bias=True), LoRAConfig(r=2, bias="all")),
        (LoRAConfig(r=4, bias="all", lora_bias=True), LoRAConfig(r=2, lora_bias=True)),
        (LoRAConfig(r=4, use_dora=True), LoRAConfig(r=2, use_dora=True)),
        (
            LoRAConfig(r=4, targets=["inp"], modules_to_save=["head"]),
            LoRAConfig(r=2, targets=["inp"], modules_to_save=["head"]),
        ),
        (
            BottleneckConfig(feed_forward=["0"], reduction=4),
            BottleneckConfig(feed_forward=["0"], reduction=4),
        ),
    ],
)
def test_parts_starts_biases_and_other_kinds(room: Any, new: Any, swapped: Any) -> None:
    model, loaded = swapped(room, new)
    x = torch.randn(5, 12)
    assert close(model(x), loaded(x))


def test_convolutions_in_groups_and_embeddings(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 4, 3, groups=2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.embed(ids).transpose(1, 2))

    model = Net()
    other, loaded = copy.deepcopy(model), copy.deepcopy(model)
    for net, r in ((other, 2), (model, 4)):
        add_adapter(net, LoRAConfig(r=r, targets=["embed", "conv"]))
        with torch.no_grad():
            for _, host in adapted_modules(net):
                for p in host.adapters.parameters():
                    p.normal_()
    save_adapter(other, tmp_path)
    load_adapter(loaded, tmp_path)
    ids = torch.randint(9, (3, 7))
    swap_adapter(model, tmp_path)
    assert close(model(ids), loaded(ids))
    for r in (2, 4):  # the same from a state, padded or not
        again = Net()
        again.load_state_dict(
            {
                k.replace(".base.", "."): v
                for k, v in model.state_dict().items()
                if "adapters" not in k
            }
        )
        add_adapter(again, LoRAConfig(r=r, alpha=2 * r, targets=["embed", "conv"]))
        with torch.no_grad():
            for _, host in adapted_modules(again):
                host.adapters.requires_grad_(False)
                for p in host.adapters.parameters():
                    p.normal_()
        state = adapter_state_dict(again)
        target = copy.deepcopy(model)
        for _, host in adapted_modules(target):
            host.adapter("default").rescale(2.0)
        swap_adapter(target, state)
        assert close(target(ids), again(ids))


def test_a_state_goes_into_the_tensors_that_are_there(mlp: nn.Module, shake: Shake) -> None:
    add_adapter(mlp, ROOM, "a")
    add_adapter(mlp, LoRAConfig(r=6, alpha=60), "b")
    shake(mlp)
    before = {name: (id(p), p.data_ptr()) for name, p in mlp.named_parameters()}
    set_adapters(mlp, "b")
    swap_adapter(mlp, adapter_state_dict(mlp, "a"), "b")
    assert {name: (id(p), p.data_ptr()) for name, p in mlp.named_parameters()} == before
    assert active_names(mlp) == ["b"]
    for _, host in adapted_modules(mlp):
        a, b = host.adapter("a"), host.adapter("b")
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
        assert b.scaling == 10.0  # a state says nothing of it


def test_trained_rows_keep_their_places(make_token_model: Callable[[bool], nn.Module]) -> None:
    model = make_token_model(False)
    ids = {"targets": ["mix"], "trainable_token_indices": [1, 3]}
    add_adapter(model, LoRAConfig(r=1, **ids), "a")
    ids["trainable_token_indices"] = [1, 4]
    add_adapter(model, LoRAConfig(r=1, **ids), "b")
    from lora_core.adapters.swap import swap_adapters

    other = {site: host.adapter("b") for site, host in adapted_modules(model)}
    with pytest.raises(ValueError, match="at other places of 'embed' than 'a', as other token ids"):
        swap_adapters(model, "a", other)


# --- compiled models -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("base", ["dense", "4-bit"])
@pytest.mark.filterwarnings("ignore:.*misread by")
def test_a_compiled_model_goes_on(
    backend: str, base: str, make_mlp: Make, shake: Shake, tmp_path: Path
) -> None:
    model = make_mlp()
    if base == "4-bit":
        quantize_model(model)
    others = []
    for i, config in enumerate(NEW.values()):
        other = copy.deepcopy(model)
        add_adapter(other, config)
        shake(other, 0.1 * (i + 1))
        save_adapter(other, tmp_path / str(i))
        others.append(other)
    add_adapter(model, ROOM)
    model.eval()
    x = torch.randn(4, 12)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for i, other in enumerate(others):
                # through either: names are the model's own, without torch.compile's `_orig_mod`
                swap_adapter((model, compiled)[i % 2], tmp_path / str(i))
                assert close(compiled(x), other.eval()(x))
            first = dict(adapted_modules(model))["inp"].adapter("default")
            y = compiled(x)
            first.scaling = 3 * first.scaling  # set by hand
            assert not close(compiled(x), y)
            assert close(compiled(x), model(x))


def test_rows_of_a_compiled_model_see_the_new_weights(
    mlp: nn.Module, shake: Shake, tmp_path: Path
) -> None:
    for name in "ab":
        add_adapter(mlp, ROOM, name)
    shake(mlp)
    other = copy.deepcopy(mlp)
    shake(other)
    save_adapter(other, tmp_path, "a")
    torch.compiler.reset()
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    x = torch.randn(4, 12)
    with torch.no_grad(), adapter_rows(mlp, ["a", None, "b", "a"]):
        before = compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            swap_adapter(mlp, tmp_path, "a")
            after = compiled(x)
        assert torch.equal(after, mlp(x))
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:3], before[1:3])


def test_changing_a_scaling_changes_what_is_saved_and_reported(mlp: nn.Module) -> None:
    add_adapter(mlp, LoRAConfig(r=4, alpha=4, use_rslora=True))
    pair = dict(adapted_modules(mlp))["inp"].adapter("default")
    address = pair.scale().data_ptr()
    pair.rescale(5.0)
    assert (pair.scaling, pair.alpha, pair.scale().item()) == (5.0, 5.0 * math.sqrt(4), 5.0)
    assert pair.scale().data_ptr() == address


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "new", "message"),
    [
        (
            ROOM,
            LoRAConfig(r=7),
            "has rank 7 at 'inp', and 'default' room for 6: add_adapter with r",
        ),
        (
            ROOM,
            LoRAConfig(r=2, targets=["inp", "head"]),
            r"is at 'head' too, where 'default' is not \(and 0 more\): load_adapter it under an",
        ),
        (
            ROOM,
            LoRAConfig(r=2, lora_bias=True),
            "has lora_bias at 'inp', and 'default' has no room",
        ),
        (ROOM, LoRAConfig(r=2, bias="lora_only"), "has a trained bias at 'inp', and 'default' has"),
        (ROOM, LoRAConfig(r=2, init="pissa"), "has a start that is subtracted at 'inp', and 'def"),
        (
            ROOM,
            LoRAConfig(r=2, use_dora=True),
            "'default' is a LoRA at 'inp' and the new adapter a D",
        ),
        (
            LoRAConfig(r=4, use_dora=True),
            LoRAConfig(r=4, use_dora=True, targets=["0"]),
            "leaves 'inp' alone, where 'default' is a DoRA, which has no weights that change no",
        ),
        (
            ROOM,
            LoRAConfig(r=2, targets=["inp"], parts={"inp": [4, 20]}),
            r"another form than that of 'default' \(parts \[4, 20\], not \[\]\)",
        ),
        (
            BottleneckConfig(feed_forward=["0"], reduction=4),
            BottleneckConfig(feed_forward=["0"], reduction=3),
            "tensors of other shapes cannot be swapped",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    room: Any, new: Any, message: str, make_mlp: Make, shake: Shake, state_of: State, tmp_path: Path
) -> None:
    model = make_mlp()
    other = copy.deepcopy(model)
    add_adapter(other, new)
    save_adapter(other, tmp_path)
    add_adapter(model, room)
    shake(model)
    before = state_of(model)
    scalings = [getattr(h.adapter("default"), "scaling", 0) for _, h in adapted_modules(model)]
    with pytest.raises(ValueError, match=message) as caught:
        swap_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before
    assert scalings == [
        getattr(h.adapter("default"), "scaling", 0) for _, h in adapted_modules(model)
    ]


@pytest.mark.filterwarnings("ignore:init='loftq'")
def test_a_start_that_quantizes_the_base_is_refused(make_mlp: Make, tmp_path: Path) -> None:
    model = make_mlp()
    other = copy.deepcopy(model)
    add_adapter(other, LoRAConfig(r=2, init="loftq"))
    save_adapter(other, tmp_path)
    add_adapter(model, ROOM)
    with pytest.raises(ValueError, match=r"start \(LoftQ\) quantizes the base"):
        swap_adapter(model, tmp_path)


def test_names_states_and_merged_models(mlp: nn.Module, state_of: State, tmp_path: Path) -> None:
    add_adapter(mlp, ROOM)
    state = {key: value.clone() for key, value in adapter_state_dict(mlp).items()}
    before = state_of(mlp)
    with pytest.raises(ValueError, match="no adapter 'defualt' in the model; nearest names: 'defa"):
        swap_adapter(mlp, state, "defualt")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        swap_adapter(mlp, tmp_path / "none")
    key = "base_model.model.inp.lora_A.weight"
    with pytest.raises(ValueError, match=r"key 'base_model\.model\.inp\.lora_B\.weight' is unex"):
        swap_adapter(mlp, {k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"'base_model\.model\.x' is unexpected"):
        swap_adapter(mlp, {**state, "base_model.model.x": state[key]})
    assert state_of(mlp) == before
    merge_adapters(mlp)
    with pytest.raises(
        ValueError, match="swapping while 'inp' is merged: call unmerge_adapters fi"
    ):
        swap_adapter(mlp, state)
