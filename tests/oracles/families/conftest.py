"""Every family of decoders as a row: a tiny model of it, written by transformers, read here.

How a test uses this. It takes `family`, and runs once for each row of cases.py; a marker says which
column of the table in docs/models.md it is a proof of, and leaves out the rows without such a thing
(`window`: models none of whose layers slide):

    @pytest.mark.column("window")
    def test_it(family: str, make_pair: Callable[..., Any]) -> None:
        ours, theirs, truth, folder = make_pair(family)

`ours` is what `load_model` made of the folder, `theirs` the model of transformers that wrote it,
`truth` the same in float64, throughout: transformers' own casts to float32 are lifted. All three
are the caller's to change. The folder is not: it is written once a session. `make_pair(family,
torch.bfloat16)` gives both in bfloat16, and the truth of the rounded weights.

`draw()` gives token ids, `parameters_of(model)` the decoder's parameters by the names that
both libraries share, `within(ours, theirs, truth)` is the bound on errors (habit 2 of the house: at
most twice theirs, and two roundings of the largest value).

A further family is a row of cases.py. `python -m benchmarks.families` runs all this and writes the
table.
"""

import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def _beside(name: str) -> ModuleType:
    """A file of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"family_{name}", PLACE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PLACE = Path(__file__).parent
TABLE = _beside("cases")
CASES, COLUMNS, SIZES = TABLE.CASES, TABLE.COLUMNS, TABLE.SIZES


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"column(name): what a test proves in docs/models.md: {', '.join(COLUMNS)}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `family` for each row that has a cell in the test's column."""
    if "family" not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers("column"))
    wanted = {mark.args[0] for mark in marks} or {"logits"}
    unknown = wanted - set(COLUMNS)
    assert not unknown, f"no such column: {unknown}"
    names = [name for name, case in CASES.items() if wanted <= set(case.columns)]
    metafunc.parametrize("family", names)


class Pair(NamedTuple):
    ours: nn.Module
    theirs: Any
    truth: Any
    folder: Path


class _Doubles(TorchFunctionMode):
    """Within it what asks for float32 gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _Exact:
    """A model whose forward has no float32 in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Doubles():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def exactly(model: nn.Module) -> nn.Module:
    """The same in float64 throughout: what errors are measured against."""
    model = copy.deepcopy(model).double()
    if getattr(model.config, "num_experts", None):
        model.set_experts_implementation("eager")  # as read from a folder it is another
    model.__class__ = type("Exact", (_Exact, type(model)), {})
    return model


@pytest.fixture(scope="session")
def transformers(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("transformers")


@pytest.fixture(scope="session")
def cases() -> dict[str, Any]:
    return CASES


@pytest.fixture(scope="session")
def their_config(transformers: ModuleType) -> Callable[..., Any]:
    """transformers' configuration of a row, and further changes."""

    def make(family: str, **more: Any) -> Any:
        case = CASES[family]
        kind = getattr(transformers, case.model).config_class
        sizes = copy.deepcopy(SIZES | case.changes | more)
        if case.wrapper is None:
            return kind(**sizes)
        return kind(text_config=sizes, **copy.deepcopy(case.wrapper))

    return make


def perturb(model: nn.Module, scale: float = 0.2) -> None:
    """Numbers that matter everywhere: no norm of ones, no bias of zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(noise)  # a norm's
            else:
                parameter.copy_(noise)


@pytest.fixture(scope="session")
def load() -> Callable[..., nn.Module]:
    """`load_model`, which tells of a vision tower that it leaves out."""
    from lora_core.checkpoint import load_model

    def read(folder: Path, **options: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*left out .*vision_tower")
            return load_model(folder, **options).eval()

    return read


@pytest.fixture(scope="session")
def make_pair(
    load: Callable[..., nn.Module],
    transformers: ModuleType,
    their_config: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Pair]:
    """Our model, theirs, the exact one and the folder; see this module's docstring."""
    transformers.utils.logging.disable_progress_bar()
    kept: dict[tuple[str, torch.dtype], Pair] = {}

    def write(family: str) -> Pair:
        model = getattr(transformers, CASES[family].model)(their_config(family)).eval()
        perturb(model)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return Pair(load(folder), model, exactly(model), folder)

    def rounded(family: str, dtype: torch.dtype) -> Pair:
        folder = make_pair(family).folder
        kind = getattr(transformers, CASES[family].model)
        theirs = kind.from_pretrained(folder, dtype=dtype).eval()
        exact = kind.from_pretrained(folder, dtype=torch.float32).eval()
        exact.load_state_dict(theirs.state_dict())
        return Pair(load(folder, dtype=dtype), theirs, exactly(exact), folder)

    def make_pair(family: str, dtype: torch.dtype = torch.float32) -> Pair:
        key = family, dtype
        if key not in kept:
            kept[key] = write(family) if dtype == torch.float32 else rounded(family, dtype)
        *models, folder = kept[key]
        return Pair(*(copy.deepcopy(model) for model in models), folder)

    return make_pair


@pytest.fixture(scope="session")
def parameters_of() -> Callable[[nn.Module], dict[str, nn.Parameter]]:
    """A decoder's parameters by name, those of a multimodal model's text part by the same names."""

    def find(model: nn.Module) -> dict[str, nn.Parameter]:
        named = {
            name.replace("model.language_model.", "model."): parameter
            for name, parameter in model.named_parameters()
            if "vision_tower" not in name and "multi_modal_projector" not in name
        }
        return dict(sorted(named.items()))

    return find


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tensor]:
    """Token ids (batch, tokens)."""

    def ids(batch: int = 2, tokens: int = 21, seed: int = 11) -> Tensor:
        return torch.randint(
            SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed)
        )

    return ids
