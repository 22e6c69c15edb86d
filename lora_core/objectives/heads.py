"""`heads`: labels, tags and answers on one adapted backbone, one task for each data file.

    lora-core finetune --objective heads --model DIR --data topic.jsonl tags.jsonl:2 squad.jsonl …

A file's rows tell its kind (data/task_records.py), its name is the task's. The backbone, an encoder
or a decoder, gets the method's adapter, which is saved with the base's names; each task gets a
head, trained whole and saved beside it (checkpoint/heads.py). How tasks meet is lora_core/tasks:
their batches alternate by size, a weight behind a file (`:2`) shows it so many times as often in
relation to the others, and a step's loss is the sum of the tasks' own means.

Each task's held-out rows are measured at every evaluation as figures that add up over batches
(`eval_topic/accuracy`), and once more at the end, by example: a question's windows together, an
answer by its words, with an interval.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_core.checkpoint import save_model
from lora_core.checkpoint.heads import HEADS, differing, load_heads, save_heads
from lora_core.data import parse_sources
from lora_core.data.task_rows import TaskData, graded, read_task
from lora_core.evaluate.head_figures import figure_names, figures_of
from lora_core.evaluate.heads import measure
from lora_core.models import EncoderConfig, read_config
from lora_core.models.multi_head import MultiHead, check_task_name
from lora_core.models.task_heads import Head, HeadShape
from lora_core.objectives.head_options import HeadsOptions, check_tasks
from lora_core.objectives.objective import LoadModel, Objective, Work
from lora_core.objectives.setup import Setup
from lora_core.tasks import TaskBatches, TaskLoss, optimizer_with_rates
from lora_core.train import PCGrad, TrainResult
from lora_core.train.batches import Batch
from lora_core.train.step import LossResult

METHODS = ("lora", "qlora", "full", "bottleneck")


class Heads(Objective[HeadsOptions]):
    """Heads for sequences, tokens and spans on one backbone."""

    name = "heads"
    help = "labels, tags and answers: a head for each data file on one backbone"
    options_class = HeadsOptions
    needs_decoder = False

    def check(self, setup: Setup) -> None:
        """Refuse what heads cannot use."""
        settings = setup.settings
        if setup.method not in METHODS:
            raise ValueError(
                f"objective heads is trained with {', '.join(METHODS)}, not {setup.method}"
            )
        chat = {"template": None, "train_on": "assistant", "control_text": "drop"}
        for field, usual in (chat | {"add_tokens": None}).items():
            if getattr(settings, field, usual) != usual:
                flag = field.replace("_", "-")
                raise ValueError(f"--{flag} is for text that is written: leave it out with heads")
        if setup.training.packing:
            raise ValueError("objective heads takes a row for each text: leave packing out")
        if settings.eval_data is not None and len(settings.data) > 1:
            raise ValueError(
                "--eval-data is one file, and there are several tasks: give --eval-tasks "
                "topic=FILE,tags=FILE"
            )
        if self.options.pcgrad and setup.method == "full":
            raise ValueError("pcgrad works on adapters' gradients, and method full has no adapter")

    def read(self, setup: Setup) -> None:
        """Each file's rows, to train on and to evaluate on."""
        config = read_config(setup.settings.model)
        self.rows: dict[str, Any] = self._row_settings(setup, config)
        sources = parse_sources(setup.settings.data)
        self.tasks: dict[str, TaskData] = {}
        self.shown: dict[str, float] = {}
        for path, weight in sources:
            task = self._read(setup, path, None)
            check_task_name(task.name)
            if task.name in self.tasks:
                raise ValueError(f"two tasks are named {task.name!r}: rename {path}")
            setup.say(f"task {task}")
            self.tasks[task.name], self.shown[task.name] = task, weight
        check_tasks("task_weights", self.options.weights(), self.tasks)
        check_tasks("task_rates", self.options.rates(), [*self.tasks, "adapters"])
        self.held_out = self._hold_out(setup)
        if self.rows["causal"] and any(task.kind != "sequence" for task in self.tasks.values()):
            setup.say(
                "note: a decoder's token and span heads see what stands before a word, not what "
                "follows it"
            )

    def _row_settings(self, setup: Setup, config: Any) -> dict[str, Any]:
        """How rows are made: for a decoder or not, and no longer than the model has positions."""
        encoder = isinstance(config, EncoderConfig)
        longest = config.max_position_embeddings - (config.first_position if encoder else 0)
        length = setup.settings.max_length
        if length > longest:
            setup.say(f"note: max_length is {longest}, the model's positions, not {length}")
            length = longest
        overlap = self.options.window_overlap
        return {"max_length": length, "causal": not encoder, "overlap": overlap}

    def _read(self, setup: Setup, path: str, like: TaskData | None) -> TaskData:
        columns = setup.settings.column_names
        return read_task(path, setup.tok, columns=columns, like=like, **self.rows)

    def _hold_out(self, setup: Setup) -> dict[str, TaskData]:
        """Evaluation data by task; what is set aside leaves the training data."""
        settings, held = setup.settings, {}
        files = self.options.eval_files(self.tasks)
        if settings.eval_data is not None:
            files = {next(iter(self.tasks)): settings.eval_data}
        for name, task in list(self.tasks.items()):
            if name in files:
                held[name] = self._read(setup, files[name], task)
            elif settings.eval_fraction and not files and len(task.examples) > 1:
                self.tasks[name], held[name] = task.split(
                    settings.eval_fraction, setup.training.seed
                )
        said = ", ".join(f"{name} {len(task.examples)}" for name, task in held.items())
        setup.say(f"held out to evaluate on: {said}" if held else "no evaluation: nothing held out")
        return held

    def load(self, setup: Setup, load: LoadModel) -> MultiHead:
        """The base under fresh heads, or under those of the adapter that is gone on with."""
        backbone: Any = load()
        rate = self.options.head_dropout
        if rate is None:
            rate = getattr(backbone.config, "head_dropout", 0.0)
        size, kept = backbone.config.hidden_size, {}
        if setup.continued is not None and (setup.continued / HEADS).is_file():
            kept = load_heads(setup.continued, size)
        heads = {}
        with torch.random.fork_rng(devices=[]):  # the adapter's start is the same with more heads
            torch.manual_seed(setup.training.seed)
            for name, task in self.tasks.items():
                shape = self._shape(task, rate)
                heads[name] = kept.get(name) or Head(shape, size)
                _check_continued(name, heads[name].shape, shape)
        if kept:
            both = [name for name in heads if name in kept]
            setup.say(f"heads gone on with: {', '.join(both) or 'none of this name'}")
        return MultiHead(backbone, heads)

    def _shape(self, task: TaskData, dropout: float) -> HeadShape:
        pooling = self.options.pooling if task.kind == "sequence" else None
        return HeadShape(
            kind=task.kind,
            labels=tuple(task.labels),
            problem=task.problem,
            pooling=pooling,
            dropout=dropout,
        )

    def adapted(self, model: MultiHead) -> nn.Module:
        """The backbone: adapters have the base's names, and heads are none of theirs."""
        return model.backbone

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """Batches that alternate, and the sum of the tasks' means."""
        assert isinstance(model, MultiHead)
        for parameter in model.unused():
            parameter.requires_grad_(False)
        self.model, options, training = model, self.options, setup.training
        rates = options.rates()
        return Work(
            TaskBatches(self.tasks, training.batch_size, training.seed, **self._mixing()),
            TaskBatches(self.held_out, training.batch_size, None) if self.held_out else None,
            loss=HeadsLoss(model, options.weights()),
            optimizer=optimizer_with_rates(model, training, rates) if rates else None,
            facts={"tasks": {n: [t.kind, *t.labels] for n, t in self.tasks.items()}},
            surgery=PCGrad.of_adapters(model, training.seed) if options.pcgrad else None,
        )

    def _mixing(self) -> dict[str, Any]:
        """Arguments of `TaskBatches`."""
        options = self.options
        if options.mixing == "balanced" or all(weight == 1 for weight in self.shown.values()):
            if any(weight != 1 for weight in self.shown.values()):
                raise ValueError(
                    "mixing balanced shows all tasks alike: leave --data's weights out"
                )
            return {"mixing": options.mixing, "temperature": options.mix_temperature}
        power = 1 / options.mix_temperature
        weights = {n: self.shown[n] * len(task) ** power for n, task in self.tasks.items()}
        return {"mixing": "weighted", "weights": weights}

    def report(self, result: TrainResult) -> list[str]:
        """How good each head is on what was held out."""
        if result.interrupted:
            return []
        lines = []
        for name, task in self.held_out.items():
            for figure, estimate in measure(self.model, task).items():
                lines.append(f"{name}: {figure.replace('_', ' ')} {estimate}")
        return lines

    def save(self, setup: Setup, model: nn.Module) -> None:
        """The heads beside the adapter, read back."""
        assert isinstance(model, MultiHead)
        save_heads(model, setup.out, self.rows)
        if (odd := differing(model, setup.out)) is not None:
            raise ValueError(f"{setup.out}: {odd} reads back differently: the disk may be failing")

    def save_model(self, setup: Setup, model: nn.Module) -> None:
        """The backbone as a model folder, and the heads in it."""
        assert isinstance(model, MultiHead)
        save_model(model.backbone, setup.out, source=setup.settings.model, dtype=None)
        self.save(setup, model)


