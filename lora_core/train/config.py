"""The one dataclass of a training run; the command line's flags are made from it field by field."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_LR = {
    "full": 2e-5,
    "lora": 2e-4,
    "qlora": 2e-4,
    "bottleneck": 1e-4,
    "prompt": 3e-2,
    "prefix": 3e-3,
}
"""Learning rate by method. A full fine-tune moves every weight and wants a tenth of LoRA's rate
(Schulman et al. 2025, "LoRA Without Regret")."""

_SCHEDULES = ("cosine", "linear", "constant")
_OPTIMIZERS = ("adamw", "adamw8bit", "adamw-paged")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_REAL = (
    "lr",
    "lora_plus",
    "warmup",
    "min_lr_ratio",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "label_smoothing",
)
_WARMUP = "a share below 1 or a whole number of steps"


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
    optimizer: Literal["adamw", "adamw8bit", "adamw-paged"] = "adamw"
    """AdamW's state: float32, 8 bits a number in blocks of 256, or float32 in the host's memory"""
    lora_plus: float = 1.0
    """learning rate of LoRA's B over that of everything else (LoRA+ recommends 16)"""
    packing: int | None = None
    """tokens of a row into which short samples are packed; none: one sample a row, padded"""
    group_by_length: bool = False
    """batches of samples of about the same length: less padding, a less random order"""
    probe: bool | None = None
    """run the longest batch once, without a step, before all others, so that too little memory
    shows at once; none: on a GPU only"""
    activation_checkpointing: bool = False
    """recompute each layer in backward: less memory, about a third more time"""
    offload_activations: bool = False
    """keep what checkpointing keeps in the host's memory instead of the GPU's"""
    compile: bool = False
    """compile each layer by torch.compile; lengths are padded to a few sizes"""
    shard: bool = False
    """split weights over the processes of torchrun (FSDP2); else each process holds all of them"""
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
        whole = {"epochs": 1, "steps": 1, "batch_size": 1, "accumulate": 1, "eval_every": 1}
        whole |= {"patience": 1, "save_every": 1, "keep": 1, "seed": 0, "packing": 2}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
        for name in _REAL:
            if not _finite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number; got {getattr(self, name)!r}")
        share = self.warmup < 1
        clip = self.clip is None or (_finite(self.clip) and self.clip > 0)
        rules = [
            ("lr", self.lr > 0, "above 0"),
            ("eps", self.eps > 0, "above 0"),
            ("clip", clip, "above 0, or None not to clip"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]"),
            ("warmup", self.warmup >= 0 and (share or self.warmup == int(self.warmup)), _WARMUP),
            ("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
            ("optimizer", self.optimizer in _OPTIMIZERS, f"one of {', '.join(_OPTIMIZERS)}"),
            ("lora_plus", self.lora_plus > 0, "above 0"),
            ("dtype", self.dtype in _DTYPES, f"one of {', '.join(_DTYPES)}"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}; got {getattr(self, name)!r}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Refuse settings that do not go together."""
        if self.packing is not None and self.group_by_length:
            raise ValueError("packing fills rows whole: leave group_by_length out")
        if self.offload_activations and not self.activation_checkpointing:
            raise ValueError("offload_activations moves what checkpointing keeps: set both")
        if self.shard and self.optimizer != "adamw":
            raise ValueError(
                f"shard splits the state of adamw over the processes, and not of {self.optimizer}: "
                "leave one of them out"
            )
        if self.shard and self.dtype == "float16":
            raise ValueError("shard does not scale the loss, as float16 needs it: take bfloat16")
        if self.resume and self.out is None:
            raise ValueError("resume needs out, the folder that holds the checkpoints")

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON holds them."""
        fields = dataclasses.asdict(self)
        return fields | {"out": None if self.out is None else str(self.out)}
