"""Adapters on disk: what is written, what is read, and everything that is refused."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    Adapter,
    LoRAConfig,
    LoRALinear,
    active_names,
    adapted_modules,
    add_adapter,
    disable_adapters,
    merge_adapters,
    register_adapter,
    set_adapters,
)
from lora_core.checkpoint import adapter_state_dict, load_adapter, read_adapter, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return x

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


@pytest.fixture
def base() -> Net:
    return Net()


@pytest.fixture
def saved(shake: Callable[..., nn.Module], base: Net, tmp_path: Path) -> tuple[nn.Module, Path]:
    """An adapted copy of `base` and the folder that its adapter was saved to."""
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=2, alpha=4, trainable_token_indices=[1, 5]))
    shake(model)
    assert save_adapter(model, tmp_path / "a", base_model="some/base") == []
    return model, tmp_path / "a"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


UP = "base_model.model.blocks.0.up.lora_A.weight"


def test_the_two_files(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS, "lora_core.json"]
    assert json.loads((folder / "lora_core.json").read_text()) == {"trained_on": "float32"}
    config, tensors = read_adapter(folder)
    assert json.loads((folder / CONFIG).read_text()) == config
    assert config == {
        "alpha_pattern": {},
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 4,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": 2,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["down", "up"],
        "task_type": None,
        "trainable_token_indices": [1, 5],
        "use_dora": False,
        "use_rslora": False,
    }
    places = [f"blocks.{i}.{end}" for i in (0, 1) for end in ("up", "down")]
    keys = {f"base_model.model.{place}.lora_{f}.weight" for place in places for f in "AB"}
    keys.add("base_model.model.embed.token_adapter.trainable_tokens_delta")
    assert set(tensors) == keys
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert tensors[UP].shape == (2, 6)
    assert tensors[UP.replace("_A", "_B")].shape == (8, 2)
    state = adapter_state_dict(model)
    assert set(state) == keys
    assert all(torch.equal(state[key], tensors[key]) for key in keys)


def test_it_loads_into_a_fresh_model_with_the_same_bits(
    base: Net, saved: tuple[nn.Module, Path]
) -> None:
    model, folder = saved
    ids = torch.arange(9)
    report = load_adapter(base, folder, "again")
    assert torch.equal(base(ids), model(ids))
    assert not any(p.requires_grad for p in base.parameters())
    assert (report.name, report.trainable) == ("again", 0)
    assert load_adapter(base, folder, "further", trainable=True).trainable == 4 * 2 * 14 + 2 * 6
    assert active_names(base) == ["further"]
    # loading one for inference leaves the one that is trained alone
    load_adapter(base, folder, "reference")
    trained = {
        n.split(".adapters.")[1].split(".")[0]
        for n, p in base.named_parameters()
        if p.requires_grad
    }
    assert trained == {"further"}
    set_adapters(base, "again")
    assert torch.equal(base(ids), model(ids))


def test_saving_again_gives_the_same_files(base: Net, saved: tuple[nn.Module, Path]) -> None:
    _, folder = saved
    load_adapter(base, folder)
    save_adapter(base, folder.parent / "b", base_model="some/base")
    for file in (CONFIG, WEIGHTS):
        assert (folder.parent / "b" / file).read_bytes() == (folder / file).read_bytes()


def test_a_compiled_model_is_saved_and_loaded_under_its_own_names(
    base: Net, saved: tuple[nn.Module, Path]
) -> None:
    model, folder = saved
    compiled: Any = torch.compile(model, backend="eager")
    assert adapter_state_dict(compiled).keys() == adapter_state_dict(model).keys()
    save_adapter(compiled, folder.parent / "b", base_model="some/base")
    for file in (CONFIG, WEIGHTS):
        assert (folder.parent / "b" / file).read_bytes() == (folder / file).read_bytes()
    load_adapter(torch.compile(base, backend="eager"), folder)  # type: ignore[arg-type]
    ids = torch.arange(9)
    assert torch.equal(base(ids), model(ids))


@pytest.mark.parametrize("crash_at", range(12))
def test_a_crash_while_saving_never_mixes_two_adapters(
    crash_at: int,
    base: Net,
    saved: tuple[nn.Module, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process dies before the n-th sync or rename; what is left is one adapter or none."""
    model, folder = saved
    old = read_adapter(folder)[1]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    new = adapter_state_dict(model)
    calls = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt
            return call(*args)

        return step

    monkeypatch.setattr("os.fsync", dying(os.fsync))
    monkeypatch.setattr("os.replace", dying(os.replace))
    try:
        save_adapter(model, folder)
    except KeyboardInterrupt:
        assert calls == crash_at + 1
    else:
        assert calls <= crash_at
    monkeypatch.undo()
    if not (folder / "adapter_config.json").exists():
        with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
            load_adapter(base, folder)
        return
    left = read_adapter(folder)[1]
    whole = [all(torch.equal(left[k], other[k]) for k in left) for other in (old, new)]
    assert any(whole)
    assert whole[1] or calls < 4  # the new configuration means the new weights