class HeadsLoss(TaskLoss):
    """The tasks' losses with each head's figures, as `<task>/<figure>`."""

    def __init__(self, model: MultiHead, weights: Mapping[str, float] | None = None) -> None:
        shapes = {name: head.shape for name, head in model.task_heads().items()}
        super().__init__({name: _Figured(shape) for name, shape in shapes.items()}, weights)
        # of every task: a figure's name has to come with every batch
        self.names = [f"{task}/{name}" for task in shapes for name in figure_names(shapes[task])]

    def __call__(self, model: nn.Module, batch: Batch, normalizer: float) -> LossResult:
        """The task's loss times its weight, and its figures."""
        result = super().__call__(model, batch, normalizer)
        figures = dict.fromkeys(self.names, (0.0, 0.0)) | dict(result.figures)
        return result._replace(figures=figures)


class _Figured:
    """One head's loss and figures."""

    def __init__(self, shape: HeadShape) -> None:
        self.shape = shape
        self.count = graded

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], normalizer: float) -> LossResult:
        inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        out = model(batch["task"], **inputs, normalizer=normalizer or 1.0)
        return LossResult(out.loss, None, figures_of(self.shape, out.logits.detach(), batch))


def _check_continued(task: str, kept: HeadShape, wanted: HeadShape) -> None:
    """Refuse data that a head which is gone on with was not made for."""
    for name in ("kind", "problem", "labels"):
        was, now = getattr(kept, name), getattr(wanted, name)
        if was != now:
            raise ValueError(
                f"the head {task!r} of --adapter has the {name} {was!r}, the data have {now!r}: "
                "rename the file for a fresh head"
            )
