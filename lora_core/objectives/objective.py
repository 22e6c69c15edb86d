"""What an objective is: the part of a run that knows what is trained for.

A run asks in this order, and everything else (opening, adapters, the loop, checkpoints, files) is
the same for all:

    check(setup)            what does not go together is refused before anything is read
    read(setup)             the data; errors in it come before the model is loaded
    load(setup, load)       the model: the base as it is, or with a head
    adapt(config)           the adapter's configuration: modules to train whole beside it
    go_on(setup, model)     or the adapter that is there, loaded to be trained further
    prepare(setup, model)   the loss and the batches; the adapter is attached
    report(result)          lines about the outcome
    save(setup, model)      files beside the adapter

An objective keeps what it read between these calls; one object serves one run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from lora_core.adapters.adapter_report import AdapterReport
from lora_core.checkpoint import load_adapter, save_model
from lora_core.objectives.score import has_score_head
from lora_core.objectives.setup import Setup
from lora_core.train import TrainResult
from lora_core.train.batches import Batch
from lora_core.train.loop import OptimizerFactory
from lora_core.train.step import Loss
from lora_core.train.surgery import Surgery

Options = TypeVar("Options")
LoadModel = Callable[[], nn.Module]


@dataclass
class Work:
    """What the loop is given: arguments of `lora_core.train.train`."""

    dataset: Any
    """rows, batches, or a `BatchSource`"""
    eval_dataset: Any | None = None
    """likewise; None: no evaluation"""
    loss: Loss | None = None
    """None: next-token cross-entropy"""
    collate: Callable[[Sequence[Any]], Batch] | None = None
    """rows -> batch; None: the usual one"""
    optimizer: OptimizerFactory | None = None
    """None: AdamW by the configuration"""
    surgery: Surgery | None = None
    """of each step's gradients, such as PCGrad; None: none"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready facts for run.json, which a resumed run has to share"""


class Objective(Generic[Options]):
    """An objective and its options; subclasses say what differs from `sft`.

    Args:
        options: an instance of the class's `options_class`.
    """

    name: ClassVar[str]
    """on the command line"""
    help: ClassVar[str]
    """in a line"""
    options_class: ClassVar[type]
    """a frozen dataclass whose fields are flags; objectives may share one"""
    training: ClassVar[Mapping[str, Any]] = {}
    """fields of TrainConfig whose defaults differ"""
    rates: ClassVar[Mapping[str, float]] = {}
    """default learning rate by method, where it differs"""
    needs_decoder: ClassVar[bool] = True
    """whether the model has to write text"""

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, setup: Setup) -> None:
        """Refuse settings that do not go together; ValueError."""

    def read(self, setup: Setup) -> None:
        """Read the data, say what was read, and keep it."""
        raise NotImplementedError

    def load(self, setup: Setup, load: LoadModel) -> Any:
        """The model to train; `load()` is the base, in its dtype and on its device."""
        return load()

    def adapt(self, config: Any) -> Any:
        """The adapter's configuration; None where every weight is trained."""
        return config

    def adapted(self, model: Any) -> Any:
        """The part of the model that the adapter is attached to, and saved with the names of."""
        return model

    def go_on(self, setup: Setup, model: nn.Module) -> AdapterReport:
        """Load the adapter of `setup.continued`, which training goes on with, trainable."""
        assert setup.continued is not None  # the run asks only where there is one
        if has_score_head(setup.continued):
            raise ValueError(
                f"{setup.continued} holds a reward model, which {self.name} cannot go on with: "
                "give it to --reward, or name the adapter that it was trained from"
            )
        return load_adapter(model, setup.continued, trainable=True)

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """Loss and batches for the model, whose trained parameters require gradients by now."""
        raise NotImplementedError

    def report(self, result: TrainResult) -> list[str]:
        """Lines to print when training is done."""
        return []

    def save(self, setup: Setup, model: nn.Module) -> None:
        """Write what belongs beside the adapter into `setup.out`."""

    def save_model(self, setup: Setup, model: nn.Module) -> None:
        """Write the model that was trained whole into `setup.out`, for method full."""
        save_model(model, setup.out, source=setup.settings.model, dtype=None)

    def facts(self) -> dict[str, Any]:
        """The options as JSON holds them, for run.json."""
        return dataclasses.asdict(self.options)  # type: ignore[call-overload]
