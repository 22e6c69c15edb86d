"""One backbone and several heads: classification, token and span tasks on shared weights.

    ids ──▶ backbone (encoder or decoder, adapted) ──▶ states (B, T, C) ──▶ the task's head

A batch is of one task, named in the call; only that task's head is computed. The backbone is this
library's own model, kept whole under `backbone`: its modules have their own names there, so that an
adapter attached to `model.backbone` by "all-linear" is the base's adapter, saved under the base's
keys, and the heads (task_heads.py) are not in its reach. What no task uses (the output head, and a
pooler that no head reads) is named by `unused`, to be left out of training: it would get no
gradient.

A decoder's attention is causal: the state of a token knows what stands before it and nothing of
what follows. A sequence head therefore reads the last token, the only one that has seen the whole
text. A token head labels each word by its left context and itself, which is weaker than an
encoder's both sides where the right side decides ("Paris Hilton" against "Paris, France"). A span
head needs the question before the context (the rows of data/task_rows.py have it so): the beginning
is scored before its continuation is seen, the end with all of the answer in view.

Against transformers: `AutoModelForSequenceClassification` and its siblings are a class for each
family and kind with one head each; several tasks then need a model of one's own. Here padding never
changes a span's loss: transformers lets padded tokens take part in the softmax over positions.

Ref: Caruana 1997, "Multitask Learning", section 2 (shared layers, a head for each task);
Liu et al. 2019, arXiv:1901.11504, figure 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.models.decoder import CausalLM
from lora_core.models.encoder import Encoder, EncoderModel
from lora_core.models.task_heads import Head
from lora_core.targets import nearest


@dataclass
class HeadOutput:
    """What a forward returns."""

    logits: Tensor
    """float32: (B, labels) of a sequence, (B, T, labels) of tokens, (B, T, 2) of spans"""
    loss: Tensor | None = None
    """sum over what is graded / normalizer, a scalar; None without labels"""
    count: Tensor | None = None
    """what is graded: texts, tokens or questions, an int64 scalar; None without labels"""


class MultiHead(nn.Module):
    """A backbone and its heads.

    Args:
        backbone: an encoder (with or without a head of its own) or a decoder of this library.
        heads: by task.

    Raises:
        TypeError: another backbone.
        ValueError: no head, a name that cannot be one, or a head that does not fit the backbone.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, Head]) -> None:
        super().__init__()
        if not isinstance(backbone, EncoderModel | CausalLM):
            raise TypeError(
                "the backbone must be one of this library's encoders or decoders; got "
                f"{type(backbone).__name__}"
            )
        if not heads:
            raise ValueError("MultiHead needs at least one head")
        for name, head in heads.items():
            check_task_name(name)
            head.check(name, backbone.config.hidden_size, poolings(backbone))
        self.backbone = backbone
        self.heads = nn.ModuleDict(dict(heads))
        self.heads.to(backbone.device)

    def forward(
        self,
        task: str,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        normalizer: float | None = None,
    ) -> HeadOutput:
        """Logits of one task's head, and the loss if there are labels.

        Args:
            task: the head's name.
            input_ids: (B, T) token ids.
            attention_mask: (B, T), nonzero for real tokens; None: all are.
            token_type_ids: (B, T), which sentence each token is of; for encoders.
            labels: of a sequence (B,) integers, (B, labels) of several, (B,) numbers; of tokens
                (B, T) integers, -100 where not graded.
            start_positions: (B,) integers, of a span: the answer's first token; T and beyond: the
                row is not graded.
            end_positions: (B,) integers, its last token.
            normalizer: what the summed loss is divided by; None: `count`.

        Returns:
            HeadOutput.

        Raises:
            ValueError: an unknown task, labels of another kind of task, or shapes that do not fit.
        """
        head = self.head(task)
        states, pooled = self.states(input_ids, attention_mask, token_type_ids)
        with torch.autocast(states.device.type, enabled=False):
            logits = head(states, attention_mask, pooled)
            given = {"labels": labels, "start_positions": start_positions}
            given |= {"end_positions": end_positions}
            named = {name: value for name, value in given.items() if value is not None}
            if not named:
                return HeadOutput(logits)
            loss, count = head.loss(logits, named, normalizer)
        return HeadOutput(logits, loss, count)

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The backbone's last states (B, T, C), and the pooler's output (B, C) where there is one.

        No logits over the vocabulary are computed.
        """
        backbone = self.backbone
        if isinstance(backbone, CausalLM):
            if token_type_ids is not None:
                raise ValueError("a decoder takes no token_type_ids: leave them out")
            embedded = backbone.model.embed_tokens(input_ids)
            return backbone.model(embedded, attention_mask)[-1], None
        assert isinstance(backbone, EncoderModel)
        trunk: nn.Module = backbone  # through any host around the trunk
        if not isinstance(backbone, Encoder):
            trunk = backbone.get_submodule(backbone.config.family.prefix)
        out = trunk(input_ids, attention_mask, token_type_ids=token_type_ids)
        return out.last_hidden_state, out.pooler_output

    def head(self, task: str) -> Head:
        """A task's head.

        Raises:
            ValueError: there is none of this name.
        """
        if task not in self.heads:
            raise ValueError(f"no head {task!r}; {nearest(task, list(self.heads))}")
        return cast(Head, self.heads[task])

    def task_heads(self) -> dict[str, Head]:
        """Task -> head, in the order they were given."""
        return {name: cast(Head, head) for name, head in self.heads.items()}

    def unused(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone, adapters' too, that no head's loss depends on."""
        used: set[nn.Parameter] = set()
        if isinstance(self.backbone, CausalLM):
            spare: list[nn.Module | None] = [self.backbone.lm_head]
            used = set(self.backbone.model.parameters())  # a tied head is the embedding
        else:
            backbone = self.backbone
            pooler = backbone.trunk.pooler
            read = any(head.shape.pooling == "pooled" for head in self.task_heads().values())
            spare = [backbone.get_output_head(), None if read else pooler]
            skipped = {p for part in spare if part is not None for p in part.parameters()}
            tied = set(backbone.get_input_embeddings().parameters())
            used = (set(backbone.trunk.parameters()) - skipped) | tied
        for part in spare:
            if part is not None:
                yield from (p for p in part.parameters() if p not in used)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Where the backbone's embedding lies."""
        return cast(Any, self.backbone).device

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return cast(Any, self.backbone).get_input_embeddings()


def poolings(backbone: nn.Module) -> tuple[str, ...]:
    """How a sequence head may read a backbone's states; the usual way first.

    Args:
        backbone: an encoder or a decoder.

    Returns:
        For an encoder "pooled" (where it has a pooler), "first" and "mean"; for a decoder "last"
        and "mean".
    """
    if isinstance(backbone, CausalLM):
        return ("last", "mean")
    own = ("pooled",) if cast(EncoderModel, backbone).trunk.pooler is not None else ()
    return (*own, "first", "mean")


def check_task_name(name: str) -> None:
    """Refuse a task's name that could not be a key of the heads; ValueError says why."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name a task: it must be text without dots, and none of "
            "nn.ModuleDict's own names ('keys', 'type', 'train', …)"
        )
