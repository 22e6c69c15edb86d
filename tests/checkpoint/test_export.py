"""Adapters for other programs: each one's rules, baked scaling, and what is refused."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, adapter_names, add_adapter
from lora_core.checkpoint import export_adapter, load_adapter, read_adapter, save_adapter
from lora_core.checkpoint.baking import baked, check
from lora_core.checkpoint.loaders import LOADERS, Applied, Refused, read_as_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OTHERS = ("vllm", "llama.cpp", "sglang")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.down(torch.relu(self.up(self.embed(ids))))
        return self.conv(x.mT[None])


IDS = torch.arange(9)


@pytest.fixture
def base() -> Net:
    return Net()


@pytest.fixture
def save(
    shake: Callable[..., nn.Module], base: Net, tmp_path: Path
) -> Callable[..., tuple[nn.Module, Path]]:
    """Save an adapter of a configuration; gives the adapted model and the folder."""

    def make(**options: Any) -> tuple[nn.Module, Path]:
        model = copy.deepcopy(base)
        add_adapter(model, LoRAConfig(**{"r": 4, "alpha": 6, "targets": ["up", "down"], **options}))
        shake(model)
        save_adapter(model, tmp_path / "a", base_model="some/base")
        return model, tmp_path / "a"

    return make


UNEVEN: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"up": 2},
    "alpha_pattern": {"down": 2.5},
    "targets": ["up", "down", "embed"],
}


@pytest.mark.filterwarnings("ignore:.*misread by")
def test_a_baked_copy_is_the_same_update_to_every_program(
    base: Net, save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    model, folder = save(**UNEVEN)
    report = export_adapter(folder, tmp_path / "out", bake=True)
    assert (report.rank, report.refused, report.notes) == (4, {}, [])
    assert set(report.errors) == set(LOADERS)
    assert max(report.errors.values()) <= 2.0**-23
    record, tensors = read_adapter(tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]
    assert (record["r"], record["lora_alpha"], record["use_rslora"]) == (4, 4, False)
    assert (record["rank_pattern"], record["alpha_pattern"]) == ({}, {})
    assert record["base_model_name_or_path"] == "some/base"
    # by hand: alpha / sqrt(r) = 6 / sqrt(2) goes into B, and zeros fill up to rank 4
    old = read_adapter(folder)[1]
    a, b = (tensors[f"{PREFIX}up.lora_{f}.weight"] for f in "AB")
    first, second = (old[f"{PREFIX}up.lora_{f}.weight"] for f in "AB")
    assert torch.equal(a, torch.cat([first, torch.zeros(2, 6)]))
    scaled = (second.double() * 6 / math.sqrt(2)).float()
    assert torch.equal(b, torch.cat([scaled, torch.zeros(8, 2)], dim=1))
    load_adapter(base, tmp_path / "out")
    y = model(IDS)
    assert (base(IDS) - y).abs().max() <= 32 * torch.finfo(torch.float32).eps * y.abs().max()


@pytest.mark.filterwarnings("ignore:.*misread by")
def test_a_plain_copy_says_who_misreads_it(
    save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    _, folder = save(alpha_pattern={"down": 2.5})
    report = export_adapter(folder, tmp_path / "out")
    assert (report.rank, report.errors, report.refused) == (None, {"peft": 0.0}, {})
    (note,) = report.notes
    assert note.startswith("alpha_pattern: misread by vLLM, llama.cpp, SGLang, in silence")
    assert "lora-core export --baked" in note
    old, new = read_adapter(folder), read_adapter(tmp_path / "out")
    assert old[0] == new[0]
    assert all(torch.equal(old[1][key], new[1][key]) for key in old[1])
    assert "a plain copy" in str(report)
    assert f"note: {note}" in str(report)


# the scale each program applies at `down`, against alpha / r by pattern
@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, {"peft": 1.5, "vllm": 1.5, "llama.cpp": 1.5, "sglang": 1.5}),
        ({"use_rslora": True}, {"peft": 3.0, "vllm": 3.0, "llama.cpp": 1.5, "sglang": 1.5}),
        (
            {"alpha_pattern": {"down": 2}},
            {"peft": 0.5, "vllm": 1.5, "llama.cpp": 1.5, "sglang": 1.5},
        ),
        ({"rank_pattern": {"down": 2}}, {"peft": 3.0, "vllm": 1.5, "llama.cpp": 3.0}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*misread by")
def test_each_program_scales_by_its_own_rules(
    changes: dict[str, Any],
    scales: dict[str, float],
    save: Callable[..., tuple[nn.Module, Path]],
) -> None:
    record, tensors = read_adapter(save(**changes)[1])
    for name, scale in scales.items():
        assert LOADERS[name](record, tensors)["down"].scale == scale
    if "sglang" not in scales:
        with pytest.raises(Refused, match=r"SGLang stacks .* one rank, r = 4; at 'down' it is 2"):
            LOADERS["sglang"](record, tensors)


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (
            {"use_dora": True},
            {
                "vllm": "vLLM supports no DoRA; --to-lora RANK",
                "llama.cpp": "lora_magnitude_vector'; --to-lora RANK",
                "sglang": "SGLang supports no DoRA; --to-lora RANK",
            },
        ),
        (
            {"bias": "lora_only"},
            {
                "vllm": "vLLM supports no trained biases; `lora-core merge`",
                "llama.cpp": "stops at the key 'base_model.model.down.base_layer.bias'; `lora-core",
                "sglang": "drops the key 'base_model.model.down.base_layer.bias' in silence; `lora",
            },
        ),
        (
            {"modules_to_save": ["conv"]},
            {
                "vllm": "vLLM supports no modules_to_save; `lora-core merge`",
                "llama.cpp": "stops at the key 'base_model.model.conv.bias'",
                "sglang": "drops the key 'base_model.model.conv.bias' in silence",
            },
        ),
        (
            {"lora_bias": True},
            {
                "vllm": "vLLM refuses the key 'base_model.model.down.lora_B.bias'; `lora-core",
                "llama.cpp": "stops at the key",
                "sglang": "drops the key",
            },
        ),
        (
            {"trainable_token_indices": {"embed": [1]}},
            {
                "vllm": "embed.token_adapter.trainable_tokens_delta'; `lora-core merge` puts it",
                "llama.cpp": "trainable_tokens_delta'; `lora-core merge` puts it into the model",
                "sglang": "trainable_tokens_delta' in silence; `lora-core merge`",
            },
        ),
        (
            {"targets": ["conv"]},
            {
                "vllm": "vLLM has no LoRA for the convolution 'conv'",
                "llama.cpp": "llama.cpp has no LoRA for the convolution 'conv'",
                "sglang": "SGLang has no LoRA for the convolution 'conv'",
            },
        ),
    ],
)
def test_what_a_program_has_no_place_for(
    options: dict[str, Any],
    reasons: dict[str, str],
    base: Net,
    save: Callable[..., tuple[nn.Module, Path]],
    tmp_path: Path,
) -> None:
    model, folder = save(**options)
    for name in OTHERS:
        with pytest.raises(ValueError, match="^" + str(folder)) as caught:
            export_adapter(folder, tmp_path / "no", bake=True, loader=name)
        assert reasons[name] in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "no").exists()
    # without a program named it is written, and said; PEFT reads every kind baked
    report = export_adapter(folder, tmp_path / "out", bake=True)
    assert all(reasons[name] in report.refused[name] for name in OTHERS)
    assert set(report.errors) == {"peft"}
    load_adapter(base, tmp_path / "out")
    y = model(IDS)
    assert (base(IDS) - y).abs().max() <= 64 * torch.finfo(torch.float32).eps * y.abs().max()


def test_dora_becomes_a_lora_of_a_rank(
    base: Net, save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    model, folder = save(use_dora=True)
    plain = copy.deepcopy(base)
    report = export_adapter(
        folder, tmp_path / "out", bake=True, loader="vllm", to_lora=6, model=plain
    )
    assert report.conversion is not None
    assert report.conversion.error < 1e-6  # rank 6 is all there is of 8 × 6
    assert (report.rank, report.refused) == (6, {})
    assert "converted by SVD, relative error 0.000%" in str(report)
    load_adapter(base, tmp_path / "out")
    y = model(IDS)
    assert (base(IDS) - y).abs().max() <= 64 * torch.finfo(torch.float32).eps * y.abs().max()
    less = export_adapter(folder, tmp_path / "less", bake=True, to_lora=1, model=plain)
    assert less.conversion is not None
    assert 0.01 < less.conversion.error < 1
    assert adapter_names(plain) == []
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in Net().named_modules()]


def test_a_failed_conversion_leaves_the_model(
    base: Net, save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    _, folder = save(bias="lora_only")
    with pytest.raises(ValueError, match=r"the bias of 'up' .*changes"):
        export_adapter(folder, tmp_path / "out", bake=True, to_lora=4, model=base)
    assert adapter_names(base) == []


def test_a_rank_to_fill_up_to(save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path) -> None:
    _, folder = save()
    assert export_adapter(folder, tmp_path / "out", bake=True, rank=16).rank == 16
    tensors = read_adapter(tmp_path / "out")[1]
    assert tensors[f"{PREFIX}up.lora_A.weight"].shape == (16, 6)
    with pytest.raises(ValueError, match=r"rank 3 is below the 4 of '\w+': .* --to-lora 3"):
        export_adapter(folder, tmp_path / "no", bake=True, rank=3)
    _, folder = save(targets=["conv"])
    with pytest.raises(ValueError, match="rank 5 is no multiple of the 2 groups of 'conv'"):
        export_adapter(folder, tmp_path / "no", bake=True, rank=5)


def test_a_start_is_exported_as_what_it_adds(
    base: Net, save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    model, folder = save(r=2, init="pissa")
    report = export_adapter(folder, tmp_path / "out", bake=True, loader="vllm")
    assert report.rank == 4
    load_adapter(base, tmp_path / "out")
    y = model(IDS)
    assert (base(IDS) - y).abs().max() <= 64 * torch.finfo(torch.float32).eps * y.abs().max()


def test_options_that_do_not_fit(
    base: Net, save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    _, folder = save()
    for options, message in (
        ({"rank": 8}, r"give them with --baked \(bake=True\)"),
        ({"to_lora": 8}, r"give them with --baked \(bake=True\)"),
        ({"bake": True, "to_lora": 8}, r"give the base, --model \(model\)"),
        ({"loader": "vlm"}, "no loader 'vlm' is known; nearest names: 'vllm'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_adapter(folder, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not empty: choose a new folder"):
        export_adapter(folder, folder, bake=True)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights='pissa' trains from a changed base"):
        export_adapter(folder, tmp_path / "out", bake=True)
    (folder / CONFIG).write_text(json.dumps({**config, "peft_type": "P_TUNING"}))
    with pytest.raises(ValueError, match="is a P_TUNING adapter: only LORA ones"):
        export_adapter(folder, tmp_path / "out", bake=True)
    assert not (tmp_path / "out").exists()


def half(key: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Replace one tensor of a file, or take it away."""
    changed = {} if tensor is None else {PREFIX + key: tensor}
    return lambda tensors: {k: v for k, v in tensors.items() if k != PREFIX + key} | changed


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"r": 0}, None, "r must be a whole number of at least 1, got 0"),
        ({"r": "4"}, None, "r must be a whole number of at least 1, got '4'"),
        ({"r": 8}, None, "the configuration says rank 8 for '(up|down)', its A has 4 rows"),
        ({"rank_pattern": {"up": 2}}, None, "says rank 2 for 'up', its A has 4 rows"),
        ({"rank_pattern": ["up"]}, None, "rank_pattern must be a dict of {pattern: value}"),
        ({"rank_pattern": {"(": 4}}, None, r"rank_pattern: '\(' is no regular expression"),
        ({"lora_alpha": float("nan")}, None, "alpha must be a finite number, got nan"),
        ({"lora_alpha": None}, None, "alpha must be a finite number, got None"),
        ({}, half("up.lora_B.weight", None), "'up' has only one of A and B"),
        ({}, half("up.lora_B.weight", torch.ones(8, 3)), "A and B of 'up' are no pair: "),
        ({}, half("up.lora_A.weight", torch.ones(4)), r"'up' are no pair: \(4,\) torch.float32"),
        ({}, half("up.lora_A.weight", torch.ones(4, 6).int()), "are no pair: .* torch.int32"),
        ({}, lambda _: {PREFIX + "up.bias": torch.ones(8)}, "has no pair of A and B"),
    ],
)
def test_files_that_no_program_should_read(
    config: dict[str, Any],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    message: str,
    save: Callable[..., tuple[nn.Module, Path]],
    tmp_path: Path,
) -> None:
    """PEFT refuses these too, or scales by what is not the rank of A."""
    _, folder = save()
    raw, tensors = read_adapter(folder)
    (folder / CONFIG).write_text(json.dumps({**raw, **config}))
    if change is not None:
        save_file(change(tensors), folder / WEIGHTS)
    for options in ({}, {"bake": True}):
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}:? .*{message}") as caught:
            export_adapter(folder, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_programs_have_no_defaults_of_pefts(
    save: Callable[..., tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    _, folder = save(alpha=8)
    raw, _ = read_adapter(folder)
    (folder / CONFIG).write_text(json.dumps({k: raw[k] for k in raw if k != "lora_alpha"}))
    report = export_adapter(folder, tmp_path / "plain")
    assert set(report.refused) == set(OTHERS)
    assert "vLLM needs lora_alpha in the configuration" in report.refused["vllm"]
    assert not export_adapter(folder, tmp_path / "baked", bake=True).refused


# --- the arithmetic ---


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4
    ),
    alpha=st.sampled_from([1, 3.5, 32, 1e-3]),
    rslora=st.booleans(),
    more=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_baking_costs_one_rounding(
    shapes: list[tuple[int, int, int]], alpha: float, rslora: bool, more: int, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors, ranks = {}, {}
    for i, (n, k, r) in enumerate(shapes):
        tensors[f"{PREFIX}m{i}.lora_A.weight"] = torch.randn(r, k)
        tensors[f"{PREFIX}m{i}.lora_B.weight"] = torch.randn(n, r)
        ranks[f"m{i}"] = r
    record = {"r": 1, "lora_alpha": alpha, "rank_pattern": ranks, "use_rslora": rslora}
    wide = max(ranks.values()) + more
    new, written = baked(record, tensors, wide)
    true = read_as_peft(record, tensors)
    assert new["r"] == new["lora_alpha"] == wide
    for read in LOADERS.values():
        assert check(new, written, true, read) <= 2.0**-23
    # and a scale that is off by a millionth is found
    off = {k: Applied(p.down, p.up, p.scale * (1 + 1e-6)) for k, p in true.items()}
    with pytest.raises(ValueError, match="is off by"):
        check(new, written, off, LOADERS["vllm"])


def test_what_leaves_float32_is_refused() -> None:
    tensors = {
        f"{PREFIX}m.lora_A.weight": torch.ones(1, 2),
        f"{PREFIX}m.lora_B.weight": torch.full((2, 1), 1e38),
    }
    with pytest.raises(ValueError, match=r"lora_B.weight' with its scaling 100 leaves float32's"):
        baked({"r": 1, "lora_alpha": 100}, tensors)


def test_a_module_that_is_not_read_is_found() -> None:
    pair = Applied(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(ValueError, match="'b' is in the adapter or in what is read of it"):
        check({}, {}, {"a": pair, "b": pair}, lambda *_: {"a": pair})


def test_a_baked_copy_names_no_other_module(
    shake: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """'0' is the end of '1.0' too: as a name it would mean both."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=2, targets="0"))
    save_adapter(shake(model), tmp_path / "a")
    export_adapter(tmp_path / "a", tmp_path / "b", bake=True, rank=3)
    assert load_adapter(base, tmp_path / "b").sites == ("0",)