def test_a_merged_model_saves_the_same_adapter(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    merge_adapters(model)
    (folder / "template.jinja").write_text("kept")
    save_adapter(model, folder, base_model="some/base")
    assert (folder / WEIGHTS).read_bytes() == before
    assert (folder / "template.jinja").read_text() == "kept"


def test_patterns_and_scaling_are_applied_and_warned_of(
    shake: Callable[..., nn.Module], base: Net, tmp_path: Path
) -> None:
    model = copy.deepcopy(base)
    config = LoRAConfig(
        r=4,
        alpha=2.5,
        init="gaussian",
        use_rslora=True,
        rank_pattern={"up": 2},
        alpha_pattern={r"blocks\.1\..*": 7.0},
    )
    add_adapter(model, config)
    shake(model)
    with pytest.warns(UserWarning, match="misread by") as caught:
        notes = save_adapter(model, tmp_path)
    assert [str(w.message) for w in caught] == notes
    assert notes == [
        (
            "rank_pattern and alpha_pattern and use_rslora: misread by vLLM, llama.cpp, in "
            "silence; PEFT reads it. For them, write `lora-core export --baked`"
        )
    ]
    raw, _ = read_adapter(tmp_path)
    assert (raw["lora_alpha"], raw["alpha_pattern"]) == (2.5, {r"blocks\.1\..*": 7})
    assert raw["init_lora_weights"] == "gaussian"
    load_adapter(base, tmp_path)
    ids = torch.arange(9)
    assert torch.equal(base(ids), model(ids))
    assert next(h for _, h in adapted_modules(base)).adapter("default").config.init == "gaussian"


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["up"], ["up"]),
        (r".*\.0\..*", ["blocks.0.down", "blocks.0.up"]),
        (lambda name, _: name.endswith("1.up"), ["blocks.1.up"]),
        (["blocks.1.up", "blocks.0.up"], ["up"]),
    ],
)
def test_targets_are_written_as_names(
    targets: Any, written: list[str], base: Net, tmp_path: Path
) -> None:
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=2, targets=targets))
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path)[0]["target_modules"] == written
    load_adapter(base, tmp_path)
    assert [n for n, _ in adapted_modules(base)] == [n for n, _ in adapted_modules(model)]


