"""How much memory a run will need, before it: from config.json, the adapter and the run's settings.

Nothing here is a formula fitted to measurements. The library's own training step is run on fake
tensors, which have shapes and no memory, and what would be allocated is counted (counting.py,
step.py). Layers are alike, so models of two and of three layers are run, and every figure of L
layers is `two + (L - 2) · (three - two)`: the difference is one layer. The first and the last
are those of the model, on which the ends of the backward pass depend. An adapter whose options name
single layers takes all of them, as does a model with experts in some layers alone.

The other way to do this is a formula for each tensor, as the usual calculators have it. It is
faster, and wrong from the day on which an operator keeps one tensor more. docs/memory.md has the
formulas, and a test compares them with what is counted here.

Bytes are those that PyTorch's allocator hands out. Beyond them lie the CUDA context and what the
allocator keeps for itself (`Plan.outside`).
"""

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch

from lora_core.adapters import LoRAConfig
from lora_core.models import CausalLM, ModelConfig
from lora_core.plan.counting import Stored
from lora_core.plan.empty import METHODS, empty_model
from lora_core.plan.inside import CUBLAS_WORKSPACE, Inside
from lora_core.plan.step import Tally, tally
from lora_core.train.config import TrainConfig
from lora_core.train.offload import SMALLEST
from lora_core.train.paged import PagedAdamW

__all__ = ["DEVICES", "Plan", "Settings", "plan", "plan_of"]

DEVICES = ("cuda", "cpu")
CUDA_CONTEXT = 500_000_000
"""What a process holds on a GPU before its first tensor: a usual figure, not measured here."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PHASES = {
    "forward": "the forward pass",
    "loss": "the loss",
    "last": "the backward pass of the last layer",
    "first": "the backward pass of the first layer",
    "update": "the optimizer's step",
}


@dataclass(frozen=True)
class Settings:
    """What is planned, all choices made."""

    config: ModelConfig
    """sizes of the model"""
    method: str
    """"full", "lora" or "qlora" """
    adapter: LoRAConfig
    """of "lora" and "qlora" """
    train: TrainConfig
    """the run: rows of a batch, optimizer, checkpointing …"""
    tokens: int
    """T, tokens of a row"""
    device: str
    """"cuda" or "cpu" """
    weights: torch.dtype
    """of weights that are not 4-bit"""
    code: str
    """of the 4-bit weights"""

    @property
    def compute(self) -> torch.dtype:
        """Dtype of the matrix products."""
        if self.train.dtype == "auto":
            return torch.bfloat16 if self.device == "cuda" else torch.float32
        return _DTYPES[self.train.dtype]

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward pass."""
        return self.train.batch_size * self.tokens


@dataclass(frozen=True)
class Plan:
    """The memory of a run, in bytes; `str()` of it is a table for the user."""

    settings: Settings
    """what was planned"""
    parameters: int
    """number of the model's parameters, the adapter's not among them"""
    trainable: int
    """number of trained parameters"""
    parts: dict[str, int]
    """bytes by part: "weights", "4-bit weights", "adapter", "gradients", "optimizer" and
    "activations", which are what layers keep for backward at the end of the forward pass"""
    formulas: dict[str, str]
    """how each part came out"""
    phases: dict[str, int]
    """most bytes alive in each phase of a step"""
    host: int
    """bytes in the host's memory, where the run is on a GPU and keeps something there"""
    layer: tuple[Stored, ...]
    """the tensors that one layer keeps for backward"""

    @property
    def peak(self) -> int:
        """Most bytes allocated at once."""
        return max(self.phases.values())

    @property
    def at(self) -> str:
        """When the peak is."""
        return _PHASES[max(self.phases, key=lambda phase: self.phases[phase])]

    @property
    def outside(self) -> int:
        """Bytes that a GPU needs outside the allocator."""
        return CUDA_CONTEXT if self.settings.device == "cuda" else 0

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        s = self.settings
        kinds: dict[tuple[tuple[int, ...], str], int] = {}
        for stored in self.layer:
            key = (stored.shape, str(stored.dtype).removeprefix("torch."))
            kinds[key] = kinds.get(key, 0) + 1
        return {
            "method": s.method,
            "device": s.device,
            "weights_dtype": str(s.weights).removeprefix("torch."),
            "compute_dtype": str(s.compute).removeprefix("torch."),
            "batch_size": s.train.batch_size,
            "tokens": s.tokens,
            "optimizer": s.train.optimizer,
            "activation_checkpointing": s.train.activation_checkpointing,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "bytes": self.parts,
            "formulas": self.formulas,
            "phases": self.phases,
            "peak": self.peak,
            "peak_at": self.at,
            "host": self.host,
            "outside": self.outside,
            "kept_by_a_layer": [
                {"shape": list(shape), "dtype": dtype, "count": count}
                for (shape, dtype), count in kinds.items()
            ],
        }


