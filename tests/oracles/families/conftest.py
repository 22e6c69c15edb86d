"""Every family of decoders as a row: a tiny model of it, written by transformers, read here.

How a test uses this. It takes `family`, and runs once for each row of `CASES`; a marker says which
column of the table in docs/models.md it is a proof of, and leaves out the rows without such a thing
(`window`: models none of whose layers slide):

    @pytest.mark.column("window")
    def test_it(family: str, make_pair: Callable[..., Any]) -> None:
        ours, theirs, truth, folder = make_pair(family)

`ours` is what `load_model` made of the folder, `theirs` the model of transformers that wrote it,
`truth` the same in float64, throughout: transformers' own casts to float32 are lifted. All three
are the caller's to change. The folder is not: it is written once a session. `make_pair(family,
torch.bfloat16)` gives both in bfloat16, and the truth of the rounded weights.

`draw(family)` gives token ids, `parameters_of(model)` the decoder's parameters by the names that
both libraries share, `within(ours, theirs, truth)` is the bound on errors (habit 2 of the house: at
most twice theirs, and two roundings of the largest value).

A further family is a row of `CASES`. `python -m benchmarks.families` runs all this and writes the
table.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

COLUMNS = ("logits", "gradients", "cache", "window", "NF4", "template", "adapter")
VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    """in docs/models.md"""
    model: str
    """transformers' class"""
    templates: tuple[str, ...]
    """chat templates of tests/data/family_templates that its models come with"""
    changes: dict[str, Any] = field(default_factory=dict)
    """of its configuration, against `SIZES`"""
    wrapper: dict[str, Any] | None = None
    """of a multimodal model's configuration, whose text part the rest is about"""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that it has a cell in."""
        slides = self.changes.get("sliding_window") is not None
        return tuple(column for column in COLUMNS if slides or column != "window")


def rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
GEMMA2: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}
GEMMA3 = GEMMA2 | {
    "num_hidden_layers": 7,  # five that slide, one that does not, one more
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": rope("linear", factor=8.0) | {"rope_theta": 1e5},
        "sliding_attention": rope() | {"rope_theta": 50.0},
    },
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Of `pairs` turning pairs of channels; texts above 16 tokens have the long factors."""
    short, long = ([start + i / 3 for i in range(pairs)] for start in (1.0, 2.5))
    known = {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
    return rope("longrope", short_factor=short, long_factor=long, factor=4.0, **known | more)


CASES: dict[str, Case] = {
    "llama2": Case("Llama 2", "LlamaForCausalLM", ("llama2",), {"num_key_value_heads": 4}),
    "llama3": Case(
        "Llama 3", "LlamaForCausalLM", ("llama3", "llama31"), {"rope_parameters": LLAMA3}
    ),
    "llama32": Case(
        "Llama 3.2 (tied)",
        "LlamaForCausalLM",
        ("llama31",),
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "mistral": Case("Mistral 7B", "MistralForCausalLM", ("mistral_v01",), {"sliding_window": 7}),
    "mistral-nemo": Case(
        "Mistral Nemo, Small",
        "MistralForCausalLM",
        ("mistral_nemo", "mistral_v03", "mistral_small"),
        {"sliding_window": None, "head_dim": 12},
    ),
    "qwen2": Case("Qwen 2, 2.5", "Qwen2ForCausalLM", ("qwen25",), {"tie_word_embeddings": True}),
    "qwen2-window": Case(
        "Qwen 2, sliding",
        "Qwen2ForCausalLM",
        ("qwen25",),
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": Case("Qwen 3", "Qwen3ForCausalLM", ("qwen3",), {"head_dim": 16}),
    "gemma": Case(
        "Gemma", "GemmaForCausalLM", ("gemma",), {"num_key_value_heads": 1, "head_dim": 16}
    ),
    "gemma2": Case(
        "Gemma 2",
        "Gemma2ForCausalLM",
        ("gemma",),
        # caps as small beside these scores and logits as 50 and 30 are beside a real model's
        GEMMA2
        | {"num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": Case("Gemma 3 (text)", "Gemma3ForCausalLM", ("gemma3",), GEMMA3),
    "gemma3-wrapped": Case(
        "Gemma 3 (text of the multimodal)",
        "Gemma3ForConditionalGeneration",
        ("gemma3",),
        GEMMA3 | {"num_hidden_layers": 3, "layer_types": GEMMA3["layer_types"][4:]},
        {
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": 200,
            "boi_token_index": 198,
            "eoi_token_index": 199,
        },
    ),
    "mistral3-wrapped": Case(
        "Mistral Small 3 (text of the multimodal)",
        "Mistral3ForConditionalGeneration",
        ("mistral_small",),
        {"sliding_window": None, "head_dim": 12, "model_type": "mistral"},
        {
            "vision_config": TOWER | {"model_type": "pixtral"},
            "image_token_index": 200,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": Case("Phi-3 mini", "Phi3ForCausalLM", ("phi3",), {"sliding_window": 9}),
    "phi35": Case(
        "Phi-3.5, 4",
        "Phi3ForCausalLM",
        ("phi3", "phi4"),
        {"rope_parameters": longrope(4), "original_max_position_embeddings": 16},
    ),
    "phi4-mini": Case(
        "Phi-4 mini",
        "Phi3ForCausalLM",
        ("phi4_mini",),
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": longrope(6, partial_rotary_factor=0.75),
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2": Case("SmolLM 2", "LlamaForCausalLM", ("smollm2",), {"tie_word_embeddings": True}),
    "smollm3": Case(
        "SmolLM 3",
        "SmolLM3ForCausalLM",
        ("smollm3",),
        {"num_hidden_layers": 4, "use_sliding_window": False},  # the fourth does not rotate
    ),
    "smollm3-window": Case(
        "SmolLM 3, sliding",
        "SmolLM3ForCausalLM",
        ("smollm3",),
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "olmo2": Case("OLMo 2", "Olmo2ForCausalLM", ("olmo2",)),
    "granite": Case(
        "Granite 3",
        "GraniteForCausalLM",
        ("granite3",),
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
}


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
    model.__class__ = type("Exact", (_Exact, type(model)), {})
    return model


@pytest.fixture(scope="session")
def transformers(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("transformers")


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
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
        return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))

    return ids


def largest(x: Tensor) -> Tensor:
    return x.abs().max()


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@pytest.fixture(scope="session")
def within() -> Callable[..., None]:
    """Bound our error by theirs, either the largest or ("rms") the root of the mean square."""

    def check(ours: Tensor, theirs: Tensor, truth: Tensor, by: str = "largest") -> None:
        size = {"largest": largest, "rms": rms}[by]
        eps = torch.finfo(ours.dtype).eps
        assert ours.dtype == theirs.dtype
        error = size(ours.double() - truth)
        allowed = 2 * size(theirs.double() - truth) + 2 * eps * size(truth)
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check
