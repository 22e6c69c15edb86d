"""The training loop.

    for each group of batches:       step_groups   (batches.py)
        set the learning rate        schedule      (schedule.py)
        forward, backward, update    train_step    (step.py)
        now and then evaluate, save  Checkpoints   (state.py)
        tell the hook                on_step(record)

Whatever is drawn at random, counted or remembered is either a function of the step or saved with
the checkpoint, so that a run that was stopped and resumed is, bit for bit, the run that was not.
"""

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core.adapters import parameter_counts
from lora_core.device import (
    DtypePolicy,
    dtype_policy,
    out_of_memory,
    peak_memory,
    reset_peak_memory,
)
from lora_core.evaluate import modes_kept
from lora_core.train.batches import (
    Batch,
    BatchSource,
    SourceError,
    make_batches,
    step_groups,
    steps_per_epoch,
    to_device,
    total_steps,
)
from lora_core.train.compile import compiled_layers
from lora_core.train.config import TrainConfig
from lora_core.train.evaluation import Evaluation
from lora_core.train.folder import RunFolder, fixed
from lora_core.train.interrupt import Interrupts
from lora_core.train.optim import make_optimizer, trained_parameters
from lora_core.train.probe import advice, probe_due, run_longest
from lora_core.train.ranks import Ranks, joined_ranks
from lora_core.train.recompute import recomputed_layers
from lora_core.train.report import Bar, Metrics, Record, TrainResult
from lora_core.train.schedule import Schedule, schedule_of
from lora_core.train.shard import sharded_model
from lora_core.train.snapshot import seed_everything
from lora_core.train.state import Progress
from lora_core.train.step import CausalLoss, Loss, NonFiniteError, loss_result, train_step
from lora_core.train.surgery import Surgery
from lora_core.train.units import Reach

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


def train(  # noqa: PLR0913  # a run's parts, each with a default
    model: nn.Module,
    dataset: Iterable[Any] | BatchSource,
    config: TrainConfig | None = None,
    eval_dataset: Iterable[Any] | BatchSource | None = None,
    on_step: Callable[[Record], object] | None = None,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    schedule: Schedule | None = None,
    collate: Callable[[Sequence[Any]], Batch] | None = None,
    facts: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    surgery: Surgery | None = None,
) -> TrainResult:
    """Train the parameters of `model` that require a gradient.

    Under `torchrun` all processes call this with the same arguments and share the work (ranks.py).

    Args:
        model: any module; with the default loss one that returns `.logits` (B, T, V). It keeps its
            device and mode.
        dataset: a sequence of rows `{"input_ids", "labels"}` (optionally `"source"`), or any
            iterable of batches of tensors under those names, or a `BatchSource`, asked for each
            batch as it is needed (which the model as it then is may make).
        config: the run; `TrainConfig()` by default.
        eval_dataset: as `dataset`; read in its own order.
        on_step: is given each step's record after it. KeyboardInterrupt from it acts as Ctrl-C.
        loss: (model, batch, normalizer) -> sum / normalizer, by default next-token cross-entropy;
            if it counts something other than graded tokens it has a method `count(batch)`.
        optimizer: (name, parameter) pairs -> optimizer, by default AdamW by `config`.
        schedule: (step, total) -> factor on the peak learning rate, by default by `config`.
        collate: rows -> batch; with it rows may be anything.
        facts: JSON-ready facts for run.json, such as hashes; a resumed run has to bring the same.
        device: with `shard`, where to compute if not where the model is; it moves there in parts.
        surgery: of the gradients of each step, such as `PCGrad`; on one process.

    Returns:
        The history and its sums. With an evaluation and `keep_best` the model holds the weights of
        the best evaluation, else those of the last step.

    Raises:
        ValueError: nothing to train, no gradient, a NaN (its batch is in `out`), a folder in use, a
            checkpoint of another run, or another process that failed (RankError).
        TypeError: trained parameters narrower than float32.
    """
    config = config or TrainConfig()
    if config.patience is not None and eval_dataset is None:
        raise ValueError("patience counts evaluations: give eval_dataset, or set patience to None")
    source = make_batches(
        dataset,
        config.batch_size,
        config.seed,
        collate,
        packing=config.packing,
        by_length=config.group_by_length,
        few_lengths=config.compile,
    )
    held_out = None
    if eval_dataset is not None:
        held_out = make_batches(eval_dataset, config.batch_size, None, collate)
    parts = {
        "source": source,
        "loss": loss or CausalLoss(config.label_smoothing),
        "evaluation": Evaluation(held_out, loss or CausalLoss(), config),
        "schedule": schedule or schedule_of(config),
        "schedule_name": "" if schedule else f" {config.schedule}",
        "optimizer_factory": optimizer or (lambda named: make_optimizer(model, named, config)),
        "facts": json.loads(json.dumps(dict(facts or {}))),
        "surgery": surgery,
    }
    recompute = (config.activation_checkpointing, config.offload_activations)
    with joined_ranks() as ranks:
        trained = trained_parameters(model)
        ranks.same_start(trained.values())
        here = next(iter(trained.values())).device if device is None else torch.device(device)
        folder, counts = RunFolder(config, ranks), parameter_counts(model)
        with (
            folder.held(),
            modes_kept(model),
            sharded_model(model, ranks, here, config.shard),
            compiled_layers(model, config.compile),
            recomputed_layers(model, *recompute),
        ):
            total = total_steps(config, source, ranks.world)
            run = Run(model, config, total, ranks, folder, counts, **parts)
            return run.go(on_step or (lambda record: None))