def plan(
    config: ModelConfig,
    method: str = "qlora",
    adapter: LoRAConfig | None = None,
    train: TrainConfig | None = None,
    *,
    tokens: int = 2048,
    device: str = "cuda",
    weights: torch.dtype | None = None,
    code: str = "nf4",
) -> Plan:
    """Say what a run will need.

    Args:
        config: the model's sizes.
        method: "full", "lora" or "qlora".
        adapter: LoRA's options; None: `LoRAConfig()`.
        train: the run's; batch_size, accumulate, dtype, optimizer, activation_checkpointing and
            what else decides about memory is read from it. None: `TrainConfig()`.
        tokens: T, of each row; all rows are full and all tokens graded.
        device: "cuda" or "cpu".
        weights: dtype of the weights that are not 4-bit; None: as `lora-core finetune` holds them,
            float32 where they are trained and on a CPU, else bfloat16.
        code: of the 4-bit weights.

    Returns:
        The plan.

    Raises:
        ValueError: an unknown method or device, or options that no plan can be made for.
        TypeError: trained weights in 16 bits.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    if type(tokens) is not int or tokens < 2:
        raise ValueError(f"tokens must be a whole number, 2 or more; got {tokens!r}")
    wide = method == "full" or device == "cpu"
    settings = Settings(
        config=config,
        method=method,
        adapter=adapter or LoRAConfig(),
        train=train or TrainConfig(),
        tokens=tokens,
        device=device,
        weights=weights or (torch.float32 if wide else torch.bfloat16),
        code=code,
    )
    return plan_of(settings)


def plan_of(settings: Settings) -> Plan:
    """The plan of settings that are complete; see `plan`."""
    counted = _counted(settings)
    s, extra = settings, CUBLAS_WORKSPACE if settings.device == "cuda" else 0
    adapter = 0 if s.method == "full" else counted.trained
    weights = counted.frozen + (counted.trained if s.method == "full" else 0)
    parts = {
        "weights": weights,
        "4-bit weights": counted.packed,
        "adapter": adapter,
        "gradients": counted.gradients,
        "optimizer": counted.optimizer,
        "activations": counted.kept,
    }
    phases = {phase: peak + extra for phase, peak in counted.peaks.items()}
    paged, staging = _paged(s, counted)
    offloaded, stays = _offloaded(s, counted)
    for phase in phases:
        phases[phase] += (
            staging - paged - (0 if phase in ("first", "update") else offloaded - stays)
        )
    with torch.device("meta"):
        model = CausalLM(s.config)
    parameters = sum(p.numel() for p in model.parameters())
    return Plan(
        settings=s,
        parameters=parameters,
        trainable=counted.trained_numel,
        parts=parts,
        formulas=_formulas(s, counted, parts),
        phases=phases,
        host=paged + offloaded,
        layer=counted.layer,
    )


def _paged(s: Settings, counted: Tally) -> tuple[int, int]:
    """Bytes of the optimizer's state in a host that is not the device, and of staging buffers."""
    if s.train.optimizer != "adamw-paged":
        return 0, 0
    bucket = inspect.signature(PagedAdamW).parameters["bucket_bytes"].default
    staging = 2 * min(bucket, counted.optimizer)
    return (counted.optimizer if s.device == "cuda" else 0), staging


