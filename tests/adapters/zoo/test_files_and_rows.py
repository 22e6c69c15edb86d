"""Every method on every model: to disk and back, and beside others in one batch."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    adapted_modules,
    adapter_report,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
)
from lora_core.adapters.rows import adapter_rows
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter

Same = Callable[[Tensor, Tensor], bool]


def save(model: nn.Module, folder: Path, name: str = "default") -> None:
    with warnings.catch_warnings():  # what other programs would misread is not at stake here
        warnings.simplefilter("ignore", UserWarning)
        save_adapter(model, folder, name)


def test_files_bring_the_adapter_back(subject: Any, same_bits: Same, tmp_path: Path) -> None:
    subject.fill(subject.model)
    # frozen, as a loaded one is: torch.matmul folds its batch or not by `requires_grad`
    set_adapters(subject.model, "default", trainable=False)
    wanted = subject.call(subject.model)
    save(subject.model, tmp_path)
    model = subject.fresh()
    report = load_adapter(model, tmp_path, "again")
    assert report.sites == adapter_report(subject.model).sites
    assert not any(p.requires_grad for p in model.parameters())
    assert same_bits(subject.call(model), wanted)
    with disable_adapters(model):
        assert same_bits(subject.call(model), subject.call(subject.base))
    ours, theirs = adapter_state_dict(model, "again"), adapter_state_dict(subject.model)
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[k], theirs[k]) for k in ours)
    if subject.method.merges:
        merge_adapters(model)
        merge_adapters(subject.model)
        assert same_bits(subject.call(model), subject.call(subject.model))


def test_training_goes_on_where_it_stopped(subject: Any, same_bits: Same, tmp_path: Path) -> None:
    """Loaded to be trained: the same parameters, and the same step from there."""
    subject.fill(subject.model)
    save(subject.model, tmp_path)
    model = subject.fresh()
    load_adapter(model, tmp_path, trainable=True)
    sides = []
    for one in (subject.model, model):
        own = {k: p for k, p in one.named_parameters() if p.requires_grad}
        assert own
        optimizer = torch.optim.SGD(own.values(), lr=0.1)
        subject.call(one, grad=True).square().mean().backward()
        optimizer.step()
        sides.append(own)
    assert sides[0].keys() == sides[1].keys()
    assert all(same_bits(sides[0][k], sides[1][k]) for k in sides[0])
    assert same_bits(subject.call(model), subject.call(subject.model))


def test_a_saved_adapter_beside_another(subject: Any, same_bits: Same, tmp_path: Path) -> None:
    subject.fill(subject.model)
    set_adapters(subject.model, "default", trainable=False)
    first = subject.call(subject.model)
    subject.add("other", seed=5)
    set_adapters(subject.model, "other", trainable=False)
    second = subject.call(subject.model)
    for name in ("default", "other"):
        save(subject.model, tmp_path / name, name)
    model = subject.fresh()
    load_adapter(model, tmp_path / "default", "one")
    load_adapter(model, tmp_path / "other", "two")
    for name, wanted in (("one", first), ("two", second), ("one", first)):
        set_adapters(model, name)
        assert same_bits(subject.call(model), wanted)
    delete_adapter(model, "one")
    delete_adapter(model, "two")
    assert same_bits(subject.call(model), subject.call(subject.base))


# --- rows of one batch ---


def mixes(subject: Any) -> bool:
    """Whether rows may name the subject's adapters, at modules that see whole batches."""
    hosts = list(adapted_modules(subject.model))
    positions = any("wpe" in site for site, _ in hosts)  # one row for all of the batch
    return not positions and all(host.adapter("default").mixes for _, host in hosts)


def test_rows_name_adapters(subject: Any, check_rows: Callable) -> None:
    subject.fill(subject.model)
    subject.add("other", seed=5)
    size = len(subject.call(subject.base))
    if not mixes(subject):
        names = ["default", "other", None][:size]
        with pytest.raises(ValueError, match="rows"), adapter_rows(subject.model, names):
            subject.call(subject.model)
        assert not any(host.mixture for _, host in adapted_modules(subject.model))
        return
    for names in (["default", "other", None], ["other", None, "other"], [None, None, "default"]):
        check_rows(subject, names[:size])


@pytest.fixture
def check_rows() -> Callable[[Any, list[str | None]], None]:
    """Each row against the whole batch under its adapter alone, judged by float64."""

    def check(subject: Any, names: list[str | None]) -> None:
        model, double = subject.model, copy.deepcopy(subject.model).double()
        ours = {}
        for dtype, one in (("float", model), ("double", double)):
            with adapter_rows(one, names):
                ours[dtype] = subject.call(one)
        for row, name in enumerate(names):
            alone = {}
            for dtype, one in (("float", model), ("double", double)):
                set_adapters(one, [] if name is None else name)
                alone[dtype] = subject.call(one)
            truth = alone["double"]
            baseline = (alone["float"].double() - truth).abs().max()
            error = (ours["float"][row].double() - truth[row]).abs().max()
            room = 2 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert error <= 2 * baseline + room, (row, name)

    return check


def test_gradients_of_rows_are_their_adapters(plain: Any) -> None:
    """The loss of a mixed batch trains each adapter with its own rows alone."""
    plain.fill(plain.model)
    plain.add("other", seed=5)
    model = copy.deepcopy(plain.model).double()
    size = len(plain.call(plain.base))
    names = ["default", "other", "default"][:size]
    set_adapters(model, [], trainable=True)
    every = {k: p for k, p in model.named_parameters() if ".adapters." in k}
    for p in every.values():
        p.requires_grad_(True)

    def found(loss: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(every.values()), allow_unused=True)
        return {k: g for k, g in zip(every, grads, strict=True) if g is not None}

    with adapter_rows(model, names):
        mixed = found(plain.call(model, grad=True).square().sum())
    for name in set(names):
        set_adapters(model, name)
        rows = [i for i, other in enumerate(names) if other == name]
        alone = found(plain.call(model, grad=True)[rows].square().sum())
        assert alone
        for key, wanted in alone.items():
            # float64 through, the gradient rounded to float32 once; its blocks' norms in float32
            room = 8 * torch.finfo(torch.float32).eps * wanted.abs().max()
            assert (mixed[key] - wanted).abs().max() <= room, key
