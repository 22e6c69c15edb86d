"""The one dataclass of a training run. The command line's flags are made from it, field by field."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_LR = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4, "bottleneck": 1e-4}
"""Learning rate by method. A full fine-tune moves every weight and wants a tenth of LoRA's rate
(Schulman et al. 2025, "LoRA Without Regret")."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run does, apart from model, data and loss; checked when made."""

    out: str | Path | None = None
    """folder for checkpoints, metrics.jsonl, run.json and loss.png; none: nothing is written"""
    lr: float = 2e-4
    """peak learning rate, per step"""
    epochs: int = 3
    """passes over the data"""
    steps: int | None = None
    """optimizer steps; when given, epochs is not used"""
    batch_size: int = 4
    """rows in one forward pass"""
    accumulate: int = 4
    """forward passes in one optimizer step"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls after the warm-up"""
    warmup: float = 0.03
    """warm-up: below 1 a share of all steps, from 1 on a number of steps"""
    min_lr_ratio: float = 0.0
    """the schedule's floor, as a share of lr"""
    weight_decay: float = 0.0
    """decoupled decay per step and unit of lr, on matrices only"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.999
    """AdamW's decay of the mean squared gradient"""
    eps: float = 1e-8
    """AdamW's floor under the root of the mean squared gradient"""
    clip: float | None = 1.0
    """largest norm of the whole gradient; none: it is measured, not clipped"""
    label_smoothing: float = 0.0
    """share of each target spread over the vocabulary, in [0, 1)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the matrix products; auto: bfloat16 on a GPU that has it, else float32"""
    activation_checkpointing: bool = False
    """recompute each layer in backward: less memory, about a third more time"""
    eval_every: int | None = None
    """steps between evaluations; none: at the end of each epoch"""
    patience: int | None = None
    """stop after this many evaluations without a better loss; none: never"""
    keep_best: bool = True
    """at the end, put back the weights of the best evaluation, if there was one"""
    save_every: int | None = None
    """steps between checkpoints; none: at each evaluation and at the end"""
    keep: int = 2
    """newest checkpoints kept, the best one beside them"""
    seed: int = 0
    """seed of the data's order and of dropout"""
    resume: bool = False
    """continue the newest good checkpoint in out; without one start afresh"""
    progress: bool = True
    """show a progress bar"""

    def __post_init__(self) -> None:
        at_least = {"epochs": 1, "batch_size": 1, "accumulate": 1, "keep": 1, "seed": 0}
        optional = {"steps": 1, "eval_every": 1, "patience": 1, "save_every": 1}
        given = {k: v for k, v in optional.items() if getattr(self, k) is not None}
        for name, least in (at_least | given).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("beta1", "beta2", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be in [0, 1]; got {self.min_lr_ratio}")
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise ValueError(
                f"warmup must be a share below 1 or a whole number of steps; got {self.warmup}"
            )
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more; got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None not to clip; got {self.clip}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(
                f'schedule must be "cosine", "linear" or "constant"; got {self.schedule!r}'
            )
        if self.resume and self.out is None:
            raise ValueError("resume needs out, the folder that holds the checkpoints")

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON holds them."""
        fields = dataclasses.asdict(self)
        return fields | {"out": None if self.out is None else str(self.out)}
