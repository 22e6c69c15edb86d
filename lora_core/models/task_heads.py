"""What stands on a shared backbone: one small float32 layer for each task.

    sequence    W · pool(states): one label, several labels, or numbers for a whole text
    token       W · states: a label for every token
    span        W · states, two numbers a token: how well it begins and how well it ends the answer

Pooling takes the first token or the pooler's output of an encoder, the last real token of a
decoder, or the mean over real tokens. Heads are new weights, so they are trained whole and in
float32 whatever the backbone is held in, as adapters are. The losses are those of
encoder_losses.py.

Ref: Devlin et al. 2019, arXiv:1810.04805, section 4; Radford et al. 2018, "Improving language
understanding by generative pre-training", section 3.2 (the last token of a decoder).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_core.models.encoder_losses import IGNORED, class_loss, sequence_loss, span_loss

KINDS = ("sequence", "token", "span")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
POOLINGS = ("pooled", "first", "last", "mean")
LABEL_NAMES = {
    "sequence": ("labels",),
    "token": ("labels",),
    "span": ("start_positions", "end_positions"),
}


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What a head is, as heads.json has it."""

    kind: str
    """sequence, token or span"""
    labels: tuple[str, ...] = ()
    """names by number; none for numbers and spans"""
    problem: str = "single_label_classification"
    """of a sequence, as transformers names them: see PROBLEMS"""
    pooling: str | None = None
    """of a sequence: pooled, first, last or mean; None: what is usual for the backbone"""
    dropout: float = 0.0
    """of what the head reads, in training"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for name, known in (("kind", KINDS), ("problem", PROBLEMS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"a head's {name} must be one of {', '.join(known)}; "
                    f"got {getattr(self, name)!r}"
                )
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ValueError(
                f"a head's pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}"
            )
        if self.pooling is not None and self.kind != "sequence":
            raise ValueError(f"pooling is a sequence head's; got a {self.kind} head")
        if self.kind != "sequence" and self.problem != PROBLEMS[0]:
            raise ValueError(f"{self.problem} is for sequences; got a {self.kind} head")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"a head's dropout must be in [0, 1); got {self.dropout}")
        if len(set(self.labels)) != len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise ValueError(f"a head's labels hold {twice!r} twice")
        if self.named and not self.labels:
            raise ValueError(f"a {self.kind} head needs labels")
        if self.labels and not self.named:
            raise ValueError(f"a head for {self._told} has no labels; got {self.labels[0]!r}, …")

    @property
    def named(self) -> bool:
        """Whether outputs are labels."""
        return self.kind == "token" or (self.kind == "sequence" and self.problem != "regression")

    @property
    def _told(self) -> str:
        return "spans" if self.kind == "span" else "numbers"

    @property
    def outputs(self) -> int:
        """Numbers per text or token."""
        return len(self.labels) if self.named else {"span": 2}.get(self.kind, 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return dataclasses.asdict(self) | {"labels": list(self.labels)}


class Head(nn.Module):
    """One task's layer.

    Args:
        shape: what it is.
        size: C, the backbone's hidden size.

    Attributes:
        shape: likewise; its pooling is known once the head is in a `MultiHead`.
        out: the layer, (outputs, C) float32; starts normal with deviation 0.02, biases 0.
    """

    def __init__(self, shape: HeadShape, size: int) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = nn.Dropout(shape.dropout)
        self.out = nn.Linear(size, shape.outputs, dtype=torch.float32)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def check(self, task: str, size: int, poolings: Sequence[str]) -> None:
        """Settle the pooling, and refuse a backbone that does not fit.

        Args:
            task: for messages.
            size: the backbone's hidden size.
            poolings: what it allows, the usual first.

        Raises:
            ValueError: another size, or a pooling that the backbone cannot give.
        """
        if self.out.in_features != size:
            raise ValueError(
                f"the head {task!r} reads states of {self.out.in_features}; "
                f"the backbone's are {size}"
            )
        if self.shape.kind != "sequence":
            return
        pooling = poolings[0] if self.shape.pooling is None else self.shape.pooling
        if pooling not in poolings:
            raise ValueError(
                f"the head {task!r} cannot pool by {pooling!r} here; this backbone allows "
                f"{', '.join(poolings)}"
            )
        self.shape = dataclasses.replace(self.shape, pooling=pooling)

    def forward(
        self, states: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None
    ) -> Tensor:
        """Logits, float32.

        Args:
            states: (B, T, C), any floating dtype.
            mask: (B, T), nonzero for real tokens; None: all are.
            pooled: (B, C), the pooler's output.

        Returns:
            (B, outputs) of a sequence; (B, T, outputs) else, a span's lowest where padded.
        """
        x = states
        if self.shape.kind == "sequence":
            x = self.pool(states, mask, pooled)
        logits: Tensor = self.out(self.dropout(x.to(self.out.weight.dtype)))
        if self.shape.kind == "span" and mask is not None:
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill((mask == 0)[..., None], lowest)
        return logits

    def pool(self, states: Tensor, mask: Tensor | None, pooled: Tensor | None) -> Tensor:
        """(B, C): one state for each text."""
        how = self.shape.pooling
        if how == "pooled":
            assert pooled is not None  # check() has seen to it
            return pooled
        if how == "first":
            return states[:, 0]
        if mask is None:
            return states[:, -1] if how == "last" else states.float().mean(dim=1)
        real = (mask != 0).to(states.device)
        if how == "last":  # wherever the padding is
            columns = torch.arange(states.shape[1], device=states.device)
            last = (real * columns).amax(dim=1)  # (B,)
            return states[torch.arange(len(states), device=states.device), last]
        weights = real[..., None].float()
        return (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def loss(
        self, logits: Tensor, labels: Mapping[str, Tensor], normalizer: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and how much of the batch is graded.

        Args:
            logits: of `forward`.
            labels: `labels`, or for a span `start_positions` and `end_positions`.
            normalizer: what the sum is divided by; None: the count.

        Returns:
            (a scalar, an int64 scalar): texts of a sequence and of spans, tokens of a token head.

        Raises:
            ValueError: labels of another kind of task, or shapes that do not fit.
        """
        wanted = LABEL_NAMES[self.shape.kind]
        if set(labels) != set(wanted):
            raise ValueError(
                f"a {self.shape.kind} head takes {' and '.join(wanted)}; got {', '.join(labels)}"
            )
        if self.shape.kind == "span":
            starts, ends = (labels[name].reshape(-1) for name in wanted)
            return _spans(logits, starts, ends, normalizer)
        given = labels["labels"]
        if self.shape.kind == "token":
            return class_loss(logits, given, normalizer), (given != IGNORED).sum()
        loss = sequence_loss(logits, given, self.shape.problem, normalizer)
        return loss, torch.tensor(len(logits), device=logits.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices, not changes of dtype."""

        def keep_dtype(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype != t.dtype else out

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # torch's


def _spans(
    logits: Tensor, starts: Tensor, ends: Tensor, normalizer: float | None
) -> tuple[Tensor, Tensor]:
    """Half the sum of both ends' cross-entropies over graded texts, and their number."""
    tokens = logits.shape[1]
    if starts.shape != ends.shape:
        raise ValueError(
            f"start_positions and end_positions must be alike; got {tuple(starts.shape)} and "
            f"{tuple(ends.shape)}"
        )
    graded = (starts < tokens) & (ends < tokens)
    begin, end = logits.unbind(-1)  # (B, T) each
    halves = span_loss(begin, starts.masked_fill(~graded, tokens), normalizer) + span_loss(
        end, ends.masked_fill(~graded, tokens), normalizer
    )
    return halves / 2, graded.sum()