def test_the_librarys_decoder_is_a_causal_lm(
    small_decoder: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = small_decoder()
    add_adapter(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path)[0]["task_type"] == "CAUSAL_LM"
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in read_adapter(tmp_path)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"lora_magnitude_vector' is missing \(and 3 more\); nearest names"),
        ({"bias": "lora_only"}, r"up.base_layer.bias' is missing|down.base_layer.bias' is missing"),
        ({"bias": "some"}, "a: bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"lora_bias": True}, r"lora_B.bias' is missing \(and 3 more\)"),
        ({"modules_to_save": ["head"]}, "a: modules_to_save: 'head' matches no module; names here"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
        ({"target_parameters": ["w"]}, r"supported here: target_parameters=\['w'\]"),
        ({"layer_replication": [[0, 2]]}, r"supported here: layer_replication=\[\[0, 2\]\]"),
        ({"use_bdlora": {"x": 1}, "arrow_config": {"y": 2}}, "here: arrow_config=.*use_bdlora="),
        ({"some_new_option": 3}, "supported here: some_new_option=3"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base weights"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes .* path_initial_model_for_weight_conv"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weights"),
        ({"r": 1}, r"lora_A.weight' has shape \(2, 8\), the model needs \(1, 8\)"),
        ({"r": 10**9}, "says rank 1000000000 for '.*', no A in the file has more than 2 rows"),
        ({"r": 0}, "a: r must be a whole number"),
        ({"lora_alpha": "8"}, "a: alpha must be a finite number, got '8'"),
        ({"lora_alpha": 1e39}, "a: alpha must be in float32's range"),
        ({"lora_alpha": 10**400}, "a: alpha must be in float32's range"),
        ({"lora_alpha": float("nan")}, "a: alpha must be a finite number, got nan"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported: LORA, PROMPT_TUNING, "),
        ({"peft_type": "LORA_CORE_NONE"}, "no adapter kind 'NONE' is registered"),
        ({"peft_type": None}, "has no peft_type"),
        ({"target_modules": ["up"]}, r"down.lora_A.weight' is unexpected \(and 3 more\); nearest"),
        ({"target_modules": ["nothing"]}, "'nothing' matches no module"),
        ({"trainable_token_indices": [1]}, r"trainable_tokens_delta' has shape \(2, 6\), the mod"),
        ({"trainable_token_indices": None}, "trainable_tokens_delta' is unexpected"),
        ({"rank_pattern": {"zzz": 2}}, "rank_pattern: 'zzz' matches no target"),
        ({"rank_pattern": ["up"]}, "a: rank_pattern must be a dict of {pattern: value}"),
        ({"alpha_pattern": 3}, "a: alpha_pattern must be a dict of {pattern: value}, got 3"),
        ({"target_modules": 3}, "a: target_modules must be a list of names or a string, got 3"),
        ({"target_modules": [1]}, r"a: target_modules must be a list of names .*, got \[1\]"),
    ],
)
def test_configurations_that_do_not_fit(
    changes: dict[str, Any], message: str, base: Net, saved: tuple[nn.Module, Path]
) -> None:
    _, folder = saved
    edit(folder, **changes)
    modules = [(n, id(m)) for n, m in base.named_modules()]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(base, folder)
    assert "\n" not in str(caught.value)
    assert [(n, id(m)) for n, m in base.named_modules()] == modules
    assert all(p.requires_grad for p in base.parameters())


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def with_(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, key: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(UP), rf"the key '{UP}' is missing; nearest names: "),
        (with_(UP.replace("up", "upp"), torch.ones(1)), r"upp.lora_A.weight' is unexpected; near"),
        (with_(UP, torch.ones(2, 7)), r"has shape \(2, 7\), the model needs \(2, 6\)"),
        (with_(UP, torch.ones(2, 6, dtype=torch.int32)), "holds torch.int32, not floating-point"),
        (with_("base_model.model.embed.lora_embedding_A", torch.ones(1)), "is unexpected"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    base: Net,
    saved: tuple[nn.Module, Path],
) -> None:
    _, folder = saved
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(base, folder)
    assert not list(adapted_modules(base))


def test_copies_of_base_weights_are_compared(base: Net, saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    key = "base_model.model.blocks.0.up.base_layer.weight"
    weight = base.blocks[0]["up"].weight.detach()
    rewrite(folder, with_(key, weight + 1))
    with pytest.raises(ValueError, match=f"'{key}' is not the weight that 'blocks.0.up' has"):
        load_adapter(base, folder)
    rewrite(folder, with_(key, weight.clone()))
    load_adapter(base, folder)
    assert torch.equal(base(torch.arange(9)), model(torch.arange(9)))


def test_16_bit_adapters_load_as_float32(base: Net, saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    rewrite(folder, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    load_adapter(base, folder)
    for key, tensor in adapter_state_dict(base).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, adapter_state_dict(model)[key].bfloat16().float())


def test_pefts_leniences_are_read(base: Net, saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    ids = torch.arange(9)
    for changes in (
        {"target_modules": ["up", "down", "c_attn"]},  # PEFT leaves unmatched entries in
        {"target_modules": r"blocks\.\d\.(up|down)"},
        {"target_modules": ["up", "down"], "exclude_modules": ["nothing"]},
        {"target_modules": ["up", "down"], "layers_to_transform": [0, 1]},
        {"layers_to_transform": None, "exclude_modules": None, "runtime_config": {"x": 1}},
    ):
        edit(folder, **changes)
        fresh = copy.deepcopy(base)
        load_adapter(fresh, folder)
        assert torch.equal(fresh(ids), model(ids))


def test_bad_folders(base: Net, saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, folder = saved
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_adapter(base, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}: it is no adapter folder"):
        load_adapter(base, tmp_path / "empty")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="is truncated or has trailing bytes"):
        load_adapter(base, folder)
    (folder / WEIGHTS).write_bytes(whole[:20])
    with pytest.raises(ValueError, match="is truncated"):
        load_adapter(base, folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        load_adapter(base, folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"as pickle .* refused; convert it to safetensors"):
        load_adapter(base, folder)
    (folder / WEIGHTS).write_bytes(whole)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_adapter(base, folder)
    assert not list(adapted_modules(base))


def test_names_are_checked(base: Net, saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    with pytest.raises(ValueError, match="no adapter 'defualt' in the model; nearest names: 'def"):
        save_adapter(model, folder, "defualt")
    with pytest.raises(ValueError, match="the adapter name 'default' is taken"):
        load_adapter(model, folder)
    with pytest.raises(ValueError, match="no adapter 'default' in the model; no names here"):
        adapter_state_dict(base)


def test_a_full_disk_leaves_the_old_files(
    shake: Callable[..., nn.Module], saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def broken(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    shake(model)
    monkeypatch.setattr("lora_core.checkpoint.adapter_files.write_safetensors", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_tied_targets_load_untied_on_request(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    add_adapter(model, LoRAConfig(r=2, targets=["head"]))
    save_adapter(model, tmp_path)
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match="the weight of 'head' is tied"):
        load_adapter(tied, tmp_path)
    load_adapter(tied, tmp_path, untie=True)
    assert tied["head"].base.weight is not tied["embed"].weight


# --- kinds of one's own ---


class Shift(Adapter):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + self.by


@dataclass(frozen=True)
class PlainShift:
    """Not registered."""

    targets: Any = ("up",)
    size: int = 8

    def build(self, name: str, module: nn.Module) -> Adapter | None:
        fits = isinstance(module, nn.Linear) and module.out_features == self.size
        return Shift(self.size) if fits else None


@register_adapter("TEST_SHIFT")
@dataclass(frozen=True)
class ShiftConfig(PlainShift):
    """Registered."""


def test_a_registered_kind_is_saved_and_loaded(
    shake: Callable[..., nn.Module], base: Net, tmp_path: Path
) -> None:
    model = copy.deepcopy(base)
    add_adapter(model, ShiftConfig(targets=lambda *_: True), "mine")
    shake(model)
    save_adapter(model, tmp_path, "mine")
    config, tensors = read_adapter(tmp_path)
    assert config == {
        "base_model_name_or_path": None,
        "peft_type": "LORA_CORE_TEST_SHIFT",
        "size": 8,
        "targets": ["blocks.0.up", "blocks.1.up"],
    }
    assert set(tensors) == {"blocks.0.up.by", "blocks.1.up.by"}
    load_adapter(base, tmp_path)
    ids = torch.arange(9)
    assert torch.equal(base(ids), model(ids))
    with disable_adapters(base):
        assert not torch.equal(base(ids), model(ids))
    edit(tmp_path, sized=3)
    with pytest.raises(
        ValueError, match="ShiftConfig has no option 'sized'; nearest names: 'size'"
    ):
        load_adapter(base, tmp_path, "other")


def test_what_cannot_be_saved_says_so(base: Net, tmp_path: Path) -> None:
    by_hand = nn.Sequential(LoRALinear(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="put in by hand and has no configuration to write"):
        save_adapter(by_hand, tmp_path / "hand")
    assert not (tmp_path / "hand").exists()
    model = copy.deepcopy(base)
    add_adapter(model, PlainShift())
    with pytest.raises(ValueError, match=r"PlainShift is no registered kind .* @register_adapter"):
        save_adapter(model, tmp_path / "a")
    model = copy.deepcopy(base)
    add_adapter(model, ShiftConfig(targets=torch.ones(1)))
    with pytest.raises(TypeError, match="ShiftConfig cannot be written as JSON"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()

    @register_adapter("TEST_CLASH")
    @dataclass(frozen=True)
    class Clash(PlainShift):
        peft_type: str = "x"

    add_adapter(base, Clash())
    with pytest.raises(ValueError, match="Clash may not have a field called 'peft_type'"):
        save_adapter(base, tmp_path / "a")