def _offloaded(s: Settings, counted: Tally) -> tuple[int, int]:
    """Bytes of layers' inputs that go to the host, and of the two that are still here."""
    if s.device != "cuda" or not s.train.offload_activations:
        return 0, 0
    each = sum(
        stored.nbytes
        for stored in counted.layer
        if stored.nbytes >= SMALLEST and stored.shape[:2] == (s.train.batch_size, s.tokens)
    )
    layers = s.config.num_hidden_layers
    return layers * each, min(layers, 2) * each


def _counted(s: Settings) -> Tally:
    """The bytes of the whole model, from two small ones if its layers are alike."""
    if s.train.optimizer == "adamw-paged":  # the same numbers, elsewhere
        s = dataclasses.replace(s, train=dataclasses.replace(s.train, optimizer="adamw"))
    if s.train.offload_activations:  # likewise
        s = dataclasses.replace(s, train=dataclasses.replace(s.train, offload_activations=False))
    layers = s.config.num_hidden_layers
    mixed = len({s.config.has_experts(layer) for layer in range(layers)}) > 1
    if layers <= 3 or mixed or (s.method != "full" and not _alike(s.adapter)):
        return _count(s, layers)
    two, three = _count(s, 2), _count(s, 3)

    def extend(a: int, b: int) -> int:
        return a + (layers - 2) * (b - a)

    numbers = {
        f.name: extend(getattr(two, f.name), getattr(three, f.name))
        for f in dataclasses.fields(Tally)
        if f.type is int
    }
    peaks = {phase: extend(two.peaks[phase], three.peaks[phase]) for phase in two.peaks}
    return Tally(**numbers, layer=three.layer, peaks=peaks)


def _count(s: Settings, layers: int) -> Tally:
    model = empty_model(s.config, s.method, s.adapter, s.weights, s.code, layers)
    return tally(model, s.train, s.train.batch_size, s.tokens, Inside(s.compute, s.device))


def _alike(adapter: LoRAConfig) -> bool:
    """Whether all layers get the same pairs: no option names a module by its layer's number."""
    chosen: list[Any] = []
    for option in (adapter.targets, adapter.exclude, adapter.modules_to_save):
        chosen += [option] if isinstance(option, str) or callable(option) else list(option or ())
    chosen += [*adapter.rank_pattern, *adapter.alpha_pattern, *adapter.parts]
    return all(isinstance(name, str) and not re.search(r"\d", name) for name in chosen)


def _formulas(s: Settings, counted: Tally, parts: dict[str, int]) -> dict[str, str]:
    """How each part came out, in one line each."""
    trained, layers = counted.trained_numel, s.config.num_hidden_layers
    dtype = str(s.weights).removeprefix("torch.")
    width = s.weights.itemsize
    of_layer = sum(stored.nbytes for stored in counted.layer)
    each = of_layer / s.batch_tokens
    per_trained = counted.optimizer / max(trained, 1)
    return {
        "weights": f"{parts['weights'] // width:,} numbers in {dtype} × {width} bytes",
        "4-bit weights": (
            "codes of half a byte, a scale byte per 64, and 4 bytes per 256 scales"
            if counted.packed
            else "none"
        ),
        "adapter": f"{trained:,} × 4 bytes" if parts["adapter"] else "none",
        "gradients": f"{trained:,} × 4 bytes, one for each trained parameter",
        "optimizer": f"{s.train.optimizer}: {per_trained:.2f} bytes a trained parameter",
        "activations": (
            f"{layers} layers × {s.batch_tokens:,} tokens × {each:,.0f} bytes, and the rest"
        ),
    }