@dataclass
class Run:
    """The parts of a run, and the loop over them."""

    model: nn.Module
    config: TrainConfig
    total: int
    ranks: Ranks
    folder: RunFolder
    counts: tuple[int, int]
    source: BatchSource
    loss: Loss
    evaluation: Evaluation
    schedule: Schedule
    schedule_name: str
    optimizer_factory: OptimizerFactory
    facts: dict[str, Any]
    surgery: Surgery | None = None

    def __post_init__(self) -> None:
        self.parameters = trained_parameters(self.model)
        self.device = next(iter(self.parameters.values())).device
        self.policy: DtypePolicy = dtype_policy(self.config.dtype, self.device)
        self.optimizer = self.optimizer_factory(list(self.parameters.items()))
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.peak_lr: float = self.optimizer.param_groups[0]["initial_lr"]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.policy.scales_loss)
        self.progress = Progress(total=self.total)
        self.reach = Reach(self.loss)
        self.held = (self.parameters, self.optimizer, self.scaler)
        # batches of a step, of which each process computes every world-th
        self.share = self.config.accumulate * self.ranks.world

    def go(self, on_step: Callable[[Record], object]) -> TrainResult:
        """Resume or begin, loop, put the best weights back."""
        self.evaluation.check()
        # dropout differs by process; the order of the data is a function of the seed alone
        seed_everything(self.config.seed + 7919 * self.ranks.rank)
        resumed = self.resume() if self.config.resume else None
        interrupted, speed = False, 0.0
        if not self.progress.finished:
            self.begin()
            try:
                interrupted, speed = self.loop(on_step)
            except NonFiniteError as error:
                raise self.folder.explain(error, self.progress) from None
            except (RuntimeError, MemoryError) as error:
                if (said := out_of_memory(error)) is None:
                    raise
                step = len(self.progress.history) + 1
                raise ValueError(f"step {step}: {said}; {advice(self.config)}") from None
            self.folder.plot(self.progress)
        if self.progress.finished and self.config.keep_best:
            self.evaluation.put_back_best(self.progress, self.parameters, self.folder.checkpoints)
        progress = self.progress
        return TrainResult(
            history=progress.history,
            steps=progress.step,
            tokens=progress.tokens,
            tokens_per_second=speed,
            peak_memory=peak_memory(self.device),
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            interrupted=interrupted,
            stopped_early=progress.stopped_early,
            resumed_from=resumed,
        )

    def begin(self) -> None:
        """Write run.json and say what is about to happen."""
        self.folder.begin(self.progress.step, self.facts)
        trained, every = self.counts
        among = f" on {self.ranks.world} processes" if self.ranks.world > 1 else ""
        self.ranks.say(
            f"training {trained:,} of {every:,} parameters ({trained / every:.2%}) for "
            f"{self.total - self.progress.step} steps, lr {self.peak_lr:g}"
            f"{self.schedule_name}; {self.policy}{among}"
        )
        if (note := self.source.note()) is not None:
            self.ranks.say(note)
        # a gradient left by whatever the caller did before would be added to the first step's
        self.optimizer.zero_grad(set_to_none=True)
        reset_peak_memory(self.device)

    def loop(self, on_step: Callable[[Record], object]) -> tuple[bool, float]:
        """Step until the end, an interruption, or the end of patience.

        Returns:
            Whether it was interrupted, and the tokens per second.
        """
        progress, ranks = self.progress, self.ranks
        groups = step_groups(self.source, self.share, progress.epoch, progress.group)
        seconds, fed = 0.0, 0
        self.model.train()
        if probe_due(self.config, self.device):
            fresh = () if self.optimizer.state else self.parameters.values()
            run_longest(self.source, self.forward_backward, self.config, fresh)
            reset_peak_memory(self.device)
        metrics = Metrics(self.folder.file("metrics.jsonl"), progress.history)
        with (
            contextlib.closing(metrics),
            Interrupts(ranks.first, ranks.world > 1) as interrupts,
            Bar(self.total, progress.step, self.config.progress and ranks.first) as bar,
        ):
            asked = ranks.any(interrupts.asked)
            while not self.progress.finished and not asked:
                start = time.perf_counter()
                progress.epoch, progress.group, batches = self.next_batches(groups)
                record: Record = {"step": progress.step + 1, "epoch": progress.epoch + 1}
                record |= self.step(batches)
                progress.step, progress.group = progress.step + 1, progress.group + 1
                progress.tokens, fed = progress.tokens + record["tokens"], fed + record["tokens"]
                seconds += (spent := time.perf_counter() - start)
                record |= {"seconds": spent, "tokens_per_second": fed / seconds}
                record["peak_memory"] = peak_memory(self.device)
                better = self.evaluate_if_due(record)
                progress.history.append(record)
                metrics.write(record)
                bar.update(record)
                try:
                    on_step(record)
                except KeyboardInterrupt:
                    interrupts.asked = True
                asked = ranks.any(interrupts.asked)
                if better or self.save_due(record) or asked or self.progress.finished:
                    self.save()
        return asked and not self.progress.finished, fed / seconds if seconds else 0.0

    def next_batches(
        self, groups: Iterator[tuple[int, int, list[Batch]]]
    ) -> tuple[int, int, list[Batch]]:
        """The next step's batches; a source that fails leaves a checkpoint of the steps so far.

        Raises:
            SourceError: it failed; says what can be resumed.
        """
        try:
            return next(groups)
        except SourceError as error:
            if self.progress.step:
                self.save()
            raise SourceError(f"{error}{self.folder.left()}") from error

    def save(self) -> None:
        """Write a checkpoint, if there is a folder."""
        self.folder.save(self.progress, *self.held, self.identity(), self.source)

    def forward_backward(self, batch: Batch) -> None:
        """Run one batch without a step; its gradients are dropped."""
        try:
            with self.policy.autocast():
                value = loss_result(self.loss(self.model, to_device(batch, self.device), 1)).value
            torch.autograd.backward(self.scaler.scale(value))
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, batches: Sequence[Batch]) -> Record:
        """Set the learning rate and update the weights."""
        factor = self.schedule(number := self.progress.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        record = train_step(
            self.model,
            self.parameters,
            batches,
            self.optimizer,
            self.scaler,
            self.policy,
            loss=self.loss,
            clip=self.config.clip,
            check=self.reach,
            ranks=self.ranks,
            surgery=None if self.surgery is None else self.surgery.at(number),
        )
        if not record["graded"]:
            warnings.warn("a step had no graded token and taught nothing", stacklevel=2)
        return {"loss": record.pop("loss"), "lr": self.optimizer.param_groups[0]["lr"]} | record

    def epoch_ends(self) -> bool:
        """Whether the step just done was the last one of its epoch, or of the run."""
        per_epoch = steps_per_epoch(self.source, self.share)
        return self.progress.group == per_epoch or self.progress.step >= self.total

    def save_due(self, record: Record) -> bool:
        """Whether the configuration wants a checkpoint after this step."""
        every = self.config.save_every
        return "eval_loss" in record if every is None else self.progress.step % every == 0

    def evaluate_if_due(self, record: Record) -> bool:
        """Evaluate after the step if it is time; says whether it is the best so far."""
        if not self.evaluation.due(self.progress, self.epoch_ends()):
            return False
        try:
            record.update(self.evaluation.measure(self.model, self.policy, self.ranks))
        except SourceError as error:
            self.progress.history.append(record)  # the step is made, and is not lost
            self.save()
            raise SourceError(f"{error}{self.folder.left()}") from error
        return self.evaluation.note(record["eval_loss"], self.progress, self.parameters)

    def identity(self) -> dict[str, Any]:
        """What a continuing run has to share with the one that wrote the checkpoint."""
        data = {"batches": self.source.per_epoch(), "processes": self.ranks.world}
        return {"config": fixed(self.config), "facts": self.facts, "data": data}

    def resume(self) -> int | None:
        """Continue the newest good checkpoint.

        Returns:
            The steps it has done; None where there is no checkpoint.

        Raises:
            ValueError: it is another run's.
        """
        found = self.folder.resume(*self.held, self.identity(), self.source)
        if found is None:
            return None
        stopped = self.evaluation.out_of_patience(found)  # by this run's patience
        self.progress = dataclasses.replace(found, total=self.total, stopped_early=stopped)
        self.ranks.say(f"resumed after step {found.step} of {self.total}")
        return found.step
