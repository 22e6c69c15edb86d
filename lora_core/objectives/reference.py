"""The reference policy, which costs no second model.

Preferences and policies are judged against the model as it was when training began. Its weights are
all there already:

    fresh adapter       the base: the same model with its adapters disabled
    continued adapter   the adapter as it was: a frozen copy of it under another name, a few MB
    full fine-tuning    nothing is left of it, so that its log-probabilities are computed before the
                        first step and go with the rows from then on

The copy is read from the folder that training went on from. So a run that is resumed has the same
reference: checkpoints hold trained parameters, and the copy is not one. It is active inside the
reference's own pass and nowhere else, and `save_adapter` writes the policy's name alone.

The first two cost a forward pass a step and see the batch as the policy sees it, so that a fresh
policy's log-ratios are exactly 0. Recorded numbers come from batches that were put together
otherwise: there they are 0 up to the rounding of the forward pass.

Ref: Rafailov et al. 2023, arXiv:2305.18290, section 4 (pi_ref is the policy at the start).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_core.adapters import active_names, disable_adapters, set_adapters
from lora_core.adapters.switch import activate
from lora_core.checkpoint import load_adapter
from lora_core.data.branches import Branched
from lora_core.device import dtype_policy
from lora_core.evaluate import modes_kept
from lora_core.objectives.scoring import completion_log_probs
from lora_core.objectives.setup import Setup
from lora_core.train.batches import Batch, to_device
from lora_core.train.sources import batched

NAME = "reference"
Collate = Callable[[Sequence[Any]], Batch]


@dataclass(frozen=True)
class Recorded:
    """A row and the reference's log-probabilities of it."""

    row: Branched
    values: Tensor
    """(completions of the row, L), float32, on the CPU"""


@dataclass(frozen=True)
class Reference:
    """Where the reference's log-probabilities come from."""

    kind: Literal["disabled", "copy", "recorded"]
    """adapters off, a frozen copy of the adapter, or recorded beforehand"""

    @classmethod
    def of(cls, setup: Setup, model: nn.Module) -> "Reference":
        """The reference of a run whose policy is attached and as it will begin.

        Args:
            setup: `method` and `continued` decide the kind; a copy is read from `continued`.
            model: the policy; a copy of its adapter is put beside it.
        """
        if setup.method == "full":
            return cls("recorded")
        if setup.continued is None:
            return cls("disabled")
        trained = [p for p in model.parameters() if p.requires_grad]
        names = active_names(model)
        load_adapter(model, setup.continued, NAME)
        set_adapters(model, names)
        for parameter in trained:  # whatever was loaded, what is trained does not change
            parameter.requires_grad_(True)
        return cls("copy")

    def __str__(self) -> str:
        return {
            "disabled": "the base, adapters disabled",
            "copy": "a frozen copy of the adapter",
            "recorded": "log-probabilities recorded before the first step",
        }[self.kind]

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """The model as the reference inside, as the policy afterwards."""
        if self.kind == "disabled":
            with disable_adapters(model):
                yield
        elif self.kind == "copy":
            names = active_names(model)
            activate(model, [NAME])
            try:
                yield
            finally:
                activate(model, names)
        else:
            raise ValueError("a recorded reference is not in the model any more: it is in the rows")

    def log_probs(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
        """The reference's log-probabilities of a batch's completions, without a gradient.

        Args:
            model: the policy.
            batch: of `branch_batch`; of a recorded reference made by `collating`.
            temperature: logits are divided by it; recorded ones were.

        Returns:
            (N, L) float32, 0 where there is no token.
        """
        if self.kind == "recorded":
            return batch["reference"]
        with torch.no_grad(), self.active(model):
            return completion_log_probs(model, batch, temperature)[0]

    def record(
        self,
        model: nn.Module,
        rows: Sequence[Branched],
        collate: Collate,
        setup: Setup,
        temperature: float = 1.0,
    ) -> Sequence[Any]:
        """The rows, each with its log-probabilities where the reference is a recorded one.

        Args:
            model: the policy before its first step.
            rows: prompts with their completions, of any number each.
            collate: rows -> `branch_batch`.
            setup: its batch size, dtype and device are used.
            temperature: logits are divided by it.

        Returns:
            `Recorded` rows for `collating`; the rows themselves for the other kinds.
        """
        if self.kind != "recorded":
            return rows
        policy = dtype_policy(setup.training.dtype, setup.device)
        found: list[Recorded] = []
        batches = list(batched(range(len(rows)), setup.training.batch_size))
        with modes_kept(model), torch.no_grad(), policy.autocast():
            model.eval()
            for chosen in setup.bar(batches, "batches", "reference"):
                some = [rows[i] for i in chosen]
                batch = to_device(collate(some), setup.device)
                values = completion_log_probs(model, batch, temperature)[0].float().cpu()
                each = [len(row.completions) for row in some]
                found += map(Recorded, some, torch.split(values, each))
        return found

    def collating(self, collate: Collate) -> Collate:
        """`collate` for what `record` returned: the batch has `reference` (N, L) where recorded."""
        if self.kind != "recorded":
            return collate

        def recorded(rows: Sequence[Any]) -> Batch:
            batch = collate([row.row for row in rows])
            size = batch["completions"].shape[1]
            # a row was recorded among others, which may have been longer
            parts = [nn.functional.pad(r.values, (0, size))[:, :size] for r in rows]
            return {**batch, "reference": torch.cat(parts)}

        return recorded


def turn_off_dropout(model: nn.Module) -> int:
    """Set every dropout of a model to 0, its adapters' too; how many were above.

    A policy that drops out differs from its reference before anything is learned, and from itself
    in the next pass: ratios then measure noise.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            module.p, count = 0.0, count + 1
        elif isinstance(rate := getattr(module, "dropout", None), float) and rate > 0:
            module.dropout, count = 0.0, count + 1  # type: ignore[assignment]
    return count
