"""What is compared, on what, and by which measures: the edge between command line and library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_core.compare.variants import METHODS, Variant, check_methods, grid

SYSTEM = "Answer with one JSON object and nothing else."
"""system text of the shipped task"""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison; checked when made.

    Raises:
        ValueError: an unknown method, a value out of range, or options that need one another.
    """

    out: str
    """folder that gets results.jsonl, the tables, the plots and the report"""
    model: str | None = None
    """Hugging Face folder of the base; none: the model that ships with the package"""
    data: str | None = None
    """JSONL file to train on and to take examples from; none: the quickstart's task"""
    eval_data: str | None = None
    """JSONL file of held-out rows, whose last answers are the references"""
    general_text: str | None = None
    """text or JSONL file that forgetting is measured on; none: held-out modules of the standard
    library"""
    columns: str | None = None
    """names of the data's fields: prompt=question,completion=answer"""
    methods: tuple[str, ...] = tuple(METHODS)
    """names of METHODS"""
    metrics: tuple[str, ...] = ("exact", "f1", "rouge")
    """names of lora_core.evaluate.metrics; the first is drawn"""
    seeds: tuple[int, ...] = (0,)
    """each trained variant runs once a seed"""
    sweep: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """values by field; their products, for each method that has the fields"""
    rates: Mapping[str, float] = field(default_factory=dict)
    """learning rate by method, in place of the default"""
    steps: int = 120
    """optimizer steps of each training"""
    batch_size: int = 8
    """rows of a step"""
    r: int = 16
    """rank of LoRA, QLoRA and DoRA"""
    alpha: float = 32
    """their alpha: the update is scaled by alpha / r"""
    targets: str = "all-linear"
    """their layers: all-linear, attention, query-value, feed-forward, or names joined by +"""
    reduction: float = 8
    """width of the model over width of a bottleneck"""
    virtual_tokens: int = 20
    """virtual tokens of prefix, prompt and ptuning"""
    shots: int | None = None
    """examples of few-shot; none: half of what fits into the model's context, at least one"""
    system: str | None = None
    """text of system-prompt; none: the shipped task's own, and on other data no such variant"""
    max_length: int = 512
    """longest row trained on, in tokens"""
    max_new_tokens: int = 64
    """longest answer, in tokens"""
    eval_rows: int = 64
    """held-out rows that are asked, the first ones of the file"""
    general_bytes: int = 32_768
    """bytes of general text that forgetting is measured on, in passages spread over all of it"""
    latency_runs: int = 7
    """repeated requests whose median is the latency"""
    latency_tokens: int = 32
    """new tokens of such a request"""
    device: str | None = None
    """cpu, cuda, cuda:1 …; none: the accelerator, else the CPU"""

    def __post_init__(self) -> None:
        check_methods(self.methods)
        if (self.data is None) != (self.eval_data is None):
            raise ValueError("--data and --eval-data belong together: give both, or none")
        if not self.metrics:
            raise ValueError("no metrics: name at least one, such as exact")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different whole numbers, 0 or more; got {self.seeds}")
        least = {"shots": 1, "max_length": 2, "max_new_tokens": 1, "eval_rows": 2, "steps": 1}
        least |= {"batch_size": 1, "r": 1, "virtual_tokens": 1, "general_bytes": 1}
        least |= {"latency_runs": 1, "latency_tokens": 2}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                raise ValueError(f"{name} must be a whole number, {low} or more; got {value!r}")
        self._check_numbers()
        if self.data is not None and "system-prompt" in self.methods and self.system is None:
            if self.methods != tuple(METHODS):
                raise ValueError("system-prompt needs --system TEXT on data of your own")
            kept = tuple(name for name in self.methods if name != "system-prompt")
            object.__setattr__(self, "methods", kept)

    def _check_numbers(self) -> None:
        for field_name in ("alpha", "reduction"):
            if not 0 < getattr(self, field_name) < float("inf"):
                value = getattr(self, field_name)
                raise ValueError(f"{field_name} must be a number above 0; got {value}")
        for name in self.rates:
            if name not in self.methods:
                raise ValueError(f"--lr {name}=…: {name} is not among the methods compared")
        if self.rates and "lr" in self.sweep:
            raise ValueError("--lr and --sweep lr=… both set the rate: give one of them")

    @property
    def system_text(self) -> str:
        """What system-prompt puts before the questions."""
        return SYSTEM if self.system is None else self.system

    def variants(self) -> list[Variant]:
        """What is run, in order.

        Raises:
            ValueError: a sweep that goes nowhere.
        """
        names = ("steps", "batch_size", "r", "alpha", "targets", "reduction", "virtual_tokens")
        base = {name: getattr(self, name) for name in names}
        return grid(self.methods, base, self.rates, self.sweep, self.seeds)
